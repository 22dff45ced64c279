"""A merged model as it lies on the disk: what is asked of it before it is exported, and what is taken from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vlmtune.errors import ModelError
from vlmtune.families import Family, find_family
from vlmtune.model import load_config, parameter_names, skeleton
from vlmtune.output import MANIFEST, MARK
from vlmtune.recipe import ModelSection, Recipe, load_recipe
from vlmtune.serving import FILE as CONTRACT


@dataclass(frozen=True)
class Merged:
    """A directory that plain `from_pretrained` loads."""

    directory: Path
    config: Any  # transformers' config
    recipe: Recipe | None  # by which it was tuned, if that is known
    files: tuple[Path, ...]  # of weights
    trust_remote_code: bool = False  # the caller's word: what a recipe allowed elsewhere is not allowed here

    @cached_property
    def section(self) -> ModelSection:
        """It as the model of a recipe."""
        name = str(self.directory.absolute())
        known = self.recipe.model if self.recipe is not None else ModelSection(name=name)
        own = {"name": name, "revision": None, "quantization": "none", "trust_remote_code": self.trust_remote_code}
        return known.model_copy(update=own)

    @cached_property
    def family(self) -> Family:
        return find_family(self.section.family, config=self.config)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the weights, which a config may tell wrongly or not at all."""
        found = {tensor.dtype for tensor in self.weights().values() if tensor.is_floating_point()}
        return max(found, key=lambda dtype: dtype.itemsize)

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model on the meta device."""
        return skeleton(self.section, self.family, self.config)

    @cached_property
    def parameters(self) -> dict[str, str | None]:
        """The checkpoint's name of each tensor → the model's own."""
        return parameter_names(self.outline, self.tensors())

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """Names of the tensors that `from_pretrained` reads over: an old LLaMA's rotary frequencies, in each layer.

        https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (it says which)
        """
        expected = self.outline.state_dict()
        unknown = {own or name: name for name, own in self.parameters.items() if own not in expected}
        info: Any = SimpleNamespace(missing_keys=set[str](), unexpected_keys=set(unknown))
        self.outline._adjust_missing_and_unexpected_keys(info)  # pyright: ignore[reportPrivateUsage]
        return tuple(sorted(name for own, name in unknown.items() if own not in info.unexpected_keys))

    def weights(self) -> dict[str, Tensor]:
        """Its tensors, but for those that are ignored."""
        return {name: tensor for name, tensor in self.tensors().items() if name not in self.ignored}

    def tensors(self) -> dict[str, Tensor]:
        """All that its files hold, by the checkpoint's names, mapped into memory: read when it is used, and not kept.

        Raises:
            ModelError: a file that is not whole.

        """
        found: dict[str, Tensor] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
        return found

    def copy_rest(self, out: Path, *, but: Collection[str] = ()) -> None:
        """Copies all files that are no weights: processor, chat template, configs, recipe. The contract is of these weights."""
        left = {*but, SAFE_WEIGHTS_INDEX_NAME, MANIFEST, MARK, CONTRACT, *(path.name for path in self.files)}
        for path in self.directory.iterdir():
            if path.is_file() and path.name not in left:
                shutil.copy2(path, out)


def open_merged(directory: Path, *, trust_remote_code: bool = False) -> Merged:
    """The merged model in a directory.

    Raises:
        ModelError: there is none, not all of it, an adapter, or a model that is quantised.

    """
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}")
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter: merge it first, with `python -m vlmtune.merge {directory} MERGED`")
    files = _files(directory)
    if not files or not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds no merged model: config.json and model.safetensors are expected")
    config = load_config(ModelSection(name=str(directory.absolute()), trust_remote_code=trust_remote_code))
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{directory} holds a model that is quantised already: export the merged model that it was made of")
    return Merged(directory, config, _recipe(directory), files, trust_remote_code)


def _files(directory: Path) -> tuple[Path, ...]:
    if not (directory / SAFE_WEIGHTS_INDEX_NAME).exists():
        return tuple(sorted(directory.glob("model*.safetensors")))
    names = sorted(set(json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(f"{directory} is not whole: {missing[0]} is missing")
    return tuple(directory / name for name in names)


def _recipe(directory: Path) -> Recipe | None:
    """The recipe that lies with the model, or with the run in whose directory it is."""
    for place in (directory, directory.parent):
        if (place / "recipe.yaml").exists() and (place == directory or (place / "adapter_config.json").exists()):
            return load_recipe(place / "recipe.yaml")
    return None
