"""A plan: what a recipe needs, without weights and GPU; what fits, and what is said where nothing does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmtune import finetune, load_recipe
from vlmtune.errors import DatasetError, ModelError, RecipeError, VlmtuneError
from vlmtune.plan import make_plan
from vlmtune.plan.cards import CARDS, Card, find_card
from vlmtune.plan.forecast import FILLING, Plan
from vlmtune.planner.fitting import CHECKPOINTING, Search, Tried
from vlmtune.planner.process import Workshop, answer, plan_recipe
from vlmtune.trainer import checkpoint_every

MakeRecipe = Callable[..., dict[str, Any]]
REFERENCES = ("qwen2vl_amazon", "llama32_vision_amazon", "pixtral_amazon")
RECIPES = Path(__file__).parents[1] / "recipes"
STATED = {"data.image_size": [500, 500], "data.text_tokens": 378, "data.max_rows": 1350}


def plan_here(recipe: Any, *, gpu: str = "24GB", fit: bool = False, measured: Any = (), **overrides: Any) -> Plan:
    """A plan made in this process."""
    asked = {"gpu": gpu, "here": None, "fit": fit, "advise": True, "below_gib": None, "measured": list(measured)}
    return answer({"recipe": recipe, "overrides": overrides, **asked})


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmtune.plan", *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=cwd
    )


@pytest.fixture
def written(recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe(recipe()).to_yaml())
    return path


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "pixtral", "text", "smolvlm", "qwen2_5_vl"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_plan_of_each_family_from_its_rows(recipe: MakeRecipe, kind: str, quantization: str) -> None:
    plan = plan_here(recipe(kind, **{"model.quantization": quantization}))
    assert plan.fits
    assert plan.rows == 8
    assert 0 < plan.peak_gib < plan.reserved_gib < plan.needed_gib < 1
    assert sum(plan.breakdown.values()) == pytest.approx(plan.needed_gib)
    assert {batch.name for batch in plan.forecast.batches} >= {"worst", "95th percentile", "typical"}
    assert plan.confidence == ("medium" if kind in ("smolvlm", "qwen2_5_vl") else "high"), plan.forecast.notes
    weights = sum(gib for name, gib in plan.breakdown.items() if name.startswith("language model, "))
    assert ("language model, nf4" in plan.breakdown) == (quantization == "nf4")
    assert weights > 0


def test_eight_bits_are_planned_and_what_is_left_out_is_said(recipe: MakeRecipe) -> None:
    plan = plan_here(recipe(**{"model.quantization": "int8"}))
    assert plan.fits
    assert plan.confidence == "medium"
    assert any("outliers" in note for note in plan.forecast.notes)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_recipe_is_planned_without_network_and_data(name: str) -> None:
    """Weights are those that are published; the peaks were looked at once and hold to a twentieth."""
    plan = plan_here(str(RECIPES / f"{name}.yaml"), gpu="RTX3090", **STATED)
    nf4, peak = {"qwen2vl_amazon": (3.14, 11.4), "llama32_vision_amazon": (4.19, 12.7), "pixtral_amazon": (5.24, 15.7)}[name]
    assert plan.breakdown["language model, nf4"] == pytest.approx(nf4, abs=0.01)
    assert plan.peak_gib == pytest.approx(peak, rel=0.05)
    assert plan.steps == 129
    assert plan.verdict == "fits"
    assert plan.run_price is not None


def test_a_cached_picture_takes_the_tower_out_of_the_step(recipe: MakeRecipe) -> None:
    cached, computed = (plan_here(recipe(vision_cache=mode, **{"train.max_steps": 8})) for mode in ("memory", "off"))
    assert FILLING in cached.forecast.peaks
    assert FILLING not in computed.forecast.peaks
    assert cached.forecast.work.matmul_flops < computed.forecast.work.matmul_flops


def test_the_process_of_a_plan_says_what_is_said_here(recipe: MakeRecipe) -> None:
    plan = make_plan(load_recipe(recipe("pixtral")), gpu="l4")
    assert plan.card == "L4"
    assert plan == plan_here(recipe("pixtral"), gpu="L4")


def test_json_is_one_object_and_the_code_says_whether_it_fits(written: Path) -> None:
    done = command(written, "--gpu", "L4", "--json", "data.max_rows=4")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] is True
    assert found["rows"] == 4
    assert {"peak_gib", "reserved_gib", "step_seconds", "samples_per_second", "breakdown", "verdict"} <= found.keys()


def test_what_does_not_fit_ends_with_code_1_and_says_what_would(written: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    done = command(written, "--gpu", "1GB", "model.quantization=nf4", "--html", page, "--png", picture)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "GiB" in done.stdout
    assert page.read_text().startswith("<!")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"plan.gpu": "L5"}, "no card is known as 'L5'"),
        ({"model.name": "/nowhere"}, "there is no such directory"),
        ({"model.name": "some/where"}, "no checkpoint to be found"),
        ({"data.text_tokens": 300, "data.image_size": [500]}, "[width, height]"),
        ({"data.image_size": [500, 500]}, "without data.text_tokens"),
        ({"data.text_tokens": 1}, "are too few for a row"),
        ({"data.text_tokens": 5000}, "the limit is 2048"),
        ({"train.learning_rte": 1}, "did you mean"),
        ({"plan": "fast"}, "plan.mode"),
    ],
)
def test_a_mistake_is_one_sentence(recipe: MakeRecipe, overrides: dict[str, Any], wanted: str) -> None:
    with pytest.raises(VlmtuneError) as raised:
        plan_here(recipe(), gpu="", **overrides)
    assert wanted.lower() in " ".join(str(raised.value).split()).lower()


def test_a_picture_that_cannot_be_written_is_told_before_the_plan(written: Path, tmp_path: Path) -> None:
    done = command(written, "--png", tmp_path / "nowhere" / "plan.png")
    assert done.returncode == 2
    assert "there is no directory" in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_mistake_ends_the_command_with_code_2(written: Path) -> None:
    done = command(written, "--gpu", "L5")
    assert done.returncode == 2
    assert "no card is known as 'L5'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_data_and_tokenizer_the_sizes_are_asked_for() -> None:
    with pytest.raises((DatasetError, ModelError), match=r"or state data\.image_size and data\.text_tokens"):
        plan_here(str(RECIPES / "qwen2vl_amazon.yaml"))


def test_a_plan_makes_no_repository_and_wants_no_evaluation(recipe: MakeRecipe) -> None:
    train = {"train.push_to_hub": True, "train.lr_scheduler_type": "reduce_lr_on_plateau", "data.eval_rows": 2}
    assert plan_here(recipe(), **train).fits


def test_rows_that_are_too_long_are_named_as_in_training(recipe: MakeRecipe) -> None:
    with pytest.raises(DatasetError, match="row 1 of train"):
        plan_here(recipe(**{"train.max_length": 10}))


def test_a_card_without_bfloat16_is_planned_with_less_confidence(recipe: MakeRecipe) -> None:
    plan = plan_here(recipe(**{"train.bf16": True}), gpu="T4")
    assert plan.confidence == "medium"
    assert any("T4 refuses train.bf16" in note for note in plan.forecast.notes)


def test_steps_of_a_run_that_ends_in_mid_epoch_are_counted_as_the_trainer_does(recipe: MakeRecipe) -> None:
    values = {"train.per_device_train_batch_size": 1, "train.max_steps": -1}
    assert plan_here(recipe(**values, **{"train.num_train_epochs": 0.3})).steps == 3  # of 8: 2.4


def test_an_unknown_operator_lowers_the_confidence(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.planner.forecasting.KNOWN", ("aten", "prims"))
    plan = plan_here(recipe(**{"model.quantization": "nf4"}))
    assert plan.confidence == "low"
    assert any("bitsandbytes::gemm_4bit" in note for note in plan.forecast.notes)


# ----------------------------------------------------------------------------------------------------- monotone and sane


def peak(recipe: dict[str, Any], **overrides: Any) -> float:
    """Not what is reserved: segments of 20 MiB hide what small models need."""
    return plan_here(recipe, **overrides).peak_gib


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "pixtral"])
@pytest.mark.parametrize("cache", ["off", "memory"])
def test_more_never_needs_less(recipe: MakeRecipe, kind: str, cache: str) -> None:
    """Pixels, tokens, rows: each once more than the other."""
    settings = recipe(kind, vision_cache=cache, **{"train.gradient_checkpointing": False})
    smallest = {"data.image_size": [40, 40], "data.text_tokens": 90, "train.per_device_train_batch_size": 2}
    least = peak(settings, **smallest)
    for key, value in {
        "data.image_size": [56, 56] if kind == "qwen2_vl" else [64, 64],
        "data.text_tokens": 400,
        "train.per_device_train_batch_size": 8,
        "train.pad_to_multiple_of": 1000,
        "lora.r": 64,
    }.items():
        more = peak(settings, **{**smallest, key: value})
        assert more >= least if key == "data.image_size" else more > least, key
    assert peak(settings, **smallest, **{"train.gradient_checkpointing": True}) < least
    assert peak(settings, **smallest, packing="off") >= 0.99 * least  # rows of one length have no padding


# ---------------------------------------------------------------------------------------------------------- what fits


def tried_all(workshop: Workshop, search: Search) -> list[Tried]:
    return [
        Tried(overrides, workshop.forecast(overrides), given_up)
        for given_up in range(len(search._to_give_up()))
        for row in search.candidates(given_up)
        for overrides in row
    ]


def check_against_all(settings: Any, card: Card, share: float) -> None:
    """The chosen setting is the fastest that fits of all, for a limit that so many of them keep below."""
    recipe = load_recipe(settings)
    workshop = Workshop(recipe, card, ())
    material = workshop.material(recipe)
    everything = tried_all(workshop, Search(recipe, card, workshop.forecast, material))
    needs = sorted(one.forecast.memory.needed_gib for one in everything)
    card = replace(card, visible_gib=needs[round(share * (len(needs) - 1))] / (1 - recipe.plan.margin) + 1e-6)
    workshop.card = card
    search = Search(recipe, card, workshop.forecast, material)
    best = search.best(search.run())
    fitting = [one for one in everything if one.forecast.memory.needed_gib <= search.limit_gib]
    assert best is not None
    assert best == search.best(fitting)
    fastest = min(one.forecast.cards[0].step_seconds or 0 for one in fitting if one.given_up == best.given_up)
    assert best.given_up == min(one.given_up for one in fitting)
    assert best.forecast.cards[0].step_seconds == pytest.approx(fastest, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "pixtral"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_chosen_setting_is_the_best_of_all(recipe: MakeRecipe, kind: str, share: float) -> None:
    settings = recipe(kind, **{"train.per_device_train_batch_size": 4, "data.text_tokens": 900, "data.image_size": [56, 56]})
    check_against_all(settings, find_card("L4"), share)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_the_chosen_setting_of_a_reference_recipe_is_the_best_of_all(name: str) -> None:
    check_against_all(load_recipe(RECIPES / f"{name}.yaml", **STATED), find_card("L4"), 0.5)


@pytest.mark.parametrize(
    "other",
    [
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 4}},
    ],
)
def test_other_names_of_checkpointing_do_not_stand_against_what_is_chosen(recipe: MakeRecipe, other: dict[str, Any]) -> None:
    settings = recipe()
    settings["train"] |= other
    workshop = Workshop(load_recipe(settings), find_card("L4"), ())
    search = Search(workshop.recipe, workshop.card, workshop.forecast, workshop.material(workshop.recipe))
    for every, row in zip(CHECKPOINTING, search.candidates(0), strict=True):
        chosen = load_recipe(workshop.recipe, **search.changes(row[0]))
        assert checkpoint_every(chosen, on_gpu=True) == every


def test_rows_of_a_step_stay_the_same(recipe: MakeRecipe) -> None:
    settings = recipe(**{"train.per_device_train_batch_size": 3, "train.gradient_accumulation_steps": 2})
    workshop = Workshop(load_recipe(settings), find_card("L4"), ())
    search = Search(workshop.recipe, workshop.card, workshop.forecast, workshop.material(workshop.recipe))
    rows = search.candidates(0)
    assert len(rows) == len(CHECKPOINTING)
    for row in rows:
        sizes = [(one["train.per_device_train_batch_size"], one["train.gradient_accumulation_steps"]) for one in row]
        assert sizes == [(1, 6), (2, 3), (3, 2), (6, 1)]


def test_pixels_are_lowered_only_where_that_is_allowed_and_nothing_fits_otherwise(recipe: MakeRecipe) -> None:
    settings = recipe(**{"data.text_tokens": 90, "data.image_size": [56, 56], "images.max_pixels": 56 * 56})
    allowed = load_recipe(settings, **{"plan.smallest_max_pixels": 28 * 28})
    workshop = Workshop(allowed, find_card("L4"), ())
    search = Search(allowed, workshop.card, workshop.forecast, workshop.material(allowed))
    tried = tried_all(workshop, search)
    assert {one.overrides.get("images.max_pixels") for one in tried} == {None, 56 * 56 // 2, 28 * 28}
    assert {one.overrides.get("vision_cache") for one in tried} == {None, "off"}
    best = search.best(tried)
    assert best is not None
    assert "images.max_pixels" not in best.overrides
    search.limit_gib = min(one.forecast.memory.needed_gib for one in tried if "images.max_pixels" not in one.overrides) - 1e-9
    lowered = search.best(tried)
    assert lowered is None or lowered.overrides["images.max_pixels"] < 56 * 56


def test_a_recipe_that_cannot_fit_hears_the_smallest_card_that_would_do(recipe: MakeRecipe) -> None:
    settings = load_recipe(recipe(**{"data.text_tokens": 90, "data.image_size": [40, 40]}))
    plan = plan_recipe(settings, Card("tiny", visible_gib=0.5))
    assert plan.verdict == "no"
    smallest = min(CARDS, key=lambda card: card.visible_gib)
    assert f"the smallest card for it is {smallest.name}" in plan.advice


def test_what_needs_too_much_as_it_is_hears_what_would_fit(recipe: MakeRecipe) -> None:
    settings = recipe(**{"data.text_tokens": 900, "data.image_size": [56, 56], "train.per_device_train_batch_size": 8})
    workshop = Workshop(load_recipe(settings), find_card("L4"), ())
    now = workshop.forecast({}).memory.needed_gib
    plan = plan_recipe(load_recipe(settings), Card("small", visible_gib=now * 0.99 / 0.9))
    assert plan.verdict == "tight"
    assert "train." in plan.advice
    assert " needs " in plan.advice
    assert plan.overrides == {}


# -------------------------------------------------------------------------------------------------------- a run's plan


def test_auto_trains_with_what_was_chosen_and_resumes_with_it(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipe(plan="auto", **{"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4})
    settings["train"] |= {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    run = finetune(settings)
    train = run.recipe.train
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 8
    assert train["per_device_train_batch_size"] == 8  # memory is not short: the largest is the fastest
    assert "Compared settings" in capsys.readouterr().out
    again = finetune(settings, resume=True, **{"train.max_steps": 3})
    assert again.recipe.train["per_device_train_batch_size"] == 8
    assert again.metrics["steps"] == 3


def test_auto_refuses_what_it_cannot_see(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="you pass a collator of your own"):
        finetune(recipe(plan="auto"), collator=lambda rows: {})


def test_a_run_on_a_cpu_makes_no_plan_by_itself(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.prediction.make_plan", lambda *_, **__: pytest.fail("a plan was made"))
    assert finetune(recipe(**{"train.max_steps": 1})).metrics["steps"] == 1
