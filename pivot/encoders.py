"""Which encoder, which layer, which pixels: every fact a vision tower brings along, in tables.

`FAMILIES` says, for each transformers model type, where the features are read (PAPER: LLaVA-NeXT's
choice for SigLIP and CLIP, the final norm for the others) and what the class insists on although
no gradient can reach it. `ENCODERS` and `LLMS` give names to published checkpoints, with their
geometry. `--encoder` and `--llm` accept a preset, a local folder or a hub id, in that order.
Nothing is opened here: that is published.py.
"""
import functools
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pivot import printing

ROOT = Path(__file__).resolve().parent.parent

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Family(NamedTuple):
    """How one transformers vision class is read.

    read: where the features stand. "block": hidden_states[-1], before any final norm; "norm":
        last_hidden_state, after it; "map": last_hidden_state, ConvNeXt's map (B, D, h, w).
    drop_last_block: features are the *input* of the last block, so that block gets no gradient;
        it is deleted, lest "the encoder" be a mix of trained blocks and an untrained one.
    prefix_tokens: CLS and the like, in front of the patches, dropped (register tokens come on top).
    frozen: parameters the class keeps but no gradient reaches; prefixes of their names.
    """
    read: str
    drop_last_block: bool
    prefix_tokens: int
    frozen: tuple
    mean: tuple
    std: tuple


IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
SIGLIP, CLIP, VIT = "siglip_vision_model", "clip_vision_model", "vit"
QWEN2, QWEN3, LLAMA = "qwen2", "qwen3", "llama"
FAMILIES = {
    SIGLIP: Family("block", True, 0, ("post_layernorm.",), HALF, HALF),
    CLIP: Family("block", True, 1, ("post_layernorm.",), CLIP_MEAN, CLIP_STD),
    "metaclip_2_vision_model": Family("block", True, 1, ("post_layernorm.",), CLIP_MEAN, CLIP_STD),
    "dinov2": Family("norm", False, 1, ("embeddings.mask_token",), *IMAGENET),
    "dinov2_with_registers": Family("norm", False, 1, ("embeddings.mask_token",), *IMAGENET),
    VIT: Family("norm", False, 1, (), HALF, HALF),
    "vit_mae": Family("norm", False, 1, (), *IMAGENET),     # opened as a ViT: see as_vit
    "convnext": Family("map", False, 0, ("layernorm.",), *IMAGENET),    # that norm is the pooler's
}


class Preset(NamedTuple):
    """path: hub id or folder of this repository. geometry: enough to plan without weights. Of an
    encoder: model type, hidden, layers, heads, MLP width, patch, image size (ConvNeXt: type,
    widths, depths, –, –, patch, size). Of an LLM: model type, hidden, layers, heads, kv heads, MLP
    width, rows of the embedding, whether lm_head shares them; None: its folder says. Mean and std
    are those of the processor's or open_clip's config, else the family's.
    """
    path: str
    geometry: tuple | None


ENCODERS = {
    "siglip2-base": Preset("google/siglip2-base-patch16-384", (SIGLIP, 768, 12, 12, 3072, 16, 384)),
    "siglip2-large": Preset("google/siglip2-large-patch16-384",
                            (SIGLIP, 1024, 24, 16, 4096, 16, 384)),
    "siglip2-so400m": Preset("google/siglip2-so400m-patch16-384",
                             (SIGLIP, 1152, 27, 16, 4304, 16, 384)),
    "siglip2-giant": Preset("google/siglip2-giant-opt-patch16-384",
                            (SIGLIP, 1536, 40, 16, 6144, 16, 384)),
    "siglip1-base": Preset("google/siglip-base-patch16-384", (SIGLIP, 768, 12, 12, 3072, 16, 384)),
    "siglip1-so400m": Preset("google/siglip-so400m-patch14-384",
                             (SIGLIP, 1152, 27, 16, 4304, 14, 384)),
    "clip-large-224": Preset("openai/clip-vit-large-patch14", (CLIP, 1024, 24, 16, 4096, 14, 224)),
    "clip-large-336": Preset("openai/clip-vit-large-patch14-336",
                             (CLIP, 1024, 24, 16, 4096, 14, 336)),
    "dinov2-small": Preset("facebook/dinov2-small", ("dinov2", 384, 12, 6, 1536, 14, 518)),
    "dinov2-base": Preset("facebook/dinov2-base", ("dinov2", 768, 12, 12, 3072, 14, 518)),
    "dinov2-large": Preset("facebook/dinov2-large", ("dinov2", 1024, 24, 16, 4096, 14, 518)),
    "dinov2-giant": Preset("facebook/dinov2-giant", ("dinov2", 1536, 40, 24, 4096, 14, 518)),
    "mae-large": Preset("facebook/vit-mae-large", ("vit_mae", 1024, 24, 16, 4096, 16, 224)),
    "mae-huge": Preset("facebook/vit-mae-huge", ("vit_mae", 1280, 32, 16, 5120, 14, 224)),
    "moco-v3-base": Preset("weights/vit-b-300ep.pth.tar", (VIT, 768, 12, 12, 3072, 16, 224)),
    "vit-huge-in21k": Preset("google/vit-huge-patch14-224-in21k",
                             (VIT, 1280, 32, 16, 5120, 14, 224)),
    "convnext-xxl": Preset("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
                           ("convnext", (384, 768, 1536, 3072), (3, 4, 30, 3), None, None, 4, 768)),
    "toy-vit": Preset("weights/toy-vit", (SIGLIP, 128, 5, 4, 512, 8, 48)),
    "toy-vit-l": Preset("weights/toy-vit-l", (SIGLIP, 192, 7, 6, 768, 8, 48)),
}
MOCO_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
LLMS = {      # the 7B's table has 128 rows more than the others', all of them spare
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B-Instruct",
                           (QWEN2, 896, 24, 14, 2, 4864, 151_936, True)),
    "qwen2.5-1.5b": Preset("Qwen/Qwen2.5-1.5B-Instruct",
                           (QWEN2, 1536, 28, 12, 2, 8960, 151_936, True)),
    "qwen2.5-3b": Preset("Qwen/Qwen2.5-3B-Instruct",
                         (QWEN2, 2048, 36, 16, 2, 11008, 151_936, True)),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B-Instruct",
                         (QWEN2, 3584, 28, 28, 4, 18944, 152_064, False)),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", (QWEN3, 1024, 28, 16, 8, 3072, 151_936, True)),
    "qwen3-1.7b": Preset("Qwen/Qwen3-1.7B", (QWEN3, 2048, 28, 16, 8, 6144, 151_936, True)),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", (QWEN3, 2560, 36, 32, 8, 9728, 151_936, True)),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", (QWEN3, 4096, 36, 32, 8, 12288, 151_936, False)),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M-Instruct",
                           (LLAMA, 576, 30, 9, 3, 1536, 49_152, True)),
    "smollm2-360m": Preset("HuggingFaceTB/SmolLM2-360M-Instruct",
                           (LLAMA, 960, 32, 15, 5, 2560, 49_152, True)),
    "smollm2-1.7b": Preset("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                           (LLAMA, 2048, 24, 32, 32, 8192, 49_152, True)),
    "toy-lm": Preset("weights/toy-lm", None),
    "toy-lm-l": Preset("weights/toy-lm-l", None),
}


def resolve(name):
    """A preset, a local folder or a hub id → what `from_pretrained` accepts (str)."""
    preset = ENCODERS.get(name) or LLMS.get(name)
    path = preset.path if preset else name
    if preset and path.startswith("weights/"):
        path = str(ROOT / path)
        if path.endswith(".pth.tar") and not Path(path).is_file():
            raise SystemExit(f"error: {name} is not on the hub; download {MOCO_URL} to {path}")
        if not path.endswith(".pth.tar") and not Path(path, "config.json").exists():
            raise SystemExit(f"error: {name} has no weights at {path}; make them with:  "
                             f"python -m toy pretrain --models {name}")
    if not Path(path).exists() and not preset and \
            (name.count("/") != 1 or name.startswith((".", "/"))):
        known = ", ".join([*ENCODERS, *LLMS])
        raise SystemExit(f"error: {name} is neither a preset ({known}), nor a folder here, "
                         f"nor a hub id like google/siglip2-base-patch16-384")
    return path


def short_name(name):
    """The part of a run directory's default name that stands for this model."""
    return "+".join(Path(part.rstrip("/")).name.lower() for part in parts_of(name))


def parts_of(name):
    """`A+B`, one model made of two encoders → [A, B]; anything else → [name]."""
    parts = [name] if Path(name).is_dir() else name.split("+")
    if len(parts) > 2 or not all(parts):
        raise SystemExit(f"error: --encoder {name}: one encoder or two, A+B")
    return parts


def blocks_of(vision):
    """The transformer blocks: a class's longest list of modules (ConvNeXt: of all its stages)."""
    if vision.config.model_type == "convnext":
        return nn.ModuleList(layer for stage in vision.encoder.stages for layer in stage.layers)
    return max((m for m in vision.modules() if isinstance(m, nn.ModuleList)), key=len)


class Encoder(nn.Module):
    """Any ViT of transformers as one function from pixels to a grid of patch features.

    vision: a SiglipVisionModel, CLIPVisionModel, Dinov2Model, ViTModel, …, already truncated.
    forward: pixel_values uint8 (B, 3, S, S), 0..255 → features (B, N, D), N patches row by row.
    """

    def __init__(self, vision, mean, std):
        super().__init__()
        self.vision, self.family = vision, family_of(vision.config)
        config = vision.config
        self.image_size, self.patch_size = side(config.image_size), side(config.patch_size)
        if self.family.read == "map":        # ConvNeXt: every stage after the first halves the map
            self.hidden_size = config.hidden_sizes[-1]
            self.patch_size *= 2 ** (len(config.depths) - 1)
        else:
            self.hidden_size = config.hidden_size
        self.prefix = self.family.prefix_tokens + (getattr(config, "num_register_tokens", 0) or 0)
        self.num_tokens = (self.image_size // self.patch_size) ** 2
        self.mean, self.std = tuple(mean), tuple(std)
        for name, p in vision.named_parameters():
            p.requires_grad_(not name.startswith(self.family.frozen))
        for m in vision.modules():        # open_clip's ConvNeXt-XXL: the class hard-codes 1e-6
            if isinstance(m, nn.LayerNorm) and getattr(config, "pivot_norm_eps", None):
                m.eps = config.pivot_norm_eps

    @property
    def parts(self):
        return (self,)

    @property
    def blocks(self):
        return blocks_of(self.vision)

    def forward(self, pixel_values):
        device, dtype = pixel_values.device, torch.promote_types(self.vision.dtype, torch.float32)
        mean, std = (torch.tensor(x, dtype=dtype).view(3, 1, 1).to(device, non_blocking=True)
                     for x in (self.mean, self.std))
        pixels = (pixel_values.to(dtype) / 255 - mean) / std         # uint8 travels, not floats
        out = self.vision(pixels.to(next(self.vision.parameters()).dtype),      # bf16, or fp32
                          output_hidden_states=self.family.read == "block")
        if self.family.read == "map":
            return out.last_hidden_state.flatten(2).transpose(1, 2)      # (B, D, h, w), row by row
        # SigLIP: hidden_states[-1] is *before* post_layernorm, last_hidden_state is after it.
        features = out.last_hidden_state if self.family.read == "norm" else out.hidden_states[-1]
        return features[:, self.prefix:]


class TwoEncoders(nn.Module):
    """`--encoder A+B`, frozen: features side by side on the channel axis, the second's grid
    resampled (bilinear) to the first's. The interface of Encoder, but for the pixels.

    forward: pixel_values uint8 (B, 3·S₁² + 3·S₂²): the picture squashed for each encoder by itself
    (images.planes) → features (B, N₁, D₁ + D₂).
    """

    def __init__(self, first, second):
        super().__init__()
        self.parts = (first, second)          # a tuple: their modules are registered once, below
        self.vision = nn.ModuleList([first.vision, second.vision])
        self.family = first.family._replace(frozen=tuple(
            f"{i}.{name}" for i, part in enumerate(self.parts) for name in part.family.frozen))
        self.image_size = (first.image_size, second.image_size)
        self.num_tokens, self.prefix = first.num_tokens, first.prefix
        self.patch_size = first.patch_size
        self.hidden_size = first.hidden_size + second.hidden_size

    @property
    def blocks(self):
        return nn.ModuleList([block for part in self.parts for block in part.blocks])

    def forward(self, pixel_values):
        grids, sizes = [], [3 * s * s for s in self.image_size]
        for part, pixels in zip(self.parts, pixel_values.split(sizes, 1)):
            features = part(pixels.reshape(-1, 3, part.image_size, part.image_size))
            grid = round(part.num_tokens ** 0.5)
            grids.append(features.transpose(1, 2).unflatten(2, (grid, grid)))  # (B, D, grid, grid)
        grids[1] = nn.functional.interpolate(grids[1], grids[0].shape[2:], mode="bilinear")
        return torch.cat(grids, 1).flatten(2).transpose(1, 2)


def side(size):
    """Some configs write 224, some [224, 224]: the one number."""
    sides = {*size} if isinstance(size, (list, tuple)) else {size}
    if len(sides) > 1:
        raise SystemExit(f"error: the encoder's config says {size}: only squares work here")
    return sides.pop()


def family_of(config):
    """The row of FAMILIES; for any other ViT of transformers a row found by a trial on the meta
    device: two images forward and backward, no memory, no arithmetic.

    raises SystemExit, one line, where the class is not "pixels in, one token a patch out, last".
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    return trial(config.to_json_string(use_diff=False), type(config))


@functools.lru_cache
@torch.enable_grad()                    # whoever asks: extract.py does so without gradients
def trial(facts, kind):
    config = kind(**json.loads(facts))
    refusal = f"error: --encoder is a {config.model_type}, and cannot be used as a ViT here: "
    try:
        grid = side(config.image_size) // side(config.patch_size)
        with torch.device("meta"):
            vision = without_pooler(empty(config))
            out = vision(torch.zeros(2, 3, *[side(config.image_size)] * 2)).last_hidden_state
        blocks_of(vision)
    except Exception as e:
        raise SystemExit(refusal + printing.first_line(e))
    extra = out.shape[1] - grid ** 2 if out.dim() == 3 and len(out) == 2 else -1
    prefix = extra - (getattr(config, "num_register_tokens", 0) or 0)
    if not 0 <= prefix <= 2:        # YOLOS' hundred detection tokens, Swin's merged patches
        raise SystemExit(f"{refusal}{tuple(out.shape)} comes out of two images, not {grid} × "
                         f"{grid} patches of each after at most two extra tokens")
    out[:, extra:].sum().backward()
    frozen = tuple(n for n, p in vision.named_parameters() if p.grad is None)
    return Family("norm", False, prefix, frozen, *IMAGENET)


def without_pooler(vision):
    """Drop what stands behind the features and serves a pooled output alone."""
    if getattr(vision, "use_head", False):  # SigLIP's attention pooling
        vision.use_head = vision.config.vision_use_head = False
        del vision.head
    if isinstance(getattr(vision, "pooler", None), nn.Module):
        vision.pooler = None
    return vision


def class_of(config):
    """The transformers class of a vision config; of MetaCLIP 2's and others AutoModel does not know
    it, but it is called as the config is."""
    import transformers
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    kind = kind or getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
    if kind is None:
        raise SystemExit(f"error: --encoder is a {config.model_type}, for which transformers has "
                         f"no vision model")
    return kind


def empty(config, **options):
    """A vision model as its config describes it, with fresh weights, or none on the meta device."""
    return class_of(config)._from_config(config, **class_options(config), **options)


def class_options(config):
    """How a vision class is made: its fused attention where it has any (a ConvNeXt has none), and
    without the pooler that some make on request and no feature comes from."""
    kind = class_of(config)
    asks = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager",
            **({"add_pooling_layer": False} if asks else {})}


def truncate(vision, blocks=None):
    """Delete the block that no gradient reaches, in place; a folder already cut stays as it is.

    blocks: features are what the block of this number gives (a published model may have been
    trained so); all behind it are deleted. The cut is recorded in the config
    (`pivot_feature_layer`), which transformers keeps untouched.
    """
    family = family_of(vision.config)
    if family.drop_last_block and blocks is None:
        cut = getattr(vision.config, "pivot_feature_layer", None) is not None
        blocks = len(blocks_of(vision)) - (0 if cut else 1)
    if family.drop_last_block:
        del blocks_of(vision)[blocks:]
        vision.config.num_hidden_layers = len(blocks_of(vision))
        vision.config.pivot_feature_layer = -1
    return without_pooler(vision)
