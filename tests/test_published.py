"""Published checkpoints without the hub: their parameters, their processors, and rows of stated sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_vocab
import torch
from tiny import make_processor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune.collator import MultimodalCollator
from vlmtune.errors import DatasetError, RecipeError
from vlmtune.families import find_family
from vlmtune.planner.published import published_config, published_processor
from vlmtune.planner.stated import stated_rows

QWEN, LLAMA = "Qwen/Qwen2-VL-7B-Instruct", "meta-llama/Llama-3.2-11B-Vision-Instruct"
PIXTRAL, LLAMA_1 = "mistral-community/pixtral-12b", "huggyllama/llama-7b"
REFERENCES = {"qwen2_vl": QWEN, "mllama": LLAMA, "pixtral": PIXTRAL}

PARAMETERS = {  # as the hub shows them, counted from each checkpoint's safetensors, where no arithmetic is given
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    QWEN: 8_291_375_616,
    "Qwen/Qwen2-VL-72B-Instruct": 73_405_560_320,
    LLAMA: 10_670_220_835,
    # by arithmetic: tiles of 448 pixels have 1024 patches, 576 fewer than those of 560; each has a position of its own,
    # 1280 wide, for any tile and for each of 4 tiles of 9 aspect ratios
    "meta-llama/Llama-3.2-11B-Vision": 10_670_220_835 - 576 * 1280 * (1 + 4 * 9),
    # by arithmetic: Mistral-Nemo's 12,247,782,400 of the hub, a tower of 24 layers (four 1024² and three 1024 × 4096 matrices
    # and two norms each), its patches and first norm, and a projector of two layers with biases
    PIXTRAL: 12_247_782_400
    + 24 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024)
    + (3 * 16**2 + 1) * 1024
    + (1024 + 1) * 5120
    + (5120 + 1) * 5120,
    # by arithmetic: 6.7B in https://arxiv.org/abs/2302.13971; 32 layers, embeddings and head, the last norm
    LLAMA_1: 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096,
}

# What each config.json says, in the form that the hub has it in.
HUB: dict[str, dict[str, Any]] = {
    QWEN: {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": 152064,
    },
    LLAMA: {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": 128256,
        "model_type": "mllama",
        "text_config": {
            "bos_token_id": 128000,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            "eos_token_id": [128001, 128008, 128009],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "model_type": "mllama_text_model",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "pad_token_id": 128004,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_heads": 16,
            "hidden_size": 1280,
            "image_size": 560,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "intermediate_size": 5120,
            "max_num_tiles": 4,
            "model_type": "mllama_vision_model",
            "num_global_layers": 8,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "torch_dtype": "bfloat16",
            "vision_output_dim": 7680,
        },
    },
    PIXTRAL: {  # sizes that are not here are the defaults of transformers
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "is_composition": True,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "head_dim": 64,
            "hidden_act": "silu",
            "image_size": 1024,
            "is_composition": True,
            "model_type": "pixtral",
            "patch_size": 16,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}
# what transformers carries along from an old file and does not look at
IGNORED = {"_name_or_path", "architectures", "vision_token_id", "ignore_index"}
IGNORED |= {"in_chans", "spatial_patch_size", "is_composition", "type"}

ONE, TWO = [(500, 500)], [(640, 480), (1200, 300)]
PICTURE_TOKENS = {  # of a picture of 500 × 500 pixels
    "qwen2_vl": 1 + 18 * 18 + 1,  # <|vision_start|>, 504 × 504 pixels in 28 × 28 each, <|vision_end|>
    "mllama": 1,  # <|image|>
    "pixtral": 32 * (32 + 1),  # rows of 16 × 16 pixels, each with [IMG_BREAK] or [IMG_END]
}


def collator(name: str, *, train_on_inputs: bool = False) -> MultimodalCollator:
    """Of a published checkpoint, or `tiny <kind>`: around a tokenizer of bytes."""
    kind = name.removeprefix("tiny ")
    processor = make_processor(kind) if kind != name else published_processor(name)
    return MultimodalCollator(processor, train_on_inputs=train_on_inputs)


# Configs.


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_makes_a_model_of_the_published_size(name: str) -> None:
    config = published_config(name)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]  # a tied head counts once
    assert model.config.name_or_path == name


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_is_the_one_that_transformers_reads_from_the_hubs_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    assert plain(AutoConfig.from_pretrained(tmp_path)) == plain(published_config(name))


def plain(config: Any) -> dict[str, Any]:
    def kept(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: kept(value) for key, value in values.items() if key not in IGNORED}

    found = kept(config.to_dict())
    found["vision_config"].pop("tie_word_embeddings", None)  # it has no head
    return found


def test_each_published_config_is_a_new_one() -> None:
    published_config(QWEN).text_config.num_hidden_layers = 1
    assert published_config(QWEN).text_config.num_hidden_layers == 28


def test_a_checkpoint_that_is_not_known_has_neither_config_nor_processor() -> None:
    assert published_config("somebody/else") is None
    assert published_processor("somebody/else") is None


# Processors.


@pytest.mark.parametrize(("kind", "name"), REFERENCES.items())
def test_special_tokens_have_their_published_ids(kind: str, name: str) -> None:
    names, first = {
        "qwen2_vl": (real_vocab.QWEN_SPECIAL, 151643),
        "mllama": (real_vocab.LLAMA_SPECIAL, 128000),
        "pixtral": (real_vocab.PIXTRAL_SPECIAL, 0),
    }[kind]
    tokenizer = published_processor(name).tokenizer
    assert {token: tokenizer.get_vocab()[token] for token in names} == {token: first + i for i, token in enumerate(names)}
    assert sorted(tokenizer.added_tokens_decoder) == list(range(first, first + len(names)))


def test_special_tokens_of_the_references_have_the_ids_in_their_configs() -> None:
    qwen, llama, pixtral = (published_processor(name).tokenizer.convert_tokens_to_ids for name in (QWEN, LLAMA, PIXTRAL))
    assert qwen(["<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]) == [151643, 151645, 151655, 151656]
    assert llama(["<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"]) == [128000, 128004, 128009]
    assert llama(["<|start_header_id|>", "<|end_header_id|>", "<|image|>"]) == [128006, 128007, 128256]
    assert pixtral(["<s>", "</s>", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]) == [1, 2, 10, 11, 12, 13]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_word_is_one_token_that_the_model_has_and_no_special_one(name: str) -> None:
    processor = published_processor(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer("oak stools are sturdy", add_special_tokens=False).input_ids
    assert ids == [ids[0]] * 4
    assert ids[0] not in tokenizer.all_special_ids
    assert ids[0] < published_config(name).get_text_config().vocab_size


@pytest.mark.parametrize(("kind", "name"), REFERENCES.items())
def test_a_published_processor_tells_its_family_as_the_config_does(kind: str, name: str) -> None:
    assert find_family(processor=published_processor(name)).name == find_family(config=published_config(name)).name == kind


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize(("kind", "name"), REFERENCES.items())
def test_a_published_processor_makes_batches_of_the_layout_that_training_has(
    kind: str, name: str, train_on_inputs: bool
) -> None:
    batching = collator(name, train_on_inputs=train_on_inputs)
    batch = batching(stated_rows(batching, text_tokens=100, image_sizes=ONE, count=2))
    tokens = 100 + PICTURE_TOKENS[kind]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, tokens)
    shape = {
        "qwen2_vl": (2 * 36 * 36, 3 * 2 * 14 * 14),  # 504 / 14 patches each way
        "mllama": (2, 1, 4, 3, 560, 560),
        "pixtral": (2, 3, 512, 512),  # multiples of 16
    }
    assert tuple(batch["pixel_values"].shape) == shape[kind]
    trained = (batch["labels"] != -100).sum(1)
    if train_on_inputs:
        assert trained.tolist() == [100, 100]
    else:
        assert 25 <= trained[0] == trained[1] <= 35  # an answer of a third of the words, and its stop token


def test_text_that_looks_like_a_special_token_stays_text() -> None:
    for name, marks in {QWEN: "<|im_end|>", LLAMA: "<|eot_id|>", PIXTRAL: "[IMG]"}.items():
        batching = collator(name)
        asked, answer = ({"role": role, "content": [{"type": "text", "text": marks}]} for role in ("user", "assistant"))
        ids = batching([{"messages": [asked, answer]}])["input_ids"]
        stops = {QWEN: 3, LLAMA: 2, PIXTRAL: 0}[name]  # of the turns; Qwen2-VL's template adds a system turn
        assert int((ids == batching.tokenizer.convert_tokens_to_ids(marks)).sum()) == stops


@pytest.mark.network
@pytest.mark.parametrize(("kind", "name"), REFERENCES.items())
def test_rows_of_simple_words_have_as_many_tokens_as_with_the_real_vocabulary(kind: str, name: str) -> None:
    processor = real_vocab.real_processor(kind)
    real, stand_in = MultimodalCollator(processor), collator(name)
    rows = stated_rows(real, text_tokens=400, image_sizes=TWO, count=1)
    assert texts(rows) == texts(stated_rows(stand_in, text_tokens=400, image_sizes=TWO, count=1))
    assert real.lengths(rows) == stand_in.lengths(rows)


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for row in rows for m in row["messages"] for part in m["content"] if part["type"] == "text"]


def test_a_template_of_trls_is_read_without_importing_trl() -> None:
    code = (
        f"from vlmtune.planner import published as p; p.published_processor({QWEN!r}); import sys; exit('trl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rows of stated sizes.


@pytest.mark.parametrize("sizes", [[], ONE, TWO], ids=["no picture", "one", "two"])
@pytest.mark.parametrize("name", [QWEN, LLAMA, PIXTRAL, "tiny qwen2_vl", "tiny mllama", "tiny pixtral", "tiny smolvlm"])
def test_stated_rows_have_exactly_the_stated_tokens_beside_those_of_their_pictures(
    name: str, sizes: list[tuple[int, int]]
) -> None:
    batching = collator(name)
    of_pictures = torch.tensor(sorted(batching.family.image_token_ids(batching.processor)))
    for text_tokens in (150, 151, 152, 697):
        rows = stated_rows(batching, text_tokens=text_tokens, image_sizes=sizes, count=2)
        ids, mask = (batching(rows)[key] for key in ("input_ids", "attention_mask"))
        assert mask.all()
        assert (~torch.isin(ids, of_pictures)).sum(1).tolist() == [text_tokens] * 2
        assert [row["name"] for row in rows] == ["stated sizes"] * 2
        opened = [part["image"] for part in rows[0]["messages"][0]["content"] if part["type"] == "image"]
        assert [(picture.size, picture.mode, picture.getbbox()) for picture in opened] == [(s, "RGB", None) for s in sizes]


@pytest.mark.parametrize("name", [LLAMA_1, "tiny text"])
def test_stated_rows_of_a_language_model_are_texts(name: str) -> None:
    batching = collator(name)
    for text_tokens in (20, 21, 255):
        rows = stated_rows(batching, text_tokens=text_tokens, image_sizes=[], count=3)
        assert batching(rows)["attention_mask"].sum(1).tolist() == [text_tokens] * 3
    with pytest.raises(DatasetError, match="stated sizes has a picture, and text models take none"):
        stated_rows(batching, text_tokens=100, image_sizes=ONE, count=1)


@pytest.mark.parametrize("name", [QWEN, LLAMA, PIXTRAL, LLAMA_1, "tiny qwen2_vl"])
def test_about_two_thirds_of_the_words_are_asked_and_one_third_is_answered(name: str) -> None:
    prompt, answer = texts(stated_rows(collator(name), text_tokens=600, image_sizes=[], count=1))
    assert len(prompt.split()) == pytest.approx(2 * len(answer.split()), abs=3)


# of the template, and two words; LLaMA's plain texts have nothing between them, so that the two are read as one
@pytest.mark.parametrize(
    ("name", "smallest"), [(QWEN, 23), (LLAMA, 13), (PIXTRAL, 6), (LLAMA_1, 3)], ids=["qwen2_vl", "mllama", "pixtral", "text"]
)
def test_too_few_tokens_for_the_template_are_refused_with_the_fewest_possible(name: str, smallest: int) -> None:
    batching = collator(name)
    sizes = ONE if batching.family.takes_images else []
    with pytest.raises(RecipeError, match=f"{smallest - 1} tokens of text are too few .* at least {smallest}$"):
        stated_rows(batching, text_tokens=smallest - 1, image_sizes=sizes, count=1)
    rows = stated_rows(batching, text_tokens=smallest, image_sizes=sizes, count=1)
    assert texts(rows) == ["a", "a"]


def test_a_picture_that_the_processor_refuses_is_named_by_its_size() -> None:
    with pytest.raises(DatasetError, match=r"stated sizes.*3000×10"):
        stated_rows(collator(QWEN), text_tokens=100, image_sizes=[(3000, 10)], count=1)
