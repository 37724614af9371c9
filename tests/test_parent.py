"""A published MLLM as stage 1 (tools.parent), and stages that go on from elsewhere (--parent)."""
import json
import shutil

import pytest
import torch
import transformers as t

from conftest import COMMON, ROOT, TEXT, VISION, metrics, run
from pivot import model_io, records

TOY = ROOT / "weights/toy-lm"
# As the hub's templates of these models render: no system turn, a space before the picture, no
# newline between turns. Written for this test.
SPACED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
KINDS = {
    # name: class, tower, vision_feature_layer, strategy, template; what each stands for:
    "onevision": ("LlavaOnevision", "siglip", -1, "full", SPACED),     # llava-onevision-…-hf
    "deeper": ("LlavaOnevision", "siglip", -2, "full", SPACED),        # the block behind unused
    "interleave": ("Llava", "siglip", -1, "full", SPACED),             # llava-interleave-qwen-…-hf
    "clip": ("Llava", "clip", -2, "default", None),                    # LLaVA-1.5's, a Qwen2 in it
    "counted": ("Llava", "clip", 1, "default", None),                  # a layer from the front
}


def source(name, folder, **facts):
    """A tiny random model of the class, with what the hub has beside it: → folder."""
    kind, tower, layer, strategy, template = KINDS[name]
    tokenizer = t.AutoTokenizer.from_pretrained(TOY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    words = json.loads((TOY / "config.json").read_text())["vocab_size"]
    vision = {"siglip": t.SiglipVisionConfig, "clip": t.CLIPVisionConfig}[tower](
        **VISION, **({"vision_use_head": False} if tower == "siglip" else {}))
    text = t.Qwen2Config(**{**TEXT, "vocab_size": words}, max_position_embeddings=2048,
                         tie_word_embeddings=name != "clip")
    config = getattr(t, f"{kind}Config")(**{**dict(
        vision_config=vision, text_config=text, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, projector_hidden_act="gelu",
        tie_word_embeddings=name != "clip",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>")), **facts})
    if kind == "LlavaOnevision":
        config.image_grid_pinpoints = [[32, 32], [32, 64], [64, 32]]
    torch.manual_seed(0)
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    pixels = {"size": {"height": 32, "width": 32}, "resample": 3, "rescale_factor": 1 / 255,
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if tower == "clip":
        pixels |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32},
                   "do_center_crop": True, "image_mean": [0.48, 0.46, 0.41],
                   "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def bring(folder, run_dir, *more, check=True):
    return run("-m", "tools.parent", folder, run_dir, *more, check=check)
