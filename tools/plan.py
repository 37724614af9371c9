"""What a run will take: parameters, row lengths, FLOPs, memory a GPU, hours. Nothing is loaded.

    python -m tools.plan train_dpo --encoder siglip2-so400m --llm qwen2.5-7b            # 8 × H100
    python -m tools.plan train_dpo --encoder siglip2-so400m --llm qwen2.5-7b 1x4090
    python -m tools.plan pretrain --help                       # the flags are the stage's own

What can be counted is counted, not estimated: a row's FLOPs and the bytes it keeps (meta.py), the
bytes of weights, gradients and moments on each GPU. Assumed are the kernels, the utilisation, and,
where there is no data yet, the lengths: all of them are printed. Not run on a GPU.
"""
import importlib
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import model as m
from pivot import distributed, encoders, published, records, training
from pivot.distributed import print0
from tools import meta

GPUS = {   # name: memory in bytes, dense bf16 FLOP/s with fp32 sums (data sheets)
    "h100": (80e9, 989e12), "h200": (141e9, 989e12), "b200": (180e9, 2250e12),
    "a100": (80e9, 312e12), "a100-40": (40e9, 312e12), "l40s": (48e9, 362e12),
    "a6000": (48e9, 155e12), "4090": (24e9, 165e12)}
DEFAULT = "8xh100"
USABLE = 0.9          # the rest: CUDA context, NCCL's buffers, what the allocator cannot use
UTILISATION = 0.35    # of those FLOP/s; an assumption
SAMPLE = 1000         # records whose lengths are read
FP32 = 4              # bytes of a master weight, of a reduced gradient, of each moment of AdamW
# Where there is no data: records, and prompt, chosen, rejected in text tokens. Numbers of records
# are the paper's; the lengths are assumptions, cut to what the length rule admits.
ASSUMED = {"captions": (558_000, (0, 20, 0), (0, 128, 0)),
           "conversations": (3_200_000, (150, 150, 0), (736, 736, 0)),
           "pairs": (20_000, (80, 200, 200), (100, 1372, 1372))}
REPAIR = 737_000      # conversations of re-pairing's second step


class Lengths(NamedTuple):
    """records: usable ones; mean, longest: tokens of a row's prompt (image included), chosen and
    rejected answer; source: where these come from, in words."""
    records: int
    mean: tuple
    longest: tuple
    source: str


# --------------------------------------------------------------------------------------- memory

def shard_bytes(parameters, processes):
    """Bytes of fp32 the first process holds: FSDP2 cuts each tensor along its first axis."""
    return sum(math.ceil(p.shape[0] / processes) * (p.numel() // p.shape[0]) * FP32
               for p in parameters)


def memory(model, row, processes, micro_batch, micro_steps, compute=2, checkpointing=False,
           sharded=True, live=False):
    """What a process needs: ({component: bytes}, bytes at the worst moment). Not all components are
    at their largest in the same moment.

    model: MLLM (meta or real) whose requires_grad says what is trained; row: its Trace in the
    compute dtype, of `compute` bytes; processes: those that share one copy of the model; sharded:
    under FSDP2 (distributed.is_sharded); live: a second, frozen model (--reference live).
    """
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    units = [list(b.parameters()) for b in model.blocks]
    inside = {id(p) for unit in units for p in unit}
    largest = max(sum(p.numel() for p in unit) for unit in units)
    busiest = max(sum(p.numel() for p in unit if p.requires_grad) for unit in units)
    root = sum(p.numel() for p in every if id(p) not in inside)
    root_trained = sum(p.numel() for p in trained if id(p) not in inside)
    lm_head = model.llm.get_output_embeddings()
    vocab = lm_head.out_features
    logits = min(micro_batch * row.rows, max(1, m.MAX_LOGITS // vocab)) * vocab
    kept = row.inputs if checkpointing else row.blocks
    again = row.blocks if checkpointing else [0] * len(row.blocks)       # recomputed, one at a time
    accumulates = micro_steps > 1
    summed = FP32 * sum(p.numel() for p in trained) if accumulates else 0   # between micro-batches
    weights, gathered = shard_bytes(every, processes), root * compute if sharded else 0
    own_gradient = compute + FP32 if sharded else (FP32 if accumulates else 0)
    held = {"weights": weights,
            "optimizer": 2 * shard_bytes(trained, processes),
            "gradients": shard_bytes(trained, processes),
            # FSDP2 sums whole gradients, reduces them last; unsharded these are "gradients" itself
            "accumulated gradients": summed if sharded else 0,
            "gathered: root": gathered,                     # embeddings, projector: whole all along
            "reference model": weights + gathered if live else 0,
            "gathered: blocks": 2 * largest * compute if sharded else 0,    # this one and the next
            "block's gradient": busiest * own_gradient,
            "activations": micro_batch * (row.outside + sum(kept) + max(again)),
            # become probabilities and their own gradient in place, in fp32 (model.LogProb)
            "logits": (FP32 + (compute if compute < FP32 else 0)) * logits}
    states = weights + held["optimizer"] + gathered + held["reference model"]
    running = states + summed + held["gathered: blocks"]
    # The worst of three moments. First: all activations are there, the logits, lm_head's gradient.
    begin = running + micro_batch * (row.outside + sum(kept)) + held["logits"]
    if lm_head.weight.requires_grad:
        begin += compute * lm_head.weight.numel()
    # Then block after block gives up its activations and leaves a gradient (which takes the place
    # of an accumulated one); lm_head's is there from the start.
    whole, between, reduced = root_trained * compute, 0, 0
    for i in reversed(range(len(units))):
        between = max(between, running + whole + held["block's gradient"] + reduced + micro_batch *
                      (row.outside + sum(kept[:i + 1]) + again[i]))
        if not accumulates:
            reduced += shard_bytes([p for p in units[i] if p.requires_grad], processes)
    # Last the root's gradient is reduced: the embedding's own, the sum, and fp32 to send.
    end = states + held["gradients"] + FP32 * root_trained * (2 if accumulates else 1)
    if sharded:
        end += whole
    return held, max(begin, between, end)


def fitting(model, row, usable, limit, **options):
    """The largest micro-batch, a power of two up to limit, that stays within usable bytes; 0."""
    sizes = [b for b in (2 ** k for k in range(11)) if b <= limit]
    fits = [b for b in sizes if memory(model, row, micro_batch=b, micro_steps=math.ceil(limit / b),
                                       **options)[1] <= usable]
    return max(fits, default=0)


# -------------------------------------------------------------------------------------- lengths

def assumed_lengths(args, model, phase, why):
    """The paper's number of records, and the lengths of ASSUMED as far as the image leaves room."""
    n, (many, *texts) = model.encoder.num_tokens, ASSUMED[phase.kind]
    if args.stage == "repair" and phase.kind == "conversations":
        many = REPAIR
    rows = []
    for prompt, chosen, rejected in texts:
        share = min(1, (data.MAX_LENGTH - n) / (prompt + chosen))
        if int(share * chosen) < 1:
            raise SystemExit(f"error: {n} image tokens leave no room for text in a row of at "
                             f"most {data.MAX_LENGTH} tokens; a smaller --image-size does")
        rows.append((n + int(share * prompt), int(share * chosen), int(share * rejected)))
    return Lengths(min(many, args.num_samples or many), *rows,
                   f"{why}: the paper's number of records, assumed lengths")


def sampled_lengths(args, model, phase, tokenizer):
    """Of SAMPLE records of the phase's file."""
    published.prepare_tokenizer(tokenizer)
    files = data.pair_files if phase.kind == "pairs" else data.plain_files
    sources = files(args, phase.file)
    samples = data.Samples(phase.kind, sources, tokenizer, model.encoder,
                           model.llm.config.max_position_embeddings, SAMPLE, args.seed,
                           args.skip_bad, args.follow_links)
    rows = []
    for i in range(len(samples)):
        ids, roles = samples.tokens(i)
        counts = np.bincount(roles, minlength=3)
        counts[records.PROMPT] += (model.encoder.num_tokens - 1) * (ids == samples.image_id).sum()
        rows.append(counts)
    rows = np.array(rows)
    usable = samples.read * len(samples) // (len(samples) + sum(samples.dropped.values()))
    return Lengths(min(usable, args.num_samples or usable),
                   tuple(int(round(x)) for x in rows.mean(0)),
                   tuple(int(x) for x in rows[rows.sum(1).argmax()]),
                   f"a sample of {len(samples)} records of {phase.file}")


def lengths(args, model, phase):
    """Of a sample of the phase's data where they are there, of the paper where not. → Lengths."""
    for path in [phase.file] if isinstance(phase.file, str) else phase.file:
        if not Path(path).exists():
            return assumed_lengths(args, model, phase, f"no {path}")
    try:
        tokenizer = published.open_tokenizer(encoders.resolve(args.llm))
    except SystemExit:                       # a preset's, with no network to fetch it
        return assumed_lengths(args, model, phase, f"the tokenizer of {args.llm} is not here")
    return sampled_lengths(args, model, phase, tokenizer)


# ---------------------------------------------------------------------------------------- plans

def machine(spec):
    """"8xh100" → (8, "h100", bytes, FLOP/s)."""
    count, _, name = spec.lower().rpartition("x")
    if name not in GPUS or not (count or "1").isdigit() or count == "0":
        raise SystemExit(f"error: {spec} is no number of GPUs; write 8xh100, or another of "
                         f"{', '.join(GPUS)}")
    return int(count or 1), name, *GPUS[name]


def phases_of(stage, args):
    """The training.Phase list of a stage's module: its own where it has several."""
    if hasattr(stage, "phases"):
        return stage.phases(args)
    return [training.Phase(args.stage, "pairs", args.preferences, training.learning_rates(args),
                           args.epochs, args.max_steps)]


def phase_plan(args, model, phase, spec=DEFAULT):
    """Everything about one training.Phase on the GPUs of `spec`: a dict of plain numbers."""
    gpus, _, size, speed = machine(spec)
    if args.global_batch % gpus or gpus % args.replicas:
        raise SystemExit(f"error: --global-batch {args.global_batch} or --replicas "
                         f"{args.replicas} does not fit {gpus} GPUs")
    training.freeze(model, phase.rates)
    reference, live = getattr(args, "reference", None), False
    layout = "answers"
    if reference:                                      # a stage that has one scores both answers
        layout, live = getattr(args, "layout", "pair"), reference == "live"
        published.refuse_layout(model.llm, layout)
    long = lengths(args, model, phase)
    mean = meta.trace(model, *long.mean, layout)
    worst = meta.trace(model, *long.longest, layout)
    steps = phase.epochs * (long.records // args.global_batch)
    steps = steps if phase.max_steps is None else min(steps, phase.max_steps)
    options = dict(processes=gpus // args.replicas, compute=2 if args.dtype == "bf16" else 4,
                   sharded=distributed.is_sharded(gpus, args.dtype), live=live)
    share = args.global_batch // gpus
    fits = {c: fitting(model, worst, USABLE * size, share, checkpointing=c, **options)
            for c in (False, True)}
    micro = min(args.micro_batch, share)
    held, total = memory(model, worst, micro_batch=micro, micro_steps=math.ceil(share / micro),
                         checkpointing=args.activation_checkpointing, **options)
    per_row, of_reference = mean.forward + mean.backward, 0
    if args.activation_checkpointing:
        per_row += mean.in_blocks
    if reference:
        of_reference = mean.forward * (args.global_batch * steps if live else long.records)
    step = per_row * args.global_batch
    run = step * steps + of_reference
    return dict(name=phase.name, rates=phase.rates, lengths=long, layout=layout,
                steps=steps, fits=fits, micro=micro, held=held, total=total, usable=USABLE * size,
                step=step, run=run, plain=worst.outside + sum(worst.blocks),
                saved=worst.outside + sum(worst.inputs) + max(worst.blocks),
                seconds=step / (gpus * speed * UTILISATION),
                hours=run / (gpus * speed * UTILISATION) / 3600)


def show_phase(args, p):
    """Print what phase_plan computed."""
    long, gb = p["lengths"], 1e9
    print0(f"{p['name']}: " + ", ".join(f"{k} at {v:g}" if v else f"{k} frozen"
                                        for k, v in p["rates"].items()))
    count = "two rows" if p["layout"] == "rows" else "rows"
    print0(f"  {count} of {meta.row_length(*long.mean, p['layout'])} tokens, at most "
           f"{meta.row_length(*long.longest, p['layout'])} ({long.source})")
    print0(f"  {p['steps']:,} steps of {args.global_batch}: {p['step'] / 1e15:.2f} PFLOP a "
           f"step, {p['run'] / 1e18:.3f} EFLOP in all"
           + (", the reference included" if p["layout"] != "answers" else ""))
    print0(f"  {p['seconds']:.1f} s a step, {p['hours']:.2f} h, if {UTILISATION:.0%} of the "
           f"GPUs' FLOP/s are reached")
    print0(f"  memory a GPU at --micro-batch {p['micro']}, longest rows, "
           f"{'with' if args.activation_checkpointing else 'without'} "
           f"--activation-checkpointing:")
    for part, size in p["held"].items():
        if size:
            print0(f"    {part:<22} {size / gb:8.2f} GB")
    print0(f"    {'worst moment':<22} {p['total'] / gb:8.2f} GB of {p['usable'] / gb:.0f} "
           f"usable: {'fits' if p['total'] <= p['usable'] else 'DOES NOT FIT'}")
    print0(f"    activations of one row: {p['plain'] / gb:.2f} GB, {p['saved'] / gb:.2f} GB "
           f"with --activation-checkpointing")
    for checkpointing, b in p["fits"].items():
        print0(f"    {'with' if checkpointing else 'without'} it "
               + (f"--micro-batch {b} fits" if b else "no micro-batch fits"))


def stage_and_args(words):
    """["train_dpo", flag, …, "8xh100"] → the stage's module, its arguments, the machine."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    name, *words = words
    spec, given = DEFAULT, [w for w in words if re.fullmatch(r"\d+x[\w-]+", w)]
    if given:
        spec = given[-1]
        words.remove(spec)
    machine(spec)
    name = name.removesuffix(".py")
    if not (encoders.ROOT / f"{name}.py").is_file():
        raise SystemExit(f"error: no stage {name}.py here; write pretrain, train_sft, train_dpo, "
                         f"repair_eval, or a file of your own beside them")
    stage = importlib.import_module(name)
    if not hasattr(stage, "get_args") or not hasattr(stage, "PAPER"):
        raise SystemExit(f"error: {name}.py trains nothing: it has no get_args and PAPER")
    if not any(w.startswith("--dtype") for w in words):
        words += ["--dtype", "bf16"]                  # as on a GPU, wherever the plan is made
    args = stage.get_args(words)
    if hasattr(args, "group"):
        raise SystemExit(f"error: {name}.py draws its answers; what that takes is not computed "
                         f"here. --rehearsal on tries its longest update before step 0")
    return stage, args, spec


def main():
    stage, args, spec = stage_and_args(sys.argv[1:])
    gpus, gpu, size, speed = machine(spec)
    model = meta.empty_mllm(args.encoder, args.llm, args.image_size, args.dtype)
    encoder = model.encoder
    print0(f"{args.stage}: {args.encoder} + {args.llm} on {gpus} × {gpu.upper()} ({size / 1e9:.0f} "
           f"GB, {speed / 1e12:.0f} TFLOP/s bf16); computed, nothing is loaded")
    pictures = " and ".join(f"{p.image_size} × {p.image_size}" for p in encoder.parts)
    print0(f"  image {pictures} → {encoder.num_tokens} tokens of width {encoder.hidden_size}")
    for name in training.MODULES:
        part = getattr(model, name)
        print0(f"  {name:<10} {sum(p.numel() for p in part.parameters()):>14,} parameters")
    hours = 0
    for phase in phases_of(stage, args):
        planned = phase_plan(args, model, phase, spec)
        hours += planned["hours"]
        show_phase(args, planned)
    print0(f"in all {hours:.2f} h")


if __name__ == "__main__":
    distributed.launch(main)
