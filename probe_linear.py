"""Evidence 1, linear classification: how much of a picture's class lies open in frozen features?

One process:     python probe_linear.py --encoder toy-vit DIR --data data/toy/imagenet
Eight GPUs:      torchrun --nproc_per_node=8 probe_linear.py --encoder siglip2-so400m DIR

Features: the tokens the LLM sees, fp32, averaged over patches, L2-normalised; `--mllm final/` adds
a trained model's encoder, and its encoder + projector. Classifiers, fitted on a balanced subset of
train and tested on all of val: L2-regularised logistic regression (judge/logistic.py, where the
time goes), its C picked on a fifth of the subset and refitted on all of it; and class means
(cosine).

Reads   DATA/{train,val}/CLASS/*.jpg: ImageNet, its val sorted into class folders, or the toy's.
Writes  --out: results.json and features/*.safetensors. Default: runs/NAME/probes/linear, NAME from
        the first model that is runs/NAME/STAGE/encoder or final; if none is, runs/probes/linear.
        Features of another encoder or of other images are computed anew, with a line.

Intervals, 95 %: over test images. Wilson's for shares, bootstrap for paired differences. What the
draw of the subset adds is seen with --seeds: by_seed in results.json.
"""
import hashlib
import os
import random
from functools import partial
from itertools import combinations
from pathlib import Path

from pivot import flags
from pivot import rundir
from pivot import runtime
from pivot.runtime import print0
from pivot import records
from judge import report
from pivot import encoders
from judge import logistic
from pivot import folders
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

GRID = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)                       # C of the paper's sweep
BATCH = 64                                                       # images encoded at once
SCORES = ("top1", "top5", "prototype_top1", "prototype_top5")


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--encoder", nargs="+", default=[], metavar="DIR",
                        help="encoders to compare: presets, folders (extract.py) or hub ids")
    parser.add_argument("--mllm", nargs="+", default=[], metavar="DIR",
                        help="trained models (final/): encoder, and encoder + projector")
    parser.add_argument("--data", default="data/imagenet", help="folder with train/ and val/")
    parser.add_argument("--per-class", type=flags.COUNT, default=50, help="training images a class")
    parser.add_argument("--seeds", type=flags.COUNT, default=1, help="average over so many subsets")
    parser.add_argument("--limit", type=flags.COUNT, help="quick look: N images a class, in both")
    parser.add_argument("--out", metavar="DIR", help="default: probes/linear in the run folder")
    parser.add_argument("--workers", type=flags.NATURAL, default=2, help="image-decoding processes")
    args = parser.parse_args()
    args.per_class = min(args.per_class, args.limit or args.per_class)
    if not args.encoder + args.mllm or args.per_class < 2:
        raise SystemExit("error: needed are an --encoder or --mllm, and --per-class (and --limit) "
                         "of 2 or more: some images of a class fit, others pick C")
    return args


def short_names(paths, flag="encoder"):
    """runs/x/dpo/encoder → dpo; where names agree, as much more of the path as tells them apart."""
    places = [Path(encoders.resolve(encoders.parts_of(p)[0])).resolve() for p in paths]
    for path, place in zip(paths, places):
        if len(encoders.parts_of(path)) > 1:
            raise SystemExit(f"error: --{flag} {path}: one model at a time, not A+B")
        if places.count(place) > 1:
            raise SystemExit(f"error: --{flag} {path} is given twice")
    parts = [p.parts[:-1] if p.name in ("encoder", "final") else p.parts for p in map(Path, paths)]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]).lower() for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def default_out(paths, instrument):
    """runs/NAME/probes/INSTRUMENT, of the first model that lies in a run folder."""
    runs = [p.parent.parent for p in map(Path, paths) if p.name in ("encoder", "final")]
    run = Path(runs[0] if runs else "runs")
    return (run.parent if run.name == "repair" else run) / "probes" / instrument


# -------------------------------------------------------------------------------- images → features

def class_folders(root):
    """{class: sorted image paths}; every class has images."""
    found = {p.name: sorted(map(str, p.glob("[!.]*"))) for p in sorted(root.glob("[!.]*/"))}
    if len(found) < 2:
        raise SystemExit(f"error: no class folders in {root}: expected {root}/CLASS/*.jpg")
    for name in found:
        if not found[name]:
            raise SystemExit(f"error: class folder {root / name} holds no image")
    return found


def balanced(train, per_class, seed):
    """per_class images of each class, drawn with a seed: paths, class by class."""
    for name, files in train.items():
        if len(files) < per_class:
            raise SystemExit(f"error: class {name} has {len(files)} training images, fewer than "
                             f"--per-class {per_class}")
    return [f for c in train for f in random.Random(f"{seed}/{c}").sample(train[c], per_class)]


def read_batch(files, size):
    """Paths → pixels uint8 (B, 3, size, size)."""
    return torch.from_numpy(np.stack([records.load_image(f, size, "--data") for f in files]))


@torch.no_grad()
def features(args, name, encoder, projector, files, device, path):
    """See to it that path holds {"encoder": (n, D), "projector": (n, D')}, fp32, rows of length 1.

    Processes share out batches, not images: any number of them computes the same bits.
    """
    stats = [(os.path.relpath(f, args.data), s.st_size, s.st_mtime_ns)
             for f, s in ((f, os.stat(f)) for f in files)]
    key = {"encoder": rundir.tensors_digest(encoder.vision),
           "projector": rundir.tensors_digest(projector) if projector else "none",
           "layer": f"block {len(encoder.blocks)}" + ", normed" * (encoder.family.read == "norm"),
           "preprocessing": f"bicubic {encoder.image_size}, {encoder.mean}, {encoder.std}",
           "images": hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}
    old = runtime.from_main(                                  # by one, for all
        lambda: safe_open(path, "pt").metadata() or {} if path.exists() else None)
    if old is not None:
        changed = [k for k in key if old.get(k) != key[k]]
        if not changed:
            return
        print0(f"  {path}: {', '.join(changed)} changed, computed anew")
    rank, world = runtime.world()
    starts = range(0, len(files), BATCH)[rank::world]
    loader = torch.utils.data.DataLoader(
        [files[i:i + BATCH] for i in starts], batch_size=None, num_workers=args.workers,
        collate_fn=partial(read_batch, size=encoder.image_size))
    made = {"encoder": torch.zeros(len(files), encoder.hidden_size)}
    if projector:
        made["projector"] = torch.zeros(len(files), projector.linear_2.out_features)
    bar = runtime.progress(0, len(starts), f"{name}, {path.stem.split('-')[-1]} images", loader)
    for pixels, start in zip(bar, starts):
        tokens = encoder(pixels.to(device))                                       # (B, N, D)
        for view, out in made.items():
            seen = projector(tokens) if view == "projector" else tokens
            out[start:start + len(pixels)] = F.normalize(seen.mean(1), dim=1).cpu()
    made = {view: runtime.sum_tensor(out) for view, out in made.items()}
    rundir.write_whole(path, lambda aside: save_file(made, aside, metadata=key))


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


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n; unlike p ± 2 σ it has a width at 0 and at 1."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def bootstrap(values, draws=10_000):
    """95 % interval of the mean of values (n,) over resampled images. To resample is to draw how
    often each distinct value comes: exact, without an array (draws, n)."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), draws)
    return np.percentile(drawn @ distinct / len(values), [2.5, 97.5]).tolist()


def main():
    args = get_args()
    names = short_names(args.encoder) + [f"{n}/final" for n in short_names(args.mllm, "mllm")]
    paths, root = args.encoder + args.mllm, Path(args.data)
    out = Path(args.out or default_out(paths, "linear"))
    train, val = class_folders(root / "train"), class_folders(root / "val")
    if alone := sorted(train.keys() ^ val.keys()):
        raise SystemExit(f"error: class {alone[0]} is not in both {root}/train and {root}/val")
    lists = {f"seed{s}": balanced(train, args.per_class, s) for s in range(args.seeds)}
    lists["val"] = [f for files in val.values() for f in files[:args.limit]]
    test_y = torch.tensor([c for c, f in enumerate(val.values()) for _ in f[:args.limit]])

    # ---- features, by all processes
    device, views = runtime.start(), {}
    (out / "features").mkdir(parents=True, exist_ok=True)
    for i, (name, path) in enumerate(zip(names, paths)):
        trained = None
        if i >= len(args.encoder):
            trained = flags.one_eyed(folders.load_mllm(path)[0], path)
        projector = trained.projector.to(device) if trained else None
        encoder = trained.encoder if trained else encoders.load_encoder(path)
        stem = name.replace("/", "-") + (f"-limit{args.limit}" if args.limit else "")
        where = {k: out / "features" / f"{stem}-{k}.safetensors" for k in lists}
        for k, files in lists.items():
            features(args, name, encoder.eval().to(device), projector, files, device, where[k])
        views[name] = ("encoder", where)
        if trained:
            views[f"{name}+projector"] = ("projector", where)
    runtime.stop()
    if not runtime.is_main():
        return

    # ---- classifiers, by the main process with everybody's threads
    torch.set_num_threads(torch.get_num_threads() * runtime.local_world())
    classes, n = len(train), len(test_y)
    y = torch.arange(classes, device=device).repeat_interleave(args.per_class)
    held = torch.arange(args.per_class).lt(max(1, args.per_class // 5)).repeat(classes).to(device)
    results, hits = {}, {}
    for name, (view, where) in views.items():
        x = {k: load_file(path)[view].to(device) for k, path in where.items()}
        runs = [evaluate(x[f"seed{s}"], y, held, x["val"], test_y.to(device), classes)
                for s in runtime.progress(0, args.seeds, f"{name}, classifiers")]
        hits[name] = {k: np.mean([h[k] for h, _ in runs], axis=0) for k in SCORES}       # (N,)
        results[name] = {"fits": [facts for _, facts in runs]} | {
            k: {"mean": v.mean(), "ci95": wilson(v.mean(), n),
                "by_seed": [h[k].mean() for h, _ in runs]} for k, v in hits[name].items()}
    pairs = {f"{b} - {a}": {k: {"mean": (d := hits[b][k] - hits[a][k]).mean(), "ci95": bootstrap(d)}
                            for k in SCORES} for a, b in combinations(hits, 2)}

    # ---- one table
    def cell(score, sign=""):
        low, high = (100 * v for v in score["ci95"])
        return f"{100 * score['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"

    rows = [["", "C", *SCORES]]
    rows += [[name, "/".join(f"{fit['C']:g}" for fit in r["fits"]), *(cell(r[k]) for k in SCORES)]
             for name, r in results.items()]
    rows += [[name, "", *(cell(r[k], "+") for k in SCORES)] for name, r in pairs.items()]
    print(f"{n} test images, {classes} classes, {args.per_class} training images a class; percent "
          f"[95 % interval]", *report.grid(rows), sep="\n")
    rundir.write_json(out / "results.json", {
        "data": args.data, "classes": classes, "per_class": args.per_class, "seeds": args.seeds,
        "test_images": n, "encoders": results, "differences": pairs})
    print(f"wrote {out}/results.json")


if __name__ == "__main__":
    runtime.launch(main)
