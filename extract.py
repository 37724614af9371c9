"""Detach the trained eye: a folder that transformers opens, and how far every block moved.

    python extract.py --run-dir runs/toy-vit__toy-lm --stage dpo [--out DIR]

Reads   runs/NAME/STAGE/final and the original encoder named in its config.json.
Writes  runs/NAME/STAGE/encoder (or DIR): config.json, model.safetensors,
        preprocessor_config.json, README.md (the model card; its first code block runs as it is).

A vision tower that was silently not trained, or not saved, is the classic failure of this recipe.
So the table of relative weight changes is printed, the command refuses when nothing moved, and the
folder is reopened and compared bit by bit before it gets its final name.
"""
import os
import shutil
from pathlib import Path

from pivot import encoders
from pivot import flags
from pivot import folders
from pivot import rundir
from pivot import runtime
import torch

CARD = """---
tags: [vision, pivot]
base_model: {base}
---
# {title}

The vision encoder of `{folder}`, trained through an LLM ({stage}) and detached.
Features are `{layer}`{dropped}: the very tensor the LLM saw in training{unused}.

```python
from PIL import Image
import torch
from transformers import AutoImageProcessor, {cls}

folder = "."
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
encoder = {cls}.from_pretrained(folder{extra}){eps}
image = Image.new("RGB", (640, 480), "white")
pixels = processor(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    features = encoder(pixels, output_hidden_states=True).{layer}{slice}
print(tuple(features.shape))  # (1, {tokens}, {width})
```

Preprocessing is a bicubic squash to {size} × {size} with the encoder's own mean and standard
deviation; the Pillow backend is the definition.

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
for norm in [m for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)]:
    norm.eps = {}  # as it was trained; the class says 1e-6"""


def movement(trained, before):
    """Relative weight change of the embeddings, each block, and whatever else the class holds, of
    two {name: tensor}: {name: float}."""
    def group(name):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        return ".".join(parts[:number + 1])
    return rundir.relative_change([(k, p, before[k]) for k, p in trained.items()], group)[0]


def block_changes(moved):
    """The least and the largest change of a transformer block."""
    changes = [v for k, v in moved.items() if k.split(".")[-1].isdigit()]
    return min(changes), max(changes)


@torch.no_grad()
def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("--run-dir", "--run", dest="run", metavar="DIR", required=True,
                        help="run folder, e.g. runs/toy-vit__toy-lm")
    parser.add_argument("--stage", default="dpo", choices=["pretrain", "sft", "dpo"],
                        help="which trained model to take the encoder from (default dpo)")
    parser.add_argument("--out", help="where to write it; default RUN/STAGE/encoder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    args = parser.parse_args()
    stage = flags.trained_stage(args.run, args.stage)
    out = Path(args.out or stage / "encoder")
    config = encoders.read_json(stage / "config.json", "arguments",
                                *["parent_digest"] * (args.stage != "pretrain"))
    source = rundir.digest_of(stage / "final")
    if out.exists():
        held = out / "config.json"
        held = encoders.read_json(held).get("pivot_source") if held.is_file() else None
        if args.out and not held:
            raise SystemExit(f"error: --out {out} was not written by extract.py and is left alone; "
                             f"name another folder")
        if held != source and not args.overwrite:
            raise SystemExit(f"error: {out} holds the encoder of another model than {stage}/final; "
                             f"--overwrite replaces it")
        if not args.overwrite:
            print(f"{out} is already there: nothing to do (--overwrite replaces it)")
            return
    base = config["arguments"]["encoder"]
    model, _ = folders.load_mllm(stage / "final")
    encoder = model.encoder
    original = encoders.load_encoder(base, config["arguments"].get("image_size"))

    trained, before = (dict(e.vision.named_parameters()) for e in (encoder, original))
    shapes = [{n: p.shape for n, p in tensors.items()} for tensors in (before, trained)]
    encoders.refuse_misfit(f"{stage}/final, which began with {base},", *shapes)

    # ---- how far did it move? Trained blocks must have; a frozen norm must not.
    moved = movement(trained, before)
    print(f"relative weight change of {stage}/final against {base}")
    for name, change in moved.items():
        frozen = f"{name}.".startswith(encoder.family.frozen)
        print(f"  {name:<32} {change:9.2e}" + ("  (never trained: unused)" if frozen else ""))
    if args.stage != "pretrain":      # stage 1 moved it already: what did this stage add?
        parent = Path(args.run, "pretrain", "final")
        if config["parent_digest"] != rundir.digest_of(parent):
            raise SystemExit(f"error: {parent} was trained anew since {stage} began with it; train "
                             f"{args.stage} anew, too")
        files = folders.stored(parent)
        names = {n: folders.file_name_of(f"encoder.vision.{n}") for n in trained}
        moved = movement(trained, {n: files[k].get_tensor(k) for n, k in names.items()})
        print("of which since stage 1: {:.2e} … {:.2e} a block".format(*block_changes(moved)))
    least, most = block_changes(moved)
    if not least:
        raise SystemExit(f"error: nothing moved, or not every block: {stage}/final holds an "
                         f"encoder that {flags.script_of(args.stage)} did not train; was "
                         f"--encoder-lr or --lr 0?")

    # ---- write aside, reopen, compare bit by bit, rename
    family, vision = encoder.family, encoder.vision
    eps = getattr(vision.config, "pivot_norm_eps", None)
    card = CARD.format(
        base=base, title=f"{encoders.short_name(base)}, after {args.stage.upper()}",
        folder=stage / "final", stage=args.stage, cls=type(vision).__name__,
        layer="hidden_states[-1]" if family.read == "block" else "last_hidden_state",
        slice=".flatten(2).transpose(1, 2)" if family.read == "map" else
        f"[:, {encoder.prefix}:]" if encoder.prefix else "",
        eps=NORM_EPS.format(eps) if eps else "",
        dropped=f" without its first {encoder.prefix} tokens" if encoder.prefix else "",
        unused=", *not* `last_hidden_state`, which adds a norm that nobody trained"
        if family.frozen == ("post_layernorm.",) and not encoder.prefix else "",
        extra=", add_pooling_layer=False"
        if "add_pooling_layer" in encoders.class_options(vision.config) else "",
        tokens=encoder.num_tokens, width=encoder.hidden_size, size=encoder.image_size,
        llm=config["arguments"]["llm"], digest=config.get("data_digest"),
        parent=config.get("parent_digest", "none: stage 1 starts from the original"),
        moved=f"{least:.1e} … {most:.1e} a block (relative weight change"
              + (" since stage 1)" if args.stage != "pretrain" else ")"))
    aside = Path(f"{out}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    vision.config.pivot_source = source            # whose encoder it is, for a later call
    vision.save_pretrained(aside)
    encoders.image_processor(encoder).save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    pixels = torch.randint(0, 256, (2, 3, encoder.image_size, encoder.image_size),
                           dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not torch.equal(encoders.load_encoder(str(aside)).eval()(pixels), encoder.eval()(pixels)):
        shutil.rmtree(aside)
        raise SystemExit(f"error: {aside} reopened gives other features; nothing was written")
    if out.exists():
        shutil.rmtree(out)
    os.replace(aside, out)
    print(f"wrote {out}: {encoder.num_tokens} tokens of width {encoder.hidden_size}; "
          f"reopened, features bit-equal")


if __name__ == "__main__":
    runtime.launch(main)
