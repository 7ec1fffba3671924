"""A process that runs one job of an ablation after another, asked line by line.

``python -m recipes.ablation_worker`` reads the folder of a job from its standard input, runs it,
says ``done`` on its standard output, and ends with its input: whoever has started it may be
killed, and would else leave a training behind that nobody waits for.
"""

import os
import queue
import sys
import threading
from pathlib import Path

import torch

from recipes.ablation_job import run_job

DONE = "done"


def main() -> None:
    """Runs jobs until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    while True:
        run_job(Path(jobs.get()))
        print(DONE, file=answers, flush=True)


def _read(jobs: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line.rstrip("\n"))
    os._exit(0)


if __name__ == "__main__":
    main()
