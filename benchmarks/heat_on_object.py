"""Does the heat of tools.ask lie on the object asked about? Beside chance, for models of the toy.

    python benchmarks/heat_on_object.py runs/toy-vit__toy-lm/{pretrain,sft,dpo}

Draws scenes of two to four objects, asks of one object in each its colour or its shape, and takes
the heat of the model's own answer. An object is the smallest box around its mask.

    peak     how often the middle of the hottest patch lies in the box; chance: the share of patches
             whose middle does
    heat     which share of all heat lies in the box, each patch counting by how much of it does;
             chance: the box's share of the picture. Where a ReLU left no heat at all (--classic),
             none lies in the box

The same is said of all other objects of the scene together: heat that lies on whatever is there
would be as much above chance on them.

Seed 0 is the reported one; --at and --classic, the definition of the heat, were chosen by seed 1.
"""
import argparse
import io
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import gradcam  # noqa: E402
from judge import intervals, score  # noqa: E402
from pivot import distributed, model_io, printing  # noqa: E402
from tools import ask  # noqa: E402
from toy.scenes import Scene  # noqa: E402

KINDS, LIMIT = ("colour", "shape"), 32            # LIMIT: the longest answer, as repair_eval.py


def box_of(mask):
    """The smallest box around what a mask shows: bool (H, W) → bool (H, W)."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    box = np.zeros_like(mask)
    box[top:bottom + 1, left:right + 1] = True
    return box


def questions(n, seed):
    """n scenes and a question about one object of each, kinds in turn: (PNG as bytes, question,
    right answer, box of the object, boxes of the others as one mask)."""
    rng, found = random.Random(f"heat {seed}"), []
    while len(found) < n:
        scene = Scene(rng, kind="shapes").draw()
        asked = [q for q in scene.questions() if q.kind == KINDS[len(found) % 2]]
        if asked:
            q, png = rng.choice(asked), io.BytesIO()
            Image.fromarray(scene.image).save(png, "PNG")
            boxes = {name: box_of(mask) for name, mask in scene.masks.items()}
            box = boxes.pop(q.about[0])
            others = np.any(list(boxes.values()), axis=0) & ~box
            found.append((png.getvalue(), q.ask(rng), q.answer, box, others))
    return found


def peak_and_heat(heat, where):
    """heat (N,), where: bool (H, W) → is the peak there? its chance, share of heat, its chance."""
    grid = int(len(heat) ** 0.5)
    middles = [int((i + 0.5) * len(where) / grid) for i in range(grid)]
    inside = torch.from_numpy(where[np.ix_(middles, middles)]).flatten().double()
    cover = gradcam.coverage(where, grid, 1.0)
    return [inside[heat.argmax()], inside.mean(), heat @ cover / heat.sum().clamp(min=1e-30),
            cover.mean()]


def row(name, part, right, values):
    """One line of the table; values (n, 4) as peak_and_heat gives them."""
    peak, chance, heat, area = values.T
    ahead = intervals.normal(peak - chance)
    return [name, part, *(f"{100 * x.mean():.1f}" for x in (right, peak, chance)),
            f"{100 * ahead['mean']:+.1f} ±{100 * ahead['ci95']:.1f}",
            *(f"{100 * x.mean():.1f}" for x in (heat, area)), f"{heat.mean() / area.mean():.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="models, as tools.ask takes them")
    parser.add_argument("--questions", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default 0)")
    parser.add_argument("--at", default="encoder", choices=["encoder", "projector"])
    parser.add_argument("--classic", action="store_true", help="gradcam.py's other definition")
    args = parser.parse_args()
    asked = questions(args.questions, args.seed)
    print(f"{len(asked)} questions, {'Grad-CAM' if args.classic else 'gradient'} at the {args.at}")
    rows = [["in percent", "on", "right", "peak", "chance", "difference", "heat", "chance",
             "times"]]
    for name in args.folders:
        model, tokenizer = model_io.load_mllm(ask.final_of(name))
        model.eval()
        found = {"the object": [], "the others": []}
        right = []
        for png, question, answer, *places in asked:
            said = ask.answer_of(model, tokenizer, png, question, LIMIT)
            heat = ask.heat_of(model, tokenizer, said, LIMIT, args.at, args.classic)
            right.append(score.plain(tokenizer.decode(said.answer)) == answer)
            for values, place in zip(found.values(), places):
                values.append(peak_and_heat(heat, place))
        for part, values in found.items():
            rows.append(row(name, part, torch.tensor(right).double(),
                            torch.tensor(values, dtype=torch.float64)))
    print("\n".join(printing.table(rows)))


if __name__ == "__main__":
    distributed.launch(main)
