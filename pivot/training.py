"""What training loops share besides the loss: rates, schedule, clipping, the clock."""
import math
import resource
import sys
import time
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from pivot import distributed
from pivot.distributed import print0

MODULES = ("encoder", "projector", "llm")


def freeze(model, rates):
    """Set requires_grad: a rate of 0 freezes a module, and what the encoder's class keeps but no
    gradient reaches is always frozen. → the names of the latter, within the encoder."""
    frozen = tuple(f"vision.{x}" for x in model.encoder.family.frozen)
    never = {k for k, _ in model.encoder.named_parameters() if k.startswith(frozen)}
    for name in rates:
        for key, p in getattr(model, name).named_parameters():
            p.requires_grad_(rates[name] > 0 and not (name == "encoder" and key in never))
    return sorted(never)


def adamw(model, rates):
    """AdamW (0.9, 0.999), no weight decay, one group a module; a rate of 0 freezes the module.

    rates: {"encoder": lr, "projector": lr, "llm": lr}, and, of PPO, "value". Prints the table of
    what is trained at which rate: a rate silently ignored is the best hidden bug of public DPO
    scripts.
    """
    groups, unused = [], freeze(model, rates)
    for name, lr in rates.items():
        module = getattr(model, name)
        module.zero_grad()
        trained = [p for p in module.parameters() if p.requires_grad]
        count = sum(p.numel() for p in module.parameters())
        print0(f"  {name:<10} {count:>13,} parameters, {sum(p.numel() for p in trained):>13,} "
               f"trained" + (f", lr {lr:g}" if trained else "")
               + (f"; frozen: {', '.join(unused)}" if unused and name == "encoder" else ""))
        if trained:
            groups.append({"params": trained, "lr": lr, "peak": lr, "name": name})
    if not groups:
        raise SystemExit("error: every learning rate is 0: nothing would be trained")
    # FSDP2 fixes the dtype in which a block's gradients are summed at its first forward, and fixes
    # none where the block is frozen, as in phase 1a: 1b would then sum in bf16. unshard() makes it
    # decide again.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class Phase(NamedTuple):
    """A stretch of training: which data, which modules at which rates, how long."""
    name: str
    kind: str                       # of data.Samples
    file: str
    rates: dict                     # {"encoder", "projector", "llm"}; 0 freezes
    epochs: int
    max_steps: int | None


def learning_rates(args):
    """--lr is the LLM's; encoder and projector have their own or share it."""
    return {"encoder": args.lr if args.encoder_lr is None else args.encoder_lr,
            "projector": args.lr if args.projector_lr is None else args.projector_lr,
            "llm": args.lr}


def num_steps(epochs, max_steps, order):
    """Steps of a run, bounded by --max-steps; prints what a step is made of."""
    steps = epochs * order.steps_per_epoch
    steps = steps if max_steps is None else min(steps, max_steps)
    print0(f"  {steps} steps of {order.global_batch} samples: {order.world} processes × "
           f"{order.micro_steps} micro-steps of {order.micro_batch}; {order.steps_per_epoch} steps "
           f"an epoch, image = {order.samples.num_image_tokens} tokens")
    return steps


def set_lr(optimizer, step, steps, warmup):
    """Linear warm-up over a share of the steps, then cosine to 0. → {module: lr}."""
    rise = max(1, math.ceil(warmup * steps))
    scale = (step + 1) / rise if step < rise else \
        0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak"]
    return {g["name"]: g["lr"] for g in optimizer.param_groups}


def clip_grad_norm(model, max_norm=1.0, modules=MODULES):
    """Clip the global gradient norm of these modules; → {module: norm before clipping}, over all
    shards."""
    norms = {}
    for name in modules:
        grads = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if norms:                                        # read all at once: one wait for the device
        norms = dict(zip(norms, torch.stack([*norms.values()]).tolist()))
    total = math.sqrt(sum(n * n for n in norms.values()))
    if total > max_norm:
        for name in norms:
            for p in getattr(model, name).parameters():
                if p.grad is not None:
                    p.grad.mul_(max_norm / total)
    return norms


def require_same_function(args, apart, said, *causes, fp32=1e-5, bf16=1e-3):
    """Before the first update, refuse models that were to be one and the same, and are not; raises
    SystemExit. apart: by how much what they say differs; bounds: what rounding does in a dtype;
    said: what was compared; causes: usual ones, besides those of every stage."""
    said = f"step 0: {said}"
    if not apart <= (bf16 if args.dtype == "bf16" else fp32):
        causes = ["randomness in a forward, as of dropout; a forward that changes the model",
                  *causes]
        raise SystemExit(f"error: {said} are NOT the same function; nothing was updated. Usual "
                         f"causes: {'; '.join(causes)}")
    print0(f"  {said} are the same function")


def require_finite(step, loss, norms, samples, order):
    """Stop before the step that would ruin the weights, naming the batch's records."""
    if not all(map(math.isfinite, [loss, *norms.values()])):
        raise SystemExit(f"error: step {step}: loss {loss}, gradient norms {norms}; nothing was "
                         f"updated. The batch: {samples.names(order.batch(step))}")


class Clock:
    """Fetches micro-batches and knows where a step's time goes: waiting for data, or computing.

    stall_timeout: minutes that a silent worker is waited for, before it is given up and named.
    """

    def __init__(self, device, stall_timeout):
        self.device, self.stall_timeout, self.batches = device, stall_timeout, None

    def start(self, loader):
        self.loader, self.batches = loader, iter(loader)
        self.waited, self.began = 0.0, None

    def next_batch(self):
        """The next micro-batch on the device, its index on the host, where the tables are that it
        names rows of; an unreadable image raises BadRecord."""
        t = time.perf_counter()
        self.began = self.began or t
        batch = self.wait()
        self.waited += time.perf_counter() - t
        return {k: v if k == "index" else v.to(self.device, non_blocking=True)
                for k, v in batch.items()}

    def wait(self):
        """The next of the loader, which gives up every few seconds; raises SystemExit when it has
        been silent for too long, or when the run is asked to stop meanwhile."""
        began = time.monotonic()
        while True:
            try:
                batch = next(self.batches)
                self.loader.batch_sampler.arrived()
                return batch
            except RuntimeError as e:
                if not str(e).startswith("DataLoader timed out"):
                    raise
            silent = time.monotonic() - began
            if silent > 60 * self.stall_timeout:
                why = f"--stall-timeout {self.stall_timeout:g} min"
            elif distributed.asked_to_stop() and silent > 30:
                why = "asked to stop"
            else:
                continue
            records = self.loader.batch_sampler.awaited(self.loader.dataset)
            raise SystemExit(f"error: no batch came for {silent:.0f} s ({why}): a worker is stuck "
                             f"at one of {records}; what was saved before is whole")

    def lap(self, step, tokens):
        """The line of timing.jsonl for the step just finished, from its first wait to its update;
        tokens: with padding. Logging and saving are no part of it."""
        seconds, waited = time.perf_counter() - self.began, self.waited
        self.began, self.waited = None, 0.0
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        return {"step": step, "data_wait": round(waited, 4), "seconds": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds, 1), "peak_bytes": peak}
