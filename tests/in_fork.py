"""Run a script of the repository in forked children: what a user's command does, without the three
seconds of imports. A fork server of multiprocessing imports this module once; a `run` is a fork, or
several that find each other as torchrun's workers do. (How torchrun itself starts and ends them is
for test_ends.py, test_survive.py and test_headline.py, which run it.)
"""
import functools
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
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


def child(command, folder, out, killed, environment, root):
    """In the child: the script as __main__, in `folder`, its output in two files in `out`.

    root: the checkout whose script it is. killed: die in Run.finish, as a lost machine would: what
    is left is a run half done.
    """
    os.chdir(folder)
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if root != ROOT:                         # what was imported from here is forgotten
        ours = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = [str(root), *(path for path in sys.path if path != str(ROOT))]
    if killed:
        checkpoints.Run.finish = lambda *_: os._exit(9)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(root / command[0]), *command[1:]]
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


def run(context, command, folder, out=None, killed=False, processes=1, root=ROOT):
    """→ CompletedProcess. folder: where the command is typed; out: where its output is kept; root:
    the checkout that it belongs to."""
    outs = [Path(out or folder)] + [Path(out or folder, str(r)) for r in range(1, processes)]
    forks = []
    for rank, (place, environment) in enumerate(zip(outs, torchrun_says(processes))):
        place.mkdir(exist_ok=True)
        forks.append(context.Process(target=child, args=(command, folder, place, killed,
                                                         environment, root)))
        forks[rank].start()
    end, failed = time.monotonic() + 300, False
    while any(fork.exitcode is None for fork in forks) and time.monotonic() < end:
        if any(fork.exitcode for fork in forks) and not failed:
            failed, end = True, time.monotonic() + 30         # torchrun ends the others, too
            for fork in forks:
                fork.terminate()
        time.sleep(0.01)
    for fork in forks:
        fork.kill()
        fork.join()
    said = ["".join((place / name).read_text(errors="replace") for place in outs)
            for name in ("stdout", "stderr")]
    code = next((fork.exitcode for fork in forks if fork.exitcode), 0)
    return CompletedProcess(command, code, *said)


def torchrun_says(processes):
    """What torchrun tells each of its workers, in the environment: one dict a rank; [{}] alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
             "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(processes)]
