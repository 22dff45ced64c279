"""Small models with the proportions of the full-size ones, and the count of the floating-point operations that both need.

Every width is an eighth of the published one and the layers are an eighth (Qwen2-VL: a seventh) in number. Layers then shrink
by 8 × 8 × 8 and the head by 8, so the vocabulary shrinks by 8 × 8: vision tower, language layers and head keep their
shares of the work. `python benchmarks/model.py` prints both side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2_vl", "mllama", "pixtral")
LORA_RANK = 8


@dataclass(frozen=True)
class Language:
    hidden: int
    layers: int  # those with cross-attention among them
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    cross_layers: int = 0

    @property
    def attention_parameters(self) -> int:
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate  # gate, up, down


@dataclass(frozen=True)
class Vision:
    hidden: int
    layers: int
    heads: int
    intermediate: int
    gated: bool
    patch: int
    merge: int = 1  # patches of an edge that become one token
    tile: int = 0  # edge of a tile in pixels, where pictures are cut into tiles
    tiles: int = 1  # tiles that the tower computes for every picture, padding among them
    states: int = 1  # hidden states that go to the language model
    projector: tuple[tuple[int, int], ...] = ()  # its matrices, on each token that leaves the tower

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def patch_parameters(self) -> int:
        return 3 * self.patch**2 * self.hidden * (2 if self.merge > 1 else 1)  # Qwen2-VL sees every picture twice, as a film


@dataclass(frozen=True)
class Sizes:
    language: Language
    vision: Vision


# Published configs: huggingface.co/<name>/blob/main/config.json
FULL = {
    "qwen2_vl": Sizes(  # Qwen/Qwen2-VL-7B-Instruct
        Language(3584, 28, 28, 4, 128, 18944, 152064),
        Vision(1280, 32, 16, 5120, False, 14, merge=2, projector=((5120, 5120), (5120, 3584))),
    ),
    "mllama": Sizes(  # meta-llama/Llama-3.2-11B-Vision-Instruct
        Language(4096, 40, 32, 8, 128, 14336, 128256, cross_layers=8),
        Vision(1280, 40, 16, 5120, False, 14, tile=560, tiles=4, states=6, projector=((7680, 4096),)),
    ),
    "pixtral": Sizes(  # mistral-community/pixtral-12b
        Language(5120, 40, 32, 8, 128, 14336, 131072),
        Vision(1024, 24, 16, 4096, True, 16, projector=((1024, 5120), (5120, 5120))),
    ),
}
SMALL = {
    "qwen2_vl": Sizes(
        Language(448, 4, 7, 1, 64, 2368, 2716),
        Vision(160, 4, 2, 640, False, 14, merge=2, projector=((640, 640), (640, 448))),
    ),
    "mllama": Sizes(
        Language(512, 5, 8, 2, 64, 1792, 2004, cross_layers=1),
        Vision(160, 5, 2, 640, False, 14, tile=294, tiles=4, states=4, projector=((640, 512),)),
    ),
    "pixtral": Sizes(
        Language(640, 5, 8, 2, 64, 1792, 2048),
        Vision(128, 3, 2, 512, True, 16, projector=((128, 640), (640, 640))),
    ),
}
WIDE = Sizes(  # Qwen2-VL with a quarter of the widths and of the layers: eight times the work of the small one
    Language(896, 7, 7, 1, 128, 4736, 9504),
    Vision(320, 8, 4, 1280, False, 14, merge=2, projector=((1280, 1280), (1280, 896))),
)


@dataclass(frozen=True)
class Row:
    """What a row asks of a model: tokens, those of the picture among them."""

    tokens: int
    patches: int  # of the picture itself, no padding
    trained: int  # positions with a label


def picture(family: str, sizes: Sizes, width: int, height: int) -> tuple[int, int]:
    """Patches of a picture in the tower, and its tokens in the language model."""
    vision = sizes.vision
    if family == "mllama":  # pictures of the benchmark fit into one tile; one token more for the class
        return (vision.tile // vision.patch) ** 2 + 1, 1
    if family == "qwen2_vl":
        edge = vision.patch * vision.merge
        patches = round(width / edge) * round(height / edge) * vision.merge**2
        return patches, patches // vision.merge**2
    across, down = -(-width // vision.patch), -(-height // vision.patch)
    return across * down, (across + 1) * down  # a [IMG_BREAK] or [IMG_END] ends every row


def flops(sizes: Sizes, row: Row, *, padding_tiles: bool = False) -> dict[str, float]:
    """Floating-point operations of a row: `vision` once forward, `language` and `head` forward and backward.

    A matrix of P parameters takes 2 P a token forward and 2 P backward to the activations; frozen weights need no gradient of
    their own. Attention of T tokens, causal, takes 2 T² · heads · head_dim forward and twice that backward; the tower's is
    not causal and takes 4 N² · width forward. The head counts at positions with a label only. LoRA's matrices count three
    times forward (twice backward). Recomputation and padding are no useful work, and count nowhere.
    """
    language, vision, tokens = sizes.language, sizes.vision, row.tokens
    query = language.heads * language.head_dim
    key_value = language.kv_heads * language.head_dim
    lora = LORA_RANK * (2 * language.hidden + query + key_value)  # on q_proj and v_proj
    own = language.layers - language.cross_layers
    work = own * (4 * (language.attention_parameters + language.mlp_parameters) * tokens + 6 * tokens**2 * query)
    work += language.layers * 6 * lora * tokens
    seen = row.patches * (vision.tiles if padding_tiles else 1)
    if language.cross_layers:
        own_side = 4 * (2 * language.hidden * query + language.mlp_parameters) * tokens
        picture_side = 2 * 2 * language.hidden * key_value * seen  # keys and values; the picture needs no gradient
        work += language.cross_layers * (own_side + picture_side + 10 * tokens * seen * query)
    tower = vision.layers * (2 * vision.layer_parameters * seen + 4 * seen**2 * vision.hidden)
    tower += 2 * vision.patch_parameters * seen
    tower += 2 * sum(inputs * outputs for inputs, outputs in vision.projector) * seen / vision.merge**2
    return {"vision": tower, "language": work, "head": 4 * language.hidden * language.vocabulary * row.trained}


def shares(sizes: Sizes, row: Row) -> dict[str, float]:
    """Parts of the work of one row as transformers does it: Mllama's tower computes four tiles, whatever the picture fills."""
    work = flops(sizes, row, padding_tiles=True)
    return {part: count / sum(work.values()) for part, count in work.items()}


def reference_row(family: str, *, small: bool, everything: bool) -> tuple[Sizes, Row]:
    """The tutorial's row: a 500 × 500 picture and 378 tokens of text, 60 of them the answer.

    The small model's rows are smaller too: pictures of 336 × 336 pixels (Mllama: the same part of a tile), and 168 tokens of
    text with an answer of 27, which keeps the ratio of picture to text.
    """
    sizes = (SMALL if small else FULL)[family]
    edge, text, answer = (336, 168, 27) if small else (500, 378, 60)
    patches, image_tokens = picture(family, sizes, edge, edge)
    return sizes, Row(text + image_tokens, patches, text if everything else answer)


def useful_flops(family: str, rows: Sequence[Mapping[str, int]], *, epochs: int, labels: str) -> float:
    """The work that a run on the small model cannot do without: the tower once per picture, the rest once per epoch.

    Of the last layer's MLP, as of the head, the positions with a label: no token hears of another behind it. What a row begins
    with like the one before is no work of its own.
    """
    sizes, total = SMALL[family], 0.0
    for row in rows:
        work, shared = flops(sizes, Row(row["tokens"], row["patches"], row[labels])), row["shared"]
        alike = flops(sizes, Row(shared, 0, 0))["language"]
        own = row[labels] - (shared - row["shown"] if labels == "all" else 0)
        idle = 4 * sizes.language.mlp_parameters * (row["tokens"] - shared - own)
        total += work["vision"] * (1 - row["again"]) + epochs * (work["language"] - alike - idle + work["head"])
    return total


def make_checkpoint(family: str, directory: Path) -> Path:
    """A small checkpoint of random weights with its processor, and `adapter.safetensors`, the LoRA weights all start from."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(0)
    processor = _processor(family)
    model = _model(family, processor.tokenizer)
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)
    adapter = get_peft_model(model, lora_config()).state_dict()
    weights = {name: tensor.float().contiguous().clone() for name, tensor in adapter.items() if "lora_" in name}
    save_file(weights, directory / "adapter.safetensors")
    return directory


def lora_config() -> Any:
    """LoRA on the language model's q_proj and v_proj: by name alone, the towers of Mllama and Pixtral would get some too."""
    from peft import LoraConfig

    targets = r"(?:.*\.)?language_model\..*\.(?:q_proj|v_proj)"
    return LoraConfig(r=LORA_RANK, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=targets, task_type="CAUSAL_LM")


SPECIAL = {
    "qwen2_vl": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                 "<|image_pad|>", "<|video_pad|>"),
    "mllama": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>",
               "<|finetune_right_pad_id|>"),
    "pixtral": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
}  # fmt: skip
ENDS = {  # bos, eos, pad
    "qwen2_vl": (None, "<|im_end|>", "<|endoftext|>"),
    "mllama": ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "pixtral": ("<s>", "</s>", "<pad>"),
}


def _tokenizer(family: str) -> Any:
    """A tokenizer of bytes, filled up to the vocabulary's size with tokens that no text has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special, size = SPECIAL[family], SMALL[family].language.vocabulary
    known = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"<unused {number}>" for number in range(size - len(known))]
    if family == "mllama":
        known.append("<|image|>")  # as on the hub: the head has no row for it
        special = (*special, "<|image|>")
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos, pad = ENDS[family]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


# Qwen's answers end with <|im_end|>, and the newline after it is not trained on: the same for all who read the template
QWEN_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- macro parts(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) ~ '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- parts(message['content']) ~ '<|im_end|>' -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _processor(family: str) -> Any:
    import transformers

    from vlmtune.families import find_family

    tokenizer, vision = _tokenizer(family), SMALL[family].vision
    if family == "qwen2_vl":
        images, films = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2VLProcessor(images, tokenizer, films, chat_template=QWEN_TEMPLATE)
    template = find_family(family).chat_template
    if family == "mllama":
        size = {"height": vision.tile, "width": vision.tile}
        images = transformers.MllamaImageProcessor(size=size, max_image_tiles=vision.tiles)
        return transformers.MllamaProcessor(images, tokenizer, chat_template=template)
    patch = {"height": vision.patch, "width": vision.patch}
    images = transformers.PixtralImageProcessor(size={"longest_edge": 1024}, patch_size=patch)
    return transformers.PixtralProcessor(images, tokenizer, patch_size=vision.patch, chat_template=template)


def _model(family: str, tokenizer: Any) -> Any:
    """Random weights, scaled so that pictures are heard and the loss can fall."""
    model = {"qwen2_vl": _qwen2_vl, "mllama": _mllama, "pixtral": _pixtral}[family](SMALL[family], tokenizer)
    for name, parameter in model.named_parameters():
        if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            parameter.data.fill_(1.0)  # closed at birth
    return model


def _text(language: Language, tokenizer: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "hidden_size": language.hidden,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.intermediate,
        "vocab_size": language.vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **ids,
    }


def _qwen2_vl(sizes: Sizes, tokenizer: Any) -> Any:
    import transformers

    vision = sizes.vision
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    names["vision_end"] = "<|vision_end|>"
    half = sizes.language.head_dim // 2
    rope = {"rope_type": "default", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8], "rope_theta": 1e6}
    config = transformers.Qwen2VLConfig(
        text_config={**_text(sizes.language, tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": vision.layers,
            "embed_dim": vision.hidden,
            "hidden_size": sizes.language.hidden,
            "num_heads": vision.heads,
            "mlp_ratio": vision.intermediate // vision.hidden,
        },
        tie_word_embeddings=False,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _mllama(sizes: Sizes, tokenizer: Any) -> Any:
    import transformers

    vision = sizes.vision
    local = vision.layers * 4 // 5
    config = transformers.MllamaConfig(
        text_config={
            **_text(sizes.language, tokenizer),
            "cross_attention_layers": [3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        vision_config={
            "hidden_size": vision.hidden,
            "num_hidden_layers": local,
            "num_global_layers": vision.layers - local,
            "attention_heads": vision.heads,
            "intermediate_size": vision.intermediate,
            "vision_output_dim": vision.states * vision.hidden,
            "image_size": vision.tile,
            "patch_size": vision.patch,
            "max_num_tiles": vision.tiles,
            "intermediate_layers_indices": list(range(vision.states - 1)),
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return transformers.MllamaForConditionalGeneration(config)


def _pixtral(sizes: Sizes, tokenizer: Any) -> Any:
    import transformers

    vision, language = sizes.vision, sizes.language
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(
            **_text(language, tokenizer),
            head_dim=language.head_dim,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=vision.hidden,
            intermediate_size=vision.intermediate,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=1024,
            patch_size=vision.patch,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def count_rows(family: str, checkpoint: Path, rows: Path) -> list[dict[str, int]]:
    """Of every row `tokens`, `patches`, and the positions with a label under each rule, `all` and `answers`.

    `shared` are the first tokens in which it is like the row before, of which `shown` stand for the same picture; none behind
    another, and none of Mllama, whose tokens all see the picture. `again` is 1 where the row before shows the picture too.
    """
    from transformers import AutoProcessor

    from vlmtune import MultimodalCollator
    from vlmtune.prefixes import common_prefix

    processor = AutoProcessor.from_pretrained(checkpoint)
    counts: list[dict[str, int]] = []
    before: list[Any] = []
    seen: list[str] = []
    collators = {"all": MultimodalCollator(processor, family, True), "answers": MultimodalCollator(processor, family, False)}
    for line in rows.read_text(encoding="utf-8").splitlines():
        parsed = json.loads(line)
        row = {"messages": _with_parts(parsed, rows.parent)}
        seen, again = parsed["images"], parsed["images"] == seen
        batches = {rule: collator([row]) for rule, collator in collators.items()}
        trained = {rule: int((batch["labels"][:, 1:] != -100).sum()) for rule, batch in batches.items()}
        batch = batches["all"]
        told = [(seen, token) if token in collators["all"].never_trained else token for token in batch["input_ids"][0].tolist()]
        before, last = [] if family == "mllama" else told, before
        shared = common_prefix(before, last)
        shown = sum(isinstance(token, tuple) for token in told[:shared])
        sizes = {"tokens": batch["input_ids"].shape[1], "patches": _patches(family, batch)}
        counts.append({**sizes, **trained, "shared": shared, "shown": shown, "again": int(again)})
    return counts


def _patches(family: str, batch: Mapping[str, Any]) -> int:
    if family == "qwen2_vl":
        return int(batch["image_grid_thw"].prod(-1).sum())
    if family == "pixtral":
        patch = SMALL[family].vision.patch
        return sum(-(-int(height) // patch) * -(-int(width) // patch) for height, width in batch["image_sizes"])
    vision = SMALL[family].vision
    return int(batch["aspect_ratio_mask"].sum()) * ((vision.tile // vision.patch) ** 2 + 1)


def _with_parts(row: Mapping[str, Any], directory: Path) -> list[dict[str, Any]]:
    """`"<image>Describe it."` → a picture and a text, for those who take typed parts."""
    pictures = iter(row["images"])
    messages = []
    for message in row["messages"]:
        before, mark, after = message["content"].rpartition("<image>")
        parts = [{"type": "image", "image": str(directory / next(pictures))}] if mark else []
        messages.append({"role": message["role"], "content": [*parts, {"type": "text", "text": before + after}]})
    return messages


def shares_table() -> Any:
    from rich.table import Table

    table = Table(title="Shares of the work of one row, forward and backward: full size / small")
    for name in ("family", "labels", "vision tower", "language layers", "head", "GFLOP a row"):
        table.add_column(name, justify="left" if name in ("family", "labels") else "right")
    for family in FAMILIES:
        for everything in (True, False):
            both = [reference_row(family, small=small, everything=everything) for small in (False, True)]
            full, small = (shares(*one) for one in both)
            work = [sum(flops(*one, padding_tiles=True).values()) / 1e9 for one in both]
            parts = [f"{full[part]:.1%} / {small[part]:.1%}" for part in ("vision", "language", "head")]
            table.add_row(family, "all" if everything else "answers", *parts, f"{work[0]:,.0f} / {work[1]:.1f}")
    return table


if __name__ == "__main__":
    from rich.console import Console

    Console().print(shares_table())
