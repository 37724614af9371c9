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
  KL                  from stage 1 is a cost in the reward of each token, k1: log π − log π_ref, at
                      0.05 (arXiv 2403.17031). GRPO's default is none; --kl 0 holds no second model
  truncated answers   (no end within --max-new-tokens) get reward 0, as if they had ended there
  advantages          are whitened over the tokens of the global batch, of all processes
  log π_old, V_old    are of a pass of their own before the update, in the layout that is trained.
                      In the first inner epoch ρ = 1 and V = V_old: clipping does nothing before the
                      second, and by default, as in GRPO, there is one
  the loss            of the policy is near 0 by construction. Look at `reward`
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
# KL, clipping and the value loss's weight are those of arXiv 2403.17031. The head's rate is ours.
# On the toy, behind a policy that stood still, 1e-2 was the best of six for runs of 60 steps; 1e-3
# was too slow: its values were still worse than a constant. A step of Adam moves a value by at most
# rate × Σ|hidden state|, there 1.3; for Qwen, whose sum is larger, the rate is a guess.
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
    parser.add_argument("--group", type=flags.COUNT, help="answers drawn to a prompt "
                        "(default 8)")
    parser.add_argument("--inner-epochs", type=flags.COUNT, default=1, help="updates a rollout "
                        "(default 1)")
    parser.add_argument("--clip-low", type=flags.number(float, 0, 1), default=0.2,
                        help="ρ below 1 − this moves no further (default 0.2)")
    parser.add_argument("--clip-high", type=flags.RATE, default=0.2,
                        help="ρ above 1 + this moves no further (default 0.2)")
    parser.add_argument("--clip-value", type=flags.RATE, default=0.2, help="a value this far from "
                        "the old one moves no further (default 0.2)")
    parser.add_argument("--gamma", type=flags.number(float, 0, 1), default=1, help="γ: how much a "
                        "reward one token later counts (default 1)")
    parser.add_argument("--lam", type=flags.number(float, 0, 1), default=0.95, help="λ of GAE: 0 "
                        "trusts the value head, 1 what came of it alone (default 0.95)")
    parser.add_argument("--value-lr", type=flags.RATE, help="the value head's own rate "
                        "(default 3e-4; 1e-2 with a toy LLM)")
    parser.add_argument("--value-weight", type=flags.RATE, default=0.1, help="of the value loss. "
                        "Adam heeds no scale: it matters with --value-gradient (default 0.1)")
    parser.add_argument("--value-gradient", action="store_true", help="the value loss trains LLM, "
                        "projector and encoder, too; see above")
    parser.add_argument("--kl", type=flags.RATE, default=0.05, help="what a nat of divergence from "
                        "stage 1 costs, which is then held as a second, frozen model; 0: none "
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

    → a dict that the update reads: `batch` for the model; `lengths`, `rewards` (B, G); `counts` to
    be logged.
    """
    drawn, rewards, counts = rollout.draw_and_score(args, model, tokenizer, pairs, prompts, index,
                                                    step, score.RULES[args.rule])
    device = prompts["input_ids"].device
    return {"batch": data.group_batch(prompts, drawn.answers), "counts": counts,
            "lengths": drawn.lengths.to(device, non_blocking=True),
            "rewards": rewards.to(device, non_blocking=True)}


def look_back(args, model, ref_model, group):
    """METHOD: before any update, what policy, value head and reference say of every token that was
    drawn, and what then came of it.

    → a dict: `answered`, where those tokens are in the batch; and of (R,), an entry a token:
    `old_logps`, `old_values`; `kl`, log π_old − log π_ref; `advantages`, A, not yet whitened;
    `returns`, R = A + V_old, which V is to become.
    """
    batch = group["batch"]
    answered = (batch["labels"] != m.IGNORE).nonzero(as_tuple=True)
    with torch.set_grad_enabled(args.compile):    # its graph is freed at once: nothing holds it
        old_logps, old_values = (x.detach()[answered] for x in model(**batch, with_values=True))
    kl = torch.zeros_like(old_logps)
    if args.kl:
        with torch.no_grad():
            kl = old_logps - ref_model(**batch)[answered]
    rewards = m.token_rewards(group["rewards"], args.kl * kl, group["lengths"])
    advantages = m.gae(rewards, old_values, group["lengths"], args.gamma, args.lam)
    return {"answered": answered, "old_logps": old_logps, "old_values": old_values, "kl": kl,
            "advantages": advantages, "returns": advantages + old_values}


def whiten(rolled):
    """METHOD: the advantages of all tokens, of all processes, get mean 0 and deviation 1, in place.

    → what the value head explained of the returns' variance: 1 − Var(R − V_old) / Var(R). 0: no
    more than a constant would; 1: all.
    """
    def moments(name):
        values = torch.cat([group[name] for group in rolled]).double()
        sums = distributed.reduce_sum({"count": len(values), "sum": values.sum(),
                                       "squares": values.square().sum()})
        mean = sums["sum"] / sums["count"]
        return mean, max(0.0, sums["squares"] / sums["count"] - mean ** 2)

    mean, variance = moments("advantages")                                       # A = R − V_old
    _, of_returns = moments("returns")
    for group in rolled:
        group["advantages"] = (group["advantages"] - mean) / (variance + 1e-8) ** 0.5
    return 1 - variance / of_returns if of_returns else 0.0


def require_same_function(args, kl, log_ratio):
    """METHOD: before the first update policy and reference are one model, KL 0, and the policy is
    still the one of the look back, |log ρ| 0. Means over tokens; raises SystemExit.
    """
    who = "policy, old policy and reference" if args.kl else "policy and old policy"
    said = f"step 0: KL {kl:.2g}, |log ρ| {log_ratio:.2g}: {who}"
    if max(abs(kl), log_ratio) > (1e-3 if args.dtype == "bf16" else 1e-5):
        raise SystemExit(f"error: {said} are NOT the same function; nothing was updated. Usual "
                         f"causes: randomness in a forward, as of dropout; a forward that changes "
                         f"the model")
    print0(f"  {said} are the same function")


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
    if args.heldout:                               # kept aside, to see what was learned
        heldout = data.preference_pairs(args, args.heldout, tokenizer, model, run, keep_all=True)
        rollout.require_room(model, heldout, args.max_new_tokens)
        held = heldout, order.like(heldout), data.loader, score.RULES[args.rule]
        print0(f"  held-out: {heldout.summary()}")

    # ---- the optimizer works on the sharded fp32 masters
    optimizer = training.adamw(model, rates)
    clock = training.Clock(device, args.stall_timeout)
    ref_model = None
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

        # ---- look back
        for group in rolled:
            group |= look_back(args, model, ref_model, group)
        past = distributed.reduce_sum({
            "kl": sum(group["kl"].sum() for group in rolled) / counts["tokens"],
            "entropy": -sum(group["old_logps"].sum() for group in rolled) / counts["tokens"]})
        explained = whiten(rolled)

        # ---- update
        for inner in range(args.inner_epochs):
            sums = {"loss": 0.0, "tokens": 0, "value_loss": 0.0, "clipped": 0, "value_clipped": 0,
                    "log_ratio": 0.0}
            for micro, group in enumerate(rolled):
                batch = group["batch"]
                model.set_requires_gradient_sync(micro == order.micro_steps - 1)

                # METHOD: one image, one prompt, G answers, one forward.
                # L = E_tokens [−min(ρ A, clip(ρ) A) + w_v · ½ max((V − R)², (clip(V) − R)²)]
                # ρ = π / π_old
                answered = group["answered"]
                logps, values = model(**batch, with_values=True)                  # (B, T) fp32
                logps, values = logps[answered], values[answered]                 # (R,)
                losses, clipped = m.clipped_loss(logps, group["old_logps"], group["advantages"],
                                                 args.clip_low, args.clip_high)
                value_losses, value_clipped = m.value_loss(values, group["old_values"],
                                                           group["returns"], args.clip_value)
                # a mean over the tokens of all processes
                loss = (losses + args.value_weight * value_losses).sum() / counts["tokens"]
                loss.backward()

                sums["loss"] += loss.detach()
                sums["tokens"] += batch["input_ids"].numel()
                sums["value_loss"] += value_losses.detach().sum() / counts["tokens"]
                sums["clipped"] += clipped.sum() / counts["tokens"]
                sums["value_clipped"] += value_clipped.sum() / counts["tokens"]
                log_ratio = logps.detach() - group["old_logps"]
                sums["log_ratio"] += log_ratio.abs().sum() / counts["tokens"]
            sums = distributed.reduce_sum(sums)
            norms = training.clip_grad_norm(model)
            norms |= training.clip_grad_norm(model, modules=["value"])     # not with the policy's
            training.require_finite(step, sums["loss"], norms, pairs, order)
            if step == inner == 0:
                require_same_function(args, past["kl"], sums["log_ratio"])
            optimizer.step()
            optimizer.zero_grad()

        # ---- log, save
        share = {k: v / counts["answers"] for k, v in counts.items()}
        run.log({"step": step, "samples_seen": (step + 1) * args.global_batch,
                 "loss": sums["loss"], "lr": lrs, "grad_norm": norms,
                 **{k: v for k, v in share.items() if k.startswith("reward")},
                 "stopped": share["stopped"], "length": share["tokens"],
                 "entropy": past["entropy"], "clipped": sums["clipped"],
                 "value_loss": sums["value_loss"], "value_clipped": sums["value_clipped"],
                 "explained_variance": explained, **({"kl": past["kl"]} if args.kl else {})},
                {**clock.lap(step, sums["tokens"] * args.inner_epochs),
                 "rollout": round(seconds, 4)})
        bar.set_postfix(reward=f"{share['reward']:.3f}", refresh=False)
        run.save_if_due(step + 1, steps, model, optimizer)
    if args.heldout:
        rollout.report_heldout(args, run, model, tokenizer, *held, clock, step=steps)
    run.finish(model, tokenizer, f"python extract.py --run-dir {args.run} --stage {args.stage}")


if __name__ == "__main__":
    distributed.launch(main)
