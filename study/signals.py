"""Six signals from one stage 1, on the same prompts: what does each do to model and encoder?

    python -m study.signals --dry-run            # what it would run and how long; runs nothing
    python -m study.signals                      # everything, 5 seeds, two runs at a time (hours)
    python -m study.signals --minutes 140        # a slice: call it again, and it goes on
    python -m study.signals --quick --seeds 1    # every command once, tiny sizes: does it all work?
    python -m study.signals_table                # the table of what is there

signals.md is the plan, fixed before any test question was read. As in the study beside it a seed is
a world of its own with one stage-1 model, and everything goes through the stages' public commands.
SFT, DPO, MPO, GRPO and PPO see the same pairs in the same order for the same number of steps. Two
more arms learn from the model's own answers to these questions, which tools.draw makes: SFT of the
right ones, DPO of right against wrong ones. Controls are GRPO with a coin as reward, and with black
pictures.

Writes OUT/<part>/<run>.json, a file a run; stopped at any moment and started again, it goes on.
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

from study import driver
from study.pairs import link
from study.plan import Study, evaluate, extract, facts_of, flat, mean, vqa_of

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"lr": "each signal's learning rate, on validation questions",
         "signals": "each signal: the model, its encoder, what it cost",
         "controls": "GRPO with a coin as reward, and with black pictures"}
VISUAL = ("General", "OCR & Chart", "Vision-Centric")        # groups that cannot be answered blind


class Arm(NamedTuple):
    """stage: train_STAGE.py, whose rate it has; own: pairs of tools.draw instead of the world's."""
    words: str
    stage: str
    own: bool = False
    more: tuple = ()                                              # flags of this arm alone


SIGNALS = {"sft": Arm("SFT", "sft"), "sft-own": Arm("SFT, own right answers", "sft", own=True),
           "dpo": Arm("DPO", "dpo"), "dpo-own": Arm("DPO, own answers", "dpo", own=True),
           "mpo": Arm("MPO", "mpo"), "grpo": Arm("GRPO", "grpo"), "ppo": Arm("PPO", "ppo")}
CONTROLS = {
    "grpo-random": Arm("GRPO, a coin as reward", "grpo", more=("--reward-control", "random")),
    "grpo-blank": Arm("GRPO, black pictures", "grpo", more=("--blank-image",))}
ARMS = SIGNALS | CONTROLS

# Fixed before any test question was read; signals.md says why each is as it is.
FULL = dict(
    seeds=5, first_world=300,
    world=dict(captions=3200, instruct=2136, repair=2000, preferences=3200, heldout=600,
               bench=600, imagenet_train=60, imagenet_val=50, ade20k_training=600,
               ade20k_validation=400, align=2048),
    validation=600, rates=[1e-5, 3e-5, 1e-4, 3e-4], pairs=3200, steps=200, group=8, stage={})
QUICK = dict(
    seeds=5, first_world=400,
    world=dict(captions=320, instruct=640, repair=64, preferences=192, heldout=30, bench=36,
               imagenet_train=10, imagenet_val=4, ade20k_training=32, ade20k_validation=16,
               align=64),
    validation=24, rates=[1e-4], pairs=192, steps=3, group=4, stage={})


def here(arms):
    """Those of the arms whose stage is in this checkout."""
    return {name: arm for name, arm in arms.items() if (ROOT / f"train_{arm.stage}.py").exists()}


class Signals(Study):
    """Folders, sizes and all tasks, in the order in which they are worth having."""

    def __init__(self, sizes, seeds, work, out):
        self.sizes = {**sizes, "code": driver.code_of(Path(__file__))}    # a result remembers both
        self.seeds, self.work, self.out, self.tasks = seeds, Path(work), Path(out), {}
        for seed in range(seeds):
            self.prepare(seed)
        self.lr()
        for part, arms in (("signals", here(SIGNALS)), ("controls", here(CONTROLS))):
            for seed in range(seeds):
                if part == "signals":
                    self.before(seed)
                for arm in arms:
                    self.learned(part, seed, arm)

    # ----------------------------------------------------------- what results are made from

    def prepare(self, seed):
        """World, stage-1 model and own answers of a seed."""
        data, run = self.data(seed), self.run(seed, "stage1")
        drawing = f"from study import pairs; pairs.draw({str(data)!r}, " \
                  f"{self.sizes['first_world'] + seed}, {self.sizes['world']!r}, " \
                  f"{self.sizes['validation']})"
        self.add(f"seed-{seed}/world", None, data / "world.json", [], {"world": 1},
                 lambda: [[sys.executable, "-c", drawing]])
        self.stage1(seed, "stage1", "toy-vit", "toy-lm", [])
        drawn = run / "drawn" / "pretrain" / "results.json"
        self.add(f"seed-{seed}/own", None, drawn, [f"seed-{seed}/stage1"], {"draw": 1},
                 lambda: [draw(run, "pretrain", data, "meta.json", seed, self.sizes["group"],
                               "--num-samples", self.sizes["pairs"])],
                 lambda: json.loads(drawn.read_text()))

    def training(self, seed, folder, arm, rate):
        """The command that takes a run folder on from stage 1."""
        stage1 = self.run(seed, "stage1")
        link(folder / "pretrain", stage1 / "pretrain")
        pairs = self.data(seed) / "preferences" / "meta.json"
        if arm.own:
            pairs = stage1 / "drawn" / "pretrain" / "pairs.jsonl"
        more = list(arm.more)
        if arm.stage in ("sft", "dpo", "mpo"):
            more.append("--verifiable")                         # the others know no other pairs
        if arm.stage != "sft":
            more += ["--heldout", "none"]                       # judged apart: no part of the cost
        return [f"train_{arm.stage}.py", "--run", folder, "--data", self.data(seed),
                "--preferences", pairs, "--num-samples", self.sizes["pairs"], "--epochs", 1000,
                "--max-steps", self.sizes["steps"], "--lr", rate, "--seed", seed, "--workers", 0,
                *more]

    def learned(self, part, seed, name):
        """An arm at its stage's chosen rate, and all that is measured of it."""
        arm, folder = ARMS[name], self.run(seed, name)
        stage = folder / arm.stage
        trained = self.add(
            f"seed-{seed}/{name}", None, stage / "final" / "config.json",
            [f"seed-{seed}/own" if arm.own else f"seed-{seed}/stage1", f"lr/chosen-{arm.stage}"],
            {arm.stage: 1},
            lambda: [self.training(seed, folder, arm, self.rate(arm.stage))],
            lambda: {**facts_of(stage), **cost_of(stage)})
        self.judged(part, seed, name, [trained], folder, arm.stage)

    # ------------------------------------------------------------------------- learning rates

    def lr(self):
        """Stage 1 on validation questions; on seed 0 each rate of the grid; the choices."""
        for seed in range(self.seeds):
            before = self.run(seed, "validation") / "final"

            def start(seed=seed, before=before):
                link(before, self.run(seed, "stage1") / "pretrain" / "final")
                return [evaluate(before, self.data(seed), "--bench",
                                 self.data(seed) / "validation")]
            self.result("lr", f"seed-{seed}-stage1", [f"seed-{seed}/stage1"], {"val": 1}, start,
                        lambda before=before: {"stage1": scores(before)})
        for stage in dict.fromkeys(arm.stage for arm in here(SIGNALS).values()):
            names = [self.tried(stage, rate) for rate in self.sizes["rates"]]
            self.result("lr", f"chosen-{stage}", names, {}, list,
                        lambda stage=stage: {stage: {"rate": self.best(stage)}})

    def tried(self, stage, rate):
        """A stage at a rate, on validation questions; → the task's name."""
        folder = self.run(0, f"lr-{rate:g}")
        final = folder / stage / "final"
        return self.result(
            "lr", f"seed-0-{stage}-{rate:g}", ["seed-0/stage1"], {stage: 1, "val": 1},
            lambda: [self.training(0, folder, SIGNALS[stage], rate),
                     evaluate(final, self.data(0), "--bench", self.data(0) / "validation")],
            lambda: {stage: scores(final)})

    def best(self, stage):
        """The rate of the best mean over the visual groups; of equals the lowest. One that diverged
        is out."""
        found = {rate: self.read("lr", f"seed-0-{stage}-{rate:g}")["values"].get(stage, {})
                 for rate in self.sizes["rates"]}
        score = {rate: values["vqa visual"] for rate, values in found.items() if values}
        if not score:
            raise SystemExit(f"error: {stage} diverged at every rate of the grid")
        return max(score, key=score.get)

    def rate(self, stage):
        return self.read("lr", f"chosen-{stage}")["values"][stage]["rate"]

    # --------------------------------------------------------------------------- the judges

    def before(self, seed):
        """The stage-1 model, and the encoder as it was before that."""
        self.judged("signals", seed, "stage1", [f"seed-{seed}/stage1"], self.run(seed, "stage1"),
                    "pretrain")
        run = self.run(seed, "original")
        self.result("signals", f"seed-{seed}-original", [], {"linear": 1, "seg": 1, "align": 1,
                                                             "repair": 1},
                    lambda: self.looks(seed, "toy-vit", run),
                    lambda: {"original": seen(run, "toy-vit")})

    def judged(self, part, seed, name, needs, run, stage):
        """The result of an arm: its model by group and on held-out prompts, its encoder."""
        data, folder = self.data(seed), run / stage
        held = run / "drawn" / "heldout"

        def steps():
            detach = [extract(run, stage)] if stage != "pretrain" else []
            return [*detach, evaluate(folder / "final", data),
                    draw(run, stage, data, "heldout.jsonl", seed, self.sizes["group"],
                         "--out", held, "--overwrite"),
                    *self.looks(seed, folder / "encoder", run)]

        def gather():
            reward = json.loads((held / "results.json").read_text())["reward"]
            return {name: {**scores(folder / "final"), "held-out": 100 * reward,
                           **seen(run, stage)}}
        self.result(part, f"seed-{seed}-{name}", needs,
                    {"extract": 1, "vqa": 1, "held": 1, "linear": 1, "seg": 1, "align": 1,
                     "repair": 1}, steps, gather)

    def looks(self, seed, encoder, run):
        """The commands of an encoder's four measures: three probes, and re-pairing with toy-lm as
        pretrained and a projector drawn with a seed that no stage used."""
        data, few = self.data(seed), min(50, self.sizes["world"]["imagenet_train"])
        own = {"linear": ("imagenet", "--workers", 0, "--per-class", few),
               "seg": ("ade20k", "--workers", 0), "align": ("align", "--llm", "toy-lm")}
        probes = [[f"probe_{k}.py", "--encoder", encoder, "--data", data / where, "--out",
                   run / "probes" / k, *more] for k, (where, *more) in own.items()]
        return [*probes, ["repair_eval.py", "--encoder", encoder, "--llm", "toy-lm", "--data", data,
                          "--run", run, "--seed", 1000 + seed, "--workers", 0, "--show-wrong", 0,
                          "--overwrite", *flat(self.sizes["stage"])]]


# ----------------------------------------------------------------------------- commands, values

def draw(run, stage, data, pairs, seed, group, *more):
    """The command that draws a group of answers to each question of DATA/preferences/PAIRS."""
    return ["-m", "tools.draw", run, "--stage", stage, "--data", data, "--preferences",
            data / "preferences" / pairs, "--seed", seed, "--group", group, "--workers", 0, *more]


def scores(final):
    """A model's groups, and the mean of the visual ones."""
    values = vqa_of(final)
    return {**values, "vqa visual": mean([values[f"vqa {group}"] for group in VISUAL])}


def seen(run, name):
    """An encoder's four measures; `start`: what it was re-paired from, the same for all of a seed.
    """
    found = {k: json.loads((run / "probes" / k / "results.json").read_text())
             for k in ("linear", "seg", "align")}
    linear, = found["linear"]["encoders"].values()
    seg, = found["seg"]["encoders"].values()
    repaired = run / "repair" / name
    config = json.loads((repaired / "config.json").read_text())
    return {"linear": 100 * linear["top1"]["mean"], "seg": 100 * mean(seg["recall"]),
            "align": 100 * found["align"]["scores"][0]["mean"],
            **vqa_of(repaired / "final", "repair"),
            "start": [config["projector_digest"], config["data_digest"]]}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cost_of(stage):
    """What a training took, from what its stage wrote: tokens generated; tokens trained on (with
    prompt, picture and padding; every pass); pictures through the encoder, forward and back."""
    facts = json.loads((stage / "config.json").read_text())
    steps = [x for x in lines_of(stage / "metrics.jsonl") if "loss" in x]
    times = lines_of(stage / "timing.jsonl")
    forward, backward = passes(stage.name, facts["arguments"], steps[-1]["samples_seen"],
                               int(facts["data"].split()[0]))
    answers = facts["arguments"]["global_batch"] * facts["arguments"].get("group", 0)
    return {"generated": round(sum(x.get("length", 0) * answers for x in steps)),
            "trained": round(sum(x["tokens_per_s"] * x["seconds"] for x in times)),
            "forward": forward, "backward": backward}


def passes(stage, arguments, samples, pairs):
    """Pictures through the encoder, of so many samples seen: (forward, of these with a backward
    pass). pairs: how many different ones. A test counts them in the stages themselves."""
    if stage == "sft":
        return samples, samples
    if stage in ("dpo", "mpo"):
        return samples + pairs, samples                        # the reference, once
    drawn = samples + (samples if stage == "ppo" else 0)       # PPO looks back before it updates
    reference = samples if arguments["kl"] else 0
    trained = samples * arguments["inner_epochs"]
    return drawn + reference + trained, trained


def main():
    args = driver.get_args(__doc__, PARTS, "runs/signals")
    plan = Signals(QUICK if args.quick else FULL, args.seeds, args.work, args.out)
    for name in ARMS.keys() - here(ARMS).keys():
        print(f"train_{ARMS[name].stage}.py is not here: its arm is left out")
    driver.carry_out(args, plan, PARTS, "study.signals_table")


if __name__ == "__main__":
    main()
