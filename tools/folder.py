"""What a run folder holds, read once: every stage's config and curves, and the evidence."""
import json
import math
from pathlib import Path

import numpy as np

from pivot import files
from tools import evidence

CLOCK = ("data_wait", "tokens_per_s")
NOT_CURVES = {"step", "samples_seen", "phase"}


def log_lines(path):
    """The objects of a .jsonl that may still be written to, those with a step: a last line cut off
    is left out; raises SystemExit at any other that is no JSON."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        items = json.loads(b"[" + b",".join(lines) + b"]")          # at once: four times as fast
    except ValueError:
        items = []
        for number, line in enumerate(lines, 1):
            try:
                items.append(json.loads(line))
            except ValueError as e:
                raise SystemExit(f"error: {path}:{number}: not JSON ({e}); delete the line")
    return [x for x in items if isinstance(x, dict) and isinstance(x.get("step"), int)]


def columns_of(items, above=""):
    """Lines of metrics, [{"step": 0, "loss": 0.7, "lr": {"encoder": …}}, …] → {"loss": (steps,
    values), "lr.encoder": …}: finite numbers alone, each with its step."""
    found, steps = {}, np.array([item["step"] for item in items])
    for key in dict.fromkeys(key for item in items for key in item):
        values = [item.get(key) for item in items]
        inner = [{**value, "step": item["step"]} for item, value in zip(items, values)
                 if isinstance(value, dict)]
        if inner:
            found |= columns_of(inner, f"{above}{key}.")
        numbers = np.array([value if isinstance(value, int | float) else math.nan
                            for value in values], float)
        kept = np.isfinite(numbers)
        if kept.any() and key not in NOT_CURVES:
            found[above + key] = steps[kept], numbers[kept]
    return found


class Stage:
    """A folder that a training stage writes: RUN/sft, or RUN/repair/sft. columns: {(key, phase):
    (steps, values)}, where phase is None in a stage that has but one."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.config = files.read_json(folder / "config.json", "arguments")
        self.done = (folder / "final" / "config.json").exists()
        moved = folder / "encoder" / "moved.json"
        self.extracted = files.read_json(moved) if moved.exists() else {}
        items, self.columns = log_lines(folder / "metrics.jsonl"), {}
        self.steps = max((x["step"] + ("loss" in x) for x in items), default=0)
        for phase in dict.fromkeys(x.get("phase") for x in items):
            lines = [x for x in items if x.get("phase") == phase]
            found = columns_of(lines)
            self.columns |= {(key, phase): column for key, column in found.items()}
        timing = [x for x in log_lines(folder / "timing.jsonl") if x.get("seconds")]
        timing = [{**x, "data_wait": 100 * x.get("data_wait", 0) / x["seconds"]} for x in timing]
        self.seconds = sum(x["seconds"] for x in timing)
        self.peak = max((x.get("peak_bytes", 0) for x in timing), default=0)
        found = columns_of(timing)
        self.columns |= {(key, None): found[key] for key in CLOCK if key in found}


class Run:
    """A run folder, read once."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).resolve().name
        if not self.folder.is_dir():
            raise SystemExit(f"error: {folder} is no folder; a run folder is e.g. "
                             f"runs/toy-vit__toy-lm")
        self.stages = [Stage(p.parent, p.parent.name)
                       for p in sorted(self.folder.glob("*/config.json"))
                       if "arguments" in files.read_json(p)]           # another tool's has none
        order = ["pretrain", "sft", *evidence.stages_of(self.folder)]
        self.stages.sort(key=lambda s: order.index(s.name) if s.name in order else len(order))
        if not self.stages:
            raise SystemExit(f"error: {folder} holds no run: no stage's config.json in it; a run "
                             f"folder is e.g. runs/toy-vit__toy-lm")
        every = [stage.config["arguments"] for stage in self.stages]
        with_data = [arguments for arguments in every if arguments.get("data")]
        self.arguments = (with_data or every)[0]            # of a published parent: the next one's
        self.original = evidence.original_name(self.arguments["encoder"])
        self.repairs = [Stage(p.parent, p.parent.name)
                        for p in sorted(self.folder.glob("repair/*/config.json"))]
        self.repairs.sort(key=lambda s: order.index(s.name) if s.name in order else -1)
        self.evidence = evidence.gather(self.folder) if with_data else None

    def method(self, name):
        """A model's name → that of its colour: the original encoder has one of its own. (That of a
        published model brought in is its stage 1's.)"""
        return "original" if name == self.original != "pretrain" else name

    def label(self, name):
        if name == "pretrain":
            return "stage 1"
        return "original" if name in (self.original, "original") else evidence.heading_of(name)

    def json(self, *parts):
        """A JSON file of the run; None where it is not there yet."""
        path = self.folder.joinpath(*parts)
        return files.read_json(path) if path.exists() else None
