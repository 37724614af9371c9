"""Open the folders that tests/test_opens.py wrote, with whatever transformers is installed here.

    python tests/compat.py FOLDER        # `make compat`: with transformers 4.57.6, which saves what
                                         # it opened as FOLDER/NAME/saved/…, for the way back

FOLDER/NAME/{encoder,encoder-full,final} are what extract.py and the stages wrote;
FOLDER/NAME/expected.safetensors holds the pixels, ids, features and logits of the code that wrote
them; tests/opens.json says of each whether it opens. What opens gives the same through the plain
`from_pretrained`, with no missing or unexpected key, and through the code block of its own card;
what cannot is refused by name.
"""
import contextlib
import io
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

VERSION = transformers.__version__.split(".")[0]
PILLOW = {"backend": "pil"} if VERSION != "4" else {"use_fast": False}
CLEAN = ("missing_keys", "unexpected_keys", "mismatched_keys")


def picture():
    """Not square, neither small nor flat: what resizing does shows."""
    return Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def squashed(size):
    """The picture as an encoder of ours takes it: uint8 (1, 3, size, size)."""
    raw = picture().resize((size, size), Image.Resampling.BICUBIC)
    raw = torch.tensor(list(raw.tobytes()), dtype=torch.uint8).view(1, size, size, 3)
    return raw.permute(0, 3, 1, 2)


def run_card(folder):
    """Run the code block of a folder's README.md on our picture: → its variables."""
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for theirs, ours in (('folder = "."', f"folder = {str(folder)!r}"),
                         ('Image.new("RGB", (640, 480), "white")', "test_picture()")):
        assert code.count(theirs) == 1, theirs
        code = code.replace(theirs, ours)
    names = {"test_picture": picture}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    return names


def opened(kind, folder, **options):
    """kind.from_pretrained in fp32; no key may be missing or left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32,
                                       **options)
    for what in CLEAN:
        assert not info[what], f"{folder}: {what}: {sorted(info[what])[:3]}"
    return model.eval()


def same(what, got, want, tolerance=1e-5):
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    apart = (got.float() - want.float()).abs().max().item()
    assert apart <= tolerance * max(1, want.float().abs().max()), f"{what}: {apart:.1e} apart"


@torch.no_grad()
def encoder_opens(folder, facts, want):
    kind = getattr(transformers, facts["class"])
    model = opened(kind, folder, **facts["options"])
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **PILLOW)
    pixels = processor(picture(), return_tensors="pt")["pixel_values"]
    same("pixels", pixels, want["pixels"], 0)
    if facts["read"] == "block":
        features = model(pixels, output_hidden_states=True).hidden_states[-1]
    else:
        features = model(pixels).last_hidden_state
    same("features", features[:, facts["prefix"]:], want["features"])
    same("the card's features", run_card(folder)["features"], want["features"])
    return model, processor


@torch.no_grad()
def full_opens(folder, facts, want):
    """With the original's last block: what others read, of the very folder that they open."""
    model = opened(getattr(transformers, facts["class"]), folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **PILLOW)
    pixels = processor(picture(), return_tensors="pt")["pixel_values"]
    same("pixels", pixels, want["pixels"], 0)
    if facts["class"] == "CLIPVisionModel":       # LLaVA opens CLIP's processor, whatever the file says
        clip = transformers.CLIPImageProcessor.from_pretrained(folder)
        size = {"height": pixels.shape[-1], "width": pixels.shape[-1]}
        assert clip.size == clip.crop_size == size, clip
        same("CLIP's pixels", clip(picture(), return_tensors="pt")["pixel_values"], pixels)
    features = model(pixels, output_hidden_states=True).hidden_states[-2]
    same("features", features[:, facts["prefix"]:], want["features"])
    same("the card's features", run_card(folder)["features"], want["features"])
    return model, processor


@torch.no_grad()
def final_opens(folder, facts, want):
    model = opened(transformers.AutoModelForImageTextToText, folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, **PILLOW)
    messages = [{"role": "user", "content": [{"type": "image"},
                                             {"type": "text", "text": "What shape is it?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    same("ids", inputs["input_ids"], want["input_ids"], 0)
    same("pixels of final", inputs["pixel_values"], want["pixels"], 0)
    same("logits", model(**inputs).logits, want["logits"])
    said = run_card(folder)
    answer = said["processor"].decode(said["answer"], skip_special_tokens=True)
    assert answer == facts["answer"], f"the card's answer: {answer!r}, not {facts['answer']!r}"
    return model, processor


CHECKS = {"encoder": encoder_opens, "encoder-full": full_opens, "final": final_opens}


def outcome(check, folder, facts, want, saved=None):
    """"opens", or why not, as one line. saved: where to save what was opened."""
    try:
        opened = check(folder, facts, want)
    except Exception as e:
        return (str(e).strip() or type(e).__name__).splitlines()[0]
    for each in opened if saved else ():
        each.save_pretrained(saved)
    return "opens"


def main():
    root, wrong, count = Path(sys.argv[1]), 0, 0
    table = json.loads((Path(__file__).parent / "opens.json").read_text())
    print(f"transformers {transformers.__version__}")
    for name, row in table.items():
        facts = json.loads((root / name / "facts.json").read_text())
        want = load_file(root / name / "expected.safetensors")
        for what, versions in row.items():
            said = outcome(CHECKS[what], root / name / what, facts, want,
                           root / name / "saved" / what)
            stated = versions[VERSION]
            fits = said == stated or (stated != "opens" and stated in said)
            wrong, count = wrong + (not fits), count + 1
            print(f"  {name:<24}{what:<14}{said[:90]}" + ("" if fits else f"   STATED: {stated}"))
    if wrong:
        sys.exit(f"error: {wrong} of {count} are not as tests/opens.json says")


if __name__ == "__main__":
    main()
