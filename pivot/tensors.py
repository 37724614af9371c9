"""The ground floor: tensors in files. What identifies them, what fits, how far they moved."""
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from pivot import files, printing


class Stored(NamedTuple):
    """A tensor in an open safetensors file, not yet read."""
    file: object
    key: str

    def tensor(self):
        return self.file.get_tensor(self.key)

    def shape(self):
        return self.file.get_slice(self.key).get_shape()


def stored(folder):
    """{name: Stored} of a model's folder; raises SystemExit. A name is as the modules here have it,
    without the `vision_model.` that the hub's names of SigLIP and CLIP have in the middle."""
    from safetensors import SafetensorError, safe_open
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        try:
            file = safe_open(path, "pt")
        except SafetensorError as e:
            raise SystemExit(f"error: cannot read {path}: {printing.first_line(e)}")
        for key in file.keys():
            name = key.replace("vision_tower.vision_model.", "vision_tower.", 1)
            found[name] = Stored(file, key)
    return found


def refuse_misfit(who, wanted, found):
    """Raise SystemExit, one line, unless both {name: shape} agree: a model that is nearly the
    right one is worse than none."""
    other_shape = [name for name in wanted.keys() & found.keys()
                   if tuple(wanted[name]) != tuple(found[name])]
    for what, names in (("lacks", wanted.keys() - found.keys()),
                        ("has an unknown", found.keys() - wanted.keys()),
                        ("has, of another shape than expected,", other_shape)):
        if names:
            raise SystemExit(f"error: {who} {what} tensor {sorted(names)[0]} ({len(names)} in all)")


def digest_of(model):
    """sha256 over a model's weights: a file, or a folder's safetensors or pickles; a name on the
    hub stands for itself."""
    folder = Path(model)
    if not folder.exists():
        return str(model)
    if folder.is_file():
        return files.sha256(folder)
    return files.sha256(*(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))))


def tensors_digest(module):
    """sha256 over a module's tensors: equal digests mean an equal start (16 hex digits)."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def relative_change(tensors, group):
    """‖w − w₀‖ / ‖w₀‖ of every group of tensors, norms in fp64: ({group: change}, names of those
    that are bit-equal). tensors: (name, w, w₀), …; group: name → its group."""
    squares, still = {}, []
    for name, new, old in tensors:
        change, size = squares.get(group(name), (0.0, 0.0))
        squares[group(name)] = (change + (new - old).norm(dtype=torch.float64).item() ** 2,
                                size + old.norm(dtype=torch.float64).item() ** 2)
        if torch.equal(new, old):
            still.append(name)
    return {g: (c / s) ** 0.5 if s else 0.0 for g, (c, s) in squares.items()}, still
