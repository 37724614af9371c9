"""LLMs people use: opened as they compute themselves, or refused in one line before any training."""
import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import model as m
from conftest import COMMON, ROOT, TEXT, copied, killed_at, metrics, run
from pivot import flags, model_io, published, tensors

TOY = ROOT / "weights/toy-lm"
WORDS = len(t.AutoTokenizer.from_pretrained(TOY))                  # `<image>` is not yet one
VOCAB = json.loads((TOY / "config.json").read_text())["vocab_size"]
FACTS = {**TEXT, "vocab_size": VOCAB, "max_position_embeddings": 2048, "tie_word_embeddings": True}
WIDE = {"head_dim": 8}

LLMS = {
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**FACTS, **WIDE)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**FACTS)),
    "full": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**FACTS, "vocab_size": WORDS})),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(
        **FACTS, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**FACTS, logit_scale=0.25)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(
        **FACTS, **WIDE, final_logit_softcapping=2.0, sliding_window=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**FACTS, **WIDE, sliding_window=8)),
    "qwen3_5": lambda: t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(
        **{**FACTS, "num_hidden_layers": 4}, **WIDE, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCAB)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=1, n_head=2,
                                                      vocab_size=VOCAB)),
}
SCALED = ["granite", "cohere", "gemma2"]
ROWS_ALONE = ["gemma2", "gemma3", "qwen3_5"]


def folder_of(name, path):
    """A tiny random LLM of the class with the toy's tokenizer, in a folder: → path."""
    torch.manual_seed(0)
    llm = LLMS[name]()
    with torch.no_grad():
        for p in llm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    llm.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (TOY / file).exists():
            shutil.copy(TOY / file, path)
    return path


# ----------------------------------------------------------------------------- its own log-probs

@pytest.mark.parametrize("name", ["qwen3", "llama", *SCALED, "gemma3", "qwen3_5"])
def test_log_probs_are_those_of_the_llm_itself(name, tmp_path):
    """19 tokens through our path = the class's own logits, also where it scales or caps them."""
    llm, _, _ = published.open_llm(str(folder_of(name, tmp_path)))
    ids = torch.arange(3, 22)[None]
    own = llm(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    want = own.gather(-1, ids[0, 1:, None])[:, 0].sum()
    hidden = llm.base_model(input_ids=ids).last_hidden_state[0, :-1]
    got = m.token_logps(hidden, llm, ids[0, 1:]).sum()
    assert abs(got - want) < 1e-4 * abs(want)
    unscaled = llm.get_output_embeddings()(hidden).log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    assert (abs(unscaled - want) > 1e-2) == (name in SCALED)
    assert m.can_hold_pairs(llm) == (name not in ROWS_ALONE)


def test_an_llm_with_logits_of_its_own_is_refused():
    llm = LLMS["llama"]()
    head = llm.lm_head.forward

    def forward(hidden):                                       # some MuP: nobody's config key
        return head(hidden) * (1.5 if hidden.dim() == 3 else 1)
    llm.lm_head.forward = forward
    with pytest.raises(SystemExit, match="is a llama: its own logits are not those"):
        published.refuse_llm(llm, "x")


# --------------------------------------------------------------------------- what is in the folder

def test_a_head_of_its_own_stays_its_own(world, tmp_path):
    """The config says tied, the file holds another lm_head: stored as what it is, opened again."""
    folder = folder_of("qwen3", tmp_path / "llm")
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = torch.randn_like(held["model.embed_tokens.weight"])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = model_io.build_mllm("toy-vit", str(folder), 0)
    assert torch.equal(model.llm.lm_head.weight, held["lm_head.weight"])
    (tmp_path / "final").mkdir()
    model_io.save_mllm(model, tokenizer, tmp_path / "final", True)
    again, _ = model_io.load_mllm(tmp_path / "final")
    assert torch.equal(again.llm.lm_head.weight, held["lm_head.weight"])
    assert torch.equal(again.llm.model.embed_tokens.weight, held["model.embed_tokens.weight"])
    whole, info = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "final",
                                                                output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    assert torch.equal(whole.lm_head.weight, held["lm_head.weight"])


def test_an_equal_head_in_the_file_is_tied(tmp_path):
    folder = folder_of("qwen3", tmp_path)
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    llm, _, _ = published.open_llm(str(folder))
    assert llm.lm_head.weight is llm.model.embed_tokens.weight and llm.config.tie_word_embeddings


def spoil_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


def spoil_layers(folder):
    facts = json.loads((folder / "config.json").read_text())
    facts["num_hidden_layers"] = 1
    facts["layer_types"] = facts["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(facts))


def add_tensor(folder, key, shape):
    held = load_file(folder / "model.safetensors")
    held[key] = torch.randn(shape)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_biases(folder):
    add_tensor(folder, "model.layers.0.self_attn.q_proj.bias", 32)


def spoil_norms(folder):
    """A Qwen3 whose config calls it a Llama."""
    add_tensor(folder, "model.layers.1.self_attn.q_norm.weight", 8)


def spoil_tie(folder):
    """Another lm_head, and a config that says so."""
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = torch.randn_like(held["model.embed_tokens.weight"])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "tie_word_embeddings": False}))


def spoil_quantized(folder):
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("name,spoil,words", [
    ("qwen3", spoil_adapter, "is an adapter .LoRA., or has one beside it; merge it"),
    ("qwen3", spoil_layers, "holds model.layers.1.*, which a model of its config.json does not"),
    ("qwen3", spoil_biases, "holds model.layers.0.self_attn.q_proj.bias, which a model of its"),
    ("llama", spoil_norms, "holds model.layers.1.self_attn.q_norm.weight, which a model of its"),
    ("qwen3", spoil_quantized, "is quantized; training needs the weights it was made of"),
    ("gpt_neox", None, "is a gpt_neox: only causal LMs with their blocks in model.layers"),
    ("bloom", None, "is a bloom: only causal LMs with their blocks in model.layers"),
])
def test_what_would_go_wrong_later_is_refused_first(tmp_path, name, spoil, words):
    folder = folder_of(name, tmp_path)
    if spoil:
        spoil(folder)
    with pytest.raises(SystemExit, match=words) as e:
        published.open_llm(str(folder))
    assert len(str(e.value).splitlines()) == 1 and "install" not in str(e.value)


def test_what_older_versions_stored_of_computed_tables_is_no_matter(tmp_path):
    folder = folder_of("llama", tmp_path)
    add_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", 4)
    published.open_llm(str(folder))


# ------------------------------------------------------------------------------ a table that is full

@pytest.mark.parametrize("tied", [True, False])
def test_a_full_table_gets_rows(tmp_path, tied):
    """SmolLM2's tokenizer has as many words as its LLM rows: `<image>` gets one, the logits of text
    stay, what was tied is tied, and the folder opens elsewhere with the larger table."""
    words, folder, ids = WORDS, folder_of("full", tmp_path / "llm"), torch.arange(20)[None]
    if not tied:
        spoil_tie(folder)
    before = t.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits[0]
    model, tokenizer = model_io.build_mllm("toy-vit", str(folder), 0)
    rows = model.llm.config.vocab_size
    assert model.image_token_id == words and rows == (words + 64) // 64 * 64
    after = model.llm(input_ids=ids).logits[0]
    assert torch.equal(after[:, :words], before)
    assert (after[:, words:] < before.amax(-1, keepdim=True)).all()
    assert (model.llm.lm_head.weight is model.llm.model.embed_tokens.weight) == tied
    (tmp_path / "final").mkdir()
    model_io.save_mllm(model, tokenizer, tmp_path / "final", True)
    again, _ = model_io.load_mllm(tmp_path / "final")
    assert tensors.tensors_digest(again) == tensors.tensors_digest(model)
    whole, info = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "final",
                                                                output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert whole.config.text_config.vocab_size == rows


# --------------------------------------------------------------------------------- two plain rows

SHORT = ["--num-samples", 16, "--epochs", 2, "--lr", 1e-4]


def dpo(folder, world, *more, processes=1, check=True):
    return run("train_dpo.py", "--run-dir", folder, "--data", world, *COMMON[2:], *SHORT, *more,
               processes=processes, check=check)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_sliding_and_linear_attention_train_with_rows(name, world, tmp_path):
    """The whole of DPO: ln 2 at step 0, resumed, on two processes, and the pair layout refused."""
    llm, folder = folder_of(name, tmp_path / name), tmp_path / "run"
    said = run("pretrain.py", "--run-dir", folder, "--encoder", "toy-vit", "--llm", llm, "--data",
               world, *COMMON[2:], "--projector-max-steps", 1, "--max-steps", 1)
    assert "will need --layout rows" in said.stdout
    refused = dpo(folder, world, check=False)
    assert refused.returncode == 1 and "use --layout rows" in refused.stderr
    for twin in ("resumed", "two"):
        shutil.copytree(folder, tmp_path / twin)
    said = dpo(folder, world, "--layout", "rows").stdout
    whole = metrics(folder / "dpo")
    steps = [row for row in whole if "loss" in row]
    assert "are the same function" in said and abs(steps[0]["loss"] - 0.693147) < 1e-6
    assert len(steps) == 4 and steps[0]["margin"] == 0 and steps[-1]["margin"] > 0
    assert all(norm > 0 for norm in steps[0]["grad_norm"].values())

    # killed after the checkpoint of step 2, started again: the same four steps, bit for bit
    command = ["--run-dir", tmp_path / "resumed", "--data", world, *COMMON[2:], *SHORT, "--layout",
               "rows", "--save-every", 2]
    killed_at("after rename of step:1:0", tmp_path / "kill", ["train_dpo.py", *command])
    assert "continuing after 2 steps" in run("train_dpo.py", *command).stdout
    assert metrics(tmp_path / "resumed/dpo") == whole

    # (Later steps of so wild a model, its gradient's norm is 70, magnify the rounding.)
    dpo(tmp_path / "two", world, "--layout", "rows", processes=2)
    for a, b in zip(steps[:2], [x for x in metrics(tmp_path / "two/dpo") if "loss" in x]):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["margin"] - b["margin"]) < 1e-4
    for key, norm in steps[0]["grad_norm"].items():
        assert abs(norm / metrics(tmp_path / "two/dpo")[1]["grad_norm"][key] - 1) < 1e-5


def test_rows_and_pairs_train_alike(stage1, world, tmp_path):
    """On full attention the layout changes the time, not the run; a reference of the other layout
    is refused."""
    for name in ("pair", "rows"):
        copied(stage1, tmp_path / name)
        dpo(tmp_path / name, world, "--layout", name)
    for a, b in zip(metrics(tmp_path / "pair/dpo"), metrics(tmp_path / "rows/dpo")):
        for key in {"loss", "margin", "heldout_margin", "heldout_accuracy"} & a.keys():
            assert abs(a[key] - b[key]) < 1e-4, (key, a, b)
    (tmp_path / "third/dpo").mkdir(parents=True)
    copied(stage1, tmp_path / "third")
    shutil.copy(tmp_path / "pair/dpo/ref_logps.safetensors", tmp_path / "third/dpo")
    refused = dpo(tmp_path / "third", world, "--layout", "rows", check=False)
    assert refused.returncode == 1 and "layout" in refused.stderr.splitlines()[-1]


def test_a_toy_is_a_toy_by_its_config(tmp_path):
    """Not by its name: neither is a folder called toy-qwen one, nor must a toy be called so."""
    small, large = folder_of("qwen3", tmp_path / "mine"), tmp_path / "toy-qwen"
    shutil.copytree(small, large)
    facts = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**facts, "vocab_size": 151_936}))
    assert flags.is_toy(str(small)) and flags.is_toy("toy-lm") and not flags.is_toy(str(large))
    assert not any(flags.is_toy(x) for x in ("qwen2.5-1.5b", "smollm2-135m", "Qwen/Qwen3-14B"))
