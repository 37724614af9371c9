"""Do encoder and language see the same neighbours? Mutual k-NN alignment over image–caption pairs.

    python probe_align.py --encoder toy-vit runs/toy-vit__toy-lm/{sft,dpo}/encoder \\
        --llm toy-lm --data data/toy/align [--seeds 3] [--limit 1024] [--k 10]

An encoder gives every image its k nearest images, an LLM every caption its k nearest captions; the
score is the mean share they have in common, |A ∩ B| / k, the item itself excluded.

Protocol (platonic-representation). LLM: mean over the caption's tokens, at the embeddings (layer 0)
and after every block, the last one after the final norm. Encoder: mean over patches after every
block, prefix tokens dropped. Clamping: of each item the 95 % quantile of |values| over all its
layers and channels; t = the mean of these over the subset's items; every value is clamped to
[−t, t], one t a model and subset. Then each layer is L2-normalised; neighbours by cosine; the score
is the best over (LLM layer, block). A trained model (--encoder runs/NAME/STAGE/final) has one more
row, its projector's output, with a t of its own.

Each seed draws --limit pairs; ± is the standard deviation over seeds (too small where the subsets
overlap much). Unrelated features share k / (n − 1), but a maximum over many cells lies above that:
`shuffled` is the same maximum with the captions dealt out anew.

Reads   DATA/pairs.jsonl, {"image": name below DATA/images, "caption": text} a line.
Writes  align.png (every block against every LLM layer) and results.json to runs/NAME/probes/align
        of the first trained encoder, else to runs/probes/align.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import math
from collections import Counter
from itertools import combinations, groupby, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from judge import probing
from pivot import (distributed, encoders, files, flags, images, packs, printing, published,
                   records)
from pivot.distributed import print0

BATCH = 32                # images or captions at once
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--encoder", nargs="+", required=True, help="presets, folders, hub ids, trained models")
    add("--llm", nargs="+", required=True, help="presets, folders or hub ids")
    add("--data", default="data/align", help="folder with pairs.jsonl and images/ "
        "(default data/align)")
    add("--k", type=flags.COUNT, default=10, help="neighbours (default 10)")
    add("--limit", type=flags.COUNT, default=1024, help="pairs a subset (default 1024); scores "
        "depend on it: compare at one")
    flags.add_image_size(parser)
    add("--seeds", type=flags.COUNT, default=3, help="how many subsets (default 3)")
    add("--seed", type=flags.NATURAL, default=0, help="the first one's seed (default 0)")
    add("--out", help="where to write; default: see above")
    flags.add_follow_links(parser)
    args = parser.parse_args()
    args.out = args.out or str(probing.default_out(args.encoder, "align"))
    return args


def read_items(folder, follow_links=False):
    """[(where, image path, caption)]; the first bad record ends the run with its file and line."""
    items, unread = [], Counter()
    for where, item in records.read_lines(Path(folder, "pairs.jsonl")):
        item = records.parse(where, item)
        image = records.image_of(item, packs.default_images(folder), where, follow_links)
        if image in (None, "many"):
            raise records.BadRecord(f"{where}: a pair needs one image")
        unread.update(records.other_pictures(item))
        items.append((where, image, records.text_of(item, "caption", where)))
    for key, n in unread.items():
        print0(f"  {n} pictures under '{key}' are not read: 'image' and 'images' are")
    return items


def pooled(name, items, step):
    """step(some items) → [(B, L, D), …], run over all items: [(n, L, D), …] fp32 on the CPU."""
    parts = [[p.float().cpu() for p in step(items[BATCH * i:BATCH * (i + 1)])]
             for i in distributed.progress(0, math.ceil(len(items) / BATCH), name)]
    stacks = [torch.cat(p) for p in zip(*parts)]
    if not all(s.isfinite().all() for s in stacks):     # NaN is everybody's neighbour, or nobody's
        raise SystemExit(f"error: {name} gives features that are not finite")
    return stacks


@torch.no_grad()
def vision_features(name, items, device, image_size=None):
    """→ [blocks (n, L, D), of a trained model projector (n, 1, d_llm)], names of all these rows,
    input size."""
    path, projector, blocks = encoders.resolve(name), None, []
    if Path(path, "processor_config.json").exists():          # a trained model, not an encoder
        encoder, projector = probing.open_mllm(path, image_size)
        projector.to(device)
    else:
        encoder = probing.open_encoder(name, image_size)
    encoder.to(device)

    def keep(block, inputs, out):
        out = out[0] if isinstance(out, tuple) else out
        out = out.flatten(2).transpose(1, 2) if encoder.family.read == "map" else out
        blocks.append(out[:, encoder.prefix:].mean(1))

    def step(batch):
        blocks.clear()
        pixels = [images.load_image(x, encoder.image_size, where) for where, x, _ in batch]
        features = encoder(torch.from_numpy(np.stack(pixels)).to(device))
        # A ConvNeXt's stages have widths of their own; a ViT's blocks are one stack.
        seen = [torch.stack(list(stage), 1) for _, stage in groupby(blocks, lambda b: b.shape[1])]
        return seen if projector is None else [*seen, projector(features).mean(1, keepdim=True)]
    for block in encoder.blocks:
        block.register_forward_hook(keep)
    rows = [str(i) for i in range(1, len(encoder.blocks) + 1)]
    if projector is not None:
        rows.append("proj")
    return pooled(name, items, step), rows, encoder.image_size


@torch.no_grad()
def llm_features(name, items, device):
    """→ [(n, layers + 1, D)], names of the layers."""
    from transformers import AutoModelForCausalLM
    path = encoders.resolve(name)
    llm = published.open_model(AutoModelForCausalLM, f"--llm {name}", path)
    tokenizer, llm = published.open_tokenizer(path), llm.base_model.eval().to(device)

    def step(batch):
        ids = [torch.tensor(x) for x in tokenizer([text for *_, text in batch])["input_ids"]]
        ids, there = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device)
                      for x in (ids, [torch.ones_like(x) for x in ids]))
        out = llm(input_ids=ids, attention_mask=there, output_hidden_states=True, use_cache=False)
        return [torch.stack([(h * there[..., None]).sum(1) / there.sum(1, keepdim=True)
                             for h in out.hidden_states], 1)]
    stacks = pooled(name, items, step)
    return stacks, list(map(str, range(stacks[0].shape[1])))


def clamped(stack, quantile=0.95):
    """(n, L, D) → the same in fp64, clamped to ± the mean over items of each one's quantile."""
    stack = stack.double()      # item by item: torch.quantile takes at most 16 million values
    t = torch.stack([item.abs().quantile(quantile) for item in stack.flatten(1)]).mean()
    return stack.clamp(-t, t)


def neighbours(stacks, k):
    """Each item's k nearest others by cosine, in every layer: [(n, L, D), …] → (ΣL, n, k)."""
    layers = [F.normalize(x, dim=-1) for s in stacks for x in clamped(s).unbind(1)]
    return torch.stack([(x @ x.T).fill_diagonal_(-torch.inf).topk(k).indices for x in layers])


def mutual_knn(a, b):
    """Mean share of common neighbours: (V, n, k), (L, n, k) → every pair of layers, (V, L)."""
    return torch.stack([(x[..., None] == b[:, :, None]).sum((1, 2, 3)) / x.numel() for x in a])


def shuffled(b, seed):
    """The same neighbourhoods with the items dealt out anew: (L, n, k) → (L, n, k)."""
    new = torch.randperm(b.shape[1], generator=torch.Generator().manual_seed(seed))
    return new[b][:, new.argsort()]


def coloured(values, low, high, cell):
    """(V, L) → a picture of cells, from dark (low) to bright (high)."""
    at = (values - low) / max(high - low, 1e-12)
    rgb = np.stack([np.interp(at, np.arange(5) / 4, channel) for channel in VIRIDIS.T], -1)
    V, L = values.shape
    return Image.fromarray(rgb.astype(np.uint8)).resize((cell * L, cell * V), 0)


def draw(path, scores):
    """A heat map for each of encoders (downwards) × LLMs (to the right), one colour scale for all.
    scores: {(encoder, LLM): result}."""
    maps = {both: np.array(r["map"]) for both, r in scores.items()}
    low, high = min(x.min() for x in maps.values()), max(x.max() for x in maps.values())
    names = [list(dict.fromkeys(both[i] for both in maps)) for i in (0, 1)]
    (V, L), font, gap = np.max([x.shape for x in maps.values()], 0), ImageFont.load_default(12), 50
    cell = max(14, min(40, 640 // max(V, L)))
    wide, tall = max(480, cell * L + gap), cell * V + 2 * gap
    sheet = Image.new("RGB", (wide * len(names[1]) + gap, tall * len(names[0]) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), f"dark {low:.3f}, bright {high:.3f}; down: block, across: LLM layer; red: "
             "best", "black", font)
    for (encoder, llm), r in scores.items():
        x, y = gap + wide * names[1].index(llm), gap + tall * names[0].index(encoder)
        heat = coloured(maps[encoder, llm], low, high, cell)
        sheet.paste(heat, (x, y))
        u, v = x + cell * r["columns"].index(r["layer"]), y + cell * r["rows"].index(r["block"])
        pen.rectangle((u, v, u + cell - 1, v + cell - 1), None, "red", 2)
        pen.text((x, y - 18), f"{encoder}, {llm}: {r['text']}", "black", font)
        for i, name in enumerate(r["rows"]):
            pen.text((x - 18, y + i * cell + cell // 2), name, "black", font, "mm")
        for i, name in enumerate(r["columns"]):
            pen.text((x + i * cell + cell // 2, y + heat.height + 10), name, "black", font, "mm")
    files.write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def spread(values):
    """Over seeds: mean, standard deviation (None of a single one), the same as text."""
    values = torch.as_tensor(values, dtype=torch.float64)
    sd = values.std().item() if len(values) > 1 else None
    return {"mean": values.mean().item(), "sd": sd, "seeds": values.tolist(),
            "text": f"{values.mean():.4f}" + ("" if sd is None else f" ±{sd:.4f}")}


def compare(vision, language):
    """Every block against every layer. vision [(V, n, k)], language [(L, n, k)]: neighbourhoods, a
    seed each → the map averaged over seeds (V, L), the best cell of each seed, the same shuffled.
    """
    maps = [mutual_knn(a, b) for a, b in zip(vision, language)]
    chance = [mutual_knn(a, shuffled(b, seed)).max()
              for seed, (a, b) in enumerate(zip(vision, language))]
    return sum(maps) / len(maps), [x.max() for x in maps], chance


def subsets(args, n):
    """The indices of every seed's subset of n items: [(size,), …]."""
    size = min(args.limit, n)
    if size < args.k + 1:
        raise SystemExit(f"error: {size} pairs (--limit {args.limit}, {args.data}/pairs.jsonl has "
                         f"{n}); --k {args.k} needs at least {args.k + 1}")
    if size == n and args.seeds > 1:
        args.seeds = 1
        print0(f"  all {size} pairs make but one subset: --seeds 1 (a lower --limit gives a ±)")
    return [np.sort(np.random.default_rng(args.seed + s).permutation(n)[:size])
            for s in range(args.seeds)]


def main():
    args = get_args()
    encoder_names = probing.short_names(args.encoder)
    llm_names = probing.short_names(args.llm, "llm")
    device = distributed.start()

    # ---- one subset a seed; features of their union, once; neighbours in each subset
    items = read_items(args.data, args.follow_links)
    drawn = subsets(args, len(items))
    size, union = len(drawn[0]), np.unique(drawn)
    shown, language, vision, sizes = [items[i] for i in union], {}, {}, {}

    def by_subset(stacks):
        return [neighbours([s[np.searchsorted(union, d)] for s in stacks], args.k) for d in drawn]
    for short, name in zip(llm_names, args.llm):
        stacks, layers = llm_features(name, shown, device)
        language[short] = by_subset(stacks), layers
    for short, name in zip(encoder_names, args.encoder):
        stacks, blocks, sizes[short] = vision_features(name, shown, device, args.image_size)
        vision[short] = by_subset(stacks), blocks

    # ---- every block against every layer
    print0(f"\nmutual k-NN alignment, k = {args.k}, {args.seeds} × {size} pairs ({len(union)} "
           f"different); unrelated: {args.k / (size - 1):.4f}")
    scores, rows = {}, [["encoder", "llm", "score", "shuffled", "at block", "layer"]]
    for encoder, llm in product(encoder_names, llm_names):
        (seen, blocks), (read, layers) = vision[encoder], language[llm]
        mean, best, chance = compare(seen, read)
        v, l = divmod(mean.argmax().item(), len(layers))
        result = {"encoder": encoder, "llm": llm, **spread(best), "block": blocks[v],
                  "layer": layers[l], "shuffled": spread(chance), "rows": blocks,
                  "columns": layers, "map": mean.tolist()}
        scores[encoder, llm] = result
        rows.append([encoder, llm, result["text"], result["shuffled"]["text"], blocks[v],
                     layers[l]])
    print0("\n".join(printing.table(rows)))
    probing.say_sizes(sizes)
    paired = {}
    for (a, b), llm in product(combinations(encoder_names, 2), llm_names):
        change = np.subtract(scores[b, llm]["seeds"], scores[a, llm]["seeds"])
        paired[f"{b} - {a}, {llm}"] = spread(change)
    for name, difference in paired.items():
        print0(f"{name}: {difference['text']} (paired by subset)")

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        draw(out / "align.png", scores)
        files.write_json(out / "results.json", {
            "arguments": vars(args), "pairs": size, "different_pairs": len(union),
            "image_sizes": sizes, "scores": list(scores.values()), "paired": paired})
    print0(f"wrote {out}/align.png, {out}/results.json")


if __name__ == "__main__":
    distributed.launch(main)
