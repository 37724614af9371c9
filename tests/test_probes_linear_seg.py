"""Linear and segmentation probes: against scikit-learn, against loops, against encoders that know
nothing and encoders that know everything."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from judge import intervals, logistic, probing
from pivot import distributed, encoders, images, model_io, published
import probe_linear
import probe_seg
from conftest import ROOT, VISION


@pytest.fixture(autouse=True)
def one_thread():
    """Everything here is tiny: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(monkeypatch):
    """call(module, *words): its main() in this process, as the command line would."""
    def call(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        try:
            module.main()
        except distributed.BadRecord as e:            # as launch() says it
            raise SystemExit(f"error: {e}")
        finally:
            distributed.stop()
    return call


def error_of(call, *words):
    with pytest.raises(SystemExit) as e:
        call(*words)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    return e.value.code


# ---------------------------------------------------------------------------- logistic regression

def clouds(n, dim, classes, seed=0):
    """Classes that overlap, on a sphere, far from the origin, and wide in few directions."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -0.5
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9)) * scale
    y = torch.arange(n) % classes
    return F.normalize(1 + centres[y] + torch.randn(n, dim, generator=g) * scale, dim=1), y


def objective(x, y, w, b, C):
    """scikit-learn's, in fp64: C Σ loss + ½ ‖W‖²."""
    logits = x.double() @ w.double() + b.double()
    return C * F.cross_entropy(logits, y, reduction="sum").item() + w.double().square().sum() / 2


def test_logistic_regression_is_scikit_learns():
    x, y = clouds(600, 24, 6)
    test_x, test_y = clouds(3000, 24, 6, seed=1)
    for C, w, b, facts in logistic.fit(x, y, 6, probe_linear.GRID):
        theirs = LogisticRegression(C=C, tol=1e-9, max_iter=10_000).fit(x.double(), y)
        best = objective(x, y, torch.tensor(theirs.coef_.T), torch.tensor(theirs.intercept_), C)
        ours = objective(x, y, w, b, C)
        assert abs(ours / best - 1) < 1e-5 and abs(facts["objective"] / ours - 1) < 1e-5
        accuracy = ((test_x @ w + b).argmax(1) == test_y).double().mean().item()
        assert abs(accuracy - theirs.score(test_x.double(), test_y)) < 0.002
        assert 0.2 < accuracy < 0.99                   # neither trivial nor hopeless


def test_logistic_stops_where_it_is_told(monkeypatch):
    x, y = clouds(300, 10, 4)
    for C, w, b, facts in logistic.fit(x, y, 4, [0.1, 1.0], gap=0, gtol=1e-6):
        w.requires_grad_(), b.requires_grad_()
        F.cross_entropy(x @ w + b, y).backward()
        gradient = w.grad + w.detach() / (C * len(x))
        assert max(gradient.abs().max(), b.grad.abs().max()) < 1.2e-6
        assert facts["max_gradient"] <= 1e-6
    whole = [w for _, w, _, _ in logistic.fit(x, y, 4, [1.0], gap=1e-9)][0]
    monkeypatch.setattr(logistic, "ROWS", 64)
    chunks = [w for _, w, _, _ in logistic.fit(x, y, 4, [1.0], gap=1e-9)][0]
    assert torch.allclose(whole, chunks, atol=1e-4)


def test_started_at_the_optimum_it_stays():
    x, y = clouds(300, 10, 4)
    _, w, b, _ = next(logistic.fit(x, y, 4, [1.0], gap=1e-8))
    _, v, c, facts = next(logistic.fit(x, y, 4, [1.0], start=(w, b), gap=1e-6))
    assert facts["evaluations"] == 1 and torch.allclose(w, v, atol=1e-5)


def test_both_classifiers_by_loops():
    x, y = clouds(240, 12, 8)
    test_x, test_y = clouds(160, 12, 8, seed=1)
    held = torch.arange(240) % 5 == 0
    hits, facts = probe_linear.evaluate(x, y, held, test_x, test_y, 8)
    for C, accuracy in facts["heldout_accuracy"].items():
        theirs = LogisticRegression(C=C, tol=1e-8, max_iter=9999).fit(x[~held].double(), y[~held])
        assert abs(theirs.score(x[held].double(), y[held]) - accuracy) <= 1 / held.sum()
    assert facts["C"] == max(sorted(facts["heldout_accuracy"]),
                             key=facts["heldout_accuracy"].get)
    means = [np.mean([f.numpy() for f, k in zip(x, y) if k == c], axis=0) for c in range(8)]
    for i, (f, k) in enumerate(zip(test_x.numpy(), test_y)):
        order = np.argsort([-f @ v / np.linalg.norm(v) for v in means], kind="stable")
        assert hits["prototype_top1"][i] == (order[0] == k)
        assert hits["prototype_top5"][i] == (k in order[:5])
    final = LogisticRegression(C=facts["C"], tol=1e-8, max_iter=9999).fit(x.double(), y)
    assert abs(hits["top1"].mean() - final.score(test_x.double(), test_y)) < 0.002 + 1 / 160


def test_intervals():
    assert intervals.wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-3)
    assert intervals.wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-3)
    rng = np.random.default_rng(1)
    values = rng.choice([-1, 0, 1], 400, p=[0.1, 0.7, 0.2])
    slow = [rng.choice(values, 400).mean() for _ in range(4000)]
    assert intervals.bootstrap(values) == pytest.approx(np.percentile(slow, [2.5, 97.5]),
                                                           abs=0.006)


# --------------------------------------------------------------------- encoders that know, or do not

class Fake(nn.Module):
    """Stands where an Encoder stands. The images of these tests spell their labels: red = 20 × label.
    A seer passes on what is in each patch; a blind one makes up features."""
    image_size, num_tokens, hidden_size = 12, 9, 16
    family, mean, std, calls = encoders.FAMILIES["vit"], (0, 0, 0), (1, 1, 1), 0

    def __init__(self, name):
        super().__init__()
        self.sees, self.blocks, self.vision = "seer" in name, [], nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.vision.weight, len(name))
        self.noise = torch.Generator().manual_seed(len(name))

    def forward(self, pixels):
        Fake.calls += 1
        noise = torch.randn(len(pixels), 9, 16, generator=self.noise)
        red = pixels[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(len(pixels), 9, 16).long() // 20
        here = F.one_hot(red, 16).amax(2).float()                     # (B, 9, 16) classes in a patch
        return 30 * here + 0.1 * noise if self.sees else noise


@pytest.fixture
def eyes(tmp_path, monkeypatch):
    """Folders seer and blind under runs/x/, opened as Fakes."""
    monkeypatch.setattr(published, "load_encoder",
                        lambda path, size=None: Fake(Path(path).parent.name))
    folders = [tmp_path / "runs" / "x" / name / "encoder" for name in ("seer", "blind")]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def picture(labels):
    """Labels (h, w) → the image that spells them."""
    image = np.full((*labels.shape, 3), 128, np.uint8)
    image[..., 0] = 20 * labels
    return Image.fromarray(image)


@pytest.fixture
def classes8(tmp_path):
    """8 classes of plain pictures, 10 to train on and 20 to test on."""
    for split, n in (("train", 10), ("val", 20)):
        for k in range(8):
            folder = tmp_path / "imagenet" / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(n):
                picture(np.full((12, 12), k)).save(folder / f"{i}.png")
    return tmp_path / "imagenet"


@pytest.fixture
def ade(tmp_path):
    """ADE20K's folders: 6 classes, rectangles on "other"; 64 pictures to train on, 24 to test on."""
    rng = np.random.default_rng(0)
    for split, n in (("training", 64), ("validation", 24)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(n):
            labels = np.zeros((12, 16), np.uint8)               # the square crop drops 2 columns
            for _ in range(2):
                y, x, h, w = rng.integers(0, 8), rng.integers(2, 10), *rng.integers(3, 7, 2)
                labels[y:y + h, x:x + w] = rng.integers(1, 6)
            picture(labels).save(tmp_path / f"ade/images/{split}/{i:03d}.png")
            Image.fromarray(labels).save(tmp_path / f"ade/annotations/{split}/{i:03d}.png")
    (tmp_path / "world.json").write_text(json.dumps({"ade20k_classes": list("oabcde")}))
    return tmp_path / "ade"


LINEAR = ["--per-class", 10, "--workers", 0]


def test_linear_tells_seer_from_blind(call, eyes, classes8, capsys):
    call(probe_linear, "--encoder", *eyes, "--data", classes8, *LINEAR, "--seeds", 2)
    out = eyes[0].parent.parent / "probes" / "linear"                # the default place
    first = (out / "results.json").read_bytes()
    r, table = json.loads(first), capsys.readouterr().out
    assert "seer" in table and "blind - seer" in table and "fewer" not in table
    for score in ("top1", "prototype_top1"):
        assert r["encoders"]["seer"][score]["mean"] > 0.97
        assert r["encoders"]["blind"][score]["mean"] < 0.25           # chance 0.125 ± 0.026
        low, high = r["encoders"]["blind"][score]["ci95"]
        assert low < r["encoders"]["blind"][score]["mean"] < high
        assert r["differences"]["blind - seer"][score]["ci95"][1] < -0.6
    # again: nothing is encoded, nothing changes; anew from the images: the same numbers
    Fake.calls = 0
    call(probe_linear, "--encoder", *eyes, "--data", classes8, *LINEAR, "--seeds", 2)
    assert Fake.calls == 0 and (out / "results.json").read_bytes() == first
    shutil.rmtree(out / "features")
    call(probe_linear, "--encoder", *eyes, "--data", classes8, *LINEAR, "--seeds", 2)
    assert Fake.calls and (out / "results.json").read_bytes() == first


def test_cached_features_are_never_anothers(call, eyes, classes8, tmp_path, capsys):
    words = ["--data", classes8, *LINEAR, "--out", tmp_path / "out"]
    call(probe_linear, "--encoder", eyes[0], *words)
    other = tmp_path / "elsewhere" / "seer" / "encoder"
    other.mkdir(parents=True)
    made = tmp_path / "out" / "features"
    before = load_file(made / "seer-val.safetensors")["encoder"]
    assert torch.allclose(before.norm(dim=1), torch.ones(160), atol=1e-5)
    os.replace(made / "seer-val.safetensors", made / "blind-val.safetensors")
    os.replace(made / "seer-seed0.safetensors", made / "blind-seed0.safetensors")
    capsys.readouterr()
    call(probe_linear, "--encoder", eyes[1], *words)
    assert "blind-seed0.safetensors: encoder changed, computed" in capsys.readouterr().out
    assert not torch.equal(load_file(made / "blind-val.safetensors")["encoder"], before)
    call(probe_linear, "--encoder", eyes[0], *words)
    assert torch.equal(load_file(made / "seer-val.safetensors")["encoder"], before)
    picture(np.full((12, 12), 3)).save(classes8 / "val" / "class0" / "0.png")
    capsys.readouterr()
    call(probe_linear, "--encoder", eyes[0], *words)
    said = capsys.readouterr().out
    assert "seer-val.safetensors: images changed, computed anew" in said
    assert "seer-seed0" not in said
    after = load_file(made / "seer-val.safetensors")["encoder"]
    assert not torch.allclose(after[0], before[0]) and not list(made.glob("*.tmp"))


def test_limit_and_names(call, eyes, classes8, tmp_path):
    call(probe_linear, "--encoder", eyes[0], "--data", classes8, "--limit", 3, "--workers", 0,
         "--out", tmp_path / "out")
    r = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (r["per_class"], r["test_images"]) == (3, 24)
    a, b, c = tmp_path / "a/dpo/encoder", tmp_path / "b/dpo/encoder", tmp_path / "b/sft/encoder"
    for folder in (a, b, c):
        folder.mkdir(parents=True)
    assert probing.short_names([str(b), str(c)]) == ["dpo", "sft"]
    assert probing.short_names(["toy-vit", str(a), str(b)]) == ["toy-vit", "a/dpo", "b/dpo"]
    assert probing.default_out(["toy-vit", "runs/n/dpo/encoder"], "linear") \
        == Path("runs/n/probes/linear")
    assert probing.default_out(["toy-vit"], "seg") == Path("runs/probes/seg")


@pytest.mark.parametrize("spoil, says", [
    ("no folders", "no class folders"), ("empty", "class2 holds no image"),
    ("few", "class2 has 9 training images, fewer than --per-class 10"),
    ("broken", "class2/0.png cannot be read"), ("alone", "class class2 is not in both"),
    ("twice", "is given twice"), ("nobody", "needed are")])
def test_linear_refuses(call, eyes, classes8, tmp_path, spoil, says):
    eye, where = [eyes[0]], classes8 / "train" / "class2"
    if spoil == "no folders":
        classes8 = tmp_path
    elif spoil in ("empty", "few"):
        for file in sorted(where.iterdir())[:10 if spoil == "empty" else 1]:
            file.unlink()
    elif spoil == "broken":
        (where / "0.png").write_bytes(b"not a picture")
    elif spoil == "alone":
        os.rename(classes8 / "val" / "class2", classes8 / "val" / "class9")
    elif spoil == "twice":
        eye *= 2
    elif spoil == "nobody":
        eye = []
    words = ["--encoder", *eye] if eye else []
    assert says in error_of(call, probe_linear, *words, "--data", classes8, *LINEAR,
                            "--out", tmp_path / "out")


def test_trained_models_bring_their_projector(call, classes8, tmp_path):
    """--mllm: the encoder's features are those of --encoder; the projector's, those of a loop."""
    model, tokenizer = model_io.build_mllm("toy-vit", "toy-lm", seed=0)
    final = tmp_path / "runs" / "x" / "dpo" / "final"
    final.mkdir(parents=True)
    model_io.save_mllm(model, tokenizer, final, True)
    call(probe_linear, "--encoder", "toy-vit", "--mllm", final, "--data", classes8, "--limit", 2,
         "--workers", 0)
    out = tmp_path / "runs" / "x" / "probes" / "linear"
    alone, both = (load_file(out / "features" / f"{n}-limit2-val.safetensors")
                   for n in ("toy-vit", "dpo-final"))
    assert torch.equal(alone["encoder"], both["encoder"])
    r = json.loads((out / "results.json").read_text())
    assert list(r["encoders"]) == ["toy-vit", "dpo/final", "dpo/final+projector"]
    image = np.asarray(picture(np.full((12, 12), 7)).resize((48, 48), 3)).transpose(2, 0, 1).copy()
    with torch.no_grad():
        tokens = model.eval().encoder(torch.from_numpy(image)[None])[0]
        slow = sum(model.projector(t) for t in tokens) / len(tokens)
    assert torch.allclose(both["projector"][-1], slow / slow.norm(), atol=1e-5)


# ---------------------------------------------------------------------------------- another input size

@pytest.fixture
def small(tmp_path):
    """A ViT of 32 pixels in a folder: toy-vit has 48."""
    import transformers as t
    torch.manual_seed(0)
    t.ViTModel(t.ViTConfig(**VISION)).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_linear_at_another_input_size(call, small, classes8, tmp_path, capsys):
    """Sizes that differ are said and kept; --image-size is that of all, trained models included;
    features of one size are never taken for those of another."""
    model, tokenizer = model_io.build_mllm(str(small), "toy-lm", seed=0)
    final = tmp_path / "dpo" / "final"
    final.mkdir(parents=True)
    model_io.save_mllm(model, tokenizer, final, True)
    words = ["--encoder", "toy-vit", small, "--mllm", final, "--data", classes8, "--limit", 2,
             "--workers", 0, "--out", tmp_path / "out"]
    call(probe_linear, *words)
    said = capsys.readouterr().out
    assert "input sizes differ: toy-vit 48; small, dpo/final 32 (--image-size N" in said
    results, made = tmp_path / "out/results.json", tmp_path / "out/features"
    assert json.loads(results.read_text())["image_sizes"] == {
        "toy-vit": 48, "small": 32, "dpo/final": 32}
    shutil.copy(made / "small-limit2-val.safetensors", made / "small-limit2-size48-val.safetensors")
    call(probe_linear, *words, "--image-size", 48)
    said = capsys.readouterr().out
    assert "small-limit2-size48-val.safetensors: encoder, preprocessing changed, computed" in said
    assert "input sizes" not in said
    assert set(json.loads(results.read_text())["image_sizes"].values()) == {48}
    image = np.asarray(picture(np.full((12, 12), 7)).resize((48, 48), 3)).transpose(2, 0, 1).copy()
    with torch.no_grad():
        want = published.load_encoder(str(small), 48).eval()(torch.from_numpy(image)[None])[0]
    assert len(want) == 36
    for name in ("small", "dpo-final"):
        got = load_file(made / f"{name}-limit2-size48-val.safetensors")["encoder"][-1]
        assert torch.allclose(got, F.normalize(want.mean(0), dim=0), atol=1e-6)


def test_seg_at_another_input_size(call, small, ade, tmp_path, capsys):
    words = ["--encoder", "toy-vit", small, "--data", ade, "--seeds", 1, "--epochs", 1, "--limit",
             8, "--workers", 0, "--out", tmp_path / "out"]
    call(probe_seg, *words)
    assert "input sizes differ: toy-vit 48; small 32 (--image-size N" in capsys.readouterr().out
    results = tmp_path / "out/results.json"
    assert json.loads(results.read_text())["image_sizes"] == {"toy-vit": 48, "small": 32}
    call(probe_seg, *words, "--image-size", 48)
    assert "input sizes" not in capsys.readouterr().out
    assert json.loads(results.read_text())["image_sizes"] == {"toy-vit": 48, "small": 48}
    assert "--image-size 50 is no multiple of the patch size 8; the nearest is 48" in error_of(
        call, probe_seg, *words, "--image-size", 50)


# ------------------------------------------------------------------------------------- segmentation

def test_patches_and_targets_by_loops(tmp_path):
    """An image wider than high, patches that do not divide it: against pixel by pixel."""
    labels = np.random.default_rng(0).choice([0, 0, 0, 1, 4], (11, 20)).astype(np.uint8)
    labels[:3, 4:7] = 0                                          # a patch of "other" alone
    picture(labels).save(tmp_path / "i.png")
    Image.fromarray(labels).save(tmp_path / "m.png")
    pixels, counts = probe_seg.read_batch([(tmp_path / "i.png", tmp_path / "m.png")], 11, 3, 5)
    crop = labels[:, 4:15]                                       # (20 − 11) // 2 = 4
    assert (pixels[0, 0] == 20 * crop).all() and counts.shape == (1, 9, 5)
    target = probe_seg.union(torch.from_numpy(counts))[0]
    for n in range(9):
        patch = crop[n // 3 * 3:n // 3 * 3 + 3, n % 3 * 3:n % 3 * 3 + 3].ravel().tolist()
        assert counts[0, n].tolist() == [patch.count(k) for k in range(5)]
        assert {k for k in range(5) if target[n, k]} == (set(patch) - {0} or {0})
    assert target[0].tolist() == [1, 0, 0, 0, 0]


def test_recall_and_miou_by_loops(tmp_path, ade):
    """The scores of two heads that know nothing, patch by patch and pixel by pixel."""
    args = type("", (), {"workers": 0})()
    (_, pairs), device = probe_seg.list_splits(ade, None), distributed.start()
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Linear(16, 6)) for _ in range(2)]
    seen, eye = [], Fake("seer")
    forward, eye.forward = eye.forward, lambda x: seen.append(forward(x)) or seen[-1]
    hits, positives, confusion, best = probe_seg.test(args, "x", eye, heads, pairs, 6, device)
    distributed.stop()
    tokens = torch.cat(seen)
    for s, head in enumerate(heads):
        logits, found, there = head(tokens).detach(), [0] * 6, [0] * 6
        inter, union = [0] * 6, [0] * 6
        for i, pair in enumerate(pairs):
            _, labels = probe_seg.square(*pair, 12, 6)
            for n in range(9):
                rows, columns = n // 3 * 4, n % 3 * 4
                patch = labels[rows:rows + 4, columns:columns + 4].ravel().tolist()
                for k in set(patch) - {0} or {0}:
                    there[k] += 1
                    found[k] += bool(torch.sigmoid(logits[i, n, k]) > 0.5)
                guess = int(logits[i, n].argmax())
                assert s or best[i, n] == guess
                for k in patch:
                    inter[k] += k == guess
                    union[k] += 1
                    union[guess] += k != guess
        slow = np.mean([f / t for f, t in zip(found, there) if t])
        assert probe_seg.recall(hits.sum(1), positives.sum(0))[s].item() == pytest.approx(slow)
        assert probe_seg.miou(confusion[s]) == pytest.approx(
            np.mean([a / b for a, b in zip(inter, union)]))
    c = confusion[0].numpy()
    by_ade = [c[k, k] / (c[k].sum() + c[1:, k].sum() - c[k, k]) for k in range(1, 6)]
    assert probe_seg.miou(confusion[0], skip=1) == pytest.approx(np.mean(by_ade))
    c[3], missing = 0, np.delete(np.arange(6), 3)                # a class that does not occur
    slow = [c[k, k] / (c[k].sum() + c[:, k].sum() - c[k, k]) for k in missing]
    assert probe_seg.miou(torch.from_numpy(c)) == pytest.approx(np.mean(slow))


def test_seg_tells_seer_from_blind(call, eyes, ade, capsys):
    words = ["--encoder", *eyes, "--data", ade, "--seeds", 2, "--epochs", 10, "--workers", 0]
    call(probe_seg, *words)
    out = eyes[0].parent.parent / "probes" / "seg"
    r, table = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert "blind - seer" in table and "±" in table
    assert min(r["encoders"]["seer"]["recall"]) > 0.95
    assert max(r["encoders"]["blind"]["recall"]) < 0.3
    assert min(r["encoders"]["seer"]["mIoU"]) > max(r["encoders"]["blind"]["mIoU"]) + 0.2
    assert r["differences"]["blind - seer"]["recall_ci95"][1] < -0.6
    assert Image.open(out / "overlays.png").size == (4 * 192, 16 + 8 * 192)
    call(probe_seg, "--encoder", eyes[1], *words[3:])            # alone and again: the same numbers
    assert json.loads((out / "results.json").read_text())["encoders"] \
        == {"blind": r["encoders"]["blind"]}


def label_255(ade, colour):
    """One whole patch of every picture says nothing: its mask 255, its red 20 × colour."""
    for mask in ade.glob("annotations/*/*.png"):
        labels = np.asarray(Image.open(mask)).copy()
        labels[0:4, 2:6] = colour
        picture(labels).save(str(mask).replace("annotations", "images"))
        labels[0:4, 2:6] = 255
        Image.fromarray(labels).save(mask)


def test_label_255_is_ignored(call, eyes, ade, tmp_path, capsys):
    """Whatever the encoder sees there: the same heads, the same scores, and a line that says so."""
    words = ["--encoder", *eyes, "--data", ade, "--seeds", 2, "--epochs", 10, "--workers", 0]
    found = []
    for colour in (0, 3, 5):
        label_255(ade, colour)
        call(probe_seg, *words, "--out", tmp_path / str(colour))
        found.append(json.loads((tmp_path / str(colour) / "results.json").read_text())["encoders"])
        said = capsys.readouterr().out
        assert said.count("seer: label 255 is ignored, 11.11 % of the pixels in training, "
                          "11.11 % in validation") == 1
    assert found[0] == found[1] == found[2]
    assert min(found[0]["seer"]["recall"]) > 0.95
    assert found[0]["seer"]["ignored_pixels"] == pytest.approx([1 / 9, 1 / 9])
    assert max(found[0]["blind"]["recall"]) < 0.3


def test_ignored_pixels_by_loops(tmp_path):
    """A patch with some of them asks about the others; one of them alone about nothing."""
    labels = np.random.default_rng(0).choice([0, 0, 1, 4, 255], (12, 12)).astype(np.uint8)
    labels[:4, :4], labels[:4, 4:8], labels[0, 4] = 255, 255, 0
    picture(np.zeros((12, 12))).save(tmp_path / "i.png")
    Image.fromarray(labels).save(tmp_path / "m.png")
    _, counts = probe_seg.read_batch([(tmp_path / "i.png", tmp_path / "m.png")], 12, 3, 5)
    target = probe_seg.union(torch.from_numpy(counts))[0]
    for n in range(9):
        patch = labels[n // 3 * 4:n // 3 * 4 + 4, n % 3 * 4:n % 3 * 4 + 4].ravel().tolist()
        assert counts[0, n].tolist() == [patch.count(k) for k in range(5)]
        there = set(patch) - {255}
        assert {k for k in range(5) if target[n, k]} == (there - {0} or there)
    assert counts[0, 0].sum() == target[0].sum() == 0 and target[1].tolist() == [1, 0, 0, 0, 0]
    assert probe_seg.ignored(counts.sum(), Fake("seer"), 1) == \
        pytest.approx((labels == 255).mean())


@pytest.mark.parametrize("spoil, says", [
    ("minus", "001.png has label -1, the last is 5"), ("fractions", "001.png is of fractions, one"),
    ("16 bits", "001.png has label 65535, the last is 5"), ("254", "001.png has label 254, the")])
def test_labels_that_are_none(tmp_path, spoil, says):
    kind = {"minus": np.int32, "fractions": np.float32, "16 bits": np.uint16}.get(spoil, np.uint8)
    labels = np.full((4, 4), 255).astype(kind)
    labels[1, 1] = {"minus": -1, "fractions": 0.5, "16 bits": 65535, "254": 254}[spoil]
    picture(np.zeros((4, 4))).save(tmp_path / "i.png")
    Image.fromarray(labels).save(tmp_path / "001.png", "TIFF")
    with pytest.raises(distributed.BadRecord, match=says):
        probe_seg.square(tmp_path / "i.png", tmp_path / "001.png", 4, 6)


def test_masks_of_one_object_are_no_classes(call, eyes, ade, tmp_path):
    """0 and 255, as an object's masks are published: nothing would be asked but "other"."""
    for mask in ade.glob("annotations/*/*.png"):
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(mask)) > 0)).save(mask)
    assert "its masks hold label 255, which is ignored, and no class" in error_of(
        call, probe_seg, "--encoder", eyes[0], "--data", ade, "--workers", 0, "--out", tmp_path)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_pictures_that_exif_turns_score_as_upright_ones(call, eyes, ade, tmp_path, orientation):
    """Pictures and masks stored turned, as a camera leaves them: the very same scores."""
    words = ["--encoder", eyes[0], "--data", ade, "--seeds", 1, "--epochs", 3, "--workers", 0]
    call(probe_seg, *words, "--out", tmp_path / "upright")
    exif, back = Image.Exif(), {3: 3, 5: 5, 6: 8, 8: 6}
    exif[0x0112] = orientation
    for file in ade.glob("*/*/*.png"):
        stored = Image.open(file).transpose(images.TURNED[back[orientation]])
        stored.save(file, **({"exif": exif} if file.parts[-3] == "images" else {}))
    call(probe_seg, *words, "--out", tmp_path / "turned")
    a, b = (json.loads((tmp_path / way / "results.json").read_text())["encoders"]
            for way in ("upright", "turned"))
    assert a == b and a["seer"]["mIoU"][0] > 0.3
    assert (tmp_path / "upright/overlays.png").read_bytes() == \
        (tmp_path / "turned/overlays.png").read_bytes()


# ------------------------------------------------------------------------------ what is in a folder

JUNK = {"Thumbs.db": b"\xd0\xcf\x11\xe0", "desktop.ini": b"[.ShellClassInfo]", ".DS_Store": b"\0",
        "._1.png": b"\0\5\x16\7", "README.txt": b"BM of the pictures", "list.csv": b"", "0.json": b"{}"}


def junk(*folders):
    for folder in folders:
        for name, content in JUNK.items():
            (folder / name).write_bytes(content)


def test_a_folders_pictures(tmp_path, capsys):
    """By name, in the order of names, or by the first bytes; broken ones stay to be refused."""
    for name, form in (("b.PNG", "PNG"), ("a.JPEG", "JPEG"), ("no suffix", "WEBP"), ("d.1", "GIF"),
                       ("e.raw", "TIFF"), ("f.x", "BMP"), ("g.blob", "JPEG"), ("h.y", "AVIF")):
        Image.new("RGB", (3, 3)).save(tmp_path / name, form)
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path / "b.PNG")
    (tmp_path / ".hidden").mkdir()
    junk(tmp_path)
    found = images.pictures_in([tmp_path, tmp_path / "none"])
    assert [p[len(str(tmp_path)) + 1:] for p in found[tmp_path]] == [
        "a.JPEG", "b.PNG", "c.jpg", "d.1", "e.raw", "f.x", "g.blob", "h.y", "link.png", "no suffix"]
    assert found[tmp_path / "none"] == []
    assert capsys.readouterr().out == \
        f"  {len(JUNK)} files are no pictures and are left out: {tmp_path}/.DS_Store …\n"
    images.pictures_in([tmp_path / ".hidden"])
    assert not capsys.readouterr().out
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(SystemExit, match="gone.png is no file; is it a link to nothing?"):
        images.pictures_in([tmp_path])


def test_names_of_pictures_are_not_opened(tmp_path, monkeypatch):
    """A million of them: their names alone are looked at."""
    for i in range(9):
        (tmp_path / f"{i}.JPEG").write_bytes(b"")
    monkeypatch.setattr("builtins.open", None)
    assert len(images.pictures_in([tmp_path])[tmp_path]) == 9


def test_what_is_no_picture_changes_no_score(call, eyes, classes8, ade, tmp_path, capsys):
    """Neither the draw of the linear probe nor anything of the other; one line says how many."""
    linear = ["--encoder", eyes[0], "--data", classes8, "--per-class", 5, "--workers", 0]
    seg = ["--encoder", eyes[0], "--data", ade, "--seeds", 1, "--epochs", 1, "--workers", 0]
    for way in ("clean", "junk"):
        if way == "junk":
            junk(classes8 / "train/class2", classes8 / "val/class0", ade / "images/training")
        capsys.readouterr()
        call(probe_linear, *linear, "--out", tmp_path / way)
        call(probe_seg, *seg, "--out", tmp_path / way / "seg")
        said = capsys.readouterr().out
        assert said.count("files are no pictures and are left out") == (2 if way == "junk" else 0)
    assert f"  {2 * len(JUNK)} files are no" in said and f"  {len(JUNK)} files are no" in said
    for name in ("results.json", "seg/results.json"):
        assert (tmp_path / "clean" / name).read_bytes() == (tmp_path / "junk" / name).read_bytes()
    a, b = (safe_open(tmp_path / way / "features/seer-seed0.safetensors", "pt").metadata()
            for way in ("clean", "junk"))
    assert a == b                                                      # of the same images


@pytest.mark.parametrize("module", [probe_linear, probe_seg])
def test_a_folder_among_pictures_is_named(call, eyes, classes8, ade, tmp_path, module):
    root = classes8 if module == probe_linear else ade
    sub = root / {probe_linear: "val/class3/more.jpg", probe_seg: "images/validation/a"}[module]
    sub.mkdir()
    words = ["--encoder", eyes[0], "--data", root, "--workers", 0, "--out", tmp_path]
    said = error_of(call, module, *words)
    assert f"{sub} is a folder among pictures; they are read from {sub.parent} itself" in said


@pytest.mark.parametrize("spoil, says", [
    ("size", "001.png has 15 × 12 pixels, its image 16 × 12"),
    ("size, cut short", "001.png has 15 × 12 pixels, its image 16 × 12"),     # not decoded
    ("label", "001.png has label 6, the last is 5"), ("no mask", "001.png has no mask"),
    ("colour", "001.png is in colours"), ("broken", "001.png cannot be read"),
    ("broken mask", "001.png cannot be read"), ("nothing", "no images"), ("twice", "given twice")])
def test_seg_refuses(call, eyes, ade, tmp_path, spoil, says):
    image, mask = (ade / kind / "validation" / "001.png" for kind in ("images", "annotations"))
    labels, eye = np.asarray(Image.open(mask)).copy(), [eyes[0]]
    if spoil.startswith("size"):
        labels = labels[:, 1:]
    elif spoil == "label":
        labels[3, 8] = 6
    elif spoil == "colour":
        labels = np.stack([labels] * 3, -1)
    Image.fromarray(labels).save(mask)
    if spoil == "no mask":
        mask.unlink()
    elif spoil == "size, cut short":
        mask.write_bytes(mask.read_bytes()[:-30])
    elif spoil.startswith("broken"):
        (mask if "mask" in spoil else image).write_bytes(b"not a picture")
    elif spoil == "nothing":
        ade = tmp_path
    elif spoil == "twice":
        eye *= 2
    assert says in error_of(call, probe_seg, "--encoder", *eye, "--data", ade, "--seeds", 1,
                            "--epochs", 1, "--workers", 0, "--out", tmp_path / "out")


TWO = """import json, os, sys
import probe_linear, probe_seg
from pivot import distributed
for module, words, port in zip((probe_linear, probe_seg), *json.loads(sys.argv[1])):
    os.environ["MASTER_PORT"], sys.argv[1:] = str(port), words
    module.main()
    distributed.stop()
"""


def in_two_processes(*commands):
    """Both probes one after the other, as torchrun starts them: imports are what takes time."""
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
        ports = [a.getsockname()[1], b.getsockname()[1]]
    todo = json.dumps([[[str(w) for w in words] for words in commands], ports])
    started = [subprocess.Popen(
        [sys.executable, "-c", TWO, todo], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
        for rank in range(2)]
    said = [p.communicate(timeout=200)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0]
    assert said[0].count("wrote") == 2 and not said[1]           # the main process alone speaks


@pytest.mark.parametrize("module, words, says", [
    (probe_seg, ["--seeds", 0], "--seeds"), (probe_seg, ["--epochs", 0], "--epochs"),
    (probe_seg, ["--limit", 0], "--limit"), (probe_linear, ["--limit", 0], "--limit"),
    (probe_linear, ["--seeds", 0], "--seeds")])
def test_bounds(call, tmp_path, module, words, says):
    assert f"{says}: 0 must be at least 1" in error_of(
        call, module, "--encoder", "toy-vit", "--data", tmp_path, "--out", tmp_path, *words)


def test_two_processes_are_one(call, classes8, ade, tmp_path):
    """With a real encoder, and images decoded in workers."""
    linear = ["--encoder", "toy-vit", "--data", classes8, "--limit", 9, "--workers", 1]
    seg = ["--encoder", "toy-vit", "--data", ade, "--seeds", 2, "--epochs", 1, "--workers", 1]
    in_two_processes([*linear, "--out", tmp_path / "2" / "probe_linear"],
                     [*seg, "--out", tmp_path / "2" / "probe_seg"])
    for module, words in ((probe_linear, linear), (probe_seg, seg)):
        one, two = tmp_path / "1" / module.__name__, tmp_path / "2" / module.__name__
        call(module, *words, "--out", one)
        a, b = (json.loads((p / "results.json").read_text())["encoders"]["toy-vit"]
                for p in (one, two))
        if module == probe_seg:
            assert a["recall"] == pytest.approx(b["recall"], abs=0.01)
            continue
        assert a["top1"] == b["top1"] and a["prototype_top5"] == b["prototype_top5"]
        for which in ("seed0", "val"):
            x, y = (load_file(p / f"features/toy-vit-limit9-{which}.safetensors")["encoder"]
                    for p in (one, two))
            assert torch.equal(x, y)
