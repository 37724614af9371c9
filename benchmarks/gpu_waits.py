"""Where a training step lets the host wait for the device: how often, and in which line.

On a GPU torch counts these itself (torch.cuda.set_sync_debug_mode). On a CPU a stand-in follows
what *would* lie on the device: whatever came there by `.to`, and whatever was computed from it. It
counts each time the host reads such a number, or a shape that depends on one (item, tolist, cpu,
nonzero, a mask of booleans as an index), and each copy to the device that is not `non_blocking`.
It sees the backward pass too: of `masked_scatter`, a masked_select. It does not see what CUDA's own
kernels and libraries wait for. By hand, on a parent that is there:

    python benchmarks/gpu_waits.py train_dpo --run-dir runs/waits --parent runs/toy-vit__toy-lm \
        --data data/toy
"""
import importlib
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pivot import distributed, files, training  # noqa: E402

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.masked_scatter_backward.default, aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default}


def place():
    """"model.py:196  int(is_image.sum())": our line that is running, and whether it is a package
    that it called. (Of the backward pass the line is the one that began it.)"""
    inside = ""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == Path(__file__).resolve():
            continue
        if "transformers" in path.parts and not inside:
            inside = f" in transformers' {path.name}:{frame.lineno}"
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}  {frame.line.strip()}{inside}"
    return "elsewhere"


class Standin:
    """What would be on the device, and the waits so far. count: {place: times}."""

    def __init__(self):
        self.there, self.count = WeakTensorKeyDictionary(), Counter()

    def holds(self, values):
        return any(x in self.there for x in tree_leaves(values) if isinstance(x, torch.Tensor))

    def put(self, values):
        for x in tree_leaves(values):
            if isinstance(x, torch.Tensor):
                self.there[x] = True

    def wait(self, what):
        self.count[f"{place()}  [{what}]"] += 1


class Calls(TorchFunctionMode):
    """The copies between host and device, which on a CPU are none."""

    def __init__(self, standin):
        super().__init__()
        self.standin = standin

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, standin, name = kwargs or {}, self.standin, getattr(function, "__name__", "")
        if function in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy) \
                and standin.holds(args[0]):
            standin.wait(name)
            copy = args[0].detach().clone()
            standin.there.pop(copy)                              # this one lies on the host
            return function(copy, *args[1:], **kwargs)
        out = function(*args, **kwargs)
        if function is torch.Tensor.to:
            goes = any(isinstance(x, torch.device) for x in (*args[1:], *kwargs.values()))
            if goes and not standin.holds(args[0]):
                self.copied(name, kwargs)
                out = out.view_as(out) if out is args[0] else out
                standin.put(out)
        elif kwargs.get("device") is not None:                 # made there: torch.arange, zeros, …
            if function in (torch.tensor, torch.as_tensor):      # of numbers of the host
                self.copied(name, kwargs)
            standin.put(out)
        return out

    def copied(self, name, kwargs):
        if not kwargs.get("non_blocking"):
            self.standin.wait(f"{name}, not non_blocking")


class Kernels(TorchDispatchMode):
    """What is computed from what, and the kernels that let the host wait."""

    def __init__(self, standin):
        super().__init__()
        self.standin = standin

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, standin = kwargs or {}, self.standin
        on_device = standin.holds((args, kwargs))
        if on_device and (function in READS or function in INDEXED and any(
                x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None)):
            standin.wait(function.overloadpacket.__name__)
        out = function(*args, **kwargs)
        if on_device:
            standin.put(out)
        return out


@contextmanager
def counted():
    """`with counted() as count:` {place: waits} of everything inside, on a CPU by the stand-in, on
    a GPU by torch's own count."""
    if not torch.cuda.is_available():
        standin = Standin()
        with Calls(standin), Kernels(standin):
            yield standin.count
        return
    count, before = Counter(), torch.cuda.get_sync_debug_mode()
    true = warnings.showwarning

    def show(message, *rest, **more):
        if "called a synchronizing CUDA operation" in str(message):
            count[f"{place()}  [cuda]"] += 1
        else:
            true(message, *rest, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode(before)


# ---------------------------------------------------------------------------------- of a real stage

def of_step(stage, flags):
    """Run three steps of a stage's own main() in this process. → {place: waits} of the second one,
    from where its rates are set to where the third one's are."""
    module, marks = importlib.import_module(stage), []
    sys.argv = [f"{stage}.py", *flags, "--workers", "0", "--max-steps", "3", "--save-every", "100",
                "--rehearsal", "off"]
    with counted() as count:
        true = training.set_lr, distributed.shard

        def mark(*args):
            marks.append(Counter(count))
            return true[0](*args)

        def shard(*args, **more):
            model = true[1](*args, **more)
            model.llm.get_input_embeddings().sparse = False           # as on CUDA
            return model
        training.set_lr, distributed.shard = mark, shard
        module.main()
    return marks[2] - marks[1]


def main():
    """python benchmarks/gpu_waits.py train_dpo [--json FILE] --run-dir DIR --parent DIR …"""
    stage, *flags = sys.argv[1:]
    out = None
    if flags[:1] == ["--json"]:
        out, flags = flags[1], flags[2:]
    found = of_step(stage, flags)
    lines = [f"{times:4d}  {where}" for where, times in found.most_common()]
    print("\n".join([f"{found.total()} waits in a step", *lines]))
    if out:
        files.write_json(out, {"waits": found.total(), "places": lines})


if __name__ == "__main__":
    main()
