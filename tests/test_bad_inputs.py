"""What people really type and really have on disk: every mistake ends in one clear line.

A row spoils a copy of a small world or run folder, runs one command, and names the words the line
must hold. For every row: a non-zero exit code; one line `error: …` (or argparse's own), the last
thing said; no traceback; every file that was there is there, bit by bit; nothing under a name that
says "finished".
"""
import base64
import hashlib
import io
import json
import os
import re
import shutil
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import conftest
import in_fork
from pivot import tensors

FINISHED = {"final", "encoder", "results.json", "ref_logps.safetensors"}
TINY = "--llm toy-lm --data DATA --global-batch 8 --micro-batch 8 --workers 0"
BASE = {    # the command of each stage; a row's own flags come after and win
    "pretrain": f"pretrain.py --run-dir RUN --encoder toy-vit {TINY} --projector-max-steps 1 "
                f"--max-steps 2 --save-every 2",
    "sft": f"train_sft.py --run-dir RUN {TINY} --max-steps 2 --save-every 1",
    "dpo": f"train_dpo.py --run-dir RUN {TINY} --max-steps 2 --save-every 1",
    "repair": f"repair_eval.py --run-dir RUN --encoder toy-vit {TINY} --projector-max-steps 1 "
              f"--max-steps 2 --save-every 2 --limit 4",
    "score": "repair_eval.py --mllm RUN/pretrain/final --llm toy-lm --data DATA --limit 4 "
             "--workers 0",
    "compare": "repair_eval.py --compare RUN/pretrain",
    "extract": "extract.py --run-dir RUN",
    "toy": "-m toy"}


# ---------------------------------------------------------------------------------- how to spoil

def put(path, content):
    """Write a file anew: what lies there may be a hard link to another test's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())


def cut(path):
    """As a full disk or a broken download leaves it."""
    put(path, path.read_bytes()[:path.stat().st_size // 2])


def change(path, where, value):
    """Set one entry of a JSON file: change(config, "arguments.seed", 7)."""
    item = whole = json.loads(path.read_text())
    *outer, last = where.split(".")
    for key in outer:
        item = item[int(key) if isinstance(item, list) else key]
    item[int(last) if isinstance(item, list) else last] = value
    put(path, whole)


def record(path, number, **fields):
    """Change fields of one line of a .jsonl (from 1)."""
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **fields})
    put(path, "\n".join(lines) + "\n")


def line(path, number, content):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = content
    put(path, b"\n".join(lines))


def spoil_tensors(path, spoil):
    """Change a dict of tensors in place and write it as the file was written."""
    stored = load_file(path)
    spoil(stored)
    path.unlink()
    save_file(stored, path, {"format": "pt"})


def lose(folder, name):
    """Take one tensor, by the end of its name, out of a model folder."""
    spoil_tensors(folder / "model.safetensors",
            lambda t: t.pop(next(k for k in t if k.endswith(name))))


def instead(path, make_folder=False):
    """A file where a folder should be, or a folder where a file should be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.mkdir(parents=True) if make_folder else put(path, "")


def model_folder(b, name, spoil=lambda folder: None):
    """A copy of a committed model folder, spoiled: BOX/eye or BOX/head."""
    folder = b / {"toy-vit": "eye", "toy-lm": "head"}[name]
    shutil.copytree(conftest.ROOT / "weights" / name, folder)
    spoil(folder)


def bomb(path):
    """A PNG of a few bytes that says it holds 100,000 × 100,000 pixels."""
    def chunk(kind, data):
        length, check = (struct.pack(">I", n) for n in (len(data), zlib.crc32(kind + data)))
        return length + kind + data + check
    size = struct.pack(">IIBBBBB", 10 ** 5, 10 ** 5, 8, 2, 0, 0, 0)
    put(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) +
        chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))


def tsv(b, text, name="ToyVision"):
    """The one benchmark of the world. PNG in the text stands for a picture."""
    shutil.rmtree(b / "toy/bench")
    picture = base64.b64encode((next((b / "toy/images/captions").glob("*.png"))).read_bytes())
    put(b / f"toy/bench/{name}.tsv", text.replace("PNG", picture.decode()) if isinstance(text, str)
        else text)


HEAD = "index\timage\tquestion\tanswer\n"
META, COLOUR = "toy/preferences/meta.json", "toy/preferences/annotations/colour.jsonl"
HELD, FINAL = "toy/preferences/heldout.jsonl", "run/pretrain/final"


def every_image(b, spoil, folder="preferences"):
    for path in (b / "toy" / folder / "images").rglob("*.png"):
        spoil(path)


def grey(values):
    """A picture of one band, as a TIFF."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


def nan_weights(b):
    spoil_tensors(b / FINAL / "model.safetensors",
            lambda t: t["multi_modal_projector.linear_1.weight"].fill_(float("nan")))


def shard(b, stage):
    return next((b / f"run/{stage}/checkpoints").glob("step-*/*.distcp"))


def position(b, stage, name="position.json"):
    return next((b / f"run/{stage}/checkpoints").glob(f"step-*/{name}"))


def dpo_is(b, stage):
    """The stage-1 model under dpo/, as if DPO had written it."""
    shutil.copytree(b / "run/pretrain", b / "run/dpo")
    config = json.loads((b / "run/dpo/config.json").read_text())
    put(b / "run/dpo/config.json", {**config, "parent_digest": tensors.digest_of(b / FINAL)})


class Row(NamedTuple):
    stage: str
    name: str
    flags: str                       # after the stage's own; RUN, DATA, BOX stand for folders
    words: list                      # what the one line must hold
    spoil: object = lambda b: None   # b: the box, a folder that holds run/ and toy/
    begun: str = ""                  # a stage of which the box holds an interrupted run


ROWS = [Row(*row) for row in [
    # -------------------------------------------------------------------------------- pretrain.py
    ("pretrain", "data folder is not there", "--data BOX/nowhere",
     ["nowhere/captions.jsonl does not exist"]),
    ("pretrain", "captions cut short", "", ["DATA/captions.json:", "not JSON"],
     lambda b: cut(b / "toy/captions.json")),
    ("pretrain", "captions are one object", "", ["DATA/captions.json: a JSON list"],
     lambda b: put(b / "toy/captions.json", {"image": "a.png"})),
    ("pretrain", "captions empty list", "", ["no usable record in DATA/captions.json"],
     lambda b: put(b / "toy/captions.json", [])),
    ("pretrain", "captions a folder", "--captions DATA/images", ["DATA/images", "folder"]),
    ("pretrain", "captions not UTF-8", "", ["DATA/captions.json:1: not JSON", "utf-8"],
     lambda b: put(b / "toy/captions.json", b"[\xff\xfe\x00]")),
    ("pretrain", "caption without an image", "", ["DATA/captions.json:item 3: a caption without"],
     lambda b: change(b / "toy/captions.json", "2.image", None)),
    ("pretrain", "half a surrogate in a text", "",
     ["DATA/instruct.jsonl:4: not JSON", "surrogates"],
     lambda b: record(b / "toy/instruct.jsonl", 4, conversations=[
         {"from": "human", "value": "What?"}, {"from": "gpt", "value": "\ud83d"}])),
    ("pretrain", "zero byte in an image name", "", ["DATA/instruct.jsonl:5: ", "image"],
     lambda b: record(b / "toy/instruct.jsonl", 5, image="a\0.png")),
    ("pretrain", "newline in an image name", "", ["DATA/captions.json:item 2: ", "not found"],
     lambda b: change(b / "toy/captions.json", "1.image", "a\nb.png")),
    ("pretrain", "a line of 17 MB", "", ["DATA/instruct.jsonl: a line of over 16 MB at byte"],
     lambda b: put(b / "toy/instruct.jsonl", b'{"x": "' + b"x" * (17 << 20) + b'"}\n')),
    ("pretrain", "answers come first", "", ["DATA/instruct.jsonl:1: turn 1 is not from 'human'"],
     lambda b: record(b / "toy/instruct.jsonl", 1, conversations=[
         {"from": "gpt", "value": "red"}, {"from": "human", "value": "What?"}])),
    ("pretrain", "image is zero bytes", "", ["captions.json:item ", "cannot be read"],
     lambda b: [put(p, b"") for p in (b / "toy/images/captions").glob("*.png")]),
    ("pretrain", "decompression bomb", "", ["captions.json:item ", "100000 × 100000 pixels"],
     lambda b: [bomb(p) for p in (b / "toy/images/captions").glob("*.png")]),
    ("pretrain", "image is a folder", "", ["captions.json:item 1: image captions/000001.png"],
     lambda b: instead(b / "toy/images/captions/000001.png", True)),
    ("pretrain", "12 bits in images of 16", "", ["captions.json:item ", "would be nearly black: its "
     "largest value is 4095, and white may be 65535; save it with 8 bits"], lambda b: every_image(
         b, lambda p: put(p, grey(np.arange(4096, dtype=np.uint16).reshape(64, 64))), "")),
    ("pretrain", "fractions up to 4095", "", ["captions.json:item ", "holds values from 0 to 4095"],
     lambda b: every_image(b, lambda p: put(
         p, grey(np.arange(4096, dtype=np.float32).reshape(64, 64))), "")),
    ("pretrain", "image under another key", "",
     ["DATA/instruct.jsonl:2: 'image_path' names a picture, and only 'image' and 'images' are read"],
     lambda b: record(b / "toy/instruct.jsonl", 2, image=None, image_path="a.png", conversations=[
         {"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}])),
    ("pretrain", "image and images disagree", "",
     ["DATA/instruct.jsonl:1: 'image' and 'images' name different pictures"],
     lambda b: record(b / "toy/instruct.jsonl", 1, images=["b.png"])),
    ("pretrain", "images are links that lead out", "", ["DATA/captions.json:item 1: image captions/"
     "000001.png leaves its folder", "by a link; --follow-links allows it"], lambda b: [
         (b / "toy/images/captions").rename(b / "elsewhere"),
         (b / "toy/images/captions").symlink_to(b / "elsewhere")]),
    ("pretrain", "an absolute image name, with --follow-links", "--follow-links",
     ["DATA/captions.json:item 2: image /etc/hostname leaves its folder"],
     lambda b: change(b / "toy/captions.json", "1.image", "/etc/hostname")),
    ("pretrain", "turns are JSON inside a string", "",
     ["DATA/instruct.jsonl:3: 'conversations' is a string, a list of turns is expected; is it JSON"],
     lambda b: record(b / "toy/instruct.jsonl", 3, conversations=json.dumps([
         {"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]))),
    ("pretrain", "an answer is a fraction", "", ["DATA/instruct.jsonl:4, turn 2: 'value' is the "
     "number 7.0; write it in quotes"], lambda b: record(b / "toy/instruct.jsonl", 4, conversations=[
         {"from": "human", "value": "What?"}, {"from": "gpt", "value": 7.0}])),
    ("pretrain", "two encoders at once", "--encoder toy-vit+toy-vit",
     ["--encoder toy-vit+toy-vit: two encoders are judged together, by repair_eval.py"]),
    ("pretrain", "lr NaN", "--lr nan", ["--lr: nan must be at least 0"]),
    ("pretrain", "lr below 0", "--encoder-lr=-1e-5", ["--encoder-lr: -1e-5 must be at least"]),
    ("pretrain", "warmup 2", "--warmup 2", ["--warmup: 2 must be from 0 to 1"]),
    ("pretrain", "seed -1", "--seed -1", ["--seed"]),
    ("pretrain", "workers -1", "--workers -1", ["--workers"]),
    ("pretrain", "no projector epochs", "--projector-epochs 0", ["--projector-epochs"]),
    ("pretrain", "run folder below a file", "--run-dir DATA/captions.json/run",
     ["cannot write DATA/captions.json/run/pretrain"]),
    ("pretrain", "encoder weights cut short", "--encoder BOX/eye", ["BOX/eye", "--encoder"],
     lambda b: model_folder(b, "toy-vit", lambda f: cut(f / "model.safetensors"))),
    ("pretrain", "encoder of other shapes", "--encoder BOX/eye", 
     ["--encoder BOX/eye has, of another shape than expected, tensor"],
     lambda b: model_folder(b, "toy-vit", lambda f: change(f / "config.json", "hidden_size", 64))),
    ("pretrain", "encoder without config", "--encoder BOX/eye", ["BOX/eye", "config.json"],
     lambda b: model_folder(b, "toy-vit", lambda f: (f / "config.json").unlink())),
    ("pretrain", "encoder lacks a tensor", "--encoder BOX/eye",
     ["--encoder BOX/eye lacks tensor", "patch_embedding"],
     lambda b: model_folder(b, "toy-vit", lambda f: lose(f, "patch_embedding.bias"))),
    ("pretrain", "encoder's pixel statistics cut short", "--encoder BOX/eye",
     ["BOX/eye/preprocessor_config.json", "not JSON"],
     lambda b: model_folder(b, "toy-vit", lambda f: cut(f / "preprocessor_config.json"))),
    ("pretrain", "LLM without tokenizer", "--llm BOX/head", ["tokenizer", "BOX/head"],
     lambda b: model_folder(b, "toy-lm", lambda f: (f / "tokenizer.json").unlink())),
    ("pretrain", "LLM that knows no ChatML", "--llm BOX/head", ["BOX/head", "<|im_start|>"],
     lambda b: model_folder(b, "toy-lm", lambda f: [
         put(p, p.read_text().replace("im_start", "im_go")) for p in f.glob("tokenizer*.json")])),
    ("pretrain", "LLM lacks a tensor", "--llm BOX/head", ["--llm BOX/head lacks tensor"],
     lambda b: model_folder(b, "toy-lm", lambda f: lose(f, "model.norm.weight"))),
    ("pretrain", "LLM weights cut short", "--llm BOX/head", ["--llm BOX/head"],
     lambda b: model_folder(b, "toy-lm", lambda f: cut(f / "model.safetensors"))),
    ("pretrain", "goes on with another rate", "--lr 0.5",
     ["RUN/pretrain was begun with --lr 0.001, now 0.5"], lambda b: None, "pretrain"),
    ("pretrain", "goes on with a config cut short", "", ["RUN/pretrain/config.json", "not JSON"],
     lambda b: cut(b / "run/pretrain/config.json"), "pretrain"),
    ("pretrain", "checkpoint lost a shard", "", ["RUN/pretrain/checkpoints/step-2"],
     lambda b: shard(b, "pretrain").unlink(), "pretrain"),

    # ------------------------------------------------------------------------------- train_sft.py
    ("sft", "stage 1 has no config", "", ["RUN/pretrain/config.json", "pretrain.py"],
     lambda b: (b / "run/pretrain/config.json").unlink()),
    ("sft", "stage 1's config holds no arguments", "", ["RUN/pretrain/config.json", "arguments"],
     lambda b: put(b / "run/pretrain/config.json", {"stage": "pretrain"})),
    ("sft", "parent's weights cut short", "", ["RUN/pretrain/final/model.safetensors"],
     lambda b: cut(b / FINAL / "model.safetensors")),
    ("sft", "parent lacks a tensor", "",
     ["RUN/pretrain/final lacks tensor multi_modal_projector.linear_2.bias (1 in all)"],
     lambda b: lose(b / FINAL, "multi_modal_projector.linear_2.bias")),
    ("sft", "parent's tensor has another shape", "",
     ["RUN/pretrain/final", "multi_modal_projector.linear_2.bias"],
     lambda b: spoil_tensors(b / FINAL / "model.safetensors",
                       lambda t: t.update({"multi_modal_projector.linear_2.bias": torch.ones(3)}))),
    ("sft", "a second model beside the parent", "", ["RUN/pretrain/final has an unknown tensor x"],
     lambda b: save_file({"x": torch.ones(2)}, b / FINAL / "model-2.safetensors")),
    ("sft", "parent is a language model", "", ["RUN/pretrain/final is a qwen2"],
     lambda b: put(b / FINAL / "config.json", {"model_type": "qwen2"})),
    ("sft", "parent's config cut short", "", ["RUN/pretrain/final/config.json", "not JSON"],
     lambda b: cut(b / FINAL / "config.json")),
    ("sft", "parent's tokenizer lost", "", ["tokenizer in RUN/pretrain/final"],
     lambda b: [p.unlink() for p in (b / FINAL).glob("tokenizer*")]),
    ("sft", "parent's processor lost", "", ["RUN/pretrain/final: neither processor_config.json nor"],
     lambda b: [p.unlink() for p in (b / FINAL).glob("*processor_config.json")]),
    ("sft", "parent's weights are NaN", "", ["step 0: loss nan", ".jsonl:"], nan_weights),
    ("sft", "no set in meta.json", "", ["DATA/preferences/meta.json", "no set in it"],
     lambda b: put(b / META, {})),
    ("sft", "meta.json without annotation", "", ["DATA/preferences/meta.json", "annotation"],
     lambda b: change(b / META, "toy_shape", {"root": "images"})),
    ("sft", "annotation file lost", "", ["annotations/colour.jsonl does not exist"],
     lambda b: (b / COLOUR).unlink()),
    ("sft", "preferences a folder", "--preferences DATA/preferences",
     ["DATA/preferences", "folder", "meta.json"]),
    ("sft", "annotations in UTF-16", "", ["annotations/colour.jsonl:", ": not JSON"],
     lambda b: put(b / COLOUR, (b / COLOUR).read_text().encode("utf-16"))),
    ("sft", "every image name is wrong", "--images BOX --skip-bad --preferences "
     "DATA/preferences/heldout.jsonl", ["no usable record in", "'bad'"]),
    ("sft", "epochs 1.5", "--epochs 1.5", ["--epochs: invalid int value: '1.5'"]),
    ("sft", "no samples", "--num-samples 0", ["--num-samples: 0 must be at least 1"]),
    ("sft", "a flag that is none", "--learning-rate 1", ["unrecognized", "--learning-rate"]),
    ("sft", "nothing is trained", "--lr 0", ["every learning rate is 0"]),
    ("sft", "three copies of one process", "--replicas 3", ["1 process", "--replicas 3"]),
    *([] if torch.cuda.is_available() else [
        ("dpo", "flex without CUDA", "--attention flex", ["--attention flex needs CUDA"])]),
    ("sft", "stage folder is a file", "", ["cannot write RUN/sft"],
     lambda b: put(b / "run/sft", "")),
    ("sft", "goes on with other data", "", ["RUN/sft was begun with data_digest"],
     lambda b: [record(b / COLOUR, n, question="What now?") for n in range(1, 17)], "sft"),
    ("sft", "goes on from another parent", "", ["RUN/sft was begun with parent_digest"],
     lambda b: spoil_tensors(b / FINAL / "model.safetensors", lambda t: t[
         "multi_modal_projector.linear_2.bias"].add_(1)), "sft"),
    ("sft", "checkpoint's position cut short", "", ["RUN/sft/checkpoints/step-1/position.json"],
     lambda b: cut(position(b, "sft")), "sft"),
    ("sft", "checkpoint's index lost", "", ["RUN/sft/checkpoints/step-1"],
     lambda b: position(b, "sft", ".metadata").unlink(), "sft"),

    # ------------------------------------------------------------------------------- train_dpo.py
    ("dpo", "beta 0", "--beta 0", ["--beta: 0 must be at least 1e-12"]),
    ("dpo", "beta below 0", "--beta -0.1", ["--beta: -0.1 must be at least"]),
    ("dpo", "lr infinite", "--lr 1e999", ["--lr: 1e999 must be at least"]),
    ("dpo", "a dtype that is none", "--dtype fp8", ["--dtype", "'fp8'"]),
    ("dpo", "a reference that is none", "--reference frozen", ["--reference", "'frozen'"]),
    ("dpo", "held-out file lost", "--heldout BOX/no.jsonl", ["BOX/no.jsonl does not exist"]),
    ("dpo", "held-out file empty", "", ["no usable record in DATA/preferences/heldout.jsonl"],
     lambda b: put(b / HELD, "")),
    ("dpo", "held-out pair without a choice", "",
     ["DATA/preferences/heldout.jsonl:2: chosen and rejected are the same"],
     lambda b: record(b / HELD, 2, chosen="red", rejected="red")),
    ("dpo", "images cut short", "", [".jsonl:", "cannot be read"],
     lambda b: every_image(b, cut)),
    ("dpo", "images cut short, met by a worker", "--workers 1", [".jsonl:", "cannot be read"],
     lambda b: every_image(b, cut)),
    ("dpo", "parent's weights are NaN", "", ["RUN/pretrain/final", "finite"], nan_weights),
    ("dpo", "another language model", "--llm qwen2.5-0.5b", ["was made with --llm toy-lm"]),
    ("dpo", "larger batch than there are pairs", "--global-batch 4096",
     ["fewer than one --global-batch of 4096"]),
    ("dpo", "--overwrite and a mistyped file", "--overwrite --preferences BOX/no.jsonl",
     ["BOX/no.jsonl does not exist"], lambda b: None, "dpo"),
    ("dpo", "finished with another beta", "--beta 0.3", ["was begun with --beta 0.5, now 0.3"],
     lambda b: [shutil.rmtree(b / "run/dpo/checkpoints"),
                shutil.copytree(b / FINAL, b / "run/dpo/final")], "dpo"),
    ("sft", "finished before stage 1 was made anew", "", ["RUN/sft was begun with parent_digest"],
     lambda b: [shutil.copytree(b / FINAL, b / "run/sft/final"), spoil_tensors(
         b / FINAL / "model.safetensors", lambda t: t[
             "multi_modal_projector.linear_2.bias"].add_(1))], "sft"),
    ("dpo", "goes on with another beta", "--beta 0.3", ["was begun with --beta 0.5, now 0.3"],
     lambda b: None, "dpo"),
    ("dpo", "reference cut short", "", ["RUN/dpo/ref_logps.safetensors", "delete it"],
     lambda b: cut(b / "run/dpo/ref_logps.safetensors"), "dpo"),
    ("dpo", "reference of unknown origin", "", ["RUN/dpo/ref_logps.safetensors", "delete it"],
     lambda b: [(b / "run/dpo/ref_logps.safetensors").unlink(),
                save_file({"pairs": torch.ones(40, 2)}, b / "run/dpo/ref_logps.safetensors")],
     "dpo"),
    ("dpo", "checkpoint's shard cut short", "", ["RUN/dpo/checkpoints/step-1"],
     lambda b: cut(shard(b, "dpo")), "dpo"),

    # ----------------------------------------------------------------- repair_eval.py, the training
    ("repair", "no data to re-pair with", "", ["DATA/repair.jsonl does not exist"],
     lambda b: (b / "toy/repair.jsonl").unlink()),
    ("repair", "encoder is a whole model", "--encoder RUN/pretrain/final",
     ["RUN/pretrain/final", "extract.py"]),
    ("repair", "a rate for the frozen encoder", "--encoder-lr 1e-5", ["the encoder is frozen"]),
    ("repair", "preset mistyped", "--encoder toy-vti", ["toy-vti is neither a preset"]),
    ("repair", "no tokens to answer with", "--max-new-tokens 0", ["--max-new-tokens"]),
    ("repair", "questions in batches of 0", "--eval-batch 0", ["--eval-batch"]),
    ("repair", "benchmarks are not there", "--bench BOX/nowhere",
     ["no known benchmark TSV in BOX/nowhere"]),
    ("repair", "conversation has no answer", "", ["DATA/repair.jsonl:1: 'conversations' must alt"],
     lambda b: record(b / "toy/repair.jsonl", 1, conversations=[
         {"from": "human", "value": "What?"}])),
    ("repair", "goes on with another encoder", "--encoder BOX/eye --run-dir RUN",
     ["was begun with --encoder"], lambda b: [
         model_folder(b, "toy-vit"), shutil.move(b / "run/repair/toy-vit", b / "run/repair/eye")],
     "repair"),
    ("repair", "re-paired with another seed", "--seed 3", ["was begun with --seed"],
     lambda b: [shutil.rmtree(b / "run/repair/toy-vit/checkpoints"), shutil.copytree(
         b / FINAL, b / "run/repair/toy-vit/final")], "repair"),
    ("repair", "re-paired, config lost its end", "", ["RUN/repair/toy-vit/config.json", "not JSON"],
     lambda b: [shutil.copytree(b / FINAL, b / "run/repair/toy-vit/final"),
                cut(b / "run/repair/toy-vit/config.json")], "repair"),
    ("repair", "three encoders", "--encoder toy-vit+toy-vit+toy-vit", ["one encoder or two, A+B"]),
    ("repair", "the second encoder mistyped", "--encoder toy-vit+toy-vti",
     ["toy-vti is neither a preset"]),
    ("repair", "projector of an encoder that was not extracted", "--reuse-projector-layers 1",
     ["--reuse-projector-layers 1: no model at", "extract.py"]),
    ("repair", "projector that was not kept", "--encoder BOX/dpo/encoder --run-dir BOX/new "
     "--reuse-projector-layers 2", ["no model at BOX/dpo/final", "extract.py"],
     lambda b: [model_folder(b, "toy-vit"), (b / "dpo").mkdir(),
                (b / "eye").rename(b / "dpo/encoder")]),
    ("repair", "projector of another encoder", "--encoder RUN/dpo/encoder "
     "--reuse-projector-layers 1", ["RUN/dpo/final holds another encoder than RUN/dpo/encoder"],
     lambda b: [dpo_is(b, "pretrain"), model_folder(b, "toy-vit"),
                (b / "eye").rename(b / "run/dpo/encoder")]),
    ("repair", "three projector layers", "--reuse-projector-layers 3", ["invalid choice: 3"]),
    ("repair", "a benchmark that cannot be scored, before hours of training", "",
     ["AI2D_TEST.tsv:2: answer 'C' is not one of the options A, B"], lambda b: tsv(
         b, "index\timage\tquestion\tA\tB\tanswer\n1\tPNG\tWhat?\tx\ty\tC\n", "AI2D_TEST")),
    ("repair", "checkpoint's index cut short", "", ["RUN/repair/toy-vit/checkpoints/step-2"],
     lambda b: cut(position(b, "repair/toy-vit", ".metadata")), "repair"),

    # ------------------------------------------------------------------ repair_eval.py, the scoring
    ("score", "TSV is empty", "", ["DATA/bench/ToyVision.tsv"], lambda b: tsv(b, "")),
    ("score", "TSV has no rows", "", ["DATA/bench/ToyVision.tsv"], lambda b: tsv(b, HEAD)),
    ("score", "TSV lacks a column", "", ["DATA/bench/ToyVision.tsv", "no 'answer'"],
     lambda b: tsv(b, "index\timage\tquestion\n1\tPNG\tWhat?\n")),
    ("score", "image is not base64", "", ["DATA/bench/ToyVision.tsv:3: 'image' is not base64"],
     lambda b: tsv(b, HEAD + "1\tPNG\tWhat?\tred\n2\t" + "?" * 99 + "\tWhat?\tred\n")),
    ("score", "image is no picture", "", ["ToyVision.tsv:2: embedded image cannot be read"],
     lambda b: tsv(b, HEAD + "1\t" + "QUJD" * 40 + "\tWhat?\tred\n")),
    ("score", "two rows of one index", "", ["DATA/bench/ToyVision.tsv:3: ", "index"],
     lambda b: tsv(b, HEAD + "1\tPNG\tWhat?\tred\n1\tPNG\tAnd this?\tblue\n")),
    ("score", "TSV in another encoding", "", ["DATA/bench/ToyVision.tsv", "UTF-8"],
     lambda b: tsv(b, (HEAD + "1\t" + "QUJD" * 40 + "\tQu\u00e9?\tred\n").encode("latin-1"))),
    ("score", "no benchmark of a known name", "", ["no known benchmark TSV in DATA/bench"],
     lambda b: tsv(b, HEAD, "MMBench")),
    ("score", "question holds the placeholder", "", ["DATA/bench/ToyVision.tsv:2: the question"],
     lambda b: tsv(b, HEAD + "1\tPNG\tWhat is <image>?\tred\n")),
    ("score", "--wrong-image of one picture", "--wrong-image", ["DATA/bench/ToyVision.tsv"],
     lambda b: tsv(b, HEAD + "1\tPNG\tWhat?\tred\n2\t1\tAnd this?\tblue\n")),
    ("score", "a broken line among the answers", "", ["RUN/pretrain/bench/ToyVision.0.jsonl:1: "],
     lambda b: [tsv(b, HEAD + "1\tPNG\tWhat?\tred\n"), put(
         b / "run/pretrain/bench/ToyVision.0.jsonl", '{"index": "1", "predic}\n')]),
    ("score", "temperature below 0", "--temperature -1", ["--temperature: -1 must be at least"]),
    ("score", "temperature NaN", "--temperature nan", ["--temperature: nan must be at least"]),
    ("score", "answers drawn with another seed", "--temperature 1",
     ["RUN/pretrain/bench-drawn holds the answers of another model or setting (drawn: temperature "
      "1, seed 3, now temperature 1, seed 1)"], lambda b: put(
         b / "run/pretrain/bench-drawn/config.json", {"drawn": "temperature 1, seed 3"})),
    ("score", "answers of another model", "", ["RUN/pretrain/bench holds the answers of another"],
     lambda b: put(b / "run/pretrain/bench/config.json", {"model": "another"})),
    ("score", "nothing to score anew", "--rescore", ["RUN/pretrain/bench holds no answers"]),
    ("score", "questions that were not answered", "--rescore",
     ["holds no answer to 2 of 2 questions of ToyVision, first: index 1"], lambda b: [
         tsv(b, HEAD + "1\tPNG\tWhat?\tred\n2\t1\tAnd this?\tblue\n"),
         put(b / "run/pretrain/bench/config.json", {})]),
    ("score", "the file has changed since", "--rescore",
     ["RUN/pretrain/bench holds the answers of another", "ToyVision.tsv: 0-0, now"], lambda b: [
         tsv(b, HEAD + "1\tPNG\tWhat?\tred\n"), put(          # they do not say what was asked
             b / "run/pretrain/bench/ToyVision.0.jsonl", '{"index": "1", "prediction": "red"}\n'),
         put(b / "run/pretrain/bench/config.json", {"ToyVision.tsv": "0-0"})]),
    ("score", "no words of an OCR", "--ocr-tokens", ["TextVQA_VAL.tsv has no column ocr_tokens"],
     lambda b: tsv(b, HEAD + "1\tPNG\tWhat?\tred\n", "TextVQA_VAL")),
    ("score", "MME without perception", "", ["MME.tsv: none of its 1 questions counts"],
     lambda b: tsv(b, HEAD.strip() + "\tcategory\n1\tPNG\tWhat?\tYes\ttext\n", "MME")),
    ("score", "a quote left open", "", ["DATA/bench/ToyVision.tsv:"],
     lambda b: tsv(b, HEAD + '1\tPNG\t"What?\tred\n2\t1\tAnd this?\tblue\n')),
    ("score", "--show-wrong below 0", "--show-wrong -1", ["--show-wrong: -1 must be at least 0"]),
    ("score", "the model is a file", "--mllm RUN/pretrain/config.json",
     ["RUN/pretrain/config.json is not a trained model"]),
    ("compare", "results cut short", "", ["RUN/pretrain/bench/results.json", "not JSON"],
     lambda b: put(b / "run/pretrain/bench/results.json", '{"bench')),
    ("compare", "results without units", "RUN/other",
     ["RUN/pretrain/bench/units.json", "--rescore"], lambda b: [
         put(b / f"run/{n}/bench/results.json", {"benchmarks": {}, "groups": {}, "average": 0})
         for n in ("pretrain", "other")]),
    ("compare", "results of something else", "", ["RUN/pretrain/bench/results.json"],
     lambda b: put(b / "run/pretrain/bench/results.json", {"accuracy": 1})),

    # ---------------------------------------------------------------------------------- extract.py
    ("extract", "a stage that is none", "--stage local",
     ["no trained model at RUN/local/final", "trained there: pretrain"]),
    ("extract", "stage's config lost", "", ["RUN/dpo/config.json"], lambda b: [
        dpo_is(b, "dpo"), (b / "run/dpo/config.json").unlink()]),
    ("extract", "nothing moved", "", ["nothing moved", "RUN/dpo/final"],
     lambda b: dpo_is(b, "dpo")),
    ("extract", "stage 1 lost", "", ["RUN/pretrain/final"],
     lambda b: [dpo_is(b, "dpo"), shutil.rmtree(b / "run/pretrain")]),
    ("extract", "original of other blocks", "--stage pretrain", ["BOX/eye"], lambda b: [
        model_folder(b, "toy-vit", lambda f: change(f / "config.json", "num_hidden_layers", 3)),
        change(b / "run/pretrain/config.json", "arguments.encoder", str(b / "eye"))]),
    ("extract", "--out is the model itself", "--stage pretrain --out RUN/pretrain/final "
     "--overwrite", ["RUN/pretrain/final", "--out"]),
    ("extract", "--out is a published encoder", "--stage pretrain --out BOX/eye --overwrite",
     ["--out BOX/eye was not written by extract.py"], lambda b: model_folder(b, "toy-vit")),
    ("extract", "--out holds another model's", "--stage pretrain --out BOX/eye",
     ["BOX/eye holds the encoder of another model than RUN/pretrain/final", "--overwrite"],
     lambda b: put(b / "eye/config.json", {"pivot_source": "of another one"})),
    ("pretrain", "finished with another encoder at the same place", "",
     ["begun with encoder_digest"],
     lambda b: [shutil.rmtree(b / "run/pretrain/checkpoints"),
                shutil.copytree(b / "run/other/final", b / "run/pretrain/final"),
                change(b / "run/pretrain/config.json", "encoder_digest", "0")], "pretrain"),
    ("pretrain", "goes on with another encoder at the same place", "", ["begun with encoder_digest"],
     lambda b: change(b / "run/pretrain/config.json", "encoder_digest", "0"), "pretrain"),
    ("extract", "stage 1 was made anew", "", ["RUN/pretrain/final was trained anew"],
     lambda b: [dpo_is(b, "dpo"), change(b / "run/dpo/config.json", "parent_digest", "0")]),
    ("extract", "--out below a file", "--stage pretrain --out DATA/captions.json/eye",
     ["DATA/captions.json/eye"]),

    # -------------------------------------------------------------------------------------- python -m toy
    ("toy", "scale is a word", "BOX/new --scale tiny", ["--scale", "'tiny'"]),
    ("toy", "seed is a word", "BOX/new --seed one", ["--seed", "'one'"]),
    ("toy", "a model that is none", "pretrain --models toy-vot", ["--models", "'toy-vot'"]),
    ("toy", "world is there already", "DATA", ["DATA is already there; --overwrite replaces it"]),
    ("toy", "--overwrite of no world", "BOX/run --overwrite",
     ["BOX/run", "no world.json", "not replaced"]),
    ("toy", "no steps", "pretrain --steps -3 --out BOX/new", ["--steps", "-3 must be at least 1"]),
    ("toy", "scale 0", "BOX/new --scale 0", ["--scale"]),
    ("toy", "world below a file", "DATA/captions.json/toy --scale 0.02",
     ["DATA/captions.json/toy"]),
]]


# ----------------------------------------------------------------------------------------- the test

def link(source, target):
    """Files that no stage writes into are linked: a copy of a world in milliseconds."""
    linked = source.endswith((".png", ".safetensors", ".distcp"))
    os.link(source, target) if linked else shutil.copy2(source, target)


def contents(folder):
    """{path: digest} of every file below."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def expand(text, b):
    return text.replace("RUN", str(b / "run")).replace("DATA", str(b / "toy")) \
        .replace("BOX", str(b))


@pytest.fixture(scope="module")
def server():
    return in_fork.server()


@pytest.fixture(scope="module")
def origin(server, world, stage1, tmp_path_factory):
    """What every box is a copy of: toy/, run/pretrain, and begun/, where each stage was killed
    after its checkpoint. Afterwards it must be as it was."""
    b = tmp_path_factory.mktemp("origin")
    shutil.copytree(world, b / "toy", ignore=shutil.ignore_patterns(
        "imagenet", "ade20k", "align", "masks"))
    shutil.copytree(stage1, b / "run", ignore=lambda *_: ["sft", "dpo", "repair"])
    for stage in ("sft", "dpo", "repair", "pretrain"):
        where = b / "begun"
        if stage == "sft":
            shutil.copytree(b / "run", where)
        if stage == "pretrain":
            shutil.rmtree(where / "pretrain")
        command = expand(BASE[stage], b).replace(str(b / "run"), str(where)).split()
        done = in_fork.run(server, command, b, killed=True)
        assert done.returncode == 9, done.stderr
    before = contents(b)
    yield b
    assert contents(b) == before, "a row spoiled what it should have copied"


@pytest.fixture
def box(origin, tmp_path, request):
    """A world and a run folder of this row's own."""
    stage, begun = (getattr(request.node.callspec.params["row"], k) for k in ("stage", "begun"))
    shutil.copytree(origin / "toy", tmp_path / "toy", copy_function=link)
    earlier = "other" if stage == "pretrain" else "pretrain"      # or pretrain.py had nothing to do
    shutil.copytree(origin / "run/pretrain", tmp_path / "run" / earlier, copy_function=link)
    if begun:
        # as the same command would find it: config.json holds the paths it was made with
        shutil.copytree(origin / "begun" / begun, tmp_path / "run" / begun, copy_function=link)
        for config in (tmp_path / "run" / begun).rglob("config.json"):
            put(config, config.read_text().replace(str(origin / "begun"), str(tmp_path / "run"))
                .replace(str(origin), str(tmp_path)))
    yield tmp_path
    shutil.rmtree(tmp_path)


def refused(done, words, before, after):
    """One line, an exit code, and nothing that was there is lost."""
    said = [x for x in done.stderr.splitlines() if x.strip() and not re.search(r"/s[],]", x)]
    errors = [x for x in said if re.match(r"(\w+\.py( pretrain)?: )?error: ", x)]
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-2000:]
    assert done.returncode not in (0, None), f"accepted: {done.stdout[-500:]} {done.stderr[-500:]}"
    assert len(errors) == 1, done.stderr[-2000:]
    for word in words:
        assert word in errors[0], f"{word!r} is not in: {errors[0]}"
    assert {k: v for k, v in after.items() if k in before} == before, "an earlier file changed"
    new = [k for k in after if k not in before and FINISHED & set(k.split("/"))
           and not k.endswith("/lock")]
    assert not new, f"under its final name: {new}"
    return said, errors[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.stage}: {r.name}")
def test_one_clear_line(server, box, row):
    row.spoil(box)
    before = contents(box)
    done = in_fork.run(server, expand(f"{BASE[row.stage]} {row.flags}", box).split(), box)
    said, error = refused(done, [expand(w, box) for w in row.words], before, contents(box))
    assert said[-1] == error, f"more was said after the line: {said[-3:]}"


def test_the_rows_are_many_and_different():
    assert len({(r.stage, r.name) for r in ROWS}) == len(ROWS) >= 60
    for stage in ("pretrain", "sft", "dpo", "repair"):
        assert sum(r.stage == stage for r in ROWS) >= 6


@pytest.mark.parametrize("row", [
    *(r for r in ROWS if (r.stage, r.name) == ("dpo", "checkpoint's shard cut short")),
    Row("sft", "batch not divisible", "--global-batch 7", ["--global-batch 7", "2 processes"]),
], ids=lambda r: f"{r.stage}: {r.name}")
def test_the_same_line_once_by_two_processes(box, row):
    row.spoil(box)
    before = contents(box)
    done = conftest.run(*expand(f"{BASE[row.stage]} {row.flags}", box).split(), processes=2,
                        check=False)
    refused(done, [expand(w, box) for w in row.words], before, contents(box))
