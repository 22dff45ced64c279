"""A plan as a picture and as a page, both drawn by matplotlib, which the extra `vlmtune[notebook]` brings."""

from __future__ import annotations

import io
import textwrap
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import RecipeError
from vlmtune.output import disk_errors
from vlmtune.plan.forecast import FITS_BELOW, Plan
from vlmtune.plan.words import CHOSEN, PHASES, VERDICTS, Sheet, describe, expected, gib, kinds, overrides, simulated, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "handlelength": 1, "columnspacing": 1}
STYLE = """
.plan{font:15px/1.45 system-ui,sans-serif;color:#1d2129;background:#fff;max-width:56em;margin:auto;padding:1em;text-align:left}
.plan h3{font-size:1.05em;margin:1.6em 0 .4em}
.plan .verdict{font-size:1.2em;font-weight:600}
.plan img{width:100%;max-width:42em}
.plan div{overflow-x:auto}
.plan table{border-collapse:collapse;font-size:.93em;font-variant-numeric:tabular-nums;margin:0}
.plan th,.plan td{padding:.25em .8em .25em 0;border-bottom:1px solid #e8eaee;text-align:left;background:#fff}
.plan th{color:#68707c;font-weight:500} .plan tr{vertical-align:top}
.plan .r{text-align:right;white-space:nowrap}
.plan .chosen td{font-weight:650;background:#f3f6fb}
.plan pre{white-space:pre-wrap;background:#f6f7f9;padding:.6em;margin:0}
"""


def draw(plan: Plan, path: Path) -> None:
    """Writes a PNG: where the memory goes, how it rises through a step and, where settings were compared, memory against speed.

    Raises:
        RecipeError: matplotlib is missing.
        OutputError: the file cannot be written.

    """
    shown = figure(plan)
    title = f"{plan.model}\n{textwrap.fill(verdict(plan), 66)}"
    shown.suptitle(title, x=0.02, ha="left", fontsize=11, color=VERDICTS[plan.verdict]).set_parse_math(False)
    with disk_errors(path):
        shown.savefig(path, format="png", dpi=150, bbox_inches="tight")


def write_html(plan: Plan, path: Path) -> None:
    """Writes a page that needs no network.

    Raises:
        RecipeError: matplotlib is missing.
        OutputError: the file cannot be written.

    """
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = escape(f"{plan.model} on {plan.card}")
    page = f"{head}<title>{title}</title><body>{html(plan)}</body></html>\n"
    with disk_errors(path):
        path.write_text(page, encoding="utf-8")


def html(plan: Plan) -> str:
    """The plan as HTML, for a page or `IPython.display.HTML`; everything is escaped, and the picture is in it."""
    buffer = io.BytesIO()
    figure(plan).savefig(buffer, format="svg", bbox_inches="tight")
    picture = b64encode(buffer.getvalue()).decode()
    heading = f"Where the {gib(plan.needed_gib)} GiB go"
    parts = [
        f'<p class="verdict" style="color:{VERDICTS[plan.verdict]}">{escape(verdict(plan))}</p>',
        *map(_table, simulated(plan)),
        f'<h3>{heading}</h3><img alt="{heading}" src="data:image/svg+xml;base64,{picture}">',
        *map(_table, expected(plan)),
        f"<h3>Run it with</h3><pre>{escape(overrides(plan))}</pre>" if plan.overrides else "",
    ]
    return f'<div class="plan"><style>{STYLE}</style>{"".join(parts)}</div>'


def _table(sheet: Sheet) -> str:
    def cells(texts: tuple[str, ...], tag: str) -> str:
        return "".join(
            f'<{tag} class="{side}" style="color:{VERDICTS.get(text, "")}">{escape(text)}</{tag}>'
            for text, side in zip(texts, sheet.alignment, strict=True)
        )

    head = f"<tr>{cells(sheet.columns, 'th')}</tr>" if any(sheet.columns) else ""
    rows = [f'<tr class="{"chosen" if CHOSEN in row else ""}">{cells(row, "td")}</tr>' for row in sheet.rows]
    return f"<h3>{escape(sheet.title)}</h3><div><table>{head}{''.join(rows)}</table></div>"


def figure(plan: Plan) -> Figure:
    """The breakdown, the memory through the step and, where settings were compared, needed memory against speed."""
    try:
        from matplotlib.figure import Figure  # one of its own leaves pyplot's backend as it is
    except ImportError:
        raise RecipeError(
            "a plan's picture and page are drawn by matplotlib, which is not installed: pip install 'vlmtune[notebook]'"
        ) from None
    drawings = [_draw_bar, _draw_timeline]
    if plan.frontier and plan.samples_per_second is not None:
        drawings.append(_draw_compared)
    shown = Figure(figsize=(5.8, 2.8 * len(drawings)), layout="constrained")
    for drawing, axis in zip(drawings, shown.subplots(len(drawings)), strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        drawing(axis, plan)
    return shown


def _draw_bar(axis: Axes, plan: Plan) -> None:
    start = 0.0
    for kind, size, colour in kinds(plan):
        axis.barh(0, size, left=start, color=colour, label=f"{size:.2f}  {kind}")
        start += size
    axis.set_title(f"GiB needed, {gib(plan.needed_gib)} of {gib(plan.visible_gib)}", loc="left", pad=20)
    axis.set_xlim(0, max(plan.visible_gib, plan.needed_gib) * 1.02)
    axis.set_yticks([])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, **LEGEND)
    _limits(axis, plan)


def _draw_timeline(axis: Axes, plan: Plan) -> None:
    timeline = plan.forecast.memory.timeline
    phases, sizes = [phase for phase, _ in timeline], [size for _, size in timeline]
    for phase, colour in PHASES.items():
        here = [phase in pair for pair in zip(phases, [None, *phases], strict=False)]  # up to where the next begins
        axis.fill_between(range(len(sizes)), sizes, where=here, color=colour, linewidth=0, label=phase)
    axis.set_title(f"GiB allocated through the step, at most {gib(plan.peak_gib)}", loc="left")
    axis.set_ylim(bottom=0)
    axis.set_xticks([])
    axis.margins(x=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, **LEGEND)


def _draw_compared(axis: Axes, plan: Plan) -> None:
    for one in plan.frontier:
        speed, colour = one.cards[0].samples_per_second or 0, VERDICTS[one.cards[0].verdict]
        axis.plot(one.memory.needed_gib, speed, "o", color=colour)
    speed = plan.samples_per_second or 0
    axis.plot(plan.needed_gib, speed, "o", markersize=13, markerfacecolor="none", markeredgecolor="black")
    told = describe(plan.forecast.setting, [one.setting for one in plan.frontier])
    axis.set_title(textwrap.fill(f"Compared settings, ringed: {told}", 60), loc="left", pad=20)
    axis.set_xlabel("needed GiB")
    axis.set_ylabel("rows/s")
    _limits(axis, plan)


def _limits(axis: Axes, plan: Plan) -> None:
    """Marks 90 % and all of the card's memory."""
    for share, colour, side in ((FITS_BELOW, VERDICTS["tight"], "right"), (1, VERDICTS["no"], "left")):
        at = share * plan.visible_gib
        axis.axvline(at, color=colour, linewidth=1.2)
        axis.text(at, 1.02, f" {share:.0%} ", transform=axis.get_xaxis_transform(), ha=side, color=colour, fontsize=8.5)
