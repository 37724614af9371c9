"""How the cost grows: a DPO step against image tokens, answer length and batch; indexing of data.

    python benchmarks/scaling.py [--quick]

Around shape A with a vocabulary of 2,000, one thing is varied at a time. The whole sweep is gone
through --rounds times and the best step of all rounds counts. Then data.Samples reads preference
files of growing length. The exponent is the slope of log cost over log size: 1 is linear. Below 1
is fixed cost (the optimizer does not care for the batch); attention, quadratic, lifts it above.
"""
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import common as c
import data
import numpy as np
import torch
from PIL import Image
from turns import progress

BASE = c.SHAPES["A"]._replace(vocab=2_000)
SWEEPS = {"image_tokens": (64, 144, 256, 400, 576, 784, 1024),
          "answer": (16, 32, 64, 128, 256, 512), "batch": (1, 2, 4, 8)}
RECORDS = (1_000, 4_000, 16_000, 64_000)
TINY = c.QUICK["A"]
TINY_SWEEPS = {"image_tokens": (4, 16, 36), "answer": (4, 8, 16), "batch": (1, 2, 4)}


def step_seconds(shape, steps):
    """Seconds of the best of so many DPO steps, after one to warm up."""
    ours = c.Ours(c.build(shape)[0])
    batch, = c.batches(shape, c.pairs(shape, shape.batch, ours.model.image_token_id), "pair")
    ref, took = ours.reference(batch), []
    for _ in range(1 + steps):
        began = time.perf_counter()
        ours.dpo_step(batch, ref)
        took.append(time.perf_counter() - began)
    return min(took[1:])


def index_seconds(records, folder, tokenizer):
    """Seconds in which data.Samples reads, checks and tokenises so many preference pairs."""
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({
        "image": "0.png", "question": f"<image>\nhow many circles are left of number {i} ?",
        "chosen": f"there are {i}", "rejected": f"there are {i + 1}"}) + "\n"
        for i in range(records)))
    began = time.perf_counter()
    data.Samples("pairs", [(path, str(folder))], tokenizer,
                 SimpleNamespace(image_size=48, num_tokens=36), 2048, verbose=False)
    return time.perf_counter() - began


def exponent(sizes, seconds):
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of each size in each round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, sweeps = (TINY, TINY_SWEEPS) if args.quick else (BASE, SWEEPS)
    records = tuple(n // 20 for n in RECORDS) if args.quick else RECORDS
    best = {(name, size): float("inf") for name, sizes in sweeps.items() for size in sizes}
    _, tokenizer = c.build(TINY)
    with progress(total=args.rounds * (len(best) + len(records)), desc="sizes") as bar:
        for _ in range(args.rounds):
            for name, size in best:
                seconds = step_seconds(base._replace(**{name: size}), args.steps)
                best[name, size] = min(best[name, size], seconds)
                bar.update()
        for size in records:
            with tempfile.TemporaryDirectory() as folder:
                best["records", size] = min(index_seconds(size, Path(folder), tokenizer)
                                            for _ in range(args.rounds))
                bar.update(args.rounds)
    result = {}
    print()
    for name in (*sweeps, "records"):
        sizes = [s for n, s in best if n == name]
        seconds = [best[name, s] for s in sizes]
        result[name] = {"sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
        c.table([name, "seconds", "ms for one"], [
            [s, f"{t:.3f}", f"{1000 * t / s:.3f}"] for s, t in zip(sizes, seconds)])
        print(f"{name}: exponent {result[name]['exponent']:.2f}, the larger half "
              f"{exponent(sizes[-len(sizes) // 2:], seconds[-len(sizes) // 2:]):.2f}\n")
    c.write("scaling", args, {"base": base._asdict(), "sweeps": result})


if __name__ == "__main__":
    main()
