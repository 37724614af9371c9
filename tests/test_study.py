"""The study's arithmetic, its pairs, its resumption, the README's section; no stage is run."""
import hashlib
import json
import re
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from pivot import records as record_files
from judge import intervals
from study import driver as study
from study import findings as study_findings
from study import models as study_models
from study import pairs as study_pairs
from study import plan as study_plan
from study import report
from conftest import ROOT, run
from judge.score import plain

RESULTS = ROOT / "results"


# ------------------------------------------------------------------------------------ statistics

def test_interval_is_students_by_hand():
    # 1, 2, 3, 4, 5: mean 3, sd √2.5 = 1.58114, standard error 0.70711, t(4) = 2.776 → 1.96293
    middle, half = intervals.student([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(1.96293, abs=1e-5)
    assert intervals.student([2.0, 4.0]) == (3, pytest.approx(12.706))     # sd √2, ÷ √2
    assert intervals.student([7.0]) == (7, None)


def test_quantiles_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")          # comes with scikit-learn
    for df, (t975, t80) in enumerate(zip(intervals.T975, study_findings.T80), 1):
        assert t975 == pytest.approx(stats.t.ppf(0.975, df), abs=6e-4)
        assert t80 == pytest.approx(stats.t.ppf(0.80, df), abs=6e-4)


@pytest.mark.parametrize("values, side, said", [
    ([1, 2, 3, 4, 5], "+", "holds"),                    # 1.04 … 4.96
    ([-1, -2, -3, -4, -5], "+", "does not"),
    ([-1, 2, 3, 4, -5], "+", "undecided"),
    ([9.0], "+", "undecided"),                          # one seed has no interval
    ([0.1, 0.2, -0.1, 0.0, -0.2], "=", "holds"),        # within ±2
    ([3.0, 3.1, 2.9, 3.0, 3.0], "=", "does not"),
    ([0.9, 1.0, 1.1, 1.0, 1.0], "=", "holds"),          # not 0, but a tie of the stated width
    ([5, -5, 5, -5, 0], "=", "undecided")])
def test_verdicts(values, side, said):
    assert study_findings.verdict(values, side) == said


def test_smallest_effect_is_the_one_registered():
    text = (RESULTS / "README.md").read_text()
    assert study_findings.smallest_effect(1, 600) is None
    # (2.776 + 0.941) · √(0.1 / 600 / 5) = 3.717 · 0.0057735 = 2.146 points
    assert study_findings.smallest_effect(5, 600) == pytest.approx(2.146, abs=1e-3)
    bench, val = study_plan.FULL["world"]["bench"], study_plan.FULL["world"]["imagenet_val"]
    for label, questions in (("a group", bench), ("the average of four groups", 4 * bench),
                             ("the linear probe", 12 * val)):
        assert f"| {label} | {questions:,} | {study_findings.smallest_effect(5, questions):.1f} |" in text


def test_a_tie_holds_as_often_as_registered():
    """600 questions, a tenth of the answers differ, true difference 0, five seeds."""
    rng = random.Random(0)
    sd = 100 * (0.1 / study_plan.FULL["world"]["bench"]) ** 0.5
    held = [study_findings.verdict([rng.gauss(0, sd) for _ in range(5)], "=") == "holds"
            for _ in range(4000)]
    assert sum(held) / 4000 == pytest.approx(0.55, abs=0.03)
    assert "in about 55 % of cases" in (RESULTS / "README.md").read_text()


def test_registration_states_the_plan():
    """Seeds, sizes, grid, passes and margin of results/README.md are those the code uses."""
    import train_dpo
    text, plan = " ".join((RESULTS / "README.md").read_text().split()), study_plan.FULL
    assert f"{plan['pairs']:,} pairs, {plan['passes']} passes" in text
    sizes = sorted([*plan["sizes"], plan["pairs"]])
    assert ", ".join(f"{n:,}" for n in sizes) + " pairs" in text
    assert [n / sizes[0] for n in sizes] == pytest.approx([1, 5 / 3, 10 / 3, 20 / 3, 40 / 3])
    assert f"answers {plan['world']['preferences']:,} questions" in text
    assert "the grid " + ", ".join(f"{r:.0e}".replace("e-0", "e-") for r in plan["rates"]) in text
    assert f"{plan['validation']} a group" in text and f"±{study_findings.TIE}" in text
    assert "t = 2.776" in text and "β = 0.5" in text
    steps = [n // train_dpo.TOY["global_batch"] * plan["passes"] for n in sizes]
    assert ", ".join(map(str, steps)) + " steps" in text
    assert f"{plan['weights']['toy-lm-l']['--steps']:,} + 6,750 steps" in text
    assert train_dpo.TOY["beta"] == 0.5 and train_dpo.TOY["global_batch"] == 32


# ------------------------------------------------------------------------------------ hard pairs

@pytest.mark.parametrize("said, right, fit", [
    ("3", "2", True), ("2", "2", False), ("The circle is red", "The circle is red.", False),
    ("RED", "red", False), ("red", "The circle is red.", False), ("", "2", False),
    ("The circle is blue.", "The circle is red.", True)])
def test_wrong_in_words_not_in_form(said, right, fit):
    assert study_pairs.wrong(said, right) is fit


def a_pool(n):
    rng = random.Random(0)
    return [{"id": f"q{i}", "image": f"{i % (n - 3)}.png", "question": f"Question {i}?",
             "chosen": rng.choice("12345"), "rejected": "9"} for i in range(n)]


@pytest.mark.parametrize("said, right, form", [
    ("The circle is blue", "The circle is red.", "The circle is blue."), (" Two. ", "3", "Two"),
    ("the circle is blue.", "The circle is red", "The circle is blue"), ("Blue!", "red", "blue"),
    ("6", "5", "6"), ("40", "50.", "40."), ("No", "yes", "no")])
def test_form_does_not_tell_the_rejected_from_the_chosen(said, right, form):
    assert study_pairs.like(said, right) == form
    pool = [{"id": str(i), "image": f"{i}.png", "question": "Which?", "chosen": right,
             "rejected": "x"} for i in range(2)]
    pool.append({**pool[0], "id": "2", "chosen": said})          # what was said is right elsewhere
    kinds = study_pairs.kinds_of(pool, {k: said for k in "012"}, seed=0, n=1)
    assert {r["rejected"] for k in ("sampled", "images") for r in kinds[k]} == (
        {form} if len(form.split()) == len(right.split()) else set())
    assert not study_pairs.wrong("Red!", "red") and not study_pairs.wrong("red", "Red.")


def test_what_is_right_nowhere_is_not_rejected():
    """"star" is no count: that it is wrong can be told without looking."""
    pool = [{"id": f"{kind}-{i}", "image": f"{i}.png", "question": "?", "chosen": right,
             "rejected": "x"} for kind, right in (("count", "23"), ("shape", ["star", "ring"]))
            for i, right in enumerate(right)]
    said = {"count-0": "star", "count-1": "2", "shape-0": "ring", "shape-1": "3"}
    kinds = study_pairs.kinds_of(pool, said, seed=0, n=1)
    assert {r["id"] for r in kinds["sampled"]} == {"count-1", "shape-0"}


def test_blind_is_what_the_other_pairs_say():
    """Each pair is judged by the others alone, kind by kind; by hand."""
    def pairs(*rows):
        return [{"id": f"{kind}-{i}", "chosen": a, "rejected": b}
                for i, (kind, a, b) in enumerate(rows)]
    ab, ba = ("k", "a", "b"), ("k", "b", "a")
    assert study_pairs.blind(pairs(ab, ab, ab)) == 1 and study_pairs.blind(pairs(ab)) == 0.5
    assert study_pairs.blind(pairs(ab, ba)) == 0             # the one other pair says the contrary
    assert study_pairs.blind(pairs(ab, ab, ba)) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert study_pairs.blind(pairs(ab, ("other", "b", "a"))) == 0.5


def test_kinds_differ_in_one_thing_each():
    pool = a_pool(80)
    pool.append({**pool[0], "id": "q80", "image": "80.png", "chosen": "6"})
    said = {r["id"]: (r["chosen"] if i % 4 == 0 else "7 8" if i % 4 == 1 else " 6")
            for i, r in enumerate(pool)}
    kinds = study_pairs.kinds_of(pool, said, seed=3, n=30)
    assert kinds == study_pairs.kinds_of(pool, said, seed=3, n=30)          # deterministic
    assert kinds != study_pairs.kinds_of(pool, said, seed=4, n=30)
    known = {r["id"]: r for r in pool}
    hard = ("sampled", "swapped", "shuffled", "images")
    assert len({tuple(r["id"] for r in kinds[k]) for k in hard}) == 1       # items and order
    assert len(kinds["sampled"]) == 40 and len(kinds["easy"]) == 30
    for rows in zip(*(kinds[k] for k in hard)):
        own, sampled, swapped, shuffled, images = known[rows[0]["id"]], *rows
        for r in rows:
            assert plain(r["rejected"]) != plain(r["chosen"]) == plain(own["chosen"])
            assert r["question"] == own["question"]
        assert swapped == own and sampled == {**own, "rejected": "6"}
        assert {**shuffled, "rejected": own["rejected"]} == own and shuffled["rejected"] in "12345"
        assert {**images, "image": own["image"]} == sampled and images["image"] != own["image"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A seed's world, drawn small, its pool written and answered wrongly in every second place."""
    out = tmp_path_factory.mktemp("study") / "seed-0"
    study_pairs.draw(out, 0, {**study_plan.QUICK["world"], "captions": 4, "instruct": 4,
                              "repair": 4, "preferences": 120}, 12)
    study_pairs.write_pool(out)
    bench = out.parent / "bench"
    bench.mkdir()
    pool = study_pairs.pool_of(out)
    (bench / "ToyGeneral.0.jsonl").write_text("".join(
        json.dumps({"index": r["id"], "prediction": r[("chosen", "rejected")[i % 2]]}) + "\n"
        for i, r in enumerate(pool)))
    return out, bench, pool


def test_pool_is_a_benchmark_of_the_pairs(small):
    from judge import answer
    out, _, pool = small
    rows, dropped = answer.read_tsv(out / "pool" / "ToyGeneral.tsv")
    assert not dropped and [r["answer"] for r in rows] == [r["chosen"] for r in pool]
    images = os.path.realpath(out / "preferences" / "images")
    assert all(os.path.realpath(r["image_id"]).startswith(images) for r in rows)
    assert not any("<image>" in r["question"] for r in rows)


def test_validation_shows_other_images_than_the_test(small):
    from judge import answer
    shown = []
    for folder in ("bench", "validation"):
        files = sorted((small[0] / folder).glob("*.tsv"))
        assert len(files) == 4
        shown.append({r["image_id"] for f in files for r in answer.read_tsv(f)[0]})
    assert not shown[0] & shown[1]


def test_hard_pairs_can_be_trained_on(small):
    """Images stay within their root, are there, and no pair is refused; unused ones are gone."""
    out, bench, pool = small
    plan = {"pairs": 32, "sizes": [40]}
    said = study_pairs.hard_pairs(out, bench, 0, plan)["counts"]
    folder = out / "preferences"
    assert said == json.loads((folder / "kinds.json").read_text())
    assert said["pool"] == 120 and 32 <= said["sampled"] <= 60
    used = set()
    for kind in study_pairs.KINDS:
        records = list(record_files.read_lines(folder / f"{kind}.jsonl"))
        assert len(records) == said[kind]
        for where, raw in records:
            item = record_files.parse(where, raw)
            image = record_files.image_of(item, str(folder / "images"), where)
            record_files.pair_record(where, item, image)
            used.add(item["image"])
    kept = {p.name for p in (folder / "images").iterdir() if not p.name.startswith("heldout")}
    assert kept == used and len(used) < 120
    again = {k: (folder / f"{k}.jsonl").read_bytes() for k in study_pairs.KINDS}
    study_pairs.hard_pairs(out, bench, 0, plan)
    assert again == {k: (folder / f"{k}.jsonl").read_bytes() for k in study_pairs.KINDS}


def test_too_few_wrong_answers_are_refused(small):
    with pytest.raises(SystemExit, match="usably wrong, 999 are needed"):
        study_pairs.hard_pairs(small[0], small[1], 0, {"pairs": 999, "sizes": [1]})


# ------------------------------------------------------------------------- the plan, resumption

@pytest.fixture
def toy_study(tmp_path):
    """Three tasks that leave a mark each time they run: c needs b, b needs a."""
    s = study_plan.Study.__new__(study_plan.Study)
    s.sizes, s.seeds, s.work, s.out, s.tasks = {"x": 1}, 1, tmp_path / "work", tmp_path / "out", {}
    s.marks = tmp_path / "marks"
    s.marks.write_text("")

    def steps(name, code=0):
        mark = f"open({str(s.marks)!r}, 'a').write({name!r})"
        made = tmp_path / "a"
        return lambda: [[sys.executable, "-c", f"{mark}; open({str(made)!r}, 'w'); exit({code})"]]
    s.steps, s.note = steps, s.out / "made" / "a.json"
    s.add("a", None, tmp_path / "a", [], {"sft": 1}, steps("a"))
    s.result("vqa", "b", ["a"], {"vqa": 1}, steps("b"), lambda: {"dpo": {"m": 1.5}})
    s.result("eye", "c", ["vqa/b"], {"vqa": 1}, steps("c"), lambda: {"dpo": {"m": 2.5}})
    return s


def test_finished_runs_are_not_redone_and_lost_ones_are(toy_study):
    s = toy_study
    assert study.go(s, ["vqa", "eye"], 2, True) == {} and s.marks.read_text() == "abc"
    assert study.go(s, ["vqa", "eye"], 2, True) == {} and s.marks.read_text() == "abc"
    found = json.loads((s.out / "vqa" / "b.json").read_text())
    assert found["values"] == {"dpo": {"m": 1.5}} and found["plan"] == study.digest(s.sizes)
    (s.out / "vqa" / "b.json").unlink()                        # its parent's files are still there
    assert study.go(s, ["vqa"], 2, True) == {} and s.marks.read_text() == "abcb"
    s.tasks["a"].done.unlink()                                 # nobody needs it: not made again
    assert study.go(s, ["vqa"], 2, True) == {} and s.marks.read_text() == "abcb"
    (s.out / "vqa" / "b.json").unlink()                        # now somebody does
    assert study.go(s, ["vqa"], 2, True) == {} and s.marks.read_text() == "abcbab"


def test_a_failed_run_leaves_no_result_and_stops_only_what_needs_it(toy_study, capsys):
    s = toy_study
    s.result("vqa", "b", ["a"], {"vqa": 1}, s.steps("b", code=3), lambda: {})
    s.result("size", "d", ["a"], {"vqa": 1}, s.steps("d"), lambda: {})
    failed = study.go(s, ["vqa", "eye", "size"], 1, True)
    assert set(failed) == {"vqa/b", "eye/c"} and "needs vqa/b" in failed["eye/c"]
    assert not (s.out / "vqa" / "b.json").exists() and (s.out / "size" / "d.json").exists()
    s.result("vqa", "b", ["a"], {"vqa": 1}, s.steps("b"), lambda: {})
    assert study.go(s, ["vqa", "eye", "size"], 1, True) == {}
    assert s.marks.read_text() == "abdbc"


def test_a_killed_driver_goes_on(toy_study, monkeypatch):
    """Killed between the last command and the result: half a file is never seen as a result."""
    s = toy_study
    monkeypatch.setattr(study, "write", lambda path, value: (_ for _ in ()).throw(OSError("full"))
                        if path.parent.name == "vqa" else study_pairs.write(path, value))
    assert "full" in study.go(s, ["vqa"], 1, True)["vqa/b"]
    assert not list((s.out).glob("vqa/*.json"))
    monkeypatch.setattr(study, "write", study_pairs.write)
    assert study.go(s, ["vqa"], 1, True) == {} and s.marks.read_text() == "abb"


def test_a_lost_note_is_written_again_and_nothing_is_run(toy_study):
    s = toy_study
    study.go(s, ["vqa"], 1, True)
    s.note.unlink()
    assert [t.name for t in study.pending(s, ["vqa"])] == ["a"]
    s.add("a", None, s.tasks["a"].done, [], {"sft": 1}, lambda: pytest.fail("run again"),
          lambda: {"counts": 3})
    assert study.go(s, ["vqa"], 1, True) == {} and s.marks.read_text() == "ab"
    assert json.loads(s.note.read_text())["values"] == {"counts": 3}
    assert study.pending(s, ["vqa"]) == []


@pytest.mark.parametrize("error", [IndexError("no line"), TypeError("None"), SystemExit("refused")])
def test_a_gather_that_fails_is_one_failed_task(toy_study, error):
    s = toy_study

    def gather():
        raise error
    s.result("vqa", "b", ["a"], {"vqa": 1}, s.steps("b"), gather)
    s.result("size", "d", ["a"], {"vqa": 1}, s.steps("d"), lambda: {})
    failed = study.go(s, ["vqa", "size"], 1, True)
    assert set(failed) == {"vqa/b"} and str(error) in failed["vqa/b"]
    assert (s.out / "size" / "d.json").exists() and not (s.out / "vqa" / "b.json").exists()


def test_a_run_that_diverged_loses_its_seed_and_is_not_run_again(toy_study):
    s = toy_study
    words = f"open({str(s.marks)!r}, 'a').write('x'); " \
        "print('error: step 3: loss nan; nothing was updated.'); exit(1)"
    s.add("a", None, s.work / "a", [], {"sft": 1}, lambda: [[sys.executable, "-c", words]])
    s.result("size", "d", [], {"vqa": 1}, s.steps("d"), lambda: {})
    failed = study.go(s, ["vqa", "size"], 1, True)
    assert set(failed) == {"a", "vqa/b"} and "the seed is lost" in failed["a"]
    assert "loss nan" in json.loads(s.note.read_text())["values"]["diverged"]
    assert study.go(s, ["vqa", "size"], 1, True) == {} and s.marks.read_text() == "xd"


def test_a_rate_too_high_is_a_result_and_never_chosen(toy_study):
    s = toy_study
    words = "print('error: step 3: loss nan; nothing was updated. The batch: x'); exit(1)"
    s.result("lr", "seed-0-sft-1", [], {"sft": 1}, lambda: [[sys.executable, "-c", words]],
             lambda: {"sft": {"vqa average": 99.0}})
    s.add("seed-0/world", None, s.work, [], {}, list)
    s.work.mkdir()
    assert study.go(s, ["lr"], 1, True) == {}
    assert "loss nan" in s.read("lr", "seed-0-sft-1")["values"]["diverged"]
    s.sizes = {"tuning_seeds": 1, "rates": [1, 2]}
    for name in ("sft-2", "dpo-1", "dpo-2"):
        study_pairs.write(s.out / "lr" / f"seed-0-{name}.json",
                          {"values": {name[:3]: {"vqa average": 50.0, "data_digest": "d"}}})
    assert s.choose() == {"sft": {"rate": 2}, "dpo": {"rate": 1}}
    study_pairs.write(s.out / "lr" / "seed-0-dpo-2.json",
                      {"values": {"dpo": {"vqa average": 50.0, "data_digest": "e"}}})
    with pytest.raises(SystemExit, match="data_digest differs"):
        s.choose()
    for name in ("dpo-1", "dpo-2"):
        study_pairs.write(s.out / "lr" / f"seed-0-{name}.json", {"values": {"diverged": "nan"}})
    with pytest.raises(SystemExit, match="dpo diverged at every rate"):
        s.choose()


def test_asked_to_stop_it_stops_and_goes_on(toy_study):
    """The signal comes from the running command itself, so that no clock is in the test. What the
    stopped attempt took is part of what the run took."""
    s = toy_study
    signal.signal(signal.SIGINT, signal.default_int_handler)      # as main() does: `&` ignores it
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    s.result("vqa", "b", ["a"], {"vqa": 1}, lambda: [[sys.executable, "-c", stop]] * 2, lambda: {})
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.go(s, ["vqa", "eye"], 1, True)
    assert s.marks.read_text() == "a" and not (s.out / "vqa" / "b.json").exists()
    spent = s.work / "logs" / "vqa-b.seconds"
    assert 0 < float(spent.read_text()) < 60
    spent.write_text("1000")
    s.result("vqa", "b", ["a"], {"vqa": 1}, s.steps("b"), lambda: {})
    assert study.go(s, ["vqa", "eye"], 1, True) == {} and s.marks.read_text() == "abc"
    assert 1000 <= json.loads((s.out / "vqa" / "b.json").read_text())["seconds"] < 1060
    assert not spent.exists()


def test_a_command_started_while_stopping_is_ended(toy_study, monkeypatch):
    """The stop comes after the process was started and before it is among those that run."""
    s, live, popen = toy_study, study.Live(), study.subprocess.Popen

    def late(*args, **more):
        process = popen(*args, **more)
        live.stop()
        return process
    monkeypatch.setattr(study.subprocess, "Popen", late)
    sleep = [sys.executable, "-c", "__import__('time').sleep(9)"]
    s.add("a", None, s.work, [], {}, lambda: [sleep])
    with pytest.raises(SystemExit, match="stopped"):
        study.execute(s.tasks["a"], s.out, s.work / "log", live, study.made_by(s.sizes))


def test_the_lock_lives_as_long_as_a_child_of_a_killed_driver(toy_study):
    """The command leaves a process behind, as a driver killed at once leaves its commands."""
    s, pid = toy_study, toy_study.marks.with_name("pid")
    fork = "import os, time; child = os.fork(); child or time.sleep(60); " \
           f"open({str(pid)!r}, 'w').write(str(child)); open({str(s.tasks['a'].done)!r}, 'w')"
    s.add("a", None, s.tasks["a"].done, [], {}, lambda: [[sys.executable, "-c", fork]])
    s.work.mkdir()
    lock = open(s.work / "lock", "w")
    study.fcntl.flock(lock, study.fcntl.LOCK_EX)
    os.set_inheritable(lock.fileno(), True)
    assert study.go(s, ["vqa"], 1, True) == {}
    lock.close()
    with open(s.work / "lock", "w") as other:
        with pytest.raises(BlockingIOError):
            study.fcntl.flock(other, study.fcntl.LOCK_EX | study.fcntl.LOCK_NB)
        os.kill(int(pid.read_text()), 9)
        study.fcntl.flock(other, study.fcntl.LOCK_EX)        # waits for the end of the process


def test_a_task_that_never_fits_is_named(toy_study, capsys):
    s = toy_study
    s.add("a", None, s.tasks["a"].done, [], {"toy-lm-l": 1}, s.steps("a"))
    assert study.go(s, ["vqa"], 1, False, limit=study.COST["toy-lm-l"]) == {}
    said = capsys.readouterr().out
    assert "a alone takes about 80 min" in said and "vqa/b alone" not in said
    assert s.marks.read_text() == ""


def test_nothing_is_started_that_would_not_end_in_time(toy_study, capsys):
    s = toy_study
    assert study.go(s, ["vqa", "eye"], 1, True, limit=study.START / 2) == {}
    assert s.marks.read_text() == "" and "3 runs are left" in capsys.readouterr().out


def test_two_at_a_time_and_no_more(toy_study):
    s = toy_study
    stamp = ("import time, os; t = time.time(); time.sleep(0.3); open({0!r}, 'a').write("
             "f'{{t}} {{time.time()}}\\n')")
    for i in range(4):
        s.result("lr", f"t{i}", [], {"val": 1}, lambda: [[sys.executable, "-c", stamp.format(
            str(s.marks))]], lambda: {})
    study.go(s, ["lr"], 2, True)
    spans = [tuple(map(float, x.split())) for x in s.marks.read_text().splitlines()]
    assert len(spans) == 4
    assert max(sum(a <= t < b for a, b in spans) for t, _ in spans) <= 2


def test_the_plan_names_every_need_and_command(tmp_path):
    """All tasks of the full plan: needs exist, none is circular, every script is one of ours."""
    s = study_plan.Study(study_plan.FULL, 5, tmp_path / "w", tmp_path / "o")
    order = [t.name for t in study.pending(s, list(study_plan.PARTS))]
    assert set(order) == set(s.tasks)
    for name, task in s.tasks.items():
        assert all(order.index(n) < order.index(name) for n in task.needs)
        assert all(c in study.COST for c in task.cost)
        assert task.part is None or task.part in study_plan.PARTS
    counts = {p: sum(t.part == p for t in s.tasks.values()) for p in study_plan.PARTS}
    assert counts == {"lr": 2 * 11 + 1, "vqa": 5, "eye": 5, "repair": 5, "controls": 20, "size": 20,
                      "head": 5, "encoder": 5, "pretrained": 10}
    trains = [t for t in s.tasks.values() if {"sft", "dpo"} & set(t.cost)]
    # a seed: main 2, controls 5, sizes 8, four variants 8; and 2 × 5 on each of two tuning seeds
    assert len(trains) == 5 * 23 + 20


def test_plan_totals_add_up(tmp_path, capsys):
    s = study_plan.Study(study_plan.FULL, 5, tmp_path / "w", tmp_path / "o")
    study.show_tasks(s, list(study_plan.PARTS), 2, False)
    said = capsys.readouterr().out
    hours = sum(study.seconds_of(t) for t in s.tasks.values()) / 2 / 3600
    assert f"{hours:.1f} h" in said.splitlines()[-1]
    done = s.tasks["vqa/seed-0"].done
    study_pairs.write(done, {})
    study.show_tasks(s, ["vqa"], 2, False)
    assert capsys.readouterr().out.splitlines()[2].split()[1:3] == ["5", "4"]


def test_results_of_another_plan_are_refused(toy_study):
    s = toy_study
    study.go(s, ["vqa"], 1, True)
    s.sizes = {"x": 2}
    with pytest.raises(SystemExit, match="by another plan.*--out and --work, or delete both"):
        study.refuse_other_plans(s)
    s.sizes = {"x": 1}
    study_pairs.write(s.work / "plan.json", study.refuse_other_plans(s))
    for key, value in (("plan", "f00"), ("versions", {**study.versions(), "torch": "1.0"})):
        for path in (s.out / "vqa" / "b.json", s.work / "plan.json"):
            before = json.loads(path.read_text())
            study_pairs.write(path, {**before, key: value})
            with pytest.raises(SystemExit, match=f"{path.name} was made"):
                study.refuse_other_plans(s)
            study_pairs.write(path, before)
    assert study.refuse_other_plans(s)["plan"] == study.digest(s.sizes)


def test_the_digest_is_of_the_code_but_not_of_its_words(tmp_path, monkeypatch):
    """Another command is another plan; another docstring or comment is not."""
    for name in ("plan", "pairs", "models"):
        (tmp_path / f"{name}.py").write_text((ROOT / "study" / f"{name}.py").read_text())
    ours = study.digest({})
    monkeypatch.setattr(study, "__file__", str(tmp_path / "driver.py"))
    assert study.digest({}) == ours != study.digest({"x": 1})
    for name, old, new, same in (
            ("plan", '"""The plan of the study:', '"""A plan:', True),
            ("pairs", '"""JSON, ', '"""', True),
            ("plan", "# and 6,750;", "#", True), ("plan", "1000 + seed", "2000 + seed", False),
            ("pairs", "{seed}/kinds", "{seed}/k", False), ("models", "1e-3", "2e-3", False)):
        path = tmp_path / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert (study.digest({}) == ours) is same, old
        path.write_text(text)


def test_readme_is_rewritten_by_the_registered_study_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, readme = f"a {report.BEGIN}{report.END} z", tmp_path / "study/README.md"
    readme.parent.mkdir()
    for words, changed in (([], True), (["--quick"], False), (["--out", "other"], False),
                           (["--out", "results/"], True)):
        readme.write_text(page)
        monkeypatch.setattr(sys, "argv", ["report", *words])
        report.main()
        assert (readme.read_text() != page) is changed, words
    assert f"{study_plan.FULL['pairs']:,} pairs" in (tmp_path / "other/summary.md").read_text()


def test_the_driver_says_when_the_report_failed(tmp_path, monkeypatch):
    """And remembers in the folder of work which plan it is of, and hands its lock to commands."""
    work, seen = tmp_path / "work", []

    def go(*args):
        """In place of the runs: which locks would a command inherit?"""
        held = [int(fd.name) for fd in study.Path("/proc/self/fd").iterdir()
                if os.path.realpath(fd) == str((work / "lock").resolve())]
        seen.append([os.get_inheritable(fd) for fd in held])
        return {}
    monkeypatch.setattr(study, "go", go)
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "out"), "--work",
                                      str(work), "--parts", "lr"])

    def ends(code):
        return lambda command, **more: study.subprocess.CompletedProcess(command, code)
    monkeypatch.setattr(study.subprocess, "run", ends(3))
    with pytest.raises(SystemExit, match="study.report: exit status 3"):
        study.main()
    monkeypatch.setattr(study.subprocess, "run", ends(0))
    study.main()
    assert json.loads((work / "plan.json").read_text())["plan"] == study.digest(study_plan.FULL)
    assert seen == [[True], [True]]
    (work / "plan.json").write_text('{"plan": "another", "versions": {}}')
    with pytest.raises(SystemExit, match="by another plan"):
        study.main()


def test_clear_words_for_bad_input(tmp_path):
    for words, said in ((["--seeds", "0"], "--seeds must be at least 1"),
                        (["--seeds", "6"], "--seeds must be at most 5"),
                        (["--parts", "nose"], "invalid choice: 'nose'")):
        done = run("-m", "study", *words, "--out", tmp_path, "--dry-run", check=False)
        assert done.returncode and said in done.stdout + done.stderr


# ---------------------------------------------------------------------------------- the section

# No two measures, and no two kinds of control, differ by the same: one for another is seen.
TIMES = {**{f"{p} {g}": scale * (1 + i / 10) for p, scale in (("vqa", 1), ("repair", 6))
            for i, g in enumerate(("average", *study_findings.GROUPS))},
         "linear": 2, "seg": 3, "align": 4, "heat": 5}
ABOVE = {"swapped": 1, "shuffled": 2, "images": 3, "easy": 4}


def fake_results(out, plan, seeds=5):
    """Results with every value: DPO 2 points above SFT, SFT 1 above stage 1, ±0.1 by seed; a
    control's ABOVE these; all of it times TIMES."""
    s = study_plan.Study(plan, seeds, out.parent / "w", out)
    level = {"original": 50, "stage1": 60, "sft": 61, "dpo": 63, "chance": 5}
    for task in s.tasks.values():
        name = task.name.split("/")[-1]
        bump = 0.1 * int(name.split("-")[1]) if name.startswith("seed") else 0
        above = ABOVE.get(name.split("-")[-1], 0) if task.part == "controls" else 0
        values = {c: {m: times * (v + above + bump * (c == "dpo")) for m, times in TIMES.items()}
                  for c, v in level.items()}
        if name == "chosen":
            values = {m: {"rate": 1e-4} for m in ("sft", "dpo")}
        if task.name.endswith("/dpo"):
            values = {"heldout_accuracy": 0.7 + bump / 100}
        if name == "pairs":
            values = {"counts": {"sampled": 4000}, "blind": {"sampled": 0.6}}
        where = task.done if task.part else out / "made" / f"{task.name.replace('/', '-')}.json"
        study_pairs.write(where, {
            "values": values, "seconds": 36.0, "plan": study.digest(plan), "code": "now",
            "arithmetic": "AVX2"})
    return report.Results(out)


def test_section_from_full_results(tmp_path):
    plan = study_plan.FULL
    summary = report.summarise(fake_results(tmp_path / "results", plan), plan)
    found = {f["finding"]: f for f in summary["findings"]}
    one = found["the model, average: DPO above SFT"]
    assert one["by_seed"] == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4]) and one["verdict"] == "holds"
    assert found["the model, Knowledge: a tie"]["verdict"] == "does not"
    gap = found["the gap is larger with the fewest pairs than with the most"]
    assert gap["by_seed"] == pytest.approx([0] * 5) and gap["verdict"] == "undecided"
    assert not [f for f in summary["findings"] if f["verdict"] == "not run yet"]
    assert "lr.png" not in report.section(summary, plan)
    text = report.section(summary, plan) + report.details(summary, plan)
    assert "| +2.20 [+2.00, +2.40] | holds |" in text and "5 seeds" in text
    assert "4,000 to 4,000 of 45,000 questions" in text and "lr.png" in text
    assert "gets 60 % of these pairs right" in text
    assert text.count("\n| DPO, ") == 5 and text.count("\n| *DPO, ") == 5
    for minus, points in (("SFT", [2.2, 4.4, 6.6, 13.2]), ("original", [13.2, 26.4, 39.6, 79.2])):
        row = next(x for x in text.splitlines() if x.startswith(f"| larger encoder | {minus} | "))
        assert [float(x) for x in re.findall(r"([+-][\d.]+) \[", row)] == points, row
    assert "seeds 2 to 4, which were not used for tuning: the model +2.30 [+2.05, +2.55]" in text
    assert "| linear probe | 100.0 [" in text and "| +26.4 [+26.0, +26.8] |" in text
    assert not [x for x in ("edge of the grid", "lost", "states of this code", "rounding")
                if x in text]
    for base, apart in (("stage1", {"sft": 1, "dpo": 3.2}),
                        ("original", {"stage1": 10, "sft": 11, "dpo": 13.2})):
        for row, (_, measure) in zip(
                summary[f"each_minus_{base}"],
                [r for r in study_findings.measures() if base == "stage1" or r[1] in (
                    "linear", "seg", "align", "repair average")], strict=True):
            assert {c: row[c]["mean"] for c in apart} == pytest.approx(
                {c: TIMES[measure] * d for c, d in apart.items()}), measure


def test_controls_from_full_results(tmp_path):
    """Each kind of pair above stage 1, and the main comparison's DPO above each, by every judge."""
    summary = report.summarise(fake_results(tmp_path / "results", study_plan.FULL))
    want = [("SFT, no rejected", 1), ("DPO, the model's own wrong answer", 3.2),
            ("attribute swapped", 4.2), ("another question", 5.2), ("another image", 6.2),
            ("SFT, easy", 5), ("DPO, easy", 7.2), ("attribute swapped", -1),
            ("another question's", -2), ("another image", -3), ("minus* SFT, easy", -1.8),
            ("DPO, easy items, minus* SFT, easy", 2.2)]
    for row, (words, points) in zip(summary["controls"], want, strict=True):
        assert words in row["trained"]
        assert {m: row[m]["mean"] for m in ("vqa average", "linear", "seg", "repair average")} == \
            pytest.approx({m: points * TIMES[m] for m in ("vqa average", "linear", "seg",
                                                          "repair average")}), row["trained"]


def test_section_says_what_diverged_and_where_the_grid_ends(tmp_path):
    plan, out = study_plan.FULL, tmp_path / "results"
    fake_results(out, plan)
    lost = {"values": {"diverged": "loss nan"}, "seconds": 1, "code": "then"}
    study_pairs.write(out / "made/seed-3-size-480-dpo.json", lost)
    (out / "size/seed-3-480.json").unlink()
    study_pairs.write(out / "repair/seed-1.json", lost)
    study_pairs.write(out / "lr/chosen.json", {"values": {
        "sft": {"rate": plan["rates"][-1]}, "dpo": {"rate": 1e-4}}, "seconds": 1, "code": "now"})
    summary = report.summarise(report.Results(out), plan)
    found = {f["finding"]: f["verdict"] for f in summary["findings"]}
    assert found["480 pairs: DPO above SFT"] == "4 of 5 seeds; 1 lost, diverged"
    assert found["re-paired, average: DPO above SFT"] == "4 of 5 seeds; 1 lost, diverged"
    assert found["the model, average: DPO above SFT"] == "holds"
    assert found["800 pairs: DPO above SFT"] == "holds"
    text = report.section(summary, plan)
    assert "Made by 2 states of this code." in text
    assert "**SFT's is at the edge of the grid**" in text and "DPO's is at the edge" not in text


def test_what_was_run_twice_is_shown_beside(tmp_path):
    """The results of out/first beside those of out, which alone decide."""
    plan, out = study_plan.FULL, tmp_path / "results"
    fake_results(out, plan)
    fake_results(out / "first", plan)
    for path in (out / "first").glob("*/*.json"):
        found = json.loads(path.read_text())
        if path.parent.name == "vqa":
            found["values"]["dpo"] = found["values"]["sft"]
            study_pairs.write(path, found)
        elif path.name == "chosen.json":
            study_pairs.write(path, {**found, "values": {"sft": {"rate": 1e-4}, "dpo": {"rate": 1e-5}}})
        elif path.parent.name != "eye":
            path.unlink()
    summary = report.summarise(report.Results(out), plan)
    rows = {f["finding"]: f for f in summary["findings"] if "first" in f}
    assert {f["part"] for f in rows.values()} == {"vqa", "eye", "size", "lr"}    # 3,200: vqa's
    best = next(f for f in rows.values() if f["part"] == "lr")
    assert (best["text"], best["verdict"]) == ("1e-4, 1e-4", "undecided")
    assert best["first"] == {"text": "1e-5, 1e-4", "verdict": "holds"}
    assert summary["chosen"] == {"sft": 1e-4, "dpo": 1e-5}, "all else was trained at these"
    assert "A second tuning prefers 1e-4 for DPO; what is shown here was" in report.section(summary, plan)
    one = rows["the model, average: DPO above SFT"]
    assert (one["mean"], one["verdict"]) == (pytest.approx(2.2), "holds")
    assert (one["first"]["mean"], one["first"]["verdict"]) == (0, "undecided")
    text = report.details(summary, plan)
    assert "| +2.20 [+2.00, +2.40] | holds | +0.0 [+0.0, +0.0] | undecided |" in text
    assert "DPO at 1e-4 | verdict" not in text


def test_dpo_at_another_rate_is_shown_beside(tmp_path):
    """Its findings, and its column among what each gains over stage 1; it decides nothing."""
    plan, out = study_plan.FULL, tmp_path / "results"
    fake_results(out, plan)
    before = report.summarise(report.Results(out), plan)
    fake_results(out / "dpo-1e-4", plan)
    for path in (out / "dpo-1e-4").glob("*/*.json"):
        found = json.loads(path.read_text())
        if path.parent.name in ("vqa", "repair"):
            prefix = path.parent.name
            found["values"]["dpo"][f"{prefix} average"] = \
                found["values"]["sft"][f"{prefix} average"] + 7
            study_pairs.write(path, found)
        else:
            path.unlink()
    summary = report.summarise(report.Results(out), plan)
    for old, new in zip(before["findings"], summary["findings"], strict=True):
        assert old.items() <= new.items()
    row = next(f for f in summary["findings"] if f["finding"] == "the model, average: DPO above SFT")
    assert (row["dpo-1e-4"]["mean"], row["dpo-1e-4"]["verdict"]) == (pytest.approx(7), "holds")
    gains = {e["measure"]: e for e in summary["each_minus_stage1"]}
    for measure in ("the model, average", "re-paired, average"):
        assert gains[measure]["dpo-1e-4"]["mean"] == pytest.approx(gains[measure]["sft"]["mean"] + 7)
    assert gains["linear probe"]["dpo-1e-4"] is None
    text = report.details(summary, plan)
    assert "|  | stage 1 | SFT | DPO | DPO at 1e-4 |" in text
    assert "registered | verdict | DPO at 1e-4 | verdict |" in text
    assert "*first time*" not in text


def test_findings_stay_listed_when_nothing_was_run(tmp_path):
    summary = report.summarise(report.Results(tmp_path))
    assert {f["verdict"] for f in summary["findings"]} == {"not run yet"}
    text = report.section(summary)
    assert "has not been run yet" in text and ".png" not in text + report.details(summary)
    assert text.count("not run yet |") == len(summary["findings"]) >= 30


def test_one_seed_decides_nothing(tmp_path):
    summary = report.summarise(fake_results(tmp_path / "results", study_plan.FULL, seeds=1))
    assert {f["verdict"] for f in summary["findings"]} == {"1 of 5 seeds", "undecided"}    # rates
    four = report.summarise(fake_results(tmp_path / "four", study_plan.FULL, seeds=4))
    assert {f["verdict"] for f in four["findings"]} == {"4 of 5 seeds", "undecided"}
    assert report.details(four).count(" (4 of 5 seeds) | ") == 12 + 8      # controls, variants


def test_readme_section_is_the_committed_jsons():
    """What study/README.md says, to the letter, is what results/*/*.json give."""
    summary = report.summarise(report.Results(RESULTS))
    text, readme = report.section(summary), (ROOT / "study/README.md").read_text(encoding="utf-8")
    assert report.put_section(readme, text) == readme, "run: python -m study.report"
    assert report.page(summary) == (RESULTS / "summary.md").read_text(encoding="utf-8")
    assert sum(f.stat().st_size for f in RESULTS.rglob("*") if f.is_file()) < 5e6


def test_committed_results_are_of_the_registered_plan():
    ours = study.digest(study_plan.FULL)
    for path in RESULTS.glob("*/*.json"):
        assert study.same_plan(json.loads(path.read_text())["plan"], ours), path
    assert not study.same_plan("f00", ours) and not study.same_plan("97977281eb53", "f00")


def commands_of(sizes, tmp_path, monkeypatch, renamed):
    """{task: its part, needs, cost and commands} of a whole plan, in the words of then."""
    monkeypatch.setattr(study_plan, "write_pool", lambda data: None)
    s = study_plan.Study(sizes, 5, tmp_path / "work", tmp_path / "out")
    study_pairs.write(tmp_path / "out/lr/chosen.json", {"values": {
        "sft": {"rate": 1e-4}, "dpo": {"rate": 3e-5}}})
    here = {str(tmp_path / "work"): "WORK", str(tmp_path / "out"): "OUT", sys.executable: "python"}

    def plain(word):
        for now, then in here.items():
            word = str(word).replace(now, then)
        return word

    def command(words):
        words = [plain(w) for w in words]
        text = "\0".join(words)
        for now, then in renamed.items():
            text = text.replace(now.replace("-m ", "-m\0"), then)
        return text.split("\0")
    return {name: {"part": t.part, "needs": t.needs, "done": plain(t.done), "cost": t.cost,
                   "commands": [command(c) for c in t.steps()]} for name, t in s.tasks.items()}


def test_the_plan_is_the_registered_one(tmp_path, monkeypatch):
    """Sizes, every command of every task, the drawn world, the pairs of every kind and the first
    loss of the other eyes: as before files were moved. Only what passes here is tied to the old
    digest: after a change that passes but for the last line, write there what it says."""
    known = json.loads((ROOT / "study/registered.json").read_text())
    for name, sizes in (("FULL", study_plan.FULL), ("QUICK", study_plan.QUICK)):
        then = known[name]
        assert sizes == then["sizes"]
        tasks = commands_of(sizes, tmp_path / name, monkeypatch, known["renamed"])
        for task, commands in then.get("seed 0", {}).items():
            assert [" ".join(c) for c in tasks[task]["commands"]] == commands, task
        assert (len(tasks), sum(len(t["commands"]) for t in tasks.values())) == (
            then["tasks"], then["commands"])
        text = json.dumps(tasks, sort_keys=True)
        assert hashlib.sha256(text.encode()).hexdigest() == then["sha256"]

    rng = random.Random(5)
    pool = [{"id": f"q-{i}", "image": f"{i % 37}.png", "question": f"Question {i}?",
             "chosen": rng.choice(["1", "2", "red", "The ring is red."]), "rejected": "9"}
            for i in range(120)]
    said = {r["id"]: rng.choice(["1", "2", "3", "Red", "blue.", "the ring is blue"]) for r in pool}
    kinds = study_pairs.kinds_of(pool, said, seed=3, n=30)
    assert hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest() == known["pairs"]
    assert {k: study_pairs.blind(v) for k, v in kinds.items()} == known["blind"]

    out, sha = tmp_path / "world", hashlib.sha256()
    study_pairs.draw(out, 100, {**study_plan.QUICK["world"], "captions": 4, "instruct": 4,
                                "repair": 4, "preferences": 24, "heldout": 6, "align": 4}, 4)
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix != ".png":       # PNG's bytes depend on zlib's version
            sha.update(str(path.relative_to(out)).encode() + path.read_bytes())
    assert sha.hexdigest() == known["world"]

    for name, loss in known["models"].items():
        torch.manual_seed(0)
        _, loss_of = getattr(study_models, name)(random.Random(f"0/toy-vit-{name}"))
        assert loss_of(0).item() == pytest.approx(loss, rel=1e-5)

    assert known["digests"] == dict(zip(("97977281eb53", "be831ae26c0d"), (
        study.digest(study_plan.FULL), study.digest(study_plan.QUICK))))


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    report.draw_figures(report.summarise(fake_results(out, study_plan.FULL)), out)
    assert {p.stem for p in out.glob("*.png")} == {name for name, *_ in report.FIGURES}
    for part in ("head", "size", "controls"):                    # the last seed is not run yet
        for path in (out / part).glob("seed-4-*"):
            path.unlink()
    summary = report.summarise(report.Results(out))
    assert {f["part"] for f in report.complete(summary)} == {"vqa", "eye", "repair", "encoder",
                                                             "pretrained", "size"}
    assert [f["finding"] for f in report.complete(summary) if f["part"] == "size"] == [
        "3,200 pairs: DPO above SFT"]
    assert [name for name, *_ in report.FIGURES if not report.drawn(summary, name)] == [
        "size", "controls"]


def test_a_seed_run_again_is_compared_value_by_value(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        fake_results(out, study_plan.QUICK, seeds=1)
    both, apart = report.differing(one, two)
    assert len(both) > 20 and not apart
    changed = json.loads((two / "vqa/seed-0.json").read_text())
    changed["values"]["dpo"]["vqa average"] += 1e-12
    study_pairs.write(two / "vqa/seed-0.json", {**changed, "seconds": 1})
    assert report.differing(one, two)[1] == {"vqa/seed-0.json": pytest.approx(1e-12, rel=0.1)}


# ------------------------------------------------------------- commands and what is read of them

SCORES = {"groups": dict.fromkeys(study_findings.GROUPS, 50.0), "average": 50.0}


def pretend(command):
    """Write what a stage's command would have written, where it would have."""
    import repair_eval
    script, flags, name = command[0], {}, None
    for word in command[1:]:
        name = word if word.startswith("--") else name
        flags.setdefault(name, []).extend([] if word.startswith("--") else [word])
    one = {k.strip("-"): v[0] for k, v in flags.items() if k and v}

    def put(path, value):
        study_pairs.write(Path(path), value)
    if script in ("pretrain.py", "train_sft.py", "train_dpo.py"):
        stage = f"{one['run']}/{script[:-3].removeprefix('train_')}"
        put(f"{stage}/config.json", {"data_digest": "d", "data": "x", "projector_digest": "1",
                                     "arguments": {"lr": float(one.get("lr", 0))}})
        put(f"{stage}/metrics.jsonl", 0)
        Path(stage, "metrics.jsonl").write_text(
            '{"step": 2, "loss": 1}\n{"step": 3, "heldout_margin": 0, "heldout_accuracy": 0.5}\n')
        put(f"{stage}/final/config.json", {})
    elif script == "extract.py":
        put(f"{one['run']}/{one['stage']}/encoder/config.json", {})
    elif script == "repair_eval.py" and "mllm" in one:
        put(Path(one["mllm"]).parent / "bench" / "results.json", SCORES)
    elif script == "repair_eval.py":
        folder = repair_eval.repair_folder(study.argparse.Namespace(
            encoder=one["encoder"], run=one["run"], run_typed=True, reuse_projector_layers=0))
        put(folder / "bench" / "results.json", SCORES)
        put(folder / "config.json", {"data_digest": "r", "projector_digest": one["seed"]})
    elif script == "gradcam.py":
        put(f"{one['run']}/probes/gradcam/results.json", {"share_inside": {
            k: {"mean": 0.5} for k in ("SFT", "DPO", "chance")}})
    elif script.startswith("probe_"):
        eyes = flags["--encoder"]
        assert len(eyes) == len(set(eyes)) and all(
            e == "toy-vit" or (Path(e) / "config.json").exists() for e in eyes)
        put(f"{one['out']}/results.json", {
            "encoders": {e: {"top1": {"mean": 0.5}, "recall": [0.4, 0.6]} for e in eyes},
            "scores": [{"mean": 0.5} for e in eyes]})
    else:                                                    # weights: -m toy, -m study.models
        put(f"{one['out']}/{[w for w in command if w.startswith('toy-')][0]}/config.json", {})


def test_every_run_reads_what_its_commands_write_and_every_finding_is_fed(tmp_path):
    """The whole plan with stages that only pretend: names of files, conditions and measures fit
    from the first command to the last finding; every flag is one its script knows."""
    plan = study_plan.QUICK
    s = study_plan.Study(plan, 2, tmp_path / "work", tmp_path / "out")
    known = (ROOT / "pivot/flags.py").read_text()
    for task in study.pending(s, list(study_plan.PARTS)):
        if task.part is None:
            study_pairs.write(study.record_of(task, s.out), {
                "values": {"counts": {"sampled": 96}, "blind": {"sampled": 0.5}}, "seconds": 1,
                "code": "c"})
        if task.name.endswith(("/world", "/pairs")):
            study_pairs.write(task.done, {})
            continue
        commands = [[str(w) for w in c] for c in task.steps()]
        for command in commands:
            script = {"toy": "toy/__main__.py", "study.models": "study/models.py"}[command[1]] \
                if command[0] == "-m" else command[0]
            source = known + (ROOT / script).read_text()
            assert all(f'"{w}"' in source for w in command if w.startswith("--")), command
            pretend(command)
        values = task.gather() if task.gather else None
        if task.part:
            study_pairs.write(task.done, {"values": values, "seconds": 1, "code": "c"})
        assert task.done.exists(), task.name
    assert study.pending(s, list(study_plan.PARTS)) == []
    summary = report.summarise(report.Results(s.out), plan)
    assert {f["verdict"] for f in summary["findings"]} <= {"2 of 5 seeds", "undecided"}
    assert all(row.pop("held-out") is None for row in summary["controls"])     # in notes alone
    compared = summary["each_minus_stage1"] + summary["each_minus_original"]
    assert all(row.pop("dpo-1e-4") is None for row in compared)                # not of this plan
    cells = [c for row in compared + summary["controls"] for c in row.values()]
    assert None not in cells, "each judge gave all its values"
    assert s.chosen() == dict.fromkeys(("sft", "dpo"), plan["rates"][0])     # all equal: the lowest

    def refused(name, stage, key, value, said):
        before = json.loads((stage / "config.json").read_text())
        study_pairs.write(stage / "config.json", {**before, key: value})
        with pytest.raises(SystemExit, match=said):
            s.tasks[name].gather()
        study_pairs.write(stage / "config.json", before)
    repaired = {"repair/seed-0": "main", "controls/seed-0-easy": "easy",
                "head/seed-0-head-l": "head-l", "encoder/seed-0-eye-l": "eye-l",
                "pretrained/seed-0-masked": "masked"}
    for name, folder in {**repaired, "vqa/seed-0": "main", "eye/seed-0": "main",
                         "size/seed-0-32": "size-32"}.items():
        refused(name, s.run(0, folder) / "dpo", "data_digest", "e", "data_digest differs")
    for name, folder in {**repaired, "controls/seed-0-images": "images"}.items():
        refused(name, s.run(0, folder) / "pretrain", "projector_digest", "1000", "not a new one")
    for name, folder in repaired.items():
        refused(name, s.run(0, folder) / "repair/sft", "projector_digest", "7", "_digest differs")
        refused(name, s.run(0, folder) / "repair/sft", "data_digest", "7", "_digest differs")


# ----------------------------------------------------------------------------- the other encoders

@pytest.mark.parametrize("name", ["toy-vit-supervised", "toy-vit-masked"])
def test_other_encoders_open_and_are_the_same_twice(name, tmp_path):
    from pivot import published
    for out in ("one", "two"):
        run("-m", "study.models", name, "--out", tmp_path / out, "--steps", 2)
    one, two = ((tmp_path / out / name / "model.safetensors").read_bytes() for out in
                ("one", "two"))
    assert one == two
    assert published.load_encoder(str(tmp_path / "one" / name)).num_tokens == 36
