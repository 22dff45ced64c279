"""Head and last MLP at trained positions only: which these are, and how likely the head makes the tokens there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils import is_triton_available
from trl.trainer.utils import FusedCausalLMOutput

from vlmtune.batch import IGNORE

BLOCK = 2**20  # logits in 32 bit at once: 4 MiB, which a processor's cache holds


class Head:
    """Forward hooks: what stands behind the last attention sees the states whose next token is trained on, and no others.

    These are the last layer's MLP and the head. Of the logits a hook makes scores. On a GPU TRL's fused head does that with
    Triton kernels; elsewhere it goes some twenty times over logits in 32 bit, which it computes twice.
    https://github.com/huggingface/trl/blob/main/trl/kernels/chunked_logprob.py

    Args:
        model: with its adapter.
        last_mlp: behind which no token hears of another, as `proof.ends_apart` tells; None leaves all MLPs whole.

    """

    def __init__(self, model: PeftModel, last_mlp: nn.Module | None = None) -> None:
        body: Any = model.get_base_model().base_model
        body.register_forward_hook(self._leave_trained)
        uncompiled: Any = torch.compiler.disable  # it would be compiled anew for every number of trained tokens
        model.base_model.register_forward_hook(uncompiled(self._score))
        if last_mlp is not None:
            last_mlp.register_forward_pre_hook(self._take_trained)
            last_mlp.register_forward_hook(self._put_back)
        self._trained: Tensor | None = None  # positions in the batch, flattened; None leaves all
        self._in_mlp: Tensor | None = None  # where these are among the tokens that the layers compute
        self._multiple = 1  # of so many, by zeros behind them
        self._shape = torch.Size()  # of the states that the last MLP's were taken from
        self._stays = False  # chosen, until a step is over
        self._targets: Tensor | None = None  # [trained]; None leaves logits as they are
        self._entropy = self._is_top1 = torch.empty(0)

    def choose(self, inputs: Mapping[str, Any], multiple: int = 1) -> dict[str, Any]:
        """The batch with `shift_labels` `[1, trained]` in place of `labels` `[batch, seq]`, and their positions kept.

        Of a multiple there are -100 at the end.
        """
        pad = nn.functional.pad
        targets = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        self._trained = (targets != IGNORE).nonzero().flatten()
        inverse = inputs.get("inverse")
        self._in_mlp = self._trained if inverse is None else inverse[self._trained].unique()
        self._multiple = multiple
        return {name: values for name, values in inputs.items() if name != "labels"} | {
            "shift_labels": pad(targets[self._trained], (0, -len(self._trained) % multiple), value=IGNORE)[None]
        }

    def scoring(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as TRL's trainer calls it, with the scores that the hook makes.

        The hook, because what comes out of `model` are logits that accelerate has copied to 32 bit.
        """

        def scored(*, shift_labels: Tensor, fused_lm_head: bool = False, **inputs: Any) -> Any:
            self._targets = shift_labels[0] if fused_lm_head else None
            output = model(**inputs)
            if not fused_lm_head:  # the trainer wants logits too
                return output
            return FusedCausalLMOutput(
                log_probs=output.logits,
                entropy=self._entropy,
                is_top1=self._is_top1,
                label_mask=shift_labels != IGNORE,
                aux_loss=output.get("aux_loss"),
            )

        return scored

    @contextmanager
    def step(self) -> Generator[None]:
        """In here what was chosen stays so for the backward pass too, which may compute layers again."""
        self._stays = True
        try:
            yield
        finally:
            self._stays = False
            self.rest()

    def rest(self) -> None:
        """Leaves states and logits as they are, until the next `choose`."""
        if not self._stays:
            self._trained = self._in_mlp = self._targets = None

    def _leave_trained(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._trained is not None:
            output.last_hidden_state = self._chosen(output.last_hidden_state, self._trained)
        return output

    def _take_trained(self, module: nn.Module, args: Any) -> Any:
        if self._in_mlp is None:
            return args
        self._shape = args[0].shape
        return (self._chosen(args[0], self._in_mlp),)

    def _put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Zeros elsewhere, which the residual is added to and nobody reads."""
        if self._in_mlp is None:
            return output
        everywhere = output.new_zeros(self._shape).flatten(0, 1)
        return everywhere.index_copy_(0, self._in_mlp, output[0, : len(self._in_mlp)]).view(self._shape)

    def _chosen(self, states: Tensor, places: Tensor) -> Tensor:
        """`[batch, seq, hidden]` → `[1, places, hidden]`."""
        chosen, extra = states.flatten(0, 1).index_select(0, places)[None], -len(places) % self._multiple
        return nn.functional.pad(chosen, (0, 0, 0, extra)) if extra else chosen

    def _score(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._targets is not None:
            log_probs, self._entropy, self._is_top1 = score(output.logits[0], self._targets)
            output.logits = log_probs[None]
        return output


def has_kernels(device: torch.device) -> bool:
    """Whether TRL's head has Triton kernels there, and scores in one pass."""
    return is_triton_available() and device.type in ("cuda", "xpu")


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How likely each target is, and how sure of it the model.

        >>> score(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        (tensor([-0.6931]), tensor([0.6931]), tensor([False]))

    Args:
        logits: `[tokens, vocabulary]`, of any floating dtype.
        targets: `[tokens]`, one id each, or -100 for no target.

    Returns:
        of each token, in 32 bit: the logarithm of its probability, by which gradients go back; the entropy; whether no other
        is as likely, or only later ones. Without a target, zeros, as of TRL's head.

    """
    wanted, none = logits if torch.is_grad_enabled() else logits.detach(), targets == IGNORE
    log_probs, entropy, is_top1 = _Scores.apply(wanted, targets.clamp(min=0))  # pyright: ignore[reportGeneralTypeIssues]
    return log_probs.masked_fill(none, 0), entropy.masked_fill(none, 0), is_top1 & ~none


class _Scores(torch.autograd.Function):
    """Block after block, and the logits' gradient with it, so that each logit is read once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, entropy = (torch.empty(len(targets), dtype=torch.float32, device=logits.device) for _ in range(2))
        is_top1 = torch.empty(len(targets), dtype=torch.bool, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for block in _blocks(logits):
            logs, wanted = torch.log_softmax(logits[block], -1, dtype=torch.float32), targets[block, None]
            probabilities = logs.exp()
            log_probs[block] = logs.gather(-1, wanted).squeeze(-1)
            entropy[block] = -(probabilities * logs).sum(-1)
            is_top1[block] = logs.argmax(-1) == targets[block]
            if gradient is not None:  # of the target's logarithm: 1 for the target itself, less each probability
                gradient[block] = probabilities.neg_().scatter_add_(-1, wanted, torch.ones_like(wanted, dtype=torch.float32))
        ctx.mark_non_differentiable(entropy, is_top1)
        ctx.save_for_backward(gradient)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, of_log_probs: Tensor, *_: Any
    ) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        for block in _blocks(gradient):  # in its place: it is as large as the logits, and has no other use
            gradient[block] = gradient[block].to(torch.float32).mul_(of_log_probs[block, None])
        return gradient, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that the cache holds, one run after the other."""
    tokens, words = logits.shape
    size = max(BLOCK // words, 1)
    for start in range(0, tokens, size):
        yield slice(start, start + size)
