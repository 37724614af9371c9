"""Does decoding keep up? Pictures a second on a core, by format and size, beside what a plan eats.

    python benchmarks/decode.py [--quick] [--side 384]

First, images.load_image, all of it: decoded, turned, squashed to 384 pixels; of it the decoding.
JPEG and WEBP of quality 90, PNG; photographs of benchmarks/photos.py; medians over pictures, of
processor time, which other work on the machine hardly changes.
Second, JPEGs decoded at a reduced scale (Pillow's draft: libjpeg leaves frequencies out, and gives
1/2, 1/4 or 1/8 of the size, the least that is not below 384): how much faster, and how far the
pixels are then from the definition, after the same squash. Third, pictures a second that eight
H100s take, by tools.plan, and how many cores of this kind that is for JPEGs of 640 × 480.
"""
import argparse
import io
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
from photos import encoded, photo  # noqa: E402
from PIL import Image  # noqa: E402

from pivot import images  # noqa: E402
from tools import meta, plan  # noqa: E402

SIZES = [(320, 240), (640, 480), (1024, 768), (2048, 1536)]
PLANS = [("pretrain", "qwen2.5-0.5b"), ("pretrain", "qwen2.5-1.5b"), ("pretrain", "qwen2.5-7b"),
         ("train_dpo", "qwen2.5-0.5b"), ("train_dpo", "qwen2.5-1.5b")]


def seconds_of(work, raws, rounds):
    """The median processor time of work(raw) over pictures and rounds."""
    times = []
    for raw in raws * rounds:
        began = time.process_time()
        work(raw)
        times.append(time.process_time() - began)
    return statistics.median(times)


def decoded(raw):
    with Image.open(io.BytesIO(raw)) as image:
        image.load()


def drafted(raw, side):
    """load_image of an RGB JPEG, but decoded at a reduced scale: (pixels, the size decoded at)."""
    with Image.open(io.BytesIO(raw)) as image:
        image.draft("RGB", (side, side))
        image.load()
        return images.planes(image.convert("RGB"), side), image.size


def formats(args):
    print(f"{'on one core':<22}{'KB':>8}{'a second':>10}{'ms':>8}{'decoding alone':>16}")
    for kind in ("JPEG", "PNG", "WEBP"):
        for size in args.sizes:
            raws = [encoded(photo(size, i), kind) for i in range(args.pictures)]
            whole = seconds_of(lambda raw: images.load_image(raw, args.side, ""), raws, args.rounds)
            alone = seconds_of(decoded, raws, args.rounds)
            print(f"{kind:<6}{size[0]:>5} × {size[1]:<8}{len(raws[0]) / 1000:>8.0f}"
                  f"{1 / whole:>10.0f}{1000 * whole:>8.1f}{1000 * alone:>13.1f} ms")


def reduced(args):
    print(f"\n{'JPEG at a reduced scale':<26}{'read at':>12}{'times as fast':>15}"
          f"{'mean |Δ|':>10}{'99.9 %':>8}{'most':>6}   (of 255)")
    for size in args.sizes:
        raws = [encoded(photo(size, i), "JPEG") for i in range(args.pictures)]
        apart, at = [], None
        for raw in raws:
            fast, at = drafted(raw, args.side)
            apart.append(np.abs(fast.astype(int) - images.load_image(raw, args.side, "")))
        apart = np.stack(apart)
        times = [seconds_of(work, raws, args.rounds) for work in (
            lambda raw: images.load_image(raw, args.side, ""), lambda raw: drafted(raw, args.side))]
        print(f"{size[0]:>5} × {size[1]:<18}{at[0]:>6} × {at[1]:<5}{times[0] / times[1]:>13.1f}"
              f"{apart.mean():>10.2f}{np.quantile(apart, 0.999):>8.0f}{apart.max():>6}")


def eaten(args):
    raws = [encoded(photo((640, 480), i), "JPEG") for i in range(args.pictures)]
    core = 1 / seconds_of(lambda raw: images.load_image(raw, args.side, ""), raws, args.rounds)
    print(f"\n8 × H100, computed{'':<24}{'pictures a second':>20}{'cores':>8}")
    for name, llm in PLANS:
        stage, flags, spec = plan.stage_and_args([name, "--encoder", "siglip2-so400m", "--llm", llm,
                                                  "--run-dir", "none", "--data", "none", "8xh100"])
        model = meta.empty_mllm(flags.encoder, flags.llm, flags.image_size, flags.dtype)
        for phase in plan.phases_of(stage, flags):
            p = plan.phase_plan(flags, model, phase, spec)
            rate = flags.global_batch / p["seconds"]
            print(f"{name + ', ' + p['name'] + ', ' + llm:<42}{rate:>20.0f}{rate / core:>8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=384, help="the encoder's input size")
    parser.add_argument("--quick", action="store_true", help="few pictures: does it run?")
    args = parser.parse_args()
    args.sizes = SIZES[:3] if args.quick else SIZES
    args.pictures, args.rounds = (2, 1) if args.quick else (4, 5)
    print(f"squash to {args.side} pixels; load {os.getloadavg()[0]:.1f}")
    formats(args)
    reduced(args)
    eaten(args)


if __name__ == "__main__":
    main()
