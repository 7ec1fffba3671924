"""Files that are whole or not there, whenever the process is killed or the disk full."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def staged(target: Path, needs: Callable[[], int] | None = None) -> Iterator[Path]:
    """A path beside `target` to write to; synced and renamed to it when nothing went wrong.

    A kill or a full disk then leaves the target as it was. What a kill leaves of the temporary
    file, `remove_orphans` clears away.

    Args:
        target: the file to write or to replace; folders on the way to it are made.
        needs: the size of the whole in bytes, asked for when the disk is full, to say so.

    Raises:
        OSError: no room on the disk, in the quota or below the limit on a file's size, also where
            a library hides that error behind one of its own; says how many bytes are missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with claimed(temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        sync_folder(target.parent)
    except Exception as error:
        code = _no_room(error)
        if code is None:
            raise
        written = temporary.stat().st_size if temporary.exists() else 0
        # Before the free bytes are counted, which the temporary file would hide.
        temporary.unlink(missing_ok=True)
        expected = f"at least {written:,}" if needs is None else f"{needs():,}"
        kept = f"; the previous {target.name} is kept" if target.exists() else ""
        raise OSError(
            code,
            f"{os.strerror(code)}: found {shutil.disk_usage(target.parent).free:,} bytes free for "
            f"{target}; expected {expected} ({written:,} were written){kept}: free some space, or "
            "raise the quota or the limit on a file's size, then go on",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(temporary: Path) -> Iterator[None]:
    """Locks a new file, for `remove_orphans` to know that its writer lives."""
    if sys.platform == "win32":
        # Nothing can remove a file that is open there, nor rename it.
        yield
        return
    with temporary.open("xb") as file:
        # A file system without locks has no orphans removed; it can be written to all the same.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _no_room(error: BaseException | None) -> int | None:
    """The code of the error by which the disk refused; torch.save raises another from it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def remove_orphans(folder: Path) -> int:
    """Removes the temporary files that killed processes left in a folder, not in those below.

    A temporary file is an orphan when nobody holds its lock: the system drops a process' locks
    with the process, where process ids are taken again, and differ between containers and
    machines that share a folder. So whoever is writing now is left alone. What cannot be locked
    or removed (of another user, on a file system without locks) stays.

    Args:
        folder: it need not exist.

    Returns:
        How many were removed.
    """
    removed = 0
    for path in folder.glob(".*.partial"):
        if _TEMPORARY.fullmatch(path.name) is None or path.is_symlink():
            continue
        with suppress(OSError):
            if sys.platform == "win32":
                path.unlink()
            else:
                with path.open("rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            removed += 1
    return removed


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system offers it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_bytes(target: Path, content: bytes) -> None:
    """Writes bytes through `staged`."""
    with staged(target, content.__len__) as path:
        path.write_bytes(content)


def write_text(target: Path, text: str) -> None:
    """Writes UTF-8 text through `staged`."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, content: Any) -> None:
    """Writes indented JSON through `staged`."""
    write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes safetensors through `staged`.

    `safetensors.torch.save_file` stages in a ``.tmpXXXXXX`` of its own, which a kill leaves behind
    for good, and makes files that their owner alone can read.

    Args:
        target: the file.
        tensors: contiguous, of any shapes, by name.
        metadata: goes into the file's header.
    """
    write_bytes(target, save(dict(tensors), None if metadata is None else dict(metadata)))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
