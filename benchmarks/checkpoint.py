"""What a checkpoint costs: the share of a run's wall time when it is saved every 50 steps.

    python benchmarks/checkpoint.py data/toy [--steps 30] [--every 10] [--batch 4]

Trains a random model of 30 million parameters through pretrain.py itself, which says how long each
checkpoint took; timing.jsonl has the steps. A run saved every 50 steps is then computed, not waited
for. Saving is synchronous: shards, fsync, rename.
"""
import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent


def make_models(folder):
    """A SigLIP-shaped encoder (6 × 384) and a Qwen2-shaped LLM (8 × 448), random, on disk."""
    from transformers import (AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig,
                              SiglipVisionModel)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "weights" / "toy-lm")
    tokenizer.save_pretrained(folder / "llm")
    Qwen2ForCausalLM(Qwen2Config(
        hidden_size=448, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=1024)).save_pretrained(folder / "llm")
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=7, num_attention_heads=6,
        image_size=48, patch_size=8, vision_use_head=False)).save_pretrained(folder / "eye")
    shutil.copy(ROOT / "weights" / "toy-vit" / "preprocessor_config.json", folder / "eye")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a world drawn by `python -m toy`")
    parser.add_argument("--steps", type=int, default=30, help="steps to run")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints here")
    parser.add_argument("--batch", type=int, default=4, help="conversations a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        make_models(folder)
        command = [sys.executable, "pretrain.py", "--run", folder / "run", "--encoder",
                   folder / "eye", "--llm", folder / "llm", "--data", args.data, "--lr", 1e-4,
                   "--global-batch", args.batch, "--micro-batch", args.batch, "--workers", 1,
                   "--max-steps", args.steps, "--projector-max-steps", 1, "--save-every",
                   args.every, "--keep", 1]
        # As a run of its own disk use shows: watch the newest checkpoint while it is there.
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT,
                                   stdout=open(folder / "log", "w"))
        size = 0
        while process.poll() is None:
            for step in (folder / "run/pretrain/checkpoints").glob("step-*"):
                size = max(size, sum(p.stat().st_size for p in step.glob("*") if p.exists()))
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
        if process.returncode:
            raise SystemExit(f"error: pretrain.py ended with {process.returncode}")
        saves = [float(x) for x in re.findall(r"saved after \d+ steps, in (.*) s",
                                              (folder / "log").read_text())]
        lines = [json.loads(x) for x in (folder / "run/pretrain/timing.jsonl").open()]
        with safe_open(folder / "run/pretrain/final/model.safetensors", "pt") as file:
            count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    seconds = [x["seconds"] for x in lines if x["step"] > 2]
    step, save = statistics.median(seconds), statistics.mean(saves)
    print(f"{count / 1e6:.1f} million parameters, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}\n"
          f"  checkpoint   {size / 1e6:8.0f} MB on disk, {save:6.2f} s (mean of {len(saves)})\n"
          f"  step         {step:8.2f} s (median of {len(seconds)})\n"
          f"  every 50 steps: {100 * save / (50 * step + save):.1f} % of the wall time")


if __name__ == "__main__":
    main()
