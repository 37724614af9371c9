"""Stage 2a, SFT: maximise the likelihood of the right answer alone. The control of the comparison.

One process:     python train_sft.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 train_sft.py --encoder siglip2-so400m

Reads   runs/NAME/pretrain/final (the stage-1 model) and MMPR pairs, of which the chosen answers.
        --parent takes another run's stage 1, or a published model, instead.
Writes  runs/NAME/sft/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens as
        LlavaForConditionalGeneration). Next: python extract.py --run-dir runs/NAME --stage sft

`diff train_sft.py train_dpo.py` shows the method: the items and their order are the same.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
from pathlib import Path

import data
from pivot import checkpoints, distributed, flags, model_io, rehearsal, training

PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", epochs=3, lr=5e-6,
             global_batch=256, micro_batch=8, warmup=0.03, num_samples=20_000, workers=4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", epochs=1, lr=1e-4, global_batch=32,
           micro_batch=32, workers=1)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_parent(parser)
    flags.add_verifiable(parser)
    flags.add_preferences(parser)
    return flags.settle_pairs(parser.parse_args(argv), "sft", PAPER, TOY, parent="pretrain")


def main():
    args = get_args()
    device = distributed.start()
    run = checkpoints.Run(Path(args.run, args.stage), args)

    # ---- model
    model, tokenizer = model_io.load_mllm(run.parent)
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    rehearsal.rehearse(args, model, training.learning_rates(args),
                       data.longest_batch("pairs", "answers", data.rows_at_once(args), tokenizer,
                                          model))

    # ---- data
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model, run)
    order = data.BatchOrder(pairs, args.global_batch, args.micro_batch, args.seed,
                            *distributed.world())
    steps = training.num_steps(args.epochs, args.max_steps, order)
    run.describe({"data": pairs.summary(), "data_digest": order.digest(steps),
                  "parent_digest": checkpoints.file_digest(run.parent)})

    # ---- the optimizer works on the sharded fp32 masters
    optimizer = training.adamw(model, training.learning_rates(args))
    clock = training.Clock(device, args.stall_timeout)
    if run.start:
        run.resume(model, optimizer)
    distributed.heed_signals()

    clock.start(data.loader(pairs, order.schedule(run.start, steps), "answers", args.workers))
    for step in (bar := distributed.progress(run.start, steps, args.stage)):
        lrs = training.set_lr(optimizer, step, steps, args.warmup)
        # Token means divide by the tokens of the *global* batch, or micro-batches would count
        # unequally. Every process holds the index, so the count needs no communication.
        num_tokens = pairs.answer_tokens[order.batch(step)].sum()
        sums = {"loss": 0.0, "tokens": 0}
        for micro in range(order.micro_steps):
            batch = clock.next_batch()
            model.set_requires_gradient_sync(micro == order.micro_steps - 1)

            # METHOD: L = −E log π(y_c), a mean over answer tokens
            logps = model(**batch)                                    # (B, T) fp32
            loss = -logps.sum() / num_tokens
            loss.backward()

            sums["loss"] += loss.detach()
            sums["tokens"] += batch["input_ids"].numel()
        sums = distributed.reduce_sum(sums)
        norms = training.clip_grad_norm(model)
        training.require_finite(step, sums["loss"], norms, pairs, order)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms},
                clock.lap(step, sums["tokens"]))
        bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
        run.save_if_due(step + 1, steps, model, optimizer)
    run.finish(model, tokenizer, f"python extract.py --run-dir {args.run} --stage {args.stage}")


if __name__ == "__main__":
    distributed.launch(main)
