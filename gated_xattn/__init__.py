"""Gated cross-attention: the block and the reader built of it."""

from gated_xattn.bridge import GatedXAttn
from gated_xattn.layers import GatedCrossAttention

__all__ = ["GatedCrossAttention", "GatedXAttn"]
