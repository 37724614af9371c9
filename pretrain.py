"""Stage 1: teach the projector to speak (1a), then let encoder, projector and LLM learn (1b).

One process:     python pretrain.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 pretrain.py --encoder siglip2-so400m

Reads   image–caption pairs (LLaVA-Pretrain layout) for 1a, conversations (LLaVA layout) for 1b.
Writes  runs/NAME/pretrain/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens
        as LlavaForConditionalGeneration). Next: train_sft.py and train_dpo.py

1a and 1b share the folder and one step axis. --lr --encoder-lr --epochs --max-steps speak of 1b,
--projector-lr --projector-epochs --projector-max-steps of 1a.
"""
from pathlib import Path

from pivot import flags
from tools.plan import show_plan
from pivot import rundir
from pivot import runtime
import data
from pivot import encoders
from pivot import folders

PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", projector_epochs=1,
             projector_lr=1e-3, epochs=1, lr=1e-5, encoder_lr=2e-6, global_batch=256,
             micro_batch=8, warmup=0.03, workers=4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", projector_epochs=2,
           projector_lr=5e-3, lr=1e-3, encoder_lr=5e-4, global_batch=32, micro_batch=32, workers=1)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_two_steps(parser, "instruct")
    args = flags.settle_two_steps(parser.parse_args(argv), "pretrain", "instruct", PAPER, TOY)
    if len(encoders.parts_of(args.encoder)) == 2:
        raise SystemExit(f"error: --encoder {args.encoder}: two encoders are judged together, by "
                         f"repair_eval.py, which keeps both frozen; each is trained by itself")
    return args


def phases(args):
    """Two: the projector alone on captions, then everything on conversations."""
    return [runtime.Phase("1a", "captions", args.captions,
                          {"encoder": 0, "projector": args.projector_lr, "llm": 0},
                          args.projector_epochs, args.projector_max_steps),
            runtime.Phase("1b", "conversations", args.instruct,
                          {**runtime.learning_rates(args), "projector": args.lr},
                          args.epochs, args.max_steps)]


def train(args, run, device, model, tokenizer, facts, phases):
    """The phases on one step axis, then final/. repair_eval.py re-pairs through this same loop.

    facts: what else config.json should hold and a resumed run must agree with.
    """
    # ---- data
    limit = model.llm.config.max_position_embeddings
    samples = [data.Samples(phase.kind, [(phase.file, args.images)], tokenizer, model.encoder,
                            limit, args.num_samples, args.seed, args.skip_bad) for phase in phases]
    plans = [data.BatchPlan(s, args.global_batch, args.micro_batch, args.seed, *runtime.world())
             for s in samples]
    counts = [runtime.num_steps(phase.epochs, phase.max_steps, plan)
              for phase, plan in zip(phases, plans)]
    run.describe({"data": [s.summary() for s in samples],
                  "data_digest": [p.digest(n) for p, n in zip(plans, counts)],
                  "projector_digest": rundir.tensors_digest(model.projector), **facts})

    # ---- shard
    model = runtime.shard(model, device, args.dtype, args.activation_checkpointing, args.replicas,
                          args.attention, args.compile)
    clock = runtime.Clock(device)
    run.heed_signals()
    first = 0                                         # step at which the phase begins
    for phase, items, plan, steps in zip(phases, samples, plans, counts):
        if run.start >= first + steps and phase is not phases[-1]:
            first += steps                            # a checkpoint says this phase is behind us
            continue
        runtime.print0(f"stage {phase.name}")
        optimizer = runtime.adamw(model, phase.rates)    # on the sharded fp32 masters
        if run.start > first:
            run.resume(model, optimizer)
        elif run.start == first > 0:
            run.resume(model)                         # at the border: weights alone
        start = max(run.start - first, 0)

        clock.start(data.loader(items, plan.schedule(start, steps), "sft", args.workers))
        for step in (bar := runtime.progress(start, steps, phase.name)):
            lrs = runtime.set_lr(optimizer, step, steps, args.warmup)
            # Token means divide by the tokens of the *global* batch, or micro-batches would count
            # unequally. Every process holds the index, so the count needs no communication.
            num_tokens = items.answer_tokens[plan.batch(step)].sum()
            sums = {"loss": 0.0, "tokens": 0}
            for micro in range(plan.micro_steps):
                batch = clock.next_batch()
                model.set_requires_gradient_sync(micro == plan.micro_steps - 1)

                # METHOD: L = −E log π(y), a mean over the tokens of all answers
                logps = model(**batch)                                # (B, T) fp32
                loss = -logps.sum() / num_tokens
                loss.backward()

                sums["loss"] += loss.detach()
                sums["tokens"] += batch["input_ids"].numel()
            sums = runtime.reduce_sum(sums)
            norms = runtime.clip_grad_norm(model)
            runtime.require_finite(step, sums["loss"], norms, items, plan)
            optimizer.step()
            optimizer.zero_grad()

            # ---- log, save
            run.log({"step": first + step, "phase": phase.name,
                     "samples_seen": (step + 1) * args.global_batch,
                     "loss": sums["loss"], "lr": lrs, "grad_norm": norms},
                    clock.lap(first + step, sums["tokens"]))
            bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
            run.save_if_due(first + step + 1, sum(counts), model, optimizer)
        first += steps
    run.finish(model, tokenizer)


def main():
    args = get_args()
    if args.plan:
        return show_plan(args, phases(args))
    device = runtime.start()
    facts = rundir.parents(args)
    run = rundir.Run(Path(args.run, "pretrain"), args, facts)
    model, tokenizer = folders.build_mllm(args.encoder, args.llm, args.seed, args.image_size)
    train(args, run, device, model, tokenizer, facts, phases(args))


if __name__ == "__main__":
    runtime.launch(main)
