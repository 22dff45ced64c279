"""What the head and its loss take on this CPU, forward and backward: as TRL does it there, and as vlmtune does.

OMP_NUM_THREADS=1 python benchmarks/head.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from clock import milliseconds
from pages import markdown
from torch import Tensor
from torch.nn import functional as F
from trl.kernels import ChunkedLogProbFunction

from vlmtune.head import score

CHUNK = 32768  # words of the vocabulary, as TRL calls it
SIZES = {  # hidden size, vocabulary, trained tokens
    "an eighth of Qwen2-VL-7B": (448, 2716, 1300),
    "a quarter": (896, 5432, 1300),
    "Qwen2-VL-7B": (3584, 152064, 200),
}


def main() -> None:
    header = ["head of", "tokens", "TRL's, ms", "vlmtune's, ms", "times faster"]
    print(markdown(header, measured(), words=1))


def measured() -> Iterator[list[str]]:
    for name, (width, words, tokens) in SIZES.items():
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.randn(words, width, dtype=torch.bfloat16) / width**0.5, torch.randint(words, (tokens,))
        theirs, ours = (took(loss, hidden, weight, targets) for loss in (trls_loss, our_loss))
        yield [name, str(tokens), f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.1f}"]


def trls_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    outputs = ("log_probs", "entropy", "is_top1")
    return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)[0].mean()


def our_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -score(F.linear(hidden, weight), targets)[0].mean()


def took(loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    return milliseconds(lambda: torch.autograd.grad(loss(hidden, weight, targets), hidden))


if __name__ == "__main__":
    main()
