"""A resampler alone, from the checkpoints of whole models: in soft prefixes, and refused."""

from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import tiny_idefics
import tiny_openflamingo
import torch

from bridges import VisionFeatures, VisionLanguageModel, VisionShape, bridge_factory
from perceiver import PerceiverResampler
from perceiver.official import idefics_form, load_resampler

SHAPE = VisionShape(16, 10, (3, 3))


def resampler(**options: Any) -> PerceiverResampler:
    sizes: dict[str, Any] = {"num_latents": 3, "depth": 2, "num_heads": 2}
    made = PerceiverResampler(vision=SHAPE, **(sizes | options))
    tiny.randomise(made, seed=4)
    return made


IDEFICS: dict[str, Any] = {"head_dim": 8, "activation": "relu"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny_idefics.save(tiny_idefics.idefics(), tmp_path_factory.mktemp("idefics"))


@pytest.fixture
def flamingo(tmp_path) -> tuple[tiny_openflamingo.Perceiver, Path]:
    theirs = tiny_openflamingo.Flamingo("gpt_neox", 16, 101)
    torch.save(theirs.checkpoint(), tmp_path / "checkpoint.pt")
    return theirs.perceiver, tmp_path / "checkpoint.pt"


def features() -> VisionFeatures:
    return VisionFeatures(torch.randn(2, 2, 10, 16), torch.ones(2, 2).bool(), (3, 3))


def test_from_idefics(folder):
    ours, images = resampler(**IDEFICS), features()
    ours.load_pretrained(folder)
    theirs = tiny_idefics.idefics().model.perceiver_resampler
    parity.close(ours(images).flatten(0, 1), theirs(images.patches.flatten(0, 1)), "tokens")


def test_from_openflamingo(flamingo):
    theirs, path = flamingo
    ours, images = resampler(), features()
    ours.load_pretrained(path)
    parity.close(ours(images), theirs(images.patches[:, :, None]), "tokens")


def test_what_is_left_is_said(folder, flamingo):
    left = load_resampler(folder, resampler(**IDEFICS))
    assert "gated_xattn.official" in left["model.gated_cross_attn_layers.0.alpha_dense"]
    assert not any(key.startswith("model.perceiver_resampler") for key in left)
    left = load_resampler(flamingo[1], resampler())
    assert "lang_encoder.gpt_neox.embed_in.weight" in left


def test_a_soft_prefix_may_start_from_it(folder):
    sizes = {"num_latents": 3, "depth": 2, "num_heads": 2, **IDEFICS}
    perceiver = {"class_path": "perceiver.PerceiverResampler", "init_args": sizes}
    spec = {"class_path": "bridges.SoftPrefix", "init_args": {"resampler": perceiver}}
    model = VisionLanguageModel.connect(
        tiny.vision_encoder(drop_prefix=False), tiny.language_model(), bridge_factory(spec)
    )
    model.bridge.load_pretrained(folder, model.lm)
    theirs = tiny_idefics.idefics().model.perceiver_resampler
    assert torch.equal(model.bridge.resampler.latents, theirs.latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 8}, "activation: relu"),
        ({"num_heads": 4, "head_dim": 4, "activation": "relu"}, "num_heads=2 and head_dim=8"),
        (IDEFICS | {"depth": 1}, r"perceiver_resampler\.blocks\.1\..* of 1 layers"),
        (IDEFICS | {"depth": 3}, r"no layers\.2\."),
        (IDEFICS | {"num_latents": 4}, r"mis-shaped latents \(3, 16\) for \(4, 16\)"),
        (IDEFICS | {"dim": 24}, r"no input\.bias, input\.weight"),
        (IDEFICS | {"qk_norm": True}, r"no layers\.0\.attention\.k_norm"),
        (IDEFICS | {"num_kv_heads": 1}, r"mis-shaped layers\.0\.attention\.k"),
        (IDEFICS | {"activation": "swiglu"}, r"no layers\.0\.ff\.gate"),
    ],
)
def test_other_sizes_and_settings_are_refused(folder, options: dict[str, Any], message: str):
    ours = resampler(**options)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ours.load_pretrained(folder)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_a_checkpoint_without_a_resampler(tmp_path):
    tiny_idefics.save(tiny_idefics.idefics(use_resampler=False), tmp_path / "a")
    with pytest.raises(ValueError, match=r"no model\.perceiver_resampler\.… in"):
        resampler(**IDEFICS).load_pretrained(tmp_path / "a")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"no perceiver\.… in"):
        resampler().load_pretrained(tmp_path / "b.pt")


def test_another_epsilon_warns(folder):
    with pytest.warns(UserWarning, match="norm_eps=1e-06"):
        resampler(**IDEFICS, norm_eps=1e-6).load_pretrained(folder)


def test_the_way_to_hf_and_back(folder):
    ours, again = resampler(**IDEFICS, qk_norm=True), resampler(**IDEFICS, qk_norm=True)
    tiny.randomise(ours, seed=5)
    config, state = idefics_form(ours)
    changes = {"perceiver_config": config, "use_resampler": True}
    theirs = tiny_idefics.idefics(**changes)
    theirs.model.perceiver_resampler.load_state_dict(state)
    path = tiny_idefics.save(theirs, folder.parent / "again")
    load_resampler(path, again)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in ours.state_dict().items())
