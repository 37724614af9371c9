"""Photographs for the benchmarks of decoding: two of scikit-learn's, cut, mirrored and laid side by
side up to any size, so that every part has a photograph's detail. No two are alike."""
import io

import numpy as np
from PIL import Image


def photo(size, seed):
    """An RGB picture of (width, height) pixels, a function of the seed."""
    from sklearn.datasets import load_sample_images
    rng, (width, height) = np.random.default_rng(seed), size
    tiles = [np.asarray(x) for x in load_sample_images().images]           # (427, 640, 3) each
    rows = []
    for _ in range(-(-height // 427)):
        row = []
        for _ in range(-(-width // 640)):
            tile = tiles[rng.integers(2)][:, ::rng.choice([-1, 1])]
            row.append(np.roll(tile, rng.integers(640), axis=1))
        rows.append(np.concatenate(row, axis=1))
    return Image.fromarray(np.ascontiguousarray(np.concatenate(rows)[:height, :width]))


def encoded(image, kind):
    """The bytes of a picture as a file of this kind."""
    out = io.BytesIO()
    image.save(out, kind, **({} if kind == "PNG" else {"quality": 90}))
    return out.getvalue()
