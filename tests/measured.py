"""Train a medium model on the CPU and say what it really took; run by test_plan.py.

    python tests/measured.py MICRO_BATCH MICRO_STEPS CHECKPOINTING SFT|DPO

Prints one JSON line, under torchrun the first process's: peak resident bytes above those before
the model was built (VmHWM, the kernel's own high-water mark), and what plan.memory() says for the
same shapes.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from pivot import distributed, encoders, training
from tools import meta, plan
import model as m

VISION = dict(hidden_size=256, num_hidden_layers=5, num_attention_heads=4, intermediate_size=1024,
              image_size=160, patch_size=8)                                        # 400 patches
TEXT = dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=1536, vocab_size=16_000, tie_word_embeddings=True)


def build(device):
    import transformers as t
    with torch.device(device):
        vision = t.SiglipVisionModel._from_config(t.SiglipVisionConfig(**VISION),
                                                  attn_implementation="sdpa")
        llm = t.Qwen2ForCausalLM._from_config(t.Qwen2Config(**TEXT), attn_implementation="sdpa")
        return m.MLLM(encoders.Encoder(encoders.truncate(vision), *[encoders.HALF] * 2), llm, 9)


def batch_of(model, rows, prompt, chosen, rejected, pairs):
    n = model.encoder.num_tokens
    length = prompt + chosen + (rejected + 1 if pairs else 0)
    ids = torch.randint(10, 1000, (rows, length))
    ids[:, :n] = 9
    labels = torch.full_like(ids, m.IGNORE)
    labels[:, prompt:prompt + chosen] = 5
    batch = {"pixel_values": torch.zeros(rows, 3, 160, 160, dtype=torch.uint8), "input_ids": ids}
    if pairs:
        labels[:, prompt + chosen + 1:] = 5
        branch = torch.repeat_interleave(torch.tensor([0, 1, 2]),
                                         torch.tensor([prompt - 1, chosen + 1, rejected + 1]))
        batch |= {"branch": branch.expand(rows, -1).contiguous(),
                  "position_ids": torch.arange(length).expand(rows, -1).contiguous()}
    return {**batch, "labels": labels}


def status(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) * 1024


def train(model, optimizer, micro_steps, shape, steps=2):
    for _ in range(steps):
        for micro in range(micro_steps):
            model.set_requires_gradient_sync(micro == micro_steps - 1)
            (-model(**batch_of(model, *shape)).sum()).backward()
        training.clip_grad_norm(model)
        optimizer.step()
        optimizer.zero_grad()


def count_bytes():
    """Bytes of weights, gradients and moments that this process holds after a step, and planned."""
    device, (rank, size) = distributed.start(), distributed.world()
    model = distributed.shard(build(device), device, "fp32")
    optimizer = training.adamw(model, {"encoder": 1e-5, "projector": 1e-5, "llm": 0})
    (-model(**batch_of(model, 1, 430, 60, 40, "pair")).sum()).backward()
    optimizer.step()

    def here(tensor):                # a DTensor's shard, or a lone process's whole tensor
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor
    real = {"weights": sum(here(p).nbytes for p in model.parameters()),
            "gradients": sum(here(p.grad).nbytes for p in model.parameters()
                             if p.grad is not None),
            "optimizer": sum(here(s[k]).nbytes for s in optimizer.state.values()
                             for k in ("exp_avg", "exp_avg_sq"))}
    empty = build("meta")
    training.freeze(empty, {"encoder": 1e-5, "projector": 1e-5, "llm": 0})
    held, _ = plan.memory(empty, meta.trace(empty, 430, 60, 40, "pair"), size, 1, 1, 4,
                          sharded=distributed.is_sharded(size, "fp32"))
    if rank == 0:
        print(json.dumps({"real": real, "planned": {k: held[k] for k in real}}))
    distributed.stop()


def main():
    if sys.argv[1:] == ["bytes"]:
        return count_bytes()
    rows, micro_steps, checkpointing = map(int, sys.argv[1:4])
    pairs = sys.argv[4] == "DPO"
    length = (430, 60, 40)
    device, (rank, size) = distributed.start(), distributed.world()
    rates = dict.fromkeys(training.MODULES, 1e-5)
    small = build(device)         # what torch and its libraries need for any model comes first
    small = distributed.shard(small, device, "fp32", False)
    train(small, training.adamw(small, rates), 1, (1, 430, 60, 40, pairs), steps=1)
    del small
    import gc
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")           # VmHWM starts anew from here
    before = status("VmRSS")
    model = distributed.shard(build(device), device, "fp32", bool(checkpointing))
    train(model, training.adamw(model, rates), micro_steps, (rows, *length, pairs))
    measured = status("VmHWM") - before

    empty = build("meta")
    training.freeze(empty, rates)
    row = meta.trace(empty, *length, "pair" if pairs else "answers")
    held, total = plan.memory(empty, row, size, rows, micro_steps, 4, bool(checkpointing),
                              sharded=distributed.is_sharded(size, "fp32"))
    if rank == 0:
        print(json.dumps({"measured": measured, "planned": total, "held": held}))
    distributed.stop()


if __name__ == "__main__":
    main()
