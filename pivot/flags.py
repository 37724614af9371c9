"""The flags every training stage shares, and where a flag that was not typed gets its value."""
import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from pivot import encoders, files, packs, records
from pivot.distributed import print0, told


class Parser(argparse.ArgumentParser):
    """argparse's, with a docstring for its help; what is wrong is one line, said by one process."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise SystemExit(f"error: {message.removeprefix('argument ')}; --help lists all flags")


def number(kind, least, most=sys.float_info.max):
    """A `type` of argparse: an int or float within bounds (NaN is within none)."""
    def read(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} must be " + (
                f"at least {least:g}" if most == sys.float_info.max else
                f"from {least:g} to {most:g}"))
        return kind(text)
    read.__name__ = kind.__name__                  # argparse says "invalid int value"
    return read


COUNT, NATURAL = number(int, 1), number(int, 0)
RATE, ABOVE_0 = number(float, 0), number(float, 1e-12)


def arguments(doc, paper):
    """The flags every training stage shares. Their defaults are None here: `settle` fills them from
    the command line, then the parent stage, then the toy's or the paper's values."""
    parser = Parser(doc)

    def add(flag, kind, text):
        default = paper.get(flag[2:].replace("-", "_"))
        parser.add_argument(flag, type=kind,
                            help=text if default is None else f"{text} (default {default})")

    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", help="run folder of one "
                        "encoder–LLM pair; default runs/<encoder>__<llm>. Under torchrun write "
                        "--run-dir: torchrun takes --run for its own --run-path")
    add("--encoder", str, "vision encoder: a preset, a local folder or a hub id")
    add("--llm", str, "language model: a preset, a local folder or a hub id")
    add_image_size(parser)
    add("--data", str, "folder in the layout `python -m toy` writes; its parts can be pointed "
        "elsewhere")
    add("--images", str, "folder or pack that image names are relative to; default DATA/images or "
        "images.pack (a meta.json names its own)")
    add("--epochs", COUNT, "passes over the data")
    add("--max-steps", COUNT, "stop after so many steps; the schedule then ends there, too")
    add("--global-batch", COUNT, "samples a step, over all processes: of DPO and MPO pairs, "
        "of GRPO and PPO prompts")
    add("--micro-batch", COUNT, "samples a process holds at once; lower it when memory runs out")
    add("--lr", RATE, "peak learning rate; 0 freezes")
    for module in ("encoder", "projector"):
        own = f"the {module}'s own rate"
        add(f"--{module}-lr", RATE, own if paper.get(f"{module}_lr") else f"{own}; default: --lr")
    add("--warmup", number(float, 0, 1), "share of the steps in which the rate rises")
    add("--num-samples", COUNT, "use so many usable samples, drawn by a seeded shuffle")
    parser.add_argument("--seed", type=NATURAL, default=0, help="order of samples, fresh projector")
    parser.add_argument("--skip-bad", action="store_true",
                        help="drop and count bad records instead of refusing the run")
    add_follow_links(parser)
    parser.add_argument("--index", metavar="DIR", help="where records are kept as read, for the "
                        "next start and other stages (default RUN/index); runs on the same data "
                        "can share one")
    parser.add_argument("--save-every", type=COUNT, default=200, help="steps between checkpoints")
    parser.add_argument("--keep", type=COUNT, default=2, help="how many checkpoints stay on disk")
    parser.add_argument("--overwrite", action="store_true",
                        help="delete what this stage left in the run folder and start anew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"],
                        help="compute dtype; masters stay fp32 (default bf16 on CUDA, fp32 on CPU)")
    parser.add_argument("--activation-checkpointing", action="store_true",
                        help="recompute each block in the backward pass: a third more time, far "
                             "less memory")
    parser.add_argument("--attention", choices=["sdpa", "flex"], default="sdpa",
                        help="the LLM's kernel: sdpa runs everywhere; flex (FlexAttention) skips "
                             "what a pair's mask hides, and trains on CUDA alone (not run there)")
    parser.add_argument("--compile", action="store_true", help="compile each block (torch.compile):"
                        " less memory, more speed, after a minute or two of compiling")
    parser.add_argument("--replicas", type=COUNT, default=1,
                        help="hybrid sharding: so many copies of the model, each sharded within "
                             "its group of processes (one a node)")
    parser.add_argument("--rehearsal", choices=["on", "off"], help="before the data are read, "
                        "forward and backward on the longest micro-batch that is admitted: too "
                        "little memory is known in the first minute (default on with a GPU)")
    add("--workers", NATURAL, "image-decoding processes per training process")
    parser.add_argument("--stall-timeout", type=ABOVE_0, default=30, metavar="MINUTES",
                        help="how long a worker may take over a batch before it is given up, and "
                        "its records are named (default 30)")
    parser.add_argument("--log-every", type=COUNT, default=50, help="steps between printed lines")
    return parser


class OneOrMore(argparse.Action):
    """One file stays a text, as config.json always had it; several are a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def add_files(parser, flag, text):
    """A flag that takes one file of records, or several, or a folder of .jsonl."""
    parser.add_argument(flag, nargs="+", action=OneOrMore, metavar="FILE",
                        help=f"{text}; several are read one after the other, and of a folder its "
                        f".jsonl files")


def add_preferences(parser):
    """The flag of the stages that train on pairs."""
    add_files(parser, "--preferences", "MMPR meta.json, or a jsonl with image, question, chosen, "
              "rejected; default DATA/preferences/meta.json")


def add_heldout(parser, what):
    """The flag of the stages that look at pairs kept aside. what: what is done with them."""
    parser.add_argument("--heldout", help=f"pairs {what} before and after training; default "
                        "DATA/preferences/heldout.jsonl, where that exists; 'none': none")


def add_rollout(parser, rules):
    """The flags of the stages that learn from answers of their own: how these are drawn and what
    they are worth. rules: the names of judge/score.py's."""
    parser.add_argument("--max-new-tokens", type=COUNT, help="of a drawn answer, its end included "
                        "(default 512; 24 with a toy LLM)")
    parser.add_argument("--rule", choices=rules, default="exact", help="what compares an answer "
                        "with the gold one: judge/score.py's rules; what follows a last \"Final "
                        "answer:\" counts, in both (default exact)")
    parser.add_argument("--format-reward", type=RATE, default=0, help="added for an answer that "
                        "reasons first and then says \"Final answer:\" (default 0: none)")
    parser.add_argument("--reward-control", choices=["none", "random"], default="none",
                        help="random: a coin is the reward, to see what training does without any")
    parser.add_argument("--blank-image", action="store_true", help="a control: every picture is "
                        "black, in rollout, update and held-out run")


def add_image_size(parser):
    """The flag of every command that opens an encoder as it was published."""
    parser.add_argument("--image-size", type=COUNT, help="another input size than the encoder's "
                        "own: its positions are interpolated once, in fp32")


def add_follow_links(parser):
    """The flag of every command that reads pictures by the names in records."""
    parser.add_argument("--follow-links", action="store_true", help="links in the folder of images "
                        "may lead out of it (a name with .. in it may not)")


def add_parent(parser):
    """The flag of every stage that goes on from another one: `settle` takes it."""
    parser.add_argument("--parent", metavar="DIR", help="go on from the stage 1 of another run "
                        "folder, or from any trained stage's folder, instead of this run's own; a "
                        "published model becomes one by `python -m tools.parent`. Needs --run-dir")


def add_verifiable(parser):
    """The flag of the stages that train on pairs, so that all of them can see what GRPO sees."""
    parser.add_argument("--verifiable", action="store_true", help="only pairs whose chosen answer "
                        "holds a gold answer (\"Final answer: …\", or few words): the items of "
                        "train_grpo.py")


# ----------------------------------------------------------------------------- stages by their name

def script_of(stage):
    """The file that makes RUN/STAGE: STAGE.py or train_STAGE.py; None where neither is here."""
    return next((name for name in (f"{stage}.py", f"train_{stage}.py")
                 if (encoders.ROOT / name).exists()), None)


def is_trained(folder):
    return Path(folder, "final", "config.json").exists()


def trained_stage(run, stage):
    """RUN/STAGE, whose final/ is there, or the parent of that name that others of this run went on
    from; raises SystemExit with the command that makes it, or the names of those that are there."""
    folder = Path(run, stage)
    if not is_trained(folder):
        for config in sorted(Path(run).glob("*/config.json")):
            parent = files.read_json(config).get("arguments", {}).get("parent") or stage
            if Path(parent).name == stage and is_trained(files.from_folder(run, parent)):
                return files.from_folder(run, parent)
        script = script_of(stage)
        there = sorted(path.parent.parent.name for path in Path(run).glob("*/final/config.json"))
        remedy = f"make it with:  python {script} --run-dir {run}" if script else \
            f"trained there: {', '.join(there) or 'nothing'}"
        raise SystemExit(f"error: no trained model at {folder}/final; {remedy}")
    return folder


def add_two_phases(parser, second):
    """The flags stage 1 and re-pairing add: a projector phase on captions, then a phase on
    DATA/<second>.jsonl."""
    add_files(parser, "--captions", "LLaVA-Pretrain json for the projector phase; default "
              "DATA/captions.jsonl or .json")
    add_files(parser, "--instruct", "LLaVA conversations for the second phase, .json or .jsonl; "
              f"default DATA/{second}.jsonl")
    parser.add_argument("--projector-epochs", type=COUNT,
                        help="passes over the captions (default 1)")
    parser.add_argument("--projector-max-steps", type=COUNT,
                        help="bound of the projector phase; default: --max-steps")


def settle_two_phases(args, stage, second, paper, toy):
    """`settle` for the two that have these flags."""
    args = settle(args, stage, paper, toy)
    args.captions = args.captions or records.default_file(args.data, "captions")
    args.instruct = args.instruct or records.default_file(args.data, second)
    args.images = args.images or packs.default_images(args.data)
    if args.projector_max_steps is None:
        args.projector_max_steps = args.max_steps
    return args


# ---------------------------------------------------------------- what was not typed gets its value

TOY_WORDS = 4096             # an LLM that has fewer is a toy, whatever it is called


def is_toy(llm):
    """Does the config of a folder say that this LLM is a toy?"""
    preset = encoders.LLMS.get(llm)
    if preset and preset.geometry:
        return False
    config = Path(encoders.resolve(llm), "config.json")
    facts = files.read_json(config) if config.is_file() else {}
    return facts.get("vocab_size", TOY_WORDS) < TOY_WORDS


def defaults(paper, toy, llm):
    """The paper's values, or the toy's where the LLM is a toy."""
    return {**paper, **toy} if is_toy(llm or paper["llm"]) else paper


def settle(args, stage, paper, toy, parent=None):
    """Fill every flag left open: from the parent stage, then the toy's values, then the paper's.

    parent: name of the stage whose final/ is trained on; of this run, unless --parent names another
    (add_parent). Prints what is inherited, and where a toy's values differ from the paper's. What
    would keep the stage from running here goes to args.refusal, a line or None: opening the run
    raises it, a plan does without.
    """
    args.run_typed = args.run is not None
    if getattr(args, "parent", None) and not args.run_typed:
        raise SystemExit("error: --parent needs --run-dir: the folder that takes what is trained")
    if args.run is None:
        fallback = defaults(paper, toy, args.llm)
        encoder, llm = args.encoder or fallback["encoder"], args.llm or fallback["llm"]
        args.run = f"runs/{encoders.short_name(encoder)}__{encoders.short_name(llm)}"
    refusal = None
    if parent:
        parent = parent_of(args, stage, parent)
    if parent and is_trained(files.from_folder(args.run, parent)):
        inherit(args, parent)
    elif parent:
        refusal = missing_parent(args, parent)
    fill(args, paper, toy)
    args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    args.rehearsal = args.rehearsal or ("on" if torch.cuda.is_available() else "off")
    args.stage, args.parent = stage, parent
    args.refusal = refusal or unfit_machine(args)
    return args


def settle_pairs(args, stage, paper, toy, parent):
    """`settle` for the stages that train on pairs, which lie in DATA/preferences."""
    args = settle(args, stage, paper, toy, parent)
    args.preferences = args.preferences or f"{args.data}/preferences/meta.json"
    if hasattr(args, "heldout"):
        there = Path(args.data, "preferences", "heldout.jsonl")
        if not args.heldout:
            args.heldout = str(there) if there.exists() else None
        elif args.heldout == "none":
            args.heldout = None
    return args


def parent_of(args, stage, parent):
    """Where the parent lies, from the run folder: `parent` itself, a stage of this run; what
    --parent names; or, without it, what the stage was begun with. raises SystemExit."""
    typed = getattr(args, "parent", None)
    if typed:
        given = Path(typed)
        places = [p for p in (given, given / parent, given.parent) if is_trained(p)]
        if not places and (given / "config.json").exists():
            raise SystemExit(f"error: --parent {typed} is no folder of a run; a published model "
                             f"becomes one by:  python -m tools.parent {typed} {args.run}")
        if not places:
            raise SystemExit(f"error: --parent {typed}: no trained model at {given / parent}/final "
                             f"or {given}/final")
        place = Path(os.path.abspath(places[0]))       # a link in its last part stays one
        return os.path.relpath(place.parent.resolve() / place.name, Path(args.run).resolve())
    begun = Path(args.run, stage, "config.json")
    if args.overwrite or not begun.exists():
        return parent
    config = files.read_json(begun, "arguments", remedy="; --overwrite starts anew")
    return config["arguments"].get("parent") or parent


INHERITED = ("encoder", "llm", "image_size", "data")       # from the parent stage


def inherit(args, parent):
    """Take encoder, LLM, image size and data from the parent stage, where they were not typed;
    raises SystemExit where what was typed is something else."""
    place = files.from_folder(args.run, parent)
    made_with = files.read_json(place / "config.json", "arguments", remedy="; without it "
                                f"{place.name}.py --overwrite must run again")["arguments"]
    for key in INHERITED:
        flag, now, then = f"--{key.replace('_', '-')}", getattr(args, key), made_with.get(key)
        if now is None and then is not None:
            setattr(args, key, then)
            print0(f"  {flag} {then} (inherited from {parent})")
        elif key == "data" and now != then:
            print0(f"  --data {now} ({parent} had {then or 'none'})")
        elif now != then:
            if place.name != parent:
                raise SystemExit(f"error: --parent {place} was made with {flag} {then}, not {now}; "
                                 f"leave {flag} out or name another --parent")
            raise SystemExit(f"error: {args.run} was made with {flag} {then}, not {now}; leave "
                             f"--run-dir out or name another")


def missing_parent(args, parent):
    """The line that says which command makes the parent, with the flags that were typed here."""
    if Path(parent).name != parent:              # once named by --parent, and gone since
        return (f"error: {files.from_folder(args.run, parent)}/final is gone; put it back, or "
                f"--overwrite and name another --parent")
    typed = [f"--run-dir {args.run}"] if args.run_typed else []
    typed += [f"--{key.replace('_', '-')} {getattr(args, key)}" for key in INHERITED
              if getattr(args, key)]
    n = told("LOCAL_WORLD_SIZE", max(1, torch.cuda.device_count()))
    start = f"torchrun --nproc_per_node={n}" if n > 1 else "python"
    return (f"error: no stage-1 model at {Path(args.run, parent, 'final')}; make it with:  "
            + " ".join([start, script_of(parent) or parent, *typed]))


def fill(args, paper, toy):
    """What is still open gets the toy's or the paper's value; the toy's are printed."""
    values, of_the_toy = defaults(paper, toy, args.llm), []
    for key, typed in list(vars(args).items()):
        if typed is not None:
            continue
        value = values.get(key)
        setattr(args, key, value)
        if value != paper.get(key):
            of_the_toy.append(f"--{key.replace('_', '-')} {value} ({paper.get(key)})")
    if of_the_toy:
        print0(f"  a toy's values, those of the full size in brackets: {', '.join(of_the_toy)}")


def unfit_machine(args):
    """The line that says which flag this machine cannot follow; None where it can all of them."""
    if torch.cuda.is_available():
        return None
    if args.attention == "flex":
        return ("error: --attention flex needs CUDA: torch's FlexAttention has no backward pass on "
                "a CPU; leave it out")
    cxx = os.environ.get("CXX", "g++")
    if args.compile and not shutil.which(cxx):
        return (f"error: --compile needs a C++ compiler on a CPU, and there is no {cxx}; leave it "
                f"out")
    return None
