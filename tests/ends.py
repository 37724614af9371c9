"""Run a stage in which something goes wrong at a named moment: the other half of test_ends.py.

    END=what:count:rank python ends.py train_dpo.py --run-dir …

What goes wrong does so when that moment comes for the count-th time in the process of that rank, or
in any of its workers.
"""
import errno
import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.argv = sys.argv[1:]
import torch  # noqa: E402

import data  # noqa: E402
import model as m  # noqa: E402
from pivot import (checkpoints, distributed, encoders, index, model_io, rehearsal,  # noqa: E402
                   training)

what, left, rank = os.environ["END"].split(":")
left, trainer = int(left), os.getpid()
kind, _, where = what.partition(" ")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(text):
    def raising():
        raise ValueError(text)
    return raising


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


ACTIONS = {
    "exception": fail("something a fork does"), "full": full, "oom": out_of_memory,
    "exit": lambda: os._exit(3), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stuck": lambda: time.sleep(1000),
    "orphan": lambda: (os.kill(trainer, signal.SIGKILL), time.sleep(1000)),
    "parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    **{name: lambda number=number: os.kill(trainer, number) for name, number in (
        ("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT), ("SIGHUP", signal.SIGHUP),
        ("SIGUSR1", signal.SIGUSR1), ("SIGUSR2", signal.SIGUSR2))}}


def meet():
    global left
    if os.environ.get("RANK", "0") == rank:
        left -= 1
        if left == 0:
            Path(os.environ["ENDS_AT"]).write_text(str(time.time()))
            ACTIONS[kind]()


def wrap(owner, name):
    """owner.name(…), before which the moment is met."""
    true = getattr(owner, name)

    def wrapped(*args, **more):
        meet()
        return true(*args, **more)
    setattr(owner, name, wrapped)


def nan(*args, true=m.dpo_loss):
    losses, *rewards = true(*args)
    Path(os.environ["ENDS_AT"]).write_text(str(time.time()))
    return losses * float("nan"), *rewards


MOMENTS = {
    "in the loop": (training, "clip_grad_norm"), "reading records": (data.Reader, "read"),
    "in a worker": (data.Samples, "__getitem__"), "in collate": (data, "collate"),
    "in the encoder": (encoders.Encoder, "forward"), "in the log": (checkpoints.Run, "log"),
    "saving": (checkpoints.dcp, "save"), "in final": (model_io, "save_mllm"),
    "opening": (model_io, "load_mllm"), "describing": (checkpoints.Run, "describe"),
    "in the rehearsal": (rehearsal, "forward_and_backward"),
    "before the save": (checkpoints.Run, "save_if_due"),
    "in the reference": (checkpoints, "save_file")}
if kind == "nan":
    m.dpo_loss = nan
elif where == "in a hook":
    torch.nn.modules.module.register_module_forward_hook(lambda *_: meet())
else:
    wrap(*MOMENTS[where])
if where == "reading records":                # in two forks a process, however few they are
    index.WORTH, index.LEAST, distributed.cores = 0, 4, lambda: 2
runpy.run_path(sys.argv[0], run_name="__main__")
