"""Shared by all tests: a small world, tiny models, and stages run as a user runs them."""
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "offline")]
os.environ["PYTHONPATH"] = str(ROOT / "tests" / "offline")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored, where `&` started the suite
signal.signal(signal.SIGHUP, signal.SIG_DFL)               # and where nohup did
# The same rounding on every processor, as study.ARITHMETIC; set before torch is imported.
os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# A cache of its own: inductor's key does not know the capability, and code made for 16 floats at a
# time gives NaN where 8 are meant.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / ".pytest_cache/torchinductor")

# The guard against connections, for this process too (Python may have a sitecustomize of its own).
import importlib.util  # noqa: E402
spec = importlib.util.spec_from_file_location("guard", ROOT / "tests/offline/sitecustomize.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))

import pytest  # noqa: E402
import torch  # noqa: E402

from pivot import encoders, published  # noqa: E402
import in_fork  # noqa: E402
import model as m  # noqa: E402
from pivot import distributed  # noqa: E402, F401  (sets the environment transformers reads)

# Side by side (pytest -n 2) two threads each would wait for one another.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


LONG = os.environ.get("PIVOT_KILLS") == "long"                  # `make kill`, or `make test`?


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute; part of `make kill`, not `make test`")


def pytest_collection_modifyitems(items):
    """What is slow is for `make kill`. Files that take minutes begin first: all workers then end at
    about the same time."""
    for item in items:
        if item.get_closest_marker("slow") and not LONG:
            item.add_marker(pytest.mark.skip(reason="slow: make kill"))
    long = ("test_stages.py", "test_ends.py", "test_survive.py", "test_headline.py", "test_plan.py",
            "test_house.py", "test_llms.py", "test_bench.py")
    items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))


ENDED = "seconds from the failure to the end of all processes"


def pytest_terminal_summary(terminalreporter):
    """The longest of the ends that test_ends.py waited for."""
    took = [(value, report.nodeid) for report in terminalreporter.getreports("passed")
            for name, value in report.user_properties if name == ENDED]
    if took:
        terminalreporter.write_line(f"{ENDED}, of {len(took)} ends, at most: "
                                    "{:.1f} ({})".format(*max(took)))


def run(*command, processes=1, check=True, root=ROOT):
    """Run a script of the repository, or "-m" and a module, in one process or several, which are
    forks that have torch imported already; → CompletedProcess. root: another checkout of it."""
    with tempfile.TemporaryDirectory() as folder:
        done = in_fork.run(in_fork.server(), [str(c) for c in command], root, Path(folder),
                           processes=processes, root=root)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def bit_equal(a, b):
    """Two stage folders ended alike: the same numbers, the same weights, nothing left aside."""
    for name in ("metrics.jsonl", "final/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert not list(a.rglob("*.tmp")) and not (a / "checkpoints").exists()


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The toy world at 1/50 of its size: 32 captions, 140 conversations, 96 pairs."""
    out = tmp_path_factory.mktemp("world") / "toy"
    run("-m", "toy", out, "--scale", 0.02)
    return out


COMMON = ["--llm", "toy-lm", "--global-batch", 8, "--micro-batch", 8, "--workers", 0]


@pytest.fixture(scope="session")
def stage1(world, tmp_path_factory):
    """A run folder with a stage-1 model of 2 + 3 steps."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    run("pretrain.py", "--run", folder, "--encoder", "toy-vit", *COMMON, "--data", world,
        "--projector-max-steps", 2, "--max-steps", 3)
    return folder


def copied(stage1, folder):
    """The stage-1 model in a run folder of a test's own, without what others trained from it."""
    shutil.copytree(stage1 / "pretrain", folder / "pretrain")
    return folder


@pytest.fixture
def fresh(stage1, tmp_path):
    """A copy of the stage-1 run folder that a test may spoil."""
    return copied(stage1, tmp_path / "run")


def under(wrapper, script, stage, **environment):
    """Write the script that runs a stage under a file of tests/ which reads these variables."""
    environment = {name: str(value) for name, value in environment.items()}
    script.write_text(
        f"import os, runpy, sys\nos.environ.update({environment!r})\n"
        f"sys.argv = [{wrapper!r}, {str(ROOT / stage)!r}, *sys.argv[1:]]\n"
        f"runpy.run_path({str(ROOT / 'tests' / wrapper)!r}, run_name='__main__')\n")
    return script


def killed_at(moment, place, line, processes=1):
    """Run a stage that kills itself when it meets a moment of tests/killed.py, "what:count:rank".
    place: a folder of this kill's own, made here; line: the stage's script and flags."""
    place.mkdir()
    mark = place / "mark"
    script = under("killed.py", place / "script.py", line[0], KILL=moment, KILL_MARK=mark)
    done = run(script, *line[1:], processes=processes, check=False)
    ended = done.returncode == -9 if processes == 1 else done.returncode != 0
    assert mark.exists() and ended, f"{moment}: not met\n{done.stderr[-3000:]}"


VISION = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
              image_size=32, patch_size=8)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=64, initializer_range=0.2)


def tiny_model(vision="siglip", llm="qwen2", tie=True, seed=0, dtype=torch.float32):
    """A random model of the real classes, small enough for fp64; `<image>` is id 63."""
    import transformers as t
    torch.manual_seed(seed)
    eye = {"siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
           "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
           "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
           "vit": lambda: t.ViTModel(t.ViTConfig(**VISION), add_pooling_layer=False)}[vision]()
    with torch.no_grad():
        for p in eye.parameters():     # HF starts at 0.02: too tame for a test to see an error
            p.add_(0.2 * torch.randn_like(p))
    head = {"qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, tie_word_embeddings=tie)),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=tie)),
            }[llm]()
    encoder = encoders.Encoder(encoders.truncate(eye), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return published.refuse_dropout(m.MLLM(encoder, head, image_token_id=63)).to(dtype)


@torch.no_grad()
def make_wild(model):
    """Wild random weights for an MLLM's LLM and projector, in place: what it then says hangs on
    every token and pixel."""
    torch.manual_seed(0)
    for p in (*model.llm.parameters(), *model.projector.parameters()):
        p.normal_(0, 0.3) if p.dim() == 2 else p.fill_(1)
