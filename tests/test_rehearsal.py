"""The rehearsal: the longest micro-batch there is, nothing about the run changed, one line where
memory does not suffice, and the planner's bytes against those that autograd really keeps."""
import copy
from argparse import Namespace

import pytest
import torch

import data
import model as m
from pivot import distributed, model_io, records, rehearsal, training
from tools import meta, plan
from conftest import COMMON, bit_equal, copied, run, tiny_model

RATES = {"encoder": 1e-5, "projector": 1e-5, "llm": 1e-5}
ARGS = Namespace(rehearsal="on", global_batch=4, micro_batch=2, encoder="siglip2-so400m",
                 llm="qwen2.5-0.5b")


@pytest.fixture
def toy(world):
    return model_io.build_mllm("toy-vit", "toy-lm", 0)


@pytest.fixture
def alone(monkeypatch):
    """Without a process group: what one process would gather."""
    monkeypatch.setattr(distributed, "gather", lambda value: [value])


# ------------------------------------------------------------------------------ the longest batch

@pytest.mark.parametrize("kind,layout", [("pairs", "pair"), ("pairs", "answers"), ("pairs", "rows"),
                                         ("conversations", "answers")])
@pytest.mark.parametrize("bound", ["LLM", "text"])
def test_one_token_more_is_over_long(toy, kind, layout, bound, monkeypatch):
    """By the rule that reads the data; bound: which of its limits is met first."""
    model, tokenizer = toy
    if bound == "text":
        monkeypatch.setattr(data, "MAX_TEXT", 300)
    batch = data.longest_batch(kind, layout, 3, tokenizer, model)
    rows = 6 if layout == "rows" else 3
    assert batch["pixel_values"].shape[0] == 3 and batch["input_ids"].shape[0] == rows
    prompt = records.user_turn("?", True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    supervised = int((batch["labels"][0] != m.IGNORE).sum())
    answer = supervised // 2 if layout == "pair" else supervised
    rule = data.Reader.__new__(data.Reader)
    rule.kind, rule.num_image_tokens = kind, model.encoder.num_tokens
    rule.max_length = min(data.MAX_LENGTH, model.llm.config.max_position_embeddings)
    record = records.Record("x:1", "x.png", [], [])

    def fits(tokens):
        parts = [(ids, records.PROMPT), ([1] * tokens, records.ANSWER)]
        return rule.fits(record, parts + [([1] * tokens, records.OTHER)] * (kind == "pairs"))
    assert fits(answer) and not fits(answer + 1)


# --------------------------------------------------------------------------- nothing else changes

@pytest.mark.parametrize("stage,flags,processes", [
    ("dpo", [], 1), ("dpo", ["--layout", "rows", "--micro-batch", 2], 2), ("sft", [], 1)])
def test_the_run_is_bit_for_bit_the_same(stage1, world, tmp_path, stage, flags, processes):
    for name in ("off", "on"):
        copied(stage1, tmp_path / name)
        said = run(f"train_{stage}.py", "--run-dir", tmp_path / name, "--data", world, *COMMON[2:],
                   "--micro-batch", 4, "--max-steps", 2, "--num-samples", 16, "--lr", 1e-3, *flags,
                   "--rehearsal", name, processes=processes).stdout
        assert ("at its peak" in said) == (name == "on")
    bit_equal(tmp_path / "on" / stage, tmp_path / "off" / stage)


def test_stage_1_in_bf16_is_bit_for_bit_the_same(world, tmp_path):
    """Its first phase trains the projector alone, and FSDP remembers its first forward's dtypes."""
    for name in ("off", "on"):
        run("pretrain.py", "--run-dir", tmp_path / name, "--encoder", "toy-vit", *COMMON, "--data",
            world, "--projector-max-steps", 1, "--max-steps", 1, "--dtype", "bf16", "--micro-batch",
            2, "--rehearsal", name)
    bit_equal(tmp_path / "on" / "pretrain", tmp_path / "off" / "pretrain")


# ------------------------------------------------------------------------------- where it does not fit

def test_out_of_memory_is_one_line(toy, alone, monkeypatch):
    model, tokenizer = toy
    batch = data.longest_batch("pairs", "pair", 2, tokenizer, model)

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(SystemExit) as e:
        rehearsal.rehearse(ARGS, model, RATES, batch)
    tokens = batch["input_ids"].shape[1]
    assert str(e.value).startswith(f"error: out of memory at the longest micro-batch that is "
                                   f"admitted, 2 rows of {tokens} tokens (CUDA out of memory.")
    for word in ("--micro-batch", "--activation-checkpointing", "--lr 0", "-m tools.plan "):
        assert word in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("room,fits", [(0, True), (-1, False)])
def test_the_moments_of_adamw_count(alone, monkeypatch, capsys, room, fits):
    """What fits without them, and not with them, is refused before the first step meets it."""
    model = tiny_model()
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}
    monkeypatch.setattr(rehearsal, "forward_and_backward", lambda *_: None)
    training.freeze(model, RATES)
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(rehearsal, "peak_and_room", lambda _: (10 ** 6, 10 ** 6 + moments + room))
    if fits:
        rehearsal.rehearse(ARGS, model, RATES, batch)
        assert f"{(10 ** 6 + moments) / 1e9:.2f} GB with AdamW's" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit, match="more than there is; lower --micro-batch"):
        rehearsal.rehearse(ARGS, model, RATES, batch)


# ------------------------------------------------------------------------- the planner against it

@pytest.mark.parametrize("layout", ["pair", "answers", "rows"])
def test_the_bytes_that_are_planned_are_those_that_autograd_keeps(toy, layout):
    """Every tensor that autograd saves in the rehearsal, each storage once, weights left out: within
    2 % of the plan for the same row, times the micro-batch."""
    model, tokenizer = toy
    batch = data.longest_batch("pairs", layout, 2, tokenizer, model)
    kept = {p.untyped_storage()._cdata: None for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**batch)
    real = sum(storage.nbytes() for storage in kept.values() if storage is not None)

    rows = int((batch["labels"] != m.IGNORE).sum()) // 2                  # of one picture
    answer = rows // (1 if layout == "answers" else 2)
    tokens = batch["input_ids"].shape[1]
    prompt = tokens - (rows + 1 if layout == "pair" else answer)
    empty = copy.deepcopy(model).to("meta")
    row = meta.trace(empty, prompt, answer, 0 if layout == "answers" else answer, layout)
    held, _ = plan.memory(empty, row, 1, 2, 1, compute=4, sharded=False)
    planned = held["activations"] + held["logits"]
    assert planned == pytest.approx(real, rel=0.02), (planned, real)
