"""What is computed: pixels and tokens → response log-probs, in one forward on one screen.

    encode → project → scatter into the token embeddings → LLM → response rows only
           → fp32 log-softmax → gather

Every gradient that reaches the eye flows back through exactly these lines. How it is *run*
(processes, sharding, checkpoints) is in runtime.py; which encoder and layer, in encoders.py.

The pair layout (shared prefix, one image, one sequence a pair; `p` is the last prompt token):

      tokens     <image>×N  question   p   c1  c2  c3    p   r1  r2      (padding)
      branch        0  …        0      1   1   1   1     2   2   2          3
      position      0  …       P-2    P-1  P  P+1 P+2   P-1  P  P+1         …

    A token sees what stands before it in its own branch and in branch 0, nothing else. Because `p`
    opens both branches, each first answer token is predicted from its own copy of it, and the
    ordinary label shift is right everywhere (without the copy it is wrong by nats for r1, and
    positions that run on through the rejected answer are wrong by 2e-3: small enough to miss).
"""
import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import encoders

IGNORE = -100                                    # label of a token that is not predicted
SHARED, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3   # branch of a token in the pair layout
IMAGE_TOKEN = "<image>"
SYSTEM = "You are a helpful assistant."
# Qwen's ChatML with the system turn spelled out; content is a string or LLaVA's list of parts.
# It takes the place of the tokenizer's own template, so that no default system prompt slips in.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LOGITS = 1024 * 151_936     # at once through lm_head: 1,024 rows of Qwen's words, 0.6 GB of fp32


class Projector(nn.Module):
    """Linear – GELU – Linear with bias: (B, N, d_vision) → (B, N, d_llm)."""

    def __init__(self, d_vision, d_llm):
        super().__init__()
        self.linear_1 = nn.Linear(d_vision, d_llm)
        self.linear_2 = nn.Linear(d_llm, d_llm)

    def forward(self, features):
        return self.linear_2(F.gelu(self.linear_1(features)))


def visible(branch):
    """Who sees whom in the pair layout, as FlexAttention asks it: (b, head, q, k) → visible?

                     keys:  q  q  p  c1 c2  p  r1        Every row sees at least itself, padding
        query c2  (chosen)  x  x  x  x  x   .  .         included, so that no row of the softmax
        query r1 (rejected) x  x  .  .  .   x  x         is empty (an empty one is NaN).
    """
    def sees(b, head, q, k):
        return (q >= k) & ((branch[b, q] == branch[b, k]) | (branch[b, k] == SHARED))
    return sees


def pair_mask(branch):
    """The same for every pair of tokens at once: branch (B, T) int → bool (B, 1, T, T)."""
    b, t = (torch.arange(n, device=branch.device) for n in branch.shape)
    return visible(branch)(b[:, None, None, None], None, t[:, None], t)


def attention_mask(branch, kernel, dtype):
    """The mask in the form the attention kernel takes: FlexAttention's blocks, or floats."""
    (B, T), device = branch.shape, branch.device
    if kernel == "flex_attention":     # blocks of 128 × 128 that are empty are never computed
        return create_block_mask(visible(branch), B, None, T, T, device=device)
    # Of a mask of booleans, or one whose rows do not begin at multiples of 8 (CUDA's
    # memory-efficient kernel), every layer would make and keep a copy. Hence floats, in rows of the
    # *next* multiple, never T itself: that would be a second case, and graph, to --compile.
    rows = torch.zeros(B, 1, T, (T // 8 + 1) * 8, dtype=dtype, device=device)
    return rows[..., :T].masked_fill_(~pair_mask(branch), -torch.inf)


class LogProb(torch.autograd.Function):
    """log softmax(logits)[target] of each row: (R, V) fp32 or fp64, (R,) → (R,). Overwrites logits.

    d log p_t / d logits = onehot(t) − p. The logits become p in the forward pass and the gradient
    in the backward pass: one table of R × V, where log_softmax and its gradient would be three. So
    nothing else may need them: of what made them, a matrix product does not.
    """
    @staticmethod
    def forward(ctx, logits, targets):
        highest = logits.amax(-1, keepdim=True)
        picked = logits.gather(-1, targets[:, None]) - highest
        p = logits.sub_(highest).exp_()
        total = p.sum(-1, keepdim=True)
        ctx.save_for_backward(p.div_(total), targets)
        return (picked - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, targets = ctx.saved_tensors
        grad = grad[:, None]
        return p.mul_(-grad).scatter_add_(-1, targets[:, None], grad), None


def token_logps(hidden, lm_head, targets):
    """log p(target) of each row. hidden (R, D), targets (R,) → (R,) fp32.

    The logits are cast to fp32 *before* the log-softmax: in bf16 a sum over 200 tokens is off by
    1.2 nats. Rows go through in chunks, recomputed in the backward pass, so that the peak is
    LOGITS however long the answers are.
    """
    def chunk(h, t):
        logits = lm_head(h)
        return LogProb.apply(                                                  # fp64 stays (tests)
            logits.to(torch.promote_types(logits.dtype, torch.float32)), t)
    rows = max(1, LOGITS // lm_head.out_features)
    if len(hidden) <= rows:
        return chunk(hidden, targets)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(rows), targets.split(rows))])


class MLLM(nn.Module):
    """Encoder + projector + LLM as one module.

    encoder: encoders.Encoder; llm: a causal LM of transformers with a ChatML tokenizer;
    image_token_id: the id that stands for one patch in input_ids.
    """

    def __init__(self, encoder, llm, image_token_id):
        super().__init__()
        self.encoder, self.llm, self.image_token_id = encoder, llm, image_token_id
        self.projector = Projector(encoder.hidden_size, llm.config.hidden_size)

    @property
    def blocks(self):
        """The transformer blocks of both: what is sharded, compiled, counted one by one."""
        return [*self.encoder.blocks, *self.llm.base_model.layers]

    def set_requires_gradient_sync(self, whether):
        """Nothing to do for a lone process; under `fully_shard` FSDP's own method takes over."""

    def embed(self, pixel_values, input_ids):
        """Token embeddings with the projected patches in place of `<image>`: (B, T, d_llm)."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        # A frozen eye keeps no activations. Under sharding every process runs it at every step,
        # also for a batch of text alone, or the others would wait for its all-gather for ever.
        learns = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            features = self.encoder(pixel_values)                      # (B, N, d_vision)
        features = self.projector(features)                            # (B, N, d_llm)
        is_image = input_ids == self.image_token_id                    # (B, T)
        features = features[is_image.any(1)]                           # text-only rows have none
        if int(is_image.sum()) != features.shape[0] * features.shape[1]:
            raise ValueError(f"{int(is_image.sum())} image tokens for "
                             f"{features.shape[0]} × {features.shape[1]} image features")
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))

    def forward(self, pixel_values, input_ids, labels, branch=None, position_ids=None):
        """Log-prob of every supervised token, 0 elsewhere: (B, T) fp32.

        pixel_values uint8 (B, 3, S, S); input_ids, labels int64 (B, T), right-padded, labels
        IGNORE where nothing is predicted; branch, position_ids int64 (B, T) for the pair layout.
        out[b, t] = log p(labels[b, t] | image, what t sees); a response's log-prob is a sum.
        """
        embeds = self.embed(pixel_values, input_ids)
        # Without branches: right padding under a causal mask needs neither mask nor positions.
        mask = None if branch is None else attention_mask(
            branch, self.llm.config._attn_implementation, embeds.dtype)               # (B, 1, T, T)
        hidden = self.llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                                     position_ids=position_ids).last_hidden_state
        targets = labels[:, 1:]                       # row t predicts token t + 1: the one shift
        rows = targets != IGNORE
        logps = hidden.new_zeros(labels.shape,
                                 dtype=torch.promote_types(hidden.dtype, torch.float32))
        picked = token_logps(hidden[:, :-1][rows], self.llm.get_output_embeddings(), targets[rows])
        logps[:, 1:] = logps[:, 1:].masked_scatter(rows, picked)
        return logps

    @torch.inference_mode()
    def generate(self, pixel_values, input_ids, attention_mask, max_new_tokens, stop_ids,
                 temperature=0.0, seeds=()):
        """Continuation, batched and KV-cached: a list of B lists of token ids. Greedy, or drawn
        from softmax(logits / temperature).

        input_ids int64 (B, T), *left*-padded; attention_mask int64 (B, T), 0 on padding; seeds:
        B ints: what is drawn is a function of its own seed, not of what it is batched with.
        """
        stop = torch.tensor(sorted(stop_ids), device=input_ids.device)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs, cache = {"inputs_embeds": self.embed(pixel_values, input_ids)}, None
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        answers = [[] for _ in input_ids]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(max_new_tokens):
            out = self.llm.base_model(**inputs, attention_mask=attention_mask, use_cache=True,
                                      position_ids=positions, past_key_values=cache)
            logits = self.llm.get_output_embeddings()(out.last_hidden_state[:, -1])   # (B, V)
            if temperature:                  # the highest after Gumbel noise is a draw: Gumbel-max
                noise = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g).log()
                                     for g in generators])
                logits = logits.float() / temperature - noise.to(logits.device)
            token = logits.argmax(-1)
            done |= torch.isin(token, stop)
            if done.all():
                break
            for b in (~done).nonzero().flatten().tolist():
                answers[b].append(int(token[b]))
            inputs, cache = {"input_ids": token[:, None]}, out.past_key_values
            positions = positions[:, -1:] + 1
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return answers


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 2 of the paper, per pair: −log σ(β[(log π(y_c) − log π_ref(y_c)) − (… y_r …)]).

    All inputs (B,) fp32: *sums* of token log-probs (a mean would rescale beta by length).
    → losses, chosen_rewards, rejected_rewards, each (B,); the rewards are detached.
    """
    chosen_logratio = chosen_logps - ref_chosen_logps
    rejected_logratio = rejected_logps - ref_rejected_logps
    losses = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))
    return losses, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


# ---------------------------------------------------------------------------- folders, in and out

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
    own, seen = [], set()
    for name, p in model.state_dict(keep_vars=True).items():
        own += [(name, p)] if id(p) not in seen else []
        seen.add(id(p))
    return own


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
        total = sum((folder / file).stat().st_size for file in {*index.values()})
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
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts["text_config"]),
                                           dtype=torch.float32, attn_implementation="sdpa")
    pixels = encoders.read_json(folder / "processor_config.json",
                                "image_processor")["image_processor"]
    encoder = eye(facts["vision_config"], pixels["image_mean"], pixels["image_std"])
    if "second" in facts:
        encoder = encoders.TwoEncoders(encoder, eye(**facts["second"]))
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
