"""A Flamingo training step the usual way, as OpenFlamingo does it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class FlamingoLayer(nn.Module):
    """A gated block, then a decoder block, in the place of the decoder block.

    Attributes:
        media: (b, i, m, d), and bool (b, t), where the images stand; set before each forward.
    """

    def __init__(self, block: nn.Module, decoder_block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.decoder_block = decoder_block
        self.media: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the decoder block."""
        assert self.media is not None
        media, places = self.media
        # The block is trained in fp32 beside an LM in bf16, as ours is.
        wide = self.block(hidden.to(media.dtype), media, media_locations=places)
        return self.decoder_block(wide.to(hidden.dtype), *args, **kwargs)


class ReferenceFlamingo(nn.Module):
    """An LM with flamingo-pytorch's gated blocks before every block, trained as OpenFlamingo does.

    Every position is scored against all images under a mask; each layer projects all images anew.
    The whole (tied) embedding matrix gets a gradient, which is then masked but for the rows of new
    tokens. The LM's own forward makes logits and loss at all positions.

    Args:
        lm: an HF ``OPTForCausalLM``; frozen, but for its embedding.
        new_ids: rows of the embedding that are trained.
        head_dim: width of a gated block's head.

    Source: OpenFlamingo (arXiv 2308.01390), ``FlamingoLMMixin`` and ``train_one_epoch``; Flamingo
    (arXiv 2204.14198) section 2.2.
    """

    def __init__(self, lm: Any, new_ids: Iterable[int], head_dim: int = 64) -> None:
        super().__init__()
        block_class = gated_block_class()
        self.lm = lm.requires_grad_(False)
        dim, layers = lm.config.hidden_size, lm.model.decoder.layers
        self.layers = [
            FlamingoLayer(block_class(dim=dim, dim_head=head_dim, heads=dim // head_dim), layer)
            for layer in layers
        ]
        self.blocks = [layer.block for layer in self.layers]
        lm.model.decoder.layers = nn.ModuleList(self.layers)
        self.embedding: nn.Parameter = lm.get_input_embeddings().weight
        self.embedding.requires_grad_(True)
        self._new_ids = list(new_ids)

    def forward(self, input_ids: Tensor, labels: Tensor, media: Tensor, places: Tensor) -> Tensor:
        """The loss.

        Args:
            input_ids: long (b, t).
            labels: long (b, t), -100 where there is no loss.
            media: (b, i, m, d).
            places: bool (b, t), where the images stand.
        """
        for layer in self.layers:
            layer.media = media, places
        return self.lm(input_ids=input_ids, labels=labels, use_cache=False).loss

    def mask_gradient(self) -> None:
        """Zeroes the gradient of all rows of the embedding but the new ones, after backward."""
        assert self.embedding.grad is not None
        mask = torch.zeros_like(self.embedding.grad)
        mask[self._new_ids] = 1
        self.embedding.grad = self.embedding.grad * mask

    def lm_parameters(self) -> Iterator[nn.Parameter]:
        """The LM's parameters without the gated blocks among them."""
        added = {parameter for block in self.blocks for parameter in block.parameters()}
        return (p for p in self.lm.parameters() if p not in added)

    def decoder_gradients(self, wanted: bool) -> None:
        """Whether the decoder's weights get gradients, which nobody uses (as under FSDP there)."""
        for layer in self.layers:
            layer.decoder_block.requires_grad_(wanted)


def gated_block_class() -> Any:
    """flamingo-pytorch's ``GatedCrossAttentionBlock``.

    Raises:
        ImportError: it is not installed (extra ``bench``).
    """
    try:
        from flamingo_pytorch import GatedCrossAttentionBlock
    except ImportError as error:
        raise ImportError(
            "this bench measures beside flamingo-pytorch: pip install 'bridges[bench]'"
        ) from error
    return GatedCrossAttentionBlock
