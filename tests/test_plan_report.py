import builtins
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vlmtune.errors import OutputError, RecipeError
from vlmtune.forecast import Batch, Forecast, Memory, Plan, Setting, Speed, Work
from vlmtune.plan_report import Report, describe, draw, html, show, verdict, write_html

BREAKDOWN = {
    "language weights (nf4)": 3.46,
    "embeddings and head (bf16)": 2.03,
    "vision weights (bf16)": 1.26,
    "adapters": 0.01,
    "optimiser": 0.03,
    "gradients": 0.01,
    "inputs": 0.2,
    "vision activations": 0.3,
    "text activations": 4.0,
    "recomputation": 0.5,
    "logits": 0.3,
    "backward": 0.6,
    "workspace": 0.3,
    "rounding and fragmentation": 0.4,
    "CUDA context": 0.5,
    "allowance": 0.3,
}
NEEDED = sum(BREAKDOWN.values())  # 14.2
CARDS = {  # visible GiB, samples a second, dollars an hour
    "L4": (22.05, 0.92, 0.71),
    "T4": (14.58, 0.31, 0.35),
    "A10G": (22.06, 1.71, 1.01),
    "RTX 4090": (23.52, 3.9, 0.44),
    "A100-80GB": (79.25, 6.2, 1.89),
    "H100": (79.11, 11.4, 2.99),
    "24GB": (22.35, None, None),
}


def rising_and_falling() -> list[tuple[str, float]]:
    base, peak = 6.8, NEEDED - 1.5
    forward = [("forward", base + (peak - base) * 0.85 * (k / 90) ** 0.9) for k in range(90)]
    backward = [("backward", base + (peak - base) * (1 - (k / 95) ** 1.3) - 0.35 * math.sin(k) ** 2) for k in range(95)]
    return [*forward, *backward, *[("optimiser", base + 0.1)] * 15]


def forecast(*, needed: float = NEEDED, speed: float = 1.0, **setting: Any) -> Forecast:
    """Of Qwen2-VL-7B; `speed` is relative."""
    chosen = Setting.model_validate(
        {
            "micro_batch": 4,
            "accumulation": 4,
            "pack_length": 4096,
            "packed": True,
            "checkpointing": 1,
            "attention": "flash_attention_2",
            "max_pixels": 602112,
            "cached": False,
        }
        | setting
    )
    more = needed - NEEDED
    cards = [on(name, needed, speed) for name in CARDS]
    return Forecast(
        setting=chosen,
        memory=Memory(
            peak_gib=needed - 1.5,
            reserved_gib=needed - 0.8,
            needed_gib=needed,
            breakdown=BREAKDOWN | {"text activations": BREAKDOWN["text activations"] + more},
            peak_at="backward of layer 27, aten::mm",
            timeline=[(phase, gib + more * (gib - 6.8) / 5.9) for phase, gib in rising_and_falling()],
        ),
        batches=[
            Batch(name="worst", rows=4, tokens=4096, pictures=9, example="rows 17, 3, 250 and 811 of train.jsonl"),
            Batch(name="95th percentile", rows=4, tokens=3120, pictures=6, example="rows 8, 12, 99 and 104 of train.jsonl"),
            Batch(name="typical", rows=4, tokens=2210, pictures=4, example="rows 1, 2, 5 and 6 of train.jsonl"),
        ],
        peaks={"worst": needed, "95th percentile": needed - 1.4, "typical": needed - 2.9},
        work=Work(matmul_flops=4e14, attention_flops=2e13, elementwise_bytes=1e12, dequantized_bytes=4e11, kernels=38000),
        cards=cards,
        confidence="medium",
        notes=["flash_attention_2 was simulated by its formula", "no run on an L4 with this model was measured"],
    )


def on(card: str, needed: float, relative: float) -> Speed:
    visible, samples, price = CARDS[card]
    verdict = "fits" if needed <= 0.9 * visible else "tight" if needed <= visible else "no"
    samples = samples and samples * relative
    return Speed(
        card=card,
        visible_gib=visible,
        verdict=verdict,
        spare_gib=visible - needed,
        step_seconds=samples and 16 / samples,
        samples_per_second=samples,
        tokens_per_second=samples and samples * 620,
        epoch_seconds=samples and 12000 / samples,
        run_seconds=samples and 36000 / samples,
        run_price=samples and price and 10 / samples * price,
    )


def make_plan(
    *, needed: float = NEEDED, frontier: tuple[Forecast, ...] = (), chosen: Forecast | None = None, **changed: Any
) -> Plan:
    """A plan of Qwen2-VL-7B on an L4."""
    found = chosen or forecast(needed=needed)
    speed = found.cards[0]
    fields: dict[str, Any] = {
        "model": "Qwen/Qwen2-VL-7B-Instruct",
        "family": "qwen2_vl",
        "card": speed.card,
        "visible_gib": speed.visible_gib,
        "verdict": speed.verdict,
        "fits": speed.verdict == "fits",
        "peak_gib": found.memory.peak_gib,
        "reserved_gib": found.memory.reserved_gib,
        "needed_gib": found.memory.needed_gib,
        "step_seconds": speed.step_seconds,
        "samples_per_second": speed.samples_per_second,
        "tokens_per_second": speed.tokens_per_second,
        "epoch_seconds": speed.epoch_seconds,
        "run_price": speed.run_price,
        "confidence": found.confidence,
        "breakdown": found.memory.breakdown,
        "advice": "" if speed.verdict == "fits" else "train.per_device_train_batch_size=2 would need 16.9 GiB",
        "rows": 12000,
        "steps": 2250,
        "forecast": found,
        "overrides": {},
        "frontier": list(frontier),
        "measured": [],
        "versions": {"torch": "2.14.1", "transformers": "5.23.0"},
    }
    return Plan(**(fields | changed))


def fitted() -> Plan:
    """With `--fit`: nine settings, the fastest that fits is chosen."""
    chosen = forecast(needed=18.6, speed=1.21, micro_batch=8, accumulation=2, checkpointing=2)
    others = (
        forecast(),
        forecast(needed=9.9, speed=0.66, micro_batch=1, accumulation=16),
        forecast(needed=11.2, speed=0.83, micro_batch=2, accumulation=8),
        forecast(needed=13.1, speed=1.08, micro_batch=4, accumulation=4, cached=True),
        forecast(needed=17.0, speed=1.06, micro_batch=8, accumulation=2),
        forecast(needed=20.9, speed=1.24, micro_batch=4, accumulation=4, checkpointing=0),
        forecast(needed=24.3, speed=1.31, micro_batch=16, accumulation=1, checkpointing=2),
        forecast(needed=27.9, speed=1.4, micro_batch=8, accumulation=2, checkpointing=0),
    )
    overrides = {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2, "packing.length": None}
    return make_plan(chosen=chosen, frontier=(*others, chosen), overrides=overrides)


def printed(plan: Plan, width: int = 80, *, colours: bool = False) -> str:
    options: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"} if colours else {}
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(Report(plan))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_verdict_is_one_sentence_with_the_numbers_that_decide():
    assert verdict(make_plan()) == "fits: needs 14.2 of 22.1 GiB on L4 (64 %), 7.8 GiB to spare"
    advice = "train.per_device_train_batch_size=2 would need 16.9 GiB"
    assert verdict(make_plan(needed=26.1)) == f"does not fit: needs 26.1 GiB, 4.1 GiB more than an L4 shows; {advice}"
    assert verdict(make_plan(needed=20.6)) == f"tight: needs 20.6 of 22.1 GiB on L4 (93 %), 1.4 GiB to spare; {advice}"


@pytest.mark.parametrize(("card", "named"), [("L4", "an L4"), ("T4", "a T4"), ("RTX 4090", "an RTX 4090"), ("24GB", "a 24GB")])
def test_card_has_the_article_that_it_is_spoken_with(card: str, named: str):
    assert f"more than {named} shows" in verdict(make_plan(needed=26.1, card=card))


def test_verdict_is_the_first_line_printed_and_show_prints_to_the_one_console(capsys: pytest.CaptureFixture[str]):
    show(make_plan())
    assert capsys.readouterr().out.startswith("fits: needs 14.2 of 22.1 GiB on L4 (64 %)")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("colours", [False, True])
def test_no_line_is_wider_than_the_console(width: int, colours: bool):
    for plan in (make_plan(), make_plan(needed=26.1), fitted()):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", printed(plan, width, colours=colours)).splitlines()
        assert max(map(len, lines)) <= width


def test_without_colours_kinds_are_told_by_letters_and_shades():
    text = printed(make_plan())
    assert "\x1b" not in text
    assert "a▒▒▒▒▒▒▒▒▒▒▒▒b░░░░░░" in text
    assert re.search(r" a  language weights \(nf4\) +3\.46 +24 %", text)
    assert re.search(r"needed +14\.20 100 %", text)
    assert re.search(r"forward +backward +optimiser", text)


def test_bar_fills_the_share_of_the_card_that_is_needed():
    bar = next(line for line in printed(make_plan()).splitlines() if line.startswith("a▒"))
    assert len(bar) == 80
    assert bar.count("·") == 80 - round(80 * NEEDED / 22.05)
    over = next(line for line in printed(make_plan(needed=44.1)).splitlines() if line.startswith("a▒"))
    assert "·" not in over
    assert over.index("┃") == 40  # half of what is needed is there


def test_phases_of_several_micro_batches_are_named_once():
    plan = make_plan()
    steps = [("forward", 9.0), ("forward", 10.0), ("backward", 12.0), ("backward", 8.0)] * 4 + [("optimiser", 7.0)]
    memory = plan.forecast.memory.model_copy(update={"timeline": steps})
    many = plan.model_copy(update={"forecast": plan.forecast.model_copy(update={"memory": memory})})
    assert re.search(r"forward +backward +optimiser", printed(many))
    assert html(many).count(">forward<") == 1


def test_without_a_timeline_or_a_breakdown_the_rest_is_shown(tmp_path: Path):
    plan = make_plan()
    memory = plan.forecast.memory.model_copy(update={"timeline": [], "breakdown": {}})
    bare = plan.model_copy(update={"breakdown": {}, "forecast": plan.forecast.model_copy(update={"memory": memory})})
    assert "What it takes and costs" in printed(bare)
    assert "What it takes and costs" in html(bare)
    pytest.importorskip("matplotlib")
    draw(bare, tmp_path / "plan.png")


def test_cards_have_time_and_price_and_a_size_alone_has_none():
    text = printed(make_plan(), 120)
    assert re.search(r"L4 +fits +7\.8 +17\.4 +0\.92 +570 +3\.6 h +10\.9 h +\$7\.72", text)
    assert re.search(r"24GB +fits +8\.1( +–){6}", text)
    assert "assumed efficiency: estimates" in text


def test_compared_settings_differ_in_what_is_said_of_them():
    text = printed(fitted(), 120)
    assert re.search(r"▸ +8 × 2 rows, checkpointing 1 of 2 layers +18\.6 +1\.11 +fits +chosen", text)
    assert re.search(r" 4 × 4 rows, no checkpointing +20\.9 +1\.14 +tight +\+2\.3 GiB, 2 % faster", text)
    assert re.search(r" 1 × 16 rows, checkpointing +9\.9 +0\.61 +fits +−8\.7 GiB, 45 % slower", text)
    assert "run with  train.per_device_train_batch_size=8 train.gradient_accumulation_steps=2 packing.length=null" in text


def test_of_many_settings_the_terminal_shows_those_that_none_beats():
    better = [forecast(needed=10 + k / 4, speed=0.5 + k / 40, micro_batch=k + 1) for k in range(12)]
    worse = [forecast(needed=10.1 + k / 4, speed=0.4 + k / 40, micro_batch=k + 20) for k in range(12)]
    plan = make_plan(chosen=better[3], frontier=(*better, *worse))
    assert "12 more that another beats in memory and speed" in printed(plan, 120)
    assert html(plan).count(" rows</td>") == 24


def test_setting_in_words():
    setting = forecast().setting
    assert describe(setting) == "4 × 4 rows, packed to 4,096 tokens, checkpointing, flash_attention_2, at most 602,112 pixels"
    plain = Setting(
        micro_batch=1,
        accumulation=8,
        pack_length=None,
        packed=False,
        checkpointing=0,
        attention=None,
        max_pixels=None,
        cached=True,
    )
    assert describe(plain) == "1 × 8 rows, not packed, no checkpointing, cached pictures"


def test_markup_in_names_and_notes_is_text():
    hostile = "[red]<script>alert('x')</script>[/] $a_b$"
    kind = "<b>[bold]kind"
    plan = make_plan(needed=26.1, model=hostile, advice=hostile, breakdown={kind: 26.1}, measured=[{hostile: hostile}])
    plan = plan.model_copy(update={"forecast": plan.forecast.model_copy(update={"notes": [hostile]})})
    text, page = printed(plan, 120), html(plan)
    assert text.count(hostile) >= 4
    assert kind in text
    assert "<script" not in page
    assert kind not in page
    assert "[red]&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;[/] $a_b$" in page


def test_page_is_whole_and_needs_no_network(tmp_path: Path):
    path = tmp_path / "deep" / "plan.html"
    write_html(make_plan(), path)
    write_html(fitted(), path)  # over the earlier one
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "fits</b>: needs 18.6 of 22.1 GiB on L4 (84 %), 3.4 GiB to spare" in page
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert [found.name for found in path.parent.iterdir()] == ["plan.html"]


def test_chart_of_compared_settings_is_drawn_only_where_there_are_some():
    assert html(make_plan()).count("<svg") == 2
    assert "chosen" not in html(make_plan()).partition("</style>")[2]


def test_picture_is_written_with_and_without_compared_settings(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "plan.png"
    widths: list[int] = []
    for plan in (make_plan(), make_plan(needed=26.1, advice="costs $1 or $2"), fitted()):
        draw(plan, path)
        with Image.open(path) as picture:
            widths.append(picture.width)
    assert widths[0] == widths[1] < widths[2]


def test_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RecipeError, match=r"pip install 'vlmtune\[notebook\]'"):
        draw(make_plan(), tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


def test_place_that_is_a_directory_or_below_a_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(OutputError, match="is a directory: name a file"):
        write_html(make_plan(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_html(make_plan(), tmp_path / "file" / "plan.html")
