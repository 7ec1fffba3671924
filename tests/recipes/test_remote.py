"""Shards at URLs, from a server on this machine that does everything wrong that a server can."""

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from yarl import URL

from bridges.run import WEIGHTS_FILE
from recipes import cache_command, remote, remote_cache, remote_fetch, remote_room
from recipes.remote import check_url, expand_url, fetch_indexes, is_remote_folder, is_url
from recipes.remote_cache import open_shard, prefetch, url_of
from recipes.shard_files import ShardError
from recipes.shard_index import shard_indexes
from recipes.shard_store import index_path, load_index
from recipes.shard_writer import write_shards
from recipes.train import train

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


class Server:
    """Serves files by path, each in its own way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with server.lock:
                    server.asked[self.path] += 1
                data = server.files.get(self.path)
                if data is None:
                    self.send_error(404)
                else:
                    server.answers.get(self.path, whole)(self, data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def put(self, folder: Path, names: str = "*", at: str = "/set") -> None:
        for path in folder.glob(names):
            self.files[f"{at}/{path.name}"] = path.read_bytes()


def whole(request: BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def truncated(request: BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])


def silently_truncated(request: BaseHTTPRequestHandler, data: bytes) -> None:
    whole(request, data[: len(data) // 2])


def endless(request: BaseHTTPRequestHandler, data: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    try:
        for _ in range(100):
            request.wfile.write(bytes(1 << 20))
    except ConnectionError:
        pass


def flipped(request: BaseHTTPRequestHandler, data: bytes) -> None:
    whole(request, data[:600] + bytes([data[600] ^ 1]) + data[601:])


def status(code: int) -> Answer:
    return lambda request, data: request.send_error(code)


def redirected(target: str, code: int = 302) -> Answer:
    def answer(request: BaseHTTPRequestHandler, data: bytes) -> None:
        request.send_response(code)
        request.send_header("Location", target)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def failing(times: int, failure: Answer) -> Answer:
    left = [times]

    def answer(request: BaseHTTPRequestHandler, data: bytes) -> None:
        left[0] -= 1
        (failure if left[0] >= 0 else whole)(request, data)

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote_fetch, "_PAUSES", (0.0, 0.0, 0.0))
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def make_set(folder: Path, shards: int = 3, split: str = "train", size: int = 4000) -> list[Path]:
    """Shards of two samples, with indexes and a manifest beside them."""
    samples = (
        {"__key__": f"{split}{i}", "jpg": os.urandom(size), "txt": f"caption {i}"}
        for i in range(2 * shards)
    )
    paths = write_shards(samples, folder, split, samples_per_shard=2)
    shard_indexes(paths)
    write_manifest(folder)
    return paths


def write_manifest(folder: Path, **changed: object) -> None:
    entries = [
        {
            "name": path.name,
            "split": path.name.partition("-")[0],
            "samples": 2,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        | changed
        for path in sorted(folder.glob("*.tar"))
    ]
    (folder / "shards.json").write_text(json.dumps({"shards": entries}))


def read(path: Path) -> bytes:
    with open_shard(path) as file:
        return file.read()


def left_over(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.suffix in (".partial", ".tar")]


REFUSED = [
    "pipe:cat secret.tar",
    "ftp://host/a.tar",
    "ssh://host/a.tar",
    "data:application/x-tar;base64,AAAA",
    "github://org:repo@main/a.tar",
    "memory://a.tar",
    "simplecache::http://host/a.tar",
    "zip://a.tar::http://host/b.zip",
    "hf://datasets/a/b.tar",
    "gopher://host/a.tar",
]


@pytest.mark.parametrize("url", REFUSED)
def test_other_schemes_are_refused_with_what_is_allowed(url: str):
    assert is_url(url)
    with pytest.raises(ShardError, match=r"file:, http:, https:, s3:, gs:.*download"):
        expand_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/a.tar",
        "https://me:hun/ter2@host/a.tar",
        "https://me:hunter2?@host/a.tar",
        "https://host/a.tar?token=hunter2",
        "https://host/a.tar#hunter2",
        "s3://key:hunter2@bucket/a.tar",
        "ftp://me:hunter2@host/a.tar",
        "file:///folder/a.tar?auto_mkdir=hunter2",
    ],
)
def test_credentials_and_options_are_refused_and_not_shown(url: str):
    with pytest.raises(ShardError) as caught:
        expand_url(url)
    assert "hun" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https:///a.tar", "https://host", "https://host/", "http:a.tar", "file://host/a.tar"]
)
def test_a_url_without_a_place_is_refused(url: str):
    with pytest.raises(ShardError, match="names no place"):
        check_url(url)


@pytest.mark.parametrize("url", ["https://host/a.tar", "HTTP://[::1]:8000/a.tar", "gs://b/set/"])
def test_a_good_url_is_taken(url: str):
    assert check_url(url) in ("https", "http", "gs")
    assert is_remote_folder(url) == url.endswith("/")


def test_file_urls_are_local_paths(tmp_path: Path):
    paths = make_set(tmp_path / "a set")
    folder = (tmp_path / "a set").as_uri()
    assert "%20" in folder
    assert expand_url(folder) == paths
    assert expand_url(f"{folder}/train-{{000000..000002}}.tar") == paths
    assert read(paths[0]) == paths[0].read_bytes()
    assert url_of(paths[0]) is None


def test_a_local_name_is_no_url():
    assert not is_url("./http:x.tar")
    assert not is_url(r"C:\shards\a.tar")
    assert not is_remote_folder("shards")


def test_shards_by_braces_or_by_their_manifest(server: Server, tmp_path: Path):
    local = [*make_set(tmp_path / "set"), *make_set(tmp_path / "set", split="val", shards=1)]
    server.put(tmp_path / "set")
    paths = expand_url(f"{server.url}/set/train-{{000000..000002}}.tar")
    assert [path.name for path in paths] == [path.name for path in local[:3]]
    assert expand_url(f"{server.url}/set") == expand_url(f"{server.url}/set/")
    assert [p.name for p in expand_url(f"{server.url}/set")] == [p.name for p in local]
    assert url_of(paths[1]) == f"{server.url}/set/train-000001.tar"
    assert not any(path.exists() for path in paths)
    assert [read(path) for path in paths] == [path.read_bytes() for path in local[:3]]
    # Nothing is fetched twice, and the manifest once for each expansion.
    assert read(paths[0]) and server.asked["/set/train-000000.tar"] == 1
    assert server.asked["/set/shards.json"] == 4


def test_folders_of_the_same_names_are_kept_apart(server: Server, tmp_path: Path):
    for name in ("one", "two"):
        server.put(tmp_path / name, at=f"/{name}")
        make_set(tmp_path / name, shards=1)
        server.put(tmp_path / name, at=f"/{name}")
    one, two = (expand_url(f"{server.url}/{name}")[0] for name in ("one", "two"))
    assert read(one) != read(two)


def test_http_has_no_globs_and_no_lists(server: Server):
    with pytest.raises(ShardError, match=r"is a glob.*shards\.json"):
        expand_url(f"{server.url}/set/train-*.tar")
    with pytest.raises(ShardError, match=r"no shards\.json at .*bridges shards index"):
        expand_url(f"{server.url}/set/")


def test_a_shard_that_the_manifest_does_not_name(server: Server, tmp_path: Path):
    make_set(tmp_path / "set")
    server.put(tmp_path / "set")
    with pytest.raises(ShardError, match=r"found no train-000003\.tar among the 3 shards"):
        expand_url(f"{server.url}/set/train-{{000000..000003}}.tar")


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../../outside.tar"},
        {"name": "/etc/a.tar"},
        {"name": ".hidden.tar"},
        {"name": "a.tar?x=.tar"},
        {"name": "remote.json"},
        {"sha256": "0"},
        {"bytes": -1},
        {"bytes": None},
    ],
)
def test_a_manifest_with_anything_odd_is_refused(server: Server, tmp_path: Path, entry: dict):
    make_set(tmp_path / "set", shards=1)
    write_manifest(tmp_path / "set", **entry)
    server.put(tmp_path / "set")
    with pytest.raises(ShardError, match=r"set/shards\.json cannot be relied on"):
        expand_url(f"{server.url}/set/")
    assert not list(tmp_path.rglob("outside*"))


def test_indexes_come_without_the_shards(server: Server, tmp_path: Path):
    local = make_set(tmp_path / "set")
    server.put(tmp_path / "set")
    paths = expand_url(f"{server.url}/set/")
    fetch_indexes(paths)
    indexes = [load_index(path) for path in paths]
    expected = shard_indexes(local)
    assert [index and (index.sha256, index.keys) for index in indexes] == [
        (index.sha256, index.keys) for index in expected
    ]
    assert not any(path.exists() for path in paths)
    fetch_indexes(paths)
    assert all(server.asked[f"/set/{path.name}.index"] == 1 for path in paths)


@pytest.mark.parametrize("found", [None, b"<html>log in first</html>"])
def test_shards_without_an_index_are_fetched_and_indexed(
    server: Server, tmp_path: Path, found: bytes | None, capsys: pytest.CaptureFixture[str]
):
    local = make_set(tmp_path / "set")
    server.put(tmp_path / "set", "*.tar")
    paths = expand_url(f"{server.url}/set/train-{{000000..000002}}.tar")
    if found:
        server.files |= {f"/set/{path.name}.index": found for path in paths}
    fetch_indexes(paths, progress=True)
    assert "no .tar.index is beside them" in " ".join(capsys.readouterr().err.split())
    indexes = [load_index(path) for path in paths]
    assert [i and i.sha256 for i in indexes] == [i.sha256 for i in shard_indexes(local)]


def test_an_index_of_another_shard_is_refused(server: Server, tmp_path: Path):
    make_set(tmp_path / "set", shards=1)
    make_set(tmp_path / "other", shards=1)
    server.put(tmp_path / "set")
    server.put(tmp_path / "other", "*.index")
    paths = expand_url(f"{server.url}/set/")
    with pytest.raises(ShardError, match=r"\.index is of a shard with SHA-256 \w+; expected \w+"):
        fetch_indexes(paths)
    assert not index_path(paths[0]).exists()


@pytest.mark.parametrize("failure", [truncated, status(503), status(429)])
def test_what_fails_twice_and_then_works(server: Server, tmp_path: Path, failure: Answer):
    local = make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    server.answers["/set/train-000000.tar"] = failing(2, failure)
    server.answers["/set/shards.json"] = failing(2, failure)
    [path] = expand_url(f"{server.url}/set/")
    assert read(path) == local[0].read_bytes()
    assert server.asked["/set/train-000000.tar"] == 3


@pytest.mark.parametrize(
    ("failure", "tries", "said"),
    [
        (truncated, 4, "did not arrive in 4 tries"),
        (status(500), 4, "HTTP 500"),
        (status(404), 1, r"no shard at http.*train-000000\.tar"),
        (status(403), 1, "no shard at"),
        (status(400), 1, "HTTP 400"),
        (silently_truncated, 1, "found .* bytes with SHA-256 .*; expected"),
        (flipped, 1, "found .* bytes with SHA-256 .*; expected"),
        (endless, 1, "has more bytes than the"),
        (redirected("file:///etc/passwd"), 1, "redirects to file://"),
        (redirected("ftp://host/a.tar"), 1, "redirects to ftp://host"),
    ],
)
def test_what_cannot_be_had_is_named_and_nothing_of_it_kept(
    server: Server, tmp_path: Path, cache: Path, failure: Answer, tries: int, said: str
):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    server.answers["/set/train-000000.tar"] = failure
    [path] = expand_url(f"{server.url}/set/")
    with pytest.raises(ShardError, match=said) as caught:
        open_shard(path)
    assert f"{server.url}/set/train-000000.tar" in str(caught.value)
    assert server.asked["/set/train-000000.tar"] == tries
    assert not left_over(cache)


def test_a_digest_that_differs_names_both(server: Server, tmp_path: Path):
    [local] = make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    server.answers["/set/train-000000.tar"] = flipped
    data = bytearray(local.read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[600] ^= 1
    with pytest.raises(ShardError) as caught:
        open_shard(expand_url(f"{server.url}/set/")[0])
    assert expected in str(caught.value)
    assert hashlib.sha256(data).hexdigest() in str(caught.value)


def test_without_a_manifest_the_index_says_what_is_expected(server: Server, tmp_path: Path):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set", "*.tar*")
    server.answers["/set/train-000000.tar"] = flipped
    paths = expand_url(f"{server.url}/set/train-000000.tar")
    fetch_indexes(paths)
    with pytest.raises(ShardError, match="as its index says"):
        open_shard(paths[0])


def test_redirects_within_the_web_are_followed(server: Server, tmp_path: Path):
    [local] = make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    server.put(tmp_path / "set", at="/elsewhere")
    server.answers["/set/train-000000.tar"] = redirected("/elsewhere/train-000000.tar")
    assert read(expand_url(f"{server.url}/set/")[0]) == local.read_bytes()


@pytest.mark.parametrize(
    ("origin", "target", "allowed"),
    [
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "//b/x", True),
        ("http://a/x", "https://b/x", True),
        ("http://a/x", "gopher://b/x", False),
    ],
)
def test_a_redirect_keeps_what_was_secure_secure(origin: str, target: str, allowed: bool):
    response = SimpleNamespace(url=URL(origin), headers={"Location": f"{target}?signature=secret"})
    check = remote_fetch._check_redirect(None, None, SimpleNamespace(response=response))
    if allowed:
        assert fsspec.asyn.sync(fsspec.asyn.get_loop(), lambda: check) is None
        return
    with pytest.raises(ShardError, match="redirects to") as caught:
        fsspec.asyn.sync(fsspec.asyn.get_loop(), lambda: check)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("code", "tries"), [(503, 4), (400, 1), (403, 1)])
def test_a_signed_redirect_is_not_shown(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int, tries: int
):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    signed = "/cdn/a.tar?signature=secret"
    server.files[signed] = b"x"
    server.answers |= {
        "/set/train-000000.tar": redirected(server.url + signed),
        signed: status(code),
    }
    with caplog.at_level(logging.INFO, "recipes"), pytest.raises(ShardError) as caught:
        open_shard(expand_url(f"{server.url}/set/")[0])
    assert server.asked[signed] == tries
    assert ("trying again" in caplog.text) == (tries > 1)
    assert "secret" not in caplog.text + "".join(traceback.format_exception(caught.value))


def test_a_set_that_was_written_again_is_fetched_again(server: Server, tmp_path: Path):
    make_set(tmp_path / "set")
    server.put(tmp_path / "set")
    paths = expand_url(f"{server.url}/set/")
    fetch_indexes(paths)
    old = [read(path) for path in paths]
    (tmp_path / "set" / "train-000001.tar").unlink()
    make_set(tmp_path / "new", shards=2)
    (tmp_path / "new" / "train-000001.tar").rename(tmp_path / "set" / "train-000001.tar")
    write_manifest(tmp_path / "set")
    server.put(tmp_path / "set")
    assert expand_url(f"{server.url}/set/") == paths
    assert [path.exists() for path in paths] == [True, False, True]
    assert [index_path(path).exists() for path in paths] == [True, False, True]
    new = [read(path) for path in paths]
    assert [a == b for a, b in zip(old, new, strict=True)] == [True, False, True]


def test_what_a_crash_left_is_cleared_at_the_next_start(server: Server, tmp_path: Path):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    [path] = expand_url(f"{server.url}/set/")
    orphan = path.with_name(f".{path.name}.0123abcd.partial")
    orphan.write_bytes(b"half of it")
    expand_url(f"{server.url}/set/")
    assert not orphan.exists()


def test_the_bound_holds_and_the_least_recently_used_go(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    local = make_set(tmp_path / "set", shards=6, size=100_000)
    server.put(tmp_path / "set", "*.tar")
    paths = expand_url(f"{server.url}/set/train-{{000000..000005}}.tar")
    limit = 3.5 * local[0].stat().st_size
    monkeypatch.setenv("BRIDGES_SHARD_CACHE_GB", str(limit / 1e9))
    for number, again in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0)]:
        read(paths[number])
        read(paths[again])
        assert sum(path.stat().st_size for path in cache.rglob("*")) < limit + 10_000
    assert [path.exists() for path in paths] == [True, False, False, False, True, True]
    assert server.asked["/set/train-000000.tar"] == 1


def test_a_shard_in_use_stays_even_over_the_bound(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    local = make_set(tmp_path / "set", shards=4, size=100_000)
    server.put(tmp_path / "set", "*.tar")
    paths = expand_url(f"{server.url}/set/train-{{000000..000003}}.tar")
    monkeypatch.setenv("BRIDGES_SHARD_CACHE_GB", str(2.5 * local[0].stat().st_size / 1e9))
    with open_shard(paths[0]), open_shard(paths[1]):
        read(paths[2])
        assert [path.exists() for path in paths] == [True, True, True, False]
        assert "BRIDGES_SHARD_CACHE_GB" in caplog.text
        read(paths[3])
        assert [path.exists() for path in paths] == [True, True, False, True]
    read(paths[2])
    assert [path.exists() for path in paths] == [False, False, True, True]


@pytest.mark.parametrize("value", ["-1", "0", "much", "nan", "inf"])
def test_a_bound_that_is_none(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BRIDGES_SHARD_CACHE_GB", value)
    with pytest.raises(ShardError, match=f"BRIDGES_SHARD_CACHE_GB is '{value}'"):
        remote_room.room(tmp_path)


def test_a_disk_without_room_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    [path] = expand_url(f"{server.url}/set/")
    monkeypatch.setattr(remote_room.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ShardError, match=r"found 100 bytes free.*BRIDGES_CACHE"):
        open_shard(path)
    assert server.asked["/set/train-000000.tar"] == 0


def fetch_in_another_process(data: bytes, barrier: threading.Barrier, queue) -> None:
    path = pickle.loads(data)  # as a spawned worker gets it
    barrier.wait()
    queue.put(hashlib.sha256(read(path)).hexdigest())


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_share_one_download(server: Server, tmp_path: Path, start: str):
    [local] = make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    # fsspec has been used in this process before the fork.
    [path] = expand_url(f"{server.url}/set/")
    waited = threading.Event()

    def slow(request: BaseHTTPRequestHandler, data: bytes) -> None:
        waited.wait(0.3)
        whole(request, data)

    server.answers["/set/train-000000.tar"] = slow
    context = multiprocessing.get_context(start)
    barrier, queue = context.Barrier(2), context.Queue()
    arguments = pickle.dumps(path), barrier, queue
    workers = [context.Process(target=fetch_in_another_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    digests = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        worker.close()
    queue.close()
    queue.join_thread()
    assert digests == [hashlib.sha256(local.read_bytes()).hexdigest()] * 2
    assert server.asked["/set/train-000000.tar"] == 1


def test_prefetched_shards_are_there_when_opened(server: Server, tmp_path: Path):
    make_set(tmp_path / "set")
    server.put(tmp_path / "set")
    paths = expand_url(f"{server.url}/set/")
    server.answers["/set/train-000000.tar"] = status(404)
    prefetch(paths)
    thread = remote_cache._fetcher
    assert thread is not None
    thread.join()
    # The one that failed is no concern of whoever does not open it.
    assert [path.exists() for path in paths] == [False, True, True]
    prefetch([*paths[1:], tmp_path / "local.tar"])
    assert remote_cache._fetcher is thread
    with pytest.raises(ShardError, match="no shard at"):
        open_shard(paths[0])


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A bucket in memory, in the place of s3."""
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(remote, "SCHEMES", ("memory",))
    monkeypatch.setattr(remote, "_LISTED", ("memory",))
    local = make_set(tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        memory.pipe_file(f"memory://bucket/set/{path.name}", path.read_bytes())
    yield local
    memory.rm("memory://bucket", recursive=True)


@pytest.mark.parametrize("listed", [True, False])
def test_object_stores_have_globs_and_folders(bucket: list[Path], listed: bool):
    if not listed:
        fsspec.filesystem("memory").rm("memory://bucket/set/shards.json")
    names = [path.name for path in bucket]
    # fsspec gives an object in memory three slashes.
    for url in ("memory://bucket/set/", "memory://bucket/set/train-*.tar", "memory://bucket/s*/*"):
        paths = expand_url(url)
        assert [path.name for path in paths] == names
    fetch_indexes(paths)
    assert not any(path.exists() for path in paths)
    assert [read(path) for path in paths] == [path.read_bytes() for path in bucket]


def test_an_object_that_is_not_there(bucket: list[Path]):
    fsspec.filesystem("memory").rm("memory://bucket/set/shards.json")
    [path] = expand_url("memory://bucket/set/none.tar")
    with pytest.raises(ShardError, match=r"no shard at memory://bucket/set/none\.tar"):
        open_shard(path)


def test_a_store_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch):
    def missing(scheme: str, **_: object) -> None:
        raise ImportError(f"Install {scheme}fs")

    monkeypatch.setattr(remote_fetch.fsspec, "filesystem", missing)
    with pytest.raises(ShardError, match=r"pip install 'bridges\[remote\]'"):
        expand_url("s3://bucket/set/")


def test_time_of_use_leaves_the_time_of_writing(server: Server, tmp_path: Path):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    [path] = expand_url(f"{server.url}/set/")
    read(path)
    os.utime(path, (1, 2))
    read(path)
    assert path.stat().st_mtime == 2
    assert path.stat().st_atime > time.time() - 3600


def test_no_connection_stays_open(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_set(tmp_path / "set", shards=1)
    server.put(tmp_path / "set")
    sessions, client = [], remote_fetch._client

    async def kept(**options: object) -> object:
        sessions.append(await client(**options))
        return sessions[-1]

    monkeypatch.setattr(remote_fetch, "_client", kept)
    server.answers["/set/train-000000.tar"] = failing(1, redirected("ftp://host/a.tar"))
    [path] = expand_url(f"{server.url}/set/")
    with pytest.raises(ShardError, match="redirects"):
        open_shard(path)
    read(path)
    assert len(sessions) == 4
    assert all(session.closed for session in sessions)


@pytest.mark.parametrize("url", ["https://me:secret@host/a.tar", "s3://key:secret@bucket/a.tar"])
def test_credentials_are_said_to_belong_elsewhere(url: str):
    with pytest.raises(ShardError, match=r"//…@.*holds credentials.*\.netrc"):
        check_url(url)


def test_a_run_reads_shards_and_features_from_a_server(server: Server, on_disk, tmp_path: Path):
    """The whole way, from `--data URL`, with nothing in the cache; as from the local folder."""
    for folder in (on_disk.shards, tmp_path / "features"):
        if folder != on_disk.shards:
            arguments = on_disk.arguments(folder)
            vision = [a for a in arguments if a.startswith("--model.vision")]
            cache_command.main([*vision, f"--data={on_disk.shards}", f"--out={folder}"])
        server.put(folder, at=f"/{folder.name}")
        local = train(on_disk.arguments(tmp_path / f"local-{folder.name}", f"--data={folder}"))
        url = f"{server.url}/{folder.name}/"
        remote = train(on_disk.arguments(tmp_path / f"remote-{folder.name}", f"--data={url}"))
        first, second = (load_file(run / WEIGHTS_FILE) for run in (local, remote))
        assert all(torch.equal(first[name], second[name]) for name in first)
    shards = [path for path in server.asked if path.endswith(".tar")]
    assert shards and all(server.asked[path] == 1 for path in shards)
