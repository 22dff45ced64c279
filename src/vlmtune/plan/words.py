"""What a plan says, however it is shown: the verdict as a sentence, all else as tables of text, and the colours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from vlmtune.plan.forecast import Forecast, Plan, Setting

VERDICTS = {"fits": "#2e8b57", "tight": "#c98a00", "no": "#d0453a"}  # colours legible on black and on white
PHASES = {"forward": "#4e8fd0", "backward": "#e08a3c", "optimiser": "#4fa36c"}
# Tableau's twenty, ten strong and ten light: black can be read on all of them
STRONG = ["#4e79a7", "#f28e2b", "#76b7b2", "#e15759", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"]
LIGHT = ["#a0cbe8", "#ffbe7d", "#86bcb6", "#fabfd2", "#8cd17d", "#f1ce63", "#d4a6c8", "#d37295", "#d7b5a6", "#499894"]
CHOSEN = "◂ chosen"


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    title: str
    columns: tuple[str, ...]  # without names it has no head
    alignment: str  # "l" or "r" for each column
    rows: Sequence[tuple[str, ...]]


def verdict(plan: Plan) -> str:
    """Whether it fits, in one sentence.

    Example:
        → "fits: needs 12.9 of 22.5 GiB on L4 (57 %), 9.6 GiB to spare"

    """
    word = "does not fit" if plan.verdict == "no" else plan.verdict
    spare = plan.visible_gib - plan.needed_gib
    room = f"{gib(abs(spare))} GiB {'to spare' if spare >= 0 else 'too much'}"
    share = f"{100 * plan.needed_gib / plan.visible_gib:.0f} %"
    sentence = f"{word}: needs {gib(plan.needed_gib)} of {gib(plan.visible_gib)} GiB on {plan.card} ({share}), {room}"
    return f"{sentence}; {plan.advice}" if plan.advice else sentence


def describe(setting: Setting, among: Sequence[Setting] = ()) -> str:
    """A setting in words; `among` others, only what is not the same in all of them."""
    own, others = _parts(setting), [_parts(other) for other in among]
    told = [part for place, part in enumerate(own) if not others or any(other[place] != part for other in others)]
    return ", ".join(filter(None, told)) or own[0]


def _parts(setting: Setting) -> tuple[str, ...]:
    every = setting.checkpointing
    ordinal = {2: "2nd", 3: "3rd"}.get(every, f"{every}th")
    return (
        f"{setting.micro_batch} × {setting.accumulation}",
        ("packed" if setting.packed else "not packed") + (f" to {setting.pack_length:,} tokens" if setting.pack_length else ""),
        {0: "no checkpointing", 1: "every layer recomputed"}.get(every, f"every {ordinal} layer recomputed"),
        setting.attention or "",
        "pictures from the cache" if setting.cached else "",
        f"at most {setting.max_pixels:,} pixels" if setting.max_pixels else "",
    )


def overrides(plan: Plan) -> str:
    r"""What `fit` chose, to paste after a recipe's path: KEY=VALUE \ KEY=VALUE, a line each."""
    return " \\\n".join(_arguments(plan.overrides))


def as_arguments(overrides: Mapping[str, Any]) -> str:
    """Values of a recipe as they are written behind its path."""
    return " ".join(_arguments(overrides))


def _arguments(overrides: Mapping[str, Any]) -> list[str]:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    return [shlex.quote(f"{key}={value}") for key, value in values.items()]


def kinds(plan: Plan) -> list[tuple[str, float, str]]:
    """(kind, GiB, colour) of the breakdown, without what would be written as 0.00."""
    shown = ((kind, size) for kind, size in plan.breakdown.items() if size >= 0.005)
    return [(kind, size, colour) for (kind, size), colour in zip(shown, cycle(STRONG + LIGHT), strict=False)]


def simulated(plan: Plan) -> list[Sheet]:
    """What was decided, and what the steps were simulated on."""
    setting, forecast = plan.forecast.setting, plan.forecast
    counted = f"{plan.rows:,} rows, {plan.steps:,} " if plan.rows and plan.steps else ""
    step = f"steps of {setting.micro_batch * setting.accumulation} rows"
    decided = [
        ("model", f"{plan.model}, family {plan.family}"),
        ("run", f"{counted}{step}: micro-batch {setting.micro_batch} × accumulation {setting.accumulation}"),
        ("setting", describe(setting)),
        ("peak", f"{gib(plan.peak_gib)} GiB allocated, {gib(plan.reserved_gib)} GiB reserved"),
        ("where", forecast.memory.peak_at),
    ]
    names: dict[tuple[str, ...], list[str]] = {}  # batches that are alike are told once
    for batch in forecast.batches:
        counts = (f"{count:,}" if count else "" for count in (batch.rows, batch.tokens, batch.pictures))
        names.setdefault((*counts, _or_dash(forecast.peaks.get(batch.name), gib), batch.example), []).append(batch.name)
    batches = [(", ".join(alike), *cells) for cells, alike in names.items()]
    columns = ("batch", "rows", "tokens", "pictures", "needs GiB", "which")
    return [Sheet("What was decided", ("", ""), "ll", decided), Sheet("Simulated micro-batches", columns, "lrrrrl", batches)]


def expected(plan: Plan) -> list[Sheet]:
    """What it takes on each card, what other settings and real runs took, and how far to trust it."""
    cards = [
        (
            speed.card,
            speed.verdict,
            gib(speed.spare_gib),
            *(_or_dash(value, _number) for value in (speed.step_seconds, speed.samples_per_second, speed.tokens_per_second)),
            *(_or_dash(value, _time) for value in (speed.epoch_seconds, speed.run_seconds)),
            _or_dash(speed.run_price, "${:,.2f}".format),
        )
        for speed in plan.forecast.cards
    ]
    columns = ("card", "verdict", "spare GiB", "s/step", "rows/s", "tokens/s", "epoch", "run", "cost")
    beside = f"; memory: the {gib(plan.needed_gib)} GiB needed on {plan.card}" if len(cards) > 1 else ""
    return [
        Sheet(f"What it takes and costs, estimated{beside}", columns, "llrrrrrrr", cards),
        *([_compared(plan)] if plan.frontier else []),
        *([_measured(plan)] if plan.measured else []),
        Sheet(f"Confidence: {plan.confidence}", ("", ""), "ll", [("·", note) for note in plan.forecast.notes]),
    ]


def _compared(plan: Plan) -> Sheet:
    settings = [one.setting for one in plan.frontier]
    rows = [
        (
            describe(one.setting, settings),
            gib(one.memory.needed_gib),
            _or_dash(one.cards[0].samples_per_second, _number),
            one.cards[0].verdict,
            CHOSEN if one.setting == plan.forecast.setting else _difference(one, plan.forecast),
        )
        for one in plan.frontier
    ]
    columns = ("rows, setting", "GiB", "rows/s", "verdict", "beside the chosen")
    return Sheet(f"Compared settings on {plan.card}", columns, "lrrll", rows)


def _difference(one: Forecast, chosen: Forecast) -> str:
    """→ "+3.2 GiB, 12 % faster"."""
    memory = f"{one.memory.needed_gib - chosen.memory.needed_gib:+.1f} GiB".replace("-", "−")
    new, old = (forecast.cards[0].samples_per_second for forecast in (one, chosen))
    if not new or not old:
        return memory
    percent = 100 * (new / old - 1)
    return f"{memory}, {abs(percent):.0f} % {'faster' if percent > 0 else 'slower'}"


def _measured(plan: Plan) -> Sheet:
    def pair(run: dict[str, Any], key: str) -> str:
        return f"{_or_dash(run[key], _number)} / {_or_dash(run[f'predicted_{key}'], _number)}"

    rows = [
        (
            run["when"][:10],
            f"{run['setting']['micro_batch']} × {run['setting']['accumulation']}",
            *(pair(run, key) for key in ("allocated_gib", "reserved_gib", "step_seconds")),
        )
        for run in plan.measured
    ]
    columns = ("when", "rows", "allocated GiB", "reserved GiB", "s/step")
    return Sheet(f"This model on {plan.card}, measured / predicted", columns, "llrrr", rows)


def gib(value: float) -> str:
    """→ "12.9"."""
    return f"{value:z.1f}".replace("-", "−")


def _or_dash(value: Any, text: Callable[[Any], str]) -> str:
    return "–" if value is None else text(value)


def _number(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _time(seconds: float) -> str:
    for unit, size, digits in (("d", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
