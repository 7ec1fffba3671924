"""`python -m recipes`: the `bridges` command."""

from recipes.cli import console

console()
