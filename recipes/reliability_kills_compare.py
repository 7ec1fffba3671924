"""A run that was killed beside one that was not: what differs, is lost or comes twice."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from recipes.reliability_kills_log import Event, Start, Step


@dataclass
class Comparison:
    """What of a killed run is not as in the reference.

    Attributes:
        differences: steps, of any start, whose loss or samples differ from the reference's or
            that the reference does not have; steps that are missing; each described.
        lost: samples of the reference's epochs that the continued line does not hold.
        repeated: samples that the continued line holds more often than the reference.
    """

    differences: list[str] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0


def continued(events: Iterable[Event]) -> list[Step]:
    """The line of steps that the final weights are made of, over all starts of a run.

    A start goes on from a checkpoint: what earlier starts did after it is in no weights.
    """
    line: list[Step] = []
    attempt = -1
    for event in events:
        if isinstance(event, Start) and event.attempt != attempt:
            attempt, resumed = event.attempt, event.step
            line = [step for step in line if step.step < resumed]
        elif isinstance(event, Step):
            line.append(event)
    return line


def compare(
    reference: Sequence[Event], found: Sequence[Event], *, losses: bool = True
) -> Comparison:
    """Compares the events of a killed run with those of the run that nothing disturbed.

    Args:
        reference: the events of one start.
        found: the events of all starts, in the order in which they were written.
        losses: compare step by step; else only which samples each epoch is made of, which is all
            that holds for another number of ranks.
    """
    result = Comparison()
    expected, line = continued(reference), continued(found)
    if losses:
        result.differences = _differences(expected, [e for e in found if isinstance(e, Step)], line)
    wanted, seen = _samples(expected), _samples(line)
    result.lost = (wanted - seen).total()
    result.repeated = (seen - wanted).total()
    return result


def _differences(expected: list[Step], computed: list[Step], line: list[Step]) -> list[str]:
    at = {step.place: step for step in expected}
    problems = []
    # Also what was computed again later: it must have come out the same both times.
    for step in computed:
        other = at.get(step.place)
        if other is None:
            problems.append(f"{_name(step)}: not in the reference")
        elif step != other:
            problems.append(f"{_name(step)}: found {_short(step)}; expected {_short(other)}")
    times = Counter(step.place for step in line)
    for step in expected:
        if times[step.place] != 1:
            problems.append(f"{_name(step)}: found {times[step.place]} times; expected once")
    return problems


def _samples(line: Iterable[Step]) -> Counter[tuple[int, str]]:
    return Counter((step.epoch, key) for step in line for key in step.keys)


def _name(step: Step) -> str:
    return f"epoch {step.epoch}, batch {step.batch}, rank {step.rank}"


def _short(step: Step) -> str:
    return f"step {step.step}, loss {step.loss}, samples {', '.join(step.keys)}"
