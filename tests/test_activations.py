"""Norms and MLPs that keep less compute the same, and only where they are what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import batch_of
from tiny import KINDS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from vlmtune import finetune, model
from vlmtune.activations import LeanMLP, LeanNorm, keep_less
from vlmtune.model import add_adapter, load_base, load_model, load_processor, prepare_for_training
from vlmtune.recipe import load_recipe

MakeRecipe = Callable[..., dict[str, Any]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def norm(width: int = 32) -> nn.Module:
    made = LlamaRMSNorm(width, eps=1e-6)
    nn.init.normal_(made.weight, mean=1, std=0.2)
    return made.requires_grad_(False)


def mlp(width: int = 32, activation: str = "silu") -> nn.Module:
    config = GemmaConfig(hidden_size=width, intermediate_size=3 * width, hidden_act=activation)
    config.mlp_bias = False
    return LlamaMLP(config).requires_grad_(False)


def result_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    result = module(x)
    torch.manual_seed(1)
    return result, torch.autograd.grad(result, x, torch.randn_like(result))[0]


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, of each memory once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [norm, mlp, lambda: mlp(activation="gelu_pytorch_tanh")], ids=["norm", "silu", "gelu"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_result_is_the_same_to_the_bit_and_the_gradient_to_rounding(
    make: Callable[[], nn.Module], dtype: torch.dtype, close: float, device: str
) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleList([make()]).to(device, dtype)
    x = (4 * torch.randn(2, 50, 32)).to(device, dtype)
    plain, expected = result_and_gradient(holder[0], x)
    assert keep_less(holder) == 1
    result, gradient = result_and_gradient(holder[0], x)
    assert torch.equal(result, plain)
    assert (gradient - expected).abs().max() <= close * expected.abs().max()


def test_the_gradient_is_right_by_finite_differences() -> None:
    """In float64, which a norm computes in float32: so its differences are wide."""
    holder = nn.ModuleList([norm(8), mlp(8)]).double()
    keep_less(holder)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(holder[0], (x,), eps=1e-2, atol=1e-3, rtol=1e-2)
    assert torch.autograd.gradcheck(holder[1], (x,))


def test_a_norm_keeps_its_input_and_an_mlp_two_tensors() -> None:
    tokens, width = 50, 32
    holder = nn.ModuleList([norm(width), mlp(width)]).bfloat16()
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    before = [bytes_kept(lambda module=module: module(x)) for module in holder]
    keep_less(holder)
    after = [bytes_kept(lambda module=module: module(x)) for module in holder]
    weights = [sum(parameter.nbytes for parameter in module.parameters()) for module in holder]
    assert before[0] - after[0] >= tokens * width * 2  # 32 bit of the input, where 16 do
    assert after[0] == weights[0] + tokens * (width * 2 + 4)
    assert before[1] - after[1] == tokens * 3 * width * 2
    assert after[1] == weights[1] + 2 * tokens * 3 * width * 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", [*KINDS, "qwen2_5_vl", "smolvlm", "text"])
def test_a_family_gives_the_same_loss_and_gradients_and_keeps_less(recipe: MakeRecipe, kind: str, quantization: str) -> None:
    settings = load_recipe(recipe(kind, **{"model.quantization": quantization, "model.dtype": "float32", "lora.dropout": 0.0}))
    processor, family = load_processor(settings)
    batch = batch_of(settings, processor, family)
    losses: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    kept: list[int] = []
    for prepare in (add_adapter, prepare_for_training):
        torch.manual_seed(0)
        model = prepare(load_base(settings.model, family), family, settings.lora).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)

        def loss(model: nn.Module = model) -> Tensor:
            return model(**batch, use_cache=False).loss

        kept.append(bytes_kept(loss))
        losses.append(loss())
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert torch.equal(*losses)
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, lean in zip(*gradients, strict=True):
        assert (lean - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert kept[1] < kept[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_and_mlp_of_a_language_model_is_replaced(recipe: MakeRecipe, kind: str) -> None:
    model, _, family = load_model(load_recipe(recipe(kind)))
    text = [(name, module) for name, module in model.named_modules() if not family.sees.match(name.split("model.", 2)[-1])]
    layers = model.get_base_model().config.get_text_config().num_hidden_layers
    assert sum(isinstance(module, LeanMLP) for _, module in text) == layers
    assert sum(isinstance(module, LeanNorm) for _, module in text) >= 2 * layers + 1
    assert not [
        name for name, module in text if type(module).__name__.endswith(("RMSNorm", "MLP")) and "Lean" not in repr(module)
    ]


def test_names_and_weights_stay(recipe: MakeRecipe) -> None:
    settings = load_recipe(recipe())
    _, family = load_processor(settings)
    base = load_base(settings.model, family)
    before = {name: tensor.data_ptr() for name, tensor in base.state_dict().items()}
    assert keep_less(base) > 0
    assert {name: tensor.data_ptr() for name, tensor in base.state_dict().items()} == before


def test_a_norm_that_computes_something_else_stays_as_it_is() -> None:
    config = GemmaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    gemma = GemmaForCausalLM(config).requires_grad_(False)
    assert keep_less(gemma) == 1  # its MLP is LLaMA's, its norms add 1 to their weights
    assert not [module for module in gemma.modules() if isinstance(module, LeanNorm)]


def test_a_module_without_source_or_with_a_wrapped_forward_stays_as_it_is() -> None:
    class Wrapped(LlamaRMSNorm):
        @torch.no_grad()
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states)

    space: dict[str, Any] = {"LlamaRMSNorm": LlamaRMSNorm}
    exec("class Typed(LlamaRMSNorm):\n    def forward(self, hidden_states):\n        return hidden_states", space)
    assert keep_less(nn.ModuleList([Wrapped(4), space["Typed"](4)])) == 0


def test_a_module_that_somebody_changed_stays_as_it_is() -> None:
    class Wrapped(LlamaRMSNorm):
        @wraps(LlamaRMSNorm.forward)
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    own, hooked, wrapped = LlamaRMSNorm(4), LlamaRMSNorm(4), Wrapped(4)
    own.forward = lambda x: x  # as accelerate and hub kernels do
    hooked.register_forward_hook(lambda _, __, output: 2 * output)
    assert keep_less(nn.ModuleList([own, hooked, wrapped])) == 0


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    holder = nn.ModuleList([norm().requires_grad_(True)])
    x = torch.randn(5, 32)
    expected = torch.autograd.grad(holder[0](x).square().sum(), holder[0].weight)[0]
    keep_less(holder)
    assert torch.equal(torch.autograd.grad(holder[0](x).square().sum(), holder[0].weight)[0], expected)


def test_checkpointing_changes_no_gradient_of_them() -> None:
    holder = nn.ModuleList([norm(), mlp()])
    keep_less(holder)
    chain = nn.Sequential(*holder)
    x = torch.randn(5, 32)
    _, plain = result_and_gradient(chain, x)
    again = x.clone().requires_grad_()
    result = checkpoint(chain, again, use_reentrant=False)
    torch.manual_seed(1)
    assert torch.equal(torch.autograd.grad(result, again, torch.randn_like(result))[0], plain)


def test_a_run_learns_the_same_as_without(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[list[float]] = []
    for name in ("lean", "plain"):
        if name == "plain":
            monkeypatch.setattr(model, "keep_less", lambda _: 0)
        run = finetune(recipe(**{"train.output_dir": str(tmp_path / name), "train.max_steps": 8}))
        losses.append([entry["loss"] for entry in run.history if "loss" in entry])
    assert len(losses[0]) == 8
    assert all(abs(one - other) <= 1e-4 * one for one, other in zip(*losses, strict=True))
