"""What a run has logged: series by name, all its starts joined."""

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

CSV_LOGS = "csv-*"
"""Folders of the CSV logs in a run directory, one for each start."""

Series = dict[str, dict[int, float]]
"""By name: step -> value."""


def read_log(run: Path, wanted: Callable[[str], bool]) -> Series:
    """The logged series of some names.

    A run that is resumed goes on from its last checkpoint: what an earlier start logged past that
    is left out.

    Args:
        run: the run directory.
        wanted: of a name.
    """
    logs = sorted(run.glob(f"{CSV_LOGS}/metrics.csv"), key=lambda path: int(path.parent.name[4:]))
    joined: Series = defaultdict(dict)
    for log in logs:
        with log.open(encoding="utf-8", newline="") as file:
            rows = [
                (int(row["step"]), {n: float(v) for n, v in row.items() if v and wanted(n)})
                for row in csv.DictReader(file)
            ]
        rows = [(step, values) for step, values in rows if values]
        if not rows:
            continue
        begun = min(step for step, _ in rows)
        for name, points in joined.items():
            joined[name] = {step: value for step, value in points.items() if step < begun}
        for step, values in rows:
            for name, value in values.items():
                joined[name][step] = value
    return dict(joined)
