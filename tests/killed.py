"""Run a stage and `kill -9` it once, at a named moment: the crash half of test_survive.py.

    KILL=moment:count:rank KILL_MARK=file python killed.py train_dpo.py --run-dir …

The process of that rank kills itself when it meets the moment for the count-th time, unless the
mark file is there: it is made just before, so that a restarted run meets the moment unharmed.
"""
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.argv = sys.argv[1:]
from pivot import checkpoints, rollout, training  # noqa: E402

wanted, left, rank = os.environ["KILL"].split(":")
left, mark = int(left), Path(os.environ["KILL_MARK"])


def meet(moment):
    global left
    if moment == wanted and os.environ.get("RANK", "0") == rank and not mark.exists():
        left -= 1
        if not left:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name, before, after):
    """owner.name(…) with the moments before(args) and after(args) around it."""
    true = getattr(owner, name)

    def wrapped(*args, **more):
        meet(before(*args))
        result = true(*args, **more)
        meet(after(*args))
        return result
    setattr(owner, name, wrapped)


def target(source, path):
    return Path(path).name.split("-")[0]


def half_removed(path, *rest, **more):
    """The moment in the middle of removing an old checkpoint: its first shard is gone."""
    if wanted == "old half removed" and Path(path).name.startswith("step-"):
        shards = sorted(Path(path).glob("*.distcp"))
        if shards:
            shards[0].unlink()
        meet("old half removed")
    return true_rmtree(path, *rest, **more)


true_rmtree = shutil.rmtree
shutil.rmtree = half_removed
wrap(checkpoints.dcp, "save", lambda *a: "shards begun", lambda *a: "shards written")
wrap(os, "replace", lambda a, b: f"before rename of {target(a, b)}",
     lambda a, b: f"after rename of {target(a, b)}")
wrap(checkpoints.Run, "log", lambda *a: "before a line", lambda *a: "after a line")
wrap(rollout, "draw", lambda *a: "before a group", lambda *a: "after a group")
wrap(rollout, "score", lambda *a: "before a group is scored", lambda *a: "after a score")
wrap(training, "clip_grad_norm", lambda *a: "before clipping", lambda *a: "before the update")
runpy.run_path(sys.argv[0], run_name="__main__")
