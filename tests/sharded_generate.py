"""Answers drawn from a sharded model, in a training stage; run by test_model.py under torchrun.

    torchrun --nproc_per_node=2 tests/sharded_generate.py FINAL

Every process holds other questions, of other lengths; greedy and drawn answers must be those of the
whole model, token for token; afterwards a training step must work.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from pivot import distributed, model_io, training

device, (rank, size) = distributed.start(), distributed.world()
model, tokenizer = model_io.load_mllm(sys.argv[1])
generator = torch.Generator().manual_seed(rank)
n, lengths = model.encoder.num_tokens, (n_text for n_text in ((5, 9), (7, 3))[rank % 2])
rows = [[model.image_token_id] * n + torch.randint(5, 300, (k,), generator=generator).tolist()
        for k in lengths]
longest = max(map(len, rows))
ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
side = model.encoder.image_size
pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
# A stop token that ends some answers early, on one process before the other.
free = model.generate(pixels, ids, mask, 12, [-1])
stops = [free[0][2], free[1][4]] if rank == 0 else [free[1][-1]]
numbers = torch.rand(4, 12, dtype=torch.float64, generator=generator)       # a group of two each
cases = [dict(), dict(temperature=1.0, seeds=(3 + rank, 8)),
         dict(temperature=1.0, uniforms=numbers, group=2)]
want = [model.generate(pixels, ids, mask, 12, stops, **case) for case in cases]
model = distributed.shard(model, device, "fp32")
optimizer = training.adamw(model, dict.fromkeys(training.MODULES, 1e-4))
got = [model.generate(pixels, ids, mask, 12, stops, **case) for case in cases]
assert got == want, (rank, got, want)
labels = torch.where(mask.bool() & (ids != model.image_token_id), ids, -100)
(-model(pixels, ids, labels).sum()).backward()
optimizer.step()
optimizer.zero_grad()
assert model.generate(pixels, ids, mask, 12, stops) != [], "and once more after a step"
distributed.print0("answers are the same")
distributed.stop()
