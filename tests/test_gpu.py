"""benchmarks/gpu.py: pieces run, fail by name, come together; each of its checks can fail."""
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import types
from concurrent.futures import Future

import pytest
import torch

from conftest import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_correct  # noqa: E402
import gpu_models as g  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_waits  # noqa: E402
import data  # noqa: E402
import model as m  # noqa: E402

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def result(tmp_path, monkeypatch):
    """An empty result on a made-up card, in a folder of its own."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results-gpu")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "code_state", lambda: ("abc", "digest"))
    return gpu.Result({"name": "NVIDIA H100 80GB HBM3"}, quick=False)


def rows_of(work):
    """What a piece says, in this process. (With a thread: two, on cores that others use, wait for
    one another at each of its small products.)"""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work(rows.append, True)
    finally:
        torch.set_num_threads(threads)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return rows


# ------------------------------------------------------------------------------------- the command

def test_without_a_gpu_it_says_so_in_a_line():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("error: no GPU that torch can use; --quick tries the same on the CPU at "
                           "tiny sizes (make gpu GPU=--quick)\n")


def hangs(say, quick):
    child = subprocess.Popen(["sleep", "77"])
    say({"what": "begun", "child": child.pid})
    time.sleep(77)


def dies(say, quick):
    say({"what": "before"})
    os._exit(7)


def raises(say, quick):
    raise ValueError("no such kernel\nand more")


def is_fine(say, quick):
    say({"what": "fine", "ok": True})


def test_a_piece_that_hangs_dies_or_raises_is_named_and_the_rest_runs(result, capsys):
    made = [gpu.Piece("speed", "hangs", hangs, 1), gpu.Piece("speed", "dies", dies, 9),
            gpu.Piece("trl", "raises", raises, 9), gpu.Piece("correct", "fine", is_fine, 9)]
    began = time.monotonic()
    gpu.run_pieces(FORK, made, result, False, began + 99)
    assert time.monotonic() - began < 30
    on_disk = json.loads(result.path.read_text())["pieces"]
    assert [on_disk[piece.title]["ended"] for piece in made] == [
        "FAILED: did not end within 1 s", "FAILED: its process died (exit code 7)",
        "FAILED: ValueError: no such kernel", "done"]
    child = on_disk["speed: hangs"]["rows"][0]["child"]
    time.sleep(0.2)
    with open(f"/proc/{child}/stat") if os.path.exists(f"/proc/{child}") else open(os.devnull) as f:
        assert f.read().split(")")[-1].split()[:1] in ([], ["Z"]), "its child lives on"
    assert on_disk["speed: dies"]["rows"] == [{"what": "before"}]      # what came before is kept
    assert not gpu.report(result)
    said = capsys.readouterr().out
    assert "speed: hangs" in said and "FAILED: did not end within 1 s" in said


def test_time_that_is_over_and_cuda_that_is_missing_leave_out_by_name(result):
    result.facts["card"]["name"] = "cpu"
    gpu.run_pieces(FORK, [gpu.Piece("trl", "late", is_fine, 9),
                          gpu.Piece("speed", "kernel", is_fine, 9, cuda=True)], result, False,
                   time.monotonic() + 1)
    ended = [piece["ended"] for piece in result.facts["pieces"].values()]
    assert ended == ["left out: the minutes are over", "left out: needs CUDA"]
    assert gpu.report(result)                                                # that is no failure


def test_several_calls_on_one_card_and_commit_make_one_result(result, monkeypatch):
    one, two = (gpu.Piece(part, "fine", is_fine, 9) for part in ("correct", "decode"))
    gpu.run_pieces(FORK, [one], result, False, time.monotonic() + 99)
    again = gpu.Result(result.facts["card"], quick=False)
    gpu.run_pieces(FORK, [two], again, False, time.monotonic() + 99)
    assert again.path == result.path and again.path.name == "nvidia-h100-80gb-hbm3-abc.json"
    assert list(json.loads(again.path.read_text())["pieces"]) == [one.title, two.title]
    monkeypatch.setattr(gpu, "code_state", lambda: ("abc", "another digest"))
    assert gpu.Result(result.facts["card"], quick=False).facts["pieces"] == {}


def speed_row(peak=10.0, share=0.5, off=1e-4, llm="qwen2.5-1.5b", **mode):
    setting = gpu_speed.BASE._replace(llm=llm, **mode)
    return {"what": setting.mode, "samples_per_s": 10.0, "share": share, "peak": peak,
            "planned_peak": 10.0, "step0_bf16": off, "setting": setting._asdict()}


def test_goals_are_met_missed_or_not_measured(result):
    def verdicts(speed, trl=()):
        result.facts["pieces"] = {"a": {"part": "speed", "rows": speed},
                                  "b": {"part": "trl", "rows": list(trl)}}
        return [goal["verdict"] for goal in gpu.goals(result)]

    def round_of(side, rate, peak):
        return {"what": side, "side": side, "samples_per_s": rate, "peak": peak}
    modes = [speed_row(**mode) for mode in gpu_speed.MODES.values()]
    trl = [round_of("ours", 9.0, 5.0), round_of("TRL", 3.0, 9.0)]
    assert verdicts([]) == ["not measured"] * 5
    assert verdicts(modes, trl) == ["met"] * 5
    assert verdicts([*modes, speed_row(peak=11.1)], trl)[4] == "not met"
    assert verdicts([*modes, speed_row(off=2e-3)], trl)[3] == "not met"
    assert verdicts(modes[:3], trl)[3] == "not measured"                   # flex was not measured
    assert verdicts([speed_row(share=0.39)])[0] == "not met"
    assert verdicts([speed_row(llm="qwen2.5-0.5b")])[0] == "not measured"
    trl += [round_of("ours", 8.9, 5.5)]                      # the slower of two rounds counts
    assert verdicts([], trl)[1:3] == ["not met"] * 2
    result.facts["card"]["name"] = "cpu"
    assert verdicts(modes, trl) == ["not measured"] * 5


# ----------------------------------------------------------------------------------------- correct

def test_kernels_agree_with_the_definition_and_a_wrong_mask_or_nan_does_not(monkeypatch):
    branch = gpu_correct.branches(64, "cpu")
    assert gpu_correct.off_by("sdpa", torch.float32, branch, low=False)["ok"]
    assert gpu_correct.off_by("sdpa", torch.bfloat16, branch, low=True)["ok"]
    true = m.attention_mask

    def all_see(branch, kernel, dtype):             # the rejected answer reads the chosen one
        return true(torch.where(branch == m.REJECTED, m.CHOSEN, branch), kernel, dtype)
    monkeypatch.setattr(m, "attention_mask", all_see)
    assert not gpu_correct.off_by("sdpa", torch.bfloat16, branch, low=False)["ok"]
    monkeypatch.setattr(m, "attention_mask", lambda *x: true(*x) * math.nan)
    row = gpu_correct.off_by("sdpa", torch.float32, branch, low=False)
    assert row["gradient"] == math.inf and not row["ok"]


def test_losses_apart_runs_cut_short_and_failures_are_seen():
    def verdict(one, other):
        return gpu_correct.compared("", one, other, 1e-4)["ok"]
    losses = [{"loss": 0.7}, {"loss": 0.6}]
    assert verdict(losses, losses)
    assert not verdict(losses, [{"loss": 0.7}, {"loss": 0.6002}])
    assert not verdict(losses, losses[:1]) and not verdict("RuntimeError: gone", losses)
    assert gpu_correct.step0("dpo bf16", [{"loss": math.log(2) + 9e-4, "margin": 0}])["ok"]
    assert not gpu_correct.step0("dpo fp32", [{"loss": math.log(2) + 9e-4, "margin": 0}])["ok"]
    assert not gpu_correct.step0("dpo bf16", [{"loss": math.log(2), "margin": 2e-3}])["ok"]
    assert gpu_correct.waits_row("dpo", {"waits": 8})["ok"]
    assert not gpu_correct.waits_row("dpo", {"waits": 29})["ok"]         # as it was once
    assert not gpu_correct.waits_row("dpo", "RuntimeError: gone")["ok"]


# -------------------------------------------------------------------------------------------- waits

def test_waits_are_counted_where_the_host_reads_what_lies_on_the_device():
    def count(work):
        with gpu_waits.counted() as found:
            work()
        return found.total()

    def there(*shape):
        return torch.ones(shape).to(torch.device("cpu"), non_blocking=True)
    assert count(lambda: there(4, 4).sum()) == 0
    assert count(lambda: torch.ones(4).sum().item()) == 0                  # that lies on the host
    for reads in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool,
                  torch.Tensor.nonzero):
        assert count(lambda: reads(there(1))) == 1, reads
    assert count(lambda: there(4)[there(4) > 0]) == 1                      # how many are they?
    assert count(lambda: there(4)[torch.arange(4)]) == 0
    assert count(lambda: torch.ones(4).to(torch.device("cpu"))) == 1       # not non_blocking
    assert count(lambda: torch.tensor([1.0], device=torch.device("cpu"))) == 1
    assert count(lambda: torch.arange(4, device=torch.device("cpu")).sum()) == 0
    assert count(lambda: [row.numpy() for row in there(4, 4).cpu()]) == 1
    weight = torch.ones(4, requires_grad=True)
    assert count(lambda: (there(4) * weight)[there(4) > 0].sum().backward()) == 2
    mask = torch.ones(4, dtype=torch.bool)
    assert count(lambda: there(4).masked_scatter(mask, there(4) * weight).sum().backward()) == 1


def test_a_step_waits_three_times_a_micro_batch_and_twice_more(stage1, world, tmp_path):
    run("benchmarks/gpu_waits.py", "train_dpo", "--json", tmp_path / "waits.json", "--run-dir",
        tmp_path / "run", "--parent", stage1, "--data", world, "--global-batch", 8,
        "--micro-batch", 4, "--heldout", "none")
    assert json.loads((tmp_path / "waits.json").read_text())["waits"] == 2 * 3 + 2


# -------------------------------------------------------------------------------------------- speed

@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_what_is_seen_is_what_the_mask_shows(stage):
    setting = g.quick_of(gpu_speed.BASE._replace(stage=stage))
    model = g.build(setting.encoder, setting.llm, torch.device("cpu"))
    batch = data.collate(g.samples(model, setting.prompt, setting.answer, 1), setting.layout)
    length = batch["input_ids"].shape[1]
    shown = m.pair_mask(batch["branch"]) if stage == "dpo" else torch.ones(length, length).tril()
    assert g.seen_by(setting, model.encoder.num_tokens + setting.prompt) == shown.sum()
    assert batch["input_ids"].max() == model.image_token_id == 999


class Inline:
    """An executor that works at once: a fork of this process would wait for threads that it has
    not."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


def test_a_step_is_measured_and_starts_at_ln_2(monkeypatch):
    monkeypatch.setattr(gpu_speed, "ProcessPoolExecutor", Inline)
    work = gpu_speed.speed(gpu_speed.LARGE, [200], "plain", "flex")
    step, sft, left_out, profile = rows_of(work)
    assert step["ok"] and step["step0_bf16"] < 1e-6
    assert step["samples_per_s"] > 0 and step["hours"] > 20_000 * 3 / step["samples_per_s"] / 3600
    assert sft["setting"]["stage"] == "sft" and left_out["left_out"] == "needs CUDA"
    assert profile["ok"] and len(profile["kernels"]) == 10
    reference_of_other_weights(monkeypatch)
    assert not rows_of(gpu_speed.speed(gpu_speed.LARGE, [200], "checkpointing"))[0]["ok"]


def reference_of_other_weights(monkeypatch):
    """What must be seen at step 0: log-probs of the reference that are not this model's."""
    true = g.Step.reference

    def broken(self):
        true(self)
        with torch.no_grad():
            for p in self.model.llm.parameters():         # so that answers differ, as they hardly
                p.add_(torch.randn_like(p), alpha=0.1)    # do where all weights are near 0
    monkeypatch.setattr(g.Step, "reference", broken)


def test_without_trl_its_side_is_left_out_and_ours_starts_at_ln_2(monkeypatch):
    monkeypatch.setattr(gpu_speed.importlib.util, "find_spec", lambda name: None)
    assert rows_of(gpu_speed.trl_pairs)[0]["left_out"] == "TRL cannot be imported here"
    row, = rows_of(gpu_speed.our_pairs)
    assert row["ok"] and row["side"] == "ours" and row["samples_per_s"] > 0
    reference_of_other_weights(monkeypatch)
    row, = rows_of(gpu_speed.our_pairs)
    assert not row["ok"]


@pytest.mark.parametrize("first_loss,ok", [(math.log(2) + 0.03, True), (math.log(2) + 0.07, False)])
def test_a_side_of_trl_that_does_not_start_at_ln_2_is_seen(monkeypatch, first_loss, ok):
    """With TRL's side made up: it takes 2 s a step, 3 s for its reference, and says first_loss."""
    def trl_side(timed, *_, **__):
        timed.took = {"reference": [3.0], "step": [9.0, 2.0, 2.0]}
        timed.losses = [first_loss, 0.1]
    made_up = types.ModuleType("dpo_vs_trl")
    made_up.trl_side = trl_side
    monkeypatch.setitem(sys.modules, "dpo_vs_trl", made_up)
    monkeypatch.setattr(gpu_speed.importlib.util, "find_spec", lambda name: True)
    row, = rows_of(gpu_speed.trl_pairs)
    assert row["ok"] == ok and row["seconds"] == 3 and row["samples_per_s"] == 2 / 3


def test_gaps_and_shares_of_a_profile():
    assert gpu_speed.busy([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    row = gpu_speed.profile_row("x", {"sm90_xmma_gemm_bf16": 60, "flash_fwd": 30, "copy": 10}, 0.1)
    assert [row[k] for k in ("matrix products", "attention", "other")] == [0.6, 0.3, 0.1]
    assert g.nominal_rate("NVIDIA H100 80GB HBM3") == 989e12 and g.nominal_rate("cpu") is None


# ------------------------------------------------------------------------------ generate and decode

def test_answers_are_those_of_transformers_or_the_check_fails(monkeypatch):
    rows = rows_of(gpu_speed.generate)
    assert len(rows) == 4 and all(row["ok"] for row in rows)
    assert rows[0]["same_tokens"] == 1 and rows[0]["different_tokens"] > 16
    true = m.MLLM.generate
    monkeypatch.setattr(m.MLLM, "generate", lambda self, pixels, *rest, **more:
                        true(self, pixels.flip(-1), *rest, **more))
    assert not rows_of(gpu_speed.generate)[0]["ok"]


def test_the_loader_gives_every_image(monkeypatch):
    rows = rows_of(gpu_speed.decode)
    assert all(row["ok"] and row["images_per_s"] > 0 for row in rows)
    true = data.BatchOrder.cover
    monkeypatch.setattr(data.BatchOrder, "cover", lambda self: true(self)[:-1])
    assert not any(row["ok"] for row in rows_of(gpu_speed.decode))
