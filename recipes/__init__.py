"""Training recipes, shard streaming and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.ablation import ablate
    from recipes.ablation_table import AblationTable

__all__ = ["AblationTable", "ablate"]


def __getattr__(name: str) -> Any:
    """`ablate` and what it returns, imported when asked for: `bridges --help` needs no torch."""
    if name == "ablate":
        from recipes.ablation import ablate

        return ablate
    if name == "AblationTable":
        from recipes.ablation_table import AblationTable

        return AblationTable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
