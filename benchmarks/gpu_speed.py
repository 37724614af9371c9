"""gpu.py's parts `speed`, `trl`, `generate` and `decode`: how fast, in how much memory?"""
import functools
import importlib.util
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType

import data
import gpu_models as g
from pivot import distributed, encoders, model_io, published
from tools import plan

ROOT = Path(__file__).resolve().parent.parent
SMALL, LARGE = "qwen2.5-0.5b", "qwen2.5-1.5b"

# ---------------------------------------------------------------------------------------- a step

BASE = g.Setting(g.ENCODER, LARGE, "dpo", g.PROMPT, 200)
MODES = {"plain": {}, "checkpointing": {"checkpointing": True},
         "larger": {"micro_batch": 8, "micro_steps": 2}, "flex": {"attention": "flex"},
         "compile": {"compiled": True}, "flex and compile": {"attention": "flex", "compiled": True}}


def settings(llm, answers, modes):
    """For each length of answers DPO in every mode, and SFT in those that say something new."""
    for answer in answers:
        for mode in modes:
            for stage in ("dpo", "sft") if mode in ("plain", "compile") else ("dpo",):
                yield BASE._replace(llm=llm, stage=stage, answer=answer, **MODES[mode])


def measure(say, quick, wanted):
    """A row for each setting, and the profile of the best. One that fails is a row that says so."""
    wanted = list(dict.fromkeys(map(g.quick_of, wanted))) if quick else wanted
    # The planner works in a process beside this one, forked before there is a CUDA to be lost.
    planner = ProcessPoolExecutor(1, multiprocessing.get_context("fork"),
                                  initializer=distributed.die_with_parent)
    plans = {setting: planner.submit(g.planned, setting) for setting in wanted}
    device, best = distributed.start(), None
    rate = g.product_rate(device, quick)
    for setting in wanted:
        needs_cuda = setting.attention == "flex" or setting.compiled
        if needs_cuda and not g.on_gpu(device):
            say({"what": title(setting), "left_out": "needs CUDA"})
            continue
        try:
            row = speed_of(setting, device, rate, quick, plans[setting])
        except Exception as error:                     # out of memory, a compiler: the next may go
            say({"what": title(setting), "error": f"{type(error).__name__}: {error}"[:300],
                 "ok": False})
        else:
            say(row)
            if setting.stage == "dpo" and (best is None or row["samples_per_s"] > best[0]):
                best = row["samples_per_s"], setting
        g.release(device)
    if best:
        say(profile_of(best[1], device, quick))


def title(setting):
    return (f"{setting.stage}, {setting.llm}, answers of {setting.answer}, {setting.mode}, "
            f"micro-batch {setting.micro_batch} × {setting.micro_steps}")


def speed_of(setting, device, rate, quick, plan_made):
    """Train a few steps. → the row: what was measured, and what the planner says of the same.
    plan_made: a future of its Planned."""
    step, enough = g.Step(setting, device), 0.1 if quick else 2.0
    row, count = {"what": title(setting), "setting": setting._asdict()}, len(step.batches)
    per_s_reference = math.inf
    if setting.stage == "dpo":
        step.reference()                                              # compiles, if it does at all
        took = min(g.seconds_of(step.reference, device, least=1, enough=0))
        per_s_reference = count * setting.micro_batch / took
        first = step()
        row |= {"step0_loss": first["loss"], "step0_margin": first["margin"],
                "step0_bf16": max(abs(first["loss"] - math.log(2)), abs(first["margin"]))}
        row["ok"] = row["step0_bf16"] <= 1e-3
    else:
        step()
    if g.on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    took = g.seconds_of(step, device, least=2, enough=enough)
    peak = peak_of(device)
    seconds, said = statistics.median(took), plan_made.result()
    samples, tokens = count * setting.micro_batch, step.batches[0]["input_ids"].shape[1]
    card = torch.cuda.get_device_name() if g.on_gpu(device) else "cpu"
    planned_s = said.spent / (plan.UTILISATION * (g.nominal_rate(card) or rate))
    planned_reference = said.reference * planned_s / said.spent or math.inf
    planned_per_s = samples / planned_reference if setting.stage == "dpo" else math.inf
    return row | {
        "seconds": seconds, "slowest": max(took), "samples_per_s": samples / seconds,
        "tokens_per_s": samples * tokens / seconds, "peak": peak, "planned_peak": said.bytes,
        "share": said.work / seconds / rate, "product_flops": rate, "planned_seconds": planned_s,
        "hours": g.hours(samples / seconds, per_s_reference),
        "planned_hours": g.hours(samples / planned_s, planned_per_s)}


def peak_of(device):
    """The most bytes of tensors since the counter was reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if g.on_gpu(device) else None


# ----------------------------------------------------------------------------------- a profile

MATRIX = ("gemm", "cutlass", "nvjet", "xmma", "matmul", "aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("flash", "fmha", "attention", "flex")


def kind_of(name):
    """"attention", "matrix products" or "other", by a kernel's name (on a CPU, an operation's)."""
    name = name.lower()
    if any(word in name for word in ATTENTION):
        return "attention"
    return "matrix products" if any(word in name for word in MATRIX) else "other"


def busy(spans):
    """Length of the union of [(start, end), …]."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def profile_of(setting, device, quick):
    """One step of a setting under torch's profiler: its ten longest kernels, the shares of matrix
    products and attention, and the gaps: the share of its time when no kernel ran."""
    from torch.profiler import ProfilerActivity, profile
    step = g.Step(setting, device)
    step.reference()
    for _ in range(2):
        step()
    on_gpu = g.on_gpu(device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    g.wait(device)
    with profile(activities=activities) as watched:
        began = time.perf_counter()
        step()
        g.wait(device)
        microseconds = 1e6 * (time.perf_counter() - began)
    if on_gpu:
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in watched.events()
                 if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        times = {}
        for name, start, end in spans:
            times[name] = times.get(name, 0) + end - start
        gaps = 1 - busy([span[1:] for span in spans]) / microseconds
    else:
        times = {e.key: e.self_cpu_time_total for e in watched.key_averages()}
        gaps = None
    del step
    g.release(device)
    return profile_row(title(setting), times, gaps)


def profile_row(what, times, gaps):
    """times: {kernel: microseconds}; → the row of a profile."""
    total, shares = sum(times.values()), {"matrix products": 0, "attention": 0, "other": 0}
    for name, took in times.items():
        shares[kind_of(name)] += took / total
    longest = sorted(times, key=times.get, reverse=True)[:10]
    return {"what": f"profile of {what}", **shares, "gaps": gaps, "ok": total > 0, "kernels": [
        f"{times[name] / total:6.1%}  {times[name] / 1000:9.2f} ms  {name[:90]}"
        for name in longest]}


# --------------------------------------------------------------------------------------------- TRL

TRL_BATCH, TRL_STEPS = 4, 6


def our_pairs(say, quick):
    """Our DPO step, one micro-batch a step, as TRL's is measured; the reference's cost is added, as
    one pass in three steps."""
    setting = BASE._replace(micro_batch=TRL_BATCH, micro_steps=1)
    device = distributed.start()
    setting = g.quick_of(setting)._replace(micro_steps=1) if quick else setting
    modes = {"plain": {}} if not g.on_gpu(device) else {"plain": {}, "flex": MODES["flex"]}
    for mode in modes.values():
        setting = setting._replace(**mode)
        step = g.Step(setting, device)
        step.reference()
        once = min(g.seconds_of(step.reference, device, least=1, enough=0))
        first = step()["loss"]
        if g.on_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
        took = g.seconds_of(step, device, least=2, enough=0.1 if quick else 2.0)
        seconds = statistics.median(took) + once / 3
        say({"what": title(setting), "side": "ours", "seconds": seconds,
             "samples_per_s": setting.micro_batch / seconds, "first_loss": first,
             "ok": abs(first - math.log(2)) <= 1e-3, "peak": peak_of(device)})
        del step
        g.release(device)


class Timed:
    """What turns.Turns is to a side, without turns: seconds of the reference and of each step."""

    def __init__(self, device):
        self.device, self.took, self.losses = device, {"reference": [], "step": []}, []

    def begin(self, kind):
        g.wait(self.device)
        self.kind, self.began = kind, time.perf_counter()

    def end(self, value=None):
        g.wait(self.device)
        self.took[self.kind].append(time.perf_counter() - self.began)
        self.losses += [value] if self.kind == "step" else []


def trl_pairs(say, quick):
    """TRL's DPOTrainer at the settings its documentation recommends for speed: bf16, the reference
    precomputed, answer rows alone through lm_head, no checkpointing (with it, where it must)."""
    if importlib.util.find_spec("trl") is None:
        say({"what": "TRL", "left_out": "TRL cannot be imported here"})
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if g.on_gpu(device):
        torch.cuda.init()          # now: what is imported next hides the GPUs from CPU benchmarks
    import common as c
    from dpo_vs_trl import trl_side
    setting = g.quick_of(BASE) if quick else BASE
    batch = 2 if quick else TRL_BATCH
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "model")
        saved(setting, device, folder)
        g.release(device)
        config = json.loads((folder / "config.json").read_text())
        shape = c.Shape(config["image_seq_length"], setting.answer, 1_000 if quick else 151_936,
                        batch, setting.prompt)
        for checkpointing in (False, True):
            if g.on_gpu(device):
                torch.cuda.reset_peak_memory_stats(device)
            timed = Timed(device)
            try:
                trl_side(timed, folder, shape, TRL_STEPS // c.EPOCHS, True, True,
                         use_cpu=not g.on_gpu(device), bf16=g.on_gpu(device),
                         gradient_checkpointing=checkpointing)
                break
            except torch.OutOfMemoryError as error:
                say({"what": "TRL, without checkpointing", "error": str(error)[:200]})
                g.release(device)
        seconds = statistics.median(timed.took["step"][1:]) + min(timed.took["reference"]) / 3
        say({"what": f"TRL{', checkpointing' if checkpointing else ''}, batch {batch}",
             "side": "TRL", "seconds": seconds, "samples_per_s": batch / seconds,
             "first_loss": timed.losses[0], "ok": abs(timed.losses[0] - math.log(2)) <= 5e-2,
             "peak": peak_of(device)})


def saved(setting, device, folder, wild=False):
    """A random model of a setting's geometry as the folder that transformers opens. → the model.
    wild: of weights so large that what it says depends on every token and pixel."""
    model = g.build(setting.encoder, setting.llm, device)
    if wild:
        with torch.no_grad():
            for p in (*model.llm.parameters(), *model.projector.parameters()):
                p.normal_(0, 0.3) if p.dim() == 2 else p.fill_(1)
    tokenizer = published.open_tokenizer(ROOT / "weights" / "toy-lm")
    model.image_token_id = published.prepare_tokenizer(tokenizer)
    folder.mkdir(parents=True)
    model_io.save_mllm(model, tokenizer, folder, True)
    return model


# -------------------------------------------------------------------------------------- answering

def generate(say, quick):
    """MLLM.generate as repair_eval.py calls it, beside transformers' generate on the same weights:
    one by one, as evaluation scripts call it, and in the same batch. bf16 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        sides = answering(g.quick_of(BASE), device, torch.float32, 4, 8, wild=True)
        ours, theirs = (np.array(sides[name][0]()) for name in ("ours", "transformers, in a batch"))
        same = float((ours == theirs).mean())
        say({"what": "the same answers, wild weights, fp32", "same_tokens": same,
             "different_tokens": len(set(ours.flatten().tolist())), "ok": same >= 0.95})
        setting, batch, new = (g.quick_of(BASE), 4, 4) if quick else (BASE, 64, 32)
        dtype = torch.bfloat16 if g.on_gpu(device) else torch.float32
        for name, (work, count) in answering(setting, device, dtype, batch, new).items():
            said = work()                                                      # and warms up
            took = min(g.seconds_of(work, device, least=2, enough=0))
            say({"what": f"{name}: answers of {new} tokens, batch {batch}", "answers_per_s":
                 count / took, "ok": all(len(answer) == new for answer in said)})


def answering(setting, device, dtype, batch, new, wild=False):
    """{side: (function that gives all answers as lists of `new` token ids, how many answers)}."""
    from transformers import AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "model")
        ours = saved(setting, device, folder, wild).eval()
        theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    for p in ours.parameters():                              # as repair_eval.open_for_answers
        p.data = p.data.to(dtype)
    theirs.generation_config.eos_token_id = None             # `new` tokens, whatever they are
    prompts = data.collate(g.samples(ours, setting.prompt, 1, batch), "prompts")
    n, image_id = ours.encoder.num_tokens, ours.image_token_id
    ids = prompts["input_ids"] % image_id                    # the toy's tokenizer, and its <image>
    ids[:, :n] = image_id
    ids, mask, pixels = (x.to(device) for x in (ids, prompts["attention_mask"],
                                                prompts["pixel_values"]))
    values = ((pixels / 255 - 0.5) / 0.5).to(dtype)

    def their_answers(first, last):
        said = theirs.generate(
            input_ids=ids[first:last], pixel_values=values[first:last],
            attention_mask=mask[first:last], max_new_tokens=new, min_new_tokens=new,
            do_sample=False)
        return said[:, ids.shape[1]:].tolist()
    few = min(batch, 8)
    return {"ours": (lambda: ours.generate(pixels, ids, mask, new, stop_ids={-1}), batch),
            "transformers, in a batch": (lambda: their_answers(0, batch), batch),
            "transformers, one by one": (lambda: [their_answers(i, i + 1)[0]
                                                  for i in range(few)], few)}


# --------------------------------------------------------------------------------------- decoding

def decode(say, quick):
    """Images/s of the training loader, JPEGs of 640 × 480 squashed to 384 × 384, by workers."""
    count, sizes = (48, (32, 24)) if quick else (1536, (640, 480))
    cores = distributed.cores()
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        waves = rng.random((8, 8, 3)) * 255
        for i in range(32):                                    # smooth, with grain: like a photo
            smooth = Image.fromarray(np.uint8(np.roll(waves, i, 0))).resize(sizes, Image.BICUBIC)
            grain = np.asarray(smooth) + rng.normal(0, 6, (*sizes[::-1], 3))
            Image.fromarray(np.uint8(grain.clip(0, 255))).save(folder / f"{i}.jpg", quality=90)
        (folder / "pairs.jsonl").write_text("".join(json.dumps({
            "image": f"{i % 32}.jpg", "question": "<image>\nhow many circles are there ?",
            "chosen": "there are two", "rejected": "there is one"}) + "\n" for i in range(count)))
        tokenizer = published.open_tokenizer(ROOT / "weights" / "toy-lm")
        published.prepare_tokenizer(tokenizer)
        preset = encoders.ENCODERS[g.TINY_ENCODER if quick else g.ENCODER].geometry
        encoder = SimpleNamespace(image_size=preset[-1], num_tokens=(preset[-1] // preset[-2]) ** 2)
        pairs = data.Samples("pairs", [(folder / "pairs.jsonl", str(folder))], tokenizer, encoder,
                             2048, verbose=False)
        for workers in sorted({1, min(4, cores), cores}):
            order = data.BatchOrder(pairs, count, 4, 0, 0, 1)
            began, seen = time.perf_counter(), 0
            for batch in data.loader(pairs, order.cover(), "pair", workers):
                seen += len(batch["pixel_values"])
            seconds = time.perf_counter() - began
            say({"what": f"{workers} workers", "images_per_s": seen / seconds,
                 "each": seen / seconds / workers, "ok": seen == count})


# ------------------------------------------------------------------------------------ the pieces

def speed(llm, answers, *modes):
    return functools.partial(measure, wanted=list(settings(llm, answers, modes)))


PIECES = [
    ("speed", "1.5B, answers of 200", speed(LARGE, [200], "plain", "checkpointing", "larger"), 100),
    ("speed", "1.5B, flex and compile",
     speed(LARGE, [200], "flex", "compile", "flex and compile"), 160),
    ("speed", "1.5B, answers of 32", speed(LARGE, [32], "plain"), 60),
    ("speed", "0.5B", speed(SMALL, [200, 32], "plain"), 80),
    ("trl", "ours, first", our_pairs, 60), ("trl", "TRL, first", trl_pairs, 90),
    ("trl", "ours, again", our_pairs, 60), ("trl", "TRL, again", trl_pairs, 90),
    ("generate", "batch 64", generate, 90), ("decode", "the loader", decode, 60)]
