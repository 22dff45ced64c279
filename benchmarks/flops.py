"""FLOPs per epoch of the three full-size reference recipes, counted on the meta device: no GPU, no weights, no download.

    python benchmarks/flops.py                                       # tables in the terminal, about two minutes on one core
    python benchmarks/flops.py --markdown --json flops.json --png flops.png
    python benchmarks/flops.py --check                               # is the counter right? ten seconds

What is counted: forward and backward (to activations and LoRA weights) of one micro-batch of four rows through the classes
of transformers, peft and TRL at their full size, with torch's own formulas (`torch.utils.flop_counter`). Recomputation is
torch's checkpoint at work, early stop included, not a factor. Quantised linears multiply like unquantised ones, so nothing
is quantised here.

How: parameters and activations lie on the meta device, integers are real, and `Count`, a `vlmtune.planner.ledger.Outline`,
lets the two meet and adds up. A step is cut at two tensors, the picture features and the last hidden states, so that vision,
language and head can be told apart in the backward too; the features go into the language model by the door transformers has
for them (`mm_encoder_outputs`, Mllama's `cross_attention_states`). `--check` holds cut against uncut, meta against CPU, and
this counter against torch's.

What to keep in mind:

* Attention counts queries × keys, causal or not, padding or not: torch's convention. A flash kernel skips half of a causal
  square, which only a batch without a padding mask can use; that gain of packing is not in these numbers.
* Pixtral's tower in transformers runs all pictures of a batch as one sequence under a block mask and pays for the whole
  square. vlmtune is counted with one picture at a time.
* Mllama's processor pads every picture to four tiles, and cross-attention pays for all four in every stack, the tower in the
  others': of a picture up to 560 pixels vlmtune's sees one tile and one of three alike empty ones (`families.tiles`).
* A pack is counted row by row, so that packs of one row cost together what one pack of four does: where a card holds a
  single row without checkpointing, the figures without checkpointing are the right ones.
* `tutorial` is its script's full logits under today's transformers, which hooks the tower. In 2024 nothing did (117 TFLOP in
  the last table), and under today's TRL the script gets TRL's fused head.
* LoRA sits on the language model's q_proj and v_proj in every stack. The tutorial's bare names would also match Mllama's
  and Pixtral's towers.
* Not matrix products and not counted: dequantisation, norms, softmax, optimiser.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from pages import markdown
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from vlmtune.batch import IGNORE
from vlmtune.families.tiles import distinct_states, entering
from vlmtune.head import Head
from vlmtune.planner.ledger import FORMULAS, Outline
from vlmtune.planner.published import published_config

aten = torch.ops.aten

TEXT = (250, 330, 400, 530)  # text tokens of the four rows of a micro-batch; with a 500 px picture about 700 for Qwen2-VL
EVEN = (378,) * 4  # as much text, nothing to pad
ANSWER = 60  # tokens of a row's answer
SIDES = (256, 500, 768, 1024)  # px of a square picture
EPOCHS = (1, 3, 5, 10)
REFERENCE_SIDE = 500
VOCABULARY_TILE = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


# ---------------------------------------------------------------------------------------------------------- the counter


for op, formula in FORMULAS.items():
    register_flop_formula(op, get_raw=True)(formula)


class Count(Outline):
    """Adds up the FLOPs of what runs inside, on the CPU or on the meta device beside real integers."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, args, kwargs = self.run(func, args, kwargs or {})
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


# ------------------------------------------------------------------------------------------------------------ attention


_rows: tuple[int, ...] | None = None  # lengths of the rows of a pack, while one is in the language model


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` does, minus the mask, which costs no FLOP; in a pack each row by itself."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = kwargs.get("scaling")
    crosses = key.shape[2] != query.shape[2]
    causal = kwargs.get("is_causal", getattr(module, "is_causal", False)) and not crosses
    if _rows is None:
        out = _sdpa(query, key, value, causal=causal, scale=scale)
    else:
        seen = [key.shape[2] // len(_rows)] * len(_rows) if crosses else list(_rows)  # pictures are all of one size
        parts = zip(query.split(list(_rows), 2), key.split(seen, 2), value.split(seen, 2), strict=True)
        out = torch.cat([_sdpa(q, k, v, causal=causal, scale=scale) for q, k, v in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None  # [batch, seq, heads, head_dim]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    if not query.is_meta:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    # scaled_dot_product_attention falls apart into softmax and bmm on the meta device; a GPU takes a fused kernel, whose
    # backward computes the scores a second time
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]


AttentionInterface.register("counted", _attention)


@contextmanager
def _attend_per_row(rows: tuple[int, ...] | None) -> Iterator[None]:
    global _rows
    _rows = rows
    try:
        yield
    finally:
        _rows = None


# ----------------------------------------------------------------------------------------------------------- the models


TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Model:
    """A reference model: its configuration, how many tokens a picture is, how its tower is called."""

    name: str
    target: float  # of TRL's FLOPs, over three epochs
    checkpoint: str
    tiny: bool = False  # the same architecture, small enough to run on a CPU

    def config(self) -> Any:
        config = published_config(self.checkpoint)
        if not self.tiny:
            return config
        values = config.to_dict()
        text, vision = self.tiny_sizes()
        values["text_config"] = {**values["text_config"], **TINY_TEXT, "layer_types": None, **text}
        values["vision_config"] = {**values["vision_config"], **vision}
        return type(config).from_dict(values)

    def tiny_sizes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of language model and tower, where they are not `TINY_TEXT`."""
        raise NotImplementedError

    def grid(self, side: int) -> int:
        """Side of the picture as the tower sees it, in patches."""
        raise NotImplementedError

    def picture_ids(self, grid: int) -> list[int]:
        """What stands for a picture among the input ids."""
        raise NotImplementedError

    def pixels(self, grid: int, pictures: int, device: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def has_empty_tiles(self, side: int) -> bool:
        """Whether vlmtune's tower sees less of such a picture than transformers'."""
        return False

    def encode_ours(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """As vlmtune does it where there are empty tiles."""
        raise NotImplementedError

    def encode(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """Tower and projector."""
        return torch.cat(tuple(model.model.get_image_features(**pixels).pooler_output))  # [tokens, hidden]

    def see(self, features: Tensor) -> dict[str, Any]:
        """The keyword that gives features to the language model in place of pixels."""
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=(features,))}}


class Qwen2VL(Model):
    def tiny_sizes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        return {"rope_parameters": rope}, {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}

    def grid(self, side: int) -> int:
        return smart_resize(side, side, max_pixels=12845056)[0] // 14  # of the hub's preprocessor_config.json

    def picture_ids(self, grid: int) -> list[int]:
        return [151652, *[151655] * (grid // 2) ** 2, 151653]

    def pixels(self, grid: int, pictures: int, device: str) -> dict[str, Tensor]:
        patches = torch.zeros(pictures * grid**2, 3 * 2 * 14 * 14, device=device)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, grid, grid]] * pictures)}


class Mllama(Model):
    def tiny_sizes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
        vision |= {"attention_heads": 2, "image_size": 56, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
        return {"cross_attention_layers": [1]}, vision

    def grid(self, side: int) -> int:
        return self.config().vision_config.image_size // 14  # a tile's, whatever the picture's size

    def picture_ids(self, grid: int) -> list[int]:
        return [128256]

    def pixels(self, grid: int, pictures: int, device: str) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.zeros(pictures, 1, 4, 3, grid * 14, grid * 14, device=device),
            "aspect_ratio_ids": torch.ones(pictures, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * pictures),
        }

    def encode(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        states = model.model.vision_model(**pixels).last_hidden_state
        return model.model.multi_modal_projector(states).flatten(0, 2)  # [tiles, patches, hidden]

    def has_empty_tiles(self, side: int) -> bool:
        return side <= self.config().vision_config.image_size  # a larger square fills four

    def encode_ours(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        tower, found = model.model.vision_model, []
        for tiles, ratio in zip(pixels["pixel_values"][:, 0], pixels["aspect_ratio_ids"], strict=True):
            states, late = entering(tower, tiles, ratio[None])
            found.append(distinct_states(tower, states[:2], late[:2], empty=3))
        return model.model.multi_modal_projector(torch.stack(found)).flatten(0, 1)

    def see(self, features: Tensor) -> dict[str, Any]:
        return {"cross_attention_states": features}


class Pixtral(Model):
    def tiny_sizes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
        return {"head_dim": 16}, vision

    def grid(self, side: int) -> int:
        return math.ceil(min(side, 1024) / 16)

    def picture_ids(self, grid: int) -> list[int]:
        return [*([*[10] * grid, 12] * grid)[:-1], 13]  # the last [IMG_BREAK] is an [IMG_END]

    def pixels(self, grid: int, pictures: int, device: str) -> dict[str, Tensor]:
        side = grid * 16
        picture = torch.zeros(pictures, 3, side, side, device=device)
        return {"pixel_values": picture, "image_sizes": torch.tensor([[side, side]] * pictures)}


MODELS: tuple[Model, ...] = (
    Qwen2VL("Qwen2-VL-7B", 0.65, "Qwen/Qwen2-VL-7B-Instruct"),
    Mllama("Llama-3.2-11B-Vision", 0.45, "meta-llama/Llama-3.2-11B-Vision-Instruct"),
    Pixtral("Pixtral-12B", 0.8, "mistral-community/pixtral-12b"),
)


def build(model: Model, **options: Any) -> Any:
    """The model itself, without PEFT's wrapper."""
    return adapted(model, **options).get_base_model()


def adapted(model: Model, *, device: str, checkpointing: int, hooks: bool) -> Any:
    """The model with LoRA on the language model's q_proj and v_proj, everything else frozen, in training mode."""
    with torch.device(device):
        dtype = torch.bfloat16 if device == "meta" else torch.float32
        base = AutoModelForImageTextToText.from_config(model.config(), dtype=dtype, attn_implementation="counted")
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    peft_model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    if checkpointing:
        base.activation_checkpointing_enable(
            every_n_layers=checkpointing
        )  # what transformers' Trainer calls; sets the hooks too
        base.disable_input_require_grads()
    if hooks:
        peft_model.enable_input_require_grads()  # what TRL calls: on every embedding, the tower's included
    return peft_model.train()


@cache
def parameters(model: Model) -> int:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(model.config()).num_parameters()


# ------------------------------------------------------------------------------------------- a step, cut in three pieces


@cache
def vision(model: Model, grid: int, pictures: int, *, gradients: bool, device: str = "meta", ours: bool = False) -> int:
    """Tower and projector. With gradients as transformers' and TRL's hooks make it: checkpointed where the layers can be."""
    built = build(model, device=device, checkpointing=int(gradients), hooks=gradients)
    pixels = model.pixels(grid, pictures, device)
    with Count() as count, torch.set_grad_enabled(gradients):
        features = (model.encode_ours if ours else model.encode)(built, pixels)
        if gradients:
            torch.autograd.backward(features, torch.ones_like(features))
    return count.flops


@cache
def features_shape(model: Model, grid: int, pictures: int) -> torch.Size:
    built = build(model, device="meta", checkpointing=0, hooks=False)
    with Count(), torch.no_grad():
        return model.encode(built, model.pixels(grid, pictures, "meta")).shape


@cache
def language(
    model: Model,
    grid: int,
    text: tuple[int, ...],
    *,
    packed: bool,
    checkpointing: int,
    gradients: bool,
    trained: int | None = None,
    device: str = "meta",
) -> int:
    """Embeddings to last hidden states and back; with gradients into the picture features too, and into the embeddings.

    The last MLP at so many positions only, if they are given, as vlmtune has it.
    """
    wrapped = adapted(model, device=device, checkpointing=checkpointing, hooks=gradients)
    built = wrapped.get_base_model()
    features = torch.zeros(features_shape(model, grid, len(text)), dtype=built.dtype, device=device, requires_grad=gradients)
    ids, positions, lengths = rows(model, grid, text, packed=packed)
    if trained is not None:
        places = torch.arange(ids.numel()).reshape(ids.shape)
        chosen = {"labels": ids.masked_fill(places > trained, IGNORE)}  # the first token has no label that counts
        Head(wrapped, built.model.language_model.layers[-1].mlp).choose(chosen)
    with Count() as count, _attend_per_row(lengths if packed else None):
        out = built.model(input_ids=ids, position_ids=positions, use_cache=False, **model.see(features))
        torch.autograd.backward(out.last_hidden_state, torch.ones_like(out.last_hidden_state))
    return count.flops


def rows(model: Model, grid: int, text: Sequence[int], *, packed: bool) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Input ids and position ids, `[rows, longest]` or `[1, sum]`, and the lengths; 1000 stands for text and for padding."""
    picture = model.picture_ids(grid)
    each = [[*[1000] * 10, *picture, *[1000] * (length - 10)] for length in text]
    lengths = tuple(len(row) for row in each)
    if packed:
        return torch.tensor([[*chain.from_iterable(each)]]), torch.cat([torch.arange(n) for n in lengths])[None], lengths
    ids = torch.tensor([row + [1000] * (max(lengths) - len(row)) for row in each])
    return ids, torch.arange(max(lengths)).expand(len(each), -1), lengths


@cache
def head(model: Model, positions: int, *, fused: bool, device: str = "meta") -> int:
    """LM head and loss: all logits at once, or TRL's head, which computes its tiles of logits again in the backward."""
    config = model.config().get_text_config()
    with torch.device(device):
        hidden = torch.zeros(positions, config.hidden_size, requires_grad=True)
        weight = torch.zeros(config.vocab_size, config.hidden_size)
    targets = torch.full((positions,), 1000)
    # TRL asks whether autocast is on for the tensors' device, and torch refuses to answer for meta
    with Count() as count, patch.object(torch, "is_autocast_enabled", return_value=False):
        if fused:
            outputs = ("entropy", "is_top1")
            scores = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, VOCABULARY_TILE, None, 1.0, outputs)
            loss = -scores[0].sum()
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        torch.autograd.backward(loss)
    return count.flops


# ----------------------------------------------------------------------------------------------------------- the stacks


@dataclass(frozen=True)
class Stack:
    """How a micro-step is run."""

    name: str
    packed: bool  # four rows in one without padding, attention per row; else padded to the longest
    checkpointing: int  # of every n-th layer that can; 0 of none
    hooks: bool  # gradients at the inputs of tower and language model
    cached: bool = False  # a picture's features are computed in the first epoch only
    full_logits: bool = False  # LM head at every position, else at the supervised ones


TUTORIAL = Stack("tutorial", packed=False, checkpointing=1, hooks=True, full_logits=True)
TRL = Stack("TRL default", packed=False, checkpointing=1, hooks=True)
VLMTUNE = Stack("vlmtune", packed=True, checkpointing=0, hooks=False, cached=True)
STACKS = (
    TUTORIAL,
    TRL,
    replace(VLMTUNE, name="vlmtune, cache off", cached=False),
    replace(VLMTUNE, name="vlmtune, checkpointing", checkpointing=1),
    replace(VLMTUNE, name="vlmtune, checkpointing every 2nd layer", checkpointing=2),
    VLMTUNE,
)


@dataclass(frozen=True)
class Step:
    """FLOPs of one micro-step."""

    vision: int
    language: int
    head: int
    cached: bool

    @property
    def first(self) -> int:
        return self.vision + self.language + self.head

    @property
    def later(self) -> int:
        return self.first - (self.vision if self.cached else 0)

    def over(self, epochs: int) -> int:
        return self.first + (epochs - 1) * self.later


def step(
    model: Model, stack: Stack, *, side: int, text: tuple[int, ...] = TEXT, answers_only: bool = True, device: str = "meta"
) -> Step:
    """One micro-step of four rows with a picture each, all pictures distinct."""
    grid = model.grid(side)
    lengths = [length + len(model.picture_ids(grid)) for length in text]
    if stack.full_logits:
        positions = len(text) * max(lengths)
    else:  # the first token of a row is predicted from nothing
        positions = sum(ANSWER if answers_only else length - 1 for length in text)
    at_once, ours = 1 if stack.packed else len(text), stack.cached and model.has_empty_tiles(side)
    return Step(
        vision=len(text) // at_once * vision(model, grid, at_once, gradients=stack.hooks, device=device, ours=ours),
        language=language(
            model,
            grid,
            text,
            packed=stack.packed,
            checkpointing=stack.checkpointing,
            gradients=stack.hooks,
            trained=positions if stack.packed else None,
            device=device,
        ),
        head=head(model, positions, fused=not stack.full_logits, device=device),
        cached=stack.cached,
    )


# --------------------------------------------------------------------------------------------------------------- checks


def check() -> Table:
    """Small models of the same architectures: meta against CPU, cut against uncut, this counter against torch's."""
    table = Table("model", "stack", "meta", "CPU", "uncut, CPU", "torch's counter", title="FLOPs of small models")
    for column in table.columns:
        column.overflow = "fold"
    text = (70, 90)
    for model in (replace(model, tiny=True) for model in MODELS):
        for stack in (TUTORIAL, TRL, VLMTUNE, replace(VLMTUNE, name="vlmtune, checkpointing", checkpointing=1)):
            counts = [step(model, stack, side=56, text=text, device=device).first for device in ("meta", "cpu")]
            if stack is TUTORIAL:
                counts += _uncut(model, 56, text)
            if len(set(counts)) > 1:
                raise AssertionError(f"{model.name}, {stack.name}: {counts}")
            table.add_row(model.name, stack.name, *[f"{count:,}" for count in counts])
    return table


def _uncut(model: Model, side: int, text: tuple[int, ...]) -> list[int]:
    """The tutorial's step through the model's own forward and loss, pixels to LoRA weights, counted by both counters."""
    grid = model.grid(side)
    ids, positions, _ = rows(model, grid, text, packed=False)
    labels = ids.masked_fill(ids != 1000, -100)

    def run() -> None:
        pixels = model.pixels(grid, len(text), "cpu")
        if isinstance(model, Qwen2VL):
            pixels["mm_token_type_ids"] = (ids == 151655).int()
        built = build(model, device="cpu", checkpointing=1, hooks=True)
        built(input_ids=ids, position_ids=positions, labels=labels, use_cache=False, **pixels).loss.backward()

    with Count() as count:
        run()
    with FlopCounterMode(display=False) as torchs:
        run()
    return [count.flops, torchs.get_total_flops()]


def anchors() -> Table:
    """The counts of FACTS 8 again: 4 rows of 702 tokens, of which 100 are padding in three rows; loss on all text."""
    table = Table("Qwen2-VL-7B, micro-step", "TFLOP", "FACTS 8", title="Against the earlier simulation")
    text = (376, 276, 276, 276)
    towered = replace(TRL, name="TRL default, tower without autograd", hooks=False)
    known = {
        replace(towered, name="2024's stack: full logits, tower without autograd", full_logits=True): "117",
        TRL: "129",
        towered: "114",
        replace(towered, name="… and no checkpointing", checkpointing=0): "88",
    }
    for stack, figure in known.items():
        counted = step(MODELS[0], stack, side=REFERENCE_SIDE, text=text, answers_only=False)
        table.add_row(stack.name, f"{counted.first / 1e12:.1f}", figure)
    reference = step(MODELS[0], VLMTUNE, side=REFERENCE_SIDE)
    table.add_row("… and features cached, no padding: vlmtune's later epochs", f"{reference.later / 1e12:.1f}", "about 77")
    return table


# --------------------------------------------------------------------------------------------------------------- report


def ratio(model: Model, stack: Stack, epochs: int, *, side: int = REFERENCE_SIDE, **batch: Any) -> float:
    ours, trl = (step(model, each, side=side, **batch) for each in (stack, TRL))
    return ours.over(epochs) / trl.over(epochs)


Rows = list[list[str]]


def tables() -> dict[str, tuple[list[str], Rows]]:
    """Title → header and rows."""

    def tera(flops: float) -> str:
        return f"{flops / 1e12:.1f}"

    title = f"TFLOP per micro-step: 4 rows of {', '.join(map(str, TEXT))} text tokens, a {REFERENCE_SIDE} px picture each"
    header = ["model", "stack", "vision", "language", "head", "first epoch", "later epochs", "3 epochs / TRL's"]
    steps: Rows = []
    for model in MODELS:
        for stack in STACKS:
            one = step(model, stack, side=REFERENCE_SIDE)
            parts = [one.vision, one.language, one.head, one.first, one.later]
            steps.append([model.name, stack.name, *map(tera, parts), f"{ratio(model, stack, 3):.2f}"])

    targets: Rows = []
    for model in MODELS:
        for stack in STACKS[2:]:
            ratios = [ratio(model, stack, epochs) for epochs in EPOCHS]
            others = [ratio(model, stack, 3, answers_only=False), ratio(model, stack, 3, text=EVEN)]
            verdict = "met" if ratio(model, stack, 3) <= model.target else "missed"
            figures = [f"{value:.2f}" for value in [*ratios, *others]]
            targets.append([model.name, stack.name, *figures, f"≤ {model.target} {verdict}"])

    sizes: Rows = []
    for model in MODELS:
        for stack in STACKS[2:]:
            sizes.append([model.name, stack.name, *[f"{ratio(model, stack, 3, side=side):.2f}" for side in SIDES]])

    epochs = [f"{count} epoch{'s' * (count > 1)}" for count in EPOCHS]
    return {
        title: (header, steps),
        "FLOPs as a share of TRL's default, loss on answers": (
            ["model", "stack", *epochs, "3, loss on all text", "3, rows of one length", "goal, 3 epochs"],
            targets,
        ),
        "FLOPs over 3 epochs as a share of TRL's default, by picture size": (
            ["model", "stack", *[f"{side} px" for side in SIDES]],
            sizes,
        ),
    }


def report() -> dict[str, Any]:
    """Everything as numbers."""
    models: dict[str, Any] = {}
    for model in MODELS:
        sides: dict[str, Any] = {}
        for side in SIDES:
            sides[str(side)] = {"tokens_per_picture": len(model.picture_ids(model.grid(side)))}
            for stack in STACKS:
                for rule in ("answers", "all text"):
                    one = step(model, stack, side=side, answers_only=rule == "answers")
                    over = {str(n): ratio(model, stack, n, side=side, answers_only=rule == "answers") for n in range(1, 11)}
                    parts = {"vision": one.vision, "language": one.language, "head": one.head}
                    sides[str(side)].setdefault(stack.name, {})[rule] = {
                        "flops": {**parts, "first_epoch": one.first, "later_epochs": one.later},
                        "over_trl": over,
                    }
        models[model.name] = {"parameters": parameters(model), "target": model.target, "picture_px": sides}
    return {
        "versions": versions(),
        "micro_batch": {"text_tokens": TEXT, "answer_tokens": ANSWER, "pictures_per_row": 1},
        "models": models,
    }


def picture(path: Path) -> None:
    """Share of TRL's FLOPs against epochs, a panel for each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(12, 4), sharey=True, layout="constrained")
    epochs = range(1, 11)
    for axis, model in zip(axes, MODELS, strict=True):
        axis.axhline(1, color="0.5", lw=1, label="TRL default")
        for stack, style in zip(STACKS[2:], ("C0:", "C1-", "C2-", "C0-"), strict=True):
            axis.plot(epochs, [ratio(model, stack, n) for n in epochs], style, label=stack.name)
        axis.plot(3, model.target, "k_", ms=16, mew=2, label="goal at 3 epochs")
        axis.set(title=model.name, xlabel="epochs", ylim=(0, 1.1), xticks=(1, 3, 5, 10))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FLOPs / TRL default's")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}


def main(
    *,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown in place of the terminal's tables.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all counts there.")] = None,
    png_path: Annotated[Path | None, typer.Option("--png", help="Draw the shares against epochs there.")] = None,
    only_check: Annotated[bool, typer.Option("--check", help="Hold the counter against small real models.")] = False,
) -> None:
    """Counts the FLOPs of the reference recipes as TRL, the tutorial and vlmtune run them."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    console, start = Console(), time.perf_counter()
    if only_check:
        console.print(check())
        return
    for title, (header, lines) in tables().items():
        if as_markdown:
            print(f"**{title}**\n\n{markdown(header, lines)}")
            continue
        table = Table(*header, title=title)
        for index, line in enumerate(lines):
            table.add_row(*line, end_section=index + 1 < len(lines) and lines[index + 1][0] != line[0])
        console.print(table)
    counted_with = "Counted with " + ", ".join(" ".join(each) for each in versions().items())
    if as_markdown:
        print(f"{counted_with}, on the meta device.")
    else:
        console.print(anchors())
    if json_path:
        json_path.write_text(json.dumps(report(), indent=1), encoding="utf-8")
    if png_path:
        picture(png_path)
    if not as_markdown:
        console.print(f"{counted_with}, in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
