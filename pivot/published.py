"""What others published, opened strictly: an encoder, an LLM, a tokenizer.

Nothing that a folder lacks is made up, and nothing that it holds of what is opened is left out;
what this code would compute otherwise than the model's own class is refused, in one line, before
any training.
"""
import re

import torch
from torch import nn

from model import can_hold_pairs, logits_of
from pivot import convert, encoders, files, printing, tensors
from pivot.distributed import print0
from pivot.records import CHAT_TEMPLATE, IMAGE_TOKEN

# What older versions stored of tables that are computed.
COMPUTED = ("inv_freq", "position_ids", "relative_position_index", "attn.masked_bias")

# ---------------------------------------------------------------------------------------- encoders


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
    if rate := getattr(config, "drop_path_rate", 0):      # random in training, nothing in inference
        config.drop_path_rate = 0.0
        print0(f"  --encoder {name}: its config asks for drop path ({rate:g}); it is switched off")
    return config


def load_encoder(name, image_size=None, blocks=None):
    """Open an encoder for training, fp32, truncated to the layer whose output is the feature.

    name: preset, folder (published or extracted), hub id, or a file of timm, open_clip or MoCo v3;
    image_size: another input size than its own; blocks: as encoders.truncate takes them.
    raises SystemExit, one line, when the folder is missing, of a class that cannot serve, or when
        a tensor of the published model is missing.
    """
    if len(parts := encoders.parts_of(name)) == 2:
        return encoders.TwoEncoders(*(load_encoder(part, image_size) for part in parts))
    vision, mean, std = load_vision(name, image_size)
    return encoders.Encoder(encoders.truncate(vision, blocks), mean, std)


def load_vision(name, image_size=None):
    """The vision model that load_encoder truncates, with every block that it was published with:
    (vision model in fp32, mean, std)."""
    path, preset = encoders.resolve(name), encoders.ENCODERS.get(name)
    if file := convert.find(path):
        vision, mean, std = convert.load(file)
    else:
        original = config_of(name, path)
        config = convert.as_vit(original)
        encoders.family_of(config)                    # refuses before anything is loaded
        vision = open_model(encoders.class_of(config), f"--encoder {name}", path, config=config,
                            **encoders.class_options(config))
        mean, std = mean_and_std(path, encoders.family_of(original))
    own_size = preset.geometry[-1] if preset else encoders.side(vision.config.image_size)
    return convert.resize_positions(vision, image_size or own_size), mean, std


def mean_and_std(path, family=None):
    """Mean and standard deviation of the pixels, three numbers each, as the processor of a folder
    or hub id has them; of the family, and that is said, where no file there names them."""
    for file in ("preprocessor_config.json", "processor_config.json"):   # the latter since 5
        found = convert.file_at(path, file)
        facts = files.read_json(found) if found else {}
        facts = facts.get("image_processor", facts)
        if facts.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        scale = facts.get("rescale_factor") or 1 / 255
        scale = 1 if facts.get("do_rescale") is False else scale
        if abs(scale * 255 - 1) > 1e-6:
            raise SystemExit(f"error: {path}: {file} scales pixels by {scale:g}; only 1/255 is "
                             f"known here")
        if "image_mean" in facts and "image_std" in facts:
            return three(facts["image_mean"]), three(facts["image_std"])
    if family is None:
        raise SystemExit(f"error: {path}: neither processor_config.json nor "
                         f"preprocessor_config.json says how its pixels are normalised")
    print0(f"  {path}: no file names its pixels' mean; its family's is used: {family.mean}, std "
           f"{family.std}")
    return family.mean, family.std


def three(value):
    """One number for all channels, or one for each → three."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3


def open_model(kind, name, path, left_out=None, **options):
    """kind.from_pretrained in fp32; raises SystemExit, one line, where transformers would make up
    what a folder lacks (a tensor missing, or of another shape than config.json says), or leave out
    what it has: blocks, biases, norms that config.json does not speak of. left_out: a list that
    gets the names of what stands in no block, which is then no reason to refuse."""
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
    parts = {key.split(".")[0] for key in wanted}            # what is no part of this is no matter
    for key in sorted(info["unexpected_keys"]):
        in_block = left_out is None or re.search(r"\.\d+\.", key)
        if key.split(".")[0] in parts and in_block and not key.endswith(COMPUTED):
            raise SystemExit(f"error: {name} ({path}) holds {key}, which a model of its "
                             f"config.json does not have")
    if left_out is not None:
        left_out += sorted(info["unexpected_keys"])
    return model


# -------------------------------------------------------------------------------------------- LLMs

def prepare_tokenizer(tokenizer):
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
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def open_tokenizer(path):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:
        raise SystemExit(f"error: no usable tokenizer in {path}: {printing.first_line(e)}")


def config_of_whole(said, path):
    """The config of a folder or hub id; raises SystemExit, one line, where it cannot be opened, or
    stands for other weights than a whole model's. said: what a message calls it."""
    from transformers import AutoConfig
    if convert.file_at(path, "adapter_config.json"):
        raise SystemExit(f"error: {said} is an adapter (LoRA), or has one beside it; merge it into "
                         f"its base model first (PEFT: merge_and_unload)")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        where = "" if said == path else f" ({path})"
        raise SystemExit(f"error: cannot open {said}{where}: {printing.first_line(e)}")


def refuse_quantized(said, config):
    """Raise SystemExit, one line, where the weights are not those that were trained."""
    if getattr(config, "quantization_config", None):
        raise SystemExit(f"error: {said} is quantized; training needs the weights it was made of")


def llm_config(name, path):
    """The config of an LLM's folder or hub id; raises SystemExit, one line, where it is none of a
    whole model."""
    config = config_of_whole(f"--llm {name}", path)
    refuse_quantized(f"--llm {name}", config)
    return config


def attention_of(config):
    """The attention kernel of a causal LM: torch's fused one, where its class knows it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if kinds is None or kinds._supports_sdpa else "eager"


def open_llm(name):
    """Open a causal LM for training, fp32, and its tokenizer with `<image>` in it: (LLM, tokenizer,
    id of `<image>`).

    name: preset, folder or hub id. raises SystemExit, one line, where a tensor is missing, where
        this is no whole model, or where its logits are not those that model.py computes.
    """
    from transformers import AutoModelForCausalLM
    path = encoders.resolve(name)
    llm = open_model(AutoModelForCausalLM, f"--llm {name}", path,
                     attn_implementation=attention_of(llm_config(name, path)))
    own_head(llm)
    refuse_llm(llm, f"--llm {name}")
    tokenizer = open_tokenizer(path)
    image_token_id = prepare_tokenizer(tokenizer)
    if len(tokenizer) > llm.config.vocab_size:
        add_rows(llm, len(tokenizer))
        print0(f"  --llm {name}: its tokenizer filled its table, which now has "
               f"{llm.config.vocab_size} rows")
    if not can_hold_pairs(llm):
        print0(f"  --llm {name}: not all of its layers are full attention; train_dpo.py will need "
               f"--layout rows")
    return llm, tokenizer, image_token_id


def own_head(llm):
    """Let the config say what is so: some trainers leave a lm_head of its own in the file of a
    model whose config calls it tied, and transformers then keeps both."""
    head, words = llm.get_output_embeddings(), llm.get_input_embeddings()
    if llm.config.tie_word_embeddings and head.weight is not words.weight:
        if torch.equal(head.weight, words.weight):
            head.weight = words.weight
        else:
            llm.config.tie_word_embeddings = False


@torch.no_grad()
def refuse_llm(llm, who):
    """Raise SystemExit, one line, unless the LLM is built as the hub's names have it, in model. and
    lm_head, and its own logits are those of model.logits_of, compared on one row."""
    who = f"error: {who} is a {llm.config.model_type}: "
    layers = getattr(llm.base_model, "layers", ())
    if llm.base_model_prefix != "model" or not len(layers) or not hasattr(llm, "lm_head"):
        raise SystemExit(f"{who}only causal LMs with their blocks in model.layers and a lm_head "
                         f"can be saved in a form that others open")
    if llm.device.type == "meta":
        return
    ids = torch.arange(min(8, llm.config.vocab_size))[None]
    training = llm.training
    llm.eval()
    own = llm(input_ids=ids, use_cache=False).logits[0].float()
    hidden = llm.base_model(inputs_embeds=llm.get_input_embeddings()(ids), use_cache=False)
    ours = logits_of(llm, hidden.last_hidden_state[0])
    llm.train(training)
    apart = (own - ours).abs().max() / own.abs().max().clamp(min=1e-6)
    if not apart < 1e-4:
        raise SystemExit(f"{who}its own logits are not those that this code computes (up to "
                         f"{apart:.1e} of the largest apart), so every log-prob would be wrong")


def refuse_layout(llm, layout):
    """Raise SystemExit where both answers of a pair cannot stand in one row (--layout pair)."""
    if layout == "pair" and not can_hold_pairs(llm):
        raise SystemExit(f"error: --layout pair holds two answers in one row, apart by a mask that "
                         f"not every layer of a {llm.config.model_type} heeds; use --layout rows")


def add_rows(llm, words):
    """Rows for a tokenizer of so many words, up to a multiple of 64. A new one is the mean of all:
    whatever the hidden state, its logit is then an average one, never the highest."""
    before, rows = llm.config.vocab_size, -(-words // 64) * 64
    tables = [llm.get_input_embeddings().weight, llm.get_output_embeddings().weight]
    means = [table.detach().mean(0) for table in tables]
    llm.resize_token_embeddings(rows, mean_resizing=False)
    for module, mean in zip((llm.get_input_embeddings(), llm.get_output_embeddings()), means):
        module.weight.data[before:] = mean


def refuse_dropout(model):
    """Dropout anywhere would make policy and reference differ at step 0: raises SystemExit."""
    for name, module in model.named_modules():
        rates = [getattr(module, key, 0) for key in ("attention_dropout", "dropout", "drop_prob",
                                                     "dropout_prob")]
        rates += [module.p] if isinstance(module, nn.Dropout) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise SystemExit(f"error: {name} has dropout, and two passes of a step are compared "
                             f"bit by bit; set every dropout in the model's config.json to 0")
    return model


