"""One stage's folder: config, logs, checkpoints, final model; how an interrupted run goes on.

Nothing is half-written under its final name: files are written aside and renamed, checkpoints and
final/ are fsynced before. So a run killed at any moment and started again ends as if it had never
been killed, bit for bit on the same number of processes.
"""
import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pivot import encoders, files, model_io, printing, tensors
from pivot.distributed import (asked_to_stop, barrier, end_at_signals, from_main, is_main, print0,
                               reduce_sum, reshard, restarted, stop, world)

STOPPED = 75          # exit code of a run that was asked to stop and saved first (EX_TEMPFAIL)
# Arguments of every stage that may differ on resume: they do not change the numbers.
FREE = {"run", "run_typed", "workers", "keep", "save_every", "log_every", "micro_batch",
        "overwrite", "replicas", "activation_checkpointing", "stall_timeout", "follow_links",
        "rehearsal", "index"}
LOGS = ("metrics.jsonl", "timing.jsonl")
ASK = """A question about a picture, in transformers 4 and 5:

```python
from PIL import Image
import transformers

folder = "."
pillow = dict(use_fast=False) if transformers.__version__.startswith("4.") else dict(backend="pil")
processor = transformers.AutoProcessor.from_pretrained(folder, **pillow)
model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
picture, question = Image.new("RGB", (640, 480), "white"), "What is in the picture?"
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
inputs = processor(images=picture, text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

"""
REFUSED = """transformers refuses this folder by its model_type, `{}`: LLaVA's class would
compute something else. The commands here read it (`repair_eval.py --mllm`), and `extract.py` writes
its encoder for transformers.

"""


def file_digest(model):
    """The identity of a parent, read by the main process alone: 32 GB take half a minute."""
    return from_main(lambda: tensors.digest_of(model))


def parents(args):
    """What stage 1, or a re-paired model, is made of, for config.json: {"encoder_digest": …, …}."""
    encoder = [file_digest(encoders.resolve(part)) for part in encoders.parts_of(args.encoder)]
    return {"encoder_digest": "+".join(encoder),
            "llm_digest": file_digest(encoders.resolve(args.llm))}


def difference(folder, arguments, facts={}, free=()):
    """The first argument or fact that differs from those under which the run in this folder was
    begun, or a parent trained anew since, as a line of refusal; None. By the main process alone.

    free: arguments that may differ, besides those in FREE.
    """
    try:
        old = files.read_json(folder / "config.json", "arguments",
                              remedy="; --overwrite starts anew")
    except SystemExit as e:
        return e.code
    begun, now = old["arguments"], json.loads(json.dumps(arguments, default=str))
    compared = [(f"--{key.replace('_', '-')}", begun[key], value) for key, value in now.items()
                if key in begun and key not in FREE and key not in free]
    compared += [(key, old[key], value) for key, value in facts.items() if key in old]
    if "parent_digest" in old and "parent_digest" not in facts:
        parent = files.from_folder(folder.parent, arguments["parent"]) / "final"
        if parent.exists():
            compared.append(("parent_digest", old["parent_digest"], tensors.digest_of(parent)))
    for name, before, after in compared:
        if before != after:
            return (f"error: {folder} was begun with {name} {before}, now {after}; go on as "
                    f"before, name another --run-dir, or --overwrite")


def finished(folder, args, facts={}, free=()):
    """Is final/ there, made under these arguments and facts? raises SystemExit if under others."""
    def look():
        if not (folder / "final" / "config.json").exists():
            return False, None
        return True, difference(folder, vars(args), facts, free)
    there, refusal = from_main(look)
    if refusal:
        raise SystemExit(refusal)
    if there and is_main():              # the run may have been killed on its last line
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return there


def torchrun_id():
    """Which torchrun started this process, the same after its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")          # "none" without --standalone or an id
    return name and f"{name} {os.getppid()}"


def starts_anew(folder, args):
    """--overwrite? No longer, where torchrun restarts a run that has deleted what was old."""
    def begun():
        path = folder / "config.json"
        return restarted() and path.exists() and \
            files.read_json(path).get("anew_by") == torchrun_id()
    return args.overwrite and not from_main(begun)


class Run:
    """config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ of one stage.

    Opening it decides what happens: a finished stage says so and exits 0, an interrupted one goes
    on from its newest whole checkpoint, --overwrite starts anew.
    """

    def __init__(self, folder, args, facts={}, free=()):
        """args: as flags.settle leaves them; facts: what identifies the run besides, of what is
        known already; free: further arguments that may differ on resume."""
        if args.refusal:                 # no parent, or a flag that this machine cannot follow
            raise SystemExit(args.refusal)
        del args.refusal
        self.folder, self.args, self.free = Path(folder), args, free
        self.parent = args.parent and files.from_folder(args.run, args.parent) / "final"
        if world()[1] % args.replicas:
            raise SystemExit(f"error: {world()[1]} processes cannot hold --replicas "
                             f"{args.replicas}; take a number that divides them")
        self.anew = starts_anew(self.folder, args)
        if not self.anew and finished(self.folder, args, facts, free):
            print0(f"{self.folder}/final is already there: nothing to do "
                   f"(--overwrite starts anew)")
            stop()
            raise SystemExit(0)
        refusal = from_main(self.claim)
        if refusal:
            raise SystemExit(refusal)
        steps = [int(p.name[5:]) for p in self.saved() if (p / "position.json").exists()]
        steps = [] if self.anew else steps
        self.start = from_main(lambda: max(steps, default=0))     # steps already done
        self.timed = []                             # lines of timing.jsonl since the last printed
        self.index = Path(args.index or Path(args.run, "index"))            # see pivot/index.py
        self.bad = []                               # records of this start, [(where, why), …]

    @property
    def same_command(self):
        """What a line says that sends a person back to the command that was interrupted."""
        return f"the same command {'without --overwrite ' if self.args.overwrite else ''}goes on"

    def saved(self):
        """Its checkpoints, the oldest first; what else lies there is somebody's own."""
        return sorted((p for p in (self.folder / "checkpoints").glob("step-*")
                       if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))

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
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EAGAIN):
                    print0(f"  {self.folder}: its file system knows no locks ({e.strerror}); see "
                           f"to it yourself that one run alone trains there")
                    break
                time.sleep(1)
            if (patience := patience - 1) < 0:
                return (f"error: another process is training in {self.folder}; wait for it, or "
                        f"name another --run-dir")

    def list_bad(self, bad):
        """bad.jsonl: where each bad record of this start stands, and why it is bad; none: no file.
        bad: [(where, message), …] of one set of records."""
        self.bad += bad
        path = self.folder / "bad.jsonl"
        if is_main() and self.bad:
            files.write_text(path, "".join(json.dumps(
                {"record": where, "reason": why.removeprefix(where).lstrip(":, ")},
                ensure_ascii=False) + "\n" for where, why in self.bad))
        elif is_main():
            path.unlink(missing_ok=True)

    def describe(self, facts):
        """Write config.json, or compare it: a run of other arguments, data or parent is refused.

        What --overwrite gives up goes only now, when arguments, model and data have been read.
        """
        import transformers
        config = {"stage": self.args.stage, "script": Path(sys.argv[0]).name,
                  "arguments": vars(self.args), "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0]},
            # whose --overwrite it was: see starts_anew
            "anew_by": self.args.overwrite and torchrun_id()}
        self.config = config = json.loads(json.dumps({**config, **facts}, default=str))
        path = self.folder / "config.json"
        if from_main(lambda: facts) != facts:
            raise SystemExit(f"error: process {world()[0]} read other data than process 0 did (an "
                             f"image that could not be read there?); start again")
        if self.start:
            refusal = from_main(lambda: difference(self.folder, config["arguments"],
                                                   {k: config[k] for k in facts}, self.free))
            if refusal:
                raise SystemExit(refusal)
        barrier()
        if is_main():
            for old in self.folder.iterdir() if self.anew else ():
                if old.name not in ("lock", "bad.jsonl"):            # these are of this start
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            files.write_json(path, config)
            if not self.start:      # killed before its first checkpoint: its lines would double
                for name in LOGS:
                    (self.folder / name).unlink(missing_ok=True)
        barrier()              # nobody looks for files that are about to go
        for key, value in facts.items():
            print0(f"  {key}: {value}")

    def resume(self, model, optimizer=(), own=()):
        """Load the newest whole checkpoint, resharding as needed (without an optimizer: weights
        alone); truncate the metrics to it. own: names of the stage's own numbers that `save` was
        given; → {name: number}, the same bits."""
        reshard(model)
        folder = self.folder / "checkpoints" / f"step-{self.start}"
        remedy = f"; delete {folder}: the run then goes on from the checkpoint before it, if any"
        position = files.read_json(folder / "position.json", "lengths", *own, remedy=remedy)
        logging.disable(logging.CRITICAL)      # torch logs a traceback a process; ours is one line
        try:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
        except dcp.api.CheckpointException as e:       # on every process, whoever met it
            cause = printing.first_line(next(iter(e.failures.values()))[0])
            raise SystemExit(f"error: cannot read {folder}: {cause}{remedy}")
        logging.disable(logging.NOTSET)
        if is_main():
            for name, length in position["lengths"].items():
                if (log := self.folder / name).exists():
                    os.truncate(log, min(length, log.stat().st_size))
        print0(f"  continuing after {self.start} steps, from {folder}")
        return {name: position[name] for name in own}

    def log(self, metrics, timing=None):
        """One line in metrics.jsonl (deterministic fields only), one in timing.jsonl; every
        --log-every steps one for people, of the speed since the last one."""
        if timing:
            self.timed.append(timing)
        if "loss" in metrics and metrics["step"] % self.args.log_every == 0:
            words = [f"{k} {metrics[k]:.4g}" for k in ("loss", "margin", "accuracy", "reward")
                     if k in metrics]
            words += [f"|g| {k} {v:.3g}" for k, v in metrics["grad_norm"].items()]
            seconds, waited = (sum(t[key] for t in self.timed) for key in ("seconds", "data_wait"))
            tokens = sum(t["tokens_per_s"] * t["seconds"] for t in self.timed)
            print0(f"  step {metrics['step']}: {', '.join(words)}; {tokens / seconds:.0f} tokens/s,"
                   f" {waited / seconds:.0%} of the time waiting for data, peak "
                   f"{timing['peak_bytes'] / 2 ** 30:.2f} GiB")
            self.timed = []
        if is_main():
            for name, line in zip(LOGS, (metrics, timing)):
                if line is not None:
                    with open(self.folder / name, "a") as f:
                        f.write(json.dumps(line) + "\n")

    def cached(self, name, key, compute):
        """Tables that the file `name` of the run folder holds; else those that `compute` makes, and
        the file then holds: {name: tensor}. key: {what: its identity} of all that they depend on. A
        file that was made from anything else is refused, never reused.
        """
        path = self.folder / name
        if not from_main(path.exists):
            tables = compute()
            if is_main():
                files.write_aside(path, lambda aside: save_file(
                    tables, aside, metadata={"key": json.dumps(key, sort_keys=True)}))
            return tables
        try:
            with safe_open(path, "pt") as file:
                made_from = json.loads(file.metadata()["key"])
                tables = {table: file.get_tensor(table) for table in file.keys()}
        except Exception as e:     # cut short, or another tool's
            raise SystemExit(f"error: cannot read {path} ({type(e).__name__}: {e}); delete it: the "
                             f"same command computes it anew")
        for what, now in key.items():
            if made_from.get(what) != now:
                raise SystemExit(f"error: {path} was computed with {what} {made_from.get(what)}, "
                                 f"now {now}; delete it or --overwrite")
        return tables

    def save_if_due(self, done, steps, model, optimizer, own={}):
        """After a step: save every --save-every steps, and when any process was asked to stop.
        own: {name: number} of the stage's own that the next step needs."""
        asked = reduce_sum({"stop": asked_to_stop()})["stop"] > 0
        if done == steps:                     # final/ comes next: faster than stopping for it
            return
        if asked or done % self.args.save_every == 0:
            self.save(done, model, optimizer, own)
        if asked:
            print0(f"asked to stop: {self.same_command} from there")
            stop()
            raise SystemExit(STOPPED)

    def save(self, done, model, optimizer, own={}):
        """Shards, position and metric lengths: written aside, fsynced, renamed; the last K stay."""
        folder, began = self.folder / "checkpoints" / f"step-{done}", time.perf_counter()
        aside = folder.with_name(f"writing-{done}")
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        reshard(model)
        weights, moments = get_state_dict(model, optimizer)
        try:
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside)
        except dcp.api.CheckpointException as e:       # raised on every process alike
            reason = printing.first_line(next(iter(e.failures.values()))[0])
            raise SystemExit(f"error: step {done} could not be saved to {aside} ({reason}); is the "
                             f"disk full? What was saved before is whole, {self.same_command} "
                             f"from there")
        if is_main():
            logs = [self.folder / name for name in LOGS if (self.folder / name).exists()]
            files.write_json(aside / "position.json", {
                "step": done, "lengths": {log.name: log.stat().st_size for log in logs}, **own})
            files.sync(*logs, *aside.rglob("*"), aside)
            os.replace(aside, folder)
            files.sync(folder.parent)             # before anything older goes
            for old in self.saved()[:-self.args.keep]:
                shutil.rmtree(old, ignore_errors=True)
        barrier()
        print0(f"  saved after {done} steps, in {time.perf_counter() - began:.2f} s")

    def card(self, folder):
        """README.md of final/: where this model comes from, and what training moved."""
        config = self.config
        arguments, stage = config["arguments"], config["stage"]
        rows = {"stage": stage, "encoder": arguments["encoder"], "LLM": arguments["llm"]}
        rows |= {k.replace("_", " "): v for k, v in config.items() if k.endswith("_digest")}
        rows |= {"data": config.get("data"), "versions": config["versions"]}
        if self.parent:
            new, old = tensors.stored(folder), tensors.stored(self.parent)
            moved, still = tensors.relative_change(
                ((held.key, held.tensor(), old[name].tensor()) for name, held in new.items()),
                lambda name: name.split(".")[0])
            rows[f"moved since {arguments['parent']}"] = ", ".join(
                f"{part} {change:.2e}" for part, change in moved.items()) + " (‖w − w₀‖ / ‖w₀‖)"
            rows[f"bit-equal to {arguments['parent']}"] = ", ".join(still) or "no tensor"
        else:
            rows["parents"] = "the published encoder and LLM above; how far every block of the " \
                f"encoder moved: `python extract.py --stage {stage}`"
        shown = {k: v for k, v in arguments.items() if k not in FREE | {"stage"}
                 and v is not None and v is not False}
        rows["arguments"] = " ".join(
            f"--{k.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}"
            for k, v in shown.items())
        kind = files.read_json(folder / "config.json", "model_type")["model_type"]
        return ("---\ntags: [vision, pivot]\nlibrary_name: transformers\n---\n"
                f"# {rows['encoder']} + {rows['LLM']}, after {stage}\n\n"
                "An encoder, a projector and an LLM in the layout of LLaVA; the same folder is "
                "what the next stage and `extract.py` read. Images: a bicubic squash, with the "
                "saved processor's mean and standard deviation, resized by Pillow.\n\n"
                + (ASK if kind == "llava" else REFUSED.format(kind)) +
                "| provenance | |\n|---|---|\n"
                + "".join(f"| {k} | {v} |\n" for k, v in rows.items()))

    def finish(self, model, tokenizer, then=None):
        """Write final/, the folder transformers opens; drop the checkpoints, which it replaces.
        then: the command that comes next, in words."""
        reshard(model)
        aside = self.folder / "final.tmp"
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        barrier()
        model_io.save_mllm(model, tokenizer, aside, is_main())
        if is_main():
            (aside / "README.md").write_text(self.card(aside), encoding="utf-8")
            files.sync(*aside.rglob("*"), aside)
            os.replace(aside, self.folder / "final")
            files.sync(self.folder)               # before the checkpoints go
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        end_at_signals()
        if is_main():
            self.print_curves()
        print0(f"wrote {self.folder}/final" + (f"; next: {then}" if then else ""))
        barrier()

    def print_curves(self):
        """Loss, and what a stage has of margin and reward, from first step to last, a line each."""
        phases = {}
        with open(self.folder / "metrics.jsonl") as lines:
            for line in map(json.loads, lines):
                if "loss" in line:
                    phases.setdefault(line.get("phase", ""), []).append(line)
        for phase, lines in phases.items():
            for what in ("loss", "margin", "reward"):
                if what in lines[0]:
                    print0(f"  {what} of {phase or self.args.stage} over its {len(lines)} steps, "
                           f"a mean for each tenth: {printing.curve([x[what] for x in lines])}")
