"""Ask any trained models one question about one picture: one line of answer each.

    python -m tools.ask FOLDER [FOLDER …] PICTURE "QUESTION"
    python -m tools.ask runs/toy-vit__toy-lm/sft runs/toy-vit__toy-lm/dpo photo.jpg \\
        "What colour is the star?" --heat heat.png

FOLDER is a final/, or the folder that holds it: of a stage, or of repair_eval.py's re-paired model
(runs/NAME/repair/dpo). Pixels, template and prompt are those of repair_eval.py, and so is the
greedy answer, but for rounding in bf16; a benchmark's suffix ("Answer the question using a single
word or phrase.") is part of its question, so type it along.

--heat shows where each answer hangs on the picture: patch by patch Σ_d |∂ log π(answer)/∂A|, A the
encoder's features (N patches × D channels), in every picture from its own least to its own most. It
is the heat that gradcam.py gives for the SFT loss, but of the answer that the model gave, its end
included. A gradient says where a small change would matter; it does not prove what the model used.

Reads   the folders and the picture. Writes nothing but the PNG of --heat.
"""
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import gradcam
import repair_eval
from judge import answer
from pivot import distributed, files, flags, images, model_io
from pivot.distributed import print0
from pivot.records import ANSWER, PROMPT

PANEL, GAP, LINE = 280, 12, 19            # pixels: a picture's longer side, a border, a line
WHERE = "the command line"                # in messages, what names the picture and the question
WORDS = 'the words are FOLDER [FOLDER …] PICTURE "QUESTION"'


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    parser.usage = 'python -m tools.ask FOLDER [FOLDER …] PICTURE "QUESTION" [flags]'
    add = parser.add_argument
    add("words", nargs="+", metavar="WORD", help="models' folders, a picture, a question in quotes")
    add("--heat", metavar="PNG", help="write the heat of every answer over the picture, side by "
        "side")
    add("--overwrite", action="store_true", help="--heat may take the place of an older picture")
    add("--max-new-tokens", type=flags.COUNT, help="longest answer (default: repair_eval.py's, "
        f"{repair_eval.PAPER['max_new_tokens']}, with a toy LLM "
        f"{repair_eval.TOY['max_new_tokens']})")
    add("--temperature", type=flags.RATE, default=0.0, help="draw the answers (default 0: the "
        "likeliest words)")
    add("--seed", type=flags.NATURAL, default=0, help="of what --temperature draws (default 0)")
    args = parser.parse_intermixed_args(argv)
    if len(args.words) < 3:
        raise SystemExit(f"error: {len(args.words)} of at least three words; {WORDS}")
    *args.folders, args.picture, args.question = args.words
    args.question = args.question.strip()
    if not args.question:
        raise SystemExit(f"error: the question is empty; {WORDS}")
    args.dtype = "bf16" if torch.cuda.is_available() else "fp32"          # as flags.settle
    return args


def final_of(folder):
    """A folder that holds final/, or such a final/ itself → the final/, as Path; raises SystemExit
    where it is neither."""
    folder = Path(folder)
    if (folder / "final" / "config.json").exists():
        folder = folder / "final"
    elif not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise SystemExit(f"error: {folder} {kind}, a model's folder is wanted; {WORDS}")
    elif not (folder / "config.json").exists():
        there = sorted(str(path.parent.parent) for path in folder.glob("*/final/config.json"))
        raise SystemExit(f"error: {folder} holds no model (no final/)"
                         + (f"; there are {', '.join(there)}" if there else ""))
    model_io.read_config(folder)
    return folder


def refuse_heat_path(args):
    """Raise SystemExit where --heat names what cannot or should not be written."""
    path = Path(args.heat)
    if path.suffix.lower() != ".png":
        raise SystemExit(f"error: --heat {path}: a PNG is written; let its name end in .png")
    if not path.parent.is_dir():
        raise SystemExit(f"error: --heat {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise SystemExit(f"error: --heat {path} is a folder")
    if path.exists() and path.samefile(args.picture):
        raise SystemExit(f"error: --heat {path} is the picture asked about; name another file")
    if path.exists() and not args.overwrite:
        raise SystemExit(f"error: --heat {path} exists already; --overwrite replaces it")


class Said(NamedTuple):
    """prompt, answer: token ids, the image's expanded, an end mark left out; pixels: as the encoder
    takes them."""
    prompt: list
    answer: list
    pixels: np.ndarray


def answer_of(model, tokenizer, picture, question, limit, temperature=0.0, seed=0):
    """What repair_eval.py answers, in at most `limit` tokens: → Said."""
    prompt, = answer.prompt_ids([question], [WHERE], tokenizer, model.encoder)
    pixels = images.load_image(picture, model.encoder.image_size, WHERE)
    _, *batch = answer.collate([(0, prompt, torch.from_numpy(pixels))])
    device = next(model.parameters()).device
    tokens, = model.generate(*[x.to(device) for x in batch], limit, model_io.stop_ids(tokenizer),
                             temperature, [seed])
    return Said(prompt, tokens, pixels)


def heat_of(model, tokenizer, said, limit, at="encoder", classic=False):
    """gradcam.py's heat of −log π(answer | image, question): (N,) fp64. An answer shorter than the
    limit ended itself, and its end counts, as in training."""
    ended = len(said.answer) < limit
    words = said.answer + ([tokenizer.convert_tokens_to_ids("<|im_end|>")] if ended else [])
    item = {"ids": np.array(said.prompt + words), "pixels": said.pixels,
            "roles": np.repeat([PROMPT, ANSWER], [len(said.prompt), len(words)])}
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in data.collate([item], "answers").items()}
    features, grad, _ = gradcam.gradients(model, partial(gradcam.sft_loss, model, batch), at)
    return gradcam.heat_of(features.double(), grad.double(), classic).cpu()


def ask(args, folder, device):
    """One model, opened and let go: → (its answer, heat or None, the share of the picture's side
    that its patches cover)."""
    model, tokenizer = repair_eval.open_for_answers(args, folder, device)
    toy = model.llm.config.vocab_size < flags.TOY_WORDS
    values = repair_eval.TOY if toy else repair_eval.PAPER
    limit = args.max_new_tokens or values["max_new_tokens"]
    said = answer_of(model, tokenizer, args.picture, args.question, limit, args.temperature,
                     args.seed)
    heat, encoder = None, model.encoder
    if args.heat:
        heat = heat_of(model, tokenizer, said, limit)
    first = encoder.parts[0]                              # of A+B, whose grid is the first's
    reach = int(encoder.num_tokens ** 0.5) * first.patch_size / first.image_size
    return tokenizer.decode(said.answer), heat, reach


# ------------------------------------------------------------------------------------- the picture

def wrapped(pen, text, font, width):
    """A text in lines no wider than so many pixels; a word longer than a line is broken."""
    lines = [""]
    for word in text.split():
        while pen.textlength(word, font) > width:
            fits = next(n for n in range(len(word), 0, -1)
                        if n == 1 or pen.textlength(word[:n], font) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line for line in lines if line] or [""]


def draw(path, picture, question, columns):
    """The picture above its question, then for every model its name, the heat laid over, its
    answer. picture: uint8 (3, H, W); columns: [(name, answer, heat, reach), …]."""
    picture = Image.fromarray(picture.transpose(1, 2, 0))
    scale = PANEL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize(size, Image.NEAREST if scale > 1 else Image.BICUBIC)
    font, pen = ImageFont.load_default(14), ImageDraw.Draw(picture)
    texts, pictures = [(["picture"], wrapped(pen, question, font, PANEL))], [picture.copy()]
    for name, said, heat, reach in columns:
        pictures.append(picture.copy())
        gradcam.lay_over(pictures[-1], heat, reach)
        texts.append((wrapped(pen, name, font, PANEL), wrapped(pen, said, font, PANEL)))
    above, below = (max(len(lines[i]) for lines in texts) for i in (0, 1))
    sheet = Image.new("RGB", (len(texts) * (PANEL + GAP) + GAP,
                              (above + below) * LINE + size[1] + 3 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((name, said), shown) in enumerate(zip(texts, pictures)):
        x, y = GAP + i * (PANEL + GAP), GAP + above * LINE
        pen.text((x, y - len(name) * LINE), "\n".join(name), "grey", font)
        sheet.paste(shown, (x, y))
        pen.text((x, y + size[1] + GAP // 2), "\n".join(said), "black", font)
    files.write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def main():
    args = get_args()
    if not Path(args.picture).is_file():
        raise SystemExit(f"error: there is no picture {args.picture}; {WORDS}")
    picture = images.load_image(args.picture, None, WHERE)
    folders = [final_of(folder) for folder in args.folders]
    if args.heat:
        refuse_heat_path(args)
    device, columns = distributed.start(), []
    width = max(map(len, args.folders))
    for name, folder in zip(args.folders, folders):
        said, heat, reach = ask(args, folder, device)
        said = " ".join(said.split())
        print0(f"{name.ljust(width)}  {said}")
        columns.append((name, said, heat, reach))
    if args.heat and distributed.is_main():
        draw(args.heat, picture, args.question, columns)
        print0(f"wrote {args.heat}")


if __name__ == "__main__":
    distributed.launch(main)
