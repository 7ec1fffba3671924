"""Bad samples that were passed over: counted, named, and kept where a run can be asked for them."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.shard_files import ShardError

ENOUGH = 1000
"""Samples seen before a fraction of them says something, in a set that has so many."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A sample, or a member of one, that was passed over.

    Attributes:
        shard: its path.
        key: of the sample; None where damage hides it.
        kind: what such samples are counted by.
        problem: what was found.
        place: tells the faults of a shard's structure apart, which may hide the key or repeat it.
    """

    shard: str
    key: str | None
    kind: str
    problem: str
    place: str = ""

    @property
    def identity(self) -> tuple[str, str | None, str, str]:
        """The same whenever this sample comes round; the problem may be put in other words."""
        return self.shard, self.key, self.kind, self.place


class BadSamples:
    """The bad samples that one process has met, each counted once however often it comes round.

    Args:
        total: samples of the shards, the bad ones that are known included.
        max_fraction: of all samples seen, the most that may be bad.
    """

    def __init__(self, total: int, max_fraction: float) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"found max_bad_fraction {max_fraction}; expected 0 to 1")
        self.total = total
        self.max_fraction = max_fraction
        self.kinds: Counter[str] = Counter()
        self._noted: set[tuple[str, str | None, str, str]] = set()
        self._seen = 0
        self._met = 0
        self._early: list[BadSample] = []
        self._file: Path | None = None

    def add(self, found: Iterable[BadSample], seen: int = 0) -> None:
        """Notes what was found among so many samples seen.

        Raises:
            ShardError: too many are bad.
        """
        self._seen += seen
        # A sample may have several bad members.
        self._met += len(self._note(found))
        self._check(self._met, max(self._seen, min(ENOUGH, self.total)))

    def add_faults(self, found: Iterable[BadSample]) -> None:
        """Notes what is known of all the shards before a sample is read.

        Raises:
            ShardError: too many are bad.
        """
        self._check(len(self._note(found)), self.total)

    def _note(self, found: Iterable[BadSample]) -> set[tuple[str, str | None, str]]:
        samples = set()
        for bad in found:
            samples.add((bad.shard, bad.key, bad.place))
            if self._is_new(bad):
                logger.warning("skipped: %s: %s", bad.kind, bad.problem)
                self._write(bad)
        return samples

    def _check(self, bad: int, base: int) -> None:
        if bad > self.max_fraction * base:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
            raise ShardError(
                f"found {bad} bad among {base:,} samples ({kinds}); expected at most "
                f"{self.max_fraction:.1%}: mend the shards ('bridges shards verify' names what is "
                "bad), or raise data.max_bad_fraction"
            )

    def keep(self, file: Path, shards: Collection[str]) -> None:
        """Writes each bad sample as a line of JSON, from now on and what there is already.

        Args:
            file: appended to. What it holds from an earlier start of the run counts as noted.
            shards: whose samples these are, of all that the file may name.
        """
        for bad in read_bad_samples(file):
            if bad.shard in shards and not self._is_new(bad):
                self._early = [one for one in self._early if one.identity != bad.identity]
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            with file.open("a") as log:  # a kill cut its last line short
                log.write("\n")
        self._file = file
        early, self._early = self._early, []
        for bad in early:
            self._write(bad)

    def _is_new(self, bad: BadSample) -> bool:
        if bad.identity in self._noted:
            return False
        self._noted.add(bad.identity)
        self.kinds[bad.kind] += 1
        return True

    def _write(self, bad: BadSample) -> None:
        if self._file is None:
            self._early.append(bad)
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(asdict(bad)) + "\n")


def read_bad_samples(file: Path) -> list[BadSample]:
    """The lines of a file that `BadSamples.keep` wrote; none if there is no such file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [bad for bad in map(_parsed, lines) if bad is not None]


def _parsed(line: str) -> BadSample | None:
    """None for the line that a kill cut short; its sample is found again."""
    try:
        return BadSample(**json.loads(line))
    except (ValueError, TypeError):
        return None
