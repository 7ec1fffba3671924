"""Someone else's package: it imports `bridges`, and `bridges` has not heard of it."""

from third_party_bridge.bridge import AdapterBridge, BandResampler
from third_party_bridge.cheats import DyingResampler, OtherOrder, StopAt, StopInLastValidation

__all__ = [
    "AdapterBridge",
    "BandResampler",
    "DyingResampler",
    "OtherOrder",
    "StopAt",
    "StopInLastValidation",
]
