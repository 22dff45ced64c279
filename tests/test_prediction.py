"""A run beside its plan, on a GPU that is only played: what is shown, kept, and said when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune import finetune, load_recipe
from vlmtune.callbacks import ProgressBar
from vlmtune.errors import ModelError
from vlmtune.plan.forecast import Plan
from vlmtune.plan.measurements import NEEDED, card_here, keep, measured
from vlmtune.planner.process import answer
from vlmtune.prediction import Gauge, chosen_before, in_words, missing, planned
from vlmtune.trainer import Trainer, checkpoint_every

MakeRecipe = Callable[..., dict[str, Any]]
GIB = 2**30
FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 22.03 GiB of which 512.00 MiB is free. "
    "Including non-PyTorch memory, this process has 21.50 GiB memory in use."
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmtune" / "measured.jsonl"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of an L4 on which 2 GiB are allocated and 3 reserved at the peak."""
    for name, said in {
        "max_memory_allocated": 2 * GIB,
        "max_memory_reserved": 3 * GIB,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda said=said: said)


def plan_of(recipe: dict[str, Any], **overrides: Any) -> Plan:
    asked = {"gpu": "L4", "here": None, "fit": False, "advise": False, "below_gib": None, "measured": measured()}
    return answer({"recipe": recipe, "overrides": overrides, **asked})


def test_a_run_on_a_gpu_shows_and_keeps_predicted_beside_measured(
    recipe: MakeRecipe, gpu: None, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(**{"train.max_steps": 3})
    plan = plan_of(settings)
    gauge = Gauge(plan, settings["model"]["name"])
    run = finetune(settings)
    run.trainer.add_callback(gauge)
    run.trainer.remove_callback(ProgressBar)  # which `finetune` stops
    capsys.readouterr()
    run.trainer.train()
    said = " ".join(capsys.readouterr().out.split())
    assert f"first step: 2.0 GiB allocated and 3.0 reserved, predicted were {gauge.predicted_allocated:.1f}" in said
    (entry,) = measured()
    assert entry == json.loads(cache.read_text())
    assert (entry["card"], entry["reserved_gib"], entry["allocated_gib"]) == ("L4", 3, 2)
    assert entry["predicted_reserved_gib"] == pytest.approx(gauge.predicted_reserved)
    assert entry["step_seconds"] > 0


def test_what_rows_that_share_pictures_took_teaches_no_plan(recipe: MakeRecipe, gpu: None, cache: Path) -> None:
    settings = recipe(packing={"group_by_image": True})
    plan = plan_of(settings)
    assert plan.forecast.setting.group_by_image
    gauge = Gauge(plan, settings["model"]["name"])
    run = finetune(settings)
    run.trainer.add_callback(gauge)
    run.trainer.remove_callback(ProgressBar)  # which `finetune` stops
    run.trainer.train()
    assert gauge.entry["step_seconds"] > 0
    assert not cache.exists()


def test_later_plans_use_what_was_measured_on_such_a_card(recipe: MakeRecipe) -> None:
    settings = recipe()
    before = plan_of(settings)
    assert before.step_seconds is not None
    entry = {
        "card": "L4",
        "model": settings["model"]["name"],
        "reserved_gib": before.reserved_gib + 0.5,
        "predicted_reserved_gib": before.reserved_gib,
        "step_seconds": before.step_seconds * 3,
        "predicted_step_seconds": before.step_seconds,
    }
    keep(entry)
    keep({**entry, "card": "T4", "reserved_gib": 9})
    keep({**entry, "model": "another", "reserved_gib": 9})
    after = plan_of(settings)
    assert after.needed_gib == pytest.approx(before.needed_gib + 0.5)
    assert after.step_seconds == pytest.approx(before.step_seconds * 3)
    assert after.measured == [entry]


def test_a_resumed_run_has_what_was_chosen_and_nothing_that_stands_against_it(recipe: MakeRecipe, tmp_path: Path) -> None:
    given = load_recipe(recipe(**{"train.activation_checkpointing": True, "packing": {"length": 900}}))
    chosen = {"train.gradient_checkpointing": 2, "train.activation_checkpointing": None, "vision_cache": "off"}
    (tmp_path / "recipe.yaml").write_text(load_recipe(given, **chosen, **{"packing.length": None}).to_yaml())
    resumed = chosen_before(given, tmp_path)
    assert checkpoint_every(resumed, on_gpu=True) == 2
    assert (resumed.vision_cache.mode, resumed.packing.length) == ("off", None)


def test_a_line_that_was_not_finished_is_left_out(cache: Path) -> None:
    entry = dict.fromkeys(NEEDED, 1)
    keep(entry)
    keep({"card": "L4"})
    with cache.open("ab") as file:
        file.write(b'{"card": "T\xff')
    assert measured() == [entry]


def test_a_run_ends_well_where_its_measurements_cannot_be_kept(
    recipe: MakeRecipe, gpu: None, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.parent.write_text("a file where the cache should be")
    gauge = Gauge(plan_of(recipe()), "model")
    run = finetune(recipe())
    run.trainer.add_callback(gauge)
    run.trainer.remove_callback(ProgressBar)  # which `finetune` stops
    run.trainer.train()
    assert "not kept for later plans" in " ".join(capsys.readouterr().out.split())


def test_on_a_gpu_a_run_is_predicted_and_the_table_has_it(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def make(recipe_asked: Any, **options: Any) -> Plan:
        asked.append((recipe_asked.data.text_tokens, options))
        return plan_of(recipe())

    monkeypatch.setattr("vlmtune.prediction.card_here", lambda: "L4")
    monkeypatch.setattr("vlmtune.prediction.make_plan", make)
    plan = planned(load_recipe(recipe(**{"data.text_tokens": 90, "plan": {"gpu": "T4"}})))
    assert asked == [(None, {"gpu": "L4", "advise": False})]  # its own card, and its rows
    assert "of 22.0 GiB on L4, predicted" in in_words(plan)["memory"]
    assert planned(load_recipe(recipe(plan="off"))) is None
    assert planned(load_recipe(recipe()), own="a collator") is None
    assert in_words(None) == {}


def test_a_run_goes_on_where_its_memory_cannot_be_predicted(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Plan:
        raise ModelError("an operator has no fake kernel")

    monkeypatch.setattr("vlmtune.prediction.card_here", lambda: "L4")
    monkeypatch.setattr("vlmtune.prediction.make_plan", refuse)
    assert planned(load_recipe(recipe())) is None
    assert "no prediction of this run's memory: an operator has no fake kernel" in " ".join(capsys.readouterr().out.split())


def test_full_memory_names_rows_what_was_missing_and_the_next_setting(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    failed, below = plan_of(recipe()), list[float | None]()

    def make(*_: Any, fit: bool = False, below_gib: float | None = None, **__: Any) -> Plan:
        below.append(below_gib)
        return failed.model_copy(
            update={"overrides": {"train.gradient_checkpointing": True, "packing.length": None}} if fit else {}
        )

    monkeypatch.setattr("vlmtune.prediction.make_plan", make)
    monkeypatch.setattr(Trainer, "train", full)
    with pytest.raises(ModelError) as raised:
        finetune(recipe())
    assert below == [None, failed.needed_gib * 0.95]  # less than what has failed
    said = str(raised.value)
    assert "full in step 1, whose largest micro-batch is row " in said
    assert "2.50 GiB were asked for and 512.00 MiB were free" in said
    assert "the next setting that fits is train.gradient_checkpointing=true packing.length=null, which needs 0.9 GiB" in said
    with pytest.raises(ModelError, match=r"lower packing\.length or"):
        finetune(recipe(), collator=lambda rows: {}, overwrite=True)


def test_torchs_words_about_full_memory_are_read() -> None:
    assert missing(FULL) == "2.50 GiB were asked for and 512.00 MiB were free"
    assert missing("HIP out of memory. Tried to allocate 20.00 MiB") == "20.00 MiB were asked for"
    assert missing("out of memory\nmore") == "out of memory"


def test_without_a_gpu_there_is_no_card_here() -> None:
    assert card_here() is None
