"""Q-Former: layers, masks, BLIP-2's first stage, and the resampler that a reader takes."""

from qformer.bert import init_from_bert
from qformer.layers import QFormerLayer
from qformer.momentum import MomentumTeacher
from qformer.resampler import QFormer
from qformer.stage1 import Stage1, Stage1Output

__all__ = [
    "MomentumTeacher",
    "QFormer",
    "QFormerLayer",
    "Stage1",
    "Stage1Output",
    "init_from_bert",
]
