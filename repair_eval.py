"""Re-pair a frozen encoder with a new LLM and a new projector, train those, score the benchmarks.

Re-pair + score:  python repair_eval.py --encoder runs/toy-vit__toy-lm/dpo/encoder --llm toy-lm
Eight GPUs:       torchrun --nproc_per_node=8 repair_eval.py --encoder DIR --llm qwen2.5-1.5b
Score a model:    python repair_eval.py --mllm runs/toy-vit__toy-lm/dpo/final --bench DIR
Two encoders:     python repair_eval.py --encoder A+B --llm toy-lm   (features side by side)
One table:        python repair_eval.py --compare runs/toy-vit__toy-lm/repair/*

Reads   the captions of stage 1 (projector step), DATA/repair.jsonl (projector + LLM), and the
        benchmark TSVs of DATA/bench, as VLMEvalKit publishes them (score.BENCHES has their names).
        Every encoder meets the same LLM and projector start, the same data in the same order: the
        digests printed at the start show it.
Writes  runs/NAME/repair/<encoder>/: what a training stage writes, and bench/: predictions as they
        come, results.json, units.json (what intervals resample), report.txt (prompts, labels, the
        paper's table), wrong.html. With --mllm, bench/ lies beside the model's final/.
"""
import pivot  # noqa: F401  (first: from here on Ctrl-C is no traceback)
import hashlib
import json
import shutil
from pathlib import Path

import torch

import pretrain
from judge import answer, intervals, report, score
from pivot import checkpoints, distributed, encoders, files, flags, model_io, tensors
from pivot.distributed import print0

# Stage 1's values; the encoder is frozen.
PAPER = {**pretrain.PAPER, "encoder_lr": None, "max_new_tokens": 512}
TOY = {**pretrain.TOY, "encoder_lr": None, "max_new_tokens": 32}
# Arguments that say how a model is scored: they change nothing about how it is trained.
SCORING = {"mllm", "bench", "limit", "eval_batch", "max_new_tokens", "temperature", "wrong_image",
           "ocr_tokens", "rescore", "show_wrong", "compare"}


def get_args(argv=None):
    parser = flags.arguments(__doc__, PAPER)
    flags.add_two_phases(parser, "repair")
    parser.add_argument("--reuse-projector-layers", type=int, default=0, choices=[0, 1, 2],
                        help="start so many linear layers of the projector from the one the "
                        "extracted encoder was trained with (default 0: all fresh)")
    parser.add_argument("--mllm", help="score this trained model (a final/ folder) as it is")
    parser.add_argument("--bench", help="folder of benchmark TSVs; default DATA/bench")
    parser.add_argument("--limit", type=flags.COUNT, help="only the first N questions of each")
    parser.add_argument("--eval-batch", type=flags.COUNT, default=64, help="questions at once")
    parser.add_argument("--max-new-tokens", type=flags.COUNT, help="longest answer; most end long "
                        "before (default 512: OCRBench's formulas; 32 with a toy LLM)")
    parser.add_argument("--temperature", type=flags.RATE, default=0.0, help="draw the answers, "
                        "by --seed and question, into bench-drawn/; pairs to train on: tools.draw "
                        "(default 0: the likeliest words)")
    parser.add_argument("--wrong-image", action="store_true",
                        help="show every question the image of another one: what is left is what "
                        "the model answers without looking")
    parser.add_argument("--ocr-tokens", action="store_true", help="TextVQA: put the words of the "
                        "file's column ocr_tokens into the prompt (changes the score a lot)")
    parser.add_argument("--rescore", action="store_true",
                        help="score the stored answers again; no model is opened")
    parser.add_argument("--show-wrong", type=flags.NATURAL, default=50,
                        help="so many wrong answers of each benchmark on the page wrong.html")
    parser.add_argument("--compare", nargs="+", metavar="DIR",
                        help="print one table of models already scored, and each one's differences "
                        "to the first, with intervals; nothing is run")
    parser.set_defaults(seed=1)      # not stage 1's: its projector began there, this one is new
    args = parser.parse_args(argv)
    made = Path(args.mllm or "").parent / "config.json"
    if args.mllm and not args.llm and made.exists():          # a toy's LLM has a toy's defaults
        args.llm = files.read_json(made, "arguments")["arguments"]["llm"]
    args = flags.settle_two_phases(args, "repair", "repair", PAPER, TOY)
    args.bench = args.bench or f"{args.data}/bench"
    if args.encoder_lr:
        raise SystemExit(f"error: --encoder-lr {args.encoder_lr:g}: the encoder is frozen here")
    return args


def phases(args):
    """Stage 1's two; but the encoder, which is judged here, stays frozen."""
    return [phase._replace(name=name, rates={**phase.rates, "encoder": 0})
            for name, phase in zip(("projector", "re-pair"), pretrain.phases(args))]


def repair_folder(args):
    """runs/NAME/repair/<encoder>; an extracted encoder goes by its stage: runs/NAME/dpo/encoder →
    runs/NAME/repair/dpo. Two, A+B, go by both names; re-used projector layers are named, too."""
    paths = [Path(part) for part in encoders.parts_of(args.encoder)]
    extracted = [path.is_dir() and path.name == "encoder" for path in paths]
    run = paths[0].parent.parent if extracted[0] and not args.run_typed else Path(args.run)
    names = [path.parent.name if own else encoders.short_name(str(path))
             for path, own in zip(paths, extracted)]
    layers = args.reuse_projector_layers
    return run / "repair" / ("+".join(names) + (f"-projector{layers}" if layers else ""))


def reuse_projector(model, encoder, layers):
    """Start the first linear layers of the projector from those the encoder was trained with (the
    paper's appendix: "1+1" = the first of them, then a fresh one). They lie in final/ beside the
    extracted encoder; raises SystemExit unless that holds this very encoder, and layers that fit.
    """
    final = Path(encoder).parent / "final"
    hint = "it needs an encoder as extract.py leaves it, RUN/STAGE/encoder, with final/ beside it"
    if Path(encoder).name != "encoder" or not (final / "config.json").exists():
        raise SystemExit(f"error: --reuse-projector-layers {layers}: no model at {final}; {hint}")
    stored = {k: held.tensor() for k, held in tensors.stored(final).items()
              if not k.startswith("language_model.")}
    for name, p in model.encoder.state_dict().items():
        if not torch.equal(stored.get(model_io.file_name_of(f"encoder.{name}"), torch.empty(0)), p):
            raise SystemExit(f"error: --reuse-projector-layers {layers}: {final} holds another "
                             f"encoder than {encoder} (first: {name}); extract it again")
    for name, p in model.projector.named_parameters():
        if int(name.split(".")[0][-1]) <= layers:                     # linear_1.…, linear_2.…
            old = stored[model_io.file_name_of(f"projector.{name}")]
            if old.shape != p.shape:
                raise SystemExit(f"error: --reuse-projector-layers {layers}: {name} of {final} is "
                                 f"{tuple(old.shape)}, with this --llm it is {tuple(p.shape)}; "
                                 f"re-pair with an LLM of that width")
            p.data.copy_(old)


def read_files(args):
    """{path: (rows, what was left out)} of the TSVs of --bench whose name is a benchmark's; raises
    SystemExit where there is none, or a row cannot be used."""
    paths = sorted(Path(args.bench).glob("*.tsv"))
    for path in paths:
        if path.stem not in score.BENCHES:
            print0(f"  {path.name}: not a benchmark known by its name, left out")
    known = {p: answer.read_tsv(p, args.follow_links) for p in paths if p.stem in score.BENCHES}
    if not known:
        raise SystemExit(f"error: no known benchmark TSV in {args.bench}; known names: "
                         f"{', '.join(score.BENCHES)}")
    for path, (rows, dropped) in known.items():
        for why, n in dropped.items():
            print0(f"  {path.name}: {n} rows {why}, left out")
        if args.ocr_tokens and path.stem == "TextVQA_VAL" and "ocr_tokens" not in rows[0]:
            raise SystemExit(f"error: --ocr-tokens: {path} has no column ocr_tokens")
    return known


def stored_answers(args, folder, key):
    """Refuse a folder that holds answers of another model or setting; --overwrite empties it. A
    file may have changed where every answer to it says what was asked. → the key of all answers."""
    config = folder / "config.json"
    if args.overwrite and not args.rescore and not distributed.restarted():
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        distributed.barrier()
    if config.exists():
        old = files.read_json(config, remedy="; --overwrite deletes these answers")
        for what in key:
            changed = old.get(what, key[what]) != key[what]
            if changed and what.endswith(".tsv"):
                changed = not all("asked" in item for item in answer.stored(folder, what[:-4]))
            if changed:
                raise SystemExit(f"error: {folder} holds the answers of another model or setting "
                                 f"({what}: {old[what]}, now {key[what]}); --overwrite deletes "
                                 f"them")
        key = {**old, **key}             # a file that was not there before is welcome
    elif args.rescore:
        raise SystemExit(f"error: {folder} holds no answers to score anew; leave --rescore out")
    if not args.rescore:
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            files.write_json(config, key)
    return key


def file_key(path, rows, args):
    """What the answers to a file depend on, taken together: its bytes, and the prompts made of
    them. By it --compare knows that two models were asked the same."""
    prompts = "\0".join(score.prompt_of(path.stem, r, args.ocr_tokens) for r in rows)
    return f"{files.sha256(path)}-{hashlib.sha256(prompts.encode()).hexdigest()[:8]}"


def open_for_answers(args, mllm, device):
    """The model in the dtype it answers in, whole on every process, and its tokenizer."""
    model, tokenizer = model_io.load_mllm(mllm)
    if args.dtype == "bf16":         # not model.to: rotary frequencies in bf16 are a radian off at
        for p in model.parameters():                                             # position 800
            p.data = p.data.to(torch.bfloat16)
    return model.eval().to(device), tokenizer


def scored(args, folder, path, rows, dropped, answers):
    """What results.json says of one benchmark, and its units. answers: {index: prediction}."""
    name = path.stem
    lost = [r["index"] for r in rows if r["index"] not in answers]
    if lost:
        raise SystemExit(f"error: {folder} holds no answer to {len(lost)} of {len(rows)} "
                         f"questions of {name}, first: index {lost[0]}; without --rescore they "
                         f"are answered")
    units = score.units(name, rows, answers)
    if not units:
        why = ": MME scores perception" if name == "MME" else ""
        raise SystemExit(f"error: {path}: none of its {len(rows)} questions counts{why}; a larger "
                         f"--limit?")
    chance = score.units(name, rows, score.constant(name, rows))
    return {"score": score.score_of(units),
            "ci95": intervals.stratified(list(score.strata(units).values())),
            "n": len(rows), "units": len(units), "chance": score.score_of(chance),
            "note": score.notes(name, rows, dropped, args.ocr_tokens),
            "prompt": score.prompt_of(name, rows[0], args.ocr_tokens)}, units


def evaluate(args, mllm, device, folder):
    """Every known TSV of --bench answered and scored: results.json, units.json, report.txt, the
    page of wrong answers. With --rescore from stored answers alone: no model is opened."""
    benches = read_files(args)
    key = {"wrong_image": args.wrong_image, "max_new_tokens": args.max_new_tokens}
    if args.temperature:
        key["drawn"] = f"temperature {args.temperature:g}, seed {args.seed}"
    for path, (rows, _) in benches.items():
        key[path.name] = distributed.from_main(lambda: file_key(path, rows, args))
    if not args.rescore:
        model, tokenizer = open_for_answers(args, mllm, device)
        key.update(model=checkpoints.file_digest(mllm), dtype=args.dtype)
    key = stored_answers(args, folder, key)
    found, units, answered = {}, {}, []
    for path, (rows, dropped) in benches.items():
        name, shown = path.stem, answer.wrong_pictures(rows) if args.wrong_image else rows
        rows, shown = rows[:args.limit], shown[:args.limit]     # the same pictures for any --limit
        asked = distributed.from_main(
            lambda: answer.asked_of(path, rows, shown, args.ocr_tokens))
        if args.rescore:
            answers = answer.predictions(folder, name, asked)
        else:
            answers = answer.answer(args, model, tokenizer, device, path, rows, shown, folder,
                                    asked)
        found[name], units[name] = scored(args, folder, path, rows, dropped, answers)
        answered.append((path, rows, shown, answers))
    results = {"mllm": str(mllm), "bench": args.bench, **key, "limit": args.limit,
               "benchmarks": found,
               **score.summarise({n: r["score"] for n, r in found.items()})}
    if distributed.is_main():
        files.write_text(folder / "units.json", json.dumps(units))
        files.write_text(folder / "wrong.html", report.wrong_page(
            mllm, answered, args.show_wrong, args.ocr_tokens))
        files.write_text(folder / "report.txt", report.text(folder.parent.name, results))
        files.write_json(folder / "results.json", results)            # last: all else is there
    print0("\n".join([*report.table({folder.parent.name: results}),
                      f"wrote {folder}: results.json, report.txt (prompts, labels), wrong.html"]))


def repair(args, device, folder):
    """Train the re-paired model in `folder`, unless that is done; → its final/."""
    facts = checkpoints.parents(args)
    if checkpoints.starts_anew(folder, args) or \
            not checkpoints.finished(folder, args, facts, SCORING):
        read_files(args)                          # before the training, not after it
        run = checkpoints.Run(folder, args, facts, SCORING)
        model, tokenizer = model_io.build_mllm(args.encoder, args.llm, args.seed, args.image_size)
        if args.reuse_projector_layers:
            reuse_projector(model, args.encoder, args.reuse_projector_layers)
        pretrain.train(args, run, device, model, tokenizer, facts, phases(args))
        run.finish(model, tokenizer)
    return folder / "final"


def main():
    args = get_args()
    if args.compare:
        print0("\n".join(report.compare(args.compare, SCORING)))
        return
    device, folder = distributed.start(), repair_folder(args)
    if args.mllm:
        mllm = Path(args.mllm)
        folder = mllm.parent if mllm.name == "final" else mllm
    elif args.rescore:
        mllm = folder / "final"
    else:
        mllm = repair(args, device, folder)
    name = "bench"
    if args.temperature:
        name += "-drawn"
    if args.wrong_image:
        name += "-wrong-image"
    evaluate(args, mllm, device, folder / name)


if __name__ == "__main__":
    distributed.launch(main)
