"""gpu.py's part `correct`: is what the GPU computes what the CPU computes?"""
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pivot import distributed
import model as m

ROOT = Path(__file__).resolve().parent.parent
LN2 = math.log(2)

# ---------------------------------------------------------------------------------------- kernels


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


# A score of -200 is itself rounded ten times as coarsely as one of a few.
BOUNDS = {(torch.float32, False): 2e-5, (torch.bfloat16, False): 3e-2,
          (torch.float32, True): 5e-4, (torch.bfloat16, True): 2e-1}


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
                for dtype in (torch.float32, torch.bfloat16):
                    what = f"{name}, {str(dtype)[6:]}, T = {length}"
                    what += ", scores far below 0" if low else ""
                    try:
                        say({"what": what, **off_by(name, dtype, branch, low)})
                    except Exception as error:          # a kernel that this card cannot have
                        say({"what": what, "error": str(error)[:200], "ok": False})
    if not cuda:
        say({"what": "flex", "left_out": "FlexAttention has no backward pass on a CPU"})


def off_by(name, dtype, branch, low):
    """{"forward", "gradient", "ok"} of one kernel. NaN is off by inf."""
    bound = BOUNDS[dtype, low]
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
        self.call(["-m", "toy", self.folder / "toy", "--scale", "0.02"])

    def call(self, words, on_gpu=False, check=True, **environment):
        """Run one command; raises RuntimeError with its last lines where it fails."""
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment,
                 **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})})
        if check and done.returncode:
            raise RuntimeError(" | ".join((done.stdout + done.stderr).splitlines()[-3:])[-400:])

    def flags(self, stage, name):
        """What every run of a stage in the run folder `name` is told."""
        flags = ["--run-dir", self.folder / name, "--data", self.folder / "toy", "--global-batch",
                 16, "--micro-batch", 8, "--rehearsal", "off"]
        if stage != "pretrain":
            flags += ["--parent", self.folder / "cpu"]
        if stage in ("dpo", "grpo"):
            flags += ["--heldout", "none"]
        return flags

    def train(self, stage, name, *more, on_gpu=True, start=(), environment=None, check=True):
        """Train a stage in the run folder `name`, from the CPU's stage 1. → its metrics.jsonl."""
        script = "pretrain.py" if stage == "pretrain" else f"train_{stage}.py"
        words = [*start, script, *self.flags(stage, name), "--workers", 0, "--epochs", 3,
                 "--max-steps", self.steps]
        if stage == "pretrain":
            words += ["--encoder", "toy-vit", "--llm", "toy-lm", "--projector-epochs", 20]
        self.call([*words, *more], on_gpu, check, **(environment or {}))
        return [json.loads(line) for line in
                (self.folder / name / stage / "metrics.jsonl").read_text().splitlines()]

    def resumed(self, *flags):
        """DPO killed (-9) in the middle of a step, then started again. → its metrics."""
        mark, middle = self.folder / "killed", self.steps // 2
        environment = {"KILL": f"before the update:{middle + 1}:0", "KILL_MARK": str(mark)}
        flags = [*flags, "--save-every", max(1, middle // 2)]
        self.train("dpo", "resumed", *flags, start=["tests/killed.py"], environment=environment,
                   check=False)
        if not mark.exists():
            raise RuntimeError("it was not killed")
        return self.train("dpo", "resumed", *flags)

    def shared(self, backend):
        """DPO on two processes that share the one card. → its metrics."""
        script = self.folder / f"shared-{backend}.py"
        script.write_text(SHARED)
        return self.train("dpo", f"two-{backend}", *FP32, start=[
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, backend])

    def waits(self, stage):
        """{"waits", "places"} of one step, by gpu_waits.py."""
        out = self.folder / f"waits-{stage}.json"
        self.call(["benchmarks/gpu_waits.py", f"train_{stage}", "--json", out,
                   *self.flags(stage, f"waits-{stage}")], on_gpu=True)
        return json.loads(out.read_text())


# Both processes take the first card; gloo, or NCCL, moves what lies on it.
SHARED = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist
backend, sys.argv = sys.argv[1], sys.argv[2:]
if torch.cuda.is_available():
    choose, begin = torch.cuda.set_device, dist.init_process_group
    torch.cuda.set_device = lambda n: choose(0)
    dist.init_process_group = lambda name, **more: begin(f"cpu:gloo,cuda:{backend}", **more)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FP32, BF16 = ("--dtype", "fp32"), ("--dtype", "bf16")


def as_they_end(jobs):
    """{name: function} → (name, what it gave, or the error as a text), one by one. All at once on
    many cores (each is a command of one thread), one after the other on two."""
    def outcome(job):
        try:
            return job()
        except (RuntimeError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    with ThreadPoolExecutor(max(1, distributed.cores() // 2)) as pool:
        running = {pool.submit(outcome, job): name for name, job in jobs.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def compared(what, one, other, bound):
    """How far the losses of two runs are apart, step by step. → the row."""
    failed = [run for run in (one, other) if isinstance(run, str)]
    if failed:
        return {"what": what, "error": "; ".join(failed), "ok": False}
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other))
    return {"what": what, "steps": len(one), "losses_apart": apart, "bound": bound,
            "ok": len(one) == len(other) > 1 and apart <= bound}


def nccl_row(what, two, one):
    """NCCL may refuse two processes on one card: that is no failure of ours."""
    return {"what": what, "refused": two} if isinstance(two, str) else \
        compared(what, two, one, 1e-4)


def toy(say, quick):
    """The toy's stage 1, SFT and DPO: each way to compute them beside the plainest."""
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        world = Toy(folder, quick)
        parents = {"cpu": partial(world.train, "pretrain", "cpu", *FP32, on_gpu=False)}
        if cuda:
            parents |= {"gpu": partial(world.train, "pretrain", "gpu", *FP32),
                        "gpu bf16": partial(world.train, "pretrain", "gpu-bf16", *BF16)}
        found = dict(as_they_end(parents))
        if isinstance(found["cpu"], str):
            raise RuntimeError(found["cpu"])
        jobs = toy_jobs(world, cuda, ["dpo"] if quick else ["sft", "dpo"])
        left = []
        for what, row, *runs in CHECKS:
            if set(runs) <= {*found, *jobs}:
                left.append((what, row, runs))
            else:
                say({"what": what, "left_out": "needs CUDA, or is left out by --quick"})
        for name, given in [*found.items(), *as_they_end(jobs)]:
            found[name] = given
            for check in [c for c in left if name in c[2] and set(c[2]) <= set(found)]:
                what, row, runs = check
                say(row(what, *(found[run] for run in runs)))
                left.remove(check)


def toy_jobs(world, cuda, stages):
    """{name: function}: every run of a stage that is compared, and the counts of waits."""
    def train(stage, name, *flags, **options):
        return partial(world.train, stage, f"{stage}-{name}", *flags, **options)
    # Every flag of a GPU's run, the rehearsal included; on a CPU the longest batch takes minutes.
    rehearsed = ["--rehearsal", "on"] if cuda else []
    jobs = {"dpo fp32": train("dpo", "fp32", *FP32)}             # what most others stand beside
    if cuda:                                                     # what takes longest: it compiles
        jobs |= {"dpo compile": train("dpo", "compile", *BF16, "--compile"),
                 "dpo flex": train("dpo", "flex", *BF16, "--attention", "flex"),
                 "dpo flex fp32": train("dpo", "flex-fp32", *FP32, "--attention", "flex")}
    jobs |= {"dpo resumed": partial(world.resumed, *FP32)}
    for backend in ("nccl", "gloo") if cuda else ("gloo",):
        jobs[f"dpo two {backend}"] = partial(world.shared, backend)
    for stage in stages:
        jobs |= {f"{stage} fp32": train(stage, "fp32", *FP32),
                 f"{stage} bf16": train(stage, "bf16", *BF16, *rehearsed),
                 f"{stage} ckpt": train(stage, "ckpt", *FP32, "--activation-checkpointing")}
        if cuda:
            jobs[f"{stage} cpu"] = train(stage, "cpu", *FP32, on_gpu=False)
    return jobs | {f"waits {s}": partial(world.waits, s) for s in ("sft", "dpo", "grpo")}


def step0(what, metrics):
    """Loss ln 2 and margin 0 before the first update."""
    if isinstance(metrics, str):
        return {"what": what, "error": metrics, "ok": False}
    bf16 = "fp32" not in what
    off = max(abs(metrics[0]["loss"] - LN2), abs(metrics[0]["margin"]))
    return {"what": what, "loss": metrics[0]["loss"], "margin": metrics[0]["margin"],
            "step0_bf16": off if bf16 else None, "ok": off <= (1e-3 if bf16 else 1e-5)}


# Waits of the host, read in the loops of SFT and DPO: three a micro-batch, two a step. CUDA's own
# libraries may add a few; many more mean that a loop reads a number too often. (GRPO's depend on
# how long its answers are.)
EXPECTED, SLACK = 2 * 3 + 2, 4


def waits_row(what, count):
    """How often a step of two micro-batches lets the host wait for the device: counted by torch on
    CUDA, by a stand-in on a CPU (gpu_waits.py)."""
    if isinstance(count, str):
        return {"what": what, "error": count, "ok": False}
    if "grpo" in what:
        return {"what": what, **count}
    return {"what": what, "expected": EXPECTED, **count, "ok": count["waits"] <= EXPECTED + SLACK}


CHECKS = [          # what, the row of it, the runs that it needs
    ("stage 1, GPU beside CPU, fp32", partial(compared, bound=1e-4), "gpu", "cpu"),
    ("stage 1, bf16 beside fp32", partial(compared, bound=5e-2), "gpu bf16", "gpu"),
    ("sft, GPU beside CPU, fp32", partial(compared, bound=1e-4), "sft fp32", "sft cpu"),
    ("sft, bf16 beside fp32", partial(compared, bound=5e-2), "sft bf16", "sft fp32"),
    ("sft, checkpointing beside none", partial(compared, bound=1e-4), "sft ckpt", "sft fp32"),
    ("dpo, GPU beside CPU, fp32", partial(compared, bound=1e-4), "dpo fp32", "dpo cpu"),
    ("dpo, bf16 beside fp32", partial(compared, bound=5e-2), "dpo bf16", "dpo fp32"),
    ("dpo, checkpointing beside none", partial(compared, bound=1e-4), "dpo ckpt", "dpo fp32"),
    ("dpo, flex beside sdpa, fp32", partial(compared, bound=1e-4), "dpo flex fp32", "dpo fp32"),
    ("dpo, killed and resumed beside never killed", partial(compared, bound=1e-4), "dpo resumed",
     "dpo fp32"),
    ("dpo, two processes on one card (NCCL) beside one", nccl_row, "dpo two nccl", "dpo fp32"),
    ("dpo, two processes on one card (gloo) beside one", partial(compared, bound=1e-4),
     "dpo two gloo", "dpo fp32"),
    *((f"step 0, {run}", step0, run) for run in ("dpo fp32", "dpo bf16", "dpo flex",
                                                 "dpo flex fp32", "dpo compile")),
    *((f"waits in a step of 2 micro-batches, {stage}", waits_row, f"waits {stage}")
      for stage in ("sft", "dpo", "grpo"))]


PIECES = [("correct", "kernels", kernels, 120), ("correct", "toy", toy, 150)]
