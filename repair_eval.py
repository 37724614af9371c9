"""Re-pair a frozen encoder with a new LLM and a new projector, train those, score the benchmarks.

Re-pair + score:  python repair_eval.py --encoder runs/toy-vit__toy-lm/dpo/encoder --llm toy-lm
Eight GPUs:       torchrun --nproc_per_node=8 repair_eval.py --encoder DIR --llm qwen2.5-1.5b
Score a model:    python repair_eval.py --mllm runs/toy-vit__toy-lm/dpo/final --bench DIR
One table:        python repair_eval.py --compare runs/toy-vit__toy-lm/repair/*

Reads   the captions of stage 1 (projector step), DATA/repair.jsonl (projector + LLM), and the
        benchmark TSVs of DATA/bench. Every encoder meets the same LLM and projector start, the
        same data in the same order: the digests printed at the start show it.
Writes  runs/NAME/repair/<encoder>/: what a training stage writes, and bench/ (predictions as they
        come, results.json). With --mllm, bench/ lies beside the model's final/.
"""
import json
import os
import shutil
from pathlib import Path

import flags
import rundir
import runtime
from runtime import print0
import data
import encoders
import model as m
from plan import show_plan
import pretrain
import score
import torch

PAPER = dict(encoder="siglip2-so400m", llm="qwen2.5-1.5b", data="data", projector_epochs=1,
             projector_lr=1e-3, epochs=1, lr=1e-5, global_batch=256, micro_batch=8, warmup=0.03,
             workers=4)
TOY = dict(encoder="toy-vit", llm="toy-lm", data="data/toy", projector_epochs=2,
           projector_lr=5e-3, lr=1e-3, global_batch=32, micro_batch=32, workers=1)


def get_args():
    parser = flags.arguments(__doc__, PAPER)
    flags.add_two_step_flags(parser, "repair")
    parser.add_argument("--mllm", help="score this trained model (a final/ folder) as it is")
    parser.add_argument("--bench", help="folder of benchmark TSVs; default DATA/bench")
    parser.add_argument("--limit", type=int, help="score only the first N questions of each")
    parser.add_argument("--eval-batch", type=int, default=64, help="questions answered at once")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--wrong-image", action="store_true",
                        help="show every question the image of another one: what is left is what "
                        "the model answers without looking")
    parser.add_argument("--compare", nargs="+", metavar="DIR",
                        help="print one table of models already scored; nothing is run")
    args = flags.settle_two_steps(flags.settle(parser, "repair", PAPER, TOY), "repair")
    args.bench = args.bench or f"{args.data}/bench"
    if args.encoder_lr:
        raise SystemExit(f"error: --encoder-lr {args.encoder_lr:g}: the encoder is frozen here")
    return args


def phases(args):
    """[(name, kind of data.Samples, file, rates per module, epochs, bound on steps), …]."""
    frozen = {"encoder": 0}                       # the eye is judged, not trained
    return [("projector", "captions", args.captions,
             {**frozen, "projector": args.projector_lr, "llm": 0},
             args.projector_epochs, args.projector_max_steps),
            ("re-pair", "conversations", args.instruct,
             {**frozen, "projector": args.lr, "llm": args.lr}, args.epochs, args.max_steps)]


def repair_folder(args):
    """runs/NAME/repair/<encoder>; an extracted encoder goes by its stage: runs/NAME/dpo/encoder →
    runs/NAME/repair/dpo."""
    path = Path(args.encoder)
    extracted = path.is_dir() and path.name == "encoder"
    run = path.parent.parent if extracted and not args.run_typed else Path(args.run)
    return run / "repair" / (path.parent.name if extracted else encoders.short_name(args.encoder))


class Questions(torch.utils.data.Dataset):
    """Benchmark rows, tokenised, the image read in the worker: one question at a time."""

    def __init__(self, rows, bench, tokenizer, encoder, wrong_image):
        self.rows, self.size = rows, encoder.image_size
        image_id = tokenizer.convert_tokens_to_ids(m.IMAGE_TOKEN)
        prompts = [data.user_turn(score.prompt_of(r, bench), True, m.SYSTEM) for r in rows]
        self.ids = []
        for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]:
            if ids.count(image_id) != 1:
                raise SystemExit(f"error: {rows[len(self.ids)]['where']}: the question holds "
                                 f"{m.IMAGE_TOKEN}")
            at = ids.index(image_id)
            self.ids.append(ids[:at] + [image_id] * encoder.num_tokens + ids[at + 1:])
        self.images = [r["image"] for r in rows]
        if wrong_image:          # half the file away, further where that is the same picture
            n = len(rows)
            if len(set(self.images)) < 2:
                raise SystemExit(f"error: {rows[0]['where'].rpartition(':')[0]}: --wrong-image "
                                 f"needs two different pictures")
            self.images = [next(self.images[j % n] for j in range(i + n // 2, i + n // 2 + n)
                                if self.images[j % n] != self.images[i]) for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            pixels = data.load_image(self.images[i], self.size, self.rows[i]["where"])
        except data.BadRecord as e:
            return f"error: {e}"
        return i, self.ids[i], torch.from_numpy(pixels)


def collate(items):
    """Left-pad, so that every prompt ends where its answer begins."""
    for item in items:
        if isinstance(item, str):
            return item
    width = max(len(ids) for _, ids, _ in items)
    return ([i for i, _, _ in items], torch.stack([p for _, _, p in items]),
            torch.tensor([[0] * (width - len(ids)) + ids for _, ids, _ in items]),
            torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids, _ in items]))


def predictions(folder, name):
    """{index: prediction} of what has been answered so far, by any number of processes."""
    done = {}
    for file in folder.glob(f"{name}.*.jsonl"):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):     # the last line may have been cut off
            try:
                item = json.loads(line)
                done[item["index"]] = item["prediction"]
            except (ValueError, KeyError, TypeError):
                raise SystemExit(f"error: {file}:{number}: not an answer; delete the line, and its "
                                 f"question is answered again")
    return done


def answer(args, model, tokenizer, device, path, folder):
    """Answer one TSV greedily; each process appends its share to a file of its own, as it comes.

    → {index: prediction} of all rows, the rows. What an earlier, interrupted call answered stays.
    """
    name = path.stem
    rows = list(score.read_tsv(path))[:args.limit]
    rank, world = runtime.world()
    done = predictions(folder, name)
    runtime.dist.barrier()                             # all have read before anyone writes
    own = folder / f"{name}.{rank}.jsonl"
    if own.exists():
        whole = own.read_bytes()
        os.truncate(own, whole.rfind(b"\n") + 1)
    questions = Questions(rows, score.BENCHES[name], tokenizer, model.encoder, args.wrong_image)
    todo = [i for i, r in enumerate(rows) if r["index"] not in done]
    todo.sort(key=lambda i: -len(questions.ids[i]))    # full batches; the longest first
    todo = todo[rank::world]
    batches = [todo[i:i + args.eval_batch] for i in range(0, len(todo), args.eval_batch)]
    loader = torch.utils.data.DataLoader(questions, batch_sampler=batches, collate_fn=collate,
                                         num_workers=min(args.workers, len(batches)))
    stops, loader = m.stop_ids(tokenizer), iter(loader)
    with open(own, "a", encoding="utf-8") as file:
        for _ in runtime.progress(0, len(batches), name):
            batch = next(loader)
            if isinstance(batch, str):
                raise SystemExit(batch)
            index, pixels, ids, mask = batch
            tokens = model.generate(pixels.to(device), ids.to(device), mask.to(device),
                                    args.max_new_tokens, stops)
            for i, text in zip(index, tokenizer.batch_decode(tokens)):
                file.write(json.dumps({"index": rows[i]["index"], "prediction": text}) + "\n")
            file.flush()
    runtime.dist.barrier()
    return predictions(folder, name), rows


def known_files(args):
    """The TSVs of --bench whose name is a benchmark's; raises SystemExit where there is none."""
    files = sorted(p for p in Path(args.bench).glob("*.tsv"))
    known = [p for p in files if p.stem in score.BENCHES]
    for path in files:
        if path not in known:
            print0(f"  {path.name}: not a benchmark known by its name, left out")
    if not known:
        raise SystemExit(f"error: no known benchmark TSV in {args.bench}; known names: "
                         f"{', '.join(score.BENCHES)}")
    return known


def evaluate(args, mllm, device, folder):
    """Every known TSV of --bench answered and scored: results.json and the table."""
    known = known_files(args)
    model, tokenizer = m.load_mllm(mllm)
    key = {"model": rundir.file_digest(mllm), "wrong_image": args.wrong_image,
           "max_new_tokens": args.max_new_tokens, "dtype": args.dtype,
           **{p.name: runtime.from_main(lambda p=p: rundir.sha256(p)) for p in known}}
    config = folder / "config.json"
    if not args.overwrite and config.exists() and encoders.read_json(
            config, remedy="; --overwrite deletes these answers") != key:
        raise SystemExit(f"error: {folder} holds the answers of another model or setting; "
                         f"--overwrite deletes them")
    if runtime.is_main() and args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    runtime.dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_whole(config, lambda aside: aside.write_text(json.dumps(key)))
    if args.dtype == "bf16":        # parameters alone: rotary frequencies in bf16 are wrong by a
        for p in model.parameters():                   # radian at position 800
            p.data = p.data.to(torch.bfloat16)
    model = model.eval().to(device)                    # whole on every process: it only answers
    scores = {}
    for path in known:
        done, rows = answer(args, model, tokenizer, device, path, folder)
        right = [score.score_row(r, done[r["index"]]) for r in rows]
        p = sum(right) / len(rows)
        scores[path.stem] = {"score": 100 * p, "n": len(rows), "chance": score.chance(rows),
                             "ci95": 196 * (p * (1 - p) / len(rows)) ** 0.5}
    results = {"mllm": str(mllm), **key, "benchmarks": scores, **score.summarise(scores)}
    rundir.write_whole(folder / "results.json",
                       lambda aside: aside.write_text(json.dumps(results, indent=1)))
    print0("\n".join(score.table({folder.parent.name: results})))


def main():
    args = get_args()
    if args.compare:
        names = [Path(d).name for d in args.compare]
        names = names if len(set(names)) == len(names) else args.compare
        found = {name: next((p for p in (Path(d, "bench", "results.json"),
                                         Path(d, "results.json")) if p.exists()), None)
                 for name, d in zip(names, args.compare)}
        lost = [name for name, path in found.items() if path is None]
        if lost:
            raise SystemExit(f"error: not scored yet: {', '.join(lost)}")
        print("\n".join(score.table({n: encoders.read_json(p, "benchmarks", "groups", "average")
                                     for n, p in found.items()})))
        return
    if args.plan:
        return show_plan(args, phases(args))
    device = runtime.start()
    suffix = "bench-wrong-image" if args.wrong_image else "bench"
    if args.mllm:
        evaluate(args, Path(args.mllm), device, Path(args.mllm).parent / suffix)
        return
    folder = repair_folder(args)
    path = encoders.resolve(args.encoder)
    eye = rundir.file_digest(path) if Path(path).is_dir() else path
    if not args.overwrite and (folder / "final" / "config.json").exists():
        old = encoders.read_json(folder / "config.json", "arguments", remedy="; --overwrite")
        for what, then, now in (("encoder", old.get("encoder_digest"), eye),
                                ("LLM", old["arguments"].get("llm"), args.llm),
                                ("seed", old["arguments"].get("seed"), args.seed)):
            if then != now:
                raise SystemExit(f"error: {folder} was re-paired with another {what}: {then}, now "
                                 f"{now}; name another --run-dir, or --overwrite")
    else:
        known_files(args)                             # before the training, not after it
        run = rundir.Run(folder, args)
        model, tokenizer = m.build_mllm(args.encoder, args.llm, args.seed, args.image_size)
        pretrain.train(args, run, device, model, tokenizer, {"encoder_digest": eye}, phases(args))
    evaluate(args, folder / "final", device, folder / suffix)


if __name__ == "__main__":
    runtime.launch(main)
