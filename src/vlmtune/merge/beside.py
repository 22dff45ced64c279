"""What lies beside the merged weights: config, generation config, processor, recipe, licences, manifest."""

from __future__ import annotations

import copy
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from vlmtune.errors import ModelError
from vlmtune.evaluation import stop_token_ids
from vlmtune.merge.adapter import Adapter
from vlmtune.merge.base import Base
from vlmtune.merge.stream import Layout, Written
from vlmtune.model import read_processor, savable, skeleton
from vlmtune.output import MANIFEST, sha256, write_json

KEPT = ("LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")  # of the base: its terms, and code of its own


def write_beside(directory: Path, base: Base, adapter: Adapter, *, untied: bool, dtype: torch.dtype | None) -> None:
    """Config, generation config, processor, and what of the base belongs to its weights.

    Args:
        directory: where the merged weights are.
        base: what was merged into.
        adapter: what was merged.
        untied: embeddings and head were one weight, and are two now.
        dtype: that was chosen for all weights; None: the base's.

    """
    _merged_config(base, untied=untied, dtype=dtype).save_pretrained(str(directory))
    _generation_config(base, adapter).save_pretrained(str(directory))
    base.processor.save_pretrained(str(directory))
    for pattern in KEPT:
        for path in base.directory.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def _merged_config(base: Base, *, untied: bool, dtype: torch.dtype | None) -> Any:
    config = copy.deepcopy(base.config)
    config.architectures = config.architectures or [type(base.model).__name__]
    for part in (config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)):
        if untied:
            part.tie_word_embeddings = False
        if dtype is not None:
            part.dtype = dtype
    return config


def _generation_config(base: Base, adapter: Adapter) -> GenerationConfig:
    """The adapter's or the base's, with the stop token that the chat template ends answers with."""
    there = [path for path in (adapter.directory, base.directory) if (path / "generation_config.json").exists()]
    generation = GenerationConfig.from_pretrained(str(there[0])) if there else GenerationConfig()
    generation.eos_token_id = stop_token_ids(generation, base.collator)
    return savable(generation)


def check_beside(directory: Path, base: Base, layout: Layout) -> None:
    """Reads back what lies beside the weights.

    Raises:
        ModelError: it is not what was to be written.

    """
    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=base.section.trust_remote_code)
    tied = skeleton(base.section, base.family, config).all_tied_weights_keys
    written = {target.entry.name for target in layout.targets}
    template = read_processor(base.section, base.family, directory).chat_template
    stops = GenerationConfig.from_pretrained(str(directory)).eos_token_id or []
    faults = {
        "its head would be tied to its embeddings again": layout.untied and not written.isdisjoint(tied),
        "its chat template is another than the adapter's": template != base.processor.chat_template,
        "generation would not stop at its stop token": base.collator.stop_token_id not in stops,
    }
    for fault, found in faults.items():
        if found:
            raise ModelError(f"the merged model is not as it should be: {fault}; nothing was written")


def write_manifest(directory: Path, base: Base, adapter: Adapter, written: Written) -> None:
    """Of what the model was made, and the size and SHA-256 of each file in the directory."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")]
    content = {
        "vlmtune": version("vlmtune"),
        "base": {
            "name": base.section.name,
            "revision": base.section.revision,
            "files": {path.name: path.stat().st_size for path in base.files},
        },
        "adapter": {"directory": str(adapter.directory), "sha256": sha256(adapter.path)},
        "changed": len(written.moved),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": written.hashes.get(path.name) or sha256(path)} for path in files
        },
    }
    write_json(directory / MANIFEST, content)
