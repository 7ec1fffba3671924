"""A bridge like LLaMA-Adapter's: images join the LM's attention outputs behind a zero gate."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from bridges import (
    Bridge,
    BridgeOutput,
    Condition,
    DecoderShape,
    Instruction,
    LayerInsert,
    Resampler,
    ResamplerFactory,
    VisionFeatures,
    VisionShape,
)
from bridges.attention import Attention


class BandResampler(Resampler):
    """Means over equal bands of patches, each through one linear layer."""

    def __init__(self, *, vision: VisionShape, num_bands: int = 2) -> None:
        super().__init__()
        self.num_tokens = num_bands
        self.dim = vision.dim
        self.linear = nn.Linear(vision.dim, vision.dim)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        bands = vision.patches.tensor_split(self.num_tokens, dim=2)
        return self.linear(torch.stack([band.mean(dim=2) for band in bands], dim=2))


class AdapterLayer(nn.Module):
    """attention_output + tanh(gate) · attention(attention_output, image)."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, memory_dim, num_heads=num_heads)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, condition: Condition) -> Tensor:
        kv = condition.project(
            self,
            hidden,
            lambda memory: self.attention.project(rearrange(memory, "b i m d -> b (i m) d")),
        )
        visible = condition.visible_images(hidden)
        mask = visible.repeat_interleave(kv[0].shape[2] // visible.shape[-1], dim=-1)[:, None]
        return hidden + self.gate.tanh() * self.attention(hidden, (kv[0], kv[1]), mask)


class AdapterBridge(Bridge):
    """Adapter layers in the last `layers` blocks of the LM, and one marker for each image."""

    num_tokens = 1

    def __init__(
        self,
        *,
        vision: VisionShape,
        decoder: DecoderShape,
        resampler: ResamplerFactory,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.resampler = resampler(vision=vision)
        self.marker = nn.Parameter(torch.randn(1, decoder.dim) * decoder.embedding_std)
        self.first = decoder.num_layers - layers
        self.adapters = nn.ModuleList(
            AdapterLayer(decoder.dim, self.resampler.dim, decoder.num_heads) for _ in range(layers)
        )

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        memory = self.resampler(vision, text)
        marker = repeat(self.marker, "n d -> b i n d", b=memory.shape[0], i=memory.shape[1])
        return BridgeOutput(marker, memory)

    def inserts(self) -> Sequence[LayerInsert]:
        return [
            LayerInsert(self.first + offset, "attention_output", adapter)
            for offset, adapter in enumerate(self.adapters)
        ]
