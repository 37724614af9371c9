"""Memory is known in the first minute: the longest micro-batch, forward and backward, before hours
are spent on reading data."""
import os
import resource
import shlex
import sys
from pathlib import Path

import torch

from pivot import distributed, training
from pivot.distributed import print0


def remedies(args):
    """What takes less memory, in words."""
    smaller = "lower --micro-batch"
    if hasattr(args, "group"):
        smaller += ", --group or --max-new-tokens"
    return (f"{smaller}, add --activation-checkpointing, or train encoder and projector alone "
            f"(--lr 0 --encoder-lr 1e-6 --projector-lr 1e-6)")


def rehearse(args, model, rates, batch):
    """Train on a micro-batch and throw the gradients away: afterwards everything that a run depends
    on is bit for bit what it was. Prints the peak, with AdamW's moments, which are still to come,
    and the memory there is; raises SystemExit, one line, where that is less. A frozen second model
    (--reference live, --kl) is there already, and counted; what drawing answers takes is not.

    model: as distributed.shard returns it; rates: {"encoder", "projector", "llm"}, 0 freezes;
    batch: data.longest_batch's, the same on every process.
    """
    if args.rehearsal == "off":
        return
    training.freeze(model, rates)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    rows, tokens = batch["input_ids"].shape
    said = f"the longest micro-batch that is admitted, {rows} rows of {tokens} tokens"
    with torch.random.fork_rng(devices):
        try:
            forward_and_backward(args, model, {k: v.to(device) for k, v in batch.items()})
        except torch.OutOfMemoryError as e:
            raise SystemExit(f"error: out of memory at {said} ({str(e).splitlines()[0][:90]}); "
                             f"{remedies(args)}{what_fits(args)}")
    # AdamW keeps two numbers for each that it trains, of the share that this process holds.
    moments = 2 * sum(own.numel() * own.element_size() for own in (
        getattr(p, "_local_tensor", p) for p in model.parameters() if p.requires_grad))
    used, there = peak_and_room(device)
    model.zero_grad()
    distributed.reshard(model)               # the root group's tensors may still be whole
    used, moments, there = max(distributed.gather((used, moments, there)),
                               key=lambda process: process[0] + process[1] - process[2])
    print0(f"  {said}: {used / 1e9:.2f} GB at its peak, {(used + moments) / 1e9:.2f} GB with "
           f"AdamW's moments, of {there / 1e9:.1f} GB (--rehearsal off goes without)")
    if used + moments > there:
        raise SystemExit(f"error: that is more than there is; {remedies(args)}{what_fits(args)}")


def forward_and_backward(args, model, batch):
    """As a step does it: where a step has several micro-batches, the first one's whole gradients
    are still there while the last one's are made."""
    device, processes = batch["input_ids"].device, distributed.world()[1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    accumulates = args.global_batch > args.micro_batch * processes
    for last in (False, True) if accumulates else (True,):
        model.set_requires_gradient_sync(last)
        (-model(**batch).sum()).backward()


def peak_and_room(device):
    """Bytes: the most that was held at once, and all that this process can have. On a CPU: of
    resident memory, and an equal share of the machine's."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        room = torch.cuda.mem_get_info(device)[0] + reserved     # free, or ours already
        torch.cuda.empty_cache()
        return peak, room
    unit = 1 if sys.platform == "darwin" else 1024
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            memory // distributed.local_world())


def what_fits(args):
    """The command that computes it, with the flags that were typed; none for a stage that draws
    answers, which tools.plan does not compute."""
    if hasattr(args, "group"):
        return ""
    typed = shlex.join(word for word in sys.argv[1:] if word != "--overwrite")
    return (f"; what fits: python -m tools.plan {Path(sys.argv[0]).stem} {typed} "
            f"{distributed.world()[1]}xh100 (or another card)")
