"""Records → tokens → micro-batches, and the order of samples.

Nothing is truncated: an item that is too long is dropped and counted. Nothing is skipped in
silence: a bad record refuses the run, naming file and line (`--skip-bad` drops and counts it
instead). And the order of samples is a function of (seed, epoch) alone.
"""
import functools
import hashlib
import itertools
import math
import os
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import IGNORE, MAX_LENGTH, PADDING
from pivot import distributed, images, records
from pivot.records import ANSWER, IMAGE_TOKEN, OTHER, PROMPT, BadRecord

MAX_TEXT = 1500             # text tokens of prompt + answer, for either answer of a pair (MMPR)


# ---------------------------------------------------------------------------------------- datasets

class TokenTable:
    """Texts of all samples in flat arrays, while they are being read."""

    def __init__(self):
        self.kept, self.offsets, self.answer_tokens, self.golds = [], [0], [], []
        self.ids, self.roles = array("i"), array("b")

    def append(self, record, parts):
        """parts: [(ids of a piece, its role), …] of the record."""
        self.kept.append((record.where, record.image))
        self.golds.append(record.gold)
        for ids, role in parts:
            self.ids.extend(ids)
            self.roles.extend([role] * len(ids))
        self.offsets.append(len(self.ids))
        self.answer_tokens.append(sum(len(ids) for ids, role in parts if role == ANSWER))


class Samples(torch.utils.data.Dataset):
    """Tokenised records: text in flat arrays (workers share them), images by path.

    kind: "captions" | "conversations" | "pairs"; sources: [(file, image root), …].
    num_samples: stop after so many usable ones, drawn by a seeded shuffle (None: all, file order).
    raises SystemExit at the first bad record, unless skip_bad, which counts it. follow_links: links
    inside an image root may lead out of it. verifiable: pairs with a gold answer alone.
    """

    def __init__(self, kind, sources, tokenizer, encoder, max_length, num_samples=None, seed=0,
                 skip_bad=False, follow_links=False, verbose=True, verifiable=False):
        self.kind, self.size, self.num_image_tokens = kind, encoder.image_size, encoder.num_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.max_length = min(MAX_LENGTH, max_length)
        self.dropped, self.unread, self.read = Counter(), Counter(), 0
        self.follow_links, self.verifiable = follow_links, verifiable
        special = {*tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>", IMAGE_TOKEN} - {""}
        wanted = math.inf if num_samples is None else num_samples
        shown = verbose and distributed.is_main()
        raw, table, bad = raw_items(sources, num_samples, seed), TokenTable(), []
        usable = self.usable(tqdm(raw, f"reading {kind}", disable=not shown, leave=False),
                             records.frame_of(tokenizer), special, skip_bad, bad)
        while len(table.kept) < wanted:
            some = list(itertools.islice(usable, min(1024, wanted)))
            if not some:
                break
            if skip_bad:
                some = self.readable(some, bad)
            for record, parts in self.tokenised(some, tokenizer):
                if self.fits(record, parts) and len(table.kept) < wanted:
                    table.append(record, parts)
        usable.close()
        if bad:
            self.dropped["bad"] = len(bad)
            if shown:
                more = f"\n  and {len(bad) - 3} more" if len(bad) > 3 else ""
                distributed.print0("\n".join(f"  dropped: {why}" for why in bad[:3]) + more)
        self.drawn = self.read                     # looked at, and counted, until there were enough
        if num_samples is not None:
            self.read = len(raw)
        if not table.kept:
            raise SystemExit(f"error: no usable record in {sources[0][0]} "
                             f"(dropped: {dict(self.dropped)})")
        # Arrays, not lists: a worker counts references to each string it reads of a list, and so
        # comes to own a copy of its page (100 MB a worker with 500,000 records).
        self.where, self.images = np.array(table.kept, np.dtypes.StringDType(na_object=None)).T
        self.golds = np.array(table.golds, np.dtypes.StringDType(na_object=None))
        self.text_only = sum(image is None for _, image in table.kept)
        self.ids = np.frombuffer(table.ids, np.int32)
        self.roles = np.frombuffer(table.roles, np.int8)
        self.offsets = np.array(table.offsets)
        self.answer_tokens = np.array(table.answer_tokens)    # (n,): every process knows all

    def usable(self, raw, frame, special, skip_bad, bad):
        """Yield the records that the recipe has a use for; count the others. A bad one ends the
        run, or with skip_bad goes to the list `bad`. frame: what stands around a question."""
        make = {"captions": records.caption_record,
                "conversations": functools.partial(records.conversation_record, frame=frame),
                "pairs": functools.partial(records.pair_record, frame=frame)}[self.kind]
        for where, item, root in raw:
            self.read += 1
            try:
                record = self.record(make, where, item, root, special)
            except BadRecord as e:
                if not skip_bad:
                    raise SystemExit(f"error: {e}  (--skip-bad drops and counts such records)")
                bad.append(str(e))
                continue
            if record:
                yield record

    def readable(self, some, bad):
        """Those of the records whose picture can be read; why the others cannot goes to `bad`."""
        def fault(record):
            try:
                if record.image:
                    images.load_image(record.image, self.size, record.where)
            except BadRecord as e:
                return str(e)
        with ThreadPoolExecutor(distributed.cores()) as pool:      # Pillow decodes beside Python
            faults = list(pool.map(fault, some))
        bad.extend(why for why in faults if why)
        return [record for record, why in zip(some, faults) if not why]

    def tokenised(self, some, tokenizer):
        """Yield (record, [(ids, role), …]), all pieces tokenised in one call. The answers of a chat
        are closed with the id of `<|im_end|>`."""
        if not some:
            return
        end = [] if self.kind == "captions" else [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        pieces = [piece for record in some for piece, _ in record.pieces]
        encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
        for record in some:
            yield record, [(next(encoded) if role == PROMPT else next(encoded) + end, role)
                           for _, role in record.pieces]

    def fits(self, record, parts):
        """The length rule, for each answer with the prompt by itself; what is too long is counted.
        """
        tokens = {PROMPT: 0, ANSWER: 0, OTHER: 0}
        for ids, role in parts:
            tokens[role] += len(ids)
        text = tokens[PROMPT] + max(tokens[ANSWER], tokens[OTHER])
        total = text
        if record.image is not None:                       # its one placeholder is no text
            text -= 1
            total = text + self.num_image_tokens
        too_long = total > self.max_length or (self.kind == "pairs" and text > MAX_TEXT)
        if too_long:
            self.dropped["over-long"] += 1
        return not too_long

    def record(self, make, where, item, root, special):
        """One raw item → Record, or None, counted, where the recipe has no use for it."""
        item = records.parse(where, item)
        image = records.image_of(item, root, where, self.follow_links)
        if image == "many":
            self.dropped["multi-image"] += 1
            return None
        record = make(where, item, image)
        self.unread.update(records.unread(item, self.kind))
        # The template's own special tokens are ours; any in the data's text would be read as
        # structure (a second image, a forged turn), so the item is dropped.
        if any(token in text for text in record.said for token in special):
            self.dropped["special token in text"] += 1
            return None
        if self.verifiable and record.gold is None:
            self.dropped["without a gold answer"] += 1
            return None
        return record

    def __len__(self):
        return len(self.where)

    def tokens(self, i):
        """ids and roles of sample i, one `<image>` id not yet expanded."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span].astype(np.int64), self.roles[span]

    @functools.cached_property
    def keys(self):
        """A 64-bit fingerprint of each sample's text and image name, for the data digest."""
        return np.array([int.from_bytes(hashlib.sha256(
            self.ids[a:b].tobytes() + self.roles[a:b].tobytes()
            + os.path.basename(image or "").encode()).digest()[:8], "big")
            for a, b, image in zip(self.offsets[:-1], self.offsets[1:], self.images)], np.uint64)

    def __getitem__(self, i):
        """One sample with its image tokens expanded and its image as uint8 (3, S, S)."""
        (ids, roles), image = self.tokens(i), self.images[i]
        counts = np.where(ids == self.image_id, self.num_image_tokens, 1)
        ids, roles = np.repeat(ids, counts), np.repeat(roles, counts)
        try:
            pixels = images.load_image(image, self.size, self.where[i]) if image else \
                images.planes(Image.new("RGB", (1, 1)), self.size)             # black
        except BadRecord as e:
            raise BadRecord(f"{e}; with a good file in its place the same command goes on "
                            f"(or start over without it: --skip-bad --overwrite)")
        return {"index": i, "ids": ids, "roles": roles, "pixels": pixels}

    def names(self, indices, most=8):
        """Where the records of these samples stand, for a message: "file:line, …"."""
        more = f" and {len(indices) - most} more" if len(indices) > most else ""
        return ", ".join(self.where[i] for i in indices[:most]) + more

    def fingerprint(self):
        """Hash over all samples in order: what cached reference log-probs depend on."""
        return hashlib.sha256(self.keys.tobytes()).hexdigest()[:16]

    def summary(self):
        """One line for the log and config.json: what was read, kept and dropped, and why."""
        drops = ", ".join(f"{n} {why}" for why, n in sorted(self.dropped.items())) or "none"
        unread = ", ".join(f"{n} {what}" for what, n in sorted(self.unread.items()))
        drawn = f", of which {self.drawn} drawn" if self.drawn < self.read else ""
        gold = "; all with a gold answer" if self.verifiable else ""
        return (f"{len(self)} {self.kind} of {self.read} records{drawn}; dropped: {drops}; "
                f"{self.text_only} text-only" + gold + (unread and f"; not read: {unread}"))


def raw_items(sources, num_samples, seed):
    """[(file, image root), …] → (where, raw item, image root) of every record, one by one; where a
    number is drawn from them, all in a list, in the order of a seeded shuffle."""
    raw = ((where, item, root) for file, root in sources
           for where, item in records.read_lines(file))
    if num_samples is None:
        return raw
    raw = list(raw)
    return [raw[i] for i in np.random.default_rng(seed).permutation(len(raw))]


def pair_files(args, path):
    """[(annotation file, image root), …]: images lie where meta.json says, else in --images, else
    in images/ beside the file, else in DATA/images."""
    beside = Path(path).parent / "images"
    root = args.images or (str(beside) if beside.is_dir() else f"{args.data}/images")
    return [(file, folder or root) for file, folder in records.pair_sources(path)]


def preference_pairs(args, path, tokenizer, model, keep_all=False):
    """The pairs that all signals share: one reader, one filter, one seeded subset. keep_all: no
    subset (held-out pairs)."""
    return Samples("pairs", pair_files(args, path), tokenizer, model.encoder,
                   model.llm.config.max_position_embeddings,
                   None if keep_all else args.num_samples, args.seed, args.skip_bad,
                   args.follow_links, verifiable=getattr(args, "verifiable", False))


# ----------------------------------------------------------------------------------------- batches

def collate(samples, layout):
    """Samples → one right-padded micro-batch.

    layout "answers": prompt + (chosen) answer(s); "pair": the shared-prefix layout of model.py;
    "rows": both answers of a pair as plain rows, those of all chosen ones first; "prompts": no
    answer, *left*-padded, for model.generate, which draws them.
    → pixel_values uint8 (B, 3, S, S), input_ids, labels (B, T) or, for "rows", (2B, T); for "pair"
    branch, position_ids (B, T); for "prompts" no labels, but attention_mask (B, T); for these three
    index (B,), which names the rows of the cached reference.
    """
    texts = [(s["ids"], s["roles"]) for s in samples]
    if layout == "pair":
        rows = [pair_row(*text) for text in texts]
    elif layout == "prompts":
        prompts = [ids[roles == PROMPT] for ids, roles in texts]
        rows = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in prompts]
    else:
        rows = [answer_row(*text) for text in texts]
    if layout == "rows":
        rows += [answer_row(*text, OTHER) for text in texts]
    batch = padded(rows, side="left" if layout == "prompts" else "right")
    batch["pixel_values"] = torch.from_numpy(np.stack([s["pixels"] for s in samples]))
    if layout != "answers":
        batch["index"] = torch.tensor([s["index"] for s in samples])
    return batch


def padded(rows, side="right"):
    """[{name: (T,)}, …] → {name: (B, longest T)}."""
    fill = {"input_ids": 0, "labels": IGNORE, "branch": PADDING, "position_ids": 0,
            "attention_mask": 0}
    return {k: pad_sequence([torch.from_numpy(row[k]) for row in rows], batch_first=True,
                            padding_value=fill[k], padding_side=side) for k in rows[0]}


def answer_row(ids, roles, answer=ANSWER):
    """Plain causal row of a prompt and one of its answers, with the loss on that alone."""
    kept = (roles == PROMPT) | (roles == answer)
    ids, roles = ids[kept], roles[kept]
    return {"input_ids": ids, "labels": np.where(roles == answer, ids, IGNORE)}


def pair_row(ids, roles):
    """[prompt | chosen | last prompt token again | rejected], as drawn in model.py."""
    prompt, chosen, rejected = (ids[roles == r] for r in (PROMPT, ANSWER, OTHER))
    return branch_row(prompt, [chosen, rejected])          # branches CHOSEN = 1 and REJECTED = 2


def branch_row(prompt, answers):
    """One prompt and any number of answers, as drawn in model.py: each answer is a branch, 1, 2, …,
    that opens with the prompt's last token. prompt (P,), answers: each (A,), ids."""
    last, lengths = len(prompt) - 1, [len(answer) for answer in answers]
    opened = [np.append(prompt[-1:], answer) for answer in answers]
    labels = [np.append([IGNORE], answer) for answer in answers]
    return {
        "input_ids": np.concatenate([prompt[:last], *opened]).astype(np.int64),
        "labels": np.concatenate([np.full(last, IGNORE), *labels]).astype(np.int64),
        "branch": np.repeat(np.arange(len(answers) + 1), [last, *(n + 1 for n in lengths)]),
        "position_ids": np.concatenate([np.arange(last),
                                        *(np.arange(last, last + n + 1) for n in lengths)]),
    }


def group_batch(prompts, answers):
    """A micro-batch of layout "prompts" and the answers drawn to it → what the model scores: a row
    holds a picture, its prompt and all answers of its group, each a branch.

    prompts: as collate gives it, on any device; answers: B lists of G lists of ids, end tokens
    included. → pixel_values, input_ids, labels, branch, position_ids, on that device.
    """
    device = prompts["input_ids"].device
    texts = [ids[mask.bool()].numpy()
             for ids, mask in zip(prompts["input_ids"].cpu(), prompts["attention_mask"].cpu())]
    batch = padded([branch_row(text, group) for text, group in zip(texts, answers)])
    return {"pixel_values": prompts["pixel_values"],
            **{k: v.to(device, non_blocking=True) for k, v in batch.items()}}


def longest_batch(kind, layout, micro_batch, tokenizer, model):
    """The longest micro-batch that the length rule of Samples.fits admits, black pictures and one
    word over and over: what collate gives. Memory is rehearsed with it."""
    encoder = model.encoder
    prompt = records.user_turn("?", True, frame=records.frame_of(tokenizer))
    ids = np.array(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    room = min(MAX_LENGTH, model.llm.config.max_position_embeddings) - len(ids) + 1 \
        - encoder.num_tokens
    if kind == "pairs":
        room = min(room, MAX_TEXT - len(ids) + 1)
    ids = np.repeat(ids, np.where(ids == image_id, encoder.num_tokens, 1))
    answers = 2 if layout in ("pair", "rows") else 1
    roles = np.repeat([PROMPT, ANSWER, OTHER][:1 + answers], [len(ids), room, room][:1 + answers])
    ids = np.concatenate([ids, np.full(answers * room, ids[-1])])
    pixels = images.planes(Image.new("RGB", (1, 1)), encoder.image_size)
    batch = collate([{"index": 0, "ids": ids, "roles": roles, "pixels": pixels}] * micro_batch,
                    layout)
    batch.pop("index", None)
    return batch


def longest_group(group, max_new_tokens, micro_batch, tokenizer, model):
    """The same for group_batch: the longest prompts, and answers that all go on to the end. (What
    drawing them takes, the keys and values of micro_batch × group rows, is not rehearsed.)"""
    plain = longest_batch("pairs", "answers", micro_batch, tokenizer, model)
    prompts = {"input_ids": plain["input_ids"][:, :-1], "pixel_values": plain["pixel_values"]}
    prompts["attention_mask"] = torch.ones_like(prompts["input_ids"])
    answer = plain["input_ids"][0, -1:].repeat(max_new_tokens).tolist()
    return group_batch(prompts, [[answer] * group] * micro_batch)


class BatchOrder:
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
        self.micro_steps = math.ceil(global_batch // world / self.micro_batch)
        self.lengths, self.epoch, self.permutation = np.diff(samples.offsets), None, None

    def batch(self, step):
        """Sample indices of one global batch, (global_batch,), the same in every process."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch
        return self.of_epoch(epoch)[first:first + self.global_batch]

    def of_epoch(self, epoch):
        """All sample indices in the order of an epoch, (n,); the last one asked for is kept."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.permutation = epoch, rng.permutation(len(self.samples))
        return self.permutation

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
        rest = self.of_epoch(0)[self.steps_per_epoch * self.global_batch:]
        share = math.ceil(len(rest) / self.world)
        rest = np.resize(rest, share * self.world)[self.rank::self.world]
        return batches + [rest[i:i + self.micro_batch]
                          for i in range(0, len(rest), self.micro_batch)]

    def like(self, samples):
        """The order of another, perhaps smaller, set with the same processes and micro-batch."""
        if len(samples) < self.world:
            raise SystemExit(f"error: {len(samples)} held-out pairs, fewer than one for each of "
                             f"{self.world} processes; bring more, or name others by --heldout")
        batch = min(self.global_batch, len(samples) // self.world * self.world)
        return BatchOrder(samples, batch, self.micro_batch, self.seed, self.rank, self.world)

    def digest(self, steps):
        """Hash of the ordered samples that so many steps consume; equal for SFT and DPO."""
        keys, sha = self.samples.keys, hashlib.sha256()
        for step in range(steps):
            sha.update(keys[self.batch(step)].tobytes())
        return sha.hexdigest()[:16]


class Underway:
    """Micro-batches for a loader, which remembers what it was asked for and has not given back."""

    def __init__(self, micro_batches):
        self.micro_batches, self.asked = micro_batches, deque()

    def __iter__(self):
        for indices in self.micro_batches:
            self.asked.append(indices)
            yield indices

    def arrived(self):
        self.asked.popleft()

    def awaited(self, samples):
        """The records of the micro-batch that comes next, for a message."""
        return samples.names(self.asked[0])


def loader(samples, micro_batches, layout, workers):
    """Micro-batches from worker processes: decoded, resized, uint8; in the order given. One that is
    waited for raises RuntimeError ("timed out") every few seconds: training.Clock tries again."""
    return torch.utils.data.DataLoader(
        samples, batch_sampler=Underway(micro_batches), **distributed.workers(workers),
        collate_fn=functools.partial(collate, layout=layout), pin_memory=torch.cuda.is_available(),
        timeout=distributed.POLL if workers else 0, prefetch_factor=4 if workers else None)
