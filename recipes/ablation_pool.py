"""Where the jobs of an ablation run: processes beside each other on this machine, or Ray."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridges.files import write_json
from recipes.ablation_job import JOB_FILE, RESULT_FILE, failure, run_job
from recipes.ablation_worker import DONE

_MOST_BESIDE = 4  # each has the frozen models in memory

Finished = Callable[[Path], object]
"""Told of the folder of each job that has a result; what it raises ends all jobs."""


@dataclass(frozen=True)
class Devices:
    """What jobs run on.

    Attributes:
        count: jobs beside each other, each on a GPU of its own, or on an equal share of the cores
            where there are no GPUs.
        cuda: whether there are GPUs.
        threads: of each job on the CPU.
    """

    count: int
    cuda: bool
    threads: int

    @classmethod
    def find(cls, count: int | None = None) -> "Devices":
        """All GPUs, or one job for each core, by default.

        Two jobs on a core each are done sooner than one after the other on both: small models
        gain little by a second thread.

        Raises:
            ValueError: more jobs than there are GPUs, or cores.
        """
        cuda, cores = torch.cuda.is_available(), _cores()
        most = torch.cuda.device_count() if cuda else cores
        count = count or (most if cuda else min(most, _MOST_BESIDE))
        if not 1 <= count <= most:
            what = "GPUs" if cuda else "cores"
            raise ValueError(f"found --devices {count}; expected 1 to {most}, the {what} here")
        return cls(count, cuda, max(1, cores // count))

    @property
    def described(self) -> str:
        """For people."""
        if self.cuda:
            return f"{self.count} × {torch.cuda.get_device_name()}"
        return f"CPU, {self.count} × {self.threads} threads"


def run_local(devices: Devices, logs: Path, folders: Sequence[Path], finished: Finished) -> None:
    """Runs jobs in processes that live as long as there are jobs, one for each device.

    A process that dies (of memory, by a signal) fails the job that it was at, and another one goes
    on with the next.

    Args:
        devices: what they run on.
        logs: folder for what the processes say.
        folders: of the jobs, in their order.
        finished: called in this thread.
    """
    todo: queue.Queue[Path] = queue.Queue()
    for folder in folders:
        todo.put(folder)
    answers: queue.Queue[Path | BaseException] = queue.Queue()
    stop = threading.Event()
    workers = [_Worker(k, devices, logs) for k in range(min(devices.count, len(folders)))]

    def serve(worker: _Worker) -> None:
        try:
            while not stop.is_set():
                folder = todo.get_nowait()
                worker.run(folder, stop)
                answers.put(folder)
        except queue.Empty:
            pass
        except BaseException as error:
            answers.put(error)

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in folders:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            finished(answer)
    finally:
        stop.set()
        for worker in workers:
            worker.end()
        for thread in threads:
            thread.join()
        for worker in workers:  # one that a thread had just begun
            worker.end()


def run_on_ray(
    address: str, cpus: float, gpus: float, folders: Sequence[Path], finished: Finished
) -> None:
    """Runs jobs as tasks of a Ray cluster, whose own scheduler places them.

    All nodes must see the folders, the data and the caches at the same paths, and have this
    package installed.

    Args:
        address: of the cluster; ``local`` starts one on this machine, ``auto`` finds one that runs.
        cpus: that a job takes.
        gpus: that a job takes; may be a fraction.
        folders: of the jobs.
        finished: called in this thread.

    Raises:
        ImportError: Ray is not there (extra ``ray``).
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'bridges[ray]'") from error
    started = not ray.is_initialized()
    if started:
        threads = str(max(1, int(cpus)))
        environment = {"env_vars": {"OMP_NUM_THREADS": threads, "PYTHONPATH": _import_path()}}
        where: Any = {} if address == "local" else {"address": address}
        if address == "local":
            where = {"include_dashboard": False}
        ray.init(runtime_env=environment, log_to_driver=False, **where)
    waiting: dict[Any, Path] = {}
    try:
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_ray_job)
        waiting = {task.remote(str(folder)): folder for folder in folders}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            folder = waiting.pop(done)
            try:
                ray.get(done)
            except RayError as error:
                _fail(folder, f"the Ray task ended without a result: {error}")
            finished(folder)
    finally:
        for task_left in waiting:
            ray.cancel(task_left, force=True)
        if started:
            ray.shutdown()


def _ray_job(folder: str) -> None:
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    run_job(Path(folder))


class _Worker:
    """A process of `recipes.ablation_worker`, made when it is first needed."""

    def __init__(self, number: int, devices: Devices, logs: Path) -> None:
        self.log = logs / f"worker-{number}.log"
        self.environment = os.environ | {
            "PYTHONPATH": _import_path(),
            # A folder that is called like one of our packages is none of them.
            "PYTHONSAFEPATH": "1",
        }
        if devices.cuda:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            own = visible[number] if number < len(visible) and visible[number] else str(number)
            self.environment["CUDA_VISIBLE_DEVICES"] = own
        else:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                self.environment[name] = str(devices.threads)
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path, stop: threading.Event) -> None:
        """Runs a job to its end; afterwards it has a result, unless all were stopped."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        said = ""
        with suppress(OSError, ValueError):  # a pipe that is broken, or closed by `end`
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            said = process.stdout.readline()
        if said.strip() != DONE and not stop.is_set():
            # What says something else is not asked again.
            code = process.wait() if not said else process.kill() or process.wait()
            self.end()
            _fail(folder, f"its process ended with code {code} (-9: killed, perhaps out of "
                  f"memory); what it said is in {self.log}")  # fmt: skip

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            self._process = None

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "recipes.ablation_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self.environment,
                )
        return self._process


def _import_path() -> str:
    """What this process imports from, for one that is to find a user's classes too."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _cores() -> int:
    """Cores that this process may use, where the system says so."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fail(folder: Path, error: str) -> None:
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    described = {"name": job["name"], "digest": job["digest"]}
    write_json(folder / RESULT_FILE, described | failure(error))
