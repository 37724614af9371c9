"""The losses of GRPO and MPO beside TRL's own code, fed the same numbers: values and gradients.

    python benchmarks/signals_vs_trl.py [--old-trl WHEEL]

Ours are the functions of model.py. TRL's are called as they stand, in fp64, on the CPU:

  GRPO   GRPOTrainer of the TRL that is installed, from rewards and log-probs to the loss
  MPO    DPOTrainer of TRL 0.24, from logits to the loss: later ones have no δ. It does not open
         beside transformers 5, so this class alone is read out of its wheel, which comes by
         pip download trl==0.24.0 --no-deps --dest .venv-bench

Answers are ragged, ratios reach beyond both clips, one token has id 0. Prints a table: how far ours
lies from TRL's as both stand, and how far once a difference that is meant is undone. Exits with 1
where the second is over --tolerance, or where a difference that is named is not there.
"""
import argparse
import ast
import contextlib
import functools
import sys
import textwrap
import zipfile
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import common as c
import data
import model as m
import torch
import train_grpo
from torch.nn.utils.rnn import pad_sequence

LOW, HIGH, KL, LONGEST = 0.2, 0.28, 0.3, 9
BETA, WEIGHTS, VOCABULARY, PROMPT = 0.1, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 50, 4


def apart(ours, theirs, leaf):
    """How far two losses, and their gradients at a leaf, lie apart, relative to the larger one."""
    pairs = [(x.detach(), torch.autograd.grad(x, leaf, retain_graph=True)[0])
             for x in (ours, theirs)]
    return max(float((a - b).abs().max() / torch.maximum(a.abs(), b.abs()).max())
               for a, b in zip(*pairs))


# -------------------------------------------------------------------------------------------- GRPO

def groups_of_answers(seed=0):
    """Two groups of four ragged answers, their rewards, and log-probs of their tokens: a dict."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[3, 9, 1, 5], [7, 2, 8, 4]])
    answers = [[torch.randint(1, VOCABULARY, (n,), generator=g).tolist() for n in group]
               for group in lengths.tolist()]
    prompts = {"pixel_values": torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
               "input_ids": torch.tensor([[0, 7, 8, 9], [5, 7, 8, 9]]),
               "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    logps = -torch.rand(int(lengths.sum()), generator=g, dtype=torch.float64) * 3
    old, ref = (logps + 0.3 * torch.randn(len(logps), generator=g, dtype=torch.float64)
                for _ in range(2))
    return {"answers": answers, "lengths": lengths, "prompts": prompts, "old": old, "ref": ref,
            "logps": logps.requires_grad_(),
            "rewards": torch.tensor([[1, 0, 0, 1], [0.2, 0, 0.9, 0]], dtype=torch.float64)}


def our_grpo(given, normalise, kl):
    """train_grpo.py's loss of a micro-batch that is the global batch. → loss, share clipped."""
    batch = data.group_batch(given["prompts"], given["answers"])
    advantages = m.group_advantages(given["rewards"], scaled=normalise != "dr_grpo")
    losses, clipped = m.clipped_loss(
        given["logps"], given["old"], m.of_tokens(advantages, batch["branch"], batch["labels"]),
        LOW, HIGH)
    losses = losses + kl * m.kl_k3(given["logps"], given["ref"])
    lengths = given["lengths"].double()
    weights = train_grpo.NORMALISE[normalise](lengths, lengths.numel(), lengths.sum(), LONGEST)
    loss = (losses * m.of_tokens(weights, batch["branch"], batch["labels"])).sum()
    return loss, clipped.double().mean()


def their_grpo(given, normalise, kl, kl_by_ratio):
    """GRPOTrainer's, from rewards to loss; only what a model would give it is put in its place."""
    from trl import GRPOTrainer
    rows = [answer for group in given["answers"] for answer in group]
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(
        given["prompts"]["input_ids"], given["prompts"]["attention_mask"]) for _ in range(4)]

    def in_rows(values):
        return pad_sequence(values.split(given["lengths"].flatten().tolist()), batch_first=True)

    class Trainer(GRPOTrainer):
        def __init__(self):
            self.__dict__.update(dict.fromkeys(
                ["environment_factories", "environments", "pad_to_multiple_of",
                 "off_policy_mask_threshold"]))
            self.__dict__.update(dict.fromkeys(
                ["tools", "use_vllm", "mask_truncated_completions", "aux_loss_enabled",
                 "_entropy_bonus_enabled", "log_multimodal"], False))
            self.num_generations, self.loss_type, self.beta = 4, normalise, kl
            self.epsilon_low, self.epsilon_high, self.max_completion_length = LOW, HIGH, LONGEST
            self.scale_rewards = "none" if normalise == "dr_grpo" else "group"
            self.multi_objective_aggregation = "sum_then_normalize"
            self.importance_sampling_level, self.top_entropy_quantile = "token", 1.0
            self.num_iterations = self.current_gradient_accumulation_steps = 1
            self.reward_weights, self.reward_func_names = torch.ones(1), ["reward"]
            self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
            self.ref_model, self._tokenizer = self.model, SimpleNamespace(pad_token_id=0)
            self.args = SimpleNamespace(
                per_device_train_batch_size=8, steps_per_generation=1, delta=None,
                gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
                use_bias_correction_kl=kl_by_ratio)
            self.accelerator = SimpleNamespace(
                device=torch.device("cpu"), num_processes=1, process_index=0,
                gather=lambda x: x, reduce=lambda x, reduction: x)
            self._metrics = {"train": defaultdict(list)}
            self._logs = {"prompt": deque(), "completion": deque(), "advantages": deque(),
                          "rewards": defaultdict(deque), "extra": defaultdict(deque)}
            self._pending_extra_logs, self._pending_metrics = {}, {}

        def _generate(self, texts):
            return prompts, rows, None, rows, None, {}, None, []

        def _calculate_rewards(self, *inputs):
            return given["rewards"].view(-1, 1)

        def _get_per_token_logps_and_entropies(self, *inputs, **named):
            values = in_rows(given["logps"] if torch.is_grad_enabled() else given["ref"])
            return values, torch.zeros_like(values), None

    trainer = Trainer()
    inputs = trainer._generate_and_score_completions([{"prompt": "?"}] * len(rows))
    loss = trainer._compute_loss(trainer.model,
                                 {**inputs, "old_per_token_logps": in_rows(given["old"])})
    return loss, trainer._metrics["train"]["clip_ratio/region_mean"][0]


def compare_grpo():
    """Rows of the table: what is compared, as both stand, with what is meant undone, and what."""
    given, rows = groups_of_answers(), []
    for normalise in train_grpo.NORMALISE:
        (ours, share), (theirs, their_share) = our_grpo(given, normalise, 0), \
            their_grpo(given, normalise, 0, True)
        rows.append([f"GRPO, {normalise}", apart(ours, theirs, given["logps"]), None, ""])
    rows.append(["GRPO, share clipped", abs(float(share) - their_share), None, ""])
    if not 0 < share < 1:
        raise SystemExit("error: nothing was clipped: the comparison says nothing of clipping")
    ours = our_grpo(given, "dapo", KL)[0]
    rows.append(["GRPO, with KL (k3)", *(
        apart(ours, their_grpo(given, "dapo", KL, by_ratio)[0], given["logps"])
        for by_ratio in (True, False)), "TRL multiplies the KL by ρ (use_bias_correction_kl)"])
    return rows


# --------------------------------------------------------------------------------------------- MPO

def old_trainer(wheel):
    """TRL 0.24's DPOTrainer without its base, and what it needs of TRL: names in a dict."""
    if not Path(wheel).is_file():
        raise SystemExit(f"error: {wheel} is not there; get it by: pip download trl==0.24.0 "
                         f"--no-deps --dest {Path(wheel).parent}")
    wanted = {"trl/trainer/utils.py": {"RunningMoments", "pad_to_length", "flush_left",
                                       "selective_log_softmax"},
              "trl/trainer/dpo_trainer.py": {"DPOTrainer"}}
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "textwrap": textwrap,
             "dataclass": dataclass, "contextmanager": contextlib.contextmanager,
             "__name__": "trl_0_24",
             "FDivergenceType": SimpleNamespace(ALPHA_DIVERGENCE="alpha", JS_DIVERGENCE="js")}
    sys.modules["trl_0_24"] = sys                                # @dataclass looks it up
    with zipfile.ZipFile(wheel) as files:
        for file, things in wanted.items():
            tree = ast.parse(files.read(file))
            tree.body = [node for node in tree.body if getattr(node, "name", None) in things]
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    node.bases = []
            annotations = ast.parse("from __future__ import annotations").body
            exec(compile(ast.Module(annotations + tree.body, []), file, "exec"), names)
    return names


def pairs_of_answers(step, longest):
    """Three pairs behind one prompt of 4 tokens: ids (6, 4 + longest), lengths (6,), logits and the
    reference's log-probs (2, 3). Chosen ones first; one chosen token has id 0."""
    g = torch.Generator().manual_seed(step)
    lengths = torch.tensor([longest, 2, 5, 3, longest, 1])
    ids = torch.randint(1, VOCABULARY, (6, PROMPT + longest), generator=g)
    ids[:, :PROMPT] = ids[0, :PROMPT]
    ids[0, PROMPT + 1] = 0
    logits = torch.randn(6, PROMPT + longest, VOCABULARY, generator=g, dtype=torch.float64)
    ref = -8 * torch.rand(2, 3, generator=g, dtype=torch.float64) - 3 * lengths.view(2, 3)
    return ids, lengths, (3 * logits).requires_grad_(), ref


def their_mpo(old, running, given, kinds):
    """DPOTrainer.get_batch_loss_metrics with these kinds of loss: the loss."""
    ids, lengths, logits, ref = given
    mask = torch.arange(ids.shape[1]) < PROMPT + lengths[:, None]
    trainer = old["DPOTrainer"].__new__(old["DPOTrainer"])
    trainer.__dict__.update(dict.fromkeys(
        ["reference_free", "is_encoder_decoder", "aux_loss_enabled", "use_logits_to_keep",
         "padding_free", "use_weighting", "label_smoothing"], 0), max_length=None)
    trainer.beta, trainer.running, trainer.pad_token_id = BETA, running, 0
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_type, trainer.loss_weights = list(kinds), [WEIGHTS[kind] for kind in kinds]
    trainer.args = SimpleNamespace(use_liger_loss=False, rpo_alpha=None, ld_alpha=None)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), use_distributed=False,
                                          gather_for_metrics=lambda x: x)
    batch = {"prompt_input_ids": ids[:3, :PROMPT], "prompt_attention_mask": mask[:3, :PROMPT].int(),
             "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    for name, rows in (("chosen", slice(0, 3)), ("rejected", slice(3, 6))):
        batch[f"{name}_input_ids"] = ids[rows, PROMPT:]
        batch[f"{name}_attention_mask"] = mask[rows, PROMPT:].int()
    return trainer.get_batch_loss_metrics(
        lambda ids, **named: SimpleNamespace(logits=logits[:, :ids.shape[1]]), batch)[0]


def our_mpo(given, delta, ids_counted=range(VOCABULARY), token_mean=False):
    """model.mpo_loss of the same pairs: {kind: its mean over pairs}, the mean of all rewards.

    token_mean: the likelihood as a mean over the chosen tokens of all pairs; ids_counted: over
    those with these ids.
    """
    ids, lengths, logits, ref = given
    targets = ids[:, PROMPT:]
    logps = logits[:, PROMPT - 1:-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    answered = torch.arange(targets.shape[1]) < lengths[:, None]
    chosen, rejected = (logps * answered).sum(1).view(2, 3)
    preference, quality, generation, *rewards = m.mpo_loss(
        chosen, rejected, *ref, BETA, delta, lengths[:3])
    if token_mean:
        counted = answered[:3] & torch.isin(targets[:3], torch.tensor(list(ids_counted)))
        generation = -logps[:3][counted]
    return {"sigmoid": preference.mean(), "bco_pair": quality.mean(),
            "sft": generation.mean()}, float(torch.stack(rewards).mean())


def compare_mpo(wheel):
    """Three steps, so that δ has a past. Rows as compare_grpo's, the worst of the steps."""
    old = old_trainer(wheel)
    gaps, delta = defaultdict(list), 0.0
    new_running = functools.partial(
        old["RunningMoments"], SimpleNamespace(use_distributed=False))
    running, of_all = new_running(), new_running()
    for step in range(3):
        given = pairs_of_answers(step, longest=8)
        ours, rewards = our_mpo(given, delta)
        after = delta + (rewards - delta) / (step + 1)
        undone, _ = our_mpo(given, after, range(1, VOCABULARY), token_mean=True)
        for kind in WEIGHTS:
            theirs = their_mpo(old, running, given, [kind])
            gaps[kind].append([apart(WEIGHTS[kind] * x[kind], theirs, given[2])
                               for x in (ours, undone)])
        theirs = their_mpo(old, of_all, given, WEIGHTS)
        gaps["all"].append([apart(sum(WEIGHTS[k] * x[k] for k in WEIGHTS), theirs, given[2])
                            for x in (ours, undone)])
        delta = after
    worst = {kind: [max(column) for column in zip(*steps)] for kind, steps in gaps.items()}
    return [["MPO, preference", worst["sigmoid"][0], None, ""],
            ["MPO, quality", *worst["bco_pair"], "TRL's δ takes in a step's rewards before it"],
            ["MPO, generation", *worst["sft"], "TRL's is a mean over all tokens but id 0"],
            ["MPO, all three", *worst["all"], "both"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no difference: it takes seconds")
    parser.add_argument("--old-trl", default=str(c.ROOT / ".venv-bench" /
                                                 "trl-0.24.0-py3-none-any.whl"),
                        help="TRL 0.24's wheel (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="δ is fp32 in TRL "
                        "(default %(default)s)")
    args = parser.parse_args()
    rows, wrong = compare_grpo() + compare_mpo(args.old_trl), []
    for term, standing, undone, named in rows:
        if not (standing if undone is None else undone) <= args.tolerance:
            wrong.append(f"{term} differs")
        if named and standing <= 100 * args.tolerance:
            wrong.append(f"{term}: no longer differs by what is named")
    c.table(["", "as both stand", "undone", "what is meant to differ"],
            [[term, f"{standing:.1e}", "" if undone is None else f"{undone:.1e}", named]
             for term, standing, undone, named in rows])
    c.write("signals_vs_trl", args, {"apart": rows})
    if wrong:
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
