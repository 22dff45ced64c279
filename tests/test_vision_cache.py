"""A frozen tower looks at each picture once: what is kept trains to the same losses, and is never another tower's."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from tiny import KINDS
from torch import Tensor
from transformers import AutoProcessor

from vlmtune import RecipeError, finetune, load_recipe, vision_cache
from vlmtune.collator import MultimodalCollator
from vlmtune.console import console
from vlmtune.data import load_data
from vlmtune.families import Family, find_family
from vlmtune.features import FeatureStore
from vlmtune.model import load_config, load_processor
from vlmtune.recipe import DataSection
from vlmtune.result import Run
from vlmtune.trainer import Trainer

MakeRecipe = Callable[..., dict[str, Any]]
SEEING = (*KINDS, "qwen2_5_vl", "smolvlm")
EPOCHS = {"train.max_steps": 5, "train.per_device_train_batch_size": 4, "train.save_strategy": "no"}  # 8 rows: two and a half
OVERHEAD = 2  # pictures that are encoded besides: one to know the size of all, one to try the features out


def longer(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def losses(run: Run) -> list[float]:
    return [entry[name] for entry in run.history for name in ("loss", "eval_loss") if name in entry]


def kept(directory: Path) -> list[str]:
    """Keys of all features in a directory for one tower."""
    return sorted(key for file in directory.glob("*.safetensors") for key in load_file(file))


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one: what lies in the user's own would be found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "vlmtune" / "features"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows like those of conftest.py, of pictures that a model can tell apart."""
    directory = tmp_path_factory.mktemp("noise")
    lines: list[str] = []
    for number, name in enumerate(["red", "green", "blue", "white", "black", "yellow", "pink", "grey"]):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 40 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "Product Name": f"Thing {number % 2}", "description": name}))
    (directory / "train.jsonl").write_text("\n".join(lines))
    return directory / "train.jsonl"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "features"


def on_disk(cache: Path) -> dict[str, Any]:
    return {"mode": "disk", "directory": str(cache)}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """`said()`: what the table said of the cache since it was last asked."""
    monkeypatch.setattr(console, "width", 500)  # no sentence is folded

    def line() -> str:
        lines = capsys.readouterr().out.splitlines()
        (found,) = [line.split("│")[2].strip() for line in lines if "vision cache" in line]
        return found

    return line


def counting(recipe: Mapping[str, Any]) -> tuple[Family, list[int]]:
    """The recipe's family, and how many pictures it is asked to encode in each call."""
    encoded: list[int] = []
    own = find_family(config=load_config(load_recipe(recipe).model))

    class Counting(type(own)):  # type: ignore[misc]
        def encode(self, core: Any, batch: Mapping[str, Any]) -> list[Tensor]:
            features = super().encode(core, batch)
            encoded.append(len(features))
            return features

    return Counting(**{entry.name: getattr(own, entry.name) for entry in fields(own)}), encoded


def at_first_step(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Any], None]) -> None:
    """Has something happen when training begins."""
    step = Trainer.training_step

    def first(self: Trainer, model: Any, *args: Any) -> Any:
        monkeypatch.setattr(Trainer, "training_step", step)
        happens(model)
        return step(self, model, *args)

    monkeypatch.setattr(Trainer, "training_step", first)


# ---- the same losses


@pytest.mark.parametrize(
    ("kind", "packing"),
    [*((kind, "auto") for kind in SEEING), ("qwen2_vl", "off"), *(longer(kind, "off") for kind in SEEING[1:])],
)
def test_kept_features_train_to_the_losses_of_pixels(recipe: MakeRecipe, cache: Path, kind: str, packing: str) -> None:
    settings = {**EPOCHS, "packing": packing, "data.eval_rows": 2, "train.eval_strategy": "epoch", "eval.samples": 0}
    off, memory, disk = (
        losses(finetune(recipe(kind, **settings, vision_cache=mode), overwrite=True))
        for mode in ("off", "memory", on_disk(cache))
    )
    assert len(off) == 5 + 3  # six rows to train on, two steps an epoch
    assert memory == pytest.approx(off, rel=1e-5)
    assert disk == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl", longer("mllama"), longer("pixtral")])
def test_kept_features_train_to_the_losses_of_pixels_on_four_bits_in_bfloat16(recipe: MakeRecipe, kind: str) -> None:
    settings = {**EPOCHS, "model.quantization": "nf4", "model.dtype": "bfloat16"}
    off, memory = (losses(finetune(recipe(kind, **settings, vision_cache=mode), overwrite=True)) for mode in ("off", "memory"))
    assert memory == pytest.approx(off, rel=1e-2)


@pytest.mark.parametrize("kind", [*KINDS, longer("qwen2_5_vl"), longer("smolvlm")])
def test_rows_with_two_one_and_no_pictures_train_the_same(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    lines: list[str] = []
    for number in range(8):
        names = [f"{number}-{place}.png" for place in range((1, 2, 0)[number % 3])]
        for place, name in enumerate(names):
            Image.new("RGB", (30 + 25 * place, 40), (30 * number, 99, 120 * place)).save(tmp_path / name)
        parts = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": f"It is {number}."}
        lines.append(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {"source": str(tmp_path / "rows.jsonl"), "format": "openai"}
    off, memory = (
        losses(finetune(recipe(kind, data=data, **EPOCHS, vision_cache=mode), overwrite=True)) for mode in ("off", "memory")
    )
    assert memory == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("workers", [1])
def test_worker_processes_of_the_data_loader_read_the_features(recipe: MakeRecipe, cache: Path, workers: int) -> None:
    off, disk = (
        losses(finetune(recipe(**EPOCHS, **{"train.dataloader_num_workers": workers}, vision_cache=mode), overwrite=True))
        for mode in ("off", on_disk(cache))
    )
    assert disk == pytest.approx(off, rel=1e-5)


# ---- once


@pytest.mark.parametrize("kind", [*KINDS, longer("qwen2_5_vl"), longer("smolvlm")])
def test_each_picture_is_encoded_once_and_by_a_second_run_never(
    recipe: MakeRecipe, cache: Path, kind: str, said: Callable[[], str]
) -> None:
    settings = recipe(kind, **EPOCHS, **{"data.eval_rows": 2, "eval.samples": 0}, vision_cache=on_disk(cache))
    family, encoded = counting(settings)
    first = finetune(settings, family=family)
    assert sum(encoded) == 8 + OVERHEAD
    (directory,) = cache.iterdir()
    assert len(set(kept(directory))) == len(kept(directory)) == 8
    assert said().startswith("disk: 8 pictures, ")
    encoded.clear()
    second = finetune(settings, family=family, overwrite=True)
    assert sum(encoded) == 0
    assert said().startswith("disk: 8 pictures, 8 known before, ")
    assert losses(second) == losses(first)
    assert len(list(directory.iterdir())) == 1


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama"])
def test_the_size_of_all_features_is_told_from_those_of_one_picture(
    recipe: MakeRecipe, cache: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for number, size in enumerate([(28, 28), (56, 28), (56, 56), (28, 112), (28, 56)]):  # of 1, 2, 4, 4 and 2 tiles
        Image.new("RGB", size, (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": f"It is {number}."}
        lines.append(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    told: list[int] = []
    size_of = vision_cache._size
    monkeypatch.setattr(vision_cache, "_size", lambda *given: told.append(size_of(*given)) or told[-1])
    finetune(recipe(kind, data={"source": str(tmp_path / "rows.jsonl"), "format": "openai"}, vision_cache=on_disk(cache)))
    (directory,) = cache.iterdir()
    assert told == [FeatureStore(directory).nbytes]


def test_a_picture_that_stands_in_many_rows_is_encoded_once(recipe: MakeRecipe, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours.parent, tmp_path / "twice")
    lines = [json.loads(line) for line in colours.read_text().splitlines()]
    shutil.copy(colours.parent / "red.png", tmp_path / "twice" / "also red.png")
    twice = [{**lines[0], "image": "also red.png"}, *lines[:3], *lines[:3]]
    (tmp_path / "twice" / "train.jsonl").write_text("\n".join(map(json.dumps, twice)))
    settings = recipe(**EPOCHS, **{"data.source": str(tmp_path / "twice" / "train.jsonl")}, vision_cache="memory")
    family, encoded = counting(settings)
    finetune(settings, family=family)
    assert sum(encoded) == 3 + OVERHEAD


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "memory") for kind in SEEING), ("qwen2_vl", "disk"), *(longer(kind, "disk") for kind in SEEING[1:])],
)
def test_once_training_begins_no_picture_is_read_and_no_tower_runs(
    recipe: MakeRecipe, colours: Path, tmp_path: Path, cache: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(colours.parent, tmp_path / "data")
    looked: list[str] = []

    def blindfold(model: Any) -> None:
        for picture in (tmp_path / "data").glob("*.png"):
            picture.unlink()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in {"visual", "vision_tower", "vision_model"}:
                module.register_forward_hook(lambda *_: looked.append("looked"))
                looked.append(name)

    at_first_step(monkeypatch, blindfold)
    settings = {**EPOCHS, "data.eval_rows": 2, "eval.samples": 0, "train.report_to": "none"}
    settings |= {"data.source": str(tmp_path / "data" / "train.jsonl")}
    run = finetune(recipe(kind, **settings, vision_cache={**on_disk(cache), "mode": mode}))
    assert len(losses(run)) == 5 + 3
    assert len(looked) == 1
    assert "looked" not in looked


# ---- another tower, another setting


def test_other_pixel_settings_other_weights_and_another_dtype_share_nothing(
    recipe: MakeRecipe, checkpoint: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    (patches,) = [name for name in weights if "patch_embed" in name]
    weights[patches][0, 0] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for directories, settings in enumerate(
        [
            {},
            {"images.max_pixels": 28 * 28 * 2},
            {"model.dtype": "bfloat16"},
            {"model.name": str(tmp_path / "other")},
        ],
        start=1,
    ):
        asked = recipe(**EPOCHS, **settings, vision_cache=on_disk(cache))
        family, encoded = counting(asked)
        finetune(asked, family=family, overwrite=True)
        assert sum(encoded) == 8 + OVERHEAD
        assert len(list(cache.iterdir())) == directories


def test_other_adapters_and_the_same_tower_in_four_bits_share_the_features(recipe: MakeRecipe, cache: Path) -> None:
    for settings in ({}, {"lora.r": 4}, {"model.quantization": "nf4"}):
        finetune(recipe(**settings, vision_cache=on_disk(cache)), overwrite=True)
    (directory,) = cache.iterdir()
    assert len(kept(directory)) == 8


@pytest.mark.parametrize(
    ("kind", "section", "key", "value"),
    [
        ("pixtral", None, "vision_feature_layer", -2),
        longer("pixtral", "vision_config", "hidden_act", "relu"),
        ("qwen2_5_vl", "vision_config", "fullatt_block_indexes", [0]),
    ],
)
def test_the_same_weights_under_another_config_share_nothing(
    recipe: MakeRecipe,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    cache: Path,
    kind: str,
    section: str,
    key: str,
    value: Any,
) -> None:
    shutil.copytree(checkpoint(kind), tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config)[key] = value
    path.write_text(json.dumps(config))
    finetune(recipe(kind, **EPOCHS, vision_cache=on_disk(cache)))
    other = {**EPOCHS, "model.name": str(tmp_path / "other")}
    off, disk = (losses(finetune(recipe(kind, **other, vision_cache=m), overwrite=True)) for m in ("off", on_disk(cache)))
    assert disk == pytest.approx(off, rel=1e-5)
    assert len(list(cache.iterdir())) == 2


# ---- off, or refused


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("scope", ["vision", "all"])
def test_features_of_a_tower_that_is_trained_are_refused(recipe: MakeRecipe, scope: str, mode: str) -> None:
    sentence = rf"^`vision_cache` is {mode}, and the vision tower is trained \(`lora.scope` is {scope}\)$"
    with pytest.raises(RecipeError, match=sentence):
        finetune(recipe(**{"lora.scope": scope}, vision_cache=mode))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_features_for_a_text_model_are_refused(recipe: MakeRecipe, mode: str) -> None:
    with pytest.raises(RecipeError, match=f"^`vision_cache` is {mode}, and the model takes no pictures$"):
        finetune(recipe("text", vision_cache=mode))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_features_beside_a_collator_of_one_s_own_are_refused(recipe: MakeRecipe, mode: str) -> None:
    collator = MultimodalCollator(load_processor(load_recipe(recipe()))[0])
    with pytest.raises(RecipeError, match=f"^`vision_cache: {mode}` is for vlmtune's collator, and you pass one of your own"):
        finetune(recipe(vision_cache=mode), collator=collator)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_features_larger_than_the_budget_are_refused(recipe: MakeRecipe, cache: Path, mode: str) -> None:
    sentence = f"^`vision_cache` is {mode}, and the features take .* MiB where the budget is .*: raise vision_cache.budget"
    with pytest.raises(RecipeError, match=sentence):
        finetune(recipe(vision_cache={"mode": mode, "budget": 1e-6, "directory": str(cache)}))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("qwen2_vl", {"train.max_steps": -1, "train.num_train_epochs": 1}, "off: the run goes through the pictures once"),
        ("qwen2_vl", {"train.max_steps": 2}, "off: the run goes through the pictures once"),
        ("qwen2_vl", {**EPOCHS, "lora.scope": "all"}, "off: the vision tower is trained (`lora.scope` is all)"),
        ("text", EPOCHS, "off: the model takes no pictures"),
        ("qwen2_vl", {**EPOCHS, "vision_cache": {"budget": 1e-6}}, "off: the features would take 0.0 MiB, and the budget is "),
        ("qwen2_vl", {**EPOCHS, "vision_cache": "off"}, "off"),
        ("qwen2_vl", {**EPOCHS, "vision_cache": False}, "off"),
        ("qwen2_vl", {**EPOCHS, "data.images": [], "data.prompt": "Colour?"}, "off: no row has a picture"),
        ("qwen2_vl", EPOCHS, "memory: 8 pictures, "),
        ("qwen2_vl", {"train.max_steps": -1, "train.num_train_epochs": 2}, "memory: 8 pictures, "),
    ],
)
def test_the_table_says_what_auto_decided_and_why(
    recipe: MakeRecipe,
    user_cache: Path,
    kind: str,
    settings: dict[str, Any],
    reason: str,
    said: Callable[[], str],
) -> None:
    finetune(recipe(kind, **settings))
    assert said().startswith(reason)
    assert not user_cache.exists()


def test_features_lie_in_the_user_s_cache_unless_told_otherwise(recipe: MakeRecipe, user_cache: Path) -> None:
    finetune(recipe(vision_cache="disk"))
    (directory,) = user_cache.iterdir()
    assert len(kept(directory)) == 8


def test_off_is_what_yaml_reads_it_as(recipe: MakeRecipe, tmp_path: Path) -> None:
    text = load_recipe(recipe(vision_cache="off")).to_yaml()
    assert load_recipe(recipe(vision_cache=False)).to_yaml() == text
    plain = tmp_path / "recipe.yaml"
    plain.write_text("model: {name: m}\ndata: {source: d}\nvision_cache: off\npacking: off\n")
    assert (load_recipe(plain).vision_cache.mode, load_recipe(plain).packing.mode) == ("off", "off")


def test_auto_reads_what_lies_on_the_disk_already(recipe: MakeRecipe, cache: Path, said: Callable[[], str]) -> None:
    finetune(recipe(**EPOCHS, vision_cache=on_disk(cache)))
    said()
    finetune(recipe(vision_cache={"directory": str(cache)}), overwrite=True)  # one epoch only
    assert said().startswith("disk: 8 pictures, 8 known before, ")


def test_auto_is_off_beside_a_collator_of_one_s_own(recipe: MakeRecipe, said: Callable[[], str]) -> None:
    finetune(recipe(), collator=MultimodalCollator(load_processor(load_recipe(recipe()))[0]))
    assert said() == "off: a collator of your own"


class Deceptive(Family):
    """A family whose features are not what the language model sees."""

    def encode(self, core: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        return [-feature for feature in super().encode(core, batch)]


def test_features_that_change_what_the_model_sees_are_told(recipe: MakeRecipe, said: Callable[[], str]) -> None:
    own = find_family("qwen2_vl")
    family = Deceptive(**{entry.name: getattr(own, entry.name) for entry in fields(own)})
    finetune(recipe(**EPOCHS), family=family)
    assert said() == "off: features in place of pixels change what the model sees"
    with pytest.raises(RecipeError, match="features in place of pixels change what the model sees"):
        finetune(recipe(**EPOCHS, vision_cache="memory"), family=family, overwrite=True)


# ---- damage


@pytest.mark.parametrize("hurt", [b"\xff" * 40, None], ids=["nonsense", "cut"])
def test_a_damaged_file_is_left_aside_and_its_pictures_encoded_again(
    recipe: MakeRecipe, cache: Path, said: Callable[[], str], hurt: bytes | None
) -> None:
    settings = recipe(**EPOCHS, vision_cache=on_disk(cache))
    family, encoded = counting(settings)
    first = finetune(settings, family=family)
    said()
    encoded.clear()
    (file,) = cache.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-100] if hurt is None else hurt)
    second = finetune(settings, family=family, overwrite=True)
    assert sum(encoded) == 8 + OVERHEAD
    assert said().endswith(", 1 damaged files left aside")
    assert losses(second) == losses(first)


def test_a_file_that_is_deleted_during_the_run_costs_time_and_no_row(
    recipe: MakeRecipe, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(_: Any) -> None:
        for file in cache.glob("*/*.safetensors"):
            file.unlink()

    wanted = losses(finetune(recipe(**EPOCHS, vision_cache="off")))
    at_first_step(monkeypatch, delete)
    run = finetune(recipe(**EPOCHS, vision_cache=on_disk(cache)), overwrite=True)
    assert losses(run) == pytest.approx(wanted, rel=1e-5)


KILLED = """
import os, signal, sys
from dataclasses import fields
from vlmtune import finetune, vision_cache
from vlmtune.families import find_family

vision_cache.WRITTEN_AT_ONCE = 1  # every picture is a file
own, encoded = find_family("qwen2_vl"), []

class Mortal(type(own)):
    def encode(self, core, batch):
        encoded.append(batch)
        if len(encoded) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(core, batch)

known = {entry.name: getattr(own, entry.name) for entry in fields(own)}
finetune(sys.argv[1], family=Mortal(**known | {"pictures_at_once": 1}))
"""


def test_a_run_that_is_killed_while_it_encodes_leaves_what_it_had_to_the_next(
    recipe: MakeRecipe, tmp_path: Path, cache: Path, said: Callable[[], str]
) -> None:
    settings = recipe(**EPOCHS, vision_cache=on_disk(cache))
    (tmp_path / "recipe.yaml").write_text(load_recipe(settings).to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (directory,) = cache.iterdir()
    before = kept(directory)
    assert 1 <= len(before) < 8
    family, encoded = counting(settings)
    run = finetune(settings, family=family, overwrite=True)
    assert sum(encoded) == 8 - len(before)
    assert f", {len(before)} known before, " in said()
    assert losses(run) == losses(finetune(settings, overwrite=True))
    assert len(kept(directory)) == 8


# ---- afterwards


@pytest.mark.parametrize("kind", ["mllama", longer("qwen2_vl"), longer("pixtral")])
def test_new_pictures_are_looked_at_after_a_run_on_kept_features(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (64, 44), (90, 10, 200)).save(tmp_path / "new.png")
    row = {"image": str(tmp_path / "new.png"), "Product Name": "Kite", "description": "violet"}
    settings = {**EPOCHS, "train.max_steps": 15}
    pixels, features = (finetune(recipe(kind, **settings, vision_cache=mode), overwrite=True) for mode in ("off", "memory"))
    assert features.generate(row) == pixels.generate(row)
    new, known = features.compare([row]).rows[0], features.compare().rows
    assert new.tuned == features.generate(row)
    assert [answered.tuned for answered in known] == [answered.tuned for answered in pixels.compare().rows]


def test_pictures_that_are_bytes_in_a_file_are_not_gathered_in_memory(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 200, 200, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(noise) for noise in pixels], "q": ["?"] * 40, "a": ["!"] * 40}  # 120 kB each
    features = Features({"image": ImageFeature(), "q": Value("string"), "a": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    split = load_data(DataSection(source=str(tmp_path / "rows.parquet"), prompt="{q}", response="{a}", images="image"))
    collator = MultimodalCollator(AutoProcessor.from_pretrained(checkpoint("qwen2_vl")))
    tracemalloc.start()
    found, uses = vision_cache._distinct(collator, [split.train])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(found), uses) == (40, 40)
    assert peak < 2e6, "of 4.8 MB of pictures"


# ---- two processes


TWO = """
import os, sys, time
from dataclasses import fields
from vlmtune import finetune, vision_cache
from vlmtune.families import find_family

look_through = vision_cache._distinct

def slowly(*args):  # by then the first process has encoded its own
    found = look_through(*args)
    time.sleep(4 * int(os.environ["RANK"]))
    return found

vision_cache._distinct = slowly

own, encoded = find_family("qwen2_vl"), []

class Counting(type(own)):
    def encode(self, core, batch):
        features = super().encode(core, batch)
        encoded.append(len(features))
        return features

finetune(sys.argv[1], family=Counting(**{entry.name: getattr(own, entry.name) for entry in fields(own)}))
with open(f"{sys.argv[2]}-{os.environ['RANK']}", "w") as file:
    file.write(str(sum(encoded)))
"""


def test_two_processes_encode_half_of_the_pictures_each_and_train_like_one(
    recipe: MakeRecipe, tmp_path: Path, cache: Path
) -> None:
    one = finetune(recipe(**EPOCHS, vision_cache="off", **{"train.output_dir": str(tmp_path / "one")}))
    settings = {**EPOCHS, "train.per_device_train_batch_size": 2, "train.output_dir": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(load_recipe(recipe(**settings, vision_cache=on_disk(cache))).to_yaml())
    (tmp_path / "two.py").write_text(TWO)
    done = in_two_processes(tmp_path / "two.py", tmp_path / "two.yaml", tmp_path / "encoded")
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "two" / "history.json").read_text())["log"]
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(losses(one), rel=1e-3)
    (directory,) = cache.iterdir()
    assert len(kept(directory)) == len(set(kept(directory))) == 8
    assert [int((tmp_path / f"encoded-{rank}").read_text()) for rank in (0, 1)] == [4 + OVERHEAD] * 2
