"""Causal language models without eyes: LLaMA with Alpaca data, and the like."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from vlmtune.errors import RecipeError
from vlmtune.families import Family

# For base models that have no chat template: the texts as they are, then the stop token, as Alpaca-LoRA trains.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% if message.role == 'system' %}{{ '\\n\\n' }}{% endif %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Text(Family):
    def lora_targets(self, names: Collection[str], scope: str) -> str:
        if scope == "vision":
            raise RecipeError("`lora.scope` is 'vision', and a text model has no vision tower: use 'language'")
        return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(names))})"


FAMILY = Text(name="text", takes_images=False)
