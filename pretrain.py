"""Stage 1: teach the projector to speak (1a), then let encoder, projector and LLM learn (1b).

One process:     python pretrain.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 pretrain.py --encoder siglip2-so400m

Reads   image–caption pairs (LLaVA-Pretrain layout) for 1a, conversations (LLaVA layout) for 1b.
Writes  runs/NAME/pretrain/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens
        as LlavaForConditionalGeneration). Next: train_sft.py and train_dpo.py

1a and 1b share the folder and one step axis. --lr --encoder-lr --epochs --max-steps speak of 1b,
--projector-lr --projector-epochs --projector-max-steps of 1a.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
from pathlib import Path

import data
from pivot import (checkpoints, distributed, encoders, flags, model_io, records, rehearsal, tensors,
                   training)

PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", projector_epochs=1,
             projector_lr=1e-3, epochs=1, lr=1e-5, encoder_lr=2e-6, global_batch=256,
             micro_batch=8, warmup=0.03, workers=4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", projector_epochs=2,
           projector_lr=5e-3, lr=1e-3, encoder_lr=5e-4, global_batch=32, micro_batch=32, workers=1)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_two_phases(parser, "instruct")
    args = flags.settle_two_phases(parser.parse_args(argv), "pretrain", "instruct", PAPER, TOY)
    if len(encoders.parts_of(args.encoder)) == 2:
        raise SystemExit(f"error: --encoder {args.encoder}: two encoders are judged together, by "
                         f"repair_eval.py, which keeps both frozen; each is trained by itself")
    return args


def phases(args):
    """Two: the projector alone on captions, then everything on conversations."""
    return [training.Phase("1a", "captions", args.captions,
                           {"encoder": 0, "projector": args.projector_lr, "llm": 0},
                           args.projector_epochs, args.projector_max_steps),
            training.Phase("1b", "conversations", args.instruct,
                           {**training.learning_rates(args), "projector": args.lr},
                           args.epochs, args.max_steps)]


def train(args, run, device, model, tokenizer, facts, phases):
    """The phases on one step axis. repair_eval.py re-pairs through this same loop.

    facts: what else config.json should hold and a resumed run must agree with.
    """
    for phase in phases:       # the second's file, too, before hours are spent on the first's
        for file in records.files_of(phase.file):
            records.require_file(file)
    facts = {"projector_digest": tensors.tensors_digest(model.projector), **facts}

    # ---- shard
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    rehearsal.rehearse(args, model, phases[-1].rates,
                       data.longest_batch(phases[-1].kind, "answers", data.rows_at_once(args),
                                          tokenizer, model))

    # ---- data
    longest = model.llm.config.max_position_embeddings
    samples = [data.Samples(phase.kind, data.plain_files(args, phase.file), tokenizer,
                            model.encoder, longest, args.num_samples, args.seed, args.skip_bad,
                            args.follow_links, run=run)
               for phase in phases]
    orders = [data.BatchOrder(items, args.global_batch, args.micro_batch, args.seed,
                              *distributed.world()) for items in samples]
    counts = [training.num_steps(phase.epochs, phase.max_steps, order)
              for phase, order in zip(phases, orders)]
    run.describe({"data": [items.summary() for items in samples],
                  "data_digest": [order.digest(n) for order, n in zip(orders, counts)], **facts})

    clock = training.Clock(device, args.stall_timeout)
    distributed.heed_signals()
    first = 0                                         # step at which the phase begins
    for phase, items, order, steps in zip(phases, samples, orders, counts):
        if run.start < first + steps:                 # else a checkpoint says it is behind us
            train_phase(args, run, model, clock, phase, items, order, first, steps, sum(counts))
        first += steps


def train_phase(args, run, model, clock, phase, items, order, first, steps, all_steps):
    """One phase, of `steps` steps, which begins at step `first` of `all_steps`."""
    distributed.print0(f"phase {phase.name}")
    optimizer = training.adamw(model, phase.rates)    # on the sharded fp32 masters
    if run.start > first:
        run.resume(model, optimizer)
    elif first > 0 and run.start == first:
        run.resume(model)                             # at the border: weights alone
    start = max(run.start - first, 0)

    clock.start(data.loader(items, order.schedule(start, steps), "answers", args.workers))
    for step in (bar := distributed.progress(start, steps, phase.name)):
        lrs = training.set_lr(optimizer, step, steps, args.warmup)
        # Token means divide by the tokens of the *global* batch, or micro-batches would count
        # unequally. Every process holds the index, so the count needs no communication.
        num_tokens = items.answer_tokens[order.batch(step)].sum()
        sums = {"loss": 0.0, "tokens": 0}
        for micro in range(order.micro_steps):
            batch = clock.next_batch()
            model.set_requires_gradient_sync(micro == order.micro_steps - 1)

            # METHOD: L = −E log π(y), a mean over the tokens of all answers
            logps = model(**batch)                                    # (B, T) fp32
            loss = -logps.sum() / num_tokens
            loss.backward()

            sums["loss"] += loss.detach()
            sums["tokens"] += batch["input_ids"].numel()
        sums = distributed.reduce_sum(sums)
        norms = training.clip_grad_norm(model)
        training.require_finite(step, sums["loss"], norms, items, order)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        run.log({"step": first + step, "phase": phase.name,
                 "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms},
                clock.lap(first + step, sums["tokens"]))
        bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
        run.save_if_due(first + step + 1, all_steps, model, optimizer)


def main():
    args = get_args()
    device = distributed.start()
    facts = checkpoints.parents(args)
    run = checkpoints.Run(Path(args.run, args.stage), args, facts)
    model, tokenizer = model_io.build_mllm(args.encoder, args.llm, args.seed, args.image_size)
    train(args, run, device, model, tokenizer, facts, phases(args))
    run.finish(model, tokenizer, f"train_sft.py and train_dpo.py, with --run-dir {args.run}")


if __name__ == "__main__":
    distributed.launch(main)
