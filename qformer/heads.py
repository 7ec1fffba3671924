"""BERT's masked-language head, by which the Q-Former writes in stage 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.layers import BERT_EPS


class LMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the word embeddings as the last layer, with a bias.

    Shape: (m, d), word embeddings (v, d) -> (m, v).
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), word, self.bias)
