"""A benchmark file → questions → answers: VLMEvalKit TSVs, read without holding their pictures.

A TSV holds its pictures as base64, and may be of gigabytes. `read_tsv` goes through it once and
keeps the text alone, with the place of every picture; a worker reads one when its question is
asked. Answers are appended to a .jsonl a process as they come, each with a digest of what was
asked: an interrupted call goes on, and a changed file costs the answers of its changed rows alone.
"""
import base64
import csv
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from judge import score
from pivot import distributed, images, model_io, packs, records, rollout

MAX_CELL = 256 * 2 ** 20         # characters; an unclosed quote would read on to the file's end


# ------------------------------------------------------------------------------------ the files

def table_rows(path):
    """Yield (line it begins at, bytes (start, length), cells) of a TSV; raises SystemExit."""
    csv.field_size_limit(MAX_CELL)
    with open(path, "rb") as file:
        table = csv.reader((line.decode("utf-8-sig") for line in file), delimiter="\t")
        while True:
            start, number = file.tell(), table.line_num + 1
            try:
                cells = next(table)
            except StopIteration:
                return
            except (UnicodeDecodeError, csv.Error) as e:
                raise SystemExit(f"error: {path}:{number}: not a TSV in UTF-8 ({e})")
            if cells:
                yield number, (start, file.tell() - start), cells


def read_tsv(path, follow_links=False):
    """The questions of a benchmark file: ([row, …], what was left out and why: Counter).

    A row is a dict of its columns but `image`; added are `where` (file:line), `image_id` (equal for
    equal pictures) and `picture`: the bytes of the record that holds it, or a file's path. `image`
    may be base64, also as a data URI, a list of such (the first is shown), or, up to 64 characters,
    the index of the row that has it; without one `image_path` names a file below images/ beside the
    TSV. A cell that says nan is empty, as pandas writes one; but an answer may be "nan".
    raises SystemExit or BadRecord, one line, for a row that lacks something, whose picture is not
    base64, or whose answer is no option: before the first question is asked, not after hours.
    """
    path, name = Path(path), Path(path).stem
    kept, pictures, seen, dropped, header = [], {}, set(), Counter(), None
    for number, span, cells in table_rows(path):
        where = f"{path}:{number}"
        if header is None:
            header = cells
            continue
        if len(cells) > len(header):
            raise SystemExit(f"error: {where}: {len(cells)} cells in a table of {len(header)} "
                             f"columns; is a quote left open?")
        row = dict(zip(header, cells + [""] * (len(header) - len(cells))))
        for column, text in row.items():
            if column != "answer" and text.strip() in ("nan", "NaN"):
                row[column] = ""
        missing = [c for c in ("index", "question", "answer") if not row.get(c, "").strip()]
        if missing or not {"image", "image_path"} & row.keys():
            raise SystemExit(f"error: {where}: no '{(missing or ['image'])[0]}'")
        if row["index"] in seen:
            raise SystemExit(f"error: {where}: index {row['index']} is an earlier row's, too; "
                             "is it an old copy of the file?")
        seen.add(row["index"])
        row["where"], cell = where, row.pop("image", "").strip()
        if len(cell) > 64 or cell.startswith("data:"):
            text = base64_of(cell)
            decoded(text, where)
            row["image_id"] = hashlib.sha1(text.encode()).hexdigest()
            row["picture"] = (header.index("image"), *span)
            row["more_images"] = cell.startswith("[") and cell.count("'") > 2
            pictures[row["index"]] = {k: row[k] for k in ("image_id", "picture", "more_images")}
        elif cell:
            row["same_as"] = cell
        elif row.get("image_path", "").strip():
            row.update(picture_file(path, row["image_path"].strip(), where, follow_links))
        else:
            dropped["without an image"] += 1
            continue
        if name == "MMMU_DEV_VAL" and row.get("split", "validation") != "validation":
            dropped["not of the validation split"] += 1
            continue
        kept.append(row)
    if not kept:
        raise SystemExit(f"error: {path}: no question in it"
                         + "".join(f"; {n} {why}" for why, n in dropped.items()))
    unit = score.unit_of(name, kept)
    for row in kept:
        if "same_as" in row:
            if row["same_as"] not in pictures:
                raise SystemExit(f"error: {row['where']}: image {row['same_as']!r} is neither "
                                 f"base64 nor the index of a row that has one")
            row.update(pictures[row["same_as"]])
        score.references(name, row)
        unit(row)
    return kept, dropped


def picture_file(tsv, cell, where, follow_links):
    """`image_path`: a file in images/NAME/ or images/ (or images.pack) beside the TSV; raises
    BadRecord."""
    names = score.listed(cell) or [cell]
    root = packs.default_images(tsv.parent)
    if any(packs.scandir(os.path.join(root, tsv.stem))):
        root = os.path.join(root, tsv.stem)
    path = records.image_of({"image": names[0]}, root, where, follow_links)
    return {"image_id": path, "picture": path, "more_images": len(names) > 1}


def base64_of(cell):
    """The base64 of a cell's first picture: without the head of a data URI, with its padding."""
    text = "".join((score.listed(cell) or [cell])[0].split())
    if text.startswith("data:"):
        text = text.partition(",")[2]
    return text + "=" * (-len(text) % 4)


def decoded(text, where):
    """base64 → bytes; raises BadRecord."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise records.BadRecord(f"{where}: 'image' is not base64; mend the cell, or empty it: then "
                                f"the row is left out")


def picture_of(tsv, row):
    """The picture as images.load_image takes it: bytes, or a path; raises records.BadRecord."""
    if isinstance(row["picture"], str):
        return row["picture"]
    column, start, length = row["picture"]
    with open(tsv, "rb") as file:
        file.seek(start)
        text = file.read(length).decode("utf-8-sig")
    csv.field_size_limit(MAX_CELL)                      # a spawned worker has its own
    cell = next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[column].strip()
    return decoded(base64_of(cell), row["where"])


def wrong_pictures(rows):
    """For --wrong-image: the row whose picture each row is shown; half the file away, further where
    that is the same picture."""
    ids, n = [r["image_id"] for r in rows], len(rows)
    if len(set(ids)) < 2:
        raise SystemExit(f"error: {rows[0]['where'].rpartition(':')[0]}: --wrong-image needs two "
                         f"different pictures")
    return [next(rows[j % n] for j in range(i + n // 2, i + n // 2 + n) if ids[j % n] != ids[i])
            for i in range(n)]


# -------------------------------------------------------------------------------- the questions

def prompt_ids(prompts, where, tokenizer, encoder):
    """Questions in full → the tokens up to where the assistant answers, a list of ids each: the
    system turn, the image's tokens, the question. where: what names each one in the SystemExit that
    is raised where it holds `<image>`."""
    image_id, rows = tokenizer.convert_tokens_to_ids(records.IMAGE_TOKEN), []
    frame = records.frame_of(tokenizer)
    turns = [records.user_turn(prompt, True, frame=frame) for prompt in prompts]
    for ids in tokenizer(turns, add_special_tokens=False)["input_ids"]:
        if ids.count(image_id) != 1:
            raise SystemExit(f"error: {where[len(rows)]}: the question holds "
                             f"{records.IMAGE_TOKEN}")
        at = ids.index(image_id)
        rows.append(ids[:at] + [image_id] * encoder.num_tokens + ids[at + 1:])
    return rows


class Questions(torch.utils.data.Dataset):
    """Benchmark rows, tokenised; pictures are read in the worker, one question at a time.
    shown: the rows whose pictures go with the questions, their own or (--wrong-image) others."""

    def __init__(self, tsv, rows, shown, tokenizer, encoder, ocr_tokens=False):
        self.tsv, self.shown, self.size = Path(tsv), shown, encoder.image_size
        prompts = [score.prompt_of(self.tsv.stem, r, ocr_tokens) for r in rows]
        self.ids = prompt_ids(prompts, [r["where"] for r in rows], tokenizer, encoder)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        row = self.shown[i]
        pixels = images.load_image(picture_of(self.tsv, row), self.size, row["where"])
        return i, self.ids[i], torch.from_numpy(pixels)


def collate(items):
    """Left-pad, so that every prompt ends where its answer begins."""
    index, ids, pixels = zip(*items)
    rows = [torch.tensor(row) for row in ids]
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True,
                                  padding_side="left")
    return index, torch.stack(pixels), input_ids, attention_mask


# ---------------------------------------------------------------------------------- the answers

def asked_of(path, rows, shown, ocr_tokens):
    """{index: a digest of what is asked: the prompt, and the picture of the row `shown`}."""
    found, pictures = {}, {}
    for row, other in zip(rows, shown):
        picture = other["picture"]
        if not isinstance(picture, str):
            picture = other["image_id"]
        elif picture in pictures:
            picture = pictures[picture]
        else:
            with packs.open_file(picture) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            picture = pictures[picture] = digest
        prompt = score.prompt_of(path.stem, row, ocr_tokens)
        found[row["index"]] = hashlib.sha256(f"{prompt}\0{picture}".encode()).hexdigest()[:16]
    return found


def stored(folder, name):
    """Yield {"index", "prediction" and, but for those of older versions, "asked"}: all that has
    been answered so far, by any number of processes; raises SystemExit."""
    for file in sorted(folder.glob(f"{name}.*.jsonl")):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):     # the last line may have been cut off
            try:
                item = json.loads(line)
                whole = {"index", "prediction"} <= item.keys()
            except (ValueError, AttributeError):
                whole = False
            if not whole:
                raise SystemExit(f"error: {file}:{number}: not an answer; delete the line, and its "
                                 f"question is answered again")
            yield item


def predictions(folder, name, asked=None):
    """{index: prediction} of what has been answered so far; with `asked`, as asked_of gives it,
    only of what is still asked. An answer without a digest counts: repair_eval.py has refused a
    file that is not the one it was given to."""
    done = {}
    for item in stored(folder, name):
        index = item["index"]
        if asked is None or item.get("asked", asked.get(index)) == asked.get(index):
            done[index] = item["prediction"]
    return done


def still_valid(folder, name, asked):
    """The stored answers to what is asked now; one line says how many others there are."""
    kept, known = predictions(folder, name, asked), predictions(folder, name)
    if changed := sum(index in known and index not in kept for index in asked):
        distributed.print0(f"  {name}: {changed} of {len(asked)} rows have changed since they were "
                           f"answered, and are asked again")
    return kept


def answer(args, model, tokenizer, device, path, rows, shown, folder, asked):
    """Answer the rows of one TSV, with the pictures of the rows `shown`: greedily, or as drawn at
    --temperature, by --seed and the question's index. Each process appends its share to a file of
    its own, as it comes, with the digests `asked`. → {index: prediction}. What an earlier,
    interrupted call answered stays, where the same is asked.
    """
    name = path.stem
    rank, world = distributed.world()
    # By one, for all: the nodes of a cluster may see a shared folder differently for a while.
    done, mine = distributed.from_main(lambda: still_valid(folder, name, asked)), {}
    own = folder / f"{name}.{rank}.jsonl"
    if own.exists():
        whole = own.read_bytes()
        os.truncate(own, whole.rfind(b"\n") + 1)
    questions = Questions(path, rows, shown, tokenizer, model.encoder, args.ocr_tokens)
    todo = [i for i, r in enumerate(rows) if r["index"] not in done]
    todo.sort(key=lambda i: -len(questions.ids[i]))    # full batches; the longest first
    todo = todo[rank::world]
    batches = [todo[i:i + args.eval_batch] for i in range(0, len(todo), args.eval_batch)]
    loader = torch.utils.data.DataLoader(questions, batch_sampler=batches, collate_fn=collate,
                                         **distributed.workers(min(args.workers, len(batches))))
    stops = model_io.stop_ids(tokenizer)
    with open(own, "a", encoding="utf-8") as file:
        for index, pixels, ids, mask in distributed.progress(0, len(batches), name, loader):
            seeds = [rollout.seed_of(args.seed, name, rows[i]["index"]) for i in index] \
                if args.temperature else ()
            tokens = model.generate(pixels.to(device), ids.to(device), mask.to(device),
                                    args.max_new_tokens, stops, args.temperature, seeds)
            for i, text in zip(index, tokenizer.batch_decode(tokens)):
                number = rows[i]["index"]
                mine[number] = text
                file.write(json.dumps({"index": number, "asked": asked[number],
                                       "prediction": text}) + "\n")
            file.flush()
    for answers in distributed.gather(mine):
        done |= answers
    return done
