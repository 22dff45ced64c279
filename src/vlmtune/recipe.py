"""Recipes: one YAML file that says what to train on what, and how.

`load_recipe` reads a file or a dict, applies `key.path=value` overrides and returns a frozen `Recipe`. OmegaConf reads the
YAML (`1e-4` is a number there, and `${...}` refers to another key), pydantic checks it, and all mistakes are reported at once.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL.Image import MAX_IMAGE_PIXELS
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from vlmtune.errors import RecipeError
from vlmtune.plugins import did_you_mean

Path_ = tuple[str, ...]
# fields of trl.SFTConfig whose type says less than what works; max_steps is -1 where epochs count
POSITIVE = {
    *("learning_rate", "num_train_epochs", "max_length", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout"),
}
NOT_NEGATIVE = {
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "dataloader_num_workers",
    "seed",
    "data_seed",
    "neftune_noise_alpha",
    "adam_epsilon",
    "eval_delay",
}
BELOW_ONE = {"adam_beta1", "adam_beta2", "label_smoothing_factor"}  # and not negative

EVERY_N_LAYERS = {"gradient_checkpointing", "activation_checkpointing"}  # a number here is every how many layers

NOT_FOR_TRAIN = {  # fields of SFTConfig that would contradict what vlmtune does
    "assistant_only_loss": "`train_on_inputs` says what the loss is on",
    "completion_only_loss": "`train_on_inputs` says what the loss is on",
    "packing": "`packing`, beside `train`, says how rows are packed",
    "padding_free": "`packing`, beside `train`, says how rows are packed",
    "dataloader_drop_last": "no row is left out",
    "auto_find_batch_size": "micro-batches are planned before training",
    "chat_template_path": "the template comes with the checkpoint or its family",
    "model_init_kwargs": "the `model` section says how the model is loaded",
    "remove_unused_columns": "the collator needs every column",
    "dataset_kwargs": "the collator prepares the rows",
    "truncation_mode": "nothing is cut, and `on_too_long` says what becomes of a row that is too long",
    "eval_packing": "evaluations are padded",
    "pad_token": "it comes with the checkpoint",
    "eos_token": "the token that ends an answer comes with the chat template",
    "accelerator_config": "micro-batches are planned before training, and each process draws its own",
    "parallelism_config": "each process has the whole model: torchrun starts several",
    "resume_from_checkpoint": "`--resume` (resume=True) goes on from the last checkpoint",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(Section):
    name: str = Field(min_length=1)  # hub id or directory
    revision: str | None = None
    family: str | None = None  # told from the checkpoint unless given
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 where the device computes in it
    attention: str | None = None  # transformers' attn_implementation: sdpa, flash_attention_2, eager, ...
    trust_remote_code: bool = False


MOST_PIXELS = 2 * (MAX_IMAGE_PIXELS or 2**27)  # of a picture: pillow decodes none with more


class DataSection(Section):
    source: str = Field(min_length=1)  # hub id, directory, image folder, or .jsonl .json .parquet .csv file
    split: str = "train"
    eval_source: str | None = None
    eval_split: str | None = None
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    eval_rows: int | None = Field(default=None, gt=0)
    format: str = "auto"
    system: str | None = None
    prompt: str | None = None
    response: str | None = None
    images: str | list[str] | None = None
    max_rows: int | None = Field(default=None, gt=0)
    image_size: list[int] | list[list[int]] | None = None  # [width, height] of each row's pictures: plans without the data
    text_tokens: int | None = Field(default=None, gt=0)  # of each row, its pictures' not among them: plans without the data
    check_images: bool = True  # decode every picture once before the run: a broken one is found in its first minute

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataSection:
        ways = ("eval_source", "eval_split", "eval_fraction", "eval_rows")
        given = [f"data.{way}" for way in ways if getattr(self, way) is not None]
        if len(given) > 1 and given != ["data.eval_source", "data.eval_split"]:
            raise _mistake(f"{' and '.join(given)} exclude each other: keep one")
        return self

    @model_validator(mode="after")
    def _sizes_are_pairs(self) -> DataSection:
        if self.image_size is not None and self.text_tokens is None:
            raise _mistake("data.image_size is stated without data.text_tokens: a plan without the data needs both")
        if any(len(size) != 2 or min(size) < 1 for size in self.image_sizes):
            raise _mistake(f"data.image_size is {self.image_size}: [width, height] in pixels is wanted, or a list of such")
        if any(width * height > MOST_PIXELS for width, height in self.image_sizes):
            raise _mistake(f"data.image_size is {self.image_size}: pillow decodes no picture of so many pixels")
        return self

    @property
    def image_sizes(self) -> list[list[int]]:
        """Width and height of each picture of a row, as stated."""
        size: list[Any] = self.image_size or []
        return size if size and isinstance(size[0], list) else [size] if size else []


class ImagesSection(Section):
    min_pixels: int | None = Field(default=None, gt=0, le=2**26)  # areas: 256 * 28 * 28 pixels are 256 tokens of Qwen2-VL
    max_pixels: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _min_below_max(self) -> ImagesSection:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise _mistake(f"min_pixels is {self.min_pixels} and above max_pixels, {self.max_pixels}")
        return self


class LoraSection(Section):
    r: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = Field(default=["q_proj", "v_proj"], min_length=1)
    scope: Literal["language", "vision", "all"] = "language"
    use_rslora: bool = False
    use_dora: bool = False


class SwitchedSection(Section):
    """A section whose mode stands for it where there is nothing else: `packing: off`."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str | bool):
            value = {"mode": value}
        if isinstance(value, dict) and isinstance(value.get("mode"), bool):  # `off` is false to YAML
            return {**value, "mode": "auto" if value["mode"] else "off"}
        return value


class PackingSection(SwitchedSection):
    mode: Literal["auto", "off"] = "auto"
    length: int | None = Field(default=None, gt=0)  # tokens of a pack at most; None: as the padded micro-batch has at most
    group_by_image: bool = False  # rows of the same pictures come together, so that these are computed once

    @model_validator(mode="after")
    def _packs_to_group_in(self) -> PackingSection:
        if self.group_by_image and self.mode == "off":
            raise _mistake("packing.group_by_image is for packs, and packing.mode is off: leave one of them out")
        return self


class VisionCacheSection(SwitchedSection):
    mode: Literal["auto", "off", "memory", "disk"] = "auto"
    budget: float | None = Field(default=None, gt=0)  # GiB; None: a quarter of the free memory, half of the free disk
    directory: str | None = None  # of the features on disk; None: vlmtune/features in the user's cache directory


class PlanSection(SwitchedSection):
    mode: Literal["off", "predict", "auto"] = "predict"  # predict: on a GPU, what a run needs; auto: choose what fits
    gpu: str | None = None  # the card to plan for; None: the one that is here, else a 24 GB card
    margin: float = Field(default=0.1, ge=0, lt=1)  # share of the card's memory that `auto` leaves free
    smallest_max_pixels: int | None = Field(default=None, gt=0)  # `auto` may lower images.max_pixels down to this


class EvalSection(Section):
    samples: int = Field(default=4, ge=0)  # held-out rows that are answered for the table and for TensorBoard
    max_new_tokens: int = Field(default=256, gt=0)
    batch_size: int = Field(default=8, gt=0)  # rows answered at once
    accuracy: bool = False  # answer every held-out row and count exact matches: base, tuned, pictures blanked
    early_stop_patience: int | None = Field(default=None, gt=0)  # evaluations without a lower eval_loss


class Recipe(Section):
    """Everything that a run depends on. docs/recipes.md explains each field.

    Raises:
        RecipeError: from `load_recipe`, with all mistakes of the recipe at once.

    """

    model: ModelSection
    data: DataSection
    images: ImagesSection = ImagesSection()
    lora: LoraSection = LoraSection()
    train_on_inputs: bool = False
    chat_template: str | None = None  # a file with the training template; None: the family's, the processor's own, ...
    packing: PackingSection = PackingSection()
    vision_cache: VisionCacheSection = VisionCacheSection()
    plan: PlanSection = PlanSection()
    on_bad_row: Literal["raise", "drop"] = "raise"
    on_too_long: Literal["raise", "drop", "shrink"] = "raise"
    doctor: bool = True  # examine the run before it begins, and whether the tuned model looks at its pictures
    eval: EvalSection = EvalSection()
    merge: bool = False  # merge the adapter into OUTPUT_DIR/merged after training
    train: dict[str, Any] = {}  # any field of trl.SFTConfig, by its name

    @field_validator("train")
    @classmethod
    def _fields_of_sft_config(cls, train: dict[str, Any]) -> dict[str, Any]:
        mistakes: list[tuple[str, str]] = []
        checked = _checked_train(train, mistakes)
        if mistakes:
            raise PydanticCustomError("train", "several", {"mistakes": mistakes})
        return checked

    @property
    def output_dir(self) -> Path:
        """Where the run is written: `train.output_dir`, else `runs/` and the model's name."""
        return Path(self.train.get("output_dir") or Path("runs") / Path(self.model.name).name)

    def to_yaml(self) -> str:
        """The recipe with all its defaults, in YAML from which `load_recipe` makes an equal recipe."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text.replace("${", r"\${")  # a prompt's dollar, not another key's value


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """The checked recipe of a YAML file, a dict or another recipe.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        overrides: values by dotted key, `load_recipe("r.yaml", **{"train.learning_rate": 1e-4})`.

    Raises:
        RecipeError: lists every mistake with its line in the file, or as one of an override, and, for a misspelt key, what was
            probably meant.

    """
    _check_order(overrides)
    if isinstance(recipe, Recipe):
        return _with_overrides(recipe, overrides)
    text = _read(Path(recipe)) if isinstance(recipe, str | Path) else None
    where = str(recipe) if text is not None else "recipe"
    if not isinstance(recipe, str | Path | Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  (a notebook passes anything)
        raise RecipeError(f"a recipe is a file's path, a mapping or a Recipe, not a {type(recipe).__name__}")
    try:
        config = OmegaConf.create(text if text is not None else dict(recipe))  # type: ignore[arg-type]
        written = OmegaConf.to_container(config)
        for key, value in overrides.items():
            _write_out(config, key.split(".")[0])
            OmegaConf.update(config, key, value, merge=False)
        content = OmegaConf.to_container(config, resolve=True)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise RecipeError(f"{where}: {f'`{key}`: ' if key else ''}{str(error).splitlines()[0]}") from None
    except AssertionError:  # a document that is a number or a date
        content, written = None, None
    if not isinstance(content, dict):
        raise RecipeError(f"{where} holds no recipe: keys such as `model` and `data` are missing")
    lines = _key_lines(text) if text is not None else {}
    return _validated(cast("dict[str, Any]", content), where, lines, overrides, written)


def _write_out(config: Any, section: str) -> None:
    """Puts `{mode: disk}` in the place of `disk`, so that another key keeps it. What is off is turned on by one."""
    field = Recipe.model_fields.get(section)
    switched = field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, SwitchedSection)
    mode = config.get(section) if switched and isinstance(config, DictConfig) else None
    if isinstance(mode, str) and mode != "off":
        config[section] = {"mode": mode}


def _check_order(overrides: Mapping[str, Any]) -> None:
    """Refuses a section as a whole beside a key in it, unless the key comes behind and adds to a mapping: one would be lost."""
    earlier: set[str] = set()
    for path in overrides:
        earlier.add(path)
        for section in (".".join(path.split(".")[:depth]) for depth in range(1, path.count(".") + 1)):
            if section in overrides and not (section in earlier and isinstance(overrides[section], Mapping)):
                raise RecipeError(
                    f"`{section}` and `{path}` are both given, and one would undo the other: give keys of `{section}` only"
                )


def _with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A checked recipe with other values; its `${...}` were resolved when it was read."""
    content = recipe.model_dump()
    for path, value in overrides.items():
        *sections, key = path.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"override `{path}`: `{section}` is a value and has no keys")
        inner[key] = copy.deepcopy(value)
    return _validated(content, "recipe", {}, overrides, recipe.model_dump())


def _validated(
    content: Mapping[str, Any], where: str, lines: Mapping[Path_, int], overrides: Mapping[str, Any], written: Any
) -> Recipe:
    """The recipe of `content`, which is what was `written`, with `overrides`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        found = dict(_describe(error))
        if overrides:  # whose mistakes are they?
            own = _mistakes(written).items()
            given = {path: _given(path, overrides) for path, message in found.items() if (path, message) not in own}
        else:
            given = dict[Path_, str]()
        mistakes = sorted(found.items(), key=lambda mistake: 0 if given.get(mistake[0]) else _line(mistake[0], lines) or 0)
        listed = "".join(f"\n  {given.get(path) or _at(path, lines)}{_key(path)}{message}" for path, message in mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise RecipeError(f"{where} has {count}:{listed}") from None


def _mistakes(content: Any) -> dict[Path_, str]:
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        return dict(_describe(error))
    return {}


def _given(path: Path_, overrides: Mapping[str, Any]) -> str:
    """Where the override of a key, or of one below it, was given: `on the command line: `; nothing where there is none."""
    for name in overrides:
        key = tuple(name.split("."))
        if key == path[: len(key)] or path == key[: len(path)]:
            typed = any(argument.startswith(f"{name}=") for argument in sys.argv[1:])
            return "on the command line: " if typed else "override: "
    return ""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["train.learning_rate=1e-4"]` → `{"train.learning_rate": 0.0001}`; values are read as YAML.

    A text without quotes stays as it is, with its colons, `#` and braces: `data.prompt=Describe {Product Name}.`

    Raises:
        RecipeError: an argument is not of the form `key.path=value`.

    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"override {argument!r} is not of the form key.path=value")
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index]
        except (yaml.YAMLError, OmegaConfBaseException):  # a plain text with a colon or a bracket
            value = text
        plain = isinstance(value, str) and text[:1] not in ("'", '"')
        overrides[key] = text if plain or _is_template(value) else value
    return overrides


def _is_template(value: Any) -> bool:
    """Whether YAML has read `{Product Name}` as a mapping."""
    return isinstance(value, dict) and bool(value) and all(name is None for name in value.values())  # pyright: ignore


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{text}", {"text": message})


def _checked_train(train: Mapping[str, Any], mistakes: list[tuple[str, str]]) -> dict[str, Any]:
    """The values as SFTConfig's types want them; what is no field of it, or not of its type, goes into `mistakes`."""
    if not train:
        return {}
    from transformers.training_args import trainer_log_levels
    from trl import SFTConfig  # seconds: only where a recipe has a train section

    types = get_type_hints(SFTConfig)
    names = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    checked = dict(train)
    for key, value in train.items():
        if key in NOT_FOR_TRAIN:
            mistakes.append((key, f"is not for a recipe: {NOT_FOR_TRAIN[key]}"))
            continue
        if key not in names:
            mistakes.append((key, f"is not a field of trl.SFTConfig.{did_you_mean(key, names)}"))
            continue
        if value is False and key.endswith("_strategy"):  # `no` is false to YAML
            checked[key] = "no"
            continue
        if key in EVERY_N_LAYERS and isinstance(value, int) and value > 1:
            continue
        if key.startswith("log_level") and value not in trainer_log_levels:
            mistakes.append((key, f"is {value!r}: input should be one of {', '.join(trainer_log_levels)}"))
            continue
        try:
            typed = TypeAdapter(types[key], config=rules).validate_python(value)
        except ValidationError as error:
            mistakes.append((key, f"is {value!r}: {error.errors()[0]['msg'].lower()}"))
            continue
        if isinstance(typed, int | float):  # "2e-4" and "false" are what they say
            checked[key] = typed
            if wanted := _out_of_range(key, typed):
                mistakes.append((key, f"is {value!r}: input should be {wanted}"))
    return checked


def _out_of_range(key: str, value: float) -> str:
    """What a field of SFTConfig should be, where this number does not do; else nothing."""
    if key in POSITIVE and value <= 0:
        return "greater than 0"
    if key in NOT_NEGATIVE and value < 0:
        return "0 or more"
    if key in BELOW_ONE and not 0 <= value < 1:
        return "0 or more, and below 1"
    if key in ("seed", "data_seed") and value >= 2**32:
        return "below 2**32"
    return "greater than 0, or -1 to go by num_train_epochs" if key == "max_steps" and value <= 0 and value != -1 else ""


def _describe(error: ValidationError) -> Iterator[tuple[Path_, str]]:
    for details in error.errors():
        path = _known_part(details["loc"])
        for key, message in details.get("ctx", {}).get("mistakes", [(None, "")]):
            yield (path, _message(details, path)) if key is None else ((*path, key), message)


def _message(details: ErrorDetails, path: Path_) -> str:
    match details["type"]:
        case "extra_forbidden":
            return f"is not a key of a recipe.{did_you_mean(path[-1], _keys_beside(path))}"
        case "missing":
            return "is missing"
        case "recipe":
            return details["msg"]
        case "model_type":
            return f"is {details['input']!r}: a section is wanted, with keys such as `{_keys_beside((*path, ''))[0]}`"
        case "string_type" if _is_template(details["input"]):
            return f"is {details['input']!r}: put the text in quotes, or YAML reads its braces as a mapping"
        case _:
            return f"is {details['input']!r}: {details['msg'][0].lower()}{details['msg'][1:]}"


def _known_part(loc: tuple[int | str, ...]) -> Path_:
    """The location without pydantic's own additions, such as the members of a union."""
    path: list[str] = []
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if section is None:
            break
        path.append(str(part))
        field = section.model_fields.get(str(part))
        annotation = field.annotation if field else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return tuple(path)


def _keys_beside(path: Path_) -> list[str]:
    section: Any = Recipe
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _key_lines(text: str) -> dict[Path_, int]:
    """Line number of every key of a YAML text, by its path."""
    lines: dict[Path_, int] = {}

    def walk(node: yaml.Node | None, path: Path_) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))

    walk(yaml.compose(text), ())
    return lines


def _line(path: Path_, lines: Mapping[Path_, int]) -> int | None:
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)


def _at(path: Path_, lines: Mapping[Path_, int]) -> str:
    line = _line(path, lines)
    return f"line {line}: " if line else ""


def _key(path: Path_) -> str:
    return f"`{'.'.join(path)}` " if path else ""
