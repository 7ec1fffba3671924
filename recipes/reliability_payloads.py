"""Files and names that are programs, tried at every door by which data come in.

Each payload (`recipes.reliability_payloads_made`) makes a file of its own if anything executes it,
or asks a server that does. Programs that a reader might start, Ghostscript for one, are replaced
by one that makes a file, too; so that what counts is whether they are started, not whether they
are installed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.progress import Progress, TimeRemainingColumn

from recipes import reliability_payloads_files as files
from recipes import reliability_payloads_shards as shards
from recipes.reliability_payloads_made import PROGRAMS
from recipes.reliability_payloads_place import Door, Place


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Tries every payload at every door.

    Args:
        folder: an empty one.
        quick: without spawned workers, and with few command lines.

    Returns:
        ``tried`` and ``executed`` payloads; ``by_door``, those tried; ``found``, the marks of those
        executed.
    """
    doors = {name: door for name, door in DOORS.items() if not (quick and name in _SLOW)}
    marks = folder / "markers"
    by_door = {}
    columns = (*Progress.get_default_columns(), TimeRemainingColumn())
    with (
        watched(folder) as url,
        Progress(*columns, transient=True) as bar,
        # Some names are of servers that do not answer: each would be waited for, 20 seconds.
        patch("recipes.remote_fetch._PAUSES", ()),
    ):
        for name, door in bar.track(doors.items(), description="trying payloads"):
            # Without blanks, which shells and URLs would end the names of marks at.
            own = name.replace(" ", "-")
            place = Place(folder / own, marks / own, url)
            for path in (place.folder, place.markers):
                path.mkdir(parents=True)
            with _quiet():
                by_door[name] = door(place)
    found = sorted(str(path.relative_to(marks)) for path in marks.rglob("*") if path.is_file())
    tried = sum(by_door.values())
    return {"tried": tried, "executed": len(found), "by_door": by_door, "found": found}


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[str]:
    """Makes programs and fetches leave marks in ``folder / "markers"``; gives a server's URL."""
    marks, programs = folder / "markers", folder / "programs"
    for path in (marks / "programs", programs):
        path.mkdir(parents=True)
    for name in PROGRAMS:
        script = programs / name
        script.write_text(f"#!/bin/sh\n: > '{(marks / 'programs').resolve() / name}'\nexit 0\n")
        script.chmod(0o755)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Only what a payload was told to ask for: a folder of marks, and a mark in it.
            parts = self.path.removesuffix(".tar").strip("/").split("/")
            if len(parts) == 2 and (marks / parts[0]).is_dir() and ".." not in parts:
                (marks / parts[0] / f"{parts[1]}-asked").touch()
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{programs.resolve()}{os.pathsep}{path}"
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        os.environ["PATH"] = path
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Each payload is refused with a message; hundreds of them say nothing more."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


DOORS: dict[str, Door] = {
    "stream": shards.in_this_process,
    "forked workers": shards.by_workers("fork"),
    "spawned workers": shards.by_workers("spawn"),
    "CaptionData": shards.caption_data,
    "shards index and verify": shards.indexed_and_verified,
    "shards of pictures": shards.pictures,
    "files beside shards": shards.beside,
    "cache": shards.cache,
    "names of shards": shards.names,
    "names in commands": shards.names_in_commands,
    "configs": files.configs,
    "checkpoints": files.checkpoints,
    "weights": files.weights,
    "runs": files.runs,
}
"""Every way by which data come in."""

_SLOW = ("spawned workers", "names in commands", "configs")
