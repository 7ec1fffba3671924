"""What the queries look at, and whether they share the work."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bridges.attention import Attention
from bridges.contract import Instruction, VisionFeatures
from qformer.resampler import QFormer


@torch.no_grad()
def cross_attention_maps(
    qformer: QFormer, vision: VisionFeatures, text: Instruction | None = None
) -> Tensor:
    """Where each query looks in an image, in every layer that reads it and every head.

    Args:
        qformer: of any run; taken as it stands (training or evaluation mode).
        vision: the images. What the map of a padding image holds means nothing.
        text: the instruction, for a Q-Former that reads one beside the image.

    Returns:
        Attention probabilities (b, i, layers, heads, n, p), fp32: the last axis sums to 1 over an
        image's patches, in the order of `VisionFeatures` (any prefix tokens, then row by row).
    """
    blocks = [getattr(layer, "cross_attention", None) for layer in qformer.layers]
    readers = [block for block in blocks if isinstance(block, Attention)]
    read: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor]) -> None:
        read.append(rearrange(arguments[0], "(b n) d -> b n d", n=qformer.num_tokens))

    # Noted in the pass itself, so that what is shown is what the Q-Former does.
    hooks = [block.q.register_forward_pre_hook(note) for block in readers]
    try:
        qformer(vision, text)
    finally:
        for hook in hooks:
            hook.remove()
    images = qformer.project(rearrange(vision.patches, "b i p d -> (b i) p d"))
    weights = [
        block.weights(queries, keys)
        for block, queries, (keys, _) in zip(readers, read, images, strict=True)
    ]
    return rearrange(
        torch.stack(weights, 1), "(b i) l h n p -> b i l h n p", i=vision.patches.shape[1]
    )


def query_usage(winners: Tensor, num_queries: int) -> Tensor:
    """How evenly the queries win the maximum of ITC: exp(entropy) / number of queries.

    Args:
        winners: long, any shape; the index of the query that is most similar to a text.
        num_queries: number of queries.

    Returns:
        A scalar: 1 if every query wins equally often, 1 / num_queries if one wins always.
    """
    share = torch.bincount(winners.flatten(), minlength=num_queries).float()
    share = share / share.sum().clamp(min=1.0)
    return torch.special.entr(share).sum().exp() / num_queries


def query_diversity(queries: Tensor) -> Tensor:
    """How different the outputs of an image's queries are: 1 minus their mean cosine similarity.

    The mean is over all pairs of different queries of an image, then over the images.

    Shape: (b, n, d) -> scalar; 0 if all queries say the same (or there is only one).
    """
    n = queries.shape[-2]
    if n == 1:
        return queries.new_zeros(())
    unit = F.normalize(queries.float(), dim=-1)
    # The sum over all pairs is the square of the sum: no (b, n, n) in memory.
    pairs = unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-1, -2))
    return 1.0 - (pairs / (n * (n - 1))).mean()
