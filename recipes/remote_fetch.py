"""A file from a URL to the disk: bounded in size, tried again, and never interpreted."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.callbacks import Callback
from yarl import URL

from recipes.shard_files import ShardError

_WEB = ("http", "https")
# Seconds between one try and the next.
_PAUSES = (1.0, 4.0, 15.0)
# Answers of a server that is busy, where all others below 500 stay the same.
_BUSY = (408, 425, 429)
_REFUSED = (401, 403, 404, 410)

logger = logging.getLogger(__name__)


def fetch(url: str, target: Path, limit: int) -> None:
    """Writes the file at a URL to `target`, from its beginning, in up to four tries.

    Args:
        url: without credentials or a query.
        target: replaced if it exists; on failure it may hold a part.
        limit: bytes; what is larger is refused as it comes.

    Raises:
        FileNotFoundError: there is no such file, or nobody may read it.
        ShardError: no answer, a broken or too large one, or a redirect that is refused.
        OSError: the disk is full.
    """
    with _filesystem(url) as filesystem:
        for pause in (*_PAUSES, None):
            try:
                filesystem.get_file(url, str(target), callback=_Bound(url, limit))
                return
            except ShardError:
                raise
            except Exception as error:  # every library has errors of its own
                _stop_at_lasting(url, error)
                # An error's own text may hold the signed URL of a redirect.
                reason = _reason(error)
            if pause is None:
                raise ShardError(
                    f"{url} did not arrive in {len(_PAUSES) + 1} tries, the last time: {reason}; "
                    "expected the whole file: check the address and the network, then go on"
                )
            logger.warning("%s: %s; trying again in %g s", url, reason, pause)
            time.sleep(pause)


def find(pattern: str) -> list[str]:
    """The URLs that a glob on ``s3:`` or ``gs:`` matches, in the order of names.

    Raises:
        ShardError: the store gives no listing.
    """
    with _filesystem(pattern) as filesystem:
        try:
            names = filesystem.glob(pattern)
        except Exception as error:
            raise ShardError(
                f"no list of {pattern}: {_reason(error)}; expected a folder that may be listed: "
                "check the address and the permissions, or name the shards {000000..000007}"
            ) from None
        return sorted(filesystem.unstrip_protocol(str(name)) for name in names)


@contextmanager
def _filesystem(url: str) -> Iterator[Any]:
    scheme = url.partition(":")[0]
    if scheme not in _WEB:
        try:
            filesystem = fsspec.filesystem(scheme)
        except ImportError as error:
            raise ShardError(
                f"reading {url} needs a library that is not installed ({error}); expected s3fs "
                "for s3:, gcsfs for gs:: pip install 'bridges[remote]'"
            ) from error
        yield filesystem
        return
    filesystem: Any = fsspec.filesystem(scheme, get_client=_client, skip_instance_cache=True)
    try:
        yield filesystem
    finally:
        if filesystem._session is not None:
            sync(filesystem.loop, filesystem._session.close)


async def _client(**options: Any) -> aiohttp.ClientSession:
    """A session that goes through proxies and reads ``.netrc`` as curl does."""
    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(_check_redirect)
    # Five minutes for the whole, as is usual, would be too short for a large shard.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return aiohttp.ClientSession(
        **{"trust_env": True, "timeout": timeout, **options, "trace_configs": [redirects]}
    )


async def _check_redirect(session: object, context: object, redirect: Any) -> None:
    origin: URL = redirect.response.url
    target = origin.join(URL(redirect.response.headers.get("Location", "")))
    if target.scheme not in _WEB or (origin.scheme == "https" and target.scheme == "http"):
        # The path and query are left out: a signature may be in them.
        raise ShardError(
            f"{origin.with_query(None)} redirects to {target.scheme}://{target.host or ''}; "
            "expected https:, or http: from http:: name the address where the shards are"
        )


class _Bound(Callback):
    """Ends a transfer that goes on for too long."""

    def __init__(self, url: str, limit: int) -> None:
        super().__init__()
        self._url, self._limit = url, limit

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        if self.value > self._limit:
            raise ShardError(
                f"{self._url} has more bytes than the {self._limit:,} expected: if it was written "
                "again, write its shards.json again, too, with 'bridges shards index'"
            )


def _stop_at_lasting(url: str, error: Exception) -> None:
    """Raises another error for what no further try would change."""
    status = getattr(error, "status", 0)
    if isinstance(error, (FileNotFoundError, PermissionError)) or status in _REFUSED:
        said = "no such file, or not allowed to read it"
        raise FileNotFoundError(errno.ENOENT, said, url) from None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    if isinstance(error, aiohttp.InvalidURL) or (400 <= status < 500 and status not in _BUSY):
        raise ShardError(
            f"{url} cannot be fetched: {_reason(error)}; expected the file: check the address"
        ) from None


def _reason(error: Exception) -> str:
    if status := getattr(error, "status", 0):
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    return f"{type(error).__name__}: {re.sub(r'[?][^ ]*', '?…', str(error))}".removesuffix(": ")
