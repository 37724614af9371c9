"""Models as folders: an encoder opened, a model put together, saved, opened again.

There is one format, that of transformers' LlavaForConditionalGeneration: weights, config, tokenizer
with our chat template, processor. What such a model computes is in model.py; encoders come in more
layouts (convert.py).
"""
import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from model import MLLM
from pivot import convert, encoders, files, printing, tensors
from pivot.records import CHAT_TEMPLATE, IMAGE_TOKEN


def config_of(name, path):
    """The vision config of a folder or hub id; raises SystemExit, one line."""
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: cannot open --encoder {name} ({path}): {printing.first_line(e)}")
    if config.model_type == "llava":
        raise SystemExit(f"error: --encoder {name} is a whole model; detach its encoder with:  "
                         f"python extract.py --run-dir RUN --stage STAGE")
    config = getattr(config, "vision_config", config)  # a whole SigLIP/CLIP: its encoder
    if not all(hasattr(config, key) for key in ("image_size", "patch_size", "num_channels")):
        raise SystemExit(f"error: --encoder {name} is a {config.model_type}, not a vision encoder "
                         f"with patches; known families: {', '.join(encoders.FAMILIES)}; or a ViT "
                         f"like them")
    return config


def load_encoder(name, image_size=None):
    """Open an encoder for training, fp32, truncated to the layer whose output is the feature.

    name: preset, folder (published or extracted), hub id, or a file of timm, open_clip or MoCo v3;
    image_size: another input size than its own.
    raises SystemExit, one line, when the folder is missing, of a class that cannot serve, or when
        a tensor of the published model is missing.
    """
    from transformers import AutoModel
    if len(parts := encoders.parts_of(name)) == 2:
        return encoders.TwoEncoders(*(load_encoder(part, image_size) for part in parts))
    path, preset = encoders.resolve(name), encoders.ENCODERS.get(name)
    if file := convert.find(path):
        vision, mean, std = convert.load(file)
    else:
        original = config_of(name, path)
        config = convert.as_vit(original)
        encoders.family_of(config)                    # refuses before anything is loaded
        vision = open_model(AutoModel, f"--encoder {name}", path, config=config,
                            **encoders.class_options(config))
        file = convert.file_at(path, "preprocessor_config.json")
        facts = files.read_json(file) if file else {}
        mean = facts.get("image_mean") or encoders.family_of(original).mean
        std = facts.get("image_std") or encoders.family_of(original).std
    vision = encoders.truncate(vision)
    own_size = preset.geometry[-1] if preset else encoders.side(vision.config.image_size)
    size = image_size or own_size
    return encoders.Encoder(convert.resize_positions(vision, size), mean, std)


def open_model(kind, name, path, **options):
    """kind.from_pretrained in fp32; raises SystemExit, one line, where transformers would make up
    what a folder lacks: a tensor missing, or of another shape than config.json says."""
    try:
        model, info = kind.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **{"attn_implementation": "sdpa", **options})
    except Exception as e:       # a file cut short comes as safetensors' or pickle's own error
        raise SystemExit(f"error: cannot open {name} ({path}): {printing.first_line(e)}")
    wanted = {key: t.shape for key, t in model.state_dict().items()}
    found = {**wanted, **{key: shape for key, shape, _ in info["mismatched_keys"]}}
    for key in info["missing_keys"]:
        found.pop(key, None)
    tensors.refuse_misfit(name, wanted, found)
    return model


def image_processor(encoder):
    """The transformers processor that does exactly what images.py does: bicubic squash, rescale,
    normalise. The Pillow backend is the definition; torchvision's resize differs in the last bit.
    """
    from transformers import SiglipImageProcessorPil
    encoder = encoder.parts[0]              # of A+B: the first's
    size = encoder.image_size
    return SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3,
                                   image_mean=list(encoder.mean), image_std=list(encoder.std))


def prepare_tokenizer(tokenizer, vocab_size):
    """Give the tokenizer `<image>` and our template; returns the id of `<image>`.

    Qwen's embedding has more rows than its tokenizer has words (151,936 against 151,665), so the
    placeholder takes a spare row: nothing is resized, and tied embeddings stay tied.
    """
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise SystemExit(f"error: the tokenizer of {tokenizer.name_or_path} has no {token}: a "
                             f"ChatML model (Qwen2.5-Instruct or alike) is needed")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]},
                                 replace_extra_special_tokens=False)
    if len(tokenizer) > vocab_size:
        raise SystemExit(f"error: no spare embedding row for {IMAGE_TOKEN}: the tokenizer has "
                         f"{len(tokenizer)} words and the LLM {vocab_size} rows")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def open_tokenizer(path):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:
        raise SystemExit(f"error: no usable tokenizer in {path}: {printing.first_line(e)}")


def refuse_llm(llm, name):
    """Raise SystemExit, one line, unless every layer is plain attention that heeds our mask: a
    recurrent one would let the rejected answer read the chosen one, whatever the mask says."""
    layers = getattr(llm.base_model, "layers", ())
    kinds = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    mixers = ("self_attn", "attention", "attn", "self_attention")
    if not len(layers) or not all(any(hasattr(x, k) for k in mixers) for x in layers) or \
            kinds != {"full_attention"}:
        raise SystemExit(f"error: --llm {name} is a {llm.config.model_type}: only models whose "
                         f"layers are all full attention, in .layers, can hold two answers in one "
                         f"sequence (this one: {', '.join(sorted(kinds))})")


def build_mllm(encoder_name, llm_name, seed, image_size=None):
    """A pretrained encoder, a fresh projector (a function of seed alone), a pretrained LLM.

    → (MLLM in fp32, tokenizer). fp32 masters: in bf16 storage an AdamW step of 1e-6 on a weight of
    0.02 is rounded away every time.
    """
    from transformers import AutoModelForCausalLM
    encoder = load_encoder(encoder_name, image_size)
    path = encoders.resolve(llm_name)
    llm = open_model(AutoModelForCausalLM, f"--llm {llm_name}", path)
    refuse_llm(llm, llm_name)
    tokenizer = open_tokenizer(path)
    image_token_id = prepare_tokenizer(tokenizer, llm.config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return refuse_dropout(MLLM(encoder, llm, image_token_id)), tokenizer


def refuse_dropout(model):
    """Dropout anywhere would make policy and reference differ at step 0: refuse it."""
    for name, module in model.named_modules():
        rates = [getattr(module, key, 0) for key in ("attention_dropout", "dropout", "drop_prob",
                                                     "dropout_prob")]
        rates += [module.p] if isinstance(module, nn.Dropout) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise SystemExit(f"error: {name} has dropout; DPO compares two passes bit by bit")
    return model


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
    """[(name, parameter)] of what is saved; tied weights once: safetensors refuses shared ones."""
    own = {}
    for name, p in model.state_dict(keep_vars=True).items():
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
    if isinstance(facts.get("extra_special_tokens"), list):              # 4 wants a dict there
        facts["additional_special_tokens"] = facts.pop("extra_special_tokens")
    files.write_json(path, facts)
    pixels = files.read_json(folder / "processor_config.json", "image_processor")
    files.write_json(folder / "preprocessor_config.json", pixels["image_processor"])


def llava_config(model):
    """The config of the folder. A feature layer after the final norm (DINOv2, ViT) cannot be said
    in LLaVA's terms: such a folder gets a model_type that transformers refuses to open."""
    from transformers import LlavaConfig
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
    if encoder.family.read != "block":
        config.update(model_type="pivot_normed_features", architectures=["MLLM (model.py)"])
    if len(parts := encoder.parts) == 2:         # A+B: no class of theirs has two
        config.update(model_type="pivot_two_encoders", architectures=["MLLM (model.py)"], second={
            "vision_config": parts[1].vision.config.to_dict(), "image_mean": parts[1].mean,
            "image_std": parts[1].std})
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
    LlavaProcessor(image_processor(encoder), tokenizer, chat_template=CHAT_TEMPLATE,
                   patch_size=encoder.patch_size,
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
    from transformers import AutoConfig, AutoModel
    config = AutoConfig.for_model(**vision_config)
    vision = AutoModel.from_config(config, dtype=torch.float32, **encoders.class_options(config))
    return encoders.Encoder(encoders.without_pooler(vision), image_mean, image_std)


def load_mllm(folder):
    """Open a folder written by save_mllm, strictly: (MLLM in fp32, tokenizer).

    raises SystemExit, one line, when the folder is not one or a tensor is missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise SystemExit(f"error: {folder} is not a trained model (no config.json)")
    facts = files.read_json(folder / "config.json")
    if "vision_config" not in facts or "text_config" not in facts:
        raise SystemExit(f"error: {folder} is a {facts.get('model_type')}, not a model that a "
                         f"training stage or repair_eval.py wrote")
    pixels = files.read_json(folder / "processor_config.json",
                             "image_processor")["image_processor"]
    with no_init_weights():               # every tensor is read from the file: names are compared
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts["text_config"]),
                                               dtype=torch.float32, attn_implementation="sdpa")
        encoder = empty_vision(facts["vision_config"], pixels["image_mean"], pixels["image_std"])
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
    return refuse_dropout(model), open_tokenizer(folder)
