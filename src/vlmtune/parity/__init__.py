"""`python -m vlmtune.parity URL DIR`: proves that a running server asks a model as it was trained.

Rows of the training set go to the server, and what it made of them is compared with what training made of them: the prompt
token by token, the pixels, and whether the answer ends where it should. It asks any server with OpenAI's interface; what
that does not tell is said to be unproved.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vlmtune.batching import collator_of, counted_rows
from vlmtune.collator import MultimodalCollator
from vlmtune.console import bar, console
from vlmtune.data import Rows, Split, find_bad_rows, load_data
from vlmtune.errors import ModelError, RecipeError
from vlmtune.families import find_family
from vlmtune.model import check_trust, load_config, load_processor, read_processor
from vlmtune.parity.client import Server
from vlmtune.parity.compared import Finding, compare
from vlmtune.recipe import Recipe, load_recipe, parse_overrides
from vlmtune.serving import RECIPE, Serving, digest, faults, read_serving

COLOURS = {"equal": "green", "broken": "bold red", "unproved": "yellow"}


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
        table = Table(
            title=f"{self.url} beside {self.directory}", title_justify="left", title_style="bold", caption_justify="left"
        )
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
        console.print(sentence, style=COLOURS[verdict], highlight=False)

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


def parity(
    url: str,
    directory: str | Path,
    *,
    rows: int = 8,
    recipe: str | Path | None = None,
    model: str | None = None,
    timeout: float = 300,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Parity:
    """What a running server makes of rows of the training set, beside what training made of them.

    Args:
        url: of the server, "http://localhost:8000/v1".
        directory: a run's or a merged model's, with the contract.
        rows: how many, spread from the first to the last.
        recipe: another than the one in the directory.
        model: by which name to ask; None: the contract's, where the server has it.
        timeout: seconds to wait for an answer.
        trust_remote_code: run the code of a checkpoint that comes with its own.
        overrides: values of the recipe by dotted key, such as where the data lie now.

    Raises:
        VlmtuneError: no server, no contract, a mistake in the recipe, rows that cannot be read.

    """
    if rows < 1:
        raise RecipeError(f"{rows} rows prove nothing: ask for one or more")
    directory = Path(directory)
    found = read_serving(directory)
    check_trust(found.model, directory, trust_remote_code=trust_remote_code)
    server = Server(url, model, found.name, timeout)
    if recipe is None and not (directory / RECIPE).exists():
        raise RecipeError(f"{directory} has no {RECIPE}: name the one it was trained by with --recipe")
    checked = load_recipe(recipe or directory / RECIPE, **overrides)
    check_trust(checked.model, directory, trust_remote_code=trust_remote_code)
    collator = _as_trained(checked, found, directory)
    findings = _contract(found, directory, collator)
    chosen = _chosen(checked, collator, rows)
    for position in bar(range(len(chosen)), "Asking the server"):
        findings += compare(chosen[position], server, collator, found)
    return Parity(server.url, str(directory), tuple(findings))


def _as_trained(recipe: Recipe, found: Serving, directory: Path) -> MultimodalCollator:
    """The collator that the run had; where the base is gone, around the processor that lies in the directory."""
    try:
        processor, family = load_processor(recipe)
        return collator_of(recipe, processor, family, load_config(recipe.model))
    except ModelError:
        family = find_family(found.model.family)
        processor = read_processor(found.model, family, directory)
        return MultimodalCollator(processor, family, recipe.train_on_inputs, chat_template=processor.chat_template)


def _chosen(recipe: Recipe, collator: MultimodalCollator, count: int) -> Rows:
    """Some of the rows that were trained on, with their pictures as small as they were made."""
    rows = load_data(recipe.data, seed=int(recipe.train.get("seed", 42))).train
    few = rows.select([place * len(rows) // min(count, len(rows)) for place in range(min(count, len(rows)))])
    split = Split(few, None).without(find_bad_rows, policy=recipe.on_bad_row, hint="as in training")
    return counted_rows(recipe, split, collator)[0].train


def _contract(found: Serving, directory: Path, collator: MultimodalCollator) -> list[Finding]:
    """Whether the directory still keeps its contract, and whether the recipe makes the template that was trained."""
    wrong = faults(found, directory, read_processor(found.model, collator.family, directory))
    if digest(collator.chat_template) != found.chat_template.sha256:
        wrong.append("the recipe makes another chat template than the one that was trained")
    if not wrong:
        return [Finding(str(directory), "contract", "equal", "template, pixels and stop tokens are those of serving.json")]
    return [Finding(str(directory), "contract", "broken", fault) for fault in wrong]


def command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, such as http://localhost:8000/v1.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, or a merged model.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Of the recipe.")] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", help="How many rows, spread from the first to the last.")] = 8,
    recipe: Annotated[Path | None, typer.Option(help="Another recipe than the directory's.")] = None,
    model: Annotated[str | None, typer.Option(help="The name to ask for, if it is another than the contract's.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 300,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of a checkpoint that comes with its own.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="What is unproved is as bad as what is broken.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Prove that a server asks a tuned model as it was trained. Ends with 0 if it does, with 1 if not."""
    given = parse_overrides(overrides or [])
    given |= {"trust_remote_code": trust_remote_code}
    found = parity(url, directory, rows=rows, recipe=recipe, model=model, timeout=timeout, **given)
    bad = found.broken or (strict and found.unproved)
    if as_json:
        sys.stdout.write(json.dumps({**asdict(found), "ok": not bad}, indent=1, ensure_ascii=False) + "\n")
    else:
        found.print()
    if bad:
        raise typer.Exit(1)
