"""What each of the four savings of the DPO step is worth, alone and together, at shape A.

    python benchmarks/savings.py [--shape A] [--quick]

The plain implementation is written out below: two rows a pair, the image encoded for each, the
reference model run at every step, lm_head on every position. Switched on, alone and one after the
other:

  encoding   the image is encoded once a pair
  prefix     image and prompt stand once in one row for both answers (so it contains `encoding`)
  cached     the reference is one pass over the data, a third of one a step over three epochs
  rows       only the rows that predict an answer token go through lm_head

Every variant takes turns with the repository's own step, so that all are comparable although they
run one after the other. That step is the table's last row, a mean over all these runs. Exits
with 1 when the losses of a variant and of that step differ by more than --tolerance.
"""
import statistics
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import common as c
from pivot import model_io, records
import model as m
import numpy as np
import torch
from dpo_vs_trl import our_side
from turns import Side, alternate, fitting_block, ratio

VARIANTS = {"plain": (), "encoding alone": ("encoding",),
            "prefix alone": ("encoding", "prefix"), "cached alone": ("cached",),
            "rows alone": ("rows",), "encoding + prefix + cached": ("encoding", "prefix", "cached"),
            "all four": ("encoding", "prefix", "cached", "rows")}
OURS = "train_dpo.py's step"


def two_rows(shape, samples):
    """[prompt | chosen] of every pair, then [prompt | rejected]: each (2B, T); images (B, …)."""
    swapped = [{**s, "roles": np.array([records.PROMPT, records.OTHER, records.ANSWER])[s["roles"]]}
               for s in samples]
    chosen, rejected = (c.batches(shape, x, "answers") for x in (samples, swapped))
    return [{"pixel_values": a["pixel_values"],
             **{k: torch.cat([a[k], b[k]]) for k in ("input_ids", "labels")}}
            for a, b in zip(chosen, rejected)]


def answer_logps(model, batch, savings):
    """log π of both answers, (B,) each: model.py's forward with its savings made optional."""
    ids, labels, pixels = batch["input_ids"], batch["labels"], batch["pixel_values"]
    mask, copies = None, 2
    if "prefix" in savings:
        mask, copies = m.pair_mask(batch["branch"]), 1
    if "encoding" in savings:
        features = model.projector(model.encoder(pixels)).repeat(copies, 1, 1)
    else:
        features = model.projector(model.encoder(pixels.repeat(copies, 1, 1, 1)))
    embeds = model.llm.get_input_embeddings()(ids)                       # (rows, T, D)
    embeds = embeds.masked_scatter((ids == model.image_token_id)[..., None], features)
    hidden = model.llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                                  position_ids=batch.get("position_ids")).last_hidden_state
    targets = labels[:, 1:]
    wanted = targets != m.IGNORE
    if "rows" in savings:
        logits = model.llm.lm_head(hidden[:, :-1][wanted])               # (answer tokens, V)
        picked = logits.log_softmax(-1).gather(-1, targets[wanted][:, None])[:, 0]
        logps = hidden.new_zeros(targets.shape).masked_scatter(wanted, picked)
    else:
        logits = model.llm.lm_head(hidden[:, :-1])                       # (rows, T - 1, V)
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * wanted
    if "prefix" in savings:
        return m.answer_logps(logps, batch["branch"][:, 1:])
    return logps.sum(1).chunk(2)


def variant_side(turns, folder, shape, num_batches, savings):
    """Train like train_dpo.py, but without the savings that are not named."""
    model, _ = model_io.load_mllm(folder)
    trained = [p for n, p in model.named_parameters() if p.requires_grad]
    samples = c.pairs(shape, num_batches * shape.batch, model.image_token_id)
    batches = c.batches(shape, samples, "pair") if "prefix" in savings else \
        two_rows(shape, samples)
    refs = []
    if "cached" in savings:
        for batch in batches:
            turns.begin("reference")
            with torch.no_grad():
                refs.append(answer_logps(model, batch, savings))
            turns.end()
    else:
        frozen = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained, lr=c.LR, weight_decay=0.0, fused=True)
    for step in range(c.EPOCHS * num_batches):
        batch = batches[step % num_batches]
        turns.begin("step")
        if "cached" in savings:
            ref = refs[step % num_batches]
        else:
            with torch.no_grad():
                ref = answer_logps(frozen, batch, savings)
        loss = m.dpo_loss(*answer_logps(model, batch, savings), *ref, c.BETA)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss.item())


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shape", choices=sorted(c.SHAPES), default="A")
    parser.add_argument("--num-batches", type=int, default=2, help="so many, seen three times")
    parser.add_argument("--block", type=int, default=1, help="steps of one side in a row")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    args.block = fitting_block(args.block, c.EPOCHS * args.num_batches)
    shape, runs, worst = (c.QUICK if args.quick else c.SHAPES)[args.shape], {}, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        c.save(shape, folder)
        for name, savings in VARIANTS.items():
            common = (folder, shape, args.num_batches)
            sides = [Side(name, args.threads, variant_side, *common, savings),
                     Side(OURS, args.threads, our_side, *common)]
            alternate(sides, args.block, name)
            apart = max(abs(a - b) for a, b in zip(sides[0].values, sides[1].values))
            runs[name], worst = sides, max(worst, apart)
    ours = [side for _, side in runs.values()]
    speed = {name: shape.batch / statistics.median(side.costs(args.block))
             for name, (side, _) in runs.items()}
    slower = {name: ratio(*sides, args.block)[0] for name, sides in runs.items()}  # than ours
    peak = {name: side.state["peak"] for name, (side, _) in runs.items()}
    speed[OURS] = statistics.mean(shape.batch / statistics.median(side.costs(args.block))
                                  for side in ours)
    slower[OURS], peak[OURS] = 1.0, max(side.state["peak"] for side in ours)
    print()
    c.table(["switched on", "pairs/s", "× plain", "peak GiB"],
            [[name, f"{speed[name]:.3f}", f"{slower['plain'] / slower[name]:.2f}",
              f"{peak[name]:.2f}"] for name in speed])
    print(f"largest difference between two losses of a step: {worst:.1e}")
    c.write("savings", args, {"shape": shape._asdict(), "losses_apart": worst, "variants": {
        name: {"pairs_per_s": speed[name], "times_plain": slower["plain"] / slower[name],
               "peak": peak[name], **({} if name not in runs else {
                   "losses": runs[name][0].values, "costs": runs[name][0].costs(args.block),
                   "costs_of_ours": runs[name][1].costs(args.block)})} for name in speed}})
    if worst > args.tolerance:
        sys.exit(f"error: the losses differ by {worst:.1e}, more than {args.tolerance:g}")


if __name__ == "__main__":
    main()
