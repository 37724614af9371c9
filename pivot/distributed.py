"""Processes and sharding: all that knows how many processes there are, and how one ends.

A stage reads the same for one process and for sixty-four: one process is a group of one, with the
same reductions and the same checkpoints.
"""
import ctypes
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import partial

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")     # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")      # a loader's workers only read ids
# Every micro-batch has another length; grown segments leave no holes that no other length fits.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pivot.records import BadRecord

transformers_logging.disable_progress_bar()

# --------------------------------------------------------------------------------------- processes

def start():
    """Join the processes torchrun started, or be a group of one. → torch.device."""
    cuda = torch.cuda.is_available()
    # Reading a large file takes one process long, and the others wait; a death is noticed at once.
    limit = timedelta(hours=3)
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores()))        # of the tokenizers
    store, rank, size = dist.HashStore(), 0, 1
    if os.environ.get("RANK"):
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                   if not os.environ.get(name)]
        if missing:
            raise SystemExit(f"error: RANK is in the environment and {missing[0]} is not: start "
                             f"with torchrun, which sets both, or unset RANK")
        if told("RANK", 0) >= told("WORLD_SIZE", 1) or not told("MASTER_PORT", 0) < 2 ** 16:
            raise SystemExit("error: RANK must be below WORLD_SIZE, MASTER_PORT below 65536; start "
                             "with torchrun, which sets them, or unset RANK")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()     # or, torchrun killed, we would train on beside our own successor
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        # torchrun's store survives a restart of its workers with the dead ones' addresses in it. A
        # prefix for each attempt keeps a quick worker from connecting to them. (Nodes count
        # attempts differently: docs/real-use.md says what to do there.)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit, store=store,
                            rank=rank, world_size=size)
    torch.manual_seed(0)
    # Of cuDNN's attention, an H100's default since torch 2.11, it is reported that the gradient of
    # q is NaN under a mask where T % 128 = 64 and scores lie far below 0, as in some of Qwen2.5's
    # heads (pytorch#196678; not seen here, where there is no GPU).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if cuda:
        torch.backends.cudnn.allow_tf32 = False  # "fp32" means it, in the patch convolution, too
        torch.cuda.set_device(told("LOCAL_RANK", 0))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    unused = os.path.exists("/dev/nvidiactl") and not (cuda or hidden)
    print0(f"  {size} {'process' if size == 1 else 'processes'} on "
           f"{torch.cuda.get_device_name() if cuda else 'the CPU'}, torch {torch.__version__}"
           + ("; THIS MACHINE HAS AN NVIDIA GPU that this torch cannot use: driver too old, or a "
              "build for the CPU?" if unused else ""))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def die_with_parent():
    """Let this process end when the one that started it does, however that ends. Linux alone can
    (PR_SET_PDEATHSIG = 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def stop():
    """Leave the group: gloo warns, and NCCL may hang, when a process exits without."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def told(variable, default):
    """A number that torchrun tells a process; raises SystemExit, one line, for anything else."""
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise SystemExit(f"error: {variable}={value} in the environment is no number; it is for "
                         f"torchrun to set: unset it")
    return int(value)


def local_world():
    """How many processes share this machine's cores."""
    return told("LOCAL_WORLD_SIZE", 1)


def cores():
    """How many cores of this machine are this process's share."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ours // local_world())


def is_main():
    return (dist.get_rank() if dist.is_initialized() else told("RANK", 0)) == 0


def print0(*words):
    """Print once, not once a process; above the progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


def progress(start, end, desc, what=None):
    """A bar with rate and time left, on the main process alone, over range(start, end), or over
    `what`, which gives as many items."""
    return tqdm(range(start, end) if what is None else what, desc=desc, initial=start, total=end,
                unit="step", disable=not is_main(), dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def barrier():
    """Wait until every process is here."""
    dist.barrier()


def reduce_sum(values):
    """Sum a dict of numbers or 0-dim tensors over all processes: {name: float}, in fp64."""
    tensors = {k: v.double() for k, v in values.items() if torch.is_tensor(v)}
    if tensors:                            # read all at once: each reading waits for the device
        values = {**values, **dict(zip(tensors, torch.stack([*tensors.values()]).tolist()))}
    total = torch.tensor([*values.values()], dtype=torch.float64)
    dist.all_reduce(total)      # on the CPU, through gloo: exact, and in the same order every time
    return dict(zip(values, total.tolist()))


def sum_tensor(tensor):
    """Sum a tensor over all processes, in place; → the tensor."""
    dist.all_reduce(tensor)
    return tensor


def gather(value):
    """A picklable value of every process: [value, …], the same list on each."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def restarted():
    """Did torchrun start this process again, after a failure?"""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def from_main(make):
    """Compute a picklable value on the main process and give it to all."""
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_sharded(processes, dtype):
    """Under FSDP2? A lone process in fp32 has nothing to gather, cast or exchange."""
    return processes > 1 or dtype != "fp32"


def shard(model, device, dtype="fp32", activation_checkpointing=False, replicas=1,
          attention="sdpa", compiled=False):
    """Under FSDP2 every transformer block is a unit of its own, the rest one root group.

    Tied embeddings both stay in the root group, where they remain one tensor. Gradients are summed
    over processes, not averaged: losses are already divided by *global* counts. A lone process in
    fp32 trains the plain module, a few percent faster.
    """
    size = dist.get_world_size()
    if activation_checkpointing:
        for block in model.blocks:
            # Inside FSDP's hooks, and non-reentrant: it must also work on frozen inputs.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if attention == "flex":            # the LLM's alone: the encoder's patches all see each other
        model.llm.set_attn_implementation("flex_attention")
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)  # a block at a time, FSDP gathers between; for all lengths
    embeddings, lm_head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    # With tied embeddings lm_head already gives a dense gradient; the lookup's stays sparse, to
    # spare a second dense one. (On a CPU: CUDA would add the rows in bf16 and in any order.)
    embeddings.sparse = device.type == "cpu" and embeddings.weight is lm_head.weight
    if not is_sharded(size, dtype):
        return model.to(device).train()
    shape, names = (size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, size // replicas), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if dtype == "bf16" else None,
                                  reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")     # gathers the root group, as forward() does
    model.all_processes = lambda done: reduce_sum({"open": not done})["open"] == 0
    if size > 1:                                              # alone (bf16), FSDP divides by 1
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)   # gloo knows no premultiplied sum
    return model.train()


def reshard(model):
    """Back to sharded fp32 masters: after a bare forward the root group's tensors are whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---------------------------------------------------------------------------------- how it ends

POLL = 5          # seconds after which a waiting trainer looks whether anything else happened
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
stop_asked = None            # when a signal asked this process to stop (time.monotonic)


def heed_signals():
    """From here on a signal of a person or a scheduler lets the step end and be saved; a second one
    ends at once. Before, there is nothing to save but the reference log-probs of DPO, and any of
    them ends the process. One that is ignored (nohup's SIGHUP) stays so."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ask_to_stop)


def ask_to_stop(number, frame):
    global stop_asked
    if stop_asked is None:
        stop_asked = time.monotonic()
    elif time.monotonic() - stop_asked > 1:      # not torchrun's copy of what we got ourselves
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def asked_to_stop():
    return stop_asked is not None


def end_at_signals():
    """All is saved: what is asked to stop now may end at once."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is ask_to_stop:
            signal.signal(number, signal.SIG_DFL)


def workers(count):
    """What a DataLoader is told of its worker processes: they are forks, which share what is in
    memory, and end with this process and with nothing else. A signal sent to the whole process
    group is for the trainer, which saves first."""
    if not count:
        return {"num_workers": 0}
    return {"num_workers": count, "multiprocessing_context": "fork",
            "worker_init_fn": partial(begin_worker, os.getpid())}


def begin_worker(trainer, worker):
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != trainer:                              # it died before it could be asked
        os._exit(1)


def launch(main):
    """Run a stage's main(). Whatever ends it, this process ends: refusals with one line, printed
    once, all else with its cause last on the screen, and with a non-zero exit code.

    os._exit, because the interpreter's own way out waits for a DataLoader's workers and leads
    through collectives that the other processes may never enter.
    """
    try:
        main()
        stop()
        return
    except BaseException as e:
        code = 1                    # also where it cannot be said
        try:
            code = say_why(e)
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:             # nobody reads the pipe any more
            pass
        except BaseException:       # a second failure, in saying why: its traceback names both
            traceback.print_exc()
        finally:
            os._exit(code)


def say_why(error):
    """Print why this process ends; → its exit code."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return error.code or 0
    line = reason(error)
    if isinstance(error, (SystemExit, BadRecord)) and not speaks():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)         # torchrun ends us meanwhile
        time.sleep(10)       # if all refuse, the main one says why meanwhile; if we alone, we do
    sys.stdout.flush()
    if line is None:
        traceback.print_exception(error)
    else:
        tqdm.write(" ".join(line.splitlines()), file=sys.stderr)             # not behind a bar
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def speaks():
    """Whether this process says a refusal at once: the main one, and any that cannot know."""
    try:
        return is_main()
    except SystemExit:              # RANK is no number, which is what it has to say
        return True


def reason(error):
    """One line for the known ends, which are nobody's bug; None: print a traceback."""
    said = str(error)
    whole = "what was saved before is whole"
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, BadRecord):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):     # where a run does not heed it: nothing to save
        return "interrupted"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (f"error: out of GPU memory: {said.splitlines()[0][:90]}; lower --micro-batch or "
                f"add --activation-checkpointing, the sums stay the same; where answers are drawn "
                f"also --max-new-tokens, where a model is judged --eval-batch (`python -m "
                f"tools.plan` says what most stages take); {whole}")
    if isinstance(error, RuntimeError) and "DataLoader worker" in said and "Caught" not in said:
        return (f"error: a process that reads pictures was killed ({said.splitlines()[0]}); out of "
                f"memory? Fewer --workers need less. {whole.capitalize()}, the same command "
                f"(without --overwrite) goes on from there")
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return (f"error: cannot meet the other processes of this run at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                f"({said.splitlines()[0][:200]}); where the port is another run's, torchrun "
                f"--standalone, or another --rdzv-endpoint, finds a free one")
    if isinstance(error, RuntimeError) and ("gloo" in said
                                            or isinstance(error, dist.DistBackendError)):
        # gloo says it in its first line, NCCL ("Last error: …") in its last ones.
        why = said.splitlines()[0][:90] if "gloo" in said else " ".join(said.split())
        return (f"error: lost another process of this run, or the way to it ({why}); {whole}, the "
                f"same command (without --overwrite) goes on from there")
    if isinstance(error, (OSError, SafetensorError)):           # a full disk, a vanished folder
        return f"error: {error}; {whole}"
    return None
