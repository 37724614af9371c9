"""What is on disk → records. LLaVA conversations and captions, MMPR preference pairs.

Nothing is skipped in silence: a bad record raises BadRecord, naming file, line and reason. Nothing
that a file says is executed, or leaves its folder.

A record's text comes in pieces, each with its role. They are tokenised one by one and the ids are
concatenated, never the strings: the border between prompt and answer is then where we say it is,
in training and in generation alike.
"""
import codecs
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from pivot import files, packs, printing

MAX_LINE = 16 * 2 ** 20     # bytes of one jsonl line
MAX_NAME = 1024             # characters of an image name; a picture in base64 has more
SHORT_ANSWER = 10           # words of a chosen answer that is a gold answer as it stands
PROMPT, ANSWER, OTHER = 0, 1, 2   # role of a piece's tokens; OTHER is a pair's rejected answer
PICTURES = (                # how the names of pictures end, in small letters
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".jp2", ".j2k", ".avif", ".heic")
PUBLISHED = {".parquet": "parquet", ".yaml": "YAML", ".yml": "YAML"}    # not what is read here
FILMS = (".mp4", ".webm", ".avi", ".mov", ".mkv")
OF_TEXT = {"id", "conversations", "question", "chosen", "rejected", "caption"}
real_folder = functools.lru_cache(2 ** 16)(os.path.realpath)


class BadRecord(Exception):
    """A record or an image that cannot be used: the message names file, line and reason. One met by
    a DataLoader's worker arrives in a traceback, of which this is the last line."""

    def __init__(self, text):
        super().__init__(text.strip().rpartition("BadRecord: ")[2])


class Record(NamedTuple):
    """One item as read: `where` is "file:line"; `image` an absolute path or None; `pieces` a list
    of (text, role) whose ids are concatenated (of a chat, data.Samples closes each answer with the
    id of `<|im_end|>`); `said` the data's own words in them; `gold` see gold_of."""
    where: str
    image: str | None
    pieces: list
    said: list
    gold: str | None = None


# -------------------------------------------------------------------------------------- raw records

def require_file(path):
    """A path, as Path, that is a file of records; raises SystemExit."""
    path = Path(path)
    if any("\ud800" <= c <= "\udfff" for c in str(path.resolve())):
        raise SystemExit(f"error: {ascii(str(path))}: this path is not UTF-8; rename the folder")
    if not path.is_file():
        raise SystemExit(f"error: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        if path.suffix in PUBLISHED or file.read(4) == b"PAR1":
            raise SystemExit(f"error: {path}: {PUBLISHED.get(path.suffix, 'parquet')}, and .jsonl "
                             f"or .json is expected: python -m tools.prepare makes it")
    return path


def files_of(given, of="records"):
    """A file, a folder, or a list of them, as a flag takes them → [path, …] in their order, a
    folder's .jsonl files by their names. raises SystemExit for a folder without any."""
    found = []
    for path in map(Path, [given] if isinstance(given, (str, Path)) else given):
        if not path.is_dir():
            found.append(path)
            continue
        meta = path / "meta.json"
        if meta.exists():
            raise SystemExit(f"error: {path} is a folder with a meta.json in it: name {meta}")
        inside = sorted(p for p in path.glob("*.jsonl") if not p.name.startswith("."))
        if not inside:
            kinds = {PUBLISHED[p.suffix] for p in path.iterdir() if p.suffix in PUBLISHED}
            remedy = f", but {kinds.pop()}: python -m tools.prepare makes it" if kinds else ""
            raise SystemExit(f"error: {path} is a folder without a .jsonl of {of} in it{remedy}")
        found += inside
    return found


def name_of(path, number):
    """Where a record stands, for a message: "file:line", of a .json list "file:item 3"."""
    path = Path(path)
    return f"{path}:item {number}" if path.suffix == ".json" else f"{path}:{number}"


def spans(path):
    """Yield (number, first byte, bytes) of every record: of a .jsonl a line, blank ones left out,
    of a .json list an item; numbers begin at 1. raises SystemExit where the file is neither."""
    path = require_file(path)
    if path.suffix == ".json":
        yield from item_spans(path)
        return
    with open(path, "rb") as f:
        first = 0
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise SystemExit(f"error: {path}: a line of over {MAX_LINE >> 20} MB at byte "
                                 f"{first}; is this a .jsonl?")
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield number, first, len(line)
            first += len(line)


def item_spans(path):
    """`spans` of a .json list."""
    raw = path.read_bytes()
    try:
        items = files.json_of(raw)
    except (ValueError, RecursionError) as e:
        lines = "; one object a line? Then name it .jsonl" if "Extra data" in str(e) else ""
        raise SystemExit(f"error: {path}:{getattr(e, 'lineno', 1)}: not JSON ({e}){lines}")
    if not isinstance(items, list):
        raise SystemExit(f"error: {path}: a JSON list of records is expected")
    count, items, text = len(items), None, raw.decode("utf-8")
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    at = text.index("[") + 1 if count else 0
    done, first = 0, 0                              # characters, and bytes, that lie behind us
    for number in range(1, count + 1):
        at = between.match(text, at).end()
        end = decode(text, at)[1]
        first += len(text[done:at].encode())
        length = len(text[at:end].encode())
        yield number, first, length
        first, done, at = first + length, end, end


def read_lines(path):
    """Yield (where, record as bytes) of every record of a file: what `parse` takes."""
    with open(require_file(path), "rb") as file:
        for number, first, length in spans(path):
            file.seek(first)
            yield name_of(path, number), file.read(length)


def parse(where, raw):
    """A record as bytes → dict; raises BadRecord."""
    try:
        item = files.json_of(raw)
        if b"\\u" in raw:
            json.dumps(item, ensure_ascii=False).encode()   # half a surrogate pair is no character
    except RecursionError:
        raise BadRecord(f"{where}: JSON nested too deeply")
    except ValueError as e:
        raise BadRecord(f"{where}: not JSON ({e})")
    if not isinstance(item, dict):
        raise BadRecord(f"{where}: a JSON object is expected, not {type(item).__name__}")
    return item


def what_is(value):
    """A JSON value in words, for a message."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {json.dumps(value)}"
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), json.dumps(value))


def text_of(item, key, where):
    """A text of the record, not empty. A whole number is its digits; a fraction is refused: how it
    was written (7, 7.0 or 7.00) is no longer known."""
    value = item.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise BadRecord(f"{where}: '{key}' is missing")
    if not isinstance(value, str):
        raise BadRecord(f"{where}: '{key}' is {what_is(value)}; write it in quotes, as it is to "
                        f"be read")
    if not value.strip():
        raise BadRecord(f"{where}: '{key}' is empty")
    return value


def names_of(item, key):
    """The file names under `image` or `images`: [] where there is none."""
    value = item.get(key)
    names = value if isinstance(value, list) else [value]
    return [name for name in names if name is not None and name != ""]


def names_a_picture(value):
    """Is it a file name of a picture or film, a picture itself, or does it hold one?"""
    values = [value]
    for value in values:                  # grows on the way: JSON may nest deeper than calls do
        if isinstance(value, (list, dict)):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and (value.lower().endswith(PICTURES + FILMS)
                                         or value.startswith("data:image/")):
            return True
    return False


def unread(item, kind):
    """What of a usable record nobody reads, in words, for the count in the log."""
    found = [f"pictures under '{key}'" for key in other_pictures(item)]
    if kind == "pairs":
        return found
    turns = item["conversations"]
    system = turns[0].get("from") == "system"
    if system:
        found.append("system turns")
    if kind == "captions" and len(turns) - system > 2:
        found.append("captions' later turns")
    return found


def other_pictures(item):
    """The keys that name pictures but are not read: all but `image` and `images`, and what repeats
    these."""
    read = names_of(item, "image") + names_of(item, "images")
    return [key for key, value in item.items() if key not in OF_TEXT | {"image", "images"}
            and names_a_picture(value) and names_of(item, key) != read]


def image_of(item, root, where, follow_links=False):
    """The record's one image, under `image` or `images`, as a path inside root; None for text
    alone, "many" for several. follow_links: links inside root may lead out of it."""
    names, others = names_of(item, "image"), names_of(item, "images")
    if names and others and names != others:
        raise BadRecord(f"{where}: 'image' and 'images' name different pictures")
    key, names = ("image", names) if names else ("images", others)
    if len(names) > 1:
        return "many"
    if not names:
        if unread := other_pictures(item):
            raise BadRecord(f"{where}: '{unread[0]}' names a picture, and only 'image' and "
                            f"'images' are read; rename the key, or take it out")
        return None
    if not isinstance(names[0], str) or "\0" in names[0] or len(names[0]) > MAX_NAME:
        raise BadRecord(f"{where}: '{key}' is not a file name")
    return path_inside(names[0], root, where, follow_links)


def path_inside(name, root, where, follow_links):
    """The absolute path of a file that lies inside root; raises BadRecord. It keeps the name that
    the record gives: masks are found by it, whatever links stand between."""
    folder = os.path.join(os.getcwd(), root, "")
    top, path = os.path.join(real_folder(folder), ""), os.path.join(folder, name)
    real, climbs = real_path(path), ".." in name.split("/")
    if not real.startswith(top):
        by_link = path.startswith((top, folder)) and not climbs
        if not (by_link and follow_links):
            raise BadRecord(f"{where}: image {name} leaves its folder {root}"
                            + (" by a link; --follow-links allows it" if by_link else ""))
    if not packs.is_file(real):
        raise BadRecord(f"{where}: image {name} not found in {root}")
    return real if climbs else path


def real_path(path):
    """os.path.realpath, in one look at the file where its folder was looked at before. Of what lies
    in a pack, where there are no links, no file system is asked."""
    place = packs.split(os.path.normpath(path))
    if place:
        return os.path.join(real_folder(place[0]), place[1])
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    path = os.path.join(real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


# ----------------------------------------------------------------------------------------- template

IMAGE_TOKEN = "<image>"
SYSTEM = "You are a helpful assistant."
# Qwen's ChatML with the system turn spelled out; content is a string or LLaVA's list of parts.
# It takes the place of the tokenizer's own template, so that no default system prompt slips in.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Frame(NamedTuple):
    """What a chat template puts around a question. An answer is followed by `<|im_end|>`."""
    picture: str       # before a first question about a picture; `<image>` is in it, once
    first: str         # before a first question without one
    later: str         # before a later one, behind the `<|im_end|>` of the answer before
    after: str         # behind a question, up to where the assistant speaks


# What CHAT_TEMPLATE renders (a test compares).
CHATML = Frame(picture=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{IMAGE_TOKEN}\n",
               first=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
               later="\n<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n")


def frame_of(tokenizer):
    """The Frame of a tokenizer's chat template, cut out of what it renders: ours, or that of a
    published model which tools.parent brought in. raises SystemExit where it is not ChatML."""
    if tokenizer.chat_template in (None, CHAT_TEMPLATE):
        return CHATML
    question, answer, more = "Qpivot?", "Apivot.", "Mpivot?"      # words that no template has

    def user(text, *parts):
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    def render(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False,
                                             add_generation_prompt=True)
    try:
        picture, after = render(user(question, {"type": "image"})).split(question)
        first, same = render(user(question)).split(question)
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        between, last = render(user(question), said, user(more)).split(answer)[1].split(more)
    except Exception as e:                    # jinja's own, or a question that is not there once
        raise SystemExit(f"error: the chat template of {tokenizer.name_or_path} does not render a "
                         f"plain conversation ({printing.first_line(e)})")
    ends = between.startswith("<|im_end|>") and "<|im_start|>assistant" in after
    if not ends or not after == same == last or (picture.count(IMAGE_TOKEN), first.count(
            IMAGE_TOKEN)) != (1, 0):
        raise SystemExit(f"error: the chat template of {tokenizer.name_or_path} is not ChatML: "
                         f"{(picture + question + after)[:80]!r}")
    return Frame(picture, first, between.removeprefix("<|im_end|>"), after)


def user_turn(text, image, first=True, frame=CHATML):
    """A question up to where the assistant speaks; the image, if any, comes first in its turn.
    first: of its conversation."""
    if not first:
        return frame.later + text + frame.after
    return (frame.picture if image else frame.first) + text + frame.after


def caption_record(where, item, image):
    """LLaVA-Pretrain, stage 1a: `<image>` + caption + newline, loss on the caption."""
    turns = turns_of(where, item)
    if image is None:
        raise BadRecord(f"{where}: a caption without an image")
    text = turns[0][1].strip() + "\n"
    return Record(where, image, [(IMAGE_TOKEN, PROMPT), (text, ANSWER)], [text])


def turns_of(where, item):
    """LLaVA's `conversations` → [(question, answer), …], roles checked."""
    turns = item.get("conversations")
    if turns and not isinstance(turns, list):
        raise BadRecord(f"{where}: 'conversations' is {what_is(turns)}, a list of turns is expected"
                        + ("; is it JSON inside a string?" if isinstance(turns, str) else ""))
    if not turns:
        raise BadRecord(f"{where}: 'conversations' is missing or empty")
    if isinstance(turns[0], dict) and turns[0].get("from") == "system":
        turns = turns[1:]            # ours is explicit and the same everywhere
    if len(turns) % 2 or not turns:
        raise BadRecord(f"{where}: 'conversations' must alternate human and gpt")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord(f"{where}: turn {i + 1} is {what_is(turn)}, an object of 'from' and "
                            f"'value' is expected")
        if turn.get("from") != ("human", "gpt")[i % 2]:
            raise BadRecord(f"{where}: turn {i + 1} is not from '{('human', 'gpt')[i % 2]}'")
    return [(text_of(q, "value", f"{where}, turn {2 * i + 1}"),
             text_of(a, "value", f"{where}, turn {2 * i + 2}"))
            for i, (q, a) in enumerate(zip(turns[::2], turns[1::2]))]


def one_placeholder(text):
    """Remove the placeholder from the first question; the template puts it back in front."""
    return text.replace(IMAGE_TOKEN, "", 1).strip() if text.count(IMAGE_TOKEN) == 1 else text


def conversation_record(where, item, image, frame=CHATML):
    """LLaVA instructions: every answer of the conversation is supervised in one pass."""
    turns, pieces, said = turns_of(where, item), [], []
    if image is None and IMAGE_TOKEN in turns[0][0]:
        raise BadRecord(f"{where}: the text has {IMAGE_TOKEN} but the record has no image")
    for i, (question, answer) in enumerate(turns):
        question = one_placeholder(question) if i == 0 else question
        pieces += [(user_turn(question, image, i == 0, frame), PROMPT), (answer, ANSWER)]
        said += [question, answer]
    return Record(where, image, pieces, said)


def pair_record(where, item, image, frame=CHATML):
    """MMPR: image, question, chosen, rejected → prompt, chosen answer, rejected answer."""
    question, chosen, rejected = (text_of(item, k, where) for k in
                                  ("question", "chosen", "rejected"))
    if image is None:
        raise BadRecord(f"{where}: a preference pair without an image")
    if chosen == rejected:
        raise BadRecord(f"{where}: chosen and rejected are the same")
    question = one_placeholder(question)
    prompt = user_turn(question, True, frame=frame)
    return Record(where, image, [(prompt, PROMPT), (chosen, ANSWER), (rejected, OTHER)],
                  [question, chosen, rejected], gold_of(chosen))


FINAL = re.compile(r"final answer\W{0,3}:", re.I)
EDGES = " \n\t*_`$"                              # blanks, Markdown


def final_answer(text):
    """What a text says in the end: the first line after its last "Final answer:" (MMPR's words, in
    any case), without Markdown around it; where it has none, all of it."""
    *before, said = FINAL.split(text)
    said = said.strip(EDGES)
    return said.splitlines()[0].strip(EDGES) if before and said else said


def gold_of(chosen):
    """The answer that a drawn one is compared with, or None: what a pair's chosen answer says after
    "Final answer:"; one without these words, if it is short, itself: one line of at most
    SHORT_ANSWER words. A longer one (an explanation, a description) cannot be verified."""
    gold = final_answer(chosen)
    short = "\n" not in gold and len(gold.split()) <= SHORT_ANSWER
    return gold if gold and (short or FINAL.search(chosen)) else None


def pair_sources(path):
    """MMPR's meta.json → [(annotation file, image root), …] in file order; a bare jsonl → itself,
    with None for the root, which it does not name."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"error: {path} {'is a folder' if path.is_dir() else 'does not exist'}; "
                         "--preferences takes MMPR's meta.json or .jsonl with image, question, "
                         "chosen, rejected")
    if path.suffix != ".json":
        return [(path, None)]
    try:
        sets = files.json_of(path.read_bytes())
        if isinstance(sets, list):
            raise ValueError("it is a list: of pairs? Then write them as .jsonl, one a line")
        if not sets:
            raise ValueError("no set in it")
        # Published beside its folders, or one level inside them (MMPR-v1.2/meta.json).
        base = next((b for b in (path.parent, path.parent.parent)
                     if all((b / s["annotation"]).is_file() for s in sets.values())), path.parent)
        return [(base / s["annotation"], base / s["root"]) for s in sets.values()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise SystemExit(f"error: {path}: not an MMPR meta.json ({type(e).__name__}: {e}); each "
                         f"set needs 'root' and 'annotation'")


def default_file(folder, name):
    """DATA/name.jsonl, or .json where only that exists."""
    jsonl, plain = Path(folder, f"{name}.jsonl"), Path(folder, f"{name}.json")
    return str(plain if plain.exists() and not jsonl.exists() else jsonl)
