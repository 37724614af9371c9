"""tools.plan against truth: bytes and FLOPs exactly, peak memory closely, its page to the letter."""
import copy
import json
import os
import re
import subprocess
import resource
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from pivot import encoders, model_io, records, training
from tools import meta, plan
import model as m
from conftest import ROOT, TEXT, run, tiny_model
from test_model import batch_of, random_pairs


def measured(*arguments, processes=1):
    """What tests/measured.py prints. Freed memory must go back to the kernel at once, or its
    high-water mark would show the allocator's habits."""
    command = [sys.executable, "tests/measured.py", *map(str, arguments)] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", "tests/measured.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


# ------------------------------------------------------------------------------------------ truth

def real_flops(model, batch):
    """One forward and backward of the real model, counted by torch, attention in plain products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("layout", ["pair", "answers", "rows"])
@pytest.mark.parametrize("vision,llm,tie", [("siglip", "qwen2", True), ("clip", "llama", False),
                                            ("dinov2", "qwen2", True)])
@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "llm")])
def test_flops_are_those_torch_counts(layout, vision, llm, tie, frozen):
    model = tiny_model(vision, llm, tie)
    rates = {k: 0 if k in frozen else 1e-5 for k in ("encoder", "projector", "llm")}
    pairs, pixels = random_pairs(model, 1)
    batch = batch_of(pairs, pixels, layout)
    empty = copy.deepcopy(model).to("meta")
    for each in (model, empty):
        training.freeze(each, rates)
    counts = [int((pairs[0][1] == role).sum()) for role in range(3)]
    row = meta.trace(empty, *counts, layout)
    assert (row.forward, row.backward) == real_flops(model, batch)
    assert row.rows == int((batch["labels"] != m.IGNORE).sum())


def test_flops_and_bytes_of_two_encoders():
    """A+B: both pictures, both towers, the second's grid resampled; as torch counts the real one.
    What autograd keeps of frozen towers is what it keeps of nothing."""
    model = tiny_model()
    model.encoder = encoders.TwoEncoders(tiny_model("clip").encoder, tiny_model("dinov2").encoder)
    model.projector = m.Projector(model.encoder.hidden_size, 32)
    empty = copy.deepcopy(model).to("meta")
    for each in (model, empty):
        training.freeze(each, {"encoder": 0, "projector": 1e-3, "llm": 1e-3})
    pairs, _ = random_pairs(model, 1)
    batch = batch_of(pairs, torch.zeros(1, 2 * 3 * 32 ** 2, dtype=torch.uint8), "answers")
    counts = [int((pairs[0][1] == role).sum()) for role in range(3)]
    row = meta.trace(empty, *counts, "answers")
    assert (row.forward, row.backward) == real_flops(model, batch)
    assert len(row.blocks) == 2 + 3 + 2 and not any(row.blocks[:5]) and all(row.blocks[5:])


def test_flops_by_hand():
    """2 × weights × tokens, and attention's two products: nobody's counter, one row of SFT."""
    model = tiny_model().to("meta")
    row = meta.trace(model, 20, 5, 0, "answers")
    d, mlp, n, t = 32, 48, 16, 25
    eye = 2 * n * d * 3 * 64 + 2 * (n * 2 * (4 * d * d + 2 * d * mlp) + 4 * n * n * d)
    bridge = 2 * n * (d * d + d * d)
    kv = TEXT["num_key_value_heads"] * d // TEXT["num_attention_heads"]
    llm = 2 * (t * 2 * (2 * d * d + 2 * d * kv + 3 * d * mlp) + 4 * t * t * d)
    assert row.forward == eye + bridge + llm + 2 * 5 * d * 64
    assert row.in_blocks == eye - 2 * n * d * 3 * 64 + llm


@pytest.mark.parametrize("processes", [1, 3])
def test_bytes_of_weights_gradients_and_optimizer_are_exact(processes):
    """Three processes: no axis divides evenly. The LLM is frozen: it has neither."""
    said = run("tests/measured.py", "bytes", processes=processes).stdout
    got = json.loads(next(x for x in said.splitlines() if x.startswith("{")))
    assert got["real"] == got["planned"] and got["real"]["gradients"] > 0
    assert got["real"]["optimizer"] == 2 * got["real"]["gradients"] < got["real"]["weights"]


@pytest.mark.parametrize("arguments,processes", [
    ((3, 1, 0, "DPO"), 1), pytest.param((1, 2, 1, "SFT"), 1, marks=pytest.mark.slow),
    pytest.param((2, 2, 1, "DPO"), 2, marks=pytest.mark.slow)])
def test_peak_memory_of_a_real_run(arguments, processes):
    """Resident bytes of the first process at their highest, two real steps: within 10 % of the
    plan, alone and sharded."""
    got = measured(*arguments, processes=processes)
    assert 0.9 < got["planned"] / got["measured"] < 1.1, got


def test_the_fitting_micro_batch_is_the_largest_that_fits():
    model = tiny_model().to("meta")
    row = meta.trace(model, 20, 5, 5, "pair")

    def total(b, limit=16):
        return plan.memory(model, row, 2, b, -(-limit // b), 4)[1]
    sizes = [total(b) for b in (1, 2, 4, 8, 16)]
    assert plan.fitting(model, row, sizes[2], 16, processes=2, compute=4) in (4, 8, 16)
    for b in (2, 4, 8):
        fits = plan.fitting(model, row, total(b), 16, processes=2, compute=4)
        assert total(fits) <= total(b) and (fits == 16 or total(2 * fits) > total(b))
    assert plan.fitting(model, row, 1000, 16, processes=2, compute=4) == 0


# ---------------------------------------------------------------------------------------- commands

def planned(monkeypatch, *words):
    """`python -m tools.plan` in this process."""
    monkeypatch.setattr(sys, "argv", ["tools.plan", *map(str, words)])
    plan.main()


ENCODERS = [n for n in encoders.ENCODERS if not n.startswith("toy")]
LLMS = [n for n in encoders.LLMS if not n.startswith("toy")]


@pytest.mark.parametrize("i", [                          # the others in `make kill`
    pytest.param(i, marks=[] if i % 3 == 0 else pytest.mark.slow) for i in range(len(ENCODERS))])
def test_every_preset_is_planned_without_weights(i, tmp_path, monkeypatch, capsys):
    """No network, no weights, no memory for them: most pairs would take 3 GB or more. Every encoder
    and every LLM."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned(monkeypatch, "train_dpo", "--encoder", ENCODERS[i], "--llm", LLMS[i % len(LLMS)], "--data",
            tmp_path, "--run-dir", tmp_path / "r")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20        # KiB
    text = capsys.readouterr().out
    count = sum(p.numel() for p in meta.empty_encoder(ENCODERS[i]).parameters())
    assert f"{count:,} parameters" in text and "usable" in text and "in all" in text
    assert not (tmp_path / "r").exists()


def test_two_encoders_are_planned(tmp_path, monkeypatch, capsys):
    """The paper's pair: a grid of 27 × 27 and a map of 24 × 24."""
    encoder = "siglip1-so400m+convnext-xxl"
    planned(monkeypatch, "repair_eval", "--encoder", encoder, "--data", tmp_path, "--run-dir",
            tmp_path / "r")
    text = capsys.readouterr().out
    count = sum(p.numel() for name in encoder.split("+")
                for p in meta.empty_encoder(name).parameters())
    assert "image 384 × 384 and 768 × 768 → 729 tokens of width 4224" in text
    assert f"{count:,} parameters" in text
    assert text.count("encoder frozen") == 2 and "in all" in text


def test_a_larger_image_leaves_less_room_for_text(tmp_path, monkeypatch, capsys):
    """The length rule holds in a plan without data, too; and where the image alone breaks it, no
    run could begin: one line."""
    def show(size):
        planned(monkeypatch, "train_dpo", "--encoder", "dinov2-small", "--image-size", size,
                "--data", tmp_path, "--run-dir", tmp_path / "r", "--llm", "qwen2.5-0.5b")
        return capsys.readouterr().out
    text = show(616)                    # 44² = 1936: prompt and one answer share 112 tokens
    mean, most = map(int, re.search(r"rows of (\d+) tokens, at most (\d+)", text).groups())
    prompt, chosen, rejected = 1936 + 7, 104, 104
    assert most == prompt + chosen + rejected + 1 and mean <= most
    with pytest.raises(SystemExit, match="2116 image tokens leave no room for text"):
        show(644)


def test_a_plan_of_every_stage_from_the_data(world, stage1, tmp_path):
    """With data at hand its lengths are read; nothing is trained, nothing written."""
    before = sorted(p for p in stage1.rglob("*"))
    for stage, words in (("pretrain", ["1a: encoder frozen, projector at 0.005", "1b: "]),
                          ("train_sft.py", ["sft: encoder at 0.0001"]),
                          ("train_dpo", ["dpo: encoder at 5e-05", "the reference included"]),
                          ("repair_eval", ["projector: encoder frozen", "re-pair: encoder"])):
        text = run("-m", "tools.plan", stage, "--run-dir", stage1, "--llm", "toy-lm", "--data",
                   world, "2xa100", "--encoder", "toy-vit", "--global-batch", 8).stdout
        for word in [*words, "a sample of", "2 × A100", "36 tokens", "fits"]:
            assert word in text, (stage, word, text)
    assert sorted(p for p in stage1.rglob("*")) == before


def test_the_reference_is_one_pass_over_all_pairs_or_a_second_model(world, stage1, monkeypatch):
    """Cached: the same for one step as for two. Live: a forward at every step, and in memory."""
    def planned(*words):
        stage, args, spec = plan.stage_and_args([
            "train_dpo", "--run-dir", str(stage1), "--data", str(world), "--global-batch", "8",
            "1xh100", "--dtype", "fp32", *words])
        p = plan.phase_plan(args, meta.empty_mllm(args.encoder, args.llm, dtype="fp32"),
                            *plan.phases_of(stage, args), spec)
        return p, p["run"] - p["step"] * p["steps"]
    (one, reference), (two, again), (live, forwards) = (planned("--max-steps", *words) for words in (
        "1", "2", ("2", "--reference", "live")))
    assert (one["steps"], two["steps"], live["steps"]) == (1, 2, 2) and reference == again > 0
    assert forwards * one["lengths"].records == reference * 2 * 8
    assert live["held"]["reference model"] == live["held"]["weights"] > 0
    assert live["total"] - two["total"] == live["held"]["weights"]


def test_data_without_its_tokenizer_is_planned_all_the_same(world, tmp_path):
    text = run("-m", "tools.plan", "train_dpo", "--data", world, "--run-dir",
               tmp_path / "r").stdout
    assert "the tokenizer of qwen2.5-1.5b is not here: the paper's number" in text


def test_lengths_are_those_of_the_batches(world, stage1):
    """The planned mean row is the mean row that training sees, padding aside."""
    text = run("-m", "tools.plan", "train_dpo", "--run-dir", stage1, "--data", world, "1xh100",
               "--global-batch", 8).stdout
    planned, longest = map(int, re.search(r"rows of (\d+) tokens, at most (\d+)", text).groups())
    model, tokenizer = model_io.load_mllm(stage1 / "pretrain/final")
    samples = data.Samples("pairs", records.pair_sources(world / "preferences/meta.json"), tokenizer,
                           model.encoder, 10_000)
    rows = [len(data.pair_row(s["ids"], s["roles"])["input_ids"]) for s in samples]
    assert abs(planned - sum(rows) / len(rows)) <= 2 and longest == max(rows)


@pytest.mark.parametrize("words,said", [
    (["train_nothing"], "no stage train_nothing.py here"), (["model"], "trains nothing"),
    (["train_dpo", "--bete", "1"], "--help lists all flags")])
def test_a_stage_that_is_none(words, said):
    done = run("-m", "tools.plan", *words, check=False)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("spec,words", [("8xh1000", "h100, h200"), ("0xh100", "no number of GPUs"),
                                        ("7xh100", "does not fit 7 GPUs")])
def test_a_machine_that_is_none(tmp_path, spec, words):
    done = run("-m", "tools.plan", "train_dpo", "--data", tmp_path, spec, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("llm,place", [("qwen2.5-0.5b", 2), pytest.param(
    "qwen2.5-7b", 5, marks=pytest.mark.slow)])
def test_the_page_for_real_use_states_what_is_computed(llm, place):
    """Its table: So400m with four LLMs on 8 × H100, of which the smallest and the largest here."""
    lines = ["| head | parameters | weights, gradients, AdamW a GPU | `--micro-batch`, stage 1 / "
             "DPO | without checkpointing | stage 1 | DPO | in all |", "|---" * 8 + "|"]
    plans = []
    for stage in ("pretrain", "train_dpo"):
        stage, args, _ = plan.stage_and_args([
            stage, "--llm", llm, "--activation-checkpointing", "--data", "nowhere", "--run-dir",
            "nowhere"])                                                  # no data: the paper's
        model = meta.empty_mllm(args.encoder, args.llm)
        plans += [plan.phase_plan(args, model, p) for p in plan.phases_of(stage, args)]
    _, full, dpo = plans
    states = sum(dpo["held"][k] for k in ("weights", "optimizer", "gradients"))
    count = sum(p.numel() for p in model.parameters())
    lines.append(f"| {llm} | {count / 1e9:.2f} B | {states / 1e9:.1f} GB | "
                 f"{full['fits'][True]} / {dpo['fits'][True]} | "
                 f"{full['fits'][False]} / {dpo['fits'][False]} | "
                 f"{plans[0]['hours'] + full['hours']:.1f} h | {dpo['hours']:.2f} h | "
                 f"{sum(p['hours'] for p in plans):.1f} h |")
    page = (ROOT / "docs/real-use.md").read_text(encoding="utf-8")
    stated = re.search(r"<!-- plan -->\n(.*?)\n<!-- /plan -->", page, re.S)[1]
    stated = stated.strip().split("\n")
    assert len(stated) == 6 and [*stated[:2], stated[place]] == lines, "\n".join(lines)
