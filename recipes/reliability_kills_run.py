"""One run of training: started, killed as planned, and resumed until it is done."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path

from bridges.run import WEIGHTS_FILE
from recipes.checkpoints import LAST
from recipes.reliability_kills_log import Event, Saving, Step, read_events
from recipes.reliability_kills_plan import Kill, Setting
from recipes.reliability_kills_process import Attempt

RUN_SECONDS = 300
"""A start that has come neither to its kill nor to its end by then hangs."""

POLL_SECONDS = 0.002


@dataclass
class Run:
    """What became of a run.

    Attributes:
        folder: of the run.
        log: of its steps.
        kills: those that it got; one that it ended before is not among them.
        seconds_alone: how long the other rank went on after one was killed; None where it had to
            be killed, too.
        writing: kills after which an unfinished checkpoint was found.
        failure: the end of its output if a start of it failed; empty if it came to its end.
    """

    folder: Path
    log: Path
    kills: list[Kill] = field(default_factory=list)
    seconds_alone: list[float | None] = field(default_factory=list)
    writing: int = 0
    failure: str = ""

    @property
    def events(self) -> list[Event]:
        """All that it wrote down, over all starts."""
        return [event for event, _ in read_events(self.log)]

    @property
    def weights(self) -> bytes:
        """Its final weights as a file; nothing if it did not get so far."""
        path = self.folder / WEIGHTS_FILE
        return path.read_bytes() if path.is_file() else b""


def run_killed(
    context: ForkServerContext,
    folder: Path,
    name: str,
    settings: Sequence[Setting],
    kills: Sequence[Kill],
    *,
    batches: int,
    tick: Callable[[], None],
) -> Run:
    """Trains until the end, however often it is killed on the way.

    Args:
        context: of `fork_server`.
        folder: of the setup, in which the run's own is made.
        name: of the run.
        settings: of each start; the last of them of all that follow.
        kills: of each start; those that follow are left alone.
        batches: of an epoch, by which a kill's position is counted.
        tick: called after each start.
    """
    run = Run(folder / name, folder / f"{name}.jsonl")
    output = folder / f"{name}.out"
    for number in range(len(kills) + 1):
        setting = settings[min(number, len(settings) - 1)]
        arguments = setting.arguments(folder, run.folder, run.log)
        before = _unfinished(run.folder)
        size = run.log.stat().st_size if run.log.exists() else 0
        attempt = Attempt(context, arguments, output, ranks=setting.ranks, number=number)
        try:
            if number < len(kills) and _comes(attempt, run.log, size, kills[number], batches):
                run.kills.append(kills[number])
                seconds = attempt.kill(kills[number].rank % setting.ranks)
                if setting.ranks > 1:
                    run.seconds_alone.append(seconds)
                run.writing += bool(_unfinished(run.folder) - before)
            elif not attempt.wait(RUN_SECONDS) or not attempt.ended_well:
                run.failure = _tail(output, name, number, attempt)
        finally:
            attempt.close()
        tick()
        if run.failure or len(run.kills) <= number:
            break
    return run


def _comes(attempt: Attempt, log: Path, start: int, kill: Kill, batches: int) -> bool:
    """Waits until a kill is due; False if the start ends before."""
    until = time.monotonic() + RUN_SECONDS
    done = -1
    for event in _follow(attempt, log, start):
        if isinstance(event, Step):
            done = event.epoch * batches + event.batch
        due = done >= kill.position
        if kill.moment == "checkpoint write":
            due = due and isinstance(event, Saving)
        elif kill.moment == "after a resume":
            due = isinstance(event, Step)
        if due:
            time.sleep(kill.delay)
            return attempt.running
        if time.monotonic() > until:
            return False
    return False


def _follow(attempt: Attempt, log: Path, start: int) -> Iterator[Event | None]:
    """The events of a start as they are written, and None each time there is no new one."""
    while True:
        running = attempt.running
        for event, end in read_events(log, start):
            start = end
            yield event
        if not running:
            return
        yield None
        time.sleep(POLL_SECONDS)


def _unfinished(run: Path) -> set[Path]:
    return set((run / LAST).parent.glob(".*"))


def _tail(output: Path, name: str, number: int, attempt: Attempt) -> str:
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    ended = "hangs" if attempt.running else f"ended with {attempt.exit_codes}"
    return f"start {number} of {name} {ended}:\n{text[-3000:]}"
