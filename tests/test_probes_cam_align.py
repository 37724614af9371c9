"""Grad-CAM and alignment against slow definitions, on models small enough for fp64."""
import json
import re
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
from judge import intervals, probing
from pivot import distributed, encoders, images, published, records
import gradcam
import probe_align
import model as m
from conftest import copied, tiny_model
from test_encoders import write_checkpoint


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for a second thread, on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(module, capsys, *argv):
    """main() in this process, as launch() runs it: → what it printed; raises its SystemExit."""
    old, sys.argv = sys.argv, [module.__name__, *map(str, argv)]
    try:
        module.main()
    except distributed.BadRecord as e:
        raise SystemExit(f"error: {e}")
    finally:
        sys.argv = old
        distributed.stop()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return capsys.readouterr().out


def refuses(module, *argv, match):
    with pytest.raises(SystemExit, match=match) as e:
        call(module, None, *argv)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------- Grad-CAM

N, BETA = 16, 0.1          # tiny_model: 4 × 4 patches


def batches(seed=0, chosen=(5, 6, 7), rejected=(8, 9)):
    """One pair in both layouts, for tiny_model."""
    rng = np.random.default_rng(seed)
    prompt = np.array([1] + [63] * N + [2, 3])
    ids = np.concatenate([prompt, chosen, rejected]).astype(np.int64)
    roles = np.repeat([records.PROMPT, records.ANSWER, records.OTHER],
                      [len(prompt), len(chosen), len(rejected)])
    pair = {"index": 0, "ids": ids, "roles": roles,
            "pixels": rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)}
    out = [data.collate([pair], layout) for layout in ("answers", "pair")]
    for batch in out:
        batch.pop("index", None)
    return out


def rows_batch():
    """The same pair in layout "rows"."""
    rng = np.random.default_rng(0)
    prompt = np.array([1] + [63] * N + [2, 3])
    ids = np.concatenate([prompt, (5, 6, 7), (8, 9)]).astype(np.int64)
    roles = np.repeat([records.PROMPT, records.ANSWER, records.OTHER], [len(prompt), 3, 2])
    batch = data.collate([{"index": 0, "ids": ids, "roles": roles, "pixels": rng.integers(
        0, 256, (3, 32, 32), dtype=np.uint8)}], "rows")
    batch.pop("index")
    return batch


def losses(model, ref=None):
    sft, dpo = batches()
    if ref is None:
        with torch.no_grad():
            ref = m.answer_logps(model(**dpo), dpo["branch"])
    return {"sft": partial(gradcam.sft_loss, model, sft),
            "dpo": partial(gradcam.dpo_loss, model, dpo, ref, BETA)}


@pytest.fixture
def fp64(monkeypatch):
    """RMSNorm in its input's dtype: transformers casts to fp32, and rounding there is 1 % of so
    small a step."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    monkeypatch.setattr(Qwen2RMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("vision", ["siglip", "dinov2"])
@pytest.mark.parametrize("at", ["encoder", "projector"])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_gradients_are_the_finite_differences(fp64, loss, at, vision):
    model = tiny_model(vision, dtype=torch.float64)
    ref = [torch.tensor([-3.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)]
    loss_of = losses(model, ref)[loss]                    # a reference that is not the model
    features, grad, value = gradcam.gradients(model, loss_of, at)
    assert features.shape == grad.shape == (N, 32) and all(p.grad is None for p in
                                                           model.parameters())
    rng, eps = np.random.default_rng(1), 1e-5
    for token, channel in [*zip(rng.integers(0, N, 12), rng.integers(0, 32, 12))]:
        moved = []
        for sign in (1, -1):
            def shift(module, inputs, out):
                out = out.clone()
                out[0, token, channel] += sign * eps
                return out
            hook = getattr(model, at).register_forward_hook(shift)
            with torch.no_grad():
                moved.append(loss_of().item())
            hook.remove()
        slope = (moved[0] - moved[1]) / (2 * eps)
        assert abs(slope - grad[token, channel].item()) < 1e-8 + 1e-6 * abs(slope)
    assert value.item() == pytest.approx(loss_of().item(), abs=1e-12)


def test_dpo_at_step_0_is_half_beta_of_the_difference(fp64):
    model = tiny_model(dtype=torch.float64)
    _, dpo = batches()
    grads = [gradcam.gradients(model, lambda b=b: m.answer_logps(
        model(**dpo), dpo["branch"])[b].sum(), "encoder")[1] for b in (0, 1)]
    _, grad, loss = gradcam.gradients(model, losses(model)["dpo"], "encoder")
    torch.testing.assert_close(grad, BETA / 2 * (grads[1] - grads[0]), rtol=1e-9, atol=1e-15)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-12)


def test_heat_against_a_loop():
    rng = np.random.default_rng(0)
    A, G = rng.normal(size=(2, 5, 3))
    heat = gradcam.heat_of(torch.tensor(A), torch.tensor(G)).tolist()
    assert heat == pytest.approx([sum(abs(g) for g in row) for row in G])
    weights = [-sum(G[t][d] for t in range(5)) / 5 for d in range(3)]
    slow = [max(0.0, sum(A[t][d] * weights[d] for d in range(3))) for t in range(5)]
    classic = gradcam.heat_of(torch.tensor(A), torch.tensor(G), classic=True).tolist()
    assert classic == pytest.approx(slow) and 0 < sum(c > 0 for c in classic)


@pytest.mark.parametrize("layout", ["pair", "rows"])
@pytest.mark.parametrize("vision", ["siglip", "dinov2"])
def test_the_way_of_a_gradient(fp64, vision, layout, monkeypatch):
    """Station by station what a plain backward() leaves in .grad: of the whole loss, as the stage
    descends it, and of each token's own share, whose gradients sum to the whole."""
    model = tiny_model(vision, dtype=torch.float64)
    batch = batches()[1] if layout == "pair" else rows_batch()
    ref = [torch.tensor([-3.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)]
    kept = []
    model.llm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["inputs_embeds"]), with_kwargs=True)

    def backward(loss_of):
        """→ the gradients of every station, as one vector each."""
        model.zero_grad()
        kept.clear()
        loss = loss_of(model(**batch))
        kept[0].retain_grad()
        loss.backward()
        named = dict(model.named_parameters())
        blocks = "encoder.vision.encoder.layer" + ("s" if vision == "siglip" else "")
        count = len(model.encoder.blocks)
        parts = ["projector.", *(f"{blocks}.{i}." for i in reversed(range(count))), "patch_emb"]
        image = kept[0].grad[batch["input_ids"] == 63].view(-1, N, 32).sum(0)    # in "rows" twice
        return [image.flatten(), *(torch.cat([p.grad.flatten() for name, p in named.items()
                                              if part in name and p.grad is not None])
                                   for part in parts)]

    def loss_of(logps):
        return gradcam.dpo_loss(lambda **_: logps, batch, ref, BETA)
    tokenizer = type("Tokenizer", (), {"decode": staticmethod(str)})
    way = gradcam.path_of(model, batch, loss_of, tokenizer)
    assert [name for name, _ in gradcam.stations(model)] == \
        ["projector", *(f"block {i}" for i in range(len(model.encoder.blocks), 0, -1)),
         "patch embedding"]
    whole = backward(lambda logps: loss_of(logps))
    assert way["whole"] == pytest.approx([g.norm().item() for g in whole], rel=1e-9)
    labels, total = batch["labels"], [torch.zeros_like(g) for g in whole]
    places = (labels != m.IGNORE).nonzero().tolist()
    assert len(places) == len(way["tokens"]) == 5
    for (row, t), token in zip(places, way["tokens"]):
        grads = backward(lambda logps: token["pull"] * logps[row, t])
        assert token["norms"] == pytest.approx([g.norm().item() for g in grads], rel=1e-9)
        assert token["text"] == str([labels[row, t].item()])
        assert token["answer"] == ("chosen" if labels[row, t] in (5, 6, 7) else "rejected")
        assert (token["pull"] > 0) == (token["answer"] == "rejected")
        total = [a + b for a, b in zip(total, grads)]
    for a, b in zip(total, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_training_on_one_pair_lowers_each_loss():
    model = tiny_model()
    for name, loss_of in losses(model).items():
        before = loss_of().item()
        gradcam.train_on(model, loss_of, 1e-3, 5)
        assert loss_of().item() < before, name
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape, reach", [((8, 8), 1.0), ((7, 10), 1.0), ((10, 10), 0.9),
                                          ((3, 2), 1.0)])
def test_coverage_is_the_area_of_each_patch_inside_the_mask(shape, reach):
    """Against a fine raster: every pixel cut into 60 × 60."""
    mask = np.random.default_rng(0).random(shape) < 0.4
    fine = np.kron(mask, np.ones((60, 60)))
    fine = fine[:round(fine.shape[0] * reach), :round(fine.shape[1] * reach)]
    h, w = (n // 4 for n in fine.shape)
    slow = fine.reshape(4, h, 4, w).mean((1, 3)).flatten()
    cover = gradcam.coverage(mask, 4, reach)
    np.testing.assert_allclose(cover, slow, atol=1e-12)
    if reach == 1:
        assert cover.mean().item() == pytest.approx(mask.mean())


def test_shares_can_be_one_zero_and_chance():
    """Heat that knows the object scores 1, heat beside it 0, even heat chance, none at all NaN."""
    mask = np.zeros((8, 8), bool)
    mask[2:4, :4] = True                                             # two whole patches of 16
    cover = gradcam.coverage(mask, 4, 1.0)[None].repeat(3, 1)
    knows = (cover[0] > 0).double()
    heats = torch.stack([torch.stack([knows, 1 - knows]), torch.stack([knows * 0 + 3, knows]),
                         torch.stack([knows, knows * 0])])
    shares = gradcam.shares_inside(heats, cover)
    assert shares[0].tolist() == [1, 0, 1 / 8, 1] and shares[1, :2].tolist() == [1 / 8, 1]
    assert shares[2, 1].isnan()


def test_a_loss_that_reads_the_object_alone_is_found_and_a_random_model_is_at_chance():
    model = tiny_model(dtype=torch.float64)
    mask = np.zeros((32, 32), bool)
    mask[8:16, 16:32] = True
    cover = gradcam.coverage(mask, 4, 1.0)
    inside, sft = cover > 0, batches()[0]

    def reads_the_object():
        return model.projector(model.encoder(sft["pixel_values"]))[0, inside].square().sum()
    heat = gradcam.heat_of(*gradcam.gradients(model, reads_the_object, "projector")[:2])
    assert gradcam.shares_inside(heat[None, None], cover[None])[0, 0] == 1
    values = []
    for seed in range(10):                 # the same object, other random eyes: an eighth
        eye = tiny_model(seed=seed, dtype=torch.float64)
        heat = gradcam.heat_of(*gradcam.gradients(eye, losses(eye)["sft"], "encoder")[:2])
        values.append(gradcam.shares_inside(heat[None, None], cover[None])[0, 0])
    found = intervals.normal(torch.stack(values))
    assert abs(found["mean"] - 1 / 8) < max(2 * found["ci95"], 0.03)


def test_mean_ci_covers_as_often_as_it_says():
    rng, hits = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        row = intervals.normal(torch.randn(50, generator=rng) + 1)
        hits += abs(row["mean"] - 1) < row["ci95"]
    assert 0.90 < hits / 300 < 0.99
    assert intervals.normal(torch.ones(1))["ci95"] is None


@pytest.fixture(scope="module")
def cam_world(world, tmp_path_factory):
    """Six held-out pairs and their images and masks, in a folder a test may spoil."""
    out = tmp_path_factory.mktemp("cam")
    shutil.copytree(world / "preferences", out / "preferences")
    lines = (world / "preferences/heldout.jsonl").read_text().splitlines()[:6]
    (out / "preferences/heldout.jsonl").write_text("\n".join(lines) + "\n")
    return out


def test_gradcam_as_a_command(stage1, cam_world, tmp_path, capsys):
    """Table, picture, results; the same numbers for the same seed, also after steps in between."""
    common = ["--run", stage1, "--data", cam_world, "--num-samples", 4]
    out = call(gradcam, capsys, *common, "--out", tmp_path / "a")
    assert "DPO - SFT" in out and "4 of 4 pairs" in out
    a = json.loads((tmp_path / "a/results.json").read_text())
    assert a["loss"]["dpo"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(0 <= x <= 1 for row in a["samples"] for x in row[1:])
    sft = [row[1] for row in a["samples"]]
    assert a["share_inside"]["SFT"]["mean"] == pytest.approx(np.mean(sft))
    assert a["share_inside"]["SFT"]["ci95"] == pytest.approx(1.96 * np.std(sft, ddof=1) / 2)
    call(gradcam, capsys, *common, "--out", tmp_path / "b")
    b = json.loads((tmp_path / "b/results.json").read_text())
    assert a["samples"] == b["samples"]
    assert (tmp_path / "a/gradcam.png").read_bytes() == (tmp_path / "b/gradcam.png").read_bytes()
    call(gradcam, capsys, *common, "--steps", 2, "--at", "projector", "--classic", "--dpo-lr", 1e-3,
         "--out", tmp_path / "c")
    c = json.loads((tmp_path / "c/results.json").read_text())
    assert c["loss"]["dpo"] < np.log(2) and c["loss"]["sft"] < a["loss"]["sft"]
    # The model is put back after each pair: the first one's steps do not show in the second.
    call(gradcam, capsys, *common[:-1], 1, "--steps", 2, "--out", tmp_path / "d")
    call(gradcam, capsys, *common[:-1], 2, "--steps", 2, "--out", tmp_path / "e")
    d, e = (json.loads((tmp_path / x / "results.json").read_text())["samples"] for x in "de")
    assert d[0] in e


def test_path_as_a_command(stage1, cam_world, tmp_path, capsys):
    """path.json; its table; after steps the losses have gone down and the model is put back."""
    common = ["--run", stage1, "--data", cam_world, "--path"]
    out = call(gradcam, capsys, *common, "--out", tmp_path / "a")
    found = json.loads((tmp_path / "a/path.json").read_text())
    dpo, sft = found["methods"]["dpo"], found["methods"]["sft"]
    assert dpo["loss"] == pytest.approx(np.log(2), abs=1e-6) and found["stations"][1] == "projector"
    assert {x["answer"] for x in sft["tokens"]} == {"chosen"}
    pulls = [x["pull"] for x in sft["tokens"]]
    assert pulls == pytest.approx([-1 / len(pulls)] * len(pulls))
    for name, a, b in zip(found["stations"], sft["whole"], dpo["whole"]):
        assert re.search(rf"^{name} +{a:.3g} +{b:.3g} +{b / a:.3g}$", out, re.M), name
    assert not (tmp_path / "a/gradcam.png").exists()
    call(gradcam, capsys, *common, "--steps", 2, "--dpo-lr", 1e-3, "--out", tmp_path / "b")
    after = json.loads((tmp_path / "b/path.json").read_text())["methods"]
    assert all(after[x]["loss"] < found["methods"][x]["loss"] for x in ("sft", "dpo"))


def test_gradcam_refuses_in_one_line(stage1, cam_world, tmp_path):
    copied(stage1, tmp_path / "run")
    common = ["--run", tmp_path / "run", "--data", cam_world, "--out", tmp_path]
    refuses(gradcam, "--run", tmp_path / "none", match=r"no trained model.*pretrain\.py --run-dir")
    refuses(gradcam, *common, "--stage", "dpo", match=r"train_dpo\.py --run-dir")
    refuses(gradcam, *common, "--preferences", "nowhere.jsonl", match="jsonl does not exist")
    refuses(gradcam, *common, "--beta", 0, match="--beta: 0 must be at least")
    refuses(gradcam, *common, "--dpo-lr", "nan", match="--dpo-lr: nan must be at least")
    first = json.loads((cam_world / "preferences/heldout.jsonl").open().readline())["image"]
    mask = cam_world / "preferences/masks" / first
    whole = mask.read_bytes()
    Image.new("L", (5, 7)).save(mask)
    refuses(gradcam, *common, match=rf"heldout.jsonl:1: mask .*{first} has 5 × 7 pixels, its image")
    mask.write_bytes(whole[:60])
    refuses(gradcam, *common, match=f"heldout.jsonl:1: mask .*{first} cannot be read")
    mask.write_bytes(whole)
    image = cam_world / "preferences/images" / first
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    refuses(gradcam, *common, match=f"heldout.jsonl:1: image .*{first} cannot be read")
    image.write_bytes(whole)


def test_gradcam_follows_links_where_a_flag_says_so(stage1, cam_world, tmp_path, capsys):
    """Pictures linked one by one into a folder: refused, or the numbers of a copy; their masks lie
    beside the folder that names them."""
    linked, store = tmp_path / "data/preferences", tmp_path / "store"
    shutil.copytree(cam_world / "preferences", linked, ignore=lambda *_: ["images"])
    shutil.copytree(cam_world / "preferences/images", store)
    (linked / "images").mkdir()
    for i, picture in enumerate(store.iterdir()):
        picture.rename(store / f"{i:05d}")                   # as a cache of the hub stores them
        (linked / "images" / picture.name).symlink_to(store / f"{i:05d}")
    common = ["--run", stage1, "--num-samples", 2]
    refuses(gradcam, *common, "--data", tmp_path / "data", "--out", tmp_path,
            match="leaves its folder .* by a link; --follow-links allows it")
    call(gradcam, capsys, *common, "--data", cam_world, "--out", tmp_path / "a")
    call(gradcam, capsys, *common, "--data", tmp_path / "data", "--follow-links",
         "--out", tmp_path / "b")
    a, b = (json.loads((tmp_path / x / "results.json").read_text()) for x in "ab")
    assert [row[1:] for row in a["samples"]] == [row[1:] for row in b["samples"]]
    assert a["share_inside"] == b["share_inside"] and a["share_inside"]


def test_masks_of_a_linked_folder(tmp_path):
    """Beside the name, or beside what the link names."""
    args = type("Args", (), {"masks": None, "mask_label": None})
    for folder in ("store/images", "store/masks", "data/masks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/images").symlink_to(tmp_path / "store/images")
    Image.new("RGB", (2, 2)).save(tmp_path / "store/images/x.jpg")
    Image.fromarray(np.uint8([[0, 1], [0, 0]])).save(tmp_path / "store/masks/x.png")
    picture = tmp_path / "data/images/x.jpg"
    assert gradcam.mask_path(args, picture) == tmp_path / "store/masks/x.png"
    Image.fromarray(np.uint8([[0, 1], [0, 0]])).save(tmp_path / "data/masks/x.png")
    assert gradcam.mask_path(args, picture) == tmp_path / "data/masks/x.png"
    args.masks = str(tmp_path / "data")
    assert gradcam.mask_path(args, picture) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_object_turns_with_its_picture(tmp_path, orientation):
    """Its share of every patch is the upright picture's, for a mask as stored and an upright one.
    """
    args = type("Args", (), {"masks": str(tmp_path / "masks"), "mask_label": None})
    (tmp_path / "masks").mkdir()
    upright = np.zeros((6, 9), np.uint8)
    upright[:2, 5:] = 255
    picture, exif = Image.fromarray(upright).convert("RGB"), Image.Exif()
    back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = picture.transpose(images.TURNED[back]) if orientation > 1 else picture
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    want = gradcam.coverage(upright > 0, 3, 1.0)
    masks = [stored.convert("L")] + ([Image.fromarray(upright)] if orientation > 4 else [])
    for mask in masks:
        mask.save(tmp_path / "masks/x.png")
        found = gradcam.coverage(gradcam.object_mask(args, tmp_path / "x.png", "f:1"), 3, 1.0)
        assert found.tolist() == want.tolist() and 0 < want.mean() < 1
    shown = images.load_image(str(tmp_path / "x.png"), None, "f:1")[0]
    assert (shown == upright).all()


def test_masks_by_name_by_label_and_none(tmp_path):
    """ADE20K's layout: X.jpg has X.png in another folder, one number a class."""
    args = type("Args", (), {"masks": None, "mask_label": None})
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    image, labels = tmp_path / "images/x.jpg", np.zeros((4, 6), np.uint8)
    Image.new("RGB", (6, 4)).save(image)
    assert gradcam.object_mask(args, image, "f:1") is None
    labels[0, 0], labels[1, 1] = 1, 7
    Image.fromarray(labels).save(tmp_path / "labels/x.png")
    args.masks = str(tmp_path / "labels")
    assert gradcam.object_mask(args, image, "f:1").tolist() == (labels > 0).tolist()
    args.mask_label = 7
    assert gradcam.object_mask(args, image, "f:1").tolist() == (labels == 7).tolist()
    args.mask_label = 9
    assert gradcam.object_mask(args, image, "f:1") is None


# --------------------------------------------------------------------------------------- alignment

def slow_neighbours(x, k):
    """Cosine neighbours by definition: for each item, sort all others."""
    x, found = np.asarray(x, np.float64), []
    for i in range(len(x)):
        cosines = [(-(x[i] @ x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j]), j)
                   for j in range(len(x)) if j != i]
        found.append({j for _, j in sorted(cosines)[:k]})
    return found


def slow_clamp(stack):
    """The protocol, by sorting: linear interpolation at 0.95 of the sorted absolute values."""
    marks = []
    for item in np.asarray(stack, np.float64):
        values = sorted(abs(item).flatten())
        at = 0.95 * (len(values) - 1)
        marks.append(values[int(at)] + (at % 1) * (values[min(int(at) + 1, len(values) - 1)]
                                                   - values[int(at)]))
    t = sum(marks) / len(marks)
    return np.array([[[max(-t, min(t, v)) for v in row] for row in item] for item in stack])


def features(seed, n=30, layers=3, width=7):
    return torch.randn(n, layers, width, generator=torch.Generator().manual_seed(seed)) ** 3


def test_clamping_against_the_slow_definition():
    x = features(0)
    clamped = probe_align.clamped(x).numpy()
    np.testing.assert_allclose(clamped, slow_clamp(x.numpy()), atol=1e-9)
    assert 0.02 < (abs(clamped) == abs(clamped).max()).mean() < 0.10


def test_mutual_knn_against_a_brute_force_loop():
    a, b, k = features(0), features(1, layers=2, width=4), 4
    b[:, 1, :] = a[:, 2, :4]                                       # something in common
    fast = probe_align.mutual_knn(*(probe_align.neighbours([x], k) for x in (a, b)))
    for v in range(3):
        for l in range(2):
            A = slow_neighbours(slow_clamp(a.numpy())[:, v], k)
            B = slow_neighbours(slow_clamp(b.numpy())[:, l], k)
            slow = sum(len(x & y) for x, y in zip(A, B)) / (len(A) * k)
            assert fast[v, l].item() == pytest.approx(slow, abs=1e-6)
    assert fast.argmax() == 5


def test_identical_features_score_1_and_random_ones_k_over_n():
    a = probe_align.neighbours([features(0, n=60)], 10)
    same = probe_align.mutual_knn(a, a)
    assert same.diagonal().tolist() == [1, 1, 1] and (a != torch.arange(60)[:, None]).all()
    scores = torch.cat([probe_align.mutual_knn(*(probe_align.neighbours(
        [features(seed + s, n=60, layers=1)], 10) for s in (0, 1000))).flatten()
        for seed in range(2, 42)])
    found = intervals.normal(scores)
    assert abs(found["mean"] - 10 / 59) < 1.5 * found["ci95"] and found["ci95"] < 0.006


def test_shuffling_is_another_pairing_of_the_same_neighbourhoods():
    x = features(3, n=40)
    a = probe_align.neighbours([x], 5)
    b = probe_align.shuffled(a, seed=0)
    new = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert {frozenset(r) for r in b[1].tolist()} == {
        frozenset(new[i].item() for i in r) for r in a[1].tolist()}
    moved = torch.empty_like(x)
    moved[new] = x
    again = probe_align.neighbours([moved], 5)
    assert (again.sort(-1).values == b.sort(-1).values).all()
    assert probe_align.mutual_knn(a, b).max() < 0.35


def test_vision_features_are_the_blocks_and_llm_features_the_layers(stage1, world):
    """One by one, unbatched and unpadded, through transformers' own outputs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    pairs = probe_align.read_items(world / "align")[:5]
    (blocks,), rows, _ = probe_align.vision_features("toy-vit", pairs, "cpu")
    eye = published.load_encoder("toy-vit").eval()
    assert rows == ["1", "2", "3", "4"] and blocks.shape == (5, 4, eye.hidden_size)
    (also, projected), rows, _ = probe_align.vision_features(
        str(stage1 / "pretrain/final"), pairs, "cpu")
    assert rows[-1] == "proj" and projected.shape[1] == 1 and not torch.equal(also, blocks)
    (layers,), columns = probe_align.llm_features("toy-lm", pairs, "cpu")
    llm = AutoModelForCausalLM.from_pretrained(encoders.resolve("toy-lm"),
                                               dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoders.resolve("toy-lm"))
    assert len(columns) == llm.config.num_hidden_layers + 1
    for i, (where, image, caption) in enumerate(pairs):
        with torch.no_grad():
            features = eye(torch.from_numpy(images.load_image(image, eye.image_size, where))[None])
            hidden = llm(**tokenizer(caption, return_tensors="pt"),
                         output_hidden_states=True).hidden_states
        torch.testing.assert_close(blocks[i, -1], features[0].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers[i], torch.stack([h[0].mean(0) for h in hidden]),
                                   rtol=1e-4, atol=1e-4)


def test_prefix_tokens_are_dropped(tmp_path, world):
    """A DINOv2's CLS is no patch: the mean is over the others."""
    import transformers as t
    torch.manual_seed(0)
    vision = t.Dinov2Model(t.Dinov2Config(hidden_size=32, num_hidden_layers=2, image_size=32,
                                          num_attention_heads=2, patch_size=8)).eval()
    vision.save_pretrained(tmp_path / "eye")
    pairs = probe_align.read_items(world / "align")[:2]
    (blocks,), _, _ = probe_align.vision_features(str(tmp_path / "eye"), pairs, "cpu")
    encoder, seen = published.load_encoder(str(tmp_path / "eye")).eval(), []
    encoder.blocks[1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    encoder(torch.from_numpy(np.stack([images.load_image(x, 32, "") for _, x, _ in pairs])))
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(blocks[:, 1], out[:, 1:].mean(1))


@pytest.fixture(scope="module")
def random_eye(tmp_path_factory):
    """toy-vit's shape with random weights."""
    out = tmp_path_factory.mktemp("random") / "random-eye"
    shutil.copytree(encoders.resolve("toy-vit"), out)
    eye = published.load_encoder(str(out)).vision
    torch.manual_seed(0)
    with torch.no_grad():
        for p in eye.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    eye.save_pretrained(out)
    return out


def test_align_as_a_command(random_eye, world, tmp_path, capsys):
    """A trained eye is far above chance, a random one near it; the same seed, the same numbers."""
    common = ["--encoder", "toy-vit", random_eye, "--llm", "toy-lm", "--data", world / "align",
              "--limit", 32, "--k", 5, "--seeds", 2]
    out = call(probe_align, capsys, *common, "--out", tmp_path / "a")
    assert "random-eye - toy-vit, toy-lm: -" in out and "paired by subset" in out
    a = json.loads((tmp_path / "a/results.json").read_text())
    call(probe_align, capsys, *common, "--out", tmp_path / "b")
    assert a["scores"] == json.loads((tmp_path / "b/results.json").read_text())["scores"]
    assert (tmp_path / "a/align.png").read_bytes() == (tmp_path / "b/align.png").read_bytes()
    trained, random = a["scores"]
    assert trained["mean"] == pytest.approx(np.mean(trained["seeds"]))
    assert trained["sd"] == pytest.approx(np.std(trained["seeds"], ddof=1))
    excess = [x["mean"] - x["shuffled"]["mean"] for x in (trained, random)]
    print(trained["text"], random["text"], trained["shuffled"], random["shuffled"])
    assert excess[0] > 0.15 and excess[1] < excess[0] / 2
    assert np.array(trained["map"]).shape == (4, len(trained["columns"]))


def test_align_at_another_input_size(world, stage1, tmp_path, capsys):
    """--image-size is that of every encoder on the line, trained models included."""
    write_checkpoint("vit", tmp_path / "vit")
    words = ["--encoder", tmp_path / "vit", stage1 / "pretrain/final", "--llm", "toy-lm", "--data",
             world / "align", "--limit", 16, "--k", 3, "--seeds", 1]
    out = call(probe_align, capsys, *words, "--out", tmp_path / "own")
    assert "input sizes differ: vit 32; pretrain 48 (--image-size N gives all the same)" in out
    sizes = json.loads((tmp_path / "own/results.json").read_text())["image_sizes"]
    assert sizes == {"vit": 32, "pretrain": 48}
    out = call(probe_align, capsys, *words, "--image-size", 64, "--out", tmp_path / "at64")
    assert "input sizes" not in out
    at64 = json.loads((tmp_path / "at64/results.json").read_text())
    assert set(at64["image_sizes"].values()) == {64}
    pairs = probe_align.read_items(world / "align")[:3]
    (blocks,), *_ = probe_align.vision_features(str(tmp_path / "vit"), pairs, "cpu", 64)
    encoder, seen = published.load_encoder(str(tmp_path / "vit"), 64).eval(), []
    encoder.blocks[2].register_forward_hook(lambda module, inputs, out: seen.append(out))
    encoder(torch.from_numpy(np.stack([images.load_image(x, 64, "") for _, x, _ in pairs])))
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]                # (3, 1 + 64, D)
    assert out.shape[1] == 65
    torch.testing.assert_close(blocks[:, 2], out[:, 1:].mean(1))


def test_align_of_stages_of_several_widths(world, tmp_path):
    """A ConvNeXt, whose stages differ in width: every block still has its row."""
    write_checkpoint("convnext", tmp_path / "eye")
    pairs = probe_align.read_items(world / "align")[:6]
    stacks, rows, _ = probe_align.vision_features(str(tmp_path / "eye"), pairs, "cpu")
    blocks = published.load_encoder(str(tmp_path / "eye")).blocks
    assert len({s.shape[2] for s in stacks}) > 1 and all(s.shape[0] == 6 for s in stacks)
    assert sum(s.shape[1] for s in stacks) == len(blocks) == len(rows)
    assert len(probe_align.neighbours(stacks, 2)) == len(rows)


def test_align_refuses_in_one_line(world, tmp_path):
    good = ["--encoder", "toy-vit", "--llm", "toy-lm", "--data", tmp_path, "--out", tmp_path]
    (tmp_path / "images").mkdir()
    lines = (world / "align/pairs.jsonl").read_text().splitlines()[:8]
    for line in lines:
        shutil.copy(world / "align/images" / json.loads(line)["image"], tmp_path / "images")

    def write(*records):
        (tmp_path / "pairs.jsonl").write_text("\n".join(records) + "\n")
    write(*lines)
    refuses(probe_align, *good, match="8 pairs .*--k 10 needs at least 11")
    refuses(probe_align, *good, "--k", 5, "--limit", 5, match="5 pairs .*needs at least 6")
    refuses(probe_align, *good, "--k", 0, match="--k: 0 must be at least 1")
    refuses(probe_align, "--encoder", "toy-vit", encoders.resolve("toy-vit"), *good[2:],
            match="--encoder .*toy-vit is given twice")
    refuses(probe_align, *good, "--llm", "toy-lm", "toy-lm", match="--llm toy-lm is given twice")
    refuses(probe_align, *good, "--k", 3, "--llm", "./nobody", match="nobody is neither a preset")
    refuses(probe_align, *good, "--k", 3, "--llm", encoders.resolve("toy-vit"),
            match="cannot open --llm")
    refuses(probe_align, *good, "--data", tmp_path / "none", match="pairs.jsonl does not exist")
    first = json.loads(lines[0])
    write(*lines, json.dumps({"image": first["image"]}))
    refuses(probe_align, *good, match="pairs.jsonl:9: 'caption' is missing")
    write(*lines, json.dumps({"caption": "a star"}))
    refuses(probe_align, *good, match="pairs.jsonl:9: a pair needs one image")
    write(*lines)
    (tmp_path / "images" / first["image"]).write_bytes(b"no image")
    refuses(probe_align, *good, "--k", 3, match="pairs.jsonl:1: image .*cannot be read")


def test_align_reads_what_the_stages_read(world, tmp_path, capsys):
    """Captions that are numbers, `images`, links by a flag, a mark at the beginning; what else
    names a picture is counted."""
    (tmp_path / "images").mkdir()
    records_ = [json.loads(x) for x in (world / "align/pairs.jsonl").read_text().splitlines()[:3]]
    for record in records_:
        (tmp_path / "images" / record["image"]).symlink_to(world / "align/images" / record["image"])
    records_[0] = {"images": [records_[0]["image"]], "caption": 7}
    records_[1]["url"] = "https://example.org/x.jpg"
    (tmp_path / "pairs.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, records_)))
    with pytest.raises(records.BadRecord, match="pairs.jsonl:1: .* --follow-links allows it"):
        probe_align.read_items(tmp_path)
    items = probe_align.read_items(tmp_path, follow_links=True)
    assert [caption for *_, caption in items] == ["7", *(r["caption"] for r in records_[1:])]
    assert items[0][1] == str(tmp_path / "images" / records_[0]["images"][0])
    assert capsys.readouterr().out == \
        "  1 pictures under 'url' are not read: 'image' and 'images' are\n"
    refuses(probe_align, "--encoder", "toy-vit", "--llm", "toy-lm", "--data", tmp_path, "--out",
            tmp_path, match="--follow-links allows it")
    out = call(probe_align, capsys, "--encoder", "toy-vit", "--llm", "toy-lm", "--data", tmp_path,
               "--out", tmp_path, "--k", 1, "--follow-links")
    assert "mutual k-NN alignment, k = 1" in out


def test_short_names_are_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/sft/encoder", "runs/a/dpo/encoder", "runs/a/dpo/final",
                 "runs/b/dpo/encoder"):
        (tmp_path / name).mkdir(parents=True)
    assert probing.short_names(["toy-vit", "runs/a/sft/encoder", "runs/a/dpo/encoder/"]) == \
        ["toy-vit", "sft", "dpo"]
    assert probing.short_names(["runs/a/dpo/encoder", "runs/b/dpo/encoder"]) == \
        ["a/dpo", "b/dpo"]
    assert probing.short_names(["runs/a/dpo/encoder", "runs/a/dpo/final"]) == \
        ["runs/a/dpo/encoder", "runs/a/dpo/final"]
