"""Features of pictures as the bytes of one member of a sample, and back.

fp16 is an ``npy``, which any numpy reads. What numpy has no type for is a ``safetensors``: bf16 as
the tensor ``features``; int8 as ``features`` and ``scale``, an fp32 factor for each patch. int8 is
symmetric: a patch's scale is its greatest absolute value / 127, so that a value is off by at most
half a scale, 1/254 of the greatest in its patch. Read, int8 becomes fp16 again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

Storage = Literal["fp16", "bf16", "int8"]
"""How features are kept."""

MEMBER: dict[Storage, str] = {"fp16": "npy", "bf16": "safetensors", "int8": "safetensors"}
"""The member of a sample that features are in."""

_NPY = {np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}
_SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_MOST = 2**31


def has_features(raw: Mapping[str, Any]) -> bool:
    """Whether a raw sample has features in place of its pictures."""
    return any(member in raw for member in MEMBER.values())


def encode_features(features: Tensor, storage: Storage) -> tuple[str, bytes]:
    """Features as a member of a sample.

    Args:
        features: (…, p, d), floating, on the CPU.
        storage: how they are kept.

    Returns:
        The extension (`MEMBER`) and the bytes, the same ones for the same features.

    Raises:
        ValueError: features that are not finite, or not in fp16.
    """
    stored = features.to(torch.bfloat16 if storage == "bf16" else torch.float16)
    if not _finite(stored):
        if not _finite(features):
            raise ValueError(
                "found NaN or infinity among the features; expected numbers: the encoder overflows "
                "in its precision, load it in bf16 or fp32"
            )
        raise ValueError(
            f"found features up to {features.abs().max().item():.4g}; expected at most "
            f"{torch.finfo(stored.dtype).max:.4g}, the greatest number of "
            f"{str(stored.dtype).removeprefix('torch.')}: keep them as bf16, with 'bridges cache "
            "--dtype bf16'"
        )
    if storage == "int8":
        return MEMBER[storage], save(_quantised(features.float()))
    if storage == "bf16":
        return MEMBER[storage], save({"features": stored.contiguous()})
    file = io.BytesIO()
    np.save(file, stored.contiguous().numpy(), allow_pickle=False)
    return MEMBER[storage], file.getvalue()


def decode_features(raw: Mapping[str, Any]) -> Tensor:
    """The features in a raw sample, as they are stored, or in fp16 where that is int8.

    No more memory is taken than the member itself has bytes (int8: three times that), whatever
    its header says.

    Raises:
        ValueError: no such member, or it does not hold features.
    """
    if "npy" in raw:
        return _read_npy(raw["npy"])
    if "safetensors" in raw:
        return _read_safetensors(raw["safetensors"])
    raise ValueError(f"found {sorted(raw)}; expected features, npy or safetensors")


def _finite(features: Tensor) -> bool:
    if not features.numel():
        return True
    # Both are NaN if any value is. Twenty times as fast as isfinite, which makes a mask.
    low, high = torch.aminmax(features)
    return math.isfinite(low) and math.isfinite(high)


def _quantised(features: Tensor) -> dict[str, Tensor]:
    scale = features.abs().amax(dim=-1, keepdim=True) / 127
    # A patch of zeros has no scale, and needs none.
    steps = (features / scale.masked_fill(scale == 0, 1)).round()
    return {"features": steps.to(torch.int8), "scale": scale}


def _read_npy(data: bytes | bytearray) -> Tensor:
    length = int.from_bytes(data[8:10], "little") + 10
    shape, dtype, at = _npy_header(bytes(memoryview(data)[:length]))
    _check_size("npy", shape, len(data) - at, dtype.itemsize)
    if isinstance(data, bytearray):  # nobody else's: no copy
        return _tensor(data, _NPY[dtype], shape, at)
    return _tensor(bytearray(memoryview(data)[at:]), _NPY[dtype], shape)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and where the values begin; numpy takes longer over this than over the rest."""
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"found version {version} of npy; expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    # Of a damaged header, numpy raises nearly anything: TokenError, OverflowError, MemoryError.
    except Exception as error:
        raise ValueError(f"npy: {error}") from error
    if fortran or dtype not in _NPY:
        order = "Fortran" if fortran else "C"
        raise ValueError(f"npy: found {dtype} in {order} order; expected fp16 or fp32 in C order")
    return shape, dtype, file.tell()


def _read_safetensors(data: bytes) -> Tensor:
    try:
        # Checks every size against the file's before it copies anything.
        found = {name: tensor for name, tensor in deserialize(data)}
    except SafetensorError as error:
        raise ValueError(f"safetensors: {error}") from error
    kinds = {name: tensor["dtype"] for name, tensor in found.items()}
    if kinds == {"features": "I8", "scale": "F32"}:
        steps = _safetensor(found["features"], torch.int8)
        scale = _safetensor(found["scale"], torch.float32)
        if scale.shape != (*steps.shape[:-1], 1):
            raise ValueError(
                f"safetensors: found scale {tuple(scale.shape)} for features "
                f"{tuple(steps.shape)}; expected one for each patch"
            )
        return (steps * scale).half()
    if kinds.keys() != {"features"} or kinds["features"] not in _SAFETENSORS:
        raise ValueError(
            f"safetensors: found {dict(list(kinds.items())[:8])}; expected 'features' of "
            f"{', '.join(_SAFETENSORS)}, or of I8 with an F32 'scale'"
        )
    return _safetensor(found["features"], _SAFETENSORS[kinds["features"]])


def _safetensor(stored: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    _check_size("safetensors", stored["shape"], len(stored["data"]), dtype.itemsize)
    return _tensor(stored["data"], dtype, stored["shape"])


def _check_size(name: str, shape: Any, found: int, item: int) -> None:
    shape = tuple(shape)
    # Of an empty array, too, no side may be absurd: torch multiplies them all.
    if math.prod(max(side, 1) for side in shape) > _MOST or min(shape, default=0) < 0:
        raise ValueError(f"{name}: found the shape {shape}; expected at most {_MOST} values")
    if math.prod(shape) * item != found:
        raise ValueError(
            f"{name}: found {found} bytes for the shape {shape}; expected {math.prod(shape) * item}"
        )


def _tensor(data: bytearray, dtype: torch.dtype, shape: Any, offset: int = 0) -> Tensor:
    if not math.prod(shape):
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, offset=offset).view(tuple(shape))
