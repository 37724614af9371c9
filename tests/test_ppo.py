"""train_ppo.py: GAE, whitening and both losses against slow definitions, values in one row against
plain rows, what the value head's loss may move; the stage on two processes, killed, controlled."""
import json
import statistics
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import data
import model as m
import train_ppo
from conftest import COMMON, bit_equal, copied, killed_at, metrics, run, tiny_model
from pivot import distributed, rollout, training
from test_grpo import plain_rows, random_groups
from test_model import llava_twin, plain_norm

ARGS = Namespace(kl=0.4, gamma=0.9, lam=0.7, compile=False)
LOW, HIGH, VALUE, WEIGHT = 0.1, 0.15, 0.3, 0.25


@pytest.fixture
def alone(monkeypatch):
    """Without a process group: what one process would sum."""
    monkeypatch.setattr(distributed, "reduce_sum", lambda x: {k: float(v) for k, v in x.items()})


def with_head(model, detached=True):
    """A value head that has learned something: at zero nothing flows through it."""
    model.value = m.ValueHead(model.llm.config.hidden_size, detached).to(model.llm.dtype)
    torch.nn.init.normal_(model.value.weight, 0, 0.3)
    torch.nn.init.normal_(model.value.bias, 0, 0.3)
    return model


def of_answers(values, groups):
    """(R,) → a list of each answer's entries, of all answers of all groups."""
    return values.split([len(answer) for group in groups for answer in group])


# ------------------------------------------------------------------------------------- the losses

def slow_gae(rewards, values, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, written out."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))]


@pytest.mark.parametrize("gamma,lam", [(1, 0.95), (0.9, 0.5), (1, 1), (1, 0), (0, 1)])
def test_gae(gamma, lam):
    """Ragged answers, of one token too; and with γ = λ = 1 it is what came of it less V."""
    groups = [[range(n) for n in sizes] for sizes in ((3, 1, 5), (2, 6, 1))]
    lengths = rollout.Drawn(groups, None).lengths
    kl, values = torch.randn(2, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    worth = torch.tensor([[1.0, 0, 0.5], [0, 2, 1]])
    got = m.gae(m.token_rewards(worth, kl, lengths), values, lengths, gamma, lam)
    for answer, costs, expected, advantages in zip(worth.flatten().tolist(), *(
            of_answers(x, groups) for x in (kl, values, got))):
        rewards = [-cost for cost in costs.tolist()]
        rewards[-1] += answer
        want = slow_gae(rewards, expected.tolist(), gamma, lam)
        assert advantages.tolist() == pytest.approx(want, abs=1e-12)
        if gamma == lam == 1:
            assert advantages[0] == pytest.approx(sum(rewards) - expected[0].item(), abs=1e-12)


def slow_tokens(twin, head, model, prompts, groups):
    """transformers' LLaVA on every answer by itself: log π and value of each token, [[…], …]."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
                 for x in (model.encoder.mean, model.encoder.std))
    logps, values = [], []
    for b, group in enumerate(groups):
        prompt = prompts["input_ids"][b][prompts["attention_mask"][b].bool()].tolist()
        pixels = ((prompts["pixel_values"][b].double() / 255 - mean) / std)[None]
        for answer in group:
            out = twin(input_ids=torch.tensor([prompt + answer]), pixel_values=pixels,
                       output_hidden_states=True)
            before = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            logps.append([out.logits[0, t].log_softmax(-1)[token]
                          for t, token in zip(before, answer)])
            hidden = out.hidden_states[-1][0]
            if head.detached:
                hidden = hidden.detach()
            values.append([hidden[t] @ head.weight[0] + head.bias[0] for t in before])
    return logps, values


def slow_loss(logp, old, advantage, value, old_value, target):
    """Of one token, as PPO's papers write it."""
    ratio = torch.exp(logp - old)
    bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
    near = min(max(value, old_value - VALUE), old_value + VALUE)
    return -min(ratio * advantage, bounded * advantage) \
        + WEIGHT * 0.5 * max((value - target) ** 2, (near - target) ** 2)


@pytest.mark.parametrize("detached", [True, False])
def test_loss_and_gradients_are_the_definition(monkeypatch, alone, detached):
    """fp64, ragged: two micro-batches of two groups of three, = transformers' LLaVA on every answer
    by itself, token by token, and Python's own sums; policy, old policy, reference all differ."""
    plain_norm(monkeypatch)
    model, ref_model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def step_away(module, by):
        with torch.no_grad():
            for p in module.parameters():
                p += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    step_away(ref_model, 0.02)
    micro = [random_groups(model, (3, 3), seed) for seed in (0, 1)]
    worth = [torch.tensor([[1, 0, 0.5], [0, 0, 1]]), torch.tensor([[0, 0, 0.2], [1, 1, 1]])]
    twin, theirs = llava_twin(model)
    ref_twin, _ = llava_twin(ref_model)
    with_head(model, detached)
    with torch.no_grad():
        old, old_values = ([x for one in both for x in one] for both in zip(*(
            slow_tokens(twin, model.value, model, *given) for given in micro)))
        ref = [x for given in micro
               for x in slow_tokens(ref_twin, model.value, model, *given)[0]]

    rolled = [{"batch": data.group_batch(prompts, groups), "rewards": rewards,
               "lengths": rollout.Drawn(groups, None).lengths}
              for (prompts, groups), rewards in zip(micro, worth)]
    for group in rolled:
        group |= train_ppo.look_back(ARGS, model, ref_model, group)
    raw = torch.cat([group["advantages"] for group in rolled])
    explained = train_ppo.whiten(rolled)
    count = len(raw)
    step_away(model, 0.01)
    loss, seen = 0, []
    for group in rolled:
        drawn_at = group["batch"]["labels"] != m.IGNORE
        logps, values = (x[drawn_at] for x in model(**group["batch"], with_values=True))
        losses, clipped = m.clipped_loss(logps, group["old_logps"], group["advantages"], LOW, HIGH)
        value_losses, value_clipped = m.value_loss(values, group["old_values"], group["returns"],
                                                   VALUE)
        loss = loss + (losses + WEIGHT * value_losses).sum() / count
        seen.append(torch.stack([clipped, value_clipped]))
    loss.backward()
    assert all(0 < x.sum() < count for x in torch.cat(seen, 1)), "both are clipped, here and there"

    advantages, returns = [], []
    for i, value in enumerate(torch.cat(worth).flatten().tolist()):
        rewards = [ARGS.kl * float(r - o) for o, r in zip(old[i], ref[i])]
        rewards[-1] += value
        expected = [float(v) for v in old_values[i]]
        advantages.append(slow_gae(rewards, expected, ARGS.gamma, ARGS.lam))
        returns.append([a + v for a, v in zip(advantages[-1], expected)])
    flat = [a for answer in advantages for a in answer]
    assert raw.tolist() == pytest.approx(flat, abs=1e-9)
    mean, deviation = statistics.mean(flat), (statistics.pvariance(flat) + 1e-8) ** 0.5
    assert explained == pytest.approx(1 - statistics.pvariance(flat) / statistics.pvariance(
        [r for answer in returns for r in answer]), abs=1e-9)

    twin.load_state_dict({theirs(k): v for k, v in model.state_dict().items()
                          if not k.startswith("value.")})
    head = m.ValueHead(model.llm.config.hidden_size, detached).double()
    head.load_state_dict(model.value.state_dict())
    want, at = 0, 0
    for given in micro:
        for logps, values in zip(*slow_tokens(twin, head, model, *given)):
            for k, (logp, value) in enumerate(zip(logps, values)):
                want = want + slow_loss(logp, old[at][k], (advantages[at][k] - mean) / deviation,
                                        value, old_values[at][k], returns[at][k]) / count
            at += 1
    assert abs(loss - want) < 1e-9
    want.backward()
    grads = {k: p.grad for k, p in twin.named_parameters()}
    grads |= {f"value.{k}": p.grad for k, p in head.named_parameters()}
    scale, checked = max(x.abs().max() for x in grads.values() if x is not None), 0
    for name, p in model.named_parameters():
        other = grads[name if name.startswith("value.") else theirs(name)]
        if p.grad is not None and other is not None:
            assert (p.grad - other).abs().max() < 1e-9 * scale, name
            checked += 1
    assert checked > 40 and model.value.weight.grad.abs().max() > 0


def test_a_group_in_one_row_is_its_plain_rows(alone):
    """fp32. Values and log-probs are those of rows of one answer each; the first answer's first
    token is valued where the others' are. With log π_old and V_old from there: ratio 1, KL 0,
    nothing clipped."""
    model = with_head(tiny_model())
    prompts, groups = random_groups(model, (4, 4, 4))
    group = {"batch": data.group_batch(prompts, groups), "rewards": torch.rand(3, 4),
             "lengths": rollout.Drawn(groups, None).lengths}
    rows = plain_rows(prompts, groups)
    with torch.no_grad():
        separate, values = (x[rows["labels"] != m.IGNORE] for x in model(**rows, with_values=True))
    group |= train_ppo.look_back(ARGS, model, model, group)
    assert (group["old_logps"].exp() - separate.exp()).abs().max() < 1e-6
    assert (group["old_values"] - values).abs().max() < 1e-6 * values.abs().max()
    assert values.std() > 0.1, "values differ from token to token"
    assert (group["old_logps"] - separate).abs().max() < 5e-6 and group["kl"].abs().max() == 0
    firsts = torch.stack([x[0] for x in of_answers(group["old_values"], groups)]).view(3, 4)
    assert (firsts - firsts[:, :1]).abs().max() < 1e-6 and firsts[:, 0].std() > 0.01
    _, clipped = m.clipped_loss(group["old_logps"], separate, group["advantages"], LOW, HIGH)
    _, value_clipped = m.value_loss(group["old_values"], values, group["returns"], VALUE)
    assert not clipped.any() and not value_clipped.any()
    assert ((group["old_logps"] - separate).exp() - 1).abs().max() < 1e-5


@pytest.mark.parametrize("detached", [True, False])
def test_the_encoder_sees_the_policy_alone(detached):
    """The gradient of encoder, projector and LLM with the value loss = without it, bit for bit;
    let through, it is another one."""
    model = with_head(tiny_model(), detached)
    prompts, groups = random_groups(model, (3, 3))
    batch, grads = data.group_batch(prompts, groups), []
    for weight in (0, 0.1):
        model.zero_grad()
        logps, values = model(**batch, with_values=True)
        (logps.sum() + weight * values.square().sum()).backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()
                      if p.grad is not None and not k.startswith("value.")})
    same = [torch.equal(grad, grads[1][name]) for name, grad in grads[0].items()]
    assert len(same) > 40 and (all(same) if detached else not any(same[:20]))
    assert model.value.weight.grad.abs().max() > 0


def test_the_value_heads_gradient_is_clipped_by_itself():
    """However large it is, the policy's step stays as long as it was."""
    model = with_head(tiny_model())
    for name, size in (("encoder", 0), ("projector", 3), ("llm", 0), ("value", 1000)):
        for p in getattr(model, name).parameters():
            p.grad = torch.full_like(p, size)
    weights = model.projector.linear_1.weight
    norm = training.clip_grad_norm(model)["projector"]
    assert norm > 10 and weights.grad[0, 0] == pytest.approx(3 / norm)
    assert model.value.bias.grad == 1000
    assert training.clip_grad_norm(model, modules=["value"])["value"] > 1000
    assert model.value.bias.grad < 1 and weights.grad[0, 0] == pytest.approx(3 / norm)


def test_whitened_over_all_processes(monkeypatch):
    """Two processes, of 5 and of 9 tokens: over all 14, mean 0 and deviation 1."""
    g = torch.Generator().manual_seed(0)
    parts = [{"advantages": torch.randn(n, generator=g) * n + 3,
              "returns": torch.randn(n, generator=g)} for n in (5, 9)]
    told, got = [], []
    monkeypatch.setattr(distributed, "reduce_sum", lambda x: told.append(x) or x)
    for part in parts:                     # what each process tells the others of …
        train_ppo.whiten([dict(part)])
    sums = [{k: float(a[k] + b[k]) for k in a} for a, b in zip(told[:2], told[2:])]
    for part in parts:                     # … and what it does with what all have told
        answers = iter(sums)
        monkeypatch.setattr(distributed, "reduce_sum", lambda x: next(answers))
        got.append(dict(part))
        explained = train_ppo.whiten(got[-1:])
    white, raw, returns = (torch.cat([part[k] for part in which]) for which, k in (
        (got, "advantages"), (parts, "advantages"), (parts, "returns")))
    assert abs(white.mean()) < 1e-6 and white.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert explained == pytest.approx(1 - (raw.var() / returns.var()).item(), abs=1e-5)


def test_nothing_to_learn_moves_nothing(alone):
    """All tokens alike: advantages 0, not a division by 0."""
    rolled = [{"advantages": torch.full((4,), 0.5), "returns": torch.full((4,), 0.5)}]
    assert train_ppo.whiten(rolled) == 0 and rolled[0]["advantages"].abs().max() < 1e-3


# -------------------------------------------------------------------------------------- the stage

def command(folder, world, *more):
    """Two updates a rollout, and rewards of a coin: an untrained model's are all 0."""
    return ["train_ppo.py", "--run-dir", folder, *COMMON[2:], "--data", world, "--lr", 1e-3,
            "--max-steps", 3, "--group", 3, "--max-new-tokens", 8, "--inner-epochs", 2, "--kl", 0.1,
            "--value-lr", 0.01, "--reward-control", "random", "--heldout", "none", "--micro-batch",
            4, *more]


@pytest.fixture(scope="module")
def trained(stage1, world, tmp_path_factory):
    folder = copied(stage1, tmp_path_factory.mktemp("ppo") / "run")
    done = run(*command(folder, world))
    assert "policy, old policy and reference are the same function" in done.stdout
    return folder / "ppo"


def test_what_is_logged_and_what_is_saved(trained):
    """At step 0 the head is 0 and explains nothing. final/ has no tensor of it."""
    lines = metrics(trained)
    assert len(lines) == 3
    for x in lines:
        assert set(x["grad_norm"]) == set(x["lr"]) == {"encoder", "projector", "llm", "value"}
        assert min(x["grad_norm"].values()) > 0 and x["value_loss"] > 0 and x["entropy"] > 0
        assert 0 < x["reward"] < 1 and 1 <= x["length"] <= 8
        assert all(0 <= x[k] <= 1 for k in ("stopped", "clipped", "value_clipped"))
    assert lines[0]["kl"] == lines[0]["explained_variance"] == 0
    assert all(0 < x["sampler_gap"] < 2e-6 for x in lines)
    assert lines[2]["kl"] != 0 and lines[2]["explained_variance"] != 0
    assert any(x["value_clipped"] > 0 for x in lines), "the head's rate is high here"
    names = [load_file(path / "final/model.safetensors").keys()
             for path in (trained, trained.parent / "pretrain")]
    assert names[0] == names[1]
    config = json.loads((trained / "config.json").read_text())
    assert "dropped: none; 0 text-only; all with a gold answer" in config["data"]


def test_step_0_draws_what_grpo_draws(trained, fresh, world):
    """The same items, answers, rewards and log-probs."""
    line, theirs = command(fresh, world, "--max-steps", 1), ("train_ppo.py", "--value-lr", 0.01)
    run("train_grpo.py", *(word for word in line if word not in theirs))
    ours, grpo = metrics(trained)[0], metrics(fresh / "grpo")[0]
    for what in ("reward", "reward_exact", "length", "stopped"):
        assert ours[what] == grpo[what], what
    assert ours["entropy"] == pytest.approx(grpo["entropy"], abs=1e-6)


def test_two_processes_draw_and_learn_the_same(trained, fresh, world):
    run(*command(fresh, world), processes=2)
    for a, b in zip(metrics(fresh / "ppo"), metrics(trained), strict=True):
        for what in ("loss", "value_loss", "reward", "length", "stopped", "entropy", "kl",
                     "explained_variance"):
            assert a[what] == pytest.approx(b[what], abs=1e-5), (a["step"], what)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]


def test_killed_inside_and_between_is_bit_equal(trained, fresh, world, tmp_path):
    """In the second rollout, between it and its update, and between two updates of one rollout.
    The lines of metrics.jsonl show whether the value head and its moments came back."""
    line = [str(x) for x in command(fresh, world, "--save-every", 1)]
    for i, moment in enumerate(("before a group:4:0", "before clipping:1:0",
                                "before the update:7:0")):
        killed_at(moment, tmp_path / f"kill-{i}", line)
    assert "continuing after 2 steps" in run(*line).stdout
    bit_equal(fresh / "ppo", trained)


def test_controls_and_the_value_gradient(fresh, world):
    """No picture: other answers are drawn. The value loss let through: another gradient, from the
    second step on, for the head is 0 at the first. Held-out pairs are answered before and after;
    extract.py takes the stage by name."""
    more = ["--reward-control", "none", "--rule", "anls", "--kl", 0, "--inner-epochs", 1,
            "--group", 1, "--max-steps", 2, "--heldout", f"{world}/preferences/heldout.jsonl",
            "--value-weight", 1, "--overwrite"]
    told = []
    for flag in (["--rehearsal", "on"], ["--blank-image"], ["--value-gradient"]):
        said = run(*command(fresh, world, *more, *flag)).stdout
        assert "policy and old policy are the same function" in said
        assert ("at its peak" in said) == ("--rehearsal" in flag)
        first, *lines, last = metrics(fresh / "ppo")
        assert 0 <= first["heldout_reward"] <= 1 and "heldout_reward" in last
        for x in lines:
            assert x["clipped"] == x["value_clipped"] == 0 and "kl" not in x
            assert x["reward"] == x["reward_anls"]
        told.append(lines)
    plain, blank, through = told
    assert plain[0]["entropy"] != blank[0]["entropy"]
    assert plain[0] == through[0] and plain[1]["grad_norm"] != through[1]["grad_norm"]
    assert "features bit-equal" in run("extract.py", "--run-dir", fresh, "--stage", "ppo").stdout


def test_another_function_at_step_0_is_refused():
    for gaps in ((2e-4, 0, 0), (0, 1e-4, 0), (0, 0, 1e-4)):
        with pytest.raises(SystemExit, match="NOT the same function; nothing was updated"):
            train_ppo.require_same_function(Namespace(dtype="fp32", kl=0.1), *gaps)
