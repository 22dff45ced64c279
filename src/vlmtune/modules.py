"""Modules that take the place of others in a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_modules(model: nn.Module, made_of: Callable[[nn.Module], nn.Module | None]) -> int:
    """Puts what `made_of` makes of a module in its place; one for which it returns None, or with somebody's hooks, stays.

    Returns:
        how many were replaced.

    """
    free = [(name, module) for name, module in model.named_modules() if not _is_hooked(module)]
    made = [(name, new) for name, module in free if (new := made_of(module)) is not None]
    for name, new in made:
        model.set_submodule(name, new)
    return len(made)


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    return bool(hooks) or "forward" in vars(module)
