"""A run folder made of numbers drawn at random, whole, in seconds: for the tests of the page.

    python tests/made_run.py FOLDER      # a run whose names and answers are hostile, and its page;
                                         # `make look` opens it

Every file has the layout that the stages and instruments write.
"""
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EVIL = ("<script>alert(1)</script>\"'&amp;<img src=x onerror=alert(2)> \u202egnitirw\u2066 אבג "
        "$x_$ 👩‍🔬")
LONG = "ab" * 5000
STAGES, STATIONS = ("pretrain", "sft", "dpo"), ["image positions", "projector", "block 2",
                                                "block 1", "patch embedding"]


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) if not isinstance(value, str) else value, encoding="utf-8")


def logs(folder, steps, rng, more=()):
    """metrics.jsonl and timing.jsonl; more: keys besides those of SFT."""
    loss, norm = rng.random((2, steps)) + 0.1
    loss[steps // 3], loss[steps // 2] = 9.0, 0.01                 # extremes of a single step
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(steps):
            rates = {m: 1e-4 * (i + 1) / steps for m in ("encoder", "projector", "llm")}
            line = {"step": i, "samples_seen": 32 * (i + 1), "loss": loss[i], "lr": rates,
                    "grad_norm": {m: norm[i] * (j + 1) for j, m in enumerate(rates)}}
            file.write(json.dumps(line | {key: loss[i] / 10 for key in more}) + "\n")
    with open(folder / "timing.jsonl", "w") as file:
        for i in range(steps):
            file.write(json.dumps({"step": i, "data_wait": 0.01, "seconds": 0.5,
                                   "tokens_per_s": 900.0 + loss[i], "peak_bytes": 2 ** 30}) + "\n")


def stage(folder, name, steps, rng, evil, llm="toy-lm"):
    arguments = {"run": "r", "encoder": "toy-vit", "llm": llm, "data": str(folder.parent / "data"),
                 "lr": 1e-4, "seed": 0, "stage": name, "parent": "pretrain", "note": evil or None}
    put(folder / name / "config.json", {
        "arguments": arguments, "data": f"7 pairs {evil}", "data_digest": "d" * 16,
        "versions": {"torch": evil}, **({"encoder_digest": "e" * 16, "llm_digest": "f" * 16}
                                        if "pretrain" in name or "repair" in name
                                        else {"parent_digest": "a" * 16})})
    put(folder / name / "final" / "config.json", {})
    more = ["margin", "accuracy", "chosen_reward", "rejected_reward"] if name == "dpo" else []
    logs(folder / name, steps, rng, [*more, *([evil] if evil else [])])
    put(folder / name / "encoder" / "moved.json", {
        "original": evil or "toy-vit", "parent": "pretrain", **{
            key: {"embeddings": 0.01, "layers.0": rng.random(), "layers.1": rng.random()}
            for key in ("moved", "moved_since_parent")}})


def bench_files(folder, evil):
    """Two benchmark files of twenty questions, with pictures, one of which is none."""
    from PIL import Image
    out = io.BytesIO()
    Image.effect_mandelbrot((60, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(out, "PNG")
    picture = base64.b64encode(out.getvalue()).decode()
    broken = base64.b64encode(b"<svg onload='alert(3)'/>" * 9).decode()
    for name in ("ToyGeneral", "ToyOCR"):
        rows = [["index", "image", "question", "answer", "category"]]
        rows += [[str(i), broken if i == 1 else picture, f"question {i} {evil}".replace('"', "''"),
                  f"yes {evil}".replace('"', "''"), "c"] for i in range(20)]
        put(folder / f"{name}.tsv", "\n".join("\t".join(row) for row in rows) + "\n")


def answers(folder, rng, evil):
    """bench/ of a model: answers, units, results."""
    units, found = {}, {}
    for name in ("ToyGeneral", "ToyOCR"):
        right = rng.integers(0, 2, 20)
        units[name] = [["", str(i), float(v)] for i, v in enumerate(right)]
        said = [f"yes {evil}".replace('"', "''") if v else LONG if i == 3 else f"no {evil}"
                for i, v in enumerate(right)]
        lines = [json.dumps({"index": str(i), "prediction": x}) for i, x in enumerate(said)]
        put(folder / f"{name}.0.jsonl", "\n".join(lines) + "\n")
        found[name] = {"score": 100 * right.mean(), "ci95": 5.0, "n": 20, "chance": 50.0}
    put(folder / "units.json", units)
    scores = {name: f["score"] for name, f in found.items()}
    put(folder / "results.json", {
        "benchmarks": found, "groups": {"General": scores["ToyGeneral"],
                                        "OCR & Chart": scores["ToyOCR"]},
        "average": sum(scores.values()) / 2, "missing": []})


def probes(folder, rng, evil):
    from PIL import Image
    names, pairs = ["toy-vit", "sft", "dpo"], ["sft - toy-vit", "dpo - toy-vit", "dpo - sft"]
    put(folder / "linear/results.json", {
        "encoders": {n: {"top1": {"mean": 0.5, "ci95": [0.4, 0.6]}} for n in names},
        "differences": {p: {"top1": {"mean": 0.01, "ci95": [-0.02, 0.03]}} for p in pairs}})
    put(folder / "seg/results.json", {
        "encoders": {n: {"recall": [0.7, 0.72]} for n in names},
        "differences": {p: {"recall": [0.0, 0.02], "recall_ci95": [-0.01, 0.02]} for p in pairs}})
    put(folder / "align/results.json", {
        "scores": [{"encoder": n, "llm": evil or "toy-lm", "mean": 0.1, "sd": 0.01, "text": "0.1",
                    "block": "2", "layer": "1", "rows": ["1", "2"], "columns": ["0", "1", "2"],
                    "map": rng.random((2, 3)).tolist()} for n in names],
        "paired": {f"{p}, {evil or 'toy-lm'}": {"mean": 0.01, "sd": 0.002} for p in pairs}})
    put(folder / "gradcam/results.json", {"share_inside": {
        n: {"mean": v, "ci95": 0.01} for n, v in
        (("SFT", 0.2), ("DPO", 0.25), ("DPO - SFT", 0.05), ("chance", 0.05))}})
    put(folder / "gradcam/path.json", {
        "pair": evil, "question": f"what? {evil}", "chosen": "red", "rejected": LONG, "steps": 0,
        "stage": "pretrain", "stations": STATIONS, "methods": {m: {
            "loss": 0.7, "whole": (rng.random(5) + 0.1).tolist(), "tokens": [
                {"text": f"red{evil}", "answer": a, "pull": -0.2,
                 "norms": (rng.random(5) + 0.1).tolist()} for a in ("chosen", "rejected")]}
            for m in ("sft", "dpo")}})
    for name in ("seg/overlays.png", "gradcam/gradcam.png"):
        Image.effect_noise((300, 200), 90).convert("RGB").save(folder / name)


def make(folder, steps=200, evil="", seed=0):
    """→ the run folder; its benchmark files lie in data/bench beside it."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    for name in STAGES:
        stage(folder, name, steps, rng, evil)
        answers(folder / name / "bench", rng, evil)
    if evil:
        stage(folder, "own <b>", steps, rng, evil)
    answers(folder / "pretrain" / "bench-wrong-image", rng, evil)
    for name in ("toy-vit", "sft", "dpo"):
        stage(folder, f"repair/{name}", 100, rng, evil)
        answers(folder / "repair" / name / "bench", rng, evil)
    bench_files(folder.parent / "data" / "bench", evil)
    probes(folder / "probes", rng, evil)
    return folder


if __name__ == "__main__":
    import subprocess
    made = make(Path(sys.argv[1]) / "hostile <b>", evil=EVIL)
    subprocess.run([sys.executable, "-m", "tools.page", str(made), "--questions", "12"], cwd=ROOT,
                   check=True)
