import builtins
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vlmtune.errors import OutputError, RecipeError
from vlmtune.plan.forecast import Batch, Forecast, Memory, Plan, Setting, Speed, Work
from vlmtune.plan.page import draw, html, write_html
from vlmtune.plan.report import Report, show
from vlmtune.plan.words import describe, overrides, verdict

HOSTILE = "[red]<script>alert('x')</script>[/] $a_b$"


def forecast(needed: float = 14.0, rate: float | None = 1.0, **setting: Any) -> Forecast:
    """On an L4 of 20 GiB, `rate` rows a second."""
    chosen = {
        "micro_batch": 4,
        "accumulation": 4,
        "pack_length": 4096,
        "packed": True,
        "checkpointing": 1,
        "attention": "flash_attention_2",
        "max_pixels": None,
        "cached": False,
    }
    speed = Speed(
        card="L4",
        visible_gib=20.0,
        verdict="fits" if needed <= 18 else "tight" if needed <= 20 else "no",
        spare_gib=20 - needed,
        step_seconds=rate and 16 / rate,
        samples_per_second=rate,
        tokens_per_second=rate and 1153 * rate,
        epoch_seconds=rate and 1600 / rate,
        run_seconds=rate and 16000 / rate,
        run_price=rate and 7.716 / rate,
    )
    rising = [("forward", 6 + k / 10) for k in range(60)]
    falling = [("backward", 12 - k / 20) for k in range(120)]
    return Forecast(
        setting=Setting.model_validate(chosen | setting),
        memory=Memory(
            peak_gib=12.0,
            reserved_gib=13.0,
            needed_gib=needed,
            breakdown={"weights": 7.0, "gradients": 0.001, "activations": needed - 7},
            peak_at="backward of layer 27, aten::mm",
            timeline=[*rising, *falling, *[("optimiser", 6.0)] * 20],
        ),
        batches=[
            Batch(name="worst", rows=4, tokens=4096, pictures=9, example="stated sizes"),
            Batch(name="typical", rows=4, tokens=4096, pictures=9, example="stated sizes"),
            Batch(name="filling the vision cache", rows=0, tokens=0, pictures=8, example="the largest pictures"),
        ],
        peaks={"worst": needed, "typical": needed, "filling the vision cache": 8.0},
        work=Work(matmul_flops=4e14, attention_flops=2e13, elementwise_bytes=1e12, dequantized_bytes=4e11, kernels=38000),
        cards=[speed],
        confidence="medium",
        notes=["flash_attention_2 was simulated by its formula"],
    )


def plan(found: Forecast | None = None, **changed: Any) -> Plan:
    found = found or forecast()
    speed, memory = found.cards[0], found.memory
    fields = {
        **{name: getattr(speed, name) for name in Speed.model_fields if name in Plan.model_fields},
        **{name: getattr(memory, name) for name in Memory.model_fields if name in Plan.model_fields},
        "model": "Qwen/Qwen2-VL-7B-Instruct",
        "family": "qwen2_vl",
        "fits": speed.verdict == "fits",
        "confidence": found.confidence,
        "advice": "",
        "rows": 1350,
        "steps": 129,
        "forecast": found,
        "overrides": {},
        "frontier": [],
        "measured": [],
        "versions": {"torch": "2.14.1"},
    }
    return Plan(**(fields | changed))


def fitted() -> Plan:
    chosen = forecast(16.0, 1.2, micro_batch=8, accumulation=2, checkpointing=2)
    slower, faster = forecast(9.0, 0.6, micro_batch=1, accumulation=16), forecast(24.0, 1.5, checkpointing=0)
    values = {"train.per_device_train_batch_size": 8, "train.gradient_checkpointing": 2, "packing.length": None}
    return plan(chosen, frontier=[slower, chosen, faster], overrides=values)


def printed(shown: Plan, width: int = 80, *, colours: bool = False) -> str:
    file = io.StringIO()
    Console(width=width, file=file, force_terminal=colours, color_system="truecolor" if colours else None).print(Report(shown))
    return file.getvalue()


def test_verdict_is_one_sentence_with_the_numbers_that_decide():
    assert verdict(plan()) == "fits: needs 14.0 of 20.0 GiB on L4 (70 %), 6.0 GiB to spare"
    assert verdict(plan(forecast(19.0))) == "tight: needs 19.0 of 20.0 GiB on L4 (95 %), 1.0 GiB to spare"
    too_much = plan(forecast(26.0), advice="packing.length=2048 fits")
    assert verdict(too_much) == "does not fit: needs 26.0 of 20.0 GiB on L4 (130 %), 6.0 GiB too much; packing.length=2048 fits"


def test_setting_in_words_and_among_others_only_what_differs():
    one, other = forecast().setting, forecast(checkpointing=4).setting
    assert describe(one) == "4 × 4, packed to 4,096 tokens, every layer recomputed, flash_attention_2"
    assert describe(one, [one, other]) == "every layer recomputed"
    assert describe(other, [one, other]) == "every 4th layer recomputed"


def test_overrides_can_be_pasted_into_a_shell():
    assert overrides(fitted()).split(" \\\n") == [
        "train.per_device_train_batch_size=8",
        "train.gradient_checkpointing=2",
        "packing.length=null",
    ]
    assert overrides(plan(overrides={"output": "a b"})) == "'output=a b'"


def test_other_cards_are_said_to_be_judged_by_what_the_asked_one_needs():
    assert "What it takes and costs, estimated\n" in printed(plan())
    one = forecast(14.0)
    several = one.model_copy(update={"cards": [*one.cards, one.cards[0].model_copy(update={"card": "A10G"})]})
    assert "What it takes and costs, estimated; memory: the 14.0 GiB needed on L4\n" in printed(plan(several))


def test_show_prints_the_verdict_first(capsys: pytest.CaptureFixture[str]):
    show(plan())
    assert capsys.readouterr().out.startswith("fits: needs 14.0 of 20.0 GiB")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("colours", [False, True])
def test_no_line_is_wider_than_the_console(width: int, colours: bool):
    for shown in (plan(), plan(forecast(40.0)), fitted()):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", printed(shown, width, colours=colours)).splitlines()
        assert max(map(len, lines)) <= width


def test_bar_is_read_without_colours():
    lines = printed(plan()).splitlines()
    place = lines.index("a" * 28 + "b" * 28 + "·" * 24)  # 7 and 7 of 20 GiB, 80 columns
    assert lines[place - 1].index("90 % ▼") + 5 == 71
    assert lines[place - 1].endswith("100 % ▼")
    assert re.search(r" a  weights +7\.00 +50 %", printed(plan()))
    assert re.search(r"f{10,}b{10,}o+", printed(plan()))


def test_bar_of_what_does_not_fit_goes_on_past_the_card():
    lines = printed(plan(forecast(40.0))).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("aaa"))
    assert "·" not in lines[place]
    assert lines[place - 1].index("▼ 100 %") == 39


def test_batches_that_are_alike_are_one_row_and_no_rows_are_blank():
    text = printed(plan(), 120)
    assert re.search(r"worst, typical +4 +4,096 +9 +14\.0 +stated sizes", text)
    assert re.search(r"filling the vision cache +8 +8\.0 +the largest pictures", text)


def test_run_is_counted_where_the_rows_are_known():
    assert "1,350 rows, 129 steps of 16 rows: micro-batch 4 × accumulation 4" in printed(plan())
    assert "run      steps of 16 rows: micro-batch 4 × accumulation 4" in printed(plan(rows=None, steps=None))


def test_card_has_time_and_price_and_a_size_alone_has_none():
    assert re.search(r"L4 +fits +6\.0 +16\.0 +1\.00 +1,153 +27 min +4\.4 h +\$7\.72", printed(plan()))
    assert re.search(r"L4 +fits +6\.0( +–){6}", printed(plan(forecast(rate=None))))


def test_compared_settings_stand_beside_the_chosen():
    text = printed(fitted())
    assert re.search(r"1 × 16, every layer recomputed +9\.0 +0\.60 +fits +−7\.0 GiB, 50 % slower", text)
    assert re.search(r"8 × 2, every 2nd layer recomputed +16\.0 +1\.20 +fits +◂ chosen", text)
    assert re.search(r"4 × 4, no checkpointing +24\.0 +1\.50 +no +\+8\.0 GiB, 25 % faster", text)


def test_measured_runs_stand_beside_what_was_predicted():
    run: dict[str, Any] = {"card": "L4", "when": "2026-11-22T09:00:00+00:00", "setting": {"micro_batch": 4, "accumulation": 4}}
    for key in ("allocated_gib", "reserved_gib", "step_seconds"):
        run |= {key: 12.5, f"predicted_{key}": None if key == "step_seconds" else 12.0}
    assert re.search(r"2026-11-22  4 × 4 +12\.5 / 12\.0 +12\.5 / 12\.0 +12\.5 / –", printed(plan(measured=[run])))


def test_markup_in_names_and_notes_is_text(tmp_path: Path):
    pytest.importorskip("matplotlib")
    found = forecast(26.0).model_copy(update={"notes": [HOSTILE]})
    hostile = plan(found, model=HOSTILE, advice=HOSTILE, overrides={"model.name": HOSTILE})
    assert printed(hostile, 120).count(HOSTILE) == 3
    assert "<script" not in html(hostile)
    assert "[red]&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;[/] $a_b$" in html(hostile)
    draw(hostile, tmp_path / "plan.png")


def test_page_needs_no_network_and_picture_is_a_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for shown in (plan(), plan(forecast(26.0, None)), fitted()):
        write_html(shown, tmp_path / "plan.html")  # over the earlier one
        draw(shown, tmp_path / "plan.png")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "fits: needs 16.0 of 20.0 GiB on L4 (80 %), 4.0 GiB to spare" in page
    assert re.findall(r'(?:src|href)="(.{10})|url\(|@import', page) == ["data:image"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    for write in (draw, write_html):
        with pytest.raises(RecipeError, match=r"pip install 'vlmtune\[notebook\]'"):
            write(plan(), tmp_path / "plan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "absent/plan"])
def test_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, name: str):
    pytest.importorskip("matplotlib")
    for write in (draw, write_html):
        with pytest.raises(OutputError, match="cannot be written"):
            write(plan(), tmp_path / name)
