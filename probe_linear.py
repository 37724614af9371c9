"""Evidence 1, linear classification: how much of a picture's class lies open in frozen features?

One process:     python probe_linear.py --encoder toy-vit DIR --data data/toy/imagenet
Eight GPUs:      torchrun --nproc_per_node=8 probe_linear.py --encoder siglip2-so400m DIR

Features: the tokens the LLM sees, fp32, averaged over patches, L2-normalised; `--mllm final/` adds
a trained model's encoder, and its encoder + projector. Classifiers, fitted on a balanced subset of
train and tested on all of val: L2-regularised logistic regression (judge/logistic.py, where the
time goes), its C picked on a fifth of the subset and refitted on all of it; and class means
(cosine).

Reads   DATA/{train,val}/CLASS/*.jpg: ImageNet as tools.prepare sorts it, a folder or a pack, or the
        toy's.
Writes  --out: results.json and features/*.safetensors. Default: runs/NAME/probes/linear, NAME from
        the first model that is runs/NAME/STAGE/encoder or final; if none is, runs/probes/linear.
        Features of another encoder or of other images are computed anew, with a line.

Intervals, 95 %: over test images. Wilson's for shares, bootstrap for paired differences. What the
draw of the subset adds is seen with --seeds: by_seed in results.json.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import hashlib
import os
import random
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from judge import intervals, logistic, probing
from pivot import distributed, files, flags, images, packs, printing, tensors
from pivot.distributed import print0

GRID = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)                       # C of the paper's sweep
BATCH = 64                                                       # images encoded at once
SCORES = ("top1", "top5", "prototype_top1", "prototype_top5")


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--encoder", nargs="+", default=[], metavar="DIR",
                        help="encoders to compare: presets, folders (extract.py) or hub ids")
    parser.add_argument("--mllm", nargs="+", default=[], metavar="DIR",
                        help="trained models (final/): encoder, and encoder + projector")
    parser.add_argument("--data", default="data/imagenet", help="folder (or pack) of train/, val/")
    parser.add_argument("--per-class", type=flags.COUNT, default=50, help="training images a class")
    parser.add_argument("--seeds", type=flags.COUNT, default=1, help="average over so many subsets")
    parser.add_argument("--limit", type=flags.COUNT, help="quick look: N images a class, in both")
    flags.add_image_size(parser)
    parser.add_argument("--out", metavar="DIR", help="default: probes/linear in the run folder")
    parser.add_argument("--workers", type=flags.NATURAL, default=2, help="image-decoding processes")
    args = parser.parse_args()
    args.per_class = min(args.per_class, args.limit or args.per_class)
    if not args.encoder + args.mllm or args.per_class < 2:
        raise SystemExit("error: needed are an --encoder or --mllm, and --per-class (and --limit) "
                         "of 2 or more: some images of a class fit, others pick C")
    return args


# -------------------------------------------------------------------------------- images → features

def class_folders(root):
    """Train and val, each {class: paths of its pictures, in the order of names}; both have the same
    classes, and every class has pictures."""
    splits = {folder: sorted(Path(entry.path) for entry in packs.scandir(folder)
                             if entry.is_dir() and not entry.name.startswith("."))
              for folder in (root / "train", root / "val")}
    pictures = images.pictures_in([folder for classes in splits.values() for folder in classes])
    for split, classes in splits.items():
        if len(classes) < 2:
            raise SystemExit(f"error: no class folders in {split}: expected {split}/CLASS/*.jpg "
                             f"(`python -m tools.prepare imagenet` sorts ImageNet's)")
        for folder in classes:
            if not pictures[folder]:
                raise SystemExit(f"error: class folder {folder} holds no image")
    train, val = ({folder.name: pictures[folder] for folder in classes}
                  for classes in splits.values())
    if alone := sorted(train.keys() ^ val.keys()):
        raise SystemExit(f"error: class {alone[0]} is not in both {root}/train and {root}/val")
    return train, val


def balanced(train, per_class, seed):
    """per_class images of each class, drawn with a seed: paths, class by class."""
    for name, paths in train.items():
        if len(paths) < per_class:
            raise SystemExit(f"error: class {name} has {len(paths)} training images, fewer than "
                             f"--per-class {per_class}")
    return [path for name in train
            for path in random.Random(f"{seed}/{name}").sample(train[name], per_class)]


def read_batch(paths, size):
    """Paths → pixels uint8 (B, 3, size, size)."""
    return torch.from_numpy(np.stack([images.load_image(p, size, "--data") for p in paths]))


def features_key(args, encoder, projector, paths):
    """What features depend on: {what: its identity}."""
    stats = [(os.path.relpath(path, args.data), *packs.facts(path)) for path in paths]
    normed = ", normed" if encoder.family.read == "norm" else ""
    return {"encoder": tensors.tensors_digest(encoder.vision),
            "projector": tensors.tensors_digest(projector) if projector else "none",
            "layer": f"block {len(encoder.blocks)}{normed}",
            "preprocessing": f"bicubic {encoder.image_size}, {encoder.mean}, {encoder.std}",
            "images": hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}


@torch.no_grad()
def features(args, name, encoder, projector, paths, device, path):
    """See to it that path holds {"encoder": (n, D), "projector": (n, D')}, fp32, rows of length 1,
    of the images in `paths`.

    Processes share out batches, not images: any number of them computes the same bits.
    """
    key = features_key(args, encoder, projector, paths)
    old = distributed.from_main(                                  # by one, for all
        lambda: safe_open(path, "pt").metadata() or {} if path.exists() else None)
    if old is not None:
        changed = [k for k in key if old.get(k) != key[k]]
        if not changed:
            return
        print0(f"  {path}: {', '.join(changed)} changed, computed anew")
    rank, world = distributed.world()
    starts = range(0, len(paths), BATCH)[rank::world]
    loader = torch.utils.data.DataLoader(
        [paths[i:i + BATCH] for i in starts], batch_size=None, **distributed.workers(args.workers),
        collate_fn=partial(read_batch, size=encoder.image_size))
    made = {"encoder": torch.zeros(len(paths), encoder.hidden_size)}
    if projector:
        made["projector"] = torch.zeros(len(paths), projector.linear_2.out_features)
    bar = distributed.progress(0, len(starts), f"{name}, {path.stem.split('-')[-1]} images", loader)
    for pixels, start in zip(bar, starts):
        tokens = encoder(pixels.to(device))                                       # (B, N, D)
        for view, out in made.items():
            seen = projector(tokens) if view == "projector" else tokens
            out[start:start + len(pixels)] = F.normalize(seen.mean(1), dim=1).cpu()
    made = {view: distributed.sum_tensor(out) for view, out in made.items()}
    if distributed.is_main():
        files.write_aside(path, lambda aside: save_file(made, aside, metadata=key))


def all_features(args, names, lists, out, device):
    """The features of every model and every list of images, on disk in out/features.
    lists: {"seed0": paths, …, "val": paths}. → {view: ("encoder" or "projector", {list: path})},
    {name: input size}."""
    (out / "features").mkdir(parents=True, exist_ok=True)
    views, sizes = {}, {}
    for i, (name, model) in enumerate(zip(names, args.encoder + args.mllm)):
        if i < len(args.encoder):
            encoder, projector = probing.open_encoder(model, args.image_size), None
        else:
            encoder, projector = probing.open_mllm(model, args.image_size)
            projector = projector.to(device)
        sizes[name] = encoder.image_size
        stem = name.replace("/", "-") + (f"-limit{args.limit}" if args.limit else "")
        stem += f"-size{args.image_size}" if args.image_size else ""
        where = {k: out / "features" / f"{stem}-{k}.safetensors" for k in lists}
        for k, paths in lists.items():
            features(args, name, encoder.to(device), projector, paths, device, where[k])
        views[name] = ("encoder", where)
        if projector:
            views[f"{name}+projector"] = ("projector", where)
    return views, sizes


# ------------------------------------------------------------------------------- features → classes

def evaluate(x, y, held, test_x, test_y, classes):
    """Fit on x (n, D), y (n,); held (n,) marks what picks C. → {score: hits (N,)}, facts."""
    accuracy, fitted = {}, {}
    for C, w, b, _ in logistic.fit(x[~held], y[~held], classes, GRID):
        accuracy[C] = ((x[held] @ w + b).argmax(1) == y[held]).double().mean().item()
        fitted[C] = w, b
    best = max(GRID, key=accuracy.get)                    # of equals the first, the simplest
    _, w, b, facts = next(logistic.fit(x, y, classes, [best], fitted[best]))
    means = F.normalize(x.new_zeros(classes, x.shape[1]).index_add_(0, y, x), dim=1)
    hits = {}
    for kind, logits in (("", test_x @ w + b), ("prototype_", test_x @ means.T)):
        right = (logits.topk(min(5, classes)).indices == test_y[:, None]).cpu().numpy()  # (N, 5)
        hits[kind + "top1"], hits[kind + "top5"] = right[:, 0], right.any(1)
    return hits, {"C": best, "heldout_accuracy": accuracy, **facts}


def classify(args, views, test_y, classes, device):
    """Fit and test on every view's features: {view: facts of the fits, and scores with intervals},
    {view: {score: share of seeds that got it right (N,)}}."""
    y = torch.arange(classes, device=device).repeat_interleave(args.per_class)
    held = torch.arange(args.per_class).lt(max(1, args.per_class // 5)).repeat(classes).to(device)
    results, hits = {}, {}
    for name, (view, where) in views.items():
        x = {k: load_file(path)[view].to(device) for k, path in where.items()}
        runs = [evaluate(x[f"seed{s}"], y, held, x["val"], test_y.to(device), classes)
                for s in distributed.progress(0, args.seeds, f"{name}, classifiers")]
        hits[name] = {k: np.mean([h[k] for h, _ in runs], axis=0) for k in SCORES}       # (N,)
        results[name] = {"fits": [facts for _, facts in runs]}
        for k, v in hits[name].items():
            results[name][k] = {"mean": v.mean(), "ci95": intervals.wilson(v.mean(), len(test_y)),
                                "by_seed": [h[k].mean() for h, _ in runs]}
    return results, hits


def paired(hits):
    """Every view minus every one before it, image by image: {"b - a": {score: …}}."""
    out = {}
    for a, b in combinations(hits, 2):
        changes = {k: hits[b][k] - hits[a][k] for k in SCORES}                           # (N,)
        out[f"{b} - {a}"] = {k: {"mean": change.mean(), "ci95": intervals.bootstrap(change)}
                             for k, change in changes.items()}
    return out


def table(results, differences):
    """The lines of one table: every view, then every difference; percent [95 % interval]."""
    def cell(score, sign=""):
        low, high = (100 * v for v in score["ci95"])
        return f"{100 * score['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"

    rows = [["", "C", *SCORES]]
    for name, r in results.items():
        strengths = "/".join(f"{fit['C']:g}" for fit in r["fits"])
        rows.append([name, strengths, *(cell(r[k]) for k in SCORES)])
    for name, r in differences.items():
        rows.append([name, "", *(cell(r[k], "+") for k in SCORES)])
    return printing.table(rows)


def main():
    args = get_args()
    names = probing.short_names(args.encoder)
    names += [f"{n}/final" for n in probing.short_names(args.mllm, "mllm")]
    root = Path(args.data)
    out = Path(args.out or probing.default_out(args.encoder + args.mllm, "linear"))
    train, val = class_folders(root)
    lists = {f"seed{s}": balanced(train, args.per_class, s) for s in range(args.seeds)}
    lists["val"] = [path for paths in val.values() for path in paths[:args.limit]]
    test_y = torch.tensor([c for c, paths in enumerate(val.values()) for _ in paths[:args.limit]])

    # ---- features, by all processes
    device = distributed.start()
    views, sizes = all_features(args, names, lists, out, device)
    distributed.stop()
    if not distributed.is_main():
        return

    # ---- classifiers, by the main process with everybody's threads
    torch.set_num_threads(torch.get_num_threads() * distributed.local_world())
    results, hits = classify(args, views, test_y, len(train), device)
    differences = paired(hits)
    print(f"{len(test_y)} test images, {len(train)} classes, {args.per_class} training images a "
          f"class; percent [95 % interval]", *table(results, differences), sep="\n")
    probing.say_sizes(sizes)
    files.write_json(out / "results.json", {
        "data": args.data, "classes": len(train), "per_class": args.per_class, "seeds": args.seeds,
        "test_images": len(test_y), "image_sizes": sizes, "encoders": results,
        "differences": differences})
    print(f"wrote {out}/results.json")


if __name__ == "__main__":
    distributed.launch(main)
