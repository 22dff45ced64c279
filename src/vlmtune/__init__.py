"""Fine-tune open vision-language models on one 24 GB GPU.

    from vlmtune import finetune
    run = finetune("recipes/qwen2vl_amazon.yaml")

Names are imported when they are first used (PEP 562), so that `import vlmtune` costs nothing.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmtune.collator import MultimodalCollator
    from vlmtune.errors import DatasetError, ImageError, ModelError, OutputError, RecipeError, VlmtuneError
    from vlmtune.export import export_model
    from vlmtune.families import Family
    from vlmtune.merge import merge_adapter
    from vlmtune.messages import format_messages
    from vlmtune.model import load_model
    from vlmtune.plan import make_plan
    from vlmtune.plan.forecast import Plan
    from vlmtune.recipe import Recipe, load_recipe
    from vlmtune.result import Run
    from vlmtune.training import finetune

# on CPUs it says at every import that an optional kernel for inference is missing, which training does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# and in int8, at every product, that bfloat16 is multiplied as float16
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

_HOMES = {
    "DatasetError": "errors",
    "Family": "families",
    "ImageError": "errors",
    "ModelError": "errors",
    "MultimodalCollator": "collator",
    "OutputError": "errors",
    "Plan": "plan.forecast",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Run": "result",
    "VlmtuneError": "errors",
    "export_model": "export",
    "finetune": "training",
    "format_messages": "messages",
    "load_model": "model",
    "load_recipe": "recipe",
    "make_plan": "plan",
    "merge_adapter": "merge",
}

__all__ = [
    "DatasetError",
    "Family",
    "ImageError",
    "ModelError",
    "MultimodalCollator",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Run",
    "VlmtuneError",
    "export_model",
    "finetune",
    "format_messages",
    "load_model",
    "load_recipe",
    "make_plan",
    "merge_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
