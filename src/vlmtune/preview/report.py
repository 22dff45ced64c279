"""A preview in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageOps
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vlmtune.console import half_blocks
from vlmtune.preview.pieces import Piece, in_line
from vlmtune.preview.shown import ShownPack, ShownRow

if TYPE_CHECKING:
    from vlmtune.preview.seen import Seen

# two shades of each, in turn, so that tokens can be told apart; legible on black and on white
TRAINED = ("#ffffff on #1f7a3d", "#ffffff on #2c9450")
MASKED = ("#c3c8d0 on #30343c", "#c3c8d0 on #41464f")
IMAGE = "bold #10243e on #8fb8ea"
WIDEST = 44  # characters of a picture
WIDE = 100  # characters of a terminal that has room for pictures beside texts
CELL = 3  # pixels of a token's cell at least, its line among them


def show(console: Console, model: str, rows: Sequence[ShownRow], pack: ShownPack | None) -> None:
    """Prints rows and pack; without colours, what is trained stands in « »."""
    plain = console.color_system is None or console.no_color
    console.print(_legend(model, plain), end="\n\n")
    for row in rows:
        console.print(Rule(Text(row.name, "bold"), align="left", style="dim"))
        console.print(Text(" · ".join(f"{count:,} {word}" for word, count in row.counts.items()), "dim"))
        text = _tokens(row.pieces, plain)
        console.print(_beside([_picture(seen, plain) for seen in row.pictures], text, console.width))
        console.print()
    if pack is not None:
        _show_pack(console, pack, plain)


def _show_pack(console: Console, pack: ShownPack, plain: bool) -> None:
    console.print(Rule(Text("The first micro-batch, packed where the model allows it", "bold"), style="dim"))
    console.print(Text(pack.summary, "dim"))
    for row, start in zip(pack.rows, pack.starts, strict=True):
        heading = f"{row.name}: {row.tokens:,} tokens, from place {start:,}"
        console.print(Rule(Text(heading), align="left", characters="┄", style="dim"))
        console.print(_tokens(in_line(row.pieces), plain))


def _legend(model: str, plain: bool) -> Text:
    text = Text(f"{model} sees: ", "bold")
    if plain:
        return text.append("«trained», masked, [picture]")
    for word, style in (
        ("trained", TRAINED[0]),
        ("masked", MASKED[0]),
        ("special", f"{MASKED[0]} bold italic"),
        ("[picture]", IMAGE),
    ):
        text.append(f" {word} ", style).append(" ", "not bold")
    return text


def _tokens(pieces: Sequence[Piece], plain: bool) -> Text:
    text = Text(overflow="fold")
    for trained, run in groupby(enumerate(pieces), key=lambda numbered: numbered[1].trained):
        marked = plain and trained
        text.append("«" if marked else "")
        for number, piece in run:
            text.append(piece.text, "" if plain else _style(piece, number))
        text.append("»" if marked else "")
    return text


def _style(piece: Piece, number: int) -> str:
    if piece.kind == "image":
        return IMAGE
    shade = (TRAINED if piece.trained else MASKED)[number % 2]
    return f"{shade} bold italic" if piece.kind == "special" else shade


def _picture(seen: Seen, plain: bool) -> Text:
    if plain:
        return Text(seen.caption)
    small = _gridded(seen)
    return Text("\n").join([half_blocks(small, small.width), Text(seen.caption, "dim")])


def _gridded(seen: Seen) -> Image.Image:
    """The picture, small, with a line between cells where there is room for one."""
    side = WIDEST // max(seen.across, seen.down)
    if not seen.cell or side < CELL:
        return ImageOps.contain(seen.picture, (WIDEST, WIDEST))
    small = seen.picture.resize((seen.across * side, seen.down * side))
    faded = Image.blend(small, Image.new("RGB", small.size, "grey"), 0.4)
    lines = Image.new("1", small.size)
    draw = ImageDraw.Draw(lines)
    for x in range(side, small.width, side):
        draw.line((x, 0, x, small.height), 1)
    for y in range(side, small.height, side):
        draw.line((0, y, small.width, y), 1)
    return Image.composite(faded, small, lines)


def _beside(pictures: Sequence[Text], text: Text, width: int) -> RenderableType:
    """The pictures at the left of the text or, where the terminal is narrow, above it."""
    if not pictures or width < WIDE:
        return Group(*pictures, text)
    grid = Table.grid(padding=(0, 3))
    grid.add_column(no_wrap=True)
    grid.add_row(Group(*pictures), text)
    return grid
