"""The serving contract: what it says, that it is kept beside the model, and how servers are started by it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS
from PIL import Image

from vlmtune import Run, finetune
from vlmtune.collator import MultimodalCollator
from vlmtune.errors import ModelError
from vlmtune.model import read_processor
from vlmtune.serve import in_words
from vlmtune.serving import Serving, carry_serving, commands, copy_serving, digest, faults, read_serving, seen, write_serving

STOPS = {"qwen2_vl": "<|im_end|>", "mllama": "<|eot_id|>", "pixtral": "</s>", "text": "</s>"}
SIZES = {
    "qwen2_vl": {"longest_edge": 1568, "shortest_edge": 784},
    "mllama": {"height": 28, "width": 28},
    "pixtral": {"longest_edge": 64},
}


@pytest.fixture(params=STOPS)
def run(request: pytest.FixtureRequest, recipe: Callable[..., dict[str, Any]]) -> Run:
    changes = {"images.max_pixels": 1568} if request.param == "qwen2_vl" else {}
    return finetune(recipe(request.param, **{"train.max_steps": 1, "train.report_to": "none"}), **changes)


def test_every_run_leaves_its_contract(run: Run) -> None:
    found, kind = read_serving(run.adapter_dir), run.family.name
    assert (found.kind, found.name, found.model.family) == ("adapter", "run", kind)
    assert (found.model.name, found.model.dtype) == (run.recipe.model.name, "float32")
    assert [token.text for token in found.stop] == [STOPS[kind]]
    assert [token.id for token in found.stop] == [run.prompter.stop_token_id]
    assert found.pixels.get("size") == SIZES.get(kind)
    assert found.chat_template.sha256 == digest((run.adapter_dir / found.chat_template.file).read_text())
    assert found.context == (2048 if kind != "text" else run.model.config.max_position_embeddings)
    assert found.longest_row == max(run.prompter.lengths([run.train_rows[place] for place in range(8)]))
    assert (found.prompt, found.max_new_tokens, found.lora_rank) == ("Colour of {Product Name}?", 12, 8)
    processor = read_processor(found.model, run.family, run.adapter_dir)
    assert faults(found, run.adapter_dir, processor) == []
    again = MultimodalCollator(processor, run.family, train_on_inputs=True, chat_template=processor.chat_template)
    asked = run.train_rows.prompt(0)
    for name, values in run.prompter.prompts([asked]).items():
        assert again.prompts([asked])[name].tolist() == values.tolist()


# ---- one contract, read and carried


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory with nothing but a contract and a recipe."""
    (tmp_path / "adapter").mkdir()
    write_serving(tmp_path / "adapter", CONTRACT, tmp_path / "adapter")
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: {name: base}\n")
    return tmp_path / "adapter"


CONTRACT = Serving.model_validate(
    {
        "kind": "adapter",
        "name": "shop",
        "model": {"name": "Qwen/Qwen2-VL-7B-Instruct", "revision": "abc", "family": "qwen2_vl", "dtype": "bfloat16"},
        "lora_rank": 12,
        "pixels": {"size": {"shortest_edge": 3136, "longest_edge": 200704}, "patch_size": 14},
        "chat_template": {"sha256": "0" * 64},
        "tool_parser": None,
        "system": None,
        "prompt": None,
        "stop": [{"id": 151645, "text": "<|im_end|>"}],
        "bos": None,
        "context": 32768,
        "longest_row": 700,
        "max_new_tokens": 256,
    }
)


def test_a_merged_model_gets_contract_and_recipe_of_its_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    carry_serving(adapter, tmp_path / "partial", tmp_path / "merged")
    found = read_serving(tmp_path / "partial")
    model = CONTRACT.model.model_copy(update={"quantization": "none"})
    assert CONTRACT.model.quantization == "nf4"
    assert found == CONTRACT.model_copy(update={"kind": "merged", "lora_rank": None, "model": model})
    assert in_words(found)["computes in"] == "bfloat16"
    assert (tmp_path / "partial" / "recipe.yaml").read_text() == "model: {name: base}\n"
    lines = json.loads((tmp_path / "partial" / "serving.json").read_text())["commands"]
    assert lines["vlmtune"] == f"python -m vlmtune.serve {tmp_path / 'merged'}"


def test_a_merged_model_tells_the_base_and_the_dtype_that_were_chosen(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    carry_serving(adapter, tmp_path / "partial", tmp_path / "merged", base="/models/qwen", dtype="float16")
    model = read_serving(tmp_path / "partial").model
    assert (model.name, model.revision, model.dtype, model.quantization) == ("/models/qwen", None, "float16", "none")
    assert model.family == "qwen2_vl"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_copy_has_its_own_contract(adapter: Path, tmp_path: Path, quantization: Any) -> None:
    for name in ("merged", "partial"):
        (tmp_path / name).mkdir()
    carry_serving(adapter, tmp_path / "merged", tmp_path / "merged")
    copy_serving(tmp_path / "merged", tmp_path / "partial", tmp_path / "small", quantization=quantization)
    found = read_serving(tmp_path / "partial")
    assert (found.kind, found.model.quantization, found.model.revision) == ("merged", quantization, "abc")
    assert in_words(found)["computes in"] == f"bfloat16, {quantization}"
    lines = json.loads((tmp_path / "partial" / "serving.json").read_text())["commands"]
    assert lines["vlmtune"] == f"python -m vlmtune.serve {tmp_path / 'small'}"
    assert (tmp_path / "partial" / "recipe.yaml").exists()


def test_an_adapter_from_elsewhere_has_no_contract_to_carry(tmp_path: Path) -> None:
    for name in ("foreign", "partial"):
        (tmp_path / name).mkdir()
    carry_serving(tmp_path / "foreign", tmp_path / "partial", tmp_path / "merged")
    assert list((tmp_path / "partial").iterdir()) == []


def test_the_lines_that_start_servers_are_these(tmp_path: Path) -> None:
    shared = "--chat-template runs/my' 'shop/chat_template.jinja --chat-template-content-format openai"
    shared += " --generation-config runs/my' 'shop --override-generation-config '{\"temperature\": 0}'"
    directory = Path("runs/my shop")
    assert commands(CONTRACT, directory) == {
        "vlmtune": ["python", "-m", "vlmtune.serve", "runs/my shop"],
        "vllm": shlex.split(
            "vllm serve Qwen/Qwen2-VL-7B-Instruct --revision abc --tokenizer runs/my' 'shop --enable-lora --max-lora-rank 16 "
            "--lora-modules shop=runs/my' 'shop "
            """--mm-processor-kwargs '{"size": {"shortest_edge": 3136, "longest_edge": 200704}}' """
            f"--dtype bfloat16 --max-model-len 32768 {shared}"
        ),
    }
    merged = CONTRACT.model_copy(update={"kind": "merged", "tool_parser": "hermes"})
    assert commands(merged, directory) == {
        "vlmtune": ["python", "-m", "vlmtune.serve", "runs/my shop"],
        "transformers": ["transformers", "serve", "runs/my shop", "--dtype", "bfloat16"],
        "vllm": shlex.split(
            f"vllm serve runs/my' 'shop --served-model-name shop --dtype bfloat16 --max-model-len 32768 {shared} "
            "--enable-auto-tool-choice --tool-call-parser hermes"
        ),
    }


@pytest.mark.parametrize(("rank", "room"), [(1, "8"), (8, "8"), (9, "16"), (64, "64"), (300, "320"), (999, "512")])
def test_vllm_has_room_for_the_adapters_rank(rank: int, room: str) -> None:
    line = commands(CONTRACT.model_copy(update={"lora_rank": rank}), Path("a"))["vllm"]
    assert line[line.index("--max-lora-rank") + 1] == room


def test_remote_code_and_a_language_model_have_their_own_options(tmp_path: Path) -> None:
    trusting = CONTRACT.model.model_copy(update={"trust_remote_code": True, "revision": None})
    found = CONTRACT.model_copy(update={"kind": "merged", "model": trusting, "pixels": {}, "context": None})
    for server in ("vllm", "transformers"):
        assert commands(found, Path("a"))[server][-1] == "--trust-remote-code"
    assert commands(found, Path("a"))["vlmtune"] == ["python", "-m", "vlmtune.serve", "a", "--trust-remote-code"]
    line = shlex.join(commands(found, Path("a"))["vllm"])
    assert "--chat-template-content-format string" in line
    for option in ("--revision", "--max-model-len", "--mm-processor-kwargs"):
        assert option not in line


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no serving.json: name a run's directory or a merged model, as finetune and merge write them"),
        ("{", "is no contract of this version of vlmtune: invalid json"),
        ("{}", "is no contract of this version of vlmtune: `kind`: field required"),
        (json.dumps({**CONTRACT.model_dump(), "version": 2}), "`version`: input should be 1"),
        (b"\xff", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_contract_is_one_sentence(adapter: Path, content: Any, sentence: str) -> None:
    (adapter / "serving.json").unlink()
    if content is not None:
        (adapter / "serving.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        read_serving(adapter)
    assert sentence in str(caught.value)
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="there is no directory"):
        read_serving(adapter)


def test_what_is_seen_differs_with_a_pixel_and_not_with_the_words(checkpoint: Callable[[str], Path]) -> None:
    from tiny import make_processor

    collator = MultimodalCollator(make_processor("qwen2_vl"))

    def shown(picture: Image.Image, word: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": word}]
        return seen(collator.prompts([{"messages": [{"role": "user", "content": parts}]}]))

    red, other = Image.new("RGB", (56, 56), COLOURS["red"]), Image.new("RGB", (56, 56), COLOURS["red"])
    other.putpixel((3, 3), (0, 0, 0))
    assert shown(red, "a") == shown(red, "b b")
    assert shown(red, "a")["shapes"] == shown(other, "a")["shapes"] == {"image_grid_thw": [1, 3], "pixel_values": [16, 1176]}
    assert shown(red, "a")["digest"] != shown(other, "a")["digest"]
    assert seen({"input_ids": None, "attention_mask": None}) == {"shapes": {}, "digest": None, "mean": None}
