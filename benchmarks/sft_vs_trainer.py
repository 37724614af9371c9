"""Our SFT step beside transformers' Trainer on LlavaForConditionalGeneration.

    python benchmarks/sft_vs_trainer.py [--shapes A B] [--quick]

The same weights, samples, optimizer and threads, fp32, as in dpo_vs_trl.py; the Trainer runs its
own `train()`, a callback takes the time of each step, and making batches is left out on both sides.
One thing differs: we put only the rows that predict an answer through lm_head. Exits with 1 when
the two loss curves differ by more than --tolerance.
"""
import json
import statistics
import sys
import tempfile
from pathlib import Path

import common as c
from pivot import model_io
import torch
from dpo_vs_trl import trainer_arguments
from turns import Side, alternate, fitting_block, ratio, watched


def our_side(turns, folder, shape, num_batches):
    """EPOCHS × num_batches steps of train_sft.py."""
    ours = c.Ours(model_io.load_mllm(folder)[0])
    batches = c.batches(shape, c.pairs(shape, num_batches * shape.batch,
                                       ours.model.image_token_id), "answers")
    for step in range(c.EPOCHS * num_batches):
        turns.begin("step")
        turns.end(ours.sft_step(batches[step % num_batches]))


def trainer_side(turns, folder, shape, num_batches):
    """Trainer.train() on the same rows in the same order."""
    from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
    image_id = json.loads(Path(folder, "config.json").read_text())["image_token_index"]
    samples = c.pairs(shape, num_batches * shape.batch, image_id)

    def collate(examples):
        batch = c.batches(shape, examples, "answers")[0]
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"]),
                "pixel_values": (batch["pixel_values"] / 255 - 0.5) / 0.5}

    with tempfile.TemporaryDirectory() as out:
        trainer = watched(Trainer, turns)(
            model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            train_dataset=samples, data_collator=collate,
            args=TrainingArguments(out, remove_unused_columns=False,
                                   **trainer_arguments(shape, c.EPOCHS * num_batches)))
        trainer.train()


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=sorted(c.SHAPES),
                        help="default A B; with --quick A alone")
    parser.add_argument("--num-batches", type=int, default=4, help="so many, seen three times")
    parser.add_argument("--block", type=int, default=2, help="steps of one side in a row")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    args.shapes = args.shapes or (["A"] if args.quick else ["A", "B"])
    args.block = fitting_block(args.block, c.EPOCHS * args.num_batches)
    rows, result, worst = [], [], 0.0
    for letter in args.shapes:
        shape = (c.QUICK if args.quick else c.SHAPES)[letter]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            c.save(shape, folder)
            common = (folder, shape, args.num_batches)
            sides = [Side("ours", args.threads, our_side, *common),
                     Side("Trainer", args.threads, trainer_side, *common)]
            alternate(sides, args.block, f"{letter}: ours, Trainer")
        ours, trainer = sides
        apart = max(abs(a - b) for a, b in zip(ours.values, trainer.values))
        worst, times = max(worst, apart), ratio(trainer, ours, args.block)
        for side in sides:
            samples_per_s = shape.batch / statistics.median(side.costs(args.block))
            row = [letter, side.name, f"{samples_per_s:.3f}", f"{side.state['peak']:.2f}"]
            row += ["", ""] if side is ours else \
                ["{:.2f} ({:.2f}–{:.2f})".format(*times), f"{apart:.1e}"]
            rows.append(row)
        result.append({"shape": letter, **shape._asdict(), "times_as_fast": times,
                       "losses_apart": apart, **{
                           side.name: {"costs": side.costs(args.block), **side.took,
                                       "memory": side.state, "losses": side.values}
                           for side in sides}})
    print()
    c.table(["shape", "side", "samples/s", "peak GiB", "we are × as fast", "losses apart"], rows,
            left=2)
    c.write("sft_vs_trainer", args, {"measurements": result})
    if worst > args.tolerance:
        sys.exit(f"error: the losses differ by {worst:.1e}, more than {args.tolerance:g}")


if __name__ == "__main__":
    main()
