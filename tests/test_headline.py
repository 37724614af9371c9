"""The README's command for eight GPUs, to the letter, on eight CPU processes.

Behind the real presets' names stand narrow, shallow models of the same classes in a hub cache of
our own: SigLIP of 384 pixels and 576 tokens, Qwen2 with tied embeddings of 151,936 rows. What is
loaded, how it is found, sharded and saved is the code that loads the published ones.
"""
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from pivot import encoders, model_io
from conftest import ROOT, metrics

EXTRA = ["--activation-checkpointing", "--global-batch", "16", "--num-samples", "16",
         "--workers", "0"]


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A bare checkout with data/ and a hub cache that holds the two models; stage 1 is trained."""
    here = tmp_path_factory.mktemp("checkout")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, here)
    for folder in ("pivot", "judge", "tools"):
        shutil.copytree(ROOT / folder, here / folder)
    shutil.copytree(world, here / "data")
    (here / "data/preferences/heldout.jsonl").unlink()        # scoring it is not what is shown here
    torch.manual_seed(0)
    eye = t.SiglipVisionModel(t.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        image_size=384, patch_size=16))
    llm = t.Qwen2ForCausalLM(t.Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=151_936, tie_word_embeddings=True))
    for model, name in ((eye, encoders.ENCODERS["siglip2-so400m"].path),
                        (llm, encoders.LLMS["qwen2.5-1.5b"].path)):
        cache = here / "hub" / f"models--{name.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs/main").write_text("0" * 40)
        model.save_pretrained(cache / "snapshots" / ("0" * 40))
        if model is llm:
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(ROOT / "weights/toy-lm" / file, cache / "snapshots" / ("0" * 40))
    command(here, "python pretrain.py --encoder siglip2-so400m", "--projector-max-steps", "1",
            "--max-steps", "1", *EXTRA)
    return here


def command(here, line, *more):
    """A line of the README, run where a user would run it."""
    words = [*line.split(), *more]
    words = [sys.executable, *words[1:]] if words[0] == "python" else \
        [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "HF_HUB_CACHE": str(here / "hub")})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_headline_command_on_eight_processes(place):
    """FSDP2, checkpointing, accumulation, cached reference, bf16: it starts at ln 2, agrees with
    one fp32 process to 1e-2, and at the paper's 1e-6 every trained tensor moves."""
    line = "torchrun --nproc_per_node=8 train_dpo.py --encoder siglip2-so400m"
    assert line in (ROOT / "README.md").read_text()
    text = command(place, line, "--max-steps", "2", *EXTRA, "--micro-batch", "1", "--dtype", "bf16")
    assert "8 processes × 2 micro-steps of 1" in text and "image = 576 tokens" in text
    folder = place / "runs/siglip2-so400m__qwen2.5-1.5b"
    eight = [x for x in metrics(folder / "dpo") if "loss" in x]
    assert abs(eight[0]["loss"] - math.log(2)) < 1e-6 and len(eight) == 2
    assert set(eight[0]["lr"].values()) == {1e-6}
    before, after = (load_file(folder / s / "final/model.safetensors") for s in ("pretrain", "dpo"))
    assert "language_model.lm_head.weight" not in after
    assert after["language_model.model.embed_tokens.weight"].shape == (151_936, 32)
    assert all(v.dtype == torch.float32 for v in after.values())
    still = [k for k in after if torch.equal(before[k], after[k])]
    assert sorted(still) == [f"vision_tower.vision_model.post_layernorm.{x}" for x in ("bias", "weight")]
    assert (folder / "dpo/ref_logps.safetensors").exists()
    model, _ = model_io.load_mllm(folder / "dpo/final")
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight

    shutil.copytree(folder, place / "runs/one", ignore=shutil.ignore_patterns("dpo"))
    command(place, "python train_dpo.py --run-dir runs/one", "--max-steps", "2", *EXTRA,
            "--dtype", "fp32", "--reference", "live")
    one = [x for x in metrics(place / "runs/one/dpo") if "loss" in x]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(eight, one)) < 1e-2
    assert Path(place / "runs/one/dpo/final/README.md").exists()
