"""OpenFlamingo restated: its module names and its arithmetic, over tiny LMs of transformers."""

from typing import Any

import tiny
import torch
from torch import Tensor, nn

HEADS = 2
HEAD_DIM = 64
DEPTH = 2
LATENTS = 3
EVERY = 2
END = "<|endofchunk|>"
IMAGE = "<image>"

BLOCKS = {
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "mpt": "transformer.blocks",
}
"""Where each LM has its blocks."""


def feed_forward(dim: int) -> nn.Sequential:
    up, down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def attention(q: Tensor, kv: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention; `hidden` marks what a query may not read."""
    k, v = kv.chunk(2, dim=-1)
    scores = (heads(q) * HEAD_DIM**-0.5) @ heads(k).transpose(-1, -2)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -torch.finfo(scores.dtype).max)
    return (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        kv = self.to_kv(torch.cat([self.norm_media(x), latents], dim=1))
        return self.to_out(attention(self.to_q(latents), kv))


class Perceiver(nn.Module):
    def __init__(self, dim: int, frames: int = 0) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(LATENTS, dim))
        self.frame_embs = nn.Parameter(torch.randn(frames, dim)) if frames else None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim), feed_forward(dim)]) for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (b, i, f, p, d) -> (b, i, n, d)."""
        b, i, f = x.shape[:3]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:f, None]
        x = x.flatten(2, 3).flatten(0, 1)
        latents = self.latents.expand(b * i, -1, -1)
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            latents = pair[0](x, latents) + latents
            latents = pair[1](latents) + latents
        return self.norm(latents).unflatten(0, (b, i))


class MaskedCrossAttention(nn.Module):
    def __init__(self, dim: int, vision_dim: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(vision_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, media: Tensor, locations: Tensor) -> Tensor:
        times = locations.cumsum(dim=1)
        image = torch.arange(media.shape[1]).repeat_interleave(media.shape[2]) + 1
        kv = self.to_kv(media.flatten(1, 2))
        out = attention(self.to_q(self.norm(x)), kv, times[..., None] != image)
        return self.to_out(out.masked_fill((times == 0)[..., None], 0.0))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, dim: int, vision_dim: int) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim, vision_dim)
        self.attn_gate = nn.Parameter(torch.rand(1) + 0.5)
        self.ff = feed_forward(dim)
        self.ff_gate = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor, media: Tensor, locations: Tensor) -> Tensor:
        x = self.attn(x, media, locations) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class FlamingoLayer(nn.Module):
    """A decoder block, behind a gated block where there is one."""

    def __init__(self, gated: nn.Module | None, decoder: nn.Module, owner: list[Any]) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder
        self._owner = owner

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        if self.gated_cross_attn_layer is not None:
            owner = self._owner[0]
            x = self.gated_cross_attn_layer(x, owner.media, owner.locations)
        return self.decoder_layer(x, *args, **options)


class Flamingo(nn.Module):
    """The model, over an LM whose vocabulary ends in the end of a chunk and the image."""

    def __init__(self, family: str, vision_dim: int, rows: int, frames: int = 0) -> None:
        super().__init__()
        self.family = family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            untied = {"tie_word_embeddings": False} if family == "llama" else {}
            lm = tiny.causal_lm(family, vocab_size=rows, num_hidden_layers=4, **untied)
            self.perceiver = Perceiver(vision_dim, frames)
            path, _, last = BLOCKS[family].rpartition(".")
            decoder, blocks = lm.get_submodule(path), lm.get_submodule(BLOCKS[family])
            gated = [
                GatedCrossAttentionBlock(lm.config.hidden_size, vision_dim)
                if (number + 1) % EVERY == 0
                else None
                for number in range(len(blocks))
            ]
            for module in (self.perceiver, *filter(None, gated)):
                for parameter in module.parameters():
                    if parameter.ndim > 1:
                        parameter.data.normal_(0, 0.2)
                    elif parameter.shape != (1,):
                        parameter.data.add_(0.2 * torch.randn_like(parameter))
        self.lang_encoder = lm.eval()
        lm.old_decoder_blocks = blocks
        lm.gated_cross_attn_layers = nn.ModuleList(gated)
        wrapped = (FlamingoLayer(g, block, [self]) for g, block in zip(gated, blocks, strict=True))
        setattr(decoder, last, nn.ModuleList(wrapped))
        self.image_id = rows - 1
        self.media = self.locations = torch.empty(0)

    def forward(self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Shape: patches (b, i, f, p, d), (b, t), (b, t) -> logits (b, t, rows)."""
        self.media, self.locations = self.perceiver(patches), input_ids == self.image_id
        options: dict[str, Any] = {"attention_mask": attention_mask.long()}
        if self.family != "mpt":  # which has no positions
            options["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.lang_encoder(input_ids=input_ids, **options).logits

    def checkpoint(self, names: str = "wrapped", *, frozen: bool = False) -> dict[str, Tensor]:
        """What OpenFlamingo saves: what it trains, and embeddings.

        Args:
            names: of the gated blocks: ``wrapped`` (version 2), ``list`` (version 1) or ``both``.
            frozen: also what is frozen.
        """
        state = {}
        for name, tensor in self.state_dict().items():
            listed, wrapped = ".gated_cross_attn_layers." in name, "gated_cross_attn_layer." in name
            if (listed and names == "wrapped") or (wrapped and names == "list"):
                continue
            trained = listed or wrapped or name.startswith("perceiver.")
            if self.family == "gpt_neox":  # its name where these were trained
                name = name.replace("lm_head", "embed_out")
            if trained or "embed" in name or ".wte." in name or frozen:
                state[name] = tensor.clone()
        return state
