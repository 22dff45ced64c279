"""`python -m vlmtune.doctor RECIPE`: a run is examined before it costs money.

Nothing is written and nothing is trained for good. `at_start` is the short form at the start of every `finetune`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftModel
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from vlmtune.batching import Collator, collator_of, counted_rows, passes, steps_per_epoch, usable_rows
from vlmtune.checks import Finding, Patient, look, named, this_machine
from vlmtune.checks_data import DATA, ENVIRONMENT
from vlmtune.checks_template import ENCODED, TEMPLATE
from vlmtune.collator import MultimodalCollator
from vlmtune.console import command_line, console, is_main_process
from vlmtune.data import Split, spread
from vlmtune.errors import DatasetError, ModelError
from vlmtune.families import Family
from vlmtune.model import Processor, load_base, load_config, load_processor, prepare_for_training
from vlmtune.model_checks import MODEL, looks_when_trained
from vlmtune.recipe import Recipe, load_recipe, parse_overrides
from vlmtune.trainer import sft_config

LOOKED_AT = 64  # rows looked at one by one, from the first to the last
AT_START = 8  # the same, at the start of a run
COMPARED_AT_START = 500  # rows of which pictures are compared, at the start of a run
GROUPS = ("data", "template", "stop", "labels", "images", "length", "adapter", "looks", "loss", "environment")
BEFORE_COUNTING = ENVIRONMENT | TEMPLATE
AFTER_COUNTING = ENCODED | DATA | MODEL
CHECKS = BEFORE_COUNTING | AFTER_COUNTING
COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}
NOT_AT_START = {  # known to whoever wrote the recipe, or told by `finetune` itself
    *("template: default system prompt", "images: duplicates", "images: dominating", "environment: memory"),
    *("adapter: a step", "images: tokens and features"),
    "length: tokens",  # all rows are counted by then, and what is over the limit is refused, left out or made smaller
    "template: same text as the model's own",  # the processor has the training template by then
}


@dataclass(frozen=True)
class Report:
    """What an examination found; `print` shows what is wrong in full, and of what is right the names."""

    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "failure")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "warning")

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0

    def __str__(self) -> str:
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __rich__(self) -> Group:
        counts = f"{_plural(len(self.warnings), 'warning')} and {_plural(len(self.failures), 'failure')}"
        title = Text(f"{_plural(len(self.findings), 'check')}: {counts}", "bold")
        return Group(title, *map(_in_full, (*self.failures, *self.warnings)), "", self._passed())

    def _passed(self) -> Table:
        """A line for each group: what was found where it is one check, else the checks' names."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if finding.verdict == "ok":
                groups.setdefault(finding.check.partition(":")[0], []).append(finding)
        table = Table.grid(padding=(0, 2, 0, 0))
        for group, found in groups.items():
            told = found[0].found if len(found) == 1 else ", ".join(each.check.partition(": ")[2] for each in found)
            table.add_row(Text("ok", COLOURS["ok"]), Text(group, "cyan"), Text(told, overflow="fold"))
        return table

    def table(self) -> Table:
        """All checks, each with what was found."""
        table = Table()
        table.add_column("check", style="cyan", overflow="fold", ratio=3)
        table.add_column("verdict", no_wrap=True, width=len("verdict"))
        table.add_column("found", overflow="fold", ratio=6)
        table.add_column("remedy", overflow="fold", ratio=4)
        for finding in self.findings:
            verdict = Text(finding.verdict, style=COLOURS[finding.verdict])
            table.add_row(finding.check, verdict, Text(finding.found), Text(finding.remedy))
        return table

    def to_json(self) -> str:
        findings = [asdict(finding) for finding in self.findings]
        return json.dumps({"exit_code": self.exit_code, "findings": findings}, indent=1, ensure_ascii=False)


def examine(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    family: Family | str | None = None,
    collator: Collator | None = None,
    **overrides: Any,
) -> Report:
    """What is wrong with a run, before it begins. It loads the model, takes a row or two through it, and writes nothing.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        family: a `Family` of one's own, or the name of one.
        collator: as for `finetune`; its batches are looked at.
        overrides: values of the recipe by dotted key, `**{"train.learning_rate": 1e-4}`.

    Raises:
        VlmtuneError: a mistake in the recipe: there is nothing to be examined.

    """
    checked = load_recipe(recipe, **overrides)
    processor, found = load_processor(checked, family=family)
    try:
        patient = admit(checked, processor, found, collator=collator)
    except ModelError as error:
        remedy = (
            "save a template that marks its answers with {% generation %} beside the processor, or name one: `chat_template`"
        )
        return _report([Finding("template: missing", "failure", str(error), remedy)])
    return examined(patient)


def admit(recipe: Recipe, processor: Processor, family: Family, *, collator: Collator | None = None) -> Patient:
    """The patient of a recipe: its rows and its collator; the model comes when it is asked for.

    Raises:
        ModelError: no chat template that can be trained with.
        VlmtuneError: rows that cannot be read, or none that can be used.

    """
    config, seed = load_config(recipe.model), sft_config(recipe).seed
    prompter = collator_of(recipe, processor, family, config)
    split = usable_rows(_dropping(recipe), seed, check_images=recipe.data.check_images, album=prompter.album)
    return Patient(
        recipe,
        prompter,
        config,
        split,
        rows=spread(split.train, LOOKED_AT),
        load=partial(_load, recipe, family),
        collate=collator,
        machine=this_machine(recipe),
        checkpoints=checkpoints(recipe, len(split.train)),
    )


def examined(patient: Patient) -> Report:
    """All checks, in an order in which a fault is told where it lies."""
    told = [_dropped(patient.recipe, patient.split, "data: rows", "make messages, and their pictures decode")]
    told += look(BEFORE_COUNTING, patient)
    try:
        patient = _counted(patient)
    except DatasetError as error:  # no row is left
        remedy = "mend the template, where a check says so, and then the rows"
        return _report([*told, Finding("data: processor", "failure", str(error), remedy)])
    told.append(_dropped(patient.recipe, patient.split, "data: processor", "are taken by the processor"))
    return _report([*told, *look(AFTER_COUNTING, patient)])


def at_start(recipe: Recipe, prompter: MultimodalCollator, split: Split, model: PeftModel) -> None:
    """The short form: prints the warnings about a run that is about to begin, and stops one that would fail in silence.

    Args:
        recipe: of the run.
        prompter: its collator.
        split: its rows, those that cannot be used left out.
        model: with its adapter, on its device. It is left as it is.

    Raises:
        ModelError: a check fails; the message has what was found and the remedy.

    """
    samples = spread(split.train, AT_START)
    patient = Patient(
        recipe,
        prompter,
        model.config,
        split,
        samples,
        load=lambda: model,
        machine=this_machine(recipe),
        few=2,
        most=COMPARED_AT_START,
        checkpoints=checkpoints(recipe, len(split.train)),
    )
    report = _report(look({name: check for name, check in CHECKS.items() if name not in NOT_AT_START}, patient))
    if report.failures:
        told = "; ".join(f"{each.check}: {each.found} (remedy: {each.remedy})" for each in report.failures)
        raise ModelError(f"the run would go wrong: {told}; `doctor: false` turns these checks off")
    if is_main_process():
        for each in report.warnings:
            console.print(f"{each.check}: {each.found} ({each.remedy})", style="yellow", highlight=False, markup=False)


def after_training(recipe: Recipe, prompter: MultimodalCollator, split: Split, model: PeftModel) -> Finding:
    """Whether the tuned model looks at the pictures of held-out rows, or of the training rows where there are none."""
    rows = split.held_out or split.train
    patient = Patient(recipe, prompter, model.config, split, spread(rows, AT_START), load=lambda: model)
    return look({"looks: at pictures": looks_when_trained}, patient)[0]


def checkpoints(recipe: Recipe, rows: int) -> int:
    """How many of a run's checkpoints lie on the disk at once; the oldest goes when the newest is written.

    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer_callback.py (`DefaultFlowCallback`)
    """
    config = sft_config(recipe)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(passes(config, rows) * steps_per_epoch(config, rows))
    when, every = SaveStrategy(config.save_strategy).value, config.save_steps
    if when == "best":  # at most as often as it is evaluated
        when, every = IntervalStrategy(config.eval_strategy).value, config.eval_steps or config.logging_steps
    every = every if every >= 1 else math.ceil(every * steps)  # a share of the steps
    made = {"no": 0, "epoch": math.ceil(passes(config, rows)), "steps": math.ceil(steps / every)}[when]
    if not config.save_total_limit:
        return made
    best = config.load_best_model_at_end and config.save_total_limit == 1  # it is kept beside the last
    return min(made, config.save_total_limit + best + 1)


def _load(recipe: Recipe, family: Family) -> PeftModel:
    base = load_base(recipe.model, family, use_cpu=bool(recipe.train.get("use_cpu")))
    return prepare_for_training(base, family, recipe.lora)


def _counted(patient: Patient) -> Patient:
    """The patient with the tokens of all rows, and without those that the processor refuses."""
    recipe, before = _dropping(patient.recipe), patient.split
    train, counts = counted_rows(recipe, Split(before.train, None), patient.unlimited)
    lengths = {train.train.name(position): count for position, count in enumerate(counts)}
    held_out, dropped = before.held_out, train.dropped
    if held_out is not None:
        kept, counts = counted_rows(recipe, Split(held_out, None), patient.unlimited)
        lengths |= {kept.train.name(position): count for position, count in enumerate(counts)}
        held_out, dropped = kept.train, {**dropped, **kept.dropped}
    split = Split(train.train, held_out, dropped)
    return replace(patient, split=split, lengths=lengths, rows=spread(split.train, LOOKED_AT))


def _dropping(recipe: Recipe) -> Recipe:
    return load_recipe(recipe, on_bad_row="drop", on_too_long="drop")


def _dropped(recipe: Recipe, split: Split, check: str, good: str) -> Finding:
    rows = len(split.train) + len(split.held_out or ())
    if not split.dropped:
        return Finding(check, "ok", f"{rows} rows {good}")
    told = named([f"{name}: {reason}" for name, reason in split.dropped.items()])
    return Finding(
        check,
        "failure" if recipe.on_bad_row == "raise" else "warning",
        f"{len(split.dropped)} of {rows + len(split.dropped)} rows cannot be used: {told}",
        "mend them, or set `on_bad_row: drop` to go on without them",
    )


def _report(findings: Sequence[Finding]) -> Report:
    """The findings by group, and a sentence that ends several checks only once."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(f"{finding.check}: {finding.found}" if finding.verdict == "ok" else finding.found, finding)
    return Report(tuple(sorted(first.values(), key=lambda finding: GROUPS.index(finding.check.partition(":")[0]))))


def _in_full(finding: Finding) -> Group:
    head = Text.assemble((finding.verdict, f"bold {COLOURS[finding.verdict]}"), "  ", (finding.check, "cyan"))
    lines = (Text(finding.found), Text.assemble(("remedy: ", "dim"), finding.remedy))
    return Group("", head, *(Padding(line, (0, 0, 0, 2)) for line in lines))


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Other values.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="What was found by every check, in a table.")] = False,
) -> None:
    """Examine a run before it begins. Ends with 0, with 1 where a check fails, and with 2 for a mistake in the recipe."""
    console.stderr = as_json  # bars do not stand among the JSON
    report = examine(recipe, **parse_overrides(overrides or []))
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        console.print(report)
        if everything:
            console.print(report.table())
    if report.exit_code:
        raise typer.Exit(report.exit_code)


if __name__ == "__main__":
    command_line(doctor=command)
