"""A merge that is killed leaves nothing half, and what it had finished to the next one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from vlmtune import OutputError, merge_adapter
from vlmtune.output import resumable

SHARDS = "30KB"  # some twenty files


@pytest.fixture
def pair(checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter for it, side by side."""
    base = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "base")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, base_model_name_or_path=str(base))
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def files(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def killed(adapter: Path, out: Path, wait: Callable[[], object]) -> int:
    """Merges in a process that is killed when `wait` is over; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            merge_adapter(adapter, out, max_shard_size=SHARDS)
        finally:
            os._exit(0 if out.exists() else 1)
    wait()
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_killed_at_any_of_twenty_moments_it_is_absent_or_whole_and_a_second_call_finishes_it(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    before = files(base), files(adapter)
    merge_adapter(adapter, tmp_path / "expected", max_shard_size=SHARDS)
    start = time.perf_counter()
    merge_adapter(adapter, tmp_path / "expected", max_shard_size=SHARDS, overwrite=True)  # a first one takes longer
    lasts = time.perf_counter() - start
    expected = files(tmp_path / "expected")
    choose = random.Random(0)
    cut = begun = 0
    while cut < 20:
        out, moment = tmp_path / "merged", choose.uniform(0, lasts)
        if killed(adapter, out, lambda moment=moment: time.sleep(moment)) == 0:
            lasts *= 0.9  # it was done before
        else:
            cut += 1
            begun += (tmp_path / ".merged.unfinished").exists()
        assert not out.exists() or files(out) == expected
        if not out.exists():
            merge_adapter(adapter, out, max_shard_size=SHARDS)
        assert files(out) == expected
        shutil.rmtree(out)
    assert not list(tmp_path.glob(".merged*"))
    assert (files(base), files(adapter)) == before
    assert begun >= 3


def test_finished_files_are_not_written_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    out, unfinished = tmp_path / "merged", tmp_path / ".merged.unfinished"

    def third_file() -> None:
        while len(list(unfinished.glob("*.safetensors"))) < 3:
            time.sleep(0.001)

    killed(adapter, out, third_file)
    killed(adapter, out, lambda: time.sleep(0))  # and again, before it has done anything
    there = {path.name: path.stat().st_ino for path in sorted(unfinished.glob("*.safetensors"))[:-1]}
    assert len(there) >= 2
    merge_adapter(adapter, out, max_shard_size=SHARDS)
    assert {name: (out / name).stat().st_ino for name in there} == there


def interrupted(directory: Path, task: str, *, finished: str = "", half: str = "") -> None:
    with suppress(KeyboardInterrupt), resumable(directory, task) as unfinished:
        for name in filter(None, (finished, half)):
            (unfinished.directory / name).write_text(name)
        if finished:
            unfinished.done(finished, {})
        raise KeyboardInterrupt


def test_what_was_begun_for_another_adapter_is_not_gone_on_with(tmp_path: Path) -> None:
    for task, name in (("one", "a"), ("other", "b")):
        interrupted(tmp_path / "out", task, finished=name)
    with resumable(tmp_path / "out", "other") as unfinished:
        assert unfinished.finished == {"b": {}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b"]


def test_a_second_interruption_takes_nothing_away(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "task", finished="a")
    interrupted(tmp_path / "out", "task")
    with resumable(tmp_path / "out", "task") as unfinished:
        assert unfinished.finished == {"a": {}}


def test_a_link_to_a_directory_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with resumable(tmp_path / "link", "task") as unfinished:
        (unfinished.directory / "a").touch()
    assert (tmp_path / "real" / "a").exists()


def test_what_is_not_finished_is_begun_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "task", half="half")
    with resumable(tmp_path / "out", "task") as unfinished:
        assert not (unfinished.directory / "half").exists()


def test_work_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), resumable(tmp_path / "out", "task"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_directory(tmp_path: Path) -> None:
    with resumable(tmp_path / "out", "task"):
        with pytest.raises(OutputError, match="is being written by another process"), resumable(tmp_path / "out", "task"):
            pass
        assert (tmp_path / ".out.unfinished").exists()


def test_an_earlier_directory_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with resumable(tmp_path / "out", "task", replace=True) as unfinished:
        (unfinished.directory / "new").write_text("new")
        assert (tmp_path / "out" / "old").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
