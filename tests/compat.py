"""Open the folders that tests/test_opens.py wrote, with whatever transformers is installed here.

    python tests/compat.py FOLDER        # `make compat`: with transformers 4.57.6, which saves what
                                         # it opened as FOLDER/NAME/saved/…, for the way back

FOLDER/NAME/{encoder,final} are what extract.py and the stages wrote; FOLDER/NAME/expected.safetensors
holds the pixels, ids, features and logits of the code that wrote them; tests/opens.json says of each
whether it opens. What opens gives the same through the plain `from_pretrained`, with no missing or
unexpected key; what cannot is refused by name.
"""
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
    return model, processor


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
    root, wrong = Path(sys.argv[1]), 0
    table = json.loads((Path(__file__).parent / "opens.json").read_text())
    print(f"transformers {transformers.__version__}")
    for name, row in table.items():
        facts = json.loads((root / name / "facts.json").read_text())
        want = load_file(root / name / "expected.safetensors")
        for what, check in (("encoder", encoder_opens), ("final", final_opens)):
            said = outcome(check, root / name / what, facts, want, root / name / "saved" / what)
            stated = row[what][VERSION]
            fits = said == stated or (stated != "opens" and stated in said)
            wrong += not fits
            print(f"  {name:<24}{what:<9}{said[:90]}" + ("" if fits else f"   STATED: {stated}"))
    if wrong:
        sys.exit(f"error: {wrong} of {2 * len(table)} are not as tests/opens.json says")


if __name__ == "__main__":
    main()
