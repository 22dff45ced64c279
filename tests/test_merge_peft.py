"""A merge beside PEFT's own: the same weights, whatever the family, the adapter and the checkpoint's names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import KINDS, make_processor
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune import ModelError, MultimodalCollator, OutputError, merge_adapter

ATTENTION = ["q_proj", "v_proj"]  # of the language model, and of two families' towers
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": [*ATTENTION, "down_proj"]},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "q_proj": 5},
    },
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tied": {"target_modules": ATTENTION},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 70]}},
    "vectors": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
Make = Callable[..., tuple[Path, Path]]


def auto(kind: str) -> Any:
    return AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText


@pytest.fixture
def adapted(checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    """A base, with its weights under the hub's names or under transformers' own, and a random adapter for it."""

    def make(kind: str, name: str | dict[str, Any], *, names: str = "hub", tied: bool = False, dtype: str = "float32") -> Any:
        options = ADAPTERS[name] if isinstance(name, str) else name
        tied = tied or name == "tied"
        source = checkpoint(kind)
        model = auto(kind).from_pretrained(source, dtype=dtype)
        if tied:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
            model.tie_weights()
        base = tmp_path / "base"
        model.save_pretrained(base, save_original_format=names == "hub")
        for path in source.iterdir():
            if not (base / path.name).exists():
                (base / path.name).write_bytes(path.read_bytes())
        torch.manual_seed(1)
        fresh = auto(kind).from_pretrained(base, dtype=dtype)
        tuned = get_peft_model(fresh, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
        tuned.save_pretrained(tmp_path / "adapter")
        return base, tmp_path / "adapter"

    return make


def merged_by_peft(kind: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    model: Any = PeftModel.from_pretrained(auto(kind).from_pretrained(base), str(adapter)).merge_and_unload()
    return model.state_dict()


def ulps(one: Tensor, other: Tensor) -> int:
    """How many numbers of a 16-bit format lie between the two, at most."""

    def order(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((order(one) - order(other)).abs().max())


CASES = [
    pytest.param(kind, name, names, id=f"{kind}-{name}-{names}")
    for kind in (*KINDS, "text")
    for name in ADAPTERS
    for names in ("hub", "transformers")
    if not (kind == "text" and names == "transformers")  # where both are the same
    if not (kind == "mllama" and name == "tied")  # its embeddings have more rows than its head
]


@pytest.mark.parametrize(("kind", "name", "names"), CASES)
def test_in_float32_the_merged_weights_are_peft_s_bit_by_bit(
    adapted: Make, tmp_path: Path, kind: str, name: str, names: str
) -> None:
    base, adapter = adapted(kind, name, names=names)
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    expected = merged_by_peft(kind, base, adapter)
    merged = auto(kind).from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert [n for n in merged if not torch.equal(merged[n], expected[n])] == []
    stored, before = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", base))
    assert stored.keys() == before.keys()  # the base's names, whichever they are


@pytest.mark.parametrize(("kind", "name", "names"), [case for case in CASES if "embedding" not in case.values])
def test_in_bfloat16_they_are_peft_s_to_one_unit_in_the_last_place(
    adapted: Make, tmp_path: Path, kind: str, name: str, names: str
) -> None:
    base, adapter = adapted(kind, name, names=names, dtype="bfloat16")
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    expected = merged_by_peft(kind, base, adapter)
    merged = auto(kind).from_pretrained(tmp_path / "merged").state_dict()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert max(ulps(merged[n], expected[n]) for n in merged) <= 1


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_where_peft_rounds_twice_the_merged_weights_are_nearer_to_base_plus_adapter(
    adapted: Make, tmp_path: Path, kind: str
) -> None:
    """A change as large as the weight may cancel it: of such a sum PEFT's two roundings leave nothing right."""
    base, adapter = adapted(kind, "embedding", dtype="bfloat16")
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    by_peft = merged_by_peft(kind, base, adapter)
    merged = auto(kind).from_pretrained(tmp_path / "merged").state_dict()
    exact: Any = PeftModel.from_pretrained(auto(kind).from_pretrained(base, dtype="float32"), str(adapter)).merge_and_unload()
    for name, weight in exact.state_dict().items():
        ours, peft = ((one[name].float() - weight).abs() for one in (merged, by_peft))
        assert (ours <= torch.finfo(torch.bfloat16).eps / 2 * weight.abs()).all()
        assert ours.max() <= peft.max()


OLDER = {  # what transformers called these before 4.52
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "mllama": [
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("lm_head.", "language_model.lm_head."),
    ],
    "pixtral": [
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("lm_head.", "language_model.lm_head."),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_was_trained_under_older_names_is_merged_all_the_same(
    adapted: Make, tmp_path: Path, kind: str, name: str
) -> None:
    """PEFT loads the half of it, or nothing, and warns."""
    if name == "tied" and kind == "mllama":
        pytest.skip("its embeddings have more rows than its head")
    base, adapter = adapted(kind, name)
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        older = key
        for new, old in OLDER[kind]:
            older = older.replace(f"base_model.model.{new}", f"base_model.model.{old}")
        renamed[older] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "again", base=str(base))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
@pytest.mark.parametrize("kind", ["qwen2_vl", "text"])
def test_tied_weights_of_which_one_changes_are_two_afterwards(
    adapted: Make, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    base, adapter = adapted(kind, {"target_modules": ["q_proj"], **options}, tied=True)
    merge_adapter(adapter, tmp_path / "merged", base=str(base), verify="full")
    ids = torch.tensor([[9, 8, 7, 6]])
    tuned: Any = PeftModel.from_pretrained(auto(kind).from_pretrained(base), str(adapter))
    merged = auto(kind).from_pretrained(tmp_path / "merged")
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
    with torch.no_grad():
        assert (tuned.eval()(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() <= 1e-4


def test_tied_weights_that_were_trained_as_one_stay_one(adapted: Make, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    base, adapter = adapted("text", options, tied=True)
    merge_adapter(adapter, tmp_path / "merged", base=str(base), verify="full")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


FRESH = """
import sys
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
kind, *merged = sys.argv[1:]
said = [{"type": "text", "text": "What?"}]
if kind != "text":
    said.insert(0, {"type": "image", "image": Image.new("RGB", (40, 40))})
for directory in merged:
    auto = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    model, processor = auto.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": said}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    print(model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_a_fresh_process_loads_them_plainly_and_generates(adapted: Make, tmp_path: Path, kind: str) -> None:
    processor = make_processor(kind)
    processor.chat_template = MultimodalCollator(processor).chat_template
    merged: list[Path] = []
    for name in ADAPTERS.keys() - ({"tied"} if kind == "mllama" else set()):
        base, adapter = adapted(kind, name)
        processor.save_pretrained(adapter)
        merged.append(tmp_path / name)
        merge_adapter(adapter, merged[-1], base=str(base))
    done = subprocess.run([sys.executable, "-c", FRESH, kind, *merged], capture_output=True, text=True, check=True)
    said = [int(length) for length in done.stdout.split()]
    assert len(said) == len(merged)
    assert all(1 <= length <= 4 for length in said)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA on an embedding"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(adapted: Make, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    base, adapter = adapted("qwen2_vl", options)
    with pytest.raises(ModelError, match=sentence):
        merge_adapter(adapter, tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_weights_that_become_no_number_or_overflow_are_refused(adapted: Make, tmp_path: Path) -> None:
    base, adapter = adapted("text", "lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for factor, dtype, sentence in ((1e6, "float16", "too large for torch.float16"), (float("nan"), None, "no number")):
        changed = {name: tensor * factor for name, tensor in tensors.items()}
        save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=sentence):
            merge_adapter(adapter, tmp_path / "merged", base=str(base), dtype=dtype)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["tokens", "lora"])
def test_a_base_that_stores_both_of_its_tied_weights_is_merged_like_one_that_stores_one(
    adapted: Make, tmp_path: Path, name: str
) -> None:
    options = ADAPTERS[name] if name == "tokens" else {"target_modules": ["q_proj", "lm_head"]}
    base, adapter = adapted("text", options, tied=True)
    merge_adapter(adapter, tmp_path / "one", base=str(base))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "both", base=str(base), verify="full")
    ids = torch.tensor([[3, 70, 9]])
    one, both = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids).logits for name in ("one", "both"))
    assert torch.equal(one, both)


def test_a_change_that_rounding_takes_away_is_none(adapted: Make, tmp_path: Path) -> None:
    base, adapter = adapted("text", "lora", dtype="bfloat16")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e-6 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="the adapter changes no weight of its base"):
        merge_adapter(adapter, tmp_path / "merged", base=str(base))


def test_two_tensors_for_one_weight_are_refused(adapted: Make, tmp_path: Path) -> None:
    base, adapter = adapted("qwen2_vl", "lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    older = {name.replace("model.language_model.", "model."): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **older}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has two tensors for the same"):
        merge_adapter(adapter, tmp_path / "merged", base=str(base))


@pytest.mark.parametrize("place", ["base", "adapter", "."])
def test_a_merge_never_overwrites_what_it_is_made_of(adapted: Make, tmp_path: Path, place: str) -> None:
    base, adapter = adapted("text", "lora")
    (tmp_path / place / ".vlmtune").touch()
    with pytest.raises(OutputError, match="what the merge is made of"):
        merge_adapter(adapter, tmp_path / place, base=str(base), overwrite=True)
    assert (adapter / "adapter_config.json").exists()


def test_code_of_the_base_is_not_run_unasked(adapted: Make, tmp_path: Path) -> None:
    base, adapter = adapted("text", "lora")
    recipe = {"model": {"name": str(base), "trust_remote_code": True}, "data": {"source": "x"}, "train": {"output_dir": "y"}}
    (adapter / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(ModelError, match="runs the code that came with its checkpoint: allow it with --trust-remote-code"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", trust_remote_code=True)
