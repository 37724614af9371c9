"""Load encoders that tests/test_opens.py kept under timm's and open_clip's names into the real ones.

    python -m pip install timm open_clip_torch     # in an environment of your own: not pinned here
    python tests/libraries.py .pytest_cache/opens  # after `make compat`, which keeps them there

The features must be those of the code that trained them, to 1e-5; docs/opening.md shows the calls.
"""
import sys
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import load_file

TINY = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=0)
# family, file: timm's model, what its defaults have otherwise (the tiny ones' depth and MLP aside)
TIMM = {("siglip", "timm"): ("vit_base_patch16_siglip_gap_384", dict(act_layer="gelu_tanh"), 2),
        ("siglip", "timm-full"): ("vit_base_patch16_siglip_384", dict(act_layer="gelu_tanh"), 3),
        ("clip", "timm"): ("vit_large_patch14_clip_quickgelu_336", {}, 2),
        ("clip", "timm-full"): ("vit_large_patch14_clip_quickgelu_336", {}, 3),
        ("vit", "timm"): ("vit_base_patch16_224",
                          dict(norm_layer=partial(torch.nn.LayerNorm, eps=1e-12)), 3),
        ("dinov2", "timm"): ("vit_base_patch14_dinov2", dict(mlp_ratio=2), 3)}


def same(what, got, want):
    apart = (got - want).abs().max().item() / max(1, want.abs().max().item())
    print(f"  {what:<60}{apart:.1e} apart")
    assert got.shape == want.shape and apart < 1e-5, what


@torch.no_grad()
def main():
    root = Path(sys.argv[1])
    print(f"timm {timm.__version__}, open_clip {open_clip.__version__}")
    for (family, file), (name, more, depth) in TIMM.items():
        want = load_file(root / family / "expected.safetensors")
        model = timm.create_model(name, depth=depth, **{**TINY, "mlp_ratio": 1.5, **more}).eval()
        model.load_state_dict(load_file(root / family / f"{file}.safetensors"))
        normed = family in ("vit", "dinov2")
        layers = model.forward_intermediates(want["pixels"], indices=2, norm=normed,
                                             output_fmt="NLC", intermediates_only=True)
        features = layers[0] if file == "timm-full" else layers[1]
        same(f"{family}: {file}, {name}", features, want["features"])
    want = load_file(root / "clip/expected.safetensors")
    for file, depth in (("open_clip", 2), ("open_clip-full", 3)):
        visual = open_clip.transformer.VisionTransformer(
            image_size=32, patch_size=8, width=32, layers=depth, heads=2, mlp_ratio=1.5,
            output_dim=16, act_layer=open_clip.transformer.QuickGELU).eval()
        found = visual.load_state_dict(load_file(root / f"clip/{file}.safetensors"), strict=False)
        assert found.missing_keys == ["proj"] and not found.unexpected_keys, found
        layers = visual.forward_intermediates(want["pixels"], indices=2, output_fmt="NLC",
                                              intermediates_only=True)["image_intermediates"]
        features = layers[0] if file == "open_clip-full" else layers[1]
        same(f"clip: {file}, VisionTransformer", features, want["features"])


if __name__ == "__main__":
    main()
