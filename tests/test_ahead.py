"""Pictures are read on several threads, and what comes of it is what one would have made."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import make_processor

from vlmtune import DatasetError, MultimodalCollator, ahead, album, doctor, finetune, images
from vlmtune.ahead import threads
from vlmtune.album import Album
from vlmtune.data import Rows, find_bad_rows
from vlmtune.images import fingerprint
from vlmtune.vision_cache import _batches, _distinct

WAIT = 20  # seconds: a thread that is never let go fails the test in place of hanging


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Twelve pictures of a colour each."""
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(12)]


def test_a_file_is_read_once_wherever_it_stands(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(album, "fingerprint", lambda source: (asked.append(source), fingerprint(source))[1])
    sources = [files[0]] * 5 + [files[1], files[0]] * 5
    assert list(Album().fingerprints(sources)) == list(map(fingerprint, sources))
    assert sorted(asked) == files[:2]


def of_pictures(pictures: list[Any]) -> Rows:
    """Rows of one picture each."""
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "images": [picture]} for picture in pictures]
    return Rows(rows, "rows.jsonl", Path(), {}, range(len(rows)))


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.01 * (3 - number % 3))
        return -number

    assert list(ahead.ahead(slow_at_first, range(20), 3)) == [-number for number in range(20)]


def test_without_threads_it_is_map() -> None:
    names = list(ahead.ahead(lambda _: threading.current_thread(), range(3), 0))
    assert names == [threading.current_thread()] * 3


def test_items_are_worked_on_at_once() -> None:
    both = threading.Barrier(2, timeout=WAIT)
    assert len(list(ahead.ahead(lambda _: both.wait(), range(4), 2))) == 4


def test_few_items_are_drawn_before_they_are_wanted() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    results = ahead.ahead(str, items(), 2)
    assert next(results) == "0"
    assert len(drawn) == 3
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(drawn) == 3


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return 12 // (3 - number)

    results = ahead.ahead(work, range(100), 1)
    assert [next(results) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) < 10


def test_processes_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    counts: list[int] = []
    for world in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        counts.append(threads())
    assert counts == [6, 3, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert threads() == ahead.MOST


def test_fingerprints_of_many_are_those_of_each(files: list[str]) -> None:
    sources = [*files, files[0], Path(files[1]).read_bytes(), Image.open(files[2]), *reversed(files)]
    assert list(Album().fingerprints(sources)) == [fingerprint(source) for source in sources]


@pytest.mark.parametrize(
    "look", [find_bad_rows, lambda rows: list(Album().fingerprints(row["images"][0] for row in rows.content))]
)
def test_an_image_of_pillow_s_is_loaded_by_one_thread(
    files: list[str], monkeypatch: pytest.MonkeyPatch, look: Callable[[Rows], Any]
) -> None:
    image = Image.open(files[0])
    loading: set[str] = set()
    load = image.load

    def watched() -> Any:
        loading.add(threading.current_thread().name)
        return load()

    monkeypatch.setattr(image, "load", watched)
    look(of_pictures([image] * 20))
    assert loading == {threading.current_thread().name}


def test_a_file_is_checked_once_and_its_fault_told_of_every_row(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path(files[1]).write_bytes(b"no picture")
    whole, broken = Path(files[0]).read_bytes(), Image.open(BytesIO(Path(files[2]).read_bytes()[:-40]))
    looked: list[Any] = []
    monkeypatch.setattr(album, "examine", lambda source: (looked.append(source), images.examine(source))[1])
    rows = of_pictures([files[1], files[0], files[1], whole, b"", broken, *files[:2] * 5, whole])
    known = Album()
    found = find_bad_rows(rows, album=known)
    assert list(found) == [0, 2, 4, 5, 7, 9, 11, 13, 15]
    assert len({found[position] for position in found if position not in (4, 5)}) == 1
    assert looked.count(files[0]) == looked.count(files[1]) == 1
    assert len(looked) == 5
    monkeypatch.setattr(album, "fingerprint", None)
    monkeypatch.setattr(album, "image_size", None)
    assert (known.fingerprint(files[0]), known.size(files[0])) == (fingerprint(files[0]), (40, 30))


def test_a_row_of_several_pictures_is_told_its_first_fault(files: list[str]) -> None:
    for name in files[1:3]:
        Path(name).write_bytes(b"no picture")
    rows = of_pictures([files[0], files[3]])
    turns = [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "a"}]
    rows.content[0] = {"messages": turns, "images": files[:3]}  # type: ignore[index]
    assert {position: Path(fault.split("'")[1]).name for position, fault in find_bad_rows(rows).items()} == {0: "1.png"}


def test_rows_are_checked_on_several_threads_and_named_in_order(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=WAIT)
    monkeypatch.setattr(ahead, "threads", lambda: 2)
    monkeypatch.setattr(album, "examine", lambda source: (both.wait(), images.examine(source))[1])
    for broken in (9, 3):
        Path(files[broken]).write_bytes(b"no picture")
    rows = of_pictures(files)
    found = find_bad_rows(rows)
    assert list(found) == [3, 9]
    assert "not a picture" in found[3]


def test_a_row_that_makes_no_messages_is_told_with_its_pictures_unread(files: list[str]) -> None:
    rows = of_pictures(files[:3])
    rows.content[1]["messages"] = []  # type: ignore[index]
    for check_images in (True, False):
        assert list(find_bad_rows(rows, check_images=check_images)) == [1]


def test_wrong_rows_are_named_in_their_order_whatever_is_wrong(files: list[str]) -> None:
    Path(files[0]).write_bytes(b"no picture")
    rows = of_pictures(files[:3])
    rows.content[1]["messages"] = []  # type: ignore[index]
    assert list(find_bad_rows(rows)) == [0, 1]


@pytest.mark.parametrize("begin", [finetune, doctor.examine])
def test_what_checking_pictures_tells_is_not_looked_up_again(
    recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, begin: Callable[[Any], Any]
) -> None:
    asked: list[str] = []
    for name in ("fingerprint", "image_size"):
        monkeypatch.setattr(album, name, lambda source, name=name: (asked.append(name), getattr(images, name)(source))[1])
    begin(recipe("qwen2_vl", vision_cache="memory", plan="off"))
    assert asked == []


def test_pixels_are_made_while_the_tower_has_others(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    collator, made = MultimodalCollator(make_processor("pixtral")), threading.Semaphore(0)
    make = collator.opened_pictures

    def watched(sources: Any) -> Any:
        made.release()
        return make(sources)

    monkeypatch.setattr(collator, "opened_pictures", watched)
    found, _ = _distinct(collator, [of_pictures(files)])
    batches = _batches(collator, found, range(len(found)), on_gpu=True)
    first, _ = next(batches)  # here the tower would run
    assert all(made.acquire(timeout=WAIT) for _ in range(2))
    assert [*first, *(key for keys, _ in batches for key in keys)] == list(map(fingerprint, files))


def test_a_picture_that_is_gone_when_it_is_encoded_is_named_by_its_row(
    recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Album.open
    seen: list[Any] = []

    def gone(own: Album, source: Any) -> Any:
        seen.append(source)
        return opened(own, f"{source}.gone" if len(seen) > 5 else source)

    monkeypatch.setattr(Album, "open", gone)
    with pytest.raises(DatasetError, match=r"row \d+ of .*: picture .* is not there"):
        finetune(recipe("qwen2_vl", vision_cache="memory"))
