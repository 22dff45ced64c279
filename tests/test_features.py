"""Features are stored whole or not at all, come back bit for bit, and are found by every process that looks.

`made(key)` is the feature of a key: whoever reads one can tell whether it is the right one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmtune import OutputError
from vlmtune.features import FeatureStore, tower_key

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(3, 5), (2, 3, 4), (7,), (1, 1), (0, 8)]
DAY = 24 * 3600


def made(key: str, length: int = 12) -> Tensor:
    return (torch.arange(length, dtype=torch.float32) + int(key, 16)).reshape(3, -1)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def entries(*keys: str) -> dict[str, Tensor]:
    return {key: made(key) for key in keys}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache" if request.param == "disk" else None)


# ---- what is added comes back


def test_what_is_added_is_found_and_nothing_else(store: FeatureStore) -> None:
    assert len(store) == store.nbytes == 0
    store.add(entries("a", "b"))
    store.add(entries("c"))
    assert "b" in store
    assert "d" not in store
    assert len(store) == 3
    assert store.nbytes == 3 * 12 * 4
    assert store["b"].tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21, 22]]
    with pytest.raises(KeyError, match="d"):
        store["d"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_of_a_feature_comes_back(store: FeatureStore, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = torch.tensor(shape).prod().item() * dtype.itemsize
    noise = torch.randint(256, (int(size),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    feature = noise.view(dtype).reshape(shape)  # any bits: infinities, subnormals, not-a-numbers
    store.add({"a1": made("a1"), "f": feature})
    assert (store["f"].dtype, store["f"].shape, bits(store["f"])) == (dtype, feature.shape, bits(feature))
    assert store.nbytes == size + made("a1").nbytes


def test_views_of_one_tensor_are_kept_as_copies(store: FeatureStore) -> None:
    whole = torch.arange(24.0, requires_grad=True).reshape(4, 6)
    store.add({"a": whole[:2], "b": whole[1:3], "c": whole.T, "d": whole, "e": whole})
    with torch.no_grad():
        whole.zero_()
    assert store["b"].tolist() == [[6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert store["c"].tolist()[1] == [1, 7, 13, 19]
    assert store["a"].untyped_storage().nbytes() == 12 * 4
    assert not store["e"].requires_grad


# ---- the files


def test_every_add_is_one_new_file_that_a_later_run_finds(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "as needed"
    store = FeatureStore(directory)
    assert not directory.exists()
    store.add({})
    assert not directory.exists()
    store.add(entries("a", "b"))
    store.add(entries("c"))
    assert len(names(directory)) == 2
    assert all(re.fullmatch(r"features-[0-9a-f]{32}\.safetensors", name) for name in names(directory))

    later = FeatureStore(directory)
    assert (len(later), later.nbytes, later.damaged) == (3, store.nbytes, [])
    assert later["c"].equal(made("c"))


def test_a_file_may_be_read_by_whoever_may_read_other_new_files(tmp_path: Path) -> None:
    FeatureStore(tmp_path).add(entries("a"))
    (file,) = tmp_path.iterdir()
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_refresh_finds_what_others_have_added_since(tmp_path: Path) -> None:
    store, other = FeatureStore(tmp_path), FeatureStore(tmp_path)
    other.add(entries("a"))
    assert "a" not in store
    store.refresh()
    assert store["a"].equal(made("a"))


def test_a_key_that_two_have_added_is_one(tmp_path: Path) -> None:
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    first.add(entries("a", "b"))
    second.add(entries("b", "c"))
    first.refresh()
    assert len(first) == 3
    assert all(first[key].equal(made(key)) for key in "abc")


@pytest.mark.parametrize(
    "length", [0, 5, 8, 60, -1], ids=["empty", "half a length", "no header", "half a header", "half a feature"]
)
def test_a_cut_file_is_absent_and_its_features_can_be_added_again(tmp_path: Path, length: int) -> None:
    FeatureStore(tmp_path).add(entries("a", "b"))
    (cut,) = tmp_path.iterdir()
    cut.write_bytes(cut.read_bytes()[:length])
    FeatureStore(tmp_path).add(entries("c"))

    store = FeatureStore(tmp_path)
    assert (store.damaged, len(store), store.nbytes) == ([cut], 1, 48)
    assert "a" not in store
    store.add(entries("a"))
    store.refresh()
    assert store.damaged == [cut]
    assert store["a"].equal(made("a"))
    assert store["c"].equal(made("c"))


def test_what_is_no_safetensors_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "features-1.safetensors").write_bytes(b"\xff" * 300)
    (tmp_path / "features-2.safetensors").mkdir()
    (tmp_path / "features-3.safetensors").symlink_to("nowhere")
    assert [path.name[9] for path in FeatureStore(tmp_path).damaged] == ["1", "2", "3"]


@pytest.mark.parametrize("hurt", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "emptied"])
def test_a_file_that_is_hurt_after_it_was_found_makes_its_keys_absent(tmp_path: Path, hurt: Callable[[Path], None]) -> None:
    FeatureStore(tmp_path).add(entries("a", "b"))
    (file,) = tmp_path.iterdir()
    store = FeatureStore(tmp_path)
    store.add(entries("c"))
    hurt(file)
    with pytest.raises(KeyError, match="a"):
        store["a"]
    assert "b" not in store
    assert (store.damaged, len(store), store.nbytes) == ([file], 1, 48)


def test_unfinished_files_are_never_read_and_deleted_after_a_day(tmp_path: Path) -> None:
    FeatureStore(tmp_path).add(entries("a"))
    (file,) = tmp_path.iterdir()
    old, new = tmp_path / ".features-1.partial", tmp_path / ".features-2.partial"
    for path, age in ((old, DAY + 60), (new, DAY - 60)):
        path.write_bytes(file.read_bytes())
        os.utime(path, (time.time() - age, time.time() - age))
    file.unlink()
    foreign = tmp_path / "notes.partial"
    foreign.touch()
    os.utime(foreign, (0, 0))

    store = FeatureStore(tmp_path)
    assert (len(store), store.damaged) == (0, [])
    assert names(tmp_path) == [new.name, foreign.name]


# ---- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(small_disk: Path) -> None:
    store = FeatureStore(small_disk)
    store.add(entries("a"))
    with pytest.raises(OutputError, match=f"^the disk is full while writing {small_disk} .*: make room and start again$"):
        store.add({"b": torch.ones(200, 1024)})
    assert len(names(small_disk)) == 1
    assert len(store) == len(FeatureStore(small_disk)) == 1
    store.add(entries("c"))


def test_a_file_where_the_directory_should_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(OutputError, match="cache cannot be written: File exists"):
        FeatureStore(tmp_path / "cache").add(entries("a"))


def rss() -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    return {name: int(size) / 1024 for name, size in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}  # MiB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use")
def test_opening_reads_headers_only_and_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    FeatureStore(tmp_path).add({f"{n:x}": torch.full((1024, 1024), n, dtype=torch.bfloat16) for n in range(1, 33)})  # 64 MiB
    before = rss()
    store = FeatureStore(tmp_path)
    store["1"]
    opened = rss()
    assert sum(opened.values()) < sum(before.values()) + 16
    read = [store[f"{n:x}"] for n in range(1, 33)]
    assert [int(feature.view(torch.int16).max()) > 0 for feature in read] == [True] * 32
    assert rss()["RssAnon"] < opened["RssAnon"] + 16  # the pages are the file's own: the system may drop them


def test_a_hundred_thousand_features_are_opened_in_a_moment(tmp_path: Path) -> None:
    writer, feature = FeatureStore(tmp_path), torch.ones(1, 1)
    for part in range(50):
        writer.add({f"{part * 2000 + n:032x}": feature for n in range(2000)})
    start = time.perf_counter()
    store = FeatureStore(tmp_path)
    assert time.perf_counter() - start < 2
    assert len(store) == 100_000


# ---- many processes


class Looked(Dataset[Tensor]):
    """The features of the keys `0` to `f`, through a store."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 16

    def __getitem__(self, position: int) -> Tensor:
        return self.store[f"{position:x}"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_the_store(store: FeatureStore, start: str) -> None:
    store.add(entries(*"01234567"))
    store.add(entries(*"89abcdef"))
    assert store["0"].equal(made("0"))  # what the parent has opened is not the workers'
    loader = DataLoader(Looked(store), batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.cat(list(loader)).equal(torch.stack([made(f"{n:x}") for n in range(16)]))
    assert store["f"].equal(made("f"))


def test_a_store_is_pickled_without_what_it_has_opened(store: FeatureStore) -> None:
    store.add(entries("a"))
    store["a"]
    copy = pickle.loads(pickle.dumps(store))
    assert copy["a"].equal(store["a"])
    copy.add(entries("b"))
    assert len(copy) == 2
    assert len(store) == 1


def test_a_forked_process_opens_files_itself(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.add(entries("a"))
    (file,) = tmp_path.iterdir()
    opened = store._open(file)
    assert store._open(file) is opened
    child = os.fork()
    if not child:
        os._exit(0 if store["a"].equal(made("a")) and store._open(file) is not opened else 1)
    assert os.waitpid(child, 0)[1] == 0


WRITER = """
import sys, time
from pathlib import Path
from test_features import made
from vlmtune.features import FeatureStore

directory, own, other = Path(sys.argv[1]), *map(int, sys.argv[2:])
store, end = FeatureStore(directory), time.monotonic() + 50
for n in range(40):
    keys = [f"{own + n:x}", f"{n:x}"]  # the second one both processes add
    store.add({key: made(key, 3000) for key in keys})
    store.refresh()
    for key in [*keys, *(f"{other + m:x}" for m in range(40))]:
        assert key not in store or store[key].equal(made(key, 3000)), key
while not all(f"{other + m:x}" in store for m in range(40)):
    assert time.monotonic() < end, "the other process's features were not found"
    store.refresh()
assert not store.damaged and len(store) == 120
"""


def test_two_processes_add_and_read_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [
        subprocess.Popen([*command, own, other], stderr=subprocess.PIPE, text=True, env=environment)
        for own, other in (("1000", "2000"), ("2000", "1000"))
    ]
    assert [process.communicate(timeout=60)[1] for process in running] == ["", ""]
    store = FeatureStore(tmp_path)
    assert (len(store), store.damaged) == (120, [])


def add_forever(directory: Path, first: int) -> None:
    store, feature = FeatureStore(directory), torch.empty(3, 200_000)
    for n in count(first, 2):
        store.add({f"{n:x}": feature.fill_(n), f"{n + 1:x}": torch.full_like(feature, n + 1)})


def test_a_process_that_is_killed_while_it_adds_leaves_only_whole_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    for kill in range(6):
        process = multiprocessing.get_context("fork").Process(target=add_forever, args=(tmp_path, kill * 10_000))
        process.start()
        until = time.monotonic() + 10
        while f"{kill * 10_000:x}" not in FeatureStore(tmp_path) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    store = FeatureStore(tmp_path)
    assert store.damaged == []
    present = [n for n in range(60_000) if f"{n:x}" in store]
    assert 12 <= len(present) == len(store)
    assert [n ^ 1 for n in present[::2]] == present[1::2]  # the two features of one add, always
    assert all(store[f"{n:x}"].equal(torch.full((3, 200_000), float(n))) for n in present)


# ---- the key of a tower


def test_the_key_of_a_tower_is_its_own() -> None:
    parts = [("a", torch.tensor([[1.0, 2.0]])), ("b", torch.tensor(3, dtype=torch.bfloat16)), ("c", torch.ones(0))]
    settings = {"size": 448, "layers": [-2], "dtype": torch.bfloat16}
    key = tower_key(parts, settings)
    assert re.fullmatch("[0-9a-f]{32}", key)
    assert tower_key(iter(parts), dict(reversed(settings.items()))) == key

    (_, weight), *rest = parts
    others = {
        "another weight": tower_key([("a", torch.tensor([[1.0, 2.0000002]])), *rest], settings),
        "minus zero": tower_key([("a", weight), rest[0], ("c", -torch.zeros(1))], settings),
        "zero": tower_key([("a", weight), rest[0], ("c", torch.zeros(1))], settings),
        "another dtype of the same bytes": tower_key([("a", weight.view(torch.int32)), *rest], settings),
        "another shape": tower_key([("a", weight.T), *rest], settings),
        "another name": tower_key([("z", weight), *rest], settings),
        "another order": tower_key([*rest, ("a", weight)], settings),
        "one weight less": tower_key(rest, settings),
        "another setting": tower_key(parts, {**settings, "size": 336}),
        "one setting more": tower_key(parts, {**settings, "crop": None}),
    }
    assert len({key, *others.values()}) == 1 + len(others)


def test_the_key_of_a_tower_is_the_same_however_its_weights_lie_in_memory() -> None:
    weight = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    key = tower_key([("a", weight)], {})
    assert tower_key([("a", weight.T.contiguous().T)], {}) == key
    assert tower_key([("a", torch.nn.Parameter(weight))], {}) == key
    assert tower_key([("a", weight[:, 1])], {}) == tower_key([("a", weight[:, 1].clone())], {})


@pytest.mark.gpu
def test_the_gpu_changes_neither_keys_nor_features(store: FeatureStore) -> None:
    feature = torch.randn(3, 4, dtype=torch.bfloat16, device="cuda")
    store.add({"a": feature})
    assert bits(store["a"]) == bits(feature.cpu())
    assert tower_key([("a", feature)], {}) == tower_key([("a", feature.cpu())], {})
