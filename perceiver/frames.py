"""When the frames of a clip were taken: learned embeddings, interpolated for longer clips."""

import torch
from torch import Tensor


def frame_positions(counts: Tensor, num_frames: int, trained: int) -> Tensor:
    """Where the frames of each clip stand among the trained time embeddings.

    Frame k of n stands at k. If there are more frames than embeddings, all of them are spread
    evenly from the first embedding to the last. Padding frames stand anywhere in that range.

    Args:
        counts: long (m), real frames of each clip.
        num_frames: f, padding frames included.
        trained: number of embeddings.

    Returns:
        fp32 (m, f), from 0 to ``trained - 1``.
    """
    step = (trained - 1) / (counts - 1).clamp(min=1)
    step = torch.where(counts > trained, step, 1.0)
    frames = torch.arange(num_frames, device=counts.device)
    return (frames * step[:, None]).clamp(max=trained - 1)


def interpolate(embedding: Tensor, positions: Tensor) -> Tensor:
    """Between neighbouring embeddings, linearly.

    Shape: embedding (t, d), positions (...) from 0 to t - 1 -> (..., d).

    Source: Flamingo (arXiv 2204.14198), which reads 30 frames so after training on 8.
    """
    lower = positions.long()
    upper = (lower + 1).clamp(max=len(embedding) - 1)
    part = (positions - lower).to(embedding.dtype)[..., None]
    return torch.lerp(embedding[lower], embedding[upper], part)
