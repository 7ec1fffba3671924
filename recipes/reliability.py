"""`bridges reliability`: kills, damages and attacks the data plane, and counts what is lost."""

import logging
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from bridges.files import write_json, write_text
from recipes.recording import git_revision

Counts = Mapping[str, Any]

BEGIN, END = "<!-- reliability: begin -->", "<!-- reliability: end -->"
"""Between these lines of a page stands the table."""

PACKAGES = ("torch", "lightning", "transformers", "webdataset", "safetensors", "pillow", "xxhash")
"""Whose versions are noted."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        what: was done.
        keys: of the summary; the first is how often it was done.
        result: said of the counts.
        holds: whether the counts are as promised.
    """

    what: str
    keys: tuple[str, ...]
    result: str
    holds: Callable[[Counts], bool]

    @property
    def tried(self) -> str:
        """The key of how often it was done."""
        return self.keys[0]


ROWS = {
    "kills": Row(
        "SIGKILL of training at a random moment, then `--resume true`",
        ("runs", "identical", "lost", "repeated"),
        "{identical} continued bit for bit; samples lost: {lost}, repeated: {repeated}",
        lambda c: (
            c["identical"] == c["runs"]
            and not (c["lost"] or c["repeated"] or c.get("hung") or c.get("failures"))
        ),
    ),
    "faults": Row(
        "faults planted in shards",
        ("injected", "named", "good_lost"),
        "{named} named; good samples lost: {good_lost}",
        lambda c: c["named"] == c["injected"] and not c["good_lost"] and not c.get("miscounted"),
    ),
    "payloads": Row(
        "attempts to have code run by data",
        ("tried", "executed"),
        "executed: {executed}",
        lambda c: not c["executed"],
    ),
    "checkpoints": Row(
        "SIGKILL of a process that writes checkpoints",
        ("kills", "unloadable", "orphans"),
        "checkpoints that do not load: {unloadable}; orphans after a restart: {orphans}",
        lambda c: not (c["unloadable"] or c["orphans"]),
    ),
}
"""By the name of their harness, ``recipes.reliability_NAME.measure``."""


def main(arguments: Sequence[str]) -> None:
    """`bridges reliability --out runs/reliability`.

    Raises:
        ValueError: an unknown row; a page for less than the whole.
        SystemExit: with code 1, when something does not hold.
    """
    parser = ArgumentParser(
        prog="bridges reliability",
        description="Kills training and writers of checkpoints, plants faults in shards and "
        "payloads in data, and counts what is lost, repeated or executed.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"), help="folder")
    parser.add_argument("--only", type=str | None, help=f"some of {','.join(ROWS)}")
    parser.add_argument("--quick", type=bool, default=False, help="a little of each")
    parser.add_argument("--docs", type=Path | None, help="page whose table is written anew")
    options = parser.parse_args(list(arguments))
    chosen = set(options.only.split(",")) if options.only else set(ROWS)
    if unknown := sorted(chosen - set(ROWS)):
        raise ValueError(f"found --only {','.join(unknown)}; expected some of {','.join(ROWS)}")
    # In this order: a process has one fork server, and the kills need most of it preloaded.
    names = [name for name in ROWS if name in chosen]
    if options.docs is not None:
        if options.quick or chosen != set(ROWS):
            raise ValueError(
                "found --docs with --only or --quick; expected all of the rows in full, for the "
                "table is of one whole run: leave one of them out"
            )
        page_with(options.docs, "")  # a page without its markers is refused before the work

    console = Console()
    details = about(["bridges", "reliability", *arguments], quick=options.quick)
    summary: dict[str, dict[str, int]] = {}
    broken = []
    for name in names:
        with _unsaid():
            found, folder = run(name, options.out, quick=options.quick)
        details["rows"][name] = found
        summary[name] = {key: int(found[key]) for key in ROWS[name].keys}
        if not (summary[name][ROWS[name].tried] and ROWS[name].holds(found)):
            broken.append(f"{name}: see {folder}")
        else:
            shutil.rmtree(folder)
        write_json(options.out / "details.json", details)
        write_json(options.out / "summary.json", summary)
    console.print(shown(summary))
    console.print(f"written to {options.out / 'summary.json'} and details.json")
    if options.docs is not None:
        write_text(options.docs, page_with(options.docs, table(summary, details)))
    if broken:
        console.print("[bold red]does not hold[/]", *broken, sep="\n")
        raise SystemExit(1)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without the warnings of what is skipped: of what is planted there would be thousands."""
    logger = logging.getLogger("recipes.bad_samples")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(name: str, out: Path, *, quick: bool) -> tuple[dict[str, Any], Path]:
    """What a harness found, with the seconds it took; and the folder that it worked in."""
    # With the time in its name: what an earlier run left there is evidence of what went wrong.
    folder = out / f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}"
    folder.mkdir(parents=True)
    begun = time.perf_counter()
    found = import_module(f"recipes.reliability_{name}").measure(folder.resolve(), quick=quick)
    return {**found, "seconds": round(time.perf_counter() - begun, 1)}, folder


def about(command: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """What the counts depend on beside the code."""
    return {
        "command": shlex.join(command),
        "quick": quick,
        "git_revision": git_revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "rows": {},
    }


def table(summary: Mapping[str, Counts], details: Mapping[str, Any]) -> str:
    """The rows in Markdown, and what they were found with."""
    lines = ["| What was done | How often | What came of it |", "|---|---|---|"]
    for name, row in ROWS.items():
        counts = summary[name]
        lines.append(f"| {row.what} | {counts[row.tried]} | {row.result.format(**counts)} |")
    packages = ", ".join(f"{name} {number}" for name, number in details["packages"].items())
    seconds = sum(found["seconds"] for found in details["rows"].values())
    lines += [
        "",
        f"Made on {details['date'][:10]} by `{details['command']}` at revision "
        f"`{(details['git_revision'] or 'unknown')[:12]}`, in {seconds / 60:.0f} minutes on "
        f"{details['cores']} cores: Python {details['python']}, {packages}.",
    ]
    return "\n".join(lines)


def page_with(page: Path, content: str) -> str:
    """The text of a page with other content between its markers, and nothing else changed.

    Raises:
        ValueError: not one pair of markers.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end) or text.count(BEGIN) + text.count(END) != 2:
        raise ValueError(f"found no place for the table in {page}; expected lines {BEGIN}, {END}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def shown(summary: Mapping[str, Counts]) -> Table:
    """The rows for the terminal."""
    result = Table("what was done", "how often", "what came of it")
    for name, counts in summary.items():
        row = ROWS[name]
        result.add_row(row.what, str(counts[row.tried]), row.result.format(**counts))
    return result
