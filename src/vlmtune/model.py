"""The model factory: a checkpoint, quantised, with a LoRA adapter on the part that is to learn.

Every line that depends on a version of transformers, peft or bitsandbytes stands here, with the link that says why.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from vlmtune.activations import LeanMLP, keep_less
from vlmtune.attention import IMPLEMENTATION, OF_PICTURES
from vlmtune.errors import ModelError, RecipeError, one_line
from vlmtune.families import Family, find_family
from vlmtune.patches import multiply_patches
from vlmtune.plugins import did_you_mean
from vlmtune.prefixes import compute_once
from vlmtune.recipe import LoraSection, ModelSection, Recipe

Processor: TypeAlias = Any  # a ProcessorMixin or, for text models, a tokenizer


def load_model(recipe: Recipe, *, family: Family | str | None = None) -> tuple[PeftModel, Processor, Family]:
    """A model that is ready to be trained, its processor and its family.

    The language model is quantised as `model.quantization` says; vision tower, projector, embeddings and head stay in
    16 bit. Only the LoRA adapter is trainable, and it is on the language model only unless `lora.scope` says otherwise, so
    that a frozen tower runs without autograd.

    Raises:
        ModelError: the checkpoint or its processor cannot be loaded.
        RecipeError: a LoRA target that no module of the model has.

    """
    processor, found = load_processor(recipe, family=family)
    base = load_base(recipe.model, found, use_cpu=bool(recipe.train.get("use_cpu")))
    return prepare_for_training(base, found, recipe.lora), processor, found


def load_processor(recipe: Recipe, *, family: Family | str | None = None) -> tuple[Processor, Family]:
    """The checkpoint's processor with the recipe's pixel settings, and the family."""
    section = recipe.model
    found = find_family(family or section.family, config=load_config(section))
    processor = read_processor(section, found)
    bound_pixels(recipe, processor, found)
    return processor, found


def bound_pixels(recipe: Recipe, processor: Processor, family: Family) -> None:
    """Gives a processor the recipe's pixel settings."""
    images = recipe.images
    if images.min_pixels or images.max_pixels:
        family.set_pixels(processor, min_pixels=images.min_pixels, max_pixels=images.max_pixels)


def read_processor(section: ModelSection, family: Family, directory: Path | None = None) -> Processor:
    """The processor, or a language model's tokenizer, of the checkpoint or of another directory.

    Raises:
        ModelError: there is none, or it cannot be read.

    """
    auto = AutoProcessor if family.takes_images else AutoTokenizer
    kind = "processor" if family.takes_images else "tokenizer"
    try:
        processor: Processor = auto.from_pretrained(directory or section.name, **_origin(section, directory))
    except Exception as error:  # tokenizers raises the bare class, transformers a handful
        raise ModelError(f"{directory or section.name} has no usable {kind}: {one_line(error)}") from error
    if family.takes_images and not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{directory or section.name} has no processor, only a {type(processor).__name__}: put the checkpoint's "
            "preprocessor_config.json or processor_config.json beside its weights"
        )
    return processor


def load_config(section: ModelSection) -> Any:
    """The checkpoint's config.

    Raises:
        ModelError: no checkpoint of that name.

    """
    if section.name.startswith(("/", "./", "../", "~")) and not Path(section.name).expanduser().exists():
        raise ModelError(f"model {section.name}: there is no such directory")
    try:
        return AutoConfig.from_pretrained(section.name, **_origin(section))
    except (OSError, ValueError, KeyError) as error:
        what = "directory" if Path(section.name).exists() else "hub id or directory"
        raise ModelError(f"model {section.name}: no checkpoint to be found in this {what}: {one_line(error)}") from error


def load_base(section: ModelSection, family: Family, *, use_cpu: bool = False) -> PreTrainedModel:
    """The checkpoint's model, quantised, frozen, on this process's device."""
    dtype = compute_dtype(section)
    model = read_model(
        section,
        family,
        dtype=dtype,
        device_map={"": device(use_cpu=use_cpu)},
        attn_implementation=section.attention,
        quantization_config=quantization_config(section, family, dtype),
    )
    attend_in_tower(model, family)
    keep_training_layout(model)
    return model.requires_grad_(False)


def outline_base(section: ModelSection, family: Family, config: Any) -> PreTrainedModel:
    """What `load_base` makes of a checkpoint with this config, on the meta device: shapes and dtypes without weights.

    To be called within a `ledger.Outline`, so that integers among the buffers have values.
    """
    auto = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
    dtype = compute_dtype(section)
    options = {"attn_implementation": section.attention} if section.attention else {}
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(copy.deepcopy(config), dtype=dtype, **options)
    quantization = quantization_config(section, family, dtype)
    if quantization is not None:  # as `from_pretrained` does it before and after the weights
        quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": "meta"})
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                _outline_four_bit(module, dtype)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                _outline_eight_bit(module, dtype)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer  # by which the trainer knows that adapters can be trained on it
    multiply_patches(model)
    attend_in_tower(model, family)
    keep_training_layout(model)
    return model.requires_grad_(False)


def skeleton(section: ModelSection, family: Family, config: Any) -> PreTrainedModel:
    """The model of this config without weights, for its names and shapes."""
    auto = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(config), trust_remote_code=section.trust_remote_code)


def weight_files(section: ModelSection) -> list[Path]:
    """The checkpoint's files of weights, from its directory or the hub's cache; those that are missing are fetched.

    Raises:
        ModelError: it has none in safetensors' format.

    """
    origin: Any = {"revision": section.revision or "main"}
    try:
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):  # as `from_pretrained` looks
            found = cached_file(section.name, name, _raise_exceptions_for_missing_entries=False, **origin)
            if found and name == SAFE_WEIGHTS_NAME:
                return [Path(found)]
            if found:
                return [Path(path) for path in get_checkpoint_shard_files(section.name, found, **origin)[0]]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {section.name}: its weights cannot be found: {one_line(error)}") from error
    raise ModelError(
        f"model {section.name} has no weights in safetensors' format, only in another: load it once and write it with "
        "`save_pretrained`"
    )


def parameter_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str | None]:
    """What `from_pretrained` makes of a checkpoint's names, of this or an earlier transformers: the model's own.

    None where a tensor does not become a parameter as it is, but is split or joined with others.
    https://github.com/huggingface/transformers/blob/main/src/transformers/core_model_loading.py (`rename_source_key`)
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str | None] = {}
    for name in sorted(names):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = name, None
        found[name] = renamed if pattern is None else None
    return found


def _outline_four_bit(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> None:
    """Packed weights and their statistics, quantised in their turn, as `Params4bit` has them on a device."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    size = layer.out_features * layer.in_features
    blocks = -(-size // 64)
    nested = QuantState(absmax=empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32, device="meta").to(torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=dtype,
        blocksize=64,
        code=empty(16),
        quant_type="nf4",
        offset=empty(),
        state2=nested,
    )
    packed = torch.empty((-(-size // 2), 1), dtype=torch.float32, device="meta").to(torch.uint8)
    four_bit: Any = bnb.nn.Params4bit  # its arguments are its `__new__`'s, which pyright does not see
    options = {"quant_state": state, "blocksize": 64, "quant_type": "nf4", "module": layer, "bnb_quantized": True}
    layer.weight = four_bit(packed, requires_grad=False, **options)
    vars(layer)["quant_state"] = state
    _outline_bias(layer, dtype)


def _outline_eight_bit(layer: bnb.nn.Linear8bitLt, dtype: torch.dtype) -> None:
    """A byte a weight, and a number for each row. How many columns hold outliers is up to values: none is taken to."""
    layer.state.threshold = 0.0
    rows = torch.empty(layer.weight.shape, dtype=torch.float32, device="meta").to(torch.int8)
    scales = torch.empty(layer.out_features, dtype=torch.float32, device="meta")
    eight_bit: Any = bnb.nn.Int8Params
    layer.weight = eight_bit(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
    _outline_bias(layer, dtype)


def _outline_bias(layer: nn.Linear, dtype: torch.dtype) -> None:
    if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype, device="meta"), requires_grad=False)


def read_model(section: ModelSection, family: Family, directory: Path | None = None, **options: Any) -> PreTrainedModel:
    """The model of the checkpoint or of another directory; `options` of `from_pretrained`.

    Raises:
        ModelError: it cannot be read.

    """
    auto = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(directory or section.name, **_origin(section, directory), **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {directory or section.name} cannot be loaded: {one_line(error)}") from error
    savable(model.generation_config)
    multiply_patches(model)
    return model


def savable(generation: GenerationConfig) -> GenerationConfig:
    """Mends a temperature without `do_sample`, which older checkpoints have and transformers refuses to save."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
    return generation


def check_trust(section: ModelSection, what: object, *, trust_remote_code: bool) -> None:
    """Refuses to run code that came with a checkpoint, unless the caller allowed it: a recipe that lies with it may not.

    Raises:
        ModelError: it is wanted and was not allowed.

    """
    if section.trust_remote_code and not trust_remote_code:
        raise ModelError(f"{what} runs the code that came with its checkpoint: allow it with --trust-remote-code")


def device(*, use_cpu: bool = False) -> torch.device:
    """CUDA, Apple or CPU, by what is there; with several processes, each its own card."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available() and not use_cpu:
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(section: ModelSection) -> torch.dtype:
    """The dtype of everything that is not quantised, and in which is computed."""
    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16  # T4 and older
    return torch.bfloat16


def quantization_config(section: ModelSection, family: Family, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Bitsandbytes' settings; the parts that see stay out of it, and so does the head."""
    if section.quantization == "none":
        return None
    # patterns are matched from the start of a module's name, and a list of one's own replaces the default, `lm_head`:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/quantizers_utils.py
    skip = [f".*({'|'.join(family.frozen_modules)})", "lm_head"] if family.frozen_modules else ["lm_head"]
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def keep_training_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward without gradients (an evaluation, `generate`) repacks every layer for good,
    and training afterwards is wrong: lost gradients, or an error about a view of a leaf.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (`Linear4bit.forward`)
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def prepare_for_training(base: PreTrainedModel, family: Family, lora: LoraSection) -> PeftModel:
    """The frozen model with a fresh LoRA adapter, keeping no more for the backward pass than it needs.

    Raises:
        RecipeError: a target that no module within the scope is called.

    """
    keep_less(base)
    return add_adapter(base, family, lora)


def add_adapter(base: PreTrainedModel, family: Family, lora: LoraSection) -> PeftModel:
    """The model with a fresh LoRA adapter.

    Raises:
        RecipeError: a target that no module within the scope is called.

    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=lora_targets(base, family, lora),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    with old_names_allowed():
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    keep_training_layout(model)
    return model


@contextmanager
def old_names_allowed() -> Generator[None]:
    """Silences the warning that peft 0.21 asks for transformers' `is_gradient_checkpointing` by that old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def lora_targets(model: nn.Module, family: Family, lora: LoraSection) -> str:
    """The regex of the modules that get an adapter; every target named in the recipe matches at least one of them."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    leaves = {_leaf(name) for name in linear} - {"lm_head"}  # TRL's fused loss reads the head's weight directly
    inside = re.compile(family.lora_targets(leaves, lora.scope))
    there = sorted({_leaf(name) for name in linear if inside.fullmatch(name)})
    wanted = there if lora.targets == "all-linear" else list(lora.targets)
    missing = [name for name in wanted if name not in there]
    if missing or not wanted:
        hint = did_you_mean(missing[0], there) if missing else ""
        raise RecipeError(
            f"`lora.targets` names {', '.join(missing) or 'nothing'}, and no linear module of the {lora.scope} part of "
            f"this {family.name} model is called so: nothing would be trained.{hint}"
        )
    return family.lora_targets(wanted, lora.scope)


def _leaf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` → `q_proj`, and of a member of a list `visual.merger.mlp.0` → `mlp.0`."""
    found = re.search(r"[^.]+(?:\.\d+)*$", name)
    return found[0] if found else name


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of a model."""

    part: str
    trainable: int
    total: int
    dtypes: str


def parameter_counts(model: nn.Module, family: Family) -> list[PartCount]:
    """Trainable and total parameters of the language model, what sees, and the head; quantised ones counted as they were."""
    parts: dict[str, list[tuple[int, bool, str]]] = {"language model": [], "vision tower and projector": [], "head": []}
    tied: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in tied:
            continue
        tied.add(id(parameter))
        part = part_of(name, family)
        state = getattr(parameter, "quant_state", None)  # 4 bit: two weights a byte
        shape = state.shape if state is not None else parameter.shape
        kind = "nf4" if state is not None else str(parameter.dtype).removeprefix("torch.")
        parts[part].append((math.prod(shape), parameter.requires_grad, kind))
    return [
        PartCount(
            part,
            sum(count for count, trainable, _ in counts if trainable),
            sum(count for count, _, _ in counts),
            ", ".join(sorted({kind for _, _, kind in counts})),
        )
        for part, counts in parts.items()
        if counts
    ]


def part_of(name: str, family: Family) -> str:
    """Which part of a model a parameter of this name belongs to."""
    if "lm_head" in name.split("."):
        return "head"
    return "vision tower and projector" if family.sees.match(name) else "language model"


def use_checkpointing(model: PeftModel, every_n_layers: int = 1, **options: Any) -> None:
    """Recomputes the layers' activations in the backward pass instead of keeping them; `options` of torch's checkpoint.

    Without the hooks that make inputs require gradients: they are for reentrant checkpointing, and on the vision tower they
    would keep its activations for gradients that nobody uses.
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (`enable_input_require_grads`)
    """
    if every_n_layers < 1:
        raise RecipeError(f"`train.gradient_checkpointing_kwargs.every_n_layers` is {every_n_layers}: it should be 1 or more")
    base: Any = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False, **options}, every_n_layers=every_n_layers)
    base.disable_input_require_grads()


def match_adapter_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Gives the adapter its float32 back unless all is computed in bfloat16; TRL casts it to that on every quantised base.

    Under float32 a bfloat16 adapter would answer otherwise than after it is saved and loaded; and under float16 the
    gradient scaler takes no bfloat16 gradients.
    https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py ("When using QLoRA, ...")
    """
    for parameter in model.parameters():
        if parameter.requires_grad and dtype != torch.bfloat16:
            parameter.data = parameter.data.float()


@contextmanager
def evaluating(model: Any) -> Generator[None]:
    """The model as it answers: no dropout, no gradients, computing in its own dtype as it does in training."""
    was_training = model.training
    model.eval()
    autocast = torch.autocast(model.device.type, model.dtype) if model.dtype != torch.float32 else nullcontext()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        model.train(was_training)


def with_features(model: Any, family: Family, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with features for the pictures that came apart from its rows: each goes through the tower once.

    Args:
        model: on its device, as the batch is.
        family: knows how pictures are encoded.
        batch: with `distinct` and `shown`, as `MultimodalCollator` makes them; another stays as it is.

    """
    if "distinct" not in batch:
        return dict(batch)
    rest = {name: values for name, values in batch.items() if name not in ("distinct", "shown")}
    features = encoded(model, family, batch["distinct"])
    return {**rest, "image_features": family.join_features(rest, [features[number] for number in batch["shown"]])}


def encoded(model: Any, family: Family, batch: Mapping[str, Any]) -> list[Tensor]:
    """The features of the pictures whose pixels a batch holds, `[tokens, hidden]` each."""
    base: Any = getattr(model, "module", model).get_base_model()  # DistributedDataParallel hides it
    return family.encode(base.base_model, batch)


def on_device(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The batch where the model is; pixels and features in the model's dtype, and what is no tensor as it was."""

    def moved(values: Any) -> Any:
        if isinstance(values, Mapping):
            return on_device(values, model)
        floats = isinstance(values, Tensor) and values.is_floating_point()
        return values.to(model.device, model.dtype if floats else None) if isinstance(values, Tensor) else values

    return {name: moved(values) for name, values in batch.items()}


def attend_in_tower(base: PreTrainedModel, family: Family) -> None:
    """Has what sees attend by the kernel that its device is fastest with, where it would by SDPA."""
    towers: list[Any] = [
        module for name, module in base.named_modules() if isinstance(module, PreTrainedModel) and family.sees.match(f"{name}.")
    ]
    for tower in towers:
        if tower.config._attn_implementation == "sdpa" and tower._can_set_attn_implementation():
            tower.set_attn_implementation(OF_PICTURES)


def attend_by_row(model: PeftModel) -> None:
    """Has the language model attend to each row of a pack by itself, whatever the device and its kernels.

    FlashAttention and flex attention do so by themselves, but not where a model looks at its pictures by cross-attention.

    Raises:
        ModelError: a model that does not take its attention from transformers' `AttentionInterface`, or an attention that
            knows nothing of packed rows.

    """
    base: Any = model.get_base_model()
    text = base.config.get_text_config()
    own = str(text._attn_implementation)
    if ("flash" in own or own == "flex_attention") and not hasattr(text, "cross_attention_layers"):
        return
    if own == "eager":
        raise ModelError("eager attention cannot keep packed rows apart: leave `model.attention` out")
    if not type(base)._can_set_attn_implementation():
        raise ModelError(f"{type(base).__name__} does not take its attention from transformers' AttentionInterface")
    named = [name for name in base.config.sub_configs if getattr(base.config, name) is text]
    base.set_attn_implementation({named[0]: IMPLEMENTATION} if named else IMPLEMENTATION)


def share_prefixes_in(model: PeftModel) -> str:
    """Has the language model compute once what rows of a pack begin with alike; or tells why it cannot."""
    base: Any = model.get_base_model()
    attention = base.config.get_text_config()._attn_implementation
    if attention != IMPLEMENTATION:
        return f"`model.attention` is {attention}, which does not let rows share what they begin with"
    if not (obstacle := sharing_obstacle(base.config)):
        compute_once(base.base_model.get_decoder())
    return obstacle


def sharing_obstacle(config: Any) -> str:
    """Why a model of this config cannot compute once what rows of a pack begin with alike, if it cannot."""
    text = config.get_text_config()
    if hasattr(text, "cross_attention_layers"):
        return "pictures are read through cross-attention here, by the tokens before a picture too"
    if hasattr(text, "output_router_logits"):
        return "the model is a mixture of experts, which is balanced over all tokens"
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if others or any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return "not all layers of the model are attention over all of a row"
    return ""


def last_mlp(model: PeftModel, family: Family) -> LeanMLP | None:
    """That of the language model's last layer, where it is one that is known; experts of a mixture are not."""
    core: Any = model.get_base_model().base_model
    layers = [
        module
        for name, module in core.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and not family.sees.match(f"{name}.")
    ]
    return next((part for part in layers[-1].children() if isinstance(part, LeanMLP)), None) if layers else None


def kept_apart(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward, as the model's attention can tell packed rows from each other.

    Flex attention does so by their positions, and only where there is no mask. For the others the padding at a pack's end is a
    row like others: a mask that leaves it out would be made into one over all of the pack.
    https://github.com/huggingface/transformers/blob/main/src/transformers/masking_utils.py (`_preprocess_mask_arguments`)
    """
    if "segments" not in inputs or "attention_mask" not in inputs:
        return inputs
    config: Any = getattr(model, "module", model).config  # DistributedDataParallel hides it
    if config.get_text_config()._attn_implementation != "flex_attention":
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    return {name: values for name, values in inputs.items() if name != "attention_mask"}


def positions_model(model: PeftModel) -> Any:
    """The model without its head, on the meta device and so without weights, by whose config positions are told."""
    core: Any = model.get_base_model().base_model
    if not hasattr(core, "get_rope_index"):  # 0, 1, 2, …
        return None
    with torch.device("meta"):
        return type(core)(copy.deepcopy(core.config))


def _origin(section: ModelSection, directory: Path | None = None) -> dict[str, Any]:
    revision = {} if directory else {"revision": section.revision or "main"}
    return {"trust_remote_code": section.trust_remote_code, **revision}
