"""`python -m vlmtune.run RECIPE key.path=value ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmtune.console import command_line
from vlmtune.recipe import load_recipe, parse_overrides


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Other values.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the output directory.")] = False,
) -> None:
    """Fine-tune as a recipe says."""
    checked = load_recipe(recipe, **parse_overrides(overrides or []))  # a mistake is found before torch is imported
    from vlmtune.training import finetune

    finetune(checked, resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    command_line(run=command)
