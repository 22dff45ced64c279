"""Measures how fast vlmtune and its peers fine-tune the same small model on the same rows.

    python benchmarks/speed.py --out build/speed
    python benchmarks/speed.py --family qwen2_vl --llamafactory-python LF/bin/python --mswift-python MS/bin/python

Every contender runs in a process of its own; each repeat runs all of them, one after the other. README.md says how to make
the peers' environments and what is measured. `--draw speed.json` draws tables and picture again from an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from data import make_rows
from model import FAMILIES, SMALL, WIDE, count_rows, make_checkpoint, reference_row, shares, shares_table, useful_flops
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "contenders"))

from probe import Job  # noqa: E402

# for all contenders: glibc keeps freed memory for the next tensor, where it would give it back and have it zeroed again
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Contender:
    """Who trains, under which label rule, with which settings of its own."""

    script: str
    labels: str  # all: everything but padding and image tokens; answers: what the assistant says
    python: str = "vlmtune"  # whose environment
    families: tuple[str, ...] = FAMILIES
    settings: Mapping[str, Any] = field(default_factory=dict)
    comparable: bool = True  # each optimiser step sees the rows and the labels that the others see: losses compare
    default: bool = True  # runs unless --contenders says otherwise


QWEN = ("qwen2_vl",)
STEADY = {"pad_to_multiple_of": 64}  # fewer shapes, for which fewer kernels are compiled: 3 to 5 % faster, 128 is slower
PACKED = {"neat_packing": True, "cutoff_len": 1504, "per_device_train_batch_size": 1}  # about four rows a pack
CONTENDERS = {
    "tutorial": Contender("tutorial.py", "all"),
    "trl": Contender("trl_collator.py", "all", settings=STEADY),
    "trl-answers": Contender("trl_collator.py", "answers", settings=STEADY),
    "llamafactory": Contender("llama_factory.py", "all", "llamafactory", QWEN, comparable=False),
    "llamafactory-answers": Contender("llama_factory.py", "answers", "llamafactory", QWEN),
    "llamafactory-packed": Contender("llama_factory.py", "all", "llamafactory", QWEN, PACKED, comparable=False, default=False),
    "llamafactory-answers-packed": Contender(
        "llama_factory.py", "answers", "llamafactory", QWEN, PACKED, comparable=False, default=False
    ),
    "llamafactory-answers-pure": Contender(
        "llama_factory.py", "answers", "llamafactory", QWEN, {"pure_bf16": True, "bf16": False}, default=False
    ),
    "mswift": Contender("ms_swift.py", "all", "mswift", QWEN),
    "mswift-answers": Contender("ms_swift.py", "answers", "mswift", QWEN),
    "mswift-answers-checkpointing": Contender(
        "ms_swift.py", "answers", "mswift", QWEN, {"gradient_checkpointing": True}, default=False
    ),
    "mswift-answers-packed": Contender(
        "ms_swift.py",
        "answers",
        "mswift",
        QWEN,
        {"packing": True, "attn_impl": "flash_attn", "packing_length": 1504, "per_device_train_batch_size": 1},
        comparable=False,
        default=False,
    ),
    "mswift-answers-padding-free": Contender(
        "ms_swift.py", "answers", "mswift", QWEN, {"padding_free": True, "attn_impl": "flash_attn"}, default=False
    ),
    "vlmtune": Contender("ours.py", "all"),
    "vlmtune-answers": Contender("ours.py", "answers"),
}


def main() -> None:
    options = parse_options()
    if options.draw:
        show(json.loads(options.draw.read_text(encoding="utf-8")), options.picture)
        return
    if options.wide:
        options.family, SMALL["qwen2_vl"] = "qwen2_vl", WIDE
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(shares_table())
    pythons = {"vlmtune": sys.executable, "llamafactory": options.llamafactory_python, "mswift": options.mswift_python}
    chosen = choose(options.contenders, pythons)
    report: dict[str, Any] = {
        "machine": machine(options.threads),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "settings": {"rows": options.rows, "questions": options.questions, "epochs": options.epochs, "batch": options.batch},
        "families": {},
    }
    report["settings"] |= {"accumulation": options.accumulation, "learning_rate": options.learning_rate}
    for family in FAMILIES if options.family == "all" else (options.family,):
        report["families"][family] = measure_family(family, chosen, pythons, options)
        (options.out / "speed.json").write_text(json.dumps(report, indent=1), encoding="utf-8")  # what is done is kept
    show(report, options.picture)
    console.print(f"wrote {options.out / 'speed.json'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=(*FAMILIES, "all"), default="all")
    parser.add_argument("--wide", action="store_true", help="Qwen2-VL with a quarter of the widths instead of an eighth")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all that have an environment")
    parser.add_argument("--out", type=Path, default=Path("build/speed"), help="where models, rows, logs and speed.json go")
    parser.add_argument("--picture", type=Path, help="PNG of the bars (default: performance.png in --out)")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--questions", type=int, default=1, help="rows that show the same picture")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--llamafactory-python", help="python of an environment with LLaMA-Factory")
    parser.add_argument("--mswift-python", help="python of an environment with ms-swift")
    parser.add_argument("--vlmtune", nargs="*", default=[], metavar="KEY=JSON", help="recipe keys, `vision_cache='\"off\"'`")
    parser.add_argument("--draw", type=Path, help="only show an earlier speed.json")
    options = parser.parse_args()
    options.picture = options.picture or (options.draw.parent if options.draw else options.out) / "performance.png"
    return options


def choose(names: Sequence[str] | None, pythons: Mapping[str, str | None]) -> dict[str, Contender]:
    """The contenders to run; who has no environment is named and left out."""
    chosen = {name: one for name, one in CONTENDERS.items() if (name in names if names else one.default)}
    for name, one in list(chosen.items()):
        if not pythons[one.python]:
            console.print(f"{name} is left out: --{one.python}-python says where its environment is", style="yellow")
            del chosen[name]
    return chosen


def measure_family(
    family: str, chosen: Mapping[str, Contender], pythons: Mapping[str, str | None], options: argparse.Namespace
) -> dict[str, Any]:
    place = options.out.absolute() / family
    shutil.rmtree(place, ignore_errors=True)
    rows = make_rows(family, options.rows, place / "data", questions=options.questions)
    checkpoint = make_checkpoint(family, place / "model")
    counts = count_rows(family, checkpoint, rows)
    grouped = options.questions > 1 and family != "mllama"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, one in chosen.items() if family in one.families}
    gemm: list[float] = []
    for repeat in range(options.repeats):
        for name in [*runs, "gemm"]:
            one = chosen.get(name, Contender("gemm.py", "all"))
            work = place / f"{name}-{repeat}"
            work.mkdir()
            own = [*options.vlmtune, *(["packing.group_by_image=true"] if grouped else [])]
            extra = dict(pair.split("=", 1) for pair in own) if one.script == "ours.py" else {}
            job = Job(
                family=family,
                labels=one.labels,
                checkpoint=str(checkpoint),
                rows=str(rows),
                work=str(work),
                result=str(work / "result.json"),
                epochs=options.epochs,
                batch=options.batch,
                accumulation=options.accumulation,
                learning_rate=options.learning_rate,
                max_grad_norm=0.3,
                settings={**one.settings, **{key: json.loads(value) for key, value in extra.items()}},
            )
            found = run(job, one, pythons[one.python] or "", options.threads)
            if name == "gemm":
                gemm.append(found["gemm_flops"])
                continue
            runs[name].append(found)
            console.print(f"{family} repeat {repeat + 1} {name}: {_summary(found)}", highlight=False)
    return {
        "rows": counts,
        "gemm_flops": gemm,
        "useful_flops": {rule: useful_flops(family, counts, epochs=options.epochs, labels=rule) for rule in ("all", "answers")},
        "shares": {size: shares(*reference_row(family, small=size == "small", everything=True)) for size in ("full", "small")},
        "small": asdict(SMALL[family]),
        "runs": runs,
    }


def run(job: Job, contender: Contender, python: str, threads: int) -> dict[str, Any]:
    """What the contender's process found; or `error`, the end of its log."""
    work = Path(job.work)
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true", "DISABLE_VERSION_CHECK": "1"}
    own = {"OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": str(work / "cache")}
    environment = {**os.environ, **ALLOCATOR, **offline, **own}
    started = time.perf_counter()
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        command = [python, str(HERE / "contenders" / contender.script), str(work / "job.json")]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work).returncode
    if code or not Path(job.result).exists():
        tail = (work / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        return {"error": f"exit {code}: {' / '.join(tail)}"}
    found = json.loads(Path(job.result).read_text(encoding="utf-8"))
    return {**found, "process_seconds": time.perf_counter() - started}


def seconds(name: str, found: Mapping[str, Any]) -> float:
    """Seconds of training. vlmtune's hold all that it does before, but for imports and loading the model; peers' do not."""
    return found["train_seconds"] + (found["prepare_seconds"] if CONTENDERS[name].script == "ours.py" else 0.0)


def _summary(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"failed, {found['error']}"
    gibibytes = max(found["rss_peak_before"], found["rss_peak_training"]) / 2**30
    losses = f"loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"
    times = (
        f"{found['train_seconds']:.1f} s ({found['train_cpu_seconds']:.1f} s of CPU), before {found['prepare_seconds']:.1f} s"
    )
    return f"{times}, {gibibytes:.2f} GiB, {found['steps']} steps, {losses}"


def machine(threads: int) -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    flags = next((line.split(":")[1].split() for line in _lines("/proc/cpuinfo") if line.startswith("flags")), [])
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory / 2**20, 1),
        "flags": [flag for flag in flags if flag.startswith(("avx512_bf16", "amx"))],
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def summarise(report: Mapping[str, Any], family: str) -> list[dict[str, Any]]:
    """One row of the table for each contender: medians over the repeats, ratios within each repeat."""
    part, settings = report["families"][family], report["settings"]
    passes = settings["rows"] * settings["epochs"]
    summary: list[dict[str, Any]] = []
    for name, runs in part["runs"].items():
        labels = CONTENDERS[name].labels
        good = [found for found in runs if "error" not in found]
        line: dict[str, Any] = {"name": name, "labels": labels, "runs": len(good)}
        if not good:
            summary.append({**line, "error": runs[0]["error"] if runs else "not run"})
            continue
        base = "vlmtune" if labels == "all" else "vlmtune-answers"
        ours = part["runs"].get(base, [])
        pairs = [(a, b) for a, b in zip(runs, ours, strict=False) if "error" not in a and "error" not in b]
        ratios = [seconds(name, theirs) / seconds(base, own) for theirs, own in pairs]
        line["seconds"] = median(seconds(name, found) for found in good)
        line["prepare"] = median(found["prepare_seconds"] for found in good)
        line["rows_per_second"] = passes / line["seconds"]
        line["ratio"] = median(ratios) if ratios else None
        line["ratios"] = [min(ratios), max(ratios)] if ratios else None
        line["peak_gib"] = median(max(found["rss_peak_before"], found["rss_peak_training"]) for found in good) / 2**30
        line["before_gib"] = median(found["rss_before"] for found in good) / 2**30
        line["useful_flops"] = part["useful_flops"][labels] / line["seconds"]
        line["share_of_gemm"] = line["useful_flops"] / median(part["gemm_flops"])
        line["tokens"] = good[0]["tokens"] / (settings["epochs"] * sum(row["tokens"] for row in part["rows"]))
        line["steps"] = good[0]["steps"]
        line["losses"] = [good[0]["losses"][0], good[0]["losses"][-1]]
        line["loss_difference"] = _largest_difference(pairs) if CONTENDERS[name].comparable else None
        summary.append(line)
    return summary


def _largest_difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> float | None:
    """Between a contender's losses and vlmtune's under the same label rule, at any logged step of any repeat."""
    gaps = [
        abs(a - b)
        for theirs, own in pairs
        if len(theirs["losses"]) == len(own["losses"])
        for a, b in zip(theirs["losses"], own["losses"], strict=True)
    ]
    return max(gaps) if gaps else None


def show(report: Mapping[str, Any], picture: Path) -> None:
    """The tables in the terminal, and the bars as a picture."""
    for family, part in report["families"].items():
        summary = summarise(report, family)
        console.print(speed_table(family, [line for line in summary if "error" not in line], median(part["gemm_flops"])))
        for line in summary:
            if "error" in line:
                console.print(f"{line['name']} did not run: {line['error']}", style="yellow", highlight=False)
    host = report["machine"]
    console.print(f"{host['cpu']}, {host['cores']} cores, {host['threads']} threads, {host['memory_gib']} GiB")
    for name, versions in _versions(report).items():
        console.print(f"{name}: {', '.join(f'{package} {version}' for package, version in versions.items())}", highlight=False)
    draw(report, picture)
    console.print(f"wrote {picture}")


def speed_table(family: str, summary: Sequence[Mapping[str, Any]], gemm: float) -> Table:
    table = Table(
        title=f"{family}: medians of {max((line['runs'] for line in summary), default=0)} runs; GEMM {gemm / 1e12:.2f} TFLOP/s"
    )
    for name in ("contender", "labels"):
        table.add_column(name, no_wrap=True)
    for name in (
        "seconds",
        "before",
        "rows/s",
        "vlmtune is × faster",
        "peak GiB",
        "useful",
        "loss",
        "largest gap",
        "steps",
        "tokens",
    ):
        table.add_column(name, justify="right")
    for line in summary:
        low, high = line["ratios"] or (None, None)
        table.add_row(
            line["name"],
            line["labels"],
            f"{line['seconds']:.1f}",
            f"{line['prepare']:.1f}",
            f"{line['rows_per_second']:.2f}",
            f"{line['ratio']:.2f} ({low:.2f}–{high:.2f})" if line["ratio"] else "",
            f"{line['peak_gib']:.2f} ({line['before_gib']:.2f})",
            f"{line['share_of_gemm']:.1%}",
            f"{line['losses'][0]:.3f}–{line['losses'][1]:.3f}",
            f"{line['loss_difference']:.1e}" if line["loss_difference"] is not None else "",
            str(line["steps"]),
            f"{line['tokens']:.1%}",
        )
    return table


def _versions(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for part in report["families"].values():
        for name, runs in part["runs"].items():
            for one in runs:
                if "versions" in one:
                    found.setdefault(CONTENDERS[name].python, one["versions"])
    return found


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Bars of rows a second, one panel for each family."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    families = list(report["families"])
    figure, panels = pyplot.subplots(1, len(families), figsize=(4.6 * len(families), 4.2), squeeze=False)
    for panel, family in zip(panels[0], families, strict=True):
        lines = [line for line in summarise(report, family) if "error" not in line]
        lines.sort(key=lambda line: line["rows_per_second"])
        colours = ["#d9622b" if line["name"].startswith("vlmtune") else "#8d99a6" for line in lines]
        bars = panel.barh([line["name"] for line in lines], [line["rows_per_second"] for line in lines], color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.set_title(family)
        panel.set_xlabel("rows a second")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    host = report["machine"]
    figure.suptitle(f"Training speed, {host['cpu']}, {host['threads']} threads", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
