"""What a person sees in the terminal: one rich console for every table and bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from PIL.Image import Image
from rich.color import Color
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vlmtune.errors import VlmtuneError

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process speaks: the first of those that torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


console = Console(quiet=not is_main_process(), soft_wrap=False)


def decisions(title: str, rows: Mapping[str, Any]) -> None:
    """Prints what was decided, a line each."""
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def bar(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a progress bar while they are gone through."""
    with progress() as shown:
        task = shown.add_task(description, total=len(items), text="")
        for item in items:
            yield item
            shown.advance(task)


def progress() -> Progress:
    """A bar with count, elapsed and remaining time; further text comes through the field `text`.

    Where the standard output is no terminal it is kept for results, and bars go to the standard error.
    """
    seen = console.is_terminal or console.is_jupyter
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console if seen else Console(stderr=True, quiet=console.quiet),
        disable=console.is_jupyter and find_spec("ipywidgets") is None,  # rich would print a warning for each bar
    )


def half_blocks(picture: Image, width: int = 24) -> Text:
    """A picture of two pixels a character, the upper as foreground and the lower as background; its size without colours."""
    if console.color_system is None:
        return Text(f"{picture.width}×{picture.height}")
    height = max(2, round(picture.height * width / picture.width / 2) * 2)
    small = picture.convert("RGB").resize((width, height))
    lines: list[Text] = []
    for y in range(0, height, 2):
        line = Text()
        for x in range(width):
            upper, lower = (Color.from_rgb(*small.getpixel((x, y + step))) for step in (0, 1))  # type: ignore[misc]
            line.append("▀", Style(color=upper, bgcolor=lower))
        lines.append(line)
    return Text("\n").join(lines)


def command_line(program: str | None = None, /, **commands: Callable[..., None]) -> None:
    """Runs this process as a command line of one command, or of several by name; `program` is what its help calls it.

    A mistake of the user's is printed as the sentence that it is, and the process ends with code 2.
    """
    import typer  # only where a command line is wanted

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    for name, command in commands.items():
        app.command(name)(command)
    with interruptible():
        try:
            app(prog_name=program)
        except VlmtuneError as error:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(2)


@contextmanager
def interruptible() -> Generator[None]:
    """Ends the process without a traceback where the user interrupts it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
