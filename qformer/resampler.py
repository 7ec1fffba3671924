"""The Q-Former: learned queries, and text beside them, that read an image."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from bridges.contract import Instruction, Resampler, VisionFeatures, VisionShape
from bridges.precision import as_autocast
from bridges.run import WEIGHTS_FILE as BRIDGE_FILE
from qformer.layers import BERT_EPS, Projected, QFormerLayer
from qformer.layout import Layout
from qformer.masks import instruction_mask
from qformer.tokens import load_tokenizer


class QFormer(Resampler):
    """Learned queries read the image through every second layer of a BERT-shaped transformer.

    The queries have no position embedding but do pass the embedding LayerNorm; a trainable
    LayerNorm (`ln_vision`) sits on the image features. With a text branch, text goes through the
    same self-attention beside the queries and has a feed-forward of its own: stage 1 needs it,
    and with it `forward` reads the instruction, as InstructBLIP does. BLIP-2's stage 2 has none.

    Args:
        vision: sizes of the encoder.
        num_queries: tokens per image.
        dim: width of queries and text.
        depth: number of layers.
        num_heads: attention heads.
        ff_dim: inner width of the feed-forwards; ``4 * dim`` by default.
        cross_attention_every: the image is read in layers 0, 2, 4, … by default.
        tokenizer: of the text branch: a BERT's hub name, a local folder, or
            ``embedded:minilm-l6``; see `load_tokenizer`. None for no text branch.
        vocab_size: of the text branch, where token ids come from elsewhere; follows from
            `tokenizer` by default.
        max_text: longest text.
        ln_vision_eps: epsilon of `ln_vision`. LAVIS: 1e-5; Hugging Face's checkpoints: 1e-6.

    Shape: patches (b, i, p, d_vision), text (b, t) -> (b, i, num_queries, dim).

    Source: BLIP-2 (arXiv 2301.12597) section 3.1; InstructBLIP (arXiv 2305.06500) section 2.3.
    Deviation: no dropout (BERT's 0.1).
    """

    def __init__(
        self,
        *,
        vision: VisionShape,
        num_queries: int = 32,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ff_dim: int | None = None,
        cross_attention_every: int = 2,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        max_text: int = 512,
        ln_vision_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_tokens = num_queries
        self.dim = dim
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else None
        if self.tokenizer is not None:
            if vocab_size not in (None, len(self.tokenizer)):
                raise ValueError(
                    f"found vocab_size={vocab_size} and a tokenizer of {len(self.tokenizer)}; "
                    "expected them to agree: leave vocab_size out"
                )
            vocab_size = len(self.tokenizer)
        self.vocab_size = vocab_size
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.text_embeddings = TextEmbeddings(vocab_size, max_text, dim) if vocab_size else None
        self.embedding_norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.ln_vision = nn.LayerNorm(vision.dim, eps=ln_vision_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim,
                vision.dim,
                num_heads,
                ff_dim or 4 * dim,
                cross_attention=layer % cross_attention_every == 0,
                text_branch=vocab_size is not None,
            )
            for layer in range(depth)
        )
        self.apply(_init_bert)
        self.train_last_text(False)

    def train_last_text(self, wanted: bool) -> None:
        """Whether the text's outputs are wanted, as in stage 1; else its last step is frozen.

        Beside the queries the last layer's feed-forward of the text has no reader, and DDP would
        wait for its gradients.
        """
        last = self.blocks[-1]
        for module in (last.text_ff, last.text_norm):
            if module is not None:
                module.requires_grad_(wanted)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        b, i = vision.patches.shape[:2]
        images = self.project(rearrange(vision.patches, "b i p d -> (b i) p d"))
        x = self.embed_queries(b * i)
        if text is None or self.text_embeddings is None:
            layout = Layout(b * i, self.num_tokens)
        else:
            mask = repeat(text.attention_mask, "b t -> (b i) t", i=i)
            layout = Layout.of(self.num_tokens, mask, instruction_mask)
            ids = repeat(text.input_ids, "b t -> (b i) t", i=i)
            x = torch.cat([x, self.embed_text(ids, mask)])
        # The text's outputs are not wanted.
        x = self.transform(x, layout, images, keep_text=torch.arange(0, device=x.device))
        return rearrange(x, "(b i n) d -> b i n d", b=b, i=i)

    def load_pretrained(self, path: str | Path) -> None:
        """Takes the weights of a run, a LAVIS ``.pth`` or a Hugging Face folder.

        The run may be one of stage 1, or that of a bridge around a Q-Former (stage 2).

        A text branch is taken along if this Q-Former has one, and left out if not.

        Raises:
            ValueError: nothing of the kind there, or weights of other sizes.
        """
        from qformer.official import load_resampler
        from qformer.runs import is_stage1_run, read_bridge, read_qformer

        if is_stage1_run(Path(path)):
            read_qformer(Path(path), self)
        elif (Path(path) / BRIDGE_FILE).is_file():
            read_bridge(Path(path), self)
        else:
            load_resampler(path, self)

    def project(self, patches: Tensor) -> list[Projected]:
        """Keys and values of images for every layer that reads them, each a (b, h, p, d).

        `ln_vision`'s scale and shift are folded into the projections: the normalised patches then
        depend on no parameter, and backward need not multiply its way into frozen features.

        Args:
            patches: (b, p, d_vision).
        """
        norm = self.ln_vision
        normalised = F.layer_norm(patches.float(), norm.normalized_shape, eps=norm.eps)
        normalised = as_autocast(normalised.to(norm.weight.dtype))
        readers = [layer.cross_attention for layer in self.blocks]
        return [
            (
                _folded(block.k, norm, normalised, block.num_heads),
                _folded(block.v, norm, normalised, block.num_heads),
            )
            for block in readers
            if block is not None
        ]

    def embed_queries(self, rows: int) -> Tensor:
        """The queries for a number of rows: (rows · n, d)."""
        return repeat(self.embedding_norm(self.queries), "n d -> (r n) d", r=rows)

    def embed_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Word and position embeddings of the real tokens, row by row, normed: (m, d).

        Args:
            input_ids: long (r, t).
            mask: bool (r, t); False marks padding.

        Raises:
            ValueError: no text branch, or text that is longer than its positions.
        """
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return self.embed_tokens(input_ids[mask], positions[mask], mask.shape[1])

    def embed_tokens(self, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """Word and position embeddings, normed: long (m), long (m) -> (m, d).

        Args:
            ids: of the tokens.
            positions: of the tokens, below `length`.
            length: of the longest text.

        Raises:
            ValueError: as `embed_text`.
        """
        table = self.text_embeddings
        if table is None:
            raise ValueError("found no text branch; expected one: build with tokenizer=…")
        if length > table.position.num_embeddings:
            raise ValueError(
                f"found text of {length} tokens; expected at most {table.position.num_embeddings}: "
                "cut it, or build the Q-Former with a larger max_text"
            )
        return self.embedding_norm(table.word(ids) + table.position(positions))

    def transform(
        self,
        x: Tensor,
        layout: Layout,
        own: list[Projected],
        other: list[Projected] | None = None,
        *,
        rows: Tensor | None = None,
        keep_text: Tensor | None = None,
    ) -> Tensor:
        """All layers.

        Args:
            x: flat tokens (m, d), see `Layout`.
            layout: of them.
            own: keys and values of b images, from `project`. Row r reads image ``r mod b``.
            other: of the last rows, likewise, one image each; None if there are no such rows.
            rows: long (r'). The first self-attention knows no image yet, so that rows with the
                same text share it: it runs on the layout's rows, and these rows of it go on.
            keep_text: long, the text tokens that are wanted in the end; all by default.

        Returns:
            (m', d): all queries, then the wanted text tokens.
        """
        read = 0
        for index, layer in enumerate(self.blocks):
            first, last = index == 0 and rows is not None, index == len(self.layers) - 1
            x = layer.attend(x, layout, _kept(layout, keep_text) if last and not first else None)
            if first and rows is not None:
                queries, text = x.tensor_split([layout.query_tokens])
                x = torch.cat([queries, layer.feed_text(text)])
                layout, places = layout.select(rows)
                if last and keep_text is not None:
                    places = places[_kept(layout, keep_text)]
                x = x.index_select(0, places)
            queries, text = x.tensor_split([layout.query_tokens])
            if len(queries):
                if layer.cross_attention is not None:
                    rest = other[read] if other is not None else None
                    queries = layer.read(queries, layout.rows, own[read], rest)
                    read += 1
                queries = layer.feed_queries(queries)
            if len(text) and not first:
                text = layer.feed_text(text)
            x = torch.cat([queries, text])
        return x

    @property
    def blocks(self) -> list[QFormerLayer]:
        """The layers, as what they are."""
        return [layer for layer in self.layers if isinstance(layer, QFormerLayer)]


class TextEmbeddings(nn.Module):
    """Word and position embeddings of the text branch.

    LAVIS has no token types; `init_from_bert` adds BERT's first one to the positions.
    """

    def __init__(self, vocab_size: int, max_text: int, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_text, dim)


def _kept(layout: Layout, keep_text: Tensor | None) -> Tensor | None:
    if keep_text is None:
        return None
    queries = torch.arange(layout.query_tokens, device=keep_text.device)
    return torch.cat([queries, keep_text + layout.query_tokens])


def _folded(linear: nn.Linear, norm: nn.LayerNorm, normalised: Tensor, heads: int) -> Tensor:
    """``linear(scale · normalised + shift)`` as one product: (b, p, d) -> (b, h, p, d')."""
    weight, bias = linear.weight * norm.weight, F.linear(norm.bias, linear.weight, linear.bias)
    return rearrange(F.linear(normalised, weight, bias), "b p (h d) -> b h p d", h=heads)


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
