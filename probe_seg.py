"""Evidence 2, segmentation: does every patch token know what lies in its own patch?

One process:     python probe_seg.py --encoder toy-vit DIR --data data/toy/ade20k
Eight GPUs:      torchrun --nproc_per_node=8 probe_seg.py --encoder siglip2-so400m DIR

The patch-seg protocol: a head, Linear – GELU – Linear, reads one frozen token and says which
classes its patch holds, "other" only where it is alone. BCE, AdamW 1e-3, weight decay 0.01, batch
32, 5 epochs; warm-up 500 steps, but never over a quarter of all, then cosine to 1e-4. Scores:
  recall  at probability 0.5 over all patches; mean over the classes that have a positive
  mIoU    each patch's likeliest class painted on its pixels, one summed confusion matrix, mean over
          classes that occur; no interpolation, by which a token would borrow from its neighbours
  mIoU-0  the same without the pixels of "other". An answer "other" elsewhere is a miss; by ADE20K's
          convention no head could give it

Reads   DATA/images/{training,validation}/*.jpg, DATA/annotations/…/*.png, 0 = other: SceneParse150
        (151 classes) or the toy's (those of ../world.json). Pixels of label 255 are ignored: they
        count in no score, and a patch that holds nothing else in no loss. Both are cropped to
        the largest centred square; masks are resized by the nearest pixel.
Writes  --out (default runs/NAME/probes/seg): results.json, overlays.png
        (image | truth | each encoder, head of seed 0).

The encoder is what costs: an image is encoded once an epoch, and the heads of all seeds learn from
it. Seeds differ in a head's start and in the order inside 256 images; every encoder gets the same.
± is the spread over seeds; the interval of a difference is a bootstrap over validation images.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import colorsys
import math
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

from judge import intervals, probing
from pivot import distributed, files, flags, images, printing
from pivot.distributed import print0
from pivot.records import BadRecord

BATCH, CHUNK, TILE = 32, 256, 192      # images a step; encoded at a time; pixels of an overlay
SCORES = ("recall", "mIoU", "mIoU-0")
IGNORED = 255                          # the label of pixels that published masks say nothing about
SPLITS = ("training", "validation")


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--encoder", nargs="+", required=True, metavar="DIR",
                        help="encoders to compare: presets, folders (extract.py) or hub ids")
    parser.add_argument("--data", default="data/ade20k", help="folder of images/, annotations/")
    parser.add_argument("--seeds", type=flags.COUNT, default=6, help="heads trained (paper: 6)")
    parser.add_argument("--epochs", type=flags.COUNT, default=5, help="passes (paper: 5)")
    parser.add_argument("--limit", type=flags.COUNT, help="quick look: N images of each split")
    flags.add_image_size(parser)
    parser.add_argument("--pictures", type=flags.NATURAL, default=8, help="images in overlays.png")
    parser.add_argument("--out", metavar="DIR", help="default: probes/seg in the run folder")
    parser.add_argument("--workers", type=flags.NATURAL, default=2, help="image-decoding processes")
    return parser.parse_args()


# --------------------------------------------------------------------------------- images and masks

def list_splits(root, limit):
    """[(image, mask)] of training and of validation, in the order of names; every image has its
    mask."""
    splits = []
    for folder, found in images.pictures_in([root / "images" / s for s in SPLITS]).items():
        if not found:
            raise SystemExit(f"error: no images in {folder}")
        masks = root / "annotations" / folder.name
        splits.append([(Path(image), masks / f"{Path(image).stem}.png")
                       for image in found[:limit]])
        for image, mask in splits[-1]:
            if not mask.exists():
                raise SystemExit(f"error: {image} has no mask: expected {mask}")
    return splits


def square(image, mask, size, classes):
    """Paths → their largest centred squares: pixels (size, size, 3), labels (size, size), uint8."""
    pixels = images.load_image(image, None, "--data").transpose(1, 2, 0)
    labels = images.read_mask(mask, image, "--data")
    if labels.ndim != 2 or labels.dtype.kind == "f":
        what = "in colours" if labels.ndim != 2 else "of fractions"
        raise BadRecord(f"--data: mask {mask} is {what}, one whole number a pixel is expected")
    unknown = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if unknown.size:
        raise BadRecord(f"--data: mask {mask} has label {unknown.max()}, the last is {classes - 1}")
    side, h, w = min(labels.shape), *labels.shape
    box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
    return [np.asarray(Image.fromarray(x.astype(np.uint8)).crop(box).resize((size, size), how))
            for x, how in ((pixels, Image.Resampling.BICUBIC), (labels, Image.Resampling.NEAREST))]


def read_batch(masked, size, grid, classes):
    """→ pixels (B, 3, S, S), and how many pixels of each class every patch holds (B, N, K) int16,
    N = grid² row by row, ignored ones not counted; raises BadRecord."""
    pixels = np.zeros((len(masked), 3, size, size), np.uint8)
    counts = np.zeros((len(masked), grid * grid * classes), np.int16)
    p = size // grid                           # 384 / 14: the convolution leaves 6 pixels out, too
    patch = np.arange(p * grid) // p
    cell = (patch[:, None] * grid + patch) * classes                     # (p·grid, p·grid)
    for i, (image, mask) in enumerate(masked):
        picture, labels = square(image, mask, size, classes)
        pixels[i] = picture.transpose(2, 0, 1)
        labels = labels[:p * grid, :p * grid]
        counts[i] = np.bincount((cell + labels)[labels != IGNORED], minlength=counts.shape[1])
    return pixels, counts.reshape(len(masked), grid * grid, classes)    # numpy: by pipe, not by shm


@torch.no_grad()
def encoded(args, encoder, shares, classes, device):
    """shares: lists of (image, mask) → for each, tokens (B, N, D) fp32 and counts (B, N, K)."""
    read = partial(read_batch, size=encoder.image_size, grid=math.isqrt(encoder.num_tokens),
                   classes=classes)
    for batch in torch.utils.data.DataLoader(
            shares, batch_size=None, collate_fn=read, **distributed.workers(args.workers)):
        pixels, counts = map(torch.from_numpy, batch)
        yield torch.cat([encoder(p.to(device)) for p in pixels.split(BATCH)]), counts.to(device)


# ---------------------------------------------------------------------------------------- the heads

def union(counts):
    """Pixels (…, N, K) → multi-hot targets: every class in the patch, 0 only where it is alone."""
    target = (counts > 0).float()
    target[..., 0] *= target[..., 1:].sum(-1) == 0
    return target


def ignored(counts, encoder, num_images):
    """The share of pixels of label 255, by the pixels that were counted in so many images."""
    grid = math.isqrt(encoder.num_tokens)
    side = encoder.image_size // grid * grid
    return 1 - float(counts) / max(1, num_images * side ** 2)


def train(args, name, encoder, masked, classes, device):
    """→ [head] a seed, share of ignored pixels. A process encodes every world-th image; gradients
    are summed."""
    heads, orders = [], [torch.Generator().manual_seed(s) for s in range(args.seeds)]
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        heads.append(nn.Sequential(nn.Linear(encoder.hidden_size, 1024), nn.GELU(),
                                   nn.Linear(1024, classes)).to(device))
    weights = [p for head in heads for p in head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    (rank, world), shuffle, chunks = distributed.world(), torch.Generator().manual_seed(0), []
    for _ in range(args.epochs):
        chunks += torch.randperm(len(masked), generator=shuffle).split(CHUNK)
    steps, step = sum(math.ceil(len(c) / BATCH) for c in chunks), 0
    counted = torch.zeros(1, dtype=torch.float64)
    warmup = min(500, steps // 4)
    shares = encoded(args, encoder, [[masked[i] for i in c[rank::world]] for c in chunks], classes,
                     device)
    bar = distributed.progress(0, len(chunks), f"{name}, {steps} steps", shares)
    for (tokens, counts), chunk in zip(bar, chunks):
        if step == 0 and ignored(counts.sum(), encoder, len(counts)) and not counts[..., 1:].any():
            raise SystemExit(f"error: --data {args.data}: its masks hold label {IGNORED}, which is "
                             f"ignored, and no class; are they masks of one object, 0 and 255?")
        counted += counts.sum().cpu()
        orders_here = [torch.randperm(len(chunk), generator=g).split(BATCH) for g in orders]
        for picks in zip(*orders_here):                             # one (batch,) a head
            optimizer.zero_grad()
            for head, pick in zip(heads, picks):
                mine = pick[pick % world == rank] // world
                asked = counts[mine].sum(-1, keepdim=True) > 0      # (b, N, 1): not all ignored
                loss = F.binary_cross_entropy_with_logits(          # logits (b, N, K)
                    head(tokens[mine]), union(counts[mine]), asked.float(), reduction="sum")
                (loss / (len(pick) * tokens.shape[1] * classes)).backward()
            for p in weights:
                distributed.sum_tensor(p.grad)
            late = math.pi * (step - warmup) / max(1, steps - warmup)
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / warmup if step < warmup else \
                1e-4 + 0.45e-3 * (1 + math.cos(late))
            optimizer.step()
            step += 1
    return heads, ignored(distributed.sum_tensor(counted), encoder, args.epochs * len(masked))


@torch.no_grad()
def test(args, name, encoder, heads, masked, classes, device):
    """→ hits (S, n, K) and positives (n, K): patches of each class in each image, found and there;
    confusion (S, K, K), pixels of truth × prediction; best (n, N), seed 0's class of each patch."""
    rank, world = distributed.world()
    shares = [slice(i, i + BATCH) for i in range(0, len(masked), BATCH)][rank::world]
    hits = torch.zeros(len(heads), len(masked), classes)
    positives = torch.zeros(len(masked), classes)
    best = torch.zeros(len(masked), encoder.num_tokens)
    confusion = torch.zeros(len(heads), classes, classes, dtype=torch.float64)
    batches = encoded(args, encoder, [masked[rows] for rows in shares], classes, device)
    bar = distributed.progress(0, len(shares), f"{name}, validation", batches)
    for (tokens, counts), rows in zip(bar, shares):
        positives[rows] = union(counts).sum(1).cpu()
        for s, head in enumerate(heads):
            logits = head(tokens)                                   # (B, N, K)
            hits[s, rows] = ((logits > 0) * union(counts)).sum(1).cpu()     # probability > 0.5
            likely, pixels = logits.argmax(-1).cpu(), counts.double().flatten(0, 1).cpu()
            confusion[s].T.index_add_(0, likely.flatten(), pixels)
            best[rows] = likely.float() if s == 0 else best[rows]
    return [distributed.sum_tensor(x) for x in (hits, positives, confusion, best)]


def recall(hits, positives):
    """Patches found and there, (…, K) → macro average over the classes with a positive, (…)."""
    return (hits / positives).nanmean(-1)


def miou(confusion, skip=0):
    """(K, K) truth × prediction → mean IoU of classes that occur; truths below `skip` left out."""
    truth, found = confusion[skip:].sum(1), confusion[skip:].sum(0)[skip:]
    inside = confusion.diagonal()[skip:]
    return (inside / (truth + found - inside))[truth > 0].mean().item()


def overlays(path, masked, classes, drawn):
    """image | truth | each encoder; drawn {name: classes of patches (n, N)}."""
    palette = np.array([(0, 0, 0)] + [[255 * v for v in colorsys.hsv_to_rgb(k * 0.618 % 1, 0.9, 1)]
                                      for k in range(1, IGNORED)] + [(255, 255, 255)])
    palette = palette.astype(np.uint8)                       # ignored pixels are white
    sheet = Image.new("RGB", (TILE * (2 + len(drawn)), 16 + TILE * len(masked)), "white")
    for column, title in enumerate(["image", "truth", *drawn]):
        ImageDraw.Draw(sheet).text((column * TILE + 4, 2), title, fill="black")
    for row, (image, mask) in enumerate(masked):
        picture, truth = square(image, mask, TILE, classes)
        for column, labels in enumerate([None, truth, *(d[row] for d in drawn.values())]):
            tile = Image.fromarray(picture)
            if labels is not None:
                grid = math.isqrt(labels.size)
                colours = Image.fromarray(palette[labels.reshape(grid, grid).astype(int)])
                tile = Image.blend(tile.convert("L").convert("RGB"),    # grey: classes show pure
                                   colours.resize(tile.size, Image.Resampling.NEAREST), 0.6)
            sheet.paste(tile, (column * TILE, 16 + row * TILE))
    files.write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def main():
    args = get_args()
    names, root = probing.short_names(args.encoder), Path(args.data)
    out = Path(args.out or probing.default_out(args.encoder, "seg"))
    facts, labels = root.resolve().parent / "world.json", ["other"]
    if facts.exists():
        labels = files.read_json(facts, "ade20k_classes")["ade20k_classes"]
    else:
        labels += [f"class {k}" for k in range(1, 151)]
    if len(labels) > IGNORED:
        raise SystemExit(f"error: {facts}: {len(labels)} classes, at most {IGNORED} are possible")
    learn, check = list_splits(root, args.limit)
    device, results, sizes, spread, drawn = distributed.start(), {}, {}, {}, {}
    out.mkdir(parents=True, exist_ok=True)
    times = torch.from_numpy(intervals.resampling(len(check))).float()               # (1000, n)
    for name, path in zip(names, args.encoder):
        encoder = probing.open_encoder(path, args.image_size).to(device)
        sizes[name] = encoder.image_size
        heads, left_out = train(args, name, encoder, learn, len(labels), device)
        hits, there, confusion, best = test(args, name, encoder, heads, check, len(labels), device)
        left_out = left_out, ignored(confusion[0].sum(), encoder, len(check))
        if any(left_out):
            print0(f"  {name}: label {IGNORED} is ignored, {100 * left_out[0]:.2f} % of the pixels "
                   f"in training, {100 * left_out[1]:.2f} % in validation")
        drawn[name] = best[:args.pictures].numpy()
        spread[name] = recall(times @ hits.mean(0), times @ there)       # (1000,)
        by_class = (hits.mean(0).sum(0) / there.sum(0)).tolist()         # NaN: no patch has it
        results[name] = {"recall": recall(hits.sum(1), there.sum(0)).tolist(),
                         "mIoU": [miou(c) for c in confusion],
                         "mIoU-0": [miou(c, skip=1) for c in confusion],
                         "ignored_pixels": left_out,
                         "recall_by_class": {k: r for k, r in zip(labels, by_class) if r == r}}
    differences = {}
    for a, b in combinations(names, 2):
        found = {k: np.subtract(results[b][k], results[a][k]).tolist() for k in SCORES}
        found["recall_ci95"] = intervals.middle_95(spread[b] - spread[a])
        differences[f"{b} - {a}"] = found
    if not distributed.is_main():
        return
    rows = [["", *SCORES, ""]]
    for name, r in [*results.items(), *differences.items()]:
        sign = "+" if name in differences else ""
        cells = [f"{100 * np.mean(r[k]):{sign}.2f} ± {100 * np.std(r[k], ddof=args.seeds > 1):.2f}"
                 for k in SCORES]
        low, high = (100 * x for x in r.get("recall_ci95", (0, 0)))
        rows.append([name, *cells, f"recall [{low:+.2f}, {high:+.2f}]" if sign else ""])
    print(f"{len(check)} validation images, {len(learn)} for training, {args.seeds} seeds; percent "
          f"± σ over seeds [95 % over images]", *printing.table(rows), sep="\n")
    probing.say_sizes(sizes)
    overlays(out / "overlays.png", check[:args.pictures], len(labels), drawn)
    files.write_json(out / "results.json", {
        "data": args.data, "seeds": args.seeds, "epochs": args.epochs, "images": len(learn),
        "test_images": len(check), "image_sizes": sizes, "encoders": results,
        "differences": differences})
    print(f"wrote {out}/results.json and overlays.png")


if __name__ == "__main__":
    distributed.launch(main)
