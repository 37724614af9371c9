"""Weights in other layouts → a transformers class, by renaming keys, and the way back; and other
input sizes.

    timm       ViT (cls_token, blocks.i.attn.qkv, …) and ConvNeXt (stem, stages.i.blocks.j, …)
    MoCo v3    the original .pth.tar: timm's ViT under module.base_encoder., the momentum twin and
               both heads beside it
    open_clip  `visual.`: its own ViT, or timm's trunk under visual.trunk.
    MAE        transformers' own ViTMAE folder, opened as the ViT it holds

Pickled files are read with weights_only=True, so no code runs from them. A key that has no place,
or a place that has no key, refuses the file.

to_timm and to_open_clip give a trained encoder's tensors under those libraries' names; how they are
loaded there is in docs/opening.md.
"""
import re
from pathlib import Path

import torch
from torch import nn

from pivot import encoders, files, printing, tensors
from pivot.encoders import side

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
           "pytorch_model.bin")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}     # of timm's ViT-Ti/S/B/L/H, by width
MOCO_HEADS = {**HEADS, 384: 12}                           # MoCo v3's ViT-S has twelve


def file_at(path, name):
    """A file of a folder or of a hub repository; None where there is none."""
    from transformers.utils import cached_file
    found = cached_file(path, name, **{f"_raise_exceptions_for_{why}": False for why in (
        "missing_entries", "gated_repo", "connection_errors")})
    return found and Path(found)


def find(path):
    """The weight file of another layout at a path, in a folder or in a hub repository; None where
    transformers opens it itself (its config.json has a model_type). raises SystemExit, one line,
    where timm's or open_clip's config lies without it."""
    if Path(path).is_file():
        return Path(path)
    config = file_at(path, "config.json")
    if config and "architecture" not in files.read_json(config):       # timm's names one there
        return None
    if not any([config, file_at(path, "open_clip_config.json")]):     # fetched anyway, for load()
        return None
    for name in WEIGHTS:
        if file := file_at(path, name):
            return file
    raise SystemExit(f"error: {path} is a timm or open_clip model without its weights, whose "
                     f"shapes say what it is; none of {', '.join(WEIGHTS)} is there")


def read(file, device):
    """A weight file → {name: tensor}; on "meta" shapes alone. No code runs from it."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open
            with safe_open(file, "pt") as opened:
                return {k: torch.empty(opened.get_slice(k).get_shape(), device=device)
                        if device == "meta" else opened.get_tensor(k) for k in opened.keys()}
        facts = torch.load(file, map_location=device, weights_only=True)
    except Exception as e:
        raise SystemExit(f"error: cannot read {file}: {printing.first_line(e)}")
    state = next((facts[k] for k in ("state_dict", "model") if isinstance(facts, dict)
                  and isinstance(facts.get(k), dict)), facts)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SystemExit(f"error: {file} holds no table of tensors")
    return state


def under(state, prefix):
    """The tensors whose names start with prefix, without it; all of them where none does."""
    chosen = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return chosen or state


def load(file, device="cpu"):
    """A weight file in another layout → (transformers model in fp32, mean, std).
    device: "cpu", or "meta" for the model without its numbers."""
    raw = read(file, device)
    moco = any(k.startswith("module.base_encoder.") for k in raw)
    state = under(under(under(raw, "module.base_encoder."), "visual."), "trunk.")

    def beside(name, *keys):
        path = file.parent / name
        return files.read_json(path, *keys) if path.is_file() else {}
    open_clip, timm = beside("open_clip_config.json", "model_cfg"), beside("config.json")
    pixels = open_clip.get("preprocess_cfg") or timm.get("pretrained_cfg") or {}    # mean, std
    if "stem.0.weight" in state:
        config, names = timm_convnext(state, open_clip)
    elif "cls_token" in state and "patch_embed.proj.weight" in state:
        config, names = timm_vit(state, file, MOCO_HEADS if moco else HEADS)
    elif "class_embedding" in state and open_clip:
        config, names = open_clip_vit(state, open_clip["model_cfg"])
    else:
        raise SystemExit(f"error: {file} is in none of the layouts known here (timm's ViT with a "
                         f"CLS token and ConvNeXt, MoCo v3, open_clip with its "
                         f"open_clip_config.json beside it); first key: {next(iter(state))}")
    mean, std = (encoders.CLIP_MEAN, encoders.CLIP_STD) if open_clip else encoders.IMAGENET
    return fill(config, state, names, file), pixels.get("mean", mean), pixels.get("std", std)


def fill(config, state, names, file):
    """Build the class and give it every tensor under its new name.

    names: as renamed takes them.
    raises SystemExit, one line, unless names and shapes match one to one.
    """
    from transformers import AutoModel
    with torch.device("meta"):
        vision = AutoModel.from_config(config, **encoders.class_options(config))
    new = {name: tensor.float().clone(memory_format=torch.contiguous_format)
           for name, tensor in renamed(state, names).items()}   # not the file's own, mapped pages
    wanted, found = ({k: v.shape for k, v in x.items()} for x in (vision.state_dict(), new))
    tensors.refuse_misfit(f"{file} does not fit {type(vision).__name__}: it", wanted, found)
    vision.load_state_dict(new, strict=True, assign=True)
    for module in vision.modules():            # the one buffer that is not stored
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.num_positions, device=vision.device)[None]
    return vision


def renamed(state, names):
    """{name: tensor} under other names; a name that no pattern fits stays as it is.

    names: [(pattern, replacement), …]; the replacement None drops, a list splits a fused q, k, v.
    """
    new = {}
    for key, tensor in state.items():
        pattern, to = next(((p, to) for p, to in names if re.fullmatch(p, key)), (None, key))
        parts = [(to, tensor)] if not isinstance(to, list) else zip(to, tensor.chunk(len(to)))
        for target, part in parts if to else ():
            new[re.sub(pattern, target, key) if pattern else key] = part
    return new


def timm_vit(state, file, heads):
    """timm's VisionTransformer with CLS and final norm → ViTModel."""
    from transformers import ViTConfig
    _, n, width = state["pos_embed"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    if width not in heads:
        raise SystemExit(f"error: {file}: a ViT of width {width}: its number of heads is not "
                         f"known here (widths: {', '.join(map(str, heads))})")
    config = ViTConfig(
        hidden_size=width, num_attention_heads=heads[width], patch_size=patch,
        num_hidden_layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]), layer_norm_eps=1e-6,
        image_size=patch * round((n - 1) ** 0.5), qkv_bias="blocks.0.attn.qkv.bias" in state)
    block = r"blocks\.(\d+)\."
    return config, [
        (r"(pre_logits|head|fc)\..*", None),
        (r"cls_token", "embeddings.cls_token"), (r"pos_embed", "embeddings.position_embeddings"),
        (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
        (block + r"attn\.qkv\.(.*)", [rf"layers.\1.attention.{x}_proj.\2" for x in "qkv"]),
        (block + r"attn\.proj\.(.*)", r"layers.\1.attention.o_proj.\2"),
        (block + r"norm1\.(.*)", r"layers.\1.layernorm_before.\2"),
        (block + r"norm2\.(.*)", r"layers.\1.layernorm_after.\2"),
        (block + r"mlp\.(.*)", r"layers.\1.mlp.\2"), (r"norm\.(.*)", r"layernorm.\1")]


def timm_convnext(state, said):
    """timm's ConvNeXt → ConvNextModel. Its head norms the *pooled* map, as transformers' layernorm
    does; our features are the map before it. The XXL's norms have eps 1e-5, which the class
    cannot say: it is kept as `pivot_norm_eps` and set when the model is opened."""
    from transformers import ConvNextConfig
    depths, widths = {}, {}
    for key, tensor in state.items():
        if found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight", key):
            stage, block = map(int, found.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
            widths[stage] = len(tensor)
    widths, depths = ([table[i] for i in sorted(table)] for table in (widths, depths))
    size = said.get("model_cfg", {}).get("vision_cfg", {}).get("image_size", 224)
    xxl = {"pivot_norm_eps": 1e-5} if widths == [384, 768, 1536, 3072] else {}
    config = ConvNextConfig(hidden_sizes=widths, depths=depths, image_size=size, **xxl,
                            patch_size=state["stem.0.weight"].shape[-1])
    block, ours = r"stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."
    return config, [
        (r"head\.(proj|fc)\..*", None), (r"head\.norm\.(.*)", r"layernorm.\1"),
        (r"stem\.0\.(.*)", r"embeddings.patch_embeddings.\1"),
        (r"stem\.1\.(.*)", r"embeddings.layernorm.\1"),
        (r"stages\.(\d+)\.downsample\.(.*)", r"encoder.stages.\1.downsampling_layer.\2"),
        (block + r"conv_dw\.(.*)", ours + r"dwconv.\3"),
        (block + r"norm\.(.*)", ours + r"layernorm.\3"),
        (block + r"mlp\.fc1\.(.*)", ours + r"pwconv1.\3"),
        (block + r"mlp\.fc2\.(.*)", ours + r"pwconv2.\3"),
        (block + r"gamma", ours + r"layer_scale_parameter")]


def open_clip_vit(state, said):
    """open_clip's own VisionTransformer → CLIPVisionModel."""
    from transformers import CLIPVisionConfig
    facts = said["vision_cfg"]
    config = CLIPVisionConfig(
        hidden_size=facts["width"], num_hidden_layers=facts["layers"],
        num_attention_heads=facts["width"] // facts.get("head_width", 64),
        intermediate_size=int(facts["width"] * facts.get("mlp_ratio", 4)),
        patch_size=facts["patch_size"], image_size=facts["image_size"],
        hidden_act="quick_gelu" if said.get("quick_gelu") else "gelu")
    block, ours = r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."
    return config, [
        (r"proj", None), (r"(?!conv1|class_emb|positional|ln_|transformer\.resblocks).*", None),
        (r"class_embedding", "embeddings.class_embedding"),
        (r"positional_embedding", "embeddings.position_embedding.weight"),
        (r"conv1\.(.*)", r"embeddings.patch_embedding.\1"),
        (r"ln_pre\.(.*)", r"pre_layrnorm.\1"), (r"ln_post\.(.*)", r"post_layernorm.\1"),
        (block + r"attn\.in_proj_(.*)", [rf"{ours}self_attn.{x}_proj.\2" for x in "qkv"]),
        (block + r"attn\.out_proj\.(.*)", ours + r"self_attn.out_proj.\2"),
        (block + r"ln_([12])\.(.*)", ours + r"layer_norm\2.\3"),
        (block + r"mlp\.c_fc\.(.*)", ours + r"mlp.fc1.\2"),
        (block + r"mlp\.c_proj\.(.*)", ours + r"mlp.fc2.\2")]


# ------------------------------------------------------------------------------------ the way back

BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
TO_TIMM = [            # pattern of transformers' names, timm's; q, k and v are joined afterwards
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.position_embedding(?:s|\.weight)", "pos_embed"),
    (r"embeddings\.patch_embedding(?:s\.projection)?\.(.*)", r"patch_embed.proj.\1"),
    (r"embeddings\.mask_token", None),
    (r"pre_layrnorm\.(.*)", r"norm_pre.\1"),
    (BLOCK + r"(?:self_attn|attention)\.([qkv])_proj\.(.*)", r"blocks.\1.attn.\2.\3"),
    (BLOCK + r"(?:self_attn\.out|attention\.o)_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (BLOCK + r"(?:layer_norm1|layernorm_before|norm1)\.(.*)", r"blocks.\1.norm1.\2"),
    (BLOCK + r"(?:layer_norm2|layernorm_after|norm2)\.(.*)", r"blocks.\1.norm2.\2"),
    (BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (BLOCK + r"(mlp\..*)", r"blocks.\1.\2"),
    (r"(?:post_)?layernorm\.(.*)", r"norm.\1"),
    # SigLIP's attention pooling, which extract.py --full puts back
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(.*)", [rf"attn_pool.{x}.\1" for x in "qkv"]),
    (r"head\.attention\.out_proj\.(.*)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(.*)", r"attn_pool.norm.\1"),
    (r"head\.(mlp\..*)", r"attn_pool.\1")]
TO_OPEN_CLIP = [       # the same for open_clip's own ViT: its names below `visual.`
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding\.(.*)", r"conv1.\1"),
    (r"pre_layrnorm\.(.*)", r"ln_pre.\1"),
    (BLOCK + r"self_attn\.([qkv])_proj\.(.*)", r"transformer.resblocks.\1.attn.\2_\3"),
    (BLOCK + r"self_attn\.out_proj\.(.*)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (BLOCK + r"layer_norm([12])\.(.*)", r"transformer.resblocks.\1.ln_\2.\3"),
    (BLOCK + r"mlp\.fc1\.(.*)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (BLOCK + r"mlp\.fc2\.(.*)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"post_layernorm\.(.*)", r"ln_post.\1")]


def join(state, parts, whole):
    """In place: the tensors whose names hold one of `parts` (q, k, v) become one, in that order."""
    for key in [key for key in state if parts[0] in key]:
        together = [state.pop(key.replace(parts[0], part)) for part in parts]
        state[key.replace(parts[0], whole)] = torch.cat(together)


def refuse_unmapped(vision, library, kinds):
    """Raise SystemExit, one line, where a class has no names in a library here."""
    kind = vision.config.model_type
    if kind not in kinds or getattr(vision.config, "use_swiglu_ffn", False):
        raise SystemExit(f"error: {library}'s names of a {kind} like this one are not known here; "
                         f"known are those of {', '.join(kinds)}, without a gated MLP")


def to_timm(vision):
    """A vision model of transformers → {name: tensor}, as timm's VisionTransformer of the same
    depth loads it, strictly."""
    refuse_unmapped(vision, "timm", (encoders.SIGLIP, encoders.CLIP, encoders.VIT, "dinov2"))
    new = renamed(vision.state_dict(), TO_TIMM)
    join(new, (".attn.q.", ".attn.k.", ".attn.v."), ".attn.qkv.")
    join(new, ("attn_pool.k.", "attn_pool.v."), "attn_pool.kv.")
    for name in new.keys() & {"cls_token", "pos_embed"}:      # (D), (N, D) or (1, N, D) → (1, N, D)
        new[name] = new[name].reshape(1, -1, new[name].shape[-1])
    return new


def to_open_clip(vision):
    """A CLIP of transformers → {name: tensor}, as open_clip's own VisionTransformer of the same
    depth loads it, below `visual.`. Its `proj` alone is not there: no feature goes through it."""
    refuse_unmapped(vision, "open_clip", (encoders.CLIP,))
    new = renamed(vision.state_dict(), TO_OPEN_CLIP)
    join(new, (".attn.q_", ".attn.k_", ".attn.v_"), ".attn.in_proj_")
    return new


# ------------------------------------------------------------------------- other classes and sizes

def as_vit(config):
    """MAE's class shuffles the patches by random noise even where it masks none, which ruins the
    grid. Its encoder is a ViT, name by name: it is opened, trained and saved as one."""
    if config.model_type != "vit_mae":
        return config
    from transformers import ViTConfig
    facts, known = config.to_dict(), ViTConfig().to_dict()
    return ViTConfig(**{k: v for k, v in facts.items() if k in known and
                        k not in ("model_type", "architectures", "transformers_version", "dtype")})


@torch.no_grad()
def resize_positions(vision, size):
    """Another input size: the stored position table is resized once, in fp32, exactly as
    transformers' interpolate_pos_encoding would at every step (bicubic, antialiased for DINOv2 with
    registers alone), so that what is trained and saved is a plain model of the new size. In place;
    ConvNeXt has no table.
    """
    config = vision.config
    old, patch = side(config.image_size), side(config.patch_size)
    if size == old:
        return vision
    stride = patch * (2 ** (len(config.depths) - 1) if config.model_type == "convnext" else 1)
    if size % stride:
        raise SystemExit(f"error: --image-size {size} is no multiple of the patch size {stride}; "
                         f"the nearest is {max(1, round(size / stride)) * stride}")
    before, after = (old // patch) ** 2, (size // patch) ** 2
    for module in vision.modules():
        for name in ("position_embedding", "position_embeddings"):
            held = getattr(module, name, None)
            table = held.weight[None] if isinstance(held, nn.Embedding) else held
            if not isinstance(table, torch.Tensor):
                continue
            prefix = table.shape[1] - before                       # (1, prefix + N, D)
            grid = table[:, prefix:].float().unflatten(1, (old // patch,) * 2)
            grid = nn.functional.interpolate(grid.permute(0, 3, 1, 2), size=(size // patch,) * 2,
                                             mode="bicubic", align_corners=False,
                                             antialias=config.model_type == "dinov2_with_registers")
            table = torch.cat([table[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
            if isinstance(held, nn.Embedding):
                setattr(module, name, nn.Embedding.from_pretrained(table[0], freeze=False))
                module.num_positions = prefix + after
                module.position_ids = torch.arange(prefix + after, device=table.device)[None]
            else:
                setattr(module, name, nn.Parameter(table))
        if isinstance(getattr(module, "num_patches", None), int):
            module.num_patches = after
        if hasattr(module, "image_size"):
            module.image_size = (size, size) if isinstance(module.image_size, tuple) else size
    config.image_size = size
    return vision
