"""Shared by the benchmarks: shapes, random models and pairs, our step, the report.

Everything runs on the CPU, in fp32. How two ways to train are set beside each other: turns.py.
"""
import argparse
import contextlib
import io
import math
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore",
                  HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from pivot import distributed, encoders, files, model_io, published, records, training  # noqa: E402
import model as m  # noqa: E402

PATCH, EPOCHS, BETA, LR = 16, 3, 0.1, 2e-5
RESULTS = ROOT / "benchmarks" / "results"


class Shape(NamedTuple):
    """What is measured. Answers all have the same length: no padding, the kindest case for a
    layout of two rows a pair. prompt: text tokens after the image. vision, text: layers, width."""
    image_tokens: int
    answer: int
    vocab: int
    batch: int = 4
    prompt: int = 32
    vision: tuple = (6, 384)
    text: tuple = (8, 512)


SHAPES = {"A": Shape(576, 32, 32_000), "B": Shape(576, 32, 151_936), "C": Shape(256, 105, 2_000),
          "D": Shape(64, 400, 32_000)}
TINY = dict(batch=2, prompt=8, vision=(2, 64), text=(2, 64))
QUICK = {"A": Shape(36, 8, 1_000, **TINY), "B": Shape(36, 8, 3_000, **TINY),
         "C": Shape(16, 12, 800, **TINY), "D": Shape(4, 40, 1_000, **TINY)}


def arguments(doc):
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, seconds: does it run?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of every process (default %(default)s)")
    return parser


# ------------------------------------------------------------------------------- models and pairs

def build(shape, seed=0):
    """A random SigLIP + Qwen2 of this shape: (MLLM, toy-lm's tokenizer, which speaks ChatML).

    MLP 4 × width, heads of 64, a fourth as many key heads in the LLM, tied embeddings.
    """
    import transformers as t
    torch.manual_seed(seed)
    layers, width = shape.vision
    vision = t.SiglipVisionModel(t.SiglipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers + 1,  # one is cut
        num_attention_heads=width // 64, patch_size=PATCH,
        image_size=PATCH * math.isqrt(shape.image_tokens)))
    layers, width = shape.text
    llm = t.Qwen2ForCausalLM(t.Qwen2Config(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256),
        vocab_size=shape.vocab, max_position_embeddings=4096, tie_word_embeddings=True))
    encoder = encoders.Encoder(encoders.truncate(vision), encoders.HALF, encoders.HALF)
    tokenizer = published.open_tokenizer(ROOT / "weights" / "toy-lm")
    image_id = published.prepare_tokenizer(tokenizer)
    return published.refuse_dropout(m.MLLM(encoder, llm, image_id)), tokenizer


def save(shape, folder):
    """Write the random model as the folder that both load_mllm and transformers open."""
    model, tokenizer = build(shape)
    Path(folder).mkdir(parents=True)
    model_io.save_mllm(model, tokenizer, folder, True)


def pairs(shape, n, image_id, seed=1):
    """n random samples as data.Samples gives them: [image, prompt, chosen, rejected] and roles."""
    rng = np.random.default_rng(seed)
    size, prompt = PATCH * math.isqrt(shape.image_tokens), shape.image_tokens + shape.prompt
    roles = np.repeat([records.PROMPT, records.ANSWER, records.OTHER],
                      [prompt, shape.answer, shape.answer])
    return [{"index": i, "roles": roles, "ids": np.concatenate([
                np.full(shape.image_tokens, image_id),
                rng.integers(image_id + 1, shape.vocab, shape.prompt + 2 * shape.answer)]),
             "pixels": rng.integers(0, 256, (3, size, size), dtype=np.uint8)} for i in range(n)]


def batches(shape, samples, layout):
    """The samples in order, in micro-batches of data.collate, without their index."""
    made = [data.collate(samples[i:i + shape.batch], layout)
            for i in range(0, len(samples), shape.batch)]
    return [{k: v for k, v in batch.items() if k != "index"} for batch in made]


class Ours:
    """The step of train_dpo.py and train_sft.py, made of the repository's own parts: one process in
    fp32, fused AdamW, gradient norms and clipping included."""

    def __init__(self, model, lr=LR, compiled=False):
        device = torch.device("cpu") if torch.distributed.is_initialized() else distributed.start()
        self.model = distributed.shard(model, device, compiled=compiled)
        with contextlib.redirect_stdout(io.StringIO()):       # its table of rates
            self.optimizer = training.adamw(self.model, dict.fromkeys(training.MODULES, lr))

    def compile_on(self, batch):
        """Let all kernels be made now, of a DPO batch: nobody times the compiler."""
        self.reference(batch)
        self.model(**batch).sum().backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def reference(self, batch):
        """log π of both answers: (B, 2), as score_pairs has it."""
        return torch.stack(m.answer_logps(self.model(**batch), batch["branch"]), 1)

    def dpo_step(self, batch, ref):
        logps = m.answer_logps(self.model(**batch), batch["branch"])
        return self.update(m.dpo_loss(*logps, *ref.unbind(1), BETA)[0].mean())

    def sft_step(self, batch):
        return self.update(-self.model(**batch).sum() / (batch["labels"] != m.IGNORE).sum())

    def update(self, loss):
        loss.backward()
        training.clip_grad_norm(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


# ----------------------------------------------------------------------------------------- reports

def table(header, rows, left=1):
    """Print a table; the first columns to the left, the others to the right."""
    cells = [list(map(str, r)) for r in [header, *rows]]
    wide = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(c.ljust(w) if i < left else c.rjust(w)
                        for i, (c, w) in enumerate(zip(row, wide))))
    print(flush=True)


def write(name, args, result):
    """benchmarks/results/NAME.json: the figures, and what they were measured on."""
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    cpu = [x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if args.quick else ''}.json"
    files.write_json(path, {
        "arguments": vars(args), "cpu": cpu[0], "cores": os.cpu_count(), "load": os.getloadavg(),
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "accelerate")},
        **result})
    print(f"wrote {path.relative_to(ROOT)}; load average {os.getloadavg()[0]:.2f} on "
          f"{os.cpu_count()} cores")
