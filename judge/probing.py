"""What the probes share: how compared models are opened and called, where results go."""
from pathlib import Path

from pivot import convert, encoders, model_io, published
from pivot.distributed import print0


def short_names(paths, flag="encoder"):
    """runs/x/dpo/encoder → dpo; where names agree, as much more of the path as tells them apart."""
    places = [Path(encoders.resolve(encoders.parts_of(p)[0])).resolve() for p in paths]
    for path, place in zip(paths, places):
        if len(encoders.parts_of(path)) > 1:
            raise SystemExit(f"error: --{flag} {path}: one model at a time, not A+B")
        if places.count(place) > 1:
            raise SystemExit(f"error: --{flag} {path} is given twice")
    parts = [p.parts[:-1] if p.name in ("encoder", "final") else p.parts for p in map(Path, paths)]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]).lower() for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def default_out(paths, instrument):
    """runs/NAME/probes/INSTRUMENT, of the first model that lies in a run folder."""
    runs = [p.parent.parent for p in map(Path, paths) if p.name in ("encoder", "final")]
    run = Path(runs[0] if runs else "runs")
    return (run.parent if run.name == "repair" else run) / "probes" / instrument


def open_encoder(name, image_size=None):
    """An encoder for a probe; image_size: another input size than its own."""
    return published.load_encoder(name, image_size).eval()


def open_mllm(path, image_size=None):
    """A trained model for a probe, the same way: (its encoder, its projector)."""
    model = single_encoder(model_io.load_mllm(path)[0], path).eval()
    encoder = model.encoder
    if image_size:
        vision = convert.resize_positions(encoder.vision, image_size)
        encoder = encoders.Encoder(vision, encoder.mean, encoder.std).eval()
    return encoder, model.projector


def single_encoder(model, path):
    """The trained model in `path`; raises SystemExit where it was made of two encoders, A+B."""
    if len(model.encoder.parts) > 1:
        raise SystemExit(f"error: {path} has two encoders: probe each by itself (--encoder)")
    return model


def say_sizes(sizes):
    """Print who has which input size, where encoders on one line differ. sizes: {name: pixels}."""
    by_size = {}
    for name, size in sizes.items():
        by_size.setdefault(size, []).append(name)
    if len(by_size) > 1:
        said = "; ".join(f"{', '.join(names)} {size}" for size, names in by_size.items())
        print0(f"input sizes differ: {said} (--image-size N gives all the same)")
