"""Q-Former: layers and the resampler that a reader takes."""

from qformer.layers import QFormerLayer
from qformer.resampler import QFormer

__all__ = ["QFormer", "QFormerLayer"]
