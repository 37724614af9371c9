"""Detach the trained encoder: a folder that transformers opens, and how far every block moved.

    python extract.py --run-dir runs/toy-vit__toy-lm --stage dpo [--full] [--out DIR]

Reads   runs/NAME/STAGE/final and the original encoder named in its config.json.
Writes  runs/NAME/STAGE/encoder (or DIR): config.json, model.safetensors,
        preprocessor_config.json, README.md (the model card; its first code block runs as it is),
        moved.json (how far every block moved).

Of SigLIP and CLIP the last block is removed before training, for no gradient reaches it. Tools that
leave out the last block by themselves (LLaVA-NeXT's SigLIP tower deletes it, LLaVA's CLIP tower
reads hidden_states[-2]) would lose a trained one. For them --full writes runs/NAME/STAGE/
encoder-full: the same encoder with the original's last block, and what stood behind it, put back.

A vision tower that was silently not trained, or not saved, is the classic failure of this recipe.
So the table of relative weight changes is printed, the command refuses when nothing moved, and the
folder is reopened and compared bit by bit before it gets its final name.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
from pathlib import Path

import torch

from pivot import distributed, encoders, files, flags, model_io, published, tensors

CARD = """---
tags: [vision, pivot]
library_name: transformers{hub}
---
# {title}

The vision encoder of `{folder}`, trained through an LLM ({stage}) and detached.
Features are `{layer}`{dropped}: the very tensor the LLM saw in training{unused}.

```python
from PIL import Image
import torch
import transformers

folder = "."
pillow = dict(use_fast=False) if transformers.__version__.startswith("4.") else dict(backend="pil")
processor = transformers.AutoImageProcessor.from_pretrained(folder, **pillow)
encoder = transformers.{cls}.from_pretrained(folder{extra}).eval(){eps}
image = Image.new("RGB", (640, 480), "white")
pixels = processor(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    features = encoder(pixels{every}).{layer}{slice}
print(tuple(features.shape))  # (1, {tokens}, {width})
```

It runs in transformers 4 and 5. Preprocessing is a bicubic squash to {size} × {size} with the
encoder's own mean and standard deviation; Pillow's resize is the definition.{blocks}

| provenance | |
|---|---|
| original encoder | {base} |
| LLM it was trained through | {llm} |
| stage | {stage} |
| data digest | {digest} |
| parent digest | {parent} |
| how far it moved | {moved} |
"""


NORM_EPS = """
for norm in [m for m in encoder.modules() if hasattr(m, "eps")]:
    norm.eps = {}  # as it was trained; the class says 1e-6"""

CUT = """

Features are what the last block in this folder gives. The original's block behind it is left out:
no gradient reaches it. Tools that leave out the last block by themselves would lose a trained one
here: LLaVA-NeXT's SigLIP tower deletes it, LLaVA's CLIP tower reads `hidden_states[-2]`. For those,
`extract.py --full` writes a folder that has it, if the original encoder below has it."""

FULL = """

**This folder is for tools that leave out the last block by themselves**: LLaVA-NeXT's SigLIP tower
deletes it, LLaVA's CLIP tower reads `hidden_states[-2]`. The first {trained} blocks are trained.
The last one and what stands behind it are the original's, never trained with these: they are there
to be left out. `last_hidden_state` and `pooler_output` come from a mix of both; do not use them."""


def group_of(name):
    """The block that a tensor belongs to (the last number in its name: a ConvNeXt numbers stages,
    too), or the embeddings, or whatever else the class holds."""
    parts = name.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[:number + 1])


def movement(trained, before):
    """Relative weight change of the embeddings, each block, and whatever else the class holds, of
    two {name: tensor}: {name: float}."""
    return tensors.relative_change([(k, p, before[k]) for k, p in trained.items()], group_of)[0]


def block_changes(moved):
    """The least and the largest change of a transformer block."""
    changes = [v for k, v in moved.items() if k.split(".")[-1].isdigit()]
    return min(changes), max(changes)


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    parser.add_argument("--stage", default="dpo", help="which trained model to take the encoder "
                        "from: pretrain, sft, dpo or another folder of the run (default dpo)")
    parser.add_argument("--full", action="store_true", help="put the original's last block back, "
                        "for tools that leave it out by themselves")
    parser.add_argument("--out", help="where to write it; default RUN/STAGE/encoder, with --full "
                        "RUN/STAGE/encoder-full")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return parser.parse_args()


def already_there(args, stage, out, source):
    """Does `out` hold this very encoder? raises SystemExit where it holds something else."""
    if not out.exists():
        return False
    held = out / "config.json"
    held = files.read_json(held).get("pivot_source") if held.is_file() else None
    if args.out and not held:
        raise SystemExit(f"error: --out {out} was not written by extract.py and is left alone; "
                         f"name another folder")
    if args.overwrite:
        return False
    if held != source:
        raise SystemExit(f"error: {out} holds the encoder of another model than {stage}/final, or "
                         f"that one with{'out' if args.full else ''} --full; --overwrite replaces "
                         f"it")
    return True


def measure(args, stage, config, encoder, original):
    """Print how far every block moved; → what moved.json holds: the changes against the original
    and, where there is a parent stage, since that. Trained blocks must have moved: raises
    SystemExit if not."""
    base = config["arguments"]["encoder"]
    trained, before = (dict(e.vision.named_parameters()) for e in (encoder, original))
    tensors.refuse_misfit(f"{stage}/final, which began with {base},",
                          {n: p.shape for n, p in before.items()},
                          {n: p.shape for n, p in trained.items()})
    moved = movement(trained, before)
    found = {"original": base, "moved": moved}
    print(f"relative weight change of {stage}/final against {base}")
    for name, change in moved.items():
        unused = "  (never trained: unused)" if f"{name}.".startswith(encoder.family.frozen) else ""
        print(f"  {name:<32} {change:9.2e}{unused}")
    if "parent_digest" in config:     # the parent stage moved it already: what did this one add?
        name = config["arguments"].get("parent") or "pretrain"
        parent = files.from_folder(args.run, name) / "final"
        if not parent.exists():
            raise SystemExit(f"error: {parent} is gone, so nobody can say what {args.stage} added "
                             f"to it; put it back, or extract before it goes")
        if config["parent_digest"] != tensors.digest_of(parent):
            raise SystemExit(f"error: {parent} was trained anew since {stage} began with it; train "
                             f"{args.stage} anew, too")
        stored, before = tensors.stored(parent), {}
        for n in trained:
            key = model_io.file_name_of(f"encoder.vision.{n}")
            before[n] = stored[key].tensor()
        moved = movement(trained, before)
        found |= {"parent": name, "moved_since_parent": moved}
        print("of which since {}: {:.2e} … {:.2e} a block".format(name, *block_changes(moved)))
    if not block_changes(moved)[0]:
        script = config.get("script") or flags.script_of(args.stage)
        raise SystemExit(f"error: nothing moved, or not every block: {stage}/final holds an "
                         f"encoder that {script} did not train; was --encoder-lr or --lr 0?")
    return found


def with_last_block(stage, encoder, original):
    """The original's vision model, all of its blocks and what stands behind them, with everything
    that the trained encoder has in its place; raises SystemExit where no block was removed, or the
    original lacks it itself.

    original: (name, image size), as load_encoder takes them.
    """
    if not encoder.family.drop_last_block:
        raise SystemExit(f"error: --full: no block of a {encoder.vision.config.model_type} was "
                         f"removed: what extract.py writes without --full is already full")
    vision, _, _ = published.load_vision(*original)
    more = len(encoders.blocks_of(vision)) - len(encoder.blocks)
    if not more:
        raise SystemExit(f"error: --full: {stage}/final began with {original[0]}, which has no "
                         f"block behind the features; begin with one that has it: a published "
                         f"encoder, or what extract.py writes with --full")
    if more > 1:
        raise SystemExit(f"error: --full puts one block back; {stage}/final was trained with "
                         f"{more} less than {original[0]} has")
    for name, p in encoder.vision.named_parameters():
        vision.get_parameter(name).copy_(p)
    return vision


def card_of(args, stage, config, encoder, found):
    """The model card: README.md of the folder. found: as `measure` gives it."""
    family, vision, base = encoder.family, encoder.vision, config["arguments"]["encoder"]
    eps = getattr(vision.config, "pivot_norm_eps", None)
    since = f" since {config['arguments'].get('parent') or 'pretrain'}" \
        if "parent_digest" in config else ""
    changes = block_changes(found.get("moved_since_parent", found["moved"]))
    how_taken, unused = "", ""
    if family.read == "map":
        how_taken = ".flatten(2).transpose(1, 2)"
    elif encoder.prefix:
        how_taken = f"[:, {encoder.prefix}:]"
    if family.frozen == ("post_layernorm.",) and not encoder.prefix:
        unused = ", *not* `last_hidden_state`, which adds a norm that nobody trained"
    no_pooler = "add_pooling_layer" in encoders.class_options(vision.config)
    layer, every, blocks = "last_hidden_state", "", ""
    if family.read == "block":
        every = ", output_hidden_states=True"
        layer = "hidden_states[-2]" if args.full else "hidden_states[-1]"
    if family.drop_last_block:
        blocks = FULL.format(trained=len(encoder.blocks)) if args.full else CUT
    published_as = encoders.resolve(base)
    on_hub = "" if Path(published_as).exists() else f"\nbase_model: {published_as}"
    title = f"{encoders.short_name(base)}, after {args.stage.upper()}"
    title += ", with the original's last block" if args.full else ""
    return CARD.format(
        base=base, hub=on_hub, title=title,
        folder=stage / "final", stage=args.stage, cls=type(vision).__name__, layer=layer,
        every=every, blocks=blocks, slice=how_taken, eps=NORM_EPS.format(eps) if eps else "",
        dropped=f" without its first {encoder.prefix} tokens" if encoder.prefix else "",
        unused=unused, extra=", add_pooling_layer=False" if no_pooler else "",
        tokens=encoder.num_tokens, width=encoder.hidden_size, size=encoder.image_size,
        llm=config["arguments"]["llm"], digest=config.get("data_digest"),
        parent=config.get("parent_digest", "none: stage 1 starts from the original"),
        moved="{:.1e} … {:.1e} a block (relative weight change{})".format(*changes, since))


def write(out, encoder, vision, source, card, found):
    """Write the folder aside, reopen it, compare features bit by bit, then give it its name.
    vision: what is saved, the encoder's own or the whole of with_last_block; found: moved.json."""
    vision.config.pivot_source = source            # whose encoder it is, for a later call
    for_clip = vision is not encoder.vision and vision.config.model_type == encoders.CLIP
    with files.new_folder(out) as aside:
        model_io.save_vision(vision, aside)
        model_io.image_processor(encoder, for_clip).save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        files.write_json(aside / "moved.json", found)
        pixels = torch.randint(0, 256, (2, 3, encoder.image_size, encoder.image_size),
                               dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        reopened = published.load_encoder(str(aside)).eval()
        if not torch.equal(reopened(pixels), encoder.eval()(pixels)):
            raise SystemExit(f"error: {aside} reopened gives other features; nothing was written")


@torch.no_grad()
def main():
    args = get_args()
    stage = flags.trained_stage(args.run, args.stage)
    out = Path(args.out or stage / ("encoder-full" if args.full else "encoder"))
    config = files.read_json(stage / "config.json", "arguments")
    source = tensors.digest_of(stage / "final") + (" --full" if args.full else "")
    if already_there(args, stage, out, source):
        print(f"{out} is already there: nothing to do (--overwrite replaces it)")
        return
    model, _ = model_io.load_mllm(stage / "final")
    encoder = model.encoder
    original = config["arguments"]["encoder"], config["arguments"].get("image_size")
    found = measure(args, stage, config, encoder,
                      published.load_encoder(*original, blocks=len(encoder.blocks)))
    vision = with_last_block(stage, encoder, original) if args.full else encoder.vision
    card = card_of(args, stage, config, encoder, found)
    write(out, encoder, vision, source, card, found)
    print(f"wrote {out}: {encoder.num_tokens} tokens of width {encoder.hidden_size}; "
          f"reopened, features bit-equal")


if __name__ == "__main__":
    distributed.launch(main)
