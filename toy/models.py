"""How toy-vit and toy-lm are made: `python -m toy pretrain` calls this file."""
import functools
import math
import random
import re

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

from pivot.records import CHAT_TEMPLATE
from toy.scenes import CELL, COLOURS, SHAPES, SIZE, WORDS, Scene, fact_question, turn

# name: width, layers, heads, inner width, steps, batch, learning rate
# A ViT's batch is in images, an LM's in tokens. The LM never learns to look things up at 3e-3.
MODELS = {"toy-vit": (128, 5, 4, 512, 2400, 48, 1e-3),
          "toy-lm": (128, 6, 4, 256, 12000, 1000, 1e-3),
          "toy-vit-l": (192, 7, 6, 768, 2400, 48, 8e-4),
          "toy-lm-l": (192, 8, 6, 384, 12000, 1000, 8e-4)}


def train(name, model, steps, rate, loss_of):
    """AdamW, warm-up and cosine; `loss_of(part of the steps done)` makes its own batch."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))))
    for step in (bar := tqdm(range(steps), desc=name, unit="step", mininterval=1)):
        loss = loss_of(step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def patches(scene):
    """For each of the 6 x 6 patches of a drawn scene, the words for where it is and what it shows.

    The words are what toy-vit learns to see and what toy-lm reads in place of an image. Counts,
    values and relations are left to be worked out from them. Where: the middle is half left, half
    right, so that the place of a thing is linear in its words.
    """
    side, thirds = SIZE // CELL, [(2, 0), (1, 1), (0, 2)]
    words = [["top"] * top + ["bottom"] * bottom + ["left"] * left + ["right"] * right
             for top, bottom in np.repeat(thirds, side // 3, axis=0).tolist()
             for left, right in np.repeat(thirds, side // 3, axis=0).tolist()]

    def show(mask, *what):
        share = mask.reshape(side, CELL, side, CELL).mean((1, 3)).ravel()
        # An eighth of the patch, or nearly the most that any patch has of it.
        where = np.flatnonzero((share > 0.125) | (share >= 0.8 * share.max()))
        for i in where:
            words[i] += what
        return where
    for o in scene.objects:
        size = "large" if o["r"] > 6 else "small"
        where = show(scene.masks[o["name"]], o["colour"], o["shape"], size)
        words[where[0]].append("object")          # in one patch of each: so they can be counted
    for colour, _, _ in scene.bars:
        show(scene.masks[colour], colour, "bar")
    for character, mask in scene.characters:
        show(mask, character)
    return words


def pretrain_vit(folder, name, steps, seed):
    """What is in each patch, read out by a linear map behind the whole net.

    Captions alone teach a ViT this small too slowly for a laptop (one label a picture instead of
    36), so the toy cheats with its masks. The recipe later drops the last block, as it does
    with SigLIP, and so reads features that no read-out was trained on.
    """
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
    width, layers, heads, inner, default, batch, rate = MODELS[name]
    rng = random.Random(f"{seed}/{name}")
    torch.manual_seed(seed)
    model = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=SIZE, patch_size=CELL, vision_use_head=False))
    names = [*COLOURS, *SHAPES, "large", "small", "object", "bar", *"0123456789",
             *sorted(set("".join(WORDS)))]
    names += ["top", "bottom", "left", "right"]
    both = nn.ModuleList([model, nn.Linear(width, len(names))])
    nn.init.constant_(both[1].bias, -4.0)       # most things are absent from most patches

    def loss_of(_):
        scenes = [Scene(rng).draw() for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
        present = torch.zeros(batch, (SIZE // CELL) ** 2, len(names))
        for i, scene in enumerate(scenes):
            for patch, words in enumerate(patches(scene)):
                present[i, patch, [names.index(word) for word in words]] = 1
        logits = both[1](model(pixels / 127.5 - 1).last_hidden_state)
        return nn.functional.binary_cross_entropy_with_logits(
            logits, present, reduction="sum") / present[..., 0].numel()
    train(name, both, steps or default, rate, loss_of)
    model.half().save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3, image_mean=[0.5] * 3,
                         image_std=[0.5] * 3).save_pretrained(folder)


LOOKED_UP = {"colour", "shape", "exist", "larger", "place", "word", "number", "digit", "value"}


def document(rng, done):
    """Text to pretrain on: parts (text or table, is it an answer?). One in eight asks facts.

    Looking things up comes first (15 % of the steps): one question a line, of a small scene. Then
    ChatML. A table is the 6 x 6 patches of a scene in words, laid out like the patches of an image:
    a model that has read tables finds its way in an image as soon as the projector speaks its
    language. The other scenes are descriptions; some tables are only to be described.
    """
    plain, given = done < 0.15, ""
    if rng.random() < 1 / 8:
        questions = [fact_question(rng) for _ in range(8)]
    else:
        scene = Scene(rng)
        while plain and len(scene.objects) > 3:
            scene = Scene(rng)
        questions, given = scene.some(10 if rng.random() < 0.5 else 40), scene.caption() + "\n"
        if rng.random() < (0.5 if plain else 0.75):
            given = [[w if w.isdigit() else " " + w for w in p] for p in patches(scene.draw())]
        if plain:
            questions = [q for q in questions if q.kind in LOOKED_UP]
        elif isinstance(given, list) and rng.random() < 0.15:
            return [(given, 0), (scene.caption() + "\n", 1)]
        elif rng.random() < 0.3:
            questions.append(fact_question(rng))
    rng.shuffle(questions)
    talk = [turn(rng, q) for q in questions[:10]]
    if plain:
        return [(given, 0)] + [part for question, answer in talk for part in
                               ((question, 0), (" " + answer, 1), ("\n", 0))]
    parts = [("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", 0),
             (given, 0), ("\n" if isinstance(given, list) else "", 0)]
    for i, (question, answer) in enumerate(talk):
        parts += [("<|im_start|>user\n" if i else "", 0),
                  (question + "<|im_end|>\n<|im_start|>assistant\n", 0),
                  (answer + "<|im_end|>", 1), ("\n", 0)]
    return parts


def pretrain_lm(folder, name, steps, seed):
    """A byte-level BPE and a Qwen2 on descriptions, questions, answers and facts."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    width, layers, heads, inner, default, batch, rate = MODELS[name]
    rng = random.Random(f"{seed}/{name}")
    torch.manual_seed(seed)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")   # Qwen's own
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = ["".join(text for text, _ in document(rng, i / 4000) if isinstance(text, str))
             for i in range(4000)]
    bpe.train_from_iterator(
        (re.sub(r"<\|\w+\|>", "", text) for text in texts),
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[2],
                                        pad_token=special[0], model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = Qwen2ForCausalLM(Qwen2Config(
        # Like Qwen, more rows than tokens: room for <image> without resizing.
        # 0.08 is 1 / sqrt(width): at HF's 0.02 the first thousand steps only find the scale.
        initializer_range=0.08, vocab_size=(len(tokenizer) + 8 + 63) // 64 * 64, hidden_size=width,
        intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    ids = functools.lru_cache(20000)(lambda text: tokenizer(text).input_ids)
    waiting = []

    def encode(parts):
        """Token ids, weights, and [(position, ids of a cell's words), ...] of one document."""
        tokens, weights, cells = [], [], []
        for part, answer in parts:
            if isinstance(part, list):
                cells += [(len(tokens) + i, [t for word in words for t in ids(word)])
                          for i, words in enumerate(part)]
            new = [0] * len(part) if isinstance(part, list) else ids(part)
            tokens += new
            # Questions are mostly chance: what can be learnt sits in the answers.
            weights += [0.0 if isinstance(part, list) else 1.0 if answer else 0.1] * len(new)
        return tokens, weights, cells

    def refill(done):
        """128 documents in batches of like lengths."""
        pool = sorted((encode(document(rng, done)) for _ in range(128)), key=lambda d: len(d[0]))
        size = 0
        for d in pool:
            if not size or size + len(d[0]) > batch:
                waiting.append([])
                size = 0
            waiting[-1].append(d)
            size += len(d[0])
        rng.shuffle(waiting)

    def loss_of(done):
        if not waiting:
            refill(done)
        tokens, weights, tables = zip(*waiting.pop())
        x, weight = (nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
                     for rows in (tokens, weights))
        embeds, look_up = model.get_input_embeddings()(x), model.get_input_embeddings()
        cells = [(row, at, words) for row, t in enumerate(tables) for at, words in t]
        if cells:                   # a cell enters as the mean of its words, as a patch will
            rows, at, words = zip(*cells)
            bags = nn.utils.rnn.pad_sequence([torch.tensor(w) for w in words], batch_first=True,
                                             padding_value=-1)
            real = (bags >= 0)[..., None]
            mean = (look_up(bags.clamp(min=0)) * real).sum(1) / real.sum(1)
            embeds = embeds.index_put((torch.tensor(rows), torch.tensor(at)), mean)
        # Padding is at the end of the rows: a causal model does not see it.
        logits = model(inputs_embeds=embeds).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        return (loss * weight[:, 1:]).sum() / weight[:, 1:].sum()
    train(name, model, steps or default, rate, loss_of)
    # A kind of question is learnt within a few hundred steps, but nobody knows when: after one
    # round "tallest" is 100 % right and "value" still a guess. So there is a second one.
    waiting.clear()
    rng.seed(f"{seed}/{name}/2")
    train(f"{name}, round 2", model, (steps or default) * 3 // 4, rate, lambda _: loss_of(1.0))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
