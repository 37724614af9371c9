"""Does RL see better than SFT? The paper's controlled comparison at toy scale, with seeds.

    python study.py --plan                  # what it would run, and how long that takes; runs nothing
    python study.py                         # everything, 5 seeds, two runs at a time (hours)
    python study.py --parts lr vqa eye      # the most important parts first; later the others
    python study.py --quick --seeds 1       # every command once, tiny sizes: does it all work?

A seed is a world of its own: other images, questions, pairs and test sets, another order, another
projector; toy-vit and toy-lm are the same. Of each seed there is one stage-1 model; SFT and DPO go
on from it with the same items in the same order for the same number of passes (equal data digests
are checked). Each method's learning rate is the best of one grid on validation images.

The pairs are hard for this very model: it answers a pool of questions, and what it gets wrong
becomes the rejected answer (`sampled`, as in MMPR). The controls change the rejected text alone:
`swapped` (the toy's: one attribute changed at random), `shuffled` (the right answer to another
question), or the picture alone, `images` (another item's); `easy` are random items of the pool.

Everything goes through the stages' public commands. Writes OUT/<part>/<run>.json, a file a run,
whole or not at all: stopped at any moment and started again, it goes on; what is there is never
done again. Then study_report.py writes the table, the figures and the README's section.
OUT/README.md of the full study, results/README.md, fixes beforehand what counts as a finding.
"""
import argparse
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

PARTS = {"lr": "learning rates, on validation images (paper: App. B.2)",
         "vqa": "the trained models on the benchmarks, by group (section 3)",
         "eye": "linear probe, segmentation, alignment of the detached encoder; heat (section 4)",
         "repair": "re-paired with a new LLM: original, SFT's, DPO's (section 6)",
         "controls": "other rejected answers, swapped images, easy items (not in the paper)",
         "size": "three smaller sets of pairs and a larger one (section 3)",
         "head": "a larger language model to train the encoder through (section 4)",
         "encoder": "a larger encoder (sections 3 and 6)",
         "pretrained": "encoders pretrained with class labels, or by filling masked patches (section 6)"}
KINDS = ("sampled", "swapped", "shuffled", "images", "easy")
# What the variants put in place of toy-vit and toy-lm: (encoder, LLM), {}: the folder of weights.
VARIANTS = {"head": {"head-l": ("toy-vit", "{}/toy-lm-l")},
            "encoder": {"eye-l": ("{}/toy-vit-l", "toy-lm")},
            "pretrained": {"supervised": ("{}/toy-vit-supervised", "toy-lm"),
                           "masked": ("{}/toy-vit-masked", "toy-lm")}}
# The plan. Fixed before any test split was read; results/README.md says why each is as it is.
FULL = dict(
    world=dict(captions=3200, instruct=10000, repair=2000, preferences=24000, heldout=600,
               bench=600, imagenet_train=60, imagenet_val=50, ade20k_training=600,
               ade20k_validation=400, align=2048),
    validation=300, rates=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3], tuning_seeds=2, pairs=1920, passes=3,
    sizes=[288, 480, 960, 3840], heat=300, stage={}, weights={})
QUICK = dict(
    world=dict(captions=160, instruct=160, repair=64, preferences=900, heldout=60, bench=36,
               imagenet_train=10, imagenet_val=4, ade20k_training=32, ade20k_validation=16,
               align=64),
    validation=24, rates=[1e-4, 1e-3], tuning_seeds=1, pairs=64, passes=1, sizes=[32, 96],
    heat=12, stage={"--projector-epochs": 1}, weights={"--steps": 20})
# Seconds of each command on one thread of an AMD EPYC, alone on its core; of --quick, START.
COST = {"world": 60, "stage1": 330, "pool": 400, "sft": 75, "dpo": 150, "vqa": 45, "val": 25,
        "repair": 140, "linear": 12, "seg": 35, "align": 25, "heat": 30, "extract": 7,
        "toy-vit-l": 1500, "toy-lm-l": 7200, "toy-vit-supervised": 600, "toy-vit-masked": 600}
START = 9


class Task(NamedTuple):
    """One run: `steps()` gives its commands in order, `gather()` the values to keep (None where
    the files themselves are what is wanted). Done when the file `done` is there."""
    name: str
    part: str | None            # None: others need what it makes, it has no result of its own
    done: Path
    needs: list
    cost: list                  # keys of COST
    steps: object
    gather: object = None


class Study:
    """Folders, sizes and all tasks of one study, in the order of their importance."""

    def __init__(self, plan, seeds, work, out):
        self.plan, self.seeds, self.work, self.out = plan, seeds, Path(work), Path(out)
        self.tasks = {}
        for seed in range(seeds):
            self.prepare(seed)
        for part in PARTS:
            for seed in range(seeds):
                getattr(self, part)(seed)

    # ------------------------------------------------------------------------------- folders

    def data(self, seed):
        return self.work / "data" / f"seed-{seed}"

    def run(self, seed, name):
        return self.work / "runs" / f"seed-{seed}" / name

    def add(self, name, part, done, needs, cost, steps, gather=None):
        self.tasks[name] = Task(name, part, done, needs, cost, steps, gather)
        return name

    def result(self, part, name, needs, cost, steps, gather):
        return self.add(f"{part}/{name}", part, self.out / part / f"{name}.json", needs, cost,
                        steps, gather)

    # ----------------------------------------------------------- what results are made from

    def prepare(self, seed):
        """World, stage-1 model and hard pairs of a seed."""
        data, pool = self.data(seed), self.run(seed, "pool")
        self.add(f"seed-{seed}/world", None, data / "world.json", [], ["world"], lambda: [
            [sys.executable, "-c", f"import study; study.draw({str(data)!r}, {seed}, "
             f"{self.plan['world']!r}, {self.plan['validation']})"]])
        self.stage1(seed, "stage1", "toy-vit", "toy-lm", [])

        def ask():
            shutil.rmtree(pool, ignore_errors=True)
            link(pool / "final", self.run(seed, "stage1") / "pretrain" / "final")
            write_pool(data)
            return [evaluate(pool / "final", data, "--bench", data / "pool")]
        self.add(f"seed-{seed}/pairs", None, data / "preferences" / "kinds.json",
                 [f"seed-{seed}/world", f"seed-{seed}/stage1"], ["pool"], ask,
                 lambda: hard_pairs(data, pool / "bench", seed, self.plan))

    def stage1(self, seed, name, eye, llm, needs):
        """A stage-1 model and its encoder, in the run folder `name`; → the task's name."""
        run = self.run(seed, name)
        return self.add(
            f"seed-{seed}/{name}", None, run / "pretrain" / "encoder" / "config.json",
            [f"seed-{seed}/world", *needs], ["stage1", "extract"], lambda: [
                ["pretrain.py", "--run", run, "--encoder", eye, "--llm", llm, "--data",
                 self.data(seed), "--seed", seed, "--workers", 0, *flat(self.plan["stage"])],
                extract(run, "pretrain")], lambda: facts_of(run / "pretrain"))

    def trained(self, seed, name, method, kind="sampled", n=None, rate=None, base="stage1"):
        """A run folder `name` that goes on from `base` with one method, and its encoder; → the
        task's name."""
        folder = self.run(seed, name)

        def steps():
            if not (folder / "pretrain").exists():
                link(folder / "pretrain", self.run(seed, base) / "pretrain")
            return [[f"train_{method}.py", "--run", folder, "--preferences",
                     self.data(seed) / "preferences" / f"{kind}.jsonl", "--num-samples",
                     n or self.plan["pairs"], "--epochs", self.plan["passes"], "--lr",
                     rate or self.chosen()[method], "--seed", seed, "--workers", 0],
                    extract(folder, method)]
        return self.add(f"seed-{seed}/{name}/{method}", None,
                        folder / method / "encoder" / "config.json",
                        [f"seed-{seed}/{base}", f"seed-{seed}/pairs",
                         *([] if rate else ["lr/chosen"])], [method, "extract"], steps,
                        lambda: facts_of(folder / method))

    # ---------------------------------------------------------------------------- the parts

    def lr(self, seed):
        """Each rate of the grid, both methods, on validation images; then the choice."""
        if seed >= min(self.plan["tuning_seeds"], self.seeds):
            return
        val = ("--bench", self.data(seed) / "validation")
        before = self.run(seed, "validation") / "final"

        def start():
            link(before, self.run(seed, "stage1") / "pretrain" / "final")
            return [evaluate(before, self.data(seed), *val)]
        names = [self.result("lr", f"seed-{seed}-stage1", [f"seed-{seed}/stage1"], ["val"], start,
                             lambda: {"stage1": vqa_of(before)})]
        for rate in self.plan["rates"]:
            name = f"lr-{rate:g}"
            final = {m: self.run(seed, name) / m / "final" for m in ("sft", "dpo")}
            names.append(self.result(
                "lr", f"seed-{seed}-{rate:g}",
                [self.trained(seed, name, m, rate=rate) for m in final], ["val"] * 2,
                lambda final=final: [evaluate(f, self.data(seed), *val) for f in final.values()],
                lambda final=final: {m: {"rate": json.loads(
                    (f.parent / "config.json").read_text())["arguments"]["lr"], **vqa_of(f)}
                    for m, f in final.items()}))
        names += self.tasks["lr/chosen"].needs if seed else []
        self.result("lr", "chosen", names, [], list, self.choose)

    def choose(self):
        """The rate of the best validation average over the tuning seeds; of equals the lowest."""
        tuning = range(min(self.plan["tuning_seeds"], self.seeds))
        scores = {m: {rate: sum(self.read("lr", f"seed-{s}-{rate:g}")["values"][m]["vqa average"]
                                for s in tuning) / len(tuning)
                      for rate in self.plan["rates"]} for m in ("sft", "dpo")}
        return {m: {"rate": max(by_rate, key=by_rate.get), "vqa average": max(by_rate.values())}
                for m, by_rate in scores.items()}

    def chosen(self):
        return {m: v["rate"] for m, v in self.read("lr", "chosen")["values"].items()}

    def read(self, part, name):
        return json.loads((self.out / part / f"{name}.json").read_text())

    def vqa(self, seed):
        """Test benchmarks of the stage-1 model and of both methods'."""
        both = [self.trained(seed, "main", m) for m in ("sft", "dpo")]
        finals = self.finals(seed, "main")

        def gather():
            configs = [json.loads((finals[m].parent / "config.json").read_text()) for m in
                       ("sft", "dpo")]
            digests = {c["data_digest"] for c in configs}
            if len(digests) != 1:
                raise SystemExit(f"error: seed {seed}: SFT and DPO saw other items: {digests}")
            held = [json.loads(line) for line in
                    (finals["dpo"].parent / "metrics.jsonl").read_text().splitlines()]
            values = {name: vqa_of(final) for name, final in finals.items()}
            values["dpo"]["held-out pairs"] = [100 * x["heldout_accuracy"] for x in held if
                                               "heldout_accuracy" in x][-1]
            return values
        self.result("vqa", f"seed-{seed}", both, ["vqa"] * 3,
                    lambda: [evaluate(f, self.data(seed)) for f in finals.values()], gather)

    def eye(self, seed):
        """Probes of the detached encoders, and where each loss looks at the stage-1 model."""
        steps, gather = self.probes(seed, "main", "toy-vit")
        out = self.run(seed, "main") / "probes" / "gradcam"

        def heat():
            share = json.loads((out / "results.json").read_text())["share_inside"]
            return {key: {"heat": 100 * share[name]["mean"]} for key, name in
                    (("sft", "SFT"), ("dpo", "DPO"), ("chance", "chance"))}
        self.result("eye", f"seed-{seed}",
                    [self.trained(seed, "main", m) for m in ("sft", "dpo")],
                    ["linear", "seg", "align"] * 4 + ["heat"],
                    lambda: [*steps(), ["gradcam.py", "--run", self.run(seed, "main"), "--data",
                                        self.data(seed), "--num-samples", self.plan["heat"]]],
                    lambda: merged(gather(), heat()))

    def repair(self, seed):
        """Frozen encoders under a new LLM and a new projector, all alike."""
        steps, gather = self.repairs(seed, "main", "toy-vit")
        self.result("repair", f"seed-{seed}",
                    [self.trained(seed, "main", m) for m in ("sft", "dpo")],
                    ["repair"] * 3, steps, gather)

    def controls(self, seed):
        """DPO with other rejected answers or images on the same items; both methods on easy ones."""
        for kind in KINDS[1:]:
            methods = ("sft", "dpo") if kind == "easy" else ("dpo",)
            needs = [self.trained(seed, kind, m, kind=kind) for m in methods]
            self.judged("controls", seed, kind, needs, methods)

    def size(self, seed):
        """The same with fewer and with more pairs; the middle size is the main comparison."""
        for n in self.plan["sizes"]:
            final = {m: self.run(seed, f"size-{n}") / m / "final" for m in ("sft", "dpo")}
            self.result("size", f"seed-{seed}-{n}",
                        [self.trained(seed, f"size-{n}", m, n=n) for m in final], ["vqa"] * 2,
                        lambda final=final: [evaluate(f, self.data(seed)) for f in final.values()],
                        lambda final=final: {m: vqa_of(f) for m, f in final.items()})

    def variant(self, part, seed):
        """Stage 1, SFT and DPO with another encoder or LLM, on the pairs and with the rates of the
        main comparison; then every judge. Re-paired with toy-lm in any case."""
        weights = self.work / "weights"
        for name, pattern in VARIANTS[part].items():
            eye, llm = (p.format(weights) for p in pattern)
            needs = [self.weights(Path(p).name) for p in (eye, llm) if "/" in p]
            self.stage1(seed, name, eye, llm, needs)
            both = [self.trained(seed, name, m, base=name) for m in ("sft", "dpo")]
            self.judged(part, seed, name, both, ("sft", "dpo"), eye if part != "head" else None,
                        stage1=True)

    def head(self, seed):
        """The eye trained through a larger language model."""
        self.variant("head", seed)

    def encoder(self, seed):
        """A larger eye: is the smaller one, trained by DPO, better than the larger untrained one?"""
        self.variant("encoder", seed)

    def pretrained(self, seed):
        """Eyes that learned to see another way."""
        self.variant("pretrained", seed)

    def weights(self, name):
        """Made once, for all seeds: a size up by toy.py, other pretraining by study_models.py."""
        out = self.work / "weights"
        script = ["toy.py", "pretrain", "--models"] if name.endswith("-l") else \
            ["study_models.py"]
        return self.add(f"weights/{name}", None, out / name / "config.json", [], [name], lambda: [
            [*script, name, "--out", out, *flat(self.plan["weights"])]])

    # --------------------------------------------------------------------------- the judges

    def finals(self, seed, name):
        return {stage: self.run(seed, name) / folder / "final" for stage, folder in
                (("stage1", "pretrain"), ("sft", "sft"), ("dpo", "dpo"))}

    def judged(self, part, seed, name, needs, methods, original=None, stage1=False):
        """A result of all judges but alignment and heat: of `methods`, and of the encoder as it
        was, if it is named."""
        finals = self.finals(seed, name)
        finals = {k: f for k, f in finals.items() if k in methods or stage1}
        eyes, probed = self.probes(seed, name, original, methods, align=False)
        repair, repaired = self.repairs(seed, name, original, methods)
        m = len(methods) + bool(original)
        self.result(part, f"seed-{seed}-{name}", needs,
                    ["vqa"] * len(finals) + ["linear", "seg", "repair"] * m,
                    lambda: [*(evaluate(f, self.data(seed)) for f in finals.values()), *eyes(),
                             *repair()],
                    lambda: merged({k: vqa_of(f) for k, f in finals.items()}, probed(),
                                   repaired()))

    def probes(self, seed, name, original, methods=("sft", "dpo"), align=True):
        """(commands, values) of the frozen features of a run folder's encoders."""
        run, data = self.run(seed, name), self.data(seed)
        stages = (["pretrain"] if align else []) + list(methods)
        eyes = {**({"original": original} if original else {}),
                **{"stage1" if s == "pretrain" else s: run / s / "encoder" for s in stages}}
        which = {"linear": "imagenet", "seg": "ade20k", **({"align": "align"} if align else {})}

        def steps():
            return [[f"probe_{k}.py", "--encoder", *eyes.values(), "--data", data / where,
                     "--out", run / "probes" / k,
                     *(["--llm", "toy-lm"] if k == "align" else ["--workers", 0])]
                    for k, where in which.items()]

        def gather():
            found = {k: json.loads((run / "probes" / k / "results.json").read_text())
                     for k in which}
            values = {}
            for i, eye in enumerate(eyes):           # the probes keep the order they are given
                values[eye] = {
                    "linear": 100 * list(found["linear"]["encoders"].values())[i]["top1"]["mean"],
                    "seg": 100 * mean(list(found["seg"]["encoders"].values())[i]["recall"])}
                if align:
                    values[eye]["align"] = 100 * found["align"]["scores"][i]["mean"]
            return values
        return steps, gather

    def repairs(self, seed, name, original, methods=("sft", "dpo")):
        """(commands, values) of a run folder's encoders re-paired with toy-lm."""
        run, data = self.run(seed, name), self.data(seed)
        eyes = {**({"original": original} if original else {}),
                **{m: run / m / "encoder" for m in methods}}

        def steps():
            return [["repair_eval.py", "--encoder", eye, "--llm", "toy-lm", "--data", data, "--run",
                     run, "--seed", seed, "--workers", 0, "--show-wrong", 0,
                     *flat(self.plan["stage"])] for eye in eyes.values()]

        def gather():
            where = [Path(eye).parent.name if Path(eye).name == "encoder" else Path(eye).name
                     for eye in eyes.values()]
            return {k: vqa_of(run / "repair" / w / "final", "repair") for k, w in zip(eyes, where)}
        return steps, gather


# ----------------------------------------------------------------------------- commands, values

def flat(options):
    return [x for pair in options.items() for x in pair]


def evaluate(final, data, *more):
    """The command that answers and scores DATA/bench (or --bench) with the model in `final`."""
    return ["repair_eval.py", "--mllm", final, "--llm", "toy-lm", "--data", data, "--workers", 0,
            "--show-wrong", 0, *more]


def extract(run, stage):
    return ["extract.py", "--run", run, "--stage", stage, "--overwrite"]


def link(path, target):
    """path → target, relative, so that the whole study can be moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target, path.parent))


def vqa_of(final, prefix="vqa"):
    """{"vqa General": percent, …, "vqa average": percent} of what was scored beside `final`."""
    results = json.loads((final.parent / "bench" / "results.json").read_text())
    return {f"{prefix} {group}": score for group, score in
            [*results["groups"].items(), ("average", results["average"])]}


def facts_of(stage):
    """What a training stage says of itself: what it consumed, and the reward margin at its end."""
    config = json.loads((stage / "config.json").read_text())
    log = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    last = [x for x in log if "loss" in x][-1]
    return {"data_digest": config["data_digest"], "data": config["data"], "steps": last["step"] + 1,
            "loss": last["loss"], **{k: x[k] for x in log[-1:] for k in x if "heldout" in k}}


def mean(values):
    return sum(values) / len(values)


def merged(*values):
    """{condition: {measure: value}} of several judges in one."""
    out = {}
    for one in values:
        for condition, measures in one.items():
            out.setdefault(condition, {}).update(measures)
    return out


# ------------------------------------------------------------------------- worlds and hard pairs

def draw(out, seed, world, validation):
    """The world of a seed, and beside its test benchmarks others of other images to choose learning
    rates on: `validation` questions a group, drawn with another seed."""
    import toy
    aside = Path(f"{out}.drawing")
    shutil.rmtree(aside, ignore_errors=True)
    toy.draw_world(aside, seed, 1.0, world)
    other = toy.World(aside / "other", seed + 1000, 1.0)
    with other.bar:
        for name in toy.BENCH:
            other.bench(name, validation)
    os.replace(aside / "other" / "bench", aside / "validation")
    shutil.rmtree(aside / "other")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)


def pool_of(data):
    """The preference pairs of a world, in the order of its meta.json: [record, …]."""
    folder = data / "preferences"
    sets = json.loads((folder / "meta.json").read_text()).values()
    return [json.loads(line) for s in sets for line in
            (folder / s["annotation"]).read_text().splitlines()]


def write_pool(data):
    """The pairs' questions as a benchmark, DATA/pool/ToyGeneral.tsv, for the model to answer."""
    folder = data / "pool"
    folder.mkdir(exist_ok=True)
    link(folder / "images", data / "preferences" / "images")
    rows = ["index\timage_path\tquestion\tanswer"]
    rows += ["\t".join((r["id"], r["image"], r["question"].removeprefix("<image>\n"), r["chosen"]))
             for r in pool_of(data)]
    (folder / "ToyGeneral.tsv").write_text("\n".join(rows) + "\n")


def wrong(said, right):
    """Is this answer of the model's fit to be rejected: other words than the right one, but as many
    (else DPO could learn the form)? An answer that differs in case or full stop alone is right."""
    from score import plain
    said, right = plain(said), plain(right)
    return said != right and len(said.split()) == len(right.split())


def kinds_of(pool, said, seed, n):
    """Pairs of every kind; pool: [record, …], said: {id: the model's answer}, n: so many easy ones.

    `sampled`, `swapped`, `shuffled` and `images` hold the same items in the same order: those that
    the model got wrong. → {kind: [record, …]}.
    """
    from score import plain
    rng = random.Random(f"{seed}/kinds")
    items = [r for r in pool if wrong(said[r["id"]], r["chosen"])]
    rng.shuffle(items)
    out = {"swapped": items, "sampled": [{**r, "rejected": said[r["id"]].strip()} for r in items]}

    def others(i, differ):
        """The first item after the i-th, in a circle, that differs."""
        return next((o for o in items[i + 1:] + items[:i] if differ(o)), None)
    out["shuffled"] = [{**r, "rejected": o["chosen"]} for i, r in enumerate(items) if
                       (o := others(i, lambda o: plain(o["chosen"]) != plain(r["chosen"])))]
    out["images"] = [{**r, "image": o["image"]} for i, r in enumerate(out["sampled"]) if
                     (o := others(i, lambda o: o["image"] != r["image"]))]
    out["easy"] = rng.sample(pool, min(n, len(pool)))
    return {kind: out[kind] for kind in KINDS}


def hard_pairs(data, bench, seed, plan):
    """Writes DATA/preferences/<kind>.jsonl from the answers in `bench`, and kinds.json with counts:
    the file that says that all are there. Pictures that no pair shows are deleted."""
    said = {}
    for file in sorted(bench.glob("ToyGeneral.*.jsonl")):
        for line in file.read_text().splitlines():
            item = json.loads(line)
            said[item["index"]] = item["prediction"]
    pool = pool_of(data)
    most = max(plan["pairs"], *plan["sizes"])
    kinds, folder = kinds_of(pool, said, seed, most), data / "preferences"
    if len(kinds["sampled"]) < plan["pairs"]:
        raise SystemExit(f"error: seed {seed}: the model got {len(kinds['sampled'])} of {len(pool)} "
                         f"questions usably wrong, {plan['pairs']} are needed")
    for kind, records in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    counts = {"pool": len(pool), **{k: len(v) for k, v in kinds.items()}}
    write(folder / "kinds.json", counts)
    shown = {r["image"] for records in kinds.values() for r in records}
    for image in {r["image"] for r in pool} - shown:
        for where in ("images", "masks"):
            (folder / where / image).unlink(missing_ok=True)
    return {"counts": counts}


def write(path, value):
    """JSON, written aside and renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


# ---------------------------------------------------------------------------------- the runs

class Failed(Exception):
    """A command that did not end well: what it said last."""


def execute(task, out, log, live, plan):
    """Run a task's commands, one after the other, on one thread; write its result, or, of what only
    others need, OUT/made/: what it cost and what it was made of. `live`: the processes that run now,
    for a stop to end them. → seconds it took."""
    start, commands = time.time(), [[str(x) for x in c] for c in task.steps()]
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread, whatever the machine: with another number sums are rounded otherwise.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    for command in commands:
        if live.stopping:
            raise Failed("stopped")
        words = command if command[0] == sys.executable else [sys.executable, *command]
        with open(log, "a") as said:
            said.write(f"\n$ {' '.join(command)}\n")
            said.flush()
            process = subprocess.Popen(words, stdout=said, stderr=said, env=env)
            live.add(process)
            code = process.wait()
            live.discard(process)
        if code:
            said = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
            raise Failed("stopped" if live.stopping else
                         next((x for x in reversed(said[-20:]) if "rror" in x), said[-1]))
    values, seconds = task.gather() if task.gather else None, time.time() - start
    made = out / "made" / (task.name.replace("/", "-") + ".json")
    write(task.done if task.part else made, {
        "run": task.name, "plan": digest(plan), "versions": versions(),
        "commands": [" ".join(c) for c in commands], "values": values,
        "seconds": round(seconds, 1)})
    if not task.done.exists():
        raise Failed(f"{task.done} was not made; see {log}")
    return seconds


class Live(set):
    """Processes that run now, and whether they were asked to stop."""
    stopping = False

    def stop(self):
        self.stopping = True
        for process in list(self):
            process.terminate()           # a stage saves first; the same command goes on there


def digest(plan):
    import hashlib
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]


def versions():
    from importlib.metadata import version
    return {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}


def pending(study, parts):
    """Tasks to run for these parts, what others need before them: [Task, …]."""
    queue = {}

    def visit(name):
        task = study.tasks[name]
        if name not in queue and not task.done.exists():
            for need in task.needs:
                visit(need)
            queue[name] = task
    for task in study.tasks.values():
        if task.part in parts:
            visit(task.name)
    return list(queue.values())


def seconds_of(task, quick=False):
    """Estimate of a task on one thread. A quick one spends its time on starting."""
    return sum(START if quick else COST[c] for c in task.cost)


def clock(seconds):
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_plan(study, parts, jobs, quick):
    """What is still to be run and what it costs, part by part; what parts share is counted where
    it comes first."""
    seen, total = set(), 0
    print(f"{study.seeds} seeds, {jobs} runs at a time, one thread each; estimates of one AMD EPYC "
          f"core a run\n{'part':<12}{'runs':>6}{'to do':>7}{'time':>10}  what")
    for part in parts:
        todo = [t for t in pending(study, [part]) if t.name not in seen]
        seen |= {t.name for t in todo}
        cost = sum(seconds_of(t, quick) for t in todo) / jobs
        runs = [t for t in study.tasks.values() if t.part == part]
        total += cost
        print(f"{part:<12}{len(runs):>6}{sum(t.part == part for t in todo):>7}{clock(cost):>10}  "
              f"{PARTS[part]}")
    print(f"{'in all':<25}{clock(total):>10}")


def go(study, parts, jobs, quick):
    """Run all that is pending; → names of the tasks that failed."""
    queue, failed, live, spent, planned = pending(study, parts), {}, Live(), 0.0, 0.0
    count, done = len(queue), 0
    running, start = {}, time.time()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while queue or running:
                for task in list(queue):
                    lost = [n for n in task.needs if n in failed]
                    if lost:
                        queue.remove(task)
                        failed[task.name] = f"needs {lost[0]}"
                    elif len(running) < jobs and all(study.tasks[n].done.exists()
                                                     for n in task.needs):
                        queue.remove(task)
                        log = study.work / "logs" / (task.name.replace("/", "-") + ".log")
                        running[pool.submit(execute, task, study.out, log, live,
                                            study.plan)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    done += 1
                    try:
                        spent += future.result()
                        planned += seconds_of(task, quick)
                    except (Failed, SystemExit, OSError, KeyError, ValueError) as e:
                        failed[task.name] = str(e)
                        print(f"FAILED {task.name}: {e}", flush=True)
                        continue
                    rest = sum(seconds_of(t, quick) for t in [*queue, *running.values()])
                    print(f"[{done}/{count}] {task.name}, {clock(time.time() - start)} gone, about "
                          f"{clock(rest * spent / max(planned, 1) / jobs)} left", flush=True)
        except KeyboardInterrupt:
            live.stop()
            raise SystemExit("stopped; the same command goes on from here")
    return failed


def refuse_other_plans(study):
    """Results of another plan are not mixed with these; raises SystemExit."""
    for path in sorted(study.out.glob("*/*.json")):
        found = json.loads(path.read_text()).get("plan")
        if found != digest(study.plan):
            raise SystemExit(f"error: {path} belongs to another plan ({found}, now "
                             f"{digest(study.plan)}); name another --out, or delete it")


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="; ".join(f"{k}: {v}" for k, v in PARTS.items()) + "; default: all, in this order")
    add("--seeds", type=int, default=5, help="how many (default 5, as registered)")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    add("--quick", action="store_true", help="tiny sizes, into results-quick/: says whether "
        "everything works, and nothing else")
    add("--out", help="folder of results (default results, or results-quick)")
    add("--work", help="folder of worlds, models and logs (default runs/study, or "
        "runs/study-quick)")
    add("--plan", action="store_true", help="print what is to be run and its cost; run nothing")
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name} must be at least 1")
    tail = "-quick" if args.quick else ""
    args.out, args.work = args.out or f"results{tail}", args.work or f"runs/study{tail}"
    return args


def main():
    args = get_args()
    study = Study(QUICK if args.quick else FULL, args.seeds, args.work, args.out)
    refuse_other_plans(study)
    parts = [p for p in PARTS if p in args.parts]
    show_plan(study, parts, args.jobs, args.quick)
    if args.plan:
        return
    study.work.mkdir(parents=True, exist_ok=True)
    with open(study.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another study runs in {study.work}")
        failed = go(study, parts, args.jobs, args.quick)
    subprocess.run([sys.executable, "study_report.py", "--out", study.out,
                    *(["--no-readme"] if args.quick else [])])
    if failed:
        raise SystemExit("error: " + "; ".join(f"{k}: {v}" for k, v in failed.items()))


if __name__ == "__main__":
    main()
