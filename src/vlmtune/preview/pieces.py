"""Tokens as a person reads them: one by one, but characters whole and pictures in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

AT_MOST = 8  # tokens that a character is looked for in: it has four bytes, and a token may hold parts of two characters
BROKEN = "\ufffd"  # what bytes become that make no character
MARKS = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}

Size = tuple[int, str]  # of a picture: tokens that stand for it, 0 where that is not known, and its size in words


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together: one, or those that only together make a character, or those of a picture."""

    kind: Literal["text", "special", "image"]
    text: str  # a newline is ↵ and a newline, what cannot be printed is its number
    ids: tuple[int, ...]
    start: int  # place of the first in its row, from 0
    trained: bool


@dataclass(frozen=True)
class Reader:
    """Makes pieces of tokens.

    Args:
        tokenizer: the model's.
        placeholders: ids of the tokens that stand for a picture or a video → "image" or "video".

    """

    tokenizer: Any
    placeholders: Mapping[int, str]

    def read(self, ids: Sequence[int], trained: Sequence[bool], pictures: Iterable[Size] = ()) -> list[Piece]:
        """The pieces of a row, of which each token is trained or not.

        Example:
            `a`, the two bytes of `é`, `<|image_pad|>` four times, `<|im_end|>`, pictures `[(4, "56×56")]`
            → `a` · `é` · `[image 4 tokens, 56×56]` · `<|im_end|>`

        """
        special, sizes = set(self.tokenizer.added_tokens_decoder), iter(pictures)
        found: list[Piece] = []
        start = 0
        while start < len(ids):
            kind: Literal["text", "special", "image"] = "text"
            if ids[start] in self.placeholders:
                kind, (stop, text) = "image", self._picture(ids, start, sizes)
            elif ids[start] in special:
                kind, stop, text = "special", start + 1, str(self.tokenizer.convert_ids_to_tokens(ids[start]))
            else:
                stop, text = self._characters(ids, start, max(found[-1].start, start - AT_MOST) if found else 0)
            found.append(Piece(kind, visible(text), tuple(ids[start:stop]), start, any(trained[start:stop])))
            start = stop
        return found

    def _picture(self, ids: Sequence[int], start: int, sizes: Iterator[Size]) -> tuple[int, str]:
        """Where the picture's tokens end, and what is shown for them."""
        word, stop = self.placeholders[ids[start]], start
        while stop < len(ids) and self.placeholders.get(ids[stop]) == word:
            stop += 1
        tokens, size = next(sizes, (0, "")) if word == "image" else (0, "")
        if 0 < tokens < stop - start:  # the next picture follows without a token between
            stop = start + tokens
        count = stop - start
        return stop, f"[{word} {count:,} token{'s' if count > 1 else ''}{', ' if size else ''}{size}]"

    def _characters(self, ids: Sequence[int], start: int, context: int) -> tuple[int, str]:
        """Where the shortest run of tokens ends that makes whole characters, and these.

        It is decoded behind the tokens from `context` on: SentencePiece drops the space before a first word.
        """
        before = len(self._decode(ids[context:start]))
        first = self._decode(ids[context : start + 1])[before:]
        stop, text = start + 1, first
        while BROKEN in text and stop < len(ids) and stop - start < AT_MOST:
            stop += 1
            text = self._decode(ids[context:stop])[before:]
        return (start + 1, first) if BROKEN in text else (stop, text)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    r"""The text with everything to be seen: `"a\n\x1b"` → `"a↵\n\\x1b"`."""
    return "".join(MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def in_line(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces without new lines behind ↵, where there are many rows."""
    return [replace(piece, text=piece.text.replace("\n", "")) for piece in pieces]
