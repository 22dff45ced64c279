"""Directories that are written: whole or not at all, and never over an earlier result."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlmtune.errors import OutputError

MARK = ".vlmtune"  # lies in every directory that vlmtune made: no other is ever deleted
MANIFEST = "manifest.json"  # of a merged model: what it was made of, and a hash of each of its files
LOCK, JOURNAL = ".lock", ".finished.json"  # in a directory that is being written
LAST = "adapter_config.json"  # a directory without it is no adapter, so that it moves in last


def cache_directory() -> Path:
    """Where what can be made again is kept for later runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmtune"


def claim(directory: Path, *, overwrite: bool = False) -> None:
    """Makes sure that a directory may be written: nothing of value lies there, or it may be deleted.

    Args:
        overwrite: an earlier result of vlmtune's, which is told by the file `MARK`, may lie there.

    Raises:
        OutputError: the directory holds something, and `overwrite` is not set or what lies there is not ours.

    """
    try:
        content = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputError(f"output directory {directory} is a file: name a directory") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"output directory {directory} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not content:
        return
    if not overwrite:
        shown = next((name for name in content if name != MARK), MARK)
        resume = ", or go on with --resume (resume=True)" if last_checkpoint(directory) else ""
        raise OutputError(
            f"output directory {directory} is not empty (it holds {shown}): name another one, or overwrite it with --overwrite "
            f"(in Python overwrite=True){resume}"
        )
    if MARK not in content:
        raise OutputError(f"output directory {directory} holds {content[0]} and was not made by vlmtune: delete it yourself")


@contextmanager
def whole(directory: Path, *, replace: bool = False) -> Generator[Path]:
    """A temporary directory to write to; its files appear in `directory` at the end, or not at all where writing fails.

    A directory that does not exist yet appears by one rename; with `replace`, an earlier one goes in that moment. Into one
    that stays, files move one by one and `adapter_config.json` last, without which nothing takes the rest for an adapter.

    Raises:
        OutputError: the disk is full.

    """
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        try:
            partial.chmod(0o755)
            yield partial
            if replace or not directory.exists():
                _appear(partial, directory, replace=replace)
                return
            for path in partial.rglob("*"):
                _sync(path)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == LAST):
                path.replace(directory / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class Unfinished:
    """A directory beside the one that is wanted, and what in it is finished: a killed process leaves it, a later one goes on.

    Files count as finished when `done` was told so, with facts about them; all others are written anew.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.finished: dict[str, dict[str, Any]] = {}

    @property
    def _journal(self) -> Path:
        return self.directory / JOURNAL

    def open(self, task: str) -> None:
        """Keeps what an earlier process finished of the very same task, and nothing else."""
        self.task = task
        try:
            found = json.loads(self._journal.read_text(encoding="utf-8"))
            self.finished = found["files"] if found["task"] == task else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.finished = {}
        kept = {*self.finished, LOCK, *([self._journal.name] if self.finished else [])}
        for path in self.directory.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def done(self, name: str, facts: Mapping[str, Any]) -> None:
        """The file is on the disk, whole."""
        self.finished[name] = dict(facts)
        write_json(self._journal, {"task": self.task, "files": self.finished})
        _sync(self._journal)


@contextmanager
def resumable(directory: Path, task: str, *, replace: bool = False) -> Generator[Unfinished]:
    """Like `whole`, for work that takes long: a process that is killed leaves what it finished to the next one.

    What is unfinished lies in `.NAME.unfinished` beside the directory, and goes where the work fails.

    Args:
        task: all that the result depends on; what was begun for another task is deleted.
        replace: an earlier directory goes in the moment that the new one appears.

    Raises:
        OutputError: the disk is full, or another process writes the same directory.

    """
    target = directory.resolve()
    unfinished = Unfinished(target.parent / f".{target.name}.unfinished")
    with disk_errors(directory), ExitStack() as stack:
        unfinished.directory.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(unfinished.directory / LOCK, blocking=False))
        except Timeout:
            raise OutputError(f"{directory} is being written by another process: wait for it, or stop it") from None
        unfinished.open(task)
        try:
            yield unfinished
            _appear(unfinished.directory, target, replace=replace)
        except Exception:
            shutil.rmtree(unfinished.directory, ignore_errors=True)
            raise


def _appear(finished: Path, directory: Path, *, replace: bool) -> None:
    """Puts a finished directory in its place; lock and journal stay in it until it is there."""
    for path in (*finished.rglob("*"), finished):
        _sync(path)
    earlier = directory.parent / f".{directory.name}.earlier"
    if replace and directory.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        directory.rename(earlier)
    finished.rename(directory)  # over an empty directory, too
    _sync(directory.parent)
    for name in (JOURNAL, LOCK):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def disk_errors(directory: Path) -> Generator[None]:
    """Turns a full disk or a forbidden place, whoever meets it, into one sentence."""
    try:
        yield
    except Exception as error:  # safetensors and torch wrap the system's error in their own
        text = str(error)
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "file write failed" in text
        if full:
            free = shutil.disk_usage(existing(directory)).free / 2**20
            then = "resume" if last_checkpoint(directory) else "start again"
            raise OutputError(
                f"the disk is full while writing {directory} ({free:.0f} MiB free): make room and {then}"
            ) from error
        if isinstance(error, PermissionError) or number == errno.EROFS or _meets(error, directory):
            raise OutputError(f"{error.filename or directory} cannot be written: {error.strerror}") from error  # type: ignore[attr-defined]
        raise


def _meets(error: Exception, directory: Path) -> bool:
    """Whether it is the directory itself, or one above it, that the system could not make."""
    name = getattr(error, "filename", None)
    return name is not None and Path(str(name)) in (directory, *directory.parents)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON at once, over what was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end."""
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    whole_ones = [path for path in found if _is_json(path / "trainer_state.json")]  # the trainer writes it last
    return whole_ones[-1] if whole_ones else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that is there."""
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
