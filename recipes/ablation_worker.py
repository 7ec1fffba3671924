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
from typing import TextIO

import torch

from recipes.ablation_job import run_job

DONE = "done"


def main() -> None:
    """Runs jobs until the input ends."""
    # Of its own: a loader's forked workers close `sys.stdin`, and would wait for ever for the
    # thread that reads it; and what libraries print must not be taken for an answer.
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked, jobs), daemon=True).start()
    while True:
        run_job(Path(jobs.get()))
        print(DONE, file=answers, flush=True)


def _read(asked: TextIO, jobs: "queue.Queue[str]") -> None:
    for line in asked:
        jobs.put(line.rstrip("\n"))
    os._exit(0)


if __name__ == "__main__":
    main()
