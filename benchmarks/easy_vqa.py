"""Bring your own data: easy-VQA (MIT, github.com/vzhou842/easy-VQA) → the layout the stages read.

    pip download --no-deps easy-vqa==1.0 -d data/easy-vqa
    python benchmarks/easy_vqa.py data/easy-vqa/easy_vqa-1.0-py3-none-any.whl data/real

The package holds 5,000 images of 64 px and 48k questions as `[question, answer, image_id]`. This
is the whole of what a newcomer has to write: conversations, preference pairs, a benchmark TSV (and
a row of score.BENCHES that says how the answers are judged).
"""
import argparse
import base64
import csv
import json
import os
import random
import zipfile
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

KINDS = {"yes/no": ["yes", "no"], "shape": ["rectangle", "circle", "triangle"],
         "colour": ["teal", "black", "green", "blue", "gray", "yellow", "red", "brown"]}
KIND = {answer: kind for kind, answers in KINDS.items() for answer in answers}


def read(wheel, split):
    """{image id: [(question, answer), …]} of one split, in file order."""
    questions = defaultdict(list)
    for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json")):
        questions[image].append((question, answer))
    return dict(sorted(questions.items()))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def conversation(image, questions):
    """One image, all its questions: one LLaVA record, the image encoded once."""
    turns = []
    for i, (question, answer) in enumerate(questions):
        turns += [{"from": "human", "value": ("<image>\n" if i == 0 else "") + question},
                  {"from": "gpt", "value": answer}]
    return {"id": f"easy-vqa-{image}", "image": f"{image}.png", "conversations": turns}


def caption(image, questions):
    """easy-VQA has no captions; what the answers say of the picture makes one."""
    known = {KIND[answer]: answer for _, answer in questions if KIND[answer] != "yes/no"}
    text = f"a {known.get('colour', 'coloured')} {known.get('shape', 'shape')}"
    return {"id": f"caption-{image}", "image": f"{image}.png", "conversations": [
        {"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": text}]}


def pair(image, question, answer, rng):
    """MMPR: the true answer against a wrong one of the same kind."""
    wrong = rng.choice([a for a in KINDS[KIND[answer]] if a != answer])
    return {"image": f"{image}.png", "question": f"<image>\n{question}", "chosen": answer,
            "rejected": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", help="the downloaded easy_vqa wheel; it is read, never imported")
    parser.add_argument("out", type=Path, help="folder to write, e.g. data/real")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists already")
    try:
        wheel = zipfile.ZipFile(args.wheel)
        train, test = read(wheel, "train"), read(wheel, "test")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise SystemExit(f"error: {args.wheel} is not the easy_vqa wheel ({e})")
    out, rng = args.out.with_name(args.out.name + ".tmp"), random.Random(0)
    for folder in ("images", "preferences", "bench"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for image in tqdm(train, desc="images"):
        data = wheel.read(f"easy_vqa/data/train/images/{image}.png")
        (out / "images" / f"{image}.png").write_bytes(data)

    # No image serves two purposes: 2,400 to learn from, 800 to re-pair with, 800 for preferences.
    ids = list(train)
    rng.shuffle(ids)
    learn, repair, prefer, heldout = ids[:2400], ids[2400:3200], ids[3200:3900], ids[3900:]
    captions = [caption(i, train[i]) for i in learn]
    (out / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    write_jsonl(out / "instruct.jsonl", (conversation(i, train[i]) for i in learn))
    write_jsonl(out / "repair.jsonl", (conversation(i, train[i]) for i in repair))
    for name, images in (("easy_vqa", prefer), ("heldout", heldout)):
        write_jsonl(out / "preferences" / f"{name}.jsonl",
                    (pair(i, q, a, rng) for i in images for q, a in rng.sample(train[i], 3)))
    (out / "preferences" / "meta.json").write_text(json.dumps(
        {"easy-vqa": {"root": "../images", "annotation": "easy_vqa.jsonl"}}))
    (out / "preferences" / "images").symlink_to("../images")     # where heldout.jsonl looks

    # The test split as a VLMEvalKit TSV; later questions on an image name the first one's row.
    with open(out / "bench" / "EasyVQA.tsv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, delimiter="\t")
        table.writerow(["index", "image", "question", "answer", "category"])
        index = 0
        for image, questions in tqdm(test.items(), desc="test split"):
            data = wheel.read(f"easy_vqa/data/test/images/{image}.png")
            cell = base64.b64encode(data).decode()
            for question, answer in questions:
                table.writerow([index, cell, question, answer, KIND[answer]])
                cell, index = cell if len(cell) <= 64 else str(index), index + 1
    os.replace(out, args.out)
    print(f"wrote {args.out}: {len(learn)} + {len(repair)} conversations, {3 * len(prefer)} pairs, "
          f"{index} test questions")


if __name__ == "__main__":
    main()
