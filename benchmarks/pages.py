"""Tables for the pages in docs/, and their place there: between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], *, words: int = 2) -> str:
    """A table whose first columns are words, flush left; numbers follow, flush right."""
    rules = ["---"] * words + ["---:"] * (len(header) - words)
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, rules, *lines))


def put(page: Path, name: str, text: str) -> None:
    """Replaces what stands between a page's marks."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    new, places = marks.subn(lambda found: f"{found[1]}{text}{found[2]}", old)
    if places != 1:
        raise SystemExit(f"{page} has {places} places for {name}: it should have `<!-- {name} -->` and `<!-- /{name} -->` once")
    page.write_text(new, encoding="utf-8")
