"""What lies beside the merged weights: config, generation config, processor, recipe, licences, manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from vlmtune.errors import ModelError
from vlmtune.families import Family
from vlmtune.merge.adapter import Adapter
from vlmtune.merge.stream import Layout, Written
from vlmtune.model import Processor, read_processor, skeleton
from vlmtune.output import MARK, write_json
from vlmtune.recipe import ModelSection
from vlmtune.serving import carry_serving

MANIFEST = "manifest.json"
KEPT = ("LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")  # of the base: its terms, and code of its own


@dataclass(frozen=True)
class Beside:
    """The directory of a merged model, but for its weights."""

    directory: Path  # unfinished
    out_dir: Path  # what it is to become
    section: ModelSection
    family: Family
    adapter: Adapter
    base_dir: Path

    def write(
        self,
        config: Any,
        model: PreTrainedModel,
        processor: Processor,
        layout: Layout,
        stop_token: int,
        *,
        base: str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """All of it but the manifest. `model` is the base without weights; None: what the adapter says, the base's dtype."""
        _config_of_merged(config, model, untied=layout.untied, dtype=dtype).save_pretrained(str(self.directory))
        self._generation_config(stop_token).save_pretrained(str(self.directory))
        processor.save_pretrained(str(self.directory))
        for pattern in KEPT:
            for path in self.base_dir.glob(pattern):
                shutil.copyfile(path, self.directory / path.name)
        named = str(dtype).removeprefix("torch.") if dtype else None
        carry_serving(self.adapter.directory, self.directory, self.out_dir, base=base, dtype=named)

    def _generation_config(self, stop_token: int) -> GenerationConfig:
        """The adapter's or the base's, with the stop token that the chat template ends answers with."""
        for directory in (self.adapter.directory, self.base_dir):
            if (directory / "generation_config.json").exists():
                generation = GenerationConfig.from_pretrained(str(directory))
                break
        else:
            generation = GenerationConfig()
        own = generation.eos_token_id
        listed = own if isinstance(own, list) else [own]
        generation.eos_token_id = sorted({stop_token, *(token for token in listed if token is not None)})
        try:
            generation.validate(strict=True)
        except ValueError:  # a temperature without do_sample, as older checkpoints have it
            generation.do_sample = True
        return generation

    def check(self, processor: Processor, layout: Layout, stop_token: int) -> None:
        """Reads all of it back.

        Raises:
            ModelError: it is not what was to be written.

        """
        config = AutoConfig.from_pretrained(str(self.directory), trust_remote_code=self.section.trust_remote_code)
        tied = skeleton(self.section, self.family, config).all_tied_weights_keys
        written = {target.entry.name for target in layout.targets}
        template = read_processor(self.section, self.family, self.directory).chat_template
        stops = GenerationConfig.from_pretrained(str(self.directory)).eos_token_id or []
        faults = {
            "its head would be tied to its embeddings again": layout.untied and not written.isdisjoint(tied),
            "its chat template is another than the adapter's": template != processor.chat_template,
            "generation would not stop at its stop token": stop_token not in stops,
        }
        for fault, found in faults.items():
            if found:
                raise ModelError(f"the merged model is not as it should be: {fault}; nothing was written")

    def write_manifest(self, written: Written) -> None:
        """Of what the model was made, and the SHA-256 of each of its files."""
        hashes = {
            path.name: written.hashes.get(path.name) or _sha256(path)
            for path in sorted(self.directory.iterdir())
            if path.is_file() and not path.name.startswith(".")
        }
        content = {
            "vlmtune": version("vlmtune"),
            "base": {
                "name": self.section.name,
                "revision": self.section.revision,
                "files": {path.name: path.stat().st_size for path in sorted(self.base_dir.glob("*.safetensors"))},
            },
            "adapter": {"directory": str(self.adapter.directory), "sha256": _sha256(self.adapter.path)},
            "changed": len(written.largest),
            "files": {
                name: {"bytes": (self.directory / name).stat().st_size, "sha256": digest} for name, digest in hashes.items()
            },
        }
        write_json(self.directory / MANIFEST, content)
        (self.directory / MARK).touch()


def _config_of_merged(config: Any, model: PreTrainedModel, *, untied: bool, dtype: torch.dtype | None) -> Any:
    config.architectures = config.architectures or [type(model).__name__]
    parts = [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
    for part in parts:
        if untied:
            part.tie_word_embeddings = False
        if dtype is not None:
            part.dtype = dtype
    return config


def fingerprint(layout: Layout, adapter: Adapter) -> str:
    """All that the weights of a merge depend on, in a word."""
    sources = {target.source.path for target in layout.targets}
    content = {
        "vlmtune": version("vlmtune"),
        "base": sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sources),
        "adapter": [_sha256(adapter.path), _sha256(adapter.directory / "adapter_config.json")],
        "files": {name: [str(target.entry) for target in targets] for name, targets in layout.files.items()},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
