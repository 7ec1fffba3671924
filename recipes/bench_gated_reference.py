"""What `bridges bench gated_xattn` measures beside, and what both sides are given."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from bridges.condition import Condition, image_index
from bridges.precision import Precision, resolve_dtype

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "cross_attn.q_proj",
    "attn.k": "cross_attn.k_proj",
    "attn.v": "cross_attn.v_proj",
    "attn.out": "cross_attn.o_proj",
    "attn_gate": "alpha_cross_attn",
    "ff_norm": "post_attention_layernorm",
    "ff.gate": "mlp.gate_proj",
    "ff.up": "mlp.up_proj",
    "ff.out": "mlp.down_proj",
    "ff_gate": "alpha_dense",
}
"""Our parameters in Hugging Face's layer."""

HF_ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}

FLAMINGO_PYTORCH_NAMES = {
    "attn_norm": "attn.norm",
    "attn.q": "attn.to_q",
    "attn.out": "attn.to_out",
    "attn_gate": "attn_gate",
    "ff_norm": "ff.0",
    "ff.up": "ff.1",
    "ff.out": "ff.3",
    "ff_gate": "ff_gate",
}
"""Our parameters in flamingo-pytorch's block, but for keys and values: its `to_kv` is both."""


Kernel = Literal["sdpa", "eager"]
"""How Hugging Face's layer attends."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a gated block and of the text and the images that it is given.

    Attributes:
        width: of the LM.
        heads: of attention, as wide together as the LM.
        memory_dim: width of an image token.
        ff_dim: inner width of the feed-forward.
        batch: samples.
        text: positions.
        images: of each sample.
        latents: tokens of an image.
    """

    width: int = 768
    heads: int = 12
    memory_dim: int = 768
    ff_dim: int = 2048
    batch: int = 4
    text: int = 256
    images: int = 5
    latents: int = 64


class Batch:
    """Random texts with images in them, the same for both sides.

    Every text begins with an image, so no position is without one; the others stand anywhere.

    Attributes:
        hidden: (b, t, width).
        memory: (b, i, m, memory_dim).
        gradient: (b, t, width), of the output.
        placeholders: bool (b, t), where the images stand.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device)

        self.hidden = normal(sizes.batch, sizes.text, sizes.width)
        self.memory = normal(sizes.batch, sizes.images, sizes.latents, sizes.memory_dim)
        self.gradient = normal(sizes.batch, sizes.text, sizes.width)
        placeholders = torch.zeros(sizes.batch, sizes.text, dtype=torch.bool)
        for row in placeholders:
            row[1 + torch.randperm(sizes.text - 1, generator=random)[: sizes.images - 1]] = True
            row[0] = True
        self.placeholders = placeholders.to(device)
        self._images = torch.ones(sizes.batch, sizes.images, dtype=torch.bool, device=device)

    def condition(self, memory: Tensor) -> Condition:
        """As a model makes it anew for every forward pass."""
        return Condition(memory, self._images, image_index(self.placeholders, 1))

    def mask(self, latents: int) -> Tensor:
        """What each position may attend to: bool (b, 1, t, i · m)."""
        seen = self.condition(self.memory).visible_images(self.hidden)
        return seen.repeat_interleave(latents, dim=-1)[:, None]


def hf_layer(
    sizes: Sizes, device: torch.device, kernel: Kernel = "sdpa"
) -> IdeficsGatedCrossAttentionLayer:
    """Hugging Face's layer in its own configuration: RMSNorm, SwiGLU, one gate for all channels."""
    config = IdeficsConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.ff_dim,
        num_attention_heads=sizes.heads,
        rms_norm_eps=1e-5,
        alpha_type="float",
        alpha_initializer="ones",
        vision_config={"embed_dim": sizes.memory_dim},
    )
    config._attn_implementation = kernel
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0).to(device)


def flamingo_pytorch_block(sizes: Sizes, device: torch.device) -> Any:
    """flamingo-pytorch's block.

    Raises:
        ImportError: flamingo-pytorch is not installed.
    """
    try:
        from flamingo_pytorch import GatedCrossAttentionBlock
    except ImportError as error:
        raise ImportError(
            "this workload measures beside flamingo-pytorch: pip install 'bridges[bench]'"
        ) from error
    block = GatedCrossAttentionBlock(
        dim=sizes.width,
        dim_head=sizes.width // sizes.heads,
        heads=sizes.heads,
        ff_mult=sizes.ff_dim // sizes.width,
    )
    return block.to(device)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention behind a mask, by the faster kernel: the fused one, but on CPU in bf16."""
    floor = torch.finfo(q.dtype).min
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, floor).softmax(dim=-1) @ v
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, floor)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def hf_masks(mask: Tensor, dtype: Precision) -> tuple[Tensor, Tensor]:
    """Additive, and where there is an image: made outside the timed part, as for all layers."""
    kind = resolve_dtype(dtype)
    bias = torch.zeros(mask.shape, dtype=kind, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(kind).min), mask.any(dim=-1)[:, 0].long()
