"""A row that is too long gets smaller pictures, as large as they fit: nothing of it is cut, and every one is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_processor
from transformers import AutoModelForImageTextToText

from vlmtune import DatasetError, MultimodalCollator, RecipeError, finetune, load_recipe
from vlmtune.album import Album
from vlmtune.batching import counted_rows
from vlmtune.collator import pictures
from vlmtune.console import console
from vlmtune.data import Rows, Split
from vlmtune.images import Shrunk, fingerprint, image_size, load_image
from vlmtune.preview.look import look
from vlmtune.result import Run

MakeRecipe = Callable[..., dict[str, Any]]
Size = tuple[int, int]
Written = tuple[Sequence[Size], str, str]  # sizes of pictures, question, answer
SIZED = ("qwen2_vl", "pixtral", "qwen2_5_vl")  # the last goes through the generic family
SPARE = 20  # tokens: rows of ROWS have longer texts than the first
LARGE = {"images.max_pixels": 224 * 224}


def noise(number: int, size: Size) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def row(seen: Sequence[Any], question: str, answer: str) -> dict[str, Any]:
    parts = [*({"type": "image", "image": each} for each in seen), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def in_memory(rows: Sequence[Written], source: str = "given.jsonl") -> Rows:
    content = [row([noise(number, size) for size in sizes], *texts) for number, (sizes, *texts) in enumerate(rows)]
    return Rows(content, source, Path(), {"format": "openai"}, range(len(content)))


def collator_of(kind: str, limit: int | None = None) -> MultimodalCollator:
    """With pictures of up to 64 tokens and more."""
    processor = make_processor(kind)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
    if kind == "pixtral":
        processor.image_processor.size = {"longest_edge": 128}
    return MultimodalCollator(processor, max_length=limit)


def shrunk(
    kind: str, rows: Sequence[Written], limit: int, held_out: Sequence[Written] = (), on_bad_row: str = "raise"
) -> tuple[Split, list[int]]:
    policies = {"on_too_long": "shrink", "on_bad_row": on_bad_row}
    asked = load_recipe({"model": {"name": kind}, "data": {"source": "given"}, **policies})
    split = Split(in_memory(rows), in_memory(held_out, "held_out.jsonl") if held_out else None)
    return counted_rows(asked, split, collator_of(kind, limit))


def lengths(kind: str, rows: Sequence[Written]) -> list[int]:
    return collator_of(kind).lengths([*in_memory(rows)])


def sizes(sample: Any) -> list[Size]:
    return [image_size(source) for source in pictures(sample)]


@pytest.fixture
def write(recipe: MakeRecipe, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`write("pixtral", rows, held_out)`: a recipe on files, `on_too_long: shrink`."""

    def make(kind: str, rows: Sequence[Written], held_out: Sequence[Written] = (), **overrides: Any) -> dict[str, Any]:
        data = {"format": "openai"}
        for part, written in (("source", rows), ("eval_source", held_out)):
            lines: list[str] = []
            for number, (of_row, *texts) in enumerate(written):
                names = [f"{part}-{number}-{place}.png" for place in range(len(of_row))]
                for name, size in zip(names, of_row, strict=True):
                    noise(number, size).save(tmp_path / name)
                lines.append(json.dumps(row(names, *texts)))
            if lines:
                (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
                data[part] = str(tmp_path / f"{part}.jsonl")
        values = {"eval.samples": 0, "on_too_long": "shrink", "vision_cache": "off", **LARGE}
        return recipe(kind, data=data, **{**values, **overrides})

    return make


ROWS: list[Written] = [
    ([(40, 50)], "What?", "A cat."),
    ([(200, 150)], "What is it?", "A wet dog."),
    ([], "Who?", "Nobody."),
    ([(120, 180), (100, 40)], "And these?", "Two birds."),
]


# ---- it fits, and nothing is cut


@pytest.mark.parametrize("kind", SIZED)
def test_rows_fit_and_only_pictures_tokens_are_fewer(kind: str) -> None:
    before = lengths(kind, ROWS)
    limit = before[0] + SPARE
    split, after = shrunk(kind, ROWS, limit)
    assert [count > limit for count in before] == [False, True, False, True]
    assert max(after) <= limit
    assert (after[0], after[2]) == (before[0], before[2])
    assert set(split.shrunk) == {"row 2 of given.jsonl", "row 4 of given.jsonl"}
    collator = collator_of(kind, limit)
    of_pictures = torch.tensor(sorted(collator.family.image_token_ids(collator.processor)))
    for position, original in enumerate(in_memory(ROWS)):
        whole, fitted = collator_of(kind)([original]), collator([split.train[position]])
        assert fitted["input_ids"].shape[1] == after[position]
        for name in ("input_ids", "labels"):
            texts = [batch[name][~torch.isin(batch["input_ids"], of_pictures)] for batch in (whole, fitted)]
            assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("kind", SIZED)
def test_placeholders_are_as_many_as_features(kind: str, checkpoint: Callable[[str], Path]) -> None:
    core = AutoModelForImageTextToText.from_pretrained(checkpoint(kind)).base_model
    collator = MultimodalCollator(make_processor(kind))
    (width, height), source = (60, 44), noise(0, (120, 88))
    samples = [row([each], "What?", "It.") for each in (Shrunk(source, width, height), source)]
    for sample in samples:
        batch = collator([{"messages": [{**m, "content": _parts(m["content"])} for m in sample["messages"]]}])
        placeholder = collator.tokenizer.convert_tokens_to_ids(collator.processor.image_token)
        with torch.no_grad():
            features = collator.family.encode(core, batch)
        assert sum(map(len, features)) == int((batch["input_ids"] == placeholder).sum())


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@pytest.mark.parametrize("kind", ["qwen2_vl", "pixtral"])
@pytest.mark.parametrize("spare", [0, 3, 11])
def test_pictures_are_as_large_as_they_fit(kind: str, spare: int) -> None:
    size = (112, 84)
    limit = lengths(kind, [([(28, 21)], "What?", "It.")])[0] + 2 + spare
    split, (tokens,) = shrunk(kind, [([size], "What?", "It.")], limit)
    ((width, height),) = sizes(split.train[0])
    of_each = lengths(kind, [([(edge, round(edge * 84 / 112))], "What?", "It.") for edge in range(40, 113)])
    assert width == max(edge for edge, count in enumerate(of_each, 40) if count <= limit)
    assert height == round(width * 84 / 112)
    assert tokens == of_each[width - 40]


def test_all_pictures_of_a_row_get_smaller_by_one_factor_but_none_than_28_pixels() -> None:
    written = [([(224, 168), (100, 100), (30, 90), (20, 300)], "What?", "It.")]
    split, _ = shrunk(
        "qwen2_vl", written, lengths("qwen2_vl", [([(80, 60), (36, 36), (28, 84), (20, 300)], "What?", "It.")])[0]
    )
    first, second, thin, thinner = sizes(split.train[0])
    assert first[0] / 224 == pytest.approx(second[0] / 100, abs=0.01)
    assert first[0] / first[1] == pytest.approx(4 / 3, rel=0.02)
    assert thin == (28, 84)
    assert thinner == (20, 300)
    assert not isinstance(pictures(split.train[0])[3], Shrunk)  # the vision cache finds the file itself


def test_rows_that_fit_are_left_alone() -> None:
    split, found = shrunk("qwen2_vl", ROWS, 2000)
    assert (split.shrunk, found) == ({}, lengths("qwen2_vl", ROWS))
    assert not any(isinstance(source, Shrunk) for sample in split.train for source in pictures(sample))


# ---- rows that no smaller picture helps


@pytest.mark.parametrize("kind", ["qwen2_vl", "pixtral", "mllama", "smolvlm"])
def test_a_row_that_is_too_long_with_any_picture_is_refused_and_named(kind: str) -> None:
    written: list[Written] = [ROWS[0], ([(200, 150)], "What?", "long " * 80), ([], "What?", "long " * 80)]
    counts = lengths(kind, written)
    with pytest.raises(DatasetError) as caught:
        shrunk(kind, written, counts[0])
    told = str(caught.value)
    assert told.startswith(
        "2 of 3 rows cannot be used (no smaller pictures would do: shorten their texts, raise train.max_length"
    )
    assert f"row 2 of given.jsonl: it has {counts[1]} tokens and the limit is {counts[0]}" in told
    assert f"row 3 of given.jsonl: it has {counts[2]} tokens and the limit is {counts[0]}" in told
    assert "or set `on_bad_row: drop` to go on without them" in told


@pytest.mark.parametrize("kind", SIZED)
def test_with_on_bad_row_drop_the_rest_is_shrunk_and_such_a_row_dropped_counted_and_named(kind: str) -> None:
    hopeless: Written = ([(200, 150)], "What?", "long " * 80)
    written = [ROWS[0], hopeless, ROWS[1]]
    counts = lengths(kind, written)
    limit = counts[0] + SPARE
    split, after = shrunk(kind, written, limit, held_out=[hopeless, ROWS[0]], on_bad_row="drop")
    assert [split.train.name(place) for place in range(len(split.train))] == ["row 1 of given.jsonl", "row 3 of given.jsonl"]
    assert set(split.shrunk) == {"row 3 of given.jsonl"}
    assert split.dropped == {
        f"row {number} of {source}": f"it has {counts[1]} tokens and the limit is {limit}"
        for number, source in ((2, "given.jsonl"), (1, "held_out.jsonl"))
    }
    assert max(after) <= limit


def test_a_run_goes_on_without_the_rows_that_fit_at_no_size(write: Callable[..., dict[str, Any]]) -> None:
    written = [*ROWS, ([(200, 150)], "What?", "long " * 80)]
    limit = lengths("qwen2_vl", ROWS)[0] + SPARE
    asked = write("qwen2_vl", written, **{"on_bad_row": "drop", "train.max_length": limit, "packing": "off"})
    with console.capture() as captured:
        run = finetune(asked)
    assert len(run.split.train) == len(ROWS)
    assert "row 5 of source.jsonl: it has" in " ".join(captured.get().split())


def test_a_collator_of_one_s_own_opens_its_pictures_itself(write: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match=r"^`on_too_long: shrink` is for vlmtune's collator"):
        finetune(write("qwen2_vl", ROWS), collator=MultimodalCollator(make_processor("qwen2_vl")))


# ---- the picture


def test_a_shrunk_picture_is_the_picture_resized(tmp_path: Path) -> None:
    noise(1, (90, 60)).save(tmp_path / "a.png")
    small = Shrunk(str(tmp_path / "a.png"), 45, 30)
    expected = noise(1, (90, 60)).resize((45, 30), Image.Resampling.LANCZOS)
    assert load_image(small).tobytes() == expected.tobytes()
    assert image_size(small) == (45, 30)


def test_a_shrunk_picture_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        noise(1, (90, 60)).save(tmp_path / name)
    first, second = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert fingerprint(Shrunk(first, 45, 30)) == fingerprint(Shrunk(second, 45, 30))
    others = [first, Shrunk(first, 45, 31), Shrunk(first, 44, 30)]
    assert len({fingerprint(source) for source in [*others, Shrunk(first, 45, 30)]}) == 4


def test_an_album_remembers_it(tmp_path: Path) -> None:
    noise(1, (90, 60)).save(tmp_path / "a.png")
    album = Album()
    album.room = 45 * 30 * 3
    first = album.open(Shrunk(str(tmp_path / "a.png"), 45, 30))
    (tmp_path / "a.png").unlink()
    assert album.open(Shrunk(str(tmp_path / "a.png"), 45, 30)) is first


# ---- runs


HELD_OUT: list[Written] = [([(40, 50)], "What?", "A cow."), ([(150, 150)], "What?", "A hen.")]


def losses(run: Run) -> list[float]:
    return [entry[name] for entry in run.history for name in ("loss", "eval_loss") if name in entry]


def test_a_run_names_and_counts_them_and_keeps_their_features(
    write: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 500)
    limit = lengths("qwen2_vl", ROWS)[0] + SPARE
    options = {"train.max_length": limit, "train.eval_strategy": "epoch", "train.max_steps": 4, "eval.samples": 2}
    plain = finetune(write("qwen2_vl", ROWS, HELD_OUT, **options, packing="off"))
    said = capsys.readouterr().out
    cached = finetune(write("qwen2_vl", ROWS, HELD_OUT, **options, vision_cache="memory"), overwrite=True)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    told = plain.metrics["shrunk_rows"]
    assert list(told) == ["row 2 of source.jsonl", "row 4 of source.jsonl", "row 2 of eval_source.jsonl"]
    assert json.loads((plain.adapter_dir / "metrics.json").read_text())["shrunk_rows"] == told == cached.metrics["shrunk_rows"]
    assert (plain.metrics["train_rows"], plain.metrics["held_out_rows"], plain.metrics["dropped_rows"]) == (4, 2, {})
    assert "4 to train on, 2 held out, 0 dropped; 3 of them with smaller pictures" in said
    before, after = lengths("qwen2_vl", ROWS)[1], plain.trainer.plan.lengths[1]
    ((width, height),) = sizes(plain.train_rows[1])
    sentence = f"{after} tokens instead of {before}, pictures {width}×{height} instead of 200×150"
    assert told["row 2 of source.jsonl"] == sentence
    assert f"shrunk row 2 of source.jsonl: {sentence}" in said
    assert max(plain.trainer.plan.lengths) <= limit


def test_a_resumed_run_goes_on_with_the_same_pictures(write: Callable[..., dict[str, Any]]) -> None:
    options = {"train.max_length": lengths("pixtral", ROWS)[0] + 15, "train.save_strategy": "steps", "train.save_steps": 1}
    options["images.max_pixels"] = None
    first = finetune(write("pixtral", ROWS, **options, **{"train.max_steps": 1}))
    more = finetune(write("pixtral", ROWS, **options, **{"train.max_steps": 2}), resume=True)
    assert first.metrics["shrunk_rows"] == more.metrics["shrunk_rows"]
    assert len(first.metrics["shrunk_rows"]) >= 1
    assert more.metrics["steps"] == 2


def test_the_preview_shows_the_size_that_is_trained_on_and_the_one_given(write: Callable[..., dict[str, Any]]) -> None:
    limit = lengths("qwen2_vl", ROWS)[0] + SPARE
    rows, _ = look(load_recipe(write("qwen2_vl", ROWS, **{"train.max_length": limit})), 4)
    assert rows[1].tokens <= limit
    assert " from 200×150" in rows[1].pictures[0].caption


# ---- read = trained + evaluated + dropped


WRITTEN = st.tuples(
    st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), max_size=2),
    st.integers(1, 40).map(lambda length: "q" * length),
    st.integers(1, 40).map(lambda length: "a" * length),
)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["qwen2_vl", "mllama", "pixtral"]),
    rows=st.lists(WRITTEN, min_size=1, max_size=5),
    held_out=st.lists(WRITTEN, max_size=3),
    limit=st.integers(20, 200),
    policy=st.sampled_from(["raise", "drop", "shrink"]),
)
def test_rows_read_are_trained_evaluated_or_dropped(
    kind: str, rows: list[Written], held_out: list[Written], limit: int, policy: str
) -> None:
    asked = load_recipe({"model": {"name": kind}, "data": {"source": "given"}, "on_too_long": policy})
    given = Split(in_memory(rows), in_memory(held_out, "held_out.jsonl") if held_out else None)
    names = [part.name(place) for part in (given.train, given.held_out or []) for place in range(len(part))]
    collator = COLLATORS[kind]
    collator.max_length = limit
    whole = [*rows, *held_out]
    counts = collator.lengths([*given.train, *(given.held_out or [])])
    refused, split, found = "", given, counts
    try:
        split, found = counted_rows(asked, given, collator)
    except DatasetError as error:
        refused = str(error)
    if refused:
        assert max(counts) > limit
        assert "rows cannot be used" in refused
        return
    kept = [part.name(place) for part in (split.train, split.held_out or []) for place in range(len(part))]
    assert sorted([*kept, *split.dropped]) == sorted(names)
    assert len(kept) + len(split.dropped) == len(whole)
    after = collator.lengths([*split.train, *(split.held_out or [])])
    assert found == after[: len(split.train)]
    assert max(after) <= limit
    fitting = {name for name, count in zip(names, counts, strict=True) if count <= limit}
    longer = set(names) - fitting
    assert (set(split.dropped), set(split.shrunk)) == {
        "raise": (set(), set()),
        "drop": (longer, set()),
        "shrink": (set(), longer),
    }[policy]


COLLATORS = {kind: collator_of(kind) for kind in ("qwen2_vl", "mllama", "pixtral")}
