"""Benchmark questions for the page: what is asked and right, and what every model of a run said.

Reads the answers in the bench/ folders of a run and the benchmark files they belong to. An answer
counts only where the file still asks the same; nothing is answered here.
"""
import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from judge import answer, score
from pivot import files, images, records

SIDE, QUALITY = 320, 80                     # pixels and JPEG quality of a picture on the page


class Question(NamedTuple):
    """said: {model: (its answer, that answer's worth in [0, 1])}."""
    bench: str
    index: str
    asked: str
    right: str
    said: dict
    tsv: Path
    row: dict

    @property
    def rank(self):
        """First the questions whose answers differ in worth, then those whose answers differ in
        words, then those that nobody got fully right."""
        worths = {worth for _, worth in self.said.values()}
        texts = {score.plain(text) for text, _ in self.said.values()}
        return len(worths) < 2, len(texts) < 2, min(worths) == 1


def bench_of(folder):
    """Where the benchmark files of a bench/ folder lie: as its results say, or its stage."""
    results, config = folder / "results.json", folder.parent / "config.json"
    if results.exists():
        said = files.read_json(results).get("bench")
        if said:
            return Path(said)
    if config.exists():
        arguments = files.read_json(config, "arguments")["arguments"]
        if arguments.get("bench"):
            return Path(arguments["bench"])
        if arguments.get("data"):
            return Path(arguments["data"], "bench")
    return None


def said_by(folders, tsv, rows):
    """{model: {index: prediction}} in bench/ folders, of what the file still asks: as it is, or
    with --ocr-tokens. folders: {model: folder}."""
    said = {model: {} for model in folders}
    for ocr_tokens in (False, True) if "ocr_tokens" in rows[0] else (False,):
        asked = answer.asked_of(tsv, rows, rows, ocr_tokens)
        for model, folder in folders.items():
            said[model] |= answer.predictions(folder, tsv.stem, asked)
    return said


def gather(folders, bench=None):
    """All answered questions of a run: ({bench: [Question, …]}, [what could not be read, …]).
    folders: {model: its bench/ folder}; bench: where the files lie, if not where they were."""
    sources, lost = {}, []
    for model, folder in folders.items():
        where = Path(bench) if bench else bench_of(folder)
        if where is None:
            lost.append(f"{folder}: nothing says where its benchmark files lie; --bench does")
            continue
        for name in dict.fromkeys(p.name.split(".")[0] for p in sorted(folder.glob("*.jsonl"))):
            if name in score.BENCHES:
                sources.setdefault(where / f"{name}.tsv", {})[model] = folder
    found = {}
    for tsv, models in sources.items():
        if not tsv.exists():
            lost.append(f"{tsv} is not there: its questions are not shown (--bench says where "
                        f"the benchmark files lie)")
            continue
        try:
            rows, _ = answer.read_tsv(tsv, follow_links=True)
        except (SystemExit, records.BadRecord) as e:
            lost.append(str(e).removeprefix("error: "))
            continue
        found.setdefault(tsv.stem, []).extend(questions(tsv, rows, said_by(models, tsv, rows)))
    return found, lost


def questions(tsv, rows, said):
    """said: {model: {index: prediction}} → [Question, …], of what at least one has answered."""
    out = []
    for row in rows:
        index = row["index"]
        answers = {model: (texts[index], score.value(tsv.stem, row, texts[index]))
                   for model, texts in said.items() if index in texts}
        if answers:
            right = score.references(tsv.stem, row)
            gold = right[0] if len(right) == 1 else json.dumps(right, ensure_ascii=False)
            asked = score.prompt_of(tsv.stem, row)
            out.append(Question(tsv.stem, index, asked, gold, answers, tsv, row))
    return out


def picked(by_bench, wanted):
    """So many, of every benchmark in turn; of each benchmark in the order given."""
    out, queues = [], [list(items) for items in by_bench.values()]
    while len(out) < wanted and any(queues):
        out += [queue.pop(0) for queue in queues if queue]
    return out[:wanted]


def to_show(by_bench, wanted):
    """The questions of the page: those in which models differ first."""
    ranked = {name: sorted(items, key=lambda q: q.rank) for name, items in by_bench.items()}
    return sorted(picked(ranked, wanted), key=lambda q: q.rank)


def wrong(by_bench, model):
    """{bench: the questions that this model answered, and not fully right}."""
    return {name: [q for q in items if model in q.said and q.said[model][1] < 1]
            for name, items in by_bench.items()}


def jpeg(picture, side=SIDE):
    """A picture as a data URI, made anew: nothing of the data's own bytes."""
    out = io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(out, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", picture.size


def picture(question):
    """(data URI, size), or (what is wrong with the picture, None)."""
    row = question.row
    try:
        pixels = images.load_image(answer.picture_of(question.tsv, row), None, row["where"])
    except (records.BadRecord, OSError) as e:
        return str(e), None
    return jpeg(Image.fromarray(pixels.transpose(1, 2, 0)))
