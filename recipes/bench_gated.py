"""The workloads of `bridges bench gated_xattn`: gated cross-attention beside two references."""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from bridges.attention import attend_runs
from bridges.precision import Precision, resolve_dtype
from gated_xattn import GatedCrossAttention
from gated_xattn.reading import Runs, read, read_masked, read_runs
from recipes.bench_gated_reference import (
    FLAMINGO_PYTORCH_NAMES,
    HF_ATTENTION_NAMES,
    HF_NAMES,
    Batch,
    Kernel,
    Sizes,
    flamingo_pytorch_block,
    hf_layer,
    hf_masks,
    masked_attention,
)
from recipes.bench_pair import Leaf, Pair, input_leaves, pair_workload, twice, weight_leaves
from recipes.workload import Workload

SMALL = Sizes()
LARGE = Sizes(width=2048, heads=32, memory_dim=1024, ff_dim=5504, batch=2)
OPEN_FLAMINGO = Sizes(ff_dim=4 * 768)


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
        # Their default kernel is the fused one, which in fp32 is not their fastest.
        "module-eager-fp32": (partial(module, kernel="eager"), small, "fp32"),
        "block-fp32": (block, small, "fp32"),
        "block-bf16": (block, large, "bf16"),
        "block-flamingo-pytorch-fp32": (flamingo_pytorch, other, "fp32"),
    }
    return {name: partial(pair_workload, name, *way, device) for name, way in ways.items()}


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
        return rearrange(masked_attention(q, k, v, mask), "b h t d -> b t (h d)")

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


def module(sizes: Sizes, device: torch.device, dtype: Precision, kernel: Kernel = "sdpa") -> Pair:
    """The attention with its projections, and Hugging Face's."""
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    mine, theirs = _block(sizes, device), hf_layer(sizes, device, kernel)
    bias, gate = hf_masks(batch.mask(sizes.latents), dtype)

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
    mine, theirs = _block(sizes, device), hf_layer(sizes, device)
    bias, gate = hf_masks(batch.mask(sizes.latents), dtype)

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
    batch = Batch(sizes, device)
    ours, reference = twice(batch.hidden, batch.memory)
    mine = GatedCrossAttention(
        sizes.width,
        sizes.memory_dim,
        num_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads,
        ff_dim=sizes.ff_dim,
        gate_init=0.5,
    ).to(device)
    theirs = flamingo_pytorch_block(sizes, device)
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
