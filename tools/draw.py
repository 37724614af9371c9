"""Answers of your own model to questions whose answer is known: pairs to train on.

    python -m tools.draw runs/toy-vit__toy-lm --data data/toy --group 8
    torchrun --nproc_per_node=8 -m tools.draw runs/siglip2-so400m__qwen2.5-1.5b
    python -m tools.draw RUN --stage grpo --preferences HELDOUT.jsonl --out RUN/drawn/heldout

A model of the run (--stage, by default stage 1) draws a group of answers to each question with a
gold answer, as train_grpo.py does: at temperature 1, from π itself. The rules of train_grpo.py say
what each is worth. A question with a right and a wrong answer among them gives a pair, as MMPR's
were made; where all are right, or none is, it gives none, and is counted.

Which two are taken: the first right one, worth 1, and the first wrong one, worth 0. An answer is a
function of --seed, its question and its place in the group, so the first is as random as any other.
One that was cut off at --max-new-tokens is never taken; nor is one without words, or with a special
token in its text, which no stage would read.

Reads   RUN/STAGE/final and pairs, as the stages do: their pictures, questions and, for the gold
        answer, chosen answers. With the --seed and --num-samples of a stage, its very items.
Writes  RUN/drawn/STAGE/ (--out):
          pairs.jsonl      a line a pair: image, question, chosen, rejected; chosen_logps and
                           rejected_logps, log π of the model that drew, summed over the answer's
                           tokens, as DPO's reference has them; chosen_reward, rejected_reward, and
                           reward, the mean of the group
          images           a link to the pictures, so that a stage finds them
          results.json     the table that is printed at the end
          answers.N.jsonl  all answers as they came, one file a process
          config.json      what they depend on
        train_sft.py, train_dpo.py, train_mpo.py read it:  --preferences RUN/drawn/STAGE/pairs.jsonl

Killed at any moment, the same command goes on, on any number of processes: the same answers.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch

import data
import model as m
import repair_eval
import train_grpo
from judge.score import RULES
from pivot import (checkpoints, distributed, files, flags, packs, printing, records, rollout,
                   training)
from pivot.distributed import print0

# What train_grpo.py has: its items, its answers.
USED = {"data", "num_samples", "group", "max_new_tokens", "micro_batch", "workers"}
PAPER = {key: value for key, value in train_grpo.PAPER.items() if key in USED}
TOY = {key: value for key, value in train_grpo.TOY.items() if key in USED}
STALL = 30                     # minutes that a worker is waited for, as --stall-timeout's default
OTHERS = ("images", "results.json", "config.json")          # what lies there besides *.jsonl


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    parser.usage = "python -m tools.draw RUN [flags]"
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, e.g. runs/toy-vit__toy-lm")
    add("--stage", default="pretrain", help="whose model draws (default pretrain: stage 1)")
    add("--data", help="folder of the data (default: what that stage had)")
    flags.add_preferences(parser)
    add("--images", help="folder that image names are relative to (a meta.json names its own); "
        "default: images/ beside the jsonl, else DATA/images")
    add("--num-samples", type=flags.COUNT, help="so many questions with a gold answer, drawn by a "
        "seeded shuffle (default 20000)")
    add("--group", type=flags.number(int, 2), help="answers to a question (default 8)")
    add("--max-new-tokens", type=flags.COUNT, help="of an answer, its end included (default 512; "
        "24 with a toy LLM)")
    add("--rule", choices=RULES, default="exact", help="what compares an answer with "
        "the gold one, as in train_grpo.py (default exact)")
    add("--seed", type=flags.NATURAL, default=0, help="of what is drawn (default 0)")
    add("--micro-batch", type=flags.COUNT, help="questions at once; lower it when memory runs out "
        "(default 4; 32 with a toy LLM)")
    add("--dtype", choices=["fp32", "bf16"], help="in which the model answers (default bf16 on "
        "CUDA, fp32 on CPU)")
    add("--workers", type=flags.NATURAL, help="image-decoding processes (default 4; with a toy "
        "LLM 1)")
    add("--skip-bad", action="store_true", help="drop and count bad records instead of refusing "
        "the run")
    flags.add_follow_links(parser)
    add("--out", metavar="DIR", help="default RUN/drawn/STAGE")
    add("--overwrite", action="store_true", help="delete the answers that are there, and begin "
        "anew")
    args = parser.parse_args(argv)
    args.folder = flags.trained_stage(args.run, args.stage)
    made_with = files.read_json(args.folder / "config.json", "arguments")["arguments"]
    args.llm, args.data = made_with["llm"], args.data or made_with["data"]
    args.out = Path(args.out or f"{args.run}/drawn/{args.stage}")
    flags.fill(args, PAPER, TOY)
    args.preferences = args.preferences or f"{args.data}/preferences/meta.json"
    args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    args.verifiable = True                       # what data.preference_pairs keeps
    return args


# ------------------------------------------------------------------------------------- the folder

def claim(args, key):
    """Make the folder, or find the answers of an interrupted call there. key: {what: its identity}
    of all that answers depend on. → None, or the line of a refusal. By the main process alone."""
    config, begun = args.out / "config.json", {}
    if config.exists():
        begun = files.read_json(config, remedy="; if it is of drawn answers, delete it")
    if not begun.keys() >= key.keys() and args.out.exists() and (
            args.out.is_file() or any(args.out.iterdir())):
        return f"error: {args.out} holds something else than drawn answers; name another --out"
    if args.overwrite and not distributed.restarted():
        # config.json goes last: until then the folder is known for what it is.
        for path in [*args.out.glob("*.jsonl"), *(args.out / name for name in OTHERS)]:
            path.unlink(missing_ok=True)
        begun = {}
    for what, before in begun.items():
        if before != key.get(what):
            return (f"error: {args.out} holds answers of another model or setting ({what}: "
                    f"{before}, now {key.get(what)}); --overwrite deletes them, --out names "
                    f"another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_json(config, key)
    return None


def stored(folder):
    """What has been drawn so far, by any number of processes: {item: its line}."""
    found = {}
    for file in sorted(folder.glob("answers.*.jsonl")):
        for where, raw in records.read_lines(file):
            if raw.endswith(b"\n"):                  # the last one may have been cut off
                line = records.parse(where, raw)
                if not line.keys() >= {"item", "answers", "stopped", "rewards", "tokens", "pair"}:
                    raise records.BadRecord(f"{where}: not a group of answers; delete the line, "
                                            f"and its question is answered again")
                found[line["item"]] = line
    return found


# ------------------------------------------------------------------------------------- the answers

def batches_of(pairs, micro_batch):
    """All items in micro-batches, the longest first: [[item, …], …]. The same for any number of
    processes, and whatever was drawn before: what stands beside a question can move its answer, by
    rounding."""
    order = np.argsort(-np.diff(pairs.offsets), kind="stable").tolist()
    return [order[i:i + micro_batch] for i in range(0, len(order), micro_batch)]


def draw_all(args, model, tokenizer, pairs, device):
    """Draw what is not there yet. Each process appends its share, batch by batch, to its own file;
    a batch of which a part is missing is drawn once more."""
    rank, world = distributed.world()
    done = distributed.from_main(lambda: set(stored(args.out)))
    if done:
        print0(f"  {len(done)} of {len(pairs)} questions were answered before")
    todo = [batch for batch in batches_of(pairs, args.micro_batch) if not done.issuperset(batch)]
    own, mine = args.out / f"answers.{rank}.jsonl", todo[rank::world]
    if own.exists():
        whole = own.read_bytes()
        os.truncate(own, whole.rfind(b"\n") + 1)
    clock = training.Clock(device, STALL)
    clock.start(data.loader(pairs, mine, "prompts", min(args.workers, len(mine))))
    with open(own, "a", encoding="utf-8") as file:
        for _ in distributed.progress(0, len(mine), "drawing"):
            prompts = clock.next_batch()
            index = prompts.pop("index").tolist()
            lines = draw_batch(args, model, tokenizer, pairs, prompts, index)
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()


def draw_batch(args, model, tokenizer, pairs, prompts, index):
    """METHOD: a group of answers to each prompt of a micro-batch, what each is worth, and which two
    make a pair. → [line of answers.N.jsonl, …]"""
    stop_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    seeds = [[rollout.seed_of("draw", args.seed, pairs.keys[i], g) for g in range(args.group)]
             for i in index]
    drawn = rollout.draw(model, prompts, args.group, args.max_new_tokens, stop_id, seeds)

    def right(said, gold):
        return RULES[args.rule](records.final_answer(said), gold)
    rewards = rollout.score(drawn, tokenizer, [pairs.golds[i] for i in index], right)
    special = data.special_tokens(tokenizer)
    lines = []
    for i, group, texts, stopped, worth in zip(
            index, drawn.answers, rollout.texts_of(drawn, tokenizer), drawn.stopped.tolist(),
            rewards.tolist()):
        lines.append({"item": i, "where": pairs.where[i], "gold": pairs.golds[i],
                      "answers": texts, "stopped": stopped, "rewards": worth,
                      "tokens": sum(map(len, group)),
                      "pair": pair_of(texts, stopped, worth, special)})
    add_logps(model, tokenizer, prompts, lines, stop_id)
    return lines


def pair_of(texts, stopped, worth, special):
    """METHOD: the first right and the first wrong answer of a group, [g, g]; None, where one of
    them is missing. What did not stop, is blank, or holds a special token is neither."""
    readable = [g for g, text in enumerate(texts)
                if stopped[g] and text.strip() and not any(token in text for token in special)]
    right = [g for g in readable if worth[g] == 1]
    wrong = [g for g in readable if worth[g] == 0]
    return [right[0], wrong[0]] if right and wrong else None


@torch.no_grad()
def add_logps(model, tokenizer, prompts, lines, stop_id):
    """Put log π of both answers of each pair into its line, as `logps`: in the layout in which DPO
    trains, of the tokens that a stage makes of the text. (The same text can be drawn as other
    tokens.)"""
    rows = [b for b, line in enumerate(lines) if line["pair"]]
    if not rows:
        return
    answers = []
    for b in rows:
        texts = [lines[b]["answers"][g] for g in lines[b]["pair"]]
        answers.append([ids + [stop_id] for ids in
                        tokenizer(texts, add_special_tokens=False)["input_ids"]])
    batch = data.group_batch({name: values[rows] for name, values in prompts.items()}, answers)
    chosen_logps, rejected_logps = m.answer_logps(model(**batch), batch["branch"])
    for b, chosen, rejected in zip(rows, chosen_logps.tolist(), rejected_logps.tolist()):
        lines[b]["logps"] = [chosen, rejected]


# --------------------------------------------------------------------------------------- the pairs

def write_pairs(args, pairs, lines):
    """pairs.jsonl, in the order of the items, and the link to its pictures: they are named from the
    folder that holds those of all sources, one in a pack by the pack's name, too."""
    wanted, raw = {pairs.where[i] for i, line in lines.items() if line["pair"]}, {}
    sources = [(file, os.path.abspath(root))
               for file, root in data.pair_files(args, args.preferences)]
    top = os.path.commonpath([root for _, root in sources])
    if place := packs.split(top):
        top = os.path.dirname(place[0])
    for file, root in sources:
        for where, item in records.read_lines(file):
            if where in wanted:
                raw[where] = records.parse(where, item), os.path.relpath(root, top)
    out = []
    for i in sorted(lines):
        line = lines[i]
        if line["pair"]:
            item, folder = raw[pairs.where[i]]
            name, = records.names_of(item, "image") or records.names_of(item, "images")
            (right, wrong), worth = line["pair"], line["rewards"]
            out.append({
                "image": name if folder == "." else os.path.join(folder, name),
                "question": item["question"], "chosen": line["answers"][right],
                "rejected": line["answers"][wrong], "reward": sum(worth) / len(worth),
                "chosen_reward": worth[right], "rejected_reward": worth[wrong],
                "chosen_logps": line["logps"][0], "rejected_logps": line["logps"][1]})

    def write(aside):
        aside.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in out),
                         encoding="utf-8")
        files.sync(aside)
    link = args.out / "images"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(top, args.out.resolve()))
    files.write_aside(args.out / "pairs.jsonl", write)


def counted(args, lines):
    """What came out, for results.json and the table."""
    group = args.group
    right = [sum(value == 1 for value in line["rewards"]) for line in lines.values()]
    found = sum(bool(line["pair"]) for line in lines.values())
    answers = group * len(lines)
    return {"questions": len(lines), "pairs": found, "all_right": right.count(group),
            "none_right": right.count(0),
            "no_pair": len(lines) - found - right.count(group) - right.count(0),
            "answers": answers, "tokens": sum(line["tokens"] for line in lines.values()),
            "reward": sum(sum(line["rewards"]) for line in lines.values()) / answers,
            "right": sum(right) / answers,
            "stopped": sum(sum(line["stopped"]) for line in lines.values()) / answers}


def report(args, facts):
    """The table, and the command that comes next: lines."""
    group, pairs = args.group, f"{args.out}/pairs.jsonl"
    rows = [["", "questions"], ["with a gold answer", str(facts["questions"])],
            [f"a pair: right and wrong among {group}", str(facts["pairs"])],
            [f"left out: all {group} right", str(facts["all_right"])],
            [f"left out: none of {group} right", str(facts["none_right"])],
            ["left out: the rest cut off, blank or half right", str(facts["no_pair"])]]
    out = [*printing.table(rows), f"{facts['answers']} answers: {facts['right']:.1%} right, mean "
           f"{args.rule} {facts['reward']:.4f}, {1 - facts['stopped']:.1%} cut off, "
           f"{facts['tokens'] / facts['answers']:.1f} tokens each"]
    if not facts["pairs"]:
        return [*out, "no pair: a larger --group, or other questions"]
    run = f"--run-dir {args.run}"
    if args.stage != "pretrain":
        run = f"--run-dir {args.run}-{args.stage} --parent {args.folder}"
    return [*out, f"wrote {pairs}; next (train_sft.py and train_mpo.py take the same flags):",
            f"  python train_dpo.py {run} --preferences {pairs}"]


def main():
    args = get_args()
    device, final = distributed.start(), args.folder / "final"
    model, tokenizer = repair_eval.open_for_answers(args, final, device)
    rollout.require_branches(model.llm)
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model)
    rollout.require_room(model, pairs, args.max_new_tokens)
    print0(f"  {pairs.summary()}")
    key = {name: getattr(args, name) for name in ("seed", "group", "max_new_tokens", "rule",
                                                  "micro_batch", "dtype")}
    key |= {"model": checkpoints.file_digest(final), "questions": pairs.fingerprint()}
    refusal = distributed.from_main(lambda: claim(args, key))
    if refusal:
        raise SystemExit(refusal)
    draw_all(args, model, tokenizer, pairs, device)
    distributed.barrier()
    if distributed.is_main():
        lines = stored(args.out)
        facts = counted(args, lines)
        write_pairs(args, pairs, lines)
        files.write_json(args.out / "results.json", facts)
        print0("\n".join(report(args, facts)))


if __name__ == "__main__":
    distributed.launch(main)
