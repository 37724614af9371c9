"""Does RL see better than SFT? The paper's controlled comparison at toy scale, with seeds.

    python -m study --dry-run               # what it would run and how long; runs nothing
    python -m study                         # everything, 5 seeds, two runs at a time (hours)
    python -m study.report --against runs/study/results     # the same numbers as in results/?
    python -m study --parts lr vqa eye      # the most important parts first; later the others
    python -m study --minutes 140           # a slice: call it again, and it goes on
    python -m study --quick --seeds 1       # every command once, tiny sizes: does it all work?

A seed is a world of its own: other images, questions, pairs and test sets, another order, another
projector; toy-vit and toy-lm are the same. Of each seed there is one stage-1 model; SFT and DPO go
on from it with the same items in the same order for the same number of passes (equal data digests
are checked). Each method's learning rate is the best of one grid on validation images.

The pairs are hard for this very model: it answers a pool of questions, drawn at temperature 1, and
what is wrong becomes the rejected answer (`sampled`, as in MMPR). The controls change that alone:
`swapped` (the toy's: one attribute changed at random), `shuffled` (the right answer to another
question), or the picture alone, `images` (another item's); `easy` are random items of the pool.

Everything goes through the stages' public commands. Writes OUT/<part>/<run>.json, a file a run,
whole or not at all: stopped at any moment and started again, it goes on; what is there is never
done again. Then report.py writes table and figures there (of results/ study/README.md, too).
The committed results are in results/, and so is the registration: results/README.md fixed
beforehand what counts as a finding.
"""
import argparse
import ast
import fcntl
import functools
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path

from pivot import files
from study.pairs import write
from study.plan import FULL, PARTS, QUICK, Study

# Seconds of each command on one thread of an AMD EPYC, alone on its core; of --quick, START.
COST = {"world": 60, "stage1": 110, "pool": 150, "sft": 75, "dpo": 105, "vqa": 20, "val": 20,
        "repair": 110, "linear": 6, "seg": 15, "align": 10, "heat": 40, "extract": 6,
        "mpo": 110, "grpo": 400, "ppo": 450, "draw": 150, "held": 40,
        "toy-vit-l": 1200, "toy-lm-l": 4800, "toy-vit-supervised": 600, "toy-vit-masked": 600}
START = 6
# How sums are rounded depends on threads, GPU and vector units, and 300 steps later a model on it
# in its fourth digit. So: one thread, no GPU, AVX2 also where there is AVX-512.
ARITHMETIC = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ATEN_CPU_CAPABILITY": "avx2",
              "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def record_of(task, out):
    """The file that says what a task gave: its result or, of what only others need, a note."""
    return task.done if task.part else out / "made" / (task.name.replace("/", "-") + ".json")


def diverged(task, out):
    """Was its loss no number? It is a function of the seed: not run again, and the seed is lost for
    all that needs it. (A result with such values is there, like any other.)"""
    record = record_of(task, out)
    return task.part is None and not task.done.exists() and record.exists() and \
        "diverged" in (json.loads(record.read_text())["values"] or {})


def execute(task, out, log, live, ours):
    """Run a task's commands, one after the other, on one thread; write its result or, of what only
    others need, a note in OUT/made/: what it was made of and what it cost. Where just the note was
    lost, nothing is run. `live`: what runs now, for a stop to end it; `ours`: what made_by says.
    → seconds it took, with those of earlier attempts that were stopped: the stage went on from
    there."""
    spent = log.with_suffix(".seconds")
    start = time.time() - (float(spent.read_text()) if spent.exists() else 0)
    commands = [] if task.done.exists() else [[str(x) for x in c] for c in task.steps()]
    log.parent.mkdir(parents=True, exist_ok=True)

    def stop():
        files.write_text(spent, str(time.time() - start))
        raise SystemExit("stopped")
    env = {**os.environ, **ARITHMETIC, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
           "RAYON_NUM_THREADS": "1"}
    for command in commands:
        if live.stopping:
            stop()
        words = command if command[0] == sys.executable else [sys.executable, *command]
        with open(log, "a") as said:
            said.write(f"\n$ {' '.join(command)}\n")
            said.flush()
            process = subprocess.Popen(words, stdout=said, stderr=said, env=env, close_fds=False)
            live.add(process)
            if live.stopping:             # asked to stop before it was among those that run
                process.terminate()
            code = process.wait()
            live.discard(process)
        if code:
            said = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
            if live.stopping:
                stop()
            said = next((x for x in reversed(said[-20:]) if "rror" in x), said[-1])
            if "nothing was updated" not in said:
                raise SystemExit(said)
            values = {"diverged": said}           # that is a result, too
            break
    else:
        values = task.gather() if task.gather else None
    seconds = time.time() - start
    write(record_of(task, out), {
        "run": task.name, **ours,
        "commands": [" ".join(c).replace(sys.executable, "python") for c in commands],
        "values": values, "seconds": round(seconds, 1)})
    spent.unlink(missing_ok=True)
    if diverged(task, out):
        raise SystemExit(f"the seed is lost for all that needs this: {values['diverged']}")
    if not task.done.exists():
        raise SystemExit(f"{task.done} was not made; see {log}")
    return seconds


class Live(set):
    """Processes that run now, and whether they were asked to stop."""
    stopping = False

    def stop(self):
        self.stopping = True
        for process in list(self):
            process.terminate()           # a training stage saves, the same command goes on there


def code_of(path):
    """The lines of a source file without docstrings and comments: these may change."""
    return code_in(path.read_text(encoding="utf-8"))


@functools.cache                                 # a report asks for every result
def code_in(text):
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    lines = [line.split("  # ")[0].rstrip() for line in lines]
    return [line for line in lines if line and not line.lstrip().startswith("#")]


def digest(sizes):
    """What a result is a result of: the sizes, and the code that makes commands and pairs."""
    code = [code_of(Path(__file__).with_name(f"{n}.py")) for n in ("plan", "pairs", "models")]
    return hashlib.sha256(json.dumps([sizes, code], sort_keys=True).encode()).hexdigest()[:12]


def same_plan(found, ours):
    """Is a digest that a result remembers the one of this code? registered.json names an earlier
    one, of code that asked for the very same; a test shows that it did, and ties it to this code.
    """
    known = json.loads(Path(__file__).with_name("registered.json").read_text())["digests"]
    return ours in (found, known.get(found))


def whole_code():
    """The same of all code that makes results, and of the pretrained models: noted in each result.
    A change that leaves the plan alone is not refused; the report says how many states there were.
    """
    root, sha = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(p for folder in ("pivot", "judge", "toy", "study")
                                              for p in (root / folder).glob("*.py"))]):
        name = str(path.relative_to(root))
        if name not in ("study/findings.py", "study/report.py", "study/signals_table.py"):
            sha.update(json.dumps([name, code_of(path)]).encode())
    for path in sorted(root.glob("weights/toy-*/*")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def versions():
    return {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}


def made_by(sizes):
    """What every result says of its making."""
    return {"plan": digest(sizes), "code": whole_code(), "versions": versions(),
            "arithmetic": "AVX2"}


def pending(study, parts):
    """Tasks to run for these parts, what others need before them: [Task, …]. What is there but has
    no note is among them; what needs a run that diverged is not."""
    queue = {}

    def visit(name):
        """→ Will it be there?"""
        task = study.tasks[name]
        if not task.done.exists() and name not in queue:
            if diverged(task, study.out) or not all([visit(need) for need in task.needs]):
                return False
        if not (task.done.exists() and record_of(task, study.out).exists()):
            queue[name] = task
        return True
    for task in study.tasks.values():
        if task.part in parts or task.part is None and task.done.exists():
            visit(task.name)
    return list(queue.values())


def seconds_of(task, quick=False):
    """Estimate of a task on one thread. A quick one spends its time on starting; where just a note
    was lost, there is nothing to run."""
    return 0 if task.done.exists() else sum(
        START * max(1, n) if quick else COST[c] * n for c, n in task.cost.items())


def clock(seconds):
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_tasks(study, parts, jobs, quick, what=PARTS):
    """What is still to be run and what it costs, part by part; what parts share is counted where
    it comes first. what: each part in words."""
    seen, total = set(), 0
    print(f"{study.seeds} seeds, {jobs} runs at a time, one thread each; estimates of one AMD EPYC "
          f"core a run\n{'part':<12}{'runs':>6}{'to do':>7}{'time':>10}  what")
    for part in parts:
        todo = [t for t in pending(study, [part]) if t.name not in seen]
        seen |= {t.name for t in todo}
        cost = sum(seconds_of(t, quick) for t in todo) / jobs
        runs = [t for t in study.tasks.values() if t.part == part]
        total += cost
        print(f"{part:<12}{len(runs):>6}{sum(t.part == part for t in todo):>7}{clock(cost):>10}  "
              f"{what[part]}")
    print(f"{'in all':<25}{clock(total):>10}")


def go(study, parts, jobs, quick, limit=float("inf")):
    """Run all that is pending, but start nothing that would not end within `limit` seconds;
    → {task that failed: why}."""
    queue, failed, live, spent, planned = pending(study, parts), {}, Live(), 0.0, 0.0
    count, done, cost = len(queue), 0, {t.name: seconds_of(t, quick) for t in queue}
    running, start, pace = {}, time.time(), 1.0
    ours = made_by(study.sizes)                  # as it is now, when runs begin
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while queue or running:
                for task in list(queue):
                    lost = [n for n in task.needs if n in failed]
                    if lost:
                        queue.remove(task)
                        failed[task.name] = f"needs {lost[0]}"
                    elif len(running) < jobs and (task.done.exists() or all(
                            study.tasks[n].done.exists() for n in task.needs)) and \
                            time.time() - start + cost[task.name] * pace < limit:
                        queue.remove(task)
                        log = study.work / "logs" / (task.name.replace("/", "-") + ".log")
                        running[pool.submit(execute, task, study.out, log, live, ours)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    done += 1
                    try:
                        spent += future.result()
                        planned += cost[task.name]
                    except (Exception, SystemExit) as e:    # whatever it is: of this task alone
                        failed[task.name] = str(e) if isinstance(e, SystemExit) else repr(e)
                        print(f"FAILED {task.name}: {failed[task.name]}", flush=True)
                        continue
                    pace = spent / planned if planned else 1.0      # this machine's, of estimates
                    rest = sum(cost[t.name] for t in [*queue, *running.values()])
                    print(f"[{done}/{count}] {task.name}, {clock(time.time() - start)} gone, about "
                          f"{clock(rest * pace / jobs)} left", flush=True)
        except KeyboardInterrupt:
            live.stop()
            raise SystemExit("stopped; the same command goes on from here")
    if queue and not failed:
        print(f"{len(queue)} runs are left: the time is up; the same command goes on from here")
    for task in queue:
        if cost[task.name] * pace >= limit:
            print(f"{task.name} alone takes about {clock(cost[task.name] * pace)}: it is never "
                  f"started within {clock(limit)}; allow more --minutes once")
    return failed


def refuse_other_plans(study):
    """Results and models of another plan, or of other libraries, are not mixed with these; raises
    SystemExit."""
    ours = made_by(study.sizes)

    def bare(facts, key):             # +cpu and +cu130 are builds of one torch
        return re.sub(r"\+\w+", "", json.dumps(facts[key], sort_keys=True))
    for path in [study.work / "plan.json", *sorted(study.out.glob("*/*.json"))]:
        found = json.loads(path.read_text()) if path.exists() else ours
        for key, why in (("plan", "by another plan"), ("versions", "with other libraries")):
            if bare(found, key) != bare(ours, key) and not (
                    key == "plan" and same_plan(found[key], ours[key])):
                raise SystemExit(f"error: {path} was made {why} ({found[key]}, now {ours[key]})"
                                 "; name another --out and --work, or delete both")
    return ours


def get_args(doc=__doc__, what=PARTS, work="runs/study"):
    """what: its parts, {name: in words}; work: the default of --work."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=what, default=list(what), metavar="PART",
        help="; ".join(f"{k}: {v}" for k, v in what.items()) + "; default: all, in this order")
    add("--seeds", type=int, default=5, help="how many (default 5, as registered; fewer: a "
        "part of the study, which decides nothing)")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    add("--quick", action="store_true", help="tiny sizes: says whether everything works, and "
        "nothing else")
    add("--minutes", type=float, default=float("inf"), help="start nothing that would not end "
        "within so many; the same command goes on later (default: no limit)")
    add("--work", help=f"folder of worlds, models and logs (default {work}, or {work}-quick)")
    add("--out", help="folder of results (default WORK/results)")
    add("--dry-run", action="store_true", help="print what is to be run and its cost; run nothing")
    args = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name} must be at least 1")
    if args.seeds > FULL["seeds"]:
        raise SystemExit(f"error: --seeds must be at most {FULL['seeds']}: so many are registered")
    args.work = args.work or (f"{work}-quick" if args.quick else work)
    args.out = args.out or f"{args.work}/results"
    return args


def main():
    args = get_args()
    carry_out(args, Study(QUICK if args.quick else FULL, args.seeds, args.work, args.out))


def carry_out(args, study, what=PARTS, report="study.report"):
    """Run what is pending of a plan, then its report: a module with --out and --quick."""
    refuse_other_plans(study)
    parts = [p for p in what if p in args.parts]
    show_tasks(study, parts, args.jobs, args.quick, what)
    if args.dry_run:
        return
    study.work.mkdir(parents=True, exist_ok=True)
    with open(study.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another study runs in {study.work}, or a command of one that "
                             "was killed; wait for its end")
        # Once more: now nobody else writes here.
        write(study.work / "plan.json", refuse_other_plans(study))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Commands inherit the lock: it is held as long as one of them lives, whatever ends us.
        os.set_inheritable(lock.fileno(), True)
        failed = go(study, parts, args.jobs, args.quick, 60 * args.minutes)
    done = subprocess.run([sys.executable, "-m", report, "--out", study.out,
                           *(["--quick"] if args.quick else [])])
    if done.returncode:
        failed[report] = f"exit status {done.returncode}"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{clock(used.ru_utime + used.ru_stime)} of CPU time in this call")
    if failed:
        raise SystemExit("error: " + "; ".join(f"{k}: {v}" for k, v in failed.items()))


if __name__ == "__main__":
    main()
