"""Published data as they are downloaded, through tools.prepare and a stage; packs read as files do.

The files are made here in the published layouts: columns, nesting, archives, odd records.
"""
import argparse
import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from conftest import COMMON, bit_equal, run
from pivot import images, packs, records
from tools import checking, growing, matlab, parquet, prepare

WNIDS = ["n01440764", "n01443537", "n02007558"]
TINY = ["--workers", 0, "--global-batch", 4, "--micro-batch", 4]


def picture(seed, kind="JPEG", size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def call(*words):
    """A command of tools.prepare, in this process."""
    args = prepare.get_args([str(w) for w in words])
    prepare.COMMANDS[args.what](args)


def tree(folder):
    """{name: bytes} of all files below."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(what, *words):
    with pytest.raises(SystemExit) as caught:
        call(*words)
    said = str(caught.value)
    assert said.startswith("error: ") and "\n" not in said and what in said, said


# --------------------------------------------------------------------------------- made-up sources

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def write_parquet(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(columns)
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, row_group_size=4)


def chat_row(number, raw, question="What is it?", answer="a red thing"):
    tag = "<image>\n" if raw else ""
    return {"id": f"vg/{number}", "image": raw and {"bytes": raw, "path": "x.jpg"},
            "conversations": [{"from": "human", "value": tag + question},
                              {"from": "gpt", "value": answer}], "data_source": "made"}


CHAT = [("id", pa.string()), ("image", IMAGE), ("conversations", TURNS),
        ("data_source", pa.string())]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """LLaVA-OneVision-Data: two subsets, one in two parts; a text-only row, a PNG, a WEBP; a subset
    of archives."""
    source = tmp_path_factory.mktemp("chats")
    for part in (0, 1):
        write_parquet(source / f"CLEVR-Math(MathV360K)/train-{part:05d}-of-00002.parquet", CHAT,
                      [chat_row(10 * part + i, picture(10 * part + i)) for i in range(6)])
    write_parquet(source / "magpie/train-00000-of-00001.parquet", CHAT, [
        chat_row(90, None, "Was heißt „blau“?"), chat_row(91, picture(91, "PNG")),
        chat_row(92, picture(92, "WEBP", (90, 60)))])
    (source / "ureader_kg").mkdir()
    (source / "ureader_kg/images.tar.gz").write_bytes(b"x")
    return source


def with_captions(world, folder):
    """DATA with the toy's captions in it: stage 1 needs both."""
    shutil.copytree(world / "images/captions", folder / "images/captions")
    shutil.copy(world / "captions.json", folder)
    return folder


def numbered(wnid, i):
    return {"bytes": picture(i), "path": f"{wnid}_{i}_{wnid}.JPEG"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """ImageNet: as imagenet-1k's parquet, and as ILSVRC2012's folders with a flat val."""
    source = tmp_path_factory.mktemp("imagenet")
    columns = [("image", IMAGE), ("label", pa.int64())]
    train = [{"image": numbered(w, 10 * k + i), "label": k} for k, w in enumerate(WNIDS)
             for i in range(4)]
    val = [{"image": {"bytes": picture(100 + i), "path":
                      f"ILSVRC2012_val_{i + 1:08d}_{WNIDS[i % 3]}.JPEG"}, "label": i % 3}
           for i in range(6)]
    write_parquet(source / "hub/data/train-00000-of-00002.parquet", columns, train[:7])
    write_parquet(source / "hub/data/train-00001-of-00002.parquet", columns, train[7:])
    write_parquet(source / "hub/data/validation-00000-of-00001.parquet", columns, val)
    write_parquet(source / "hub/data/test-00000-of-00001.parquet", columns,
                  [{"image": val[0]["image"], "label": -1}])
    for row in train:
        folder = source / "own/train" / WNIDS[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        name = row["image"]["path"].replace(f"_{WNIDS[row['label']]}.", ".")
        (folder / name).write_bytes(row["image"]["bytes"])
    (source / "own/val").mkdir()
    for i, row in enumerate(val):
        (source / f"own/val/ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(row["image"]["bytes"])
    return source


def devkit(folder, compressed):
    """data/ of ILSVRC2012_devkit_t12: numbers in an order of their own, an inner node last."""
    folder.mkdir(parents=True, exist_ok=True)
    order = [WNIDS[2], WNIDS[0], WNIDS[1], "n00001740"]
    fields = [(x, object) for x in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children",
                                    "children", "wordnet_height", "num_train_images")]
    synsets = np.empty((4, 1), fields)
    for i, wnid in enumerate(order):
        children = np.array([[1., 2., 3.]]) if i == 3 else np.zeros((0, 0))
        synsets[i, 0] = (float(i + 1), wnid, f"thing {i}, être", "a gloss", float(3 * (i == 3)),
                         children, 0., 1300.)
    scipy.io.savemat(folder / "meta.mat", {"other": np.eye(3), "synsets": synsets},
                     do_compression=compressed)
    truth = [order.index(WNIDS[i % 3]) + 1 for i in range(6)]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{t}\n" for t in truth))


def kaggle(folder):
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i + 1:08d},{WNIDS[i % 3]} 85 1 499 272 {WNIDS[i % 3]} 1 2 3 4 \n"
        for i in reversed(range(6))))


def mmpr_source(folder, escape=None, inside="images/"):
    """MMPR-v1.2: meta.json, annotations.zip, images.zip in three parts."""
    folder.mkdir()
    names = [f"set/{i}.jpg" for i in range(8)]
    pairs = [{"image": n, "question": "<image>\nWhat?", "chosen": "red", "rejected": "blue"}
             for n in names] + [{"image": "set/gone.jpg", "question": "What?", "chosen": "a",
                                 "rejected": "b"}]
    facts = {"root": "MMPR-v1.2/images", "annotation": "MMPR-v1.2/annotations/a.jsonl",
             "data_augment": False, "repeat_time": 1, "length": 9}
    (folder / "meta.json").write_text(json.dumps({"made": facts}))
    with zipfile.ZipFile(folder / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("annotations/a.jsonl", "".join(json.dumps(p) + "\n" for p in pairs))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for i, name in enumerate(names):
            out.writestr(inside + name, picture(i))
        if escape:
            out.writestr(escape, picture(99))
    raw, third = buffer.getvalue(), len(buffer.getvalue()) // 3
    for i, letter in enumerate("abc"):
        part = raw[i * third:] if i == 2 else raw[i * third:(i + 1) * third]
        (folder / f"images.zip_a{letter}").write_bytes(part)
    return folder


# ------------------------------------------------------------------------------ through the stages

def test_onevision_trains_from_files_and_from_a_pack(chats, world, tmp_path):
    """The same records, names, pixels, digest, losses and weights."""
    for kind, flags in (("files", []), ("pack", ["--pack"])):
        data = with_captions(world, tmp_path / kind)
        said = run("-m", "tools.prepare", "onevision", chats, data, *flags).stdout
        assert "15 records of 2 subsets; 14 pictures" in said and "ureader_kg" in said
        assert f"pretrain.py --data {data}" in said and not (data / "prepared/onevision").exists()
        run("pretrain.py", "--run-dir", tmp_path / f"run-{kind}", "--encoder", "toy-vit", *COMMON,
            *TINY, "--data", data, "--projector-max-steps", 1, "--max-steps", 3)
    lines = [(tmp_path / kind / "instruct.jsonl").read_text() for kind in ("files", "pack")]
    assert lines[1].replace("onevision.pack/", "onevision/") == lines[0]
    rows = [json.loads(line) for line in lines[0].splitlines()]
    text = chat_row(90, None, "Was heißt „blau“?")
    assert rows[12] == {k: v for k, v in text.items() if k != "image"}
    assert [r["image"][-4:] for r in rows if "image" in r][-2:] == [".png", "webp"]
    pack = packs.Pack(tmp_path / "pack/images/onevision.pack")
    stored = tree(tmp_path / "files/images/onevision")
    assert {name: pack.read(name) for name in pack.names()} == stored
    assert stored["CLEVR-Math(MathV360K)/00001-000002.jpg"] == picture(12)
    bit_equal(tmp_path / "run-files/pretrain", tmp_path / "run-pack/pretrain")


def test_imagenet_in_all_its_forms_gives_the_probe_the_same(labelled, tmp_path):
    own, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(labelled / "own", own)
    refused("the truth is not at", "imagenet", own, out / "none")
    call("imagenet", labelled / "hub", out / "hub")
    call("imagenet", labelled / "hub", out / "hub", "--pack")
    kaggle(own)
    call("imagenet", own, out / "csv")
    (own / "LOC_val_solution.csv").unlink()
    devkit(own / "ILSVRC2012_devkit_t12/data", True)
    call("imagenet", own, out / "txt")
    forms = [out / "hub", out / "csv", out / "txt"]
    for split in ("train", "val"):
        first, *others = [tree(form / split) for form in forms]
        assert first == others[0] == others[1] and len({n.split("/")[0] for n in first}) == 3
    assert first[f"{WNIDS[1]}/ILSVRC2012_val_00000002.JPEG"] == picture(101)
    assert (out / "csv/val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG").samefile(
        own / "val/ILSVRC2012_val_00000001.JPEG")                 # a link, no copy
    results = []
    for form in ("hub", "hub.pack"):
        run("probe_linear.py", "--encoder", "toy-vit", "--data", out / form, "--per-class", 3,
            "--out", tmp_path / form, "--workers", 0)
        results.append(json.loads((tmp_path / form / "results.json").read_text())["encoders"])
    assert results[0] == results[1]


def test_meta_mat_is_read_as_scipy_reads_it(tmp_path):
    for compressed in (False, True):
        devkit(tmp_path, compressed)
        rows = scipy.io.loadmat(tmp_path / "meta.mat", squeeze_me=True)["synsets"]
        assert matlab.synsets(tmp_path / "meta.mat") == {int(r[0]): str(r[1]) for r in rows}
    raw = (tmp_path / "meta.mat").read_bytes()
    for broken in (raw[:300], b"no" + raw[:100], raw[:126] + b"xx" + raw[128:]):
        (tmp_path / "meta.mat").write_bytes(broken)
        with pytest.raises(SystemExit, match="is not ILSVRC2012's meta.mat"):
            matlab.synsets(tmp_path / "meta.mat")


@pytest.fixture(scope="module")
def prh(tmp_path_factory):
    """minhuh/prh: a list of texts a picture."""
    source = tmp_path_factory.mktemp("prh")
    write_parquet(source / "data/train-00000-of-00001.parquet", [
        ("image", IMAGE), ("text", pa.list_(pa.string())), ("origin", pa.string())],
        [{"image": numbered("n1", i), "text": [f"caption {i}", "page", "section"], "origin": "u"}
         for i in range(14)])
    return source


def test_align_is_probed(prh, tmp_path):
    """Of a picture's texts the protocol takes the first."""
    call("align", prh, tmp_path / "align", "--pack")
    first = json.loads((tmp_path / "align/pairs.jsonl").read_text().splitlines()[0])
    assert first == {"image": "00000-000000.jpg", "caption": "caption 0"}
    said = run("probe_align.py", "--encoder", "toy-vit", "--llm", "toy-lm", "--data",
               tmp_path / "align", "--k", 3, "--seeds", 1, "--out", tmp_path / "out").stdout
    assert "14 different" in said


def test_mmpr_is_unpacked_from_its_parts_and_trained(fresh, tmp_path, capsys):
    source = mmpr_source(tmp_path / "MMPR")
    for kind, flags in (("files", []), ("pack", ["--pack"])):
        call("mmpr", source, tmp_path / kind / "preferences", *flags)
        said = capsys.readouterr().out
        assert "made: 1 of 9 pairs are bad" in said and "gone.jpg not found" in said
        shutil.copytree(fresh / "pretrain", tmp_path / f"run-{kind}" / "pretrain")
        run("train_dpo.py", "--run-dir", tmp_path / f"run-{kind}", *COMMON, *TINY, "--max-steps",
            2, "--data", tmp_path / kind, "--skip-bad")
    assert tree(tmp_path / "files/preferences/MMPR-v1.2/images")["set/3.jpg"] == picture(3)
    bit_equal(tmp_path / "run-files/dpo", tmp_path / "run-pack/dpo")


# ------------------------------------------------------------------------ killed, refused, goes on

class Killed(BaseException):
    pass


def die_at(monkeypatch, number):
    """Let the journal's so-many-th writing not come about: the unit is on disk, and not said."""
    say, calls = growing.Growing.say, []

    def dying(self, facts, path):
        calls.append(path)
        if len(calls) == number:
            raise Killed
        say(self, facts, path)
    monkeypatch.setattr(growing.Growing, "say", dying)


@pytest.mark.parametrize("flags", [[], ["--pack"]])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_killed_at_any_unit_it_goes_on_to_the_same_bytes(chats, tmp_path, monkeypatch, flags,
                                                         number):
    """number 4 is the very end: all is renamed, and nothing says so yet."""
    call("onevision", chats, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(Killed):
            call("onevision", chats, tmp_path / "killed", *flags)
    growing_now = tmp_path / "killed/prepared/onevision"
    assert (tmp_path / "killed/instruct.jsonl").exists() == (number == 4)
    if number < 4:                                # the kill left half a line, too
        with open(growing_now / "instruct.jsonl", "ab") as file:
            file.write(b'{"id": "half')
    call("onevision", chats, tmp_path / "killed", *flags)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    before = tree(tmp_path / "whole")
    call("onevision", chats, tmp_path / "whole", *flags)              # finished: nothing to do
    assert tree(tmp_path / "whole") == before
    refused("from other files or with other flags", "onevision", chats, tmp_path / "whole",
            "--max-side", 8)
    (tmp_path / "whole/instruct.jsonl").unlink()
    refused("instruct.jsonl is gone", "onevision", chats, tmp_path / "whole", *flags)


def test_parquet_that_is_not_whole_refuses_then_goes_on(chats, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(chats, source)
    part = source / "CLEVR-Math(MathV360K)/train-00001-of-00002.parquet"
    good = part.read_bytes()
    part.unlink()
    refused("train-00001-of-00002.parquet is missing (1 of 2", "onevision", source, out)
    part.write_bytes(good[:len(good) // 2])
    refused("train-00001-of-00002.parquet is not a whole parquet file", "onevision", source, out)
    part.write_bytes(good[:40] + bytes(4000) + good[4040:])         # the footer is well, a page not
    refused("is not a whole parquet file", "onevision", source, out)
    assert not (out / "instruct.jsonl").exists()
    part.write_bytes(good)
    call("onevision", source, out)
    call("onevision", chats, tmp_path / "other")
    assert tree(out) == tree(tmp_path / "other")


def test_columns_and_pictures_that_are_not_there(tmp_path):
    write_parquet(tmp_path / "a/x.parquet", [("text", pa.string())], [{"text": "x"}])
    refused("no column 'id'; its columns are text", "onevision", tmp_path / "a", tmp_path / "out")
    row = chat_row(1, b"x")
    row["image"] = {"bytes": None, "path": "../x.jpg"}
    write_parquet(tmp_path / "b/x.parquet", CHAT, [row])
    refused("is named, but not in the file", "onevision", tmp_path / "b", tmp_path / "out2")
    refused("no .parquet file in", "align", tmp_path / "out2", tmp_path / "out3")


def test_without_pyarrow_one_line_says_what_to_install(chats, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused("pip install -r requirements-prepare.txt", "onevision", chats, tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--pack"]])
@pytest.mark.parametrize("what", ["onevision", "imagenet", "align", "mmpr"])
def test_a_full_disk_is_one_line_and_goes_on(chats, labelled, prh, tmp_path, monkeypatch, what,
                                             flags):
    """At the first, the middle and the last fsync; a list that is there is whole."""
    source = {"onevision": chats, "imagenet": labelled / "hub", "align": prh}.get(what)
    source = source or mmpr_source(tmp_path / "MMPR")
    fsync, calls = os.fsync, []

    def full(descriptor, at=None):
        calls.append(descriptor)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    call(what, source, tmp_path / "calm", *flags)
    calm, count = tree(tmp_path / "calm"), len(calls)
    for at in (1, (count + 1) // 2, count):
        out = tmp_path / f"out-{at}"
        monkeypatch.setattr("sys.argv", ["prepare", what, str(source), str(out), *flags])
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(os, "fsync", functools.partial(full, at=at))
            with pytest.raises(SystemExit, match="error: no room left on the disk"):
                prepare.main()
        named = {name: raw for name, raw in tree(out).items() if not name.startswith("prepared/")}
        assert all(calm[name] == raw for name, raw in named.items())
        assert at == count or not named
        prepare.main()
        assert tree(out) == calm


def test_what_was_written_is_read_back(chats, tmp_path, monkeypatch):
    def flip(self, name, raw, add=growing.Pictures.add):
        add(self, name, raw)
        path, offset, length, crc = self.unit[-1]
        self.unit[-1] = (path, offset, length, crc ^ 1)
    monkeypatch.setattr(growing.Pictures, "add", flip)
    refused("what was written reads otherwise", "onevision", chats, tmp_path / "out")


def test_nothing_of_somebody_elses_is_overwritten(chats, tmp_path):
    (tmp_path / "instruct.jsonl").write_text("mine")
    refused("exists already and was not written by this command", "onevision", chats, tmp_path)
    assert (tmp_path / "instruct.jsonl").read_text() == "mine"


def test_archives_that_are_not_whole(tmp_path):
    source, out = mmpr_source(tmp_path / "MMPR"), tmp_path / "out"
    parts = {p.name: p.read_bytes() for p in source.glob("images.zip_*")}

    def with_parts(**changed):
        for name, raw in parts.items():
            (source / name).unlink(missing_ok=True)
            raw = changed.get(name[-2:], raw)
            if raw is not None:
                (source / name).write_bytes(raw)
    with_parts(ab=None)
    refused("images.zip_ab is missing beside", "mmpr", source, out)
    with_parts(ac=None)
    refused("is its last part missing", "mmpr", source, out)
    with_parts(aa=parts["images.zip_aa"][:-9])
    refused("images.zip_*", "mmpr", source, out)
    middle = len(parts["images.zip_ab"]) // 2
    spoilt = bytearray(parts["images.zip_ab"])
    spoilt[middle] ^= 255
    with_parts(ab=bytes(spoilt))
    refused("cannot be unpacked (Bad CRC-32", "mmpr", source, out)
    assert not out.exists()
    with_parts()
    call("mmpr", source, out)
    assert len(list(out.rglob("*.jpg"))) == 8
    for name in ("../x.jpg", "/x.jpg", "images/../../x.jpg"):
        bad = mmpr_source(tmp_path / f"bad{len(name)}", name)
        refused("leads out of the folder", "mmpr", bad, tmp_path / "no")
    assert not list(tmp_path.rglob("x.jpg"))


def test_benchmarks_compares_with_what_is_published(world, tmp_path, monkeypatch, capsys):
    bench = tmp_path / "bench"
    bench.mkdir()
    raw = next((world / "bench").glob("*.tsv")).read_bytes()
    for name in ("MME", "MMVP"):
        (bench / f"{name}.tsv").write_bytes(raw)
    md5 = hashlib.md5(raw).hexdigest()
    monkeypatch.setattr(checking, "MD5", {"OCRBench": md5, "DocVQA_VAL": md5, "AI2D_TEST": md5})
    for name in ("OCRBench", "DocVQA_VAL"):
        (bench / f"{name}.tsv").write_bytes(raw)
    call("benchmarks", bench)
    said = capsys.readouterr().out
    assert said.count("as published") == 2 and "VLMEval/AI2D_TEST.tsv" in said
    (bench / "OCRBench.tsv").write_bytes(raw + raw.splitlines(True)[-1])
    refused("index", "benchmarks", bench)
    assert "its MD5 is" in capsys.readouterr().out


def test_check_names_all_that_is_bad(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world, data)
    said = run("-m", "tools.prepare", "check", data).stdout
    assert "read, none bad" in said and f"{data}/instruct.jsonl: " in said
    lines = (data / "instruct.jsonl").read_text().splitlines()
    broken = json.loads(next(line for line in lines if '"image"' in line))
    lines[3], lines[5] = "{", json.dumps({**broken, "image": "none.png"})
    lines[8] = json.dumps({**broken, "conversations": []})
    (data / "instruct.jsonl").write_text("\n".join(lines) + "\n")
    cut = data / "align/images/000002.png"
    cut.write_bytes(cut.read_bytes()[:60])
    next((data / "imagenet/val").glob("*/0001.png")).write_text("x")
    tsv = sorted((data / "bench").glob("*.tsv"))[0]
    rows = tsv.read_text().splitlines()
    rows[1] = rows[1].replace(rows[1].split("\t")[1], "A" * 68)      # base64, but no picture
    tsv.write_text("\n".join(rows) + "\n")
    done = run("-m", "tools.prepare", "check", data, check=False)
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad: ")]
    assert done.returncode == 1 and "error: 7 bad of" in done.stderr, bad
    for where in ("instruct.jsonl:4: not JSON", "instruct.jsonl:6: image none.png not found",
                  "instruct.jsonl:9: 'conversations' is missing", "000002.png cannot be read",
                  "0001.png cannot be read", f"{tsv.name}:2: embedded image",
                  f"{tsv.name}:3: embedded image"):                # the same picture
        assert any(where in line for line in bad), (where, bad)


def test_check_reads_packs(packed, tmp_path):
    """A byte that changed in a picture may still decode; its CRC does not agree."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    (tmp_path / "instruct.jsonl").write_text(json.dumps(
        {"image": "b.jpg", "conversations": turns}) + "\n")
    call("check", tmp_path)
    raw = bytearray((packed / "00000.bin").read_bytes())
    raw[packs.Pack(packed).row("a.jpg")["offset"] + 800] ^= 1
    (packed / "00000.bin").write_bytes(raw)
    refused("1 bad of 5", "check", tmp_path)


def test_ade20k_is_checked(world, tmp_path):
    shutil.copytree(world / "ade20k", tmp_path / "ade20k")
    call("ade20k", tmp_path / "ade20k")
    mask = next((tmp_path / "ade20k/annotations/validation").iterdir())
    Image.new("L", (3, 3)).save(mask)
    refused("1 of", "ade20k", tmp_path / "ade20k")


def test_max_side_shrinks_what_is_larger_alone(tmp_path):
    small, large, flat = picture(1), picture(2, size=(300, 100)), picture(3, "PNG", (50, 200))
    assert growing.shrunk(small, 64) == small and growing.shrunk(large, None) == large
    assert growing.shrunk(b"no picture", 64) == b"no picture"
    for raw, kind, size in ((large, "JPEG", (64, 21)), (flat, "PNG", (16, 64))):
        with Image.open(io.BytesIO(growing.shrunk(raw, 64))) as image:
            assert (image.format, image.size) == (kind, size)


# ----------------------------------------------------------------------------------------- packs

@pytest.fixture
def packed(tmp_path):
    """A folder of pictures, and the same as a pack beside it."""
    for i, name in enumerate(("b.jpg", "a/c.jpg", "a/d é.png", "a.jpg")):
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, "PNG" if name.endswith("png") else "JPEG"))
    call("pack", tmp_path / "plain", tmp_path / "images.pack")
    return tmp_path / "images.pack"


def first_bytes(path, queue):
    queue.put(packs.open_file(path).read(8))


def test_a_pack_reads_as_its_folder_does(packed):
    plain = packed.parent / "plain"
    pack = packs.Pack(packed)
    assert {name: pack.read(name) for name in pack.names()} == tree(plain)
    assert list(pack.names("a")) == ["c.jpg", "d é.png"]
    assert [e.name for e in packs.scandir(packed) if e.is_dir()] == ["a"]
    for name in ("b.jpg", "a/d é.png", "a//c.jpg", "./a.jpg"):
        path = records.path_inside(name, str(packed), "x:1", False)
        same = records.path_inside(name, str(plain), "x:1", False)
        assert (images.load_image(path, 32, "x") == images.load_image(same, 32, "x")).all()
        assert packs.facts(path)[0] == os.stat(same).st_size
    context, path = multiprocessing.get_context("fork"), f"{packed}/b.jpg"
    queue = context.Queue()
    for _ in range(3):                            # forks share the parent's open file
        child = context.Process(target=first_bytes, args=(path, queue))
        child.start()
        assert queue.get(timeout=60) == (plain / "b.jpg").read_bytes()[:8]
        child.join()


def test_names_stay_inside_a_pack(packed, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    for name in ("../secret.jpg", "a/../../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(records.BadRecord, match="leaves its folder"):
            records.path_inside(name, str(packed), "x:1", False)
    for name in ("none.jpg", "a", "a/c.jpg/x"):
        with pytest.raises(records.BadRecord, match="not found"):
            records.path_inside(name, str(packed), "x:1", False)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link.pack").symlink_to(packed)
    with pytest.raises(records.BadRecord, match="by a link; --follow-links"):
        records.path_inside("link.pack/b.jpg", str(tmp_path / "root"), "x:1", False)
    assert records.path_inside("link.pack/b.jpg", str(tmp_path / "root"), "x:1", True)


def test_a_damaged_pack_says_so(packed, tmp_path):
    pack = packs.Pack(packed)
    raw, index = (packed / "00000.bin").read_bytes(), (packed / "index.npy").read_bytes()
    assert all(pack.whole(row) for row in pack.index)
    middle = len(raw) // 2
    (packed / "00000.bin").write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1:])
    assert sum(not packs.Pack(packed).whole(row) for row in pack.index) == 1
    (packed / "00000.bin").write_bytes(raw[:-5])
    with pytest.raises(records.BadRecord, match="00000.bin ends at a picture's middle"):
        last = max(pack.index, key=lambda row: row["offset"])["name"].decode()
        images.load_image(f"{packed}/{last}", 32, "x:1")
    for broken in (index[:-7], index[:20], b"", pickled()):
        (packed / "index.npy").write_bytes(broken)
        with pytest.raises(packs.Damaged, match="cannot be read"):
            packs.Pack(packed)
    np.save(packed / "index.npy", np.zeros(3))
    with pytest.raises(packs.Damaged, match="is no index of a pack"):
        packs.Pack(packed)


def pickled():
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], object), allow_pickle=True)
    return out.getvalue()


def test_a_pack_from_a_zip_and_in_several_files(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "FILE_BYTES", 2500)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for path in sorted((tmp_path / "plain").rglob("*.*")):
            out.write(path, path.relative_to(tmp_path / "plain"))
    call("pack", tmp_path / "x.zip", tmp_path / "zip.pack")
    assert len(list((tmp_path / "zip.pack").glob("*.bin"))) > 1
    pack = packs.Pack(tmp_path / "zip.pack")
    assert {name: pack.read(name) for name in pack.names()} == tree(tmp_path / "plain")


def test_two_pictures_of_one_name_are_refused(tmp_path):
    rows = [["a.jpg", 0, 0, 3, 1], ["b.jpg", 0, 3, 3, 1], ["a.jpg", 0, 6, 3, 1]]
    (tmp_path / "entries").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="two pictures are called a.jpg"):
        growing.write_index(tmp_path / "entries", tmp_path)


def test_a_benchmarks_files_may_be_packed(packed, tmp_path):
    from judge import answer
    (tmp_path / "MME.tsv").write_text("index\timage_path\tquestion\tanswer\tcategory\n"
                                      "1\tb.jpg\tIs it red?\tYes\tcolor\n")
    rows, _ = answer.read_tsv(tmp_path / "MME.tsv")
    assert answer.picture_of(tmp_path / "MME.tsv", rows[0]) == f"{packed}/b.jpg"
    packed_asked = answer.asked_of(tmp_path / "MME.tsv", rows, rows, False)
    shutil.copytree(tmp_path / "plain", tmp_path / "images")
    rows, _ = answer.read_tsv(tmp_path / "MME.tsv")
    assert rows[0]["picture"] == f"{tmp_path}/images/b.jpg"
    assert answer.asked_of(tmp_path / "MME.tsv", rows, rows, False) == packed_asked


def test_gradcam_finds_the_masks_beside_a_pack(packed, tmp_path):
    import gradcam
    (tmp_path / "masks/a").mkdir(parents=True)
    Image.new("L", (40, 30), 255).save(tmp_path / "masks/a/c.png")
    args = argparse.Namespace(masks=None, mask_label=None)
    assert gradcam.object_mask(args, f"{packed}/a/c.jpg", "x").shape == (30, 40)
    assert gradcam.object_mask(args, f"{packed}/b.jpg", "x") is None


def test_numbered_parts():
    for names, gap in ((["0000", "0001"], None), (["0000", "0002"], "x/0001.parquet"),
                       (["train-00000-of-00002-0123abcd", "train-00001-of-00002-4567cdef"], None),
                       (["train-00001-of-00002"], "train-00000-of-00002"), (["all", "v0.7.1"], None)):
        if gap is None:
            parquet.refuse_gaps("x", [f"{name}.parquet" for name in names])
        else:
            with pytest.raises(SystemExit, match=gap):
                parquet.refuse_gaps("x", [f"{name}.parquet" for name in names])
