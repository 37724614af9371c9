"""The toy world: same seed same bytes, nothing shared, nothing guessable; its models open."""
import base64
import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toy import scenes as toy_scenes
from toy import world as toy
from toy.__main__ import main as toy_command

ROOT = Path(__file__).resolve().parent.parent
csv.field_size_limit(10 ** 8)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    toy_command([str(out), "--scale", "0.02"])
    return out


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The benchmarks alone at full size: balance cannot be seen in twelve rows."""
    world = toy.World(tmp_path_factory.mktemp("larger"), 3, 1.0)
    for name in toy.BENCH:
        world.bench(name, 600)
    return world.root


def lines(path):
    return [json.loads(line) for line in path.open()]


def table(path):
    """A benchmark's rows, with every image a row of its own or an earlier row's."""
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    images = {}
    for row in rows:
        row["reused"] = len(row["image"]) <= 64
        images[row["index"]] = images[row["image"]] if row["reused"] else row["image"]
        row["png"] = base64.b64decode(images[row["index"]], validate=True)
    return rows


def test_same_seed_same_bytes(drawn, tmp_path):
    toy_command([str(tmp_path / "again"), "--scale", "0.02"])
    toy_command([str(tmp_path / "other"), "--scale", "0.02", "--seed", "1"])
    first, other = files(drawn), files(tmp_path / "other")
    assert first == files(tmp_path / "again")
    assert set(first) == set(other) or len(other) > 100
    assert not {hashlib.sha256(v).digest() for k, v in first.items() if "images/" in k} \
        & {hashlib.sha256(v).digest() for k, v in other.items() if "images/" in k}


def test_refuses_to_overwrite_and_leaves_no_half_world(drawn):
    before = files(drawn)
    with pytest.raises(SystemExit, match="--overwrite"):
        toy_command([str(drawn), "--scale", "0.01"])
    assert files(drawn) == before
    assert not drawn.with_name("world.tmp").exists()


def test_no_picture_twice(drawn):
    pictures = [v for k, v in files(drawn).items() if k.endswith(".png") and "masks" not in k
                and "annotations" not in k]
    for name in toy.BENCH:
        pictures += [r["png"] for r in table(drawn / f"bench/{name}.tsv") if not r["reused"]]
    assert len(pictures) > 400
    assert len({hashlib.sha256(p).digest() for p in pictures}) == len(pictures)
    assert all(Image.open(io.BytesIO(p)).size == (toy.SIZE, toy.SIZE) for p in pictures)


def test_records_parse_and_name_pictures(drawn):
    counts = json.loads((drawn / "world.json").read_text())["counts"]
    captions = json.loads((drawn / "captions.json").read_text())
    assert len(captions) == counts["captions"]
    for record in captions + lines(drawn / "instruct.jsonl") + lines(drawn / "repair.jsonl"):
        talk = record["conversations"]
        assert [t["from"] for t in talk] == ["human", "gpt"] * (len(talk) // 2)
        assert all(t["value"].strip() for t in talk)
        assert talk[0]["value"].startswith("<image>\n") == ("image" in record)
        assert not any("<image>" in t["value"] for t in talk[1:])
        assert "image" not in record or (drawn / "images" / record["image"]).is_file()
    for name in ("instruct", "repair"):
        blind = sum("image" not in r for r in lines(drawn / f"{name}.jsonl"))
        assert blind == max(1, round(0.03 * counts[name]))
    for record in lines(drawn / "align/pairs.jsonl"):
        assert record["caption"] and (drawn / "align/images" / record["image"]).is_file()


def pair_records(drawn):
    meta = json.loads((drawn / "preferences/meta.json").read_text())
    tagged = set()
    for one in meta.values():
        records = lines(drawn / "preferences" / one["annotation"])
        assert one["length"] == len(records) > 0 and one["root"] == "images"
        tagged |= {r["question"].startswith("<image>\n") for r in records}
        yield from records
    assert tagged == {True, False}          # both occur in the real sets
    yield from lines(drawn / "preferences/heldout.jsonl")


def test_rejected_differs_in_one_word(drawn):
    for r in pair_records(drawn):
        good, bad = r["chosen"].rstrip(".").split(), r["rejected"].rstrip(".").split()
        # "left of the" / "right of the" and "above the" / "below the": one word each
        assert len(good) == len(bad), r
        assert sum(a != b for a, b in zip(good, bad)) == 1, r


def test_masks_show_what_is_asked_about(drawn):
    for r in pair_records(drawn):
        mask = np.asarray(Image.open(drawn / "preferences/masks" / r["image"]))
        picture = Image.open(drawn / "preferences/images" / r["image"])
        assert mask.shape == picture.size[::-1] and set(np.unique(mask)) == {0, 255}
        assert 4 < (mask > 0).sum() < mask.size / 2


def test_a_colour_mask_has_the_chosen_colour(drawn):
    """The mask, the picture and the chosen answer agree: the mean colour is nearest to it."""
    records = [r for r in lines(drawn / "preferences/annotations/colour.jsonl")]
    for r in records:
        mask = np.asarray(Image.open(drawn / "preferences/masks" / r["image"])) > 0
        mean = np.asarray(Image.open(drawn / "preferences/images" / r["image"]))[mask].mean(0)
        word = r["chosen"].rstrip(".").split()[-1]
        far = {c: np.abs(mean - np.array(rgb)).max() for c, rgb in toy.COLOURS.items()}
        assert min(far, key=far.get) == word, (r, far)


def test_held_out_wordings_stay_out_of_training(drawn):
    """Slots are replaced by a pattern; a training question must match no held-out wording."""
    held = {re.compile(re.escape(w[-1]).replace(r"\{x\}", ".+").replace(r"\{y\}", ".+")
                       .replace(r"\{pair\}", ".+")): kind for kind, w in toy.WORDINGS.items()}
    asked = {t["value"].removeprefix("<image>\n").split("\n")[0].removesuffix(toy.IN_WORDS)
             for name in ("instruct", "repair") for r in lines(drawn / f"{name}.jsonl")
             for t in r["conversations"] if t["from"] == "human"}
    for kind in toy.PAIRS:
        asked |= {r["question"].removeprefix("<image>\n").removesuffix(toy.IN_WORDS)
                  for r in lines(drawn / f"preferences/annotations/{kind}.jsonl")}
    assert len(asked) > 200
    assert not [(q, k) for q in asked for p, k in held.items() if p.fullmatch(q)]
    unseen = [r for name in toy.BENCH for r in table(drawn / f"bench/{name}.tsv")
              if r["split"] == "unseen wording"]
    assert unseen and all(any(p.fullmatch(r["question"]) for p in held) for r in unseen)


def test_benchmarks_read_as_tables(larger):
    for name in toy.BENCH:
        rows = table(larger / f"bench/{name}.tsv")
        assert len(rows) >= 600 and len({r["index"] for r in rows}) == len(rows)
        assert any(r["reused"] for r in rows)
        for r in rows:
            assert Image.open(io.BytesIO(r["png"])).size == (toy.SIZE, toy.SIZE)


def test_no_answer_is_much_more_frequent_than_the_others(larger):
    for name, kinds in toy.BENCH.items():
        answers = defaultdict(Counter)
        for r in table(larger / f"bench/{name}.tsv"):
            kind = "relation" if " or " in r["category"] else r["category"]
            answers[kind][r["answer"]] += 1
        assert set(answers) == set(kinds)
        best = sum(max(c.values()) for c in answers.values())
        assert best / sum(sum(c.values()) for c in answers.values()) <= 0.45, name
        if name != "ToyKnowledge":          # its answers are facts: 4 sides are frequent
            for kind, c in answers.items():
                bound = 1 / len(kinds[kind]) if kinds[kind] else 0.2
                assert max(c.values()) / sum(c.values()) <= bound + 0.03, (kind, c)


def test_facts_asked_are_facts_taught(larger):
    texts = {(way.format(**f.slots), f.answer) for f in toy_scenes.FACTS
             for way in toy.WORDINGS[f.kind]}
    for r in table(larger / "bench/ToyKnowledge.tsv"):
        assert (r["question"], r["answer"]) in texts


def test_probe_folders(drawn):
    world = json.loads((drawn / "world.json").read_text())
    for split in ("train", "val"):
        assert sorted(p.name for p in (drawn / "imagenet" / split).iterdir()) \
            == sorted(world["imagenet_classes"])
    for split in ("training", "validation"):
        images = sorted((drawn / "ade20k/images" / split).iterdir())
        masks = sorted((drawn / "ade20k/annotations" / split).iterdir())
        assert [p.stem for p in images] == [p.stem for p in masks]
        seen = np.unique([np.asarray(Image.open(p)) for p in masks])
        assert seen.max() < len(world["ade20k_classes"]) and len(seen) > 1


def test_pretrain_makes_folders_transformers_opens(tmp_path):
    from transformers import AutoModelForCausalLM
    toy_command(["pretrain", "--steps", "3", "--out", str(tmp_path)])
    check_models(tmp_path)
    tokenizer = check_tokenizer(tmp_path / "toy-lm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "toy-lm")
    assert llm.config.vocab_size >= len(tokenizer) + 8
    assert not list(tmp_path.glob("*.tmp"))


def check_models(folder):
    from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM
    for name, opener in (("toy-vit", AutoModel), ("toy-lm", AutoModelForCausalLM)):
        model, info = opener.from_pretrained(folder / name, output_loading_info=True)
        assert not any(info.values()), info
        assert 0.8e6 < model.num_parameters() < 1.2e6
    assert AutoImageProcessor.from_pretrained(folder / "toy-vit").size["height"] == toy.SIZE


def check_tokenizer(folder):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) \
        == ("<|im_end|>", "<|endoftext|>", None)
    assert [tokenizer.decode([i]) for i in tokenizer("478").input_ids] == ["4", "7", "8"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi?\nA. 12"}],
                                         tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    "<|im_start|>user\nHi?\nA. 12<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    return tokenizer


def test_committed_weights():
    folder = ROOT / "weights"
    check_models(folder)
    check_tokenizer(folder / "toy-lm")
    size = sum(p.stat().st_size for name in ("toy-vit", "toy-lm")
               for p in (folder / name).iterdir())
    assert size <= 6e6
