"""Killed at any moment and started again = never killed (invariant 5), on two processes.

A few kills here; `make kill` (PIVOT_KILLS=long) goes through every moment and stage. torchrun is run
where it is what is killed, or what starts a run again; elsewhere the processes are forks (conftest).
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import COMMON, LONG, ROOT, bit_equal, copied, killed_at, metrics, run, under
from test_stages import close

# moment, for the how-manieth time, on which process
MOMENTS = [
    ("before rename of ref_logps.safetensors", 1, 0), ("after a line", 1, 0),
    ("shards begun", 2, 1), ("shards written", 1, 0), ("before rename of step", 1, 0),
    ("after rename of step", 1, 0), ("old half removed", 1, 0), ("before the update", 2, 1),
    ("before a line", 2, 1), ("before rename of position.json", 1, 0), ("before clipping", 2, 0),
    ("before rename of final", 1, 0), ("after rename of final", 1, 0)]
STEPS = 9 if LONG else 5          # most kills cost a step or two
SHORT = [m for m in MOMENTS if m[0] in ("old half removed", "after rename of final")]


def torchrun(script, *command, processes=2, restarts=0, env=(), wait=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts",
               restarts, f"--nproc_per_node={processes}", script, *command]
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, **dict(env)})
    if not wait:
        return process
    out = process.communicate(timeout=180)[0]
    return process.returncode, out


@pytest.fixture(scope="module")
def commands(world, stage1, tmp_path_factory):
    """stage → (its command in a run folder of that name, the undisturbed run's folder)."""
    base, made = tmp_path_factory.mktemp("survive"), {}

    def command(stage, name, steps=STEPS):
        folder = base / name
        common = ["--run-dir", folder, *COMMON[2:], "--data", world, "--save-every", 1]
        if stage in ("sft", "dpo"):
            if not folder.exists():
                copied(stage1, folder)
            return [f"train_{stage}.py", *common, "--max-steps", steps], folder / stage
        if stage == "pretrain":
            return ["pretrain.py", "--encoder", "toy-vit", "--llm", "toy-lm", *common,
                    "--projector-max-steps", 2, "--max-steps", STEPS - 2], folder / stage
        return ["repair_eval.py", "--encoder", "toy-vit", "--llm", "toy-lm", *common, "--limit", 4,
                "--projector-max-steps", 2, "--max-steps", STEPS - 2], folder / "repair" / "toy-vit"

    def calm(stage, steps=STEPS):
        if (stage, steps) not in made:
            line, folder = command(stage, f"{stage}-calm-{steps}", steps)
            run(*line, processes=2)
            made[stage, steps] = folder
        return made[stage, steps]
    return command, calm


STAGES = ["dpo", "sft", "pretrain", "repair"] if LONG else ["dpo"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_named_moments(commands, tmp_path, stage):
    """One run, killed at one moment after the other; then it may end. Bit-equal to a calm one."""
    command, calm = commands
    line, folder = command(stage, f"{stage}-killed")
    moments = [m for m in (MOMENTS if LONG else SHORT) if stage == "dpo" or "ref_logps" not in m[0]]
    for i, (moment, count, rank) in enumerate(moments):
        killed_at(f"{moment}:{count}:{rank}", tmp_path / f"kill-{i}", line, processes=2)
        if (folder / "final").exists():
            assert (folder / "final/config.json").exists()
    run(*line, processes=2)
    bit_equal(folder, calm(stage))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim", ["worker", "torchrun"] if LONG else ["torchrun"])
def test_killed_at_random(commands, stage, victim):
    """kill -9 of a worker, or of torchrun itself (its workers must go with it)."""
    command, calm = commands
    line, folder = command(stage, f"{stage}-random-{victim}")
    rng, kills, tries = random.Random(stage + victim), 0, 0
    while kills < (8 if LONG else 1) and tries < 30:
        tries += 1
        process = torchrun(*line, wait=False)
        # Starting takes seconds in which nothing can break: wait until it trains.
        began = (folder / "config.json").stat().st_mtime if (folder / "config.json").exists() else 0
        while process.poll() is None and not ((folder / "config.json").exists() and
                                              (folder / "config.json").stat().st_mtime > began):
            time.sleep(0.01)
        time.sleep(rng.random() * 1.2)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                  text=True).stdout.split()
        try:
            os.kill(int(rng.choice(children)) if victim == "worker" else process.pid,
                    signal.SIGKILL)
        except (ProcessLookupError, IndexError):
            pass
        process.communicate(timeout=60)
        kills += process.returncode != 0
        for child in children:                     # nobody is left behind
            for _ in range(200):
                if not os.path.exists(f"/proc/{child}"):
                    break
                time.sleep(0.05)
            else:
                pytest.fail(f"process {child} outlived torchrun")
        if (folder / "final").exists():
            break
    code, out = torchrun(*line)
    assert code == 0, out[-3000:]
    bit_equal(folder, calm(stage))


@pytest.mark.parametrize("how", ["--standalone"] + ["--master-port=29611"] * LONG)
def test_a_restarted_worker_may_be_quicker_than_its_peer(how):
    """Without a store for each attempt it is refused at the address of the dead, or hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", how, "--max-restarts=1",
               "--nproc_per_node=2", "tests/restarted.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and "attempt 1 got through" in done.stdout, done.stderr[-3000:]


@pytest.mark.skipif(not LONG, reason="make kill")
@pytest.mark.parametrize("turn", range(6))
def test_torchrun_restarts_a_killed_worker_by_itself(commands, tmp_path, turn):
    command, calm = commands
    line, folder = command("dpo", f"restarted-{turn}")
    code, out = torchrun("tests/killed.py", *line, restarts=2, env={
        "KILL": f"before the update:{1 + turn % 5}:{turn % 2}",
        "KILL_MARK": str(tmp_path / "mark")})
    assert code == 0 and (tmp_path / "mark").exists(), out[-3000:]
    bit_equal(folder, calm("dpo"))


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2), (1, 4)] if LONG else [(2, 1)])
def test_restarted_with_another_number_of_processes(commands, tmp_path, before, after):
    """Five steps: AdamW magnifies the rounding of each further one (1.4e-5 after nine)."""
    command, calm = commands
    line, folder = command("dpo", f"from-{before}-to-{after}", steps=5)
    killed_at("before the update:4:0", tmp_path / "kill", line, processes=before)
    assert "continuing after 3 steps" in run(*line, processes=after).stdout
    close(metrics(folder), metrics(calm("dpo", steps=5)))


def test_two_runs_in_one_folder(commands):
    """The second is refused as long as the first one lives."""
    import fcntl
    command, _ = commands
    line, folder = command("dpo", "shared")
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = run(*line, check=False)
    assert done.returncode == 1 and "another process is training in" in done.stderr


def test_nothing_older_goes_before_what_replaces_it_is_on_disk(stage1, world, tmp_path):
    """Power may fail: files are fsynced before their folder gets its name, the name (its parent
    folder) before the older checkpoint, the checkpoints or the older encoder are deleted."""
    log, folder = tmp_path / "log", tmp_path / "run"
    copied(stage1, folder)
    dpo = ["train_dpo.py", "--run-dir", folder, "--data", world, *COMMON[2:], "--max-steps", 3,
           "--num-samples", 24, "--lr", 1e-3, "--save-every", 1, "--keep", 1]
    extract = ["extract.py", "--run-dir", folder, "--stage", "dpo"]
    for words in (dpo, extract, [*extract, "--overwrite"]):
        script = under("durable.py", tmp_path / f"durable_{words[0]}", words[0], DURABLE=log)
        run(script, *words[1:])
    events, lasting, named, deleted = [json.loads(line) for line in log.open()], set(), None, []
    for what, path, *more in events:
        if what == "fsync":
            lasting.add(path)
        elif what == "rename" and more[1:] and ".old" not in more[0]:   # a folder gets its name
            assert lasting >= set(more[1:]), (path, set(more[1:]) - lasting)
            named = str(Path(more[0]).parent)
            lasting.discard(named)
        elif what == "delete" and ".tmp" not in path and "writing" not in path:
            assert named in lasting, (path, named)
            deleted.append(Path(path).name)
    assert deleted == ["step-1", "checkpoints", "encoder.old"]
