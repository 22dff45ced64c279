"""A finished run: what it can be asked, what it leaves behind, and how well it does on the rows that were held out."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune import evaluation
from vlmtune.collator import MultimodalCollator
from vlmtune.console import decisions
from vlmtune.data import Rows, Sample, Split, spread
from vlmtune.evaluation import Comparison
from vlmtune.families import Family
from vlmtune.merge import load_merged, merge_adapter
from vlmtune.model import Processor, compute_dtype
from vlmtune.output import whole, write_json
from vlmtune.recipe import EvalSection, Recipe
from vlmtune.serving import Serving, contract, write_serving

Row = Mapping[str, Any]
PACKAGES = ("vlmtune", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


@dataclass(repr=False)
class Run:
    """A finished run: the tuned model, what it cost, and what it says."""

    model: Any  # a peft.PeftModel with the adapter on
    processor: Processor
    trainer: Any  # TRL's SFTTrainer
    recipe: Recipe
    family: Family
    split: Split
    prompter: MultimodalCollator
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])

    def __repr__(self) -> str:
        rows = f"{len(self.train_rows)} rows trained on, {len(self.held_out or [])} held out"
        return f"Run({str(self.adapter_dir)!r}: {self.metrics.get('steps')} steps, {rows})"

    @property
    def history(self) -> list[dict[str, float]]:
        """The trainer's log: an entry each logging step and each evaluation."""
        return self.trainer.state.log_history

    @property
    def adapter_dir(self) -> Path:
        return self.recipe.output_dir

    @property
    def train_rows(self) -> Rows:
        return self.split.train

    @property
    def held_out(self) -> Rows | None:
        return self.split.held_out

    def generate(self, row: Row, *, max_new_tokens: int | None = None) -> str:
        """The tuned model's answer to a row of the data set, answered or not, or to a sample of these `Rows`."""
        asked = evaluation.question(row) if isinstance(row, Sample) else self.train_rows.alone(row).prompt(0)
        options = answer_options(self.recipe.eval, max_new_tokens)
        return evaluation.answers(self.model, self.prompter, [asked], **options)[0]

    def compare(self, rows: Iterable[Row] | None = None, *, max_new_tokens: int | None = None) -> Comparison:
        """Base against tuned model, adapter off and on in this one process.

        Args:
            rows: rows of the data set, answered or not, or samples of these `Rows`; None takes `eval.samples` of the
                held-out rows, or of the training rows where none were held out.
            max_new_tokens: longest answer; None takes the recipe's.

        """
        if rows is None:
            samples: list[Row] = spread(self.held_out or self.train_rows, self.recipe.eval.samples)
        else:
            samples = [row if isinstance(row, Sample) else self.train_rows.alone(row).answered(0) for row in rows]
        options = answer_options(self.recipe.eval, max_new_tokens)
        return evaluation.compare(self.model, self.prompter, samples, **options)


def answer_options(section: EvalSection, max_new_tokens: int | None = None) -> dict[str, Any]:
    """How a recipe wants questions answered: keywords of `evaluation.answers`."""
    return {"max_new_tokens": max_new_tokens or section.max_new_tokens, "batch_size": section.batch_size}


def save(run: Run) -> None:
    """Writes the adapter with all that is needed to reproduce, merge and serve it; whole or not at all."""
    generation = run.model.generation_config
    generation.eos_token_id = evaluation.stop_token_ids(generation, run.prompter)
    with whole(run.adapter_dir) as directory:
        run.model.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card
        run.processor.save_pretrained(str(directory))
        generation.save_pretrained(str(directory))
        (directory / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
        write_serving(directory, serving(run), run.adapter_dir)
        write_json(directory / "versions.json", {"python": platform.python_version()} | {p: version(p) for p in PACKAGES})
        write_json(directory / "history.json", {"log": run.history})
        write_json(directory / "metrics.json", run.metrics)


def serving(run: Run) -> Serving:
    """What a server has to keep to, so that the tuned model is asked as it was trained."""
    plan = run.trainer.plan
    return contract(
        run.recipe,
        run.processor,
        family=run.family.name,
        dtype=str(compute_dtype(run.recipe.model)).removeprefix("torch."),
        stop_ids=evaluation.stop_token_ids(run.model.generation_config, run.prompter),
        context=getattr(run.model.config.get_text_config(), "max_position_embeddings", None),
        longest_row=max(plan.lengths) if plan is not None else None,
    )


def evaluate(run: Run) -> None:
    """Answers the held-out rows as the recipe's `eval` section asks, merges if it asks, and shows what came of it.

    With `eval.accuracy` the metrics get `base_accuracy`, `tuned_accuracy`, `blank_accuracy` and, merged, `merged_accuracy`:
    the shares of held-out answers that equal the expected text.
    """
    section, rows = run.recipe.eval, run.held_out
    samples = spread(rows, len(rows) if section.accuracy else section.samples) if rows is not None else []
    if samples:
        _compare(run, samples)
    if run.recipe.merge:
        trusted = run.recipe.model.trust_remote_code
        report = merge_adapter(
            run.adapter_dir, run.adapter_dir / "merged", family=run.family, trust_remote_code=trusted, overwrite=True
        )
        run.metrics["merge_largest_difference"] = report.largest_difference
        if section.accuracy and samples:
            merged = load_merged(run.adapter_dir / "merged", run.recipe.model, run.family)
            run.metrics["merged_accuracy"] = _accuracy(run, samples, merged, "Merged model")
    write_json(run.adapter_dir / "metrics.json", run.metrics)
    scores = {name.replace("_", " "): f"{value:.1%}" for name, value in run.metrics.items() if name.endswith("_accuracy")}
    decisions("Result (accuracy: answers equal to the expected text)", {**scores, **_places(run.adapter_dir)})


def _compare(run: Run, samples: Sequence[Row]) -> None:
    section = run.recipe.eval
    compared = run.compare(samples)
    few = Comparison(tuple(spread(compared.rows, section.samples)))
    few.write(run.adapter_dir)
    few.print()
    if section.accuracy:
        expected = [row.expected for row in compared.rows]
        run.metrics["base_accuracy"] = evaluation.accuracy([row.base for row in compared.rows], expected)
        run.metrics["tuned_accuracy"] = evaluation.accuracy([row.tuned for row in compared.rows], expected)
        blind = [evaluation.blanked(sample) for sample in samples]
        run.metrics["blank_accuracy"] = _accuracy(run, blind, run.model, "Blank pictures")


def _accuracy(run: Run, samples: Sequence[Row], model: Any, description: str) -> float:
    asked = [evaluation.question(sample) for sample in samples]
    options = answer_options(run.recipe.eval)
    given = evaluation.answers(model, run.prompter, asked, description=description, **options)
    return evaluation.accuracy(given, [evaluation.expected_answer(sample, run.prompter) for sample in samples])


def _places(directory: Path) -> dict[str, Any]:
    """What lies in a run's directory, for the table at the end."""
    places = {
        "adapter": directory,
        "metrics": directory / "metrics.json",
        "before and after": directory / "comparison.html",
        "merged model": directory / "merged",
    }
    there: dict[str, Any] = {name: path for name, path in places.items() if path.exists()}
    if (directory / "runs").exists():
        there["TensorBoard"] = f"tensorboard --logdir {directory / 'runs'}"
    return there
