"""What is on disk → batches. LLaVA conversations and captions, MMPR preference pairs.

Three rules hold throughout. Nothing is truncated: an item that is too long is dropped and counted.
Nothing is skipped in silence: a bad record refuses the run, naming file and line (`--skip-bad`
drops and counts it instead). And the order of samples is a function of (seed, epoch) alone.

Text is tokenised piece by piece and the ids are concatenated, never the strings: the border between
prompt and answer is then where we say it is, in training and in generation alike.
"""
import functools
import hashlib
import io
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from model import CHOSEN, IGNORE, IMAGE_TOKEN, PADDING, REJECTED, SHARED, SYSTEM

MAX_TEXT = 1500             # text tokens of prompt + answer, for either answer of a pair (MMPR)
MAX_LENGTH = 2048           # the same with the image tokens
MAX_PIXELS = 50_000_000     # a larger image is refused before it is decoded
MAX_LINE = 16 * 2 ** 20     # bytes of one jsonl line
PROMPT, ANSWER, OTHER = 0, 1, 2   # role of a stored token; OTHER is a pair's rejected answer
Image.MAX_IMAGE_PIXELS = None     # our own bound, above, is checked first


class BadRecord(Exception):
    """A record that cannot be used: the message names file, line and reason."""


class Record(NamedTuple):
    """One item as read: `where` is "file:line"; `image` an absolute path or None; `pieces` a list
    of (text, role) whose ids are concatenated."""
    where: str
    image: str | None
    pieces: list


# ------------------------------------------------------------------------------------- raw records

def read_lines(path):
    """Yield (where, object) of a .jsonl (line by line) or of a .json list; raises BadRecord."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"error: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".json":
        try:
            items = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise SystemExit(f"error: {path}:{getattr(e, 'lineno', 1)}: not JSON ({e})")
        if not isinstance(items, list):
            raise SystemExit(f"error: {path}: a JSON list of records is expected")
        for i, item in enumerate(items):
            yield f"{path}:item {i + 1}", item
    else:
        for number, line in enumerate(open_lines(path), 1):
            yield f"{path}:{number}", line


def open_lines(path):
    """The lines of a .jsonl as bytes, none longer than MAX_LINE; blank ones keep their number."""
    with open(path, "rb") as f:
        while line := f.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise SystemExit(f"error: {path}: a line of over {MAX_LINE >> 20} MB at byte "
                                 f"{f.tell() - len(line)}; is this a .jsonl?")
            yield line


def parse(where, item):
    """A raw line (bytes) or an object already parsed → dict; raises BadRecord."""
    try:
        item = json.loads(item) if isinstance(item, bytes) else item
        json.dumps(item, ensure_ascii=False).encode()     # half a surrogate pair is no character
    except RecursionError:
        raise BadRecord(f"{where}: JSON nested too deeply")
    except ValueError as e:
        raise BadRecord(f"{where}: not JSON ({e})")
    if not isinstance(item, dict):
        raise BadRecord(f"{where}: a JSON object is expected, not {type(item).__name__}")
    return item


def text_of(item, key, where):
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{where}: '{key}' is {'empty' if isinstance(value, str) else 'missing'}")
    return value


real_folder = functools.lru_cache(os.path.realpath)


def image_of(item, root, where):
    """The record's one image as a path inside root, None for text alone, "many" for several."""
    name = item.get("image")
    if isinstance(name, list):
        if len(name) > 1:
            return "many"
        name = name[0] if name else None
    if name is None or name == "":
        return None
    if not isinstance(name, str) or "\0" in name:
        raise BadRecord(f"{where}: 'image' is not a file name")
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not path.startswith(real_folder(root) + os.sep):
        raise BadRecord(f"{where}: image {name} leaves its folder {root}")
    if not os.path.isfile(path):
        raise BadRecord(f"{where}: image {name} not found in {root}")
    return path


def user_turn(text, image, system=None):
    """ChatML up to where the assistant speaks; the image, if any, comes first in its turn."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else "\n"
    return (f"{head}<|im_start|>user\n{IMAGE_TOKEN + chr(10) if image else ''}{text}<|im_end|>\n"
            f"<|im_start|>assistant\n")


def caption_record(where, item, image):
    """LLaVA-Pretrain, stage 1a: `<image>` + caption + newline, loss on the caption. [code]"""
    turns = turns_of(where, item)
    if image is None:
        raise BadRecord(f"{where}: a caption without an image")
    return Record(where, image, [(IMAGE_TOKEN, PROMPT), (turns[0][1].strip() + "\n", ANSWER)])


def turns_of(where, item):
    """LLaVA's `conversations` → [(question, answer), …], roles checked."""
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{where}: 'conversations' is missing or empty")
    if isinstance(turns[0], dict) and turns[0].get("from") == "system":
        turns = turns[1:]            # ours is explicit and the same everywhere
    if len(turns) % 2 or not turns:
        raise BadRecord(f"{where}: 'conversations' must alternate human and gpt")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != ("human", "gpt")[i % 2]:
            raise BadRecord(f"{where}: turn {i + 1} is not from '{('human', 'gpt')[i % 2]}'")
    return [(text_of(q, "value", f"{where}, turn {2 * i + 1}"),
             text_of(a, "value", f"{where}, turn {2 * i + 2}"))
            for i, (q, a) in enumerate(zip(turns[::2], turns[1::2]))]


def one_placeholder(text):
    """Remove the placeholder from the first question; the template puts it back in front."""
    return text.replace(IMAGE_TOKEN, "", 1).strip() if text.count(IMAGE_TOKEN) == 1 else text


def conversation_record(where, item, image):
    """LLaVA instructions: every answer of the conversation is supervised in one pass."""
    turns, pieces = turns_of(where, item), []
    if image is None and IMAGE_TOKEN in turns[0][0]:
        raise BadRecord(f"{where}: the text has {IMAGE_TOKEN} but the record has no image")
    for i, (question, answer) in enumerate(turns):
        question = one_placeholder(question) if i == 0 else question
        pieces += [(user_turn(question, image and i == 0, SYSTEM if i == 0 else None),
                    PROMPT), (answer, ANSWER)]
    return Record(where, image, pieces)


def pair_record(where, item, image):
    """MMPR: image, question, chosen, rejected → prompt, chosen answer, rejected answer."""
    question, chosen, rejected = (text_of(item, k, where) for k in
                                  ("question", "chosen", "rejected"))
    if image is None:
        raise BadRecord(f"{where}: a preference pair without an image")
    if chosen == rejected:
        raise BadRecord(f"{where}: chosen and rejected are the same")
    return Record(where, image, [(user_turn(one_placeholder(question), image, SYSTEM),
                                  PROMPT), (chosen, ANSWER), (rejected, OTHER)])


def pair_sources(path):
    """MMPR's meta.json, or a bare jsonl → [(annotation file, image root), …] in file order."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"error: {path} {'is a folder' if path.is_dir() else 'does not exist'}; "
                         "--preferences takes MMPR's meta.json or a .jsonl with image, question, "
                         "chosen, rejected")
    if path.suffix != ".json":
        return [(path, None)]
    try:
        sets = json.loads(path.read_text(encoding="utf-8")) or {"": "empty"}
        # Published beside its folders, or one level inside them (MMPR-v1.2/meta.json).
        base = next((b for b in (path.parent, path.parent.parent)
                     if all((b / s["annotation"]).is_file() for s in sets.values())), path.parent)
        return [(base / s["annotation"], base / s["root"]) for s in sets.values()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise SystemExit(f"error: {path}: not an MMPR meta.json ({type(e).__name__}: {e}); each "
                         f"set needs 'root' and 'annotation'")


# ---------------------------------------------------------------------------------------- datasets

class Samples(torch.utils.data.Dataset):
    """Tokenised records: text in flat arrays (workers share them), images by path.

    kind: "captions" | "conversations" | "pairs"; sources: [(file, image root), …].
    num_samples: stop after so many usable ones, drawn by a seeded shuffle (None: all, file order).
    raises SystemExit at the first bad record, unless skip_bad, which counts it.
    """

    def __init__(self, kind, sources, tokenizer, encoder, max_length, num_samples=None, seed=0,
                 skip_bad=False, verbose=os.environ.get("RANK", "0") == "0"):
        read = {"captions": caption_record, "conversations": conversation_record,
                "pairs": pair_record}[kind]
        self.kind, self.size, self.num_image_tokens = kind, encoder.image_size, encoder.num_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.max_length = min(MAX_LENGTH, max_length)
        special = {*tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>", IMAGE_TOKEN} - {""}
        raw = [(where, item, root) for file, root in sources for where, item in read_lines(file)
               if not (isinstance(item, bytes) and not item.strip())]
        if num_samples is not None:
            raw = [raw[i] for i in np.random.default_rng(seed).permutation(len(raw))]
        self.dropped, kept, texts = Counter(), [], []
        self.text_only = 0
        ids, roles, offsets = [], [], [0]

        def flush():
            """Tokenise what was collected, in one call, and apply the length rule."""
            encoded = iter(tokenizer([t for r in texts for t, _ in r.pieces],
                                     add_special_tokens=False)["input_ids"]) if texts else ()
            end = [tokenizer.convert_tokens_to_ids("<|im_end|>")] if kind != "captions" else []
            for record in texts:
                parts = [next(encoded) + (end if role else []) for _, role in record.pieces]
                text = sum(map(len, parts)) - (record.image is not None)
                if kind == "pairs":        # each branch by itself
                    text -= min(len(parts[1]), len(parts[2]))
                total = text + (self.num_image_tokens if record.image else 0)
                if total > self.max_length or (kind == "pairs" and text > MAX_TEXT):
                    self.dropped["over-long"] += 1
                elif num_samples is None or len(kept) < num_samples:
                    kept.append(record._replace(pieces=None))
                    self.text_only += record.image is None
                    ids.append(np.concatenate(parts).astype(np.int32))
                    roles.append(np.repeat([role for _, role in record.pieces],
                                           [len(part) for part in parts]).astype(np.int8))
                    offsets.append(offsets[-1] + len(ids[-1]))
            texts.clear()

        for where, item, root in tqdm(raw, f"reading {kind}", disable=not verbose, leave=False):
            if num_samples is not None and len(kept) >= num_samples:
                break
            try:
                item = parse(where, item)
                image = image_of(item, root, where)
                if image == "many":
                    self.dropped["multi-image"] += 1
                    continue
                record = read(where, item, image)
                # The template's own special tokens are ours; any in the data's text would be read
                # as structure (a second image, a forged turn), so the item is dropped.
                bare = "".join(p for p, _ in record.pieces)
                if any(bare.count(t) != n for t, n in template_count(record, special).items()):
                    self.dropped["special token in text"] += 1
                    continue
                if skip_bad and record.image:
                    load_image(record.image, self.size, where)
            except BadRecord as e:
                if not skip_bad:
                    raise SystemExit(f"error: {e}  (--skip-bad drops and counts such records)")
                self.dropped["bad"] += 1
                continue
            texts.append(record)
            if len(texts) >= min(1024, num_samples or 1024):
                flush()
        flush()
        self.where, self.images = [r.where for r in kept], [r.image for r in kept]
        self.read = len(raw)
        if not kept:
            raise SystemExit(f"error: no usable record in {sources[0][0]} "
                             f"(dropped: {dict(self.dropped)})")
        self.ids, self.roles = np.concatenate(ids), np.concatenate(roles)
        self.offsets = np.array(offsets)

    def __len__(self):
        return len(self.where)

    def tokens(self, i):
        """ids and roles of sample i, one `<image>` id not yet expanded."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span].astype(np.int64), self.roles[span]

    @functools.cached_property
    def answer_tokens(self):
        """How many tokens of role ANSWER each sample has: (n,) int. Every process knows them all,
        so the token count of a global batch needs no communication."""
        return np.add.reduceat((self.roles == ANSWER).astype(np.int64), self.offsets[:-1])

    @functools.cached_property
    def keys(self):
        """A 64-bit fingerprint of each sample's text and image name, for the data digest."""
        return np.array([int.from_bytes(hashlib.sha256(
            self.ids[a:b].tobytes() + self.roles[a:b].tobytes()
            + os.path.basename(image or "").encode()).digest()[:8], "big")
            for a, b, image in zip(self.offsets[:-1], self.offsets[1:], self.images)], np.uint64)

    def __getitem__(self, i):
        """One sample with its image tokens expanded and its image as uint8 (3, S, S).

        An unreadable image comes back as {"error": line}: an exception from a worker process would
        arrive wrapped in a traceback.
        """
        (ids, roles), image = self.tokens(i), self.images[i]
        counts = np.where(ids == self.image_id, self.num_image_tokens, 1)
        ids, roles = np.repeat(ids, counts), np.repeat(roles, counts)
        try:
            pixels = load_image(image, self.size, self.where[i]) if image else \
                planes(Image.new("RGB", (1, 1)), self.size)             # black
        except BadRecord as e:
            return {"error": f"error: {e}  (--skip-bad drops and counts such records)"}
        return {"index": i, "ids": ids, "roles": roles, "pixels": pixels}

    def fingerprint(self):
        """Hash over all samples in order: what cached reference log-probs depend on."""
        return hashlib.sha256(self.keys.tobytes()).hexdigest()[:16]

    def summary(self):
        """One line for the log and config.json: what was read, kept and dropped, and why."""
        drops = ", ".join(f"{n} {why}" for why, n in sorted(self.dropped.items())) or "none"
        return (f"{len(self)} {self.kind} of {self.read} records; dropped: {drops}; "
                f"{self.text_only} text-only")


def template_count(record, special):
    """How often each special token stands in a record's pieces when its text holds none."""
    questions = sum(role == PROMPT for _, role in record.pieces)
    chat = record.pieces[0][0] != IMAGE_TOKEN
    expected = Counter({IMAGE_TOKEN: int(record.image is not None)})
    if chat:
        expected += Counter({"<|im_start|>": 2 * questions + 1, "<|im_end|>": questions + 1})
    return {t: expected[t] for t in special}


def planes(image, size):
    """RGB → uint8 (3, size, size), squashed bicubically; None: as it is; two sizes: both, flat."""
    if isinstance(size, tuple):                          # one model of two encoders
        return np.concatenate([planes(image, s).ravel() for s in size])
    image = image.resize((size, size), Image.Resampling.BICUBIC) if size else image
    return np.asarray(image).transpose(2, 0, 1).copy()


def load_image(source, size, where):
    """A path or bytes → uint8 pixels as `planes` gives them; raises BadRecord.
    EXIF rotation is applied, 16-bit grey scaled to 8, transparency laid on white, the first frame
    of an animation taken: what a person sees. HF's processors apply the same bicubic squash.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(f"{where}: image of {image.width} × {image.height} pixels, over "
                                f"the bound of {MAX_PIXELS // 10 ** 6} million")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if "A" in image.mode or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return planes(image.convert("RGB"), size)
    except BadRecord:
        raise
    except Exception as e:   # Pillow's decoders raise nearly anything on broken files
        name = "embedded image" if isinstance(source, bytes) else f"image {source}"
        raise BadRecord(f"{where}: {name} cannot be read ({type(e).__name__}: {e})")


def default_file(folder, name):
    """DATA/name.jsonl, or .json where only that exists."""
    jsonl, plain = Path(folder, f"{name}.jsonl"), Path(folder, f"{name}.json")
    return str(plain if plain.exists() and not jsonl.exists() else jsonl)


def preference_pairs(args, path, tokenizer, model, keep_all=False):
    """The pairs SFT and DPO share: one reader, one filter, one seeded subset. keep_all: no subset
    (held-out pairs). Images lie where meta.json says, else in --images or beside the file."""
    beside = Path(path).parent / "images"
    root = args.images or (str(beside) if beside.is_dir() else f"{args.data}/images")
    sources = [(file, folder or root) for file, folder in pair_sources(path)]
    return Samples("pairs", sources, tokenizer, model.encoder,
                   model.llm.config.max_position_embeddings,
                   None if keep_all else args.num_samples, args.seed, args.skip_bad)


# ----------------------------------------------------------------------------------------- batches

def collate(samples, layout):
    """Samples → one right-padded micro-batch.

    layout "sft": prompt + chosen answer(s); "dpo": the shared-prefix pair layout of model.py.
    → pixel_values uint8 (B, 3, S, S), input_ids, labels (B, T), index (B,), and for "dpo" branch
    and position_ids (B, T).
    """
    for sample in samples:
        if "error" in sample:
            return sample
    rows = [(pair_row if layout == "dpo" else answer_row)(s["ids"], s["roles"]) for s in samples]
    width = max(len(r["input_ids"]) for r in rows)
    fill = {"input_ids": 0, "labels": IGNORE, "branch": PADDING, "position_ids": 0}
    batch = {k: torch.from_numpy(np.stack([np.pad(r[k], (0, width - len(r[k])),
                                                  constant_values=fill[k]) for r in rows]))
             for k in rows[0]}
    batch["pixel_values"] = torch.from_numpy(np.stack([s["pixels"] for s in samples]))
    batch["index"] = torch.tensor([s["index"] for s in samples])
    return batch


def answer_row(ids, roles):
    """Plain causal row: the rejected answer left out, loss on the answers alone."""
    ids, roles = ids[roles != OTHER], roles[roles != OTHER]
    return {"input_ids": ids, "labels": np.where(roles == ANSWER, ids, IGNORE)}


def pair_row(ids, roles):
    """[prompt | chosen | last prompt token again | rejected], as drawn in model.py."""
    prompt, chosen, rejected = (ids[roles == r] for r in (PROMPT, ANSWER, OTHER))
    P, C, R = len(prompt), len(chosen), len(rejected)
    mute = np.full(P, IGNORE)
    return {
        "input_ids": np.concatenate([prompt, chosen, prompt[-1:], rejected]),
        "labels": np.concatenate([mute, chosen, mute[:1], rejected]),
        "branch": np.repeat([SHARED, CHOSEN, REJECTED], [P - 1, C + 1, R + 1]),
        "position_ids": np.concatenate([np.arange(P + C), np.arange(P - 1, P + R)]),
    }


class BatchPlan:
    """Which samples make up which step: a function of (seed, epoch), not of who computes it.

    The last, incomplete batch of an epoch is dropped. Inside a global batch samples are sorted by
    length before they are dealt out, so that micro-batches carry little padding; the set stays.
    """

    def __init__(self, samples, global_batch, micro_batch, seed, rank, world):
        if global_batch % world:
            raise SystemExit(f"error: --global-batch {global_batch} cannot be divided among "
                             f"{world} processes; take a multiple of {world}")
        if len(samples) < global_batch:
            raise SystemExit(f"error: {len(samples)} usable samples, fewer than one --global-batch "
                             f"of {global_batch}; lower it or bring more data")
        self.samples, self.global_batch, self.seed = samples, global_batch, seed
        self.rank, self.world = rank, world
        self.micro_batch = min(micro_batch, global_batch // world)
        self.steps_per_epoch = len(samples) // global_batch
        self.micro_steps = -(-(global_batch // world) // self.micro_batch)
        self.lengths, self.epoch, self.order = np.diff(samples.offsets), None, None
        self.batch(0)

    def batch(self, step):
        """Sample indices of one global batch, (global_batch,), the same in every process."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
        return self.order[position * self.global_batch:(position + 1) * self.global_batch]

    def micro_batches(self, step):
        """This process's share of the step, in micro-batches: a list of index arrays."""
        batch = self.batch(step)
        batch = batch[np.argsort(self.lengths[batch], kind="stable")][self.rank::self.world]
        return [batch[i:i + self.micro_batch] for i in range(0, len(batch), self.micro_batch)]

    def schedule(self, start, steps):
        """The micro-batches of this process for steps start … steps - 1, one after the other."""
        for step in range(start, steps):
            yield from self.micro_batches(step)

    def cover(self):
        """Every sample once, in the first epoch's batches, then the left-over ones; a list of
        micro-batches, equally many for every process (the last may repeat samples to that end)."""
        batches = list(self.schedule(0, self.steps_per_epoch))
        rest = self.order[self.steps_per_epoch * self.global_batch:]
        rest = np.resize(rest, -(-len(rest) // self.world) * self.world)[self.rank::self.world]
        return batches + [rest[i:i + self.micro_batch]
                          for i in range(0, len(rest), self.micro_batch)]

    def like(self, samples):
        """The plan of another, perhaps smaller, set with the same processes and micro-batch."""
        batch = min(self.global_batch, max(len(samples) // self.world, 1) * self.world)
        return BatchPlan(samples, batch, self.micro_batch, self.seed, self.rank, self.world)

    def digest(self, steps):
        """Hash of the ordered samples that so many steps consume; equal for SFT and DPO."""
        keys, sha = self.samples.keys, hashlib.sha256()
        for step in range(steps):
            sha.update(keys[self.batch(step)].tobytes())
        return sha.hexdigest()[:16]


def loader(samples, micro_batches, layout, workers):
    """Micro-batches from worker processes: decoded, resized, uint8; in the order given."""
    return torch.utils.data.DataLoader(
        samples, batch_sampler=micro_batches, num_workers=workers,
        collate_fn=functools.partial(collate, layout=layout), worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None)   # the samples are shared, not sent


def ignore_signals(worker):
    """A stop signal sent to the whole process group is for the trainer, which saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
