"""Pictures and masks on disk → arrays, the same everywhere: in training, benchmarks and probes."""
import io

import numpy as np
from PIL import Image, PngImagePlugin

from pivot.records import BadRecord

MAX_PIXELS = 50_000_000     # a larger image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None     # our own bound, above, is checked first
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26   # bytes of a profile or text; some have over Pillow's 1 MB
TURNED = {       # EXIF's orientation → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")         # not LAB, whose A is a colour
SIDEWAYS = [TURNED[orientation] for orientation in (5, 6, 7, 8)]     # these swap width and height


def planes(image, size):
    """RGB → uint8 (3, size, size), squashed bicubically; None: as it is; two sizes: both, flat."""
    if isinstance(size, tuple):                          # one model of two encoders
        return np.concatenate([planes(image, s).ravel() for s in size])
    image = image.resize((size, size), Image.Resampling.BICUBIC) if size else image
    return np.asarray(image).transpose(2, 0, 1).copy()


def turn_of(image):
    """How EXIF asks for an open picture to be turned; None where it asks for nothing. Broken EXIF,
    which is published, spoils no picture (ImageOps.exif_transpose would write it back)."""
    try:
        return TURNED.get(image.getexif().get(0x0112))
    except Exception:
        return None


def load_image(source, size, where):
    """A path or bytes → uint8 pixels as `planes` gives them; raises BadRecord.
    EXIF rotation is applied, 16-bit grey scaled to 8, transparency laid on white, the first frame
    of an animation taken: what a person sees. HF's processors apply the same bicubic squash.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(f"{where}: image of {image.width} × {image.height} pixels, over "
                                f"the bound of {MAX_PIXELS // 10 ** 6} million")
            image.load()                                         # broken pixels raise here
            turn = turn_of(image)
            image = image if turn is None else image.transpose(turn)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.mode in TRANSPARENT or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return planes(image.convert("RGB"), size)
    except BadRecord:
        raise
    except Exception as e:   # Pillow's decoders raise nearly anything on broken files
        name = "embedded image" if isinstance(source, bytes) else f"image {source}"
        raise BadRecord(f"{where}: {name} cannot be read ({type(e).__name__}: {e})")


def read_mask(mask, image, where):
    """The labels of a picture's mask, as load_image shows the picture: (H, W), or (H, W, C) where
    the mask is in colours. raises BadRecord.

    mask, image: paths. Where EXIF turns the picture, its mask is turned with it: masks are drawn on
    the pixels as stored, or on the upright picture, which then shows in the mask's own size.
    """
    with Image.open(image) as picture:
        stored, turn = picture.size, turn_of(picture)
    upright = stored[::-1] if turn in SIDEWAYS else stored
    try:
        with Image.open(mask) as file:               # its size is known before it is decoded
            size = file.size
            if size == stored:
                labels = np.asarray(file if turn is None else file.transpose(turn))
            elif size == upright:
                labels = np.asarray(file)
            else:
                labels = None
    except Exception as e:
        raise BadRecord(f"{where}: mask {mask} cannot be read ({type(e).__name__}: {e})")
    if labels is None:
        raise BadRecord(f"{where}: mask {mask} has {size[0]} × {size[1]} pixels, its image "
                        f"{upright[0]} × {upright[1]}")
    return labels
