"""GGUF, as llama.cpp's own converter writes it.

https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
https://github.com/ggml-org/llama.cpp/blob/master/docs/multimodal.md
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmtune.console import bar
from vlmtune.errors import ModelError
from vlmtune.export.merged import Merged
from vlmtune.model import read_processor

CONVERTER = "convert_hf_to_gguf.py"
UNKNOWN = {"mllama": "Llama-3.2-Vision"}  # cross-attention, which llama.cpp does not have
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
MODEL, EYES = "model.gguf", "mmproj.gguf"  # llama.cpp has vision tower and projector in a file of their own
WHERE = "a clone of github.com/ggml-org/llama.cpp, or vendor/llama.cpp in the source package of llama-cpp-python"


def write_gguf(merged: Merged, out: Path, sources: Path | None) -> None:
    """Writes model.gguf and, of a model that sees, mmproj.gguf, in the dtype of the weights.

    Args:
        merged: the model.
        out: an empty directory.
        sources: of llama.cpp.

    Raises:
        ModelError: no sources, or llama.cpp does not convert such a model.

    """
    _refuse(merged, sources)
    with tempfile.TemporaryDirectory(dir=out) as stage:
        runs = [[str(merged.directory), "--outfile", str(out / MODEL)]]
        if merged.family.takes_images:
            eyes = _eyes_of_pixtral(merged, Path(stage)) if merged.family.name == "pixtral" else merged.directory
            runs.append([str(eyes), "--outfile", str(out / EYES), "--mmproj"])
        for run in bar(runs, "Converting"):
            command = [sys.executable, str(sources / CONVERTER), *run, "--outtype", TYPES[merged.dtype]]  # type: ignore[operator]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                hint = ": `pip install 'vlmtune[gguf]'`" if "No module named" in said else ""
                raise ModelError(f"llama.cpp's converter failed on {merged.directory}: {said}{hint}")


def _refuse(merged: Merged, sources: Path | None) -> None:
    name = merged.config.model_type
    if name in UNKNOWN:
        raise ModelError(f"{merged.directory} is a {UNKNOWN[name]}, which llama.cpp does not run: there is no GGUF of it")
    if sources is None:
        raise ModelError(f"GGUF is written by llama.cpp's converter: name its sources with --llama-cpp, {WHERE}")
    if not (sources / CONVERTER).exists():
        raise ModelError(f"{sources} holds no sources of llama.cpp, {CONVERTER} is missing: name {WHERE}")


def _eyes_of_pixtral(merged: Merged, stage: Path) -> Path:
    """What the converter makes Pixtral's mmproj.gguf of, in a directory of its own.

    It takes the embedding of `[IMG_BREAK]` from the language model's, and has left these out before it comes to that (seen
    in the versions of 2026): llama.cpp then refuses the file. So the embeddings up to that token stand beside the eyes, under a
    name that is not left out.
    https://github.com/ggml-org/llama.cpp/blob/master/conversion/base.py (`MmprojModel.filter_tensors`)
    """
    merged.copy_rest(stage)
    tokenizer = read_processor(merged.section, merged.family, merged.directory).tokenizer
    tensors = merged.tensors()
    (embeddings,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    eyes = {name: tensor for name, tensor in tensors.items() if merged.family.sees.match(name)}
    rows = embeddings[: tokenizer.convert_tokens_to_ids("[IMG_BREAK]") + 1].clone()
    save_file({**eyes, "embed_tokens.weight": rows}, stage / "model.safetensors", metadata={"format": "pt"})
    return stage
