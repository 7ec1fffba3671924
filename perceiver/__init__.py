"""Perceiver Resampler: layers and the resampler that a reader takes."""

from perceiver.resampler import PerceiverLayer, PerceiverResampler

__all__ = ["PerceiverLayer", "PerceiverResampler"]
