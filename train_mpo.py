"""Stage 2c, MPO: DPO's contrast, the quality of each answer alone, and the right one's likelihood.

One process:     python train_mpo.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 train_mpo.py --encoder siglip2-so400m

Reads   runs/NAME/pretrain/final (policy and reference both start there) and MMPR preference pairs.
        --parent takes another run's stage 1, or a published model, instead.
Writes  runs/NAME/mpo/: config.json, metrics.jsonl, timing.jsonl, checkpoints/,
        ref_logps.safetensors, final/ (opens as LlavaForConditionalGeneration).
        Next: python extract.py --run-dir runs/NAME --stage mpo

`diff train_dpo.py train_mpo.py` shows the method: the loss, and the δ that it needs.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import math
from pathlib import Path

import torch

import data
import model as m
from pivot import checkpoints, distributed, flags, model_io, published, rehearsal, training
from pivot.distributed import print0

# Weights and β are MPO's own (arXiv 2411.10442). Its rate is 5e-6, its weight decay 0.05; the PIVOT
# paper states none for its MPO. Here both are DPO's, so that the loss alone differs.
PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", epochs=3, lr=1e-6,
             beta=0.1, global_batch=256, micro_batch=4, warmup=0.03, num_samples=20_000, workers=4,
             preference_weight=0.8, quality_weight=0.2, generation_weight=1.0)
# One pass over the toy is too short for β = 0.1: β × margin stays near 0, so that pairs which are
# understood keep their full gradient. At 0.5 they lose it.
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", epochs=1, lr=5e-5, beta=0.5,
           global_batch=32, micro_batch=32, workers=1)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_parent(parser)
    flags.add_verifiable(parser)
    flags.add_preferences(parser)
    parser.add_argument("--beta", type=flags.ABOVE_0, help="how strongly a change of the log-ratio "
                        "counts; a smaller one lets the policy move further (default 0.1, the "
                        "paper's; 0.5 with a toy LLM)")
    parser.add_argument("--preference-weight", type=flags.RATE, help="of DPO's term, the right "
                        "answer against the wrong one (default 0.8)")
    parser.add_argument("--quality-weight", type=flags.RATE, help="of BCO's term, each answer by "
                        "itself against δ (default 0.2)")
    parser.add_argument("--generation-weight", type=flags.RATE, help="of the right answer's "
                        "negative log-likelihood, a mean over its tokens (default 1)")
    parser.add_argument("--reference", choices=["cached", "live"], default="cached",
                        help="reference log-probs from one pass before the first step (cached) or "
                        "from a frozen second model at every step (live: teaching, checking)")
    parser.add_argument("--layout", choices=["pair", "rows"], default="pair", help="both answers "
                        "of a pair in one row behind one prompt (pair), or in a row each (rows): "
                        "slower, the same log-probs, for any LLM")
    flags.add_heldout(parser, "scored")
    args = flags.settle_pairs(parser.parse_args(argv), "mpo", PAPER, TOY, parent="pretrain")
    if args.reference == "live" and args.compile and args.dtype == "bf16":
        raise SystemExit("error: --reference live with --compile in bf16: compiled without "
                         "gradients the reference rounds otherwise; leave one of them out")
    return args


def score_pairs(args, model, pairs, order, clock, desc):
    """log π of both answers of every pair: (n, 2) fp32, complete on every process.

    In the order and layout of the first epoch, so that step 0 meets the very same batches. With
    --compile gradients stay on: without them blocks are fused otherwise, and in bf16 round
    otherwise (a margin of -0.0019 at step 0, on a CPU).
    """
    logps, seen = torch.zeros(len(pairs), 2), torch.zeros(len(pairs), 1)
    cover = order.cover()
    clock.start(data.loader(pairs, cover, args.layout, args.workers))
    for _ in distributed.progress(0, len(cover), desc):
        batch = clock.next_batch()
        index = batch.pop("index")
        with torch.set_grad_enabled(args.compile):    # its graph is freed at once: nothing holds it
            chosen_logps, rejected_logps = m.answer_logps(model(**batch), batch.get("branch"))
        logps[index] = torch.stack([chosen_logps, rejected_logps], 1).detach().cpu()
        seen[index] = 1
    return distributed.sum_tensor(logps) / distributed.sum_tensor(seen)


def reference_logps(args, run, model, sets, clock):
    """METHOD: log π_ref of both answers, once, by the same code in the same layout, before step 0.

    The parent's weights are still in `model`. sets: {"pairs": (samples, order), "heldout": …}
    → {"pairs": (n, 2), …}. Later epochs and resumed runs reuse the file, and so does a run of
    another beta or rate into whose folder it is copied. One with another key is refused.
    """
    key = {"parent_digest": run.config["parent_digest"], "dtype": args.dtype,
           "attention": args.attention, "compile": args.compile,
           "pixels": str((model.encoder.image_size, model.encoder.mean, model.encoder.std)),
           "layout": {"pair": "shared prefix", "rows": "two rows"}[args.layout] + ", ChatML"}
    key |= {name: samples.fingerprint() for name, (samples, _) in sets.items()}

    def compute():
        tables = {}
        for name, (samples, order) in sets.items():
            table = score_pairs(args, model, samples, order, clock, f"reference {name}")
            broken = (~table.isfinite()).any(1).nonzero().flatten().tolist()
            if broken:
                raise SystemExit(f"error: the model in {run.parent} gives {len(broken)} of "
                                 f"{len(samples)} {name} log-probs that are not finite, first: "
                                 f"{samples.where[broken[0]]}")
            tables[name] = table
        return tables
    return run.cached("ref_logps.safetensors", key, compute)


def require_same_function(args, loss, generation, margin):
    """METHOD: before the first update policy and reference are one model, δ is 0: margin 0, and the
    loss ln 2 for preference, 2 ln 2 for quality, each times its weight, besides generation. If not,
    all rewards would be wrong by what they differ in: raises SystemExit.

    Both are looked at: references of other pairs can have the right mean. On a CPU the margin is 0
    to the last bit; a GPU's kernels may differ in one.
    """
    weight = args.preference_weight + 2 * args.quality_weight
    rest = loss - args.generation_weight * generation
    apart = max(abs(margin), abs(rest - weight * math.log(2)) / max(1, loss))
    said = (f"loss {loss:.6f}, without generation {rest:.6f} ({weight:g} ln 2 = "
            f"{weight * math.log(2):.6f}), margin {margin:.2g}: policy and reference")
    training.require_same_function(
        args, apart, said, "a ref_logps.safetensors of another --micro-batch (delete it)")


def report_heldout(args, run, model, samples, order, ref, clock, step):
    """Reward margin and accuracy on pairs never trained on: policy against reference log-ratio."""
    logps = score_pairs(args, model, samples, order, clock, "held-out pairs")
    chosen_reward, rejected_reward = (args.beta * (logps - ref)).unbind(1)           # each (n,)
    margin = (chosen_reward - rejected_reward).mean()
    accuracy = (chosen_reward > rejected_reward).float().mean()                # a tie is wrong
    run.log({"step": step, "heldout_margin": margin.item(), "heldout_accuracy": accuracy.item()})
    print0(f"  held-out pairs after {step} steps: margin {margin:.4f}, accuracy {accuracy:.3f} "
           f"(n = {len(samples)})")


def main():
    args = get_args()
    device = distributed.start()
    run = checkpoints.Run(Path(args.run, args.stage), args)

    # ---- model
    model, tokenizer = model_io.load_mllm(run.parent)
    published.refuse_layout(model.llm, args.layout)
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    if args.reference == "live":                   # the parent once more, frozen
        ref_model, _ = model_io.load_mllm(run.parent)
        ref_model = distributed.shard(ref_model.requires_grad_(False), device, args.dtype,
                                      replicas=args.replicas, attention=args.attention,
                                      compiled=args.compile)
    rehearsal.rehearse(args, model, training.learning_rates(args),
                       data.longest_batch("pairs", args.layout, data.rows_at_once(args), tokenizer,
                                          model))

    # ---- data
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model, run)
    order = data.BatchOrder(pairs, args.global_batch, args.micro_batch, args.seed,
                            *distributed.world())
    steps = training.num_steps(args.epochs, args.max_steps, order)
    run.describe({"data": pairs.summary(), "data_digest": order.digest(steps),
                  "parent_digest": checkpoints.file_digest(run.parent)})
    sets = {"pairs": (pairs, order)}
    if args.heldout:                               # kept aside, to see what was learned
        heldout = data.preference_pairs(args, args.heldout, tokenizer, model, run, keep_all=True)
        sets["heldout"] = (heldout, order.like(heldout))
        print0(f"  held-out: {heldout.summary()}")

    # ---- the optimizer works on the sharded fp32 masters
    optimizer = training.adamw(model, training.learning_rates(args))
    clock = training.Clock(device, args.stall_timeout)
    if args.reference == "live":                   # log π_ref of pairs comes step by step
        del sets["pairs"]
    ref = reference_logps(args, run, model, sets, clock)
    delta = 0.0                  # METHOD: δ, the mean of all rewards of the steps before this one
    if run.start:
        delta = run.resume(model, optimizer, ["delta"])["delta"]
    elif args.heldout:
        report_heldout(args, run, model, *sets["heldout"], ref["heldout"], clock, step=0)
    distributed.heed_signals()

    clock.start(data.loader(pairs, order.schedule(run.start, steps), args.layout, args.workers))
    for step in (bar := distributed.progress(run.start, steps, args.stage)):
        lrs = training.set_lr(optimizer, step, steps, args.warmup)
        sums = {"loss": 0.0, "tokens": 0, "chosen_reward": 0.0, "rejected_reward": 0.0,
                "correct": 0, "preference": 0.0, "quality": 0.0, "generation": 0.0}
        for micro in range(order.micro_steps):
            batch = clock.next_batch()
            model.set_requires_gradient_sync(micro == order.micro_steps - 1)

            # METHOD: one image, one prompt, two answers, one forward.
            # r = β (log π(y) − log π_ref(y))
            # L = −E [w_p log σ(r_c − r_r) + w_q (log σ(r_c − δ) + log σ(δ − r_r))
            #         + w_g log π(y_c) / |y_c|]
            index = batch.pop("index")
            if args.reference == "cached":
                ref_logps = ref["pairs"][index].to(device, non_blocking=True)      # (B, 2)
                ref_chosen, ref_rejected = ref_logps.unbind(1)
            else:                               # before the policy's, whose activations stay
                with torch.no_grad():
                    ref_chosen, ref_rejected = m.answer_logps(ref_model(**batch),
                                                              batch.get("branch"))
            logps = model(**batch)                                    # (B, T) fp32
            chosen_logps, rejected_logps = m.answer_logps(logps, batch.get("branch"))
            chosen_tokens = torch.from_numpy(pairs.answer_tokens)[index]
            preference, quality, generation, chosen_reward, rejected_reward = m.mpo_loss(
                chosen_logps, rejected_logps, ref_chosen, ref_rejected, args.beta, delta,
                chosen_tokens.to(device, non_blocking=True))
            losses = (args.preference_weight * preference + args.quality_weight * quality
                      + args.generation_weight * generation)
            loss = losses.sum() / args.global_batch       # a mean over the pairs of all processes
            loss.backward()

            sums["loss"] += loss.detach()
            sums["tokens"] += batch["input_ids"].numel()
            sums["chosen_reward"] += chosen_reward.sum() / args.global_batch
            sums["rejected_reward"] += rejected_reward.sum() / args.global_batch
            sums["correct"] += (chosen_reward > rejected_reward).sum()          # a tie is wrong
            sums["preference"] += preference.detach().sum() / args.global_batch
            sums["quality"] += quality.detach().sum() / args.global_batch
            sums["generation"] += generation.detach().sum() / args.global_batch
        sums = distributed.reduce_sum(sums)
        norms = training.clip_grad_norm(model)
        training.require_finite(step, sums["loss"], norms, pairs, order)
        margin = sums["chosen_reward"] - sums["rejected_reward"]
        if step == 0:
            require_same_function(args, sums["loss"], sums["generation"], margin)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms, "margin": margin,
                 "chosen_reward": sums["chosen_reward"],
                 "rejected_reward": sums["rejected_reward"],
                 "accuracy": sums["correct"] / args.global_batch, "delta": delta,
                 "preference": sums["preference"], "quality": sums["quality"],
                 "generation": sums["generation"]},
                clock.lap(step, sums["tokens"]))
        bar.set_postfix(loss=f"{sums['loss']:.4f}", margin=f"{margin:.3f}", refresh=False)
        # METHOD: only now does δ take in this step's rewards, of all processes (`sums` are theirs).
        delta += ((sums["chosen_reward"] + sums["rejected_reward"]) / 2 - delta) / (step + 1)
        run.save_if_due(step + 1, steps, model, optimizer, {"delta": delta})
    if args.heldout:
        report_heldout(args, run, model, *sets["heldout"], ref["heldout"], clock, step=steps)
    run.finish(model, tokenizer, f"python extract.py --run-dir {args.run} --stage {args.stage}")


if __name__ == "__main__":
    distributed.launch(main)
