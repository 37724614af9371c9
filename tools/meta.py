"""A model without weights, and what one row through it takes: FLOPs and bytes, on the meta device.

The real modules run there forward and backward: torch's meta device has shapes, but neither numbers
nor memory. FLOPs are summed over the products that run; bytes are those of the tensors that
autograd saves. Assumed is a fused attention kernel: q, k, v, output and one number a row are kept,
not the T × T scores. plan.py makes a plan of it.
"""
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import model as m
from pivot import convert, encoders, published

# ---------------------------------------------------------------------------------- without weights

def whole_encoder(name):
    """The published class of a preset, folder or file, whole (but for a ViT's pooler, which MAE and
    MoCo do not have), on the meta device. A timm, open_clip or MoCo file says its shapes itself: it
    must be there, and its header alone is read."""
    import transformers as t
    if name not in encoders.ENCODERS or encoders.ENCODERS[name].path.startswith("weights/toy"):
        path = encoders.resolve(name)
        if file := convert.find(path):
            return convert.load(file, "meta")[0]
        config = convert.as_vit(published.config_of(name, path))
    else:
        kind, hidden, depth, heads, mlp, patch, size = encoders.ENCODERS[name].geometry
        if kind == "convnext":
            facts = dict(hidden_sizes=list(hidden), depths=list(depth))
        else:
            facts = dict(hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads,
                         intermediate_size=mlp)
        if kind == "dinov2":              # the giant's MLP is gated, of two thirds of 4 × hidden
            facts["use_swiglu_ffn"] = mlp < 4 * hidden
        config = convert.as_vit(t.AutoConfig.for_model(kind, patch_size=patch, image_size=size,
                                                       **facts))
    with torch.device("meta"):
        return encoders.empty(config)


def empty_encoder(name, image_size=None):
    """The encoder as load_encoder would give it, without weights, on the meta device."""
    if len(parts := encoders.parts_of(name)) == 2:
        return encoders.TwoEncoders(*(empty_encoder(part, image_size) for part in parts))
    vision = encoders.truncate(whole_encoder(name))
    with torch.device("meta"):
        size = image_size or encoders.side(vision.config.image_size)
        vision = convert.resize_positions(vision, size)
        return encoders.Encoder(vision, encoders.HALF, encoders.HALF)


def empty_llm(name):
    """The LLM of a preset or local folder without weights, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    if name in encoders.LLMS and encoders.LLMS[name].geometry:
        kind, hidden, layers, heads, kv, mlp, rows, tied = encoders.LLMS[name].geometry
        config = AutoConfig.for_model(kind, hidden_size=hidden, num_hidden_layers=layers,
                                      num_attention_heads=heads, num_key_value_heads=kv,
                                      intermediate_size=mlp, vocab_size=rows,
                                      max_position_embeddings=32_768, tie_word_embeddings=tied)
    else:
        config = published.llm_config(name, encoders.resolve(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=published.attention_of(config))


def empty_mllm(encoder, llm, image_size=None, dtype="bf16"):
    """The model without weights, on the meta device, in the dtype that it computes in."""
    encoder, llm = empty_encoder(encoder, image_size), empty_llm(llm)
    published.refuse_llm(llm, "--llm")
    with torch.device("meta"):
        model = m.MLLM(encoder, llm, image_token_id=0)
    return published.refuse_dropout(model.to(torch.bfloat16 if dtype == "bf16" else torch.float32))


# ------------------------------------------------------------------------------------------ one row

class Trace(NamedTuple):
    """One row, forward and backward. FLOPs: forward, of that inside blocks, backward. Bytes that
    autograd keeps: outside blocks; inside each block; each block's input. rows: of lm_head."""
    forward: int
    in_blocks: int
    backward: int
    outside: int
    blocks: list
    inputs: list
    rows: int


def row_length(prompt, chosen, rejected, layout):
    """Tokens of one row: prompt + answer, or the pair layout of model.py; of layout "rows" the
    longer of the two rows."""
    if layout == "pair":
        return prompt + chosen + rejected + 1
    return prompt + (max(chosen, rejected) if layout == "rows" else chosen)


class Fused(torch.autograd.Function):
    """Attention as a fused kernel does it, shapes alone. q, k, v (B, H, T, d) → (B, H, T, d).
    Two products forward, four backward (the kernels' own recomputation is not credited)."""
    flops = 0

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.product = 2 * q.numel() * k.shape[2]
        Fused.flops += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx, grad):
        Fused.flops += 4 * ctx.product
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' hook for an attention kernel; with a mask it repeats the shared heads first."""
    from transformers.integrations.sdpa_attention import repeat_kv
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return Fused.apply(query, key, value).transpose(1, 2), None


def use_counted_attention(model):
    """Let both parts attend through `attention` above, which computes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register("counted", attention)
    for part in (*(encoder.vision for encoder in model.encoder.parts), model.llm):
        if part._supports_sdpa:
            part.config._attn_implementation = "counted"


class Ledger:
    """What a pass takes, written down while it runs: FLOPs inside blocks, and bytes that autograd
    keeps, by block (None: outside)."""

    def __init__(self, model):
        self.counter, self.blocks = FlopCounterMode(display=False), model.blocks
        self.where, self.flops_in_blocks = None, 0
        self.kept = {None: 0, **dict.fromkeys(range(len(self.blocks)), 0)}
        self.inputs = [0] * len(self.blocks)
        self.seen = {}                # storages; kept alive: an address is not used again
        for p in model.parameters():                            # weights are no activation
            self.seen[p.untyped_storage()._cdata] = p
        Fused.flops = 0

    def flops(self):
        return self.counter.get_total_flops() + Fused.flops

    def keep(self, tensor):
        """Autograd saves a tensor: count its storage once, where it is first saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.kept[self.where] += storage.nbytes()
        return tensor

    def enter(self, i):
        def hook(block, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            self.where, self.inputs[i] = i, hidden.nbytes if torch.is_grad_enabled() else 0
            self.flops_in_blocks -= self.flops()
        return hook

    def leave(self, *_):
        self.where = None
        self.flops_in_blocks += self.flops()

    def hook(self):
        """Watch every block; → what to remove afterwards."""
        hooks = []
        for i, block in enumerate(self.blocks):
            hooks += [block.register_forward_pre_hook(self.enter(i), with_kwargs=True),
                      block.register_forward_hook(self.leave)]
        return hooks


def run_row(model, length, rows, layout):
    """Forward of one row (layout "rows": of a pair's two) as MLLM.forward does it, up to the states
    that lm_head reads: their (R, d_llm), and the mask, which is None for a plain row."""
    encoder, llm = model.encoder, model.llm
    pixels = [torch.zeros(1, 3, part.image_size, part.image_size, dtype=torch.uint8)
              for part in encoder.parts]
    if len(pixels) == 1:
        pixels = pixels[0]
    else:                                           # A+B: both pictures in one row, flat
        pixels = torch.cat([p.flatten(1) for p in pixels], 1)
    with torch.set_grad_enabled(any(p.requires_grad for p in encoder.parameters())):
        features = encoder(pixels)
    copies = 2 if layout == "rows" else 1
    features = model.projector(features).repeat(copies, 1, 1)
    # Stands for masked_scatter, whose backward depends on data: the same bytes, no FLOPs.
    words = torch.nn.functional.embedding(torch.zeros(copies, length, dtype=torch.long),
                                          llm.get_input_embeddings().weight)
    embeds = torch.cat([features, words[:, encoder.num_tokens:]], 1)        # (copies, T, d_llm)
    mask = torch.zeros(1, 1, length, length, dtype=embeds.dtype) if layout == "pair" else None
    hidden = llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                            position_ids=torch.zeros(1, length, dtype=torch.long)
                            ).last_hidden_state
    return hidden.flatten(0, 1)[:rows].clone(), mask


def trace(model, prompt, chosen, rejected, layout):
    """Run one row of an MLLM (layout "rows": both of a pair) on the meta device and write down what
    it takes. → Trace. Afterwards the model, with its attention that computes nothing, is good for
    this alone."""
    use_counted_attention(model)
    length = row_length(prompt, chosen, rejected, layout)
    rows = chosen + (rejected if layout != "answers" else 0)
    ledger = Ledger(model)
    hooks = ledger.hook()
    with ledger.counter, torch.device("meta"):
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda x: x):
            picked, mask = run_row(model, length, rows, layout)
        # lm_head's own tensors are counted in plan.memory, by hand: they come in chunks
        logps = m.token_logps(picked, model.llm, torch.zeros(rows, dtype=torch.long))
        forward = ledger.flops()
        logps.sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    outside = ledger.kept.pop(None)
    if mask is not None:
        outside += mask.nbytes                            # a real kernel keeps it, Fused does not
    return Trace(forward, ledger.flops_in_blocks, ledger.flops() - forward, outside,
                 list(ledger.kept.values()), ledger.inputs, rows)
