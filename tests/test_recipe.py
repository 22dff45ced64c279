"""A recipe is read, overridden and checked; all of its mistakes are told at once, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune import Recipe, RecipeError, load_recipe
from vlmtune.recipe import parse_overrides

WHOLE = "model: {name: m}\ndata: {source: d}\n"
SHORT = {"model": {"name": "m"}, "data": {"source": "d"}}
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(recipe: Any, **overrides: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, **overrides)
    return str(caught.value)


# ---- what is right


def test_a_file_a_dict_and_a_recipe_give_the_same(write: Write) -> None:
    from_file = load_recipe(write("model: {name: m}\ndata: {source: d}\ntrain: {learning_rate: 1e-4}\n"))
    from_dict = load_recipe({"model": {"name": "m"}, "data": {"source": "d"}, "train": {"learning_rate": 1e-4}})
    assert from_file == from_dict == load_recipe(from_file)


def test_numbers_may_be_written_as_science_does(write: Write) -> None:
    assert load_recipe(write(WHOLE + "train: {learning_rate: 1e-4}\n")).train["learning_rate"] == 0.0001


def test_a_key_may_refer_to_another(write: Write) -> None:
    assert load_recipe(write(WHOLE + "lora: {r: 8, alpha: '${lora.r}'}\n")).lora.alpha == 8


def test_an_override_takes_the_place_of_the_file_s_value_and_makes_sections_that_are_not_there(write: Write) -> None:
    recipe = load_recipe(write(WHOLE + "lora: {r: 8}\n"), **{"lora.r": 4, "train.max_steps": 7})
    assert (recipe.lora.r, recipe.train) == (4, {"max_steps": 7})


def test_a_recipe_cannot_be_changed(write: Write) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write(WHOLE)).train_on_inputs = True  # type: ignore[misc]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_is_right_and_survives_being_written_down(path: Path, write: Write) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k=1e-4", 0.0001),
        ("k=8", 8),
        ("k=true", True),
        ("k=null", None),
        ("k=", None),
        ("k=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("k={use_reentrant: false}", {"use_reentrant": False}),
        ("k=a=b", "a=b"),
        ("k=What: is {Product Name}?", "What: is {Product Name}?"),
        ("k={description}", "{description}"),
        ("k=[INST] hello", "[INST] hello"),
        ("k=number # 5", "number # 5"),
        ("k=two\nlines: 2", "two\nlines: 2"),
        ("k='8'", "8"),
        ("k=${lora.r}", "${lora.r}"),
    ],
)
def test_the_value_of_an_override_is_read_as_yaml_and_a_plain_text_stays_as_it_is(argument: str, value: Any) -> None:
    assert parse_overrides([argument]) == {"k": value}


# ---- what is wrong


def test_all_mistakes_are_told_at_once_with_their_lines_and_what_was_meant(write: Write) -> None:
    path = write(
        """\
modell: {name: m}
data:
  source: d
  max_rows: many
lora:
  r: 0
  aplha: 16
train:
  learning_rat: 1e-4
  num_train_epochs: three
"""
    )
    assert refusal(path).splitlines() == [
        f"{path} has 7 mistakes:",
        "  `model` is missing",
        "  line 1: `modell` is not a key of a recipe. Did you mean 'model'?",
        "  line 4: `data.max_rows` is 'many': input should be a valid integer, unable to parse string as an integer",
        "  line 6: `lora.r` is 0: input should be greater than 0",
        "  line 7: `lora.aplha` is not a key of a recipe. Did you mean 'alpha'?",
        "  line 9: `train.learning_rat` is not a field of trl.SFTConfig. Did you mean 'learning_rate'?",
        "  line 10: `train.num_train_epochs` is 'three': input should be a valid number, unable to parse string as a number",
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("lora: {targets: q_proj}", "`lora.targets` is 'q_proj': input should be a valid list"),
        ("lora: {targets: []}", "`lora.targets` is []: value should have at least 1 item after validation, not 0"),
        ("lora: {dropout: 1.5}", "`lora.dropout` is 1.5: input should be less than 1"),
        ("lora: {alpha: .nan}", "`lora.alpha` is nan: input should be a finite number"),
        ("lora:", "`lora` is None: a section is wanted, with keys such as `r`"),
        ("lora: 8", "`lora` is 8: a section is wanted, with keys such as `r`"),
        ("train: [max_steps]", "`train` is ['max_steps']: input should be a valid dictionary"),
        ("on_bad_row: skip", "`on_bad_row` is 'skip': input should be 'raise' or 'drop'"),
        ("train_on_inputs: perhaps", "`train_on_inputs` is 'perhaps': input should be a valid boolean"),
        ("images: {min_pixels: 20, max_pixels: 10}", "`images` min_pixels is 20 and above max_pixels, 10"),
        ("5: 3", "`5` is 5: keys should be strings"),
        ("train: {max_steps: 0}", "`train.max_steps` is 0: input should be greater than 0, or -1 to go by num_train_epochs"),
        ("train: {learning_rate: -1}", "`train.learning_rate` is -1: input should be greater than 0"),
        ("train: {learning_rate: .nan}", "`train.learning_rate` is nan: input should be a finite number"),
        ("train: {per_device_train_batch_size: 0}", "`train.per_device_train_batch_size` is 0: input should be greater than 0"),
        ("train: {gradient_accumulation_steps: 0}", "`train.gradient_accumulation_steps` is 0: input should be greater than 0"),
        ("train: {weight_decay: -0.1}", "`train.weight_decay` is -0.1: input should be 0 or more"),
        ("train: {seed: 4294967296}", "`train.seed` is 4294967296: input should be below 2**32"),
    ],
)
def test_a_wrong_value_is_told_with_its_line_its_key_and_what_would_be_right(write: Write, line: str, sentence: str) -> None:
    path = write(WHOLE + line + "\n")
    said = refusal(path)
    assert said.startswith(f"{path} has 1 mistake:\n  line 3: {sentence}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "model: {name: m}\ndata: {source: d, eval_fraction: 0.1, eval_rows: 2}\n",
            "data.eval_fraction and data.eval_rows",
        ),
        (
            "model: {name: m}\ndata: {source: d, eval_fraction: 1.5}\n",
            "`data.eval_fraction` is 1.5: input should be less",
        ),
        ("model: {name: m}\ndata: {source: d, prompt: {Product Name}}\n", "put the text in quotes, or YAML reads its braces"),
        ("model: {name: m, quantization: nf5}\ndata: {source: d}\n", "input should be 'nf4', 'int8' or 'none'"),
        ("- model\n- data\n", "holds no recipe: keys such as `model` and `data` are missing"),
        ("42\n", "holds no recipe: keys such as `model` and `data` are missing"),
        ("", "has 2 mistakes:\n  `model` is missing\n  `data` is missing"),
        ("model: {name: m\ndata: [", "is not valid YAML: while parsing a flow mapping"),
        (WHOLE + "model: {name: n}\n", "is not valid YAML: while constructing a mapping"),
        (WHOLE + "---\n" + WHOLE, "is not valid YAML: expected a single document"),
        ("model: &a {name: *a}\n", "is not valid YAML: YAML recursive aliases are not supported"),
        ("model: !!python/object/apply:os.system [exit]\n", "is not valid YAML: could not determine a constructor"),
        (WHOLE + "train: {output_dir: '${nowhere}'}\n", "`train.output_dir`: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused_by_its_file_s_name(write: Write, text: str, sentence: str) -> None:
    path = write(text)
    said = refusal(path)
    assert said.startswith(str(path))
    assert sentence in said


def test_a_duplicate_key_is_named_with_its_line(write: Write) -> None:
    assert "found duplicate key model" in (said := refusal(write(WHOLE + "model: {name: n}\n")))
    assert "line 3" in said


def test_a_missing_recipe_file_is_named() -> None:
    assert refusal("nowhere.yaml") == "recipe nowhere.yaml does not exist"


def test_a_directory_or_bytes_in_place_of_a_recipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(tmp_path).startswith(f"recipe {tmp_path} cannot be read: [Errno 21] Is a directory")
    assert refusal(tmp_path / "binary.yaml").startswith(f"recipe {tmp_path}/binary.yaml cannot be read: 'utf-8' codec")


@pytest.mark.parametrize("recipe", [None, 5, ["model"], b"recipe.yaml"])
def test_what_is_neither_file_nor_mapping_nor_recipe_is_refused(recipe: Any) -> None:
    assert refusal(recipe) == f"a recipe is a file's path, a mapping or a Recipe, not a {type(recipe).__name__}"


@pytest.mark.parametrize("argument", ["train.max_steps", "=5", ".max_steps=5", "train..max_steps=5"])
def test_an_override_that_is_not_of_the_form_key_equals_value_is_refused(argument: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"override {argument!r} is not of the form key.path=value")):
        parse_overrides([argument])


@pytest.mark.parametrize(
    "overrides",
    [
        {"packing": "off", "packing.length": 4096},
        {"packing.length": 4096, "packing": "off"},
        {"packing.length": 4096, "packing": {"group_by_image": True}},
    ],
)
def test_overrides_of_which_one_would_undo_the_other_are_refused(overrides: dict[str, Any]) -> None:
    for recipe in (SHORT, load_recipe(SHORT)):
        assert "`packing` and `packing.length` are both given" in refusal(recipe, **overrides)


def test_a_mode_in_short_stays_when_another_key_is_overridden(write: Write) -> None:
    short, other = {**SHORT, "vision_cache": "disk"}, {"vision_cache.budget": 5}
    for recipe in (write(WHOLE + "vision_cache: disk\n"), short, load_recipe(short)):
        found = load_recipe(recipe, **other).vision_cache
        assert (found.mode, found.budget) == ("disk", 5)


def test_an_override_of_a_key_turns_on_what_a_file_has_turned_off(write: Write) -> None:
    found = load_recipe(write(WHOLE + "packing: off\n"), **{"packing.length": 4096}).packing
    assert (found.mode, found.length) == ("auto", 4096)


def test_an_override_may_add_to_a_section_that_another_gives() -> None:
    for recipe in (SHORT, load_recipe(SHORT)):
        found = load_recipe(recipe, **{"packing": {"length": 4096}, "packing.group_by_image": True}).packing
        assert (found.length, found.group_by_image) == (4096, True)


def test_a_mistake_of_an_override_is_not_blamed_on_a_line_of_the_file(write: Write) -> None:
    path = write(WHOLE + "lora: {r: 8}\n")
    assert refusal(path, **{"lora.rnak": 8}) == f"{path} has 1 mistake:\n  override: `lora.rnak` is not a key of a recipe."
    assert "\n  override: `lora.r` is 'many': input should be" in refusal(path, **{"lora.r": "many"})
    assert "\n  override: `lora` is 5: a section is wanted" in refusal(path, lora=5)
    assert "recipe has 1 mistake:\n  override: `lora.r` is 0" in refusal(load_recipe(path), **{"lora.r": 0})


def test_a_mistake_of_the_file_keeps_its_line_beside_overrides(write: Write) -> None:
    path = write("model: {name: m}\ndata: {source: d, eval_fraction: 0.1, eval_rows: 2}\nlora: {rank: 8}\n")
    told = refusal(path, **{"data.max_rows": 5, "lora.alpha": 4, "lora.dropout": 2})
    assert [line.strip().partition("`")[0] for line in told.splitlines()[1:]] == ["override: ", "line 2: ", "line 3: "]
    path = write("model: {name: m}\ndata: {source: d, eval_fraction: 0.1}\n")
    assert "\n  override: `data` data.eval_fraction and data.eval_rows exclude" in refusal(path, **{"data.eval_rows": 5})


def test_an_override_of_an_unknown_key_is_named_with_what_was_meant(write: Write) -> None:
    path = write(WHOLE)
    assert "Did you mean 'max_steps'?" in refusal(path, **{"train.max_step": 8})
    assert "`train_on_inputs` is {'x': 5}" in refusal(path, **{"train_on_inputs.x": 5})


def test_an_object_that_yaml_cannot_write_is_refused_by_its_key() -> None:
    said = refusal({"model": {"name": object()}, "data": {"source": "d"}})
    assert said == "recipe: `model.name`: Value 'object' is not a supported primitive type"


def test_a_recipe_is_checked_when_it_is_made_in_python_too() -> None:
    with pytest.raises(ValueError, match="Field required"):
        Recipe.model_validate({"model": {"name": "m"}})


def test_a_dollar_in_a_prompt_survives_saving_and_overriding(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {name: m}\ndata: {source: d, prompt: 'It costs \\${Price}.'}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.prompt == "It costs ${Price}."
    assert load_recipe(recipe, **{"lora.r": 4}).data.prompt == "It costs ${Price}."
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_numbers_and_switches_written_as_text_are_what_they_say() -> None:
    train = {"learning_rate": "2e-4", "gradient_checkpointing": "false"}
    recipe = load_recipe({"model": {"name": "m"}, "data": {"source": "d"}, "train": train})
    assert recipe.train == {"learning_rate": 2e-4, "gradient_checkpointing": False}


def test_fields_that_would_contradict_vlmtune_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"`train.packing` is not for a recipe: `packing`, beside `train`"):
        load_recipe({"model": {"name": "m"}, "data": {"source": "d"}, "train": {"packing": True}})
