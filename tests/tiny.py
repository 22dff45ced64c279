"""Small real models: every architecture from its own config classes, random weights, a throwaway byte-level tokenizer.

`make_checkpoint(kind, directory)` writes a checkpoint in the hub's layout; the tests load it as they would load the real
one. Weights are scaled so that pictures matter and the loss can fall (a fresh random model hardly hears its own head).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KINDS = ("qwen2_vl", "mllama", "pixtral")
QWEN = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
TRL_TEMPLATES = Path(transformers.__file__).parents[1] / "trl" / "chat_templates"
SPECIAL = {
    "qwen2_vl": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
    "mllama": [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|python_tag|>",
        "<|finetune_right_pad_id|>",
        "<|image|>",
    ],
    "pixtral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"],
    "text": ["<s>", "</s>"],
    "smolvlm": ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", "<pad>"],
}
ENDS = {  # bos, eos, pad
    "qwen2_vl": (None, "<|im_end|>", "<|endoftext|>"),
    "mllama": ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "pixtral": ("<s>", "</s>", "<pad>"),
    "text": ("<s>", "</s>", None),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<pad>"),
}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: every text is its UTF-8 bytes, special tokens come first."""
    special = SPECIAL[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos, pad = ENDS[kind]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def make_processor(kind: str) -> Any:
    """The family's real processor class around a byte tokenizer; small pictures."""
    tokenizer = make_tokenizer("qwen2_vl" if kind in QWEN else kind)
    if kind in QWEN:
        template = (TRL_TEMPLATES / ("qwen3_vl.jinja" if kind == "qwen3_vl" else "qwen2_5_vl.jinja")).read_text()
        patch = 16 if kind == "qwen3_vl" else 14
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
        image_processor = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
        video_processor = transformers.Qwen2VLVideoProcessor(size=size, patch_size=patch)
        return getattr(transformers, QWEN[kind])(image_processor, tokenizer, video_processor, chat_template=template)
    if kind == "mllama":
        image_processor = transformers.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
        return transformers.MllamaProcessor(image_processor, tokenizer)
    if kind == "pixtral":
        image_processor = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
        return transformers.PixtralProcessor(image_processor, tokenizer, patch_size=16)
    if kind == "smolvlm":
        template = (TRL_TEMPLATES / "smolvlm.jinja").read_text()
        image_processor = transformers.SmolVLMImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        )
        video_processor = transformers.SmolVLMVideoProcessor()
        return transformers.SmolVLMProcessor(
            image_processor, tokenizer, video_processor, image_seq_len=4, chat_template=template
        )
    return tokenizer


def make_model(kind: str, vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = _BUILDERS[kind](vocabulary, tokenizer)
    model.get_input_embeddings().weight.data.mul_(10)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.get_output_embeddings().weight.data.mul_(10)
    for name, parameter in model.named_parameters():
        if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            parameter.data.fill_(1.0)  # closed at birth: no picture would be seen
        if "merger" in name or "patch_embed" in name:
            parameter.data.mul_(8)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ENDS["qwen2_vl" if kind in QWEN else kind] if token]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids[-1]
    return model


def make_checkpoint(kind: str, directory: Path) -> Path:
    """A checkpoint of random weights and its processor, as `from_pretrained` reads it."""
    processor = make_processor(kind)
    tokenizer = getattr(processor, "tokenizer", processor)
    make_model(kind, len(tokenizer), tokenizer).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def _qwen_text(vocabulary: int, tokenizer: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    sizes = {"num_hidden_layers": 2, "vocab_size": vocabulary, "max_position_embeddings": 2048}
    return {**TEXT, **sizes, "rope_parameters": rope, **_ids(tokenizer)}


def _qwen2_vl(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    config = transformers.Qwen2VLConfig(
        text_config=_qwen_text(vocabulary, tokenizer),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    return _later_qwen("Qwen2_5_VL", tokenizer, _qwen_text(vocabulary, tokenizer), fullatt_block_indexes=[1])


def _qwen3_vl(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    text = {**_qwen_text(vocabulary, tokenizer), "head_dim": 16}
    return _later_qwen("Qwen3VL", tokenizer, text, num_position_embeddings=16, deepstack_visual_indexes=[0])


def _later_qwen(name: str, tokenizer: Any, text: dict[str, Any], **vision: Any) -> torch.nn.Module:
    sizes = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**sizes, **vision}, tie_word_embeddings=False, **_qwen_ids(tokenizer)
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _mllama(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "vocab_size": vocabulary - 1,  # as on the hub: the head has no row for <|image|>
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            **_ids(tokenizer),
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 64,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return transformers.MllamaForConditionalGeneration(config)


def _pixtral(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(
            **TEXT,
            head_dim=16,
            num_hidden_layers=2,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            sliding_window=None,
            **_ids(tokenizer),
        ),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _smolvlm(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    config = transformers.SmolVLMConfig(
        text_config={
            "model_type": "llama",
            **TEXT,
            "num_hidden_layers": 2,
            "vocab_size": vocabulary,
            **_ids(tokenizer),
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _text(vocabulary: int, tokenizer: Any) -> torch.nn.Module:
    config = transformers.LlamaConfig(**TEXT, num_hidden_layers=2, vocab_size=vocabulary, **_ids(tokenizer))
    return transformers.LlamaForCausalLM(config)


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    names["vision_end"] = "<|vision_end|>"
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "mllama": _mllama,
    "pixtral": _pixtral,
    "smolvlm": _smolvlm,
    "text": _text,
}
