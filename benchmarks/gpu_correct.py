"""gpu.py's part `correct`: is what the GPU computes what the CPU computes?"""
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from pivot import distributed
import model as m

ROOT = Path(__file__).resolve().parent.parent
LN2 = math.log(2)

# ------------------------------------------------------------------------------------------- kernels


def definition(q, k, v, sees):
    """softmax(q kᵀ / √d) v over what each query sees, in fp64. q (B, H, T, d), k, v (B, K, T, d),
    sees bool (B, 1, T, T) → (B, T, H, d)."""
    q, groups = q.double(), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


class Attends(nn.Module):
    """What transformers' kernels ask of the layer that calls them."""
    is_causal, layer_idx = True, 0

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def kernel(name, q, k, v, branch):
    """The LLM's attention as a step runs it: transformers' kernel, model.py's mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    name = {"sdpa": "sdpa", "flex": "flex_attention"}[name]
    mask = m.attention_mask(branch, name, q.dtype)
    attends = Attends(q.shape[1] // k.shape[1])
    return ALL_ATTENTION_FUNCTIONS[name](attends, q, k, v, mask,
                                         scaling=q.shape[-1] ** -0.5, dropout=0.0)[0]


def branches(length, device):
    """Three rows (3, T) in the pair layout: full; ragged; mostly padding."""
    rows = []
    for prompt, chosen, padding in ((0.6, 0.2, 0.0), (0.3, 0.5, 0.13), (0.1, 0.1, 0.7)):
        counts = [int(length * prompt), int(length * chosen)]
        counts.append(length - sum(counts) - int(length * padding))
        row = [m.SHARED] * counts[0] + [m.CHOSEN] * counts[1] + [m.REJECTED] * counts[2]
        rows.append(row + [m.PADDING] * (length - len(row)))
    return torch.tensor(rows, device=device)


def kernels(say, quick):
    """Forward and gradients of each kernel beside the definition; scores near 0 and, as in some of
    Qwen2.5's heads, far below it. Off by: the largest difference over the largest value."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)                      # as distributed.start has it
    lengths = (64, 192) if quick else (64, 128, 192, 320, 576, 1000, 1024, 1088, 2048)
    for length in lengths:
        branch = branches(length, device)
        for low in (False, True):
            for name in ("sdpa", "flex") if cuda else ("sdpa",):
                for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
                    say({"what": f"{name}, {str(dtype)[6:]}, T = {length}"
                         + (", scores far below 0" if low else ""),
                         **off_by(name, dtype, branch, low, bound)})
    if not cuda:
        say({"what": "flex", "left_out": "FlexAttention has no backward pass on a CPU"})


def off_by(name, dtype, branch, low, bound):
    """{"forward", "gradient", "ok"} of one kernel. NaN is off by inf."""
    g = torch.Generator(branch.device).manual_seed(0)
    shapes = [(3, heads, branch.shape[1], 64) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=g, device=branch.device).to(dtype) for s in shapes)
    if low:                                        # q and k point apart: scores near -200
        q[..., 0], k[..., 0] = 40, -40
    grad = torch.randn(3, branch.shape[1], 4, 64, generator=g, device=branch.device).to(dtype)
    grad[branch == m.PADDING] = 0                  # a step reads nothing of padded rows
    found = []
    for compute in (lambda *x: definition(*x, m.pair_mask(branch)),
                    lambda *x: kernel(name, *x, branch)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = compute(*leaves)
        out.backward(grad.to(out.dtype))
        found.append([out.detach()] + [x.grad for x in leaves])
    apart = []
    for want, got in zip(*found):
        largest = want.double().abs().max()
        difference = (got.double() - want.double()).abs().max() / largest
        apart.append(difference.item() if bool(got.isfinite().all()) else math.inf)
    return {"forward": apart[0], "gradient": max(apart[1:]), "bound": bound,
            "ok": max(apart) <= bound}


# --------------------------------------------------------------------------------- the toy's stages

class Toy:
    """The toy world in a folder of its own, and the repository's own commands on it."""

    def __init__(self, folder, quick):
        self.folder, self.steps = Path(folder), 4 if quick else 20
        # Twenty short processes at once, each of one thread; on two cores one after the other.
        self.pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2))
        self.call(["-m", "toy", self.folder / "toy", "--scale", "0.02"])

    def call(self, words, gpu=False, check=True, **environment):
        """Run one command; raises RuntimeError with its last line where it fails."""
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment,
                 **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})})
        if check and done.returncode:
            raise RuntimeError(" | ".join((done.stdout + done.stderr).splitlines()[-3:]))
        return done

    def stage(self, stage, name, *more, gpu=False, start=(), environment=None, check=True):
        """Train a stage in the run folder `name`, from the CPU's stage 1. → its losses, [a step]:
        the lines of metrics.jsonl."""
        script = "pretrain.py" if stage == "pretrain" else f"train_{stage}.py"
        words = [*start, script, "--run-dir", self.folder / name, "--data", self.folder / "toy",
                 "--global-batch", 16, "--micro-batch", 8, "--workers", 0, "--epochs", 3,
                 "--max-steps", self.steps, "--rehearsal", "off"]
        if stage == "pretrain":
            words += ["--encoder", "toy-vit", "--llm", "toy-lm", "--projector-epochs", 20]
        else:
            words += ["--parent", self.folder / "cpu"]
            words += ["--heldout", "none"] if stage == "dpo" else []
        self.call([*words, *more], gpu, check, **(environment or {}))
        return [json.loads(line) for line in
                (self.folder / name / stage / "metrics.jsonl").read_text().splitlines()]

    def all(self, jobs):
        """{name: (stage, flags…, {options})} → {name: metrics, or the error of a command}."""
        def job(name):
            stage, *flags = jobs[name]
            options = flags.pop() if flags and isinstance(flags[-1], dict) else {}
            try:
                return self.stage(stage, name.replace(" ", "-"), *flags, **options)
            except (RuntimeError, OSError) as error:
                return str(error)
        return dict(zip(jobs, self.pool.map(job, jobs)))


def compared(say, what, found, one, other, bound):
    """Say how far the losses of two runs are apart, step by step."""
    failed = [f"{name}: {found[name]}" for name in (one, other) if isinstance(found[name], str)]
    if failed:
        say({"what": what, "error": "; ".join(failed), "ok": False})
        return
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found[one], found[other])]
    same = len(found[one]) == len(found[other]) > 1
    apart = max(abs(a - b) for a, b in pairs)
    say({"what": what, "steps": len(pairs), "losses_apart": apart, "bound": bound,
         "ok": same and apart <= bound})


def toy(say, quick):
    """The toy's stage 1, SFT and DPO: each way to compute them beside the plainest."""
    gpu, fp32, bf16 = {"gpu": True}, ("--dtype", "fp32"), ("--dtype", "bf16")
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        world = Toy(folder, quick)
        jobs = {"cpu": ("pretrain", *fp32)}
        if cuda:
            jobs |= {"gpu": ("pretrain", *fp32, gpu), "gpu bf16": ("pretrain", *bf16, gpu)}
        found = world.all(jobs)
        if isinstance(found["cpu"], str):
            raise RuntimeError(found["cpu"])
        if cuda:
            compared(say, "stage 1, GPU fp32 beside CPU", found, "gpu", "cpu", 1e-4)
            compared(say, "stage 1, bf16 beside fp32", found, "gpu bf16", "gpu", 5e-2)
        jobs = {}
        for stage in ("dpo",) if quick else ("sft", "dpo"):
            jobs |= {f"{stage} fp32": (stage, *fp32, gpu), f"{stage} bf16": (stage, *bf16, gpu),
                     f"{stage} ckpt": (stage, *fp32, "--activation-checkpointing", gpu)}
            if cuda:
                jobs |= {f"{stage} cpu": (stage, *fp32)}
        if cuda:
            jobs |= {"dpo flex": ("dpo", *bf16, "--attention", "flex", gpu),
                     "dpo compile": ("dpo", *bf16, "--compile", gpu),
                     "dpo flex fp32": ("dpo", *fp32, "--attention", "flex", gpu)}
        found = world.all(jobs)
        found["dpo resumed"] = resumed(world, *fp32)
    for stage in sorted({name.split()[0] for name in jobs}):
        if cuda:
            compared(say, f"{stage}, GPU fp32 beside CPU", found, f"{stage} fp32", f"{stage} cpu",
                     1e-4)
        compared(say, f"{stage}, bf16 beside fp32", found, f"{stage} bf16", f"{stage} fp32", 5e-2)
        compared(say, f"{stage}, checkpointing beside none", found, f"{stage} ckpt",
                 f"{stage} fp32", 1e-4)
    compared(say, "dpo, killed and resumed beside never killed", found, "dpo resumed", "dpo fp32",
             1e-4)
    if cuda:
        compared(say, "dpo, flex beside sdpa, fp32", found, "dpo flex fp32", "dpo fp32", 1e-4)
    for name in ("dpo fp32", "dpo bf16", "dpo flex", "dpo compile", "dpo flex fp32"):
        if name in found:
            say(step0(name, found[name]))
        else:
            say({"what": f"step 0, {name}", "left_out": "needs CUDA"})


def resumed(world, *flags):
    """DPO killed (-9) in the middle of a step, then started again. → metrics, or the error."""
    mark, middle = world.folder / "killed", world.steps // 2
    environment = {"KILL": f"before the update:{middle + 1}:0", "KILL_MARK": str(mark)}
    flags = [*flags, "--save-every", max(1, middle // 2)]
    try:
        world.stage("dpo", "resumed", *flags, gpu=True, start=["tests/killed.py"],
                    environment=environment, check=False)
        if not mark.exists():
            return "it was not killed"
        return world.stage("dpo", "resumed", *flags, gpu=True)
    except (RuntimeError, OSError) as error:
        return str(error)


def step0(name, metrics):
    """Loss ln 2 and margin 0 before the first update."""
    if isinstance(metrics, str):
        return {"what": f"step 0, {name}", "error": metrics, "ok": False}
    bf16 = "fp32" not in name
    off = max(abs(metrics[0]["loss"] - LN2), abs(metrics[0]["margin"]))
    return {"what": f"step 0, {name}", "loss": metrics[0]["loss"], "margin": metrics[0]["margin"],
            "step0_bf16": off if bf16 else None, "ok": off <= (1e-3 if bf16 else 1e-5)}


# ------------------------------------------------------------------------- two processes on one card

SHARED = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist
backend, sys.argv = sys.argv[1], sys.argv[2:]
if torch.cuda.is_available():
    first, begin = torch.cuda.set_device, dist.init_process_group
    torch.cuda.set_device = lambda n: first(0)                   # both on the one card
    dist.init_process_group = lambda name, **more: begin(
        f"cpu:gloo,cuda:{backend}", **more)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two_processes(say, quick):
    """DPO on two processes that share the card beside one process: NCCL, else gloo."""
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        world = Toy(folder, quick)
        world.stage("pretrain", "cpu", "--dtype", "fp32")
        alone = world.stage("dpo", "alone", "--dtype", "fp32", gpu=True)
        script = Path(folder, "shared.py")
        script.write_text(SHARED)
        for backend in ("nccl", "gloo") if cuda else ("gloo",):
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
                     backend]
            try:
                both = world.stage("dpo", f"two-{backend}", "--dtype", "fp32", gpu=True,
                                   start=start)
            except (RuntimeError, OSError) as error:
                say({"what": f"two processes on one card, {backend}", "error": str(error)[-400:],
                     **({} if backend == "nccl" else {"ok": False})})     # NCCL may refuse that
                continue
            compared(say, f"two processes on one card, {backend}, beside one",
                     {"two": both, "one": alone}, "two", "one", 1e-4)
            return


# --------------------------------------------------------------------------------------------- waits

# Waits of the host a micro-batch and a step, read in the loops; a few more where CUDA's libraries
# have theirs. Many more mean that a loop reads a number too often.
EXPECTED = {"sft": (3, 2), "dpo": (3, 2)}


def waits(say, quick):
    """How often a step lets the host wait for the device: counted by torch on CUDA, by a stand-in
    on a CPU (gpu_waits.py)."""
    with tempfile.TemporaryDirectory() as folder:
        world = Toy(folder, quick)
        world.stage("pretrain", "cpu", "--dtype", "fp32", "--max-steps", 2,
                    "--projector-max-steps", 2)
        for stage in ("sft", "dpo", "grpo"):
            out = world.folder / f"{stage}.json"
            words = ["benchmarks/gpu_waits.py", f"train_{stage}", "--json", out, "--run-dir",
                     world.folder / stage, "--parent", world.folder / "cpu", "--data",
                     world.folder / "toy", "--global-batch", 16, "--micro-batch", 8]
            world.call(words, gpu=True)
            count = json.loads(out.read_text())
            row = {"what": f"waits in a {stage} step of 2 micro-batches", **count}
            if stage in EXPECTED:
                micro, step = EXPECTED[stage]
                row |= {"expected": 2 * micro + step, "ok": count["waits"] <= 2 * micro + step + 4}
            say(row)


PIECES = [("correct", "kernels", kernels, 90), ("correct", "toy", toy, 150),
          ("correct", "waits", waits, 90), ("correct", "two processes", two_processes, 90)]
