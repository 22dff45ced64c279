import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from transformers import AttentionInterface

from vlmtune.attention import IMPLEMENTATION
from vlmtune.collator import MultimodalCollator
from vlmtune.errors import ModelError
from vlmtune.model import load_config, load_model, load_processor, positions_model
from vlmtune.planner.kernels import CPU, CUDA, CUDA_BEFORE_AMPERE, Device
from vlmtune.planner.simulation import Outcome, Simulation, outline, simulation
from vlmtune.recipe import load_recipe

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import memory
from memory import Setting

# ------------------------------------------------------------------------------------------ against reality, on the CPU

QWEN, MLLAMA, PIXTRAL = (
    Setting(kind, size="small", text=90, pictures=((112, 112),)) for kind in ("qwen2_vl", "mllama", "pixtral")
)
TINY = Setting("qwen2_vl", size="tiny", dtype="float32", rows=4, text=300)
SETTINGS = [
    QWEN,
    replace(QWEN, quantization="nf4", checkpointing=1, targets="all-linear", pictures=((112, 56), (77, 130))),
    replace(QWEN, packed=True, cached=True, checkpointing=2, rows=3),
    replace(QWEN, whole=True, optimiser="adamw_torch", dropout=0.0),
    replace(MLLAMA, cached=True, packed=True, rows=1, clip=0.0),
    replace(MLLAMA, size="tiny", dtype="float32", quantization="nf4", checkpointing=1, pictures=((20, 70),) * 2),
    replace(PIXTRAL, scope="all", targets="all-linear", checkpointing=1),
    replace(PIXTRAL, packed=True, quantization="nf4", dtype="float32", pictures=((61, 99), (40, 40), (16, 64), (90, 30))),
    replace(TINY, optimiser="sgd", targets="all-linear"),
    replace(TINY, kind="smolvlm", dtype="bfloat16"),
    replace(TINY, kind="qwen2_5_vl", checkpointing=2),
    replace(TINY, kind="text", packed=True, pictures=(), dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_simulated_step_allocates_what_a_real_one_does(setting: Setting, place: Path, tmp_path: Path) -> None:
    (place / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints").symlink_to(place / "checkpoints")
    measured = memory.measure(setting, tmp_path)
    error, above_weights = memory.errors(measured)
    assert measured["simulated"]["weights"] == measured["real"]["weights"]
    assert abs(error) < 0.005
    assert abs(above_weights) < 0.01


# ------------------------------------------------------------------------------------------------------- properties


@pytest.fixture
def simulated(recipe: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """`simulated("mllama", rows=2, text=100, pictures=((28, 28),))`: the `Outcome` of a step on a GPU."""
    known: dict[Any, tuple[Any, Simulation, MultimodalCollator]] = {}

    def run(
        kind: str,
        *,
        rows: int = 1,
        text: int = 50,
        pictures: tuple[tuple[int, int], ...] = ((28, 28),),
        checkpointing: int = 0,
        packed: bool = False,
        device: Device = CUDA,
        accumulates: bool = True,
        **overrides: Any,
    ) -> Outcome:
        key = (kind, checkpointing, packed, device, json.dumps(overrides))
        if key not in known:
            known[key] = build(recipe(kind, **overrides), device, checkpointing, packed)
        model, simulated, collator = known[key]
        content = [{"type": "image", "image": Image.new("RGB", size)} for size in pictures]
        messages = [
            {"role": "user", "content": [*content, {"type": "text", "text": "a" * text}]},
            {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
        ]
        batch = collator([{"messages": messages, "name": "a row"}] * rows)
        batch = collator.family.flatten(batch, positions_model(model)) if packed else batch
        return simulated.step(batch, accumulates=accumulates)

    return run


def build(
    values: dict[str, Any], device: Device = CUDA, checkpointing: int = 0, packed: bool = False
) -> tuple[Any, Simulation, MultimodalCollator]:
    recipe = load_recipe(values, **{"train.use_cpu": True})
    processor, family = load_processor(recipe)
    model = outline(recipe, family, load_config(recipe.model))
    made = simulation(recipe, model, processor, family, device=device, checkpointing=checkpointing, packed=packed)
    return model, made, MultimodalCollator(processor, family)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", [*tiny.KINDS, "qwen2_5_vl", "smolvlm", "text"])
def test_an_outline_has_the_modules_that_the_loaded_model_has(
    recipe: Callable[..., dict[str, Any]], kind: str, quantization: str
) -> None:
    settings = load_recipe(recipe(kind, **{"model.quantization": quantization}))
    loaded, _, family = load_model(settings)
    simulated = outline(settings, family, load_config(settings.model))
    of_loaded, of_simulated = ({name: type(each) for name, each in one.named_modules()} for one in (loaded, simulated))
    assert of_simulated == of_loaded


HALF = {"model.dtype": "bfloat16", "lora.dropout": 0.1}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_more_never_needs_less(kind: str, simulated: Callable[..., Outcome]) -> None:
    step = partial(simulated, kind, **HALF)
    in_order = [
        [step(rows=rows) for rows in (1, 2, 3, 5)],
        [step(text=text, rows=2) for text in (10, 50, 51, 200)],
        [step(text=text, rows=2, packed=True) for text in (10, 50, 51, 200)],
        [step(pictures=((28, 28),) * count) for count in (1, 2, 4)],
        [step(pictures=((edge, edge),)) for edge in (28, 42, 56, 64)],
        *([step(checkpointing=every, rows=4, text=200) for every in (some, 0)] for some in (1, 2)),
        [step(accumulates=accumulates) for accumulates in (False, True)],
    ]
    for outcomes in in_order:
        peaks = [outcome.peak for outcome in outcomes]
        assert peaks == sorted(peaks)
        assert all(outcome.reserved >= outcome.peak for outcome in outcomes)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_step_leaves_nothing_behind(kind: str, simulated: Callable[..., Outcome]) -> None:
    first, second = simulated(kind, rows=2, **HALF), simulated(kind, rows=2, **HALF)
    assert sum(event.size for event in first.events) <= 16  # Qwen2-VL keeps `rope_deltas`, two integers
    assert abs(sum(event.size for event in second.before) - sum(event.size for event in first.before)) <= 16
    assert (first.flops, first.kernels) == (second.flops, second.kernels)
    assert abs(first.peak - second.peak) <= 512


def test_padded_rows_need_a_mask_and_packed_ones_none(simulated: Callable[..., Outcome]) -> None:
    packed = simulated("qwen2_vl", rows=3, packed=True, **HALF).operators
    assert "torch_attn::_varlen_attn" in packed
    old = simulated("qwen2_vl", rows=3, packed=True, device=CUDA_BEFORE_AMPERE, **HALF).operators
    assert "aten::_scaled_dot_product_efficient_attention" in old
    assert "torch_attn::_varlen_attn" not in old


def test_every_byte_has_a_name(simulated: Callable[..., Outcome]) -> None:
    outcome = simulated("qwen2_vl", rows=2, checkpointing=1, **HALF, **{"model.quantization": "nf4"})
    live, last = outcome.at_peak()
    assert sum(event.size for event in live) <= outcome.peak  # which is rounded up to 512 bytes each
    assert last.where is not None
    named = {event.where.what for event in outcome.before if event.where}
    assert {"language model, nf4", "head, bfloat16", "adapters", "optimiser's states", "buffers", "scratch"} <= named
    assert {"inputs", "gradients", "forward", "loss", "again", "backward", "optimiser"} <= {
        event.where.what for event in outcome.events if event.where
    }
    phases = list(dict.fromkeys(phase for phase, _ in outcome.timeline(points=10_000)))
    assert phases == ["forward", "backward", "optimiser"]


def test_a_gpu_holds_a_batch_only_as_long_as_the_forward_pass(simulated: Callable[..., Outcome]) -> None:
    def ends_before_the_backward_pass(outcome: Outcome) -> bool:
        numbers = {
            event.number for event in outcome.events if event.where and event.where.what == "inputs" and event.size > 5000
        }
        ends = [place for place, event in enumerate(outcome.events) if event.number in numbers and event.size < 0]
        backward = [place for place, event in enumerate(outcome.events) if event.where and event.where.what == "backward"]
        assert numbers
        return max(ends) < backward[0]

    assert ends_before_the_backward_pass(simulated("qwen2_vl", **HALF))
    assert not ends_before_the_backward_pass(simulated("qwen2_vl", device=CPU, **HALF))


def test_features_of_pictures_are_told_and_not_kept_on_the_card(recipe: Callable[..., dict[str, Any]]) -> None:
    _, made, collator = build(recipe("qwen2_vl", **HALF))
    picture = collator.pictures([Image.new("RGB", (56, 56))] * 2)
    outcome, features = made.encode(picture)
    assert [tuple(feature.shape) for feature in features] == [(4, 64), (4, 64)]
    assert outcome.peak > sum(event.size for event in outcome.before)
    again, _ = made.encode(picture)
    assert [event.size for event in again.before] == [event.size for event in outcome.before]


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "sgd", "adafactor", "adamw_8bit", "paged_adamw_8bit", "lion_32bit", "adamw_bnb_8bit", "rmsprop"],
)
def test_an_optimiser_is_simulated_or_said_not_to_be(name: str, recipe: Callable[..., dict[str, Any]]) -> None:
    _, made, collator = build(recipe("text", **{"train.optim": name}))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "name": "a row"}
    content = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in row["messages"]]
    outcome = made.step(collator([{**row, "messages": content}]), accumulates=False)
    states = sum(event.size for event in outcome.before if event.where and event.where.what == "optimiser's states")
    trained = sum(parameter.nbytes for parameter in made.model.parameters() if parameter.requires_grad)
    if made.stand_ins:
        assert made.stand_ins[0].startswith(f"{name} is counted as AdamW")
        assert states > 2 * trained
    elif name in ("sgd", "rmsprop", "adafactor"):
        assert states < 1.1 * trained
    else:
        assert states > trained / 4


def test_an_operator_that_needs_values_is_named(recipe: Callable[..., dict[str, Any]]) -> None:
    model, made, collator = build(recipe("text"))

    def choose(module: Any, args: Any, output: Any) -> None:
        torch.unique(output[0] if isinstance(output, tuple) else output)

    model.get_base_model().model.layers[0].register_forward_hook(choose)
    messages = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")]
    attention = AttentionInterface()[IMPLEMENTATION]
    with pytest.raises(ModelError, match=r"aten::_unique2 cannot be run without values"):
        made.step(collator([{"messages": messages, "name": "a row"}]), accumulates=False)
    assert AttentionInterface()[IMPLEMENTATION] is attention
