from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import KINDS, make_processor
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtune import ModelError, OutputError, finetune, merge_adapter
from vlmtune.merge import adapter as adapter_module
from vlmtune.merge import stream
from vlmtune.merge.direct import ROOM, WrittenOnce
from vlmtune.merge.weights import BLOCK, stored
from vlmtune.result import Run

MakeRecipe = Callable[..., dict[str, Any]]

FRESH = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmtune import MultimodalCollator
from vlmtune.data import load_data
from vlmtune.recipe import load_recipe
merged, adapter, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(merged)
rows = load_data(load_recipe(adapter + "/recipe.yaml").data).train
batch = MultimodalCollator(AutoProcessor.from_pretrained(merged))([rows[0], rows[1]])
batch.pop("labels")
torch.save(model(**batch).logits.detach(), out)
"""


@pytest.fixture
def trained(recipe: MakeRecipe) -> Callable[..., Run]:
    def train(kind: str = "qwen2_vl", **overrides: Any) -> Run:
        return finetune(recipe(kind, **{"train.max_steps": 3, "train.save_strategy": "no", **overrides}))

    return train


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def edit(run: Run, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = run.adapter_dir / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_loads_the_merged_model_plainly_and_gets_the_adapters_logits(
    trained: Callable[..., Run], tmp_path: Path, kind: str
) -> None:
    run = trained(kind)
    merge_adapter(run.adapter_dir, tmp_path / "merged")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "merged", run.adapter_dir, tmp_path / "logits.pt"], check=True)
    batch = run.prompter([run.train_rows[0], run.train_rows[1]])
    batch.pop("labels")
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("setting", ["use_rslora", "use_dora"])
def test_rank_stabilised_and_weight_decomposed_adapters_merge_too(
    trained: Callable[..., Run], tmp_path: Path, setting: str
) -> None:
    run = trained(**{f"lora.{setting}": True})
    assert merge_adapter(run.adapter_dir, tmp_path / "merged").largest_difference <= 1e-4


def test_the_merged_dtype_can_be_chosen(trained: Callable[..., Run], tmp_path: Path) -> None:
    merge_adapter(trained().adapter_dir, tmp_path / "merged", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_larger_than_the_memory_for_blocks_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Memory is used again after some blocks: none may be overwritten before it was written."""
    config = LlamaConfig(vocab_size=100_000, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    make_processor("text").save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    tuned.base_model.model.config.name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), tuned.merge_and_unload().state_dict()
    assert torch.equal(merged["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert (merged["lm_head.weight"].float() - expected["lm_head.weight"].float()).abs().max() <= 0.02  # PEFT rounds twice


class WithoutDirect(FileIO):
    """A file on a system that opens it with O_DIRECT and then does not write it."""

    def write(self, data: Any, /) -> int:
        if fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data)


def not_opened(path: Any, flags: int, *rest: Any, open: Any = os.open) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return open(path, flags, *rest)


@pytest.mark.parametrize("refused", ["nothing", "always", "to open", "to write"])
def test_a_file_is_written_byte_by_byte_with_and_without_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """As file systems are: some have O_DIRECT, some refuse it when a file is opened, some when it is written."""
    if refused == "always":
        monkeypatch.delattr("os.O_DIRECT", raising=False)
    elif refused == "to open":
        monkeypatch.setattr("os.open", not_opened)
    elif refused == "to write":
        monkeypatch.setattr("vlmtune.merge.direct.FileIO", WithoutDirect)
    chance = random.Random(0)
    pieces = [chance.randbytes(chance.randrange(1, 2 * ROOM // 5)) for _ in range(20)]
    with WrittenOnce(tmp_path / "file") as file:
        for piece in pieces:
            file.write(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_what_is_only_copied_comes_in_blocks_of_one_size_however_large_its_rows_are(tmp_path: Path) -> None:
    """A row of fused experts is a whole expert: dozens of them wait to be written."""
    save_file({"experts": torch.randn(3, 1024, 2048).bfloat16()}, tmp_path / "file.safetensors")
    (experts,) = stored(tmp_path / "file.safetensors")
    blocks = [rows.clone() for _, _, rows in stream._blocks([stream.Target(experts, experts)])]
    assert max(block.nbytes for block in blocks) <= BLOCK
    assert torch.equal(torch.cat(blocks).view(experts.shape), load_file(tmp_path / "file.safetensors")["experts"])


def test_after_an_error_nothing_more_is_written(tmp_path: Path) -> None:
    """A thread that still has blocks to write must not write them into the next file that is opened."""
    with pytest.raises(KeyboardInterrupt), WrittenOnce(tmp_path / "file") as file:
        raise KeyboardInterrupt
    with (tmp_path / "other").open("wb"), pytest.raises(ValueError, match="closed file"):
        file.write(torch.zeros(ROOM, dtype=torch.uint8))
    assert (tmp_path / "other").stat().st_size == 0


def test_an_adapter_that_changes_nothing_is_refused(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    edit(run, lambda tensors: {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()})
    with pytest.raises(ModelError, match="the adapter changes no weight of its base"):
        merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_keys_match_no_module_is_refused(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    edit(run, lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()})
    with pytest.raises(ModelError, match=r"14 of 28 tensors of the adapter in .* match no weight of its base.*layers\.7"):
        merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(
    trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    run = trained("qwen2_vl")
    with pytest.raises(ModelError, match=r"match no weight of its base|does not fit its base"):
        merge_adapter(run.adapter_dir, tmp_path / "merged", base=str(checkpoint("mllama")))


def test_a_moved_base_can_be_named(trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "old")
    run = trained(**{"model.name": str(tmp_path / "old")})
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ModelError, match="there is no such directory"):
        merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert merge_adapter(run.adapter_dir, tmp_path / "merged", base=str(tmp_path / "new")).modules == 14


def test_base_and_adapter_are_not_touched(
    trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    run = trained()
    before = hashes(checkpoint("qwen2_vl")), hashes(run.adapter_dir)
    merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert (hashes(checkpoint("qwen2_vl")), hashes(run.adapter_dir)) == before


def test_the_manifest_has_the_hash_of_every_file(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    merge_adapter(run.adapter_dir, tmp_path / "merged", max_shard_size="100KB")
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    listed = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    there = hashes(tmp_path / "merged")
    assert listed == {name: digest for name, digest in there.items() if name not in ("manifest.json", ".vlmtune")}
    assert manifest["changed"] == 14
    assert sum(name.endswith(".safetensors") for name in listed) > 5


def test_the_merged_directory_has_what_serving_and_parity_need(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    merge_adapter(run.adapter_dir, tmp_path / "merged")
    merged = tmp_path / "merged"
    assert (merged / "recipe.yaml").read_text() == (run.adapter_dir / "recipe.yaml").read_text()
    assert (merged / "chat_template.jinja").read_text() == (run.adapter_dir / "chat_template.jinja").read_text()
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert run.prompter.stop_token_id in stops


def test_the_terms_and_the_code_of_the_base_come_along(
    trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    base = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "base")
    (base / "LICENSE.txt").write_text("terms")
    (base / "README.md").write_text("a card")
    run = trained(**{"model.name": str(base)})
    merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "terms"
    assert not (tmp_path / "merged" / "README.md").exists()


def test_a_wrong_weight_is_found_before_the_directory_appears(
    trained: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    monkeypatch.setattr(adapter_module, "scaling", lambda *_: 2.001)  # 2 is right
    with pytest.raises(ModelError, match=r"the merged .*proj.weight is not base \+ adapter"):
        merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_quantised_base_is_refused(trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    run = trained()
    base = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": four_bit}))
    with pytest.raises(ModelError, match=r"the base .* is quantised: name the one that is not"):
        merge_adapter(run.adapter_dir, tmp_path / "merged", base=str(base))


@pytest.mark.parametrize("size", ["5", "0GB", "many"])
def test_a_size_that_is_none_is_refused(trained: Callable[..., Run], tmp_path: Path, size: str) -> None:
    with pytest.raises(ModelError, match=r"max_shard_size .* is no size: write it as 5GB or 500MB"):
        merge_adapter(trained().adapter_dir, tmp_path / "merged", max_shard_size=size)


def test_a_base_whose_file_is_cut_short_is_named(
    trained: Callable[..., Run], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    run = trained()
    base = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "base")
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(ModelError, match=r"model.safetensors has 200,000 bytes where its header says .*: it is not whole"):
        merge_adapter(run.adapter_dir, tmp_path / "merged", base=str(base))


def test_an_earlier_result_is_not_overwritten_unasked(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    merge_adapter(run.adapter_dir, tmp_path / "merged")
    with pytest.raises(OutputError, match=r"output directory .*merged is not empty"):
        merge_adapter(run.adapter_dir, tmp_path / "merged")
    merge_adapter(run.adapter_dir, tmp_path / "merged", overwrite=True)


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter: adapter_config.json is missing"):
        merge_adapter(tmp_path, tmp_path / "merged")


def test_the_command_line_prints_the_largest_difference(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained()
    command = [sys.executable, "-m", "vlmtune.merge", str(run.adapter_dir), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "they equal base + adapter, rounded once" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert again.stderr.startswith("error: output directory")
