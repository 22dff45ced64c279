"""A plan as a person reads it: in the terminal, as a picture, as a page and in a notebook.

All of them show the same: the verdict, what was decided, where the memory goes, how it rises through a step, what each card
takes and costs, and the settings that were compared.
"""

from __future__ import annotations

import io
import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vlmtune.console import console
from vlmtune.errors import OutputError, RecipeError
from vlmtune.forecast import FITS_BELOW, Forecast, Plan, Setting, Speed
from vlmtune.output import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICT_COLOURS = {"fits": "#2e8b57", "tight": "#c98a00", "no": "#c8372d"}
TERMINAL_COLOURS = {"fits": "green", "tight": "yellow", "no": "red"}  # the terminal's own, legible on its background
RAMPS = {  # from the first of a group's kinds to its last
    "weights": ("#1d4f91", "#8fc1ea"),
    "states": ("#1f7a4d", "#9bd6ac"),
    "activations": ("#f7cf6b", "#a8323a"),
    "system": ("#6b7280", "#d3d7de"),
}
GROUPS = {  # words in a kind's name → its group; what has none of them is an activation
    "system": ("workspace", "rounding", "fragmentation", "context", "allowance", "overhead"),
    "states": ("adapter", "optimi", "gradient"),
    "weights": ("weight", "embedding"),
}
PHASES = {"forward": "#4e8fd0", "backward": "#e08a3c", "optimi": "#4fa36c"}  # by the beginning of its name
OTHER_PHASE = "#8a8f98"
BLOCKS = " ▁▂▃▄▅▆▇█"
WIDEST = 120  # columns
MANY = 20  # settings; of more, the terminal leaves out those that another beats


def show(plan: Plan) -> None:
    """Prints the plan to the terminal, the verdict first."""
    console.print(Report(plan))


def draw(plan: Plan, path: Path) -> None:
    """Writes a PNG: where the memory goes, how it rises through a step and, with a frontier, needed memory against speed.

    An earlier file is overwritten.

    Raises:
        RecipeError: matplotlib is missing.
        OutputError: the file cannot be written.

    """
    try:
        from matplotlib.figure import Figure  # optional; a figure of its own leaves pyplot's backend as it is
    except ImportError:
        raise RecipeError(
            "a plan's PNG is drawn by matplotlib, which is not installed: pip install 'vlmtune[notebook]', "
            "or ask for --html, which needs nothing"
        ) from None
    panels = [1.5, 2.0, *([2.0] if _points(plan) else [])]
    figure = Figure(figsize=(2.2 + 2.75 * sum(panels), 5.6), dpi=150, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(1, len(panels), width_ratios=panels, wspace=0.05)
    axes = [figure.add_subplot(cell) for cell in grid]
    _draw_column(axes[0], plan)
    _draw_timeline(axes[1], plan)
    if len(axes) > 2:
        _draw_frontier(axes[2], plan)
    width = int(figure.get_figwidth() * 9.2)
    sentence = textwrap.fill(verdict(plan), width)
    below = textwrap.fill(
        f"{plan.model} · {describe(plan.forecast.setting)} · confidence: {plan.confidence}", int(width * 1.45)
    )
    shown = figure.suptitle(sentence, x=0.012, ha="left", fontsize=13, fontweight="bold", color=VERDICT_COLOURS[plan.verdict])
    shown.set_parse_math(False)  # a dollar is a dollar
    line = 1 / (figure.get_figheight() * 72)  # a point, as a share of the figure
    top = 1 - (13 * 1.35 * (sentence.count("\n") + 1) + 12) * line
    figure.text(0.012, top, below, ha="left", va="top", fontsize=9.5, color="#555555", parse_math=False)
    bottom = top - (9.5 * 1.35 * (below.count("\n") + 1) + 8) * line
    figure.get_layout_engine().set(rect=(0.0, 0.0, 1.0, bottom))  # type: ignore[union-attr]
    shown.set_in_layout(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    _write(path, buffer.getvalue())


def write_html(plan: Plan, path: Path) -> None:
    """Writes the plan as one page that needs no network; an earlier file is overwritten.

    Raises:
        OutputError: the file cannot be written.

    """
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = escape(f"{plan.model} on {plan.card}: {plan.verdict}")
    page = f'{head}<title>{title}</title><body style="margin:0;background:#fff">{html(plan)}</body></html>\n'
    _write(path, page.encode())


def html(plan: Plan) -> str:
    """The plan as HTML to put into a page or a notebook: tables and inline SVG, everything escaped."""
    frontier = _frontier(plan)
    measured = _measured(plan)
    word, _, rest = verdict(plan).partition(":")
    colour = VERDICT_COLOURS[plan.verdict]
    parts = [
        f'<p class="verdict" style="border-color:{colour}"><b style="color:{colour}">{word}</b>:{escape(rest)}</p>',
        "<h3>What was decided</h3><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in decided(plan)),
        "</dl>",
        _html_sheet(_batches(plan)),
        f"<h3>Where the {_gib(plan.needed_gib)} GiB go</h3>",
        _html_bar(plan),
        _html_legend(plan),
        _html_timeline(plan),
        _html_sheet(_cards(plan)),
        _html_frontier(plan),
        _html_sheet(frontier) if frontier else "",
        _html_sheet(measured) if measured else "",
        f"<h3>Confidence: {escape(plan.confidence)}</h3>",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in plan.forecast.notes) + "</ul>" if plan.forecast.notes else "",
        f"<p class=small>{escape(', '.join(f'{name} {number}' for name, number in plan.versions.items()))}</p>",
    ]
    return f'<div class="vlmtune-plan"><style>{_CSS}</style>{"".join(parts)}</div>'


# What is said, wherever it is shown


def verdict(plan: Plan) -> str:
    """Whether it fits, in one sentence.

    Example:
        → "fits: needs 12.9 of 22.5 GiB on L4 (57 %), 9.6 GiB to spare"

    """
    spare = plan.visible_gib - plan.needed_gib
    advice = f"; {plan.advice}" if plan.advice else ""
    if plan.verdict == "no":
        article = "an" if plan.card[:1].upper() in tuple("AEFHILMNORSX8") else "a"  # as it is spoken: an L4, a T4
        more = f"{_gib(-spare)} GiB more than {article} {plan.card} shows"
        return f"does not fit: needs {_gib(plan.needed_gib)} GiB, {more}{advice}"
    share = f"{plan.needed_gib / plan.visible_gib:.0%}".replace("%", " %")
    needs = f"needs {_gib(plan.needed_gib)} of {_gib(plan.visible_gib)} GiB on {plan.card} ({share})"
    return f"{plan.verdict}: {needs}, {_gib(spare)} GiB to spare{advice}"


def describe(setting: Setting, among: Sequence[Setting] = ()) -> str:
    """A setting in words; `among` others, only what is not the same in all of them."""
    own = _parts(setting)
    others = [_parts(other) for other in among]
    kept = [text for place, text in enumerate(own) if not others or any(other[place] != text for other in others)]
    return ", ".join(filter(None, kept or own))


def _parts(setting: Setting) -> list[str]:
    length = f" to {setting.pack_length:,} tokens" if setting.pack_length else ""
    layers = {0: "no checkpointing", 1: "checkpointing"}
    return [
        f"{setting.micro_batch} × {setting.accumulation} rows",
        f"packed{length}" if setting.packed else "not packed",
        layers.get(setting.checkpointing, f"checkpointing 1 of {setting.checkpointing} layers"),
        setting.attention or "",
        "cached pictures" if setting.cached else "",
        f"at most {setting.max_pixels:,} pixels" if setting.max_pixels else "",
    ]


def decided(plan: Plan) -> list[tuple[str, str]]:
    """What the simulation went by, name and text."""
    setting, memory = plan.forecast.setting, plan.forecast.memory
    _, packing, checkpointing, attention, _, pixels = _parts(setting)
    rows = setting.micro_batch * setting.accumulation
    steps = f"{plan.steps:,} steps of {rows} rows: micro-batch {setting.micro_batch} × accumulation {setting.accumulation}"
    lines = {
        "model": f"{plan.model}, family {plan.family}",
        "run": f"{plan.rows:,} rows, {steps}",
        "setting": f"{packing}, {checkpointing}, {attention or 'attention by default'}",
        "pictures": f"{'read from the cache' if setting.cached else 'computed by the tower'}, {pixels or 'pixels by default'}",
        "peak": f"{_gib(plan.peak_gib)} GiB allocated, {_gib(plan.reserved_gib)} GiB reserved",
        "where": memory.peak_at,
    }
    if plan.overrides:
        lines["run with"] = " ".join(shlex.quote(f"{key}={_plain(value)}") for key, value in plan.overrides.items())
    return list(lines.items())


@dataclass(frozen=True)
class _Sheet:
    """A table, however it is shown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: frozenset[str] = frozenset()  # columns that are not numbers
    spare: frozenset[str] = frozenset()  # columns that a narrow terminal goes without
    caption: str = ""
    verdicts: list[str] = field(default_factory=list[str])  # of each row, for its colour
    chosen: int | None = None


def _batches(plan: Plan) -> _Sheet:
    peaks = plan.forecast.peaks
    rows = [
        (
            batch.name,
            str(batch.rows),
            f"{batch.tokens:,}",
            str(batch.pictures),
            _gib(peaks[batch.name]) if batch.name in peaks else "–",
            batch.example,
        )
        for batch in plan.forecast.batches
    ]
    columns = ("batch", "rows", "tokens", "pictures", "needs GiB", "which")
    return _Sheet("Simulated micro-batches", columns, rows, words=frozenset({"batch", "which"}), spare=frozenset({"which"}))


def _cards(plan: Plan) -> _Sheet:
    cards = plan.forecast.cards
    rows = [
        (
            speed.card,
            speed.verdict,
            _gib(speed.spare_gib),
            _number(speed.step_seconds),
            _number(speed.samples_per_second),
            _number(speed.tokens_per_second),
            _time(speed.epoch_seconds),
            _time(speed.run_seconds),
            _price(speed.run_price),
        )
        for speed in cards
    ]
    columns = ("card", "verdict", "spare GiB", "s/step", "samples/s", "tokens/s", "epoch", "run", "cost")
    return _Sheet(
        "What it takes and costs",
        columns,
        rows,
        words=frozenset({"card", "verdict"}),
        spare=frozenset({"samples/s", "tokens/s", "epoch"}),
        caption="assumed efficiency: estimates",
        verdicts=[speed.verdict for speed in cards],
    )


def _frontier(plan: Plan, *, few: bool = False) -> _Sheet | None:
    """The compared settings; with `few`, where there are many, only those that none beats in both memory and speed."""
    if not plan.frontier:
        return None
    chosen = plan.forecast
    compared = _compared(plan)
    left = [one for one in compared if one is chosen or not _beaten(one, compared, plan.card)] if few else compared
    shown = left if len(compared) > MANY else compared
    settings = [forecast.setting for forecast in compared]
    rows = [
        (
            "▸" if forecast is chosen else "",
            describe(forecast.setting, settings),
            _gib(forecast.memory.needed_gib),
            _number(_on(forecast, plan.card).samples_per_second),
            _on(forecast, plan.card).verdict,
            "chosen" if forecast is chosen else _difference(forecast, chosen, plan.card),
        )
        for forecast in shown
    ]
    hidden = len(compared) - len(shown)
    return _Sheet(
        f"Compared settings on {plan.card}",
        ("", "setting", "GiB", "samples/s", "verdict", "against the chosen"),
        rows,
        words=frozenset({"", "setting", "verdict", "against the chosen"}),
        spare=frozenset({"samples/s"}),
        caption=f"{hidden} more that another beats in memory and speed" if hidden else "",
        verdicts=[_on(forecast, plan.card).verdict for forecast in shown],
        chosen=next(place for place, forecast in enumerate(shown) if forecast is chosen),
    )


def _compared(plan: Plan) -> list[Forecast]:
    """The frontier by needed memory, with the chosen one itself in it."""
    others = [forecast for forecast in plan.frontier if forecast.setting != plan.forecast.setting]
    return sorted([plan.forecast, *others], key=lambda forecast: forecast.memory.needed_gib)


def _beaten(one: Forecast, compared: Sequence[Forecast], card: str) -> bool:
    def cost(forecast: Forecast) -> tuple[float, float]:
        return forecast.memory.needed_gib, -(_on(forecast, card).samples_per_second or 0.0)

    memory, time = cost(one)
    return any(cost(other) != (memory, time) and cost(other)[0] <= memory and cost(other)[1] <= time for other in compared)


def _on(forecast: Forecast, card: str) -> Speed:
    return next((speed for speed in forecast.cards if speed.card == card), forecast.cards[0])


def _difference(forecast: Forecast, chosen: Forecast, card: str) -> str:
    """→ "+3.2 GiB, 12 % faster"."""
    more = forecast.memory.needed_gib - chosen.memory.needed_gib
    memory = "same memory" if abs(more) < 0.05 else f"{'+' if more > 0 else '−'}{_gib(abs(more))} GiB"
    new, old = (_on(one, card).samples_per_second for one in (forecast, chosen))
    if not new or not old:
        return memory
    percent = round(100 * (new / old - 1))
    return f"{memory}, {f'{abs(percent)} % ' + ('faster' if percent > 0 else 'slower') if percent else 'as fast'}"


def _measured(plan: Plan) -> _Sheet | None:
    if not plan.measured:
        return None
    columns = tuple(dict.fromkeys(key for run in plan.measured for key in run))
    rows = [tuple(_plain(run[key]) if key in run else "–" for key in columns) for run in plan.measured]
    words = {key for key in columns if any(isinstance(run.get(key), str) for run in plan.measured)}
    return _Sheet("Measured on such a card", columns, rows, words=frozenset(words))


def colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of a breakdown: one hue for weights, states, activations and the rest, darker to lighter."""
    grouped: dict[str, list[str]] = {}
    for kind in kinds:
        grouped.setdefault(_group(kind), []).append(kind)
    return {
        kind: _between(*RAMPS[group], place / max(len(members) - 1, 1))
        for group, members in grouped.items()
        for place, kind in enumerate(members)
    }


def _group(kind: str) -> str:
    return next((group for group, words in GROUPS.items() if any(word in kind.lower() for word in words)), "activations")


def _between(first: str, last: str, share: float) -> str:
    pairs = ((int(first[at : at + 2], 16), int(last[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _ink(colour: str) -> str:
    """Black or white, whichever can be read on the colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def _phase_colour(phase: str) -> str:
    return next((colour for name, colour in PHASES.items() if phase.lower().startswith(name)), OTHER_PHASE)


def _spans(phases: Sequence[str]) -> list[tuple[str, int, int]]:
    """(phase, start, stop) of those that follow each other."""
    found: list[tuple[str, int, int]] = []
    start = 0
    for phase, members in groupby(phases):
        stop = start + len(list(members))
        found.append((phase, start, stop))
        start = stop
    return found


def _named(spans: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The spans that get a name: all of them, or of many the first of each phase."""
    return list(spans) if len(spans) <= 4 else list({span[0]: span for span in reversed(spans)}.values())[::-1]


def _kinds(plan: Plan) -> dict[str, float]:
    """The breakdown without what would be written as 0.00."""
    return {kind: gib for kind, gib in plan.breakdown.items() if gib >= 0.005}


def _apart(centres: Sequence[float], sizes: Sequence[float], end: float) -> list[float]:
    """Places side by side, none over another, each as near to its own as can be from 0 to `end`."""
    placed: list[float] = []
    for centre, size in zip(centres, sizes, strict=True):
        least = placed[-1] + (sizes[len(placed) - 1] + size) / 2 if placed else size / 2
        placed.append(max(centre, least))
    limit = end
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], limit - sizes[place] / 2)
        limit = placed[place] - sizes[place] / 2
    return placed


def _ticks(top: float, most: int) -> list[float]:
    """Round numbers from 0 up to `top`."""
    step = next(
        size for power in range(-3, 9) for size in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if top / size <= most
    )
    return [step * number for number in range(int(top / step) + 1)]


def _points(plan: Plan) -> list[tuple[Forecast, float, float]]:
    """(forecast, needed GiB, samples/s) of what was compared and has a speed on the card."""
    if not plan.frontier:
        return []
    pairs = ((one, _on(one, plan.card).samples_per_second) for one in _compared(plan))
    return [(one, one.memory.needed_gib, speed) for one, speed in pairs if speed is not None]


def _gib(value: float) -> str:
    return f"{value:.2f}" if 0.005 <= abs(value) < 0.095 else f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _share(gib: float, plan: Plan) -> str:
    percent = 100 * gib / plan.needed_gib
    return f"{percent:.0f} %" if percent >= 0.5 else "<1 %"


def _number(value: float | None) -> str:
    """Three digits, or all of a large number."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 99.5 * 3600 else f"{seconds / 86400:.1f} d"


def _price(dollars: float | None) -> str:
    if dollars is None:
        return "–"
    return "<$0.01" if dollars < 0.01 else f"${dollars:,.2f}"


def _plain(value: Any) -> str:
    """As it is written in a recipe or a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


# The terminal


@dataclass(frozen=True)
class Report:
    """A plan that rich can print, on any console: at 80 columns and wide, with colours and without."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plan = self.plan
        width = min(options.max_width, WIDEST)
        coloured = console.color_system is not None and not console.no_color
        word, _, rest = verdict(plan).partition(":")
        yield Text.assemble((word, f"bold {TERMINAL_COLOURS[plan.verdict]}"), (f":{rest}", TERMINAL_COLOURS[plan.verdict]))
        yield from _section("What was decided", _grid(decided(plan)), width)
        yield from _section(_batches(plan).title, _table(_batches(plan), width), width)
        yield from _section(f"Where the {_gib(plan.needed_gib)} GiB go", Text("\n").join(_bar(plan, width, coloured)), width)
        yield Text()
        yield _memory(plan, width, coloured)
        frontier, measured = _frontier(plan, few=True), _measured(plan)
        for sheet in (_cards(plan), frontier, measured):
            if sheet:
                yield from _section(sheet.title, _table(sheet, width), width)
        yield from _section(f"Confidence: {plan.confidence}", _grid([("·", note) for note in plan.forecast.notes]), width)


def _section(title: str, content: ConsoleRenderable, width: int) -> Iterator[ConsoleRenderable]:
    yield Text()
    yield Text(title, "bold")
    shown = Table.grid()
    shown.add_column(max_width=width)
    shown.add_row(content)
    yield shown


def _grid(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    return table


def _table(sheet: _Sheet, width: int) -> ConsoleRenderable:
    left_out = sheet.spare if width < 72 else frozenset[str]()
    kept = [place for place, name in enumerate(sheet.columns) if name not in left_out]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
        header_style="dim",
        border_style="dim",
    )
    for place in kept:
        name = sheet.columns[place]
        words = name in sheet.words
        whole = " " not in name and name not in ("setting", "which")
        table.add_column(Text(name), justify="left" if words else "right", no_wrap=whole, overflow="fold")
    for number, row in enumerate(sheet.rows):
        cells = [Text(row[place]) for place in kept]
        for cell, place in zip(cells, kept, strict=True):
            if sheet.columns[place] == "verdict":
                cell.stylize(TERMINAL_COLOURS[sheet.verdicts[number]])
        table.add_row(
            *cells, style="bold" if number == sheet.chosen else "dim" if sheet.verdicts[number : number + 1] == ["no"] else ""
        )
    return Group(table, Text(sheet.caption, "dim italic")) if sheet.caption else table


def _bar(plan: Plan, width: int, coloured: bool) -> list[Text]:
    """The card's memory as a bar of `width` cells: marks above, a segment for each kind, GiB below."""
    kinds, palette = _kinds(plan), colours(list(_kinds(plan)))
    scale = max(plan.visible_gib, plan.needed_gib)

    def cell(gib: float) -> int:
        return round(gib / scale * width)

    marks = [" "] * width
    warning, limit = cell(FITS_BELOW * plan.visible_gib), cell(plan.visible_gib)
    for text, at, start in (("90 % ▼", warning, 0), ("100 % ▼", limit, warning)):
        shown = text if at - start > len(text) else text.replace(" ", "") if at - start > len(text) - 2 else "▼"
        marks[at - len(shown) : at] = list(shown)
    over = f" {_gib(plan.needed_gib - plan.visible_gib)} GiB over"
    room = width - limit >= len(over) and plan.needed_gib > plan.visible_gib
    above = Text("".join(marks[:limit]))
    above.append(over if room else "", "bold red")

    free = ("·", Style(dim=True))
    rows: list[list[tuple[str, Style]]] = [[free] * width, [free] * width]
    start, total = 0, 0.0
    for number, (letter, (kind, gib)) in enumerate(zip(_letters(len(kinds)), kinds.items(), strict=True)):
        total += gib
        stop = cell(total)
        style = Style(color=_ink(palette[kind]), bgcolor=palette[kind]) if coloured else Style()
        for row, first in zip(rows, (letter, ""), strict=True):
            text = first.ljust(stop - start, " " if coloured else "▒░"[number % 2])
            row[start:stop] = [(character, style) for character in text[: stop - start]]
        start = stop
    if limit < width:  # it goes on past the card's memory
        for row in rows:
            row[limit] = ("┃", row[limit][1] + Style(color="#ff0000", bold=True))
    lines = [Text.assemble(*row) for row in rows]

    axis = [" "] * width
    end = f"{_gib(plan.visible_gib)} GiB"
    axis[limit - len(end) : limit] = list(end)
    for tick in _ticks(scale, max(width // 12, 1)):
        at, text = cell(tick), f"{tick:g}"
        if at + len(text) < limit - len(end) or (at > limit and at + len(text) <= width):
            axis[at : at + len(text)] = list(text)
    return [above, *lines, Text("".join(axis)[:width].rstrip(), "dim")]


def _letters(count: int) -> list[str]:
    return [ascii_letters[number % len(ascii_letters)] for number in range(count)]


def _memory(plan: Plan, width: int, coloured: bool) -> ConsoleRenderable:
    """The legend of the bar, and beside it, or below where that is too narrow, the memory through the step."""
    kinds, palette = _kinds(plan), colours(list(_kinds(plan)))
    legend = Table.grid(padding=(0, 1, 0, 0), pad_edge=True)
    legend.add_column(no_wrap=True)
    legend.add_column(no_wrap=True, overflow="ellipsis")
    legend.add_column(justify="right", no_wrap=True)
    legend.add_column(justify="right", no_wrap=True)
    legend.add_row("", Text("kind", "dim"), Text("GiB", "dim"), Text("share", "dim"))
    for letter, (kind, gib) in zip(_letters(len(kinds)), kinds.items(), strict=True):
        style = Style(color=_ink(palette[kind]), bgcolor=palette[kind]) if coloured else Style()
        legend.add_row(Text(f" {letter} ", style), Text(kind), Text(f"{gib:.2f}"), Text(_share(gib, plan)))
    legend.add_row("", Text("needed", "bold"), Text(f"{plan.needed_gib:.2f}", "bold"), Text("100 %"))
    taken = 4 + max([len("needed"), *map(len, kinds)]) + 7 + 7
    room = width - taken - 3
    beside = room >= 28
    lines = _area(plan, room if beside else width, max(len(kinds) - 1, 6) if beside else 8)
    if not lines:
        return legend
    chart = Text("\n").join(lines)
    if not beside:
        return Group(legend, Text(), chart)
    shown = Table.grid(padding=(0, 2, 0, 0))
    shown.add_column(width=taken)
    shown.add_column()
    shown.add_row(legend, chart)
    return shown


def _area(plan: Plan, width: int, height: int) -> list[Text]:
    """Memory through the step in block characters, `height` cells high, its phases below."""
    timeline = plan.forecast.memory.timeline
    if not timeline:
        return []
    top = max(gib for _, gib in timeline) or 1.0
    margin = max(len(_gib(top)), 4) + 1
    columns = max(width - margin, 1)
    values: list[float] = []
    phases: list[str] = []
    for column in range(columns):
        start = column * len(timeline) // columns
        stop = max((column + 1) * len(timeline) // columns, start + 1)
        values.append(max(gib for _, gib in timeline[start:stop]))  # a short peak is a peak
        phases.append(timeline[stop - 1][0])
    lines = [Text("Memory through the step, GiB", "dim")]
    for row in reversed(range(height)):
        number = {height - 1: _gib(top), 0: "0"}.get(row, _gib(top / 2) if row == height // 2 - 1 else "")
        line = Text.assemble((f"{number:>{margin - 1}} ", "dim"))
        for value, phase in zip(values, phases, strict=True):
            filled = min(max(value / top * height - row, 0.0), 1.0)
            line.append(BLOCKS[round(filled * 8)], _phase_colour(phase))
        lines.append(line)
    spans = _spans(phases)
    rule, names = Text(" " * margin), Text(" " * margin)
    for phase, start, stop in spans:
        rule.append("╵" if stop - start == 1 else f"└{'─' * (stop - start - 2)}┘", _phase_colour(phase))
    named = _named(spans)
    sizes = [len(phase) + 1 for phase, _, _ in named]
    if sum(sizes) - 1 > columns:
        names.append(" → ".join(phase for phase, _, _ in named))
        names.truncate(width, overflow="ellipsis")
        return [*lines, rule, names]
    places = _apart([(start + stop) / 2 for _, start, stop in named], sizes, columns + 1)
    for (phase, _, _), place in zip(named, places, strict=True):
        names.append(" " * (margin + int(place - len(phase) / 2) - len(names)))
        names.append(phase, _phase_colour(phase))
    return [*lines, rule, names]


# The picture


def _draw_column(axis: Axes, plan: Plan) -> None:
    """The breakdown as a stacked column, every kind named beside it."""
    kinds, palette = _kinds(plan), colours(list(_kinds(plan)))
    top = _height(plan)
    bounds: list[tuple[float, float]] = []
    for kind, gib in kinds.items():
        start = bounds[-1][1] if bounds else 0.0
        bounds.append((start, start + gib))
        axis.bar(0.5, gib, width=0.8, bottom=start, color=palette[kind], edgecolor="white", linewidth=0.6)
    places = _apart([(start + stop) / 2 for start, stop in bounds], [top * 0.037] * len(bounds), top)
    for (kind, gib), (start, stop), place in zip(kinds.items(), bounds, places, strict=True):
        axis.plot([0.92, 1.04, 1.14], [(start + stop) / 2, place, place], color="#b5b9c0", linewidth=0.6)
        font: dict[str, Any] = {"va": "center", "fontsize": 8, "color": "#222222"}
        axis.text(1.38, place, f"{gib:.2f}", ha="right", **font)
        axis.text(1.44, place, kind, parse_math=False, **font)
    for share in (FITS_BELOW, 1.0):
        if share * plan.visible_gib < top:
            axis.plot([0, 1.0], [share * plan.visible_gib] * 2, **_limit_style(share))
    axis.set_xlim(0, 2.9)
    axis.set_ylim(0, top)
    axis.set_xticks([])
    axis.set_ylabel("GiB", color="#555555")
    _plain_axis(axis, f"Needed: {_gib(plan.needed_gib)} GiB")
    axis.spines["bottom"].set_visible(False)


def _draw_timeline(axis: Axes, plan: Plan) -> None:
    """Memory through the step, filled, over a band for each phase."""
    timeline = plan.forecast.memory.timeline
    top, count = _height(plan), max(len(timeline), 1)
    values = [gib for _, gib in timeline]
    spans = _spans([phase for phase, _ in timeline])
    for phase, start, stop in spans:
        colour = _phase_colour(phase)
        axis.axvspan(start, stop, color=colour, alpha=0.12, linewidth=0)
        reached = [*values[start:stop], values[min(stop, count - 1)]]
        axis.fill_between(range(start, stop + 1), reached, color=colour, alpha=0.85, linewidth=0)
    named = _named(spans)
    places = _apart([(start + stop) / 2 for _, start, stop in named], [count * 0.13] * len(named), count)
    font: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9, "fontweight": "bold", "parse_math": False}
    for (phase, _, _), place in zip(named, places, strict=True):
        axis.text(place, -0.02 * top, phase, color=_phase_colour(phase), **font)
    if values:
        at = values.index(max(values))
        axis.plot([at], [values[at]], "o", color="#222222", markersize=4)
        side = "right" if at > len(values) / 2 else "left"
        text = f"peak {_gib(values[at])} GiB"
        font = {"ha": side, "fontsize": 9, "fontweight": "bold"}
        under = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}  # where it meets a limit's line
        axis.annotate(text, (at, values[at]), (0, 7), textcoords="offset points", bbox=under, **font)
    for share in (FITS_BELOW, 1.0):
        if share * plan.visible_gib < top:
            axis.axhline(share * plan.visible_gib, **_limit_style(share))
            text = f"{share * 100:.0f} % of {plan.card}: {_gib(share * plan.visible_gib)} GiB"
            place = (0.01 * count, share * plan.visible_gib + 0.008 * top)
            axis.text(*place, text, fontsize=8, color="#555555", parse_math=False)
    axis.set_xlim(0, count)
    axis.set_ylim(0, top)
    axis.set_xticks([])
    axis.tick_params(labelleft=False)
    _plain_axis(axis, "Allocated through the step")


def _draw_frontier(axis: Axes, plan: Plan) -> None:
    """Needed memory against speed, a point for each compared setting."""
    points = _points(plan)
    for name in ("fits", "tight", "no"):
        found = [(x, y) for one, x, y in points if _on(one, plan.card).verdict == name]
        if found:
            label = "does not fit" if name == "no" else name
            axis.scatter(*zip(*found, strict=True), s=42, color=VERDICT_COLOURS[name], edgecolor="white", label=label, zorder=3)
    low, high = _extent(plan)
    highest = max(y for _, _, y in points) * 1.3 or 1.0
    axis.set_xlim(low, high)
    axis.set_ylim(0, highest)
    for share in (FITS_BELOW, 1.0):
        at = share * plan.visible_gib
        axis.axvline(at, **_limit_style(share))
        axis.text(at, highest * 0.99, f"{share * 100:.0f} % ", ha="right", va="top", fontsize=8, color="#555555")
    for one, x, y in points:
        if one is plan.forecast:
            axis.scatter([x], [y], s=190, facecolor="none", edgecolor="#111111", linewidth=1.6, zorder=4)
            text = textwrap.fill("chosen: " + describe(one.setting, [other.setting for other, _, _ in points]), 30)
            font: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "va": "top", "parse_math": False}
            line = {"arrowstyle": "-", "color": "#8a8f98", "linewidth": 0.8, "shrinkB": 7, "relpos": (0.5, 0)}
            axis.annotate(text, (x, y), (0.03, 0.98), textcoords="axes fraction", arrowprops=line, **font)
    axis.set_xlabel("needed GiB", color="#555555")
    axis.set_ylabel("samples/s", color="#555555")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=8.5)
    _plain_axis(axis, f"Compared settings on {plan.card}")


def _extent(plan: Plan) -> tuple[float, float]:
    """From which to which GiB the compared settings are drawn."""
    needed = [plan.visible_gib, *(gib for _, gib, _ in _points(plan))]
    margin = 0.12 * (max(needed) - min(needed)) or 1.0
    return max(min(needed) - margin, 0.0), max(needed) + margin


def _height(plan: Plan) -> float:
    """What the GiB axis goes up to: the card's memory, unless the need would be lost at its foot."""
    return plan.needed_gib * 1.3 if plan.needed_gib < 0.35 * plan.visible_gib else max(plan.visible_gib, plan.needed_gib) * 1.07


def _limit_style(share: float) -> dict[str, Any]:
    return {"color": "#c8372d" if share == 1 else "#c98a00", "linewidth": 1.2, "linestyle": "-" if share == 1 else (0, (4, 3))}


def _plain_axis(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color="#222222").set_parse_math(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c8ccd2")
    axis.tick_params(colors="#555555", labelsize=8.5, length=3)


# The page

_CSS = """
.vlmtune-plan{font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1d2129;background:#fff;
max-width:60em;margin:0 auto;padding:1em;box-sizing:border-box;text-align:left}
.vlmtune-plan *{box-sizing:border-box}
.vlmtune-plan .verdict{font-size:1.2em;margin:.2em 0 1em;padding:.5em .8em;border-left:.35em solid;background:#f6f7f9}
.vlmtune-plan h3{font-size:1.05em;margin:1.8em 0 .5em;font-weight:650}
.vlmtune-plan dl{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.2em;margin:0}
.vlmtune-plan dt{color:#68707c}.vlmtune-plan dd{margin:0;overflow-wrap:anywhere}
.vlmtune-plan .wide{overflow-x:auto}
.vlmtune-plan table{border-collapse:collapse;font-size:.93em;font-variant-numeric:tabular-nums;border:0;margin:0}
.vlmtune-plan th{color:#68707c;font-weight:500;vertical-align:bottom}
.vlmtune-plan th,.vlmtune-plan td{padding:.28em .75em .28em 0;text-align:right;border:0;border-bottom:1px solid #e8eaee;
background:#fff;white-space:nowrap}
.vlmtune-plan .w{text-align:left}.vlmtune-plan .long{white-space:normal;min-width:13em}
.vlmtune-plan .chosen td{font-weight:650;background:#f3f6fb}
.vlmtune-plan .no td{color:#8a8f98}
.vlmtune-plan .small{color:#68707c;font-size:.85em;margin:.4em 0}
.vlmtune-plan .chart{position:relative;font-size:12px;color:#68707c;margin:0 0 .8em}
.vlmtune-plan svg{display:block;width:100%}
.vlmtune-plan .chart span{position:absolute;white-space:nowrap;line-height:16px}
.vlmtune-plan .key{display:inline-block;width:.9em;height:.9em;border-radius:2px;margin-right:.6em;vertical-align:-.1em}
.vlmtune-plan .legend{columns:2;column-gap:2.5em;list-style:none;margin:0;padding:0}
.vlmtune-plan .legend li{display:flex;break-inside:avoid;border-bottom:1px solid #e8eaee;padding:.2em 0;font-size:.93em;
align-items:center;margin:0;font-variant-numeric:tabular-nums}
.vlmtune-plan .legend b{margin-left:auto;font-weight:400}.vlmtune-plan .legend i{width:3.6em;text-align:right;font-style:normal;
color:#68707c}
.vlmtune-plan ul{margin:.3em 0;padding-left:1.2em}
@media(max-width:40em){.vlmtune-plan .legend{columns:1}}
"""


def _html_sheet(sheet: _Sheet) -> str:
    def kind(name: str) -> str:
        return ' class="w long"' if name in ("setting", "which") else ' class="w"' if name in sheet.words else ""

    head = "".join(f"<th{kind(name)}>{escape(name)}</th>" for name in sheet.columns)
    body = ""
    for number, row in enumerate(sheet.rows):
        cells = ""
        for name, text in zip(sheet.columns, row, strict=True):
            colour = f' style="color:{VERDICT_COLOURS[sheet.verdicts[number]]}"' if name == "verdict" else ""
            cells += f"<td{kind(name)}{colour}>{escape(text)}</td>"
        style = (
            " class=chosen" if number == sheet.chosen else " class=no" if sheet.verdicts[number : number + 1] == ["no"] else ""
        )
        body += f"<tr{style}>{cells}</tr>"
    caption = f"<p class=small>{escape(sheet.caption)}</p>" if sheet.caption else ""
    return f"<h3>{escape(sheet.title)}</h3><div class=wide><table><tr>{head}</tr>{body}</table></div>{caption}"


def _svg(shapes: str, height: int, label: str) -> str:
    """Shapes in a square of 100 × 100 that is drawn as wide as the page; text stands beside it, so that it keeps its size."""
    box = f'viewBox="0 0 100 100" preserveAspectRatio="none" style="height:{height}px"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(label)}">{shapes}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line {ends} stroke="{colour}" vector-effect="non-scaling-stroke" {more or "/"}>' + ("</line>" if more else "")


def _dot(x: float, y: float, colour: str, size: float, title: str) -> str:
    """A round dot however the square is stretched: the end of a line of no length."""
    more = f'stroke-width="{size}" stroke-linecap="round"><title>{escape(title)}</title'
    return _line(x, y, x, y, colour, more)


def _label(text: str, *, left: float, top: int, shift: int = -50, colour: str = "") -> str:
    """Text at `left` per cent and `top` pixels of a chart; `shift` -100 ends there, 0 begins there."""
    ink = f";color:{colour}" if colour else ""
    return f'<span style="left:{left:.2f}%;top:{top}px;transform:translateX({shift}%){ink}">{escape(text)}</span>'


def _html_bar(plan: Plan) -> str:
    kinds, palette = _kinds(plan), colours(list(_kinds(plan)))
    scale = max(plan.visible_gib, plan.needed_gib) / 100
    shapes, start = '<rect width="100" height="100" fill="#eef0f3"/>', 0.0
    for kind, gib in kinds.items():
        title = escape(f"{kind}: {gib:.2f} GiB")
        shapes += (
            f'<rect x="{start:.3f}" width="{gib / scale:.3f}" height="100" fill="{palette[kind]}"><title>{title}</title></rect>'
        )
        start += gib / scale
    limit = plan.visible_gib / scale
    shapes += _line(FITS_BELOW * limit, 0, FITS_BELOW * limit, 100, "#1d2129", 'stroke-width="2" stroke-dasharray="4 3">')
    shapes += _line(limit, 0, limit, 100, "#c8372d", 'stroke-width="3">')
    labels = _label("90 %", left=FITS_BELOW * limit, top=0, shift=-100) + _label("100 %", left=limit, top=0, shift=-100)
    labels += _label(f"{_gib(plan.visible_gib)} GiB", left=limit, top=64, shift=-100)
    for tick in _ticks(scale * 100, 6):
        if tick / scale < limit - 20 or limit + 8 < tick / scale < 96:
            labels += _label(f"{tick:g}", left=tick / scale, top=64, shift=-50 if tick else 0)
    svg = _svg(shapes, 44, f"{_gib(plan.needed_gib)} of {_gib(plan.visible_gib)} GiB")
    return f'<div class=chart style="padding:18px 0 20px">{svg}{labels}</div>'


def _html_legend(plan: Plan) -> str:
    palette = colours(list(_kinds(plan)))
    items = "".join(
        f'<li><span class=key style="background:{palette[kind]}"></span>{escape(kind)}'
        f"<b>{gib:.2f} GiB</b><i>{escape(_share(gib, plan))}</i></li>"
        for kind, gib in _kinds(plan).items()
    )
    return f"<ul class=legend>{items}</ul>"


def _html_timeline(plan: Plan) -> str:
    timeline = plan.forecast.memory.timeline
    if not timeline:
        return ""
    top, count, height = max(gib for _, gib in timeline) * 1.1 or 1.0, len(timeline), 180
    values = [gib for _, gib in timeline]
    spans = _spans([phase for phase, _ in timeline])
    shapes = labels = ""
    for phase, start, stop in spans:
        colour = _phase_colour(phase)
        left, right = 100 * start / count, 100 * stop / count
        shapes += f'<rect x="{left:.2f}" width="{right - left:.2f}" height="100" fill="{colour}" fill-opacity=".12"/>'
        ends = [*enumerate(values[start:stop], start), (stop, values[min(stop, count - 1)])]
        path = " ".join(f"{100 * at / count:.2f},{100 - 100 * gib / top:.2f}" for at, gib in ends)
        shapes += f'<polygon points="{left:.2f},100 {path} {right:.2f},100" fill="{colour}" fill-opacity=".85"/>'
    named = _named(spans)
    places = _apart([100 * (start + stop) / 2 / count for _, start, stop in named], [17.0] * len(named), 100.0)
    for (phase, _, _), place in zip(named, places, strict=True):
        labels += _label(phase, left=place, top=height + 2, colour=_phase_colour(phase))
    for tick in _ticks(top, 5)[1:]:
        shapes += _line(0, 100 - 100 * tick / top, 100, 100 - 100 * tick / top, "#ffffff", 'stroke-opacity=".55">')
        labels += _label(f"{tick:g} GiB", left=0, top=round(height * (1 - tick / top)), shift=0, colour="#3b414a")
    at = values.index(max(values))
    shapes += _dot(100 * at / count, 100 - 100 * values[at] / top, "#1d2129", 8, f"peak {values[at]:.2f} GiB")
    title = f"Memory through the step, at most {_gib(max(values))} GiB allocated"
    return f'<h3>{escape(title)}</h3><div class=chart style="padding-bottom:20px">{_svg(shapes, height, title)}{labels}</div>'


def _html_frontier(plan: Plan) -> str:
    points = _points(plan)
    if not points:
        return ""
    height, settings = 240, [one.setting for one, _, _ in points]
    (low, high), highest = _extent(plan), max(y for _, _, y in points) * 1.15 or 1.0

    def across(gib: float) -> float:
        return 100 * (gib - low) / (high - low)

    shapes, labels = '<rect width="100" height="100" fill="#f8f9fb"/>', ""
    for tick in _ticks(highest, 4)[1:]:
        shapes += _line(0, 100 - 100 * tick / highest, 100, 100 - 100 * tick / highest, "#e3e6eb")
        labels += _label(f"{tick:g}", left=0.5, top=18 + round(height * (1 - tick / highest)), shift=0)
    for share, colour in ((FITS_BELOW, "#c98a00"), (1.0, "#c8372d")):
        at = across(share * plan.visible_gib)
        shapes += _line(at, 0, at, 100, colour)
        labels += _label(f"{share * 100:.0f} %", left=at, top=0, shift=-100 if share < 1 else -50)
    for tick in (tick for tick in _ticks(high, 8) if 3 < across(tick) < 97):
        labels += _label(f"{tick:g}", left=across(tick), top=height + 20)
    for one, x, y in points:
        place = across(x), 100 - 100 * y / highest
        title = f"{describe(one.setting, settings)}: {_gib(x)} GiB, {_number(y)} samples/s"
        if one is plan.forecast:
            shapes += _dot(*place, "#1d2129", 19, title) + _dot(*place, "#ffffff", 15, title)
            top = 18 + round(height * place[1] / 100) + 10
            labels += _label("chosen", left=place[0], top=top, colour="#1d2129")
        shapes += _dot(*place, VERDICT_COLOURS[_on(one, plan.card).verdict], 11, title)
    title = "Needed memory against speed"
    return (
        f'<h3>{title}</h3><div class=chart style="padding:18px 0 38px">{_svg(shapes, height, title)}{labels}'
        f"{_label('samples/s', left=0.5, top=0, shift=0)}{_label('needed GiB', left=50, top=height + 36)}</div>"
    )


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, over what was there."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a file")
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
