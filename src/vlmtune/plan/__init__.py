"""`python -m vlmtune.plan RECIPE`: what a recipe needs and takes on a card, before there is one.

The plan is made in a process of its own (`planner.process`), which simulates steps; this one asks for it and shows it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune import errors
from vlmtune.console import console
from vlmtune.errors import ModelError, OutputError
from vlmtune.plan.cards import find_card
from vlmtune.plan.forecast import Plan
from vlmtune.plan.measurements import card_here, measured
from vlmtune.plan.page import draw, write_html
from vlmtune.plan.report import show
from vlmtune.recipe import Recipe, parse_overrides

# variables by which torchrun, accelerate launch and MPI tell a process that it is one of several
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
LAUNCHERS = (*TORCHRUN, "ACCELERATE_", "OMPI_", "PMI_", "MV2_")


def make_plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    gpu: str | None = None,
    fit: bool = False,
    below_gib: float | None = None,
    advise: bool = True,
    quiet: bool = False,
    **overrides: Any,
) -> Plan:
    """What a recipe needs and takes on a card: no weights, no GPU, and of the hub `config.json` and the processor at most.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        gpu: a card's name or a size, "L4", "24GB"; None: the recipe's `plan.gpu`, else the card that is here, else 24 GB.
        fit: choose the fastest setting that fits; `Plan.overrides` has it.
        below_gib: what it may need at most, beside the recipe's `plan.margin`.
        advise: look for what would fit where this does not.
        quiet: bars go to the standard error.
        overrides: values of the recipe by dotted key.

    Raises:
        VlmtuneError: a mistake in the recipe, an unknown card, no config, rows that cannot be read.

    """
    if gpu is not None:
        find_card(gpu)  # a name that nobody knows is told at once
    content = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    asked: dict[str, Any] = {
        "recipe": content if isinstance(content, str | Path) else dict(content),
        "overrides": overrides,
        "gpu": gpu,
        "here": card_here(),
        "fit": fit,
        "below_gib": below_gib,
        "advise": advise,
        "measured": measured(),
    }
    found = _answered(asked, quiet=quiet)
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    return Plan.model_validate(found)


def _answered(asked: Mapping[str, Any], *, quiet: bool) -> dict[str, Any]:
    """What the process says that makes plans; it reads the recipe too, which takes TRL and so some seconds."""
    with tempfile.TemporaryDirectory(prefix="vlmtune-plan-") as directory:
        request, reply = Path(directory, "request.json"), Path(directory, "reply.json")
        request.write_text(json.dumps(asked, default=str), encoding="utf-8")
        # a GPU that is here stays out of it, and so does torchrun
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        done = subprocess.run(
            [sys.executable, "-m", "vlmtune.planner.process", str(request), str(reply)],
            env={**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=sys.stderr if quiet else None,
            check=False,
        )
        if not reply.exists():
            raise ModelError(f"the process that simulates a step ended with code {done.returncode} and without a plan")
        return json.loads(reply.read_text(encoding="utf-8"))


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/qwen2vl_amazon.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Other values.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A card, such as L4, or a size; else the one here, or 24GB.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Choose the fastest setting that fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Draw it there.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page there.")] = None,
) -> None:
    """Tell whether a recipe fits a card, how long it takes and what it costs. Ends with 0 if it fits, with 1 if not."""
    for path in (png, html):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no directory {path.parent}")
    plan = make_plan(recipe, gpu=gpu, fit=fit, quiet=as_json, **parse_overrides(overrides or []))
    if as_json:
        sys.stdout.write(plan.model_dump_json(indent=1) + "\n")
    else:
        show(plan)
    for path, write in ((png, draw), (html, write_html)):
        if path is not None:
            write(plan, path)
            if not as_json:
                console.print(f"written: {path}", highlight=False)
    if not plan.fits:
        raise typer.Exit(1)
