"""Puts a bridge's layers into a frozen LM through public PyTorch hooks, and takes them out."""

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bridges.condition import Condition
from bridges.contract import LayerInsert, Site
from bridges.sites import decoder_sites


class DecoderHooks:
    """Holds the hooks of one bridge on one LM.

    The LM's weights, state-dict keys and methods stay untouched. Without a condition (the LM is
    called on its own) every hook passes the activations through unchanged.

    The condition stands while the LM runs, and no longer. Where a gradient-checkpointed block
    runs again in backward, hooks included, `SameCondition` puts it back.

    Raises:
        ValueError: an unknown LM type, a layer that the LM does not have, or an unknown site.
    """

    def __init__(self, lm: nn.Module, inserts: Sequence[LayerInsert], num_layers: int) -> None:
        self.condition: Condition | None = None
        self._handles: list[RemovableHandle] = []
        if not inserts:
            return
        sites = decoder_sites(lm)
        for insert in inserts:
            if not 0 <= insert.layer < num_layers:
                raise ValueError(
                    f"found an insert for layer {insert.layer}; expected 0 to {num_layers - 1}: "
                    f"this LM has {num_layers} layers"
                )
            if insert.site not in get_args(Site):
                raise ValueError(
                    f"found site {insert.site!r}; expected one of {', '.join(get_args(Site))}"
                )
        decoder = lm.get_submodule(sites.decoder)
        self._handles.append(decoder.register_forward_pre_hook(self._locate, with_kwargs=True))
        for insert in inserts:
            self._handles.append(self._register(lm, sites.block, sites.attention, insert))

    def remove(self) -> None:
        """Gives the original LM back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.condition = None

    def _register(
        self, lm: nn.Module, block: str, attention: str, insert: LayerInsert
    ) -> RemovableHandle:
        # Bound methods, not closures: a deep copy of the model gets hooks of its own.
        if insert.site == "layer_input":
            target = lm.get_submodule(block.format(i=insert.layer))
            rewrite_input = partial(self._rewrite_input, insert)
            return target.register_forward_pre_hook(rewrite_input, with_kwargs=True)
        target = lm.get_submodule(attention.format(i=insert.layer))
        return target.register_forward_hook(partial(self._rewrite_output, insert))

    def _rewrite_input(
        self, insert: LayerInsert, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.condition is None:
            return None
        if args:
            return (self._apply(insert, args[0]), *args[1:]), kwargs
        hidden = self._apply(insert, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}

    def _rewrite_output(
        self, insert: LayerInsert, _: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if self.condition is None:
            return None
        if isinstance(output, tuple):
            return (self._apply(insert, output[0]), *output[1:])
        return self._apply(insert, output)

    def _apply(self, insert: LayerInsert, hidden: Tensor) -> Tensor:
        assert self.condition is not None
        module = insert.module
        assert isinstance(module, nn.Module)
        # A trainable bridge is usually kept in fp32 beside an LM in bf16. Widening and narrowing
        # again is exact, so a closed gate still leaves the LM's activations bit-identical.
        dtype = next((p.dtype for p in module.parameters()), hidden.dtype)
        return module(hidden.to(dtype), self.condition).to(hidden.dtype)

    def _locate(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which columns this call of the decoder computes: all, or those past the cache."""
        if self.condition is not None:
            cache = kwargs.get("past_key_values")
            self.condition.start = 0 if cache is None else int(cache.get_seq_length())


class SameCondition:
    """Puts the condition of its making back while a checkpointed block runs again in backward.

    By then it is gone, or another forward pass has set its own. A class, because backward with
    ``retain_graph`` enters it more than once.
    """

    def __init__(self, hooks: DecoderHooks) -> None:
        self._hooks = hooks
        self._then = self._now = hooks.condition

    def __enter__(self) -> None:
        self._now = self._hooks.condition
        self._hooks.condition = self._then

    def __exit__(self, *_: object) -> None:
        self._hooks.condition = self._now
