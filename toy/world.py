"""Draws the toy world, in the formats the real data have."""
import base64
import csv
import hashlib
import io
import json
import math
import random
import sys

import numpy as np
from PIL import Image
from tqdm import tqdm

from pivot import files
from toy.scenes import (BENCH, CLASSES, COLOURS, IN_WORDS, PAIRS, SHAPES, SIZE, WORDINGS, WORDS,
                        Scene, conversation, fact_question)


class World:
    """Writes below `root`; no two pictures of a world have the same bytes. sentences: the share of
    preference pairs whose answers are sentences, not single words."""

    def __init__(self, root, seed, scale, sentences=2 / 3):
        self.root, self.seed, self.scale, self.seen = root, seed, scale, set()
        self.sentences = sentences
        self.bar = tqdm(desc="drawing", unit=" images",
                        mininterval=0.5 if sys.stderr.isatty() else 10)

    def rng(self, name):
        return random.Random(f"{self.seed}/{name}")      # a string seeds the same everywhere

    def count(self, n):
        return max(1, round(n * self.scale))

    def scene(self, rng, **how):
        while True:
            scene, buffer = Scene(rng, **how).draw(), io.BytesIO()
            Image.fromarray(scene.image).save(buffer, "PNG", compress_level=1)
            scene.png = buffer.getvalue()
            digest = hashlib.sha256(scene.png).digest()
            if digest not in self.seen:
                self.seen.add(digest)
                self.bar.update()
                return scene

    def path(self, name):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name, data):
        if isinstance(data, bytes):
            self.path(name).write_bytes(data)
        elif isinstance(data, np.ndarray):
            Image.fromarray(data).save(self.path(name))
        elif name.endswith(".jsonl"):
            self.path(name).write_text("".join(json.dumps(r) + "\n" for r in data))
        else:
            self.path(name).write_text(json.dumps(data, indent=1) + "\n")

    # one method a file or folder of the layout

    def captions(self, n):
        rng, records = self.rng("captions"), []
        for i in range(n):
            scene, name = self.scene(rng), f"captions/{i + 1:06d}.png"
            self.save("images/" + name, scene.png)
            records.append({"id": f"captions-{i + 1}", "image": name, "conversations": [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": scene.caption()}]})
        self.save("captions.json", records)

    def instructions(self, split, n):
        rng, records, blind = self.rng(split), [], max(1, round(n * 0.03))
        for i in range(n + blind):
            record, scene = {"id": f"{split}-{i + 1}"}, None
            if i < n:
                scene, record["image"] = self.scene(rng), f"{split}/{i + 1:06d}.png"
                self.save("images/" + record["image"], scene.png)
            talk = conversation(rng, scene)
            if scene:
                talk[0] = ("<image>\n" + talk[0][0], talk[0][1])
            record["conversations"] = [{"from": who, "value": value} for pair in talk
                                       for who, value in zip(("human", "gpt"), pair)]
            records.append(record)
        rng.shuffle(records)
        self.save(f"{split}.jsonl", records)

    def pairs(self, rng, kind, n, prefix, tag="", heldout=0.0):
        records = []
        while len(records) < n:
            scene = self.scene(rng, kind={"number": "text", "bar": "chart"}.get(kind, "shapes"))
            asked = rng.choice(PAIRS[kind])
            qs = [q for q in scene.questions() if q.kind == asked and q.wrong]
            if kind == "count":                          # else most counts would be 1
                want = rng.choice(BENCH["ToyVision"][asked])
                qs = [q for q in qs if q.answer == want]
            if not qs:
                continue
            q, name = rng.choice(qs), f"{prefix}-{len(records) + 1:05d}.png"
            wrong, good = rng.choice(q.wrong), q.answer
            question = q.ask(rng, heldout=rng.random() < heldout)
            if rng.random() < self.sentences:
                question, good, wrong = question + IN_WORDS, q.sentence(good), q.sentence(wrong)
            mask = np.any([scene.masks[m] for m in q.about], axis=0)
            self.save(f"preferences/images/{name}", scene.png)
            self.save(f"preferences/masks/{name}", mask.astype(np.uint8) * 255)
            records.append({"id": name[:-4], "image": name, "question": tag + question,
                            "chosen": good, "rejected": wrong})
        return records

    def preferences(self, n, heldout):
        meta, held = {}, []
        for i, kind in enumerate(PAIRS):
            # Real MMPR sets differ: some questions begin with the image tag, others lack it.
            records = self.pairs(self.rng("pairs " + kind), kind, math.ceil(n / len(PAIRS)), kind,
                                 tag="<image>\n" if i % 2 else "")
            self.save(f"preferences/annotations/{kind}.jsonl", records)
            meta["toy_" + kind] = {"root": "images", "annotation": f"annotations/{kind}.jsonl",
                                   "data_augment": False, "repeat_time": 1,
                                   "length": len(records)}
            held += self.pairs(self.rng("heldout " + kind), kind, math.ceil(heldout / len(PAIRS)),
                               "heldout-" + kind, heldout=0.5)
        self.save("preferences/meta.json", meta)
        self.save("preferences/heldout.jsonl", held)

    def bench(self, name, n):
        """Fills quotas (kind, answer), at most two rows a picture, a sixth in unseen wording."""
        rng, left, rows, per = self.rng(name), {}, [], math.ceil(n / len(BENCH[name]))
        for kind, answers in BENCH[name].items():
            for a in answers or [None]:
                left[kind, a] = math.ceil(per / len(answers or [None]))
        while left:
            kind = rng.choice(sorted({k for k, _ in left}))     # the scene a missing row needs
            scene_kind = next((s for s, ks in SOURCES.items() if kind in ks), None)
            scene, shown = self.scene(rng, kind=scene_kind), []          # shown: by which rows
            qs = scene.questions() if scene_kind else [fact_question(rng, kind) for _ in "ab"]
            rng.shuffle(qs)
            for q in qs:
                keys = [k for k in left if k[0] == q.kind and k[1] in (None, q.answer)]
                if not keys or len(shown) == 2:
                    continue
                key = rng.choice(keys)
                heldout, index = rng.random() < 1 / 6, len(rows) + 1
                data = str(shown[0]) if shown else base64.b64encode(scene.png).decode()
                rows.append([index, data, q.ask(rng, heldout), q.answer,
                             q.slots.get("pair", q.kind),     # "left or right": 1 of 2, not of 4
                             "unseen wording" if heldout else "seen wording"])
                shown.append(index)
                left[key] -= 1
                if not left[key]:
                    del left[key]
        with open(self.path(f"bench/{name}.tsv"), "w", newline="") as f:
            out = csv.writer(f, delimiter="\t", lineterminator="\n")
            out.writerow(["index", "image", "question", "answer", "category", "split"])
            out.writerows(rows)

    def imagenet(self, split, n):
        rng = self.rng("imagenet " + split)
        for main in CLASSES:
            for i in range(n):
                scene = self.scene(rng, kind="shapes", main=main)
                self.save(f"imagenet/{split}/{'-'.join(main)}/{i + 1:04d}.png", scene.png)

    def ade20k(self, split, n):
        rng = self.rng("ade20k " + split)
        for i in range(n):
            scene, labels = self.scene(rng, kind="shapes"), np.zeros((SIZE, SIZE), np.uint8)
            for o in scene.objects:
                labels[scene.masks[o["name"]]] = 1 + SHAPES.index(o["shape"])
            self.save(f"ade20k/images/{split}/{i + 1:06d}.png", scene.png)
            self.save(f"ade20k/annotations/{split}/{i + 1:06d}.png", labels)

    def align(self, n):
        rng, records = self.rng("align"), []
        for i in range(n):
            scene, name = self.scene(rng), f"{i + 1:06d}.png"
            self.save("align/images/" + name, scene.png)
            records.append({"image": name, "caption": scene.caption()})
        self.save("align/pairs.jsonl", records)


SOURCES = {"shapes": ["colour", "shape", "exist", "count", "objects", "relation",
                      "larger"],
           "text": ["number", "digit", "word"],
           "chart": ["tallest", "shortest", "value", "taller"]}
COUNTS = {"captions": 3200, "instruct": 10000, "repair": 2000, "preferences": 7200,
          "heldout": 600, "bench": 600, "imagenet_train": 60, "imagenet_val": 25,
          "ade20k_training": 600, "ade20k_validation": 200, "align": 2048}


def draw_world(out, seed, scale, counts=COUNTS, **options):
    """Draws into OUT.tmp and renames, so that half a world never looks whole. options: World's."""
    with files.new_folder(out) as aside:
        fill(World(aside, seed, scale, **options), counts)


def fill(world, counts):
    """Every file and folder of the layout."""
    n = {name: world.count(c) for name, c in counts.items()}
    with world.bar:
        world.captions(n["captions"])
        world.instructions("instruct", n["instruct"])
        world.instructions("repair", n["repair"])
        world.preferences(n["preferences"], n["heldout"])
        for name in BENCH:
            world.bench(name, n["bench"])
        for split in ("train", "val"):
            world.imagenet(split, n["imagenet_" + split])
        for split in ("training", "validation"):
            world.ade20k(split, n["ade20k_" + split])
        world.align(n["align"])
    world.save("world.json", {
        "version": 1, "seed": world.seed, "scale": world.scale, "size": SIZE, "counts": n,
        "colours": list(COLOURS), "shapes": SHAPES, "words": WORDS,
        "imagenet_classes": ["-".join(c) for c in CLASSES],
        "ade20k_classes": ["other", *SHAPES],
        "heldout_wordings": [lines[-1] for lines in WORDINGS.values()]})
