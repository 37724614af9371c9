"""A worker that is killed once and then, restarted by torchrun, is quicker than its peer."""
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pivot import distributed  # noqa: E402

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
if attempt and rank == "0":
    time.sleep(3)               # meanwhile the other one looks for its address
distributed.start()
assert distributed.reduce_sum({"one": 1.0})["one"] == 2
if not attempt and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
distributed.print0(f"attempt {attempt} got through")
distributed.stop()
