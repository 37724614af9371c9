"""Run a script of the repository in a forked child: what a user's command does, without the three
seconds of imports. A fork server of multiprocessing imports this module once; a `run` is a fork.
"""
import functools
import multiprocessing
import os
import runpy
import sys
import threading
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from pivot import checkpoints  # noqa: E402, I001  (first: it sets what transformers reads)
import extract, repair_eval, train_dpo, train_sft  # noqa: E401, E402, F401
from transformers import (AutoModelForCausalLM, GenerationConfig, LlavaConfig,  # noqa: E402, F401
                          LlavaProcessor, Qwen2ForCausalLM, SiglipImageProcessorPil,
                          SiglipVisionModel)
from tqdm import tqdm  # noqa: E402

tqdm.set_lock(threading.RLock())     # its own is a semaphore, which a killed child would leak


def child(command, folder, out, killed):
    """In the child: the script as __main__, in `folder`, its output in two files in `out`.

    killed: die in Run.finish, as a lost machine would: what is left is a run half done.
    """
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if killed:
        checkpoints.Run.finish = lambda *_: os._exit(9)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / command[0]), *command[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:                  # as the interpreter does it
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        os._exit(1 if isinstance(e.code, str) else e.code or 0)


@functools.cache
def server():
    """The context whose processes are forks of one that has imported all this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["in_fork", "pytest"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), before])
    multiprocessing.forkserver.ensure_running()    # it ignores sys.path, but not the environment
    os.environ["PYTHONPATH"] = before
    return context


def run(context, command, folder, out=None, killed=False):
    """→ CompletedProcess. folder: where the command is typed; out: where its output is kept."""
    out = out or folder
    process = context.Process(target=child, args=(command, folder, out, killed))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    out = [(out / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return CompletedProcess(command, process.exitcode, *out)
