"""One stage's folder: what is written there, when, and how an interrupted run goes on.

Nothing is half-written under its final name: files are written aside and renamed, checkpoints and
final/ are fsynced before. So a run killed at any moment and started again ends as if it had never
been killed, bit for bit on the same number of processes.
"""
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from pivot.runtime import (barrier, from_main, is_main, print0, reduce_sum, reshard, restarted,
                           stop, world)
from pivot import encoders
from pivot import folders
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

STOPPED = 75          # exit code of a run that was asked to stop and saved first (EX_TEMPFAIL)
# Arguments that may differ on resume: they do not change the numbers.
FREE = {"workers", "keep", "save_every", "log_every", "micro_batch", "overwrite", "replicas",
        "activation_checkpointing", "run", "run_typed", "bench", "limit", "eval_batch",
        "max_new_tokens", "temperature", "wrong_image", "mllm", "compare", "ocr_tokens", "rescore",
        "show_wrong", "plan"}


def sha256(*files):
    """Of the files' bytes, one after the other (16 hex digits)."""
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: sha)
    return sha.hexdigest()[:16]


def digest_of(model):
    """sha256 over a model's weights: a file, or a folder's safetensors or pickles; a name on the
    hub stands for itself."""
    folder = Path(model)
    files = [folder] if folder.is_file() else \
        sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return sha256(*files) if folder.exists() else str(model)


def file_digest(model):
    """The identity of a parent, read by the main process alone: 32 GB take half a minute."""
    return from_main(lambda: digest_of(model))


def parents(args):
    """What stage 1, or a re-paired model, is made of, for config.json: {"encoder_digest": …, …}."""
    return {f"{what}_digest": "+".join(file_digest(encoders.resolve(part)) for part in parts) for
            what, parts in (("encoder", encoders.parts_of(args.encoder)), ("llm", [args.llm]))}


def write_whole(path, write):
    """The main process writes a file aside, then renames it: nobody ever sees half of it."""
    if is_main():
        aside = Path(f"{path}.tmp")
        write(aside)
        os.replace(aside, path)


def write_text(path, text):
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def tensors_digest(module):
    """sha256 over a module's tensors: equal digests mean an equal start (16 hex digits)."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def sync(*paths):
    """fsync files and folders, so that a rename means "on disk"."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def relative_change(tensors, group):
    """‖w − w₀‖ / ‖w₀‖ of every group of tensors, norms in fp64: ({group: change}, names of those
    that are bit-equal). tensors: (name, w, w₀), …; group: name → its group."""
    squares, still = {}, []
    for name, new, old in tensors:
        change, size = squares.get(group(name), (0.0, 0.0))
        squares[group(name)] = (change + (new - old).norm(dtype=torch.float64).item() ** 2,
                                size + old.norm(dtype=torch.float64).item() ** 2)
        if torch.equal(new, old):
            still.append(name)
    return {g: (c / s) ** 0.5 if s else 0.0 for g, (c, s) in squares.items()}, still


def difference(folder, arguments, facts={}):
    """The first argument or fact that differs from those under which the run in this folder was
    begun, or a parent trained anew since, as a line of refusal; None. By the main process alone."""
    try:
        old = encoders.read_json(folder / "config.json", "arguments",
                                 remedy="; --overwrite starts anew")
    except SystemExit as e:
        return e.code
    pairs = [(f"--{k.replace('_', '-')}", old["arguments"][k], v)
             for k, v in json.loads(json.dumps(arguments, default=str)).items()
             if k not in FREE and k in old["arguments"]]
    pairs += [(k, old[k], v) for k, v in facts.items() if k in old]
    parent = folder.parent / "pretrain" / "final"
    if "parent_digest" in old and "parent_digest" not in facts and parent.exists():
        pairs += [("parent_digest", old["parent_digest"], digest_of(parent))]
    for name, before, now in pairs:
        if before != now:
            return (f"error: {folder} was begun with {name} {before}, now {now}; go on as before, "
                    f"name another --run-dir, or --overwrite")


def finished(folder, args, facts={}):
    """Is final/ there, made under these arguments and facts? raises SystemExit if under others."""
    def look():
        if not (folder / "final" / "config.json").exists():
            return False, None
        return True, difference(folder, vars(args), facts)
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
            json.loads(path.read_text()).get("anew_by") == torchrun_id()
    return args.overwrite and not from_main(begun)


class Run:
    """config.json, metrics.jsonl, timing.jsonl, checkpoints/, final/ of one stage.

    Opening it decides what happens: a finished stage says so and exits 0, an interrupted one goes
    on from its newest whole checkpoint, --overwrite starts anew.
    """

    def __init__(self, folder, args, facts={}):
        self.folder, self.args, self.stopping = Path(folder), args, False
        if world()[1] % args.replicas:
            raise SystemExit(f"error: {world()[1]} processes cannot hold --replicas "
                             f"{args.replicas}; take a number that divides them")
        self.anew = starts_anew(self.folder, args)
        if not self.anew and finished(self.folder, args, facts):
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

    def heed_signals(self):
        """From here on SIGTERM and Ctrl-C let the step end and save it. Before, there is nothing to
        save but the reference log-probs of DPO, and they end the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        """Finish the step, save, exit; a second signal ends at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def describe(self, facts):
        """Write config.json, or compare it: a run of other arguments, data or parent is refused.

        What --overwrite gives up goes only now, when arguments, model and data have been read.
        """
        import transformers
        config = {"stage": self.args.stage, "arguments": vars(self.args), "versions": {
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
                                                   {k: config[k] for k in facts}))
            if refusal:
                raise SystemExit(refusal)
        barrier()
        if is_main():
            for old in self.folder.iterdir() if self.anew else ():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            write_json(path, config)
            if not self.start:      # killed before its first checkpoint: its lines would double
                for name in ("metrics.jsonl", "timing.jsonl"):
                    (self.folder / name).unlink(missing_ok=True)
        barrier()              # nobody looks for files that are about to go
        for key, value in facts.items():
            print0(f"  {key}: {value}")

    def resume(self, model, optimizer=()):
        """Load the newest whole checkpoint, resharding as needed (without an optimizer: weights
        alone); truncate the metrics to it."""
        reshard(model)
        folder = self.folder / "checkpoints" / f"step-{self.start}"
        remedy = f"; delete {folder}: the run then goes on from the checkpoint before it, if any"
        position = encoders.read_json(folder / "position.json", "lengths", remedy=remedy)
        logging.disable(logging.CRITICAL)      # torch logs a traceback a process; ours is one line
        try:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
        except dcp.api.CheckpointException as e:       # on every process, whoever met it
            cause = encoders.first_line(next(iter(e.failures.values()))[0])
            raise SystemExit(f"error: cannot read {folder}: {cause}{remedy}")
        logging.disable(logging.NOTSET)
        if is_main():
            for name, length in position["lengths"].items():
                if (log := self.folder / name).exists():
                    os.truncate(log, min(length, log.stat().st_size))
        print0(f"  continuing after {self.start} steps, from {folder}")

    def log(self, metrics, timing=None):
        """One line in metrics.jsonl (deterministic fields only), one in timing.jsonl; every
        --log-every steps one for people."""
        if "loss" in metrics and metrics["step"] % self.args.log_every == 0:
            words = [f"{k} {metrics[k]:.4g}" for k in ("loss", "margin", "accuracy")
                     if k in metrics] + [f"|g| {k} {v:.3g}" for k, v in
                                         metrics["grad_norm"].items()]
            print0(f"  step {metrics['step']}: {', '.join(words)}; {timing['tokens_per_s']:.0f} "
                   f"tokens/s, peak {timing['peak_bytes'] / 2 ** 30:.2f} GiB")
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
            print0(f"asked to stop: the same command "
                   f"{'without --overwrite ' * self.args.overwrite}goes on from there")
            stop()
            raise SystemExit(STOPPED)

    def save(self, done, model, optimizer):
        """Shards, position and metric lengths: written aside, fsynced, renamed; the last K stay."""
        folder, began = self.folder / "checkpoints" / f"step-{done}", time.perf_counter()
        aside = folder.with_name(f"writing-{done}")
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        reshard(model)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        try:
            dcp.save(state, checkpoint_id=aside)
        except dcp.api.CheckpointException as e:       # raised on every process alike
            reason = encoders.first_line(next(iter(e.failures.values()))[0])
            raise SystemExit(f"error: step {done} could not be saved to {aside} ({reason}); is the "
                             f"disk full? What was saved before is whole, the same command "
                             f"{'without --overwrite ' * self.args.overwrite}goes on from there")
        if is_main():
            lengths = {n: (self.folder / n).stat().st_size for n in
                       ("metrics.jsonl", "timing.jsonl") if (self.folder / n).exists()}
            write_json(aside / "position.json", {"step": done, "lengths": lengths})
            sync(*map(self.folder.joinpath, lengths), *aside.rglob("*"), aside)
            os.replace(aside, folder)
            for old in self.saved()[:-self.args.keep]:
                shutil.rmtree(old, ignore_errors=True)
        barrier()
        print0(f"  saved after {done} steps, in {time.perf_counter() - began:.2f} s")

    def card(self, folder):
        """README.md of final/: where this model comes from, and what training moved."""
        config, parent = self.config, self.folder.parent / "pretrain" / "final"
        rows = {"stage": config["stage"], "encoder": config["arguments"]["encoder"],
                "LLM": config["arguments"]["llm"]}
        rows |= {k.replace("_", " "): v for k, v in config.items() if k.endswith("_digest")}
        rows |= {"data": config.get("data"), "versions": config["versions"]}
        if "parent_digest" in config:
            new, old = folders.stored(folder), folders.stored(parent)
            parts, still = relative_change(((k, file.get_tensor(k), old[k].get_tensor(k))
                                            for k, file in new.items()),
                                           lambda name: name.split(".")[0])
            rows["moved since stage 1"] = ", ".join(f"{k} {v:.2e}" for k, v in parts.items()) + \
                " (‖w − w₀‖ / ‖w₀‖)"
            rows["bit-equal to stage 1"] = ", ".join(still) or "no tensor"
        elif config["stage"] == "pretrain":
            rows["parents"] = "the published encoder and LLM above; how far every block of the " \
                "encoder moved: `python extract.py --stage pretrain`"
        rows["arguments"] = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in
                                     config["arguments"].items() if k not in FREE | {"stage"}
                                     and v is not None and v is not False)
        return ("---\ntags: [vision, pivot]\nlibrary_name: transformers\n---\n"
                f"# {rows['encoder']} + {rows['LLM']}, after {config['stage']}\n\n"
                "An encoder, a projector and an LLM in the layout of LLaVA; the same folder is "
                "what the next stage and `extract.py` read. Images: a bicubic squash, with the "
                "saved processor's mean and standard deviation (`backend=\"pil\"`).\n\n"
                "| provenance | |\n|---|---|\n"
                + "".join(f"| {k} | {v} |\n" for k, v in rows.items()))

    def finish(self, model, tokenizer):
        """Write final/, the folder transformers opens; drop the checkpoints, which it replaces."""
        reshard(model)
        aside = self.folder / "final.tmp"
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        barrier()
        folders.save_mllm(model, tokenizer, aside, is_main())
        if is_main():
            (aside / "README.md").write_text(self.card(aside), encoding="utf-8")
            sync(*aside.rglob("*"), aside)
            os.replace(aside, self.folder / "final")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        print0(f"wrote {self.folder}/final")
        barrier()
