"""What gpu.py measures with: random models of the published geometry, and a training step of them.

Everything is the repository's own: presets, sharding, optimizer, losses, the planner.
"""
import contextlib
import functools
import gc
import io
import math
import time
from typing import NamedTuple

import numpy as np
import torch

import data
from pivot import distributed, encoders, published, records, training
from tools import meta, plan
import model as m

ENCODER, PROMPT, RATE, BETA = "siglip2-so400m", 80, 1e-6, 0.1      # PROMPT: text tokens of it
TINY_ENCODER, TINY_LLM, TINY_PROMPT = "quick-vit", "quick-lm", 8
encoders.ENCODERS[TINY_ENCODER] = encoders.Preset("", (encoders.SIGLIP, 64, 3, 4, 128, 16, 96))
encoders.LLMS[TINY_LLM] = encoders.Preset("", (encoders.QWEN2, 64, 2, 4, 2, 128, 1_000, True))


class Setting(NamedTuple):
    """What is trained and how. answer: tokens of each answer; micro_steps: micro-batches a step."""
    encoder: str
    llm: str
    stage: str                                       # "dpo" or "sft"
    prompt: int
    answer: int
    attention: str = "sdpa"
    compiled: bool = False
    checkpointing: bool = False
    micro_batch: int = 4
    micro_steps: int = 4

    @property
    def layout(self):
        return "pair" if self.stage == "dpo" else "answers"

    @property
    def mode(self):
        return " + ".join([self.attention, *["compile"] * self.compiled,
                           *["checkpointing"] * self.checkpointing])


def quick_of(setting):
    """The same at a tiny size, for a CPU."""
    return setting._replace(encoder=TINY_ENCODER, llm=TINY_LLM, prompt=TINY_PROMPT, micro_batch=2,
                            answer=min(setting.answer, 12), micro_steps=2)


def on_gpu(device):
    return device.type == "cuda"


def wait(device):
    if on_gpu(device):
        torch.cuda.synchronize(device)


def release(device):
    """Forget compiled code, and give unused memory back, before the next model."""
    torch._dynamo.reset()
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()


def build(encoder, llm, device, seed=0):
    """A random MLLM of two presets' geometry in fp32, made on the device; `<image>` is its last
    token."""
    from transformers import AutoModelForCausalLM
    vision_config, llm_config = meta.whole_encoder(encoder).config, meta.empty_llm(llm).config
    torch.manual_seed(seed)
    with torch.device(device):
        vision = encoders.truncate(encoders.empty(vision_config, dtype=torch.float32))
        head = AutoModelForCausalLM.from_config(
            llm_config, dtype=torch.float32,
            attn_implementation=published.attention_of(llm_config))
        part = encoders.Encoder(vision, encoders.HALF, encoders.HALF)
        return published.refuse_dropout(m.MLLM(part, head, llm_config.vocab_size - 1))


def samples(model, prompt, answer, count, seed=1):
    """`count` random pairs as data.Samples gives them, all answers of one length."""
    rng, n, image_id = np.random.default_rng(seed), model.encoder.num_tokens, model.image_token_id
    side = model.encoder.image_size
    roles = np.repeat([records.PROMPT, records.ANSWER, records.OTHER], [n + prompt, answer, answer])
    return [{"index": i, "roles": roles, "ids": np.concatenate([
                np.full(n, image_id), rng.integers(0, image_id, prompt + 2 * answer)]),
             "pixels": rng.integers(0, 256, (3, side, side), dtype=np.uint8)}
            for i in range(count)]


class Step:
    """The step of train_dpo.py or train_sft.py in bf16 with fp32 masters, as on a GPU, alone."""

    def __init__(self, setting, device):
        self.setting, self.device = setting, device
        model = build(setting.encoder, setting.llm, device)
        pairs = samples(model, setting.prompt, setting.answer,
                        setting.micro_batch * setting.micro_steps)
        self.batches = []
        for i in range(0, len(pairs), setting.micro_batch):
            batch = data.collate(pairs[i:i + setting.micro_batch], setting.layout)
            self.batches.append({k: v.to(device) for k, v in batch.items() if k != "index"})
        self.model = distributed.shard(model, device, "bf16", setting.checkpointing,
                                       attention=setting.attention, compiled=setting.compiled)
        with contextlib.redirect_stdout(io.StringIO()):                   # its table of rates
            self.optimizer = training.adamw(self.model, dict.fromkeys(training.MODULES, RATE))
        self.refs = None

    def reference(self):
        """The pass before step 0 (train_dpo.score_pairs: gradients stay on where compiled)."""
        self.refs = []
        for batch in self.batches:
            with torch.set_grad_enabled(self.setting.compiled):
                logps = m.answer_logps(self.model(**batch), batch["branch"])
            self.refs.append([logp.detach() for logp in logps])

    def loss_of(self, batch, ref):
        """A micro-batch's share of the loss, and of DPO's margin."""
        logps = self.model(**batch)
        if self.setting.stage == "sft":
            return -logps.sum() / (len(self.batches) * (batch["labels"] != m.IGNORE).sum()), 0.0
        losses, chosen, rejected = m.dpo_loss(*m.answer_logps(logps, batch["branch"]), *ref, BETA)
        count = self.setting.micro_batch * self.setting.micro_steps
        return losses.sum() / count, (chosen - rejected).sum() / count

    def __call__(self):
        """One step. → {"loss", "margin"}, as a stage logs them."""
        sums = {"loss": 0.0, "margin": 0.0}
        for i, batch in enumerate(self.batches):
            self.model.set_requires_gradient_sync(i == len(self.batches) - 1)
            loss, margin = self.loss_of(batch, self.refs and self.refs[i])
            loss.backward()
            sums["loss"] += loss.detach()
            sums["margin"] += margin
        sums = distributed.reduce_sum(sums)
        training.clip_grad_norm(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums


def seconds_of(work, device, least=2, enough=3.0):
    """Seconds of each repetition: at least so many, until they took `enough` seconds together."""
    took = []
    while len(took) < least or sum(took) < enough:
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        took.append(time.perf_counter() - began)
    return took


def product_rate(device, quick):
    """FLOP/s of one large bf16 product, the best of many: what "all of the card" means here."""
    side = 256 if quick else 8192
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    took = seconds_of(lambda: left @ right, device, least=5, enough=0.1 if quick else 1.0)
    return 2 * side ** 3 / min(took)


# ------------------------------------------------------------------------------ what is planned

class Planned(NamedTuple):
    """Of the planner. work: FLOPs of a step that count as work: the models' products, attention
    where a query sees a key; spent: what its hours are made of (whole rows of attention, and what
    checkpointing recomputes); reference: of the pass that scores as many pairs; bytes: at the
    worst moment."""
    work: float
    spent: float
    reference: float
    bytes: float


@functools.cache
def traced(encoder, llm, prompt, answer, layout):
    """(a model without weights, tools.meta's trace of one of its rows); seconds of one core."""
    model = meta.empty_mllm(encoder, llm)
    training.freeze(model, dict.fromkeys(training.MODULES, RATE))
    return model, meta.trace(model, model.encoder.num_tokens + prompt, answer, answer, layout)


def planned(setting):
    """What tools.plan computes for one process and this setting's rows. → Planned."""
    model, row = traced(setting.encoder, setting.llm, setting.prompt, setting.answer,
                        setting.layout)
    prompt, config = model.encoder.num_tokens + setting.prompt, model.llm.config
    _, total = plan.memory(model, row, 1, setting.micro_batch, setting.micro_steps,
                           checkpointing=setting.checkpointing)
    tokens = meta.row_length(prompt, setting.answer, setting.answer, setting.layout)
    hidden = tokens ** 2 - seen_by(setting, prompt)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    unseen = 12 * config.num_hidden_layers * heads * width * hidden    # 2 products, then 4, × 2
    rows, whole = setting.micro_batch * setting.micro_steps, row.forward + row.backward
    again = row.in_blocks if setting.checkpointing else 0
    return Planned(rows * (whole - unseen), rows * (whole + again), rows * row.forward, total)


def seen_by(setting, prompt):
    """Pairs of a query and a key that it sees, in one row: of the pair layout, or causal."""
    def causal(count):
        return count * (count + 1) // 2
    if setting.layout == "answers":
        return causal(prompt + setting.answer)
    branch = setting.answer + 1                       # each opens with the prompt's last token
    return causal(prompt - 1) + 2 * (causal(branch) + branch * (prompt - 1))


def nominal_rate(card):
    """The data sheet's FLOP/s that the planner has for a card of this name; None: it has none."""
    words = card.lower().replace("-", " ").split()
    for name, (_, rate) in plan.GPUS.items():
        if name in words:
            return rate
    return None


def hours(samples_per_s, pairs_per_s_reference=math.inf):
    """Of the paper's run on this one card: 20,000 pairs three times, the reference once."""
    return (3 * 20_000 / samples_per_s + 20_000 / pairs_per_s_reference) / 3600
