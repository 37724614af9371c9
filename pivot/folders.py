"""A model as a folder: put together from two pretrained ones, saved, opened again.

There is one format, that of transformers' LlavaForConditionalGeneration: weights, config, tokenizer
with our chat template, processor. What such a model computes is in model.py.
"""
import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from pivot import encoders
from model import MLLM
from pivot.records import CHAT_TEMPLATE, IMAGE_TOKEN


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
        raise SystemExit(f"error: no usable tokenizer in {path}: {encoders.first_line(e)}")


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
    encoder = encoders.load_encoder(encoder_name, image_size)
    path = encoders.resolve(llm_name)
    llm = encoders.open_model(AutoModelForCausalLM, f"--llm {llm_name}", path)
    refuse_llm(llm, llm_name)
    tokenizer = open_tokenizer(path)
    image_token_id = prepare_tokenizer(tokenizer, llm.config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return no_dropout(MLLM(encoder, llm, image_token_id)), tokenizer


def no_dropout(model):
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


def file_name_of(name):
    """`encoder.vision.x` → `vision_tower.x`, the name under which a tensor is stored."""
    ours = next(p for p in PREFIXES if name.startswith(p))
    return PREFIXES[ours] + name.removeprefix(ours)


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
    config["architectures"] = ["LlavaForConditionalGeneration"]
    if encoder.family.read != "block":
        config.update(model_type="pivot_normed_features", architectures=["MLLM (model.py)"])
    if len(parts := encoder.parts) == 2:         # A+B: no class of theirs has two
        config.update(model_type="pivot_two_encoders", architectures=["MLLM (model.py)"], second={
            "vision_config": parts[1].vision.config.to_dict(), "image_mean": parts[1].mean,
            "image_std": parts[1].std})
    return config


def save_mllm(model, tokenizer, folder, is_main, shard_bytes=5 * 10 ** 9):
    """Write the folder transformers opens. Every process calls it; the main one writes.

    model: MLLM, sharded or not; folder: Path, not yet under its final name (the caller renames).
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlavaProcessor
    folder, files, room = Path(folder), [], 0          # files: what goes into each
    for name, p in own_tensors(model):
        room -= p.nbytes
        if room < 0:
            files.append([])
            room = shard_bytes - p.nbytes
        files[-1].append((file_name_of(name), p))
    index = {}
    for i, inside in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if files[1:] else \
            "model.safetensors"
        part = {}
        for name, p in inside:         # one at a time: nobody ever holds a second copy of the model
            index[name], tensor = file, whole(p)
            if is_main:
                part[name] = tensor
        if is_main:
            save_file(part, folder / file, metadata={"format": "pt"})
    if not is_main:
        return
    if files[1:]:
        total = sum(p.nbytes for inside in files for _, p in inside)
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": total}, "weight_map": index}, indent=1, sort_keys=True))
    (folder / "config.json").write_text(json.dumps(llava_config(model), indent=1))
    encoder = model.encoder
    LlavaProcessor(encoders.image_processor(encoder), tokenizer, chat_template=CHAT_TEMPLATE,
                   patch_size=encoder.patch_size,
                   num_additional_image_tokens=encoder.prefix, image_token=IMAGE_TOKEN,
                   vision_feature_select_strategy="default" if encoder.prefix else "full",
                   ).save_pretrained(folder)
    stops = stop_ids(tokenizer)
    GenerationConfig(do_sample=False, eos_token_id=stops,
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def stored(folder):
    """{name of a tensor: the open file it lies in} of a model's folder; raises SystemExit."""
    from safetensors import SafetensorError, safe_open
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        try:
            file = safe_open(path, "pt")
        except SafetensorError as e:
            raise SystemExit(f"error: cannot read {path}: {encoders.first_line(e)}")
        found |= dict.fromkeys(file.keys(), file)
    return found


def stop_ids(tokenizer):
    """Generation ends on ChatML's end of turn and on the base model's end of text."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return sorted({i for i in ids if i is not None})


def load_mllm(folder):
    """Open a folder written by save_mllm, strictly: (MLLM in fp32, tokenizer).

    raises SystemExit, one line, when the folder is not one or a tensor is missing or left over.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise SystemExit(f"error: {folder} is not a trained model (no config.json)")
    facts = encoders.read_json(folder / "config.json")
    if "vision_config" not in facts or "text_config" not in facts:
        raise SystemExit(f"error: {folder} is a {facts.get('model_type')}, not a model written by "
                         f"pretrain.py, train_sft.py, train_dpo.py or repair_eval.py")

    def eye(vision_config, image_mean, image_std, **_):
        config = AutoConfig.for_model(**vision_config)
        vision = encoders.without_pooler(AutoModel.from_config(
            config, dtype=torch.float32, **encoders.class_options(config)))
        return encoders.Encoder(vision, image_mean, image_std)
    pixels = encoders.read_json(folder / "processor_config.json",
                                "image_processor")["image_processor"]
    with no_init_weights():               # every tensor is read from the file: names are compared
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts["text_config"]),
                                               dtype=torch.float32, attn_implementation="sdpa")
        encoder = eye(facts["vision_config"], pixels["image_mean"], pixels["image_std"])
        if "second" in facts:
            encoder = encoders.TwoEncoders(encoder, eye(**facts["second"]))
    llm.tie_weights()
    model = MLLM(encoder, llm, facts["image_token_index"])
    # Names and shapes first, then tensor by tensor: the model is never in memory twice.
    own, files = {file_name_of(n): t for n, t in model.state_dict().items()}, stored(folder)
    if llm.config.tie_word_embeddings:
        own.pop("language_model.lm_head.weight", None)
    encoders.refuse_misfit(folder, {k: t.shape for k, t in own.items()},
                           {k: file.get_slice(k).get_shape() for k, file in files.items()})
    for key, file in files.items():
        own[key].copy_(file.get_tensor(key))
    return no_dropout(model), open_tokenizer(folder)
