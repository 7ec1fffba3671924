"""What the layers inserted into the LM know of the images while the LM runs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bridges.contract import BridgeOutput

Visible = Literal["latest", "all"]
"""Which of the preceding images a position reads."""

T = TypeVar("T")


def image_index(
    placeholders: Tensor,
    num_tokens: int,
    *,
    segments: Tensor | None = None,
    next_image: Tensor | None = None,
) -> Tensor:
    """Index of the latest image at or before each position; -1 where there is none yet.

    Args:
        placeholders: bool (b, t); every image owns `num_tokens` consecutive ones.
        num_tokens: placeholders of an image.
        segments: long (b, t), the sample that each column of a packed row belongs to: no column
            has an image of another sample. None: a row is one sample.
        next_image: bool (b) or (b, t), rows or columns that have the first image at or after
            them instead, and the last one where none follows. None: no row.

    Shape: bool (b, t) -> long (b, t).

    Source: Flamingo (arXiv 2204.14198) section 2.3, φ: the number of images so far, minus one.
    """
    seen = placeholders.long().cumsum(dim=1)
    first, stop = _images_of_samples(placeholders, num_tokens, segments)
    index = torch.div(seen - 1, num_tokens, rounding_mode="floor")
    if next_image is not None:
        begun = torch.div(seen - placeholders.long(), num_tokens, rounding_mode="floor")
        following = next_image.to(index.device).view(len(index), -1)
        index = torch.where(following, begun.minimum(stop - 1), index)
    return index.masked_fill(index < first, -1)


def _images_of_samples(
    placeholders: Tensor, num_tokens: int, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The images [first, stop) of the sample that each column belongs to: two long (b, t)."""
    seen = placeholders.long().cumsum(dim=1)
    if segments is None:
        return torch.zeros_like(seen), (seen[:, -1:] // num_tokens).expand_as(seen)
    if segments.shape != seen.shape:
        raise ValueError(
            f"found segments {tuple(segments.shape)} for a text of {tuple(seen.shape)}; expected "
            "the sample of every column: (b, t)"
        )
    border = segments.to(seen.device).diff(dim=1) != 0
    edge = border.new_ones(len(border), 1)
    before = (seen - placeholders.long()).where(torch.cat([edge, border], dim=1), 0)
    after = seen.where(torch.cat([border, edge], dim=1), torch.iinfo(seen.dtype).max)
    first, stop = before.cummax(dim=1).values, after.flip(1).cummin(dim=1).values.flip(1)
    return first // num_tokens, stop // num_tokens


def packed_images(
    output: "BridgeOutput",
    image_mask: Tensor,
    placeholders: Tensor,
    num_tokens: int,
    segments: Tensor,
) -> tuple["BridgeOutput", Tensor]:
    """What a bridge made of the images of samples, for the rows that the samples are packed into.

    Args:
        output: of s samples.
        image_mask: bool (s, i).
        placeholders: bool (b, t), those of the samples in their order.
        num_tokens: placeholders of an image.
        segments: long (b, t), the sample of each column.

    Returns:
        The output, its memory (b, i', m, d_memory) and its `next_image` (b, t), and the mask of
        the rows' images, bool (b, i').
    """
    counts = placeholders.sum(dim=1, keepdim=True) // num_tokens
    most = max(1, int(counts.max()))
    rows = torch.arange(most, device=counts.device) < counts
    memory, following = output.memory, output.next_image
    if memory is not None:
        real = memory[image_mask]
        memory = real.new_zeros(*rows.shape, *real.shape[1:]).masked_scatter(
            rows[..., None, None], real
        )
    if following is not None:
        following = following.to(segments.device)[segments]
    return replace(output, memory=memory, next_image=following), rows


@dataclass
class Condition:
    """The images of the current forward pass, as inserted layers see them.

    Attributes:
        memory: (b, i, m, d_memory) or None.
        image_mask: bool (b, i).
        index: long (b, t), `image_index` of every column of the whole prompt.
        start: first column that the running LM call computes (more than 0 in cached decoding).
        keep_projections: whether all LM calls up to the last are one generation, so that what
            is computed of the images alone can be kept for the next call.
        first: long (b, t), the first image of each column's own sample where a row holds
            several samples; None where a row is one sample.
    """

    memory: Tensor | None
    image_mask: Tensor
    index: Tensor
    start: int = 0
    keep_projections: bool = False
    first: Tensor | None = None
    _kept: dict[object, Any] = field(default_factory=dict)
    _shared: dict[object, Any] = field(default_factory=dict)
    _call: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        output: "BridgeOutput",
        placeholders: Tensor,
        num_tokens: int,
        image_mask: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        keep_projections: bool = False,
    ) -> "Condition":
        """The condition of a batch of texts.

        Args:
            output: what the bridge made of the images.
            placeholders: bool (b, t), where the images stand in the text.
            num_tokens: placeholders of an image.
            image_mask: bool (b, i); the text counts real images only.
            attention_mask: bool (b, t), False for padding, which reads no image; None: no padding.
            segments: long (b, t), see `image_index`; padding may have any number.
            keep_projections: see `Condition`.

        Raises:
            ValueError: segments of another shape than the text.
        """
        index = image_index(
            placeholders, num_tokens, segments=segments, next_image=output.next_image
        )
        if attention_mask is not None:
            index = index.masked_fill(~attention_mask, -1)
        first = None
        if segments is not None:
            first, _ = _images_of_samples(placeholders, num_tokens, segments)
        return cls(output.memory, image_mask, index, 0, keep_projections, first)

    @property
    def past_prompt(self) -> bool:
        """Whether every column of the running LM call sees what the prompt's last one saw."""
        return self.start >= self.index.shape[1] - 1

    def image_index(self, hidden: Tensor) -> Tensor:
        """Image index of the columns of `hidden`; columns past the prompt repeat its last one.

        Shape: hidden (b', t', d) -> long (b', t'), where b' = b × beams.
        """
        return self._columns(self.index, hidden)

    def image_place(self, hidden: Tensor) -> Tensor:
        """Where on the image axis the image of each position stands; -1 for none.

        Shape: hidden (b', t', d) -> long (b', t').
        """
        return self._columns(self._places(), hidden)

    def last_place(self, rows: int) -> Tensor:
        """`image_place` of the prompt's last column, which all later ones repeat: long (b')."""
        return self._expand(self._places()[:, -1], rows)

    def visible_images(self, hidden: Tensor, visible: Visible = "latest") -> Tensor:
        """Which real images each position reads.

        Args:
            hidden: (b', t', d).
            visible: ``latest``, the one of `image_index`; ``all``, this one and all before it
                in the same sample.

        Returns:
            bool (b', t', i).
        """
        mask = self._expand(self.image_mask, hidden.shape[0])[:, None]
        ordinals = mask.long().cumsum(dim=-1) - 1
        latest = self.image_index(hidden)[..., None]
        if visible == "latest":
            return (ordinals == latest) & mask
        seen = (ordinals <= latest) & mask
        if self.first is not None:
            seen &= ordinals >= self._columns(self.first, hidden)[..., None]
        return seen

    def project(
        self, owner: object, hidden: Tensor, projection: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`projection(memory)`, repeated for beams; computed once per generation.

        Only a generation keeps projections (the condition lives as long as it does): training
        must compute them anew in every forward or their weights would get no gradient.
        """
        rows = hidden.shape[0]

        def make() -> tuple[Tensor, ...]:
            return tuple(self._expand(x, rows) for x in projection(self.images()))

        return self.kept((owner, rows), make)

    def images(self) -> Tensor:
        """The memory of the images: (b, i, m, d_memory).

        Raises:
            ValueError: the bridge returned none.
        """
        if self.memory is None:
            raise ValueError("this inserted layer reads memory, but the bridge returned none")
        return self.memory

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """`make()`, computed once per generation and anew everywhere else.

        Args:
            key: of one layer and one purpose.
            make: computes it of the images and of the layer's weights.
        """
        if not self.keep_projections:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def shared(self, key: object, hidden: Tensor, make: Callable[[], T]) -> T:
        """`make()`, computed once for all layers of an LM call, and of all calls past the prompt.

        Args:
            key: of one purpose.
            hidden: (b', t', d), the input of the layer.
            make: computes it of the condition and the shape of `hidden`, and of nothing that gets
                a gradient: a checkpointed block that runs again finds it made.
        """
        start = self.index.shape[1] if self.past_prompt else self.start
        call = (start, *hidden.shape[:2])
        if call != self._call:
            self._call = call
            self._shared.clear()
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _places(self) -> Tensor:
        """Where on the image axis the image of each column of the prompt stands; -1 for none."""
        # The text counts real images only, wherever padding images stand among them.
        places = self.image_mask.long().argsort(dim=1, descending=True, stable=True)
        real = self.image_mask.sum(dim=1, keepdim=True)
        found = places.gather(1, self.index.clamp(0, places.shape[1] - 1))
        return found.where((self.index >= 0) & (self.index < real), -1)

    def _columns(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The columns of (b, t) that belong to `hidden`, its rows repeated for beams."""
        length = x.shape[1]
        if self.start or hidden.shape[1] != length:
            columns = torch.arange(self.start, self.start + hidden.shape[1], device=x.device)
            x = x[:, columns.clamp(max=length - 1)]
        return self._expand(x, hidden.shape[0])

    @staticmethod
    def _expand(x: Tensor, batch: int) -> Tensor:
        """Beam search and several returned sequences repeat each row in place."""
        if x.shape[0] == batch:
            return x
        if batch % x.shape[0]:
            raise ValueError(
                f"found {batch} rows in the LM for {x.shape[0]} conditioned samples; expected a "
                "multiple (beams). Run the LM through the VisionLanguageModel"
            )
        return x.repeat_interleave(batch // x.shape[0], dim=0)
