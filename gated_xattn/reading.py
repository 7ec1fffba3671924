"""How text positions read their images: three ways to compute one and the same attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from bridges.attention import Attention
from bridges.condition import Condition, Visible
from bridges.precision import as_autocast


def read(
    attn: Attention,
    norm: Callable[[Tensor], Tensor],
    hidden: Tensor,
    condition: Condition,
    visible: Visible,
) -> Tensor:
    """Cross-attention of every position to its image; zero where it has none.

    Args:
        attn: the attention.
        norm: what stands before it.
        hidden: (b, t, d_lm).
        condition: the images.
        visible: which of the preceding images.

    Returns:
        (b, t, d_lm).
    """
    if one_image(condition, visible):
        return read_one(attn, norm, hidden, condition)
    images, tokens = condition.images().shape[1:3]
    if visible == "latest" and grouping_is_faster(hidden, images, tokens):
        runs = condition.shared("runs", hidden, lambda: Runs.of(condition, hidden))
        # Where nobody reads, no weight would get a gradient, and DDP would wait for it.
        if runs.lengths:
            return read_runs(attn, norm, hidden, condition, runs)
    return read_masked(attn, norm, hidden, condition, visible)


def grouping_is_faster(hidden: Tensor, images: int, tokens: int) -> bool:
    """Whether positions are grouped by image, or a mask hides the other images from them.

    A group must be spared enough scores to be worth its own matrix products. Time with a mask over
    time in groups, forward and backward, on an AMD EPYC (8 heads of width 64; attention with its
    projections):

    | Positions, images | 256, 5 × 64 | 256, 2 × 64 | 100, 2 × 64 | 256, 10 × 16 | 48, 3 × 16 |
    |---|---|---|---|---|---|
    | fp32 | 1.34 | 1.34 | 1.11 | 1.10 | 0.73 |
    | bf16 | 1.25 | 1.26 | 1.06 | 0.88 | 0.76 |

    Not measured on CUDA, where the lengths of the groups would have to be waited for: masks there.

    Args:
        hidden: (b, t, d_lm).
        images: on the image axis.
        tokens: of each image.
    """
    return hidden.device.type == "cpu" and hidden.shape[1] * (images - 1) * tokens >= 3072 * images


def one_image(condition: Condition, visible: Visible) -> bool:
    """Whether no row of this call reads more than one image."""
    return condition.image_mask.shape[1] == 1 or (visible == "latest" and condition.past_prompt)


def read_one(
    attn: Attention, norm: Callable[[Tensor], Tensor], hidden: Tensor, condition: Condition
) -> Tensor:
    """Every row reads its one image, without a mask; positions that may not read get zero.

    So each step of cached decoding costs the attention to one image, however many the prompt has.
    """
    read, blind = condition.shared("one", hidden, lambda: _one_image(condition, hidden))

    def make_kv() -> tuple[Tensor, Tensor]:
        kv = attn.project(as_autocast(condition.images()).flatten(0, 1))
        return kv if read is None else _select(kv, read)

    out = attn(norm(hidden), condition.kept((attn, "one", hidden.shape[0]), make_kv))
    return out if blind is None else out.masked_fill(blind, 0.0)


def read_runs(
    attn: Attention,
    norm: Callable[[Tensor], Tensor],
    hidden: Tensor,
    condition: Condition,
    runs: "Runs",
) -> Tensor:
    """Positions are grouped by image; those without one, and images nobody reads, cost nothing."""
    memory = as_autocast(condition.images()).flatten(0, 1)
    if runs.images is None:
        kv = attn.project(memory)
    elif hidden.shape[0] == len(condition.image_mask):
        kv = attn.project(memory.index_select(0, runs.images))
    else:  # beams read the same images: each is projected once for all of them
        kv = _select(attn.project(memory), runs.images)
    _keep_last(attn, condition, hidden, kv, runs.images)
    out = attn.forward_runs(norm(runs.gather(hidden)), kv, runs.lengths)
    return runs.spread(out, hidden)


def read_masked(
    attn: Attention,
    norm: Callable[[Tensor], Tensor],
    hidden: Tensor,
    condition: Condition,
    visible: Visible,
) -> Tensor:
    """Every position is scored against every image, and a mask hides those it may not read."""
    batch, images = condition.image_mask.shape

    def make_mask() -> Tensor | None:
        tokens = condition.images().shape[2]
        seen = condition.visible_images(hidden, visible)
        # A generation asks once and saves the masking of every step; training does not wait.
        if condition.keep_projections and condition.past_prompt and bool(seen.all()):
            return None
        return seen.repeat_interleave(tokens, dim=-1)[:, None]

    def make_kv() -> tuple[Tensor, ...]:
        kv = attn.project(as_autocast(condition.images()).flatten(0, 1))
        if visible == "latest":
            _keep_last(attn, condition, hidden, kv, None)
        rows = (rearrange(x, "(b i) h m d -> b h (i m) d", i=images) for x in kv)
        return tuple(x.repeat_interleave(hidden.shape[0] // batch, dim=0) for x in rows)

    mask = condition.shared(("mask", visible), hidden, make_mask)
    all_kept = visible == "all"  # of the latest image alone, `_keep_last` has what steps need
    k, v = condition.kept((attn, "all", hidden.shape[0]), make_kv) if all_kept else make_kv()
    return attn(norm(hidden), (k, v), mask)


@dataclass(frozen=True)
class Runs:
    """Consecutive positions of the flattened text that read one and the same image.

    Attributes:
        spans: lengths of all runs, of those that read nothing too.
        reads: for each of them, whether it reads an image.
        lengths: lengths of those that read one.
        images: long (r), which of all b · i images each of these reads; None where they read
            all of them in order.
    """

    spans: list[int]
    reads: list[bool]
    lengths: list[int]
    images: Tensor | None

    @classmethod
    def of(cls, condition: Condition, hidden: Tensor) -> "Runs":
        """The runs of the positions of `hidden`: waits once for the device."""
        place = condition.image_place(hidden)
        image = place + _first_image_of_rows(condition, len(place))[:, None]
        image = image.where(place >= 0, -1).flatten()
        found, spans = image.unique_consecutive(return_counts=True)
        found_list, spans_list = torch.stack([found, spans]).tolist()
        reads = [image >= 0 for image in found_list]
        read = [image for image in found_list if image >= 0]
        lengths = [span for span, reads_one in zip(spans_list, reads, strict=True) if reads_one]
        whole = read == list(range(condition.image_mask.numel()))
        return cls(spans_list, reads, lengths, None if whole else found[found >= 0])

    def gather(self, x: Tensor) -> Tensor:
        """The positions that read an image: (b, t, d) -> (n, d)."""
        x = x.flatten(0, 1)
        if all(self.reads):
            return x
        runs = zip(x.split(self.spans), self.reads, strict=True)
        return torch.cat([run for run, reads in runs if reads])

    def spread(self, x: Tensor, like: Tensor) -> Tensor:
        """Back to their places, zeros elsewhere: (n, d) -> (b, t, d)."""
        if not all(self.reads):
            runs = iter(x.split(self.lengths))
            pairs = zip(self.spans, self.reads, strict=True)
            x = torch.cat(
                [next(runs) if reads else x.new_zeros(n, x.shape[1]) for n, reads in pairs]
            )
        return x.view(like.shape)


def _keep_last(
    attn: Attention,
    condition: Condition,
    hidden: Tensor,
    kv: tuple[Tensor, Tensor],
    images: Tensor | None,
) -> None:
    """At the end of a generation's prompt, keeps of each row the image that all steps will read.

    The keys and values of the others are free to go.

    Args:
        attn: the attention that `kv` belongs to.
        condition: the images.
        hidden: (b', t', d_lm).
        kv: (r, h, m, d_head) each.
        images: long (r), which of all b · i images they are of; None: all of them in order.
    """
    rows = hidden.shape[0]
    if (
        not condition.keep_projections
        or condition.start + hidden.shape[1] < condition.index.shape[1]
    ):
        return

    def find() -> Tensor:
        last = _first_image_of_rows(condition, rows) + condition.last_place(rows).clamp(min=0)
        if images is None:
            return last
        # A row that reads none is blind at every step: any image will do for it.
        return (images == last[:, None]).long().argmax(dim=1)

    last = condition.shared("last", hidden, find)
    condition.kept((attn, "one", rows), lambda: _select(kv, last))


def _select(kv: tuple[Tensor, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    return kv[0].index_select(0, images), kv[1].index_select(0, images)


def _one_image(condition: Condition, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which of all b · i images each row reads, and which positions may not: bool (b', t', 1).

    None for the first where the rows read the images in order; None for the second where all may.
    """
    batch, images = condition.image_mask.shape
    rows = hidden.shape[0]
    blind = condition.image_place(hidden)[..., None] < 0  # as above: asked once a generation
    blind = None if condition.keep_projections and not bool(blind.any()) else blind
    if images == 1 and rows == batch:
        return None, blind
    return _first_image_of_rows(condition, rows) + condition.last_place(rows).clamp(min=0), blind


def _first_image_of_rows(condition: Condition, rows: int) -> Tensor:
    """Of all b · i images the first of each row, rows repeated for beams: long (b')."""
    batch, images = condition.image_mask.shape
    sample = torch.arange(rows, device=condition.image_mask.device) // (rows // batch)
    return sample * images
