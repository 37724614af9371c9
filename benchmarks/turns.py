"""Sides that take turns: one way to train beside another, in one run, each with its own memory.

A *side* is a process. It works only when it is told to; the other one sleeps meanwhile. Sides
alternate, a block of turns each, so that whatever else the machine does meets them alike.
"""
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections import defaultdict

import torch
from tqdm import tqdm

from common import EPOCHS


class Turns:
    """Inside a side's process: wait for the turn, do one piece of work, say how long it took."""

    def __init__(self, conn):
        self.conn, self.start_memory = conn, None

    def begin(self, kind):
        self.start_memory = self.start_memory or memory("VmRSS")
        self.conn.send(kind)
        self.conn.recv()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def end(self, value=None):
        self.conn.send((time.perf_counter() - self.began, time.process_time() - self.cpu_began,
                        value))


def watched(kind, turns):
    """A class of transformers' Trainer whose steps are turns: from after its collator to after its
    optimizer, with the loss as their value."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_begin(self, *state, **named):
            turns.begin("step")

        def on_step_end(self, *state, **named):
            turns.end(self.trainer.last.item())

    class Watched(kind):
        def __init__(self, *args, **named):
            super().__init__(*args, callbacks=[Watch(self)], **named)

        def training_step(self, *inputs, **named):
            self.last = super().training_step(*inputs, **named)
            return self.last
    return Watched


def memory(key):
    """GiB of this process. VmHWM is its peak; ru_maxrss would also hold the parent's, from before
    the exec, so it serves only where there is no /proc."""
    try:
        line = next(x for x in open("/proc/self/status") if x.startswith(key))
        return int(line.split()[1]) / 2 ** 20
    except OSError:
        import resource
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def serve(conn, threads, work, args):
    """A side's process: work(turns, *args), then its memory."""
    torch.set_num_threads(threads)
    sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"    # the parent's bar alone
    try:
        turns = Turns(conn)
        work(turns, *args)
        conn.send({"peak": memory("VmHWM"), "before": turns.start_memory})
    except BaseException:
        traceback.print_exc()
        raise


class Side:
    """One way to train, seen from outside. state: kind of its next turn, or its memory when done;
    took, cpu: {kind: seconds of every turn, by the wall's clock and of all its threads' work};
    values: what the turns returned, where not None."""

    def __init__(self, name, threads, work, *args):
        self.name, self.took, self.cpu = name, defaultdict(list), defaultdict(list)
        self.values = []
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, threads, work, args), daemon=True).start()
        theirs.close()
        self.state = None                # alternate() waits for it: sides start at the same time

    def hear(self):
        try:
            return self.conn.recv()
        except EOFError:
            raise SystemExit(f"error: the process of '{self.name}' ended; its message stands above")

    def turn(self):
        self.conn.send("go")
        seconds, cpu, value = self.hear()
        self.took[self.state].append(seconds)
        self.cpu[self.state].append(cpu)
        self.values += [] if value is None else [value]
        self.state = self.hear()         # only then is it quiet: between turns it makes batches

    def costs(self, block):
        """Seconds a step, of every round but the first (warm-up); the reference pass included, if
        it has one, as one pass in EPOCHS steps of the same batch."""
        steps, ref = self.took["step"], self.took["reference"]
        once = statistics.median(ref) / EPOCHS if ref else 0.0
        return [statistics.mean(steps[i:i + block]) + once
                for i in range(block, len(steps) - block + 1, block)]


def alternate(sides, block, label):
    """Blocks of turns, side by side, references first, until all are done."""
    for side in sides:
        side.state = side.hear()
    with progress(desc=label, unit="turn") as bar:
        for kind in ("reference", "step"):
            while any(side.state == kind for side in sides):
                for side in sides:
                    for _ in range(block):
                        if side.state == kind:
                            side.turn()
                            bar.update()
                            bar.set_postfix_str(side.name, refresh=False)
                sides = sides[1:] + sides[:1]


def fitting_block(block, steps):
    """Steps of one side in a row: the first round is warm-up, so that two rounds must fit."""
    if steps < 2:
        raise SystemExit(f"error: {steps} step a side: the first is warm-up, take two or more")
    return min(block, steps // 2)


def ratio(side, other, block):
    """How many times as long side takes, round by round: (median, smallest, largest)."""
    rounds = [a / b for a, b in zip(side.costs(block), other.costs(block))]
    return statistics.median(rounds), min(rounds), max(rounds)


def progress(*of, **named):
    """A tqdm bar; where nobody watches, a line every ten seconds."""
    return tqdm(*of, file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10, **named)
