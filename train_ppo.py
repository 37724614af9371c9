"""Stage 2e, PPO: the model's own answers, scored by a rule, against what was expected of them.

One process:     python train_ppo.py --encoder toy-vit --llm toy-lm --data data/toy
Eight GPUs:      torchrun --nproc_per_node=8 train_ppo.py --encoder siglip2-so400m

Reads   runs/NAME/pretrain/final (the policy starts there) and MMPR preference pairs: their prompts,
        and their chosen answers for the gold answer in them. A pair without one is dropped.
        --parent takes another run's stage 1, or a published model, instead.
Writes  runs/NAME/ppo/: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ (opens as
        LlavaForConditionalGeneration). Next: python extract.py --run-dir runs/NAME --stage ppo

`diff train_grpo.py train_ppo.py` shows the method. Answers are drawn and scored as there: at step 0
the very same ones. But where GRPO compares an answer with its group, PPO compares each token with
what was expected: a value head reads off the policy's own hidden state how much reward is still to
come, and a token after which more came than was expected before it is made more likely. The group
only saves encodings: its answers stand in one row, behind one picture. The items and their order
are those of `train_dpo.py --verifiable`.

What was decided here, where PPOs differ:
  the value head      is one linear layer, zero at the start, with a rate and a gradient norm of its
                      own, and no part of final/. It is *detached*: its loss stops at the hidden
                      state, so that the encoder sees the policy's gradient alone. --value-gradient
                      lets it through. Then the encoder is taught by two losses at once, and the
                      second is regression on the rule's scores, supervised learning from gold
                      answers: what it does to the encoder is no longer RL's doing
  KL                  from the first π is a cost in each token's reward, k1: log π − log π_ref, at
                      0.05 (arXiv 2403.17031). GRPO's default is none; --kl 0 holds no second model
  truncated answers   (no end within --max-new-tokens) get reward 0, as if they had ended there
  advantages          are whitened over the tokens of the global batch, of all processes
  log π_old, V_old    are of a forward of their own before the update. In the first inner epoch
                      ρ = 1 and V = V_old: clipping does nothing before the second, and by default,
                      as in GRPO, there is one
  the loss            does not say what was learned: at ρ = 1 the policy's part is 0, for advantages
                      are whitened, and what is left is the value head's. Look at `reward_exact` (or
                      what --rule names); no `reward` has the cost of KL in it
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

# The PIVOT paper's PPO is another project's model. Items, steps, rate and group are GRPO's here; λ,
# KL, clipping and the value loss's weight are those of arXiv 2403.17031. The head's rate is ours:
# with a frozen policy on the toy 1e-2 was the best of six after 60 steps; at 1e-3 the head was
# still worse than a constant. A step of Adam moves a value by at most rate × Σ|hidden state|, 1.3
# on the toy and larger in Qwen, for which 3e-4 is a guess.
PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", epochs=3, lr=1e-6,
             global_batch=256, micro_batch=4, warmup=0.03, num_samples=20_000, workers=4,
             group=8, max_new_tokens=512, value_lr=3e-4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", epochs=1, lr=5e-5, global_batch=32,
           micro_batch=32, workers=1, max_new_tokens=24, value_lr=1e-2)


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_parent(parser)
    flags.add_preferences(parser)
    flags.add_rollout(parser, score.RULES)
    parser.add_argument("--group", type=flags.COUNT, help="answers drawn for a "
                        "prompt (default 8)")
    parser.add_argument("--inner-epochs", type=flags.COUNT, default=1, help="optimizer steps on "
                        "what a rollout drew (default 1)")
    parser.add_argument("--clip-low", type=flags.number(float, 0, 1), default=0.2,
                        help="where ρ = π / π_old is below 1 − CLIP_LOW, a token of a bad answer "
                        "is not made less likely still (default 0.2)")
    parser.add_argument("--clip-high", type=flags.RATE, default=0.2,
                        help="where ρ is above 1 + CLIP_HIGH, a token of a good answer is not made "
                        "more likely still (default 0.2)")
    parser.add_argument("--clip-value", type=flags.RATE, default=0.2, help="a value this far from "
                        "the old one moves no further (default 0.2)")
    parser.add_argument("--gamma", type=flags.number(float, 0, 1), default=1, help="γ: how much a "
                        "reward one token later counts (default 1)")
    parser.add_argument("--lam", type=flags.number(float, 0, 1), default=0.95, help="λ of GAE: at "
                        "0 one token, then the value head's word; at 1 the rewards that came, "
                        "alone (default 0.95)")
    parser.add_argument("--value-lr", type=flags.RATE, help="the value head's own rate "
                        "(default 3e-4; 1e-2 with a toy LLM)")
    parser.add_argument("--value-weight", type=flags.RATE, default=0.1, help="of the value loss; "
                        "it matters with --value-gradient; the head alone is moved by Adam, which "
                        "heeds no scale (default 0.1)")
    parser.add_argument("--value-gradient", action="store_true", help="the value loss trains LLM, "
                        "projector and encoder, too; see above")
    parser.add_argument("--kl", type=flags.RATE, default=0.05, help="what a nat of divergence from "
                        "the model it starts from costs, then held a second time, frozen; 0: none "
                        "(default 0.05)")
    flags.add_heldout(parser, "answered, greedily,")
    args = flags.settle_pairs(parser.parse_args(argv), "ppo", PAPER, TOY, parent="pretrain")
    args.verifiable = True                       # what data.preference_pairs keeps
    if args.kl and args.compile and args.dtype == "bf16":
        raise SystemExit("error: --kl with --compile in bf16: compiled without gradients the "
                         "reference rounds otherwise; --kl 0, or leave --compile out")
    return args


def roll_out(args, model, tokenizer, pairs, prompts, index, step):
    """METHOD: draw and score a group for each prompt of a micro-batch.

    → a dict that the update reads: `batch` for the model; `sampler_logps` (R,), of the R drawn
    tokens; `lengths`, `rewards` (B, G); `counts` to be logged.
    """
    drawn, rewards, counts = rollout.draw_and_score(args, model, tokenizer, pairs, prompts, index,
                                                    step, score.RULES[args.rule])
    device = prompts["input_ids"].device
    return {"batch": data.group_batch(prompts, drawn.answers),
            "sampler_logps": drawn.sampler_logps, "counts": counts,
            "lengths": drawn.lengths.to(device, non_blocking=True),
            "rewards": rewards.to(device, non_blocking=True)}


def look_back(args, model, ref_model, part):
    """METHOD: before any update, what policy, value head and reference say of every token that was
    drawn, and what then came of it.

    → a dict: `drawn_at`, (b, t), where in (B, T) these R tokens stand; and each (R,), an entry a
    token: `old_logps`, `old_values`; `kl`, log π_old − log π_ref; `advantages`, A, not yet
    whitened; `returns`, A + V_old, which V is to become.
    """
    batch = part["batch"]
    drawn_at = (batch["labels"] != m.IGNORE).nonzero(as_tuple=True)
    with torch.set_grad_enabled(args.compile):    # its graph is freed at once: nothing holds it
        old_logps, old_values = (x.detach()[drawn_at] for x in model(**batch, with_values=True))
    kl = torch.zeros_like(old_logps)
    if args.kl:
        with torch.no_grad():
            kl = old_logps - ref_model(**batch)[drawn_at]
    rewards = m.token_rewards(part["rewards"], args.kl * kl, part["lengths"])
    advantages = m.gae(rewards, old_values, part["lengths"], args.gamma, args.lam)
    return {"drawn_at": drawn_at, "old_logps": old_logps, "old_values": old_values, "kl": kl,
            "advantages": advantages, "returns": advantages + old_values}


def whiten(parts):
    """METHOD: the advantages of all tokens, of all processes, get mean 0 and deviation 1, in place.

    → what the value head explained of the variance of the returns: 1 − Var(returns − V_old) /
    Var(returns). 0: no more than a constant would; below 0: less; 1: all. Below --lam 1 returns
    have V in them, and this flatters the head.
    """
    def moments(name):
        values = torch.cat([part[name] for part in parts]).double()
        sums = distributed.reduce_sum({"count": len(values), "sum": values.sum(),
                                       "squares": values.square().sum()})
        mean = sums["sum"] / sums["count"]
        return mean, max(0.0, sums["squares"] / sums["count"] - mean ** 2)

    mean, variance = moments("advantages")                                 # A = returns − V_old
    _, of_returns = moments("returns")
    for part in parts:
        part["advantages"] = (part["advantages"] - mean) / (variance + 1e-8) ** 0.5
    return 1 - variance / of_returns if of_returns else 0.0


def require_same_function(args, sampler_gap, ref_gap, log_ratio):
    """METHOD: before the first update the sampler, the policy and the reference are one model, and
    the policy is still the one of the look back: what they say of the drawn tokens is apart by
    rounding alone (of the sampler's more, for it computes otherwise). Means of |Δ log π|; raises
    SystemExit.
    """
    rollout.require_same_sampler(args, sampler_gap)
    who = "policy, old policy and reference" if args.kl else "policy and old policy"
    training.require_same_function(
        args, max(ref_gap, log_ratio),
        f"|log π − log π_ref| {ref_gap:.2g}, |log ρ| {log_ratio:.2g}: {who}")


def main():
    args = get_args()
    device = distributed.start()
    run = checkpoints.Run(Path(args.run, args.stage), args)

    # ---- model
    model, tokenizer = model_io.load_mllm(run.parent)
    rollout.require_branches(model.llm)
    model.value = m.ValueHead(model.llm.config.hidden_size, detached=not args.value_gradient)
    rates = {**training.learning_rates(args), "value": args.value_lr}
    model = distributed.shard(model, device, args.dtype, args.activation_checkpointing,
                              args.replicas, args.attention, args.compile)
    ref_model = None
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

        # ---- look back
        for part in parts:
            part.update(look_back(args, model, ref_model, part))
        past = distributed.reduce_sum({
            "kl": sum(part["kl"].sum() for part in parts),
            "ref_gap": sum(part["kl"].abs().sum() for part in parts),
            "surprise": -sum(part["old_logps"].sum() for part in parts),
            "sampler_gap": sum((part["old_logps"] - part["sampler_logps"]).abs().sum()
                               for part in parts)})
        past = {k: v / counts["answer_tokens"] for k, v in past.items()}
        explained = whiten(parts)

        # ---- update
        for inner in range(args.inner_epochs):
            sums = {"loss": 0.0, "tokens": 0, "value_loss": 0.0, "clipped": 0, "value_clipped": 0,
                    "log_ratio": 0.0}
            for micro, part in enumerate(parts):
                batch = part["batch"]
                model.set_requires_gradient_sync(micro == order.micro_steps - 1)

                # METHOD: one image, one prompt, G answers, one forward. A row is the prompt less
                # its last token; then, for each answer, that token once more and the answer,
                # which sees prompt and itself (data.branch_row, model.visible).
                # L = E_tokens [−min(ρ A, clip(ρ) A) + w ½ max((V − Y)², (clip(V) − Y)²)]
                # ρ = π / π_old; Y: returns; clip(V): at most --clip-value from V_old;
                # w: --value-weight
                # gradients are summed over micro-batches and processes
                drawn_at = part["drawn_at"]
                logps, values = model(**batch, with_values=True)                  # (B, T) fp32
                logps, values = logps[drawn_at], values[drawn_at]     # (R,), of R drawn tokens
                losses, clipped = m.clipped_loss(logps, part["old_logps"], part["advantages"],
                                                 args.clip_low, args.clip_high)
                value_losses, value_clipped = m.value_loss(values, part["old_values"],
                                                           part["returns"], args.clip_value)
                # a mean over the tokens of all processes
                loss = (losses + args.value_weight * value_losses).sum() / counts["answer_tokens"]
                loss.backward()

                sums["loss"] += loss.detach()
                sums["tokens"] += batch["input_ids"].numel()      # prompts and padding, too
                sums["value_loss"] += value_losses.detach().sum()
                sums["clipped"] += clipped.sum()
                sums["value_clipped"] += value_clipped.sum()
                sums["log_ratio"] += (logps.detach() - part["old_logps"]).abs().sum()
            sums = distributed.reduce_sum(sums)
            mean = {k: v / counts["answer_tokens"] for k, v in sums.items()}
            norms = training.clip_grad_norm(model)
            norms |= training.clip_grad_norm(model, modules=["value"])     # not with the policy's
            training.require_finite(step, sums["loss"], norms, pairs, order)
            if step == 0 and inner == 0:
                require_same_function(args, past["sampler_gap"], past["ref_gap"],
                                      mean["log_ratio"])
            optimizer.step()
            optimizer.zero_grad()

        # ---- log, save; loss, norms and clipped are of the last inner epoch
        per_answer = {k: v / counts["answers"] for k, v in counts.items()}
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms,
                 **{k: v for k, v in per_answer.items() if k.startswith("reward")},
                 "stopped": per_answer["stopped"], "length": per_answer["answer_tokens"],
                 "entropy": past["surprise"], "sampler_gap": past["sampler_gap"],
                 "clipped": mean["clipped"],
                 "value_loss": mean["value_loss"], "value_clipped": mean["value_clipped"],
                 "explained_variance": explained,
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
