"""LLaMA as Meta's own code has it: names, rotary layout and params.json, as Alpaca-LoRA's second export wrote them.

https://github.com/tloen/alpaca-lora/blob/main/export_state_dict_checkpoint.py
https://github.com/meta-llama/llama/blob/main/llama/model.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
IN_A_LAYER = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
MULTIPLE = 256  # of which Meta's feed-forward width is one
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_metas(config: Any) -> bool:
    """Whether Meta's code can run it: a LLaMA without biases and with one of the rotary embeddings that it knows."""
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        return False
    return config.head_dim * config.num_attention_heads == config.hidden_size and _rope(config) is not None


def to_meta(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights under Meta's names.

    Raises:
        KeyError: a name that a LLaMA does not have.

    """
    heads = {"attention.wq.weight": config.num_attention_heads, "attention.wk.weight": config.num_key_value_heads}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        leaf = IN_A_LAYER[place[2]] if place else NAMES[name]
        new = f"layers.{place[1]}.{leaf}" if place else leaf
        found[new] = interleaved(tensor, heads[leaf]) if leaf in heads else tensor
    found.setdefault("output.weight", found["tok_embeddings.weight"])  # tied: Meta's code has them twice
    return found


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as Meta rotates them, in neighbouring pairs; transformers rotates half with half.

    With one head of four rows: 0 1 2 3 → 0 2 1 3.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def params(config: Any) -> dict[str, Any]:
    """What Meta's params.json says of this model."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        **_width(config.hidden_size, config.intermediate_size),
        **(_rope(config) or {}),
    }


def _width(dim: int, wanted: int) -> dict[str, Any]:
    """By what Meta's code computes the feed-forward's width: two thirds of 4 dim, times a factor, up to a multiple."""
    plain = int(2 * 4 * dim / 3)
    if -(-plain // MULTIPLE) * MULTIPLE == wanted:
        return {"multiple_of": MULTIPLE}
    # half a row more than wanted: the product is cut to a whole number, and may not fall below it by rounding
    return {"multiple_of": MULTIPLE if wanted % MULTIPLE == 0 else 1, "ffn_dim_multiplier": (wanted + 0.5) / plain}


def _rope(config: Any) -> dict[str, Any] | None:
    """Meta's words for the rotary embedding; None where it has none."""
    rope = dict(config.rope_parameters)
    theta = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "default":
        return theta
    known = rope["rope_type"] == "llama3" and all(rope[name] == value for name, value in LLAMA_3.items())
    return {**theta, "use_scaled_rope": True} if known else None
