"""What a comparison found, row by row and as a whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from vlmtune.console import console

Verdict = Literal["equal", "broken", "unproved"]
What = Literal["contract", "prompt", "pictures", "end"]
COLOURS = {"equal": "green", "broken": "bold red", "unproved": "yellow"}


@dataclass(frozen=True)
class Finding:
    """What was compared, and what came of it."""

    where: str  # "row 17 of train.jsonl", or a directory
    what: What
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Parity:
    """All that was compared."""

    url: str
    directory: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "broken")

    @property
    def unproved(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "unproved")

    @property
    def nothing_proved(self) -> bool:
        """Whether the server told of no row what the model was shown."""
        return not any(finding.verdict != "unproved" for finding in self.findings if finding.what in ("prompt", "pictures"))

    def print(self) -> None:
        """Shows a line for each thing compared, then what is broken."""
        table = Table(title=f"{self.url} beside {self.directory}", title_justify="left", title_style="bold")
        for name in ("what", "equal", "broken", "unproved"):
            table.add_column(name)
        for what in dict.fromkeys(finding.what for finding in self.findings):
            counts = Counter(finding.verdict for finding in self.findings if finding.what == what)
            table.add_row(what, *(str(counts[verdict]) if counts[verdict] else "" for verdict in COLOURS))
        console.print(table)
        unproved = {finding.what: finding for finding in self.unproved}
        for finding in (*self.broken, *unproved.values()):
            where = finding.where if finding.verdict == "broken" else "not proved"
            line = f"{where}: {finding.what}: {finding.detail}"
            console.print(line, style=COLOURS[finding.verdict], highlight=False, markup=False)
        verdict, sentence = self._conclusion()
        console.print(sentence, style=COLOURS[verdict], highlight=False, markup=False)

    def _conclusion(self) -> tuple[str, str]:
        count = len(self.findings)
        if self.broken:
            return (
                "broken",
                f"{len(self.broken)} of {count} comparisons are broken: the model is asked otherwise than it was trained",
            )
        if self.nothing_proved:
            return "unproved", "No prompt and no picture is proved: the server does not tell what it made of them"
        if self.unproved:
            return "unproved", f"{len(self.unproved)} of {count} comparisons prove nothing; the others are equal to training"
        return "equal", f"All {count} comparisons are equal: the model is asked as it was trained"
