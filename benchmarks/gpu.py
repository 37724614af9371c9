"""All that a GPU can show, in one command of at most nine minutes: right, fast, small?

    make gpu                                     # on a machine with a GPU, as PYTHON stands
    python benchmarks/gpu.py [--parts correct speed trl generate decode] [--minutes 9]
    make gpu GPU=--quick                         # the CPU path at tiny sizes: does it all run?

  correct    losses on the GPU beside the CPU's, bf16 beside fp32, every attention kernel beside its
             definition, resuming, two processes on one card, waits of host and device
  speed      DPO and SFT steps at so400m + Qwen2.5-0.5B and 1.5B: samples/s, memory, the share of
             the card's own bf16 product rate, beside what tools.plan says; the best one's kernels
  trl        a DPO step beside that of TRL's DPOTrainer, where TRL can be imported
  generate   answers/s at batch 64 beside transformers' generate
  decode     images/s of the loader

Random weights of the published geometry; no network, and no package but the six of run time. Each
piece of a part is a process of its own with a time limit: one that dies or takes too long is named,
and the others run. Writes, as it comes, benchmarks/results-gpu/CARD-COMMIT.json (--quick:
benchmarks/results/gpu-quick.json). Several short calls on the same card and commit make one result.
Exits with 1 where a piece failed, a check did, or there is no GPU.
"""
import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from pivot import files, printing  # noqa: E402

NEEDED = ("torch", "transformers", "safetensors", "PIL", "numpy", "tqdm")
PARTS = ("correct", "speed", "trl", "generate", "decode")
RESULTS = ROOT / "benchmarks" / "results-gpu"
PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy", "triton", "trl")
LEAST = 15                        # seconds without which a piece is not begun
SLOW = 6                          # so many times a piece's limit on whatever runs --quick


class Piece(NamedTuple):
    """What one process does: work(say, quick), where say(row) hands over a dict of the result at
    once. A row with "ok" is a check. limit: seconds; cuda: needs a GPU."""
    part: str
    name: str
    work: Callable
    limit: float
    cuda: bool = False

    @property
    def title(self):
        return f"{self.part}: {self.name}"


def pieces():
    """All of them, what is worth most first. (Imported here: --help needs no torch.)"""
    import gpu_correct
    import gpu_speed
    return [Piece(*piece) for piece in (*gpu_correct.PIECES, *gpu_speed.PIECES)]


# ------------------------------------------------------------------------------------- one piece

def alone(pipe, work, quick):
    """A piece's own process: its rows, then how it ended. Its children are of its own group."""
    os.setsid()
    try:
        work(lambda row: pipe.send(("row", row)), quick)
        pipe.send(("end", "done"))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("end", f"FAILED: {type(error).__name__}: {printing.first_line(error)[:300]}"))


def carry_out(context, piece, quick, limit, keep):
    """Run a piece for at most `limit` seconds; keep(row) as each row comes. → how it ended."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=alone, args=(theirs, piece.work, quick))
    process.start()
    theirs.close()
    ends, ended = time.monotonic() + limit, None
    try:
        while ended is None:
            if not ours.poll(max(0, ends - time.monotonic())):
                ended = f"FAILED: did not end within {limit:.0f} s"
                break
            kind, value = ours.recv()
            if kind == "row":
                keep(value)
            else:
                ended = value
    except EOFError:
        process.join(5)
        ended = f"FAILED: its process died (exit code {process.exitcode})"
    finally:
        stop(process)
    return ended


def stop(process):
    """End a piece's process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:                            # it has not begun, or all are gone
        process.kill()
    process.join(10)


# ------------------------------------------------------------------------------------- the result

def code_state():
    """(commit, digest): the commit, with -changed where files were; a digest of the code, by which
    the parts of one result are known to be of the same."""
    code = sorted(p for folder in (".", "pivot", "tools", "benchmarks")
                  for p in (ROOT / folder).glob("*.py"))
    digest = files.sha256(*code)

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    try:
        head, changed = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:
        return f"code-{digest[:10]}", digest
    if head.returncode:
        return f"code-{digest[:10]}", digest
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else ""), digest


def versions():
    """{package: version} of what is installed."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


class Result:
    """The JSON file: what was measured on one card with one state of the code."""

    def __init__(self, card, quick):
        commit, digest = code_state()
        slug = re.sub(r"[^a-z0-9]+", "-", card["name"].lower()).strip("-")
        self.path = RESULTS.parent / "results" / "gpu-quick.json" if quick else \
            RESULTS / f"{slug}-{commit}.json"
        self.facts = {"card": card, "commit": commit, "code": digest, "quick": quick,
                      "versions": versions(), "pieces": {}, "goals": []}
        if self.path.exists():
            old = files.read_json(self.path, "pieces", "code", "versions")
            if all(old[key] == self.facts[key] for key in ("code", "versions")):
                self.facts["pieces"] = old["pieces"]
            else:
                print(f"{self.path.name} is of other code or packages: begun anew")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, piece):
        self.facts["pieces"][piece.title] = {"part": piece.part, "ended": "FAILED: cut off",
                                             "seconds": None, "rows": []}

    def keep(self, piece, row):
        """A row, printed and on disk at once."""
        self.facts["pieces"][piece.title]["rows"].append(row)
        print(f"  {line_of(row)}", flush=True)
        self.write()

    def end(self, piece, ended, seconds):
        self.facts["pieces"][piece.title] |= {"ended": ended, "seconds": round(seconds, 1)}
        print(f"  {ended} ({seconds:.0f} s)", flush=True)
        self.write()

    def write(self):
        files.write_json(self.path, self.facts)

    def rows(self, part):
        return [row for piece in self.facts["pieces"].values() if piece["part"] == part
                for row in piece["rows"]]


def line_of(row):
    """A row for people: "what  key value, key value  FAILED"."""
    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    told = ", ".join(f"{k} {shown(v)}" for k, v in row.items()
                     if k not in ("what", "ok") and not isinstance(v, dict | list))
    many = "".join(f"\n    {shown(item)}" for v in row.values() if isinstance(v, list)
                   for item in v)
    verdict = "" if row.get("ok", True) else "  FAILED"
    return f"{row['what']}: {told}{verdict}{many}"


# ----------------------------------------------------------------------------------------- goals

ALL_MODES = 5           # sdpa, with checkpointing, with compile; flex, with compile


def goals(result):
    """[{"goal", "measured", "verdict"}]: met, not met, or not measured, as all are on a CPU."""
    on_gpu = result.facts["card"]["name"] != "cpu"
    steps = [row for row in result.rows("speed") if on_gpu and "samples_per_s" in row]
    dpo = [row for row in steps if row["setting"]["stage"] == "dpo"]
    shares = [row["share"] for row in dpo if row["setting"]["llm"] == "qwen2.5-1.5b"]
    modes = {tuple(row["setting"][key] for key in ("attention", "compiled", "checkpointing"))
             for row in dpo}
    off = [row["step0_bf16"] for row in (*dpo, *result.rows("correct"))
           if row.get("step0_bf16") is not None]
    apart = [abs(row["peak"] / row["planned_peak"] - 1) for row in steps]
    times, memory = beside_trl(result.rows("trl") if on_gpu else [])

    def goal(what, value, met):
        verdict = "not measured" if value is None else "met" if met(value) else "not met"
        return {"goal": what, "measured": value, "verdict": verdict}
    return [
        goal("DPO step at so400m + 1.5B, share of the card's product rate ≥ 0.40",
             max(shares, default=None), lambda x: x >= 0.40),
        goal("times TRL's pairs/s at its best settings ≥ 3", times, lambda x: x >= 3),
        goal("times TRL's memory ≤ 0.6", memory, lambda x: x <= 0.6),
        goal("step 0 off ln 2, or its margin off 0, in bf16, in every mode ≤ 1e-3",
             max(off) if len(modes) == ALL_MODES else None, lambda x: x <= 1e-3),
        goal("planner's memory off by ≤ 0.10", max(apart, default=None), lambda x: x <= 0.10)]


def beside_trl(rows):
    """(times as fast, times the memory) of our best mode beside TRL, its slowest round beside TRL's
    fastest; (None, None) where a side is missing."""
    rounds = {"ours": {}, "TRL": {}}
    for row in rows:
        if "samples_per_s" in row:
            rounds[row["side"]].setdefault(row["what"], []).append(row)
    if not rounds["ours"] or not rounds["TRL"]:
        return None, None
    ours = max(rounds["ours"].values(), key=lambda of: min(row["samples_per_s"] for row in of))
    theirs = [row for of in rounds["TRL"].values() for row in of]
    return (min(row["samples_per_s"] for row in ours)
            / max(row["samples_per_s"] for row in theirs),
            max(row["peak"] for row in ours) / min(row["peak"] for row in theirs))


def speed_table(rows):
    """The steps, what was measured and what was planned of each; [] where there are none."""
    steps = [row for row in rows if "samples_per_s" in row]
    if not steps:
        return []

    def gb(size):
        return "" if size is None else f"{size / 1e9:.2f}"
    header = ["step", "samples/s", "tokens/s", "of product rate", "GB", "planned", "hours",
              "planned"]
    return printing.table([header] + [
        [row["what"], f"{row['samples_per_s']:.2f}", f"{row['tokens_per_s']:.0f}",
         f"{row['share']:.1%}", gb(row["peak"]), gb(row["planned_peak"]), f"{row['hours']:.2f}",
         f"{row['planned_hours']:.2f}"] for row in steps])


# --------------------------------------------------------------------------------------- the whole

def card_of(say, quick):
    """The card's name, memory and product rate, seen from a process of its own."""
    import torch
    import gpu_models
    from pivot import distributed
    cuda = torch.cuda.is_available()
    if not cuda and not quick:
        say({"what": "card", "name": "none"})
        return
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    row = {"what": "card", "name": torch.cuda.get_device_name() if cuda else "cpu",
           "cores": distributed.cores()}
    if cuda:
        facts = torch.cuda.get_device_properties(0)
        row |= {"bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}",
                "cuda": torch.version.cuda}
    say(row | {"bf16_product_flops": gpu_models.product_rate(device, quick)})


def find_card(quick):
    """(context, card) to run pieces with. A server that has imported all forks each piece; where a
    fork cannot open CUDA, each piece imports for itself."""
    piece, card = Piece("card", "card", card_of, 120), {}
    for method in ("forkserver", "spawn"):
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["gpu_correct", "gpu_speed"])
        ended = carry_out(context, piece, quick, piece.limit, card.update)
        if ended == "done":
            return context, card
    raise SystemExit(f"error: the card could not be opened: {ended}")


def run_pieces(context, wanted, result, quick, ends):
    """One after the other until `ends` (time.monotonic); what is left out is named."""
    cuda = result.facts["card"]["name"] != "cpu"
    for piece in wanted:
        print(f"\n{piece.title}", flush=True)
        result.begin(piece)
        left, began = ends - time.monotonic(), time.monotonic()
        if piece.cuda and not cuda:
            ended = "left out: needs CUDA"
        elif left < LEAST:
            ended = "left out: the minutes are over"
        else:
            ended = carry_out(context, piece, quick, min(SLOW * piece.limit if quick else
                                                         piece.limit, left),
                              lambda row: result.keep(piece, row))
        result.end(piece, ended, time.monotonic() - began)


def report(result):
    """Print steps, how all ended, and the goals. → whether nothing failed."""
    every = result.facts["pieces"]
    print("\n" + "\n".join([*speed_table(result.rows("speed")), "", *printing.table(
        [["piece", "seconds", "checks", "ended"]]
        + [[title, str(p["seconds"]), f"{sum(r['ok'] for r in p['rows'] if 'ok' in r)} of "
            f"{sum('ok' in r for r in p['rows'])}", p["ended"]] for title, p in every.items()])]))
    result.facts["goals"] = goals(result)
    result.write()
    print("\n" + "\n".join(printing.table([["goal (one H100)", "measured", ""]] + [
        [g["goal"], "" if g["measured"] is None else f"{g['measured']:.3g}", g["verdict"]]
        for g in result.facts["goals"]])))
    print(f"\nwrote {result.path.relative_to(ROOT)}")
    return not any(p["ended"].startswith("FAILED") or not all(r.get("ok", True) for r in p["rows"])
                   for p in every.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9, help="for all of them (default 9; "
                        "--quick takes what it takes)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; on a CPU too, where what "
                        "needs CUDA is left out by name")
    args = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # the piece that runs is ended, too
    os.environ.update(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    # Else torch may open CUDA to see whether there is one, and no fork could use it afterwards.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {sys.executable} has no {missing[0]}; name another by "
                         f"make gpu PYTHON=…")
    ends = time.monotonic() + 60 * (60 if args.quick else args.minutes)
    context, card = find_card(args.quick)
    if card["name"] == "none":
        raise SystemExit("error: no GPU that torch can use; --quick tries the same on the CPU at "
                         "tiny sizes (make gpu GPU=--quick)")
    result = Result(card, args.quick)
    print(line_of(card) + "\n" + json.dumps(result.facts["versions"]))
    run_pieces(context, [p for p in pieces() if p.part in args.parts], result, args.quick,
               ends)
    if not report(result):
        raise SystemExit("error: not all of it succeeded: see FAILED above")


if __name__ == "__main__":
    main()
