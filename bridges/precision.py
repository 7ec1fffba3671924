"""Names of floating-point types, as a YAML writes them."""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX-512 BF16 or AMX); emulation is slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def as_autocast(x: Tensor) -> Tensor:
    """In the type that autocast would give it to a matrix product; as it is without autocast.

    For what several products take: autocast keeps its casts of weights, and casts anything else
    anew for each of them.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def resolve_dtype(name: Precision) -> torch.dtype:
    """``auto`` is bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        if name not in _DTYPES:
            raise ValueError(f"found dtype {name!r}; expected auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32
