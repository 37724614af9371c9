"""The plan of the study: its sizes, and every run as a list of the stages' public commands.

`Study` lists all tasks in the order of their importance, each with what it needs, the file that
says it is done, its cost, its commands, and what is kept of what they wrote. driver.py runs them.
The sizes in FULL are registered in results/README.md; a result remembers a digest of them and of
this file's code.
"""
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from study.pairs import KINDS, hard_pairs, link, write_pool

PARTS = {"lr": "learning rates, on validation images (paper: App. B.2)",
         "vqa": "the trained models on the benchmarks, by group (section 3)",
         "eye": "linear probe, segmentation, alignment of the detached encoder; heat (section 4)",
         "repair": "re-paired with toy-lm as pretrained: original, SFT's, DPO's (section 6)",
         "controls": "other rejected answers, swapped images, easy items (not in the paper)",
         "size": "three smaller sets of pairs and a larger one (section 3)",
         "head": "a larger language model to train the encoder through (section 4)",
         "encoder": "a larger encoder (sections 3 and 6)",
         "pretrained": "encoders pretrained by class labels or masked patches (section 6)"}
# What the variants put in place of toy-vit and toy-lm: (encoder, LLM), {}: the folder of weights.
VARIANTS = {"head": {"head-l": ("toy-vit", "{}/toy-lm-l")},
            "encoder": {"eye-l": ("{}/toy-vit-l", "toy-lm")},
            "pretrained": {"supervised": ("{}/toy-vit-supervised", "toy-lm"),
                           "masked": ("{}/toy-vit-masked", "toy-lm")}}
# The sizes. Fixed before any test split was read; results/README.md says why each is as it is.
FULL = dict(
    seeds=5, first_world=100,    # seeds of the worlds: 100, 101, …; `make demo` has drawn world 0
    world=dict(captions=3200, instruct=2427, repair=2000, preferences=45000, heldout=600,
               bench=600, imagenet_train=60, imagenet_val=50, ade20k_training=600,
               ade20k_validation=400, align=2048),
    validation=600, rates=[3e-6, 1e-5, 3e-5, 1e-4, 3e-4], tuning_seeds=2, pairs=3200, passes=2,
    sizes=[480, 800, 1600, 6400], heat=300, stage={},
    weights={"toy-lm-l": {"--steps": 9000}})       # and 6,750; toy-lm had 12,000 and 6,000
QUICK = dict(
    seeds=5, first_world=200,
    world=dict(captions=160, instruct=160, repair=64, preferences=900, heldout=60, bench=36,
               imagenet_train=10, imagenet_val=4, ade20k_training=32, ade20k_validation=16,
               align=64),
    validation=24, rates=[1e-4, 1e-3], tuning_seeds=1, pairs=64, passes=1, sizes=[32, 96],
    heat=12, stage={"--projector-epochs": 1}, weights={
        name: {"--steps": 20} for name in ("toy-lm-l", "toy-vit-l", "toy-vit-supervised",
                                           "toy-vit-masked")})


class Task(NamedTuple):
    """One run: `steps()` gives its commands in order, `gather()` the values to keep (None where
    the files themselves are what is wanted). Done when the file `done` is there."""
    name: str
    part: str | None            # None: others need what it makes, it has no result of its own
    done: Path
    needs: list
    cost: dict                  # {key of driver.COST: how often}
    steps: object
    gather: object = None


class Study:
    """Folders, sizes and all tasks of one study, in the order of their importance."""

    def __init__(self, sizes, seeds, work, out):
        self.sizes, self.seeds, self.work, self.out = sizes, seeds, Path(work), Path(out)
        self.tasks = {}
        for seed in range(max(seeds, sizes["tuning_seeds"])):
            self.prepare(seed)
        for part in PARTS:       # rates are tuned on the same seeds, however many are asked for
            for seed in range(sizes["tuning_seeds"] if part == "lr" else seeds):
                getattr(self, part)(seed)

    # ------------------------------------------------------------------------------- folders

    def data(self, seed):
        """The folder of a seed's world."""
        return self.work / "data" / f"seed-{seed}"

    def run(self, seed, name):
        """A run folder of the stages."""
        return self.work / "runs" / f"seed-{seed}" / name

    def add(self, name, part, done, needs, cost, steps, gather=None):
        """A task; → its name."""
        self.tasks[name] = Task(name, part, done, needs, cost, steps, gather)
        return name

    def result(self, part, name, needs, cost, steps, gather):
        """A task that leaves OUT/part/name.json; → its name."""
        world = [f"seed-{name.split('-')[1]}/world"] if name.startswith("seed-") else []
        return self.add(f"{part}/{name}", part, self.out / part / f"{name}.json",
                        [*world, *needs], cost, steps, gather)

    # ----------------------------------------------------------- what results are made from

    def prepare(self, seed):
        """World, stage-1 model and hard pairs of a seed."""
        data, pool = self.data(seed), self.run(seed, "pool")
        drawing = f"from study import pairs; pairs.draw({str(data)!r}, " \
                  f"{self.sizes['first_world'] + seed}, {self.sizes['world']!r}, " \
                  f"{self.sizes['validation']})"
        self.add(f"seed-{seed}/world", None, data / "world.json", [], {"world": 1},
                 lambda: [[sys.executable, "-c", drawing]])
        self.stage1(seed, "stage1", "toy-vit", "toy-lm", [])

        def ask():
            shutil.rmtree(pool, ignore_errors=True)
            link(pool / "final", self.run(seed, "stage1") / "pretrain" / "final")
            write_pool(data)
            return [evaluate(pool / "final", data, "--bench", data / "pool", "--temperature", 1,
                             "--seed", seed)]
        self.add(f"seed-{seed}/pairs", None, data / "preferences" / "kinds.json",
                 [f"seed-{seed}/world", f"seed-{seed}/stage1"], {"pool": 1}, ask,
                 lambda: hard_pairs(data, pool / "bench-drawn", seed, self.sizes))

    def stage1(self, seed, name, encoder, llm, needs, times=1):
        """A stage-1 model and its encoder, in the run folder `name`, at `times` the usual cost;
        → the task's name."""
        run = self.run(seed, name)
        return self.add(
            f"seed-{seed}/{name}", None, run / "pretrain" / "encoder" / "config.json",
            [f"seed-{seed}/world", *needs], {"stage1": times, "extract": 1}, lambda: [
                ["pretrain.py", "--run", run, "--encoder", encoder, "--llm", llm, "--data",
                 self.data(seed), "--seed", seed, "--workers", 0, *flat(self.sizes["stage"])],
                extract(run, "pretrain")], lambda: facts_of(run / "pretrain"))

    def training(self, seed, name, method, kind="sampled", n=None, rate=None, base="stage1"):
        """The commands that take a run folder `name` on from `base` with one method, and detach its
        encoder. n: pairs; kind: which; rate: the chosen one if None."""
        folder = self.run(seed, name)
        if base != name:
            link(folder / "pretrain", self.run(seed, base) / "pretrain")
        return [[f"train_{method}.py", "--run", folder, "--preferences",
                 self.data(seed) / "preferences" / f"{kind}.jsonl", "--num-samples",
                 n or self.sizes["pairs"], "--epochs", self.sizes["passes"], "--lr",
                 rate or self.chosen()[method], "--seed", seed, "--workers", 0],
                extract(folder, method)]

    def trained(self, seed, name, method, kind="sampled", n=None, base="stage1", times=1):
        """The task of that training, with the chosen rate; → its name."""
        stage = self.run(seed, name) / method
        cost = {method: times * (n or self.sizes["pairs"]) / self.sizes["pairs"], "extract": 1}
        return self.add(f"seed-{seed}/{name}/{method}", None, stage / "encoder" / "config.json",
                        [f"seed-{seed}/{base}", f"seed-{seed}/pairs", "lr/chosen"], cost,
                        lambda: self.training(seed, name, method, kind, n, base=base),
                        lambda: facts_of(stage))

    # ---------------------------------------------------------------------------- the parts

    def lr(self, seed):
        """Each rate of the grid, both methods, on validation images; then the choice."""
        val = ("--bench", self.data(seed) / "validation")
        before = self.run(seed, "validation") / "final"

        def start():
            link(before, self.run(seed, "stage1") / "pretrain" / "final")
            return [evaluate(before, self.data(seed), *val)]
        names = [self.result("lr", f"seed-{seed}-stage1", [f"seed-{seed}/stage1"], {"val": 1},
                             start, lambda: {"stage1": vqa_of(before)})]
        for rate, method in [(r, m) for r in self.sizes["rates"] for m in ("sft", "dpo")]:
            name = f"lr-{rate:g}"
            final = self.run(seed, name) / method / "final"
            names.append(self.result(
                "lr", f"seed-{seed}-{method}-{rate:g}",
                [f"seed-{seed}/stage1", f"seed-{seed}/pairs"], {method: 1, "extract": 1, "val": 1},
                lambda name=name, method=method, rate=rate, final=final: [
                    *self.training(seed, name, method, rate=rate),
                    evaluate(final, self.data(seed), *val)],
                lambda method=method, final=final: {method: {**vqa_of(final), **facts_of(
                    final.parent)}}))
        if seed:
            names += self.tasks["lr/chosen"].needs
        self.result("lr", "chosen", names, {}, list, self.choose)

    def choose(self):
        """The rate of the best validation average over the tuning seeds; of equals the lowest.
        A run that diverged has no average: its rate is never chosen."""
        out, rates, tuning = {}, self.sizes["rates"], range(self.sizes["tuning_seeds"])
        found = {(s, m, rate): self.read("lr", f"seed-{s}-{m}-{rate:g}")["values"].get(m, {})
                 for s in tuning for m in ("sft", "dpo") for rate in rates}
        for s in tuning:
            agree(f"seed {s}: data_digest", {f"{m} {rate:g}": v["data_digest"] for (t, m, rate), v
                                             in found.items() if t == s and v})
        for m in ("sft", "dpo"):
            score = {rate: mean([found[s, m, rate].get("vqa average", float("-inf"))
                                 for s in tuning]) for rate in rates}
            if max(score.values()) == float("-inf"):
                raise SystemExit(f"error: {m} diverged at every rate of the grid")
            out[m] = {"rate": max(rates, key=score.get)}
        return out

    def chosen(self):
        """{method: learning rate}."""
        return {m: v["rate"] for m, v in self.read("lr", "chosen")["values"].items()}

    def read(self, part, name):
        """A result of an earlier run, as written."""
        return json.loads((self.out / part / f"{name}.json").read_text())

    def vqa(self, seed):
        """Test benchmarks of the stage-1 model and of both methods'."""
        both = [self.trained(seed, "main", m) for m in ("sft", "dpo")]
        finals = self.finals(seed, "main")

        def gather():
            values = scored(finals)
            held = [json.loads(line) for line in
                    (finals["dpo"].parent / "metrics.jsonl").read_text().splitlines()]
            values["dpo"]["held-out pairs"] = [100 * x["heldout_accuracy"] for x in held if
                                               "heldout_accuracy" in x][-1]
            return values
        self.result("vqa", f"seed-{seed}", both, {"vqa": 3},
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
                    {"linear": 4, "seg": 4, "align": 4, "heat": 1},
                    lambda: [*steps(), ["gradcam.py", "--run", self.run(seed, "main"), "--data",
                                        self.data(seed), "--num-samples", self.sizes["heat"]]],
                    lambda: merged(gather(), heat()))

    def repair(self, seed):
        """Frozen encoders under toy-lm as pretrained and a new projector, all alike."""
        steps, gather = self.repairs(seed, "main", "toy-vit", ("pretrain", "sft", "dpo"))
        self.result("repair", f"seed-{seed}",
                    [self.trained(seed, "main", m) for m in ("sft", "dpo")],
                    {"repair": 4}, steps, gather)

    def controls(self, seed):
        """DPO with other rejected answers or images on the same items; both on easy ones."""
        for kind in KINDS[1:]:
            methods = ("sft", "dpo") if kind == "easy" else ("dpo",)
            needs = [self.trained(seed, kind, m, kind=kind) for m in methods]
            self.judged("controls", seed, kind, needs, methods)

    def size(self, seed):
        """The same with fewer and with more pairs; the middle size is the main comparison."""
        for n in self.sizes["sizes"]:
            final = {m: self.run(seed, f"size-{n}") / m / "final" for m in ("sft", "dpo")}
            self.result("size", f"seed-{seed}-{n}",
                        [self.trained(seed, f"size-{n}", m, n=n) for m in final], {"vqa": 2},
                        lambda final=final: [evaluate(f, self.data(seed)) for f in final.values()],
                        lambda final=final: scored(final))

    def variant(self, part, seed):
        """Stage 1, SFT and DPO with another encoder or LLM, on the pairs and with the rates of the
        main comparison; then every judge. Re-paired with toy-lm in any case."""
        weights = self.work / "weights"
        for name, pattern in VARIANTS[part].items():
            encoder, llm = (p.format(weights) for p in pattern)
            needs = [self.weights(Path(p).name) for p in (encoder, llm) if "/" in p]
            times = 2 if name.endswith("-l") else 1
            self.stage1(seed, name, encoder, llm, needs, times)
            both = [self.trained(seed, name, m, base=name, times=times) for m in ("sft", "dpo")]
            original = None if part == "head" else encoder       # toy-vit's is of the main part
            self.judged(part, seed, name, both, ("sft", "dpo"), original, stage1=True,
                        times=times)

    def head(self, seed):
        """The encoder trained through a larger language model."""
        self.variant("head", seed)

    def encoder(self, seed):
        """A larger encoder: is the smaller one after DPO better than the larger as it was?"""
        self.variant("encoder", seed)

    def pretrained(self, seed):
        """Encoders that learned to see another way."""
        self.variant("pretrained", seed)

    def weights(self, name):
        """Made once, for all seeds: a size up by toy/, other pretraining by models.py."""
        out = self.work / "weights"
        script = ["-m", "toy", "pretrain", "--models"] if name.endswith("-l") else \
            ["-m", "study.models"]
        return self.add(
            f"weights/{name}", None, out / name / "config.json", [], {name: 1}, lambda: [
                [*script, name, "--out", out, *flat(self.sizes["weights"].get(name, {}))]])

    # --------------------------------------------------------------------------- the judges

    def finals(self, seed, name):
        """{condition: final/} of a run folder's three stages."""
        return {stage: self.run(seed, name) / folder / "final" for stage, folder in
                (("stage1", "pretrain"), ("sft", "sft"), ("dpo", "dpo"))}

    def judged(self, part, seed, name, needs, methods, original=None, stage1=False,
               times=1):
        """A result of all judges but alignment and heat: of `methods`, and of the encoder as it
        was, if it is named."""
        finals = self.finals(seed, name)
        finals = {k: f for k, f in finals.items() if k in methods or stage1}
        probe, probed = self.probes(seed, name, original, methods, align=False)
        repair, repaired = self.repairs(seed, name, original, methods)
        m = len(methods) + bool(original)
        self.result(part, f"seed-{seed}-{name}", needs,
                    {"vqa": len(finals) * times, "linear": m, "seg": m, "repair": m},
                    lambda: [*(evaluate(f, self.data(seed)) for f in finals.values()), *probe(),
                             *repair()],
                    lambda: merged(scored(finals), probed(), repaired()))

    def probes(self, seed, name, original, methods=("sft", "dpo"), align=True):
        """(commands, values) of the frozen features of a run folder's encoders."""
        run, data = self.run(seed, name), self.data(seed)
        stages = (["pretrain"] if align else []) + list(methods)
        encoders = encoders_of(run, original, stages)
        which = {"linear": "imagenet", "seg": "ade20k"}
        if align:
            which["align"] = "align"
        own = {"align": ["--llm", "toy-lm"], "seg": ["--workers", 0], "linear": [
            "--workers", 0, "--per-class", min(50, self.sizes["world"]["imagenet_train"])]}

        def steps():
            return [[f"probe_{k}.py", "--encoder", *encoders.values(), "--data", data / where,
                     "--out", run / "probes" / k, *own[k]] for k, where in which.items()]

        def gather():
            same_items(run / m for m in methods)
            found = {k: json.loads((run / "probes" / k / "results.json").read_text())
                     for k in which}
            values = {}
            for i, name in enumerate(encoders):      # the probes keep the order they are given
                values[name] = {
                    "linear": 100 * list(found["linear"]["encoders"].values())[i]["top1"]["mean"],
                    "seg": 100 * mean(list(found["seg"]["encoders"].values())[i]["recall"])}
                if align:
                    values[name]["align"] = 100 * found["align"]["scores"][i]["mean"]
            return values
        return steps, gather

    def repairs(self, seed, name, original, methods=("sft", "dpo")):
        """(commands, values) of a run folder's encoders re-paired with toy-lm as pretrained and a
        projector drawn with a seed that no stage used."""
        run, data = self.run(seed, name), self.data(seed)
        encoders = encoders_of(run, original, methods)

        def steps():
            return [["repair_eval.py", "--encoder", encoder, "--llm", "toy-lm", "--data", data,
                     "--run", run, "--seed", 1000 + seed, "--workers", 0, "--show-wrong", 0,
                     "--overwrite", *flat(self.sizes["stage"])] for encoder in encoders.values()]

        def gather():
            where = []
            for path in map(Path, encoders.values()):
                name = path.parent.name if path.name == "encoder" else path.name
                where.append(run / "repair" / name)
            same_items(run / m for m in methods if m != "pretrain")
            same_items(where)
            start = agree("projector_digest", config_of(where, "projector_digest"))
            if start in config_of([run / "pretrain"], "projector_digest").values():
                raise SystemExit(f"error: {where[0]}: the projector is stage 1's, not a new one")
            return {k: vqa_of(w / "final", "repair") for k, w in zip(encoders, where)}
        return steps, gather


# ----------------------------------------------------------------------------- commands, values

def flat(options):
    """{flag: value} → [flag, value, …]."""
    return [x for pair in options.items() for x in pair]


def evaluate(final, data, *more):
    """The command that answers and scores DATA/bench (or --bench) with the model in `final`. From
    the beginning: half the answers, and the rest in other batches, might differ in a last bit."""
    return ["repair_eval.py", "--mllm", final, "--llm", "toy-lm", "--data", data, "--workers", 0,
            "--show-wrong", 0, "--overwrite", *more]


def extract(run, stage):
    """The command that detaches a stage's encoder into RUN/STAGE/encoder."""
    return ["extract.py", "--run", run, "--stage", stage, "--overwrite"]


def encoders_of(run, original, stages):
    """{condition: encoder} of a run folder's stages, after the one it began as, if it is named."""
    out = {"original": original} if original else {}
    for stage in stages:
        out["stage1" if stage == "pretrain" else stage] = run / stage / "encoder"
    return out


def config_of(stages, key):
    """{folder: what its config.json says of `key`}."""
    return {str(s): json.loads((s / "config.json").read_text())[key] for s in stages}


def agree(what, found):
    """The one value that all have; found: {who: value}. Raises SystemExit where they differ."""
    values = list(found.values())
    if any(v != values[0] for v in values):
        raise SystemExit(f"error: {what} differs: {found}")
    return values[0] if values else None


def same_items(stages):
    """Refuse training stages that did not see the same items in the same order."""
    agree("data_digest", config_of(stages, "data_digest"))


def scored(finals):
    """{condition: scores} of models; those trained on after stage 1 saw the same items."""
    same_items(f.parent for k, f in finals.items() if k != "stage1")
    return {k: vqa_of(f) for k, f in finals.items()}


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
    """The plain mean."""
    return sum(values) / len(values)


def merged(*values):
    """{condition: {measure: value}} of several judges in one."""
    out = {}
    for one in values:
        for condition, measures in one.items():
            out.setdefault(condition, {}).update(measures)
    return out
