"""Starts of a training run as processes of their own, and their ends."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = [
    "recipes.train",
    "recipes.mixture",
    "recipes.module",
    "gated_xattn",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.llama.modeling_llama",
    "recipes.reliability_kills_log",
]
"""What every start imports, in seconds; here it is once, in the server that all are forked from."""

PEER_SECONDS = 60
"""Within so long a rank must end when another is gone."""


def fork_server() -> ForkServerContext:
    """A context whose processes begin with torch, transformers and lightning imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Attempt:
    """One start of a run: a process for each rank, each with a process group for its workers.

    Args:
        context: of `fork_server`.
        arguments: of `bridges train`.
        output: file that the ranks' output is appended to.
        ranks: processes.
        number: which start of the run this is.
    """

    def __init__(
        self,
        context: ForkServerContext,
        arguments: Sequence[str],
        output: Path,
        *,
        ranks: int,
        number: int,
    ) -> None:
        self.ranks: list[ForkServerProcess] = []
        port = _free_port()
        for rank in range(ranks):
            environment = _environment(rank, ranks, port, number)
            self.ranks.append(
                context.Process(target=_rank, args=(list(arguments), str(output), environment))
            )
        for process in self.ranks:
            process.start()

    @property
    def running(self) -> bool:
        """Whether any rank is."""
        return any(process.is_alive() for process in self.ranks)

    @property
    def ended_well(self) -> bool:
        """Whether all ranks ended by themselves and without an error."""
        return self.exit_codes == [0] * len(self.ranks)

    @property
    def exit_codes(self) -> list[int | None]:
        """Of the ranks; None of those that run."""
        return [process.exitcode for process in self.ranks]

    def wait(self, seconds: float) -> bool:
        """Whether all ranks end within so long."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        return not self.running

    def kill(self, first: int) -> float | None:
        """SIGKILL to one rank and its workers; the others must then end by themselves.

        Args:
            first: index of the rank.

        Returns:
            Seconds until the others had ended; None if they had not after `PEER_SECONDS` and were
            killed.
        """
        begun = time.monotonic()
        _kill_group(self.ranks[first])
        ended = self.wait(PEER_SECONDS)
        seconds = time.monotonic() - begun
        self.close()
        return seconds if ended else None

    def close(self) -> None:
        """Kills whatever is left of the ranks and their workers."""
        for process in self.ranks:
            _kill_group(process)
            process.join()


def _rank(arguments: list[str], output: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    # A process of a fork server would start its workers by another such server, in seconds each.
    multiprocessing.set_start_method("fork", force=True)

    import torch

    from recipes.cli import main

    torch.set_num_threads(1)
    sys.exit(main(["train", *arguments]))


def _environment(rank: int, ranks: int, port: int, number: int) -> dict[str, str]:
    """torchrun's, so that Lightning starts no processes of its own."""
    common = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "BRIDGES_TRACEBACK": "1",
        "TORCHELASTIC_RESTART_COUNT": str(number),
    }
    if ranks == 1:
        return common
    return common | {
        "TORCHELASTIC_RUN_ID": "reliability",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _kill_group(process: ForkServerProcess) -> None:
    """Ends a rank and its workers, and waits until they are gone."""
    assert process.pid is not None
    until = time.monotonic() + 5
    # Bounded: where nobody reaps orphans, the group of a dead worker stays.
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        time.sleep(0.005)
    # Before its setsid, the rank is no group yet.
    with suppress(ProcessLookupError):
        process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
