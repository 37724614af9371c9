"""Stage 2d, GRPO: the model's own answers, drawn by the group, scored by a rule, compared.

One process:     python train_grpo.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 train_grpo.py --encoder siglip2-so400m

Reads   runs/NAME/pretrain/final (the policy starts there) and MMPR preference pairs: their prompts,
        and their chosen answers for the gold answer in them. A pair without one is dropped.
        --parent takes another run's stage 1, or a published model, instead.
Writes  runs/NAME/grpo/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens as
        LlavaForConditionalGeneration). Next: python extract.py --run-dir runs/NAME --stage grpo

A step has two halves. In the rollout G answers to each prompt are drawn from the policy, and a rule
of judge/score.py says what each is worth. In the update an answer that is worth more than the mean
of its group is made more likely, one that is worth less, less. The rollout has no gradient; in the
update a row holds a picture, a prompt and all G answers, and the encoder learns from all of them at
once. The items and their order are those of `train_dpo.py --verifiable`.

What was decided here, where GRPOs differ:
  what is drawn       is drawn from π: temperature 1, no top-k. `<image>` alone is left out of the
                      draw, but not of log π: the two differ by how probable it is, next to nothing.
                      `<|im_end|>` alone ends an answer, and is trained as its last token
  truncated answers   (no end within --max-new-tokens) get reward 0 and are trained on as they are
  equal groups        (all answers worth the same) stay in the batch, with advantage 0, so that the
                      items are those of SFT and DPO. Their share is logged, as `equal_groups`
  log π_old           is what the first inner epoch's own forward says, before any update; the
                      sampler's KV-cached forward says the same but for rounding: how far they are
                      apart is logged, as `sampler_gap`, and step 0 refuses more than rounding. With
                      one inner epoch ρ = 1, and this is the plain policy gradient: clipping does
                      nothing
  the loss            does not say what was learned: at ρ = 1, without KL, it is −Σ w A, always 0 by
                      --normalise grpo, else above 0 where the worse answers are the longer. Look at
                      `reward_exact` (or what --rule names): `reward`, which is trained on, may have
                      a format's part in it, or be a coin
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import time
from pathlib import Path

import torch

import data
import model as m
from judge import score
from pivot import checkpoints, distributed, flags, model_io, rehearsal, rollout, training
from pivot.distributed import print0

# The PIVOT paper states neither group size nor rate nor KL of its GRPO. Items, steps and rate are
# DPO's here, the group is TRL's; 512 tokens are room to reason before the final answer. Batches
# count prompts: a step draws 256 × 8 answers, a micro-batch holds 4 × 8.
PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", epochs=3, lr=1e-6,
             global_batch=256, micro_batch=4, warmup=0.03, num_samples=20_000, workers=4,
             group=8, max_new_tokens=512)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", epochs=1, lr=5e-5, global_batch=32,
           micro_batch=32, workers=1, max_new_tokens=24)
NORMALISE = {"dapo": m.normalise_dapo, "grpo": m.normalise_grpo, "dr_grpo": m.normalise_dr_grpo}
KL = {"k3": m.kl_k3, "k2": m.kl_k2}


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_parent(parser)
    flags.add_preferences(parser)
    flags.add_rollout(parser, score.RULES)
    parser.add_argument("--group", type=flags.number(int, 2), help="answers drawn for a "
                        "prompt (default 8)")
    parser.add_argument("--normalise", choices=NORMALISE, default="dapo", help="dapo: a mean over "
                        "tokens; grpo: over each answer's tokens, then over answers; dr_grpo: a "
                        "sum over tokens / (answers × --max-new-tokens), with advantages that are "
                        "not divided by the group's deviation (default dapo)")
    parser.add_argument("--inner-epochs", type=flags.COUNT, default=1, help="optimizer steps on "
                        "what a rollout drew (default 1)")
    parser.add_argument("--clip-low", type=flags.number(float, 0, 1), default=0.2,
                        help="where ρ = π / π_old is below 1 − CLIP_LOW, a token of a bad answer "
                        "is not made less likely still (default 0.2)")
    parser.add_argument("--clip-high", type=flags.RATE, default=0.2,
                        help="where ρ is above 1 + CLIP_HIGH, a token of a good answer is not made "
                        "more likely still (default 0.2; DAPO's is 0.28)")
    parser.add_argument("--kl", type=flags.RATE, default=0, help="weight of the KL divergence from "
                        "the model it starts from, then held a second time, frozen (default 0: "
                        "none)")
    parser.add_argument("--kl-estimator", choices=KL, default="k3", help="how it is estimated from "
                        "a drawn token; see model.py (default k3)")
    flags.add_heldout(parser, "answered, greedily,")
    args = flags.settle_pairs(parser.parse_args(argv), "grpo", PAPER, TOY, parent="pretrain")
    args.verifiable = True                       # what data.preference_pairs keeps
    if args.kl and args.compile and args.dtype == "bf16":
        raise SystemExit("error: --kl with --compile in bf16: compiled without gradients the "
                         "reference rounds otherwise; leave one of them out")
    return args


def roll_out(args, model, tokenizer, pairs, prompts, index, step):
    """METHOD: draw and score a group for each prompt of a micro-batch; compare within the groups.

    An answer's reward is what --rule makes of it and the gold answer, in rollout.rewards_of. → a
    dict that the update reads: `batch` for the model; `drawn_at`, (b, t), where in (B, T) its R
    drawn tokens stand; `sampler_logps` (R,); `lengths`, `advantages` (B, G); `counts` to be logged.
    """
    drawn, rewards, counts = rollout.draw_and_score(args, model, tokenizer, pairs, prompts, index,
                                                    step, score.RULES[args.rule])
    advantages = m.group_advantages(rewards, scaled=args.normalise != "dr_grpo")
    counts["equal_groups"] = (rewards == rewards[:, :1]).all(1).sum()
    device, batch = prompts["input_ids"].device, data.group_batch(prompts, drawn.answers)
    return {"batch": batch, "drawn_at": (batch["labels"] != m.IGNORE).nonzero(as_tuple=True),
            "sampler_logps": drawn.sampler_logps, "counts": counts,
            "lengths": drawn.lengths.to(device, non_blocking=True),
            "advantages": advantages.to(device, non_blocking=True)}


def require_same_function(args, sampler_gap, ref_gap):
    """METHOD: before the first update the sampler, the policy and the reference are one model: what
    they say of the drawn tokens is apart by rounding alone (of the sampler's more, for it computes
    otherwise). Means of |Δ log π|; raises SystemExit.
    """
    rollout.require_same_sampler(args, sampler_gap)
    if not args.kl:
        return
    training.require_same_function(
        args, ref_gap, f"|log π − log π_ref| {ref_gap:.2g}: policy and reference")


def main():
    args = get_args()
    device = distributed.start()
    run = checkpoints.Run(Path(args.run, args.stage), args)

    # ---- model
    model, tokenizer = model_io.load_mllm(run.parent)
    rollout.require_branches(model.llm)
    rates = training.learning_rates(args)
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    if args.kl:                                    # the parent once more, frozen
        ref_model, _ = model_io.load_mllm(run.parent)
        ref_model = distributed.shard(ref_model.requires_grad_(False), device, args.dtype,
                                      replicas=args.replicas, attention=args.attention,
                                      compiled=args.compile)
    rehearsal.rehearse(args, model, rates, data.longest_group(
        args.group, args.max_new_tokens, data.rows_at_once(args), tokenizer, model))

    # ---- data
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model, run)
    rollout.require_room(model, pairs, args.max_new_tokens)
    order = data.BatchOrder(pairs, args.global_batch, args.micro_batch, args.seed,
                            *distributed.world())
    steps = training.num_steps(args.epochs, args.max_steps, order)
    run.describe({"data": pairs.summary(), "data_digest": order.digest(steps),
                  "parent_digest": checkpoints.file_digest(run.parent)})
    if args.heldout:                               # kept aside, for rollout.report_heldout
        heldout = data.preference_pairs(args, args.heldout, tokenizer, model, run, keep_all=True)
        rollout.require_room(model, heldout, args.max_new_tokens)
        held = {"samples": heldout, "order": order.like(heldout), "loader": data.loader,
                "rule": score.RULES[args.rule]}
        print0(f"  held-out: {heldout.summary()}")

    # ---- the optimizer works on the sharded fp32 masters
    optimizer = training.adamw(model, rates)
    clock = training.Clock(device, args.stall_timeout)
    if run.start:
        run.resume(model, optimizer)
    elif args.heldout:
        rollout.report_heldout(args, run, model, tokenizer, clock, step=0, **held)
    distributed.heed_signals()

    clock.start(data.loader(pairs, order.schedule(run.start, steps), "prompts", args.workers))
    for step in (bar := distributed.progress(run.start, steps, args.stage)):
        lrs = training.set_lr(optimizer, step, steps, args.warmup)

        # ---- rollout: all answers of the step, before any update; a part is one micro-batch's
        parts, began = [], time.perf_counter()
        for _ in range(order.micro_steps):
            prompts, index = rollout.next_prompts(args, clock)
            parts.append(roll_out(args, model, tokenizer, pairs, prompts, index, step))
        counts = distributed.reduce_sum({k: sum(float(part["counts"][k]) for part in parts)
                                         for k in parts[0]["counts"]})
        rollout_seconds = time.perf_counter() - began

        # ---- update
        for inner in range(args.inner_epochs):
            sums = {"loss": 0.0, "tokens": 0, "kl": 0.0, "clipped": 0, "surprise": 0.0,
                    "sampler_gap": 0.0, "ref_gap": 0.0}
            for micro, part in enumerate(parts):
                batch = part["batch"]
                model.set_requires_gradient_sync(micro == order.micro_steps - 1)

                # METHOD: one image, one prompt, G answers, one forward. A row is the prompt less
                # its last token; then, for each answer, that token once more and the answer,
                # which sees prompt and itself (data.branch_row, model.visible).
                # L = Σ_tokens w [−min(ρ A, clip(ρ) A) + c KL],  ρ = π / π_old
                # w: --normalise; c: --kl
                # gradients are summed over micro-batches and processes
                drawn_at = part["drawn_at"]
                if args.kl and inner == 0:         # before the policy's, whose activations stay
                    with torch.no_grad():
                        part["ref_logps"] = ref_model(**batch)[drawn_at]
                logps = model(**batch)[drawn_at]           # (B, T) fp32 → (R,), of R drawn tokens
                if inner == 0:
                    part["old_logps"] = logps.detach()
                losses, clipped = m.clipped_loss(
                    logps, part["old_logps"],
                    m.of_tokens(part["advantages"], batch["branch"], drawn_at),
                    args.clip_low, args.clip_high)
                weights = NORMALISE[args.normalise](part["lengths"], counts["answers"],
                                                    counts["answer_tokens"], args.max_new_tokens)
                if args.kl:
                    kl = KL[args.kl_estimator](logps, part["ref_logps"])
                    losses = losses + args.kl * kl
                    sums["kl"] += kl.detach().sum()
                    sums["ref_gap"] += (logps.detach() - part["ref_logps"]).abs().sum()
                loss = (losses * m.of_tokens(weights, batch["branch"], drawn_at)).sum()
                loss.backward()

                sums["loss"] += loss.detach()
                sums["tokens"] += batch["input_ids"].numel()      # prompts and padding, too
                sums["clipped"] += clipped.sum()
                sums["surprise"] -= logps.detach().sum()
                sums["sampler_gap"] += (logps.detach() - part["sampler_logps"]).abs().sum()
            sums = distributed.reduce_sum(sums)
            mean = {k: v / counts["answer_tokens"] for k, v in sums.items()}
            norms = training.clip_grad_norm(model)
            training.require_finite(step, sums["loss"], norms, pairs, order)
            if inner == 0:
                past = mean        # of the very π that drew: its mean −log π is its entropy
            if step == 0 and inner == 0:
                require_same_function(args, past["sampler_gap"], past["ref_gap"])
            optimizer.step()
            optimizer.zero_grad()

        # ---- log, save; loss, norms and clipped are of the last inner epoch
        per_answer = {k: v / counts["answers"] for k, v in counts.items()}
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms,
                 **{k: v for k, v in per_answer.items() if k.startswith("reward")},
                 "stopped": per_answer["stopped"], "length": per_answer["answer_tokens"],
                 "equal_groups": counts["equal_groups"] / args.global_batch,
                 "entropy": past["surprise"], "sampler_gap": past["sampler_gap"],
                 "clipped": mean["clipped"],
                 **({"kl": past["kl"]} if args.kl else {})},
                {**clock.lap(step, sums["tokens"] * args.inner_epochs),
                 "rollout": round(rollout_seconds, 4)})
        bar.set_postfix(reward=f"{per_answer['reward']:.3f}", refresh=False)
        run.save_if_due(step + 1, steps, model, optimizer)
    if args.heldout:
        rollout.report_heldout(args, run, model, tokenizer, clock, step=steps, **held)
    run.finish(model, tokenizer, f"python extract.py --run-dir {args.run} --stage {args.stage}")


if __name__ == "__main__":
    distributed.launch(main)
