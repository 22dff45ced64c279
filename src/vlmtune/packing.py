"""Which rows go together in which micro-batch, for every epoch.

A micro-batch holds as many rows as fit into a budget of tokens, while an optimiser step holds a fixed number of rows: how
rows are packed decides memory and speed, never what is learned from. Rows that are better together are the one exception: they
share their steps.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Generator, Iterable, Iterator, Sequence
from heapq import heappush, heapreplace
from itertools import chain, pairwise

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

Group = list[int]  # the rows of a micro-batch
Step = list[list[Group]]  # micro-batch → process → rows


class BatchPlan(BatchRebalanceSampler):  # by this class alone the trainer knows micro-batches that are already one process's
    """The micro-batches of each epoch, every row exactly once; iterated, those of this process.

    A step is the next `rows_per_step` rows of the epoch's order, however they are packed and on however many processes. The
    last one has what is left; too little to give each process a row joins the step before. A shuffled epoch 0 opens with the
    costliest of its full steps, so that memory runs out in the first minute.

    Args:
        lengths: tokens of each row.
        rows_per_step: rows of an optimiser step, of all processes together.
        max_tokens: what a micro-batch may cost at most.
        packed: a micro-batch is a sequence without padding and costs the sum of its lengths; else rows × longest row.
        together: a number for each row. Rows with the same one come one after the other where the order is shuffled, no more
            than a step has, and go into one micro-batch where that makes no more of them.
        epochs: how many will be run; all of them are planned for.
        seed: decides, with the epoch, the order of the rows.
        shuffle: a new order every epoch; else rows come as they lie.
        rank, world: this process, counted from 0, and how many there are.

    Attributes:
        micro_batches: of each process in a step, the trainer's `gradient_accumulation_steps`: the fewest that all steps fit in.
        largest: tokens of the largest micro-batch.

    Raises:
        ValueError: a row is longer than `max_tokens`, or a step's rows cannot make as many micro-batches on each process.

    Example:
        lengths `[5, 3, 4, 2]`, 4 rows a step, 8 tokens, not shuffled
        → packed `[0, 3]`, `[2, 1]` of 7 tokens; not packed `[1, 3]`, `[0]`, `[2]` of 6, 5 and 4

    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows_per_step: int,
        max_tokens: int,
        packed: bool,
        together: Sequence[int] | None = None,
        epochs: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        # super().__init__ is left out: it is told the number of micro-batches that is found here
        self.lengths, self.rows_per_step, self.max_tokens, self.packed = array("q", lengths), rows_per_step, max_tokens, packed
        self.epochs, self.seed, self.shuffle, self.rank, self.world = epochs, seed, shuffle, rank, world
        self.together = array("q", together) if together is not None else None
        self.epoch = 0
        self._opening = 0  # the step that trades places with the first of epoch 0
        self._check()
        self._bounds = step_bounds(len(self.lengths), rows_per_step, world)
        planned = range(epochs if shuffle else 1)
        self.micro_batches = max(self._needed(rows) for epoch in planned for rows in self._rows(epoch))
        costs = [self._tokens(step[0][0]) for step in self._steps(0)]
        self.largest = max(chain(costs, (self._tokens(step[0][0]) for epoch in planned[1:] for step in self._steps(epoch))))
        if shuffle:
            full = costs[: max(len(self.lengths) // rows_per_step, 1)]  # a step of fewer micro-batches stays the last
            self._opening = full.index(max(full))

    def __iter__(self) -> Generator[Group, None, None]:
        for step in self._steps(self.epoch):
            yield from (micro_batch[self.rank] for micro_batch in step)

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch, the same in each."""
        return (len(self._bounds) - 2) * self.micro_batches + self._count(self._bounds[-1] - self._bounds[-2])

    def steps(self, epoch: int) -> list[Step]:
        """Step → micro-batch → process → rows."""
        return list(self._steps(epoch))

    def _check(self) -> None:
        for row, length in enumerate(self.lengths):
            if not 0 < length <= self.max_tokens:
                raise ValueError(f"row {row}, counted from 0, has {length} tokens; 1 to {self.max_tokens} fit a micro-batch")
        if min(len(self.lengths), self.rows_per_step) < self.world:
            found = f"{len(self.lengths)} rows, {self.rows_per_step} a step, are too few for {self.world} processes"
            raise ValueError(f"{found}: each needs a row in every step")

    def _rows(self, epoch: int) -> Iterator[Group]:
        """Each step's rows, longest first."""
        order = list(range(len(self.lengths)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
            if self.together is not None:
                bundles = bundle(order, self.together, self.rows_per_step)
                numbers = torch.randperm(len(bundles), generator=generator).tolist()
                order = [row for number in numbers for row in bundles[number]]
        steps = [order[start:stop] for start, stop in pairwise(self._bounds)]
        if epoch == 0:
            steps[0], steps[self._opening] = steps[self._opening], steps[0]
        return (sorted(rows, key=self.lengths.__getitem__, reverse=True) for rows in steps)

    def _steps(self, epoch: int) -> Iterator[Step]:
        for rows in self._rows(epoch):
            parts = self._count(len(rows)) * self.world
            groups = self._divide(rows, parts)
            if len(groups) > parts:
                found = f"a step of epoch {epoch}, counted from 0, needs {len(groups)} micro-batches instead of {parts}"
                raise ValueError(f"{found}: {self.epochs} epochs were planned for")
            groups.sort(key=self._tokens, reverse=True)
            dealt = [groups[start : start + self.world] for start in range(0, parts, self.world)]
            yield [slot[::-1] if number % 2 else slot for number, slot in enumerate(dealt)]  # or rank 0 always has the most

    def _count(self, rows: int) -> int:
        """Micro-batches of each process in a step of so many rows, whatever their lengths: epochs have to be equally long."""
        return min(self.micro_batches, rows // self.world)

    def _needed(self, rows: Group) -> int:
        """The fewest micro-batches of each process that the step fits in."""
        needed = len((best_fit if self.packed else fill_padded)(rows, self.lengths, self.max_tokens))
        most = min(len(rows), self.rows_per_step) // self.world * self.world
        if needed > most:
            found = f"a step of {len(rows)} rows needs {needed} micro-batches of {self.max_tokens} tokens"
            raise ValueError(f"{found}, but {self.world} processes with equally many and none empty can have {most}")
        return -(-needed // self.world)

    def _divide(self, rows: Group, parts: int) -> list[Group]:
        """The rows in exactly so many groups, or in more where they do not fit."""
        if not self.packed:
            return divide_padded(rows, self.lengths, self.max_tokens, parts)
        groups = balance(rows, self.lengths, parts) if self.together is None else self._divide_together(rows, parts)
        if max(map(self._tokens, groups)) <= self.max_tokens:
            return groups
        return split(best_fit(rows, self.lengths, self.max_tokens), parts)

    def _divide_together(self, rows: Group, parts: int) -> list[Group]:
        """So many groups with rows of the same number in one, as far as that fits: the largest are cut until it does."""
        bundles = bundle(rows, self.together or [], self.max_tokens // self.lengths[rows[0]])
        fewest, cuts = max(parts, len(bundles)), 0
        while True:
            pieces = sorted(split(bundles, min(fewest + cuts, len(rows))), key=self._tokens, reverse=True)
            dealt = balance(range(len(pieces)), [*map(self._tokens, pieces)], parts)
            groups = [[row for number in numbers for row in pieces[number]] for numbers in dealt]
            if len(pieces) == len(rows) or max(map(self._tokens, groups)) <= self.max_tokens:
                return groups
            cuts = 2 * cuts or 1

    def _tokens(self, group: Group) -> int:
        lengths = [self.lengths[row] for row in group]
        return sum(lengths) if self.packed else len(lengths) * max(lengths)


def step_bounds(rows: int, rows_per_step: int, world: int) -> list[int]:
    """Where an epoch's steps begin and the last one ends; rows that do not give one to each process join the step before."""
    bounds = [*range(0, rows, rows_per_step), rows]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < world:
        del bounds[-2]
    return bounds


def best_fit(rows: Group, lengths: Sequence[int], budget: int) -> list[Group]:
    """Few groups of at most `budget` tokens in sum: rows come longest first, each goes where it leaves the least room."""
    groups: list[Group] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the group), sorted
    for row in rows:
        place = bisect_left(room, (lengths[row], 0))
        if place == len(room):
            room.append((budget, len(groups)))
            groups.append([])
        left, number = room.pop(place)
        groups[number].append(row)
        insort(room, (left - lengths[row], number))
    return groups


def balance(rows: Iterable[int], lengths: Sequence[int], parts: int) -> list[Group]:
    """So many groups of about the same sum of tokens: rows come longest first, each goes to the emptiest."""
    groups: list[Group] = [[] for _ in range(parts)]
    emptiest = [(0, number) for number in range(parts)]
    for row in rows:
        tokens, number = emptiest[0]
        groups[number].append(row)
        heapreplace(emptiest, (tokens + lengths[row], number))
    return groups


def bundle(rows: Sequence[int], together: Sequence[int], most: int) -> list[Group]:
    """Rows of the same number in one group, up to so many, in the order of each group's first."""
    groups: list[Group] = []
    latest: dict[int, Group] = {}
    for row in rows:
        group = latest.get(together[row])
        if group is None or len(group) == most:
            group = latest[together[row]] = []
            groups.append(group)
        group.append(row)
    return groups


def split(groups: list[Group], parts: int) -> list[Group]:
    """The groups, the one with the most rows cut in two until they are so many."""
    heap = sorted((-len(group), group) for group in groups)
    while len(heap) < parts:
        group = heap[0][1]
        heapreplace(heap, (-len(group[::2]), group[::2]))
        heappush(heap, (-len(group[1::2]), group[1::2]))
    return [group for _, group in heap]


def fill_padded(rows: Group, lengths: Sequence[int], budget: int, parts: int = 0) -> list[Group]:
    """The fewest groups of at most `budget` tokens when padded, but not fewer than `parts`; rows come longest first."""
    groups: list[Group] = []
    start = 0
    while start < len(rows):
        spare = len(rows) - start - (parts - len(groups) - 1)  # all but one row for each of the parts to come
        groups.append(rows[start : start + min(budget // lengths[rows[start]], spare)])
        start += len(groups[-1])
    return groups


def divide_padded(rows: Group, lengths: Sequence[int], max_tokens: int, parts: int) -> list[Group]:
    """So many groups, the largest as small as it can be when padded; more, where `max_tokens` asks for more."""
    longest = lengths[rows[0]]
    fits = range(longest, max_tokens)
    above = bisect_left(fits, True, key=lambda budget: len(fill_padded(rows, lengths, budget, parts)) <= parts)
    return fill_padded(rows, lengths, longest + above, parts)
