"""What learning from one's own answers begins with: answers are drawn to prompts, and scored.

Shared by the stages that do so. What is then made of the scores, and of log-probs, is theirs.
"""
import hashlib
from typing import NamedTuple

import torch

from model import can_hold_pairs
from pivot import distributed, records, training
from pivot.distributed import print0


class Drawn(NamedTuple):
    """Answers to B prompts, G to each. answers: B lists of G lists of token ids, the stop token
    included; stopped: bool (B, G), False where an answer was cut off at max_new_tokens;
    sampler_logps: fp32 (R,), log π of the R tokens of all answers, one after the other, as the
    KV-cached forward had it that drew them; None where nobody asked for them."""
    answers: list
    stopped: torch.Tensor
    sampler_logps: torch.Tensor | None = None

    @property
    def lengths(self):
        """Tokens of each answer, (B, G) int64."""
        return torch.tensor([[len(answer) for answer in group] for group in self.answers])


def seed_of(*what):
    """A seed (32 bits) for what is named, whatever its place in a batch and whoever draws."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:4], "big")


def uniforms_of(seed, count):
    """The numbers in [0, 1) that an answer's tokens are drawn by: (count,) fp64."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(model, prompts, group, max_new_tokens, stop_id, seeds=(), with_logps=False):
    """METHOD: G answers to each prompt, from the model as it is, at temperature 1: from π itself,
    every token of its vocabulary but `<image>`. A prompt and its image go through the model once.
    → Drawn.

    prompts: a micro-batch of data.collate's layout "prompts"; stop_id: the token that ends an
    answer; seeds: B lists of G ints; none: one greedy answer; with_logps: sampler_logps, too. There
    is no other sampler: what top-k or another temperature draws does not come from π, and log π
    would not be its log-prob.
    """
    how = dict(max_new_tokens=max_new_tokens, stop_ids=[stop_id], keep_stop=True, group=group)
    if seeds:
        uniforms = torch.stack([uniforms_of(seed, max_new_tokens) for own in seeds for seed in own])
        how |= dict(temperature=1.0, uniforms=uniforms)
    rows = model.generate(**prompts, **how, with_logps=with_logps)
    if with_logps:
        rows, logps = rows
    answers = [rows[i:i + group] for i in range(0, len(rows), group)]
    stopped = torch.tensor([[answer[-1] == stop_id for answer in group] for group in answers])
    drawn = Drawn(answers, stopped)
    if with_logps:
        own = (torch.arange(logps.shape[1]) < drawn.lengths.view(-1, 1)).nonzero()   # not behind
        drawn = drawn._replace(sampler_logps=logps[own.to(logps.device).unbind(1)])
    return drawn


def texts_of(drawn, tokenizer):
    """The answers as texts, without the token that ended them: B lists of G."""
    return [tokenizer.batch_decode([answer[:-1] if stops else answer
                                    for answer, stops in zip(group, stopped)])
            for group, stopped in zip(drawn.answers, drawn.stopped.tolist())]


def score(drawn, tokenizer, golds, rule):
    """What each answer is worth: (B, G) fp32. golds: B gold answers; rule: a function of an
    answer's text and a gold answer → a number.

    An answer that did not stop gets 0, whatever stands in it: nobody has said where it ends.
    """
    values = [[rule(text, gold) for text in texts]
              for texts, gold in zip(texts_of(drawn, tokenizer), golds)]
    return torch.tensor(values, dtype=torch.float32) * drawn.stopped


def well_formed(said, gold):
    """Is something said first, then "Final answer:", and something after it? 1 or 0."""
    parts = [part.strip(records.EDGES) for part in records.FINAL.split(said)]
    return float(len(parts) > 1 and bool(parts[0]) and bool(parts[-1]))


def rewards_of(args, drawn, tokenizer, pairs, index, step, rule):
    """METHOD: what each answer is worth, (B, G); its parts before their weights, {name: (B, G)}.

    rule: what --rule names, a function of an answer and a gold answer → a number. An answer that
    did not stop gets 0 for every part; under --reward-control random a coin, like any other.
    """
    def right(said, gold):
        return rule(records.final_answer(said), gold)

    golds = [pairs.golds[i] for i in index]
    parts = {args.rule: score(drawn, tokenizer, golds, right)}
    rewards = parts[args.rule]
    if args.format_reward:
        parts["format"] = score(drawn, tokenizer, golds, well_formed)
        rewards = rewards + args.format_reward * parts["format"]
    if args.reward_control == "random":
        coins = [[seed_of("coin", args.seed, step, pairs.keys[i], g) % 2
                  for g in range(args.group)] for i in index]
        rewards = torch.tensor(coins, dtype=torch.float32)
    return rewards, parts


def draw_and_score(args, model, tokenizer, pairs, prompts, index, step, rule):
    """METHOD: a group of answers to each prompt of a micro-batch, and what each of them is worth.

    The random numbers of an answer are a function of --seed, the step and the item, not of who
    draws it: with the same weights, a run that was killed draws the same answers again. → Drawn;
    the rewards (B, G); counts to be logged, {name: a number}.
    """
    seeds = [[seed_of(args.seed, step, pairs.keys[i], g) for g in range(args.group)]
             for i in index]
    drawn = draw(model, prompts, args.group, args.max_new_tokens,
                 tokenizer.convert_tokens_to_ids("<|im_end|>"), seeds, with_logps=True)
    rewards, parts = rewards_of(args, drawn, tokenizer, pairs, index, step, rule)
    counts = {"answers": rewards.numel(), "answer_tokens": drawn.lengths.sum(),
              "reward": rewards.sum(), "stopped": drawn.stopped.sum(),
              **{f"reward_{name}": values.sum() for name, values in parts.items()}}
    return drawn, rewards, counts


def next_prompts(args, clock):
    """A micro-batch of prompts, and which pairs they are."""
    prompts = clock.next_batch()
    index = prompts.pop("index").tolist()
    if args.blank_image:
        prompts["pixel_values"] = torch.zeros_like(prompts["pixel_values"])
    return prompts, index


def report_heldout(args, run, model, tokenizer, clock, step, samples, order, loader, rule):
    """The rule's mean score of greedy answers to prompts never trained on. loader: data.loader;
    rule: as in rewards_of."""
    scores, seen = torch.zeros(len(samples)), torch.zeros(len(samples))
    stop_id, cover = tokenizer.convert_tokens_to_ids("<|im_end|>"), order.cover()
    clock.start(loader(samples, cover, "prompts", args.workers))
    for _ in distributed.progress(0, len(cover), "held-out pairs"):
        prompts, index = next_prompts(args, clock)
        drawn = draw(model, prompts, 1, args.max_new_tokens, stop_id)
        _, parts = rewards_of(args, drawn, tokenizer, samples, index, step, rule)
        scores[index], seen[index] = parts[args.rule][:, 0], 1
    reward = (distributed.sum_tensor(scores) / distributed.sum_tensor(seen)).mean().item()
    run.log({"step": step, "heldout_reward": reward})
    print0(f"  held-out pairs after {step} steps: {args.rule} {reward:.4f} (n = {len(samples)})")


def require_same_sampler(args, gap):
    """Raise SystemExit where the model that draws, with a KV cache, left padding and one position
    after the other, is not the model that is trained. gap: the mean of |Δ log π| over the drawn
    tokens, before the first update: rounding, in bf16 some hundredths of a nat."""
    training.require_same_function(
        args, gap, f"|log π_sampler − log π| {gap:.2g}: what draws and what is trained",
        "a mask or positions that are wrong in one of them", fp32=1e-4, bf16=0.1)


def require_branches(llm):
    """Raise SystemExit where this LLM cannot hold a group in a row."""
    if not can_hold_pairs(llm):
        raise SystemExit(f"error: the answers of a group stand in one row, apart by a mask that "
                         f"not every layer of a {llm.config.model_type} heeds; take another --llm")


def require_room(model, pairs, max_new_tokens):
    """Raise SystemExit where this LLM cannot hold an answer behind the longest prompt."""
    positions = model.llm.config.max_position_embeddings
    texts = (pairs.tokens(i) for i in range(len(pairs)))
    longest = max((roles == records.PROMPT).sum() + (ids == pairs.image_id).sum()
                  * (pairs.num_image_tokens - 1) for ids, roles in texts)
    if longest + max_new_tokens > positions:
        raise SystemExit(f"error: --max-new-tokens {max_new_tokens} after a prompt of {longest} "
                         f"tokens: this LLM has {positions} positions")
