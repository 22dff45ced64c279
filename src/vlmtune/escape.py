"""Text that looks like a special token stays text.

A user's caption may hold `<|im_end|>` or `[IMG]`. Rendered into a prompt it would end the turn or stand for a picture. So
each such word is replaced, before rendering, by private characters, one for each of the tokens that the word has as plain
text; the tokenizer knows the characters as tokens of its own, and afterwards their ids are exchanged for the plain ones.
Nothing changes its length, so that masks and positions stay right, and a text without such words is left alone. Newlines
at the start of an answer are kept apart from the header before it in the same way, as they are when the model generates.

transformers' `sanitize_control_tokens` does the like, but not together with `return_assistant_tokens_mask`:
https://github.com/huggingface/transformers/blob/main/src/transformers/tokenization_utils_base.py (`_mark_chat_inputs`)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from vlmtune.tools import beside, replaced, texts

FIRST = 0x10F000  # in the last private-use plane of Unicode, which texts do not use
SPACES = "\n\r\t "
LEADING = re.compile(r"[ \t]*[\n\r][\n\r\t ]*")  # would melt into one token with the newline that ends a turn's header


class Escape:
    """Keeps the special tokens of one processor out of users' texts."""

    def __init__(self, processor: Any) -> None:
        self._plain = processor
        tokenizer = getattr(processor, "tokenizer", processor)
        words = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()}
        words |= set(SPACES)
        words |= {word for name, word in vars(processor).items() if name.endswith("_token") and isinstance(word, str)}
        pieces = {word: _plain_ids(tokenizer, word) for word in words}
        ids = sorted({piece for word in pieces.values() for piece in word})
        characters = {piece: chr(FIRST + index) for index, piece in enumerate(ids)}
        self._ids = ids
        self._words = {word: "".join(characters[piece] for piece in pieces[word]) for word in words}
        special = sorted(words - set(SPACES), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._processor: Any = None

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with every special token in their texts replaced; the messages given stay as they were."""
        return [
            {**m, **replaced(beside(m), self._plainly), "content": [self._part(part, m["role"]) for part in m["content"]]}
            for m in messages
        ]

    def is_needed(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether any text holds a special token, or an answer starts with a newline."""
        for message in messages:
            said = [part["text"] for part in message["content"] if part["type"] == "text"]
            if message["role"] == "assistant" and any(map(LEADING.match, said)):
                return True
            if any(map(self._pattern.search, [*said, *texts(beside(message))])):
                return True
        return False

    @property
    def processor(self) -> Any:
        """The processor with a tokenizer that knows the private characters."""
        if self._processor is None:  # a copy of a real vocabulary takes a second: only where it is needed
            self._processor = _with_tokens(self._plain, [chr(FIRST + index) for index in range(len(self._ids))])
        return self._processor

    def restore(self, input_ids: Tensor) -> Tensor:
        """The ids with those of private characters exchanged for the plain ones. `[batch, seq]` → `[batch, seq]`."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        first = tokenizer.convert_tokens_to_ids(chr(FIRST))
        plain = torch.tensor(self._ids, dtype=input_ids.dtype)
        return torch.where(input_ids >= first, plain[(input_ids - first).clamp(min=0)], input_ids)

    def _part(self, part: Mapping[str, Any], role: str) -> dict[str, Any]:
        if part["type"] != "text":
            return dict(part)
        text = self._plainly(part["text"])
        if role == "assistant":
            start = found[0] if (found := LEADING.match(text)) else ""
            text = "".join(self._words[space] for space in start) + text.removeprefix(start)
        return {**part, "text": text}

    def _plainly(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._words[found[0]], text)


def _plain_ids(tokenizer: Any, word: str) -> list[int]:
    """The tokens of a word read as plain text; where a vocabulary holds it whole, of its characters one by one."""
    own = tokenizer.convert_tokens_to_ids(word)
    ids = tokenizer.encode(word, add_special_tokens=False, split_special_tokens=True)
    if own not in ids:
        return ids
    return [piece for letter in word for piece in tokenizer.encode(letter, add_special_tokens=False)]


def _with_tokens(processor: Any, characters: Sequence[str]) -> Any:
    added = [AddedToken(character, special=True, normalized=False) for character in characters]
    if not hasattr(processor, "tokenizer"):
        processor = copy.deepcopy(processor)
        processor.add_tokens(added)
        return processor
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.add_tokens(added)
    return processor
