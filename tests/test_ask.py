"""tools.ask: the answers of repair_eval.py, the heat of an obvious definition, refusals in one line."""
import base64
import csv
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, make_wild, run
from judge import answer
from pivot import model_io
from test_probes_cam_align import call, refuses
from tools import ask

sys.path.insert(0, str(ROOT / "benchmarks"))
import heat_on_object  # noqa: E402

ASKED = ["What colour is the star?", "How many circles are there?", "What word is printed?",
         "Is the red bar taller than blue?", "What is 1 plus 2? Say it in one word."]


def photo(path, seed):
    """Noise of an odd size, as a person has it: JPEG with a turn in its EXIF, PNG with alpha."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (30 + 7 * seed, 64, 4 if path.suffix == ".png" else 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).resize((90, 40 + seed)).save(path, exif=exif)


@pytest.fixture(scope="module")
def asked(stage1, tmp_path_factory):
    """A run folder whose model has answered ASKED, each of its own photo, by repair_eval.py in one
    batch. Wild random weights: what it says hangs on every token and pixel."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(stage1 / "pretrain", folder / "run/wild")
    model, tokenizer = model_io.load_mllm(folder / "run/wild/final")
    make_wild(model)
    model_io.save_mllm(model, tokenizer, folder / "run/wild/final", True)
    photos = [folder / f"{i}.{'png' if i == 3 else 'jpg'}" for i in range(len(ASKED))]
    (folder / "bench").mkdir()
    with open(folder / "bench/ToyGeneral.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer", "category"])
        for i, path in enumerate(photos):
            photo(path, i)
            table.writerow([i, base64.b64encode(path.read_bytes()).decode(), ASKED[i], "x", "y"])
    run("repair_eval.py", "--mllm", folder / "run/wild/final", "--bench", folder / "bench",
        "--workers", 0)
    return folder, photos, answer.predictions(folder / "run/wild/bench", "ToyGeneral")


def lines(out):
    return [x for x in out.splitlines() if not x.startswith(("  ", "wrote"))]


def test_answers_are_those_of_repair_eval(asked, capsys):
    folder, photos, predictions = asked
    assert len(set(predictions.values())) == len(ASKED)
    model, tokenizer = ask.repair_eval.open_for_answers(
        SimpleNamespace(dtype="fp32"), folder / "run/wild/final", "cpu")
    for i, question in enumerate(ASKED):
        said = ask.answer_of(model, tokenizer, photos[i], question, 32)
        assert tokenizer.decode(said.answer) == predictions[str(i)]
    said = ask.answer_of(model, tokenizer, photos[0], ASKED[1], 32)          # another picture
    assert tokenizer.decode(said.answer) != predictions["1"]
    line, = lines(call(ask, capsys, folder / "run/wild", photos[3], f" {ASKED[3]}\n"))
    assert line == f"{folder}/run/wild  {' '.join(predictions['3'].split())}"


def test_several_models_as_a_command(asked, stage1, tmp_path):
    """A line each, aligned, in the order typed; a final/ and its stage's folder are the same."""
    folder, photos, _ = asked
    names = [f"{folder}/run/wild", f"{stage1}/pretrain", f"{folder}/run/wild/final"]
    done = run("-m", "tools.ask", *names, photos[1], "--heat", tmp_path / "heat.png", ASKED[0],
               "--max-new-tokens", 3)
    said = lines(done.stdout)
    width = max(map(len, names))
    assert [x[:width].strip() for x in said] == names
    answers = [x[width:] for x in said]
    assert answers[0] == answers[2] != answers[1] and all(x.startswith("  ") for x in answers)
    sheet = Image.open(tmp_path / "heat.png")
    assert sheet.size[0] == 4 * (ask.PANEL + ask.GAP) + ask.GAP
    assert [p.name for p in tmp_path.iterdir()] == ["heat.png"]


def test_draws_are_a_function_of_the_seed(asked, capsys):
    folder, photos, _ = asked
    words = [folder / "run/wild", photos[0], ASKED[0], "--temperature", 2, "--max-new-tokens", 4]
    a, again, b = (lines(call(ask, capsys, *words, "--seed", seed)) for seed in (1, 1, 2))
    assert a == again != b


def slow_heat(model, prompt, words, pixels, at):
    """Σ_d |∂ Σ log π(word)/∂A| by transformers' own forward, of a leaf in the place of A."""
    with torch.no_grad():
        features = model.encoder(torch.from_numpy(pixels)[None])
        if at == "projector":
            features = model.projector(features)
    leaf = features.requires_grad_()
    put = model.projector(leaf) if at == "encoder" else leaf
    ids = torch.tensor([prompt + words])
    embeds = model.llm.get_input_embeddings()(ids).detach()
    first = prompt.index(model.image_token_id)
    embeds = torch.cat([embeds[:, :first], put, embeds[:, first + put.shape[1]:]], 1)
    logps = model.llm(inputs_embeds=embeds).logits[0].log_softmax(-1)
    sum(logps[len(prompt) + i - 1, word] for i, word in enumerate(words)).backward()
    return leaf.grad[0].abs().sum(1)


@pytest.mark.parametrize("at", ["encoder", "projector"])
def test_heat_is_the_gradient_of_the_answer(stage1, asked, at):
    """Over the number of words, for gradcam's loss is a mean over them. The end counts where the model said it,
    and not where the limit cut the answer."""
    folder, photos, _ = asked
    model, tokenizer = ask.repair_eval.open_for_answers(
        SimpleNamespace(dtype="fp32"), stage1 / "pretrain/final", "cpu")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = ask.answer_of(model, tokenizer, photos[0], ASKED[0], 32)
    assert 0 < len(whole.answer) < 32
    short = len(whole.answer)
    for limit, words in ((32, whole.answer + [end]), (short, whole.answer)):
        said = ask.answer_of(model, tokenizer, photos[0], ASKED[0], limit)
        assert said.answer == whole.answer
        heat = ask.heat_of(model, tokenizer, said, limit, at) * len(words)
        slow = slow_heat(model, said.prompt, words, said.pixels, at)
        torch.testing.assert_close(heat.float(), slow, rtol=1e-3, atol=1e-5)


def test_the_picture_shows_the_heat_where_it_is(tmp_path):
    """Of a wide picture on a grid of 4 × 4: red in the patch that has it all, blue far away."""
    heat = torch.zeros(16, dtype=torch.float64)
    heat[6] = 1                                           # second row, third column
    grey = np.full((3, 50, 100), 128, np.uint8)
    long = "a question that goes on and on " * 4 + "W" * 300
    ask.draw(tmp_path / "a.png", grey, long, [("one", "red", heat, 1.0), ("two", "", heat, 0.5)])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    wide, high = ask.PANEL, ask.PANEL // 2
    top = ask.GAP + ask.LINE
    panels = [sheet[top:top + high, x:x + wide].astype(int)
              for x in (ask.GAP + i * (wide + ask.GAP) for i in range(3))]
    assert (panels[0] == 128).all()
    for panel, reach in zip(panels[1:], (1.0, 0.5)):
        y, x = (panel[..., 0] > panel[..., 2]).nonzero()              # red, not blue
        middle = (y.mean() + 0.5) / high / reach * 4, (x.mean() + 0.5) / wide / reach * 4
        assert middle == pytest.approx((1.5, 2.5), abs=0.1)
        assert panel[0, 0, 2] > panel[0, 0, 0]
    assert (panels[2][high // 2 + 1:, wide // 2 + 1:] == 128).all()      # beyond the patches
    assert (sheet[:, -ask.GAP:] == 255).all() and (sheet[-2:] == 255).all()


def test_long_words_are_broken_and_nothing_is_lost():
    pen, font = ask.ImageDraw.Draw(Image.new("RGB", (9, 9))), ask.ImageFont.load_default(14)
    text = "runs/" + "W" * 90 + "/dpo is a folder " + "with words in it " * 9
    found = ask.wrapped(pen, text, font, ask.PANEL)
    assert "".join(found).replace(" ", "") == text.replace(" ", "") and found[-1].endswith("it")
    assert all(0 < pen.textlength(line, font) <= ask.PANEL for line in found)
    assert ask.wrapped(pen, "", font, ask.PANEL) == [""]


@pytest.mark.parametrize("words, match", [
    ("RUN/wild PHOTO", "2 of at least three words; the words are FOLDER"),
    ("RUN/wild RUN/wild PHOTO", "there is no picture .*run/wild; the words are"),
    ("RUN/wild PHOTO _", "the question is empty"),
    ("RUN/wild PHOTO What colour", "there is no picture What; the words are"),
    ("RUN/wild none.jpg Q", "there is no picture none.jpg"),
    ("RUN/wild RUN/wild/config.json Q", "image .*config.json cannot be read"),
    ("nowhere PHOTO Q", "nowhere does not exist, a model's folder is wanted"),
    ("PHOTO PHOTO Q", "0.jpg is a file, a model's folder is wanted"),
    ("RUN PHOTO Q", "run holds no model .*; there are .*run/wild"),
    ("RUN/wild/bench PHOTO Q", "bench holds no model that a training stage"),
    ("RUN/wild weights/toy-vit PHOTO Q", "toy-vit is a siglip_vision_model, not a model that"),
    ("RUN/wild PHOTO Q --heat nowhere/x.png", "there is no folder nowhere; make it first"),
    ("RUN/wild PHOTO Q --heat x.jpg", "a PNG is written; let its name end in .png"),
    ("RUN/wild PHOTO Q --heat OLD", "old.png exists already; --overwrite replaces it"),
    ("RUN/wild OLD Q --heat OLD --overwrite", "old.png is the picture asked about"),
    ("RUN/wild PHOTO Q --max-new-tokens 0", "--max-new-tokens: 0 must be at least 1"),
    ("RUN/wild PHOTO Q --hot x", "unrecognized arguments: --hot"),
])
def test_one_clear_line_before_a_model_is_loaded(asked, tmp_path, monkeypatch, words, match):
    def loaded(*_):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(ask.repair_eval, "open_for_answers", loaded)
    folder, photos, _ = asked
    old = tmp_path / "old.png"
    Image.new("RGB", (9, 9)).save(old)
    before = old.read_bytes()
    words = [{"_": " ", "PHOTO": photos[0], "OLD": old}.get(x, x.replace("RUN", f"{folder}/run"))
             for x in words.split()]
    refuses(ask, *words, match=match)
    assert old.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["old.png"]


def test_a_question_with_an_image_token_is_refused(asked):
    folder, photos, _ = asked
    refuses(ask, folder / "run/wild", photos[0], "What is <image>?", match="holds <image>")


def test_an_older_picture_is_replaced_where_the_command_says_so(asked, tmp_path, capsys,
                                                                 monkeypatch):
    folder, photos, _ = asked
    monkeypatch.setattr(ask, "ask", lambda *_: ("yes", torch.arange(9.0), 1.0))
    old = tmp_path / "old.png"
    Image.new("RGB", (9, 9)).save(old)
    call(ask, capsys, folder / "run/wild", photos[0], ASKED[0], "--heat", old, "--overwrite")
    assert Image.open(old).size[0] == 2 * (ask.PANEL + ask.GAP) + ask.GAP


def test_the_measurement_of_heat_on_objects():
    """benchmarks/heat_on_object.py: heat on the object alone is 1, spread evenly it is chance; a
    random peak is at chance, too. The box is the asked object's."""
    rng = random.Random(0)
    hits = []
    for _, question, right, box, others in heat_on_object.questions(20, seed=3):
        rows, columns = box.any(1).nonzero()[0], box.any(0).nonzero()[0]
        assert box.sum() == len(rows) * len(columns) and not (box & others).any() and others.any()
        inside = ask.gradcam.coverage(box, 6, 1.0)
        peak, chance, share, area = heat_on_object.peak_and_heat(inside ** 3, box)
        assert peak == 1 and share > 4 * area and area == pytest.approx(box.mean())
        even = heat_on_object.peak_and_heat(torch.ones(36, dtype=torch.float64), box)
        assert even[2] == pytest.approx(area)
        for _ in range(200):
            heat = torch.tensor([rng.random() for _ in range(36)], dtype=torch.float64)
            peak, chance, *_ = heat_on_object.peak_and_heat(heat, box)
            hits.append(float(peak - chance))
    assert abs(np.mean(hits)) < 4 * np.std(hits) / len(hits) ** 0.5
