"""Bridges: the piece between a frozen vision encoder and a frozen language model."""

from bridges.blind import BlindResampler
from bridges.build import bridge_factory
from bridges.captioning import caption, caption_features
from bridges.condition import Condition, image_index
from bridges.contract import (
    Bridge,
    BridgeFactory,
    BridgeOutput,
    DecoderShape,
    Instruction,
    LayerInsert,
    Resampler,
    ResamplerFactory,
    VisionFeatures,
    VisionShape,
)
from bridges.fewshot import FewShotPrompts
from bridges.hooks import DecoderHooks
from bridges.language import LanguageModel, LoRA, add_image_token
from bridges.model import ModelOutput, VisionLanguageModel
from bridges.projector import Projector
from bridges.prompts import PromptEncoder, TextBatch
from bridges.run import LanguageSource, RunSpec, VisionSource, load, save_run
from bridges.scoring import score_choices
from bridges.soft_prefix import SoftPrefix
from bridges.version import __version__
from bridges.vision import VisionEncoder

__all__ = [
    "BlindResampler",
    "Bridge",
    "BridgeFactory",
    "BridgeOutput",
    "Condition",
    "DecoderHooks",
    "DecoderShape",
    "FewShotPrompts",
    "Instruction",
    "LanguageModel",
    "LanguageSource",
    "LayerInsert",
    "LoRA",
    "ModelOutput",
    "Projector",
    "PromptEncoder",
    "Resampler",
    "ResamplerFactory",
    "RunSpec",
    "SoftPrefix",
    "TextBatch",
    "VisionEncoder",
    "VisionFeatures",
    "VisionLanguageModel",
    "VisionShape",
    "VisionSource",
    "__version__",
    "add_image_token",
    "bridge_factory",
    "caption",
    "caption_features",
    "image_index",
    "load",
    "save_run",
    "score_choices",
]
