"""A published MLLM as stage 1 (tools.parent), and stages that go on from elsewhere (--parent)."""
import json
import math
import re
import shutil
from argparse import Namespace

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import data
from conftest import COMMON, ROOT, TEXT, VISION, bit_equal, killed_at, metrics, run
from judge import answer
from pivot import model_io, published, records, tensors
from tools import parent

TOY = ROOT / "weights/toy-lm"
# As the hub's templates of these models render: no system turn, a space before the picture, no
# newline between turns. Written for this test.
SPACED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
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


def test_the_frame_is_what_the_template_renders():
    """Cut out of our own template it is the recipe's; of another one every piece is its own."""
    tokenizer = t.AutoTokenizer.from_pretrained(TOY)
    tokenizer.chat_template = records.CHAT_TEMPLATE + "{# another string, the same words #}"
    assert records.frame_of(tokenizer) == records.CHATML
    tokenizer.chat_template = SPACED
    assert records.frame_of(tokenizer) == records.Frame(
        picture="<|im_start|>user <image>\n", first="<|im_start|>user \n",
        later="<|im_start|>user \n", after="<|im_end|><|im_start|>assistant\n")
    item = {"conversations": [
        {"from": who, "value": said} for who, said in (
            ("human", "<image>\nA?"), ("gpt", "B"), ("human", "C?"), ("gpt", "D"))]}
    pieces = records.conversation_record("x:1", item, "x.png", records.frame_of(tokenizer)).pieces
    assert "".join(f"{text}<|im_end|>" if role == records.ANSWER else text
                   for text, role in pieces) == (
        "<|im_start|>user <image>\nA?<|im_end|><|im_start|>assistant\nB<|im_end|>"
        "<|im_start|>user \nC?<|im_end|><|im_start|>assistant\nD<|im_end|>")


def last(done):
    """The last line of a command that was refused."""
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------- brought in

def picture():
    """A square one, of the tower's size: there no processor resizes, crops or pads."""
    return torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_transformers(folder, question):
    """What transformers' own class makes of our picture and a question: (ids with one `<image>`,
    projected features (N, D), logits (T, V)). Of LLaVA-OneVision the base picture alone: what
    comes first, before the tiles."""
    kind = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(facts[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    pixels = (picture() / 255 - mean) / std
    if kind.config.model_type == "llava_onevision":
        whole = kind.model.get_image_features(pixels[:, None].repeat(1, 2, 1, 1, 1), torch.tensor(
            [[32, 32]]), return_dict=True).pooler_output[0]
        features = whole[:16]
        assert len(whole) == 16 + 4 * 5         # base; the tile's rows, each with its newline
    else:
        features = kind.model.get_image_features(pixels, return_dict=True).pooler_output[0]
    template = folder / "chat_template.json"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, chat_template=json.loads(
            template.read_text())["chat_template"] if template.exists() else records.CHAT_TEMPLATE)
    ids, image = tokenizer(text)["input_ids"], kind.config.image_token_index
    at = ids.index(image)
    embeds = kind.get_input_embeddings()(torch.tensor([ids]))[0]
    embeds = torch.cat([embeds[:at], features, embeds[at + 1:]])[None]
    return ids, features, kind(inputs_embeds=embeds).logits[0]


def to_hub_names(folder):
    """The file as transformers 4 wrote it, and as the hub has it; with a pooling head, which the
    class has no place for."""
    held = load_file(folder / "model.safetensors")
    old = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in held.items()}
    old["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 32)
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


def to_new_names(folder):
    """As the modules have them in transformers 5: model.vision_tower., model.language_model."""
    held = load_file(folder / "model.safetensors")
    new = {}
    for name, tensor in held.items():
        if name.startswith("language_model.lm_head."):
            new[name.removeprefix("language_model.")] = tensor
        else:
            new["model." + name.replace("language_model.model.", "language_model.")] = tensor
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name,names", [
    ("onevision", None), ("onevision", to_hub_names), ("deeper", to_new_names),
    ("interleave", None), ("clip", to_hub_names), ("clip", to_new_names), ("counted", None)])
def test_it_computes_what_it_computed(name, names, tmp_path):
    """Ids, projected features and logits are those of transformers' own class on SOURCE; final/
    opens as a plain LLaVA and gives them, too; what was left out is said."""
    folder = source(name, tmp_path / "src")
    if names:
        names(folder)
    told = parent.examine(str(folder))                  # what main() does, in this process
    parent.write(Namespace(run=str(tmp_path / "run"), encoder=None), told, *parent.bring_in(told))
    ids, features, logits = by_transformers(folder, "What is it?")
    final = tmp_path / "run/pretrain/final"
    model, tokenizer = model_io.load_mllm(final)
    frame = records.frame_of(tokenizer)
    own = tokenizer(records.user_turn("What is it?", True, frame=frame))["input_ids"]
    assert own == ids
    at, image = ids.index(model.image_token_id), model.image_token_id
    own = torch.tensor([ids[:at] + [image] * 16 + ids[at + 1:]])
    with torch.no_grad():
        assert (model.projector(model.encoder(picture()))[0] - features).abs().max() < 1e-5
        hidden = model.llm.base_model(inputs_embeds=model.embed(picture(), own)).last_hidden_state
        assert (model.llm.lm_head(hidden)[0] - logits).abs().max() < 1e-5
    whole, info = t.LlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = t.AutoProcessor.from_pretrained(final, backend="pil")
    raw = picture()[0].permute(1, 2, 0).numpy()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text",
                                                             "text": "What is it?"}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=raw, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == own.tolist()
    assert (whole(**inputs).logits[0] - logits).abs().max() < 1e-5

    used = {"onevision": 3, "deeper": 2, "interleave": 3, "clip": 2, "counted": 1}[name]
    assert len(model.encoder.blocks) == used
    card = (final / "README.md").read_text()
    assert ("head.probe" in card) == (names is to_hub_names)
    assert ("image_newline" in card) == (KINDS[name][0] == "LlavaOnevision")
    assert (f"{3 - used} of the tower's 3 blocks" in card) == (used < 3)
    assert ("crops the middle" in card) == (KINDS[name][1] == "clip")
    assert ("the source brings none" in card) == (KINDS[name][4] is None)


def test_the_check_before_writing_can_fail(tmp_path, monkeypatch):
    """Features of another block than the model's own are refused, and nothing is written."""
    folder = source("onevision", tmp_path / "src")
    monkeypatch.setattr(parent, "feature_block", lambda name, config: 2)
    with pytest.raises(SystemExit, match="of the largest apart from those of its own class"):
        parent.bring_in(parent.examine(str(folder)))


# ----------------------------------------------------------------------------------------- trained

SHORT = ["--num-samples", 16, "--epochs", 1, "--lr", 1e-3]


def train(stage, run_dir, world, *more, check=True):
    return run(f"train_{stage}.py", "--run-dir", run_dir, "--data", world, *COMMON[2:], *SHORT,
               *more, check=check)


@pytest.fixture(scope="module")
def brought(world, tmp_path_factory):
    """A run folder into which a LLaVA-OneVision was brought, of which two blocks of three are used;
    and its SFT, from another run folder: (run, other, what SFT printed)."""
    out = tmp_path_factory.mktemp("brought")
    bring(source("deeper", out / "src"), out / "run")
    said = train("sft", out / "other", world, "--parent", out / "run").stdout
    return out / "run", out / "other", said


def test_sft_from_elsewhere(brought, world, tmp_path):
    run_dir, other, said = brought
    assert "(inherited from ../run/pretrain)" in said
    config = json.loads((other / "sft/config.json").read_text())
    assert config["arguments"]["parent"] == "../run/pretrain"
    assert "moved since ../run/pretrain" in (other / "sft/final/README.md").read_text()
    model, tokenizer = model_io.load_mllm(other / "sft/final")
    assert tokenizer.chat_template == SPACED and len(model.encoder.blocks) == 2
    assert config["parent_digest"] == tensors.digest_of(run_dir / "pretrain/final")

    # what is fed, and what is asked, stands in the parent's template, not in the recipe's
    pairs = data.Samples("pairs", data.pair_files(Namespace(images=None, data=str(world)), str(
        world / "preferences/meta.json")), tokenizer, model.encoder, 2048)
    ids, roles = pairs.tokens(0)
    prompt = tokenizer.decode(ids[roles == records.PROMPT])
    tsv = next((world / "bench").glob("ToyG*.tsv"))
    rows, _ = answer.read_tsv(tsv, False)
    asked = tokenizer.decode(answer.Questions(tsv, rows, rows, tokenizer, model.encoder).ids[0])
    assert prompt.startswith("<|im_start|>user <image>\n")
    assert asked.startswith("<|im_start|>user " + 16 * "<image>" + "\n")
    for text in (prompt, asked):
        assert text.endswith("<|im_end|><|im_start|>assistant\n")

    # started again: without --parent as it was begun, with the very folder, not with another
    assert "already there" in train("sft", other, world).stdout
    assert "already there" in train("sft", other, world, "--parent",
                                    run_dir / "pretrain/final").stdout
    shutil.copytree(run_dir / "pretrain", tmp_path / "twin/pretrain")
    done = train("sft", other, world, "--parent", tmp_path / "twin", check=False)
    assert done.returncode == 1 and "was begun with --parent ../run/pretrain, now" in \
        done.stderr.splitlines()[-1]


def test_dpo_from_a_published_model_killed_and_resumed(brought, world, tmp_path):
    """ln 2 at step 0; killed after a checkpoint and started again it ends with the same bytes, in
    its own run folder and in another one."""
    run_dir, _, _ = brought
    said = train("dpo", run_dir, world, "--epochs", 2).stdout
    assert "are the same function" in said
    steps = [row for row in metrics(run_dir / "dpo") if "loss" in row]
    assert len(steps) == 4 and abs(steps[0]["loss"] - 0.693147) < 1e-6
    assert all(norm > 0 for norm in steps[0]["grad_norm"].values())
    command = ["--run-dir", tmp_path / "other", "--parent", run_dir, "--data", world, *COMMON[2:],
               *SHORT, "--epochs", 2, "--save-every", 2]
    killed_at("after rename of step:1:0", tmp_path / "kill", ["train_dpo.py", *command])
    command[2:4] = []                                    # as it was begun
    assert "continuing after 2 steps" in run("train_dpo.py", *command).stdout
    bit_equal(run_dir / "dpo", tmp_path / "other/dpo")


def test_everything_finds_the_parent(brought, world, tmp_path):
    """extract.py compares with the encoder that the parent holds; the evidence and Grad-CAM find
    it; a run whose parent went says so."""
    run_dir, other, _ = brought
    said = run("extract.py", "--run-dir", other, "--stage", "sft").stdout
    assert f"against {run_dir}/pretrain/encoder" in said and "features bit-equal" in said
    least, most = re.search(r"of which since ../run/pretrain: (\S+) … (\S+) a block", said).groups()
    trained, parent = (model_io.load_mllm(x)[0].encoder.blocks for x in (
        other / "sft/final", run_dir / "pretrain/final"))
    want = [math.dist(*(torch.nn.utils.parameters_to_vector(x.parameters()).tolist()
                        for x in (a, b))) / torch.nn.utils.parameters_to_vector(
        b.parameters()).norm().item() for a, b in zip(trained, parent)]
    assert abs(float(least) / min(want) - 1) < 0.01 and abs(float(most) / max(want) - 1) < 0.01
    again = published.load_encoder(str(other / "sft/encoder"))
    assert len(again.blocks) == 2
    assert "already there" in run("extract.py", "--run-dir", other, "--stage", "pretrain").stdout
    assert "inside the object" in run("gradcam.py", "--run-dir", other, "--data", world,
                                      "--num-samples", 2).stdout
    said = run("-m", "tools.evidence", "--run-dir", other).stdout
    encoders_of_both = f"{run_dir}/pretrain/encoder {other}/sft/encoder"
    assert f"probe_linear.py --encoder {encoders_of_both} --data {world}" in said
    assert "--llm LLM" in said
    run("repair_eval.py", "--mllm", other / "sft/final", "--data", world, "--limit", 2,
        "--workers", 0)
    moved = tmp_path / "moved"
    shutil.copytree(other / "sft", moved / "sft")
    done = train("sft", moved, world, check=False)
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/run/pretrain/final is gone; put it back")


def test_the_published_original_where_it_is_known(tmp_path):
    """--encoder: extract.py says how far it is from that, cut where the model reads it: here behind
    the first of three blocks, where the recipe would cut behind the second."""
    folder = source("counted", tmp_path / "src")
    whole = t.AutoModelForImageTextToText.from_pretrained(folder).model.vision_tower
    with torch.no_grad():
        for p in whole.parameters():
            p.mul_(1.5)                          # the model's: trained since, by a third of it
    whole.save_pretrained(tmp_path / "original")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "original")
    bring(folder, tmp_path / "run", "--encoder", tmp_path / "original")
    assert "already there" in bring(folder, tmp_path / "run").stdout
    said = run("extract.py", "--run-dir", tmp_path / "run", "--stage", "pretrain",
               "--overwrite").stdout
    assert f"against {tmp_path}/original" in said
    assert "encoder.layers.0                  3.33e-01" in said and "layers.1" not in said
    done = run("extract.py", "--run-dir", tmp_path / "run", "--stage", "pretrain", "--full",
               check=False)
    assert "--full puts one block back" in last(done) and "2 less than" in last(done)
    done = bring(folder, tmp_path / "run", "--overwrite", "--encoder", "toy-vit", check=False)
    assert "--encoder toy-vit" in last(done) and not (tmp_path / "run/pretrain.tmp").exists()


# ----------------------------------------------------------------------------------------- refused

def change(file, **facts):
    def spoil(folder):
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**held, **facts}))
    return spoil


def cut_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder):
    held = load_file(folder / "model.safetensors")
    del held["multi_modal_projector.linear_2.bias"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_blocks(folder):
    facts = json.loads((folder / "config.json").read_text())
    facts["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(facts))


def no_chatml(folder):
    for path in folder.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))


def with_bos(folder):
    """A tokenizer that puts a token in front of all it is given, as Llama's do."""
    facts = json.loads((folder / "tokenizer.json").read_text())
    one = {"id": "<image>", "type_id": 0}
    facts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": one}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<image>": {"id": "<image>", "ids": [3], "tokens": ["<image>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps(facts))


def dinov2(folder):
    facts = json.loads((folder / "config.json").read_text())
    facts["vision_config"] = {"model_type": "dinov2"}
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("name,spoil,words", [
    ("clip", change("config.json", vision_feature_select_strategy="full"), "keeps CLIP's CLS"),
    ("interleave", change("config.json", vision_feature_select_strategy="default"),
     "drops the first token of a SigLIP"),
    ("clip", change("config.json", vision_feature_layer=[-2, -1]), "reads several layers"),
    ("clip", change("config.json", vision_feature_layer=-4), "is no block of a tower of 3"),
    ("clip", change("config.json", projector_hidden_act="silu"), "is not Linear, GELU, Linear"),
    ("clip", change("config.json", multimodal_projector_bias=False), "is not Linear, GELU, Linear"),
    ("clip", change("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
     "is quantized"),
    ("clip", change("config.json", model_type="llava_next"), "which sees a picture in tiles"),
    ("clip", change("config.json", image_token_index=5), "image_token_index is 5"),
    ("clip", no_chatml, "has no <.im_start.>: a ChatML model"),
    ("clip", with_bos, "puts a token of its own before or behind every prompt"),
    ("clip", dinov2, "has a dinov2 as its tower"),
    ("clip", change("preprocessor_config.json", crop_size={"height": 48, "width": 48}),
     "its tower takes 32 × 32"),
    ("onevision", change("preprocessor_config.json", size={"height": 48, "width": 48}),
     "its tower takes 32 × 32"),
    ("interleave", change("preprocessor_config.json", rescale_factor=1), "scales pixels by 1"),
    ("onevision", change("chat_template.json", chat_template=VICUNA),
     "is not ChatML: 'USER: <image>"),
    ("onevision", change("chat_template.json", chat_template="{{ nothing.at.all }}"),
     "does not render a plain conversation"),
    ("onevision", cut_file, "cannot open"),
    ("onevision", drop_tensor, "lacks tensor model.multi_modal_projector.linear_2.bias"),
    ("onevision", fewer_blocks, "which a model of its config.json does not have"),
    ("onevision", lambda folder: (folder / "preprocessor_config.json").unlink(), "neither"),
    ("onevision", lambda folder: (folder / "config.json").write_text("{}"), "cannot open"),
    ("onevision", lambda folder: (folder / "adapter_config.json").write_text("{}"),
     "is an adapter"),
])
def test_what_is_not_this_code_s_model_is_refused(name, spoil, words, sources, tmp_path):
    """One line with the reason; nothing is written."""
    folder = tmp_path / "src"
    shutil.copytree(sources[name], folder)
    spoil(folder)
    with pytest.raises(SystemExit, match=words) as e:
        parent.bring_in(parent.examine(str(folder)))
    assert str(e.value).startswith("error: ") and len(str(e.value).splitlines()) == 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    out = tmp_path_factory.mktemp("sources")
    return {name: source(name, out / name) for name in ("onevision", "interleave", "clip")}


def test_a_scaled_llm_is_refused(sources, tmp_path):
    """LLaVA's class takes lm_head's logits as they are; ours would scale them."""
    shutil.copytree(sources["clip"], tmp_path / "src")
    facts = json.loads((tmp_path / "src/config.json").read_text())
    facts["text_config"] |= {"model_type": "granite", "logits_scaling": 8.0}
    (tmp_path / "src/config.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match="scales its logits, which LLaVA's class leaves out"):
        parent.examine(str(tmp_path / "src"))


def test_where_nothing_is_overwritten(brought, sources, world, tmp_path):
    """A run's own stage 1, another model, and folders that are no parents."""
    run_dir, other, _ = brought
    (tmp_path / "own/pretrain").mkdir(parents=True)
    (tmp_path / "own/pretrain/config.json").write_text('{"arguments": {"encoder": "toy-vit"}}')
    assert "was not written by tools.parent" in last(bring(
        sources["clip"], tmp_path / "own", "--overwrite", check=False))
    assert "holds another model" in last(bring(sources["clip"], run_dir, check=False))
    assert "neither a folder here nor a hub id" in last(bring("llava", tmp_path, check=False))
    assert "becomes one by:  python -m tools.parent" in last(train(
        "sft", tmp_path / "x", world, "--parent", sources["clip"], check=False))
    assert "no trained model at" in last(train(
        "sft", tmp_path / "x", world, "--parent", tmp_path, check=False))
    assert "--parent needs --run-dir" in last(run("train_dpo.py", "--parent", run_dir, check=False))
    assert "was made with --llm" in last(train(
        "sft", tmp_path / "x", world, "--parent", run_dir, "--llm", "toy-lm", check=False))
    assert not (tmp_path / "x").exists()
