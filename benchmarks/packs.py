"""Pictures from a pack beside the same pictures from files, on a local disk, in one run.

    python benchmarks/packs.py [--pictures 2000] [--quick]

Draws JPEGs of 640 × 480 (benchmarks/photos.py), writes each as a file and all of them into a pack,
compares the bits, and then reads them in a shuffled order, as training does: bytes alone, and
decoded and squashed to 384 pixels, with the disk's cache warm, and with it dropped before every
round (posix_fadvise; the memory of a machine that reads from the network holds nothing, either).
Also the look-up of a name by the record reader, `records.path_inside`. Files and pack take turns;
medians of the rounds: of processor time, which other work hardly changes, and, where the cache was
dropped and the disk is waited for, of the clock's. Uses a temporary folder in the current one.
"""
import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from photos import encoded, photo  # noqa: E402

from pivot import images, packs, records  # noqa: E402
from tools import prepare  # noqa: E402


def drop_cache(folder):
    """Let the disk forget what it keeps in memory of these files."""
    os.sync()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read(paths):
    for path in paths:
        with packs.open_file(path) as file:
            file.read()


def decode(paths):
    for path in paths:
        images.load_image(path, 384, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few pictures: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.pictures, args.rounds = 40, 1
    with tempfile.TemporaryDirectory(dir=".") as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "all.pack")
        names = [f"{i % 100:02d}/{i:06d}.jpg" for i in range(args.pictures)]
        for i, name in enumerate(names):
            (plain / name).parent.mkdir(parents=True, exist_ok=True)
            (plain / name).write_bytes(encoded(photo((640, 480), i), "JPEG"))
        prepare.pack(prepare.get_args(["pack", str(plain), str(packed)]))
        random.Random(0).shuffle(names)
        sides = {"files": [f"{plain}/{name}" for name in names],
                 "pack": [f"{packed}/{name}" for name in names]}
        for one, other in zip(*sides.values()):
            with packs.open_file(one) as a, packs.open_file(other) as b:
                assert a.read() == b.read(), one
        size = sum(os.path.getsize(path) for path in sides["files"])
        print(f"{args.pictures} JPEGs of 640 × 480, {size / args.pictures / 1000:.0f} KB each; the "
              f"same bytes from both; load {os.getloadavg()[0]:.1f}")

        def look_up(paths):
            root = str(plain if paths is sides["files"] else packed)
            for name in names:
                records.path_inside(name, root, "", False)
        some = min(100, args.pictures)
        works = {"look-up of a name": (look_up, False, args.pictures),
                 "bytes, warm": (read, False, args.pictures),
                 "bytes, cache dropped": (read, True, args.pictures),
                 "decoded, warm": (decode, False, some),
                 "decoded, cache dropped": (decode, True, some)}
        print(f"{'a second':<24}{'files':>10}{'pack':>10}{'pack / files':>14}")
        for what, (work, cold, count) in works.items():
            seconds = {side: [] for side in sides}
            for turn in range(args.rounds):
                for side in sorted(sides, reverse=turn % 2):       # take turns in going first
                    if cold:
                        drop_cache(folder)
                    paths = sides[side] if count == args.pictures else sides[side][:count]
                    clock = time.perf_counter if cold else time.process_time
                    began = clock()
                    work(paths)
                    seconds[side].append(clock() - began)
            a, b = (count / statistics.median(seconds[side]) for side in ("files", "pack"))
            print(f"{what:<24}{a:>10,.0f}{b:>10,.0f}{b / a:>14.2f}")


if __name__ == "__main__":
    main()
