"""A published multimodal model as stage 1: brought in once, then SFT and DPO go on from it.

    python -m tools.parent llava-hf/llava-onevision-qwen2-0.5b-si-hf runs/onevision
    python train_dpo.py --run-dir runs/onevision --data data
    python train_dpo.py --run-dir runs/other --parent runs/onevision --data data   # or so

Reads   SOURCE, a folder or a hub id: a LlavaForConditionalGeneration, or the base picture of a
        LlavaOnevisionForConditionalGeneration (no tiles, no image_newline), with a SigLIP or CLIP
        tower and a ChatML LLM.
Writes  RUN/pretrain/: final/, a plain LlavaForConditionalGeneration whose README.md says what it
        was and what was left out; encoder/, its encoder alone, the "original" of what is trained
        from it; llm/, the LLM's config and tokenizer without weights; config.json.

The model's own feature layer, mean, std, image size and chat template stay. What this code would
compute otherwise than the model's own class is refused, in one line. Before anything is written
projected features and logits are compared with those of that class, on random pictures. Pictures
are squashed here, whatever the model's own processor does: the card says where it differs.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from model import MLLM, logits_of, scales_logits
from pivot import (checkpoints, convert, distributed, encoders, files, flags, model_io,
                   published, records, tensors)

KINDS = {"llava": "LlavaForConditionalGeneration",
         "llava_onevision": "LlavaOnevisionForConditionalGeneration"}
TOWERS = (encoders.SIGLIP, encoders.CLIP)
RESAMPLING = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}
CARD = """---
tags: [vision, pivot]
library_name: transformers{hub}
---
# {source}, brought in as stage 1

A published model in the layout of LLaVA, as `python -m tools.parent` wrote it; training goes on
from it. Images: a bicubic squash, with the saved processor's mean and standard deviation, resized
by Pillow. The license is that of the source.

{ask}| provenance | |
|---|---|
{rows}"""
ENCODER = """The vision encoder of `../final`, as it was published inside {}: features are
`hidden_states[-1]`{}. `extract.py` compares with it what was trained from it.
"""
NO_WEIGHTS = """The config and the tokenizer of the LLM inside `../final`, without weights: by them
other commands know which LLM it is. For re-pairing take a published LLM.
"""


class Source(NamedTuple):
    """A published model: as it was named; the folder its files are in, on this machine; its config;
    which block gives the features; its tokenizer, with its own chat template; mean and std."""
    name: str
    path: str
    config: object
    blocks: int
    tokenizer: object
    mean: tuple
    std: tuple


# --------------------------------------------------------------------------------- what is refused

def config_of(name):
    """The config of SOURCE; raises SystemExit, one line, where its class is not one known here."""
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise SystemExit(f"error: {name} is neither a folder here nor a hub id like "
                         f"llava-hf/llava-onevision-qwen2-0.5b-si-hf")
    config = published.config_of_whole(name, name)
    if config.model_type not in KINDS:
        why = ", which sees a picture in tiles" if "next" in config.model_type else ""
        raise SystemExit(f"error: {name} is a {config.model_type}{why}; known as stage 1 are "
                         f"{' and '.join(KINDS)}")
    published.refuse_quantized(name, config)
    return config


def feature_block(name, config):
    """How many blocks of the tower are used: features are what the last of them gives. raises
    SystemExit where the model reads features, or projects them, as model.py does not."""
    tower, layer = config.vision_config.model_type, config.vision_feature_layer
    if tower not in TOWERS:
        raise SystemExit(f"error: {name} has a {tower} as its tower; known here are "
                         f"{' and '.join(TOWERS)}")
    if not isinstance(layer, int):
        raise SystemExit(f"error: {name} reads several layers of its tower (vision_feature_layer "
                         f"{layer}); features here come from one")
    strategy = config.vision_feature_select_strategy
    if (tower, strategy) == (encoders.CLIP, "full"):
        raise SystemExit(f"error: {name} keeps CLIP's CLS token (vision_feature_select_strategy "
                         f"full); features here are patches alone")
    if (tower, strategy) == (encoders.SIGLIP, "default"):
        raise SystemExit(f"error: {name} drops the first token of a SigLIP "
                         f"(vision_feature_select_strategy default), which is a patch, not a CLS")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise SystemExit(f"error: {name}: its projector is not Linear, GELU, Linear with bias "
                         f"(projector_hidden_act {config.projector_hidden_act}, "
                         f"multimodal_projector_bias {config.multimodal_projector_bias})")
    depth = config.vision_config.num_hidden_layers
    block = layer if layer >= 0 else depth + 1 + layer     # hidden_states[0]: the embeddings
    if not 1 <= block <= depth:
        raise SystemExit(f"error: {name}: vision_feature_layer {layer} is no block of a tower of "
                         f"{depth}")
    return block


def pixel_facts(name):
    """What the model's own processor says of pictures: a dict, {} where no file says anything."""
    for file in ("preprocessor_config.json", "processor_config.json"):       # the latter since 5
        found = convert.file_at(name, file)
        facts = files.read_json(found) if found else {}
        facts = facts.get("image_processor", facts)
        if "size" in facts or "crop_size" in facts:
            return facts
    return {}


def refuse_size(name, config):
    """Raise SystemExit where the processor gives pictures of a size that the tower has not."""
    facts, wanted = pixel_facts(name), encoders.side(config.vision_config.image_size)
    given = facts.get("crop_size") if facts.get("do_center_crop") else facts.get("size")
    sides = given.values() if isinstance(given, dict) else [given or wanted]
    if {side for side in sides if side} != {wanted}:
        raise SystemExit(f"error: {name}: its processor gives pictures of {given}, its tower takes "
                         f"{wanted} × {wanted}")


def open_tokenizer(name, config):
    """The tokenizer with the model's own chat template, or ours where it brings none; raises
    SystemExit where that is not ChatML, or `<image>` is not the token the model knows."""
    tokenizer = published.open_tokenizer(name)
    template = tokenizer.chat_template
    for file in ("processor_config.json", "chat_template.json"):
        if found := convert.file_at(name, file):
            template = files.read_json(found).get("chat_template") or template
    if found := convert.file_at(name, "chat_template.jinja"):
        template = found.read_text(encoding="utf-8")
    if isinstance(template, dict):
        template = template.get("default")
    image_token_id = published.prepare_tokenizer(tokenizer)
    if image_token_id != config.image_token_index:
        raise SystemExit(f"error: {name}: {records.IMAGE_TOKEN} is token {image_token_id} of its "
                         f"tokenizer, but config.json's image_token_index is "
                         f"{config.image_token_index}")
    if template:
        tokenizer.chat_template = template
    tokenizer.name_or_path = name
    prompt = records.user_turn("Why?", True, frame=records.frame_of(tokenizer))
    if tokenizer(prompt)["input_ids"] != tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        raise SystemExit(f"error: {name}: its tokenizer puts a token of its own before or behind "
                         f"every prompt; none is put there here")
    return tokenizer


def examine(name):
    """All that can be refused before a weight is read. → Source."""
    config = config_of(name)
    blocks = feature_block(name, config)
    refuse_size(name, config)
    if scales_logits(config.text_config):
        raise SystemExit(f"error: {name}: its LLM scales its logits, which LLaVA's class leaves "
                         f"out")
    path = convert.file_at(name, "config.json").parent
    return Source(name, str(path), config, blocks, open_tokenizer(name, config),
                  *published.mean_and_std(name))


# ------------------------------------------------------------------------- opened, compared, saved

@torch.no_grad()
def own_outputs(theirs, source, pixels, ids):
    """Projected features (2, N, D) and logits (2, T, V) of the model's own class, of the base
    picture alone. pixels uint8 (2, 3, S, S); ids (2, T)."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (source.mean, source.std))
    pixels = (pixels / 255 - mean) / std
    if source.config.model_type == "llava":
        features = theirs.model.get_image_features(pixels, return_dict=True).pooler_output
    else:          # two pictures in one turn are not cut into tiles; image_newline follows each
        features = theirs.model.get_image_features(
            pixels[:, None], image_sizes=torch.tensor([pixels.shape[-2:]] * 2),
            batch_num_images=torch.tensor([2]), return_dict=True).pooler_output
        features = [each[:-1] for each in features]
    features = torch.stack(list(features))
    embeds = theirs.get_input_embeddings()(ids)
    embeds[ids == source.config.image_token_index] = features.flatten(0, 1)
    return features, theirs(inputs_embeds=embeds, use_cache=False).logits


def as_mllm(theirs, source):
    """The same modules as our MLLM. The blocks behind the features are deleted from `theirs`."""
    from transformers import AutoModelForCausalLM
    inner = theirs.model
    encoder = encoders.Encoder(encoders.truncate(inner.vision_tower, source.blocks), source.mean,
                               source.std)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(source.config.text_config)
    published.refuse_llm(llm, source.name)
    llm.model, llm.lm_head, llm.config = inner.language_model, theirs.lm_head, \
        inner.language_model.config
    words = llm.get_input_embeddings().weight
    llm.config.tie_word_embeddings = llm.lm_head.weight is words or torch.equal(
        llm.lm_head.weight, words)
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = words
    model = MLLM(encoder, llm, source.config.image_token_index)
    model.projector.load_state_dict(inner.multi_modal_projector.state_dict())
    published.refuse_llm(llm, source.name)
    return published.refuse_dropout(model).eval()


@torch.no_grad()
def bring_in(source):
    """Open SOURCE by its own class, and hold our model against it. → (MLLM, what was left out, how
    far features and logits are apart, relative to the largest)."""
    import transformers
    left_out, kind = [], getattr(transformers, KINDS[source.config.model_type])
    theirs = published.open_model(kind, source.name, source.name, left_out).eval()
    size = encoders.side(source.config.vision_config.image_size)
    patches = (size // encoders.side(source.config.vision_config.patch_size)) ** 2
    prompt = records.user_turn("What is it?", True, frame=records.frame_of(source.tokenizer))
    ids = source.tokenizer(prompt)["input_ids"]
    at, image = ids.index(source.config.image_token_index), source.config.image_token_index
    ids = torch.tensor([ids[:at] + [image] * patches + ids[at + 1:]] * 2)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    wanted = own_outputs(theirs, source, pixels, ids)
    if hasattr(theirs.model, "image_newline"):
        left_out.append("image_newline")
    depth = source.config.vision_config.num_hidden_layers      # before the config is cut, too
    model = as_mllm(theirs, source)
    if depth > source.blocks:
        left_out.append(f"{depth - source.blocks} of the tower's {depth} blocks, behind the "
                        f"features")
    features = model.projector(model.encoder(pixels))
    hidden = model.llm.base_model(inputs_embeds=model.embed(pixels, ids), use_cache=False)
    found = features, logits_of(model.llm, hidden.last_hidden_state)
    apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted)]
    if not all(x < 1e-4 for x in apart):                       # of NaN, max() would be the other
        raise SystemExit(f"error: {source.name}: features and logits are {apart[0]:.1e} and "
                         f"{apart[1]:.1e} of the largest apart from those of its own class; "
                         f"nothing was written")
    return model, left_out, apart


def preprocessing(source):
    """How the model's own processor treats a picture, where that is not the squash done here."""
    facts, said = pixel_facts(source.name), []
    if not facts:
        return "not said by the source"
    if facts.get("do_center_crop"):
        said.append("resizes the shorter side and crops the middle")
    if facts.get("do_pad") and source.config.model_type == "llava":
        said.append("pads to a square")
    if facts.get("resample", 3) != 3:
        said.append(f"resizes by {RESAMPLING.get(facts['resample'], facts['resample'])}")
    if source.config.model_type == "llava_onevision":
        said.append("adds tiles of the picture, and an image_newline, behind the base picture")
    return "the source's own " + ", ".join(said) if said else "the source's own does the same"


def template(source):
    """What the chat template renders, and where it differs from the recipe's own."""
    tokenizer, frame = source.tokenizer, records.frame_of(source.tokenizer)
    said = repr(records.user_turn("QUESTION", True, frame=frame))
    if frame == records.CHATML:
        none = tokenizer.chat_template == records.CHAT_TEMPLATE
        return f"`{said}`, the recipe's own" + ("; the source brings none" if none else "")
    said = f"`{said}`, the source's own; the recipe's would be " \
        f"`{records.user_turn('QUESTION', True)!r}`"
    turns = [{"role": role, "content": [{"type": "text", "text": text}]}
             for role, text in (("user", "QUESTION"), ("assistant", "ANSWER"))]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    plain = records.user_turn("QUESTION", False, frame=frame) + "ANSWER<|im_end|>"
    if not whole.startswith(plain):
        said += f". Answers are trained where generation begins; of a finished turn the source's " \
            f"template makes `{whole!r}`"
    return said


def card_of(source, model, left_out, apart, digest):
    """README.md of final/: what the model was, and what is no longer in it."""
    config, encoder = source.config, model.encoder
    place = Path(source.path)
    rows = {"source": source.name, "class": KINDS[config.model_type],
            "revision": place.name if place.parent.name == "snapshots" else "not known: a folder",
            "digest": digest, "tower": config.vision_config.model_type,
            "features": f"vision_feature_layer {config.vision_feature_layer}: what block "
                        f"{source.blocks} gives, the last of those that are here; "
                        f"{encoder.num_tokens} tokens a picture",
            "LLM": config.text_config.model_type,
            "pictures": f"{encoder.image_size} × {encoder.image_size}, mean {encoder.mean}, std "
                        f"{encoder.std}",
            "preprocessing": "here a bicubic squash; " + preprocessing(source),
            "template": template(source).replace("|", "\\|"),
            "left out": ", ".join(left_out) or "nothing",
            "compared": f"with the source's own class: features {apart[0]:.1e}, logits "
                        f"{apart[1]:.1e} of the largest apart"}
    hub = "" if Path(source.name).exists() else f"\nbase_model: {source.name}"
    return CARD.format(hub=hub, source=source.name, ask=checkpoints.ASK,
                       rows="".join(f"| {k} | {v} |\n" for k, v in rows.items()))


def write(args, source, model, left_out, apart):
    """RUN/pretrain, written aside and renamed."""
    import transformers
    digest, folder = tensors.digest_of(source.path), Path(args.run, "pretrain")
    with files.new_folder(folder) as aside:
        for part in ("final", "encoder", "llm"):
            (aside / part).mkdir()
        model_io.save_mllm(model, source.tokenizer, aside / "final", True)
        card = card_of(source, model, left_out, apart, digest)
        files.write_text(aside / "final" / "README.md", card)
        vision = model.encoder.vision                  # extract.py knows by this whose it is
        vision.config.pivot_source = tensors.digest_of(aside / "final")
        model_io.save_vision(vision, aside / "encoder")
        model_io.image_processor(model.encoder).save_pretrained(aside / "encoder")
        prefix = " without the CLS token" if model.encoder.prefix else ""
        files.write_text(aside / "encoder" / "README.md", ENCODER.format(source.name, prefix))
        model.llm.config.save_pretrained(aside / "llm")
        source.tokenizer.save_pretrained(aside / "llm")
        files.write_text(aside / "llm" / "README.md", NO_WEIGHTS)
        size = model.encoder.image_size if args.encoder else None
        files.write_json(aside / "config.json", {
            "stage": "pretrain", "script": "tools.parent", "arguments": {
                "run": args.run, "source": source.name, "image_size": size, "data": None,
                "encoder": args.encoder or str(folder / "encoder"), "llm": str(folder / "llm")},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": sys.version.split()[0]},
            "source_digest": digest, "left_out": left_out})
    return card


def already_there(args):
    """Does RUN/pretrain hold this very model? raises SystemExit where it holds something else."""
    folder = Path(args.run, "pretrain")
    if not folder.exists():
        return False
    config = folder / "config.json"
    held = files.read_json(config).get("arguments", {}).get("source") if config.exists() else None
    if held is None:
        raise SystemExit(f"error: {folder} was not written by tools.parent and is left alone; name "
                         f"another run folder")
    if args.overwrite:
        return False
    same = held == args.source
    if same and Path(held).exists():
        same = files.read_json(config).get("source_digest") == tensors.digest_of(held)
    if not same:
        raise SystemExit(f"error: {folder} holds another model, {held}; --overwrite replaces it")
    original = files.read_json(config)["arguments"]["encoder"]
    if args.encoder and args.encoder != original:
        raise SystemExit(f"error: {folder} was brought in with --encoder {original}, now "
                         f"{args.encoder}; --overwrite replaces it")
    return True


def main():
    parser = flags.Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder or a hub id")
    parser.add_argument("run", metavar="RUN", help="the run folder that takes it")
    parser.add_argument("--encoder", metavar="NAME", help="the published encoder that the model "
                        "began with, where you know it (a preset, a folder or a hub id): "
                        "extract.py then also says how far the trained one is from that")
    parser.add_argument("--overwrite", action="store_true", help="replace what tools.parent wrote "
                        "there before")
    args = parser.parse_args()
    if already_there(args):
        print(f"{args.run}/pretrain is already there: nothing to do (--overwrite replaces it)")
        return
    source = examine(args.source)
    model, left_out, apart = bring_in(source)
    if args.encoder:
        original = published.load_encoder(args.encoder, model.encoder.image_size, source.blocks)
        tensors.refuse_misfit(f"--encoder {args.encoder}", *(
            {k: p.shape for k, p in e.vision.state_dict().items()}
            for e in (model.encoder, original)))
    card = write(args, source, model, left_out, apart)
    print(card[card.index("| provenance"):], end="")
    print(f"wrote {args.run}/pretrain. Next:  python train_dpo.py --run-dir {args.run} --data DATA")


if __name__ == "__main__":
    distributed.launch(main)
