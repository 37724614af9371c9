"""Two more encoders for the controlled study, of toy-vit's shape but pretrained another way.

    python -m study.models toy-vit-supervised --out runs/study/weights     # class labels
    python -m study.models toy-vit-masked --out runs/study/weights         # filling masked patches

The paper puts PIVOT on encoders that never saw text: ImageNet-supervised and MAE (its section 6).
`supervised`: which of the twelve classes is the large thing, from the mean over patches. `masked`:
three of five patches are hidden, their pixels guessed (after SimMIM: a learned token in the place
of hidden patches, a linear read-out, L1). Neither sees a question or a word; toy-vit, by contrast,
was taught what is in each patch. The same seed gives the same weights.
"""
import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pivot import files
from toy.models import MODELS, train
from toy.scenes import CELL, CLASSES, SIZE, Scene

BATCH, RATE, STEPS, HIDDEN = 48, 1e-3, 2400, 0.6      # toy-vit's, and MAE-like masking
GRID = SIZE // CELL


def new_vit():
    """toy-vit's geometry, untrained."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    width, layers, heads, inner, *_ = MODELS["toy-vit"]
    return SiglipVisionModel(SiglipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=SIZE, patch_size=CELL, vision_use_head=False))


def pixels_of(scenes):
    """Drawn scenes → fp32 (B, 3, SIZE, SIZE), from -1 to 1."""
    pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    return pixels / 127.5 - 1


def supervised(rng):
    """Model with a linear classifier, and the loss of a fresh batch of labelled pictures."""
    both = nn.ModuleList([new_vit(), nn.Linear(MODELS["toy-vit"][0], len(CLASSES))])

    def loss_of(_):
        labels = [rng.randrange(len(CLASSES)) for _ in range(BATCH)]
        pixels = pixels_of([Scene(rng, kind="shapes", main=CLASSES[k]).draw() for k in labels])
        logits = both[1](both[0](pixels).last_hidden_state.mean(1))          # (B, classes)
        return nn.functional.cross_entropy(logits, torch.tensor(labels))
    return both, loss_of


def masked(rng):
    """Model with a mask token and a linear read-out of pixels, and the loss of a fresh batch."""
    width = MODELS["toy-vit"][0]
    both = nn.ModuleList([new_vit(), nn.Linear(width, 3 * CELL * CELL),
                          nn.ParameterList([nn.Parameter(torch.zeros(width))])])
    hide = torch.zeros(BATCH, GRID * GRID, 1, dtype=torch.bool)

    def put_token(module, inputs, out):        # behind the patch embedding, before the positions
        token = both[2][0][None, :, None, None]
        return torch.where(hide.view(BATCH, 1, GRID, GRID), token, out)
    both[0].get_submodule("embeddings.patch_embedding").register_forward_hook(put_token)

    def loss_of(_):
        pixels = pixels_of([Scene(rng).draw() for _ in range(BATCH)])
        for row in hide:
            row[:] = False
            row[rng.sample(range(GRID * GRID), round(HIDDEN * GRID * GRID))] = True
        patches = nn.functional.unfold(pixels, CELL, stride=CELL).transpose(1, 2)  # (B, N, 3·64)
        guess = both[1](both[0](pixels).last_hidden_state)
        return ((guess - patches).abs() * hide).sum() / hide.sum() / patches.shape[2]
    return both, loss_of


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["toy-vit-supervised", "toy-vit-masked"])
    parser.add_argument("--out", type=Path, required=True,
                        help="folder to write the model folder in; one there is replaced")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}, as toy-vit")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default 0)")
    args = parser.parse_args()
    if args.steps < 1:
        raise SystemExit("error: --steps must be at least 1")
    torch.manual_seed(args.seed)
    make = supervised if args.name.endswith("supervised") else masked
    both, loss_of = make(random.Random(f"{args.seed}/{args.name}"))
    train(args.name, both, args.steps, RATE, loss_of)
    from transformers import SiglipImageProcessor
    with files.new_folder(args.out / args.name) as aside:
        both[0].half().save_pretrained(aside)
        SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3,
                             image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(aside)


if __name__ == "__main__":
    main()
