"""What it costs to begin: reading a set of conversations for the first time, and opening its index.

    python benchmarks/indexing.py [--records 1000000] [--before DIR] [--quick]

A made-up set: two questions and answers about one of 1,000 pictures in each record, about 240 tokens
of toy-lm's. Measured, with one process and with several: seconds from the records to the first
micro-batch (no model), at the first start and the second; the memory that the set takes, the sum of
the processes' proportional shares (PSS) after every token was read; with strace, calls that ask the
file system, a record. DIR is a checkout of an earlier commit, measured beside it.
"""
import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
TRACED = 20_000                  # records whose calls are counted: strace is slow
WORDS = ("the a red blue circle square left right of is there many one two picture shows small "
         "large between above below next to and with bright dark which colour how answer").split()


def make(folder, records):
    """DATA/instruct.jsonl and DATA/images."""
    from PIL import Image
    rng = random.Random(0)
    for i in range(1000):
        (folder / f"images/{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (i % 256, i // 4, 7)).save(folder / f"images/{i % 10}/{i}.jpg")
    with open(folder / "instruct.jsonl", "w") as file:
        for i in range(records):
            turns = []
            for k in range(2):
                turns += [{"from": "human", "value": "<image>\n" * (k == 0) + " ".join(
                              rng.choices(WORDS, k=31)) + " ?"},
                          {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=31)) + f" {i}"}]
            image = f"{i % 10}/{i % 1000 // 10 * 10 + i % 10}.jpg"
            file.write(json.dumps({"id": i, "image": image, "conversations": turns}) + "\n")


def child(root, folder, place):
    """A process of a start: reads the set, and prints what it took. root: whose code."""
    sys.path.insert(0, root)
    import inspect

    from pivot import distributed, encoders, published
    import data
    distributed.start()
    os.chdir(root)
    tokenizer = published.open_tokenizer(encoders.resolve("toy-lm"))
    published.prepare_tokenizer(tokenizer)
    encoder = SimpleNamespace(image_size=48, num_tokens=36)
    run = SimpleNamespace(index=Path(place), folder=Path(place), list_bad=lambda bad: None,
                          args=SimpleNamespace(stall_timeout=30))
    indexed = "run" in inspect.signature(data.Samples.__init__).parameters
    before = pss()
    os.access("/the-set-begins", 0)                  # marks in strace's list
    began = time.perf_counter()
    samples = data.Samples("conversations", [(f"{folder}/instruct.jsonl", f"{folder}/images")],
                           tokenizer, encoder, 2048, **({"run": run} if indexed else {}))
    order = data.BatchOrder(samples, 256, 8, 0, *distributed.world())
    digest = order.digest(order.steps_per_epoch)
    os.access("/the-set-ends", 0)
    next(iter(data.loader(samples, order.schedule(0, 1), "answers", 0)))
    seconds = time.perf_counter() - began
    for array in (samples.ids, samples.roles, samples.offsets, samples.keys):
        array.max()                                  # every page of it
    distributed.barrier()
    memory = pss() - before
    distributed.barrier()
    print("measured " + json.dumps({"seconds": seconds, "memory": memory, "digest": digest,
                                    "tokens": len(samples.ids) / len(samples)}), flush=True)
    distributed.stop()


def pss():
    """Bytes of this process, pages that others share divided among them."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+)", text, re.M)[1]) * 1024


def start(root, folder, place, processes=1, trace=()):
    """→ what all processes of one start measured: seconds of the slowest, memory of all."""
    words = [Path(__file__), "--child", root, folder, place]
    command = [sys.executable, *words] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", *words]
    done = subprocess.run([str(x) for x in (*trace, *command)], capture_output=True, text=True)
    said = [json.loads(x[9:]) for x in done.stdout.splitlines() if x.startswith("measured ")]
    if len(said) != processes:
        raise SystemExit(f"error: {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return {"seconds": max(x["seconds"] for x in said), "memory": sum(x["memory"] for x in said),
            "digest": said[0]["digest"], "tokens": said[0]["tokens"]}


def calls(root, folder, place, log):
    """How often one process asks the file system before its first step."""
    start(root, folder, place, trace=("strace", "-f", "-qq", "-o", log, "-e",
                                      "trace=%file,%desc"))
    lines = Path(log).read_text(errors="replace").split("the-set-begins")[1]
    return lines.split("the-set-ends")[0].count("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--before", metavar="DIR", help="a checkout of an earlier commit")
    parser.add_argument("--quick", action="store_true", help="4,000 records: does it run?")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    import common as c
    records = 4000 if args.quick else args.records
    rows, result = [], []
    with tempfile.TemporaryDirectory(prefix="pivot-indexing-") as work:
        work = Path(work)
        make(work / "set", records)
        plans = [(f"{args.before}, {n}", args.before, n) for n in (1,) if args.before]
        plans += [(f"{n}", ROOT, n) for n in args.processes]
        for name, root, processes in plans:
            shutil.rmtree(work / "set-index", ignore_errors=True)
            for which in ("first",) if root == args.before else ("first", "second"):
                took = start(root, work / "set", work / "set-index", processes)
                rows.append([name, which, f"{took['seconds']:.1f}",
                             f"{took['memory'] / 2 ** 20:.0f}", took["digest"]])
                result.append({"code": name, "start": which, **took})
        c.table(["processes", "start", "seconds", "MiB", "data digest"], rows, left=2)
        print(f"{records} records of {result[0]['tokens']:.0f} tokens")
        if shutil.which("strace"):
            small = min(records, TRACED)
            make(work / "small", small)
            plans = [("before", args.before, "small", small)] if args.before else []
            plans += [("first", ROOT, "small", small), ("second", ROOT, "small", small),
                      ("second", ROOT, "set", records)]
            for name, root, data, count in plans:
                asked = calls(root, work / data, work / f"{data}-index", work / "log")
                print(f"{name}, {count} records: {asked} calls, {asked / count:.4f} a record")
                result.append({"code": name, "records": count, "calls": asked})
        else:
            print("strace is not here: calls are not counted")
    c.write("indexing", args, {"starts": result})


if __name__ == "__main__":
    main()
