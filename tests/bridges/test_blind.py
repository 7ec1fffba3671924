"""The floor of every comparison: nothing of the picture passes."""

from functools import partial

import pytest
import tiny
import torch

from bridges import BlindResampler, VisionFeatures, VisionLanguageModel, bridge_factory
from perceiver import PerceiverResampler


def blind(kind: str):
    spec = tiny.BRIDGES[kind]
    within = {
        "class_path": "bridges.BlindResampler",
        "init_args": {"resampler": spec["init_args"]["resampler"]},
    }
    return bridge_factory(spec | {"init_args": spec["init_args"] | {"resampler": within}})


def pictures(seed: int) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 1, 9, 16, generator=generator)
    return VisionFeatures(patches, torch.ones(2, 1, dtype=torch.bool), (3, 3))


@pytest.mark.parametrize("kind", ["linear", "mlp", "qformer", "perceiver", "perceiver_gated"])
def test_nothing_of_the_picture_passes(kind, encoder, language_models):
    torch.manual_seed(0)
    model = VisionLanguageModel.connect(encoder, language_models("llama"), blind(kind))
    tiny.open_gates(model.bridge)
    text = model.prompt_encoder()([model.prompt] * 2, ["a cat", "two dogs"])
    outputs = [
        model(text.input_ids, text.attention_mask, text.labels, pictures(seed)) for seed in (0, 1)
    ]
    assert torch.equal(outputs[0].token_losses, outputs[1].token_losses)
    outputs[0].loss.backward()
    unused = [n for n, p in model.bridge.named_parameters() if p.grad is None or not p.grad.any()]
    # LayerNorm makes zeros of a constant: its factor is then of no use, as everything is that
    # tells patches apart.
    seeing = {
        "features_norm.weight",
        "ln_vision.weight",
        "q.weight",
        "q.bias",
        "k.weight",
        "k.bias",
    }
    assert all(any(name.endswith(one) for one in seeing) for name in unused), unused
    model.hooks.remove()


def test_it_has_the_tokens_and_the_parameters_of_the_resampler_within(encoder):
    within = partial(PerceiverResampler, num_latents=3, depth=1, num_heads=2, head_dim=8)
    seeing, one = (
        within(vision=encoder.shape),
        BlindResampler(vision=encoder.shape, resampler=within),
    )
    assert (one.num_tokens, one.dim, one.reads_video) == (3, seeing.dim, True)
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in seeing.parameters())
    assert set(one.state_dict()) == {f"resampler.{name}" for name in seeing.state_dict()}
    assert one.constant.square().mean() == pytest.approx(1, abs=0.1)


def test_weights_go_to_the_resampler_within(encoder, tmp_path):
    within = partial(PerceiverResampler, num_latents=3, depth=1)
    one = BlindResampler(vision=encoder.shape, resampler=within)
    with pytest.raises((ValueError, OSError), match="nothing"):
        one.load_pretrained(tmp_path / "nothing")
