"""What learning from one's own answers begins with: answers are drawn to prompts, and scored.

Shared by the stages that do so. What is then made of the scores, and of log-probs, is theirs.
"""
import hashlib
from typing import NamedTuple

import torch


class Drawn(NamedTuple):
    """Answers to B prompts, G to each. answers: B lists of G lists of token ids, the stop token
    included; stopped: bool (B, G), False where an answer was cut off at max_new_tokens."""
    answers: list
    stopped: torch.Tensor

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


def draw(model, prompts, group, max_new_tokens, stop_id, seeds=()):
    """METHOD: G answers to each prompt, from the model as it is, at temperature 1: from π itself,
    every token of its vocabulary but `<image>`. A prompt and its image go through the model once.
    → Drawn.

    prompts: a micro-batch of data.collate's layout "prompts"; stop_id: the token that ends an
    answer; seeds: B lists of G ints; none: one greedy answer. No other sampler is used: of what
    top-k or another temperature draws, log π is not the log-prob.
    """
    uniforms = None
    if seeds:
        uniforms = torch.stack([uniforms_of(seed, max_new_tokens) for own in seeds for seed in own])
    rows = model.generate(
        prompts["pixel_values"], prompts["input_ids"], prompts["attention_mask"], max_new_tokens,
        [stop_id], 1.0 if seeds else 0.0, keep_stop=True, group=group, uniforms=uniforms)
    answers = [rows[i:i + group] for i in range(0, len(rows), group)]
    stopped = torch.tensor([[answer[-1] == stop_id for answer in group] for group in answers])
    return Drawn(answers, stopped)


def score(drawn, tokenizer, golds, rule):
    """What each answer is worth: (B, G) fp32. golds: B gold answers; rule: a function of an
    answer's text and a gold answer → a number.

    An answer that did not stop gets 0, whatever stands in it: nobody has said where it ends.
    """
    values = [[rule(text, gold) for text in tokenizer.batch_decode(
        [answer[:-1] if stops else answer for answer, stops in zip(group, stopped)])]
        for group, stopped, gold in zip(drawn.answers, drawn.stopped.tolist(), golds)]
    return torch.tensor(values, dtype=torch.float32) * drawn.stopped
