"""Memory that others measured on GPUs and published, beside what the simulation says of the same training.

    python benchmarks/anchors.py                # a table in the terminal, about four minutes on one core
    python benchmarks/anchors.py --only fms     # of sources whose name has it
    python benchmarks/anchors.py --markdown

Each training is stated as its source states it, and simulated by `vlmtune.planner.simulation` on the meta device: with
transformers' or TRL's trainer, and the loss of the versions that the source names. Nothing is fitted to any of these figures.
A source that does not say how it measured is compared with what it most probably did; where a setting is unknown, `why` says
so.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from pages import markdown, put
from rich.console import Console
from rich.table import Table
from stacks import Stack, as_then, padded, pictured, shifted_16_bit, shifted_copy, simulated
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from vlmtune.planner.allocator import replay
from vlmtune.planner.forecasting import CONTEXT_GIB
from vlmtune.planner.published import published_config
from vlmtune.planner.simulation import Outcome
from vlmtune.recipe import LoraSection

GIB, GB, MIB = 2**30, 10**9, 2**20
ALLOWED = 0.1  # of the published figure
UNITS = {GIB: "GiB", GB: "GB", MIB: "MiB"}

Measure = Literal["allocated", "whole process", "after training", "loaded", "failed request"]


@dataclass(frozen=True)
class Anchor:
    """A published figure, and the training of which it is."""

    source: str
    setting: str
    figure: float
    unit: int  # bytes
    measure: Measure
    config: Callable[[], Any]
    stack: Stack
    batch: Callable[[], dict[str, Any]]
    accumulates: bool = False
    card_gib: float | None = None  # its memory, where it ran out
    why: str = ""  # the difference
    billions: float = 7  # parameters


def text(rows: int, length: int) -> dict[str, Any]:
    """Rows of text, all of it trained on."""
    ids = torch.full((rows, length), 1000)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def picture(name: str, size: tuple[int, int], text_tokens: int) -> dict[str, Any]:
    """One row of a picture and text, all of the text trained on."""
    return padded(pictured(name, size=size, text_tokens=text_tokens, train_on_inputs=True), rows=1)


def llama(hidden: int, layers: int, heads: int, inner: int, vocabulary: int, *, key_heads: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads or heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def mistral_7b() -> MistralConfig:
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
    return MistralConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=4096,
        dtype="bfloat16",
    )


LLAMA_2_7B = partial(llama, 4096, 32, 32, 11008, 32000)
LLAMA_2_13B = partial(llama, 5120, 40, 40, 13824, 32000)
# Qwen's first models have the layers of LLaMA, with one matrix for queries, keys and values
# https://huggingface.co/Qwen/Qwen-7B/blob/main/config.json and those of 1.8B and 14B
QWEN = {
    "1.8B": partial(llama, 2048, 24, 16, 5504, 151936),
    "7B": partial(llama, 4096, 32, 32, 11008, 151936),
    "14B": partial(llama, 5120, 40, 40, 13696, 152064),
}


def chunked_16_bit(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Litgpt's loss: 128 positions at a time, in 16 bit.

    https://github.com/Lightning-AI/litgpt/blob/main/litgpt/utils.py (`chunked_cross_entropy`)
    """
    parts = zip(logits[0, :-1].split(128), labels[0, 1:].split(128), strict=True)
    return torch.stack([F.cross_entropy(part, wanted, reduction="sum") for part, wanted in parts]).sum() / labels.shape[1]


def fms() -> Iterator[Anchor]:
    # https://github.com/foundation-model-stack/fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb.csv
    lora = LoraSection(r=16, alpha=16, dropout=0.1, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    plain = Stack("", lora=lora, quantization="none", autocast=False, loss=shifted_copy)
    stacks = {
        "LoRA bf16": plain,
        "QLoRA as TRL 0.13 prepares it": replace(plain, quantization="nf4", norms_in_32_bit=True, autocast=True),
        "QLoRA, nothing cast": replace(plain, quantization="nf4"),
    }
    figures = {  # peak allocated, nvidia-smi in MiB, allocated after training
        ("LoRA bf16", 4): (26704571904, 29576, 14664493056),
        ("LoRA bf16", 8): (38742912512, 43232, 14664886272),
        ("QLoRA as TRL 0.13 prepares it", 4): (20669338112, 26056, 4307028992),
        ("QLoRA as TRL 0.13 prepares it", 8): (37002646016, 46050, 4307422208),
        ("QLoRA, nothing cast", 4): (16373838336, 19912, 4306496512),
        ("QLoRA, nothing cast", 8): (28412178944, 34016, 4306889728),
    }
    for (name, rows), (peak, smi, after) in figures.items():
        one = Anchor(
            "fms-acceleration",
            f"Mistral-7B, {name}, r 16 q k v o, {rows} × 4096 tokens, A100",
            peak / GIB,
            GIB,
            "allocated",
            mistral_7b,
            stacks[name],
            partial(text, rows, 4096),
        )
        yield one
        yield replace(one, figure=smi, unit=MIB, measure="whole process")
        if rows == 4:
            yield replace(one, figure=after / GIB, measure="after training")


def litgpt() -> Iterator[Anchor]:
    # https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md
    stack = Stack(
        "",
        quantization="none",
        adapters=torch.bfloat16,
        autocast=False,
        checkpointing=False,
        hooks=False,
        loss=chunked_16_bit,
        inputs_kept=True,
    )
    for name, config, billions, quantization, figure in (
        ("7B", LLAMA_2_7B, 7, "none", 21.30),
        ("7B", LLAMA_2_7B, 7, "nf4", 13.84),
        ("13B", LLAMA_2_13B, 13, "none", 38.12),
        ("13B", LLAMA_2_13B, 13, "nf4", 22.55),
    ):
        yield Anchor(
            "litgpt",
            f"Llama-2-{name}, {'QLoRA' if quantization == 'nf4' else 'LoRA bf16'}, r 8 q v, 1 × 1304 tokens, no checkpointing, "
            "A100",
            figure,
            GB,
            "allocated",
            config,
            replace(stack, quantization=quantization),
            partial(text, 1, 1304),
            billions=billions,
            why="litgpt's own modeling code; 1.1 and 1.7 GB are missing without quantisation too",
        )


def qwen() -> Iterator[Anchor]:
    # https://github.com/QwenLM/Qwen/blob/main/README.md, "Profiling of Memory and Speed"; finetune.py beside it
    lora = LoraSection(r=64, alpha=16, dropout=0.05, targets="all-linear")
    stack = Stack("", lora=lora, quantization="none", loss=shifted_16_bit)  # peft 0.5 makes adapters in 32 bit
    figures = {
        "1.8B": {256: 6.7, 512: 7.4, 1024: 8.4, 2048: 11.0, 4096: 16.2, 8192: 21.8},
        "7B": {256: 20.1, 512: 20.4, 1024: 21.5, 2048: 23.8, 4096: 29.7, 8192: 36.6},
        "14B": {256: 34.6, 512: 35.1, 1024: 35.3, 2048: 37.4, 4096: 42.5, 8192: 55.2},
    }
    for name, by_length in figures.items():
        for length, figure in by_length.items():
            yield Anchor(
                "Qwen's README",
                f"Qwen-{name}, LoRA bf16, r 64 all, 1 × {length} tokens, A100",
                figure,
                GIB,
                "whole process",
                QWEN[name],
                stack,
                partial(text, 1, length),
                accumulates=True,
                billions=float(name[:-1]),
                why="Qwen's own modeling code; how it was measured is not said. About 1 GiB is missing, 2 at 4096 tokens, "
                "which weighs more in a small model",
            )


def llama_factory() -> Iterator[Anchor]:
    # https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison
    lora = LoraSection(r=8, alpha=16, dropout=0.0, targets="all-linear")
    stack = Stack("", lora=lora, loss="upcast")
    for length, figure in {1024: 6, 2048: 7, 4096: 9, 8192: 12, 16384: 19, 32768: 32}.items():
        yield Anchor(
            "LLaMA-Factory's wiki",
            f"Llama-2-7B, QLoRA, r 8 all, 1 × {length} tokens, A100",
            figure,
            GIB,
            "whole process",
            LLAMA_2_7B,
            stack,
            partial(text, 1, length),
            accumulates=True,
            why="published in whole GB; how it was measured is not said",
        )


def trl_issue() -> Iterator[Anchor]:
    # https://github.com/huggingface/trl/issues/4347
    lora = LoraSection(r=16, alpha=16, dropout=0.05, targets="all-linear", scope="all")
    name = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    yield Anchor(
        "trl#4347",
        "Llama-3.2-11B-Vision, LoRA bf16, r 16 all, eager attention, 1 row: runs out of 80 GB; the request that failed",
        2.47,
        GIB,
        "failed request",
        partial(published_config, name),
        Stack("", lora=lora, quantization="none", attention="eager"),
        partial(picture, name, (1024, 1024), 378),
        card_gib=79.14,
        billions=11,
    )


def unsloth() -> Iterator[Anchor]:
    # https://github.com/unslothai/notebooks: "GB of memory reserved" before training
    lora = LoraSection(r=16, alpha=16, dropout=0.0, targets="all-linear", scope="all")
    for name, figure, billions in (
        ("mistral-community/pixtral-12b", 8.031, 12),
        ("Qwen/Qwen2-VL-7B-Instruct", 6.131, 7),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", 8.477, 11),
    ):
        yield Anchor(
            "unsloth's notebooks",
            f"{name.partition('/')[2]}, QLoRA r 16 all, loaded, T4",
            figure,
            GIB,
            "loaded",
            partial(published_config, name),
            Stack("", lora=lora),
            partial(picture, name, (256, 256), 100),
            billions=billions,
            why="reserved by the loader; unsloth leaves some modules of its checkpoint in 16 bit",
        )


def swift() -> Iterator[Anchor]:
    # https://github.com/modelscope/ms-swift/blob/main/examples/train/multimodal/grounding.sh and caption.sh
    name = "Qwen/Qwen2-VL-7B-Instruct"
    lora = LoraSection(r=8, alpha=32, dropout=0.05, targets="all-linear")
    for script, figure, size, tokens in (("grounding.sh", 20, (1120, 896), 200), ("caption.sh", 22, (640, 480), 100)):
        yield Anchor(
            f"ms-swift, {script}",
            f"Qwen2-VL-7B, LoRA bf16, r 8 all, 1 row with a picture of {size[0]} × {size[1]}",
            figure,
            GIB,
            "whole process",
            partial(published_config, name),
            Stack("", lora=lora, quantization="none"),
            partial(picture, name, size, tokens),
            accumulates=True,
            why=f"sizes are guessed ({tokens} tokens of text). A comment in a script, older than the model in it; grounding.sh "
            "says less for larger pictures",
        )


SOURCES = (fms, litgpt, qwen, llama_factory, trl_issue, unsloth, swift)


@dataclass(frozen=True)
class Found:
    """An anchor and what is simulated for it."""

    anchor: Anchor
    simulated: float  # in the anchor's unit

    @property
    def difference(self) -> float:
        return self.simulated / self.anchor.figure - 1


def in_bytes(anchor: Anchor, outcome: Outcome) -> float:
    """What corresponds to the published figure."""
    if anchor.measure == "allocated":
        return outcome.peak
    if anchor.measure == "whole process":
        return outcome.reserved + CONTEXT_GIB * GIB
    if anchor.measure in ("after training", "loaded"):
        not_yet = ("optimiser's states", "scratch") if anchor.measure == "loaded" else ()
        return sum(event.size for event in outcome.before if event.where is None or event.where.what not in not_yet)
    events = [*outcome.before, *outcome.events]
    assert anchor.card_gib is not None
    failed = replay([(event.number, event.size) for event in events], int((anchor.card_gib - CONTEXT_GIB) * GIB)).failed_at
    assert failed is not None
    return events[failed].size


def find(only: str) -> Iterator[Found]:
    """All anchors of sources that have `only` in their name; each training is simulated once."""
    known: dict[Any, Outcome] = {}
    for anchor in (anchor for source in SOURCES for anchor in source()):
        if only.lower() not in anchor.source.lower():
            continue
        key = anchor.source, anchor.setting
        if key not in known:
            batch = anchor.batch()  # first: a configuration that is made for it takes accelerate's state away from a trainer
            simulation = simulated(anchor.stack, anchor.config())
            with as_then(anchor.stack):
                known = {key: simulation.step(batch, accumulates=anchor.accumulates)}
        yield Found(anchor, in_bytes(anchor, known[key]) / anchor.unit)


HEADER = ("source", "training", "figure is", "published", "simulated", "difference", "why")


def lines(found: Iterable[Found]) -> Iterator[list[str]]:
    for one in found:
        anchor, unit = one.anchor, UNITS[one.anchor.unit]
        digits = 0 if anchor.unit == MIB else 2
        why = anchor.why if abs(one.difference) > ALLOWED else ""
        published = f"{anchor.figure:,.{digits}f} {unit}"
        simulated = f"{one.simulated:,.{digits}f} {unit}"
        difference = f"{one.difference:+.1%}".replace("-0.0%", "+0.0%")
        yield [anchor.source, anchor.setting, anchor.measure, published, simulated, difference, why]


def main(
    *,
    only: Annotated[str, typer.Option("--only", help="Sources that have this in their name.")] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown in place of the terminal's table.")] = False,
    write: Annotated[Path | None, typer.Option("--write", help="A page with a place for the table.")] = None,
) -> None:
    """Compares published memory figures with simulated ones."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start, found = time.perf_counter(), []
    for one in find(only):
        found.append(one)
        print(".", end="", file=sys.stderr, flush=True)
    within = sum(abs(one.difference) <= ALLOWED for one in found)
    large = [one for one in found if one.anchor.billions >= 7]
    of_large = sum(abs(one.difference) <= ALLOWED for one in large)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    summary = (
        f"{within} of {len(found)} figures are within 10 %, of models from 7B on {of_large} of {len(large)}. "
        f"Simulated with {names}."
    )
    page = markdown(HEADER, lines(found), words=3) + f"\n{summary}\n"
    if write:
        put(write, "anchors", page)
    elif as_markdown:
        print(page)
    else:
        table = Table(*HEADER)
        for line in lines(found):
            table.add_row(*line)
        console = Console()
        console.print(table)
        console.print(f"{summary} {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
