"""The last layer's MLP is computed where a token is trained on, and nothing else changes by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import KINDS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cohere2Config, PreTrainedConfig, Qwen2MoeConfig

from vlmtune import MultimodalCollator, finetune, load_recipe, training
from vlmtune.activations import LeanMLP, keep_less
from vlmtune.batching import usable_rows
from vlmtune.families import Family
from vlmtune.families.text import FAMILY
from vlmtune.model import last_mlp, load_model
from vlmtune.proof import ends_apart
from vlmtune.result import Run

MakeRecipe = Callable[..., dict[str, Any]]
EVERY = (*KINDS, "qwen2_5_vl", "smolvlm", "text")
MEASURED = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens", "eval_loss")
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens go through the last MLP, each time that it runs."""
    seen: list[int] = []
    project = LeanMLP.forward

    def look(self: LeanMLP, x: Tensor) -> Tensor:
        if getattr(self, "is_last", False):
            seen.append(x.shape[0] * x.shape[1])
        return project(self, x)

    def marked(*args: Any) -> bool:
        args[-1].is_last = True
        return ends_apart(*args)

    monkeypatch.setattr(LeanMLP, "forward", look)
    monkeypatch.setattr(training, "ends_apart", marked)
    return seen


def loaded(recipe: dict[str, Any]) -> tuple[Any, Family, dict[str, Tensor]]:
    """A model, its family and a batch of one row."""
    checked = load_recipe(recipe)
    model, processor, family = load_model(checked)
    return model, family, MultimodalCollator(processor, family)([usable_rows(checked, 0, check_images=False).train[0]])


def of_text(config: PreTrainedConfig) -> tuple[PeftModel, dict[str, Tensor]]:
    """A language model and a batch of one row."""
    base = AutoModelForCausalLM.from_config(config)
    keep_less(base)
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"])), batch


def history(run: Run) -> list[dict[str, float]]:
    return [{name: entry[name] for name in MEASURED if name in entry} for entry in run.history]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in EVERY),
        *((kind, {"packing": "off", "train.gradient_checkpointing": True}) for kind in KINDS),
        ("qwen2_vl", {"train_on_inputs": True, "train.pad_to_multiple_of": 16}),
        ("pixtral", {"train.gradient_checkpointing": 2, "model.quantization": "nf4"}),
        ("mllama", {"train.label_smoothing_factor": 0.1}),
    ],
)
def test_a_run_learns_what_it_learns_with_the_whole_mlp(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    found: list[list[dict[str, float]]] = []
    adapters: list[Tensor] = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(training, "ends_apart", lambda *_: False)
        run = finetune(
            recipe(kind, **{"data.eval_rows": 2, "train.eval_strategy": "steps", "train.eval_steps": 2, **settings}),
            overwrite=True,
        )
        found.append(history(run))
        adapters.append(torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]))
    assert len(found[0]) >= 3
    for some, all_of_them in zip(*found, strict=True):
        assert some == pytest.approx(all_of_them, rel=1e-4)
    assert torch.allclose(*adapters, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_sees_trained_tokens_only_while_it_is_trained(recipe: MakeRecipe, tokens: list[int], checkpointing: bool) -> None:
    run = finetune(recipe(**{"train.gradient_checkpointing": checkpointing, "packing": {"length": 2000}}))
    batch = next(iter(run.trainer.get_train_dataloader()))
    length, trained = batch["input_ids"].shape[1], int((batch["labels"] >= 0).sum())
    tokens.clear()
    run.trainer.training_step(run.trainer.model, dict(batch), None)
    assert tokens == [trained] * (1 + checkpointing)
    assert trained < length / 2
    tokens.clear()
    run.trainer.compute_loss(run.trainer.model, dict(batch))
    with torch.no_grad():
        run.model(input_ids=batch["input_ids"][:, :7])
    assert tokens == [trained, 7]


def test_a_step_that_fails_leaves_the_model_whole(recipe: MakeRecipe, tokens: list[int]) -> None:
    run = finetune(recipe())
    batch = next(iter(run.trainer.get_train_dataloader()))
    hook = run.model.get_input_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.trainer.training_step(run.trainer.model, dict(batch), None)
    hook.remove()
    tokens.clear()
    with torch.no_grad():
        run.model(input_ids=batch["input_ids"][:, :7])
    assert tokens == [7]


@pytest.mark.parametrize("kind", EVERY)
def test_behind_the_last_mlp_no_token_hears_of_another_and_behind_the_first_they_do(recipe: MakeRecipe, kind: str) -> None:
    model, family, batch = loaded(recipe(kind))
    first = next(
        module
        for name, module in model.get_base_model().base_model.named_modules()
        if isinstance(module, LeanMLP) and not family.sees.match(f"{name}.")
    )
    last = last_mlp(model, family)
    assert last is not None
    assert ends_apart(model, family, batch, last)
    assert not ends_apart(model, family, batch, first)


def test_a_norm_that_subtracts_the_mean_hides_nothing() -> None:
    model, batch = of_text(Cohere2Config(**SMALL))
    last = last_mlp(model, FAMILY)
    assert last is not None
    assert ends_apart(model, FAMILY, batch, last)
    assert not ends_apart(model, FAMILY, batch, next(each for each in model.modules() if isinstance(each, LeanMLP)))


def test_an_expert_is_not_the_last_mlp() -> None:
    """It sees tokens of all rows below each other, or some of them."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    model, _ = of_text(Qwen2MoeConfig(**SMALL, **sizes))
    assert any(isinstance(module, LeanMLP) for module in model.modules())
    assert last_mlp(model, FAMILY) is None


def test_in_16_bit_and_filled_up_a_run_learns_the_same(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[float]] = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(training, "ends_apart", lambda *_: False)
        run = finetune(recipe(**{"train.bf16": True, "model.dtype": "bfloat16"}), overwrite=True)
        found.append([entry["loss"] for entry in run.history if "loss" in entry])
    assert run.model.dtype == torch.bfloat16
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_is_trained_whole(recipe: MakeRecipe, compiled: bool) -> None:
    backend = {"train.torch_compile": True, "train.torch_compile_backend": "eager"}
    run = finetune(recipe("text", **(backend if compiled else {})))
    last = last_mlp(run.model, run.family)
    assert last is not None
    assert bool(last._forward_hooks) is not compiled


def test_a_module_that_is_not_run_or_has_other_results_does_not_count(recipe: MakeRecipe) -> None:
    model, family, batch = loaded(recipe())
    assert not ends_apart(model, family, batch, nn.Linear(2, 2))
    assert not ends_apart(model, family, batch, model.get_base_model().base_model)


def test_a_model_without_a_known_mlp_is_trained_whole(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.model.keep_less", lambda _: 0)
    run = finetune(recipe())
    assert last_mlp(run.model, run.family) is None
    assert run.metrics["steps"] == 2


def test_beside_a_collator_of_ones_own_it_is_whole_and_nothing_is_tried_out(recipe: MakeRecipe, tokens: list[int]) -> None:
    """Rows that only the caller's collator can read are no business of vlmtune's."""
    checked = load_recipe(recipe())
    _, processor, family = load_model(checked)
    theirs = MultimodalCollator(processor, family)
    asked: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        asked.append(len(rows))
        return theirs(rows)

    finetune(checked, collator=collate)
    assert set(asked) == {4}
    assert tokens == []  # no MLP was marked as the last
