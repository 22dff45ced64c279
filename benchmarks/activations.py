"""What norms and MLPs that keep less save of a 24 GB card's memory, and what they cost on this CPU.

OMP_NUM_THREADS=1 python benchmarks/activations.py   # two minutes
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
from clock import milliseconds
from memory_table import CARDS, MODELS, ROWS_PER_STEP, TEXT_TOKENS
from pages import markdown
from stacks import pictured_recipe
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from vlmtune.activations import keep_less
from vlmtune.plan.cards import seconds
from vlmtune.plan.forecast import Forecast
from vlmtune.planner.forecasting import Forecaster
from vlmtune.planner.material import read_material

SIDE = 500  # px of a square picture
TOKENS = 1300
WIDTHS = {"an eighth of Qwen2-VL-7B": (448, 2368), "a quarter": (896, 4736), "Qwen2-VL-7B": (3584, 18944)}  # hidden, MLP


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    header = ["model", "rows", "activations, GiB", "less", "needed, GiB", "rows/s on L4"]
    print(markdown(header, on_a_card(), words=1))
    print(markdown(["width", "norm, ms", "MLP's gate, ms"], on_this_cpu(), words=1))


def on_a_card() -> Iterator[list[str]]:
    """Of each model and so many rows at once, nothing recomputed: as transformers has them → as they are here."""
    for model, (name, _) in MODELS.items():
        for rows in (2, 4):  # with one, filling the cache needs more of Llama-3.2-Vision
            plain, lean = (forecast(name, rows, how) for how in (patch("vlmtune.model.keep_less"), nullcontext()))
            kept = [found.memory.breakdown["text activations"] for found in (plain, lean)]
            needed = [found.memory.needed_gib for found in (plain, lean)]
            speeds = [ROWS_PER_STEP / seconds(found.work, CARDS[0]) for found in (plain, lean)]
            arrows = [_arrow(*kept, digits=2), f"{1 - kept[1] / kept[0]:.0%}", _arrow(*needed), _arrow(*speeds, digits=2)]
            yield [model, str(rows), *arrows]


def forecast(name: str, rows: int, how: AbstractContextManager[object]) -> Forecast:
    train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": ROWS_PER_STEP // rows}
    values = {f"train.{key}": value for key, value in train.items()} | {"train.gradient_checkpointing": False}
    recipe = pictured_recipe(name, size=(SIDE, SIDE), text_tokens=TEXT_TOKENS, **values)
    with how:
        return Forecaster(recipe, read_material(recipe), CARDS[0]).forecast()


def on_this_cpu() -> Iterator[list[str]]:
    """Forward and backward of 1,300 tokens in bfloat16; of an MLP what is around its matrix products."""
    for name, (hidden, wide) in WIDTHS.items():
        norms = [LlamaRMSNorm(hidden) for _ in range(2)]
        gates = [LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8)) for _ in range(2)]
        for gate in gates:
            for part in ("gate_proj", "up_proj", "down_proj"):
                gate.set_submodule(part, nn.Identity())
        holder = nn.ModuleList([norms[1], gates[1]]).requires_grad_(False).bfloat16()
        assert keep_less(holder) == 2
        yield [
            name,
            _arrow(took(norms[0].requires_grad_(False).bfloat16(), hidden), took(holder[0], hidden)),
            _arrow(took(gates[0], wide), took(holder[1], wide)),
        ]


def took(module: Callable[..., torch.Tensor], width: int) -> float:
    """Milliseconds, forward and backward."""
    x = torch.randn(TOKENS, width).bfloat16().requires_grad_()
    gradient = torch.randn_like(module(x))
    return milliseconds(lambda: torch.autograd.grad(module(x), x, gradient))


def _arrow(before: float, after: float, *, digits: int = 1) -> str:
    return f"{before:.{digits}f} → {after:.{digits}f}"


if __name__ == "__main__":
    main()
