"""What the toy world shows and asks: scenes, their captions and questions, facts to know.

A `Scene` is drawn in text first (objects, or a number and a word, or bars) and in pixels only when
asked, so that a language model can be trained on thousands of scenes that nobody drew.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
place: At which place is the {x}? | Tell me the place of the {x}. | The {x} is at which place?
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
    "objects": "The number of objects is {a}.", "relation": "The {x} is {a} {of}the {y}.",
}
IN_WORDS = " Answer in a sentence."
BENCH = {                                    # kinds of question -> answers to balance over
    "ToyGeneral": {"colour": list(COLOURS), "shape": SHAPES, "exist": ["yes", "no"]},
    "ToyOCR": {"number": None, "digit": list("123456789"), "word": None,
               "tallest": list(COLOURS), "shortest": list(COLOURS), "value": list("12345"),
               "taller": ["yes", "no"]},
    "ToyVision": {"count": list("123"), "objects": list("234"), "larger": ["yes", "no"],
                  "relation": ["left", "right", "above", "below"]},
    "ToyKnowledge": dict.fromkeys(["sides", "mix", "more", "sum", "opposite", "thing"]),
}
PAIRS = {"colour": ["colour"], "shape": ["shape"], "number": ["number"],
         "count": ["count", "objects"], "relation": ["relation"],
         "bar": ["tallest", "shortest", "value"]}
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
            n = rng.choice([3, 4])                        # (colour, value, column of patches)
            self.bars = list(zip(rng.sample(list(COLOURS), n), rng.sample(range(1, 6), n),
                                 sorted(rng.sample(range(SIZE // CELL), n))))

    def place_objects(self, main):
        rng, self.objects = self.rng, []
        for i in range(rng.randint(2, 4)):
            colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
            large = rng.random() < 0.5
            if self.objects and not main and rng.random() < 0.5:
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
        # Named in reading order, so that a caption says nothing that the picture does not.
        self.objects.sort(key=lambda o: (PLACES.index(o["place"]), o["x"]))
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
        for colour, value, column in self.bars:
            wide = rng.randint(CELL - 3, CELL - 1)
            high = CELL * value + rng.randint(-JITTER, JITTER)
            left = CELL * column + rng.randint(0, CELL - wide)
            paint(colour, np.ones((high, wide)), SIZE - high, left, tint(colour))
        im += noise.standard_normal(im.shape, dtype=np.float32) * PIXEL_NOISE
        self.image = im.clip(0, 255).astype(np.uint8)
        return self

    def caption(self):
        if self.number:
            return f"The number {self.number} and the word {self.word} are printed."
        if self.bars:
            return "A bar chart: " + ", ".join(f"{c} {v}" for c, v, _ in self.bars) + "."
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
            add("place", o["place"], PLACES, [name], x=name)
            for p in self.objects:
                if p is o:
                    continue
                for axis, ab, pair in (("x", ["left", "right"], "left or right of"),
                                       ("y", ["above", "below"], "above or below")):
                    a, b = o[axis], p[axis]                 # in different thirds, and clearly so
                    if a * 3 // SIZE != b * 3 // SIZE and abs(a - b) >= 6:
                        add("relation", ab[a > b], ab, [name], x=name, y=p["name"], pair=pair)
                if (o["r"] > 6) != (p["r"] > 6):
                    add("larger", "yes" if o["r"] > 6 else "no", ["yes", "no"], [name], x=name,
                        y=p["name"])
        if self.objects:         # the most frequent shape alone, or most counts would be 1
            s = max(sorted(set(shapes)), key=shapes.count)
            about = [n for n in names if n.endswith(s)]
            if len(about) < 4:   # wrong counts come from the same three as right ones
                add("count", len(about), (1, 2, 3), about, x=s)
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
            order, held = sorted(self.bars, key=lambda b: b[1]), [c for c, _, _ in self.bars]
            add("tallest", order[-1][0], held, [order[-1][0]])
            add("shortest", order[0][0], held, [order[0][0]])
            for c, v, _ in self.bars:
                add("value", v, range(1, 6), [c], x=c)
                d, w, _ = rng.choice([b for b in self.bars if b[0] != c])
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
