"""Where a training step lets the host wait for the device: how often, and in which line.

On a GPU torch counts these itself (torch.cuda.set_sync_debug_mode). On a CPU a stand-in follows
what *would* lie on the device: whatever came there by `.to`, and whatever was computed from it. It
counts each time the host reads such a number, or a shape that depends on one (item, tolist, cpu,
nonzero, a mask of booleans as an index), and each copy to the device that is not `non_blocking`.
It sees the backward pass too: of `masked_scatter`, a masked_select. It does not see what CUDA's own
kernels and libraries wait for.
"""
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
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.masked_scatter_backward.default, aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default}


def place():
    """"model.py:196 int(is_image.sum())": our line that is running; the backward pass has none."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in frame.filename \
                and path.name != Path(__file__).name:
            return f"{path.relative_to(ROOT)}:{frame.lineno}  {frame.line.strip()}"
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
        if function in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy):
            if standin.holds(args[0]):
                standin.wait(name)
                return function(args[0].detach().clone(), *args[1:], **kwargs)
        out = function(*args, **kwargs)
        goes = function is torch.Tensor.to and any(
            isinstance(x, torch.device) for x in (*args[1:], *kwargs.values()))
        made = function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if (goes and not standin.holds(args[0])) or made:
            if not kwargs.get("non_blocking"):
                standin.wait(f"{name}, not non_blocking")
            out = out.view_as(out) if goes and out is args[0] else out
            standin.put(out)
        return out


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
