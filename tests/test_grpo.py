"""train_grpo.py: losses against slow definitions, a group in one row against plain rows, what is
drawn and what it is worth; the stage on two processes, killed, and under its controls."""
import json
import statistics
from argparse import Namespace

import numpy as np
import pytest
import torch

import data
import model as m
import train_grpo
from conftest import COMMON, ROOT, bit_equal, copied, killed_at, metrics, run, tiny_model
from judge import score
from pivot import model_io, records, rollout
from test_model import IMAGE, llava_twin, plain_norm

LOW, HIGH, BETA, LONGEST = 0.2, 0.28, 0.3, 9


def random_groups(model, sizes=(3, 3), seed=0):
    """Prompts as the loader gives them, and ragged answers: (prompts, [[[id, …], …], …])."""
    g = np.random.default_rng(seed)
    samples, groups = [], []
    for group in sizes:
        prompt = [1] + [IMAGE] * model.encoder.num_tokens + list(
            g.integers(2, 60, g.integers(2, 7)))
        samples.append({"ids": np.array(prompt + [5]), "index": len(samples), "roles": np.array(
            [records.PROMPT] * len(prompt) + [records.ANSWER]),
            "pixels": g.integers(0, 256, (3, 32, 32)).astype(np.uint8)})
        groups.append([g.integers(2, 60, n).tolist() for n in g.permutation(LONGEST)[:group] + 1])
    prompts = data.collate(samples, "prompts")
    prompts.pop("index")
    return prompts, groups


def plain_rows(prompts, groups):
    """The same as rows of one answer each, as SFT has them: a picture and a prompt for each."""
    samples = []
    for ids, mask, pixels, group in zip(prompts["input_ids"], prompts["attention_mask"],
                                        prompts["pixel_values"], groups):
        prompt = ids[mask.bool()].tolist()
        samples += [{"ids": np.array(prompt + answer), "pixels": pixels.numpy(), "index": 0,
                     "roles": np.repeat([records.PROMPT, records.ANSWER],
                                        [len(prompt), len(answer)])} for answer in group]
    return data.collate(samples, "answers")


def predicted(model, batch):
    """log π of all predicted tokens, answer after answer."""
    return model(**batch)[batch["labels"] != m.IGNORE]


# ------------------------------------------------------------------------------------- the losses

def slow_token(logp, old, ref, advantage, estimator):
    """−min(ρ A, clip(ρ) A) + β KL, of one token, as the papers write it."""
    ratio = torch.exp(logp - old)
    bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
    quotient = torch.exp(ref - logp)                                     # π_ref / π
    kl = quotient - torch.log(quotient) - 1 if estimator == "k3" else 0.5 * torch.log(quotient) ** 2
    return -min(ratio * advantage, bounded * advantage) + BETA * kl


def slow_total(per_answer, normalise):
    """[[loss of a token, …] of each answer] → the batch's loss."""
    if normalise == "dapo":
        return sum(map(sum, per_answer)) / sum(map(len, per_answer))
    if normalise == "grpo":
        return sum(sum(x) / len(x) for x in per_answer) / len(per_answer)
    return sum(map(sum, per_answer)) / (len(per_answer) * LONGEST)


@pytest.mark.parametrize("normalise,estimator", [("dapo", "k3"), ("grpo", "k2"), ("dr_grpo", "k3")])
def test_loss_and_gradients_are_the_definition(monkeypatch, normalise, estimator):
    """fp64, ragged: two groups of four, each in a padded row, = transformers' LLaVA on every answer
    by itself, token by token, and Python's own sums."""
    plain_norm(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    twin, theirs = llava_twin(model)
    prompts, groups = random_groups(model, (4, 4))
    batch = data.group_batch(prompts, groups)
    rewards = torch.tensor([[1, 0, 0, 1], [0.2, 0, 0, 0]], dtype=torch.float64)
    advantages = m.group_advantages(rewards, scaled=normalise != "dr_grpo")
    lengths = rollout.Drawn(groups, None).lengths.double()
    count = int(lengths.sum())
    logps = predicted(model, batch)
    g = torch.Generator().manual_seed(1)
    old, ref = (logps.detach() + 0.3 * torch.randn(count, generator=g, dtype=torch.float64)
                for _ in range(2))
    drawn_at = batch["labels"] != m.IGNORE
    losses, clipped = m.clipped_loss(logps, old, m.of_tokens(advantages, batch["branch"], drawn_at),
                                     LOW, HIGH)
    weights = train_grpo.NORMALISE[normalise](lengths, 8, count, LONGEST)
    losses = losses + BETA * train_grpo.KL[estimator](logps, ref)
    loss = (losses * m.of_tokens(weights, batch["branch"], drawn_at)).sum()
    loss.backward()
    assert 0 < clipped.sum() < count

    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
                 for x in (model.encoder.mean, model.encoder.std))
    per_answer, at = [], 0
    for b, group in enumerate(groups):
        values = rewards[b].tolist()
        prompt = prompts["input_ids"][b][prompts["attention_mask"][b].bool()].tolist()
        pixels = ((prompts["pixel_values"][b].double() / 255 - mean) / std)[None]
        for answer, value in zip(group, values):
            above = value - statistics.mean(values)
            if normalise != "dr_grpo":
                above /= statistics.stdev(values) + 1e-4
            logits = twin(input_ids=torch.tensor([prompt + answer]), pixel_values=pixels).logits[0]
            per_answer.append([])
            for k, token in enumerate(answer):
                logp = logits[len(prompt) + k - 1].log_softmax(-1)[token]
                per_answer[-1].append(slow_token(logp, old[at], ref[at], above, estimator))
                at += 1
    want = slow_total(per_answer, normalise)
    assert abs(loss - want) < 1e-9
    want.backward()
    grads = {k: p.grad for k, p in twin.named_parameters()}
    scale, checked = max(x.abs().max() for x in grads.values() if x is not None), 0
    for name, p in model.named_parameters():
        if p.grad is not None and grads[theirs(name)] is not None:
            assert (p.grad - grads[theirs(name)]).abs().max() < 1e-9 * scale, name
            checked += 1
    assert checked > 40


def test_one_inner_epoch_is_the_policy_gradient_and_a_group_its_plain_rows():
    """fp32. log π_old from plain rows, a picture each: ratio 1, KL 0, nothing clipped. And the
    gradient of the group's row is that of −Σ A log π / tokens over the plain ones."""
    model = tiny_model()
    prompts, groups = random_groups(model, (5, 5, 5))
    batch, rows = data.group_batch(prompts, groups), plain_rows(prompts, groups)
    assert len(batch["pixel_values"]) == 3 and len(rows["pixel_values"]) == 15
    with torch.no_grad():
        separate = predicted(model, rows)
    advantages = m.group_advantages(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    logps = predicted(model, batch)
    assert (logps - separate).abs().max() < 5e-6
    assert (logps.exp() - separate.exp()).abs().max() < 1e-6
    for old in (separate, logps.detach()):
        per_token = m.of_tokens(advantages, batch["branch"], batch["labels"] != m.IGNORE)
        losses, clipped = m.clipped_loss(logps, old, per_token, LOW, HIGH)
        assert not clipped.any() and ((logps - old).exp() - 1).abs().max() < 1e-5
        assert m.kl_k3(logps, old).max() < 1e-5 and m.kl_k2(logps, old).max() < 1e-5
    loss = losses.sum() / len(losses)
    loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again = model(**rows)
    lengths = (rows["labels"] != m.IGNORE).sum(1)
    assert abs(loss + (advantages.flatten() * lengths).sum() / len(losses)) < 1e-6         # ρ = 1
    (-(again.sum(1) * advantages.flatten()).sum() / len(losses)).backward()
    largest = max(x.abs().max() for x in grads.values())
    for name, p in model.named_parameters():
        if name in grads:
            assert (p.grad - grads[name]).abs().max() < 5e-6 * largest, name


def test_no_answer_reads_another():
    """Another third answer changes no log-prob but its own; padding none."""
    model = tiny_model()
    prompts, groups = random_groups(model, (4, 4))
    with torch.no_grad():
        before = model(**data.group_batch(prompts, groups))
        other = [[*groups[0][:2], [x + 1 for x in groups[0][2]], groups[0][3]], groups[1]]
        batch = data.group_batch(prompts, other)
        changed = (model(**batch) - before).abs() > 1e-6
    for row, group in zip(batch["branch"], other):                  # padding is nobody's branch
        assert [int((row == g + 1).sum()) for g in range(4)] == [len(x) + 1 for x in group]
    assert changed.any() and (batch["branch"][changed] == 3).all() and not changed[1].any()


TRL = dict(           # of TRL 1.16.0: GRPOTrainer._compute_loss on these log-probs; β 0.04
    lengths=[[3, 1, 4, 2], [2, 4, 1, 3]], rewards=[[1, 0, 0, 1], [0.5, 0, 0, 0]],
    logps=[-2.91, -2.123, -1.378, -1.935, -1.744, -0.865, -1.359, -0.53, -1.066, -1.866, -1.222,
           -0.616, -0.631, -2.03, -0.329, -1.571, -0.678, -2.236, -0.683, -2.43],
    old=[-2.938, -1.957, -1.381, -2.315, -1.548, -0.82, -1.702, 0.031, -1.159, -1.794, -2.165,
         -0.65, -0.807, -1.181, -0.058, -1.287, -1.092, -2.319, -0.417, -1.984],
    ref=[-3.362, -2.161, -0.979, -1.862, -1.444, -1.089, -1.329, 0.267, -0.886, -1.244, -1.502,
         -0.486, -0.274, -1.561, -0.487, -1.393, -0.747, -2.426, -0.568, -2.957],
    dapo=(0.04741266, [
        -0.0437958, -0.0365973, -0.0444045, 0.0631564, 0.0348883, 0.0417901, 0.0609473, -0.0024377,
        -0.0479077, -0.0420115, 0.0004884, -0.0778405, 0.028941, -0.0011968, 0.0002923, -0.0003897,
        0.0379397, 0.0274988, -0.0002437, 0.0008193]),
    grpo=(0.04445009, [
        -0.0364965, -0.0304977, -0.0370038, 0.1578909, 0.0218052, 0.0261188, 0.0380921, -0.0015236,
        -0.0598846, -0.0525144, 0.0006105, -0.0973006, 0.0180881, -0.000748, 0.0001827, -0.0002435,
        0.0948491, 0.0229156, -0.0002031, 0.0006827]),
    dr_grpo=(0.00899401, [
        -0.0104094, -0.0087923, -0.0108566, 0.015169, 0.0082711, 0.0101255, 0.0146535, -0.0010157,
        -0.0115962, -0.0104119, 0.0002035, -0.0081984, 0.0027478, -0.0004987, 0.0001218, -0.0001624,
        0.0039953, 0.0029737, -0.0001016, 0.0003414]))


@pytest.mark.parametrize("normalise", ["dapo", "grpo", "dr_grpo"])
def test_the_numbers_of_trl(normalise):
    """Loss and its gradient at every token; the longest answer had 6 tokens (dr_grpo). TRL's "grpo"
    is a mean over a process's micro-batch, ours over the global batch: here they are one. Its
    "dr_grpo" divides by the deviation unless told scale_rewards="none", as here; ours never does.
    """
    lengths, rewards = (torch.tensor(TRL[k]).double() for k in ("lengths", "rewards"))
    advantages = m.group_advantages(rewards, scaled=normalise != "dr_grpo")
    logps, old, ref = (torch.tensor(TRL[k], dtype=torch.float64) for k in ("logps", "old", "ref"))
    logps.requires_grad_()

    def spread(values):
        return values.flatten().repeat_interleave(lengths.flatten().long())
    losses, _ = m.clipped_loss(logps, old, spread(advantages), 0.2, 0.28)
    losses = losses + 0.04 * m.kl_k3(logps, ref)
    weights = train_grpo.NORMALISE[normalise](lengths, 8, lengths.sum(), 6)
    loss = (losses * spread(weights)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(TRL[normalise][0], abs=1e-7)
    assert logps.grad.tolist() == pytest.approx(TRL[normalise][1], abs=1e-6)


# --------------------------------------------------------------------------- drawn, scored, gold

def test_a_group_is_drawn_behind_its_own_picture_by_its_own_seeds():
    """Each answer = the one drawn alone, from its picture, its prompt and its seed; its last token
    is the stop token, or it has max_new_tokens."""
    model, calls, rows = tiny_model().eval(), [], []
    prompts, _ = random_groups(model, (1, 1, 1))
    model.encoder.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    model.llm.model.norm.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    seeds = [[100 * b + g for g in range(4)] for b in range(3)]
    free = rollout.draw(model, prompts, 4, 6, 9999, seeds)
    stop = free.answers[1][2][2]
    drawn = rollout.draw(model, prompts, 4, 6, stop, seeds, with_logps=True)
    assert calls == [3, 3], "a picture is encoded once, not once an answer"
    assert rows == [3, *[12] * 5] * 2, "and a prompt goes through the LLM once"
    assert not free.stopped.any() and drawn.stopped[1, 2] and len(drawn.answers[1][2]) <= 3
    for b in range(3):
        one = {k: v[b:b + 1] for k, v in prompts.items()}
        start = int(one["attention_mask"].argmax())
        one = {k: v[:, start:] if v.ndim == 2 else v for k, v in one.items()}
        for g in range(4):
            alone = model.generate(**one, max_new_tokens=6, stop_ids=[stop], temperature=1.0,
                                   uniforms=rollout.uniforms_of(seeds[b][g], 6)[None])[0]
            whole = drawn.answers[b][g]
            assert whole == alone + [stop] * drawn.stopped[b, g].item()
            assert drawn.stopped[b, g] == (stop in whole) and drawn.lengths[b, g] == len(whole)
    assert len({str(x) for group in free.answers for x in group}) > 8
    greedy = rollout.draw(model, prompts, 1, 6, stop)
    assert greedy.answers[0][0] != [] and greedy.sampler_logps is None
    with torch.no_grad():
        plain = predicted(model, plain_rows(prompts, drawn.answers))
    assert (drawn.sampler_logps - plain).abs().max() < 1e-5 and plain.std() > 0.1


class Words:
    """A tokenizer whose ids are places in a list."""
    said = ["red", "Red.", "blue", "END"]

    def batch_decode(self, rows):
        return [" ".join(self.said[i] for i in row) for row in rows]


def test_scores_and_what_was_cut_off():
    drawn = rollout.Drawn([[[0, 3], [1, 3], [2, 3], [0]], [[2, 3], [0, 0, 3], [3], [2]]],
                          torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]).bool())
    got = rollout.score(drawn, Words(), ["red", "blue"], score.RULES["exact"])
    assert got.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("rule,said,gold,want", [
    ("exact", "The star is red.", "the star is red", 1), ("exact", "red or blue", "red", 0),
    ("letter", "(B) a cat", "B", 1), ("letter", "A and B", "(B)", 0), ("letter", "red", "Red.", 1),
    ("letter", "red blue", "red", 0), ("relaxed", "104", "100", 1), ("relaxed", "106", "100", 0),
    ("anls", "hallo", "hello", 0.8), ("anls", "xyz", "hello", 0), ("vqa", "two dogs", "2 dogs", 1)])
def test_rules(rule, said, gold, want):
    assert score.RULES[rule](said, gold) == pytest.approx(want)


@pytest.mark.parametrize("chosen,gold", [
    ("The star is red.", "The star is red."), ("word " * 10, ("word " * 10).strip()),
    ("word " * 11, None), ("one\ntwo", None), ("Long. " * 30 + "\n**Final Answer:** 12", "12"),
    ("So.\nFinal answer:\n$7$\nFor it is odd.", "7"),
    ("Final answer: 3? No.\nFinal answer: `B`", "B"), ("Because. Final answer:", None)])
def test_what_gold_means(chosen, gold):
    assert records.gold_of(chosen) == gold


def test_rewards_add_up_and_a_coin_is_a_function_of_the_item():
    drawn = rollout.Drawn([[[0, 3], [2, 3]]], torch.ones(1, 2).bool())
    pairs = Namespace(golds=["red"], keys=[7])
    args = Namespace(rule="exact", format_reward=0.5, reward_control="none", seed=0, group=2)
    tokenizer = Namespace(batch_decode=lambda rows: ["I see.\nIt is\nFinal answer: red",
                                                     "Final answer: blue"])
    rewards, parts = rollout.rewards_of(args, drawn, tokenizer, pairs, [0], 3,
                                        score.RULES["exact"])
    assert rewards.tolist() == [[1.5, 0]] and parts["exact"].tolist() == [[1, 0]]
    args.reward_control, seen = "random", []
    for step in range(200):
        coins, again = (rollout.rewards_of(args, drawn, tokenizer, pairs, [0], step,
                                           score.RULES["exact"])[0] for _ in range(2))
        assert torch.equal(coins, again)
        seen += coins.flatten().tolist()
    assert set(seen) == {0, 1} and 150 < sum(seen) < 250


def test_equal_groups_have_no_advantage():
    rewards = torch.tensor([[0.3] * 4, [1, 0, 0, 0]])
    for scaled in (True, False):
        got = m.group_advantages(rewards, scaled)
        assert got[0].abs().max() < 1e-3 and got[1, 0] > 0 and abs(got[1].sum()) < 1e-6
    assert m.group_advantages(torch.ones(1, 8)).abs().max() == 0


# -------------------------------------------------------------------------------------- the stage

def command(folder, world, *more):
    """Two updates a rollout, a KL term and rewards of a coin: an untrained model's are all 0."""
    return ["train_grpo.py", "--run-dir", folder, *COMMON[2:], "--data", world, "--lr", 1e-4,
            "--max-steps", 3, "--group", 3, "--max-new-tokens", 8, "--inner-epochs", 2, "--kl", 0.1,
            "--reward-control", "random", "--heldout", "none", "--micro-batch", 4, *more]


@pytest.fixture(scope="module")
def trained(stage1, world, tmp_path_factory):
    folder = copied(stage1, tmp_path_factory.mktemp("grpo") / "run")
    done = run(*command(folder, world))
    assert "policy and reference are the same function" in done.stdout
    return folder / "grpo"


def test_what_is_logged(trained):
    lines = metrics(trained)
    assert len(lines) == 3
    for x in lines:
        assert set(x["grad_norm"]) == {"encoder", "projector", "llm"}
        assert min(x["grad_norm"].values()) > 0 and (x["kl"] > 1e-12) == (x["step"] > 0)
        assert 0 < x["reward"] < 1 and 1 <= x["length"] <= 8 and x["entropy"] > 0
        assert 0 < x["sampler_gap"] < 2e-6
    assert all(0 <= x[k] <= 1 for x in lines for k in ("stopped", "equal_groups", "clipped"))
    config = json.loads((trained / "config.json").read_text())
    assert "dropped: none; 0 text-only; all with a gold answer" in config["data"]


def test_two_processes_draw_and_learn_the_same(trained, fresh, world):
    """`entropy` is −log π of the very answers that were drawn."""
    run(*command(fresh, world), processes=2)
    for a, b in zip(metrics(fresh / "grpo"), metrics(trained), strict=True):
        for what in ("loss", "reward", "length", "stopped", "equal_groups", "entropy", "kl"):
            assert a[what] == pytest.approx(b[what], abs=1e-5), (a["step"], what)


def test_killed_inside_and_between_is_bit_equal(trained, fresh, world, tmp_path):
    """In the second rollout, between it and its update, and between two updates of one rollout."""
    line = [str(x) for x in command(fresh, world, "--save-every", 1)]
    for i, moment in enumerate(("before a group:4:0", "before a group is scored:2:0",
                                "before the update:4:0")):
        killed_at(moment, tmp_path / f"kill-{i}", line)
    assert "continuing after" in run(*line).stdout
    bit_equal(fresh / "grpo", trained)


def test_a_blank_image_and_the_rules_reward(fresh, world):
    """No picture: the encoder's gradient is another one. Held-out pairs are answered before and
    after. Of train_dpo.py --verifiable the items are the same; extract.py takes the stage by name.
    """
    more = ["--reward-control", "none", "--rule", "anls", "--heldout",
            f"{world}/preferences/heldout.jsonl", "--kl", 0, "--inner-epochs", 1, "--max-steps", 1]
    told = []
    for blank in ([], ["--blank-image", "--overwrite"]):
        run(*command(fresh, world, *more, *blank))
        first, line, last = metrics(fresh / "grpo")
        assert 0 <= first["heldout_reward"] <= 1 and "heldout_reward" in last
        assert line["clipped"] == 0 and "kl" not in line and line["reward"] == line["reward_anls"]
        told.append((line["entropy"], json.loads((fresh / "grpo/config.json").read_text())))
    assert told[0][0] != told[1][0]
    run("train_dpo.py", "--run-dir", fresh, *COMMON[2:], "--data", world, "--max-steps", 1,
        "--verifiable", "--heldout", "none")
    dpo = json.loads((fresh / "dpo/config.json").read_text())
    assert dpo["data_digest"] == told[0][1]["data_digest"] and dpo["data"] == told[0][1]["data"]
    assert "features bit-equal" in run("extract.py", "--run-dir", fresh, "--stage", "grpo").stdout


def test_pairs_without_gold_are_dropped_and_counted(world, tmp_path):
    """For all signals alike, by one reader; by default nothing is dropped."""
    lines = (world / "preferences/annotations/colour.jsonl").read_text().splitlines()[:6]
    items = [json.loads(x) for x in lines]
    items[1]["chosen"] = "I look at it for long. " * 9
    items[4]["chosen"] = items[1]["chosen"] + "Final answer: red"
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, items)))
    model, tokenizer = model_io.build_mllm("toy-vit", "toy-lm", 0)
    args = Namespace(images=str(world / "preferences/images"), num_samples=None, seed=0,
                     skip_bad=False, follow_links=False, verifiable=True)
    pairs = data.preference_pairs(args, file, tokenizer, model)
    assert len(pairs) == 5 and "1 without a gold answer" in pairs.summary()
    assert sorted(pairs.golds) == sorted([x["chosen"] for i, x in enumerate(items)
                                          if i not in (1, 4)] + ["red"])
    args.verifiable = False
    assert len(data.preference_pairs(args, file, tokenizer, model)) == 6


SEES_PADDING = """
import runpy, sys, torch
import model as m
right = m.MLLM.generate

def wrong(self, pixel_values, input_ids, attention_mask, *args, **kwargs):
    return right(self, pixel_values, input_ids, torch.ones_like(attention_mask), *args, **kwargs)

m.MLLM.generate = wrong
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_sampler_that_sees_padding_is_refused_at_step_0(stage, fresh, world, tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(SEES_PADDING)
    done = run(script, ROOT / f"train_{stage}.py", *command(fresh, world, "--kl", 0)[1:],
               check=False)
    assert done.returncode == 1 and "what draws and what is trained are NOT the same" in done.stderr
    assert not (fresh / stage / "final").exists()
    assert not (fresh / stage / "metrics.jsonl").exists() or not metrics(fresh / stage)


def test_another_function_at_step_0_and_too_few_positions_are_refused(world):
    for gaps in ((2e-4, 0), (0, 2e-5)):
        with pytest.raises(SystemExit, match="NOT the same function; nothing was updated"):
            train_grpo.require_same_function(Namespace(dtype="fp32", kl=0.1), *gaps)
    train_grpo.require_same_function(Namespace(dtype="fp32", kl=0), 1e-5, 1.0)   # no reference
    model, tokenizer = model_io.build_mllm("toy-vit", "toy-lm", 0)
    args = Namespace(images=None, data=str(world), num_samples=5, seed=0, skip_bad=False,
                     follow_links=False)
    pairs = data.preference_pairs(args, f"{world}/preferences/meta.json", tokenizer, model)
    rollout.require_room(model, pairs, 24)
    with pytest.raises(SystemExit, match="--max-new-tokens 1000 after a prompt of"):
        rollout.require_room(model, pairs, 1000)


def test_the_rehearsal_is_as_long_as_a_group_can_be():
    model, tokenizer = model_io.build_mllm("toy-vit", "toy-lm", 0)
    batch = data.longest_group(3, 7, 2, tokenizer, model)
    plain = data.longest_batch("pairs", "answers", 2, tokenizer, model)["input_ids"].shape[1]
    assert batch["input_ids"].shape == (2, plain - 2 + 3 * 8)
    assert (batch["labels"] != m.IGNORE).sum() == 2 * 3 * 7 and len(batch["pixel_values"]) == 2
