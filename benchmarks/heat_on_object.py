"""Does the heat of tools.ask lie on the object asked about? Beside chance, for several models.

    python benchmarks/heat_on_object.py runs/toy-vit__toy-lm/{pretrain,sft,dpo} --data data/toy

Asks the toy's held-out questions about one object, as many of its colour as of its shape, and draws
the heat of each model's own answer. The object is where its mask says; its box is the smallest one
around it.

    peak     how often the middle of the hottest patch lies in the box; chance: the share of patches
             whose middle does
    heat     which share of all heat lies in the box, each patch counting by how much of it does;
             chance: the box's share of the picture; ratio: the one over the other

--first 25 takes the questions from the 26th of each kind on, so that --at and --classic can be
chosen by questions that are not reported.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import gradcam  # noqa: E402
from judge import intervals, score  # noqa: E402
from pivot import distributed, images, model_io, printing, records  # noqa: E402
from tools import ask  # noqa: E402

KINDS, LIMIT = ("colour", "shape"), 32            # the longest answer of a toy, as repair_eval.py


def questions(folder, each, first):
    """`each` held-out pairs of every kind, from the one numbered `first`: dicts."""
    items = [records.parse(*line) for line in records.read_lines(folder / "heldout.jsonl")]
    kinds = [[x for x in items if x["id"].startswith(f"heldout-{kind}-")] for kind in KINDS]
    return [x for kind in kinds for x in kind[first:first + each]]


def box_of(mask_path):
    """The smallest box around what a mask (PNG, 0 outside) shows: bool (H, W)."""
    mask = images.read_mask(mask_path, mask_path, str(mask_path)) > 0
    box = np.zeros_like(mask)
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    box[top:bottom + 1, left:right + 1] = True
    return box


def measured(model, tokenizer, folder, item, at, classic):
    """One question → right answer?, peak in the box?, its chance, share of heat, its chance."""
    said = ask.answer_of(model, tokenizer, str(folder / "images" / item["image"]),
                         records.one_placeholder(item["question"]), LIMIT)
    heat = ask.heat_of(model, tokenizer, said, LIMIT, at, classic)
    box, grid = box_of(folder / "masks" / item["image"]), int(len(heat) ** 0.5)
    middles = [int((i + 0.5) * len(box) / grid) for i in range(grid)]
    inside = torch.from_numpy(box[np.ix_(middles, middles)]).flatten().double()
    cover = gradcam.coverage(box, grid, 1.0)
    right = score.plain(tokenizer.decode(said.answer)) == score.plain(item["chosen"])
    return [float(right), inside[heat.argmax()], inside.mean(),
            (heat * cover).sum() / heat.sum(), cover.mean()]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="models, as tools.ask takes them")
    parser.add_argument("--data", default="data/toy", help="a toy world (default data/toy)")
    parser.add_argument("--each", type=int, default=25, help="questions of each kind (default 25)")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of each kind")
    parser.add_argument("--at", default="encoder", choices=["encoder", "projector"])
    parser.add_argument("--classic", action="store_true", help="gradcam.py's other definition")
    args = parser.parse_args()
    folder, rows = Path(args.data, "preferences"), []
    asked = questions(folder, args.each, args.first)
    for name in args.folders:
        model, tokenizer = model_io.load_mllm(ask.final_of(name))
        model.eval()
        values = torch.tensor([measured(model, tokenizer, folder, item, args.at, args.classic)
                               for item in asked], dtype=torch.float64)
        right, peak, peak_chance, heat, area = values.T
        cells = [f"{100 * x.mean():.1f}" for x in (right, peak, peak_chance, heat, area)]
        ahead = [f"{100 * found['mean']:+.1f} ±{100 * found['ci95']:.1f}" for found in
                 (intervals.normal(peak - peak_chance), intervals.normal(heat - area))]
        rows.append([name, cells[0], *cells[1:3], ahead[0], *cells[3:], ahead[1],
                     f"{heat.mean() / area.mean():.2f}"])
    print(f"{len(asked)} questions, gradient at the {args.at}{', classic' * args.classic}")
    print("\n".join(printing.table([["in percent", "right", "peak", "chance", "difference", "heat",
                                     "chance", "difference", "ratio"], *rows])))


if __name__ == "__main__":
    distributed.launch(main)
