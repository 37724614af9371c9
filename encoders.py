"""Which encoder, which layer, which pixels: every fact a vision tower brings along, in two tables.

`FAMILIES` says, for each transformers model type, where the features are read (PAPER: LLaVA-NeXT's
choice for SigLIP and CLIP, the final norm for the others) and what the class insists on although
no gradient can reach it. `PRESETS` gives names to published checkpoints. `--encoder` and `--llm`
accept a preset, a local folder or a hub id, in that order.
"""
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

HERE = Path(__file__).resolve().parent

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Family(NamedTuple):
    """How one transformers vision class is read.

    drop_last_block: features are the *input* of the last block, so that block gets no gradient;
        it is deleted, lest "the encoder" be a mix of trained blocks and an untrained one.
    normed: features are taken after the final norm (True) or before it (False).
    prefix_tokens: CLS and the like, in front of the patches, dropped.
    frozen: parameters the class keeps but no gradient reaches; prefixes of their names.
    """
    drop_last_block: bool
    normed: bool
    prefix_tokens: int
    frozen: tuple
    mean: tuple
    std: tuple


FAMILIES = {
    "siglip_vision_model": Family(True, False, 0, ("post_layernorm.",), HALF, HALF),
    "clip_vision_model": Family(True, False, 1, ("post_layernorm.",), CLIP_MEAN, CLIP_STD),
    "dinov2": Family(False, True, 1, ("embeddings.mask_token",), IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": Family(False, True, 1, ("embeddings.mask_token",),
                                    IMAGENET_MEAN, IMAGENET_STD),
    "vit": Family(False, True, 1, (), HALF, HALF),
}


class Preset(NamedTuple):
    """path: hub id or folder beside this file. geometry: model type, hidden, layers, heads, MLP
    width, patch, image size; enough to plan without weights."""
    path: str
    geometry: tuple


SIGLIP, CLIP = "siglip_vision_model", "clip_vision_model"
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
    "vit-huge-in21k": Preset("google/vit-huge-patch14-224-in21k",
                             ("vit", 1280, 32, 16, 5120, 14, 224)),
    "toy-vit": Preset("weights/toy-vit", (SIGLIP, 128, 5, 4, 512, 8, 48)),
    "toy-vit-l": Preset("weights/toy-vit-l", (SIGLIP, 192, 7, 6, 768, 8, 48)),
}
LLMS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "toy-lm": "weights/toy-lm",
    "toy-lm-l": "weights/toy-lm-l",
}


def resolve(name):
    """A preset, a local folder or a hub id → what `from_pretrained` accepts (str)."""
    path = ENCODERS[name].path if name in ENCODERS else LLMS.get(name, name)
    if path != name and path.startswith("weights/"):
        path = str(HERE / path)
        if not Path(path, "config.json").exists():
            raise SystemExit(f"error: {name} has no weights at {path}; make them with:  "
                             f"python toy.py pretrain --models {name}")
    if not Path(path).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))) \
            and name not in ENCODERS and name not in LLMS:
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
    """The transformer blocks: each class of FAMILIES holds exactly one list of modules."""
    return next(m for m in vision.modules() if isinstance(m, nn.ModuleList))


class Encoder(nn.Module):
    """Any ViT of transformers as one function from pixels to a grid of patch features.

    vision: a SiglipVisionModel, CLIPVisionModel, Dinov2Model or ViTModel, already truncated.
    forward: pixel_values uint8 (B, 3, S, S), 0..255 → features (B, N, D), N patches row by row.
    """

    def __init__(self, vision, mean, std):
        super().__init__()
        self.vision, self.family = vision, FAMILIES[vision.config.model_type]
        config = vision.config
        self.image_size = config.image_size
        self.prefix = self.family.prefix_tokens + getattr(config, "num_register_tokens", 0)
        self.num_tokens = (config.image_size // config.patch_size) ** 2
        self.hidden_size = config.hidden_size
        self.mean, self.std = tuple(mean), tuple(std)
        for name, p in vision.named_parameters():
            p.requires_grad_(not name.startswith(self.family.frozen or ("\0",)))

    @property
    def blocks(self):
        return blocks_of(self.vision)

    def forward(self, pixel_values):
        as_pixels = {"dtype": torch.promote_types(self.vision.dtype, torch.float32),
                     "device": pixel_values.device}
        mean, std = (torch.tensor(x, **as_pixels).view(3, 1, 1) for x in (self.mean, self.std))
        pixels = (pixel_values.to(**as_pixels) / 255 - mean) / std   # uint8 travels, not floats
        out = self.vision(pixels, output_hidden_states=not self.family.normed)
        # SigLIP: hidden_states[-1] is *before* post_layernorm, last_hidden_state is after it.
        features = out.last_hidden_state if self.family.normed else out.hidden_states[-1]
        return features[:, self.prefix:]


class Towers(nn.ModuleList):
    """Two vision models under the names they are stored by; what is asked of one, the first says.
    Both are frozen and keep no activations: there is nothing to checkpoint."""
    supports_gradient_checkpointing = True

    @property
    def config(self):
        return self[0].config

    @property
    def dtype(self):
        return self[0].dtype

    def gradient_checkpointing_enable(self, options):
        pass


class TwoEncoders(nn.Module):
    """`--encoder A+B`, frozen: features side by side on the channel axis, the second's grid
    resampled (bilinear) to the first's. The interface of Encoder, but for the pixels.

    forward: pixel_values uint8 (B, 3·S₁² + 3·S₂²): the picture squashed for each encoder by itself
    (data.planes) → features (B, N₁, D₁ + D₂).
    """

    def __init__(self, first, second):
        super().__init__()
        self.parts = (first, second)          # a tuple: their modules are registered once, below
        self.vision = Towers([first.vision, second.vision])
        self.family = first.family._replace(frozen=tuple(
            f"{i}.{name}" for i, part in enumerate(self.parts) for name in part.family.frozen))
        self.image_size = (first.image_size, second.image_size)
        self.num_tokens, self.prefix = first.num_tokens, first.prefix
        self.hidden_size = first.hidden_size + second.hidden_size

    @property
    def blocks(self):
        return nn.ModuleList([block for part in self.parts for block in part.blocks])

    def forward(self, pixel_values):
        grids, sizes = [], [3 * s * s for s in self.image_size]
        for part, pixels in zip(self.parts, pixel_values.split(sizes, 1)):
            features = part(pixels.reshape(-1, 3, part.image_size, part.image_size))
            side = round(part.num_tokens ** 0.5)
            grids.append(features.transpose(1, 2).unflatten(2, (side, side)))  # (B, D, side, side)
        grids[1] = nn.functional.interpolate(grids[1], grids[0].shape[2:], mode="bilinear")
        return torch.cat(grids, 1).flatten(2).transpose(1, 2)


def truncate(vision):
    """Delete the block that no gradient reaches, in place; a folder already cut stays as it is.

    The cut is recorded in the config (`pivot_feature_layer`), which transformers keeps untouched.
    """
    family = FAMILIES[vision.config.model_type]
    if family.drop_last_block and getattr(vision.config, "pivot_feature_layer", None) is None:
        del blocks_of(vision)[-1]
        vision.config.num_hidden_layers -= 1
        vision.config.pivot_feature_layer = -1
    if getattr(vision, "use_head", False):  # SigLIP's attention pooling: never part of the features
        vision.use_head = vision.config.vision_use_head = False
        del vision.head
    return vision


def load_encoder(name):
    """Open an encoder for training, fp32, truncated to the layer whose output is the feature.

    name: preset, folder (published or extracted) or hub id.
    raises SystemExit, one line, when the folder is missing, of a family not in FAMILIES, or when
        a tensor of the published model is missing.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file
    if len(parts := parts_of(name)) == 2:
        return TwoEncoders(*map(load_encoder, parts))
    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: cannot open --encoder {name} ({path}): {first_line(e)}")
    if config.model_type == "llava":
        raise SystemExit(f"error: --encoder {name} is a whole model; detach its encoder with:  "
                         f"python extract.py --run-dir RUN --stage STAGE")
    config = getattr(config, "vision_config", config)  # a whole SigLIP/CLIP: take the eye
    if config.model_type not in FAMILIES:
        raise SystemExit(f"error: --encoder {name} is a {config.model_type}; "
                         f"known families: {', '.join(FAMILIES)}")
    extra = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    vision = open_model(AutoModel, f"--encoder {name}", path, config=config, **extra)
    family, mean, std = FAMILIES[config.model_type], None, None
    processor = cached_file(path, "preprocessor_config.json",
                            _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
    if processor:           # the encoder's own statistics win over the family's
        facts = read_json(processor)
        mean, std = facts.get("image_mean"), facts.get("image_std")
    return Encoder(truncate(vision), mean or family.mean, std or family.std)


def open_model(kind, name, path, **options):
    """kind.from_pretrained in fp32; raises SystemExit, one line, where transformers would make up
    what a folder lacks: a tensor missing, or of another shape than config.json says."""
    try:
        model, info = kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as e:       # a file cut short comes as safetensors' or pickle's own error
        raise SystemExit(f"error: cannot open {name} ({path}): {first_line(e)}")
    for what, keys in (("lacks", info["missing_keys"]),
                       ("has other shapes than its config.json says: of",
                        [key for key, *_ in info["mismatched_keys"]])):
        if keys:
            raise SystemExit(f"error: {name} {what} {len(keys)} tensors, first: {sorted(keys)[0]}")
    return model


def read_json(path, *keys, remedy=""):
    """The object in a JSON file; raises SystemExit, one line, unless it is one with these keys."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}{remedy}")
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"error: {path}: not JSON ({e}){remedy}")
    for key in keys if isinstance(facts, dict) else ["{"]:
        if not isinstance(facts, dict) or key not in facts:
            raise SystemExit(f"error: {path}: no '{key}' in it{remedy}")
    return facts


def first_line(error):
    """The first line of an exception: what a person needs, without the traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def image_processor(encoder):
    """The transformers processor that does exactly what data.py does: bicubic squash, rescale,
    normalise. The Pillow backend is the definition; torchvision's resize differs in the last bit.
    """
    from transformers import SiglipImageProcessorPil
    encoder = getattr(encoder, "parts", [encoder])[0]       # of A+B: the first's
    size = encoder.image_size
    return SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3,
                                   image_mean=list(encoder.mean), image_std=list(encoder.std))
