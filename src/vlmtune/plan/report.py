"""A plan in the terminal, at 80 columns and wide, with colours and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_letters

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from vlmtune.console import console
from vlmtune.plan.forecast import FITS_BELOW, Plan
from vlmtune.plan.words import CHOSEN, PHASES, VERDICTS, Sheet, expected, gib, kinds, overrides, simulated, verdict

WIDEST = 120  # columns
BLOCKS = " ▁▂▃▄▅▆▇█"
CHART, HEIGHT = 62, 10  # columns and lines of the memory through the step


def show(plan: Plan) -> None:
    """Prints the plan, the verdict first."""
    console.print(Report(plan))


@dataclass(frozen=True)
class Report(JupyterMixin):
    """A plan that rich can print on any console, and that a notebook displays."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        yield Constrain(Group(*_report(self.plan, width)), width)


def _report(plan: Plan, width: int) -> Iterator[RenderableType]:
    yield Text(verdict(plan), f"bold {VERDICTS[plan.verdict]}")
    yield from map(_table, simulated(plan))
    yield Text(f"\nWhere the {gib(plan.needed_gib)} GiB go", "bold")
    yield _bar(plan, width)
    yield Columns([_legend(plan), _chart(plan, min(CHART, width))], padding=(1, 2))
    yield from map(_table, expected(plan))
    if plan.overrides:
        yield Text("\nRun it with", "bold")
        yield Text(overrides(plan))


def _table(sheet: Sheet) -> RenderableType:
    headed = any(sheet.columns)
    table = Table(box=box.SIMPLE_HEAD, show_header=headed, header_style="dim", border_style="dim")
    table.show_edge, table.pad_edge, table.collapse_padding = False, False, True
    for name, side in zip(sheet.columns, sheet.alignment, strict=True):
        table.add_column(Text(name), justify="left" if side == "l" else "right", overflow="fold")
    table.columns[0].style = "" if headed else "cyan"
    for row in sheet.rows:
        style = "bold" if CHOSEN in row else "dim" if "no" in row else ""
        table.add_row(*(Text(cell, VERDICTS.get(cell, "")) for cell in row), style=style)
    return Group(Text(f"\n{sheet.title}", "bold"), table)


def _bar(plan: Plan, width: int) -> Text:
    """The card's memory: marks above, a segment of letters for each kind, GiB below."""

    def column(size: float) -> int:
        return round(size / max(plan.visible_gib, plan.needed_gib) * width)

    limit, warning = column(plan.visible_gib), column(FITS_BELOW * plan.visible_gib)
    first, second, start, total = Text(), Text(), 0, 0.0
    for letter, (_, size, colour) in zip(ascii_letters, kinds(plan), strict=False):
        total += size
        cells = letter * (column(total) - start)
        first.append(cells[:1], f"#000000 on {colour}")
        first.append(cells[1:], f"{colour} on {colour}")  # the letters are seen only where there are no colours
        second.append(cells, f"{colour} on {colour}")
        start += len(cells)
    free = Text("·" * (width - start), "dim")
    marks = _placed(width, (warning, "90 % ▼"), (limit, "100 % ▼"), (limit + 6, "▼ 100 %"))
    axis = _placed(width, (1, "0"), (limit, f"{gib(plan.visible_gib)} GiB"), (column(plan.needed_gib), gib(plan.needed_gib)))
    return Text("\n").join([Text(marks), first + free, second + free, Text(axis + "\n", "dim")])


def _placed(width: int, *texts: tuple[int, str]) -> str:
    """A line in which each text ends at its column, unless an earlier one is there."""
    line = " " * width
    for end, text in texts:
        start = max(end - len(text), 0)
        if line[max(start - 1, 0) : start + len(text) + 1].isspace():
            line = line[:start] + text + line[start + len(text) :]
    return line[:width].rstrip()


def _legend(plan: Plan) -> Table:
    table = Table.grid("", "", "", "", padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for letter, (kind, size, colour) in zip(ascii_letters, kinds(plan), strict=False):
        share = f"{100 * size / plan.needed_gib:.0f} %"
        table.add_row(Text(f" {letter} ", f"#000000 on {colour}"), Text(kind), f"{size:.2f}", share)
    table.add_row("", "needed", f"{plan.needed_gib:.2f}", "100 %", style="bold")
    return table


def _chart(plan: Plan, width: int) -> Text:
    """Memory through the step in block characters, the initials of its phases below."""
    timeline, columns = plan.forecast.memory.timeline, width - 5
    top = max(size for _, size in timeline)
    cuts = [column * len(timeline) // columns for column in range(columns + 1)]
    # a short peak is a peak
    points = [max(timeline[a : max(b, a + 1)], key=lambda point: point[1]) for a, b in pairwise(cuts)]
    lines = [Text.assemble("GiB through the step:", *((f" {phase}", colour) for phase, colour in PHASES.items()))]
    for row in reversed(range(HEIGHT)):
        eighths = (round(8 * (HEIGHT * size / top - row)) for _, size in points)
        blocks = ((BLOCKS[min(max(count, 0), 8)], PHASES[phase]) for count, (phase, _) in zip(eighths, points, strict=True))
        lines.append(Text.assemble((f"{gib(top * (row + 1) / HEIGHT):>4} ", "dim"), *blocks))
    return Text("\n").join([*lines, Text.assemble("     ", *((phase[0], PHASES[phase]) for phase, _ in points))])
