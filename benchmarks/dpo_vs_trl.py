"""Our DPO step beside that of TRL's DPOTrainer: same weights, pairs, optimizer, threads.

    python benchmarks/dpo_vs_trl.py [--shapes A B C D] [--compile] [--quick]

Both train a random SigLIP + Qwen2 in fp32 with fused AdamW, a constant rate, no weight decay and
gradients clipped at 1. TRL runs its own `train()`; a callback takes the time of each step, from
after its collator to after its optimizer. Making batches is left out on both sides. Of TRL's
defaults gradient checkpointing and bf16 are off. The reference counts on both sides, over three
epochs: ours is one cached pass, so a third of one for every step. Opponents, one at a time:

  TRL                its default: the reference model runs at every step
  TRL, precomputed   precompute_ref_log_probs; TRL 1.16 refuses it for a dataset with images, so
                     the images come in through the collator
  TRL, answer rows   this, and lm_head on answer rows alone: TRL does so on CUDA but scores all
                     positions on a CPU, so here its device check is answered "yes"

With --compile our blocks are compiled, as train_dpo.py --compile does; what the compiler takes is
left out. Exits with 1 when the two loss curves differ by more than --tolerance.
"""
import statistics
import sys
import tempfile
from pathlib import Path

import common as c
from pivot import model_io, records
import torch
from turns import Side, alternate, fitting_block, ratio, watched

SIDES = {"TRL": (False, False), "TRL, precomputed": (True, False), "TRL, answer rows": (True, True)}


def our_side(turns, folder, shape, num_batches, compiled):
    """The cached reference pass, then EPOCHS × num_batches steps of train_dpo.py."""
    ours = c.Ours(model_io.load_mllm(folder)[0], compiled=compiled)
    batches = c.batches(shape, c.pairs(shape, num_batches * shape.batch,
                                       ours.model.image_token_id), "pair")
    if compiled:
        ours.compile_on(batches[0])
    refs = []
    for batch in batches:
        turns.begin("reference")
        refs.append(ours.reference(batch))
        turns.end()
    for step in range(c.EPOCHS * num_batches):
        turns.begin("step")
        turns.end(ours.dpo_step(batches[step % num_batches], refs[step % num_batches]))


def trl_side(turns, folder, shape, num_batches, precomputed, answer_rows, **options):
    """DPOTrainer.train() on the same pairs, already tokenised, in the same order. options: of
    DPOConfig, other than those below."""
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    if answer_rows:
        utils._use_triton = lambda device: True      # in this module it chooses the rows alone

    class Trainer(watched(DPOTrainer, turns)):
        def _prepare_dataset(self, dataset, *rest):
            return dataset                           # it holds token ids: nothing to tokenise

        def compute_ref_log_probs(self, *inputs):    # called by the precomputation alone
            turns.begin("reference")
            logps = super().compute_ref_log_probs(*inputs)
            turns.end()
            return logps

    processor = AutoProcessor.from_pretrained(folder)
    image_id = processor.tokenizer.convert_tokens_to_ids(records.IMAGE_TOKEN)
    samples = c.pairs(shape, num_batches * shape.batch, image_id)
    pixels = (torch.stack([torch.from_numpy(s["pixels"]) for s in samples]) / 255 - 0.5) / 0.5
    collate_ids = DataCollatorForPreference(pad_token_id=0)

    def collate(examples):
        """TRL's collator, then each image twice, as in its DataCollatorForVisionPreference."""
        images = pixels[[example["index"] for example in examples]]
        return {**collate_ids(examples), "pixel_values": torch.cat([images, images])}

    names = {c.data.PROMPT: "prompt_ids", c.data.ANSWER: "chosen_ids", c.data.OTHER: "rejected_ids"}
    dataset = Dataset.from_list([{"index": s["index"], **{
        name: s["ids"][s["roles"] == role].tolist() for role, name in names.items()}}
        for s in samples])
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=str(folder), train_dataset=dataset, processing_class=processor,
            data_collator=collate, args=DPOConfig(
                out, beta=c.BETA, max_length=None, precompute_ref_log_probs=precomputed,
                remove_unused_columns=False, **{
                    "gradient_checkpointing": False,
                    **trainer_arguments(shape, c.EPOCHS * num_batches), **options}))
        trainer.train()


def trainer_arguments(shape, steps):
    """What every transformers Trainer is told here, so that it does what our loop does."""
    return dict(max_steps=steps, per_device_train_batch_size=shape.batch, learning_rate=c.LR,
                lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, use_cpu=True,
                bf16=False, train_sampling_strategy="sequential", save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True,
                dataloader_pin_memory=False)


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=sorted(c.SHAPES),
                        help="default all; with --quick A alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--num-batches", type=int, default=4, help="so many, seen three times")
    parser.add_argument("--block", type=int, default=2, help="steps of one side in a row")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    args.shapes = args.shapes or (["A"] if args.quick else sorted(c.SHAPES))
    args.block = fitting_block(args.block, c.EPOCHS * args.num_batches)
    rows, result, worst = [], [], 0.0
    for letter in args.shapes:
        shape = (c.QUICK if args.quick else c.SHAPES)[letter]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            c.save(shape, folder)
            for name in args.sides:
                common = (folder, shape, args.num_batches)
                ours = Side("ours, compiled" if args.compile else "ours", args.threads, our_side,
                            *common, args.compile)
                trl = Side(name, args.threads, trl_side, *common, *SIDES[name])
                alternate([ours, trl], args.block, f"{letter}: {ours.name}, {name}")
                apart = max(abs(a - b) for a, b in zip(ours.values, trl.values))
                worst, times = max(worst, apart), ratio(trl, ours, args.block)
                for side in (ours, trl):
                    pairs_per_s = shape.batch / statistics.median(side.costs(args.block))
                    row = [letter, side.name, f"{pairs_per_s:.3f}", f"{side.state['peak']:.2f}"]
                    row += ["", ""] if side is ours else \
                        ["{:.2f} ({:.2f}–{:.2f})".format(*times), f"{apart:.1e}"]
                    rows.append(row)
                result.append({"shape": letter, **shape._asdict(), "opponent": name,
                               "times_as_fast": times, "losses_apart": apart, **{
                                   who: {"costs": side.costs(args.block), **side.took,
                                         "memory": side.state, "losses": side.values}
                                   for who, side in (("ours", ours), ("trl", trl))}})
    print()
    c.table(["shape", "side", "pairs/s", "peak GiB", "we are × as fast", "losses apart"], rows,
            left=2)
    c.write("dpo_vs_trl-compiled" if args.compile else "dpo_vs_trl", args, {"measurements": result})
    if worst > args.tolerance:
        sys.exit(f"error: the losses differ by {worst:.1e}, more than {args.tolerance:g}")


if __name__ == "__main__":
    main()
