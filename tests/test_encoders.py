"""Every family of vision encoder: counts from geometry, conversion by key, grid, round trip."""
import copy
import json
import math
import re

import pytest
import torch
import transformers as t
from safetensors.torch import save_file
from torch.nn import functional as F

import compat
from pivot import convert, encoders, model_io, published
from tools import meta
from conftest import COMMON, VISION, run
from test_stages import opens_in_transformers

CONV = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=96)
REGISTERS = {**VISION, "mlp_ratio": 2, "num_register_tokens": 4}
REGISTERS.pop("intermediate_size")
PLAIN = {k: v for k, v in REGISTERS.items() if k != "num_register_tokens"}
DECODER = dict(decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
               decoder_intermediate_size=16)
# name: (class that writes the checkpoint, its config, prefix tokens,
#        layer PAPER.md names, parameters no gradient reaches)
NORMS = ["post_layernorm.bias", "post_layernorm.weight"]
FAMILIES = {
    "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(**VISION), 0, "hidden_states[-2]", NORMS),
    "clip": (t.CLIPVisionModel, t.CLIPVisionConfig(**VISION), 1, "hidden_states[-2]", NORMS),
    "dinov2": (t.Dinov2Model, t.Dinov2Config(**PLAIN), 1,
               "last_hidden_state", ["embeddings.mask_token"]),
    "registers": (t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig(**REGISTERS), 5,
                  "last_hidden_state", ["embeddings.mask_token"]),
    "swiglu": (t.Dinov2Model, t.Dinov2Config(**PLAIN,
                                             use_swiglu_ffn=True), 1,
               "last_hidden_state", ["embeddings.mask_token"]),
    "mae": (t.ViTMAEForPreTraining, t.ViTMAEConfig(**VISION, **DECODER), 1, "last_hidden_state",
            []),
    "vit": (t.ViTModel, t.ViTConfig(**VISION), 1, "last_hidden_state", []),
    "convnext": (t.ConvNextModel, t.ConvNextConfig(**CONV, layer_scale_init_value=0.1), 0, "map",
                 ["layernorm.bias", "layernorm.weight"]),
}


def write_checkpoint(name, folder, noise=0.2, seed=0):
    """A tiny random checkpoint as transformers itself writes it; → the model."""
    torch.manual_seed(seed)
    kind, config, *_ = FAMILIES[name]
    vision = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for p in vision.parameters():
            p.add_(noise * torch.randn_like(p))
    vision.save_pretrained(folder)
    return vision


def theirs(name, vision, values):
    """The features as transformers computes them, at the layer PAPER.md names: (B, N, D)."""
    _, _, prefix, layer, _ = FAMILIES[name]
    if name == "mae":        # mask nothing, shuffle nothing: noise in ascending order
        vision.vit.config.mask_ratio = 0.0
        out = vision.vit(values, noise=torch.arange(16.).expand(len(values), -1))
    else:
        out = vision(values, output_hidden_states=True)
    if layer == "map":
        return torch.stack([out.last_hidden_state[:, :, r, c] for r in range(3) for c in range(3)],
                           1)
    out = out.hidden_states[-2] if layer == "hidden_states[-2]" else out.last_hidden_state
    return out[:, prefix:]


def pixels_for(encoder, count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *[encoder.image_size] * 2), dtype=torch.uint8,
                         generator=g)


def values_of(encoder, pixels):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    return (pixels.float() / 255 - mean) / std


# ------------------------------------------------------------------------ what the presets promise

def linear(a, b):
    return a * b + b


def block(d, mlp):
    """q, k, v, o with bias, two norms, two linears."""
    return 4 * linear(d, d) + 2 * 2 * d + linear(d, mlp) + linear(mlp, d)


def count(kind, d, depth, mlp, patch, size):
    """Parameters of the whole published vision class, from its geometry alone."""
    n, conv = (size // patch) ** 2, 3 * patch * patch * d
    if kind == "siglip":       # with bias; post-norm; head: probe, attention, norm, MLP
        head = d + 4 * linear(d, d) + 2 * d + linear(d, mlp) + linear(mlp, d)
        return conv + d + n * d + depth * block(d, mlp) + 2 * d + head
    if kind == "clip":         # conv without bias, CLS, pre- and post-norm
        return conv + d + (n + 1) * d + depth * block(d, mlp) + 2 * 2 * d
    if kind == "vit":
        return conv + d + d + (n + 1) * d + depth * block(d, mlp) + 2 * d
    if kind == "dinov2":       # two layer scales a block and a mask token
        each = block(d, mlp) + 2 * d
        if mlp < 4 * d:        # gated: three linears of `mlp` for two
            each += linear(d, mlp)
        return conv + d + d + d + (n + 1) * d + depth * each + 2 * d


def count_convnext(widths, depths):
    total = 3 * 16 * widths[0] + widths[0] + 2 * widths[0]
    for i, (d, depth) in enumerate(zip(widths, depths)):
        if i:
            total += 2 * widths[i - 1] + 4 * widths[i - 1] * d + d
        total += depth * (49 * d + d + 2 * d + linear(d, 4 * d) + linear(4 * d, d) + d)
    return total + 2 * widths[-1]


# preset: (kind, width, depth, MLP, patch, size), exact count as published, nominal, tokens. The
# nominal sizes are as their papers print them: "86M", "303M", "400M", "1B", to that many digits.
PUBLISHED = {
    "siglip2-base": (("siglip", 768, 12, 3072, 16, 384), 93_176_064, "86M", 576),
    "siglip2-large": (("siglip", 1024, 24, 4096, 16, 384), 316_283_904, "303M", 576),
    "siglip2-so400m": (("siglip", 1152, 27, 4304, 16, 384), 428_256_704, "4e8", 576),
    "siglip2-giant": (("siglip", 1536, 40, 6144, 16, 384), 1_163_659_776, "1e9", 576),
    "siglip1-base": (("siglip", 768, 12, 3072, 16, 384), 93_176_064, "86M", 576),
    "siglip1-so400m": (("siglip", 1152, 27, 4304, 14, 384), 428_225_600, "4e8", 729),
    "clip-large-224": (("clip", 1024, 24, 4096, 14, 224), 303_179_776, "303M", 256),
    "clip-large-336": (("clip", 1024, 24, 4096, 14, 336), 303_507_456, "303M", 576),
    "dinov2-small": (("dinov2", 384, 12, 1536, 14, 518), 22_056_576, "22M", 1369),
    "dinov2-base": (("dinov2", 768, 12, 3072, 14, 518), 86_580_480, "86M", 1369),
    "dinov2-large": (("dinov2", 1024, 24, 4096, 14, 518), 304_368_640, "304M", 1369),
    "dinov2-giant": (("dinov2", 1536, 40, 4096, 14, 518), 1_136_480_768, "1136M", 1369),
    "mae-large": (("vit", 1024, 24, 4096, 16, 224), 303_301_632, "304M", 196),
    "mae-huge": (("vit", 1280, 32, 5120, 14, 224), 630_764_800, "632M", 256),
    "moco-v3-base": (("vit", 768, 12, 3072, 16, 224), 85_798_656, "86M", 196),
    "vit-huge-in21k": (("vit", 1280, 32, 5120, 14, 224), 630_764_800, "632M", 256),
    "convnext-xxl": (None, 843_398_016, "846M", 576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name):
    """The count of the class built from the preset = a closed formula = the published figure; what
    is cut off is exactly one block and the pooling head; the grid is the paper's."""
    geometry, exact, nominal, tokens = PUBLISHED[name]
    vision = meta.whole_encoder(name)
    formula = count_convnext((384, 768, 1536, 3072), (3, 4, 30, 3)) if geometry is None else \
        count(*geometry)
    assert sum(p.numel() for p in vision.parameters()) == formula == exact
    assert all(p.is_meta for p in vision.parameters())
    kind, d, depth, mlp = (geometry or ("convnext", 0, 0, 0))[:4]
    head = d + 4 * linear(d, d) + 2 * d + linear(d, mlp) + linear(mlp, d) if kind == "siglip" else 0
    if nominal.endswith("M"):       # the head is no part of SigLIP's "86M", "303M"
        table = (384 // 16) ** 2 * d if kind == "siglip" else 0
        assert abs((formula - head - table) / (float(nominal[:-1]) * 1e6) - 1) < 0.02, name
    else:                           # "So400m", "1B": one digit is all their names claim
        assert float(f"{formula - head:.0e}") == float(nominal)

    encoder = meta.empty_encoder(name)
    cut = block(d, mlp) + head if kind in ("siglip", "clip") else 0
    assert sum(p.numel() for p in encoder.parameters()) == exact - cut
    assert encoder.num_tokens == tokens
    assert len(encoder.blocks) == (depth - (cut > 0) if kind != "convnext" else 40)
    with torch.device("meta"):
        out = encoder(torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8))
    assert out.shape == (1, tokens, encoder.hidden_size)


@pytest.mark.parametrize("name,exact", [("qwen2.5-0.5b", 494_032_768),
                                        ("qwen2.5-1.5b", 1_543_714_304),
                                        ("qwen2.5-3b", 3_085_938_688),
                                        ("qwen2.5-7b", 7_615_616_512),
                                        ("qwen3-0.6b", 596_049_920),
                                        ("qwen3-1.7b", 1_720_574_976),
                                        ("qwen3-4b", 4_022_468_096),
                                        ("qwen3-8b", 8_190_735_360),
                                        ("smollm2-135m", 134_515_008),
                                        ("smollm2-360m", 361_821_120),
                                        ("smollm2-1.7b", 1_711_376_384)])
def test_llm_presets_have_the_published_size(name, exact):
    kind, d, layers, heads, kv, mlp, rows, tied = encoders.LLMS[name].geometry
    head = 128 if kind == "qwen3" else d // heads
    q, k = heads * head, kv * head
    more = {"qwen2": q + 2 * k, "qwen3": 2 * head, "llama": 0}[kind]    # biases, or norms of q and k
    formula = rows * d * (1 if tied else 2) + d + layers * (
        2 * d * q + 2 * d * k + more + 3 * d * mlp + 2 * d)
    llm = meta.empty_llm(name)
    assert sum(p.numel() for p in llm.parameters()) == formula == exact
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied


# -------------------------------------------------------------------------------- every family

@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_transformers(name, tmp_path):
    """Load what transformers wrote: bit-equal features, and a card of what no gradient reaches."""
    vision = write_checkpoint(name, tmp_path)
    encoder = published.load_encoder(str(tmp_path)).eval()
    pixels = pixels_for(encoder)
    got = encoder(pixels)
    assert torch.equal(got, theirs(name, vision, values_of(encoder, pixels)))
    assert got.shape == (2, encoder.num_tokens, encoder.hidden_size)
    (got.double() * torch.randn(got.shape, dtype=torch.float64)).sum().backward()
    silent = sorted(n.removeprefix("vision.") for n, p in encoder.named_parameters()
                    if p.grad is None)
    assert silent == FAMILIES[name][4]
    dead = [n for n, p in encoder.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not dead, "a parameter with a zero gradient would be trained in name only"


@pytest.mark.parametrize("kind,config", [(t.SiglipModel, t.SiglipConfig),
                                         (t.CLIPModel, t.CLIPConfig)])
def test_the_published_pairs_of_encoders_are_read_too(tmp_path, kind, config):
    """SigLIP and CLIP are on the hub with their text encoder: keys vision_model.*, text_model.*."""
    torch.manual_seed(0)
    text = {k: VISION[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads")}
    whole = kind(config(vision_config=VISION, text_config={**text, "vocab_size": 99})).eval()
    whole.save_pretrained(tmp_path)
    encoder = published.load_encoder(str(tmp_path)).eval()
    pixels = pixels_for(encoder)
    theirs = whole.vision_model(values_of(encoder, pixels), output_hidden_states=True)
    assert torch.equal(encoder(pixels), theirs.hidden_states[-2][:, encoder.prefix:])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_is_in_reading_order(name, tmp_path):
    """Change one patch of the image: the feature that changes most is the one of that patch."""
    write_checkpoint(name, tmp_path, noise=0.02)
    encoder = published.load_encoder(str(tmp_path)).eval()
    grid, p = encoder.image_size // encoder.patch_size, encoder.patch_size
    image = pixels_for(encoder, 1)
    marked = image.repeat(grid ** 2, 1, 1, 1)
    for i in range(grid ** 2):
        row, column = divmod(i, grid)
        part = marked[i, :, row * p:(row + 1) * p, column * p:(column + 1) * p]
        part.copy_(255 - part)
    with torch.no_grad():
        change = (encoder(marked) - encoder(image)).norm(dim=-1)
    assert change.argmax(1).tolist() == list(range(grid ** 2))


def test_mae_as_transformers_runs_it_would_ruin_the_grid(tmp_path):
    """Why it is opened as a ViT: ViTMAEModel permutes the patches even when it masks none."""
    vision = write_checkpoint("mae", tmp_path).vit
    vision.config.mask_ratio = 0.0
    encoder = published.load_encoder(str(tmp_path)).eval()
    pixels = pixels_for(encoder)
    shuffled = vision(values_of(encoder, pixels)).last_hidden_state[:, 1:]
    ours = encoder(pixels)
    assert not torch.allclose(shuffled, ours, atol=1e-3)
    nearest = torch.cdist(ours, shuffled).argmin(-1)       # the same features in another order
    assert nearest.sort(-1).values.tolist() == [list(range(16))] * 2
    assert encoder.mean == encoders.IMAGENET_MEAN and type(encoder.vision) is t.ViTModel


@pytest.mark.parametrize("name", FAMILIES)
def test_the_round_trip(name, world, tmp_path):
    """Real scripts: checkpoint → stage 1 → one DPO step → final → extract → load again. The
    features stay those of transformers; the folder has every key it asks for; all blocks moved."""
    write_checkpoint(name, tmp_path / "published")
    common = ["--run", tmp_path / "r", "--data", world, *COMMON[2:], "--max-steps", 1]
    run("pretrain.py", "--encoder", tmp_path / "published", "--llm", "toy-lm", *common,
        "--projector-max-steps", 1)
    text = run("train_dpo.py", *common, "--lr", 1e-3, "--activation-checkpointing",
               *(["--dtype", "bf16"] if name == "convnext" else [])).stdout
    silent = FAMILIES[name][4]
    assert not silent or "frozen: " + ", ".join(f"vision.{n}" for n in silent) in text, text
    assert "loss 0.693147" in text
    done = run("extract.py", "--run", tmp_path / "r", "--stage", "dpo").stdout
    assert "bit-equal" in done
    folder = tmp_path / "r/dpo/encoder"

    trained = model_io.load_mllm(tmp_path / "r/dpo/final")[0].encoder.eval()
    told = re.findall(r"^  (?:\S+\.)?layers?\.\d+ ", done, re.M)       # each block by itself
    assert len(told) == len(trained.blocks), done
    again = published.load_encoder(str(folder)).eval()
    pixels = pixels_for(again)
    want = trained(pixels)
    assert torch.equal(again(pixels), want)
    original = published.load_encoder(str(tmp_path / "published")).eval()
    assert not torch.equal(original(pixels), want), "training did not reach the eye"

    kind = type(again.vision)                     # reopened by transformers alone, as the card says
    options = {k: v for k, v in encoders.class_options(again.vision.config).items()
               if k == "add_pooling_layer"}
    alone, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    out = alone.eval()(values_of(again, pixels), output_hidden_states=True)
    layer = FAMILIES[name][3]
    out = out.hidden_states[-1] if layer == "hidden_states[-2]" else out.last_hidden_state
    out = out.flatten(2).transpose(1, 2) if layer == "map" else out[:, FAMILIES[name][2]:]
    assert torch.equal(out, want)
    features = compat.run_card(folder)["features"]
    compat.same("the card's features", features, again(compat.squashed(again.image_size)))
    assert features.shape == (1, again.num_tokens, again.hidden_size)
    card = (folder / "README.md").read_text()
    assert ("would lose a trained one here" in " ".join(card.split())) == (name in ("siglip", "clip"))
    still = [n for n, p in trained.vision.named_parameters()
             if torch.equal(p, original.vision.get_parameter(n))]
    assert sorted(still) == silent


# ------------------------------------------------------------------ with the original's last block

def trained_run(run_dir, base, image_size=None):
    """RUN/pretrain as stage 1 leaves it, of an encoder whose every tensor was moved: → Encoder."""
    model, tokenizer = model_io.build_mllm(str(base), "toy-lm", 0, image_size)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.mul_(1.1 if p.requires_grad else 1)
    (run_dir / "pretrain/final").mkdir(parents=True)
    model_io.save_mllm(model, tokenizer, run_dir / "pretrain/final", True)
    (run_dir / "pretrain/config.json").write_text(json.dumps({"arguments": {
        "encoder": str(base), "llm": "toy-lm", "image_size": image_size}}))
    return model.encoder.eval()


def extract(run_dir, *words, check=True):
    return run("extract.py", "--run-dir", run_dir, "--stage", "pretrain", *words, check=check)


@pytest.mark.parametrize("name,size", [("siglip", None), ("clip", 48)])
def test_full_is_the_original_with_trained_blocks(name, size, tmp_path):
    """--full: hidden_states[-2] of the plain class is bit-equal to the trained features, and so is
    hidden_states[-1] after a tool has deleted the last block; what was put back is the original's;
    opened here it is truncated again."""
    original = write_checkpoint(name, tmp_path / "published")
    encoder = trained_run(tmp_path / "r", tmp_path / "published", size)
    assert "features bit-equal" in extract(tmp_path / "r", "--full").stdout
    folder = tmp_path / "r/pretrain/encoder-full"
    pixels = pixels_for(encoder)
    values, want = values_of(encoder, pixels), encoder(pixels)
    whole, info = type(original).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    states = whole.eval()(values, output_hidden_states=True).hidden_states
    assert len(states) == 4 and torch.equal(states[-2][:, encoder.prefix:], want)
    back = [n for n, p in whole.named_parameters() if n.startswith(("encoder.layers.2", "post_", "head"))]
    assert any("head" in n for n in back) == (name == "siglip")
    for n, p in whole.named_parameters():
        same = p.shape == original.get_parameter(n).shape and torch.equal(p, original.get_parameter(n))
        assert same == (n in back), n
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and "pivot_feature_layer" not in config
    assert config.get("vision_use_head", True)
    again = published.load_encoder(str(folder)).eval()
    assert len(again.blocks) == 2 and torch.equal(again(pixels), want)
    features = compat.run_card(folder)["features"]
    compat.same("the card's", features, encoder(compat.squashed(encoder.image_size)))
    assert "leave out the last block by themselves" in (folder / "README.md").read_text()
    del whole.encoder.layers[-1:]                                 # as LLaVA-NeXT's SigLIP tower does
    states = whole(values, output_hidden_states=True).hidden_states
    assert torch.equal(states[-1][:, encoder.prefix:], want)


def test_full_and_not_full_are_never_taken_for_one_another(tmp_path):
    write_checkpoint("siglip", tmp_path / "published")
    encoder = trained_run(tmp_path / "r", tmp_path / "published")
    extract(tmp_path / "r")
    extract(tmp_path / "r", "--full")
    assert "already there" in extract(tmp_path / "r", "--full").stdout
    said = extract(tmp_path / "r", "--full", "--out", tmp_path / "r/pretrain/encoder", check=False)
    assert "or that one without --full; --overwrite replaces it" in said.stderr
    # an encoder that lost its block before this run began has none to put back; a full one has
    for base, words in (("encoder", "which has no block behind the features"),
                        ("encoder-full", None)):
        trained_run(tmp_path / base, tmp_path / "r/pretrain" / base)
        done = extract(tmp_path / base, "--full", check=not words)
        assert words is None or words in done.stderr.splitlines()[-1]
    again = published.load_encoder(str(tmp_path / "encoder-full/pretrain/encoder-full"))
    assert len(again.blocks) == len(encoder.blocks)


@pytest.mark.parametrize("name", ["dinov2", "vit", "convnext"])
def test_full_of_a_family_that_lost_no_block_is_refused(name, tmp_path):
    write_checkpoint(name, tmp_path / "published")
    trained_run(tmp_path / "r", tmp_path / "published")
    said = extract(tmp_path / "r", "--full", check=False)
    assert said.stderr.splitlines()[-1].startswith("error: --full: no block of a")
    assert not (tmp_path / "r/pretrain/encoder-full").exists()


# -------------------------------------------------------------------------------- final/

@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_final_of_siglip_and_clip_opens_in_transformers(name, tmp_path):
    write_checkpoint(name, tmp_path / "eye")
    model, tokenizer = model_io.build_mllm(str(tmp_path / "eye"), "toy-lm", 0)
    (tmp_path / "final").mkdir()
    model_io.save_mllm(model, tokenizer, tmp_path / "final", True)
    opens_in_transformers(tmp_path / "final", 32)


@pytest.mark.parametrize("name", ["dinov2", "mae", "convnext"])
def test_final_of_the_others_does_not_open_as_something_else(name, tmp_path):
    """LLaVA's class cannot say "after the final norm": it refuses, lest it read another layer."""
    write_checkpoint(name, tmp_path / "eye")
    model, tokenizer = model_io.build_mllm(str(tmp_path / "eye"), "toy-lm", 0)
    (tmp_path / "final").mkdir()
    model_io.save_mllm(model, tokenizer, tmp_path / "final", True)
    with pytest.raises(ValueError, match="pivot_normed_features"):
        t.AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    again, _ = model_io.load_mllm(tmp_path / "final")
    pixels = pixels_for(again.encoder)
    assert torch.equal(again.encoder.eval()(pixels), model.encoder.eval()(pixels))


# -------------------------------------------------------------------------------- by key

def timm_state(d=192, depth=2, patch=8, grid=4, seed=0):
    """timm's ViT, tensor by tensor, under its own names."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape):
        return 0.1 * torch.randn(*shape, generator=g)
    state = {"cls_token": new(1, 1, d), "pos_embed": new(1, grid ** 2 + 1, d),
             "patch_embed.proj.weight": new(d, 3, patch, patch), "patch_embed.proj.bias": new(d),
             "norm.weight": new(d), "norm.bias": new(d)}
    for i in range(depth):
        for key, shape in (("norm1.weight", (d,)), ("norm1.bias", (d,)), ("norm2.weight", (d,)),
                           ("norm2.bias", (d,)), ("attn.qkv.weight", (3 * d, d)),
                           ("attn.qkv.bias", (3 * d,)), ("attn.proj.weight", (d, d)),
                           ("attn.proj.bias", (d,)), ("mlp.fc1.weight", (4 * d, d)),
                           ("mlp.fc1.bias", (4 * d,)), ("mlp.fc2.weight", (d, 4 * d)),
                           ("mlp.fc2.bias", (d,))):
            state[f"blocks.{i}.{key}"] = new(*shape)
    return state


def timm_forward(s, x, heads, depth=2, patch=8, eps=1e-6, act=F.gelu, normed=True):
    """timm's forward_features, from its source, in the plainest words: the patches, after its norm
    or before it."""
    x = F.conv2d(x, s["patch_embed.proj.weight"], s.get("patch_embed.proj.bias"), stride=patch)
    x = x.flatten(2).transpose(1, 2)
    b, _, d = x.shape
    prefix = int("cls_token" in s)
    if prefix:
        x = torch.cat([s["cls_token"].expand(b, -1, -1), x], 1)
    x, n = x + s["pos_embed"], s["pos_embed"].shape[1]
    if "norm_pre.weight" in s:
        x = F.layer_norm(x, (d,), s["norm_pre.weight"], s["norm_pre.bias"], eps)
    for i in range(depth):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in s.items()}
        y = F.layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], eps)
        qkv = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) / math.sqrt(d // heads)).softmax(-1) @ v
        x = x + w.get("ls1.gamma", 1) * F.linear(
            a.transpose(1, 2).reshape(b, n, d), w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], eps)
        y = act(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w.get("ls2.gamma", 1) * F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = F.layer_norm(x, (d,), s["norm.weight"], s["norm.bias"], eps) if normed else x
    return x[:, prefix:]


def moco_checkpoint(state, other):
    """As MoCo v3 wrote it: both encoders, heads of three layers, an optimizer."""
    head = {"head.0.weight": torch.randn(4, 192), "head.1.weight": torch.randn(4),
            "head.1.num_batches_tracked": torch.tensor(3)}
    return {"epoch": 300, "arch": "vit_base", "optimizer": {"state": {}, "param_groups": []},
            "state_dict": {**{f"module.momentum_encoder.{k}": v for k, v in other.items()},
                           **{f"module.base_encoder.{k}": v for k, v in {**state, **head}.items()},
                           "module.predictor.0.weight": torch.randn(4, 4)}}


def test_moco_v3_as_it_was_published(tmp_path):
    """The .pth.tar: the trained encoder, not its momentum twin; q, k and v taken apart; ImageNet
    statistics; and the features of timm's own forward."""
    state, file = timm_state(), tmp_path / "vit-b-300ep.pth.tar"
    torch.save(moco_checkpoint(state, timm_state(seed=1)), file)
    encoder = published.load_encoder(str(file)).eval()
    pixels = pixels_for(encoder)
    want = timm_forward(state, values_of(encoder, pixels), heads=3)
    assert (encoder(pixels) - want).abs().max() < 1e-5
    assert encoder.mean == encoders.IMAGENET_MEAN and encoder.image_size == 32
    assert convert.MOCO_HEADS[384] == 12 and convert.HEADS[384] == 6


def test_moco_not_downloaded_yet_says_from_where(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"download {encoders.MOCO_URL} to {tmp_path}/weights/"):
        published.load_encoder("moco-v3-base")
    (tmp_path / "weights").mkdir()
    torch.save(moco_checkpoint(timm_state(), timm_state(seed=1)),
               tmp_path / "weights/vit-b-300ep.pth.tar")
    encoder = published.load_encoder("moco-v3-base")             # at its preset's 224 pixels
    assert encoder.num_tokens == 28 ** 2 and encoder.mean == encoders.IMAGENET_MEAN


def test_a_timm_folder(tmp_path):
    state = timm_state()
    save_file({**state, "head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch8_32", "pretrained_cfg": {"mean": [0.5, 0.5, 0.4],
                                                                 "std": [0.5, 0.5, 0.6]}}))
    encoder = published.load_encoder(str(tmp_path)).eval()
    assert (encoder.mean, encoder.std) == ((0.5, 0.5, 0.4), (0.5, 0.5, 0.6))     # the file's own
    pixels = pixels_for(encoder)
    want = timm_forward(state, values_of(encoder, pixels), heads=3)
    assert (encoder(pixels) - want).abs().max() < 1e-5


def shapes(encoder):
    return {k: v.shape for k, v in encoder.state_dict().items()}, encoder.num_tokens


def test_other_layouts_are_planned_from_the_header_alone(tmp_path, monkeypatch):
    """timm and MoCo files: the same model on the meta device, without numbers, and it runs there;
    the MoCo preset needs no file at all; a folder with no weights is refused in one line."""
    state = timm_state()
    torch.save(moco_checkpoint(state, state), tmp_path / "moco.pth.tar")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/config.json").write_text(json.dumps({"architecture": "vit_tiny_patch8_32"}))
    with pytest.raises(SystemExit, match="without its weights, whose shapes say"):
        meta.empty_encoder(str(tmp_path / "timm"))
    save_file(state, tmp_path / "timm/model.safetensors")
    for name in ("moco.pth.tar", "timm"):
        real = shapes(published.load_encoder(str(tmp_path / name), 48))
        empty = meta.empty_encoder(str(tmp_path / name), 48)
        assert shapes(empty) == real and {p.device.type for p in empty.parameters()} == {"meta"}
        assert empty(torch.zeros(1, 3, 48, 48, dtype=torch.uint8, device="meta")).shape[1] == 36
        row = meta.trace(meta.empty_mllm(str(tmp_path / name), "toy-lm"), 40, 5, 0, "answers")
        assert row.forward > 0 and len(row.blocks) == 2 + 6
    monkeypatch.setattr(encoders, "ROOT", tmp_path)
    assert meta.empty_encoder("moco-v3-base").num_tokens == 196


@pytest.mark.parametrize("spoil,words", [
    (lambda s: s.pop("blocks.1.norm2.bias"), "lacks tensor layers.1.layernorm_after.bias"),
    (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(192)}), "unknown tensor blocks.0.ls1"),
    (lambda s: s.update({"norm.bias": torch.ones(7)}), "another shape .* tensor layernorm.bias"),
    (lambda s: s.pop("cls_token"), "none of the layouts"),
])
def test_a_file_that_is_nearly_right_is_refused(tmp_path, spoil, words):
    state = timm_state()
    spoil(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=words):
        published.load_encoder(str(tmp_path / "x.pth"))


def test_no_code_runs_from_a_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)
    torch.save({"state_dict": timm_state(), "args": Evil()}, tmp_path / "x.pth.tar")
    with pytest.raises(SystemExit, match="cannot read"):
        published.load_encoder(str(tmp_path / "x.pth.tar"))
    assert not (tmp_path / "ran").exists()


def timm_convnext_names(key):
    """transformers' name → timm's: written the other way round, to check convert.py's table."""
    for a, b in (("embeddings.patch_embeddings.", "stem.0."), ("embeddings.layernorm.", "stem.1."),
                 ("encoder.stages.", "stages."), (".downsampling_layer.", ".downsample."),
                 (".layers.", ".blocks."), (".dwconv.", ".conv_dw."), (".layernorm.", ".norm."),
                 (".pwconv1.", ".mlp.fc1."), (".pwconv2.", ".mlp.fc2."),
                 (".layer_scale_parameter", ".gamma")):
        key = key.replace(a, b)
    return "head.norm." + key[10:] if key.startswith("layernorm.") else key


def test_open_clip_convnext(tmp_path):
    """visual.trunk.… with the text tower beside it: the map before the head's norm, CLIP's mean."""
    vision = write_checkpoint("convnext", tmp_path / "hf")
    state = {"visual.trunk." + timm_convnext_names(k): v for k, v in vision.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.zeros(4, 32), "logit_scale": torch.zeros(()),
              "token_embedding.weight": torch.zeros(9, 4)}
    (tmp_path / "oc").mkdir()
    torch.save(state, tmp_path / "oc/open_clip_pytorch_model.bin")
    (tmp_path / "oc/open_clip_config.json").write_text(json.dumps(
        {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_x", "image_size": 96}},
         "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}}))
    encoder = published.load_encoder(str(tmp_path / "oc")).eval()
    assert encoder.mean == (0.5, 0.4, 0.3)
    pixels = pixels_for(encoder)
    assert torch.equal(encoder(pixels), theirs("convnext", vision, values_of(encoder, pixels)))
    assert published.load_encoder(str(tmp_path / "oc"), 160).num_tokens == 25
    assert shapes(meta.empty_encoder(str(tmp_path / "oc"))) == shapes(encoder)


def test_convnext_xxl_norms_have_its_own_eps(tmp_path):
    """timm gives the XXL 1e-5 where the class hard-codes 1e-6; saved and reopened it stays."""
    vision = meta.whole_encoder("convnext-xxl")
    state = {timm_convnext_names(k): v for k, v in vision.state_dict().items()}
    config, names = convert.timm_convnext(state, {})
    assert config.depths == [3, 4, 30, 3] and config.pivot_norm_eps == 1e-5
    with torch.device("meta"):
        encoder = encoders.Encoder(convert.fill(config, state, names, "x"), *encoders.IMAGENET)
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    config.save_pretrained(tmp_path)
    assert t.AutoConfig.from_pretrained(tmp_path).pivot_norm_eps == 1e-5


def test_open_clip_vit(tmp_path):
    """Its own VisionTransformer, against a forward with torch's MultiheadAttention."""
    torch.manual_seed(0)
    d, n = 128, 16
    state = {"class_embedding": torch.randn(d), "positional_embedding": torch.randn(n + 1, d),
             "conv1.weight": 0.1 * torch.randn(d, 3, 8, 8), "proj": torch.randn(d, 5)}
    for norm in ("ln_pre", "ln_post"):
        state |= {f"{norm}.weight": torch.randn(d), f"{norm}.bias": torch.randn(d)}
    blocks = [torch.nn.ModuleDict({
        "ln_1": torch.nn.LayerNorm(d), "attn": torch.nn.MultiheadAttention(d, 2, batch_first=True),
        "ln_2": torch.nn.LayerNorm(d), "mlp": torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(d, 4 * d), "c_proj": torch.nn.Linear(4 * d, d)})})
        for _ in range(3)]
    for i, b in enumerate(blocks):
        state |= {f"transformer.resblocks.{i}.{k}": v for k, v in b.state_dict().items()}
    torch.save({**{f"visual.{k}": v for k, v in state.items()}, "logit_scale": torch.zeros(())},
               tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "quick_gelu": False, "vision_cfg": {"image_size": 32, "layers": 3, "width": d,
                                            "patch_size": 8}}}))
    encoder = published.load_encoder(str(tmp_path)).eval()
    assert shapes(meta.empty_encoder(str(tmp_path))) == shapes(encoder)
    pixels = pixels_for(encoder)
    want = open_clip_forward(state, values_of(encoder, pixels), blocks[:-1])   # the last is deleted
    assert (encoder(pixels) - want).abs().max() < 1e-4
    assert encoder.mean == encoders.CLIP_MEAN


def open_clip_forward(state, x, blocks):
    """open_clip's VisionTransformer up to its last block, with torch's MultiheadAttention."""
    d = len(state["class_embedding"])
    x = F.conv2d(x, state["conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(2, 1, -1), x], 1) + state["positional_embedding"]
    x = F.layer_norm(x, (d,), state["ln_pre.weight"], state["ln_pre.bias"])
    for b in blocks:
        y = b["ln_1"](x)
        x = x + b["attn"](y, y, y, need_weights=False)[0]
        x = x + b["mlp"]["c_proj"](F.gelu(b["mlp"]["c_fc"](b["ln_2"](x))))
    return x[:, 1:]


# -------------------------------------------------------------------------------- the way back

@pytest.mark.parametrize("name", ["vit", "mae", "siglip", "siglip full", "clip", "dinov2"])
def test_the_way_back_to_timm(name, tmp_path):
    """Under timm's names, timm's own forward (written out above) gives the same features. The real
    timm was asked, too: tests/libraries.py."""
    name, full = name.split()[0], name.endswith("full")
    write_checkpoint(name, tmp_path)
    encoder = published.load_encoder(str(tmp_path)).eval()
    vision = published.load_vision(str(tmp_path))[0] if full else encoder.vision
    state = convert.to_timm(vision)
    config = encoder.vision.config
    options = {"act": lambda x: F.gelu(x, approximate="tanh")} if name == "siglip" else \
        {"act": lambda x: x * torch.sigmoid(1.702 * x)} if name == "clip" else {}
    pixels = pixels_for(encoder)
    got = timm_forward(state, values_of(encoder, pixels), heads=2, depth=len(encoder.blocks),
                       eps=config.layer_norm_eps, normed=encoder.family.read == "norm", **options)
    compat.same(name, got, encoder(pixels))
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    assert depth == len(encoder.blocks) + full and full == any("attn_pool" in key for key in state)


def test_the_way_back_to_timm_and_in_again(tmp_path):
    """timm's file → ours → timm's: the same names, the same numbers."""
    state = timm_state()
    torch.save(state, tmp_path / "x.pth")
    back = convert.to_timm(published.load_encoder(str(tmp_path / "x.pth")).vision)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_siglips_pooling_has_timms_names_and_shapes(tmp_path):
    """What timm 1.0.31 lists for vit_base_patch16_siglip_384 made this small."""
    write_checkpoint("siglip", tmp_path)
    vision = published.load_vision(str(tmp_path))[0]
    state, d, mlp = convert.to_timm(vision), 32, 48
    pool = {"latent": (1, 1, d), "q.weight": (d, d), "q.bias": (d,), "kv.weight": (2 * d, d),
            "kv.bias": (2 * d,), "proj.weight": (d, d), "proj.bias": (d,), "norm.weight": (d,),
            "norm.bias": (d,), "mlp.fc1.weight": (mlp, d), "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (d, mlp), "mlp.fc2.bias": (d,)}
    assert {k[10:]: tuple(v.shape) for k, v in state.items() if "attn_pool" in k} == pool
    fused = vision.head.attention.in_proj_weight
    assert torch.equal(fused, torch.cat([state["attn_pool.q.weight"], state["attn_pool.kv.weight"]]))
    assert state["pos_embed"].shape == (1, 16, d) and "cls_token" not in state


def test_the_way_back_to_open_clip(tmp_path):
    """Under open_clip's names; in again by convert.load, which knows nothing of the table: equal."""
    write_checkpoint("clip", tmp_path / "hf")
    vision = published.load_vision(str(tmp_path / "hf"))[0]
    state = convert.to_open_clip(vision)
    (tmp_path / "oc").mkdir()
    save_file({f"visual.{k}": v.contiguous() for k, v in state.items()},
              tmp_path / "oc/open_clip_model.safetensors")
    (tmp_path / "oc/open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size":
                                           8, "head_width": 16, "mlp_ratio": 1.5}}}))
    a, b = (published.load_encoder(str(tmp_path / x)).eval() for x in ("hf", "oc"))
    pixels = pixels_for(a)
    assert torch.equal(a(pixels), b(pixels))
    again = published.load_vision(str(tmp_path / "oc"))[0].state_dict()
    assert all(torch.equal(again[k], v) for k, v in vision.state_dict().items())
    assert state["transformer.resblocks.2.attn.in_proj_weight"].shape == (96, 32)


def test_other_libraries_names_are_refused_where_they_are_not_known(tmp_path):
    for name in ("swiglu", "convnext"):
        write_checkpoint(name, tmp_path / name)
        with pytest.raises(SystemExit, match="^error: timm's names of a .* are not known here"):
            convert.to_timm(published.load_encoder(str(tmp_path / name)).vision)
    write_checkpoint("siglip", tmp_path / "siglip")
    with pytest.raises(SystemExit, match="^error: open_clip's names of a siglip_vision_model"):
        convert.to_open_clip(published.load_encoder(str(tmp_path / "siglip")).vision)


# -------------------------------------------------------------------------------- other sizes

@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2", "registers"])
@pytest.mark.parametrize("size", [48, 24])
def test_another_input_size_interpolates_as_transformers_does(name, tmp_path, size):
    vision = write_checkpoint(name, tmp_path / "a")
    encoder = published.load_encoder(str(tmp_path / "a"), size).eval()
    pixels = pixels_for(encoder)
    assert pixels.shape[-1] == size and encoder.num_tokens == (size // 8) ** 2
    option = {"interpolate_pos_encoding": True} if "Dinov2" not in type(vision).__name__ else {}
    out = vision(values_of(encoder, pixels), output_hidden_states=True, **option)
    _, _, prefix, layer, _ = FAMILIES[name]
    out = out.hidden_states[-2] if layer == "hidden_states[-2]" else out.last_hidden_state
    assert torch.equal(encoder(pixels), out[:, prefix:])
    encoder.vision.save_pretrained(tmp_path / "b")          # now a plain model of that size
    again = published.load_encoder(str(tmp_path / "b")).eval()
    assert again.image_size == size and torch.equal(again(pixels), encoder(pixels))


def test_an_input_size_between_patches_is_refused(tmp_path):
    write_checkpoint("siglip", tmp_path)
    with pytest.raises(SystemExit, match="--image-size 50 is no multiple of the patch size 8; the "
                                         "nearest is 48"):
        published.load_encoder(str(tmp_path), 50)


def test_image_size_goes_through_the_stages(world, tmp_path):
    """Asked for once in stage 1, inherited by DPO, known to extract, held by the folder."""
    write_checkpoint("vit", tmp_path / "vit")
    common = ["--run", tmp_path / "r", "--data", world, *COMMON[2:], "--max-steps", 1]
    run("pretrain.py", "--encoder", tmp_path / "vit", "--llm", "toy-lm", *common,
        "--projector-max-steps", 1, "--image-size", 48)
    text = run("train_dpo.py", *common, "--lr", 1e-3).stdout
    assert "--image-size 48 (inherited from pretrain)" in text and "image = 36 tokens" in text
    run("extract.py", "--run", tmp_path / "r", "--stage", "dpo")
    assert published.load_encoder(str(tmp_path / "r/dpo/encoder")).num_tokens == 36
    refused = run("train_dpo.py", *common, "--image-size", 32, check=False)
    assert "was made with --image-size 48, not 32" in refused.stderr


# -------------------------------------------------------------------------------- anything else

OTHERS = {
    "deit": (t.DeiTModel, t.DeiTConfig(**VISION), 2),
    "vit_msn": (t.ViTMSNModel, t.ViTMSNConfig(**VISION), 1),
    "ijepa": (t.IJepaModel, t.IJepaConfig(**VISION), 0),
    "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**VISION, num_register_tokens=4), 5),
    "beit": (t.BeitModel, t.BeitConfig(**VISION, use_absolute_position_embeddings=True), 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_vit_of_transformers(name, tmp_path):
    """No row in the table: prefix and idle parameters are found on the meta device."""
    kind, config, prefix = OTHERS[name]
    torch.manual_seed(0)
    vision = kind(config).eval()
    vision.save_pretrained(tmp_path)
    encoder = published.load_encoder(str(tmp_path)).eval()
    pixels = pixels_for(encoder)
    want = vision(values_of(encoder, pixels)).last_hidden_state[:, prefix:]
    assert encoder.prefix == prefix and torch.equal(encoder(pixels), want)
    encoder(pixels).square().sum().backward()
    for key, p in encoder.named_parameters():
        assert (p.grad is None) == (not p.requires_grad), key


@pytest.mark.parametrize("kind,config,words", [
    (t.SwinModel, t.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], image_size=32,
                               patch_size=4, window_size=2), "not 8 × 8 patches"),
    (t.YolosModel, t.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=10),
     "not 4 × 4 patches"),
    (t.ResNetModel, t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
     "not a vision encoder with patches"),
    (t.Siglip2VisionModel, t.Siglip2VisionConfig(**{k: v for k, v in VISION.items()
                                                    if k != "image_size"}),
     "not a vision encoder with patches"),
    (t.PixtralVisionModel, t.PixtralVisionConfig(**{k: v for k, v in VISION.items()}),
     r"\(1, 32, 32\) comes out of two images"),
    (t.HieraModel, t.HieraConfig(embed_dim=8, image_size=[32, 32], patch_stride=[4, 4],
                                 depths=[1, 1, 1, 1]), "comes out of two images"),
    (t.BertModel, t.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=8), "is a bert"),
])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, kind, config, words):
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=words) as e:
        published.load_encoder(str(tmp_path))
    assert len(str(e.value).splitlines()) == 1 and str(e.value).startswith("error: --encoder")


# ------------------------------------------------------------------------------ mean and std

@pytest.mark.parametrize("file,facts,mean,std", [
    ("processor_config.json", {"image_processor": {"image_mean": [0.48, 0.45, 0.40],
                                                   "image_std": [0.26, 0.26, 0.27]}},
     (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)),                    # all that transformers 5 writes
    ("preprocessor_config.json", {"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),
    ("preprocessor_config.json", {"do_normalize": False, "image_mean": 0.5}, (0.,) * 3, (1.,) * 3),
    ("processor_config.json", {"processor_class": "SiglipProcessor"}, encoders.HALF, encoders.HALF),
    (None, None, encoders.HALF, encoders.HALF),
])
def test_mean_and_std_are_the_processors(tmp_path, capsys, file, facts, mean, std):
    t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)).save_pretrained(tmp_path)
    if file:
        (tmp_path / file).write_text(json.dumps(facts))
    encoder = published.load_encoder(str(tmp_path))
    assert (encoder.mean, encoder.std) == (mean, std)
    unsaid = "no file names its pixels' mean" in capsys.readouterr().out
    assert unsaid == (file is None or "processor_class" in facts)


@pytest.mark.parametrize("facts,scale", [
    ({"rescale_factor": 1 / 127.5}, "0.0078"), ({"do_rescale": False}, "1"),
    ({"do_rescale": False, "rescale_factor": None}, "1"), ({"rescale_factor": None}, None)])
def test_pixels_of_another_scale_are_refused(tmp_path, facts, scale):
    t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {**facts, "image_mean": 0.5, "image_std": 0.5}))
    if scale is None:
        assert published.load_encoder(str(tmp_path)).mean == encoders.HALF
        return
    with pytest.raises(SystemExit, match=f"scales pixels by {scale}.*; only 1/255 is known here"):
        published.load_encoder(str(tmp_path))


# ---------------------------------------------------------------------------- drop path, refusals

def test_drop_path_is_switched_off(tmp_path, capsys):
    """It is random in training and nothing in inference: without it the same features."""
    torch.manual_seed(0)
    vision = t.BeitModel(t.BeitConfig(**VISION, use_absolute_position_embeddings=True,
                                      drop_path_rate=0.3))
    vision.save_pretrained(tmp_path)
    encoder = published.refuse_dropout(published.load_encoder(str(tmp_path))).train()
    assert "asks for drop path (0.3); it is switched off" in capsys.readouterr().out
    pixels = pixels_for(encoder)
    want = vision.eval()(values_of(encoder, pixels)).last_hidden_state[:, 1:]
    assert torch.equal(encoder(pixels), want) and encoder.vision.config.drop_path_rate == 0
