"""`python -m vlmtune.preview RECIPE`: rows as the model sees them, before it learns from them. No weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.console import console
from vlmtune.errors import RecipeError
from vlmtune.output import disk_errors
from vlmtune.preview.page import fragment, whole_page
from vlmtune.preview.report import show
from vlmtune.preview.shown import ShownPack, ShownRow
from vlmtune.recipe import Recipe, load_recipe, parse_overrides


@dataclass(frozen=True)
class Preview:
    """Rows as the model sees them, and the first micro-batch that is planned; a notebook shows it by itself."""

    model: str
    rows: tuple[ShownRow, ...]
    pack: ShownPack | None  # as it is where the model allows packing; None: the recipe says `packing: off`

    def _repr_html_(self) -> str:
        return fragment(self.model, self.rows, self.pack)

    def print(self) -> None:
        """Shows it in the terminal."""
        show(console, self.model, self.rows, self.pack)

    def write_html(self, path: str | Path) -> None:
        """Writes a page that needs no network.

        Raises:
            OutputError: the file cannot be written.

        """
        with disk_errors(Path(path)):
            Path(path).write_text(whole_page(self.model, self.rows, self.pack), encoding="utf-8")


def preview(recipe: str | Path | Mapping[str, Any] | Recipe, rows: int = 3, **overrides: Any) -> Preview:
    """Rows of a recipe as the model sees them: pictures as they are resized, tokens, and which of these are trained.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        rows: how many, spread from the first to the last.
        overrides: values of the recipe by dotted key.

    Raises:
        VlmtuneError: a mistake in the recipe or its rows, no processor, no data.

    """
    if rows < 1:
        raise RecipeError(f"a preview of {rows} rows shows nothing: ask for one or more")
    checked = load_recipe(recipe, **overrides)  # a mistake is found before torch is imported
    from vlmtune.preview.look import look

    return Preview(checked.model.name, *look(checked, rows))


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Other values.")] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", help="How many rows, spread from the first to the last.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page there.")] = None,
) -> None:
    """Show rows as the model sees them: pictures as they are resized, tokens, which are trained, and a pack."""
    found = preview(recipe, rows, **parse_overrides(overrides or []))
    found.print()
    if html is not None:
        found.write_html(html)
        console.print(f"written: {html}", highlight=False)
