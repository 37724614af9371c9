"""The plan of the six signals, its table from made-up results, and the encoder passes it counts."""
import json
import re
import shutil
from pathlib import Path

import pytest

import test_study
from conftest import COMMON, ROOT, metrics, run
from study import driver, findings, pairs, signals, signals_table

HERE = signals.here(signals.ARMS)


# ------------------------------------------------------------------------------------- the plan

def pretend(command):
    """Write what a command would have written, where it would have."""
    one = {a.strip("-"): b for a, b in zip(command, command[1:]) if a.startswith("--")}
    if command[0] == "-m":
        out = Path(one.get("out") or f"{command[2]}/drawn/{one['stage']}")
        pairs.write(out / "results.json", {"reward": 0.5, "tokens": 700, "questions": 100,
                                           "pairs": 40})
        (out / "pairs.jsonl").write_text("")
    elif command[0].startswith("train_"):
        assert Path(one["preferences"]).name in ("meta.json", "pairs.jsonl")
        folder = Path(one["run"], command[0][6:-3])
        pairs.write(folder / "config.json", {
            "data_digest": Path(one["preferences"]).stem, "data": "192 pairs of 200 records",
            "arguments": {"global_batch": 32, "group": 8, "kl": 0.1, "inner_epochs": 1}})
        (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1, "samples_seen": 96}\n')
        (folder / "timing.jsonl").write_text('{"seconds": 2, "tokens_per_s": 50}\n')
        pairs.write(folder / "final/config.json", {})
    else:
        test_study.pretend(command)
    if command[0] == "repair_eval.py" and "encoder" in one:        # of its two phases
        for config in Path(one["run"], "repair").glob("*/config.json"):
            pairs.write(config, {**json.loads(config.read_text()), "data_digest": ["p", "q"]})


def test_every_task_reads_what_its_commands_write(tmp_path):
    """The whole plan with stages that only pretend, each command with flags that its script knows;
    needs come first, costs are known, and every arm that is here has its line in the table."""
    plan = signals.Signals(signals.QUICK, 2, tmp_path / "work", tmp_path / "out")
    order = driver.pending(plan, list(signals.PARTS))
    assert {task.name for task in order} == set(plan.tasks)
    known, seen = (ROOT / "pivot/flags.py").read_text(), set()
    for task in order:
        assert set(task.needs) <= seen and set(task.cost) <= driver.COST.keys()
        seen.add(task.name)
        if task.name.endswith("/world"):
            pairs.write(task.done, {})
            pairs.write(driver.record_of(task, plan.out), {"values": None, "seconds": 9,
                                                           "code": "c"})
            continue
        for command in [[str(word) for word in c] for c in task.steps()]:
            script = command[0] if command[0] != "-m" else command[1].replace(".", "/") + ".py"
            source = known + (ROOT / script).read_text()
            assert all(f'"{w}"' in source for w in command if w.startswith("--")), command
            pretend(command)
        assert task.part or task.done.exists(), task.name
        values = task.gather() if task.gather else None
        pairs.write(driver.record_of(task, plan.out), {"values": values, "seconds": 9, "code": "c"})
    assert driver.pending(plan, list(signals.PARTS)) == []
    assert plan.rate("grpo") == signals.QUICK["rates"][0]
    text = signals_table.page(findings.Results(plan.out), signals.QUICK)
    for arm in HERE.values():
        assert f"\n| {arm.words} | +0.0 " in text, arm.words
    assert text.count("2 of 5 seeds") == 1 + text.count("| 2 of 5 seeds |")


def test_the_plan_states_its_sizes_and_the_parts_their_arms(tmp_path):
    text, full = " ".join((ROOT / "study/signals.md").read_text().split()), signals.FULL
    assert f"{full['steps']} steps of 32 questions, twice over the same {full['pairs']:,}" in text
    assert 2 * full["pairs"] == 32 * full["steps"] <= 2 * full["world"]["preferences"]
    assert f"--seed` {full['first_world']} to {full['first_world'] + full['seeds'] - 1}" in text
    assert "grid is " + ", ".join(f"{r:.0e}".replace("e-0", "e-") for r in full["rates"]) in text
    talks = full["world"]["instruct"] + round(0.03 * full["world"]["instruct"])
    assert f"it is {talks:,} conversations, and {full['world']['captions']:,} captions" in text
    assert f"{full['group']} draws to each of {full['world']['heldout']} held-out" in text
    assert f"adds {signals_table.AIM} points" in text
    count = len(signals_table.COMPARED) * len(signals_table.DECIDING)
    assert f"These are {count} intervals" in text
    plan = signals.Signals(full, 5, tmp_path / "w", tmp_path / "o")
    of = {part: [t.name for t in plan.tasks.values() if t.part == part] for part in signals.PARTS}
    assert len(of["signals"]) == 5 * (2 + len(signals.here(signals.SIGNALS)))
    assert len(of["controls"]) == 5 * 2


# ------------------------------------------------------------------------------------ the table

def made_up(out):
    """Five seeds: stage 1 at 70 + seed, an arm so many points above it, ± a little by seed."""
    above = {"stage1": 0, "original": -9, **{arm: i for i, arm in enumerate(signals.ARMS, 1)}}
    above |= {"grpo": 6, "grpo-random": 0}
    for seed in range(5):
        for arm, points in above.items():
            wiggle = (seed - 2) / 10 if arm != "stage1" else 0
            values = {m: 70 + seed + points + wiggle for m in signals_table.MEASURES.values()}
            part, name, _ = signals_table.where(arm)
            pairs.write(out / part / f"seed-{seed}-{name}.json", {
                "values": {arm: {**values, "start": "s"}}, "seconds": 1, "code": "c"})
        for arm, how in signals.ARMS.items():
            pairs.write(out / "made" / f"seed-{seed}-{arm}.json", {
                "seconds": 60 + seed, "code": "c", "values": {
                    "data_digest": "own" if how.own else "given", "generated": 1000 * (seed + 1),
                    "trained": 2_500_000, "forward": 6400, "backward": 6400}})
        pairs.write(out / "made" / f"seed-{seed}-own.json", {
            "seconds": 100, "code": "c",
            "values": {"tokens": 50_000, "questions": 3200, "pairs": 900}})
        pairs.write(out / "lr" / f"seed-{seed}-stage1.json", {
            "values": {"stage1": {f"vqa {g}": 71 for g in signals.VISUAL}}, "seconds": 1,
            "code": "c"})
    for stage, rate in (("sft", 1e-4), ("grpo", 3e-4)):
        pairs.write(out / "lr" / f"chosen-{stage}.json", {
            "values": {stage: {"rate": rate}}, "seconds": 1, "code": "c"})
    return out


def row(text, start):
    return [x.strip() for x in next(line for line in text.splitlines() if line.startswith(
        f"| {start} |")).split("|")[1:-1]]


def test_the_table_says_what_the_results_say(tmp_path):
    """sd of −0.2 … 0.2 is 0.158; ± 2.776 · 0.158 / √5 = 0.196."""
    out = made_up(tmp_path)
    text = signals_table.page(findings.Results(out), signals.FULL)
    names = row(text, "")
    assert len(names) == 1 + 10 + 5
    grpo = row(text, "GRPO")
    assert set(grpo[1:11]) == {"+6.00 [+5.80, +6.20]"}
    assert grpo[11:] == ["3k", "2.5M", "6.4k", "6.4k", "62"]
    assert row(text, "SFT, own right answers")[11:] == ["53k", "2.5M", "10.5k", "6.4k", "162"]
    assert set(row(text, "**stage 1**")[1:11]) == {"72.0 [70.0, 74.0]"}
    assert set(row(text, "encoder before stage 1")[11:]) == {"–"}
    assert row(text, "GRPO: 5 points or more")[1:] == ["+6.00 [+5.80, +6.20]", "reached"]
    assert row(text, "a coin as reward: none")[2] == "none, as it should be"
    for label in signals_table.DECIDING:
        assert re.search(rf"\| GRPO minus SFT \| {label} \| \+5\.0.* \| above \|", text)
        assert re.search(rf"\| SFT, own right answers minus SFT \| {label} \| .* \| above \|", text)
    assert "SFT 0.0001" in text and "GRPO's is at the edge" in text and "SFT's is" not in text
    assert "General 71.0 [71.0, 71.0], OCR" in text


@pytest.mark.parametrize("change, said", [
    (("made", "grpo", lambda v: v["values"].update(data_digest="other")), "of the pairs"),
    (("signals", "dpo", lambda v: v["values"]["dpo"].update(start="t")), "re-paired from differs")])
def test_what_is_not_comparable_is_refused(tmp_path, change, said):
    part, arm, alter = change
    path = made_up(tmp_path) / part / f"seed-3-{arm}.json"
    found = json.loads(path.read_text())
    alter(found)
    pairs.write(path, found)
    with pytest.raises(SystemExit, match=f"seed 3: .*{said}"):
        signals_table.page(findings.Results(tmp_path), signals.FULL)


def test_fewer_seeds_decide_nothing_and_a_small_gain_is_no_aim(tmp_path):
    assert signals_table.said([1, 1.1, 1.2, 1.3], 5) == "4 of 5 seeds"
    assert signals_table.said([-1, -1.1, -1.2, -1.3, -1], 5) == "below"
    assert signals_table.said([-1, 1, -1, 1, 0], 5) == "undecided"
    out = made_up(tmp_path)
    for seed in range(5):
        for arm, less in (("grpo", 3), ("grpo-random", -4)):
            path = out / signals_table.where(arm)[0] / f"seed-{seed}-{arm}.json"
            found = json.loads(path.read_text())
            found["values"][arm]["held-out"] -= less
            pairs.write(path, found)
    text = signals_table.page(findings.Results(out), signals.FULL)
    assert row(text, "GRPO: 5 points or more")[2] == "above, but by less than 5"
    assert row(text, "a coin as reward: none")[2] == "above"


# ------------------------------------------------------------------------------------- the cost

COUNTED = """import json, runpy, sys
sys.path.insert(0, {root!r})
from pivot import encoders
true, seen = encoders.Encoder.forward, [0, 0]

def forward(self, pixel_values):
    out = true(self, pixel_values)
    seen[0] += len(pixel_values)
    if out.requires_grad:
        out.register_hook(lambda grad: seen.insert(1, seen.pop() + len(grad)))
    return out

encoders.Encoder.forward = forward
sys.argv = [{root!r} + "/" + sys.argv[1], *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
open({counts!r}, "w").write(json.dumps(seen))
"""


@pytest.mark.parametrize("stage, more", [
    ("sft", []), ("dpo", ["--heldout", "none"]),
    *((stage, ["--heldout", "none", "--inner-epochs", 2, "--kl", 0.1, "--group", 3,
               "--max-new-tokens", 6]) for stage in ("grpo", "ppo"))])
def test_encoder_passes_and_tokens_are_those_of_the_stage(fresh, world, tmp_path, stage, more):
    """Counted where they happen: in Encoder.forward, and in the gradient of what it gave."""
    if not (ROOT / f"train_{stage}.py").exists():
        pytest.skip(f"no train_{stage}.py")
    script, counts = tmp_path / "counted.py", tmp_path / "counts.json"
    script.write_text(COUNTED.format(root=str(ROOT), counts=str(counts)))
    run(script, f"train_{stage}.py", "--run-dir", fresh, *COMMON, "--data", world, "--max-steps", 2,
        "--num-samples", 40, *more)
    cost = signals.cost_of(fresh / stage)
    assert [cost["forward"], cost["backward"]] == json.loads(counts.read_text())
    drawn = sum(8 * 3 * x["length"] for x in metrics(fresh / stage) if "length" in x)
    assert cost["generated"] == pytest.approx(drawn) and (drawn > 0) is (stage in ("grpo", "ppo"))
    assert cost["trained"] > cost["generated"]


def test_curves_outlive_their_runs(tmp_path):
    """A mean over each ten steps, the last over what is left; a run that has not ended is none."""
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    assert signals_table.curves(work, out) == {} and not any(out.iterdir())
    for arm, stage in (("grpo", "grpo"), ("grpo-random", "grpo"), ("ppo", "ppo")):
        folder = work / "runs/seed-3" / arm / stage
        if arm != "ppo":
            pairs.write(folder / "final/config.json", {})
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": 0, "heldout_reward": 9}] + [
            {"step": i, "reward": 1, "reward_exact": i / 10} for i in range(25)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = signals_table.curves(work, out)
    assert found == {(3, arm): pytest.approx([0.45, 1.45, 2.2]) for arm in ("grpo", "grpo-random")}
    shutil.rmtree(work)
    pairs.write(work / "runs/seed-1/ppo/ppo/final/config.json", {})
    (work / "runs/seed-1/ppo/ppo/metrics.jsonl").write_text('{"reward_exact": 0.5}\n')
    both = signals_table.curves(work, out)
    assert both == {(1, "ppo"): [0.5], **found}
    pytest.importorskip("matplotlib")
    signals_table.draw_curves(found, out / "curves.png")
    assert (out / "curves.png").stat().st_size > 10_000


def test_the_pages_say_what_the_committed_results_give():
    """results/signals/signals.md whole; of study/README.md its table and, to the letter, the
    intervals that it and README.md name."""
    out = ROOT / "results/signals"
    results = findings.Results(out)
    text = signals_table.page(results, signals.FULL)
    assert text == (out / "signals.md").read_text(), "run: python -m study.signals_table"
    drawn = [(x["seed"], x["arm"]) for x in signals.lines_of(out / "curves.jsonl")]
    assert sorted(drawn) == sorted(
        (seed, arm) for seed in range(5) for arm, how in signals.ARMS.items()
        if how.stage in ("grpo", "ppo"))
    page = (ROOT / "study/README.md").read_text().split("## Six signals")[1]
    for arm in signals.ARMS.values():
        found = row(text, arm.words)
        assert row(page, arm.words) == [found[i] for i in (0, 6, 5, 7, 8, 9, 10, 15)]
    told = " ".join(page.split())
    for one, other, measure, said in (
            ("grpo", "sft", "vqa visual", "−0.7 [−2.5, +1.2]"),
            ("grpo", "sft-own", "vqa visual", "−0.4 [−2.4, +1.6]"),
            ("grpo", "sft", "linear", "1.6 [0.6, 2.6]"),
            ("dpo", "sft", "vqa visual", "−2.6 [−3.9, −1.4]"),
            ("mpo", "dpo", "vqa visual", "+2.0 [+1.1, +3.0]")):
        shown = signals_table.show(signals_table.cell(signals_table.apart(
            results, measure, one, other)))
        assert shown.replace("-", "−").replace("+", "") == said.replace("+", "") and said in told
    assert "GRPO adds 5.6 points of reward" in (ROOT / "README.md").read_text()
