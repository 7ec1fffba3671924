"""Two modules with the same weights, forward and backward from the same inputs, as a workload."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bridges.precision import Precision
from recipes.workload import Side, Workload


@dataclass(frozen=True)
class Leaf:
    """Something that gets a gradient on both sides.

    Attributes:
        name: what it is, in our names.
        ours: our tensor.
        reference: the reference's.
        rows: of the reference's, where one of its tensors joins two of ours.
    """

    name: str
    ours: Tensor
    reference: Tensor
    rows: slice | None = None


@dataclass(frozen=True)
class Pair:
    """Two ways to one output.

    Attributes:
        ours: our way.
        reference: the other.
        leaves: what gets a gradient.
        gradient: of the output, the same for both.
        autocast: whether matrices are multiplied in bf16.
    """

    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    leaves: Sequence[Leaf]
    gradient: Tensor
    autocast: bool = False

    def step(self, side: Callable[[], Tensor]) -> Tensor:
        """Forward and backward of one side; returns the output."""
        kind = self.gradient.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            out = side()
        out.backward(self.gradient.to(out.dtype))
        return out

    def zero(self) -> None:
        """Forgets all gradients."""
        for leaf in self.leaves:
            leaf.ours.grad = leaf.reference.grad = None

    def differences(self) -> tuple[float, float]:
        """Of the loss (the mean of output times `gradient`), and the largest relative one of a
        leaf's gradient."""
        self.zero()
        ours, reference = (
            (self.step(side).detach().float() * self.gradient).mean()
            for side in (self.ours, self.reference)
        )
        gradient = max(_relative(leaf) for leaf in self.leaves)
        self.zero()
        return float((ours - reference).abs()), gradient

    def largest_difference(self) -> float:
        """Of the two outputs."""
        found = float((self.step(self.ours) - self.step(self.reference)).detach().abs().max())
        self.zero()
        return found


def pair_workload(
    name: str,
    way: Callable[[Any, torch.device, Precision], Pair],
    sizes: Any,
    dtype: Precision,
    device: torch.device,
) -> Workload:
    """The workload of a pair; in bf16 its differences are shown in fp32 as well.

    Args:
        name: of the workload.
        way: makes the pair of sizes, a device and a dtype.
        sizes: a dataclass.
        dtype: in which matrices are multiplied.
        device: where it computes.
    """
    pair = way(sizes, device, dtype)

    def checks(_: Mapping[str, int]) -> dict[str, float]:
        loss, gradient = pair.differences()
        found = {
            "max_abs_loss_diff": loss,
            "max_rel_grad_diff": gradient,
            "max_abs_output_diff": pair.largest_difference(),
        }
        if dtype == "fp32":
            return found
        exact = way(sizes, device, "fp32")
        loss, gradient = exact.differences()
        return found | {"max_abs_loss_diff_fp32": loss, "max_rel_grad_diff_fp32": gradient}

    ours = Side(lambda: pair.step(pair.ours), pair.zero)
    reference = Side(lambda: pair.step(pair.reference), pair.zero)
    return Workload(name, asdict(sizes), dtype, ours, reference, checks)


def twice(*inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of either side that get a gradient."""
    ours, reference = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    return ours, reference


def input_leaves(
    names: Iterable[str], ours: Sequence[Tensor], reference: Sequence[Tensor]
) -> list[Leaf]:
    """The inputs of both sides as leaves."""
    return [Leaf(*leaf) for leaf in zip(names, ours, reference, strict=True)]


def weight_leaves(ours: nn.Module, reference: nn.Module, names: Mapping[str, str]) -> list[Leaf]:
    """The parameters of both sides, by prefixes of their names, with the reference's made ours.

    Args:
        ours: our module.
        reference: the other; its parameters become equal to ours.
        names: the reference's prefix of each of ours.
    """
    theirs = dict(reference.named_parameters())
    leaves = []
    for name, parameter in ours.named_parameters():
        prefix = next((p for p in names if name == p or name.startswith(f"{p}.")), None)
        if prefix is not None:
            partner = theirs[names[prefix] + name.removeprefix(prefix)]
            partner.data.copy_(parameter.data.view_as(partner))
            leaves.append(Leaf(name, parameter, partner))
    return leaves


def _relative(leaf: Leaf) -> float:
    assert leaf.ours.grad is not None and leaf.reference.grad is not None, leaf.name
    expected = leaf.reference.grad if leaf.rows is None else leaf.reference.grad[leaf.rows]
    expected = expected.view_as(leaf.ours).float()
    difference = (leaf.ours.grad.float() - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))
