"""What the doctor costs a run, at its start and after training: in seconds, in passes, in steps, and of ten minutes on a card.

    OMP_NUM_THREADS=1 python benchmarks/doctor.py [--family qwen2_vl] [--gpu L4]

Small models with the proportions of the full-size ones train on steps of 32 rows, as the reference recipe does. Measured are
`doctor.at_start`, `doctor.after_training`, the model's passes in both, and the steps. Planned is how long a step of the
full-size recipe takes on a card. There the passes are taken to cost as many steps as here, and the rest as many seconds.
Seconds are the processor's, with one thread, so that other programs beside it do not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import make_rows
from model import FAMILIES, make_checkpoint
from pages import ROOT, markdown
from transformers import TrainerCallback

import vlmtune.doctor
import vlmtune.training
from vlmtune import finetune
from vlmtune.console import console
from vlmtune.plan import make_plan

ROWS, HELD_OUT, STEPS = 128, 32, 3
RUN = 600  # seconds
RECIPES = {"qwen2_vl": "qwen2vl_amazon", "mllama": "llama32_vision_amazon", "pixtral": "pixtral_amazon"}
STATED = {"data.image_size": [500, 500], "data.text_tokens": 378, "data.max_rows": 1350}


@dataclass
class Examination:
    """Seconds of the doctor, and of the model's passes in it."""

    seconds: float = 0.0
    passes: list[float] = field(default_factory=list[float])  # forward and backward
    backward: int = 0  # of the passes

    @property
    def counted(self) -> str:
        back = f" + {self.backward}" if self.backward else ""
        return f"{len(self.passes) - self.backward}{back}"

    def planned(self, step: float, planned: float) -> float:
        """Seconds where a step takes `planned` seconds, and not `step` as here."""
        passing = sum(self.passes)
        return passing / step * planned + self.seconds - passing


@dataclass
class Measured:
    """A run."""

    at_start: Examination = field(default_factory=Examination)
    after: Examination = field(default_factory=Examination)
    steps: list[float] = field(default_factory=list[float])  # seconds

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


class Steps(TrainerCallback):
    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.since = seconds, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.since = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.since)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--gpu", default="L4", help="the card of which steps are planned")
    arguments = parser.parse_args()
    console.stderr = True  # the table alone goes to the standard output
    table = [line for family in FAMILIES if arguments.family in (None, family) for line in lines(family, arguments.gpu)]
    header = ["model", "weights", "a step s", "at start s", "after s", "passes", "after", "steps", "after"]
    header += [f"{arguments.gpu}: a step s", "steps in 10 min", "at start", "after"]
    sys.stdout.write(markdown(header, table))


def lines(family: str, gpu: str) -> list[list[str]]:
    """A line of the table for each way to keep the weights."""
    planned = make_plan(ROOT / f"recipes/{RECIPES[family]}.yaml", gpu=gpu, advise=False, quiet=True, **STATED).step_seconds
    if planned is None:
        raise SystemExit(f"{gpu} is a size: name a card, whose speed is known")
    found: list[list[str]] = []
    for quantization, weights in (("none", "bfloat16"), ("nf4", "NF4")):
        with tempfile.TemporaryDirectory() as directory:
            run = measured(family, quantization, Path(directory))
        there = [each.planned(run.step, planned) for each in (run.at_start, run.after)]
        found.append([
            family, weights, f"{run.step:.1f}",
            *(f"{each.seconds:.1f}" for each in (run.at_start, run.after)),
            *(each.counted for each in (run.at_start, run.after)),
            *(f"{each.seconds / run.step:.2f}" for each in (run.at_start, run.after)),
            f"{planned:.1f}", f"{RUN / planned:.0f}", *(f"{100 * seconds / RUN:.1f} %" for seconds in there),
        ])  # fmt: skip
    return found


def measured(family: str, quantization: str, directory: Path) -> Measured:
    """A short run, its doctor and its steps timed."""
    found = Measured()
    replaced = vlmtune.doctor.at_start, vlmtune.doctor.after_training, vlmtune.training._trainer
    examine, look_again, trainer = replaced

    def at_start(recipe: Any, prompter: Any, split: Any, model: Any) -> None:
        with Timed(model, found.at_start):
            examine(recipe, prompter, split, model)

    def after_training(recipe: Any, prompter: Any, split: Any, model: Any) -> Any:
        with Timed(model, found.after):
            return look_again(recipe, prompter, split, model)

    def timed_trainer(*arguments: Any) -> Any:
        made = trainer(*arguments)
        made.add_callback(Steps(found.steps))
        return made

    vlmtune.doctor.at_start, vlmtune.doctor.after_training, vlmtune.training._trainer = at_start, after_training, timed_trainer
    try:
        finetune(
            {
                "model": {"name": str(make_checkpoint(family, directory / "model")), "quantization": quantization},
                "data": {"source": str(make_rows(family, ROWS, directory / "data")), "eval_rows": HELD_OUT},
                "lora": {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
                "train_on_inputs": True,
                "vision_cache": "memory",
                "eval": {"samples": 0},
                "train": {
                    "output_dir": str(directory / "run"),
                    "max_steps": STEPS,
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 16,
                    "save_strategy": "no",
                    "use_cpu": True,
                    "bf16": True,
                },
            }
        )
    finally:
        vlmtune.doctor.at_start, vlmtune.doctor.after_training, vlmtune.training._trainer = replaced
    return found


class Timed:
    """Enters the seconds of an examination, of each forward of the model in it, and of each backward."""

    def __init__(self, model: Any, found: Examination) -> None:
        self.model, self.found, self.start, self.since = model, found, 0.0, 0.0
        self.grad: Callable[..., Any] = torch.autograd.grad

    def __enter__(self) -> None:
        def begin(*_: Any) -> None:
            self.since = time.process_time()

        def end(*_: Any) -> None:
            self.found.passes.append(time.process_time() - self.since)

        def grad(*arguments: Any, **more: Any) -> Any:
            begin()
            result = self.grad(*arguments, **more)
            end()
            self.found.backward += 1
            return result

        self.hooks = [self.model.register_forward_pre_hook(begin), self.model.register_forward_hook(end)]
        torch.autograd.grad = grad
        self.start = time.process_time()

    def __exit__(self, *_: Any) -> None:
        self.found.seconds = time.process_time() - self.start
        torch.autograd.grad = self.grad
        for hook in self.hooks:
            hook.remove()


if __name__ == "__main__":
    main()
