"""A small world to try everything on: pictures, questions, preferences, probes, tiny models.

    python -m toy data/toy [--seed 0] [--scale 1.0]     # draw the world (about half a minute)
    python -m toy pretrain [--out weights]              # make toy-vit and toy-lm (about an hour)

The first command writes, below data/toy and in the formats the real data have:

    captions.json            LLaVA-Pretrain: one caption an image
    instruct.jsonl           LLaVA instructions, several turns a record, 3 % without an image
    repair.jsonl             the same, other images, to re-pair an encoder with a new LLM
    images/                  the root of the image names in the three files above
    preferences/meta.json    MMPR: one set a kind of mistake; images/ and masks/ beside it
    preferences/heldout.jsonl   pairs of the same kinds on other images, to measure with
    bench/Toy*.tsv           VLMEvalKit: General, Knowledge, OCR (text and charts), Vision
    imagenet/{train,val}/CLASS/*.png     one main object and distractors, for linear probing
    ade20k/{images,annotations}/{training,validation}/*.png      0 = other, 1..5 = the shapes
    align/pairs.jsonl        images and captions, for the alignment score
    world.json               seed, scale, counts, class names

The second writes <out>/toy-vit (SigLIP) and <out>/toy-lm (Qwen2) for transformers to open.
"""
import argparse
import math
import sys
from pathlib import Path

from pivot import files
from toy.world import draw_world


def main(argv):
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    if argv[:1] == ["pretrain"]:
        ap.prog += " pretrain"
        ap.add_argument("--out", type=Path, default=Path("weights"),
                        help="folder to write the model folders in; models there are replaced")
        from toy.models import MODELS, pretrain_lm, pretrain_vit
        ap.add_argument("--models", nargs="+", default=["toy-vit", "toy-lm"], choices=MODELS,
                        help="which to make; the -l ones are one size up, and not committed")
        ap.add_argument("--steps", type=int,
                        help="instead of the table's; fewer make worse models")
        args = ap.parse_args(argv[1:])
        if args.steps is not None and args.steps < 1:
            raise SystemExit(f"error: --steps: {args.steps} must be at least 1")
        for name in args.models:
            make = pretrain_vit if "vit" in name else pretrain_lm
            with files.new_folder(args.out / name) as aside:
                make(aside, name, args.steps, args.seed)
        return
    ap.add_argument("out", type=Path, help="folder to draw, or the word pretrain (see above)")
    ap.add_argument("--scale", type=float, default=1.0,
                    help="multiplies every count; 0.02 is enough for a test")
    ap.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = ap.parse_args(argv)
    if args.out.exists() and not args.overwrite:
        raise SystemExit(f"error: {args.out} is already there; --overwrite replaces it")
    if args.out.exists() and not (args.out / "world.json").exists():
        raise SystemExit(f"error: {args.out} is no world of this script's (it has no world.json): "
                         f"not replaced")
    if not 0 < args.scale < math.inf:
        raise SystemExit(f"error: --scale {args.scale:g} must be above 0")
    try:
        draw_world(args.out, args.seed, args.scale)
    except OSError as e:
        raise SystemExit(f"error: cannot draw {args.out}: {e.strerror} ({e.filename})")


if __name__ == "__main__":
    main(sys.argv[1:])
