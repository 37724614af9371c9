"""The page of a run: it shows what the run folder holds, and nothing in there becomes markup."""
import argparse
import json
import re
import shutil
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from tools import evidence, figures, layout, page, questions
from made_run import EVIL, LONG, logs, make

TAGS = set("html head meta title style body header h1 h2 h3 p nav a main section div span dl dt dd "
           "code ul li figure figcaption br svg path polyline circle g text rect symbol image use "
           "details summary table tr th td article b bdi img".split())
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Tags with their attributes, and all text, as a browser would take them."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.words = [], [], []
        self.feed(source)
        self.close()
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def of(self, tag, **attributes):
        """The attributes of such tags; data_key="loss" asks for data-key="loss"."""
        return [a for name, a in self.tags if name == tag and all(
            a.get(k.replace("_", "-")) == v for k, v in attributes.items())]


def source_of(*folders, **options):
    args = argparse.Namespace(**{"bench": None, "questions": 40, "wrong": 20} | options)
    return page.page_of([page.Run(folder) for folder in folders], args)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "toy")


@pytest.fixture(scope="module")
def read(run):
    return Reader(source_of(run))


def log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


# ------------------------------------------------------------------------------ what it may not be

def require_harmless(source):
    """No tag but ours, no attribute that runs or fetches anything."""
    found = Reader(source)
    assert {tag for tag, _ in found.tags} <= TAGS and not found.open
    for tag, attributes in found.tags:
        assert not [k for k in attributes if k.startswith("on") or k == "style"], tag
        for name in ("href", "src"):
            value = attributes.get(name, "#")
            assert re.fullmatch(r"#[\w-]+|#|data:image/jpeg;base64,[\w+/=]+", value), value[:80]
    policy, = found.of("meta", http_equiv="Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]
    assert not re.search(r"(?i)@import|url\(|</?script", source)
    return found


def test_names_and_answers_stay_text(tmp_path, monkeypatch):
    folder = make(tmp_path / "run <i>&\u202e", steps=90, evil=EVIL)
    found = require_harmless(source_of(folder))
    seen = EVIL.replace("\u202e", "[U+202E]").replace("\u2066", "[U+2066]")
    assert found.text.count(seen) > 50 and LONG in found.text and "own <b>" in found.text
    assert "run <i>&[U+202E]" in found.text and "👩‍🔬" in found.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", found.text)
    assert "cannot be read (UnidentifiedImageError" in found.text      # the picture that is none
    assert f"--run-dir '{tmp_path}/run <i>&[U+202E]'" in found.text    # a shell takes it as a name
    for module in (figures, layout, page):                             # the check can fail
        monkeypatch.setattr(module, "text", str)
    with pytest.raises(AssertionError):
        require_harmless(source_of(folder))


def test_text_of_anything():
    assert figures.text("a\0\ud800\u200f<b>\n") == "a[U+0000][U+D800][U+200F]&lt;b&gt;\n"
    assert figures.text(None) == "None" and figures.text('"\'') == "&quot;&#x27;"


# -------------------------------------------------------------------------------- what it must show

def points(line):
    return np.array([p.split(",") for p in line["points"].split()], float)


def test_curves_are_the_numbers_that_were_logged(run, read):
    """Each curve's extremes exactly; each of its points, read back from the picture, to a pixel."""
    for stage, label in (("pretrain", "stage 1"), ("sft", "SFT"), ("dpo", "DPO")):
        lines = log(run / stage)
        for key, of in (("loss", lambda x: x["loss"]),
                        ("grad_norm.encoder", lambda x: x["grad_norm"]["encoder"]),
                        ("lr.llm", lambda x: x["lr"]["llm"])):
            values = np.array([of(x) for x in lines])
            svg, line = next(both for both in curves_of(read, key)
                             if both[1]["data-line"] == label)
            facts = [float(line[f"data-{x}"]) for x in ("first", "last", "min", "max", "n")]
            assert facts == [values[0], values[-1], values.min(), values.max(), len(values)]
            left, top, right, bottom = map(float, svg["data-box"].split())
            (x0, x1), (y0, y1) = (map(float, svg[f"data-{a}"].split()) for a in "xy")
            x, y = points(line).T
            steps = x0 + (x - left) / (right - left) * (x1 - x0)
            if svg["data-log"] == "1":
                found = y0 * (y1 / y0) ** ((bottom - y) / (bottom - top))
                wanted = values[np.rint(steps).astype(int)]
                np.testing.assert_allclose(np.log(found / wanted), 0,
                                           atol=np.log(y1 / y0) / (bottom - top))
            else:
                found = y0 + (bottom - y) / (bottom - top) * (y1 - y0)
                np.testing.assert_allclose(found, values[np.rint(steps).astype(int)],
                                           atol=(y1 - y0) / (bottom - top))


def curves_of(read, key):
    """[(attributes of the picture, of a curve in it), …] in the order of the page."""
    out, svg = [], None
    for tag, attributes in read.tags:
        if tag == "svg":
            svg = attributes if attributes.get("data-key") == key else None
        elif tag == "polyline" and svg and "data-line" in attributes:
            out.append((svg, attributes))
    return out


def test_data_wait_is_the_share_of_the_step(run, read):
    timing = log(run / "sft", "timing.jsonl")
    share = [100 * x["data_wait"] / x["seconds"] for x in timing]
    line = next(x for _, x in curves_of(read, "data_wait") if x["data-line"] == "SFT")
    assert float(line["data-max"]) == pytest.approx(max(share))


def test_thinning_keeps_every_extreme():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[31_234], y[777] = 60, -60
    kept = figures.thinned(x, y, 300)
    assert len(kept) <= 602 and {0, 777, 31_234, 49_999} <= set(kept)
    for column in range(300):
        inside = (x * 300 / x[-1]).astype(int).clip(max=299) == column
        seen = inside[kept]
        assert y[kept][seen].max() == y[inside].max() and y[kept][seen].min() == y[inside].min()
    assert len(figures.thinned(x[:500], y[:500], 300)) == 500
    slow = [y[:240][max(0, i - 3):i + 4].mean() for i in range(240)]
    np.testing.assert_allclose(figures.moving_mean(y[:240]), slow)


def test_scores_are_the_results_with_their_intervals(run, read):
    dots = {(a["data-row"], a["data-name"], float(a["data-value"])): a for a in read.of("g")
            if "data-row" in a}
    for model, folder in (("sft", "sft"), ("dpo", "dpo"), ("pretrain", "pretrain"),
                          ("original", "repair/toy-vit"), ("dpo", "repair/dpo"),
                          ("wrong image", "pretrain/bench-wrong-image/..")):
        bench = "bench-wrong-image" if model == "wrong image" else "bench"
        results = json.loads((run / folder / bench / "results.json").read_text())
        one = results["benchmarks"]["ToyOCR"]
        dot = dots["OCR & Chart", model, one["score"]]
        assert float(dot["data-low"]) == pytest.approx(one["score"] - one["ci95"])
        dot = dots["Average", model, results["average"]]      # of two scores, independently ±5
        assert float(dot["data-high"]) == pytest.approx(results["average"] + 5 / 2 ** 0.5)
    assert dots["top-1", "dpo", 50.0]["data-high"] == "60.0"
    assert dots["top-1", "dpo", 1.0]["data-low"] == "-2.0"
    assert dots["inside the object", "original", 5.0]
    for heading, rows in evidence.gather(run).sections:
        for label, cells, apart in rows:
            for cell in (*cells.values(), *apart.values()):
                assert cell.text in read.text


def test_profiles_path_and_map(run, read):
    for stage, label in (("sft", "SFT"), ("dpo", "DPO")):
        found = json.loads((run / stage / "encoder/moved.json").read_text())
        for key in ("moved", "moved_since_parent"):
            line = next(x for _, x in curves_of(read, key) if x["data-line"] == label)
            values = list(found[key].values())
            assert [float(line[f"data-{x}"]) for x in ("first", "last", "max")] == \
                [values[0], values[-1], max(values)]
        way = json.loads((run / "probes/gradcam/path.json").read_text())["methods"][stage]
        line = next(x for _, x in curves_of(read, "path:whole") if x["data-line"] == label)
        assert float(line["data-max"]) == max(way["whole"])
        tokens = [x for _, x in curves_of(read, f"path:{stage}") if x["data-line"] != label]
        assert [float(x["data-first"]) for x in tokens] == sorted(
            [t["norms"][0] for t in way["tokens"]], reverse=True)
    maps = json.loads((run / "probes/align/results.json").read_text())["scores"]
    cells = [float(a["data-value"]) for a in read.of("rect") if "data-value" in a]
    assert sorted(cells) == sorted(v for s in maps for row in s["map"] for v in row)
    assert len([a for a in read.of("rect") if a.get("class") == "best"]) == len(maps)


def test_questions_in_which_models_differ_come_first(run, read):
    by_bench, lost = questions.gather({s: run / s / "bench" for s in ("sft", "dpo")})
    assert not lost and {b: len(qs) for b, qs in by_bench.items()} == {"ToyGeneral": 20,
                                                                       "ToyOCR": 20}
    shown = questions.to_show(by_bench, 12)
    differ = [len({worth for _, worth in q.said.values()}) > 1 for q in shown]
    assert differ == sorted(differ, reverse=True) and len(shown) == 12
    units = json.loads((run / "dpo/bench/units.json").read_text())["ToyOCR"]
    wrong = questions.wrong(by_bench, "dpo")["ToyOCR"]
    assert {q.index for q in wrong} == {index for _, index, value in units if value < 1}
    assert f"{len(wrong)} of 20" in read.text and read.text.count("Wrong answers: ") == 6
    assert len(read.of("article")) >= 40 and len(read.of("use")) > 2 * len(read.of("symbol")) > 0


def test_an_answer_to_another_question_is_not_shown(run, tmp_path):
    shutil.copytree(run / "sft/bench", tmp_path / "bench")
    answers = tmp_path / "bench/ToyOCR.0.jsonl"
    items = [json.loads(line) | {"asked": "0" * 16} for line in answers.open()]
    answers.write_text("".join(json.dumps(item) + "\n" for item in items))
    found, _ = questions.gather({"sft": tmp_path / "bench"}, run.parent / "data/bench")
    assert found["ToyOCR"] == [] and len(found["ToyGeneral"]) == 20
    _, lost = questions.gather({"sft": tmp_path / "bench"}, tmp_path / "nowhere")
    assert len(lost) == 2 and "--bench says where" in lost[0]


# ---------------------------------------------------------------------------------- at any moment

@pytest.mark.parametrize("left", ["pretrain/config.json", "pretrain/metrics.jsonl", "sft/final",
                                  "dpo/encoder", "probes/gradcam", "repair/dpo/bench/results.json"])
def test_half_a_run_shows_half(run, tmp_path, left):
    """What is not there is named with its command; the rest is shown."""
    folder = tmp_path / "toy"
    shutil.copytree(run, folder)
    gone = folder / left
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found = require_harmless(source_of(folder, bench=str(run.parent / "data/bench")))
    word = {"pretrain": "pretrain.py", "sft": "train_sft.py", "dpo": "extract.py", "probes":
            "gradcam.py", "repair": "--encoder"}[left.split("/")[0]]
    if left != "pretrain/metrics.jsonl":
        assert re.search(rf"python \S*{word}|{word} \S+/dpo/encoder", found.text), left


def test_the_beginning_of_a_run(run, tmp_path):
    """A stage that has only begun; a line that is still being written; then a broken one."""
    folder = tmp_path / "toy"
    (folder / "pretrain").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds no run: no stage's config.json"):
        page.Run(folder)
    with pytest.raises(SystemExit, match="is no folder"):
        page.Run(tmp_path / "nowhere")
    shutil.copy(run / "pretrain/config.json", folder / "pretrain")
    found = Reader(source_of(folder))
    assert "not finished: 0 steps so far" in found.text and "no step has been logged" in found.text
    lines = (run / "pretrain/metrics.jsonl").read_text().splitlines()
    metrics = folder / "pretrain/metrics.jsonl"
    metrics.write_text("\n".join(lines[:3])[:-9])
    assert "not finished: 2 steps so far" in Reader(source_of(folder)).text
    metrics.write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n")
    with pytest.raises(SystemExit, match=r"metrics.jsonl:2: not JSON"):
        page.Run(folder)


def test_runs_side_by_side_share_their_height(run, tmp_path):
    other = make(tmp_path / "other", steps=300, seed=1)
    found = require_harmless(source_of(run, other))
    for key in ("loss", "moved", "path:whole"):
        ranges = [a["data-y"] for a in found.of("svg", data_key=key)]
        groups = len(ranges) // 2
        assert ranges[:groups] == ranges[groups:] and groups
    assert "toy | other" in found.text and len(found.of("h1")) == 1


def test_a_long_run_stays_small_and_quick(tmp_path):
    """50,000 steps."""
    folder = make(tmp_path / "long", steps=50)
    logs(folder / "dpo", 50_000, np.random.default_rng(0), ["margin", "accuracy"])
    began = time.perf_counter()
    source = source_of(folder)
    assert len(source.encode()) < 8e6 and time.perf_counter() - began < 20
    line, = [x for _, x in curves_of(Reader(source), "loss") if x["data-n"] == "50000"]
    assert line["data-max"] == "9.0" and len(points(line)) <= 2 * figures.PLOT + 2


# ------------------------------------------------------------------------------------- how it looks

def contrast(a, b):
    def light(colour):
        channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])
    low, high = sorted([light(a), light(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_words_and_curves_stand_out(theme):
    """Words 4.5 : 1, curves 3 : 1, on both grounds; no two methods share a colour."""
    for ground in ("paper", "card"):
        ground = layout.PALETTE[ground][theme]
        for name in ("ink", "soft", "good", "bad", "link"):
            assert contrast(layout.PALETTE[name][theme], ground) >= 4.5, name
        for name, both in figures.COLOURS.items():
            assert contrast(both[theme], ground) >= 3, name
    assert len({both[theme] for both in figures.COLOURS.values()}) == len(figures.COLOURS)
    assert round(contrast("#ffffff", "#000000")) == 21


def test_the_command(run, tmp_path, monkeypatch, capsys):
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["page", *map(str, argv)])
        page.main()
        return capsys.readouterr().out
    said = call(run)
    size = (run / "page.html").stat().st_size
    assert f"page.html: {size / 1e6:.2f} MB" in said and not list(run.glob("*.tmp"))
    other = make(tmp_path / "a" / "toy", steps=30)
    call(other, run, "--questions", 0, "--wrong", 0)
    assert not Reader((tmp_path / "a/page.html").read_text()).of("article")
    for left in ("repair", "sft", "pretrain/metrics.jsonl", "pretrain/bench", "dpo/bench",
                 "pretrain/bench-wrong-image", "probes/seg", "probes/linear"):
        shutil.rmtree(other / left) if (other / left).is_dir() else (other / left).unlink()
    for log in other.rglob("timing.jsonl"):
        log.unlink()
    (other / "dpo/metrics.jsonl").write_text('{"step": 0, "loss": 0.7}\n{"step": 1, "loss": 0.6}\n')
    said = call(other, "--png", tmp_path / "slides")
    drawn = list((tmp_path / "slides").glob("*.png"))
    assert f"wrote {len(drawn)} figures" in said and len(drawn) == 12
    assert {"path-whole.png", "moved.png", "stage-2-loss.png", "align-toy-vit-toy-lm.png"} <= \
        {p.name for p in drawn}
    line = figures.Line("sft", EVIL, [0, 1], [2, 3])
    figures.draw_png(figures.Chart("k", EVIL, [line], names=(EVIL,) * 2), tmp_path / "hostile.png")           # its dollars are no mathematics
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="--png needs matplotlib: pip install"):
        call(other, "--png", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------ what is rare

def test_a_published_model_brought_in_has_a_page(run, tmp_path):
    """tools.parent's run: the original is stage 1's own encoder, and stage 1 has no data. With its
    parent elsewhere, nobody is told to train another stage 1."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("pretrain", "sft", "dpo"):
        config = json.loads((folder / name / "config.json").read_text())
        config["arguments"]["encoder"] = f"{folder}/pretrain/encoder"
        config["arguments"]["data"] = config["arguments"]["data"] if name != "pretrain" else None
        config["arguments"] |= {"num_samples": 40} if name == "sft" else {}
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "dpo")
    found = Reader(source_of(folder))
    assert "The trained models: difference to stage 1" in found.text
    again = f"train_dpo.py --run-dir {folder} --num-samples 40 --seed 0"
    assert again in found.text and "pretrain.py" not in found.text
    config = json.loads((folder / "sft/config.json").read_text())
    config["arguments"]["parent"] = "../other/pretrain"
    (folder / "sft/config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "pretrain")
    found = Reader(source_of(folder))
    assert f"--parent {tmp_path}/other/pretrain" in found.text and "pretrain.py" not in found.text
    (folder / "sft/final/config.json").unlink()
    assert "/sft has begun; it goes on by the command that began it: python train_sft.py" in \
        Reader(source_of(folder)).text


def test_axes_of_what_is_rare():
    """A zero in the run beside it, a range narrower than a factor of two, what is no number."""
    def chart(values, log):
        return figures.Chart("g", "g", [figures.Line("sft", "SFT", [0, 1], values)], log=log)
    mine = chart([0.5, 0.9], True)
    assert figures.bounds(mine, [mine, chart([0.0, 0.7], False)])[2:] == (0.5 / 1.2, 0.9 * 1.2)
    assert figures.log_ticks(0.25, 0.48) == [0.3, 0.4]
    assert figures.short(float("nan")) == "nan" and figures.short(float("inf")) == "inf"


def test_answers_to_prompts_with_and_without_ocr_tokens_are_one_set(tmp_path, monkeypatch):
    """A row without OCR tokens is asked alike both ways: the others' answers must not vanish."""
    rows = [{"index": "1", "ocr_tokens": ""}, {"index": "2", "ocr_tokens": "a"}]
    asked = {False: {"1": "x", "2": "y"}, True: {"1": "x", "2": "z"}}
    monkeypatch.setattr(questions.answer, "asked_of", lambda tsv, rows, _, ocr: asked[ocr])
    given = {"1": ("x", "one"), "2": ("z", "two")}
    monkeypatch.setattr(questions.answer, "predictions", lambda folder, name, asked: {
        i: said for i, (prompt, said) in given.items() if asked[i] == prompt})
    assert questions.said_by({"sft": tmp_path}, tmp_path / "b.tsv", rows) == {
        "sft": {"1": "one", "2": "two"}}
