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
  what is drawn       is drawn from π itself: temperature 1, no top-k; `<|im_end|>` alone ends an
                      answer, and is trained as its last token
  truncated answers   (no end within --max-new-tokens) get reward 0 and are trained on as they are
  equal groups        (all answers worth the same) stay in the batch, with advantage 0: the items
                      are the same for every signal. Their share is logged, as `equal_groups`
  log π_old           is the first inner epoch's own log-prob, in the layout that is trained; the
                      sampler's numbers are not used. With one inner epoch ρ = 1, and this is the
                      plain policy gradient: clipping does nothing
  the loss            says little: without KL its value is near 0 by construction. Look at `reward`
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
# DPO's here, the group is TRL's.
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
    parser.add_argument("--group", type=flags.number(int, 2), help="answers drawn to a prompt "
                        "(default 8)")
    parser.add_argument("--normalise", choices=NORMALISE, default="dapo", help="dapo: every token "
                        "counts alike; grpo: every answer; dr_grpo: every token, by a constant, "
                        "and advantages are not divided by the group's deviation (default dapo)")
    parser.add_argument("--inner-epochs", type=flags.COUNT, default=1, help="updates a rollout "
                        "(default 1)")
    parser.add_argument("--clip-low", type=flags.number(float, 0, 1), default=0.2,
                        help="ρ below 1 − this moves no further (default 0.2)")
    parser.add_argument("--clip-high", type=flags.RATE, default=0.2,
                        help="ρ above 1 + this moves no further (default 0.2; DAPO's is 0.28)")
    parser.add_argument("--kl", type=flags.RATE, default=0, help="weight of the KL divergence from "
                        "stage 1, which is then held as a second, frozen model (default 0: none)")
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

    → a dict that the update reads: `batch` for the model; `answered`, where its drawn tokens are;
    `lengths`, `advantages` (B, G); `counts` to be logged.
    """
    drawn, rewards, counts = rollout.draw_and_score(args, model, tokenizer, pairs, prompts, index,
                                                    step, score.RULES[args.rule])
    advantages = m.group_advantages(rewards, scaled=args.normalise != "dr_grpo")
    counts["equal_groups"] = (rewards == rewards[:, :1]).all(1).sum()
    device, batch = prompts["input_ids"].device, data.group_batch(prompts, drawn.answers)
    return {"batch": batch, "answered": (batch["labels"] != m.IGNORE).nonzero(as_tuple=True),
            "counts": counts,
            "lengths": drawn.lengths.to(device, non_blocking=True),
            "advantages": advantages.to(device, non_blocking=True)}


def require_same_function(args, kl):
    """METHOD: before the first update policy and reference are one model: KL 0. raises SystemExit.
    """
    if abs(kl) > (1e-3 if args.dtype == "bf16" else 1e-5):
        raise SystemExit(f"error: step 0: KL {kl:.2g}: policy and reference are NOT the same "
                         f"function; nothing was updated. Usual causes: randomness in a forward, "
                         f"as of dropout; a forward that changes the model")
    print0(f"  step 0: KL {kl:.2g}: policy and reference are the same function")


def main():
    args = get_args()
    device = distributed.start()
    run = checkpoints.Run(Path(args.run, args.stage), args)

    # ---- model
    model, tokenizer = model_io.load_mllm(run.parent)
    rollout.require_branches(model.llm)
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    rehearsal.rehearse(args, model, training.learning_rates(args), data.longest_group(
        args.group, args.max_new_tokens, data.rows_at_once(args), tokenizer, model))

    # ---- data
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model, run)
    rollout.require_room(model, pairs, args.max_new_tokens)
    order = data.BatchOrder(pairs, args.global_batch, args.micro_batch, args.seed,
                            *distributed.world())
    steps = training.num_steps(args.epochs, args.max_steps, order)
    run.describe({"data": pairs.summary(), "data_digest": order.digest(steps),
                  "parent_digest": checkpoints.file_digest(run.parent)})
    if args.heldout:                               # kept aside, to see what was learned
        heldout = data.preference_pairs(args, args.heldout, tokenizer, model, run, keep_all=True)
        rollout.require_room(model, heldout, args.max_new_tokens)
        held = heldout, order.like(heldout), data.loader, score.RULES[args.rule]
        print0(f"  held-out: {heldout.summary()}")

    # ---- the optimizer works on the sharded fp32 masters
    optimizer = training.adamw(model, training.learning_rates(args))
    clock = training.Clock(device, args.stall_timeout)
    if args.kl:                                    # the parent once more, frozen
        ref_model, _ = model_io.load_mllm(run.parent)
        ref_model = distributed.shard(ref_model.requires_grad_(False), device, args.dtype,
                                      replicas=args.replicas, attention=args.attention,
                                      compiled=args.compile)
    if run.start:
        run.resume(model, optimizer)
    elif args.heldout:
        rollout.report_heldout(args, run, model, tokenizer, *held, clock, step=0)
    distributed.heed_signals()

    clock.start(data.loader(pairs, order.schedule(run.start, steps), "prompts", args.workers))
    for step in (bar := distributed.progress(run.start, steps, args.stage)):
        lrs = training.set_lr(optimizer, step, steps, args.warmup)

        # ---- rollout
        rolled, began = [], time.perf_counter()
        for _ in range(order.micro_steps):
            prompts, index = rollout.next_prompts(args, clock)
            rolled.append(roll_out(args, model, tokenizer, pairs, prompts, index, step))
        counts = distributed.reduce_sum({k: sum(float(group["counts"][k]) for group in rolled)
                                         for k in rolled[0]["counts"]})
        seconds = time.perf_counter() - began

        # ---- update
        for inner in range(args.inner_epochs):
            sums = {"loss": 0.0, "tokens": 0, "kl": 0.0, "clipped": 0, "surprise": 0.0}
            for micro, group in enumerate(rolled):
                batch = group["batch"]
                model.set_requires_gradient_sync(micro == order.micro_steps - 1)

                # METHOD: one image, one prompt, G answers, one forward.
                # L = Σ_tokens w [−min(ρ A, clip(ρ) A) + β KL],  ρ = π / π_old; w: --normalise
                answered = group["answered"]
                logps = model(**batch)[answered]                          # (R,) fp32
                if inner == 0:
                    group["old_logps"] = logps.detach()
                losses, clipped = m.clipped_loss(
                    logps, group["old_logps"],
                    m.of_tokens(group["advantages"], batch["branch"], answered),
                    args.clip_low, args.clip_high)
                weights = NORMALISE[args.normalise](group["lengths"], counts["answers"],
                                                    counts["tokens"], args.max_new_tokens)
                if args.kl:
                    if inner == 0:
                        with torch.no_grad():
                            group["ref_logps"] = ref_model(**batch)[answered]
                    kl = KL[args.kl_estimator](logps, group["ref_logps"])
                    losses = losses + args.kl * kl
                    sums["kl"] += kl.detach().sum() / counts["tokens"]
                loss = (losses * m.of_tokens(weights, batch["branch"], answered)).sum()
                loss.backward()

                sums["loss"] += loss.detach()
                sums["tokens"] += batch["input_ids"].numel()
                sums["clipped"] += clipped.sum() / counts["tokens"]
                sums["surprise"] -= logps.detach().sum() / counts["tokens"]
            sums = distributed.reduce_sum(sums)
            norms = training.clip_grad_norm(model)
            training.require_finite(step, sums["loss"], norms, pairs, order)
            if inner == 0:
                entropy = sums["surprise"]  # drawn from π: in the mean −log π is π's entropy
            if step == inner == 0 and args.kl:
                require_same_function(args, sums["kl"])
            optimizer.step()
            optimizer.zero_grad()

        # ---- log, save
        share = {k: v / counts["answers"] for k, v in counts.items()}
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms,
                 **{k: v for k, v in share.items() if k.startswith("reward")},
                 "stopped": share["stopped"], "length": share["tokens"],
                 "equal_groups": counts["equal_groups"] / args.global_batch,
                 "entropy": entropy, "clipped": sums["clipped"],
                 **({"kl": sums["kl"]} if args.kl else {})},
                {**clock.lap(step, sums["tokens"] * args.inner_epochs),
                 "rollout": round(seconds, 4)})
        bar.set_postfix(reward=f"{share['reward']:.3f}", refresh=False)
        run.save_if_due(step + 1, steps, model, optimizer)
    if args.heldout:
        rollout.report_heldout(args, run, model, tokenizer, *held, clock, step=steps)
    run.finish(model, tokenizer, f"python extract.py --run-dir {args.run} --stage {args.stage}")


if __name__ == "__main__":
    distributed.launch(main)
