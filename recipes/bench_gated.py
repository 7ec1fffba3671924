"""The workloads of `bridges bench gated_xattn`: gated cross-attention beside two references."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from bridges.attention import attend_runs
from bridges.condition import Condition, image_index
from bridges.precision import Precision, resolve_dtype
from gated_xattn import GatedCrossAttention
from gated_xattn.reading import Runs, read, read_masked, read_runs
from recipes.bench_pair import Leaf, Pair, input_leaves, pair_workload, twice, weight_leaves
from recipes.workload import Workload

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


SMALL = Sizes()
LARGE = Sizes(width=2048, heads=32, memory_dim=1024, ff_dim=5504, batch=2)
OPEN_FLAMINGO = Sizes(ff_dim=4 * 768)


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


def gated_workloads(
    device: torch.device, small: Sizes = SMALL, large: Sizes = LARGE, other: Sizes = OPEN_FLAMINGO
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name."""
    ways: dict[str, tuple[Callable[[Sizes, torch.device, Precision], Pair], Sizes, Precision]] = {
        "core-fp32": (core, small, "fp32"),
        "core-bf16": (core, large, "bf16"),
        "masked-fp32": (masked, small, "fp32"),
        "masked-bf16": (masked, large, "bf16"),
        "module-fp32": (module, small, "fp32"),
        "module-bf16": (module, large, "bf16"),
        "block-fp32": (block, small, "fp32"),
        "block-bf16": (block, large, "bf16"),
        "block-flamingo-pytorch-fp32": (flamingo_pytorch, other, "fp32"),
    }
    return {name: partial(_workload, name, *way, device) for name, way in ways.items()}


def core(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """Attention alone, from queries, keys and values: runs of positions, and one mask."""
    batch = Batch(sizes, device)
    kind = resolve_dtype(dtype)
    shape = (sizes.batch, sizes.images, sizes.latents, sizes.width)
    random = torch.Generator().manual_seed(1)
    inputs = [batch.hidden, *torch.randn(2, *shape, generator=random).to(device)]
    ours, reference = twice(*(x.to(kind) for x in inputs))
    mask = batch.mask(sizes.latents)

    def run_ours() -> Tensor:
        q, k, v = ours
        condition = batch.condition(k)
        runs = Runs.of(condition, q)
        images = (
            x.flatten(0, 1) if runs.images is None else x.flatten(0, 1)[runs.images] for x in (k, v)
        )
        k, v = (rearrange(x, "r m (h d) -> r h m d", h=sizes.heads) for x in images)
        q = rearrange(runs.gather(q), "n (h d) -> 1 h n d", h=sizes.heads)
        out = attend_runs(q, k, v, runs.lengths)
        return runs.spread(rearrange(out, "1 h n d -> n (h d)"), batch.hidden)

    def run_reference() -> Tensor:
        q, k, v = (
            rearrange(
                x.reshape(sizes.batch, -1, sizes.width), "b s (h d) -> b h s d", h=sizes.heads
            )
            for x in reference
        )
        return rearrange(_masked(q, k, v, mask), "b h t d -> b t (h d)")

    return Pair(run_ours, run_reference, input_leaves("qkv", ours, reference), batch.gradient)


def masked(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """Our module, projections included: runs of positions, and one mask."""
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    blocks = [_block(sizes, device) for _ in range(2)]
    blocks[1].load_state_dict(blocks[0].state_dict())

    def run_ours() -> Tensor:
        condition = batch.condition(ours[1])
        runs = Runs.of(condition, ours[0])
        return read_runs(blocks[0].attn, nn.Identity(), ours[0], condition, runs)

    def run_reference() -> Tensor:
        condition = batch.condition(reference[1])
        return read_masked(blocks[1].attn, nn.Identity(), reference[0], condition, "latest")

    names = {name: name for name, _ in blocks[0].attn.named_parameters()}
    leaves = input_leaves(("hidden", "memory"), ours, reference)
    leaves += weight_leaves(blocks[0].attn, blocks[1].attn, names)
    return Pair(run_ours, run_reference, leaves, batch.gradient, dtype != "fp32")


def module(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """The attention with its projections, and Hugging Face's."""
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    mine, theirs = _block(sizes, device), _hf_layer(sizes, device, dtype)
    bias, gate = _hf_masks(batch.mask(sizes.latents), dtype)

    def run_ours() -> Tensor:
        return read(mine.attn, nn.Identity(), ours[0], batch.condition(ours[1]), "latest")

    def run_reference() -> Tensor:
        out, _ = theirs.cross_attn(reference[0], reference[1].flatten(1, 2), attention_mask=bias)
        return out.masked_fill((gate == 0)[..., None], 0.0)

    leaves = input_leaves(("hidden", "memory"), ours, reference)
    leaves += weight_leaves(mine.attn, theirs.cross_attn, HF_ATTENTION_NAMES)
    return Pair(run_ours, run_reference, leaves, batch.gradient, dtype != "fp32")


def block(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """The whole block, and Hugging Face's layer in its own configuration."""
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    mine, theirs = _block(sizes, device), _hf_layer(sizes, device, dtype)
    bias, gate = _hf_masks(batch.mask(sizes.latents), dtype)

    def run_reference() -> Tensor:
        return theirs(
            reference[0],
            image_hidden_states=reference[1].flatten(1, 2),
            image_attention_mask=bias,
            cross_attention_gate=gate,
        )

    leaves = input_leaves(("hidden", "memory"), ours, reference) + weight_leaves(
        mine, theirs, HF_NAMES
    )
    return Pair(
        lambda: mine(ours[0], batch.condition(ours[1])),
        run_reference,
        leaves,
        batch.gradient,
        dtype != "fp32",
    )


def flamingo_pytorch(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """The whole block as OpenFlamingo has it, and flamingo-pytorch's.

    Raises:
        ImportError: flamingo-pytorch is not installed.
    """
    try:
        from flamingo_pytorch import GatedCrossAttentionBlock
    except ImportError as error:
        raise ImportError(
            "this workload measures beside flamingo-pytorch: pip install 'bridges[bench]'"
        ) from error
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    head_dim = sizes.width // sizes.heads
    mine = GatedCrossAttention(
        sizes.width,
        sizes.memory_dim,
        num_heads=sizes.heads,
        head_dim=head_dim,
        ff_dim=sizes.ff_dim,
        gate_init=0.5,
    ).to(device)
    theirs = GatedCrossAttentionBlock(
        dim=sizes.width,
        dim_head=head_dim,
        heads=sizes.heads,
        ff_mult=sizes.ff_dim // sizes.width,
    ).to(device)
    joined = theirs.attn.to_kv.weight
    leaves = input_leaves(("hidden", "memory"), ours, reference)
    leaves += weight_leaves(mine, theirs, FLAMINGO_PYTORCH_NAMES)
    for name, part, rows in (
        ("attn.k.weight", mine.attn.k.weight, slice(None, sizes.width)),
        ("attn.v.weight", mine.attn.v.weight, slice(sizes.width, None)),
    ):
        joined.data[rows] = part.data
        leaves.append(Leaf(name, part, joined, rows))
    return Pair(
        lambda: mine(ours[0], batch.condition(ours[1])),
        lambda: theirs(reference[0], reference[1], media_locations=batch.placeholders),
        leaves,
        batch.gradient,
        dtype != "fp32",
    )


def _block(sizes: Sizes, device: torch.device) -> GatedCrossAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        block = GatedCrossAttention(
            sizes.width,
            sizes.memory_dim,
            num_heads=sizes.heads,
            head_dim=sizes.width // sizes.heads,
            ff_dim=sizes.ff_dim,
            norm="rms",
            feed_forward="swiglu",
            gate_init=0.5,
        )
    return block.to(device)


def _hf_layer(
    sizes: Sizes, device: torch.device, dtype: Precision
) -> IdeficsGatedCrossAttentionLayer:
    # On CPU in bf16 the fused kernel is the slower one.
    slow = device.type == "cpu" and dtype != "fp32"
    config = IdeficsConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.ff_dim,
        num_attention_heads=sizes.heads,
        rms_norm_eps=1e-5,
        alpha_type="float",
        alpha_initializer="ones",
        vision_config={"embed_dim": sizes.memory_dim},
    )
    config._attn_implementation = "eager" if slow else "sdpa"
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0).to(device)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention behind a mask, by the kernel that is faster, as in `_hf_layer`."""
    floor = torch.finfo(q.dtype).min
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, floor).softmax(dim=-1) @ v
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, floor)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _hf_masks(mask: Tensor, dtype: Precision) -> tuple[Tensor, Tensor]:
    """Additive, and where there is an image: made outside the timed part, as for all layers."""
    kind = resolve_dtype(dtype)
    bias = torch.zeros(mask.shape, dtype=kind, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(kind).min), mask.any(dim=-1)[:, 0].long()


def _workload(
    name: str,
    way: Callable[[Sizes, torch.device, Precision], Pair],
    sizes: Sizes,
    dtype: Precision,
    device: torch.device,
) -> Workload:
    return pair_workload(name, asdict(sizes), dtype, lambda kind: way(sizes, device, kind))
