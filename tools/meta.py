"""A model without weights, and what one row through it takes: FLOPs and bytes, on the meta device.

The real modules run there forward and backward: torch's meta device has shapes, but neither numbers
nor memory. FLOPs are summed over the products that run; bytes are those of the tensors that
autograd saves. Assumed is a fused attention kernel: q, k, v, output and one number a row are kept,
not the T × T scores. plan.py makes a plan of it.
"""
from typing import NamedTuple

from pivot import encoders
from pivot import folders
import model as m
import torch
from torch.utils.flop_counter import FlopCounterMode


# ---------------------------------------------------------------------------------- without weights

def published(name):
    """The published class of a preset, folder or file, whole (but for a ViT's pooler, which MAE and
    MoCo do not have), on the meta device. A timm, open_clip or MoCo file says its shapes itself: it
    must be there, and its header alone is read."""
    from pivot import convert
    import transformers as t
    if name not in encoders.ENCODERS or encoders.ENCODERS[name].path.startswith("weights/toy"):
        path = encoders.resolve(name)
        if file := convert.find(path):
            return convert.load(file, "meta")[0]
        config = convert.as_vit(encoders.config_of(name, path))
    else:
        kind, hidden, depth, heads, mlp, patch, size = encoders.ENCODERS[name].geometry
        facts = dict(hidden_sizes=list(hidden), depths=list(depth)) if kind == "convnext" else dict(
            hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=mlp)
        if kind == "dinov2":              # the giant's MLP is gated, of two thirds of 4 × hidden
            facts["use_swiglu_ffn"] = mlp < 4 * hidden
        config = convert.as_vit(t.AutoConfig.for_model(kind, patch_size=patch, image_size=size,
                                                       **facts))
    with torch.device("meta"):
        return t.AutoModel.from_config(config, **encoders.class_options(config))


def empty_encoder(name, image_size=None):
    """The encoder as load_encoder would give it, without weights, on the meta device."""
    from pivot import convert
    if len(parts := encoders.parts_of(name)) == 2:
        return encoders.TwoEncoders(*(empty_encoder(part, image_size) for part in parts))
    vision = encoders.truncate(published(name))
    with torch.device("meta"):
        size = image_size or encoders.side(vision.config.image_size)
        vision = convert.resize_positions(vision, size)
        return encoders.Encoder(vision, encoders.HALF, encoders.HALF)


def empty_llm(name):
    """The LLM of a preset or local folder without weights, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
    if name in encoders.LLMS and encoders.LLMS[name].geometry:
        hidden, layers, heads, kv, mlp, rows, tied = encoders.LLMS[name].geometry
        config = Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, vocab_size=rows,
                             num_attention_heads=heads, num_key_value_heads=kv,
                             intermediate_size=mlp, tie_word_embeddings=tied)
    else:
        try:
            config = AutoConfig.from_pretrained(encoders.resolve(name), trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise SystemExit(f"error: cannot open --llm {name}: {encoders.first_line(e)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def empty_mllm(encoder, llm, image_size=None, dtype="bf16"):
    """The model without weights, on the meta device, in the dtype that it computes in."""
    encoder, llm = empty_encoder(encoder, image_size), empty_llm(llm)
    folders.refuse_llm(llm, llm.config.model_type)
    with torch.device("meta"):
        model = m.MLLM(encoder, llm, image_token_id=0)
    return folders.no_dropout(model.to(torch.bfloat16 if dtype == "bf16" else torch.float32))


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


def row_length(prompt, chosen, rejected, pairs):
    """Tokens of one row: prompt + answer, or the pair layout of model.py."""
    return prompt + chosen + (rejected + 1 if pairs else 0)


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


def trace(model, prompt, chosen, rejected, pairs):
    """Run one row of an MLLM on the meta device and write down what it takes. → Trace. Afterwards
    the model, with its attention that computes nothing, is good for this alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register("plan", attention)
    encoder, llm = model.encoder, model.llm
    for part in (*(p.vision for p in encoder.parts), llm):
        if part._supports_sdpa:
            part.config._attn_implementation = "plan"
    counter, where, flops_in_blocks = FlopCounterMode(display=False), None, 0
    blocks = model.blocks
    kept, inputs = {None: 0, **dict.fromkeys(range(len(blocks)), 0)}, [0] * len(blocks)
    seen = {p.untyped_storage()._cdata: p for p in model.parameters()}   # weights are no activation
    Fused.flops = 0

    def count():
        return counter.get_total_flops() + Fused.flops

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage      # kept alive here: its address is not used again
            kept[where] += storage.nbytes()
        return x

    def enter(i):
        def hook(block, args, kwargs):
            nonlocal where, flops_in_blocks
            where, x = i, args[0] if args else kwargs["hidden_states"]
            inputs[i] = x.nbytes if torch.is_grad_enabled() else 0
            flops_in_blocks -= count()
        return hook

    def leave(*_):
        nonlocal where, flops_in_blocks
        where = None
        flops_in_blocks += count()
    hooks = [h for i, block in enumerate(blocks) for h in (
        block.register_forward_pre_hook(enter(i), with_kwargs=True),
        block.register_forward_hook(leave))]

    length = row_length(prompt, chosen, rejected, pairs)
    rows = chosen + (rejected if pairs else 0)
    learns = any(p.requires_grad for p in encoder.parameters())
    with counter, torch.device("meta"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            pixels = [torch.zeros(1, 3, p.image_size, p.image_size, dtype=torch.uint8)
                      for p in encoder.parts]
            with torch.set_grad_enabled(learns):    # A+B: both pictures in one row, flat
                features = encoder(pixels[0] if len(pixels) == 1 else
                                   torch.cat([p.flatten(1) for p in pixels], 1))
            features = model.projector(features)
            # Stands for masked_scatter, whose backward depends on data: the same bytes, no FLOPs.
            words = torch.nn.functional.embedding(torch.zeros(1, length, dtype=torch.long),
                                                  llm.get_input_embeddings().weight)
            embeds = torch.cat([features, words[:, encoder.num_tokens:]], 1)     # (1, T, d_llm)
            mask = torch.zeros(1, 1, length, length, dtype=embeds.dtype) if pairs else None
            positions = torch.zeros(1, length, dtype=torch.long)
            hidden = llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                                    position_ids=positions).last_hidden_state
            picked = hidden[:, :rows].flatten(0, 1).clone()                      # (R, d_llm)
        # lm_head's own tensors are counted in plan.memory, by hand: they come in chunks
        logps = m.token_logps(picked, llm.get_output_embeddings(),
                              torch.zeros(rows, dtype=torch.long))
        forward = count()
        logps.sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    extra = 0 if mask is None else mask.nbytes            # a real kernel keeps it, Fused does not
    return Trace(forward, flops_in_blocks, count() - forward, kept.pop(None) + extra,
                 list(kept.values()), inputs, rows)
