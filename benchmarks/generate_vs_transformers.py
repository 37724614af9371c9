"""Answering benchmarks: MLLM.generate at batch 16 beside transformers' generate, one question at a
time, as evaluation scripts call it.

    python benchmarks/generate_vs_transformers.py [--shapes deep …] [--quick]

Both sides open the same folder of random weights with Qwen2.5's vocabulary. Every prompt has 300
tokens, 256 of them the image; 16 new tokens are forced on both sides; encoding and prefill are
included. The sides alternate, round by round, in one process; the first round warms up. Same tokens
on both sides is checked, not assumed.

Batching shortens the decoding alone: the prefill is the same sum of products for 16 questions at
once or one by one. So the table has a last column, what a decoding that costs nothing would reach
here: their time by our prefill's. Three shapes, as the balance of the two depends on the model:
`deep` (SigLIP of 6 × 384, Qwen2 of 8 × 512), `shallow` (4 × 384, 2 × 1024) and `light` (4 × 384,
2 × 640), where nearly all parameters are those of the vocabulary.
"""
import statistics
import tempfile
import time
from pathlib import Path

import common as c
from pivot import model_io
import torch
from turns import progress

NEW, VOCAB = 16, 151_936
DEEP = c.Shape(image_tokens=256, answer=NEW, vocab=VOCAB, batch=16, prompt=44)
SHAPES = {"deep": DEEP, "shallow": DEEP._replace(vision=(4, 384), text=(2, 1024)),
          "light": DEEP._replace(vision=(4, 384), text=(2, 640))}
QUICK = c.Shape(image_tokens=16, answer=NEW, vocab=1_000, batch=4, prompt=8, vision=(2, 64),
                text=(2, 64))


@torch.inference_mode()
def measure(shape, rounds, label):
    """→ dict: parameters, seconds of every timed round and side, ratios, share of same tokens."""
    from transformers import AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as folder:
        c.save(shape, Path(folder, "final"))
        ours, _ = model_io.load_mllm(Path(folder, "final"))
        theirs = AutoModelForImageTextToText.from_pretrained(Path(folder, "final"))
    ours, theirs = ours.eval(), theirs.eval()
    theirs.generation_config.eos_token_id = None            # NEW tokens, whatever they are
    tokens = shape.image_tokens + shape.prompt
    samples = c.pairs(shape, shape.batch, ours.image_token_id)
    ids = torch.stack([torch.from_numpy(s["ids"][:tokens]) for s in samples])          # (B, 300)
    pixels = torch.stack([torch.from_numpy(s["pixels"]) for s in samples])             # uint8
    mask = torch.ones_like(ids)
    values = (pixels / 255 - 0.5) / 0.5                          # as their processor would give it

    def one_by_one():
        return [theirs.generate(input_ids=ids[i:i + 1], pixel_values=values[i:i + 1],
                                attention_mask=mask[i:i + 1], max_new_tokens=NEW,
                                min_new_tokens=NEW, do_sample=False)[0, tokens:].tolist()
                for i in range(shape.batch)]

    sides = {"ours": lambda: ours.generate(pixels, ids, mask, NEW, stop_ids={-1}),
             "our prefill": lambda: ours.generate(pixels, ids, mask, 1, stop_ids={-1}),
             "transformers": one_by_one}
    took, said = {name: [] for name in sides}, {}
    for turn in progress(range(1 + rounds), desc=label):
        for name in list(sides)[::1 if turn % 2 else -1]:
            began = time.perf_counter()
            said[name] = sides[name]()
            took[name].append(time.perf_counter() - began)
    took = {name: seconds[1:] for name, seconds in took.items()}
    assert all(len(row) == NEW for side in ("ours", "transformers") for row in said[side])
    same = sum(a == b for x, y in zip(said["ours"], said["transformers"]) for a, b in zip(x, y))
    ratios = [b / a for a, b in zip(took["ours"], took["transformers"])]
    bounds = [b / a for a, b in zip(took["our prefill"], took["transformers"])]
    return {"shape": shape._asdict(), "parameters": sum(p.numel() for p in ours.parameters()),
            "prompt_tokens": tokens, "new_tokens": NEW, "seconds": took,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "bound": statistics.median(bounds), "same_tokens": same / (shape.batch * NEW)}


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {name: measure(QUICK if args.quick else SHAPES[name], args.rounds, name)
               for name in args.shapes}

    rows = []
    for name, r in results.items():
        rate = {side: r["shape"]["batch"] / statistics.median(s) for side, s in r["seconds"].items()}
        rows.append([name, f"{r['parameters'] / 1e6:.0f}M", f"{rate['transformers']:.2f}",
                     f"{rate['ours']:.2f}", "{median:.2f} ({min:.2f}–{max:.2f})".format(**r["ratio"]),
                     f"{100 * r['same_tokens']:.1f} %", f"{r['bound']:.2f}"])
    print()
    c.table(["shape", "parameters", "their questions/s", "ours", "we are × as fast", "same tokens",
             "free decoding"], rows)
    c.write("generate_vs_transformers", args, results)


if __name__ == "__main__":
    main()
