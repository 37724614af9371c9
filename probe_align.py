"""Do eye and language see the same neighbours? Mutual k-NN alignment over image–caption pairs.

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
import os
from itertools import combinations, groupby, product, repeat
from pathlib import Path

from pivot import encoders
from pivot import flags
from pivot import rundir
from pivot import runtime
from pivot import records
from judge import report
from pivot import folders
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from probe_linear import default_out, short_names
from pivot.runtime import print0
from torch.nn import functional as F

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
    add("--seeds", type=flags.COUNT, default=3, help="how many subsets (default 3)")
    add("--seed", type=flags.NATURAL, default=0, help="the first one's seed (default 0)")
    add("--out", help="where to write; default: see above")
    args = parser.parse_args()
    args.out = args.out or str(default_out(args.encoder, "align"))
    return args


def read_pairs(folder):
    """[(where, image path, caption)]; the first bad record ends the run with its file and line."""
    pairs = []
    for where, item in records.read_lines(Path(folder, "pairs.jsonl")):
        item = records.parse(where, item)
        image = records.image_of(item, os.path.join(folder, "images"), where)
        if image in (None, "many"):
            raise records.BadRecord(f"{where}: a pair needs one image")
        pairs.append((where, image, records.text_of(item, "caption", where)))
    return pairs


def pooled(name, pairs, step):
    """step(some pairs) → [(B, L, D), …], run over all pairs: [(n, L, D), …] fp32 on the CPU."""
    parts = [[p.float().cpu() for p in step(pairs[BATCH * i:BATCH * (i + 1)])]
             for i in runtime.progress(0, -(-len(pairs) // BATCH), name)]
    stacks = [torch.cat(p) for p in zip(*parts)]
    if not all(s.isfinite().all() for s in stacks):     # NaN is everybody's neighbour, or nobody's
        raise SystemExit(f"error: {name} gives features that are not finite")
    return stacks


@torch.no_grad()
def vision_features(name, pairs, device):
    """→ [blocks (n, L, D), of a trained model projector (n, 1, d_llm)], names of all these rows."""
    path, projector, blocks = encoders.resolve(name), None, []
    if Path(path, "processor_config.json").exists():          # a trained model, not an encoder
        model = flags.one_eyed(folders.load_mllm(path)[0], path).eval().to(device)
        encoder, projector = model.encoder, model.projector
    else:
        encoder = encoders.load_encoder(name).eval().to(device)

    def keep(block, inputs, out):
        out = out[0] if isinstance(out, tuple) else out
        out = out.flatten(2).transpose(1, 2) if encoder.family.read == "map" else out
        blocks.append(out[:, encoder.prefix:].mean(1))

    def step(batch):
        blocks.clear()
        pixels = [records.load_image(x, encoder.image_size, where) for where, x, _ in batch]
        features = encoder(torch.from_numpy(np.stack(pixels)).to(device))
        # A ConvNeXt's stages have widths of their own; a ViT's blocks are one stack.
        seen = [torch.stack(list(stage), 1) for _, stage in groupby(blocks, lambda b: b.shape[1])]
        return seen if projector is None else [*seen, projector(features).mean(1, keepdim=True)]
    for block in encoder.blocks:
        block.register_forward_hook(keep)
    rows = [*map(str, range(1, len(encoder.blocks) + 1)), *["proj"] * (projector is not None)]
    return pooled(name, pairs, step), rows


@torch.no_grad()
def llm_features(name, pairs, device):
    """→ [(n, layers + 1, D)], names of the layers."""
    from transformers import AutoModelForCausalLM
    path = encoders.resolve(name)
    llm = encoders.open_model(AutoModelForCausalLM, f"--llm {name}", path)
    tokenizer, llm = folders.open_tokenizer(path), llm.base_model.eval().to(device)

    def step(batch):
        ids = [torch.tensor(x) for x in tokenizer([text for *_, text in batch])["input_ids"]]
        ids, there = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device)
                      for x in (ids, [torch.ones_like(x) for x in ids]))
        out = llm(input_ids=ids, attention_mask=there, output_hidden_states=True, use_cache=False)
        return [torch.stack([(h * there[..., None]).sum(1) / there.sum(1, keepdim=True)
                             for h in out.hidden_states], 1)]
    stacks = pooled(name, pairs, step)
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


def draw(path, scores):
    """A heat map a pair, encoders downwards, LLMs to the right, one colour scale for all."""
    maps = {pair: np.array(r["map"]) for pair, r in scores.items()}
    low, high = min(x.min() for x in maps.values()), max(x.max() for x in maps.values())
    eyes, llms = (list(dict.fromkeys(pair[i] for pair in maps)) for i in (0, 1))
    (V, L), font, gap = np.max([x.shape for x in maps.values()], 0), ImageFont.load_default(12), 50
    cell = max(14, min(40, 640 // max(V, L)))
    wide, tall = max(480, cell * L + gap), cell * V + 2 * gap
    sheet = Image.new("RGB", (wide * len(llms) + gap, tall * len(eyes) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), f"dark {low:.3f}, bright {high:.3f}; down: block, across: LLM layer; red: "
             "best", "black", font)
    for (eye, llm), r in scores.items():
        x, y = gap + wide * llms.index(llm), gap + tall * eyes.index(eye)
        at = (maps[eye, llm] - low) / max(high - low, 1e-12)
        rgb = np.stack([np.interp(at, np.arange(5) / 4, c) for c in VIRIDIS.T], -1)
        heat = Image.fromarray(rgb.astype(np.uint8)).resize((cell * at.shape[1],
                                                             cell * at.shape[0]), 0)
        sheet.paste(heat, (x, y))
        u, v = x + cell * r["columns"].index(r["layer"]), y + cell * r["rows"].index(r["block"])
        pen.rectangle((u, v, u + cell - 1, v + cell - 1), None, "red", 2)
        pen.text((x, y - 18), f"{eye}, {llm}: {r['text']}", "black", font)
        for i, name in enumerate(r["rows"]):
            pen.text((x - 18, y + i * cell + cell // 2), name, "black", font, "mm")
        for i, name in enumerate(r["columns"]):
            pen.text((x + i * cell + cell // 2, y + heat.height + 10), name, "black", font, "mm")
    rundir.write_whole(path, lambda aside: sheet.save(aside, "PNG"))


def spread(values):
    """Over seeds: mean, standard deviation (None of a single one), the same as text."""
    values = torch.as_tensor(values, dtype=torch.float64)
    sd = values.std().item() if len(values) > 1 else None
    return {"mean": values.mean().item(), "sd": sd, "seeds": values.tolist(),
            "text": f"{values.mean():.4f}" + ("" if sd is None else f" ±{sd:.4f}")}


def main():
    args = get_args()
    eyes, llms = short_names(args.encoder), short_names(args.llm, "llm")
    device = runtime.start()

    # ---- one subset a seed; features of their union, once; neighbours in each subset
    pairs = read_pairs(args.data)
    size = min(args.limit, len(pairs))
    if size < args.k + 1:
        raise SystemExit(f"error: {size} pairs (--limit {args.limit}, {args.data}/pairs.jsonl has "
                         f"{len(pairs)}); --k {args.k} needs at least {args.k + 1}")
    if size == len(pairs) and args.seeds > 1:
        args.seeds = 1
        print0(f"  all {size} pairs make but one subset: --seeds 1 (a lower --limit gives a ±)")
    drawn = [np.sort(np.random.default_rng(args.seed + s).permutation(len(pairs))[:size])
             for s in range(args.seeds)]
    union, found, labels = np.unique(drawn), {}, {}
    for kind, short, name in [*zip(repeat("llm"), llms, args.llm),
                              *zip(repeat("eye"), eyes, args.encoder)]:
        extract = llm_features if kind == "llm" else vision_features
        stacks, labels[kind, short] = extract(name, [pairs[i] for i in union], device)
        found[kind, short] = [neighbours([s[np.searchsorted(union, d)] for s in stacks], args.k)
                              for d in drawn]

    # ---- every block against every layer
    print0(f"\nmutual k-NN alignment, k = {args.k}, {args.seeds} × {size} pairs ({len(union)} "
           f"different); unrelated: {args.k / (size - 1):.4f}")
    scores, table = {}, [["encoder", "llm", "score", "shuffled", "at block", "layer"]]
    for eye, llm in product(eyes, llms):
        rows, columns = labels["eye", eye], labels["llm", llm]
        both = list(zip(found["eye", eye], found["llm", llm]))
        maps = [mutual_knn(a, b) for a, b in both]
        chance = spread([mutual_knn(a, shuffled(b, s)).max() for s, (a, b) in enumerate(both)])
        mean = sum(maps) / len(maps)
        v, l = divmod(mean.argmax().item(), len(columns))
        scores[eye, llm] = {"encoder": eye, "llm": llm, **spread([x.max() for x in maps]),
                            "block": rows[v], "layer": columns[l], "shuffled": chance,
                            "rows": rows, "columns": columns, "map": mean.tolist()}
        table.append([eye, llm, scores[eye, llm]["text"], chance["text"], rows[v], columns[l]])
    print0("\n".join(report.grid(table)))
    paired = {f"{b} - {a}, {llm}": spread(np.subtract(*(scores[e, llm]["seeds"] for e in (b, a))))
              for a, b in combinations(eyes, 2) for llm in llms}
    for name, difference in paired.items():
        print0(f"{name}: {difference['text']} (paired by subset)")

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "align.png", scores)
    rundir.write_json(out / "results.json", {
        "arguments": vars(args), "pairs": size, "different_pairs": len(union),
        "scores": list(scores.values()), "paired": paired})
    print0(f"wrote {out}/align.png, {out}/results.json")


if __name__ == "__main__":
    runtime.launch(main)
