"""What all tests share: no network, one thread, tiny models built once."""

import os

# Before anything imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tiny
import torch

from bridges import LanguageModel, VisionEncoder

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def full_precision() -> None:
    """Training lowers it for its whole process, and so for whatever test comes next."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def encoder() -> VisionEncoder:
    """A tiny CLIP: 3 × 3 patches of width 16."""
    return tiny.vision_encoder("clip")


@pytest.fixture(scope="session")
def language_models() -> Callable[[str], LanguageModel]:
    """Tiny frozen LMs by family. Shared: whoever hooks one takes the hooks out again."""
    return cache(tiny.language_model)


@pytest.fixture(scope="session")
def bare_lms() -> Callable[[str], Any]:
    """The same LMs, weight for weight, as plain HF models that no bridge ever touches."""
    return cache(tiny.causal_lm)
