"""Stage 2a, SFT: maximise the likelihood of the right answer alone. The control of the comparison.

One process:     python train_sft.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 train_sft.py --encoder siglip2-so400m

Reads   runs/NAME/pretrain/final (the stage-1 model) and MMPR pairs, of which the chosen answers.
Writes  runs/NAME/sft/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens as
        LlavaForConditionalGeneration). Next: python extract.py --run-dir runs/NAME --stage sft

`diff train_sft.py train_dpo.py` shows the method: the items and their order are the same.
"""
from pathlib import Path

from pivot import flags
from tools.plan import show_plan
from pivot import rundir
from pivot import runtime
import data
from pivot import folders

PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", epochs=3, lr=5e-6,
             global_batch=256, micro_batch=8, warmup=0.03, num_samples=20_000, workers=4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", epochs=1, lr=1e-4, global_batch=32,
           micro_batch=32, workers=1)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    parser.add_argument("--preferences", help="MMPR meta.json, or a jsonl with image, question, "
                        "chosen, rejected; default DATA/preferences/meta.json")
    args = flags.settle(parser.parse_args(argv), "sft", PAPER, TOY, parent="pretrain")
    args.preferences = args.preferences or f"{args.data}/preferences/meta.json"
    return args


def phases(args):
    """The stage's single phase: what --plan reads."""
    return [runtime.Phase("sft", "pairs", args.preferences, runtime.learning_rates(args),
                          args.epochs, args.max_steps)]


def main():
    args = get_args()
    if args.plan:
        return show_plan(args, phases(args))
    device = runtime.start()
    run = rundir.Run(Path(args.run, "sft"), args)

    # ---- model
    parent = Path(args.run, "pretrain", "final")
    model, tokenizer = folders.load_mllm(parent)

    # ---- data
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model)
    plan = data.BatchPlan(pairs, args.global_batch, args.micro_batch, args.seed, *runtime.world())
    steps = runtime.num_steps(args.epochs, args.max_steps, plan)
    run.describe({"data": pairs.summary(), "data_digest": plan.digest(steps),
                  "parent_digest": rundir.file_digest(parent)})

    # ---- shard; the optimizer works on the sharded fp32 masters, so no forward comes before it
    model = runtime.shard(model, device, args.dtype, args.activation_checkpointing, args.replicas,
                          args.attention, args.compile)
    optimizer = runtime.adamw(model, runtime.learning_rates(args))
    clock = runtime.Clock(device)
    if run.start:
        run.resume(model, optimizer)
    run.heed_signals()

    clock.start(data.loader(pairs, plan.schedule(run.start, steps), "sft", args.workers))
    for step in (bar := runtime.progress(run.start, steps, "sft")):
        lrs = runtime.set_lr(optimizer, step, steps, args.warmup)
        # Token means divide by the tokens of the *global* batch, or micro-batches would count
        # unequally. Every process holds the index, so the count needs no communication.
        num_tokens = pairs.answer_tokens[plan.batch(step)].sum()
        sums = {"loss": 0.0, "tokens": 0}
        for micro in range(plan.micro_steps):
            batch = clock.next_batch()
            model.set_requires_gradient_sync(micro == plan.micro_steps - 1)

            # METHOD: L = −E log π(y_c), a mean over answer tokens
            logps = model(**batch)                                    # (B, T) fp32
            loss = -logps.sum() / num_tokens
            loss.backward()

            sums["loss"] += loss.detach()
            sums["tokens"] += batch["input_ids"].numel()
        sums = runtime.reduce_sum(sums)
        norms = runtime.clip_grad_norm(model)
        runtime.require_finite(step, sums["loss"], norms, pairs, plan)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms},
                clock.lap(step, sums["tokens"]))
        bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
        run.save_if_due(step + 1, steps, model, optimizer)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    runtime.launch(main)
