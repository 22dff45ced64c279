"""`python -m vlmtune.parity URL DIR`: proves that a running server asks a model as it was trained.

Rows of the training set go to the server, and what it made of them is compared with what training made of them: the prompt
token by token, the pixels, and whether the answer ends where it should. It asks any server with OpenAI's interface; what
that does not tell is said to be unproved.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.console import bar
from vlmtune.errors import RecipeError
from vlmtune.parity.findings import Parity
from vlmtune.recipe import load_recipe, parse_overrides
from vlmtune.serving import RECIPE, read_serving


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
    if recipe is None and not (directory / RECIPE).exists():
        raise RecipeError(f"{directory} has no {RECIPE}: name the one it was trained by with --recipe")
    checked = load_recipe(recipe or directory / RECIPE, **overrides)

    # what takes seconds to import: mistakes are told before
    from vlmtune.model import check_trust
    from vlmtune.parity.client import Server
    from vlmtune.parity.compared import compare
    from vlmtune.parity.trained import as_trained, chosen, contract

    check_trust(found.model, directory, trust_remote_code=trust_remote_code)
    check_trust(checked.model, directory, trust_remote_code=trust_remote_code)
    server = Server(url, model, found.name, timeout)
    collator = as_trained(checked, found, directory)
    findings = contract(found, directory, collator)
    asked = chosen(checked, collator, rows)
    for position in bar(range(len(asked)), "Asking the server"):
        findings += compare(asked[position], server, collator, found)
    return Parity(server.url, str(directory), tuple(findings))


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
