import os
import subprocess
import sys
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmtune.packing import BatchPlan, best_fit, bundle, divide_padded, split

SIXTEEN = [9, 2, 7, 4, 4, 1, 8, 3, 6, 5, 2, 9, 1, 7, 3, 5]
PLAN: dict[str, Any] = {"rows_per_step": 4, "max_tokens": 20, "packed": True, "epochs": 2, "seed": 7}


def plan(lengths: list[int] = SIXTEEN, **overrides: Any) -> BatchPlan:
    return BatchPlan(lengths, **{**PLAN, **overrides})


@st.composite
def plans(draw: st.DrawFn, **fixed: Any) -> BatchPlan:
    """Any plan that can be made: where two rows always fit together, any number of rows can be dealt evenly."""
    world = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 50), min_size=world, max_size=40))
    wanted: dict[str, Any] = {
        "rows_per_step": world * draw(st.integers(1, 5)),
        "max_tokens": max(lengths) * (1 if world == 1 else 2) + draw(st.integers(0, 60)),
        "packed": draw(st.booleans()),
        "epochs": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 9)),
        "shuffle": draw(st.booleans()),
        "world": world,
    }
    return plan(lengths, **{**wanted, **fixed})


def row_sets(made: BatchPlan, epoch: int) -> list[list[int]]:
    """The rows of each step, sorted."""
    return [sorted(row for micro_batch in step for rows in micro_batch for row in rows) for step in made.steps(epoch)]


def costs(made: BatchPlan, step: list[list[list[int]]]) -> list[int]:
    lengths = [[made.lengths[row] for row in rows] for micro_batch in step for rows in micro_batch]
    return [sum(group) if made.packed else len(group) * max(group) for group in lengths]


def order(made: BatchPlan, epoch: int) -> list[int]:
    count = len(made.lengths)
    generator = torch.Generator().manual_seed(made.seed + epoch)
    return torch.randperm(count, generator=generator).tolist() if made.shuffle else list(range(count))


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_exactly_one_micro_batch_of_an_epoch(made: BatchPlan) -> None:
    for epoch in range(made.epochs):
        assert sorted(chain(*row_sets(made, epoch))) == list(range(len(made.lengths)))


@given(plans())
@settings(max_examples=150, deadline=None)
def test_the_steps_are_the_epoch_s_order_cut_every_so_many_rows(made: BatchPlan) -> None:
    for epoch in range(made.epochs):
        rows, size = order(made, epoch), made.rows_per_step
        cuts = [*range(0, len(rows), size), len(rows)]
        if len(cuts) > 2 and len(rows) % size in range(1, made.world):
            del cuts[-2]
        wanted = [sorted(rows[start:stop]) for start, stop in pairwise(cuts)]
        found = row_sets(made, epoch)
        if made.shuffle and epoch == 0:
            assert sorted(found) == sorted(wanted)
            assert sum(a != b for a, b in zip(found, wanted, strict=True)) in {0, 2}  # two steps traded places
        else:
            assert found == wanted


@given(plans())
@settings(max_examples=150, deadline=None)
def test_no_micro_batch_is_empty_or_over_the_budget_and_the_largest_is_known(made: BatchPlan) -> None:
    seen = [cost for epoch in range(made.epochs) for step in made.steps(epoch) for cost in costs(made, step)]
    assert 0 < min(seen) <= max(seen) == made.largest <= made.max_tokens
    assert all(rows for epoch in range(made.epochs) for rows in made)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_process_has_as_many_micro_batches_and_only_the_last_step_has_fewer(made: BatchPlan) -> None:
    for epoch in range(made.epochs):
        steps = made.steps(epoch)
        assert {len(step) for step in steps[:-1]} <= {made.micro_batches}
        assert 1 <= len(steps[-1]) <= made.micro_batches
        assert {len(micro_batch) for step in steps for micro_batch in step} == {made.world}
        assert sum(map(len, steps)) == len(made)
        assert -(-len(made) // made.micro_batches) == len(steps)  # the trainer counts its steps so


@given(plans())
@settings(max_examples=150, deadline=None)
def test_micro_batches_come_largest_first_and_neighbours_in_cost_run_together(made: BatchPlan) -> None:
    for step in made.steps(0):
        slots = [costs(made, [micro_batch]) for micro_batch in step]
        assert all(min(before) >= max(after) for before, after in pairwise(slots))


@given(plans(world=1, packed=True))
@settings(max_examples=100, deadline=None)
def test_packed_steps_have_as_many_micro_batches_as_best_fit_needs(made: BatchPlan) -> None:
    def needed(rows: list[int]) -> int:
        room: list[int] = []
        for length in sorted((made.lengths[row] for row in rows), reverse=True):
            fitting = [left for left in room if left >= length]
            left = min(fitting, default=made.max_tokens)
            if fitting:
                room.remove(left)
            room.append(left - length)
        return len(room)

    assert made.micro_batches == max(needed(rows) for epoch in range(made.epochs) for rows in row_sets(made, epoch))


def smallest_largest(lengths: list[int], parts: int) -> int:
    """Every way to cut the sorted rows, tried."""
    lengths = sorted(lengths)
    ways = ([0, *cuts, len(lengths)] for cuts in combinations(range(1, len(lengths)), parts - 1))
    return min(max((stop - start) * lengths[stop - 1] for start, stop in pairwise(cuts)) for cuts in ways)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_padded_micro_batches_are_the_fewest_and_their_largest_the_smallest_of_all_ways(lengths: list[int], more: int) -> None:
    made = plan(lengths, packed=False, max_tokens=max(lengths) + more, rows_per_step=9, epochs=1)
    ways = [smallest_largest(lengths, parts) for parts in range(1, len(lengths) + 1)]
    assert made.micro_batches == next(parts for parts, cost in enumerate(ways, 1) if cost <= made.max_tokens)
    assert made.largest == ways[made.micro_batches - 1]


def test_a_padded_micro_batch_takes_no_row_more_than_the_smallest_largest_cost_allows() -> None:
    made = plan([5, 3, 3, 1, 1], packed=False, rows_per_step=5, max_tokens=5, shuffle=False)  # 3 + 3 would make 6
    assert made.micro_batches == 4
    assert made.largest == 5


def test_the_docstring_s_example() -> None:
    packed, padded = (plan([5, 3, 4, 2], max_tokens=8, shuffle=False, packed=packed) for packed in (True, False))
    assert list(packed) == [[0, 3], [2, 1]]
    assert list(padded) == [[1, 3], [0], [2]]
    assert (packed.largest, padded.largest) == (7, 6)


def test_best_fit_is_taken_where_balancing_goes_over_the_budget() -> None:
    lengths = [5, 4, 3, 3, 3]  # balanced: 5 + 3, 4 + 3 + 3
    made = plan(lengths, rows_per_step=5, max_tokens=9, shuffle=False)
    assert made.micro_batches == 2
    assert sorted(made) == [[0, 1], [2, 3, 4]]


def test_best_fit_s_micro_batches_are_split_where_another_step_needs_more() -> None:
    nine = [5] * 6 + [4] * 6 + [3] * 9  # six times 5 + 4, three times 3 + 3 + 3; balanced over ten, 4 + 3 + 3
    ten = [9] * 8 + [1] * 13
    made = plan(nine + ten, rows_per_step=21, max_tokens=9, shuffle=False)
    assert [len(step) for step in made.steps(0)] == [10, 10]
    assert made.largest == 9


def test_the_group_of_the_most_rows_is_split_first() -> None:
    assert sorted(split([[1, 2, 3, 4, 5], [6]], 4)) == [[1, 5], [2, 4], [3], [6]]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_a_step_do_not_depend_on_packing_or_on_the_number_of_processes(packed: bool) -> None:
    made = plan(max_tokens=20)
    for world in (1, 2):
        other = plan(packed=packed, world=world, max_tokens=30)
        assert sorted(row_sets(other, 0)) == sorted(row_sets(made, 0))
        assert row_sets(other, 1) == row_sets(made, 1)


def test_the_processes_share_an_epoch_out_between_them() -> None:
    first, second = (plan(world=2, rank=rank) for rank in (0, 1))
    assert len(list(first)) == len(list(second)) == len(first)
    assert [list(pair) for pair in zip(first, second, strict=True)] == list(chain(*first.steps(0)))


def test_neither_process_always_has_the_larger_micro_batch() -> None:
    (step,) = plan([8, 7, 6, 5], world=2, max_tokens=8, shuffle=False).steps(0)
    assert step == [[[0], [1]], [[3], [2]]]


def test_each_epoch_has_its_own_order_and_without_shuffling_all_have_one() -> None:
    made, plain = plan(), plan(shuffle=False)
    assert made.steps(0) != made.steps(1) != made.steps(2)
    assert plain.steps(0) == plain.steps(1)
    assert row_sets(plain, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_set_epoch_decides_what_is_iterated() -> None:
    made = plan()
    made.set_epoch(1)
    assert list(made) == [rows for step in made.steps(1) for (rows,) in step]


@given(plans(shuffle=True))
@settings(max_examples=100, deadline=None)
def test_epoch_0_opens_with_the_costliest_full_step(made: BatchPlan) -> None:
    peaks = [max(costs(made, step)) for step in made.steps(0)]
    full = peaks[: max(len(made.lengths) // made.rows_per_step, 1)]
    assert peaks[0] == max(full)


def test_a_step_with_fewer_rows_stays_last_even_where_it_is_the_costliest() -> None:
    last = order(plan([1] * 13), 0)[-1]
    made = plan([9 if row == last else 1 for row in range(13)], max_tokens=9)
    assert row_sets(made, 0)[-1] == [last]
    assert made.largest == 9


# ---- rows that are better together


def grouped(lengths: list[int], together: list[int], **overrides: Any) -> BatchPlan:
    return plan(lengths, together=together, **overrides)


def numbers_of_steps(made: BatchPlan, epoch: int) -> list[list[int]]:
    assert made.together is not None
    return [[made.together[row] for row in rows] for rows in row_sets(made, epoch)]


def test_rows_of_a_number_come_one_after_the_other_and_in_one_micro_batch() -> None:
    made = grouped([5] * 16, [row % 4 for row in range(16)], rows_per_step=8, max_tokens=20)
    assert made.micro_batches == 2
    for epoch in range(2):
        for step in made.steps(epoch):
            assert all(len({row % 4 for row in rows}) == 1 for (rows,) in step)
    assert made.steps(0) != made.steps(1)


@pytest.mark.parametrize("size", [3, 5])
def test_rows_of_a_number_are_parted_only_where_a_step_ends(size: int) -> None:
    made = grouped([5] * 60, [row % (60 // size) for row in range(60)], rows_per_step=8, max_tokens=100)
    for epoch in range(2):
        parted = sum(len(set(numbers)) for numbers in numbers_of_steps(made, epoch)) - 60 // size
        assert parted <= len(made.steps(epoch)) + 1  # one between two steps, and those that traded places


def test_no_more_rows_of_a_number_come_together_than_a_step_has() -> None:
    made = grouped([5] * 240, [0] * 120 + [*range(1, 121)], rows_per_step=4, max_tokens=100)
    assert [len(rows) for rows in bundle(range(12), [0] * 6 + [*range(1, 7)], 4)] == [4, 2, *[1] * 6]
    shares = [numbers.count(0) for numbers in numbers_of_steps(made, 1)]
    assert sum(share == 0 for share in shares) > 10  # not all in one place


def test_rows_that_are_many_of_a_number_come_no_earlier_than_others() -> None:
    made = grouped([5] * 800, [*range(400), *(400 + row // 4 for row in range(400))], rows_per_step=8, max_tokens=40, epochs=4)
    places = [place for epoch in range(1, 4) for place, rows in enumerate(row_sets(made, epoch)) for row in rows if row >= 400]
    assert sum(places) / len(places) == pytest.approx(49.5, rel=0.1)


def test_rows_that_share_a_step_do_so_however_they_are_packed_and_on_any_number_of_processes() -> None:
    numbers = [row // 3 for row in range(30)]
    steps = [
        row_sets(grouped([5] * 30, numbers, rows_per_step=6, max_tokens=tokens, world=world), 1)
        for tokens, world in ((5, 1), (15, 1), (100, 1), (15, 2), (15, 3))
    ]
    assert all(found == steps[0] for found in steps)


def test_no_more_is_parted_than_has_to_be() -> None:
    made = grouped([100] * 12, [row // 4 for row in range(12)], rows_per_step=12, max_tokens=700, shuffle=False)
    groups = [[row // 4 for row in rows] for slot in made.steps(0)[0] for rows in slot]
    assert sorted(len(set(group)) for group in groups) == [2, 2]
    made = grouped([100] * 12, [row // 4 for row in range(12)], rows_per_step=12, max_tokens=100, shuffle=False)
    assert [len(rows) for slot in made.steps(0)[0] for rows in slot] == [1] * 12


def test_rows_that_come_as_they_lie_stay_so_and_go_together_within_their_step() -> None:
    made = grouped([5] * 8, [0, 1, 0, 1, 2, 3, 2, 3], max_tokens=10, shuffle=False)
    assert row_sets(made, 0) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made.steps(0) == [[[[0, 2]], [[1, 3]]], [[[4, 6]], [[5, 7]]]]


def test_what_would_need_more_micro_batches_is_parted() -> None:
    made = grouped([5] * 4, [0, 0, 0, 1], max_tokens=10, shuffle=False)
    assert made.micro_batches == 2
    assert sorted(len(rows) for slot in made.steps(0)[0] for rows in slot) == [2, 2]


@given(plans(packed=True), st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_together_changes_no_count_and_no_budget(made: BatchPlan, data: st.DataObject) -> None:
    count = len(made.lengths)
    numbers = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    taken = ("rows_per_step", "max_tokens", "epochs", "seed", "shuffle", "world")
    with_it = grouped(list(made.lengths), numbers, **{name: getattr(made, name) for name in taken})
    assert len(with_it) == len(list(with_it))
    if not made.shuffle:
        assert with_it.micro_batches == made.micro_batches
        assert row_sets(with_it, 0) == row_sets(made, 0)
    for epoch in range(made.epochs):
        assert sorted(chain(*row_sets(with_it, epoch))) == list(range(count))
        for step in with_it.steps(epoch):
            assert max(costs(with_it, step)) <= with_it.largest <= with_it.max_tokens
            assert all(len(slot) == made.world and all(slot) for slot in step)


def test_rows_left_over_that_give_not_every_process_one_join_the_step_before() -> None:
    sizes = [len(rows) for rows in row_sets(plan(SIXTEEN[:9], world=2, shuffle=False), 0)]
    assert sizes == [4, 5]
    assert [len(rows) for rows in row_sets(plan(SIXTEEN[:9], shuffle=False), 0)] == [4, 4, 1]


def test_a_row_that_is_too_long_is_named() -> None:
    with pytest.raises(ValueError, match=r"^row 2, counted from 0, has 21 tokens; 1 to 20 fit a micro-batch$"):
        plan([5, 20, 21])
    with pytest.raises(ValueError, match=r"row 1, counted from 0, has 0 tokens"):
        plan([5, 0])


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^2 rows, 4 a step, are too few for 3 processes: each needs a row in every step$"):
        plan([1, 1], world=3)
    with pytest.raises(ValueError, match="0 rows"):
        plan([])


def test_rows_that_cannot_be_dealt_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 rows needs 3 micro-batches of 20 tokens, but 2 processes .* can have 2"):
        plan([20, 20, 20], world=2)
    with pytest.raises(ValueError, match=r"8 rows needs 8 micro-batches of 20 tokens, but 4 processes .* can have 4"):
        plan([1] * 5 + [20] * 8, rows_per_step=5, world=4, shuffle=False)  # three rows joined the step before


def test_rows_per_step_need_not_be_a_multiple_of_the_processes() -> None:
    made = plan([1] * 10, rows_per_step=5, world=2, max_tokens=2, shuffle=False)
    assert row_sets(made, 0) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert made.micro_batches == 2


def test_an_epoch_that_was_not_planned_for_is_refused_where_it_needs_more() -> None:
    lengths = [10, 10, 1, 1, 1, 1, 1, 1]  # two micro-batches where both long rows meet
    made = next(made for seed in range(99) if (made := plan(lengths, max_tokens=13, epochs=1, seed=seed)).micro_batches == 1)
    with pytest.raises(ValueError, match=r"^a step of epoch \d+, counted from 0, needs 2 micro-batches instead of 1: 1 epochs"):
        list(map(made.steps, range(99)))


def test_another_process_makes_the_same_plan() -> None:
    code = f"from vlmtune.packing import *; print(BatchPlan({SIXTEEN}, **{PLAN}).steps(0))"
    there = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(plan().steps(0))


def test_a_step_of_many_rows_is_divided_quickly() -> None:
    lengths = [50 + row * 7919 % 850 for row in range(20_000)]
    rows = sorted(range(20_000), key=lengths.__getitem__, reverse=True)
    assert 2_300 < len(best_fit(rows, lengths, 4096)) < 2_400
    assert len(divide_padded(rows, lengths, 4096, 2_600)) == 2_600


def test_the_wrapper_of_accelerate_lets_a_process_have_its_own() -> None:
    made = plan(world=2, rank=1)
    shard = BatchSamplerShard(made, num_processes=2, process_index=1)
    shard.num_processes, shard.process_index = 1, 0  # as the trainer leaves it
    assert list(shard) == list(made)
    assert len(shard) == len(made)


class Seen(torch.nn.Module):
    """A model that keeps the rows of each batch it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def forward(self, row: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        self.rows.append(row.tolist())
        return {"loss": self.weight * row.sum()}


class Cut(TrainerCallback):
    """Keeps how many batches had been seen at the end of each optimiser step."""

    def __init__(self, model: Seen) -> None:
        self.model, self.at = model, list[int]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(len(self.model.rows))


class Planned(Trainer):
    def _get_train_sampler(self, *_: Any) -> BatchPlan:  # pyright: ignore[reportIncompatibleMethodOverride]
        return plan(SIXTEEN[:13], max_tokens=12)


def test_the_trainer_takes_the_steps_as_planned_and_resumes_inside_an_epoch(tmp_path: Path) -> None:
    made = plan(SIXTEEN[:13], max_tokens=12)
    wanted = [[rows for (rows,) in step] for epoch in (0, 1) for step in made.steps(epoch)]
    assert len(made) % made.micro_batches  # the last step of an epoch has fewer

    def run(resume: str | None) -> list[list[list[int]]]:
        arguments = TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            gradient_accumulation_steps=made.micro_batches,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = Seen()
        trainer = Planned(model, arguments, train_dataset=[{"row": row} for row in range(13)], callbacks=[cut := Cut(model)])
        trainer.train(resume_from_checkpoint=resume)
        return [model.rows[start:stop] for start, stop in pairwise([0, *cut.at])]

    assert run(None) == wanted
    assert run(str(tmp_path / "checkpoint-6")) == wanted[6:]
