"""How time and memory of a run grow with its rows: 1,000, 10,000 and 100,000 of them, each with a small picture of its own.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                    # about ten minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/growth.py --rows 1000 --profile

Everything is a real `vlmtune.finetune` on a tiny model, planned for three epochs and stopped after some steps, in a process
of its own: once with features in memory, once with features written to disk, and once more with those found there. Left to
itself a run keeps them in memory as long as they fit into a quarter of what is free: these small ones do, those of 100,000
ordinary pictures, some hundred gigabytes, do not. What is timed are functions of vlmtune, wrapped from outside. The figures
are medians of the runs in which a part is the same work.

Pictures were written a moment ago, so that they are read from the system's memory and not from a disk.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import model as small
from model import FAMILIES, Language, Sizes, Vision
from PIL import Image
from rich.console import Console
from rich.table import Table

RUNS = ("memory", "disk", "found")  # where features go; `found`: they are on the disk from the run before
FILLING = {"memory": "encoding to memory", "disk": "encoding to disk", "found": "encoding none"}
WHERE = {"memory": "in memory", "disk": "written to disk", "found": "found on disk"}
PLANNING = ("counting tokens", "looking through pictures", "telling the size of features", "planning 3 epochs")
GOAL = 60  # seconds of planning for 100,000 rows
WARM = 10  # steps that are left out of rows a second and of the memory that training takes
WORDS = ["light", "warm", "linen", "steel", "for", "a", "kitchen", "made", "in", "small", "numbers", "blue"]
TINY = {
    "qwen2_vl": Sizes(
        Language(64, 2, 1, 1, 64, 128, 300), Vision(32, 2, 2, 64, False, 14, merge=2, projector=((128, 128), (128, 64)))
    ),
    "mllama": Sizes(
        Language(64, 4, 2, 1, 32, 128, 300, cross_layers=1),
        Vision(32, 5, 2, 64, False, 14, tile=84, tiles=4, states=2, projector=((64, 64),)),
    ),
    "pixtral": Sizes(Language(64, 2, 2, 1, 32, 128, 300), Vision(32, 2, 2, 64, True, 16, projector=((32, 64), (64, 64)))),
}

console = Console()


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    checkpoint: str
    rows: str
    work: str
    features: str
    run: str
    steps: int
    profile: bool


def main() -> None:
    options = parse_options()
    if options.show:
        show(json.loads(options.show.read_text(encoding="utf-8")), markdown=options.markdown)
        return
    if options.job:
        measure(Job(**json.loads(options.job.read_text(encoding="utf-8"))))
        return
    place = options.out.absolute() / options.family
    shutil.rmtree(place / "runs", ignore_errors=True)
    small.SMALL[options.family] = TINY[options.family]
    checkpoint = small.make_checkpoint(options.family, place / "model")
    found: dict[int, dict[str, Any]] = {}
    load = [os.getloadavg()[0]]
    for count in sorted(options.rows):
        rows, seconds = make_rows(count, options.out.absolute() / "data")
        console.print(f"{count:,} rows made in {seconds:.0f} s")
        work, features = place / "runs" / str(count), place / "features" / str(count)
        found[count] = {}
        for run in options.runs:
            if run == "disk":
                shutil.rmtree(features, ignore_errors=True)
            job = Job(str(checkpoint), str(rows), str(work / run), str(features), run, options.steps, options.profile)
            found[count][run] = run_apart(job)
            load.append(os.getloadavg()[0])
            total, peak = found[count][run]["seconds"], found[count][run]["peak"] / 2**20
            console.print(f"{count:,} rows, features {run}: {total:.0f} s, at most {peak:,.0f} MiB", highlight=False)
    report = {"family": options.family, "machine": machine(), "load": [min(load), max(load)], "rows": found}
    (options.out / "growth.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    show(report, markdown=options.markdown)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument(
        "--runs", choices=RUNS, nargs="+", default=RUNS, help="where features go; `found` is for those of an earlier `disk`"
    )
    parser.add_argument("--steps", type=int, default=50, help=f"optimiser steps of 16 rows; the first {WARM} warm up")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--profile", action="store_true", help="say where each part spends its time, which then is longer")
    parser.add_argument("--out", type=Path, default=Path("build/growth"), help="where model, rows, logs and growth.json go")
    parser.add_argument("--show", type=Path, help="only show an earlier growth.json")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_rows(count: int, directory: Path) -> tuple[Path, float]:
    """`rows-COUNT.jsonl` and the pictures that are not there yet, and the seconds that took; fewer rows are the first ones."""
    started = time.perf_counter()
    path = directory / f"rows-{count}.jsonl"
    lines: list[str] = []
    for number in range(count):
        chance = random.Random(number)
        size = chance.randint(28, 84), chance.randint(28, 84)
        picture = Path("pictures") / f"{number // 1000:03d}" / f"{number:06d}.{('jpg', 'png')[number % 2]}"
        if not (directory / picture).exists():
            (directory / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (3, 3), chance.randbytes(27)).resize(size).save(directory / picture)
        answer = " ".join(chance.choices(WORDS, k=round(chance.lognormvariate(2, 0.5)) + 1))
        asked = f"<image>Describe product {number}."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": [str(picture)]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, time.perf_counter() - started


def run_apart(job: Job) -> dict[str, Any]:
    """What a new process measures."""
    work = Path(job.work)
    work.mkdir(parents=True)
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, str(Path(__file__).absolute()), "--job", str(work / "job.json")]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        sys.exit(f"exit {code}:\n{(work / 'log.txt').read_text(encoding='utf-8', errors='replace')[-2000:]}")
    if job.profile:
        for name in sorted(work.glob("*.prof")):
            console.print(f"[bold]{name.stem}")
            pstats.Stats(str(name)).sort_stats("tottime").print_stats(12)
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


def measure(job: Job) -> None:
    """Runs `finetune` with its parts wrapped, and leaves what they took in `result.json`."""
    import vlmtune
    from vlmtune import batching, training, vision_cache
    from vlmtune.packing import BatchPlan
    from vlmtune.trainer import Trainer

    decodes = job.run == "memory"
    parts = Parts(Path(job.work) if job.profile else None)
    parts.wrap(batching, "load_data", "reading rows")
    parts.wrap(batching, "find_bad_rows", "checking rows, pictures too" if decodes else "checking rows")
    parts.wrap(training, "load_model", "loading the model")
    parts.wrap(training, "counted_rows", "counting tokens")
    parts.wrap(vision_cache, "_distinct", "looking through pictures")
    parts.wrap(vision_cache, "_size", "telling the size of features")
    parts.wrap(
        vision_cache, "_complete", {"memory": "encoding to memory", "disk": "encoding to disk"}.get(job.run, "encoding none")
    )
    parts.wrap(BatchPlan, "__init__", "planning 3 epochs")
    steps = stop_after(Trainer, job.steps)
    parts.wrap(Trainer, "train", "training")
    recipe = {
        "model": {"name": job.checkpoint, "quantization": "none", "dtype": "float32"},
        "data": {"source": job.rows, "check_images": decodes},
        "vision_cache": {"mode": "memory" if job.run == "memory" else "disk", "directory": job.features},
        "train": {
            "output_dir": str(Path(job.work) / "out"),
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
        },
    }
    started = time.perf_counter()
    trained = vlmtune.finetune(recipe)
    total = time.perf_counter() - started
    taken = [after.seconds - before.seconds for before, after in zip(steps[WARM - 1 :], steps[WARM:], strict=False)]
    plan = trained.trainer.plan
    result = {
        "seconds": total,
        "peak": max(part["peak"] for part in parts.found.values()),
        "own": max(*(part["own"] for part in parts.found.values()), *(step.resident for step in steps)),
        "parts": parts.found,
        "first_step": steps[0].seconds - parts.began["training"],
        "rows_per_second": plan.rows_per_step / median(taken),
        "kept_per_row": (steps[-1].resident - steps[WARM - 1].resident) / (len(taken) * plan.rows_per_step),
        "features": sum(path.stat().st_size for path in Path(job.features).rglob("*.safetensors")),
    }
    (Path(job.work) / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


class Parts:
    """Seconds and memory of functions, which are wrapped where they are looked up."""

    def __init__(self, profiles: Path | None) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.began: dict[str, float] = {}
        self._profiles = profiles

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, attribute)

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
            before, cpu = memory(), time.process_time()
            self.began[name] = time.perf_counter()
            if self._profiles:
                profile = cProfile.Profile()
                result = profile.runcall(function, *args, **kwargs)
                profile.dump_stats(self._profiles / f"{name}.prof")
            else:
                result = function(*args, **kwargs)
            seconds, after = time.perf_counter() - self.began[name], memory()
            self.found[name] = {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": after["VmHWM"]}
            own = after["RssAnon"]
            self.found[name] |= {"before": before["VmRSS"], "own": own, "kept": own - before["RssAnon"]}
            return result

        setattr(owner, attribute, measured)


@dataclass(frozen=True)
class Moment:
    seconds: float
    resident: int  # bytes of its own, without files that are memory-mapped


def stop_after(trainer: Any, count: int) -> list[Moment]:
    """Makes training end after so many steps, while three epochs are planned; the end of each comes into the list."""
    from transformers import TrainerCallback

    moments: list[Moment] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append(Moment(time.perf_counter(), memory()["RssAnon"]))
            control.should_training_stop |= state.global_step >= count

    train = trainer.train

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Stop())
        return train(self, *args, **kwargs)

    trainer.train = stopping
    return moments


def memory() -> dict[str, int]:
    """Bytes of this process in memory: `VmRSS` now, of which `RssAnon` are no file's; `VmHWM` at most.

    https://man7.org/linux/man-pages/man5/proc.5.html
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon"))}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ", ".join(f"{name} {version(name)}" for name in ("vlmtune", "torch", "transformers", "trl", "peft", "pillow"))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{cpu}, {os.cpu_count()} cores, {threads} threads; Python {platform.python_version()}, {packages}"


def show(report: Mapping[str, Any], *, markdown: bool) -> None:
    found = {int(count): one for count, one in report["rows"].items()}  # JSON's keys are texts
    counts = list(found)
    title = f"{report['family']}: seconds (µs of CPU a row; MiB more than before, at most)"
    head = ["", *(f"{count:,} rows" for count in counts), *([f"× for × {counts[-1] / counts[-2]:.0f}"] if counts[1:] else [])]
    lines = table_lines(found)
    notes = [report["machine"], "load average {:.1f} to {:.1f}".format(*report["load"])]
    if markdown:
        for line in (head, ["---", *["---:"] * len(head[1:])], *lines):
            print("| " + " | ".join(line) + " |")
        print("", title, *notes, sep="\n")
        return
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table, *notes, sep="\n", highlight=False)


def table_lines(found: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each part, one for planning as a whole, and some for the run."""
    runs = {count: list(one.values()) for count, one in found.items()}
    names = list(dict.fromkeys(name for each in next(iter(runs.values())) for name in each["parts"]))
    lines: list[list[str]] = []
    for name in names:
        if name in ("training", "encoding none"):
            continue
        parts = {count: [run["parts"][name] for run in each if name in run["parts"]] for count, each in runs.items()}
        seconds, work = ([median(part[kind] for part in each) for each in parts.values()] for kind in ("seconds", "cpu"))
        more = [median(part["peak"] - part["before"] for part in each) / 2**20 for each in parts.values()]
        cells = zip(parts, seconds, work, more, strict=True)
        lines.append([name, *(f"{a:.2f} ({b / count * 1e6:.0f}; {c:.0f})" for count, a, b, c in cells), *_factor(work)])
    planning = {
        kind: [median(sum(run["parts"][name][kind] for name in PLANNING) for run in each) for each in runs.values()]
        for kind in ("seconds", "cpu")
    }
    cells = zip(runs, planning["seconds"], planning["cpu"], strict=True)
    total = [f"{seconds:.2f} ({work / count * 1e6:.0f})" for count, seconds, work in cells]
    lines.append([f"planning in all (goal: {GOAL} s for 100,000)", *total, *_factor(planning["cpu"])])
    lines.append(_line("before the first step is done, s", runs, lambda run: run["first_step"], "{:.2f}"))
    lines.append(_line("rows a second in training", runs, lambda run: run["rows_per_second"], "{:.0f}"))
    lines.append(_line("memory before the rows, MiB", runs, lambda run: run["parts"]["reading rows"]["before"] / 2**20))
    for name in next(iter(found.values())):
        one = {count: [each[name]] for count, each in found.items()}
        lines.append(_line(f"largest, features {WHERE[name]}, MiB", one, lambda run: run["peak"] / 2**20))
        lines.append(_line("… of that no mapped files", one, lambda run: run["own"] / 2**20))
    lines.append(_line("kept in planning, bytes a row", runs, lambda run: kept(run) / run["rows"], rows=True))
    lines.append(_line("kept in training, bytes a row", runs, lambda run: run["kept_per_row"]))
    return lines


def kept(run: Mapping[str, Any]) -> float:
    """Bytes that reading, checking and planning have left in memory."""
    return sum(part["kept"] for name, part in run["parts"].items() if name in (*PLANNING, "reading rows"))


def _line(
    name: str, runs: Mapping[int, Sequence[Any]], value: Callable[[Any], float], shown: str = "{:,.0f}", *, rows: bool = False
) -> list[str]:
    values = [median(value({**run, "rows": count} if rows else run) for run in each) for count, each in runs.items()]
    return [name, *map(shown.format, values), *_factor(values)]


def _factor(values: Sequence[float]) -> list[str]:
    """How many times as much as for the number of rows before."""
    return [f"{values[-1] / values[-2]:.1f}" if values[-2] > 0 else ""] if values[1:] else []


if __name__ == "__main__":
    main()
