"""What a run shows while it goes on: a bar with the figures in the terminal, answers with pictures in TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from transformers import TrainerCallback

from vlmtune import evaluation
from vlmtune.collator import MultimodalCollator
from vlmtune.console import console, progress

SHOWN = {  # what the console shows of the trainer's log, in this order; short enough for 80 columns
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "mean_token_accuracy": "token acc. {:.1%}",
    "tokens_per_second": "{:,.0f} tok/s",
    "eval_loss": "eval loss {:.4f}",
    "eval_mean_token_accuracy": "eval token acc. {:.1%}",
}


class ProgressBar(TrainerCallback):
    """One bar for the steps, and a line of figures whenever the trainer logs."""

    def __init__(self) -> None:
        self._bar = progress()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._task = self._bar.add_task("Training", total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        figures = [shape.format(logs[key]) for key, shape in SHOWN.items() if key in logs] if logs else []
        if figures and state.is_world_process_zero:
            line = "  ".join([f"step {state.global_step}", f"epoch {state.epoch or 0:.2f}", *figures])
            console.print(line, highlight=False)

    def stop(self) -> None:
        """Leaves the terminal to others, also where training ended in an error."""
        self._bar.stop()


class HeldOutAnswers(TrainerCallback):
    """Puts the model's answers to a few held-out rows, with their pictures, into TensorBoard at every evaluation."""

    def __init__(
        self,
        writer: SummaryWriter,
        collator: MultimodalCollator,
        samples: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        self._writer, self._collator, self._samples, self._options = writer, collator, samples, options

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not self._samples:
            return
        asked = [evaluation.question(sample) for sample in self._samples]
        model = getattr(model, "module", model)  # without DistributedDataParallel
        given = evaluation.answers(model, self._collator, asked, description="Held-out rows", **self._options)
        for number, (sample, text) in enumerate(zip(self._samples, given, strict=True), 1):
            expected = evaluation.expected_answer(sample, self._collator)
            markdown = f"**answer**\n\n{text}\n\n**expected**\n\n{expected}"
            self._writer.add_text(f"held out/{number}", markdown, state.global_step)
            for place, picture in enumerate(evaluation.thumbnails(sample), 1):
                self._writer.add_image(f"held out/{number}, picture {place}", pil_to_tensor(picture), state.global_step)


class PlanEpochs(TrainerCallback):
    """Tells a plan the epoch: a run of several processes that is resumed in mid-epoch does not.

    There the trainer's `set_epoch` reaches accelerate's two wrappers and not what they hold.
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (`_run_epoch`)
    """

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._plan.set_epoch(int(state.epoch))


class Speed(TrainerCallback):
    """Tokens a second between one log and the next, in training alone; and a log of the last step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens, self._time = state.num_input_tokens_seen, time.perf_counter()  # a resumed run has seen some

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step too, which a short run would not show

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._time += seconds

    def __call__(self, tokens: int) -> float:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return rate
