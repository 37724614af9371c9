"""train_mpo.py: the three terms against their definition, δ by hand, resumed, on two processes."""
import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import in_fork
import model as m
import train_mpo
from conftest import COMMON, ROOT, bit_equal, copied, metrics, run, tiny_model
from pivot import model_io, records
from test_model import batch_of, llava_twin, plain_norm, random_pairs, slow_logps

TERMS = ("preference", "quality", "generation")


def command(stage, folder, world, *more):
    return [f"train_{stage}.py", "--run-dir", folder, *COMMON[2:], "--data", world, "--lr", 1e-4,
            "--beta", 0.1, "--max-steps", 4, *more]


def steps(folder):
    return [x for x in metrics(folder) if "loss" in x]


@pytest.fixture(scope="module")
def trained(stage1, world, tmp_path_factory):
    """One process, one micro-batch a step, the default weights."""
    folder = copied(stage1, tmp_path_factory.mktemp("mpo") / "run")
    run(*command("mpo", folder, world))
    return folder / "mpo"


# ------------------------------------------------------------------------------------- the loss

def slow_terms(chosen, rejected, ref_chosen, ref_rejected, beta, delta, words):
    """The three terms of one pair as MPO's paper writes them: for floats, and for fp64 scalars of
    torch, where it is to be derived."""
    exp, log = (torch.exp, torch.log) if torch.is_tensor(chosen) else (math.exp, math.log)
    r_c, r_r = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    right, good, bad = (1 / (1 + exp(-x)) for x in (r_c - r_r, r_c - delta, r_r - delta))
    return -log(right), -log(good) - log(1 - bad), -chosen / words


@pytest.mark.parametrize("layout", ["pair", "rows"])
def test_loss_and_gradients_are_the_definition(monkeypatch, layout):
    """fp64, ragged answers: one padded batch = transformers' LLaVA on each sequence by itself."""
    plain_norm(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    twin, theirs = llava_twin(model)
    pairs, pixels = random_pairs(model, 4)
    words = [int((roles == records.ANSWER).sum()) for _, roles in pairs]
    assert len(set(words)) > 1
    ref, beta, delta, weights = torch.randn(4, 2, dtype=torch.float64), 0.3, 0.4, (0.8, 0.2, 1.0)

    batch = batch_of(pairs, pixels, layout)
    logps = m.answer_logps(model(**batch), batch.get("branch"))
    *fast, chosen_rewards, rejected_rewards = m.mpo_loss(*logps, *ref.unbind(1), beta, delta,
                                                         torch.tensor(words))
    sum(w * term.sum() for w, term in zip(weights, fast)).backward()
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad

    table, total = slow_logps(twin, model, pairs, pixels), 0
    for i in range(4):
        terms = slow_terms(*table[i], *ref[i], beta, delta, words[i])
        floats = slow_terms(*table[i].tolist(), *ref[i].tolist(), beta, delta, words[i])
        assert [float(x[i].detach()) for x in fast] == pytest.approx(floats, abs=1e-9)
        total = total + sum(w * term for w, term in zip(weights, terms))
    total.backward()
    want = {k: p.grad for k, p in twin.named_parameters()}
    scale, checked = max(g.abs().max() for g in want.values() if g is not None), 0
    for name, p in model.named_parameters():
        if p.grad is not None and want[theirs(name)] is not None:
            assert (p.grad - want[theirs(name)]).abs().max() < 1e-9 * scale, name
            checked += 1
    assert checked > 40
    rewards = beta * (table.detach() - ref)
    assert torch.allclose(torch.stack([chosen_rewards, rejected_rewards], 1), rewards, atol=1e-9)


TRL = [   # chosen, rejected and both reference log-probs → "sigmoid", "bco_pair", running mean
    ([-12.5, -30.25, -7.0], [-14.0, -21.5, -9.75], [-13.25, -28.0, -11.0], [-13.5, -26.5, -6.0],
     [0.632599, 1.1199598, 0.3789184], [1.3252043, 1.7831475, 1.036519], 0.0541667),
    ([-5.0, -41.5, -17.25], [-25.5, -33.0, -8.0], [-9.5, -36.0, -16.0], [-21.0, -34.75, -12.5],
     [0.3411539, 1.1199598, 1.0214182], [0.9866228, 1.7921628, 1.6991556], 0.0229167)]


def test_the_numbers_of_trl():
    """What DPOTrainer.dpo_loss of TRL 0.24.0 gave for two batches, β 0.1. Its δ takes in a batch
    (there: a micro-batch) before it is used; ours, of a global batch, after. Its "sft" is a mean
    over all tokens of the micro-batch, without those of id 0, and so is not compared."""
    seen = []
    for *logps, sigmoid, bco_pair, mean in TRL:
        logps = [torch.tensor(x, dtype=torch.float64) for x in logps]
        *_, r_c, r_r = m.mpo_loss(*logps, 0.1, 0.0, 1)
        seen += [*r_c.tolist(), *r_r.tolist()]
        delta = sum(seen) / len(seen)
        preference, quality, *_ = m.mpo_loss(*logps, 0.1, delta, 1)
        assert delta == pytest.approx(mean, abs=1e-6)
        assert preference.tolist() == pytest.approx(sigmoid, abs=1e-6)
        assert quality.tolist() == pytest.approx(bco_pair, abs=1e-6)


def test_every_step_by_hand(fresh, world):
    """A pair a step, so that its own rewards are logged: both terms and δ follow from them in plain
    floats; step 0's likelihood from the reference and a count of tokens."""
    run("train_mpo.py", "--run-dir", fresh, *COMMON[:2], "--workers", 0, "--data", world,
        "--global-batch", 1, "--num-samples", 5, "--lr", 1e-3, "--beta", 2, "--preference-weight",
        0.5, "--quality-weight", 0.7, "--generation-weight", 0.3)
    lines, seen = steps(fresh / "mpo"), []
    assert len(lines) == 5
    for x in lines:
        r_c, r_r = x["chosen_reward"], x["rejected_reward"]
        delta = sum(seen) / len(seen) if seen else 0
        assert x["delta"] == pytest.approx(delta, abs=1e-12)
        want = slow_terms(r_c, r_r, 0, 0, 1, delta, 1)[:2]
        assert [x["preference"], x["quality"]] == pytest.approx(want, abs=1e-5)
        assert x["loss"] == pytest.approx(0.5 * x["preference"] + 0.7 * x["quality"]
                                          + 0.3 * x["generation"], abs=1e-5)
        seen += [r_c, r_r]
    assert min(abs(x["delta"]) for x in lines[2:]) > 1e-3, "δ does not show"

    model, tokenizer = model_io.load_mllm(fresh / "pretrain/final")
    args = Namespace(images=None, data=str(world), num_samples=5, seed=0, skip_bad=False,
                     follow_links=False)
    pairs = data.preference_pairs(args, f"{world}/preferences/meta.json", tokenizer, model)
    first = int(np.random.default_rng((0, 0)).permutation(5)[0])
    file, number = pairs.where[first].rsplit(":", 1)
    text = json.loads(open(file, encoding="utf-8").readlines()[int(number) - 1])["chosen"]
    words = len(tokenizer(text)["input_ids"]) + 1                                  # <|im_end|>
    logp = load_file(fresh / "mpo/ref_logps.safetensors")["pairs"][first, 0].item()
    assert lines[0]["generation"] == pytest.approx(-logp / words, abs=1e-6)


# -------------------------------------------------------------------------------------- the stage

def test_it_starts_at_what_its_weights_say(trained):
    first = steps(trained)[0]
    assert abs(first["loss"] - 1.2 * math.log(2) - first["generation"]) < 1e-6
    assert first["generation"] > 0.1
    assert first["margin"] == first["delta"] == first["accuracy"] == 0
    assert metrics(trained)[0]["heldout_margin"] == 0
    assert all(x[term] > 0 for x in steps(trained) for term in TERMS)


@pytest.mark.parametrize("loss,generation,margin,fine", [
    (1.4 * math.log(2) + 2 * 3, 3, 0, True), (math.log(2) + 2 * 3, 3, 0, False),
    (1.4 * math.log(2) + 3, 3, 0, False), (1.4 * math.log(2) + 6 + 1e-4, 3, 0, False),
    (1.4 * math.log(2) + 6, 3, 1e-4, False)])
def test_another_function_at_step_0_is_refused(loss, generation, margin, fine):
    args = Namespace(preference_weight=0.4, quality_weight=0.5, generation_weight=2, dtype="fp32")
    if fine:
        return train_mpo.require_same_function(args, loss, generation, margin)
    with pytest.raises(SystemExit, match="are NOT the same function; nothing was updated"):
        train_mpo.require_same_function(args, loss, generation, margin)


def test_the_preference_alone_is_dpo(fresh, world):
    """Weights 1, 0, 0: train_dpo.py's losses and its model, bit for bit."""
    for stage, more in (("dpo", []), ("mpo", ["--preference-weight", 1, "--quality-weight", 0,
                                              "--generation-weight", 0])):
        run(*command(stage, fresh, world, "--max-steps", 2, "--heldout", "none", *more))
    dpo, mpo = (steps(fresh / stage) for stage in ("dpo", "mpo"))
    assert [x.items() <= y.items() for x, y in zip(dpo, mpo)] == [True, True]
    weights = [(fresh / stage / "final/model.safetensors").read_bytes() for stage in ("dpo", "mpo")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("processes,more", [
    (2, ["--micro-batch", 3]), (1, ["--layout", "rows", "--reference", "live"])])
def test_processes_micro_batches_and_layouts_count_the_same(trained, fresh, world, processes, more):
    run(*command("mpo", fresh, world, *more), processes=processes)
    lines = steps(fresh / "mpo")
    assert len(lines) == 4
    for a, b in zip(lines, steps(trained)):
        for what in ("loss", "delta", "chosen_reward", "rejected_reward", *TERMS):
            assert a[what] == pytest.approx(b[what], abs=1e-5), (a["step"], what)
    assert abs(lines[3]["delta"]) > 1e-4, "δ does not show"


def test_killed_and_started_again_is_bit_equal(trained, fresh, world, tmp_path):
    """δ included, which every line of metrics.jsonl shows. A checkpoint without it is refused."""
    words = [str(x) for x in command("mpo", fresh, world, "--save-every", 2)]
    done = in_fork.run(in_fork.server(), words, ROOT, out=tmp_path, killed=True)
    position = fresh / "mpo/checkpoints/step-2/position.json"
    assert done.returncode == 9 and position.exists() and not (fresh / "mpo/final").exists()
    whole = position.read_text()
    facts = json.loads(whole)
    assert facts.pop("delta") == steps(fresh / "mpo")[2]["delta"] != 0
    position.write_text(json.dumps(facts))
    done = run(*words, check=False)
    assert done.returncode == 1 and re.search("error: .*no 'delta' in it; delete", done.stderr)
    position.write_text(whole)
    assert "continuing after 2 steps" in run(*words).stdout
    bit_equal(fresh / "mpo", trained)
