"""A small world to try everything on: pictures, questions, preferences, probes, tiny models.

    python toy.py data/toy [--seed 0] [--scale 1.0]     # draw the world (about half a minute)
    python toy.py pretrain [--out weights]              # make toy-vit and toy-lm (about 20 minutes)

The first command writes, below data/toy and in the formats the real data have:

    captions.json            LLaVA-Pretrain: one caption an image
    instruct.jsonl           LLaVA instructions, several turns a record, 3 % without an image
    repair.jsonl             the same, other images, to re-pair an encoder with a new LLM
    images/                  the root of the image names in the three files above
    preferences/meta.json    MMPR: one set a kind of mistake; images/ and masks/ beside it
    preferences/heldout.jsonl   pairs of the same kinds on other images, to measure with
    bench/Toy*.tsv           VLMEvalKit: General, Knowledge, OCR (text and charts), Vision
    imagenet/{train,val}/CLASS/*.png     one main object and distractors, for linear probing
    ade20k/{images,annotations}/{training,validation}/*.png      0 = other, 1..5 = the shapes
    align/pairs.jsonl        images and captions, for the alignment score
    world.json               seed, scale, counts, class names

The second writes <out>/toy-vit (SigLIP) and <out>/toy-lm (Qwen2) for transformers to open.
"""
import argparse
import base64
import csv
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE, CELL = 48, 8                           # pixels a side, of a patch: 6 x 6 patches
# Things stand on the grid of patches but for so many pixels. Anywhere at all, the tiny encoder
# needs hours to tell a square from a star; at 0 it would read a picture like a table.
JITTER = 1
COLOURS = {"red": (212, 52, 52), "orange": (224, 130, 50), "yellow": (218, 198, 70),
           "green": (66, 158, 76), "blue": (60, 96, 204), "purple": (142, 72, 170)}
SHAPES = ["circle", "square", "triangle", "diamond", "star"]
WORDS = ("cat cot cut car can cap cup map man mat hat hot hut hit pot pen pin pan "
         "sun son ran run bag big bug dog dig log leg let").split()
PLACES = ["top left", "top", "top right", "left", "centre", "right",
          "bottom left", "bottom", "bottom right"]
# How hard the pictures are. At these values the tiny encoder leaves room to improve.
COLOUR_JITTER, PIXEL_NOISE, TEXT_CONTRAST = 16, 6, (90, 140)

CALM = 0.5 if sys.stderr.isatty() else 10    # seconds between updates of a bar

# Ways to ask. The last of each kind is kept for the tests: never in training text.
WORDINGS = {line.split(": ")[0]: line.split(": ")[1].split(" | ") for line in """\
colour: What colour is the {x}? | Tell me the colour of the {x}. | The {x} has what colour?
shape: What shape is the {x} object? | Tell me the shape of {x}. | The {x} object has what shape?
exist: Is there a {x}? | Is a {x} in the picture? | Does the picture have a {x}?
number: What number is printed? | Tell me the number. | The picture has what number?
digit: What is the {x} digit? | Tell me the {x} digit. | The number has what {x} digit?
word: What word is printed? | Tell me the word. | The picture has what word?
tallest: Which bar is tallest? | What colour is the tallest bar? | The tallest bar is what?
shortest: Which bar is shortest? | What colour is the shortest bar? | The shortest bar is what?
value: What is the value of the {x} bar? | How tall is the {x} bar? | The {x} bar has what value?
taller: Is the {x} bar taller than {y}? | Is {x} taller than {y}? | Tell me, is {x} taller than {y}?
count: How many {x}s are there? | Tell me the number of {x}s. | The picture has how many {x}s?
objects: How many objects are there? | Tell me the number of objects. | How many objects is it?
relation: Is the {x} {pair} the {y}? | Where is {x}, {pair} {y}? | The {x} is {pair} the {y}?
larger: Is the {x} larger than the {y}? | Is {x} larger than {y}? | Tell me, is {x} larger than {y}?
sides: How many sides does a {x} have? | Tell me the sides of a {x}. | A {x} has how many sides?
mix: What colour do {x} and {y} make? | What is {x} plus {y}? | Tell me what {x} and {y} make.
more: Which is larger, {x} or {y}? | What is larger, {x} or {y}? | Tell me, is {x} or {y} larger?
sum: What is {x} plus {y}? | How much is {x} plus {y}? | Tell me, what is {x} plus {y}?
opposite: What is the opposite of {x}? | What is opposite to {x}? | Tell me the opposite of {x}.
thing: What colour is {x}? | Which colour does {x} have? | Tell me, what colour is {x}?
""".splitlines()}
SENTENCES = {                                # the same answers as full sentences
    "colour": "The {x} is {a}.", "shape": "The {x} object is a {a}.",
    "number": "The number is {a}.", "word": "The word is {a}.",
    "tallest": "The tallest bar is {a}.", "shortest": "The shortest bar is {a}.",
    "value": "The value of the {x} bar is {a}.", "count": "The number of {x}s is {a}.",
    "relation": "The {x} is {a} {of}the {y}.",
}
IN_WORDS = " Answer in a sentence."
BENCH = {                                    # kinds of question -> answers to balance over
    "ToyGeneral": {"colour": list(COLOURS), "shape": SHAPES, "exist": ["yes", "no"]},
    "ToyOCR": {"number": None, "digit": list("123456789"), "word": None,
               "tallest": list(COLOURS), "shortest": list(COLOURS), "value": list("123456789"),
               "taller": ["yes", "no"]},
    "ToyVision": {"count": list("123"), "objects": list("234"), "larger": ["yes", "no"],
                  "relation": ["left", "right", "above", "below"]},
    "ToyKnowledge": dict.fromkeys(["sides", "mix", "more", "sum", "opposite", "thing"]),
}
PAIRS = {"colour": ["colour"], "shape": ["shape"], "number": ["number"], "count": ["count"],
         "relation": ["relation"], "bar": ["tallest", "shortest", "value"]}
KINDS = {"shapes": 0.5, "text": 0.27, "chart": 0.23}      # shares of the three kinds of scene
CLASSES = [(c, s) for c in ("red", "green", "blue", "purple") for s in ("circle", "square", "star")]


@dataclass
class Question:
    kind: str
    answer: str
    slots: dict
    wrong: list = ()                         # answers of the same kind that are false here
    about: tuple = ()                        # names of the masks of what it asks about

    def ask(self, rng, heldout=False):
        lines = WORDINGS[self.kind]
        return (lines[-1] if heldout else rng.choice(lines[:-1])).format(**self.slots)

    def sentence(self, answer):
        of = "of " if answer in ("left", "right") else ""
        return SENTENCES[self.kind].format(a=answer, of=of, **self.slots)


# ------------------------------------------------------------------------- knowledge


def facts():
    """Every question that can be answered without looking."""
    colours = list(COLOURS)

    def fact(kind, answer, pool, **slots):
        return Question(kind, answer, slots, [p for p in pool if p != answer])

    out = [fact("sides", n, "34568", x=x) for x, n in
           zip("triangle square rectangle diamond pentagon hexagon octagon".split(), "3444568")]
    for x, y, a in (("red", "blue", "purple"), ("red", "yellow", "orange"),
                    ("blue", "yellow", "green"), ("red", "white", "pink"),
                    ("black", "white", "grey")):
        pool = ["purple", "orange", "green", "pink", "grey"]
        out += [fact("mix", a, pool, x=x, y=y), fact("mix", a, pool, x=y, y=x)]
    for a in range(10):
        for b in range(10):
            if a != b:
                out.append(fact("more", str(max(a, b)), [str(min(a, b))], x=a, y=b))
            if a + b < 10:
                out.append(fact("sum", str(a + b), "0123456789", x=a, y=b))
    both = ("left right,above below,large small,hot cold,up down,tall short,yes no,open closed,"
            "wet dry,fast slow,new old,black white,first last,day night,high low,soft hard")
    both = [p.split() for p in both.split(",")]
    for x, y in [p for a, b in both for p in ((a, b), (b, a))]:
        out.append(fact("opposite", y, [q for p in both for q in p if x not in p], x=x))
    things = {"red": "blood,a tomato,a cherry", "orange": "a carrot,an orange,a pumpkin",
              "yellow": "a banana,a lemon,butter", "green": "grass,a leaf,a frog",
              "blue": "the sea,the sky,a sapphire", "purple": "a plum,a grape,an aubergine"}
    out += [fact("thing", c, colours, x=x) for c, xs in things.items() for x in xs.split(",")]
    return out


FACTS = facts()

# ---------------------------------------------------------------------------- scenes


@functools.lru_cache(None)
def stamp(shape, r, angle):
    """Coverage (0..1) of a shape of radius r, drawn at 8 times the size and averaged down."""
    n, k = 2 * r + 1, 8
    im = Image.new("L", (n * k, n * k))
    c = n * k / 2

    def points(count, radii, start):
        turns = [math.radians(start + angle + 360 * i / count) for i in range(count)]
        return [(c + radii[i % len(radii)] * c * math.cos(t),
                 c + radii[i % len(radii)] * c * math.sin(t)) for i, t in enumerate(turns)]
    pen = ImageDraw.Draw(im)
    if shape == "circle":
        pen.ellipse([c * 0.1, c * 0.1, c * 1.9, c * 1.9], fill=255)
    else:
        pen.polygon({"square": points(4, [1.15], 45), "diamond": points(4, [1.05, 0.85], -90),
                     "triangle": points(3, [1.05], -90),
                     "star": points(10, [1.05, 0.45], -90)}[shape], fill=255)
    return np.asarray(im.resize((n, n), Image.BOX), dtype=np.float32) / 255


@functools.lru_cache(None)
def letters(text, size):
    """Coverage of a line of text, each character in a cell of its own. The font is Pillow's
    own: no system font, the same bytes anywhere."""
    font = ImageFont.load_default(size)
    im = Image.new("L", (CELL * len(text), 2 * CELL))
    for i, character in enumerate(text):
        ImageDraw.Draw(im).text((CELL * i + CELL / 2, 13), character, font=font, fill=255,
                                anchor="ms")
    return np.asarray(im, dtype=np.float32) / 255


class Scene:
    """What is in a picture. Nothing is drawn before `draw`, so that text alone is cheap."""

    def __init__(self, rng, kind=None, main=None):
        self.rng = rng
        self.kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
        self.objects, self.bars, self.number, self.word = [], [], "", ""
        if self.kind == "shapes":
            while not self.place_objects(main):
                pass
        elif self.kind == "text":
            self.number = str(rng.randint(10, 99))
            self.word = rng.choice(WORDS)
        else:
            n = rng.choice([3, 4])
            self.bars = list(zip(rng.sample(list(COLOURS), n), rng.sample(range(1, 10), n)))

    def place_objects(self, main):
        rng, self.objects = self.rng, []
        for i in range(rng.randint(2, 4)):
            colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
            large = rng.random() < 0.5
            if self.objects and not main and rng.random() < 0.3:
                shape = self.objects[0]["shape"]          # something to count
            if main:                                      # ImageNet: one large, others small
                (colour, shape), large = (main, True) if i == 0 else ((colour, shape), False)
            r = rng.randint(7, 8) if large else rng.randint(3, 4)
            for _ in range(20):     # a large thing covers 2 x 2 patches, a small one a single one
                x, y = (CELL * (rng.randint(1, 5) if large else rng.randint(0, 5) + 0.5)
                        + rng.randint(-JITTER, JITTER) for _ in "xy")
                x, y = (int(min(max(v, r), SIZE - 1 - r)) for v in (x, y))
                if all(max(abs(x - o["x"]), abs(y - o["y"])) > r + o["r"] for o in self.objects):
                    break
            else:
                return False
            if any((o["colour"], o["shape"]) == (colour, shape) for o in self.objects):
                return False                              # "the red circle" must be one
            self.objects.append(dict(
                colour=colour, shape=shape, r=r, x=x, y=y, name=f"{colour} {shape}",
                place=PLACES[y * 3 // SIZE * 3 + x * 3 // SIZE]))
        return True

    def draw(self):
        """Sets .image (uint8, SIZE x SIZE x 3), .masks {name: bool array} and .characters."""
        rng = self.rng
        noise = np.random.default_rng(rng.getrandbits(64))
        y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
        turn, wave = rng.random() * math.pi, rng.uniform(0.3, 1.5)
        stripes = np.sin((x * math.cos(turn) + y * math.sin(turn)) * wave + rng.random() * 6)
        base = np.array([rng.uniform(75, 180)] * 3) + [rng.uniform(-18, 18) for _ in range(3)]
        im = (base + stripes[..., None] * rng.uniform(0, 22)).astype(np.float32)
        self.masks, self.characters = {}, []

        def paint(name, cover, top, left, colour):
            h, w = cover.shape
            part = im[top:top + h, left:left + w]
            part += cover[..., None] * (np.asarray(colour, dtype=np.float32) - part)
            self.masks[name] = np.zeros((SIZE, SIZE), dtype=bool)
            self.masks[name][top:top + h, left:left + w] = cover > 0.5

        def tint(colour):
            return [v + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER) for v in COLOURS[colour]]

        for o in self.objects:
            cover = stamp(o["shape"], o["r"], rng.randrange(-12, 13, 4))
            paint(o["name"], cover, o["y"] - o["r"], o["x"] - o["r"], tint(o["colour"]))
        rows = [CELL * rng.randint(0, 1), CELL * rng.randint(3, 4)]
        lines = [("number", self.number), ("word", self.word)] if self.number else []
        for row, (name, text) in zip(rows, rng.sample(lines, len(lines))):
            cover = letters(text, rng.randint(14, 16))
            h, w = cover.shape
            top = min(max(row + rng.randint(-JITTER, JITTER), 0), SIZE - h)
            left = CELL * rng.randint(0, 6 - len(text)) + rng.randint(-JITTER, JITTER)
            left = min(max(left, 0), SIZE - w)
            ink = base + rng.choice([-1, 1]) * rng.uniform(*TEXT_CONTRAST)
            paint(name, cover, top, left, ink)
            for i, character in enumerate(text):
                box = np.zeros((SIZE, SIZE), dtype=bool)
                box[top:top + h, left + CELL * i:left + CELL * (i + 1)] = True
                self.characters.append((character, box))
        for i, (colour, value) in enumerate(self.bars):
            step, bottom = 44 // len(self.bars), SIZE - 3
            wide, high = rng.randint(step - 4, step - 2), value * 4 + 3
            paint(colour, np.ones((high, wide)), bottom - high, 3 + i * step, tint(colour))
        im += noise.standard_normal(im.shape, dtype=np.float32) * PIXEL_NOISE
        self.image = im.clip(0, 255).astype(np.uint8)
        return self

    def caption(self):
        if self.number:
            return f"The number {self.number} and the word {self.word} are printed."
        if self.bars:
            return "A bar chart: " + ", ".join(f"{c} {v}" for c, v in self.bars) + "."
        parts = [f"a {'large' if o['r'] > 6 else 'small'} {o['name']} at the {o['place']}"
                 for o in self.objects]
        text = ", ".join(parts[:-1]) + " and " + parts[-1] + "."
        return text[0].upper() + text[1:]

    def questions(self):
        """Every question the scene can answer; yes and no are made equally often."""
        rng, out, colours = self.rng, [], list(COLOURS)

        def add(kind, answer, pool, about=(), **slots):
            wrong = [str(p) for p in pool if str(p) != str(answer)]
            out.append(Question(kind, str(answer), slots, wrong, tuple(about)))

        shapes = [o["shape"] for o in self.objects]
        hues = [o["colour"] for o in self.objects]
        names = [o["name"] for o in self.objects]
        for o in self.objects:
            c, s, name = o["colour"], o["shape"], o["name"]
            if shapes.count(s) == 1:
                add("colour", c, colours, [name], x=s)
            if hues.count(c) == 1:
                add("shape", s, SHAPES, [name], x=c)
            c2 = rng.choice([k for k in colours if k != c])
            s2 = rng.choice([k for k in SHAPES if k != s])
            # Half of the false ones take colour and shape from two objects that are there.
            mixed = [f"{h} {k}" for h in hues for k in shapes if f"{h} {k}" not in names]
            false = rng.choice(mixed) if mixed and rng.random() < 0.5 else f"{c2} {s2}"
            add("exist", "yes", ["no"], [name], x=name)
            if false not in names:
                add("exist", "no", ["yes"], x=false)
            for p in self.objects:
                if p is o:
                    continue
                col, row = (PLACES.index(o["place"]) % 3 - PLACES.index(p["place"]) % 3,
                            PLACES.index(o["place"]) // 3 - PLACES.index(p["place"]) // 3)
                if col and abs(o["x"] - p["x"]) >= 6:
                    ab = ["left", "right"]
                    add("relation", ab[col > 0], ab, [name], x=name, y=p["name"],
                        pair="left or right of")
                if row and abs(o["y"] - p["y"]) >= 6:
                    ab = ["above", "below"]
                    add("relation", ab[row > 0], ab, [name], x=name, y=p["name"],
                        pair="above or below")
                if (o["r"] > 6) != (p["r"] > 6):
                    yes = o["r"] > p["r"]
                    add("larger", "yes" if yes else "no", ["yes", "no"], [name], x=name,
                        y=p["name"])
        for s in sorted(set(shapes)):
            about = [n for n in names if n.endswith(s)]
            # Wrong counts come from the same three as right ones, or 4 would only ever be wrong.
            add("count", len(about), (1, 2, 3), about, x=s)
        if self.objects:
            add("objects", len(shapes), range(2, 5), names)
        if self.number:
            n = self.number          # wrong numbers and words differ in one character
            once = [n[:k] + d + n[k + 1:] for k in range(2) for d in "123456789" if d != n[k]]
            add("number", n, once, ["number"])
            add("digit", n[0], "123456789", ["number"], x="first")
            add("digit", n[-1], "0123456789", ["number"], x="last")
            near = [w for w in WORDS if sum(a != b for a, b in zip(w, self.word)) == 1]
            add("word", self.word, near or WORDS, ["word"])
        if self.bars:
            order, held = sorted(self.bars, key=lambda b: b[1]), [c for c, _ in self.bars]
            add("tallest", order[-1][0], held, [order[-1][0]])
            add("shortest", order[0][0], held, [order[0][0]])
            for c, v in self.bars:
                add("value", v, [k for k in range(1, 10) if abs(k - v) < 4], [c], x=c)
                d, w = rng.choice([b for b in self.bars if b[0] != c])
                add("taller", "yes" if v > w else "no", ["yes", "no"], [c], x=c, y=d)
        return out

    def some(self, n):
        """n questions of kinds as various as the scene allows."""
        groups, out = {}, []
        for q in self.questions():
            groups.setdefault(q.kind, []).append(q)
        for group in groups.values():
            self.rng.shuffle(group)
        while len(out) < n and groups:
            for kind in self.rng.sample(sorted(groups), len(groups)):
                out.append(groups[kind].pop())
                if not groups[kind]:
                    del groups[kind]
        return out[:n]


def turn(rng, q):
    """One question and its answer as training text."""
    if q.kind in SENTENCES and rng.random() < 0.12:
        return q.ask(rng) + IN_WORDS, q.sentence(q.answer)
    return q.ask(rng), q.answer


def fact_question(rng, kind=None):
    """A fact, of this kind if one is named."""
    return rng.choice([f for f in FACTS if f.kind == (kind or f.kind)])


def conversation(rng, scene, n=6):
    """n turns; every sixth conversation about a picture also asks a fact."""
    qs = [fact_question(rng) for _ in range(n)] if scene is None else scene.some(n)
    if scene is not None and rng.random() < 1 / 6:
        qs[rng.randrange(len(qs))] = fact_question(rng)
    return [turn(rng, q) for q in qs]


# ----------------------------------------------------------------------------- files


class World:
    """Writes below `root`; no two pictures of a world have the same bytes."""

    def __init__(self, root, seed, scale):
        self.root, self.seed, self.scale, self.seen = root, seed, scale, set()
        self.bar = tqdm(desc="drawing", unit=" images", mininterval=CALM)

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
            if kind == "count" and qs:                   # else most counts would be 1
                want = rng.choice("123")
                qs = [q for q in qs if q.answer == want]
            if not qs:
                continue
            q, name = rng.choice(qs), f"{prefix}-{len(records) + 1:05d}.png"
            wrong, good = rng.choice(q.wrong), q.answer
            question = q.ask(rng, heldout=rng.random() < heldout)
            if rng.random() < 2 / 3:                     # the others are single words
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
            scene, image = self.scene(rng, kind=scene_kind), None
            qs = scene.questions() if scene_kind else [fact_question(rng, kind) for _ in "ab"]
            rng.shuffle(qs)
            for q in qs:
                keys = [k for k in left if k[0] == q.kind and k[1] in (None, q.answer)]
                if not keys or (image and image[1]):
                    continue
                key = rng.choice(keys)
                heldout, index = rng.random() < 1 / 6, len(rows) + 1
                data = base64.b64encode(scene.png).decode() if not image else str(image[0])
                rows.append([index, data, q.ask(rng, heldout), q.answer,
                             q.slots.get("pair", q.kind),     # "left or right": 1 of 2, not of 4
                             "unseen wording" if heldout else "seen wording"])
                image = (index, False) if not image else (image[0], True)
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
COUNTS = {"captions": 3000, "instruct": 8000, "repair": 4000, "preferences": 2000,
          "heldout": 600, "bench": 600, "imagenet_train": 60, "imagenet_val": 25,
          "ade20k_training": 600, "ade20k_validation": 200, "align": 2048}


def draw_world(out, seed, scale):
    """Draws into OUT.tmp and renames, so that half a world never looks whole."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    world = World(aside, seed, scale)
    n = {name: world.count(c) for name, c in COUNTS.items()}
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
        "version": 1, "seed": seed, "scale": scale, "size": SIZE, "counts": n,
        "colours": list(COLOURS), "shapes": SHAPES, "words": WORDS,
        "imagenet_classes": ["-".join(c) for c in CLASSES],
        "ade20k_classes": ["other", *SHAPES],
        "heldout_wordings": [lines[-1] for lines in WORDINGS.values()]})
    world.bar.close()
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)


# ----------------------------------------------------------------------- pretraining

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>"
          "system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + "
          "m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# name: width, layers, heads, inner width, steps, batch, learning rate
# A ViT's batch is in images, an LM's in tokens. The LM never learns to look things up at 3e-3.
MODELS = {"toy-vit": (128, 5, 4, 512, 2400, 48, 1e-3), "toy-lm": (128, 4, 4, 384, 4500, 1000, 1e-3),
          "toy-vit-l": (192, 7, 6, 768, 2400, 48, 8e-4),
          "toy-lm-l": (192, 6, 6, 576, 4500, 1000, 8e-4)}


def train(name, model, steps, rate, loss_of):
    """AdamW, warm-up and cosine; `loss_of(part of the steps done)` makes its own batch."""
    import torch
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))))
    bar, mean = tqdm(range(steps), desc=name, mininterval=CALM), None
    for step in bar:
        loss = loss_of(step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


def contents(scene):
    """(what, mask) of everything that can be named; counts, values and relations stay open."""
    for o in scene.objects:
        for what in (o["colour"], o["shape"], "large" if o["r"] > 6 else "small"):
            yield what, scene.masks[o["name"]]
    for colour, _ in scene.bars:
        yield colour, scene.masks[colour]
        yield "bar", scene.masks[colour]
    yield from scene.characters


def in_patches(mask):
    """The patches that show a thing: an eighth covered, or nearly the most any patch has of it."""
    share = mask.reshape(SIZE // CELL, CELL, -1, CELL).mean((1, 3)).ravel()
    return (share > 0.125) | (share >= 0.8 * share.max())


def pretrain_vit(folder, name, steps, seed):
    """What is in each patch, read out by a linear map behind the whole net.

    Captions alone teach a ViT this small too slowly for a laptop (one label a picture instead of
    36), so the toy cheats with its masks. The recipe later drops the last block, as it does
    with SigLIP, and so reads features that no read-out was trained on.
    """
    import torch
    from torch import nn
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
    width, layers, heads, inner, default, batch, rate = MODELS[name]
    rng = random.Random(f"{seed}/{name}")
    torch.manual_seed(seed)
    model = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=SIZE, patch_size=CELL, vision_use_head=False))
    names = [*COLOURS, *SHAPES, "large", "small", "bar", *"0123456789",
             *sorted(set("".join(WORDS)))]
    both = nn.ModuleList([model, nn.Linear(width, len(names))])
    nn.init.constant_(both[1].bias, -4.0)       # most things are absent from most patches

    def loss_of(_):
        scenes = [Scene(rng).draw() for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
        present = torch.zeros(batch, (SIZE // CELL) ** 2, len(names))
        for i, scene in enumerate(scenes):
            for what, mask in contents(scene):
                present[i, in_patches(mask), names.index(what)] = 1
        logits = both[1](model(pixels / 127.5 - 1).last_hidden_state)
        return nn.functional.binary_cross_entropy_with_logits(
            logits, present, reduction="sum") / present[..., 0].numel()
    train(name, both, steps or default, rate, loss_of)
    model.half().save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3, image_mean=[0.5] * 3,
                         image_std=[0.5] * 3).save_pretrained(folder)


LOOKED_UP = {"colour", "shape", "word", "number", "digit", "value"}


def table(scene):
    """The scene as 6 x 6 cells, each a list of the words for what is in it; "." where empty."""
    cells = [[] for _ in range((SIZE // CELL) ** 2)]
    for what, mask in contents(scene):
        for i in np.flatnonzero(in_patches(mask)):
            cells[i].append(what if what.isdigit() else " " + what)
    return [cell or ["."] for cell in cells]


def document(rng, done):
    """Text to pretrain on: parts (text or table, is it an answer?). One in eight asks facts.

    Looking things up comes first (a tenth of the steps): short descriptions, one question a line.
    Then ChatML; three scenes in four are a table instead of a description, and some of those are
    only to be put into words. A table is how words can be laid out like patches: a model that has
    read tables finds its way in an image as soon as the projector speaks its language.
    """
    plain, scene = done < 0.1, None
    if rng.random() < 1 / 8:
        questions, given = [fact_question(rng) for _ in range(8)], ""
    else:
        scene = Scene(rng)
        while plain and len(scene.objects) > 3:
            scene = Scene(rng)
        questions, given = scene.some(40), scene.caption() + "\n"
        if plain:
            questions = [q for q in questions if q.kind in LOOKED_UP]
        elif rng.random() < 0.75:
            given = table(scene.draw())
            if rng.random() < 0.2:
                return [(given, 0), (scene.caption() + "\n", 1)]
            if rng.random() < 0.3:
                questions.append(fact_question(rng))
    rng.shuffle(questions)
    if plain:
        talk = [turn(rng, q) for q in questions[:8]]
        return [(given, 0)] + [part for question, answer in talk for part in
                               ((question, 0), (" " + answer, 1), ("\n", 0))]
    parts = [("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", 0),
             (given, 0)]
    for i, q in enumerate(questions[:6]):
        question, answer = turn(rng, q)
        start = "<|im_start|>user\n" if i else "\n" if isinstance(given, list) else ""
        parts += [(start + question + "<|im_end|>\n<|im_start|>assistant\n", 0),
                  (answer + "<|im_end|>", 1), ("\n", 0)]
    return parts


def pretrain_lm(folder, name, steps, seed):
    """A byte-level BPE and a Qwen2 on descriptions, questions, answers and facts."""
    import tokenizers
    import torch
    from torch import nn
    from tokenizers import decoders, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    width, layers, heads, inner, default, batch, rate = MODELS[name]
    rng = random.Random(f"{seed}/{name}")
    torch.manual_seed(seed)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")   # Qwen's own
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = ["".join(text for text, _ in document(rng, i / 4000) if isinstance(text, str))
             for i in range(4000)]
    bpe.train_from_iterator(
        (re.sub(r"<\|\w+\|>", "", text) for text in texts),
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[2],
                                        pad_token=special[0], model_max_length=1024)
    tokenizer.chat_template = CHATML
    model = Qwen2ForCausalLM(Qwen2Config(
        # Like Qwen, more rows than tokens: room for <image> without resizing.
        # 0.08 is 1 / sqrt(width): at HF's 0.02 the first thousand steps only find the scale.
        initializer_range=0.08, vocab_size=(len(tokenizer) + 8 + 63) // 64 * 64, hidden_size=width,
        intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    ids = functools.lru_cache(20000)(lambda text: tokenizer(text).input_ids)
    waiting = []

    def encode(parts):
        """Token ids, weights, and [(position, ids of a cell's words), ...] of one document."""
        tokens, weights, cells = [], [], []
        for part, answer in parts:
            if isinstance(part, list):
                cells += [(len(tokens) + i, [t for word in words for t in ids(word)])
                          for i, words in enumerate(part)]
            new = [0] * len(part) if isinstance(part, list) else ids(part)
            tokens += new
            # Questions are mostly chance: what can be learnt sits in the answers.
            weights += [0.0 if isinstance(part, list) else 1.0 if answer else 0.1] * len(new)
        return tokens, weights, cells

    def refill(done):
        """128 documents in batches of like lengths."""
        pool = sorted((encode(document(rng, done)) for _ in range(128)), key=lambda d: len(d[0]))
        size = 0
        for d in pool:
            if not size or size + len(d[0]) > batch:
                waiting.append([])
                size = 0
            waiting[-1].append(d)
            size += len(d[0])
        rng.shuffle(waiting)

    def loss_of(done):
        if not waiting:
            refill(done)
        tokens, weights, tables = zip(*waiting.pop())
        x, weight = (nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
                     for rows in (tokens, weights))
        embeds, look_up = model.get_input_embeddings()(x), model.get_input_embeddings()
        cells = [(row, at, words) for row, t in enumerate(tables) for at, words in t]
        if cells:                   # a cell enters as the mean of its words, as a patch will
            rows, at, words = zip(*cells)
            bags = nn.utils.rnn.pad_sequence([torch.tensor(w) for w in words], batch_first=True,
                                             padding_value=-1)
            real = (bags >= 0)[..., None]
            mean = (look_up(bags.clamp(min=0)) * real).sum(1) / real.sum(1)
            embeds = embeds.index_put((torch.tensor(rows), torch.tensor(at)), mean)
        # Padding is at the end of the rows: a causal model does not see it.
        logits = model(inputs_embeds=embeds).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        return (loss * weight[:, 1:]).sum() / weight[:, 1:].sum()
    train(name, model, steps or default, rate, loss_of)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv):
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    if argv[:1] == ["pretrain"]:
        ap.prog += " pretrain"
        ap.add_argument("--out", type=Path, default=Path("weights"),
                        help="folder to write the model folders in; models there are replaced")
        ap.add_argument("--models", nargs="+", default=["toy-vit", "toy-lm"], choices=MODELS,
                        help="which to make; the -l ones are one size up, and not committed")
        ap.add_argument("--steps", type=int, help="instead of the table's; fewer make worse models")
        args = ap.parse_args(argv[1:])
        for name in args.models:
            aside = args.out / (name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            make = pretrain_vit if "vit" in name else pretrain_lm
            make(aside, name, args.steps, args.seed)
            shutil.rmtree(args.out / name, ignore_errors=True)
            os.replace(aside, args.out / name)
        return
    ap.add_argument("out", type=Path, help="folder to draw, or the word pretrain (see above)")
    ap.add_argument("--scale", type=float, default=1.0,
                    help="multiplies every count; 0.02 is enough for a test")
    ap.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = ap.parse_args(argv)
    if args.out.exists() and not args.overwrite:
        raise SystemExit(f"{args.out} exists; --overwrite replaces it")
    draw_world(args.out, args.seed, args.scale)


if __name__ == "__main__":
    main(sys.argv[1:])
