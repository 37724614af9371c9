"""What comes out opens elsewhere, or refuses by name (invariant 9): every family walked through the
real commands. What is written stays in .pytest_cache/opens for `make compat`.

load → two steps of stage 1 and of DPO → final/ → extract → load again → both probes.
"""
import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

import compat
import model as m
from conftest import COMMON, ROOT, run
from pivot import convert, encoders, model_io, published, tensors
from pivot.records import frame_of, user_turn
from test_llms import folder_of
import test_parent

OUT = ROOT / ".pytest_cache" / "opens"
TABLE = json.loads((ROOT / "tests/opens.json").read_text())
SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
             image_size=32, patch_size=8)
WITHOUT = {"add_pooling_layer": False}


def models():
    """{family: (class, config, options of the class)}: a tiny random model of each."""
    more = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    return {
        "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(**SHAPE), {}),
        "clip": (t.CLIPVisionModel, t.CLIPVisionConfig(**SHAPE), {}),
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**more, mlp_ratio=2), {}),
        "dinov2_with_registers": (t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig(
            **more, mlp_ratio=2, num_register_tokens=3), {}),
        "vit": (t.ViTModel, t.ViTConfig(**SHAPE), WITHOUT),
        "deit": (t.DeiTModel, t.DeiTConfig(**SHAPE), WITHOUT),
        "vit_msn": (t.ViTMSNModel, t.ViTMSNConfig(**SHAPE), {}),
        "ijepa": (t.IJepaModel, t.IJepaConfig(**SHAPE), WITHOUT),
        "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**SHAPE, num_register_tokens=2), {}),
        "aimv2": (t.Aimv2VisionModel, t.Aimv2VisionConfig(**SHAPE, use_head=False), {}),
        "mlcd": (t.MLCDVisionModel, t.MLCDVisionConfig(**SHAPE, num_key_value_groups=1), {}),
        "metaclip_2": (t.MetaClip2VisionModel, t.MetaClip2VisionConfig(**SHAPE), {}),
        "chinese_clip": (t.ChineseCLIPVisionModel, t.ChineseCLIPVisionConfig(**SHAPE), {}),
        "beit": (t.BeitModel, t.BeitConfig(**SHAPE, use_absolute_position_embeddings=True,
                                           drop_path_rate=0.1), WITHOUT),
        "internvl": (t.InternVLVisionModel, t.InternVLVisionConfig(
            **SHAPE, use_absolute_position_embeddings=True), {})}


@pytest.fixture(scope="session")
def few_classes(world, tmp_path_factory):
    """Two classes of pictures, sorted as ImageNet's are."""
    out = tmp_path_factory.mktemp("few")
    for i, path in enumerate(sorted((world / "images/captions").glob("*.png"))[:12]):
        folder = out / ("val" if i < 4 else "train") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return out


@pytest.mark.parametrize("name", TABLE)
def test_every_family_comes_out_as_it_was_trained(name, world, few_classes, tmp_path):
    """NAME is an encoder's family, siglip-KIND with another LLM than the toy's, or published-KIND:
    a model that tools.parent brought in, in the place of stage 1."""
    family, _, other = name.partition("-")
    folder, tiny = tmp_path / "run", ["--run-dir", tmp_path / "run", "--data", world, *COMMON[2:]]
    if family == "published":
        test_parent.bring(test_parent.source(other, tmp_path / other), folder)
    else:
        kind, config, options = models()[family]
        torch.manual_seed(0)
        kind(config, **options).save_pretrained(tmp_path / family)
        llm = folder_of(other, tmp_path / other) if other else "toy-lm"
        run("pretrain.py", "--encoder", tmp_path / family, "--llm", llm, *tiny,
            "--projector-max-steps", 1, "--max-steps", 1)
    run("train_dpo.py", *tiny, "--max-steps", 1, "--num-samples", 8, "--lr", 1e-3)
    said = run("extract.py", "--run-dir", folder, "--stage", "dpo").stdout
    assert "features bit-equal" in said
    run("probe_seg.py", "--encoder", folder / "dpo/encoder", "--data", world / "ade20k", "--seeds",
        1, "--epochs", 1, "--limit", 4, "--workers", 0)
    run("probe_linear.py", "--encoder", folder / "dpo/encoder", "--data", few_classes, "--limit", 2,
        "--workers", 0)
    if "encoder-full" in TABLE[name]:
        assert "features bit-equal" in run("extract.py", "--run-dir", folder, "--full").stdout
    keep(name, folder / "dpo")
    facts = json.loads((OUT / name / "facts.json").read_text())
    want = compat.load_file(OUT / name / "expected.safetensors")
    for what, versions in TABLE[name].items():
        said = compat.outcome(compat.CHECKS[what], OUT / name / what, facts, want)
        stated = versions["5"]
        assert said == stated or (stated != "opens" and stated in said), (what, said)


def ids_of(question, model, tokenizer):
    """The prompt that our code makes of a question about a picture: (1, T)."""
    ids = tokenizer(user_turn(question, True, frame=frame_of(tokenizer)))["input_ids"]
    n = model.encoder.num_tokens
    at = ids.index(model.image_token_id)
    return torch.tensor([ids[:at] + [model.image_token_id] * n + ids[at + 1:]])


@torch.no_grad()
def keep(name, stage):
    """Copy encoder/, encoder-full/ and final/ to OUT/NAME, with what they give here."""
    shutil.rmtree(OUT / name, ignore_errors=True)
    for what in TABLE[name]:
        shutil.copytree(stage / what, OUT / name / what)
    model, tokenizer = model_io.load_mllm(stage / "final")
    encoder = model.eval().encoder
    raw = compat.squashed(encoder.image_size)
    processor = model_io.image_processor(encoder)
    ids = ids_of("What shape is it?", model, tokenizer)
    hidden = model.llm.base_model(inputs_embeds=model.embed(raw, ids)).last_hidden_state
    logits = m.logits_of(model.llm, hidden)
    save_file({"pixels": processor(compat.picture(), return_tensors="pt")["pixel_values"],
               "features": encoder(raw).contiguous(), "input_ids": ids,
               "logits": logits},
              OUT / name / "expected.safetensors")
    ids = ids_of("What is in the picture?", model, tokenizer)
    answer = model.generate(raw, ids, torch.ones_like(ids), 64, model_io.stop_ids(tokenizer))[0]
    options = encoders.class_options(encoder.vision.config)
    options.pop("attn_implementation")
    if name in ("siglip", "clip", "vit", "dinov2"):            # for tests/libraries.py
        others = {"": encoder.vision}
        if "encoder-full" in TABLE[name]:
            others["-full"] = published.load_vision(str(stage / "encoder-full"))[0]
        for full, vision in others.items():
            save_file(convert.to_timm(vision), OUT / name / f"timm{full}.safetensors")
            if name == "clip":
                save_file(convert.to_open_clip(vision), OUT / name / f"open_clip{full}.safetensors")
    (OUT / name / "facts.json").write_text(json.dumps({
        "class": type(encoder.vision).__name__, "read": encoder.family.read,
        "prefix": encoder.prefix, "options": options, "answer": tokenizer.decode(answer),
        "digest": tensors.tensors_digest(encoder.vision)}))


@pytest.mark.parametrize("name,what", [(name, what) for name in TABLE for what in TABLE[name]])
def test_what_transformers_4_saved_opens_here(name, what):
    """The way back, with what `make compat` left: the same pixels, features, logits."""
    folder = OUT / name / "saved" / what
    if TABLE[name][what]["4"] != "opens" or not folder.exists():
        pytest.skip("transformers 4 does not open it, or did not run yet (make compat)")
    facts = json.loads((OUT / name / "facts.json").read_text())
    want = compat.load_file(OUT / name / "expected.safetensors")
    if what != "final":
        encoder = published.load_encoder(str(folder)).eval()
    else:
        model, _ = model_io.load_mllm(folder)
        encoder = model.eval().encoder
        hidden = model.llm.base_model(inputs_embeds=model.embed(
            compat.squashed(encoder.image_size), want["input_ids"])).last_hidden_state
        assert torch.equal(m.logits_of(model.llm, hidden), want["logits"])
    assert tensors.tensors_digest(encoder.vision) == facts["digest"]
    assert torch.equal(encoder(compat.squashed(encoder.image_size)), want["features"])
