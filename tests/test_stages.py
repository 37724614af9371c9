"""The real scripts, run as a user runs them, on a world of a hundred pairs."""
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compat
from pivot import checkpoints, model_io, published, tensors
from conftest import COMMON, ROOT, bit_equal, copied, killed_at, metrics, run


def stage2(name, folder, world, *more, **options):
    beta = ["--beta", 0.1] * (name == "dpo")     # the paper's: the toy's 0.5 multiplies rounding
    return run(f"train_{name}.py", "--run-dir", folder, *COMMON[2:], "--data", world, "--lr", 1e-4,
               "--max-steps", 4, *beta, *more, **options)


def close(a, b, bound=1e-5):
    a, b = ([x["loss"] for x in lines if "loss" in x] for lines in (a, b))
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < bound


@pytest.fixture(scope="module")
def trained(stage1, world):
    """Stage 1, SFT, DPO and both encoders, in one run folder."""
    out = {s: stage2(s, stage1, world).stdout for s in ("sft", "dpo")}
    for s in ("sft", "dpo"):
        out["extract", s] = run("extract.py", "--run", stage1, "--stage", s).stdout
    return stage1, out


def test_dpo_starts_at_ln_2_and_held_out_margin_at_0(trained):
    """Invariant 2."""
    lines = metrics(trained[0] / "dpo")
    first = next(x for x in lines if "loss" in x)
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert first["margin"] == first["chosen_reward"] == first["accuracy"] == 0
    assert lines[0]["heldout_margin"] == 0 and lines[0]["heldout_accuracy"] == 0
    assert lines[-1]["heldout_margin"] != 0 and 0 < lines[-1]["heldout_accuracy"] <= 1
    assert "loss 0.693147" in trained[1]["dpo"]


def test_sft_and_dpo_consume_the_same_items_in_the_same_order(trained):
    configs = [json.loads((trained[0] / s / "config.json").read_text()) for s in ("sft", "dpo")]
    assert configs[0]["data_digest"] == configs[1]["data_digest"]
    assert configs[0]["parent_digest"] == configs[1]["parent_digest"]
    assert all(c["data_digest"] in trained[1][s] for c, s in zip(configs, ("sft", "dpo")))


def test_an_extracted_encoder_says_how_far_every_block_moved(trained):
    """moved.json holds what was printed, and what the files say."""
    moved = json.loads((trained[0] / "dpo/encoder/moved.json").read_text())
    names = ["embeddings", *(f"encoder.layers.{i}" for i in range(4)), "post_layernorm"]
    assert list(moved["moved"]) == list(moved["moved_since_parent"]) == names
    for name, change in moved["moved"].items():
        said = re.escape(f"{change:.2e}")
        assert re.search(rf"{name} +{said}", trained[1]["extract", "dpo"])
    new, old = (load_file(trained[0] / stage / "final/model.safetensors")
                for stage in ("dpo", "pretrain"))
    part = [k for k in old if ".encoder.layers.2." in k and "vision" in k]
    apart, size = (torch.cat([x.flatten() for x in values]).double().norm() for values in (
        [new[k] - old[k] for k in part], [old[k] for k in part]))
    assert moved["moved_since_parent"]["encoder.layers.2"] == \
        pytest.approx((apart / size).item(), rel=1e-5)


def test_metrics_carry_rates_and_norms_of_every_module(trained):
    for stage in ("pretrain", "sft", "dpo"):
        last = [x for x in metrics(trained[0] / stage) if "loss" in x][-1]
        assert set(last["lr"]) == set(last["grad_norm"]) == {"encoder", "projector", "llm"}
        assert all(v > 0 for v in last["grad_norm"].values())
    first = metrics(trained[0] / "pretrain")[0]
    assert set(first["grad_norm"]) == {"projector"}, "1a trains the projector alone"


def test_stage_1a_moves_the_projector_alone(world, tmp_path):
    run("pretrain.py", "--run", tmp_path / "r", "--encoder", "toy-vit", *COMMON, "--data", world,
        "--projector-max-steps", 2, "--max-steps", 1, "--lr", 0)
    trained, _ = model_io.load_mllm(tmp_path / "r/pretrain/final")
    start, _ = model_io.build_mllm("toy-vit", "toy-lm", 0)
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    # --encoder-lr has its own default, so 1b moves the eye even where --lr 0 freezes the rest
    assert {n.split(".")[0] for n in moved} == {"projector", "encoder"}


def same_weights(a, b, start):
    """Not the largest difference: AdamW turns a gradient that is rounding alone (key biases, words
    common to both answers) into full steps. The runs must agree on where they went."""
    a, b = (load_file(f / "final" / "model.safetensors") for f in (a, b))
    apart = sum((a[k] - b[k]).square().sum() for k in a).sqrt()
    travelled = sum((b[k] - start[k]).square().sum() for k in a).sqrt()
    assert apart < 0.01 * travelled, (apart, travelled)


@pytest.mark.parametrize("stage,processes,micro_batch", [
    ("sft", 1, 3), ("sft", 2, 3), ("dpo", 1, 3), ("dpo", 2, 3),
    ("dpo", 4, 2)])
def test_processes_and_micro_batches_count_the_same(trained, fresh, world, stage, processes,
                                                    micro_batch):
    """Invariant 4: all equal 1 process × micro-batch 8."""
    stage2(stage, fresh, world, "--micro-batch", micro_batch, processes=processes)
    close(metrics(fresh / stage), metrics(trained[0] / stage))
    same_weights(fresh / stage, trained[0] / stage,
                 load_file(fresh / "pretrain/final/model.safetensors"))


def test_pretrain_on_any_number_of_processes_counts_the_same(world, tmp_path):
    """Text-only samples included: some batches have one on a process that has no image."""
    def folder(processes, micro_batch):     # gentle rates: AdamW amplifies rounding by the rate
        run("pretrain.py", "--run-dir", tmp_path / str(processes), "--encoder", "toy-vit",
            *COMMON[:-4], "--workers", 0, "--micro-batch", micro_batch, "--data", world,
            "--projector-lr", 1e-3, "--lr", 1e-4, "--encoder-lr", 1e-4,
            "--projector-max-steps", 2, "--max-steps", 3, processes=processes)
        return tmp_path / str(processes) / "pretrain"
    start = model_io.build_mllm("toy-vit", "toy-lm", 0)[0].state_dict()
    start = {model_io.file_name_of(name, "vision_model."): p for name, p in start.items()}
    one = folder(1, 8)
    for processes, micro_batch in ((2, 2), (4, 1)):
        other = folder(processes, micro_batch)
        close(metrics(other), metrics(one))
        same_weights(other, one, start)


@pytest.mark.parametrize("processes", [1, 2])
def test_stage_1_in_bf16_stays_close(stage1, world, tmp_path, processes):
    """What 1a froze trains in 1b, one micro-step a step: FSDP2 had settled at 1a's first forward
    that the blocks have no gradients, and then could not store them in fp32."""
    run("pretrain.py", "--run-dir", tmp_path / "r", "--encoder", "toy-vit", *COMMON, "--data", world,
        "--projector-max-steps", 2, "--max-steps", 3, "--dtype", "bf16", processes=processes)
    mine, fp32 = metrics(tmp_path / "r/pretrain"), metrics(stage1 / "pretrain")
    close(mine, fp32, 2e-2)
    for a, b in zip(mine[:3], fp32[:3]):      # the first steps of both phases: nearly one model
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("spoil,off", [
    (lambda table: table + torch.tensor([0.01, 0]), "margin"),
    (lambda table: table.roll(1, 0), "loss")])
def test_dpo_that_does_not_start_at_ln_2_stops_before_the_first_update(fresh, world, spoil, off):
    """A reference that is another function: by 0.01 in one answer of each pair; or each pair's is
    another pair's, so that the mean margin is 0."""
    stage2("dpo", fresh, world, "--max-steps", 1, "--num-samples", 8)            # one batch
    ref = fresh / "dpo/ref_logps.safetensors"
    with safe_open(ref, "pt") as file:
        key, tables = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    tables["pairs"] = spoil(tables["pairs"])
    for name in ("final", "metrics.jsonl", "timing.jsonl", "config.json"):
        path = fresh / "dpo" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ref.unlink()
    save_file(tables, ref, metadata=key)
    done = run("train_dpo.py", "--run-dir", fresh, *COMMON[2:], "--data", world, "--lr", 1e-4,
               "--beta", 0.1, "--max-steps", 1, "--num-samples", 8, check=False)
    assert done.returncode == 1 and "are NOT the same function; nothing was updated" in done.stderr
    loss, margin = map(float, re.search(r"loss (\S+) .*margin (\S+):", done.stderr).groups())
    assert (abs(margin) > 1e-5) == (off == "margin") and abs(loss - math.log(2)) > 1e-4
    assert not [x for x in metrics(fresh / "dpo") if "loss" in x]
    assert not (fresh / "dpo/final").exists()


def test_bf16_and_activation_checkpointing_stay_close(trained, fresh, world):
    """bf16 compute over fp32 masters: losses within 1e-2, step 0 still at ln 2, weights move."""
    stage2("dpo", fresh, world, "--dtype", "bf16", "--activation-checkpointing", processes=2)
    close(metrics(fresh / "dpo"), metrics(trained[0] / "dpo"), 1e-2)
    first = next(x for x in metrics(fresh / "dpo") if "loss" in x)
    assert abs(first["loss"] - math.log(2)) < 1e-6
    a, b = (load_file(fresh / s / "final/model.safetensors") for s in ("pretrain", "dpo"))
    still = [k for k in a if torch.equal(a[k], b[k])]
    assert all("post_layernorm" in k for k in still), still
    assert {v.dtype for v in b.values()} == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_blocks_give_the_same_losses(trained, fresh, world):
    """To rounding, which AdamW's first steps enlarge (eager and eager on two processes: 1e-5)."""
    stage2("dpo", fresh, world, "--compile", "--activation-checkpointing", processes=2)
    close(metrics(fresh / "dpo"), metrics(trained[0] / "dpo"), 5e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_bf16_starts_at_ln_2(fresh, world):
    """The cached reference is of the very graph that is trained: without gradients the compiler
    fuses, and so rounds, otherwise."""
    stage2("dpo", fresh, world, "--compile", "--dtype", "bf16", "--max-steps", 1)
    first = next(x for x in metrics(fresh / "dpo") if "loss" in x)
    assert first["margin"] == 0 and abs(first["loss"] - math.log(2)) < 1e-6
    assert {x["heldout_margin"] for x in metrics(fresh / "dpo")[:1]} == {0}


def test_a_stage_ends_with_its_curve_and_what_comes_next(fresh, world):
    """The numbers are those of metrics.jsonl: 12 steps, so each tenth is one or two of them."""
    said = stage2("dpo", fresh, world, "--max-steps", 12, "--log-every", 5).stdout
    lines = [x for x in metrics(fresh / "dpo") if "loss" in x]
    for what in ("loss", "margin"):
        told = re.search(rf"  {what} of dpo over its 12 steps, a mean for each tenth: (.*)", said)[1]
        told, values = list(map(float, told.split())), [x[what] for x in lines]
        assert len(told) == 10 and told[0] == pytest.approx(values[0], abs=1e-4)
        assert told[-1] == pytest.approx(values[-1], rel=1e-3)
        assert told[2] == pytest.approx((values[2] + values[3]) / 2, rel=1e-3)
    assert f"; next: python extract.py --run-dir {fresh} --stage dpo" in said
    timed = [json.loads(x) for x in (fresh / "dpo/timing.jsonl").read_text().splitlines()][6:11]
    share = sum(x["data_wait"] for x in timed) / sum(x["seconds"] for x in timed)
    assert f"{share:.0%} of the time waiting for data" in re.search(r"step 10: .*", said)[0]


def test_live_reference_gives_the_losses_of_the_cached_one(trained, fresh, world):
    stage2("dpo", fresh, world, "--reference", "live")
    close(metrics(fresh / "dpo"), metrics(trained[0] / "dpo"))


def test_stopped_and_started_again_is_bit_equal(trained, fresh, world):
    """Invariant 5, the polite way: SIGTERM, then the same command."""
    command = ["train_dpo.py", "--run", fresh, *COMMON[2:], "--data", world, "--lr", 1e-4,
               "--beta", 0.1, "--max-steps", 4, "--save-every", 1]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = fresh / "dpo/metrics.jsonl"
    while process.poll() is None and not (file.exists() and '"loss"' in file.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and not (fresh / "dpo/final").exists()
    assert "continuing after" in run(*command).stdout
    bit_equal(fresh / "dpo", trained[0] / "dpo")


@pytest.mark.parametrize("done", [1, 2, 3])
def test_killed_before_at_and_after_the_border_of_two_phases(trained, world, tmp_path, done):
    """Invariant 5, the rude way: kill -9 behind a checkpoint inside phase 1a, at its end, in 1b."""
    command = ["pretrain.py", "--run", tmp_path / "new", "--encoder", "toy-vit", *COMMON, "--data",
               world, "--projector-max-steps", 2, "--max-steps", 3, "--save-every", 1]
    killed_at(f"after rename of step:{done}:0", tmp_path / "kill", command)
    assert f"continuing after {done} steps" in run(*command).stdout
    bit_equal(tmp_path / "new/pretrain", trained[0] / "pretrain")


def test_a_parent_is_known_by_its_numbers(tmp_path):
    """Safetensors, pickles or one file: other bytes, another digest. A name on the hub is its own."""
    for name in ("a/model.safetensors", "b/pytorch_model.bin", "c.pth.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        model = path if name == "c.pth.tar" else path.parent
        path.write_bytes(b"one")
        before = tensors.digest_of(model)
        path.write_bytes(b"two")
        assert len(before) == 16 and before != tensors.digest_of(model)
    assert tensors.digest_of("google/siglip2-base-patch16-384") == "google/siglip2-base-patch16-384"


def test_a_finished_stage_says_so(trained, world):
    before = (trained[0] / "dpo/final/model.safetensors").stat().st_mtime
    again = stage2("dpo", trained[0], world)
    assert "nothing to do" in again.stdout
    assert (trained[0] / "dpo/final/model.safetensors").stat().st_mtime == before


# ------------------------------------------------------------------------- folders that others open

def test_final_opens_in_transformers_with_the_same_logits(trained):
    opens_in_transformers(trained[0] / "dpo/final", 48)


def opens_in_transformers(folder, size):
    """The folder is a plain LLaVA: same logits, same greedy answer through its own processor."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    ours, tokenizer = model_io.load_mllm(folder)
    image = Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"},
                                             {"type": "text", "text": "What shape is it?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        want = theirs(**inputs).logits
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
        pixels = pixels.permute(2, 0, 1)[None]
        hidden = ours.llm.model(inputs_embeds=ours.embed(pixels, inputs["input_ids"]))
        got = ours.llm.lm_head(hidden.last_hidden_state)
    assert (want - got).abs().max() < 1e-5
    answer = theirs.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    mine = ours.generate(pixels, inputs["input_ids"], inputs["attention_mask"], 8,
                         model_io.stop_ids(tokenizer))[0]
    assert [t for t in answer.tolist() if t not in model_io.stop_ids(tokenizer)] == mine


def test_the_card_of_final_states_where_it_comes_from(trained):
    """Parents, data digest, arguments, what moved: from the files, not from the code's memory."""
    folder = trained[0] / "dpo"
    config = json.loads((folder / "config.json").read_text())
    card = (folder / "final/README.md").read_text()
    for fact in (config["data_digest"], config["parent_digest"], "--lr 0.0001", "--seed 0",
                 "| encoder | toy-vit"):
        assert fact in card, fact
    a, b = (load_file(trained[0] / s / "final/model.safetensors") for s in ("pretrain", "dpo"))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        keys = [k for k in a if k.startswith(part)]
        change = sum((a[k] - b[k]).double().square().sum() for k in keys).sqrt()
        change /= sum(a[k].double().square().sum() for k in keys).sqrt()
        stated = re.search(rf"{part} (\d\.\d+e[-+]\d+)", card)
        assert change > 0 and float(stated[1]) == pytest.approx(change.item(), rel=0.01)
    still = re.search(r"bit-equal to pretrain \| (.*) \|", card)[1].split(", ")
    assert sorted(still) == sorted(k for k in a if torch.equal(a[k], b[k]))
    assert all("post_layernorm" in k for k in still)
    assert "published encoder" in (trained[0] / "pretrain/final/README.md").read_text()


def test_the_card_of_final_answers_a_question_about_a_picture(trained):
    """Its code block, run as it stands: the answer that our own code gives."""
    said = compat.run_card(trained[0] / "dpo/final")
    answer = said["processor"].decode(said["answer"], skip_special_tokens=True)
    model, tokenizer = model_io.load_mllm(trained[0] / "dpo/final")
    ids = said["inputs"]["input_ids"]
    own = model.eval().generate(compat.squashed(48), ids, torch.ones_like(ids), 64,
                                model_io.stop_ids(tokenizer))[0]
    assert answer == tokenizer.decode(own) and answer


HUB = {          # a handful of names in the published files, by which others find the tensors
    "final": ["vision_tower.vision_model.embeddings.patch_embedding.weight",
              "vision_tower.vision_model.embeddings.position_embedding.weight",
              "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias",
              "vision_tower.vision_model.encoder.layers.3.mlp.fc2.weight",
              "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias",
              "language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
              "language_model.model.layers.0.self_attn.q_proj.weight"],
    "encoder": ["vision_model.embeddings.patch_embedding.weight",
                "vision_model.embeddings.position_embedding.weight",
                "vision_model.encoder.layers.0.self_attn.k_proj.bias",
                "vision_model.encoder.layers.3.mlp.fc2.weight",
                "vision_model.post_layernorm.weight"]}


@pytest.mark.parametrize("what", HUB)
def test_names_of_tensors_are_the_hubs(trained, what):
    """So that transformers 4, vLLM and others find them, and not nothing (with a warning)."""
    names = load_file(trained[0] / "dpo" / what / "model.safetensors").keys()
    assert set(HUB[what]) <= names
    tops = {"final": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model."),
            "encoder": ("vision_model.",)}[what]
    assert all(name.startswith(tops) for name in names)


def test_shorter_names_are_read_as_well(trained, tmp_path):
    """Folders of before, and whatever transformers 5 writes itself."""
    shutil.copytree(trained[0] / "dpo/final", tmp_path / "final")
    path = tmp_path / "final/model.safetensors"
    short = {k.replace(".vision_model.", ".", 1): v for k, v in load_file(path).items()}
    path.unlink()
    save_file(short, path, metadata={"format": "pt"})
    a, b = (model_io.load_mllm(f)[0].state_dict() for f in (tmp_path / "final",
                                                             trained[0] / "dpo/final"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_files_are_such_that_transformers_4_opens_them(trained):
    """What it looks for under other names than 5 writes; without them it would compute otherwise,
    in silence, or find no class."""
    final = trained[0] / "dpo/final"
    text = json.loads((final / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((final / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    pixels = json.loads((final / "preprocessor_config.json").read_text())
    assert pixels["image_processor_type"] == "SiglipImageProcessor" and pixels["resample"] == 3


def test_a_folder_in_several_shards_is_the_same_model(trained, tmp_path):
    model, tokenizer = model_io.load_mllm(trained[0] / "dpo/final")
    model_io.save_mllm(model, tokenizer, tmp_path, True, file_bytes=1_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    from transformers import AutoModelForImageTextToText
    again, _ = model_io.load_mllm(tmp_path)
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(theirs.model.multi_modal_projector.linear_1.weight,
                       model.projector.linear_1.weight)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    sizes = [json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
             ["total_size"] for folder in (tmp_path, tmp_path / "theirs")]
    assert sizes[0] == sizes[1], "bytes of the tensors"


def test_extracted_encoder_is_what_was_trained(trained):
    """Invariant 6, trap 5: reopened by transformers alone, bit-equal to the eye inside the MLLM."""
    from transformers import SiglipVisionModel
    model, _ = model_io.load_mllm(trained[0] / "dpo/final")
    theirs = SiglipVisionModel.from_pretrained(trained[0] / "dpo/encoder").eval()
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    values = (pixels.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        want = theirs(values, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.encoder(pixels), want)
        assert torch.equal(published.load_encoder(str(trained[0] / "dpo/encoder"))(pixels), want)
        original = published.load_encoder("toy-vit")(pixels)
    assert not torch.equal(original, want), "DPO did not reach the eye"
    text = trained[1]["extract", "dpo"]
    assert re.search(r"encoder\.layers\.3 +[1-9]\.\d+e-0\d", text), text
    assert "never trained" in text and "bit-equal" in text


def test_the_model_card_runs(trained):
    card = (trained[0] / "dpo/encoder/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=trained[0] / "dpo/encoder",
                          capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 36, 128)", done.stderr


def test_extract_refuses_when_nothing_moved(fresh, world):
    folder = fresh / "still"
    run("pretrain.py", "--run", folder, "--encoder", "toy-vit", *COMMON, "--data", world,
        "--projector-max-steps", 1, "--max-steps", 1, "--encoder-lr", 0)
    done = run("extract.py", "--run", folder, "--stage", "pretrain", check=False)
    assert done.returncode == 1 and "nothing moved" in done.stderr
    assert not (folder / "pretrain/encoder").exists()


def test_repairing_keeps_the_eye_and_scores(trained, world, tmp_path):
    """The re-paired model holds the extracted encoder bit by bit; 2 processes answer alike."""
    encoder = trained[0] / "dpo/encoder"
    done = run("repair_eval.py", "--encoder", encoder, *COMMON, "--data", world, "--max-steps", 2,
               "--limit", 12, processes=2)
    folder = trained[0] / "repair/dpo"
    model, _ = model_io.load_mllm(folder / "final")
    for name, p in published.load_encoder(str(encoder)).named_parameters():
        assert torch.equal(p, model.encoder.get_parameter(name)), name
    starts = [json.loads((d / "config.json").read_text())["projector_digest"]
              for d in (folder, trained[0] / "pretrain")]
    assert starts[0] != starts[1]          # the encoder has never met this projector
    two = json.loads((folder / "bench/results.json").read_text())
    assert set(two["groups"]) == {"General", "Knowledge", "OCR & Chart", "Vision-Centric"}
    shutil.copytree(folder / "final", tmp_path / "m/final")
    run("repair_eval.py", "--mllm", tmp_path / "m/final", "--data", world, "--limit", 12,
        "--llm", "toy-lm")
    one = json.loads((tmp_path / "m/bench/results.json").read_text())
    assert one["benchmarks"] == two["benchmarks"]
    answers = [sorted(line for p in f.glob("ToyVision.*.jsonl") for line in p.open())
               for f in (folder / "bench", tmp_path / "m/bench")]
    assert answers[0] == answers[1] and len(answers[0]) == 12
    assert "Average" in done.stdout
    table = run("repair_eval.py", "--compare", folder, tmp_path / "m").stdout
    assert "dpo" in table and "chance" in table


def test_one_table_of_all_instruments(trained, world, tmp_path):
    """evidence.py says what the instruments wrote, and which commands are still to be run."""
    folder = trained[0]
    before = run("-m", "tools.evidence", "--run", folder).stdout
    assert f"not run yet: python gradcam.py --run-dir {folder}" in before and "top-1" not in before
    eyes = ["--encoder", "toy-vit", folder / "sft/encoder", folder / "dpo/encoder"]
    shutil.copytree(world / "imagenet", tmp_path / "imagenet")        # one image a class here
    for image in list((tmp_path / "imagenet").glob("train/*/*.png")):
        shutil.copy(image, image.with_name("again.png"))
    run("probe_linear.py", *eyes, "--data", tmp_path / "imagenet", "--per-class", 2,
        "--workers", 0)
    run("probe_seg.py", *eyes, "--data", world / "ade20k", "--seeds", 1, "--workers", 0)
    run("probe_align.py", *eyes, "--llm", "toy-lm", "--data", world / "align", "--limit", 30)
    run("gradcam.py", "--run", folder, "--data", world, "--num-samples", 3)
    table = run("-m", "tools.evidence", "--run", folder).stdout
    found = {name: json.loads((folder / "probes" / name / "results.json").read_text())
             for name in ("linear", "seg", "align", "gradcam")}
    eye = {"original": "toy-vit", "SFT": "sft", "DPO": "dpo"}
    want = {"top-1": [f"{100 * found['linear']['encoders'][n]['top1']['mean']:.1f}"
                      for n in eye.values()],
            "recall of patches": [f"{100 * found['seg']['encoders'][n]['recall'][0]:.1f}"
                                  for n in eye.values()],
            "with toy-lm": [next(s["text"] for s in found["align"]["scores"]
                                 if s["encoder"] == n) for n in eye.values()],
            "inside the object": [f"{100 * found['gradcam']['share_inside'][k]['mean']:.1f}"
                                  for k in ("chance", "SFT", "DPO")]}
    for label, cells in want.items():
        line = next(x for x in table.splitlines() if x.strip().startswith(label))
        places = [line.index(cell, len(label)) for cell in cells[:1]]
        for cell in cells[1:]:
            places.append(line.index(cell, places[-1] + 1))
    for picture in re.findall("picture: (.*)", table):
        assert (ROOT / picture).exists()
    assert table.count("picture: ") == 3 and "not run yet: python repair_eval.py" in table

    # ---- and on the page, as numbers
    run("gradcam.py", "--run", folder, "--data", world, "--path")
    assert f"wrote {folder}/page.html" in run("-m", "tools.page", folder).stdout
    page = (folder / "page.html").read_text()
    for name in ("sft", "dpo"):
        share = found["linear"]["encoders"][name]["top1"]["mean"]
        assert f'data-name="{name}" data-value="{100 * share!r}"' in page
        last = [x["loss"] for x in metrics(folder / name) if "loss" in x][-1]
        assert f'data-last="{last!r}"' in page
    for score in found["align"]["scores"]:
        assert all(f'data-value="{x!r}"' in page for row in score["map"] for x in row)
    way = json.loads((folder / "probes/gradcam/path.json").read_text())["methods"]
    assert all(f'data-first="{way[name]["whole"][0]!r}"' in page for name in way)
    assert page.count('<img src="data:image/jpeg;base64,') == 2


# ----------------------------------------------------------------------------------- one clear line

def refused(done, *words):
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-2000:]
    for word in words:
        assert word in errors[0], errors[0]


def test_the_headline_command_says_what_is_missing(tmp_path):
    """`torchrun --nproc_per_node=8 train_dpo.py --encoder siglip2-so400m`, on a bare checkout."""
    for processes in (1, 2):
        done = run("train_dpo.py", "--encoder", "siglip2-so400m", processes=processes, check=False)
        errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
        assert done.returncode != 0 and len(errors) == 1
        assert "runs/siglip2-so400m__qwen2.5-1.5b/pretrain/final" in errors[0]
        assert "pretrain.py --encoder siglip2-so400m" in errors[0]


@pytest.mark.parametrize("command,words", [
    (["train_sft.py", "--run", "nowhere"], ["nowhere/pretrain/final", "pretrain.py"]),
    (["train_dpo.py", "--run", "RUN", "--encoder", "clip-large-336"], ["was made with --encoder"]),
    (["train_dpo.py", "--run", "RUN", "--preferences", "no.jsonl"], ["no.jsonl does not exist"]),
    (["train_dpo.py", "--run", "RUN", "--global-batch", 4096], ["fewer than one --global-batch"]),
    (["train_dpo.py", "--run", "RUN", "--epochs", 0], ["--epochs: 0 must be at least 1"]),
    (["pretrain.py", "--encoder", "no-such-encoder", "--llm", "toy-lm"], ["neither a preset"]),
    (["pretrain.py", "--encoder", "weights/toy-lm", "--llm", "toy-lm"], ["is a qwen2"]),
    (["pretrain.py", "--encoder", "toy-vit", "--llm", "weights/toy-vit"], ["cannot open --llm"]),
    (["extract.py", "--run", "nowhere"], ["nowhere/dpo/final", "train_dpo.py"]),
    (["repair_eval.py", "--mllm", "nowhere", "--llm", "toy-lm"], ["nowhere is not a trained"]),
    (["repair_eval.py", "--compare", "nowhere"], ["not scored yet: nowhere"]),
])
def test_bad_arguments(stage1, world, tmp_path, command, words):
    if "RUN" in command:
        copied(stage1, tmp_path / "run")
    command = [tmp_path / "run" if c == "RUN" else c for c in command]
    if command[0] in ("pretrain.py", "train_dpo.py"):
        command += ["--data", world, "--workers", 0]
        if command[0] == "pretrain.py":
            command += ["--run", tmp_path / "r"]
    if "--mllm" in command:
        command += ["--data", world]
    refused(run(*command, check=False), *words)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_that_breaks_during_the_run(stage1, world, fresh, tmp_path, processes):
    """A truncated PNG: file and line, exit code, nothing under a final name, earlier work whole."""
    bad = tmp_path / "toy"
    shutil.copytree(world, bad)
    for image in (bad / "preferences/images").glob("*.png"):
        image.write_bytes(image.read_bytes()[:60])
    done = run("train_dpo.py", "--run-dir", fresh, *COMMON[2:], "--data", bad, "--heldout",
               bad / "preferences/heldout.jsonl", processes=processes, check=False)
    assert done.returncode != 0
    assert re.search(r"error: \S+\.jsonl:\d+: image \S+\.png cannot be read", done.stderr)
    if processes == 1:
        refused(done, "cannot be read", "with a good file in its place the same command goes on")
    assert not (fresh / "dpo/final").exists() and (fresh / "pretrain/final").exists()
    assert not (fresh / "dpo/ref_logps.safetensors").exists()


def test_another_run_in_the_same_folder_is_refused(fresh, world):
    """Other arguments: the first difference is named. Other reference log-probs: refused, too."""
    stage2("dpo", fresh, world, "--save-every", 1)
    shutil.rmtree(fresh / "dpo/final")
    ref = (fresh / "dpo/ref_logps.safetensors").read_bytes()
    done = run("train_dpo.py", "--run", fresh, *COMMON[2:], "--data", world, "--lr", 1e-4,
               "--max-steps", 4, "--num-samples", 16, "--keep", 3, check=False)
    refused(done, "ref_logps.safetensors was computed with pairs")
    assert (fresh / "dpo/ref_logps.safetensors").read_bytes() == ref


def test_no_flag_of_ours_is_ambiguous_to_torchrun():
    """`torchrun train.py --run x` dies in torchrun's own parser: --run is short for --run-path."""
    from torch.distributed.run import get_args_parser
    theirs = [o for a in get_args_parser()._actions for o in a.option_strings]
    for script in ("pretrain.py", "train_sft.py", "train_dpo.py", "train_mpo.py", "train_grpo.py",
                   "train_ppo.py", "repair_eval.py"):
        ours = set(re.findall(r"^  (--[a-z-]+)", run(script, "--help").stdout, re.M))
        assert "--run-dir" in ours and "--seed" in ours
        assert not [o for o in ours for t in theirs if t.startswith(o)], script


def test_help_teaches():
    for script in ("pretrain.py", "train_sft.py", "train_dpo.py", "train_mpo.py", "train_grpo.py",
                   "train_ppo.py", "extract.py", "repair_eval.py"):
        text = run(script, "--help").stdout
        assert "torchrun" in text or script == "extract.py"
        assert re.search(r"Reads +\S", text) and re.search(r"Writes +\S", text)


def test_overwrite_counts_until_it_has_deleted(monkeypatch, tmp_path):
    """Restarted by torchrun, the same command must not delete what its own first start saved, but
    still what an earlier run left when that start died before it came so far."""
    args = Namespace(overwrite=True)
    monkeypatch.setattr(checkpoints, "from_main", lambda make: make())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    assert checkpoints.starts_anew(tmp_path, args)
    (tmp_path / "config.json").write_text(json.dumps({"anew_by": checkpoints.torchrun_id()}))
    assert checkpoints.starts_anew(tmp_path, args)              # a first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not checkpoints.starts_anew(tmp_path, args)
    monkeypatch.setattr(os, "getppid", lambda: 1)             # another torchrun of the same id
    assert checkpoints.starts_anew(tmp_path, args)
    assert not checkpoints.starts_anew(tmp_path, Namespace(overwrite=False))


def test_a_restart_keeps_the_answers_that_came_before_it(monkeypatch, tmp_path):
    """--overwrite of a scoring that torchrun starts again."""
    import repair_eval
    args, answers = Namespace(overwrite=True, rescore=False), tmp_path / "ToyVision.0.jsonl"
    monkeypatch.setattr(repair_eval.distributed.dist, "barrier", lambda: None)
    for count, kept in (("1", True), ("0", False)):
        answers.write_text("{}")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        repair_eval.stored_answers(args, tmp_path, {"model": "x"})
        assert answers.exists() is kept


@pytest.mark.parametrize("error, said", [(errno.ENOLCK, None), (errno.EAGAIN, "another process")])
def test_a_file_system_without_locks_is_not_a_second_run(monkeypatch, tmp_path, capsys, error, said):
    def lockf(*_):
        raise OSError(error, os.strerror(error))
    monkeypatch.setattr(checkpoints.fcntl, "lockf", lockf)
    run = checkpoints.Run.__new__(checkpoints.Run)
    run.folder = tmp_path
    refusal = run.claim(patience=0)
    assert said in refusal if said else refusal is None
    assert ("knows no locks" in capsys.readouterr().out) is (said is None)
