"""Every end is an end (invariant 8): whatever fails, every process of the run ends within a minute,
with a non-zero code and the cause last on the screen, and nothing of it is left behind.

Ten ways here; `make kill` (PIVOT_KILLS=long) goes through all of them.
"""
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import COMMON, ENDED, LONG, ROOT, bit_equal, copied, metrics, run

MINUTE, STOPPED = 60, 75


class End(NamedTuple):
    """what:count:rank as tests/ends.py reads them; says: stands in the last lines; goes_on: the same
    command then ends as an undisturbed run does; short: one of `make test`."""
    what: str
    count: int
    says: str
    code: int = 1
    workers: int = 2
    processes: int = 1
    rank: int = 0
    goes_on: bool = True
    short: bool = False
    flags: tuple = ()


RAISED = "ValueError: something a fork does"
FULL = "No space left on device"
ENDS = [
    End("exception in the loop", 2, RAISED, short=True),
    End("exception in the loop", 2, RAISED, workers=0),
    End("exception in the loop", 2, RAISED, processes=2, rank=1, short=True),
    End("exception in the loop", 2, RAISED, processes=2, rank=0, workers=0),
    End("exception reading records", 1, RAISED),
    End("exception reading records", 1, RAISED, processes=2, rank=1),
    End("kill reading records", 1, "a process that reads records was killed", short=True),
    End("kill reading records", 1, "a process that reads records was killed", processes=2, rank=1),
    End("stuck reading records", 1, "nothing was read for 0.1 min",
        flags=("--stall-timeout", 0.1)),
    End("orphan reading records", 1, "", code=-9),       # stuck where its trainer is killed
    End("SIGTERM reading records", 1, "", code=-15),
    End("exception in a worker", 3, RAISED, short=True),
    End("exception in collate", 2, RAISED),
    End("exception in collate", 2, RAISED, workers=0),
    End("exception in a hook", 5, RAISED),
    End("exception in the encoder", 3, RAISED, short=True),
    End("exception in the encoder", 3, RAISED, processes=2, rank=1),
    End("exception opening", 1, RAISED),
    End("exception saving", 1, RAISED),
    End("exception in final", 1, RAISED),
    End("exit in a worker", 3, "a process that reads pictures was killed", short=True),
    End("kill in a worker", 3, "a process that reads pictures was killed"),
    End("kill in a worker", 3, "a process that reads pictures was killed", processes=2, rank=1),
    End("stuck in a worker", 3, "a worker is stuck at one of", short=True,
        flags=("--stall-timeout", 0.1)),
    End("stuck in a worker", 3, "a worker is stuck at one of", processes=2, rank=1,
        flags=("--stall-timeout", 0.1)),
    End("kill in the loop", 2, "", code=-9),
    End("orphan in a worker", 3, "", code=-9, short=True),        # stuck where its trainer is killed
    End("kill in the loop", 2, "", processes=2, rank=1, short=True),
    End("exit in the loop", 2, "", processes=2, rank=1),
    End("parent in the loop", 2, "", processes=2, rank=1, code=-9),          # torchrun itself
    End("SIGTERM opening", 1, "", code=-15),
    End("SIGINT describing", 1, "interrupted", code=130),
    End("SIGTERM in a worker", 3, "", code=-15),                        # in the reference pass
    End("SIGHUP opening", 1, "", code=-1),
    End("SIGTERM in the loop", 2, "asked to stop", code=STOPPED, short=True),
    End("SIGINT in the loop", 2, "asked to stop", code=STOPPED),
    End("SIGUSR1 in the loop", 2, "asked to stop", code=STOPPED),
    End("SIGUSR2 in the loop", 2, "asked to stop", code=STOPPED, workers=0),
    End("SIGHUP in the loop", 2, "asked to stop", code=STOPPED),
    End("SIGTERM in the loop", 2, "asked to stop", processes=2, rank=1),
    End("SIGTERM saving", 1, "asked to stop", code=STOPPED),
    End("SIGTERM before the save", 3, "asked to stop", code=STOPPED),
    End("full in the log", 3, FULL, short=True),
    End("full saving", 1, FULL),
    End("full in final", 1, FULL),
    End("full in the reference", 1, FULL),
    End("oom in the loop", 2, "out of GPU memory"),
    End("oom in the rehearsal", 1, "out of memory at the longest", flags=("--rehearsal", "on")),
    End("oom in the rehearsal", 1, "out of memory at the longest", processes=2, rank=1,
        flags=("--rehearsal", "on")),
    End("nan in the loop", 1, "nothing was updated", goes_on=False)]
TABLE = [e for e in ENDS if LONG or e.short]


def of_mark(mark):
    """The processes that were started with this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def left_behind(mark, patience=MINUTE):
    """Which of them are still there when a minute has passed."""
    end = time.monotonic() + patience
    while (found := of_mark(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def start(words, processes, env):
    command = [sys.executable, *words] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", *words]
    return subprocess.Popen([str(w) for w in command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, **env})


@pytest.fixture(scope="module")
def calm(world, stage1, tmp_path_factory):
    """processes → the run folder of an undisturbed run."""
    made = {}

    def undisturbed(processes):
        if processes not in made:
            folder = tmp_path_factory.mktemp("calm") / "run"
            copied(stage1, folder)
            run("train_dpo.py", *command(folder, world, 2), processes=processes)
            made[processes] = folder
        return made[processes]
    return undisturbed


def command(folder, world, workers):
    common = [*COMMON[2:-2], "--workers", workers, "--data", world]
    return ["--run-dir", folder, *common, "--max-steps", 4, "--save-every", 1, "--num-samples", 32]


@pytest.mark.parametrize("end", TABLE, ids=lambda e: f"{e.what}, {e.workers} workers, "
                         f"{e.processes} processes")
def test_every_end_is_an_end(end, world, stage1, calm, tmp_path, record_property):
    folder, mark = copied(stage1, tmp_path / "run"), uuid.uuid4().hex
    words = command(folder, world, end.workers)
    process = start(["tests/ends.py", "train_dpo.py", *words, *end.flags], end.processes,
                    {"END": f"{end.what}:{end.count}:{end.rank}", "ENDS_MARK": mark,
                     "ENDS_AT": str(tmp_path / "at")})
    try:
        said = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        for there in (found := of_mark(mark)):          # one that lives on holds the pipe open
            os.kill(there, signal.SIGKILL)
        raise AssertionError(f"still there after four minutes: {found}, having said "
                             f"{process.communicate()[0][-2000:]}")
    left = left_behind(mark)
    took = time.time() - float((tmp_path / "at").read_text())
    record_property(ENDED, took)
    assert not left and took < MINUTE, f"{took:.0f} s after the failure, left: {left}"
    if end.processes == 1:
        assert process.returncode == end.code, said[-2000:]
        last = [x for x in said.strip().split("\n") if x.strip() and "/4 [" not in x]   # no bars
        assert end.says in "\n".join(last[-2:]), said[-2000:]
    else:
        assert process.returncode != 0 and end.says in said, said[-3000:]
    if end.goes_on and not (LONG or end.what.startswith(("full", "SIG"))):
        return                                             # `make kill` starts every one again
    if end.goes_on:
        run("train_dpo.py", *words, processes=end.processes)
        bit_equal(folder / "dpo", calm(end.processes) / "dpo")
    elif (folder / "dpo/metrics.jsonl").exists():
        assert not [x for x in metrics(folder / "dpo") if "loss" in x]


def test_a_second_interrupt_ends_at_once(world, stage1, tmp_path):
    """The first asks to stop; the second is heeded where it finds the run, here in a stuck save."""
    import signal
    folder, mark = copied(stage1, tmp_path / "run"), uuid.uuid4().hex
    process = start(["tests/ends.py", "train_dpo.py", *command(folder, world, 2)], 1,
                    {"END": "stuck saving:1:0", "ENDS_MARK": mark,
                     "ENDS_AT": str(tmp_path / "at")})
    deadline = time.monotonic() + 180
    while not (folder / "dpo/metrics.jsonl").exists() or \
            not [x for x in metrics(folder / "dpo") if "loss" in x]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -2 and not left_behind(mark, 10)


def test_a_run_that_nobody_reads_any_more_ends(world, stage1, tmp_path):
    """`| head`, or a terminal that is gone: the cause cannot be printed either. It ends all the
    same, while workers live."""
    folder, mark = copied(stage1, tmp_path / "run"), uuid.uuid4().hex
    process = start(["train_dpo.py", *command(folder, world, 2), "--log-every", 1, "--max-steps",
                     400, "--epochs", 100], 1, {"ENDS_MARK": mark})
    while "step 0" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(MINUTE) != 0 and not left_behind(mark, 10)


def test_a_hangup_that_nohup_ignores_stays_ignored(world, stage1, tmp_path):
    folder = copied(stage1, tmp_path / "run")
    words = ["nohup", sys.executable, "tests/ends.py", "train_dpo.py", *command(folder, world, 0)]
    done = subprocess.run([str(w) for w in words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "END": "SIGHUP in the loop:2:0",
                               "ENDS_AT": str(tmp_path / "at")}, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]


# --------------------------------------------------------------------------- before a run begins

@pytest.mark.parametrize("command", [["train_dpo.py"], ["-m", "tools.plan"]])
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, command):
    """A torch that takes a minute to import stands for the real one on a slow disk."""
    mark = tmp_path / "mark"
    (tmp_path / "torch.py").write_text(
        f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    while not mark.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=MINUTE)[1].strip() == "interrupted"
    assert process.returncode == -signal.SIGINT


def typed(command, **environment):
    """→ CompletedProcess of a command in another environment."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          timeout=MINUTE, env={**os.environ, **environment})


@pytest.mark.parametrize("environment,says", [
    ({"RANK": "0"}, "RANK is in the environment and WORLD_SIZE is not: start with torchrun"),
    ({"RANK": "x"}, "RANK=x in the environment is no number"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
     "RANK must be below WORLD_SIZE"),
    ({"LOCAL_WORLD_SIZE": ""}, "nowhere/captions.jsonl does not exist"),         # as if unset
])
def test_half_of_what_torchrun_sets_is_one_line(environment, says):
    done = typed(["pretrain.py", "--encoder", "toy-vit", "--llm", "toy-lm", "--data", "nowhere"],
                 **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_a_busy_port_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = typed(["pretrain.py", "--encoder", "toy-vit", "--llm", "toy-lm", "--data", "x"],
                     RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"cannot meet the other processes of this run at 127.0.0.1:{port}" in last


@pytest.mark.parametrize("command", [
    ["-m", "tools.plan", "train_dpo", "--encoder", "siglip2-base"], ["-m", "toy", "--help"]])
def test_a_terminal_that_knows_ascii_alone(command):
    """× and – come as \\xd7 and \\u2013."""
    done = typed(command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.isascii() and len(done.stdout) > 100
