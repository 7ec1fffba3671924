"""Every bridge on every LM family: a test that asks for `vlm` runs over the whole grid."""

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch

from bridges import LanguageModel, VisionEncoder, VisionLanguageModel


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=tiny.BRIDGES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vlm(
    kind: str,
    family: str,
    encoder: VisionEncoder,
    language_models: Callable[[str], LanguageModel],
) -> Iterator[VisionLanguageModel]:
    """A fresh bridge, gates closed, between shared frozen ends."""
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(encoder, language_models(family), tiny.factory(kind))
    yield model
    model.hooks.remove()


@pytest.fixture
def open_vlm(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The same with its gates, if it has any, opened to random values."""
    tiny.open_gates(vlm.bridge)
    return vlm
