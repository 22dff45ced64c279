"""The serving contract: what a server has to do so that a tuned model is asked as it was trained.

`serving.json` lies beside every adapter and every merged model. `vlmtune.serve` keeps it, `vlmtune.parity` proves that a
running server does, and whoever serves with something else reads in it what to set.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmtune.errors import ModelError, one_line
from vlmtune.output import write_json
from vlmtune.recipe import ModelSection, Recipe

FILE = "serving.json"
RECIPE = "recipe.yaml"
TEMPLATE = "chat_template.jinja"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for
UNSAID = ("processor_class", "image_processor_type", "feature_extractor_type", "_processor_class", "_name_or_path")


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Template(Part):
    file: str = TEMPLATE
    sha256: str


class Token(Part):
    id: int
    text: str


class Serving(Part):
    """What `serving.json` holds; docs/serving.md explains each field."""

    version: Literal[1] = 1
    kind: Literal["adapter", "merged"]
    name: str  # by which clients ask for it
    model: ModelSection  # the base; of a merged model, what it was made from
    lora_rank: int | None  # of an adapter
    pixels: dict[str, Any]  # the image processor's settings; none of a language model
    chat_template: Template
    tool_parser: str | None  # vLLM's name of what reads this template's calls
    system: str | None  # the recipe's, for rows without one of their own: nobody adds it to a request
    prompt: str | None  # how the recipe writes a question from a row's columns
    stop: list[Token]  # generation ends at any of these; the trained one is among them
    bos: Token | None
    context: int | None  # tokens that the model has positions for
    longest_row: int | None  # tokens of the longest row that was trained
    max_new_tokens: int  # of an answer, unless a request says otherwise


def contract(
    recipe: Recipe,
    processor: Any,
    *,
    family: str,
    dtype: str,
    stop_ids: Sequence[int],
    context: int | None,
    longest_row: int | None = None,
) -> Serving:
    """The contract of an adapter.

    Args:
        recipe: it was trained by.
        processor: it was trained with, the chat template among it.
        family: name of the model family.
        dtype: in which the model computes, "bfloat16".
        stop_ids: where generation ends.
        context: tokens that the model has positions for.
        longest_row: tokens of the longest row that was trained.

    """
    tokenizer = getattr(processor, "tokenizer", processor)
    return Serving(
        kind="adapter",
        name=recipe.output_dir.absolute().name,
        model=recipe.model.model_copy(update={"family": family, "dtype": dtype}),
        lora_rank=recipe.lora.r,
        pixels=pixels(processor),
        chat_template=Template(sha256=digest(processor.chat_template)),
        tool_parser=_tool_parser(processor.chat_template),
        system=recipe.data.system,
        prompt=recipe.data.prompt,
        stop=[_token(tokenizer, number) for number in stop_ids],
        bos=_token(tokenizer, tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else None,
        context=context,
        longest_row=longest_row,
        max_new_tokens=recipe.eval.max_new_tokens,
    )


def write_serving(partial: Path, found: Serving, directory: Path) -> None:
    """Writes `serving.json` into `partial`, which is to become `directory`."""
    lines = {server: shlex.join(arguments) for server, arguments in commands(found, directory).items()}
    write_json(partial / FILE, {**found.model_dump(), "commands": lines})


def carry_serving(
    adapter_dir: Path, partial: Path, directory: Path, *, base: str | None = None, dtype: str | None = None
) -> None:
    """Gives a merged model the contract and the recipe of its adapter; nothing where the adapter has none.

    Args:
        adapter_dir: a run's directory, or any PEFT adapter.
        partial: where the merged model is written; the processor is there already.
        directory: what `partial` is to become.
        base: hub id or directory of the base that was merged, if it is another than the adapter's.
        dtype: of the merged weights, if it is another than the trained one.

    """
    changes: dict[str, Any] = {"quantization": "none"}
    changes |= {"name": base, "revision": None} if base is not None else {}
    changes |= {"dtype": dtype} if dtype is not None else {}
    _carry(adapter_dir, partial, directory, changes)


def copy_serving(source_dir: Path, partial: Path, directory: Path, *, quantization: Literal["nf4", "int8"]) -> None:
    """Gives a quantised copy of a merged model its contract and recipe; nothing where that has none.

    Args:
        source_dir: the merged model.
        partial: where the copy is written.
        directory: what `partial` is to become.
        quantization: of the copy's files, which `from_pretrained` reads as they are.

    """
    _carry(source_dir, partial, directory, {"quantization": quantization})


def _carry(source: Path, partial: Path, directory: Path, changes: Mapping[str, Any]) -> None:
    if (source / RECIPE).exists():
        shutil.copyfile(source / RECIPE, partial / RECIPE)
    if (source / FILE).exists():
        found = read_serving(source)
        model = found.model.model_copy(update=changes)
        merged = found.model_copy(update={"kind": "merged", "lora_rank": None, "model": model})
        write_serving(partial, merged, directory)


def read_serving(directory: Path, *, base: str | None = None) -> Serving:
    """The contract in a directory.

    Args:
        directory: a run's, or a merged model's.
        base: hub id or directory of the base, if it is no longer where it was trained.

    Raises:
        ModelError: there is none, or it cannot be read.

    """
    path = directory / FILE
    try:
        found = Serving.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"{directory} has no {FILE}" if directory.is_dir() else f"there is no directory {directory}"
        raise ModelError(f"{what}: name a run's directory or a merged model, as finetune and merge write them") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"`{place}`: {error.errors()[0]['msg'].lower()}" if place else error.errors()[0]["msg"].lower()
        raise ModelError(f"{path} is no contract of this version of vlmtune: {reason}") from None
    if base is None:
        return found
    return found.model_copy(update={"model": found.model.model_copy(update={"name": base, "revision": None})})


def faults(found: Serving, directory: Path, processor: Any) -> list[str]:
    """What in a directory is no longer as its contract says: other template, other pixels, a stop token that is missing."""
    wrong: list[str] = []
    if digest(processor.chat_template) != found.chat_template.sha256:
        wrong.append(f"{found.chat_template.file} is another chat template than the one that was trained")
    now = pixels(processor)
    other = [name for name in sorted(now.keys() | found.pixels.keys()) if now.get(name) != found.pixels.get(name)]
    wrong += [f"the image processor's {name} is {now.get(name)}, trained was {found.pixels.get(name)}" for name in other]
    ends = _ends(directory / "generation_config.json")
    missing = [token.text for token in found.stop if token.id not in ends]
    if missing:
        wrong.append(f"generation_config.json does not stop at {', '.join(missing)}")
    return wrong


def commands(found: Serving, directory: Path) -> dict[str, list[str]]:
    """How servers are started with this contract, each a list of arguments, by the server's name.

    https://docs.vllm.ai/en/stable/cli/serve.html
    """
    own, trust = str(directory), ["--trust-remote-code"] if found.model.trust_remote_code else []
    started = {
        "vlmtune": ["python", "-m", "vlmtune.serve", own, *trust],
        "vllm": ["vllm", "serve", *_vllm(found, directory), *trust],
    }
    if found.kind == "merged":  # transformers' own loads no adapter with the processor beside it
        started["transformers"] = ["transformers", "serve", own, "--dtype", found.model.dtype, *trust]
    return started


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pixels(processor: Any) -> dict[str, Any]:
    """The settings by which an image processor makes pixels, as JSON has them."""
    if not hasattr(processor, "image_processor"):
        return {}
    settings = json.loads(processor.image_processor.to_json_string())
    return {name: value for name, value in settings.items() if value is not None and name not in UNSAID}


def seen(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown to a model beside the tokens of one prompt: names and shapes, a digest, and the pixels' mean.

    Args:
        batch: of one prompt, as the processor made it.

    """
    from vlmtune.batch import OF_TOKENS  # torch, which is not needed to read a contract

    shown = {name: batch[name] for name in sorted(batch) if name not in (*OF_TOKENS, "cross_attention_mask")}
    found = hashlib.blake2b(digest_size=16)
    for values in shown.values():
        found.update(values.contiguous().numpy().tobytes())
    shapes = {name: list(values.shape) for name, values in shown.items()}
    mean = round(float(shown["pixel_values"].float().mean()), 6) if "pixel_values" in shown else None
    return {"shapes": shapes, "digest": found.hexdigest() if shown else None, "mean": mean}


def _vllm(found: Serving, directory: Path) -> list[str]:
    """Arguments of `vllm serve`: whatever it would else take from the base or leave to its own defaults."""
    arguments = [str(directory), "--served-model-name", found.name]
    if found.kind == "adapter":
        rank = next((rank for rank in LORA_RANKS if rank >= (found.lora_rank or 0)), LORA_RANKS[-1])
        arguments = [found.model.name, *(["--revision", found.model.revision] if found.model.revision else [])]
        arguments += ["--tokenizer", str(directory), "--enable-lora", "--max-lora-rank", str(rank)]
        arguments += ["--lora-modules", f"{found.name}={directory}"]
        if "size" in found.pixels:  # of a merged model they are read from its own directory
            arguments += ["--mm-processor-kwargs", json.dumps({"size": found.pixels["size"]})]
    arguments += ["--dtype", found.model.dtype]
    if found.context:
        arguments += ["--max-model-len", str(found.context)]
    content = "openai" if found.pixels else "string"
    arguments += ["--chat-template", str(directory / TEMPLATE), "--chat-template-content-format", content]
    arguments += ["--generation-config", str(directory), "--override-generation-config", json.dumps({"temperature": 0})]
    if found.tool_parser:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", found.tool_parser]
    return arguments


def _tool_parser(chat_template: str) -> str | None:
    """Qwen2.5 and many after it write calls as Hermes did: JSON between `<tool_call>` and `</tool_call>`."""
    return "hermes" if "<tool_call>" in chat_template and "<function=" not in chat_template else None


def _ends(path: Path) -> list[int]:
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        return []
    return ends if isinstance(ends, list) else [ends]


def _token(tokenizer: Any, number: int) -> Token:
    return Token(id=number, text=str(tokenizer.convert_ids_to_tokens(number)))
