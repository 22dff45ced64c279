"""Scores of tokens made here are TRL's, and those of all logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from trl.kernels import ChunkedLogProbFunction

from vlmtune import finetune, head, trainer
from vlmtune.head import has_kernels, score

MakeRecipe = Callable[..., dict[str, Any]]
TOKENS, WORDS, WIDTH = 70, 50, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=[2**20, 8 * WORDS, 1], ids=["one block", "blocks of 8", "token by token"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_scores_and_gradients_are_those_of_64_bit(blocks: int, dtype: torch.dtype, close: float, device: str) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(TOKENS, WORDS)).to(device, dtype).requires_grad_()
    targets = torch.randint(WORDS, (TOKENS,), device=device)
    weights = torch.rand(TOKENS, device=device)  # each token's part in the loss
    log_probs, entropy, is_top1 = score(logits, targets)
    (gradient,) = torch.autograd.grad((log_probs * weights).sum(), logits)

    exact = logits.detach().double().requires_grad_()
    logs = exact.log_softmax(-1)
    wanted = logs.gather(-1, targets[:, None]).squeeze(-1)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), exact)
    assert (log_probs - wanted).abs().max() < 1e-5
    assert (entropy + (logs.exp() * logs).sum(-1)).abs().max() < 1e-5
    assert torch.equal(is_top1, logits.argmax(-1) == targets)
    assert gradient.dtype == dtype
    assert (gradient - expected).abs().max() <= close


def test_a_later_token_that_is_as_likely_is_not_the_first() -> None:
    _, _, is_top1 = score(torch.tensor([[0.0, 7.0, 7.0], [0.0, 7.0, 7.0]]), torch.tensor([1, 2]))
    assert is_top1.tolist() == [True, False]


def test_a_token_without_a_target_has_no_score_and_no_gradient() -> None:
    logits = torch.randn(TOKENS, WORDS, requires_grad=True)
    targets = torch.randint(WORDS, (TOKENS,))
    wanted = [values[::2] for values in score(logits, targets)]
    targets[1::2] = -100
    found = score(logits, targets)
    for values, expected in zip(found, wanted, strict=True):
        assert torch.equal(values[::2], expected)
        assert not values[1::2].any()
    found[0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[::2].any(1).all()
    assert not logits.grad[1::2].any()


def test_no_token_at_all_has_no_score_and_a_gradient() -> None:
    logits = torch.randn(0, WORDS, requires_grad=True)
    log_probs, _, _ = score(logits, torch.zeros(0, dtype=torch.long))
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, WORDS)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gradient_is_made_only_where_one_is_wanted(wanted: bool) -> None:
    logits, targets = torch.randn(TOKENS, WORDS, requires_grad=True), torch.zeros(TOKENS, dtype=torch.long)
    with torch.set_grad_enabled(wanted), profile(activities=[ProfilerActivity.CPU]) as recorder:
        score(logits, targets)
    assert any(event.key == "aten::scatter_add_" for event in recorder.key_averages()) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_trls(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, WIDTH).to(dtype) for size in (TOKENS, WORDS))
    targets = torch.randint(WORDS, (TOKENS,))
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    scores = score(F.linear(ours, weight), targets)
    outputs = ("log_probs", "entropy", "is_top1")
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(theirs, weight, None, targets, 1.0, 8, None, 1.0, outputs)
    for one, other in zip(scores, (log_probs, entropy, is_top1), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)
    scores[0].sum().backward()
    log_probs.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.grad.abs().max()


@pytest.mark.parametrize(("loss_type", "multiple"), [("nll", None), ("dft", None), ("nll", 16)])
def test_a_run_has_the_losses_and_metrics_that_it_has_with_trls_head(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str, multiple: int | None
) -> None:
    """TRL's is asked for the same positions, as on a GPU."""
    names = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens", "eval_loss", "eval_entropy")
    found: list[list[dict[str, float]]] = []
    for whose in ("ours", "trl"):
        if whose == "trl":
            monkeypatch.setattr(trainer, "has_kernels", lambda _: True)
        settings = {"train.output_dir": str(tmp_path / whose), "train.loss_type": loss_type, "data.eval_rows": 2}
        settings |= {"train.pad_to_multiple_of": multiple}
        run = finetune(recipe(**{**settings, "train.max_steps": 6, "train.eval_strategy": "steps", "train.eval_steps": 3}))
        found.append([{name: entry[name] for name in names if name in entry} for entry in run.history])
    assert len(found[0]) >= 8
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_triton_is_asked_for_where_it_runs() -> None:
    assert not has_kernels(torch.device("cpu"))
    assert not has_kernels(torch.device("mps"))


def test_logits_are_there_for_who_asks_the_trainer_for_them(recipe: MakeRecipe) -> None:
    run = finetune(recipe())
    batch = next(iter(run.trainer.get_train_dataloader()))
    trained = int((batch["labels"][:, 1:] != -100).sum())
    loss, outputs = run.trainer.compute_loss(run.trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == (1, trained)
    assert loss.item() == pytest.approx(run.trainer.compute_loss(run.trainer.model, batch).item())


@pytest.mark.parametrize("dora", [False, True])
def test_under_autocast_the_input_of_an_adapter_stays_in_16_bit_but_for_dora(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    """DoRA takes norms in its input's dtype: in 16 bit training would divide by others than answers and merges do."""
    seen: set[bool] = set()
    compute_loss = trainer.Trainer.compute_loss

    def look(self: trainer.Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(module.cast_input_dtype_enabled for module in self.model.modules() if hasattr(module, "lora_A"))
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", look)
    run = finetune(recipe(**{"model.dtype": "bfloat16", "lora.use_dora": dora, "train.max_steps": 1}))
    assert seen == {dora}
    assert all(module.cast_input_dtype_enabled for module in run.trainer.model.modules() if hasattr(module, "lora_A"))
