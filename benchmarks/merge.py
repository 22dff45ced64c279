"""Memory and time of a merge at full size, beside a copy of the same files and beside PEFT's merge.

    python benchmarks/merge.py --model Qwen/Qwen2-VL-2B-Instruct --peft
    python benchmarks/merge.py --model Qwen/Qwen2-VL-7B-Instruct

The checkpoint is written first: the names, shapes and dtype of the hub's, random values; twice its size must be free. The base
is put out of the page cache before each measurement where the system lets us, and each ends with the result on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from vlmtune.families import find_family
from vlmtune.merge.weights import BLOCK, Entry, write
from vlmtune.model import skeleton
from vlmtune.planner.published import published_config, published_processor
from vlmtune.recipe import ModelSection

SHARD = 4_000_000_000  # bytes, about as on the hub
HUB_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, adapter, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Measured:
    who: str
    seconds: float
    gib: float  # peak resident memory


def write_base(name: str, directory: Path) -> None:
    """A checkpoint of random values under the hub's names."""
    config = published_config(name)
    model = skeleton(ModelSection(name=name), find_family(None, config=config), config)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    published_processor(name).save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "pad_token_id": 151643}')
    tied = model.all_tied_weights_keys
    entries = [Entry(_hub(key), tuple(t.shape), torch.bfloat16) for key, t in model.state_dict().items() if key not in tied]
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if sum(e.bytes for e in files[-1]) + entry.bytes > SHARD:
            files.append([])
        files[-1].append(entry)
    noise = torch.randn(BLOCK // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weight_map = {}
    for number, file in enumerate(files, 1):
        path = directory / f"model-{number:05}-of-{len(files):05}.safetensors"
        write(path, file, _noise(file, noise))
        weight_map |= {entry.name: path.name for entry in file}
    index = {"metadata": {"total_size": sum(e.bytes for e in entries)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _hub(name: str) -> str:
    for own, hub in HUB_NAMES:
        name = name.replace(own, hub)
    return name


def _noise(entries: Sequence[Entry], noise: torch.Tensor) -> Iterator[torch.Tensor]:
    for entry in entries:
        left = entry.bytes // 2
        while left:
            yield noise[: min(left, len(noise))]
            left -= min(left, len(noise))


def write_adapter(name: str, base: Path, directory: Path, targets: Sequence[str], rank: int, saved: Sequence[str] = ()) -> int:
    """A random adapter on the language model's layers, and modules that it has whole; how many it changes."""
    config = published_config(name)
    model = skeleton(ModelSection(name=name), find_family(None, config=config), config)
    chosen = {
        key.removesuffix(".weight"): tensor.shape
        for key, tensor in model.state_dict().items()
        if "language_model" in key and key.removesuffix(".weight").rpartition(".")[2] in targets and key.endswith(".weight")
    }
    tensors = {}
    for module, (rows, columns) in chosen.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns).mul_(0.02).bfloat16()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank).mul_(0.02).bfloat16()
    for module in saved:
        shape = model.get_submodule(module).weight.shape
        tensors[f"base_model.model.{module}.weight"] = torch.randn(shape).mul_(0.02).bfloat16()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    pattern = rf"^(?:.*\.)?language_model\..*\.(?:{'|'.join(targets)})$"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern, modules_to_save=list(saved) or None)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(directory)
    return len(chosen) + len(saved)


def measured(who: str, command: Sequence[str], base: Path, out: Path) -> Measured:
    """A command in a process of its own, from a cold base to a result on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    _forget(base)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _peak(process.pid))
        time.sleep(0.02)
    for path in out.rglob("*"):
        _sync(path)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{who} failed: {' '.join(command)}")
    return Measured(who, seconds, peak)


def _peak(process: int) -> float:
    """Most resident memory that a process ever had, GiB; the system's own count, and of this program alone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 2**20 if found else 0.0


def _forget(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct")
    parser.add_argument("--directory", type=Path, default=Path("runs/merge-benchmark"))
    parser.add_argument("--peft", action="store_true", help="PEFT's merge beside it, which holds the whole model in memory")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base, adapter, out = (options.directory / name for name in ("base", "adapter", "out"))
    shutil.rmtree(options.directory, ignore_errors=True)
    try:
        write_base(options.model, base)
        size = sum(path.stat().st_size for path in base.iterdir())
        print(f"{options.model}: {size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} files of weights\n")
        print("| adapter | who | seconds | × a copy | peak GiB |\n|---|---|---:|---:|---:|", flush=True)
        everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        cases: list[tuple[str, list[str], int, list[str]]] = [
            ("r 8, q and v", ["q_proj", "v_proj"], 8, []),
            ("r 16, all linear", everything, 16, []),
            ("r 8, q and v, head whole", ["q_proj", "v_proj"], 8, ["lm_head"]),
        ]
        for label, targets, rank, saved in cases:
            shutil.rmtree(adapter, ignore_errors=True)
            modules = write_adapter(options.model, base, adapter, targets, rank, saved)
            commands = {
                "a copy (`cp -r`)": ["cp", "-r", str(base), str(out)],
                "vlmtune": [sys.executable, "-m", "vlmtune.merge", str(adapter), str(out)],
            }
            if options.peft:
                commands["PEFT"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)]
            found: dict[str, list[Measured]] = {who: [] for who in commands}
            for _ in range(options.repeats):
                for who, command in commands.items():
                    found[who].append(measured(who, command, base, out))
            for who, runs in found.items():
                seconds = _median([m.seconds for m in runs])
                peak = max(m.gib for m in runs)
                ratio = _median([m.seconds / c.seconds for m, c in zip(runs, found["a copy (`cp -r`)"], strict=True)])
                print(f"| {label}: {modules} modules | {who} | {seconds:.1f} | {ratio:.2f} | {peak:.2f} |", flush=True)
    finally:
        shutil.rmtree(options.directory, ignore_errors=True)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
