"""How much of the machine our DPO step uses: its FLOP/s beside those of one large matrix product.

    python benchmarks/flops.py [--shape A] [--quick] [--profile]

Counted are the model's own FLOPs alone: every linear layer, the patch convolution and attention
over visible positions; forward once, backward twice (the patch convolution once: no gradient goes
to pixels). Recomputation, norms, softmax, the optimizer are work the step does and is not credited
for. The yardstick, an fp32 product of two square matrices, is measured between the steps; for both
the best of all tries counts, so that a busy machine lowers neither by chance. With --profile
torch's profiler says afterwards on which operators one more step spends its time.
"""
import time

import common as c
import torch
from torch import nn
from turns import progress


def model_flops(model, batch, shape):
    """Multiply-adds × 2 of one forward and backward over the batch, by what they are spent on."""
    counted = {"encoder": 0, "projector": 0, "llm": 0, "lm_head": 0, "attention": 0}
    hooks = []

    def count(name):
        kind = "lm_head" if "lm_head" in name else name.split(".")[0]

        def hook(module, inputs, output):
            passes = 2 if isinstance(module, nn.Conv2d) else 3
            counted[kind] += passes * 2 * output.numel() * module.weight[0].numel()
        return hook
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            hooks.append(module.register_forward_hook(count(name)))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    seen = int(c.m.pair_mask(batch["branch"]).sum()) - int((batch["branch"] == c.m.PADDING).sum())
    patches = shape.batch * shape.image_tokens ** 2
    for (layers, width), visible in ((shape.text, seen), (shape.vision, patches)):
        counted["attention"] += 3 * 2 * 2 * layers * width * visible     # QKᵀ and PV
    return counted


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shape", choices=sorted(c.SHAPES), default="A")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, side = (c.QUICK if args.quick else c.SHAPES)[args.shape], 256 if args.quick else 2048
    model, _ = c.build(shape)
    batch, = c.batches(shape, c.pairs(shape, shape.batch, model.image_token_id), "pair")
    flops = model_flops(model, batch, shape)
    total, ours = sum(flops.values()), c.Ours(model)
    ref, steps, products = ours.reference(batch), [], []
    left, right = torch.randn(2, side, side)
    for _ in progress(range(args.steps), desc="step, products"):
        began = time.perf_counter()
        ours.dpo_step(batch, ref)
        steps.append(time.perf_counter() - began)
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right)
            products.append(time.perf_counter() - began)
    reached, peak = total / min(steps), 2 * side ** 3 / min(products)
    print()
    c.table(["", "GFLOP a step", "share"],
            [[k, f"{v / 1e9:.1f}", f"{v / total:.1%}"] for k, v in flops.items()])
    c.table(["", "GFLOP/s"], [["our step", f"{reached / 1e9:.1f}"],
                              [f"{side} × {side} product", f"{peak / 1e9:.1f}"],
                              ["share", f"{reached / peak:.1%}"]])
    if args.profile:
        with torch.profiler.profile() as profile:
            ours.dpo_step(batch, ref)
        print("\n" + profile.key_averages().table("self_cpu_time_total", row_limit=15))
    c.write("flops", args, {"shape": shape._asdict(), "flops": flops, "steps": steps,
                            "products": products, "step_flops_per_s": reached,
                            "product_flops_per_s": peak, "share": reached / peak})


if __name__ == "__main__":
    main()
