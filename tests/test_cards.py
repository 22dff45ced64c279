import dataclasses

import pytest

from vlmtune.errors import RecipeError
from vlmtune.plan.cards import CARDS, CARDS_24GB, Card, find_card, seconds, smallest_card, speed, verdict
from vlmtune.plan.forecast import Work

ROUND = Card("round", visible_gib=20.0, tflops=100, gb_per_second=1000, matmul_efficiency=0.5, dollars_per_hour=3.6)


def work(**changed: float) -> Work:
    nothing = {"matmul_flops": 0, "attention_flops": 0, "elementwise_bytes": 0, "dequantized_bytes": 0, "kernels": 0}
    return Work.model_validate(nothing | changed)


def run_on(card: Card, needed_gib: float = 10.0):
    step = work(matmul_flops=50e12)  # a second on a round card
    return speed(card, needed_gib=needed_gib, work=step, rows_per_step=8, tokens_per_step=4000, steps_per_epoch=100, epochs=3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("rtx 4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("RTX_4090", "RTX4090"),
        ("GeForce RTX 3090 24GB", "RTX3090"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("l4 24gb", "L4"),
        ("L40S", "L40S"),
        ("RTX A6000", "A6000"),
        ("NVIDIA RTX A6000", "A6000"),
        ("A100-40", "A100-40"),
        ("A100-40GB", "A100-40"),
        ("a100 80gb", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("Tesla V100-PCIE-32GB", "V100-32"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
    ],
)
def test_a_card_is_found_however_it_is_written(written: str, meant: str):
    assert find_card(written).name == meant


def test_every_card_is_found_by_its_own_name_and_no_two_are_spelt_alike():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


@pytest.mark.parametrize("size", ["24GB", "24gb", "24 GB", "24GiB", " 24gb "])
def test_a_size_is_a_card_without_speeds(size: str):
    assert find_card(size) == Card("24GB", visible_gib=22.03)
    assert find_card(size).tflops is None


def test_a_size_has_the_memory_of_the_smallest_card_sold_by_it():
    assert find_card("24GB").visible_gib == min(find_card(name).visible_gib for name in CARDS_24GB)
    assert find_card("16GB").visible_gib == find_card("T4").visible_gib
    assert find_card("80 GB").visible_gib == find_card("H100").visible_gib


def test_a_size_that_no_known_card_is_sold_by_shows_a_little_less():
    assert find_card("96GB").visible_gib == 93.6


def test_an_unknown_card_is_answered_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"'TPU v5'.*T4.*H100.*24GB\.$"):
        find_card("TPU v5")


@pytest.mark.parametrize(
    ("written", "near"), [("RTX 4091", "RTX4090"), ("nvidia geforce rtx 3080", "RTX4080"), ("A10", "A10G")]
)
def test_an_unknown_card_is_answered_with_a_near_one(written: str, near: str):
    with pytest.raises(RecipeError, match=f"Did you mean '{near}'"):
        find_card(written)


@pytest.mark.parametrize("name", ["", "0GB", "-24GB", "GB", "24"])
def test_what_is_neither_a_name_nor_a_size_is_refused(name: str):
    with pytest.raises(RecipeError):
        find_card(name)


def test_the_four_cards_of_24_gb_are_known():
    assert all(21 < find_card(name).visible_gib < 24 for name in CARDS_24GB)


def test_every_known_card_has_speeds_and_shares_below_one():
    for card in CARDS:
        assert card.tflops is not None
        assert card.gb_per_second is not None
        assert card.matmul_efficiency is not None
        assert 0 < card.matmul_efficiency < 1 > card.bandwidth_efficiency > 0


def test_a_second_of_products_and_a_second_of_traffic_take_two():
    step = work(matmul_flops=30e12, attention_flops=20e12, elementwise_bytes=800e9, dequantized_bytes=50e9)
    assert seconds(step, ROUND) == pytest.approx(2.0)  # 50 of 100 TFLOP/s at half, 850 of 1000 GB/s at 85 %


def test_a_step_is_never_faster_than_its_kernels_start():
    assert seconds(work(matmul_flops=1.0, kernels=1000), ROUND) == pytest.approx(0.006)


def test_a_size_has_no_seconds():
    with pytest.raises(ValueError, match="24GB"):
        seconds(work(matmul_flops=1.0), find_card("24GB"))


@pytest.mark.parametrize(("name", "minutes"), [("L4", 74.0), ("A10G", 58.5), ("RTX3090", 49.2), ("RTX4090", 27.7)])
def test_the_tutorials_run_takes_what_the_prototype_said(name: str, minutes: float):
    step = work(matmul_flops=8 * 129e12, elementwise_bytes=8 * 518e9)  # 8 micro-batches
    assert 126 * seconds(step, find_card(name)) / 60 == pytest.approx(minutes, rel=0.01)


@pytest.mark.parametrize(
    ("needed", "expected"), [(0.0, "fits"), (18.0, "fits"), (18.01, "tight"), (20.0, "tight"), (20.01, "no")]
)
def test_up_to_nine_tenths_fit_and_the_rest_is_tight(needed: float, expected: str):
    assert verdict(needed, ROUND) == expected


def test_a_run_is_its_steps():
    found = run_on(ROUND)
    assert (found.card, found.visible_gib, found.verdict, found.spare_gib) == ("round", 20.0, "fits", 10.0)
    assert (found.step_seconds, found.samples_per_second, found.tokens_per_second) == (1.0, 8.0, 4000.0)
    assert (found.epoch_seconds, found.run_seconds) == (100.0, 300.0)
    assert found.run_price == pytest.approx(0.3)  # 300 s at 0.1 cent


def test_what_does_not_fit_spares_less_than_nothing():
    assert run_on(ROUND, needed_gib=25.0).verdict == "no"
    assert run_on(ROUND, needed_gib=25.0).spare_gib == -5.0


def test_a_size_has_a_verdict_and_no_times():
    found = run_on(find_card("24GB"))
    assert found.verdict == "fits"
    assert {found.step_seconds, found.samples_per_second, found.epoch_seconds, found.run_seconds, found.run_price} == {None}


def test_a_card_without_a_price_has_times():
    found = run_on(dataclasses.replace(ROUND, dollars_per_hour=None))
    assert (found.run_seconds, found.run_price) == (300.0, None)


@pytest.mark.parametrize(
    ("needed", "name"),
    [
        (0.0, "RTX3060"),
        (13.0, "T4"),
        (19.8, "L4"),
        (21.0, "RTX4090"),
        (28.0, "RTX5090"),
        (35.0, "A100-40"),
        (71.0, "H100-PCIe"),
    ],
)
def test_the_smallest_card_has_a_tenth_to_spare(needed: float, name: str):
    found = smallest_card(needed)
    assert found is not None
    assert found.name == name


def test_what_fits_on_no_card_has_no_smallest():
    assert smallest_card(75.0) is None
