"""Memory of training steps, simulated and real: how far off is what a plan says?

    OMP_NUM_THREADS=1 python benchmarks/memory.py                    # about ten minutes on two cores
    OMP_NUM_THREADS=1 python benchmarks/memory.py --only mllama --markdown

Each setting is trained for two optimiser steps by vlmtune's own trainer on the CPU, from a checkpoint on the disk and rows with
pictures, in a process of its own. torch.profiler reports every allocation of torch's CPU allocator. Then the same process
simulates the step from the checkpoint's config and the same batches, with the CPU's kernels.

What is compared is the most that is allocated at once in the second step, when the optimiser has its states: weights,
quantisation's statistics, buffers and adapters, whose bytes are counted, and on top of them what the profiler has seen since
training began: states, gradients, the step's batches and the one that is drawn ahead, activations, kernels' scratch. The error
is given of all of it, which is what a plan promises, and of the part above the weights, which is what is hard to foresee.

Not seen by either: memory that does not come from torch's allocator, as Python's own, NumPy's (batches are copied out of it),
MKL's, decoded pictures; and features in the vision cache, which lie there before training begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import model as small
from model import Language, Sizes, Vision
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

TESTS = Path(__file__).absolute().parents[1] / "tests"  # whose tiny models are measured too
MARKS = ("memory: second step begins", "memory: second step ends")
WORDS = ["light", "warm", "linen", "steel", "for", "a", "kitchen", "made", "in", "small", "numbers", "blue"]
MIDDLE = {
    "qwen2_vl": Sizes(
        Language(768, 6, 12, 2, 64, 2048, 8000),
        Vision(256, 4, 4, 1024, False, 14, merge=2, projector=((1024, 1024), (1024, 768))),
    ),
    "mllama": Sizes(
        Language(768, 6, 12, 4, 64, 2048, 8000, cross_layers=1),
        Vision(256, 5, 4, 1024, False, 14, tile=224, tiles=4, states=4, projector=((1024, 768),)),
    ),
    "pixtral": Sizes(
        Language(768, 6, 12, 4, 64, 2048, 8000), Vision(256, 4, 4, 1024, True, 16, projector=((256, 768), (768, 768)))
    ),
}

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Setting:
    """What one process trains and simulates."""

    kind: str
    size: str = "middle"  # 50 million parameters; "small": 20, `model.py`'s; "tiny": a tenth, the tests' own
    dtype: str = "bfloat16"
    quantization: str = "none"
    checkpointing: int = 0
    packed: bool = False
    cached: bool = False
    targets: str = "q,v"
    scope: str = "language"
    whole: bool = False  # every weight is trained, without an adapter, by TRL's own trainer
    dropout: float = 0.05
    optimiser: str = "adamw_torch_fused"
    clip: float = 1.0
    rows: int = 2  # in a micro-batch
    micro_batches: int = 2
    pictures: tuple[tuple[int, int], ...] = ((224, 224),)  # of each row, width and height
    text: int = 200  # tokens of a row's text, about

    @property
    def name(self) -> str:
        """What differs from the defaults, in words."""
        weights = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]
        words = [f"{self.kind} {self.size}", f"nf4/{weights}" if self.quantization == "nf4" else weights]
        words += [f"every {self.checkpointing} again"] if self.checkpointing else []
        words += [word for word, on in (("packed", self.packed), ("cached", self.cached), ("whole model", self.whole)) if on]
        words += [self.targets] if self.targets != "q,v" else []
        words += [f"scope {self.scope}"] if self.scope != "language" else []
        words += [self.optimiser] if self.optimiser != "adamw_torch_fused" else []
        words += ["no clipping"] if not self.clip else []
        words += ["no dropout"] if not self.dropout else []
        words += [f"{self.rows} × {self.micro_batches} rows"] if (self.rows, self.micro_batches) != (2, 2) else []
        sizes = " ".join(f"{width}×{height}" for width, height in self.pictures)
        words += [sizes or "no pictures"] if self.pictures != ((224, 224),) else []
        return ", ".join(words)

    @property
    def recipe(self) -> dict[str, Any]:
        """Without what depends on the place: `model.name`, `data.source` and `train.output_dir`."""
        return {
            "model": {"quantization": self.quantization, "dtype": self.dtype},
            "lora": {
                "r": 8,
                "alpha": 16,
                "dropout": self.dropout,
                "targets": {"q,v": ["q_proj", "v_proj"]}.get(self.targets, self.targets),
                "scope": self.scope,
            },
            "packing": {"mode": "auto" if self.packed else "off"},
            "vision_cache": {"mode": "memory" if self.cached else "off"},
            "train": {
                "max_steps": 2,
                "per_device_train_batch_size": self.rows,
                "gradient_accumulation_steps": self.micro_batches,
                "train_sampling_strategy": "sequential",
                "gradient_checkpointing": self.checkpointing or False,
                "optim": self.optimiser,
                "max_grad_norm": self.clip,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }


def settings() -> list[Setting]:
    """All that are measured."""
    qwen, mllama, pixtral = (Setting(kind) for kind in ("qwen2_vl", "mllama", "pixtral"))
    odd = ((301, 177),)
    four = ((224, 224), (112, 280), (333, 90), (60, 60))
    return [
        qwen,
        replace(qwen, dtype="float32"),
        replace(qwen, checkpointing=1),
        replace(qwen, checkpointing=2),
        replace(qwen, quantization="nf4"),
        replace(qwen, quantization="nf4", checkpointing=1, targets="all-linear"),
        replace(qwen, quantization="nf4", dtype="float32", checkpointing=2),
        replace(qwen, packed=True, rows=3),
        replace(qwen, packed=True, checkpointing=1, dtype="float32", cached=True),
        replace(qwen, quantization="nf4", packed=True, cached=True, checkpointing=1, rows=4, optimiser="adamw_torch"),
        replace(qwen, scope="all", targets="all-linear", dtype="float32"),
        replace(qwen, pictures=four, rows=1, optimiser="sgd"),
        replace(qwen, pictures=odd, clip=0.0, dropout=0.0, rows=4, targets="all-linear"),
        replace(qwen, whole=True, dtype="float32", optimiser="adamw_torch"),
        replace(qwen, whole=True, checkpointing=1, dropout=0.0),
        replace(qwen, pictures=()),
        mllama,
        replace(mllama, dtype="float32", checkpointing=1),
        replace(mllama, quantization="nf4", checkpointing=2, targets="all-linear"),
        replace(mllama, packed=True, cached=True),
        replace(mllama, packed=True, quantization="nf4", dtype="float32", checkpointing=1, optimiser="adamw_torch"),
        replace(mllama, cached=True, pictures=odd, rows=3, clip=0.0),
        replace(mllama, scope="all", targets="all-linear"),
        replace(mllama, pictures=((224, 224), (500, 200)), rows=1, micro_batches=3),
        replace(mllama, whole=True, optimiser="sgd", dtype="float32"),
        pixtral,
        replace(pixtral, dtype="float32", checkpointing=2, targets="all-linear"),
        replace(pixtral, quantization="nf4", checkpointing=1, cached=True, packed=True),
        replace(pixtral, packed=True, pictures=odd, rows=3),
        replace(pixtral, cached=True, dtype="float32", pictures=((150, 150), (90, 200), (77, 33)), dropout=0.0),
        replace(pixtral, scope="all", targets="all-linear", checkpointing=1),
        replace(pixtral, whole=True, checkpointing=2, optimiser="adamw_torch"),
        replace(qwen, size="small", checkpointing=1, rows=4),
        replace(mllama, size="small", quantization="nf4"),
        replace(pixtral, size="small", dtype="float32", packed=True),
        *(Setting(kind, size="tiny", checkpointing=1, rows=4) for kind in ("smolvlm", "qwen2_5_vl")),
        *(Setting(kind, size="tiny", dtype="float32", targets="all-linear") for kind in ("smolvlm", "qwen2_5_vl")),
        Setting("text", size="tiny", packed=True, pictures=(), text=400),
        Setting("text", size="tiny", quantization="nf4", checkpointing=2, pictures=(), text=400, optimiser="adamw_torch"),
    ]


def main() -> None:
    options = parse_options()
    if options.setting is not None:
        setting = from_json(json.loads(options.setting))
        options.out.write_text(json.dumps(measure(setting, options.place)), encoding="utf-8")
        return
    started = time.perf_counter()
    chosen = [setting for setting in settings() if all(word in setting.name for word in options.only)]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for setting in chosen:
            checkpoint(setting, place)
        with ThreadPoolExecutor(options.jobs) as pool:
            found = list(pool.map(partial(measure_apart, place=place), range(len(chosen)), chosen))
    report = {"machine": machine(), "seconds": time.perf_counter() - started, "settings": found}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    show(report, markdown=options.markdown)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="settings with all these words in their names")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def from_json(values: Mapping[str, Any]) -> Setting:
    return Setting(**{**values, "pictures": tuple(map(tuple, values["pictures"]))})


def measure_apart(number: int, setting: Setting, place: Path) -> dict[str, Any]:
    """What a new process measures."""
    out = place / f"{number}.json"
    work = place / "work" / str(number)
    work.mkdir(parents=True)
    (place / "work" / str(number) / "checkpoints").symlink_to(place / "checkpoints")
    command = [sys.executable, str(Path(__file__).absolute()), "--setting", json.dumps(asdict(setting))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    done = subprocess.run([*command, "--place", str(work), "--out", str(out)], capture_output=True, text=True, env=environment)
    if done.returncode:
        failed = f"exit {done.returncode}: {done.stderr[-2000:]}"
        console.print(f"{setting.name}: {failed}", style="red", highlight=False, markup=False)
        return {"name": setting.name, "failed": failed}
    result = json.loads(out.read_text(encoding="utf-8"))
    error, above = errors(result)
    console.print(f"{setting.name}: {error:+.3%}, above the weights {above:+.3%}", highlight=False)
    return {"name": setting.name, **result}


# ------------------------------------------------------------------------------------------------------- one setting


def measure(setting: Setting, place: Path) -> dict[str, Any]:
    """Trains and simulates a setting: bytes of the weights and at the peak, `real` and `simulated`, and seconds.

    Args:
        setting: what to train.
        place: a directory, in which `checkpoints` is shared by all settings.

    """
    warnings.filterwarnings("ignore")
    from vlmtune.recipe import load_recipe

    overrides = {
        "model.name": str(checkpoint(setting, place)),
        "data.source": str(rows_file(setting, place)),
        "train.output_dir": str(place / "out"),
    }
    recipe = load_recipe(setting.recipe, **overrides)
    started = time.perf_counter()
    real, material = train(setting, recipe)
    trained = time.perf_counter()
    simulated = simulate(setting, recipe, *material)
    return {
        "real": real,
        "simulated": simulated,
        "seconds": {"real": trained - started, "simulated": time.perf_counter() - trained},
    }


def errors(result: Mapping[str, Any]) -> tuple[float, float]:
    """What is simulated too much, as a share of the real peak, and of the real peak above the weights."""
    real, simulated = result["real"], result["simulated"]
    above = (simulated["peak"] - simulated["weights"]) / (real["peak"] - real["weights"]) - 1
    return simulated["peak"] / real["peak"] - 1, above


def train(setting: Setting, recipe: Any) -> tuple[dict[str, int], tuple[Any, ...]]:
    """The real peak, and what the simulation is made of."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import set_seed

    from vlmtune import training
    from vlmtune.batching import usable_rows
    from vlmtune.collator import MultimodalCollator, PackingCollator
    from vlmtune.model import load_base, load_model, load_processor
    from vlmtune.trainer import sft_config

    config = sft_config(recipe)
    set_seed(0)
    if setting.whole:
        processor, family = load_processor(recipe)
        model: Any = load_base(recipe.model, family, use_cpu=True).requires_grad_(True)
    else:
        model, processor, family = load_model(recipe)
    prompter = MultimodalCollator(processor, family, recipe.train_on_inputs)
    split = usable_rows(recipe, 0, check_images=False)
    if setting.whole:
        batches = padded_batches(recipe, config, split, prompter)
        trainer = whole_trainer(setting, model, config, split.train, processor, batches)
    else:
        split, batches, _ = training._prepared(recipe, config, model, split, prompter, None)
        if isinstance(batches.collator, PackingCollator):  # a plan counts rows as if they shared nothing
            batches = replace(batches, collator=replace(batches.collator, shares=False))
        last = training._last_mlp(model, family, batches, split)
        trainer = training._trainer(recipe, config, model, split, prompter, batches, last)
    batches = replace(batches, collator=in_torchs_memory(batches.collator))
    trainer.data_collator = batches.collator
    trainer.add_callback(marks())
    gc.collect()
    weights = bytes_of(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        trainer.train()
    first, second, third = (plan_step(batches.plan, number) for number in range(3))
    assert len(first) == len(second)
    drawn = [batches.collator([split.train[row] for row in group]) for group in [*second, third[0]]]
    config_of_model = model.config
    peak = weights + peak_between(recorder, *MARKS)
    return {"weights": weights, "peak": peak}, (config_of_model, processor, family, drawn)


def in_torchs_memory(collator: Any) -> Any:
    """The collator, its tensors copied where a processor has left them in NumPy's memory, which no profiler sees."""

    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        batch = collator(rows)
        return {
            name: values.clone() if isinstance(values, Tensor) and not values.untyped_storage().resizable() else values
            for name, values in batch.items()
        }

    return collate


def plan_step(plan: Any, number: int) -> list[list[int]]:
    """The rows of each micro-batch of a step."""
    return [slot[plan.rank] for slot in plan.steps(0)[number]]


def padded_batches(recipe: Any, config: Any, split: Any, prompter: Any) -> Any:
    from vlmtune.batching import Batching, counted_rows, micro_batches

    _, lengths = counted_rows(recipe, split, prompter)
    return Batching(prompter, prompter, micro_batches(recipe, config, lengths, packed=False), "off")


def whole_trainer(setting: Setting, model: Any, config: Any, rows: Any, processor: Any, batches: Any, **mixed: Any) -> Any:
    """TRL's own trainer of all weights, with batches as planned."""
    from trl import SFTTrainer

    from vlmtune.training import _dataset

    class Whole(*mixed.get("bases", ()), SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return batches.plan

    if setting.checkpointing:
        kwargs = {"use_reentrant": False, **mixed.get("checkpointing", {})}
        model.activation_checkpointing_enable(kwargs, every_n_layers=setting.checkpointing)
    if batches is not None:
        config.gradient_accumulation_steps = batches.plan.micro_batches
    return Whole(
        model=model,
        args=config,
        data_collator=batches.collator if batches is not None else list,
        train_dataset=_dataset(rows) if batches is not None else rows,
        processing_class=processor,
    )


def marks() -> Any:
    """A callback that marks the second step in a profile."""
    from torch.profiler import record_function
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with record_function(MARKS[state.global_step - 1]):
                pass

    return Marks()


def bytes_of(model: Any) -> int:
    """Of all storages of a model: weights, quantisation's statistics, buffers, adapters."""
    from vlmtune.planner.simulation import _statistics

    tensors = [*model.parameters(), *model.buffers()]
    tensors += [statistic for tensor in tensors for statistic in _statistics(tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def memory_events(recorder: Any) -> list[tuple[str, int]]:
    """What a profile has, in order: marks, and allocations and their ends as bytes."""
    events = recorder.profiler.kineto_results.events()
    found = [(event.start_ns(), event.name(), event.nbytes()) for event in events if event.name() in ("[memory]", *MARKS)]
    return [(name, size) for _, name, size in sorted(found, key=lambda event: event[0])]


def peak_between(recorder: Any, begin: str, end: str) -> int:
    """Most bytes that are allocated at once between two marks, of those allocated since the profile began."""
    live = most = 0
    inside = False
    for name, size in memory_events(recorder):
        if name == "[memory]":
            live += size
            most = max(most, live) if inside else most
        else:
            inside = name == begin
    assert most
    return most


def simulate(setting: Setting, recipe: Any, config: Any, processor: Any, family: Any, drawn: Sequence[Any]) -> dict[str, int]:
    """The peak of a step with these batches, the last of which is drawn ahead."""
    simulation = simulated(setting, recipe, config, processor, family)
    outcomes = [
        simulation.step(batch, accumulates=number > 0, waiting=[other for other in drawn if other is not batch])
        for number, batch in enumerate(drawn[:-1])
    ]
    weights = sum(event.size for event in outcomes[0].before if event.where and event.where.what != "optimiser's states")
    return {"weights": weights, "peak": max(outcome.peak for outcome in outcomes)}


def simulated(setting: Setting, recipe: Any, config: Any, processor: Any, family: Any) -> Any:
    from vlmtune.model import outline_base
    from vlmtune.planner.kernels import CPU, Kernels
    from vlmtune.planner.ledger import Outline
    from vlmtune.planner.simulation import NO_ROWS, NOT_SIMULATED, Simulation, StaysThere, outline, simulation
    from vlmtune.trainer import sft_config

    if not setting.whole:
        model: Any = outline(recipe, family, config)
        return simulation(
            recipe, model, processor, family, device=CPU, checkpointing=setting.checkpointing, packed=setting.packed
        )
    with Outline():
        model = outline_base(recipe.model, family, config).requires_grad_(True)
    kernels = Kernels(CPU)
    train = {**recipe.train, **NOT_SIMULATED, "gradient_accumulation_steps": 1}
    plain = sft_config(recipe.model_copy(update={"train": train}))
    again = {"checkpointing": {"context_fn": kernels.again}, "bases": (StaysThere,)}
    return Simulation(lambda: whole_trainer(setting, model, plain, NO_ROWS, processor, None, **again), family, kernels)


# ------------------------------------------------------------------------------------------------- checkpoints and rows


def checkpoint(setting: Setting, place: Path) -> Path:
    """The checkpoint of a setting, made once."""
    directory = place / "checkpoints" / f"{setting.kind}-{setting.size}"
    if directory.exists():
        return directory
    directory.mkdir(parents=True)
    if setting.size == "tiny":
        sys.path.append(str(TESTS))
        import tiny

        return tiny.make_checkpoint(setting.kind, directory)
    kept = small.SMALL[setting.kind]
    if setting.size == "middle":
        small.SMALL[setting.kind] = MIDDLE[setting.kind]
    try:
        return small.make_checkpoint(setting.kind, directory)
    finally:
        small.SMALL[setting.kind] = kept


def rows_file(setting: Setting, place: Path) -> Path:
    """Rows for three steps, each with its pictures, and answers of different lengths."""
    chance = random.Random(0)
    lines: list[str] = []
    for number in range(3 * setting.rows * setting.micro_batches):
        pictures: list[str] = []
        for picture, (width, height) in enumerate(setting.pictures):
            pictures.append(f"{number}-{picture}.png")
            Image.frombytes("RGB", (3, 3), chance.randbytes(27)).resize((width, height)).save(place / pictures[-1])
        words = chance.choices(WORDS, k=round(setting.text * chance.uniform(0.6, 1.4) / 6))
        question, answer = " ".join(words[len(words) // 5 :]), " ".join(words[: len(words) // 5])
        marks = "<image>" * len(pictures)
        messages = [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, **({"images": pictures} if pictures else {})}))
    path = place / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- table


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    return f"{cpu}, Python {platform.python_version()}, {packages}"


def show(report: Mapping[str, Any], *, markdown: bool) -> None:
    found = [result for result in report["settings"] if "failed" not in result]
    failed = [result["name"] for result in report["settings"] if "failed" in result]
    head = ["setting", "weights MiB", "real peak MiB", "off by, bytes", "error", "above the weights"]
    lines = [line(result) for result in found]
    both = [errors(result) for result in found]
    notes = [
        f"{len(found)} settings; error of the peak: largest {summary([one for one, _ in both])}; "
        f"above the weights: largest {summary([above for _, above in both])}",
        *([f"failed: {', '.join(failed)}"] if failed else []),
        f"{report['seconds'] / 60:.1f} minutes on {report['machine']}",
    ]
    if markdown:
        for cells in (head, ["---", *["---:"] * len(head[1:])], *lines):
            print("| " + " | ".join(cells) + " |")
        print("", *notes, sep="\n")
        return
    table = Table(title="Peak of torch's allocations in a training step on the CPU")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for cells in lines:
        table.add_row(*cells)
    console.print(table, *notes, sep="\n", highlight=False)


def line(result: Mapping[str, Any]) -> list[str]:
    real, simulated = result["real"], result["simulated"]
    error, above = errors(result)
    mib = [f"{size / 2**20:,.1f}" for size in (real["weights"], real["peak"])]
    return [result["name"], *mib, f"{simulated['peak'] - real['peak']:+,}", f"{error:+.3%}", f"{above:+.3%}"]


def summary(values: Sequence[float]) -> str:
    sizes = [abs(value) for value in values]
    return f"{max(sizes):.3%}, median {median(sizes):.3%}" if sizes else "none"


if __name__ == "__main__":
    main()
