"""Every row of the site table leads to the right activations."""

import copy
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridges import Condition, DecoderHooks, LayerInsert
from bridges.sites import SITES, DecoderSites, decoder_sites

T = 6


class Recorder(nn.Module):
    """Notes what it is given, and gives it back scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.seen: list[Tensor] = []
        self.starts: list[int] = []

    def forward(self, hidden: Tensor, condition: Condition) -> Tensor:
        self.seen.append(hidden.clone())
        self.starts.append(condition.start)
        return hidden * self.scale


def nothing_to_see() -> Condition:
    return Condition(
        None, torch.zeros(1, 1, dtype=torch.bool), torch.full((1, T), -1, dtype=torch.long)
    )


def lm_of(model_type: str) -> Any:
    if model_type in tiny.CONFIGS:
        return tiny.causal_lm(model_type)
    twins = {"qwen3": (hf.Qwen3Config, "qwen2"), "gemma": (hf.GemmaConfig, "llama")}
    config, twin = twins[model_type]
    sizes = {**tiny.CONFIGS[twin]().to_diff_dict(), "head_dim": 8}
    for name in ("model_type", "transformers_version", "rope_parameters", "layer_types"):
        sizes.pop(name, None)
    return tiny.randomise(hf.AutoModelForCausalLM.from_config(config(**sizes)))


@pytest.fixture(params=SITES)
def lm(request: pytest.FixtureRequest) -> Any:
    return lm_of(request.param)


@torch.no_grad()
def test_layer_input_is_the_residual_stream_before_the_block(lm: Any):
    ids = torch.arange(10, 10 + T)[None]
    streams = lm(input_ids=ids, output_hidden_states=True).hidden_states
    layers = lm.config.num_hidden_layers
    recorders = [Recorder() for _ in range(layers)]
    inserts = [LayerInsert(i, "layer_input", r) for i, r in enumerate(recorders)]
    hooks = DecoderHooks(lm, inserts, layers)
    hooks.condition = nothing_to_see()
    lm(input_ids=ids)
    hooks.remove()
    for layer in range(layers):
        (seen,) = recorders[layer].seen
        torch.testing.assert_close(seen, streams[layer])


@torch.no_grad()
def test_layer_input_rewrites_what_the_block_gets(lm: Any):
    ids = torch.arange(10, 10 + T)[None]
    layers = lm.config.num_hidden_layers
    scale, recorder = Recorder(0.5), Recorder()
    inserts = [LayerInsert(1, "layer_input", scale), LayerInsert(2, "layer_input", recorder)]
    hooks = DecoderHooks(lm, inserts, layers)
    hooks.condition = nothing_to_see()
    lm(input_ids=ids)
    hooks.condition = None
    block = lm.get_submodule(decoder_sites(lm).block.format(i=1))
    halve = block.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 0.5, *args[1:]), kwargs), with_kwargs=True
    )
    streams = lm(input_ids=ids, output_hidden_states=True).hidden_states
    halve.remove()
    hooks.remove()
    torch.testing.assert_close(recorder.seen[0], streams[2])


@torch.no_grad()
def test_attention_output_is_what_joins_the_residual_stream(lm: Any):
    ids = torch.arange(10, 10 + T)[None]
    silenced = copy.deepcopy(lm)
    attention = silenced.get_submodule(decoder_sites(lm).attention.format(i=1))
    assert "Attention" in type(attention).__name__
    # The projection back into the residual stream is the last linear layer of the module.
    projection = [m for m in attention.modules() if isinstance(m, nn.Linear | Conv1D)][-1]
    for parameter in projection.parameters():
        parameter.zero_()
    expected = silenced(input_ids=ids).logits

    silence = Recorder(0.0)
    inserts = [LayerInsert(1, "attention_output", silence)]
    hooks = DecoderHooks(lm, inserts, lm.config.num_hidden_layers)
    hooks.condition = nothing_to_see()
    found = lm(input_ids=ids).logits
    hooks.remove()
    assert silence.seen[0].shape == (1, T, lm.config.hidden_size)
    torch.testing.assert_close(found, expected)
    assert (found - lm(input_ids=ids).logits).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("site", ["layer_input", "attention_output"])
def test_the_column_that_is_computed_is_known_in_cached_decoding(lm: Any, site: Any):
    recorder = Recorder()
    layers = lm.config.num_hidden_layers
    hooks = DecoderHooks(lm, [LayerInsert(layers - 1, site, recorder)], layers)
    hooks.condition = nothing_to_see()
    embeddings = lm.get_input_embeddings()(torch.arange(10, 10 + T)[None])
    lengths = {"max_new_tokens": 4, "min_new_tokens": 4}
    lm.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, T, dtype=torch.long),
        pad_token_id=0,
        **lengths,
    )
    hooks.remove()
    assert recorder.starts == [0, T, T + 1, T + 2]
    assert [seen.shape[1] for seen in recorder.seen] == [T, 1, 1, 1]


def test_two_layers_of_one_place_run_in_their_order():
    lm = tiny.causal_lm("llama")
    first, second = Recorder(2.0), Recorder()
    inserts = [LayerInsert(0, "layer_input", module) for module in (first, second)]
    hooks = DecoderHooks(lm, inserts, 3)
    hooks.condition = nothing_to_see()
    lm(input_ids=torch.arange(10, 10 + T)[None])
    hooks.remove()
    torch.testing.assert_close(second.seen[0], 2 * first.seen[0])


def hooks_left(lm: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())


def test_an_unknown_lm_type_is_answered_with_the_row_to_add():
    config = hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=tiny.VOCABULARY)
    lm = hf.BloomForCausalLM(config)
    with pytest.raises(ValueError) as caught:
        DecoderHooks(lm, [LayerInsert(0, "layer_input", Recorder())], 1)
    message = str(caught.value)
    assert "found an LM of type 'bloom'; expected one of gemma, gemma2, gpt2" in message
    assert "bridges.sites.SITES['bloom'] = DecoderSites(" in message


def test_a_row_added_as_the_message_says_is_enough(monkeypatch: pytest.MonkeyPatch):
    config = hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=tiny.VOCABULARY)
    lm = hf.BloomForCausalLM(config)
    row = DecoderSites("transformer", "transformer.h.{i}", "transformer.h.{i}.self_attention")
    monkeypatch.setitem(SITES, "bloom", row)
    recorder = Recorder()
    hooks = DecoderHooks(lm, [LayerInsert(1, "layer_input", recorder)], 2)
    hooks.condition = nothing_to_see()
    lm(input_ids=torch.arange(10, 10 + T)[None])
    hooks.remove()
    assert recorder.seen[0].shape == (1, T, 16)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there(layer: int):
    lm = tiny.causal_lm("llama")
    message = f"found an insert for layer {layer}; expected 0 to 2: this LM has 3 layers"
    with pytest.raises(ValueError, match=message):
        DecoderHooks(lm, [LayerInsert(layer, "layer_input", Recorder())], 3)
    assert hooks_left(lm) == 0


def test_an_unknown_site_leaves_no_hook_behind():
    lm = tiny.causal_lm("llama")
    inserts: list[Any] = [
        LayerInsert(0, "layer_input", Recorder()),
        LayerInsert(1, "mlp", Recorder()),  # pyright: ignore[reportArgumentType]
    ]
    with pytest.raises(ValueError, match="found site 'mlp'; expected one of layer_input, att"):
        DecoderHooks(lm, inserts, 3)
    assert hooks_left(lm) == 0


def test_a_bridge_without_inserts_needs_no_row():
    lm = nn.Linear(2, 2)
    DecoderHooks(lm, [], 0)
    assert hooks_left(lm) == 0
