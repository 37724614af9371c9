"""Models as folders: put together from what others published, saved, opened again.

There is one format, that of transformers' LlavaForConditionalGeneration: weights, config, tokenizer
with our chat template, processor. What such a model computes is in model.py; encoders come in more
layouts (convert.py).
"""
import json
from copy import deepcopy
from pathlib import Path

import torch

from model import MLLM, scales_logits
from pivot import encoders, files, published, tensors
from pivot.records import CHAT_TEMPLATE, IMAGE_TOKEN


def image_processor(encoder, for_clip=False):
    """The transformers processor that does exactly what images.py does: bicubic squash, rescale,
    normalise. The Pillow backend is the definition; torchvision's resize differs in the last bit.

    for_clip: as CLIP's own class, which LLaVA's CLIP tower opens whatever the file says, and which
    crops to 224 pixels unless told otherwise.
    """
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    encoder = encoder.parts[0]              # of A+B: the first's
    square = {"height": encoder.image_size, "width": encoder.image_size}
    facts = dict(size=square, resample=3, image_mean=list(encoder.mean),
                 image_std=list(encoder.std))
    if for_clip:
        return CLIPImageProcessorPil(**facts, do_center_crop=False, crop_size=square)
    return SiglipImageProcessorPil(**facts)


def build_mllm(encoder_name, llm_name, seed, image_size=None):
    """A pretrained encoder, a fresh projector (a function of seed alone), a pretrained LLM.

    → (MLLM in fp32, tokenizer). fp32 masters: in bf16 storage an AdamW step of 1e-6 on a weight of
    0.02 is rounded away every time.
    """
    encoder = published.load_encoder(encoder_name, image_size)
    llm, tokenizer, image_token_id = published.open_llm(llm_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MLLM(encoder, llm, image_token_id)
    return published.refuse_dropout(model), tokenizer


# Our names → those of a LlavaForConditionalGeneration folder.
PREFIXES = {"encoder.vision.": "vision_tower.", "projector.": "multi_modal_projector.",
            "llm.": "language_model."}


def file_name_of(name, hub=""):
    """`encoder.vision.x` → `vision_tower.x`, the name under which a tensor is stored; hub: what
    hub_prefix says of the encoder, where the name on disk is wanted."""
    ours = next(p for p in PREFIXES if name.startswith(p))
    between = hub if ours == "encoder.vision." else ""
    return PREFIXES[ours] + between + name.removeprefix(ours)


def hub_prefix(vision):
    """What the published tensors of a class have before the names that its module has since
    transformers 5: `vision_model.` of SigLIP and CLIP, nothing of most others. Under the shorter
    names transformers 4, vLLM and others would find no tensor, and make up all of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    if vision.config.model_type == "mlcd_vision_model":     # 5.23 forgot it in its table
        return "vision_model."
    for change in get_model_conversion_mapping(vision, add_legacy=False):
        if getattr(change, "prefix_to_remove", None):
            return f"{change.prefix_to_remove}."
    return ""


def save_vision(vision, folder):
    """Write an encoder for its own class, in transformers 4 and 5: under the hub's names."""
    prefix = hub_prefix(vision)
    vision.save_pretrained(folder, state_dict={
        f"{prefix}{name}": tensor for name, tensor in vision.state_dict().items()})


def own_tensors(model):
    """[(name, parameter)] of what is saved; tied weights once: safetensors refuses shared ones. A
    value head is PPO's own: no class has a place for it."""
    own = {}
    for name, p in model.state_dict(keep_vars=True).items():
        if not name.startswith("value."):
            own.setdefault(id(p), (name, p))
    return list(own.values())


def whole(p):
    """A parameter, or all processes' shards of one (each must ask) → one tensor on the CPU."""
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).cpu().contiguous()


def old_names(text_config):
    """What transformers 4 looks for in an LLM's config under other names than 5 writes: without
    them it would compute with its own defaults, in silence."""
    rope = text_config.get("rope_parameters") or {}
    found = {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return found


def open_in_both(folder):
    """Make the tokenizer's and the processor's files such that transformers 4 opens them, too."""
    path = folder / "tokenizer_config.json"
    facts = files.read_json(path)
    if facts.get("tokenizer_class") == "TokenizersBackend":              # a class of 5 alone
        facts["tokenizer_class"] = "PreTrainedTokenizerFast"
        # without it 4 adds token_type_ids, which its generate() then refuses
        facts.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(facts.get("extra_special_tokens"), list):              # 4 wants a dict there
        facts["additional_special_tokens"] = facts.pop("extra_special_tokens")
    files.write_json(path, facts)
    pixels = files.read_json(folder / "processor_config.json", "image_processor")
    files.write_json(folder / "preprocessor_config.json", pixels["image_processor"])


def llava_config(model):
    """The config of the folder. A feature layer after the final norm (DINOv2, ViT) cannot be said
    in LLaVA's terms: such a folder gets a model_type that transformers refuses to open."""
    from transformers import MODEL_MAPPING, LlavaConfig
    encoder = model.encoder
    config = LlavaConfig(     # copies: LlavaConfig resets the attention kernel of what it is given
        vision_config=deepcopy(encoder.parts[0].vision.config),
        text_config=deepcopy(model.llm.config),
        image_token_index=model.image_token_id, image_seq_length=encoder.num_tokens,
        vision_feature_layer=-1, projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if encoder.prefix else "full",
        tie_word_embeddings=model.llm.config.tie_word_embeddings).to_dict()
    config["text_config"] |= old_names(config["text_config"])
    config["architectures"] = ["LlavaForConditionalGeneration"]
    refused = None
    if encoder.family.read != "block":
        refused = "pivot_normed_features"
    elif type(encoder.parts[0].vision.config) not in MODEL_MAPPING:       # MetaCLIP 2
        refused = "pivot_unlisted_encoder"
    if scales_logits(model.llm.config):          # that class takes lm_head's as they are
        refused = "pivot_scaled_logits"
    if len(parts := encoder.parts) == 2:         # A+B: no class of theirs has two
        refused = "pivot_two_encoders"
        config["second"] = {"vision_config": parts[1].vision.config.to_dict(),
                            "image_mean": parts[1].mean, "image_std": parts[1].std}
    if refused:
        config.update(model_type=refused, architectures=["MLLM (model.py)"])
    return config


def divided(named, most_bytes):
    """[(name, parameter)] → the same in lists, a list a file, each of at most `most_bytes`."""
    parts, size = [[]], 0
    for name, p in named:
        if size and size + p.nbytes > most_bytes:
            parts.append([])
            size = 0
        parts[-1].append((name, p))
        size += p.nbytes
    return parts


def save_mllm(model, tokenizer, folder, is_main, file_bytes=5 * 10 ** 9):
    """Write the folder transformers opens. Every process calls it; the main one writes.

    model: MLLM, sharded or not; folder: Path, not yet under its final name (the caller renames).
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlavaProcessor
    folder, index = Path(folder), {}
    hub = hub_prefix(model.encoder.vision) if len(model.encoder.parts) == 1 else ""
    named = [(file_name_of(name, hub), p) for name, p in own_tensors(model)]
    parts = divided(named, file_bytes)
    for i, part in enumerate(parts, 1):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        gathered = {}
        for name, p in part:           # one at a time: nobody ever holds a second copy of the model
            tensor = whole(p)
            index[name] = file
            if is_main:
                gathered[name] = tensor
        if is_main:
            save_file(gathered, folder / file, metadata={"format": "pt"})
    if not is_main:
        return
    if len(parts) > 1:
        total = sum(p.nbytes for part in parts for _, p in part)
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": total}, "weight_map": index}, indent=1, sort_keys=True))
    (folder / "config.json").write_text(json.dumps(llava_config(model), indent=1))
    encoder = model.encoder
    LlavaProcessor(image_processor(encoder), tokenizer, patch_size=encoder.patch_size,
                   chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
                   num_additional_image_tokens=encoder.prefix, image_token=IMAGE_TOKEN,
                   vision_feature_select_strategy="default" if encoder.prefix else "full",
                   ).save_pretrained(folder)
    open_in_both(folder)
    GenerationConfig(do_sample=False, eos_token_id=stop_ids(tokenizer),
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def stop_ids(tokenizer):
    """Generation ends on ChatML's end of turn and on the base model's end of text."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return sorted({i for i in ids if i is not None})


def empty_vision(vision_config, image_mean, image_std, **_):
    """The encoder that a folder's config describes, its tensors not yet read."""
    from transformers import AutoConfig
    vision = encoders.empty(AutoConfig.for_model(**vision_config), dtype=torch.float32)
    return encoders.Encoder(encoders.without_pooler(vision), image_mean, image_std)


def read_config(folder):
    """The config of a folder written by save_mllm; raises SystemExit where it is not one."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise SystemExit(f"error: {folder} is not a trained model (no config.json)")
    facts = files.read_json(folder / "config.json")
    if "vision_config" not in facts or "text_config" not in facts:
        kind = f"is a {facts['model_type']}, not a" if "model_type" in facts else "holds no"
        raise SystemExit(f"error: {folder} {kind} model that a training stage or repair_eval.py "
                         f"wrote")
    return facts


def load_mllm(folder):
    """Open a folder written by save_mllm, strictly: (MLLM in fp32, tokenizer).

    raises SystemExit, one line, when the folder is not one or a tensor is missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    folder, facts = Path(folder), read_config(folder)
    with no_init_weights():               # every tensor is read from the file: names are compared
        config = AutoConfig.for_model(**facts["text_config"])
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                               attn_implementation=published.attention_of(config))
        encoder = empty_vision(facts["vision_config"], *published.mean_and_std(folder))
        if "second" in facts:
            encoder = encoders.TwoEncoders(encoder, empty_vision(**facts["second"]))
    llm.tie_weights()
    model = MLLM(encoder, llm, facts["image_token_index"])
    # Names and shapes first, then tensor by tensor: the model is never in memory twice.
    own = {file_name_of(name): tensor for name, tensor in model.state_dict().items()}
    if llm.config.tie_word_embeddings:
        own.pop("language_model.lm_head.weight", None)
    found = tensors.stored(folder)
    tensors.refuse_misfit(folder, {k: t.shape for k, t in own.items()},
                          {name: held.shape() for name, held in found.items()})
    for name, held in found.items():
        own[name].copy_(held.tensor())
    published.refuse_llm(llm, folder)
    return published.refuse_dropout(model), published.open_tokenizer(folder)
