"""Where a training step of vlmtune goes on a CPU: the time of each kind of operation, in the runs of `speed.py`.

OMP_NUM_THREADS=2 python benchmarks/step.py [--family qwen2_vl] [--labels all|answers]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import make_rows
from model import FAMILIES, SMALL, make_checkpoint
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from vlmtune import finetune
from vlmtune.trainer import Trainer

WARM, PROFILED = 4, 8  # micro-batches
KINDS = {  # names of operations, without `aten::`; those with the vocabulary in their shapes are the head's
    "matrix products": ("mm", "addmm", "linear"),
    "attention": ("bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_scaled_dot_product", "triu"),
    "elementwise": ("mul", "add", "add_", "silu", "silu_backward", "pow", "mean", "rsqrt", "neg", "sum", "div", "sigmoid"),
    "copies and casts": ("copy_", "cat", "fill_", "_to_copy", "clone", "contiguous"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--labels", choices=("all", "answers"), default="all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seconds, tokens = profiled(arguments.family, arguments.labels, Path(directory))
    whole = sum(seconds.values())
    table = Table(title=f"{arguments.family}, labels: {arguments.labels}; {whole / tokens * 1e6:.0f} µs a token, profiled")
    table.add_column("kind")
    table.add_column("share", justify="right")
    for kind, taken in seconds.most_common():
        table.add_row(kind, f"{taken / whole:.0%}")
    Console().print(table)


def profiled(family: str, labels: str, directory: Path) -> tuple[Counter[str], int]:
    """Seconds of each kind of operation in some micro-batches, and the tokens of these."""
    recorder = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    step, seen = Trainer.training_step, [0, 0]  # micro-batches, tokens of those profiled

    def training_step(trainer: Trainer, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        if seen[0] == WARM:
            recorder.__enter__()
        if WARM <= seen[0] < WARM + PROFILED:
            seen[1] += int(inputs["attention_mask"].sum())
        result = step(trainer, model, inputs, *rest)
        seen[0] += 1
        if seen[0] == WARM + PROFILED:
            recorder.__exit__(None, None, None)
        return result

    replaced: Callable[..., Any] = training_step
    Trainer.training_step = replaced
    finetune(
        {
            "model": {"name": str(make_checkpoint(family, directory / "model")), "quantization": "none"},
            "data": {"source": str(make_rows(family, 32, directory / "data"))},
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
            "train_on_inputs": labels == "all",
            "vision_cache": "memory",
            "train": {
                "output_dir": str(directory / "run"),
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "save_strategy": "no",
            },
        }
    )
    Trainer.training_step = step
    seconds: Counter[str] = Counter()
    vocabulary = SMALL[family].language.vocabulary
    for event in recorder.key_averages(group_by_input_shape=True):
        of_head = any(vocabulary in shape for shape in event.input_shapes)
        seconds["head and loss" if of_head else _kind(event.key)] += event.self_cpu_time_total / 1e6
    return seconds, seen[1]


def _kind(name: str) -> str:
    bare = name.removeprefix("aten::")
    for kind, names in KINDS.items():
        if bare in names or any(bare.startswith(start) for start in names if start[:1] in "_C" and len(start) > 8):
            return kind
    return "the rest: views, dispatch, Python"


if __name__ == "__main__":
    main()
