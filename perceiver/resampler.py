"""Flamingo's Perceiver Resampler."""

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from bridges.attention import Attention
from bridges.contract import Instruction, Resampler, VisionFeatures, VisionShape
from bridges.feed_forward import FeedForward


class PerceiverLayer(nn.Module):
    """latents += attention(latents, [features; latents]); latents += feed_forward(latents)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        ff_mult: int,
        activation: Literal["gelu", "relu", "squared_relu"],
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.features_norm = nn.LayerNorm(dim)
        self.latents_norm = nn.LayerNorm(dim)
        self.attention = Attention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            qk_norm=nn.LayerNorm if qk_norm else None,
        )
        self.ff_norm = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, ff_mult * dim, activation)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Shape: features (b, p, d), latents (b, n, d) -> (b, n, d)."""
        queries = self.latents_norm(latents)
        memory = torch.cat([self.features_norm(features), queries], dim=1)
        latents = latents + self.attention(queries, self.attention.project(memory))
        return latents + self.ff(self.ff_norm(latents))


class PerceiverResampler(Resampler):
    """A fixed number of learned latents read the patches of each image.

    The defaults are OpenFlamingo's (8 heads of width 64, GELU, the encoder's width). The paper
    has 16 heads and ``activation: squared_relu``; IDEFICS-1 has ``relu`` and may normalise
    queries and keys. Images have no spatial position embedding (Flamingo A.1.1), the encoder's
    features carry their places.

    Args:
        vision: sizes of the encoder.
        num_latents: tokens per image.
        depth: number of layers.
        dim: width of the latents. The encoder's by default; another one adds a linear layer on
            the features, which the references do not have.
        num_heads: attention heads.
        head_dim: width of a head.
        ff_mult: the feed-forward is this many times wider than `dim`.
        activation: of the feed-forward.
        qk_norm: LayerNorm on each head's queries and keys (IDEFICS-1 option).

    Shape: patches (b, i, p, d_vision) -> (b, i, num_latents, dim).

    Source: Flamingo (arXiv 2204.14198) section 2.1 and figure 5.
    """

    def __init__(
        self,
        *,
        vision: VisionShape,
        num_latents: int = 64,
        depth: int = 6,
        dim: int | None = None,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        activation: Literal["gelu", "relu", "squared_relu"] = "gelu",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens = num_latents
        self.dim = dim or vision.dim
        self.input = nn.Identity() if self.dim == vision.dim else nn.Linear(vision.dim, self.dim)
        self.latents = nn.Parameter(torch.randn(num_latents, self.dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(self.dim, num_heads, head_dim, ff_mult, activation, qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        b, i = vision.patches.shape[:2]
        features = self.input(rearrange(vision.patches, "b i p d -> (b i) p d"))
        latents = repeat(self.latents, "n d -> b n d", b=b * i)
        for layer in self.layers:
            latents = layer(features, latents)
        return rearrange(self.norm(latents), "(b i) n d -> b i n d", b=b)
