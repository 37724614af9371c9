"""How it is run: processes, sharding, checkpoints, logging. What is computed: model.py.

Everything that knows about processes lives here, so that a stage reads the same for one and for
sixty-four of them. One process is a group of one: the same `fully_shard`, the same checkpoints.
"""
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")     # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")     # workers fork after tokenising
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from transformers.utils import logging as transformers_logging

import model as model_file

transformers_logging.disable_progress_bar()

MODULES = ("encoder", "projector", "llm")
STOPPED = 75          # exit code of a run that was asked to stop and saved first (EX_TEMPFAIL)
# Arguments that may differ on resume: they do not change the numbers.
FREE = {"workers", "keep", "save_every", "log_every", "micro_batch", "overwrite", "replicas",
        "activation_checkpointing", "run", "run_typed", "bench", "limit", "eval_batch",
        "max_new_tokens", "wrong_image", "mllm", "compare"}


# --------------------------------------------------------------------------------------- processes

def start(timeout_minutes=10):
    """Join the processes torchrun started, or be a group of one. → torch.device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        die_with_parent()
        limit = timedelta(minutes=timeout_minutes)   # a lost peer ends in an error, not in a hang
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1,
                                store=dist.HashStore())
    torch.manual_seed(0)
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def die_with_parent():
    """If torchrun itself is killed, its workers would train on, unseen, in the same folder as the
    run that takes their place. Linux can end them with it (PR_SET_PDEATHSIG = 1)."""
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


def is_main():
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


def print0(*words):
    """Print once, not once a process; above the progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


def progress(start, end, desc):
    """range(start, end) as a bar with rate and time left, on the main process alone."""
    return tqdm(range(start, end), desc=desc, initial=start, total=end, unit="step",
                disable=not is_main(), dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)


def reduce_sum(values):
    """Sum a dict of numbers or 0-dim tensors over all processes: {name: float}, in fp64."""
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(total)      # on the CPU, through gloo: exact, and in the same order every time
    return dict(zip(values, total.tolist()))


def sum_tensor(tensor):
    """Sum a CPU tensor over all processes."""
    dist.all_reduce(tensor)
    return tensor


def from_main(make):
    """Compute a small picklable value on the main process and give it to all."""
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard(model, device, dtype="fp32", activation_checkpointing=False, replicas=1):
    """FSDP2: every transformer block is a unit of its own, the rest one root group.

    Tied embeddings both stay in the root group, where they remain one tensor. Gradients are summed
    over processes, not averaged: losses are already divided by *global* counts.
    """
    size = dist.get_world_size()
    if size % replicas:
        raise SystemExit(f"error: {size} processes cannot hold --replicas {replicas}")
    mesh = init_device_mesh(device.type, (replicas, size // replicas) if replicas > 1 else (size,),
                            mesh_dim_names=("replicate", "shard")[-1 if replicas == 1 else -2:])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if dtype == "bf16" else None,
                                  reduce_dtype=torch.float32)
    if activation_checkpointing:       # non-reentrant: it must also work on frozen inputs
        for part in (model.encoder.vision, model.llm):
            part.gradient_checkpointing_enable({"use_reentrant": False})
    for block in [*model.encoder.blocks, *model.llm.base_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
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


# ------------------------------------------------------------------------------------ optimisation

def adamw(model, rates):
    """AdamW (0.9, 0.999), no weight decay, one group a module; a rate of 0 freezes the module.

    rates: {"encoder": lr, "projector": lr, "llm": lr}. Prints the table of what is trained at which
    rate: a rate silently ignored is the best hidden bug of public DPO scripts.
    """
    groups = []
    for name in MODULES:
        module, lr = getattr(model, name), rates[name]
        frozen = model.encoder.family.frozen if name == "encoder" else ()
        for key, p in module.named_parameters():
            p.requires_grad_(lr > 0 and not key.removeprefix("vision.").startswith(frozen or "\0"))
            p.grad = None
        trained = [p for p in module.parameters() if p.requires_grad]
        count = sum(p.numel() for p in module.parameters())
        never = sorted({k for k, _ in module.named_parameters()
                        if k.removeprefix("vision.").startswith(frozen or "\0")})
        print0(f"  {name:<10} {count:>13,} parameters, {sum(p.numel() for p in trained):>13,} "
               f"trained" + (f", lr {lr:g}" if trained else "")
               + (f"; frozen: {', '.join(never)}" if never else ""))
        if trained:
            groups.append({"params": trained, "lr": lr, "peak": lr, "name": name})
    if not groups:
        raise SystemExit("error: every learning rate is 0: nothing would be trained")
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def learning_rates(args):
    """--lr is the LLM's; encoder and projector have their own or share it."""
    return {"encoder": args.lr if args.encoder_lr is None else args.encoder_lr,
            "projector": args.lr if args.projector_lr is None else args.projector_lr,
            "llm": args.lr}


def num_steps(epochs, max_steps, plan):
    """Steps of a run, bounded by --max-steps; prints what a step is made of."""
    steps = epochs * plan.steps_per_epoch
    steps = steps if max_steps is None else min(steps, max_steps)
    print0(f"  {steps} steps of {plan.global_batch} samples: {plan.world} processes × "
           f"{plan.micro_steps} micro-steps of {plan.micro_batch}; {plan.steps_per_epoch} steps "
           f"an epoch, image = {plan.samples.num_image_tokens} tokens")
    return steps


def set_lr(optimizer, step, steps, warmup):
    """Linear warm-up over a share of the steps, then cosine to 0. → {module: lr}."""
    rise = max(1, math.ceil(warmup * steps))
    scale = (step + 1) / rise if step < rise else \
        0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak"]
    return {g["name"]: g["lr"] for g in optimizer.param_groups}


def clip_grad_norm(model, max_norm=1.0):
    """Clip the global gradient norm; → {module: norm before clipping}, over all shards."""
    norms = {}
    for name in MODULES:
        grads = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            norms[name] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = math.sqrt(sum(n * n for n in norms.values()))
    if total > max_norm:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(max_norm / total)
    return norms


def require_finite(step, loss, norms, samples, plan):
    """Stop before the step that would ruin the weights, naming the batch's records."""
    if not all(map(math.isfinite, [loss, *norms.values()])):
        where = [samples.where[i] for i in plan.batch(step)]
        raise SystemExit(f"error: step {step}: loss {loss}, gradient norms {norms}; nothing was "
                         f"updated. The batch: {', '.join(where[:8])}"
                         + (f" and {len(where) - 8} more" if len(where) > 8 else ""))


# ---------------------------------------------------------------------------------- run directories

def sha256(*files):
    """Of the files' bytes, one after the other (16 hex digits)."""
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()[:16]


def file_digest(folder):
    """sha256 over the safetensors of a model folder: the identity of a parent.
    Read by the main process alone: 32 GB take half a minute."""
    return from_main(lambda: sha256(*sorted(Path(folder).glob("*.safetensors"))))


def write_whole(path, write):
    """Let the main process write a file aside, then rename it; the others wait."""
    if is_main():
        aside = Path(f"{path}.tmp")
        write(aside)
        os.replace(aside, path)
    dist.barrier()


def tensors_digest(module):
    """sha256 over a module's tensors: equal digests mean an equal start (16 hex digits)."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def write_json(path, value):
    """Written aside and renamed: a reader never sees half a file."""
    aside = Path(f"{path}.tmp")
    aside.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(aside, path)


def sync_folder(folder):
    """fsync every file of a folder and the folder itself, so that a rename means "on disk"."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Run:
    """One stage's folder: config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/.

    Opening it decides what happens: a finished stage says so and exits 0, an interrupted one goes
    on from its newest whole checkpoint, --overwrite starts anew.
    """

    def __init__(self, folder, args):
        self.folder, self.args, self.stopping = Path(folder), args, False
        refusal = from_main(self.claim)
        if refusal:
            raise SystemExit(refusal)
        if (self.folder / "final" / "config.json").exists():
            print0(f"{self.folder}/final is already there: nothing to do "
                   f"(--overwrite starts anew)")
            if is_main():                # the last run may have been killed on its last line
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            stop()
            raise SystemExit(0)
        steps = [int(p.name[5:]) for p in (self.folder / "checkpoints").glob("step-*")
                 if p.name[5:].isdigit() and (p / "position.json").exists()]
        self.start = from_main(lambda: max(steps, default=0))     # steps already done

    def claim(self, patience=5):
        """Make the folder and lock it: two runs in one folder would ruin each other. → a refusal.
        POSIX locks end with their process; a restarted run waits for its predecessor to be gone."""
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.locked = open(self.folder / "lock", "w")
        except OSError as e:
            return f"error: cannot write {self.folder}: {e.strerror}"
        while True:
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(1)
            if (patience := patience - 1) < 0:
                return (f"error: another process is training in {self.folder}; wait for it, or "
                        f"name another --run-dir")
        for old in self.folder.iterdir() if self.args.overwrite else ():
            if old.name != "lock":
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def ask_to_stop(self, number, frame):
        """Finish the step, save, exit; a second signal ends at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def describe(self, facts):
        """Write config.json, or compare it: a run of other arguments, data or parent is refused."""
        import transformers
        config = {"stage": self.args.stage, "arguments": vars(self.args), "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0]}}
        self.config = config = json.loads(json.dumps({**config, **facts}, default=str))
        path = self.folder / "config.json"
        if self.start and path.exists():
            old = json.loads(path.read_text())
            pairs = [(f"--{k.replace('_', '-')}", old["arguments"].get(k), v)
                     for k, v in config["arguments"].items() if k not in FREE]
            pairs += [(k, old.get(k), config[k]) for k in facts]
            for name, before, now in pairs:
                if before != now:
                    raise SystemExit(f"error: {self.folder} was begun with {name} {before}, now "
                                     f"{now}; go on as before, name another --run-dir, or "
                                     f"--overwrite")
        dist.barrier()
        if is_main():
            write_json(path, config)
            if not self.start:      # killed before its first checkpoint: its lines would double
                for name in ("metrics.jsonl", "timing.jsonl"):
                    (self.folder / name).unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        for key, value in facts.items():
            print0(f"  {key}: {value}")

    def resume(self, model, optimizer=None):
        """Load the newest whole checkpoint, resharding as needed; truncate the metrics to it."""
        reshard(model)
        folder = self.folder / "checkpoints" / f"step-{self.start}"
        if optimizer is None:
            state = {"model": get_model_state_dict(model)}
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(model, state["model"])
        else:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
        position = json.loads((folder / "position.json").read_text())
        if is_main():
            for name, length in position["lengths"].items():
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, length)
        print0(f"  continuing after step {self.start} of {folder}")

    def log(self, metrics, timing=None):
        """One line in metrics.jsonl (deterministic fields only), one in timing.jsonl; every
        --log-every steps one for people."""
        if "loss" in metrics and metrics["step"] % self.args.log_every == 0:
            words = [f"{k} {metrics[k]:.4g}" for k in ("loss", "margin", "accuracy")
                     if k in metrics] + [f"|g| {k} {v:.3g}" for k, v in
                                         metrics["grad_norm"].items()]
            print0(f"  step {metrics['step']}: {', '.join(words)}")
        if is_main():
            for name, line in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
                if line is None:
                    continue
                with open(self.folder / name, "a") as f:
                    f.write(json.dumps(line) + "\n")

    def save_if_due(self, done, steps, model, optimizer):
        """After a step: save every --save-every steps, and when any process was asked to stop."""
        asked = reduce_sum({"stop": self.stopping})["stop"] > 0
        if done == steps:                     # final/ comes next: faster than stopping for it
            return
        if asked or done % self.args.save_every == 0:
            self.save(done, model, optimizer)
        if asked:
            print0(f"asked to stop: saved after step {done}; the same command goes on from there")
            stop()
            raise SystemExit(STOPPED)

    def save(self, done, model, optimizer):
        """Shards, position and metric lengths: written aside, fsynced, renamed; the last K stay."""
        folder = self.folder / "checkpoints" / f"step-{done}"
        aside = folder.with_name(f"writing-{done}")
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        reshard(model)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        try:
            dcp.save(state, checkpoint_id=aside)
        except dcp.api.CheckpointException as e:       # raised on every process alike
            reason = str(next(iter(e.failures.values()))[0]).splitlines()[0]
            raise SystemExit(f"error: step {done} could not be saved to {aside} ({reason}); is the "
                             f"disk full? What was saved before is whole, the same command goes on "
                             f"from there")
        if is_main():
            lengths = {n: (self.folder / n).stat().st_size for n in
                       ("metrics.jsonl", "timing.jsonl") if (self.folder / n).exists()}
            write_json(aside / "position.json", {"step": done, "lengths": lengths})
            sync_folder(aside)
            os.replace(aside, folder)
            kept = sorted((p for p in folder.parent.glob("step-*")), key=lambda p: int(p.name[5:]))
            for old in kept[:-self.args.keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def finish(self, model, tokenizer):
        """Write final/, the folder transformers opens; drop the checkpoints, which it replaces."""
        reshard(model)
        aside = self.folder / "final.tmp"
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        dist.barrier()
        model_file.save_mllm(model, tokenizer, aside, is_main())
        if is_main():
            sync_folder(aside)
            os.replace(aside, self.folder / "final")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        print0(f"wrote {self.folder}/final")
        dist.barrier()


class Clock:
    """Fetches micro-batches and knows where a step's time goes: waiting for data, or computing."""

    def __init__(self, device):
        self.device, self.batches = device, None

    def start(self, loader):
        self.batches, self.waited, self.began = iter(loader), 0.0, time.perf_counter()

    def wait(self):
        """The next micro-batch on the device; an unreadable image ends the run with its line."""
        t = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - t
        if "error" in batch:
            tqdm.write(batch["error"], file=sys.stderr)
            os._exit(1)     # peers may be inside a collective: leaving must not wait for them
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def lap(self, step, tokens):
        """The line of timing.jsonl for the step just finished."""
        now = time.perf_counter()
        seconds, waited = now - self.began, self.waited
        self.began, self.waited = now, 0.0
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"step": step, "data_wait": round(waited, 4), "seconds": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds, 1), "peak_bytes": peak}


def launch(main):
    """Run a stage's main(): refusals are one line, printed once, with a non-zero exit code."""
    try:
        main()
        stop()
    except SystemExit as e:
        if isinstance(e.code, str):
            if not is_main():
                time.sleep(5)    # a refusal all share is printed once; one of our own follows
            print(e.code, file=sys.stderr, flush=True)
            os._exit(1)      # not through a collective that the other processes may never enter
        raise
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistBackendError):
            raise
        print(f"error: lost another process of this run ({str(e).splitlines()[0][:90]}); what was "
              f"saved before is whole, the same command goes on from there", file=sys.stderr)
        os._exit(1)
    except (OSError, SafetensorError) as e:     # a full disk, a vanished folder
        print(f"error: {e}; what was saved before is whole", file=sys.stderr, flush=True)
        os._exit(1)
