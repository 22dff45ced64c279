"""The sizes of well-known checkpoints as their authors publish them, so that planning a run needs neither hub nor weights.

    published_config("Qwen/Qwen2-VL-7B-Instruct")     # 28 layers of 3584, a tower of 32: 8,291,375,616 parameters
    published_processor("Qwen/Qwen2-VL-7B-Instruct")  # its real processor class and picture sizes, around a stand-in tokenizer

A config is the one that `AutoConfig` reads from the hub. A processor is the real one but for its vocabulary, which is tens of
megabytes and not always free to be passed on: in its place stands a tokenizer that has the checkpoint's special tokens, with
their ids, and one more token, for every word. Batches so have their true layout, and about their true length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

# How the published tokenizers cut a text before they look into their vocabulary; they differ in digits and in capitals.
# https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct/blob/main/tokenizer.json
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The special tokens in order of their ids, from each checkpoint's tokenizer_config.json.
# fmt: off
QWEN_TOKENS = (  # 151643 and on
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
LLAMA_3_TOKENS = (  # 128000 and on; the last one has no row in the head
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)), "<|image|>",
)
PIXTRAL_TOKENS = (  # 0 and on
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    *(f"<SPECIAL_{number}>" for number in range(17, 1000)),
)
LLAMA_1_TOKENS = ("<unk>", "<s>", "</s>")  # 0 and on
# fmt: on


def published_config(name: str) -> Any | None:
    """The config of a checkpoint of that name on the hub, or None where it is not among the known ones."""
    if name not in _CHECKPOINTS:
        return None
    config = _CHECKPOINTS[name].config()
    config.name_or_path = name
    return config


def published_processor(name: str) -> Any | None:
    """The processor, or a language model's tokenizer, of a checkpoint of that name; None where it is not a known one.

    It takes pictures as the checkpoint's own does and knows its special tokens. Every other word, number or mark is the one
    token that stands for all of them: for lengths and for trying out, not for training.
    """
    return _CHECKPOINTS[name].processor() if name in _CHECKPOINTS else None


def _qwen2_vl(*, tie_word_embeddings: bool = False, **text: int) -> Any:
    # https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct/blob/main/config.json and those of 2B and 72B
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    more = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "use_sliding_window": False, "rope_parameters": rope}
    unused = {"max_window_layers": text["num_hidden_layers"]}  # of a sliding window
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_channels": 3}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return transformers.Qwen2VLConfig(
        text_config={**text, **more, **unused, "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16"},
        vision_config={**vision, **patches, "hidden_size": text["hidden_size"]},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=tie_word_embeddings,
        dtype="bfloat16",
    )


def _qwen2_vl_processor() -> Any:
    # https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct/blob/main/preprocessor_config.json: areas, min_pixels and max_pixels
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    tokenizer = _tokenizer(QWEN_TOKENS, first=151643, eos="<|im_end|>", pad="<|endoftext|>", model_max_length=32768)
    return transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=14, temporal_patch_size=2, merge_size=2),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=size, patch_size=14, temporal_patch_size=2, merge_size=2),
        chat_template=_trl_template("qwen2_5_vl"),  # Qwen2-VL's has the same text
    )


def _mllama(*, tile: int, eos: int | list[int]) -> Any:
    # https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct/blob/main/config.json
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return transformers.MllamaConfig(
        text_config={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
            "tie_word_embeddings": False,
            "bos_token_id": 128000,
            "eos_token_id": eos,
            "pad_token_id": 128004,
            "dtype": "bfloat16",
        },
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_global_layers": 8,
            "attention_heads": 16,
            "image_size": tile,
            "patch_size": 14,
            "max_num_tiles": 4,
            "vision_output_dim": 7680,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "dtype": "bfloat16",
        },
        image_token_index=128256,
        dtype="bfloat16",
    )


def _mllama_processor(*, tile: int, eos: str) -> Any:
    # https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct/blob/main/preprocessor_config.json
    tokenizer = _tokenizer(
        LLAMA_3_TOKENS,
        first=128000,
        bos="<|begin_of_text|>",
        eos=eos,
        pad="<|finetune_right_pad_id|>",
        model_max_length=131072,
    )
    image_processor = transformers.MllamaImageProcessor(size={"height": tile, "width": tile}, max_image_tiles=4)
    return transformers.MllamaProcessor(image_processor, tokenizer)  # the family has the chat template


def _pixtral() -> Any:
    # https://huggingface.co/mistral-community/pixtral-12b/blob/main/config.json
    return transformers.LlavaConfig(
        text_config={
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,  # 32 heads of it are less than the hidden size
            "vocab_size": 131072,
            "max_position_embeddings": 1024000,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "hidden_act": "silu",
            "image_size": 1024,
            "patch_size": 16,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4},
        },
        image_token_index=10,
        image_seq_length=1,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _pixtral_processor() -> Any:
    # https://huggingface.co/mistral-community/pixtral-12b/blob/main/preprocessor_config.json
    marks = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    tokenizer = _tokenizer(PIXTRAL_TOKENS, first=0, **marks, model_max_length=131072)
    patch = {"height": 16, "width": 16}
    image_processor = transformers.PixtralImageProcessor(size={"longest_edge": 1024}, patch_size=patch)
    return transformers.PixtralProcessor(image_processor, tokenizer, patch_size=16)  # the family has the chat template


def _llama() -> Any:
    # https://huggingface.co/huggyllama/llama-7b/blob/main/config.json
    return transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="float16",
    )


def _llama_tokenizer() -> Any:
    return _tokenizer(LLAMA_1_TOKENS, first=0, bos="<s>", eos="</s>", unk="<unk>", model_max_length=2048)


def _tokenizer(names: Iterable[str], *, first: int, model_max_length: int, **marks: str) -> Any:
    """A tokenizer that knows special tokens, with ids from `first` on, and one token for every other word, number or mark.

    That one has the first id that is free; `marks` says which of the special tokens are bos, eos, pad and unk.
    """
    vocabulary = {name: first + place for place, name in enumerate(names)}
    special = [AddedToken(name, special=True, normalized=False) for name in vocabulary]
    word = "word"
    vocabulary[word] = 0 if first else len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=word))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        **{f"{mark}_token": token for mark, token in marks.items()},
    )


def _trl_template(name: str) -> str:
    """One of the chat templates that TRL ships. Read as a file, for importing trl takes seconds."""
    spec = find_spec("trl")
    assert spec is not None
    directory = Path(next(iter(spec.submodule_search_locations or []))) / "chat_templates"
    return (directory / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Checkpoint:
    config: Callable[[], Any]
    processor: Callable[[], Any]


_QWEN_2B = {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
_QWEN_7B = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
_QWEN_72B = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568}
_CHECKPOINTS = {
    "Qwen/Qwen2-VL-2B-Instruct": _Checkpoint(
        partial(_qwen2_vl, **_QWEN_2B, num_hidden_layers=28, vocab_size=151936, tie_word_embeddings=True),
        _qwen2_vl_processor,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": _Checkpoint(
        partial(_qwen2_vl, **_QWEN_7B, num_hidden_layers=28, vocab_size=152064), _qwen2_vl_processor
    ),
    "Qwen/Qwen2-VL-72B-Instruct": _Checkpoint(
        partial(_qwen2_vl, **_QWEN_72B, num_hidden_layers=80, vocab_size=152064), _qwen2_vl_processor
    ),
    # the base model has smaller tiles: `vision_chunk_size` in
    # https://github.com/meta-llama/llama-models/blob/main/models/sku_list.py
    "meta-llama/Llama-3.2-11B-Vision": _Checkpoint(
        partial(_mllama, tile=448, eos=128001), partial(_mllama_processor, tile=448, eos="<|end_of_text|>")
    ),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": _Checkpoint(
        partial(_mllama, tile=560, eos=[128001, 128008, 128009]), partial(_mllama_processor, tile=560, eos="<|eot_id|>")
    ),
    "mistral-community/pixtral-12b": _Checkpoint(_pixtral, _pixtral_processor),
    "huggyllama/llama-7b": _Checkpoint(_llama, _llama_tokenizer),
}
