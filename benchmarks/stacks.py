"""How others train the same adapter, for `vlmtune.planner.simulation`: which weights have which dtype, which loss, which hooks.

vlmtune's own stack is a recipe; these are stated in code, each line as the stack's sources have it. All run on today's
modeling code: what a model computed otherwise in the versions that a stack stands for is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bitsandbytes.autograd._functions import MatMul4Bit
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from vlmtune.families import find_family
from vlmtune.model import add_adapter, outline_base
from vlmtune.planner.kernels import CUDA, Kernels
from vlmtune.planner.ledger import Outline
from vlmtune.planner.material import Material, read_material
from vlmtune.planner.simulation import NO_ROWS, NOT_SIMULATED, Simulation, StaysThere
from vlmtune.recipe import LoraSection, ModelSection, Recipe, load_recipe

QV = LoraSection(r=8, alpha=16, dropout=0.05, targets=["q_proj", "v_proj"])

Loss = Callable[..., Tensor]  # a model's `loss_function`


@dataclass(frozen=True)
class Stack:
    """How a LoRA adapter is trained."""

    name: str
    lora: LoraSection = QV
    quantization: Literal["nf4", "none"] = "nf4"
    norms_in_32_bit: bool = False  # TRL 0.11 to 0.13: all that is not 4-bit, then embeddings and head back
    adapters: torch.dtype = torch.float32  # peft's default
    autocast: bool = True  # bf16=True
    checkpointing: bool = True
    hooks: bool = True  # inputs of tower and language model require gradients, as transformers and TRL have it
    loss: Loss | Literal["fused", "upcast", "the model's own"] = "the model's own"
    attention: str | None = None
    inputs_kept: bool = False  # by 4-bit layers, which need none: bitsandbytes 0.41


# https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py
TRL = Stack("TRL 1.16", adapters=torch.bfloat16, loss="fused")

# transformers 4.45.1, TRL 0.11.1, peft 0.13.0: neither TRL nor peft hooks the inputs of a quantised model without
# reentrant checkpointing. https://github.com/huggingface/trl/blob/v0.11.1/trl/trainer/sft_trainer.py
TUTORIAL = Stack("the tutorial, 2024", norms_in_32_bit=True, hooks=False, loss="upcast")


def shifted_copy(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The loss of transformers 4.48: logits in 32 bit, and a copy of them without the last position.

    https://github.com/huggingface/transformers/blob/v4.48.1/src/transformers/loss/loss_utils.py
    """
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def shifted_16_bit(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The loss of Qwen's first models: the copy is in 16 bit, and autocast makes it 32.

    https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py
    """
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


class _Trainer(StaysThere, Trainer):
    """transformers' trainer: the model's own loss, over all logits."""


class _UpcastTrainer(_Trainer):
    """The loss as transformers 4.45 has it in the model's forward: of the logits, those in 32 bit are kept."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)  # which accelerate casts to 32 bit
        return shifted_copy(outputs.logits, labels, outputs.logits.shape[-1])


class _TrlTrainer(StaysThere, SFTTrainer):
    """TRL's trainer as it is."""


def simulated(stack: Stack, config: Any, processor: Any = None) -> Simulation:
    """A stack's training of a model with this config, on a GPU from Ampere on.

    Args:
        stack: how it is trained.
        config: of a checkpoint, as published.
        processor: TRL's trainer wants one.

    """
    family, kernels = find_family(config=config), Kernels(CUDA)
    section = ModelSection(name="-", quantization=stack.quantization, dtype="bfloat16", attention=stack.attention)
    with Outline():
        # everything but the head is quantised, the tower too: bitsandbytes' default
        base = outline_base(section, replace(family, frozen_modules=()), config)
        if stack.norms_in_32_bit:
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        model = add_adapter(base, family, stack.lora)
        if stack.norms_in_32_bit:
            _cast_back(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(stack.adapters)
    if callable(stack.loss):
        inner: Any = model.get_base_model()
        inner.loss_function = stack.loss

    def build() -> Any:
        trainer = _trainer(stack, model, processor)
        if stack.checkpointing:
            inner: Any = model.get_base_model()
            options = {"use_reentrant": False, "context_fn": kernels.again}
            inner.activation_checkpointing_enable(options)  # as `Trainer.train` does, which installs the hooks too
            if not stack.hooks:
                inner.disable_input_require_grads()
        return trainer

    return Simulation(build, family, kernels)


@contextmanager
def as_then(stack: Stack) -> Generator[None]:
    """Bitsandbytes as it was, while a step is simulated.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.41.1/bitsandbytes/autograd/_functions.py (`MatMul4Bit`)
    """
    forward = MatMul4Bit.forward

    def keeping(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        ctx.kept = args[0]
        return forward(ctx, *args, **kwargs)

    with patch.object(MatMul4Bit, "forward", staticmethod(keeping)) if stack.inputs_kept else nullcontext():
        yield


def pictured_recipe(name: str, *, size: tuple[int, int], text_tokens: int, **values: Any) -> Recipe:
    """Of a published checkpoint and rows of a picture and so many tokens of text; `values` by dotted key."""
    data = {"source": "-", "image_size": list(size), "text_tokens": text_tokens}
    return load_recipe({"model": {"name": name}, "data": data}, **values)


def pictured(name: str, **values: Any) -> Material:
    """Rows of such a recipe."""
    return read_material(pictured_recipe(name, **values))


def padded(material: Material, rows: int) -> dict[str, Any]:
    """A batch of a material's rows, of which all but the first have a token of padding: attention then needs a mask."""
    batch: dict[str, Any] = dict(material.collator([material.rows[0]] * rows))
    batch["attention_mask"][1:, -1] = 0
    return batch


def _trainer(stack: Stack, model: PeftModel, processor: Any) -> Any:
    common: dict[str, Any] = {
        **NOT_SIMULATED,
        "bf16": stack.autocast,
        "gradient_accumulation_steps": 1,
        "remove_unused_columns": False,
    }
    given: dict[str, Any] = {"model": model, "train_dataset": NO_ROWS, "data_collator": list}
    if stack.loss == "fused":
        options: dict[str, Any] = {"gradient_checkpointing": stack.checkpointing, "max_length": None}
        config = SFTConfig(**common, **options, dataset_kwargs={"skip_prepare_dataset": True})
        return _TrlTrainer(args=config, processing_class=processor, **given)
    trainer = _UpcastTrainer if stack.loss == "upcast" else _Trainer
    return trainer(args=TrainingArguments(**common), **given)


def _cast_back(model: nn.Module) -> None:
    """What stays in 32 bit are norms, convolutions and biases.

    https://github.com/huggingface/trl/blob/v0.11.1/trl/trainer/utils.py (`peft_module_casting_to_bf16`)
    """
    for name, module in model.named_modules():
        if "norm" not in name and any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dtype == torch.float32:
                module.to(torch.bfloat16)
