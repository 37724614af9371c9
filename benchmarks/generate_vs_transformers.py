"""Answering benchmarks: MLLM.generate at batch 16 beside transformers' generate, one question at a
time, as evaluation scripts call it.

    python benchmarks/generate_vs_transformers.py [--quick]

Both sides open the same folder: 118M random parameters (SigLIP of 6 × 384, Qwen2 of 8 × 512, the
vocabulary of Qwen2.5, whose table is two thirds of them). Every prompt has 300 tokens, 256 of them
the image; 16 new tokens are forced on both sides; encoding and prefill are included. The sides
alternate, round by round, in one process; the first round warms up. Same tokens on both sides is
checked, not assumed.
"""
import statistics
import tempfile
import time
from pathlib import Path

import common as c
import model as m
import torch
from turns import progress

NEW = 16
SHAPE = c.Shape(image_tokens=256, answer=NEW, vocab=151_936, batch=16, prompt=44)
QUICK = c.Shape(image_tokens=16, answer=NEW, vocab=1_000, batch=4, prompt=8, vision=(2, 64),
                text=(2, 64))


@torch.inference_mode()
def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else SHAPE
    from transformers import AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as folder:
        c.save(shape, Path(folder, "final"))
        ours, _ = m.load_mllm(Path(folder, "final"))
        theirs = AutoModelForImageTextToText.from_pretrained(Path(folder, "final"))
    ours, theirs = ours.eval(), theirs.eval()
    theirs.generation_config.eos_token_id = None            # NEW tokens, whatever they are
    parameters = sum(p.numel() for p in ours.parameters())

    tokens = shape.image_tokens + shape.prompt
    samples = c.pairs(shape, shape.batch, ours.image_token_id)
    ids = torch.stack([torch.from_numpy(s["ids"][:tokens]) for s in samples])          # (B, 300)
    pixels = torch.stack([torch.from_numpy(s["pixels"]) for s in samples])             # uint8
    mask = torch.ones_like(ids)
    values = (pixels / 255 - 0.5) / 0.5                          # as their processor would give it

    def batched():
        return ours.generate(pixels, ids, mask, NEW, stop_ids={-1})

    def one_by_one():
        return [theirs.generate(input_ids=ids[i:i + 1], pixel_values=values[i:i + 1],
                                attention_mask=mask[i:i + 1], max_new_tokens=NEW,
                                min_new_tokens=NEW, do_sample=False)[0, tokens:].tolist()
                for i in range(shape.batch)]

    sides, took, said = {"ours": batched, "transformers": one_by_one}, {}, {}
    for turn in progress(range(1 + args.rounds), desc="rounds"):
        for name in list(sides)[::1 if turn % 2 else -1]:
            began = time.perf_counter()
            said[name] = sides[name]()
            took.setdefault(name, []).append(time.perf_counter() - began)
    assert all(len(row) == NEW for rows in said.values() for row in rows)
    same = sum(a == b for x, y in zip(said["ours"], said["transformers"]) for a, b in zip(x, y))
    same /= shape.batch * NEW

    took = {name: seconds[1:] for name, seconds in took.items()}
    ratios = [b / a for a, b in zip(took["ours"], took["transformers"])]
    rate = {name: shape.batch / statistics.median(seconds) for name, seconds in took.items()}
    c.table(["", "questions/s", "new tokens/s"],
            [[name, f"{r:.2f}", f"{r * NEW:.1f}"] for name, r in rate.items()])
    print(f"{parameters / 1e6:.0f}M parameters, prompts of {tokens} tokens, {NEW} new ones, batch "
          f"{shape.batch}: {statistics.median(ratios):.2f} times as fast "
          f"({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds); "
          f"{100 * same:.1f} % of the tokens are the same")
    c.write("generate_vs_transformers", args, {
        "shape": shape._asdict(), "parameters": parameters, "prompt_tokens": tokens,
        "new_tokens": NEW, "seconds": took, "questions_per_second": rate,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "same_tokens": same})


if __name__ == "__main__":
    main()
