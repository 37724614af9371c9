"""Records → tokens → micro-batches, and the order of samples.

Nothing is truncated: an item that is too long is dropped and counted. Nothing is skipped in
silence: a bad record refuses the run, naming file and line (`--skip-bad` drops and counts it
instead). And the order of samples is a function of (seed, epoch) alone.
"""
import functools
import hashlib
import math
from collections import Counter, deque
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from model import IGNORE, MAX_LENGTH, PADDING
from pivot import distributed, files, images, index, packs, records
from pivot.records import ANSWER, IMAGE_TOKEN, OTHER, PROMPT, BadRecord

AT_ONCE = 64                # texts tokenised in one call: the work on more leaves the core's cache
MAX_TEXT = 1500             # text tokens of prompt + answer, for either answer of a pair (MMPR)


# ------------------------------------------------------------------------------------------- rules

def special_tokens(tokenizer):
    """The words that are the template's alone. Any in the data's text would be read as structure (a
    second image, a forged turn), so such a record is dropped."""
    return {*tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>", IMAGE_TOKEN} - {""}


class Reader:
    """The rules: what becomes of a record. It gives tokens, or the recipe has no use for it.

    kind: "captions" | "conversations" | "pairs". max_length: of the LLM. skip_bad: its picture is
    decoded to see whether that can be done. follow_links: links inside an image root may lead out
    of it. verifiable: pairs with a gold answer alone.
    """

    def __init__(self, kind, tokenizer, encoder, max_length, skip_bad=False, follow_links=False,
                 verifiable=False):
        self.kind, self.tokenizer, self.frame = kind, tokenizer, records.frame_of(tokenizer)
        self.size, self.num_image_tokens = encoder.image_size, encoder.num_tokens
        self.max_length = min(MAX_LENGTH, max_length)
        self.skip_bad, self.follow_links, self.verifiable = skip_bad, follow_links, verifiable
        tokenizer("")                    # lets its core neither truncate nor pad: see tokenised
        # The answers of a chat are closed with the id of `<|im_end|>`.
        self.end = [] if kind == "captions" else [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        self.special = special_tokens(tokenizer)

    def depends_on(self):
        """All that the outcomes depend on besides the files: {what: its identity}. The rules are
        these very lines, and those of the modules they call."""
        rules = [__file__, index.__file__, records.__file__]
        facts = {"kind": self.kind, "tokenizer": index.tokenizer_digest(self.tokenizer),
                 "frame": self.frame, "special": sorted(self.special), "end": self.end,
                 "image_tokens": self.num_image_tokens, "max_length": self.max_length,
                 "follow_links": self.follow_links, "verifiable": self.verifiable,
                 "skip_bad": self.skip_bad}
        if self.skip_bad:
            rules.append(images.__file__)
            facts |= {"size": self.size, "pillow": PIL.__version__}
        return {**facts, "rules": files.sha256(*rules)}

    def read(self, raw):
        """[(where, record as bytes, image root), …] → an index.Outcome of each, in their order."""
        outcomes = [self.look(*one) for one in raw]
        usable = [one for one in outcomes if one.state == index.KEPT]
        encoded = iter(self.tokenised([text for one in usable for text, _ in one.record.pieces]))
        for one in usable:
            one.parts = [(next(encoded) if role == PROMPT else next(encoded) + self.end, role)
                         for _, role in one.record.pieces]
            if not self.fits(one.record, one.parts):
                one.state = index.OVER_LONG
        return outcomes

    def tokenised(self, texts):
        """→ the ids of each text. The tokenizer's core is asked: transformers would make a dict of
        masks for each of them, a seventh of the time that it takes to read a set."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None:
            return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [one.ids for i in range(0, len(texts), AT_ONCE) for one in core.encode_batch_fast(
            texts[i:i + AT_ONCE], add_special_tokens=False)]

    def look(self, where, raw, root):
        """One record, all but its tokens → index.Outcome."""
        outcome = index.Outcome(where)
        try:
            item = records.parse(where, raw)
            image = records.image_of(item, root, where, self.follow_links)
            if image == "many":
                outcome.state = index.MULTI_IMAGE
                return outcome
            outcome.record = record = self.make(where, item, image)
            outcome.unread = records.unread(item, self.kind)
        except BadRecord as e:
            outcome.state, outcome.why = index.BAD, str(e)
            return outcome
        if any(token in text for text in record.said for token in self.special):
            outcome.state = index.SPECIAL_TOKEN
        elif self.verifiable and record.gold is None:
            outcome.state = index.NO_GOLD
        elif self.skip_bad and image:
            try:
                images.load_image(image, self.size, where)
            except BadRecord as e:
                outcome.state, outcome.why = index.UNREADABLE, str(e)
        return outcome

    def make(self, where, item, image):
        if self.kind == "captions":
            return records.caption_record(where, item, image)
        if self.kind == "conversations":
            return records.conversation_record(where, item, image, self.frame)
        return records.pair_record(where, item, image, self.frame)

    def fits(self, record, parts):
        """The length rule, for each answer with the prompt by itself."""
        tokens = {PROMPT: 0, ANSWER: 0, OTHER: 0}
        for ids, role in parts:
            tokens[role] += len(ids)
        text = tokens[PROMPT] + max(tokens[ANSWER], tokens[OTHER])
        total = text
        if record.image is not None:                       # its one placeholder is no text
            text -= 1
            total = text + self.num_image_tokens
        return total <= self.max_length and not (self.kind == "pairs" and text > MAX_TEXT)


# ---------------------------------------------------------------------------------------- datasets

class Samples(torch.utils.data.Dataset):
    """Tokenised records: text in flat arrays, which all processes share, images by path.

    kind, max_length, skip_bad, follow_links, verifiable: see Reader. sources: [(file, image root),
    …]. num_samples: stop after so many usable ones, drawn by a seeded shuffle (None: all, in the
    order of the files). run: the stage's checkpoints.Run, in whose index they are kept for the next
    start; None: read for this process alone.
    raises SystemExit, one line, where records are bad, unless skip_bad, which counts them.
    """

    def __init__(self, kind, sources, tokenizer, encoder, max_length, num_samples=None, seed=0,
                 skip_bad=False, follow_links=False, verbose=True, verifiable=False, run=None):
        self.kind, self.size, self.num_image_tokens = kind, encoder.image_size, encoder.num_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.verifiable = verifiable
        reader = Reader(kind, tokenizer, encoder, max_length, skip_bad, follow_links, verifiable)
        table = index.table(reader, sources, num_samples, seed, run,
                            verbose and distributed.is_main())
        self.ids, self.roles, self.offsets = table.ids, table.roles, table.offsets
        self.where, self.images, self.golds = table.where, table.images, table.golds
        self.answer_tokens = table.answer_tokens              # (n,): every process knows all
        # A 64-bit fingerprint of each sample's text and image name, for the data digest.
        self.keys = table.keys
        self.dropped, self.unread = Counter(table.dropped), Counter(table.unread)
        # drawn: looked at, and counted, until there were enough
        self.read, self.drawn, self.text_only = table.read, table.drawn, table.text_only

    def __len__(self):
        return len(self.where)

    def tokens(self, i):
        """ids and roles of sample i, one `<image>` id not yet expanded."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span].astype(np.int64), self.roles[span]

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


def plain_files(args, given):
    """What --captions or --instruct names → [(file, image root), …]."""
    return [(file, args.images) for file in records.files_of(given)]


def pair_files(args, given):
    """What --preferences names → [(annotation file, image root), …]: images lie where meta.json
    says, else in --images, else in images/ beside the file, else in DATA/images."""
    found = []
    for path in records.files_of(given, "pairs"):
        beside = packs.default_images(path.parent)
        root = args.images or (beside if Path(beside).is_dir() else packs.default_images(args.data))
        found += [(file, folder or root) for file, folder in records.pair_sources(path)]
    return found


def preference_pairs(args, given, tokenizer, model, run=None, keep_all=False):
    """The pairs that all signals share: one reader, one filter, one seeded subset. run: see
    Samples. keep_all: no subset (held-out pairs)."""
    return Samples("pairs", pair_files(args, given), tokenizer, model.encoder,
                   model.llm.config.max_position_embeddings,
                   None if keep_all else args.num_samples, args.seed, args.skip_bad,
                   args.follow_links, verifiable=getattr(args, "verifiable", False), run=run)


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


def rows_at_once(args):
    """Samples of a micro-batch: never more than a process's share of a global batch."""
    return max(1, min(args.micro_batch, args.global_batch // distributed.world()[1]))


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
