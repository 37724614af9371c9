"""Our GRPO step beside that of TRL's GRPOTrainer: rollout and update apart, time and memory.

    python benchmarks/grpo_vs_trl.py [--quick] [--profile] [--sides …]

Both open the same folder of random weights (LLaVA: SigLIP of 6 × 384, Qwen2 of 8 × 512) and train
it in fp32 on the CPU: the same prompts, each a picture of 576 tokens and a question, 8 answers of
32 tokens to each, drawn at temperature 1 from all words but `<image>`, a coin as reward, dapo's
loss, no KL, fused AdamW, gradients clipped at 1. Ours is train_grpo.py's main(), TRL's its own
train(). Calls that both make anyway are watched from outside, and hand over to the other side after
every rollout and every update. Opening pictures is part of both rollouts, without workers; in TRL's
the processor sees each of them 16 times.

TRL at its best on a CPU: no bf16, all of a step's prompts in one batch as here, no old log-probs to
compute (one update a rollout), transformers' generate with its cache (vLLM needs a GPU), nothing
logged. Three of it, the last on request:

  TRL, answer rows    lm_head on answer rows alone, as TRL does on CUDA; on a CPU it scores all
                      positions, so its device check is answered "yes" here
  TRL                 as it stands
  TRL, checkpointing  the first, with gradient checkpointing, TRL's default: slower, in less memory

First, on a small model, one step of both with the same answers: TRL is handed ours. Prompts must be
the same token ids, loss and every gradient the same to --tolerance, or this exits with 1. Then the
table, and the ratios beside their goals: where others use the machine, read CPU seconds, with
--threads 1. --profile says on what our own step spends its time.
"""
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import common as c
import torch
import train_grpo
from PIL import Image
from pivot import checkpoints, distributed, files, model_io, rollout, training
from turns import Side, progress

GROUP, LR = 8, 1e-5
GOALS = {"update": 6, "step": 3, "memory": 0.4}
SIDES = {"TRL, answer rows": (True, {}), "TRL": (False, {}),
         "TRL, checkpointing": (True, {"gradient_checkpointing": True})}


# ---------------------------------------------------------------------------------- what both read

def write_task(shape, count, folder, ragged=False):
    """The stage-1 folder that both open, and `count` pairs of which the prompts are used. All ask
    the same of another picture, so that nobody pads; ragged: of another length each. Answers are
    one word: each is a gold answer."""
    c.save(shape, folder / "stage1" / "pretrain" / "final")
    files.write_json(folder / "stage1" / "pretrain" / "config.json", {"arguments": {
        "encoder": "siglip2-so400m", "llm": "qwen2.5-1.5b", "image_size": None, "data": None}})
    (folder / "images").mkdir()
    for i, sample in enumerate(c.pairs(shape, count, image_id=0)):
        Image.fromarray(sample["pixels"].transpose(1, 2, 0)).save(folder / f"images/{i}.png")
    pairs = [{"image": f"{i}.png", "chosen": "red", "rejected": "blue",
              "question": "What is to be seen" + " here" * (i if ragged else 1) + "?"}
             for i in range(count)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


# ------------------------------------------------------------------------------------------- sides

class Profiled:
    """In the place of turns.Turns: what the second rollout and the second update spend time on."""

    def __init__(self):
        self.seen, self.tables = [], {}

    def begin(self, kind):
        self.seen.append(kind)
        self.profile = torch.profiler.profile() if self.seen.count(kind) == 2 else \
            contextlib.nullcontext()
        self.profile.__enter__()

    def end(self, value=None):
        self.profile.__exit__(None, None, None)
        if hasattr(self.profile, "key_averages"):
            self.tables[self.seen[-1]] = self.profile.key_averages().table(
                "self_cpu_time_total", row_limit=12, max_name_column_width=40)


def our_side(turns, folder, shape, prompts, out):
    """train_grpo.py, from its arguments to its last update; the final model is not written."""
    set_lr, reduce_sum, updating = training.set_lr, distributed.reduce_sum, []

    def step_begins(*args):
        updating.clear()
        turns.begin("rollout")
        return set_lr(*args)

    def summed(values):                # first of all tokens drawn; then after every update's sums
        total = reduce_sum(values)
        if not updating:
            updating.append(total["answer_tokens"])
            turns.end()
            turns.begin("update")
        return total

    def step_ends(run, metrics, timing=None):
        turns.end((metrics["loss"], updating[0]))

    sys.argv = ["train_grpo.py", "--run-dir", str(out), "--parent", str(folder / "stage1"),
                "--preferences", str(folder / "pairs.jsonl"), "--images", str(folder / "images"),
                "--data", str(folder), "--heldout", "none", "--epochs", "1", "--lr", str(LR),
                "--global-batch", str(prompts), "--micro-batch", str(prompts),
                "--group", str(GROUP), "--max-new-tokens", str(shape.answer), "--workers", "0",
                "--reward-control", "random", "--save-every", "1000000"]
    with mock.patch.object(training, "set_lr", step_begins), \
            mock.patch.object(distributed, "reduce_sum", summed), \
            mock.patch.object(distributed, "heed_signals"), \
            mock.patch.object(checkpoints.Run, "log", step_ends), \
            mock.patch.object(checkpoints.Run, "finish"), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_grpo.main()


def coin(completions, number, trainer_state, **named):
    """The reward of train_grpo.py --reward-control random, an item's number in place of its key."""
    return [rollout.seed_of("coin", 0, trainer_state.global_step, n, i % GROUP) % 2
            for i, n in enumerate(number)]


def trl_trainer(turns, folder, shape, prompts, out, answer_rows, reward=coin, rollout_func=None,
                **more):
    """GRPOTrainer on the same prompts, its rollouts and updates watched. more: of GRPOConfig."""
    from datasets import Dataset
    from dpo_vs_trl import trainer_arguments
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
    if answer_rows:
        utils._use_triton = lambda device: True      # in this module it chooses the rows alone

    class Watch(TrainerCallback):
        def on_step_begin(self, *state, **named):
            turns.begin("rollout")

        def on_step_end(self, *state, **named):
            turns.end((trainer.last.item(), trainer.tokens))

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            self.tokens = int(made["completion_mask"].sum())
            turns.end()
            turns.begin("update")
            return made

        def training_step(self, *inputs, **named):
            self.last = super().training_step(*inputs, **named)
            return self.last

    items = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    dataset = Dataset.from_list([
        {"prompt": [{"role": "user", "content": item["question"]}], "number": i,
         "image": Image.open(folder / "images" / item["image"])} for i, item in enumerate(items)])
    final = folder / "stage1" / "pretrain" / "final"
    arguments = trainer_arguments(shape, len(items) // prompts) | dict(
        per_device_train_batch_size=prompts * GROUP, learning_rate=LR, num_generations=GROUP,
        max_completion_length=shape.answer, temperature=1.0, beta=0.0, loss_type="dapo",
        shuffle_dataset=False, gradient_checkpointing=False, log_multimodal=False)
    trainer = Trainer(
        model=str(final), reward_funcs=reward, train_dataset=dataset, callbacks=[Watch()],
        processing_class=AutoProcessor.from_pretrained(final, backend="pil"),
        rollout_func=rollout_func, args=GRPOConfig(str(out), **arguments | more))
    return trainer


def trl_side(turns, folder, shape, prompts, out, name):
    answer_rows, more = SIDES[name]
    trl_trainer(turns, folder, shape, prompts, out, answer_rows, **more).train()


# ------------------------------------------------------------------------ the same answers, in both

class Losses:
    """In the place of turns.Turns, where nobody waits: keeps the last step's loss."""

    def __init__(self, kept):
        self.kept = kept

    def begin(self, kind):
        pass

    def end(self, value=None):
        self.kept["loss"] = value and value[0]


def our_check(turns, folder, *task):
    """One step of ours: prompts, answers, what they are worth, loss and gradients, to ours.pt."""
    draw, advantages, clip = rollout.draw, train_grpo.m.group_advantages, training.clip_grad_norm
    kept = {"prompts": [], "answers": [], "rewards": []}

    def drawn(model, prompts, *rest, **named):
        made = draw(model, prompts, *rest, **named)
        kept["prompts"] += [ids[mask.bool()].tolist() for ids, mask in zip(
            prompts["input_ids"], prompts["attention_mask"])]
        kept["answers"] += made.answers
        return made

    def compared(rewards, **named):
        kept["rewards"] += rewards.tolist()
        return advantages(rewards, **named)

    def clipped(model):
        kept["grads"] = {name_in_trl(name): p.grad.clone() for name, p in model.named_parameters()
                         if p.grad is not None}
        return clip(model)

    with mock.patch.object(rollout, "draw", drawn), \
            mock.patch.object(train_grpo.m, "group_advantages", compared), \
            mock.patch.object(training, "clip_grad_norm", clipped):
        our_side(Losses(kept), folder, *task)
    torch.save(kept, folder / "ours.pt")


def name_in_trl(name):
    """Our name of a parameter → its name in transformers' LlavaForConditionalGeneration."""
    name = "model." + model_io.file_name_of(name)
    return name.replace("language_model.model.", "language_model.").replace(
        "model.language_model.lm_head", "lm_head")


def trl_check(turns, folder, *task):
    """The same step of TRL, handed the same answers and what they are worth, to trl.pt."""
    ours, kept, groups = torch.load(folder / "ours.pt"), {}, []

    def handed(texts, trainer):
        ids, *_ = trainer._tokenize_prompts(texts)
        if not all(one in ours["prompts"] for one in ids):
            raise SystemExit("error: TRL's prompts are other token ids than ours")
        groups[:] = [ours["prompts"].index(one) for one in ids]
        return {"prompt_ids": ids, "logprobs": None, "completion_ids": [
            ours["answers"][b][i % GROUP] for i, b in enumerate(groups)]}

    def worth(completions, **named):
        return [ours["rewards"][b][i % GROUP] for i, b in enumerate(groups)]

    trainer = trl_trainer(Losses(kept), folder, *task, True, reward=worth, rollout_func=handed,
                          max_grad_norm=0)                           # gradients as they are
    step = trainer.create_optimizer().step

    def keep(*args, **named):
        kept["grads"] = {name: p.grad.clone() for name, p in trainer.model.named_parameters()
                         if p.grad is not None}
        return step(*args, **named)
    trainer.optimizer.step = keep
    trainer.train()
    torch.save(kept, folder / "trl.pt")


def compare_one_step(threads):
    """→ how far the losses of one step lie apart, and its gradients, relative to the largest."""
    shape = c.QUICK["A"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(shape, 2, folder, ragged=True)
        for name, work in (("ours", our_check), ("TRL", trl_check)):
            Side(f"{name}, one step", threads, work, folder, shape, 2, folder / name).hear()
        ours, theirs = (torch.load(folder / f"{name}.pt") for name in ("ours", "trl"))
    if not ours["grads"].keys() == theirs["grads"].keys():
        odd = sorted(ours["grads"].keys() ^ theirs["grads"].keys())
        raise SystemExit(f"error: one side alone has gradients of {odd}")
    largest = max(float(grad.abs().max()) for grad in theirs["grads"].values())
    grads = max(float((grad - ours["grads"][name]).abs().max()) / largest
                for name, grad in theirs["grads"].items())
    loss = abs(ours["loss"] - theirs["loss"])
    print(f"one step with the same {2 * GROUP} answers: losses {loss:.1e} apart, "
          f"{len(theirs['grads'])} gradients {grads:.1e} of the largest")
    return loss, grads


# --------------------------------------------------------------------------------- time and memory

def alternate(sides, label):
    """A turn each, rollout beside rollout, update beside update, until all are done."""
    for side in sides:
        side.state = side.hear()
    with progress(desc=label, unit="turn") as bar:
        while any(isinstance(side.state, str) for side in sides):
            for side in sides:
                side.turn()
                bar.update()
            sides = sides[::-1]


def by_step(took):
    """{"rollout", "update", "step"}: seconds of every step but the first, which warms up."""
    took = {kind: took[kind][1:] for kind in ("rollout", "update")}
    return took | {"step": [a + b for a, b in zip(*took.values())]}


def measure(shape, args, opponent):
    """One opponent beside us. → the two sides, done."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(shape, args.prompts * args.steps, folder)
        task = (folder, shape, args.prompts)
        sides = [Side("ours", args.threads, our_side, *task, folder / "ours"),
                 Side(opponent, args.threads, trl_side, *task, folder / "trl", opponent)]
        alternate(sides, f"ours, {opponent}")
    return sides


def report(sides, goals):
    """Print seconds, memory, answers' lengths, and ratios beside their goals; → the ratios."""
    rows = []
    for side in sides:
        wall, cpu = by_step(side.took), by_step(side.cpu)
        length = statistics.mean(tokens for _, tokens in side.values)
        rows.append([side.name, *(f"{statistics.median(wall[kind]):.2f}" for kind in wall),
                     f"{statistics.median(cpu['step']):.2f}", f"{side.state['peak']:.2f}",
                     f"{length:.0f}"])
    c.table(["", "rollout, s", "update, s", "step, s", "of CPU, s", "peak GiB", "tokens a step"],
            rows)
    ratios = {}
    for kind in ("rollout", "update", "step"):
        wall, cpu = ([theirs / ours for ours, theirs in zip(*(by_step(x)[kind] for x in both))]
                     for both in ([side.took for side in sides], [side.cpu for side in sides]))
        ratios[kind], ratios[f"{kind}, CPU"] = wall, cpu
        print(f"  {kind}: {statistics.median(wall):.2f} times as fast "
              f"({min(wall):.2f}–{max(wall):.2f}), {statistics.median(cpu):.2f} in CPU seconds"
              + reached(kind, statistics.median(wall), goals))
    memory = sides[0].state["peak"] / sides[1].state["peak"]
    print(f"  peak memory: {memory:.2f}" + reached("memory", memory, goals), end="\n\n", flush=True)
    return {**ratios, "memory": memory}


def reached(kind, value, goals):
    """A goal, and whether it is reached, in words."""
    if kind not in goals:
        return ""
    least = kind != "memory"
    good = value >= goals[kind] if least else value <= goals[kind]
    return (f"; goal {'at least' if least else 'at most'} {goals[kind]}: "
            f"{'reached' if good else 'missed'}")


def profile(shape, args):
    """Print what our own second rollout and update spend their time on."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder, profiled = Path(temporary), Profiled()
        write_task(shape, args.prompts * 2, folder)
        our_side(profiled, folder, shape, args.prompts, folder / "ours")
    for kind, table in profiled.tables.items():
        print(f"\nour {kind}\n{table}")


def main():
    parser = c.arguments(__doc__)
    parser.add_argument("--shape", choices=["A", "B"], default="A", help="A: 32,000 words, B: "
                        "Qwen2.5's 151,936 (default %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=SIDES,
                        default=["TRL, answer rows", "TRL"])
    parser.add_argument("--steps", type=int, default=4, help="of each side; the first is warm-up "
                        "(default %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="a step (default %(default)s)")
    parser.add_argument("--profile", action="store_true", help="and nothing else")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: the first is warm-up, take two or more")
    shape = (c.QUICK if args.quick else c.SHAPES)[args.shape]
    if args.profile:
        return profile(shape, args)
    apart, result = compare_one_step(args.threads), []
    for opponent in args.sides:
        sides = measure(shape, args, opponent)
        print()
        ratios = report(sides, {} if args.quick else GOALS)
        result.append({"opponent": opponent, "ratios": ratios, **{
            who: {"took": side.took, "cpu": side.cpu, "memory": side.state, "values": side.values}
            for who, side in zip(("ours", "trl"), sides)}})
    c.write("grpo_vs_trl", args, {"shape": shape._asdict(), "apart": apart, "goals": GOALS,
                                  "measurements": result})
    if not max(apart) <= args.tolerance:
        sys.exit(f"error: one step differs by {max(apart):.1e}, more than {args.tolerance:g}")


if __name__ == "__main__":
    main()
