"""What every contender is measured with: it needs transformers and safetensors only, whatever environment it runs in.

A `Probe` wraps `transformers.Trainer.train`, which all contenders come down to. Before training it gives the LoRA weights the
shared start, and after it writes seconds, memory and losses to the job's result file.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vlmtune", "llamafactory", "ms_swift")


@dataclass(frozen=True)
class Job:
    """What is to be trained, the same for all contenders but for `labels` and `settings`."""

    family: str
    labels: str  # all: everything but padding and image tokens; answers: what the assistant says
    checkpoint: str
    rows: str  # rows.jsonl
    work: str  # a directory of the contender's own
    result: str
    epochs: int
    batch: int
    accumulation: int
    learning_rate: float
    max_grad_norm: float
    settings: dict[str, Any]

    def train_arguments(self) -> dict[str, Any]:
        """Arguments by their names in transformers' TrainingArguments, which all contenders take."""
        return {
            "output_dir": str(Path(self.work) / "out"),
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": 0.0,
            "optim": "adamw_torch",
            "bf16": True,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 0,
        }


def read_job() -> Job:
    """The job named on the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


class Probe:
    def __init__(self, job: Job) -> None:
        self._job, self._apart = job, dict[str, float]()
        self._found: dict[str, Any] = {}
        self._tokens = 0

    def start(self) -> None:
        """Imports are done: from here on the time counts as preparation. Call it before the contender's own code runs."""
        from transformers import PreTrainedModel, Trainer

        self._patch(Trainer)
        load = PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            with self.apart("model"):
                return load(cls, *args, **kwargs)

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        self._started = time.perf_counter()

    @contextmanager
    def apart(self, name: str) -> Generator[None]:
        """Time that is neither preparation nor training, under a name; a name within itself counts once."""
        started, known = time.perf_counter(), self._apart.get(name, 0.0)
        yield
        self._apart[name] = known + time.perf_counter() - started

    def call_apart(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # ms-swift reads the trainer's signature
        def called(*args: Any, **kwargs: Any) -> Any:
            with self.apart(name):
                return function(*args, **kwargs)

        return called

    def _patch(self, trainer_class: Any) -> None:
        train, training_step, probe = trainer_class.train, trainer_class.training_step, self
        trainer_class.__init__ = self.call_apart("trainer", trainer_class.__init__)

        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            ended = time.perf_counter()
            probe._found["prepare_seconds"] = ended - probe._started - sum(probe._apart.values())
            probe._before(trainer)
            started, worked = time.perf_counter(), time.process_time()
            output = train(trainer, *args, **kwargs)
            probe._found["train_seconds"] = time.perf_counter() - started
            probe._found["train_cpu_seconds"] = time.process_time() - worked  # of all threads: tells a busy machine
            probe._after(trainer)
            return output

        def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            probe._tokens += _tokens(inputs)
            return training_step(trainer, model, inputs, *args, **kwargs)

        trainer_class.train, trainer_class.training_step = measured, counted

    def _before(self, trainer: Any) -> None:
        self._found["adapter_dtype"] = start_adapter(trainer.model, Path(self._job.checkpoint) / "adapter.safetensors")
        self._found["rss_before"] = _status("VmRSS")
        self._found["rss_peak_before"] = _status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of the training

    def _after(self, trainer: Any) -> None:
        import torch

        self._found |= {
            "rss_peak_training": _status("VmHWM"),
            "rss_peak_workers": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "steps": trainer.state.global_step,
            "tokens": self._tokens,
            "apart_seconds": self._apart,
            "threads": torch.get_num_threads(),
            "dtype": str(next(trainer.model.parameters()).dtype),
            "versions": _versions(),
            "settings": self._job.settings,
        }
        Path(self._job.result).write_text(json.dumps(self._found), encoding="utf-8")


def start_adapter(model: Any, path: Path) -> str:
    """Gives a model's LoRA weights the shared start, whatever the contender drew; returns their dtype.

    Raises:
        ValueError: the model trains other weights than the file holds.

    """
    import torch
    from safetensors.torch import load_file

    shared = {_plain(name): tensor for name, tensor in load_file(path).items()}
    trained = {_plain(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
    if shared.keys() != trained.keys():
        raise ValueError(f"{len(trained)} weights are trained, not the {len(shared)} shared: {sorted(trained)[:3]}")
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(shared[name])
    return ", ".join(sorted({str(weight.dtype) for weight in trained.values()}))


def _tokens(inputs: Any) -> int:
    """Tokens of a micro-batch without padding: who sees fewer than the others has lost some, its pictures perhaps."""
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.dim() == 2 and mask.max() == 1 else inputs["input_ids"].numel()


def _plain(name: str) -> str:
    return name.replace(".default", "").removeprefix("module.").replace("base_model.model.", "")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
