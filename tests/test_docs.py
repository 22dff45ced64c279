"""The pages do what they say: code runs, commands and links lead somewhere, every field of a recipe is explained."""

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel
from transformers import AutoProcessor

from vlmtune import Family, Recipe, load_recipe, merge_adapter
from vlmtune.plugins import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SMOLVLM = "HuggingFaceTB/SmolVLM-256M-Instruct"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def family_page(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Python of docs/adding-a-family.md: the family's file is importable, the rest runs beside a picture and rows."""
    family, *rest = blocks("docs/adding-a-family.md", "python")
    (tmp_path / "vlmtune_smolvlm.py").write_text(family)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "kite.png")
    row = {"prompt": "What is it?", "completion": "A kite.", "image": "kite.png"}
    (tmp_path / "kites.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vlmtune_smolvlm", raising=False)
    return [block.replace(SMOLVLM, str(checkpoint("smolvlm"))) for block in rest]


def test_page_about_families_runs(family_page: list[str]):
    names: dict[str, Any] = {}
    for block in family_page:
        exec(block, names)
    run = names["run"]
    assert run.family is names["FAMILY"]
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".text_model." in name for name in trained)


def test_entry_point_on_the_page_about_families_leads_to_the_family(family_page: list[str]):
    (toml,) = blocks("docs/adding-a-family.md", "toml")
    found = re.fullmatch(rf'\[project.entry-points."{FAMILIES}"\]\n(\w+) = "(.+)"\n', toml)
    assert found
    name, value = found.groups()
    family = EntryPoint(name, value, FAMILIES).load()
    assert isinstance(family, Family)
    assert family.name == name


def test_template_on_the_page_about_families_renders_as_the_checkpoint_s(
    family_page: list[str], checkpoint: Callable[[str], Path]
):
    from vlmtune_smolvlm import FAMILY  # type: ignore[import-not-found]

    processor = AutoProcessor.from_pretrained(checkpoint("smolvlm"))
    text = [{"type": "text", "text": "Hello."}]
    turns = [{"role": "system", "content": text}, {"role": "user", "content": [{"type": "image"}, *text]}]
    for messages, asks in ((turns, True), ([*turns, {"role": "assistant", "content": text}], False)):
        own, ours = (
            processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=asks)
            for template in (None, FAMILY.chat_template)
        )
        assert ours == own


def fields(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, default) of every field of a recipe; required ones have the default `...`."""
    found: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += fields(kind, f"{prefix}{name}.")
        else:
            found.append((prefix + name, ... if field.is_required() else field.default))
    return found


@pytest.mark.parametrize(("key", "default"), fields(Recipe))
def test_page_about_recipes_has_every_field_with_its_default(key: str, default: Any):
    page = (ROOT / "docs" / "recipes.md").read_text()
    row = re.search(rf"^\| `{re.escape(key)}` \|[^|]*\| (.*?) \|", page, re.MULTILINE)
    assert row, f"docs/recipes.md has no row for {key}"
    assert row[1] == ("required" if default is ... else f"`{json.dumps(default).replace(chr(34), '')}`")


def test_page_about_recipes_names_no_field_that_is_not_there():
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \|[^|]*\| (?:required|`.*?`) \|", page, re.MULTILINE)
    assert rows == [key for key, _ in fields(Recipe)]


@pytest.mark.parametrize("text", blocks("docs/recipes.md", "yaml"))
def test_recipes_on_the_page_about_recipes_load(text: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_and_recipes_that_are_named_exist(page: Path):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text()
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) <= set(targets)
    assert [name for name in re.findall(r"recipes/\w+\.yaml", text) if not (ROOT / name).exists()] == []


def test_python_of_the_readme_runs(
    checkpoint: Callable[[str], Path], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train, use = blocks("README.md", "python")
    rows = [{**json.loads(line), "Category": "Toys"} for line in colours.read_text().splitlines()]
    (colours.parent / "products.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model.name": str(checkpoint("qwen2_vl")),
        "data.source": str(colours.parent / "products.jsonl"),
        "data.eval_rows": 2,
        "eval.max_new_tokens": 4,
        "train.max_steps": 1,
        "train.tf32": False,  # needs a GPU
    }
    train = train.replace("recipes/", f"{ROOT}/recipes/").replace('{"data.eval_rows": 20}', repr(values))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("watch.png")
    names: dict[str, Any] = {}
    exec(train, names)
    assert isinstance(names["run"].compare().to_html(), str)
    merge_adapter("runs/qwen2vl_amazon", "merged/qwen2vl_amazon")
    exec(use, names)
    assert names["model"].config.model_type == "qwen2_vl"


def test_house_on_the_page_about_design_is_the_one_that_import_linter_keeps():
    contract, *_ = re.findall(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    layers = [layer.replace("vlmtune.", "") for layer in re.findall(r'"(.*?)"', contract)]
    (house,) = re.findall(r"^## The house\n\n```\n(.*?)^```$", (ROOT / "docs/design.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [line.partition("  ")[0] for line in house.splitlines()] == layers
