"""Rows and packs made ready to be looked at, in a terminal or in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from vlmtune.preview.pieces import Piece

if TYPE_CHECKING:
    from vlmtune.preview.seen import Seen


@dataclass(frozen=True)
class ShownRow:
    """A row as the model gets it: its tokens are the trained, the masked and those of pictures."""

    name: str
    pieces: tuple[Piece, ...]
    pictures: tuple[Seen, ...] = ()
    padding: int = 0  # tokens, in a padded batch of the rows shown

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)

    @property
    def of_pictures(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.kind == "image")

    @property
    def masked(self) -> int:
        return self.tokens - self.trained - self.of_pictures

    @property
    def counts(self) -> dict[str, int]:
        """What stands in a row's heading."""
        counts = {"tokens": self.tokens, "trained": self.trained, "masked": self.masked, "of pictures": self.of_pictures}
        return counts | {"padding in a batch of these": self.padding}


@dataclass(frozen=True)
class ShownPack:
    """The rows of a micro-batch as one sequence."""

    rows: tuple[ShownRow, ...]
    room: int  # tokens that a micro-batch has at most

    @property
    def starts(self) -> list[int]:
        """The place of each row's first token in the pack."""
        return list(accumulate((row.tokens for row in self.rows[:-1]), initial=0))

    @property
    def summary(self) -> str:
        """→ "3 rows, 520 tokens of at most 640, no padding; padded they would be 3 × 200 = 600 tokens"."""
        counts = [row.tokens for row in self.rows]
        packed = f"{len(counts)} row{'s' if len(counts) > 1 else ''}, {sum(counts):,} tokens of at most {self.room:,}"
        padded = f"{len(counts)} × {max(counts):,} = {len(counts) * max(counts):,} tokens"
        return f"{packed}, no padding; padded they would be {padded}"
