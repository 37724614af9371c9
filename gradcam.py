"""Where the loss looks: the gradient of one pair's SFT and DPO loss, patch by patch.

Pictures:     python gradcam.py --run-dir runs/toy-vit__toy-lm --data data/toy
Measurement:  python gradcam.py --run-dir runs/toy-vit__toy-lm --data data/toy --num-samples 300
The paper's:  python gradcam.py --run-dir runs/toy-vit__toy-lm --data data/toy --steps 20
Its way:      python gradcam.py --run-dir runs/toy-vit__toy-lm --data data/toy --path

The loss is back-propagated to the image features A (N patches × D channels); the heat of a patch is
Σ_d |∂L/∂A|, the L1 norm over channels, as in the authors' code. There A is the projector's output
(`--at projector`); in the paper's text, and here by default, the encoder's. `--classic` is Grad-CAM
proper: ReLU(Σ_d w_d A), w = the mean over patches of ∂(−L)/∂A, what speaks *for* a lower loss.

DPO's reference is the model before any step, so its gradient at step 0 is exactly
½β (∇log π(y_r) − ∇log π(y_c)): SFT asks what makes the right answer likely, DPO what tells it from
the wrong one. `--steps N` first trains on that one pair with each loss, as the paper does (it shows
about step 20): AdamW at the stage's peak rate, clipped at 1; then the model is put back. That takes
20 bytes a parameter (fp32; without steps 4).

The number is the share of the heat inside the object's mask: each patch's heat counts by the share
of the patch that lies inside. Chance is the object's share of the picture; the ceiling (all heat in
the patch it fills most) is below 100 % where objects are thinner than patches. The authors replace
border rows and columns; here nothing is hidden: picture and number must speak of the same heat.

`--path` shows, for one pair, how the gradient gets there: the norm of what each answer token sends
to the image positions (the projector's output), to the weights of the projector, of every encoder
block, the last one first, and of the patch embedding. A loss is a function of the answer tokens'
log-probs, so its gradient is a sum over tokens: ∂L/∂log π(y_t) × ∇ log π(y_t). Their norms do not
add up: where a right and a wrong answer pull the same way, DPO's difference leaves less.

Reads   runs/NAME/STAGE/final; pairs in MMPR's layout; masks: the image's path with `masks` for
        `images` (toy), or --masks DIR with one a name (ADE20K: annotations, with --mask-label).
Writes  runs/NAME/probes/gradcam/: gradcam.png (image | SFT | DPO), results.json; with --path
        path.json alone.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import data
import model as m
import train_dpo
import train_sft
from judge import intervals
from pivot import distributed, files, flags, images, model_io, printing, records, training
from pivot.distributed import print0

PICTURES, PANEL = 6, 240          # rows of the picture; pixels of a panel
TOKENS = 12                       # of an answer in --path's table


def get_args():
    parser = flags.Parser(__doc__)
    add, flag = parser.add_argument, dict(action="store_true")
    add("--run-dir", "--run", dest="run", metavar="DIR", required=True, help="run folder")
    add("--stage", default="pretrain", help="which model of it to look through: pretrain, sft, dpo "
        "or another folder of the run (default pretrain: where both losses start)")
    add("--data", help="folder in the layout `python -m toy` writes; default: the run's")
    add("--preferences", help="MMPR meta.json or a jsonl of pairs; default DATA/preferences/"
        "heldout.jsonl, or meta.json where that is missing")
    add("--images", help="folder that image names are relative to, where meta.json does not say")
    add("--masks", help="folder of masks, each of its image's name or that name in .png")
    add("--mask-label", type=int, help="inside is this value alone (default: all above 0)")
    add("--num-samples", type=flags.COUNT, default=PICTURES, help="pairs, drawn by a seeded "
        f"shuffle; some hundreds make a measurement (default {PICTURES})")
    add("--seed", type=flags.NATURAL, default=0, help="which pairs are drawn (default 0)")
    add("--skip-bad", **flag, help="drop and count bad records")
    flags.add_follow_links(parser)
    add("--at", default="encoder", choices=["encoder", "projector"], help="default encoder")
    add("--path", **flag, help="of the first pair drawn, the norm of the gradient from every "
        "answer token to every station on its way; no pictures")
    add("--classic", **flag, help="gradient-weighted activations and a ReLU")
    add("--steps", type=flags.NATURAL, default=0, help="train on each pair so long first "
        "(default 0)")
    add("--beta", type=flags.ABOVE_0, help="DPO's (default: train_dpo.py's; matters after step 0)")
    add("--sft-lr", type=flags.ABOVE_0, help="rate of those steps; default: train_sft.py's")
    add("--dpo-lr", type=flags.ABOVE_0, help="the same for DPO; default: train_dpo.py's")
    add("--out", help="default RUN/probes/gradcam")
    args = parser.parse_args()
    stage = flags.trained_stage(args.run, args.stage)
    made_with = files.read_json(stage / "config.json", "arguments")["arguments"]
    args.data = args.data or made_with["data"] or train_sft.PAPER["data"]
    heldout = Path(args.data, "preferences", "heldout.jsonl")
    args.preferences = args.preferences or str(
        heldout if heldout.exists() else heldout.with_name("meta.json"))
    sft = flags.defaults(train_sft.PAPER, train_sft.TOY, made_with["llm"])
    dpo = flags.defaults(train_dpo.PAPER, train_dpo.TOY, made_with["llm"])
    args.sft_lr, args.dpo_lr = args.sft_lr or sft["lr"], args.dpo_lr or dpo["lr"]
    args.beta = args.beta or dpo["beta"]
    args.out = args.out or str(Path(args.run, "probes", "gradcam"))
    return args


def sft_loss(model, batch):
    """−log π(y_c), a mean over answer tokens, as train_sft.py descends it: 0-dim."""
    return -model(**batch).sum() / (batch["labels"] != m.IGNORE).sum()


def dpo_loss(model, batch, ref, beta):
    """DPO's loss of a pair, as train_dpo.py descends it; ref: log π_ref of both answers: 0-dim."""
    chosen, rejected = m.answer_logps(model(**batch), batch.get("branch"))
    return m.dpo_loss(chosen, rejected, *ref, beta)[0].sum()


def gradients(model, loss_of, at):
    """METHOD: one pair's features A at model.encoder or model.projector, ∂L/∂A, each (N, D), and L.

    loss_of: no arguments → 0-dim loss. No parameter's gradient is computed."""
    kept = []
    hook = getattr(model, at).register_forward_hook(lambda module, inputs, out: kept.append(out))
    loss = loss_of()
    hook.remove()
    grad, = torch.autograd.grad(loss, kept)
    return kept[0][0].detach(), grad[0], loss.detach()


def heat_of(features, grad, classic=False):
    """METHOD: (N, D), (N, D) → heat of every patch (N,), never negative."""
    return (features @ -grad.mean(0)).relu() if classic else grad.abs().sum(1)


def train_on(model, loss_of, lr, steps):
    """So many steps on one pair, as a stage takes them but for the schedule."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr,
                                  betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(steps):
        loss_of().backward()
        training.clip_grad_norm(model)
        optimizer.step()
        optimizer.zero_grad()


def mask_path(args, image):
    """Where a picture's mask lies: in --masks, or where `masks` stands for `images` in its path,
    with its links or without; None where there is no such file."""
    folders = [args.masks] if args.masks else []
    for path in () if args.masks else (image, os.path.realpath(image)):
        packed = f"{Path(path).parent}/".replace("/images.pack/", "/images/")    # masks are files
        above, found, below = packed.rpartition("/images/")
        folders += [f"{above}/masks/{below}"] if found else []
    candidates = [Path(folder, name) for folder in folders
                  for name in (Path(image).name, f"{Path(image).stem}.png")]
    return next((path for path in candidates if path.is_file()), None)


def object_mask(args, image, where):
    """Where the object is, bool (H, W), as large as the picture; None without a file or an object.
    """
    path = mask_path(args, image)
    if path is None:
        return None
    labels = images.read_mask(path, image, where)
    if labels.ndim == 3:                                             # alpha says nothing here
        labels = labels[..., :3 if labels.shape[2] > 2 else 1].max(-1)
    mask = labels > 0 if args.mask_label is None else labels == args.mask_label
    return mask if mask.any() else None


def coverage(mask, grid, reach):
    """Share of every patch that lies inside the mask: bool (H, W) → (grid², ) fp64, exact.

    reach: share of the image's side that the patches cover (27 × 14 of 384 pixels: 0.984)."""
    def overlap(n):          # (grid, n): which share of a patch each pixel makes up
        edges, pixels = np.arange(grid + 1)[:, None] * n * reach / grid, np.arange(n)
        inside = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
        return inside.clip(0) * grid / (n * reach)
    return torch.from_numpy(overlap(mask.shape[0]) @ mask @ overlap(mask.shape[1]).T).flatten()


def shares_inside(heats, cover):
    """heats (n, 2, N), cover (n, N), NaN without a mask → (n, 4): the share of SFT's and of DPO's
    heat inside the mask (NaN where there is none at all), chance, ceiling."""
    inside = (heats * cover[:, None]).sum(2) / heats.sum(2)
    return torch.cat([inside, cover.mean(1, keepdim=True), cover.amax(1, keepdim=True)], 1)


def lay_over(picture, heat, reach):
    """Heat (N,) over a picture of any size, in place, as the authors do: min–max, power 1.1,
    bilinear, jet colours at 0.6."""
    heat = ((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-30)) ** 1.1
    grid, size = int(len(heat) ** 0.5), [round(side * reach) for side in picture.size]
    heat = Image.fromarray(heat.view(grid, grid).float().numpy()).resize(size, 2)
    jet = (1.5 - abs(4 * np.asarray(heat)[..., None] - (3, 2, 1))).clip(0, 1) * 255
    jet = Image.fromarray(jet.astype(np.uint8))
    picture.paste(Image.blend(picture.crop((0, 0, *size)), jet, 0.6))


def panel(pixels, mask, heat, reach):
    """The image as the encoder sees it, the mask's outline, and the heat, if any: PANEL² picture.
    """
    picture = Image.fromarray(pixels.transpose(1, 2, 0)).resize((PANEL, PANEL), Image.NEAREST)
    if heat is not None:
        lay_over(picture, heat, reach)
    if mask is not None:
        mask = Image.fromarray(mask.astype(np.uint8) * 255).resize((PANEL, PANEL), Image.NEAREST)
        rim = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MinFilter(5)))
        picture.paste("white", mask=Image.fromarray(rim))
    return picture


def draw(path, rows):
    """rows: [(three panels, a line above each, two lines below)] → one picture."""
    gap, line, font = 8, 18, ImageFont.load_default(13)
    height = PANEL + 3 * line + 2 * gap
    sheet = Image.new("RGB", (3 * (PANEL + gap) + gap, len(rows) * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (panels, labels, texts) in zip(range(gap, len(rows) * height, height), rows):
        for x, picture, label in zip(range(gap, sheet.width, PANEL + gap), panels, labels):
            pen.text((x, y), label, "black", font)
            sheet.paste(picture, (x, y + line))
        for i, text in enumerate(texts, 1):
            while pen.textlength(text, font) > sheet.width - 2 * gap:
                text = text[:-2] + "…"
            pen.text((gap, y + PANEL + i * line + 2), text, "black", font)
    files.write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def batches_of(model, pair, device):
    """One pair as SFT and as DPO are fed it: [batch, batch]."""
    batches = []
    for layout in ("answers", "pair" if m.can_hold_pairs(model.llm) else "rows"):
        batch = data.collate([pair], layout)
        batches.append({k: v.to(device) for k, v in batch.items() if k != "index"})
    return batches


def losses_of(args, model, pair, device):
    """The two losses of one pair as functions without arguments, and the rate each trains at:
    [(loss_of, lr), …], SFT's first. DPO's reference is the model as it is now."""
    answers, both = batches_of(model, pair, device)
    with torch.no_grad():
        ref = m.answer_logps(model(**both), both.get("branch"))
    return [(partial(sft_loss, model, answers), args.sft_lr),
            (partial(dpo_loss, model, both, ref, args.beta), args.dpo_lr)]


def heats_of(args, model, pairs, device):
    """The heat of both losses for every pair, each from the same weights; on every process, shared
    out: heats (n, 2, N) fp64, losses (n, 2)."""
    (rank, world), n = distributed.world(), len(pairs)
    start = [p.detach().clone() for p in model.parameters()] if args.steps else []
    heats = torch.zeros(n, 2, model.encoder.num_tokens, dtype=torch.float64)
    losses, mine = torch.zeros(n, 2), range(rank, n, world)
    for i in (mine[j] for j in distributed.progress(0, len(mine), "heat")):
        for which, (loss_of, lr) in enumerate(losses_of(args, model, pairs[i], device)):
            train_on(model, loss_of, lr, args.steps)
            features, grad, losses[i, which] = gradients(model, loss_of, args.at)
            heats[i, which] = heat_of(features, grad, args.classic).double().cpu()
            with torch.no_grad():
                for p, before in zip(model.parameters(), start):
                    p.copy_(before)
        if not heats[i].isfinite().all():
            raise SystemExit(f"error: {pairs.where[i]}: a gradient is not finite; lower --sft-lr "
                             f"or --dpo-lr, if there were steps")
    return distributed.sum_tensor(heats), distributed.sum_tensor(losses)


def texts_of(pairs, tokenizer, i):
    """Question, chosen and rejected answer of a pair, as text."""
    (ids, roles), texts = pairs.tokens(i), []
    for role in (records.PROMPT, records.ANSWER, records.OTHER):
        piece = tokenizer.decode(ids[roles == role]).split(records.IMAGE_TOKEN)[-1]
        texts.append(piece.split("<|im_end|>")[0].strip())
    return texts


def summary(shares):
    """shares (n, 4) as shares_inside gives them → {what: mean and interval}, paired by pair."""
    sft, dpo, chance, ceiling = shares.T
    if not len(sft):
        return {}
    return {name: intervals.normal(values) for name, values in (
        ("SFT", sft), ("DPO", dpo), ("DPO - SFT", dpo - sft), ("chance", chance),
        ("SFT - chance", sft - chance), ("DPO - chance", dpo - chance), ("ceiling", ceiling))}


# --------------------------------------------------------------------------- the gradient's way

def stations(model):
    """Whose weights the gradient meets on its way from the image positions to the pixels: [(name,
    [parameters]), …]. Positions, a class token and norms outside the blocks are none of them."""
    encoder = model.encoder
    found = [("projector", model.projector.parameters())]
    for number, block in reversed([*enumerate(encoder.blocks, 1)]):
        found.append((f"block {number}", block.parameters()))
    patch = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return [(name, [p for p in parameters if p.requires_grad])
            for name, parameters in [*found, ("patch embedding", patch.parameters())]]


def norms_of(model, batch, pulls):
    """METHOD: one backward pass from the answer tokens' log-probs: the norm of the gradient at the
    image positions, then at every station, [1 + stations]. pulls: ∂L/∂log π of every token (B, T).
    """
    kept, groups = [], [parameters for _, parameters in stations(model)]
    hook = model.projector.register_forward_hook(lambda module, inputs, out: kept.append(out))
    logps = model(**batch)
    hook.remove()
    flat = [p for group in groups for p in group]
    grads = torch.autograd.grad(logps, [*kept, *flat], pulls.to(logps.dtype))
    norms, rest = [grads[0].norm().item()], list(grads[1:])
    for group in groups:
        norms.append(torch.stack([rest.pop(0).norm() for _ in group]).norm().item())
    return norms


def path_of(model, batch, loss_of, tokenizer):
    """The way of one loss's gradient. loss_of: log-probs (B, T) → 0-dim loss.
    → {"loss", "whole": norms, "tokens": [{"text", "answer", "pull", "norms"}, …]}."""
    with torch.no_grad():
        logps = model(**batch)
    loss = loss_of(logps.requires_grad_())
    pulls, = torch.autograd.grad(loss, logps)
    answers, tokens = batch.get("branch"), []
    for row, t in (batch["labels"] != m.IGNORE).nonzero().tolist():
        rejected = row > 0 if answers is None else answers[row, t] == m.REJECTED
        one = torch.zeros_like(pulls)
        one[row, t] = pulls[row, t]
        tokens.append({"text": tokenizer.decode([batch["labels"][row, t].item()]),
                       "answer": "rejected" if rejected else "chosen",
                       "pull": one[row, t].item(), "norms": norms_of(model, batch, one)})
    return {"loss": loss.item(), "whole": norms_of(model, batch, pulls), "tokens": tokens}


def path_tables(names, methods):
    """The lines of --path's two tables: every station, of the whole loss; then every answer token
    (of a long answer those that send most), at some of the stations."""
    sft, dpo = (methods[name]["whole"] for name in ("sft", "dpo"))
    lines = printing.table([["the whole loss", "SFT", "DPO", "DPO / SFT"], *(
        [name, f"{s:.3g}", f"{d:.3g}", f"{d / s:.3g}" if s else "–"]
        for name, s, d in zip(names, sft, dpo))])
    shown = [names.index(name) for name in dict.fromkeys(
        ["image positions", "projector", names[2], names[-2], "patch embedding"])]
    rows = [["token by token", "pull", *(names[i] for i in shown)]]
    for method, found in methods.items():
        for answer in dict.fromkeys(x["answer"] for x in found["tokens"]):
            tokens = [x for x in found["tokens"] if x["answer"] == answer]
            least = sorted((x["norms"][0] for x in tokens), reverse=True)[:TOKENS][-1]
            rows += [[f"{method.upper()}, {answer} {x['text']!r}", f"{x['pull']:+.3g}",
                      *(f"{x['norms'][i]:.2e}" for i in shown)]
                     for x in tokens if x["norms"][0] >= least]
    return [*lines, "", *printing.table(rows)]


def show_path(args, model, tokenizer, pairs, device):
    """Print the way of both gradients for the first pair, each from the same weights, and write
    path.json."""
    answers, both = batches_of(model, pairs[0], device)
    with torch.no_grad():
        ref = m.answer_logps(model(**both), both.get("branch"))
    # The losses of log-probs that are there already: of a "model" that gives just these.
    losses = {"sft": lambda logps: sft_loss(lambda **batch: logps, answers),
              "dpo": lambda logps: dpo_loss(lambda **batch: logps, both, ref, args.beta)}
    start, methods = [p.detach().clone() for p in model.parameters()], {}
    for method, batch, (loss_of, lr) in zip(losses, (answers, both),
                                            losses_of(args, model, pairs[0], device)):
        train_on(model, loss_of, lr, args.steps)
        methods[method] = path_of(model, batch, losses[method], tokenizer)
        with torch.no_grad():
            for p, before in zip(model.parameters(), start):
                p.copy_(before)
    question, chosen, rejected = texts_of(pairs, tokenizer, 0)
    names = ["image positions", *(name for name, _ in stations(model))]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        files.write_json(out / "path.json", {
            "pair": pairs.where[0], "question": question, "chosen": chosen, "rejected": rejected,
            "stage": args.stage, "steps": args.steps, "stations": names, "methods": methods})
    print0(f"{pairs.where[0]}: {question}\nchosen: {chosen}   rejected: {rejected}\nnorm of the "
           f"gradient on its way from the answer to the pixels, {args.steps} steps\n")
    print0("\n".join([*path_tables(names, methods), f"wrote {out}/path.json"]))


def main():
    args = get_args()
    device = distributed.start()
    model, tokenizer = model_io.load_mllm(flags.trained_stage(args.run, args.stage) / "final")
    model, encoder = model.eval().to(device), model.encoder
    pairs = data.preference_pairs(args, args.preferences, tokenizer, model)
    if args.path:
        show_path(args, model, tokenizer, pairs, device)
        return

    # ---- images and masks first: a bad file should not end an hour's work
    grid = int(encoder.num_tokens ** 0.5)
    reach = grid * encoder.patch_size / encoder.image_size
    cover, shown = torch.full((len(pairs), grid * grid), float("nan"), dtype=torch.float64), []
    for i in distributed.progress(0, len(pairs), "images and masks"):
        pixels = pairs[i]["pixels"]
        mask = object_mask(args, pairs.images[i], pairs.where[i])
        if mask is not None:
            cover[i] = coverage(mask, grid, reach)
        if i < PICTURES:
            shown.append((pixels, mask))

    # ---- one pair at a time, each loss from the same weights
    heats, losses = heats_of(args, model, pairs, device)

    # ---- shares inside the mask, paired by sample; picture, table, results
    shares = shares_inside(heats, cover)
    usable = shares.isfinite().all(1)
    table, rows = summary(shares[usable]), []
    for i, (pixels, mask) in enumerate(shown):
        sft, dpo, chance, _ = ["none" if s != s else f"{100 * s:.1f} %" for s in shares[i].tolist()]
        print0(f"  {pairs.where[i]}: inside: SFT {sft}, DPO {dpo}, chance {chance}")
        question, chosen, rejected = texts_of(pairs, tokenizer, i)
        rows.append(([panel(pixels, mask, heat, reach) for heat in (None, *heats[i])],
                     [f"object: {chance} of the picture", f"SFT: {sft} inside",
                      f"DPO: {dpo} inside"],
                     (question, f"chosen: {chosen}   rejected: {rejected}")))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        draw(out / "gradcam.png", rows)
        sft_loss_mean, dpo_loss_mean = losses.mean(0).tolist()
        files.write_json(out / "results.json", {
            "arguments": vars(args), "data": pairs.summary(), "share_inside": table,
            "loss": {"sft": sft_loss_mean, "dpo": dpo_loss_mean},
            "columns": ["SFT", "DPO", "chance", "ceiling"],
            "samples": [[where, *(None if s != s else s for s in row)]
                        for where, row in zip(pairs.where, shares.tolist())]})
    no_mask, no_heat = int(cover[:, 0].isnan().sum()), int((heats.sum(2) == 0).any(1).sum())
    print0(f"\nshare of the heat inside the object; {'Grad-CAM' if args.classic else 'gradient'} "
           f"at the {args.at}, {args.steps} steps; {int(usable.sum())} of {len(pairs)} pairs (no "
           f"mask: {no_mask}, no heat: {no_heat})")
    for name, row in table.items():
        half = "" if row["ci95"] is None else f" ±{100 * row['ci95']:.1f}"
        print0(f"  {name:<14}{100 * row['mean']:7.1f}{half} %")
    print0(f"wrote {out}/gradcam.png, {out}/results.json")


if __name__ == "__main__":
    distributed.launch(main)
