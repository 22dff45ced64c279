from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import KINDS
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vlmtune import MultimodalCollator, RecipeError, finetune, load_model, load_recipe
from vlmtune.attention import OF_PICTURES
from vlmtune.data import load_data
from vlmtune.model import parameter_counts, use_checkpointing

MakeRecipe = Callable[..., dict[str, Any]]
GENERIC = ("qwen2_5_vl", "smolvlm")
SEES = {
    "qwen2_vl": "visual",
    "mllama": "vision_model",
    "pixtral": "vision_tower",
    "qwen2_5_vl": "visual",
    "smolvlm": "vision_model",
}


def batch_of(model_recipe: Any, processor: Any, family: Any) -> dict[str, torch.Tensor]:
    rows = load_data(model_recipe.data).train
    return MultimodalCollator(processor, family)([rows[position] for position in range(4)])


@pytest.mark.parametrize("kind", [*KINDS, *GENERIC])
def test_only_the_language_model_is_quantised_and_only_the_adapter_learns(recipe: MakeRecipe, kind: str) -> None:
    model, _, family = load_model(load_recipe(recipe(kind, **{"model.quantization": "nf4", "model.dtype": "bfloat16"})))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora" not in name:
            quantised = hasattr(module.weight, "quant_state")
            assert quantised == ("language_model" in name or "text_model" in name), name
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name and SEES[kind] not in name for name in trainable)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora" not in n and not hasattr(p, "quant_state")}
    assert dtypes == {torch.bfloat16}  # no embedding, head or norm was cast up to float32
    counts = {count.part: count for count in parameter_counts(model, family)}
    assert counts["vision tower and projector"].trainable == 0
    assert counts["language model"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_a_quantised_model_are_counted_as_they_were(recipe: MakeRecipe) -> None:
    counts = [
        parameter_counts(model, family)
        for model, _, family in (load_model(load_recipe(recipe(**{"model.quantization": q}))) for q in ("none", "nf4"))
    ]
    assert [c.total for c in counts[0]] == [c.total for c in counts[1]]


@pytest.mark.parametrize(("asked", "used"), [(None, OF_PICTURES), ("sdpa", OF_PICTURES), ("eager", "eager")])
@pytest.mark.parametrize("kind", [*KINDS, *GENERIC])
def test_the_tower_attends_by_what_is_fastest_unless_another_attention_is_named(
    recipe: MakeRecipe, kind: str, asked: str | None, used: str
) -> None:
    settings = load_recipe(recipe(kind, **{"model.attention": asked, "model.dtype": "bfloat16"}))
    model, processor, family = load_model(settings)
    (tower,) = (module for name, module in model.named_modules() if name.rpartition(".")[2] == SEES[kind])
    assert tower.config._attn_implementation == used
    with profile(activities=[ProfilerActivity.CPU]) as recorder, torch.no_grad():
        model(**family.model_inputs(batch_of(settings, processor, family)))
    assert any(event.key == "aten::baddbmm" for event in recorder.key_averages()) == (used == OF_PICTURES)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *GENERIC])
def test_the_frozen_tower_runs_without_autograd(recipe: MakeRecipe, kind: str, checkpointing: bool) -> None:
    settings = load_recipe(recipe(kind, **{"model.quantization": "nf4"}))
    model, processor, family = load_model(settings)
    if checkpointing:
        use_checkpointing(model)
    seen: list[bool] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        seen.extend(tensor.requires_grad for tensor in tensors if isinstance(tensor, torch.Tensor))

    for name, module in model.named_modules():
        if SEES[kind] in name.split(".") or any(part in name for part in ("multi_modal_projector", "connector")):
            module.register_forward_hook(look)
    model.train()
    model(**batch_of(settings, processor, family)).loss.backward()
    assert len(seen) > 5
    assert not any(seen)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(recipe: MakeRecipe, kind: str) -> None:
    gradients: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        settings = load_recipe(recipe(kind))
        torch.manual_seed(0)
        model, processor, family = load_model(settings)
        if checkpointing:
            use_checkpointing(model)
        model.train()
        model(**batch_of(settings, processor, family)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_between_two_steps_changes_no_gradient(recipe: MakeRecipe, kind: str) -> None:
    """bitsandbytes repacks 4-bit weights in a forward without gradients, on CPUs with AVX512-BF16 (FACTS 3, gotcha 1)."""
    settings = load_recipe(recipe(kind, **{"model.quantization": "nf4", "model.dtype": "bfloat16"}))
    model, processor, family = load_model(settings)
    batch = {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch_of(settings, processor, family).items()}

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_a_target_that_no_module_has_is_refused(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"`lora.targets` names q_prj, and no linear module .* Did you mean 'q_proj'\?"):
        load_model(load_recipe(recipe(**{"lora.targets": ["q_prj", "v_proj"]})))


def test_q_and_v_alone_are_found_in_every_language_layer(recipe: MakeRecipe) -> None:
    model, _, _ = load_model(load_recipe(recipe("mllama", **{"lora.targets": ["q_proj", "v_proj"]})))
    tuned = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(tuned) == 2 * 4  # two cross-attention and two self-attention layers
    assert all("language_model" in name for name in tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vision_tower_learns_where_the_recipe_says_so(recipe: MakeRecipe, kind: str) -> None:
    model, _, family = load_model(load_recipe(recipe(kind, **{"lora.scope": "all"})))
    counts = {count.part: count.trainable for count in parameter_counts(model, family)}
    assert counts["vision tower and projector"] > 0
    assert counts["language model"] > 0


def test_int8_learns_too(recipe: MakeRecipe) -> None:
    settings = {"model.quantization": "int8", "model.dtype": "bfloat16", "train.max_steps": 15, "train.save_strategy": "no"}
    losses = [entry["loss"] for entry in finetune(recipe(**settings)).history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
