from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import real_vocab
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import KINDS
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune import DatasetError, ModelError, MultimodalCollator, OutputError, export_model, load_recipe
from vlmtune.console import command_line
from vlmtune.data import load_data, spread
from vlmtune.export import command
from vlmtune.export.llama import interleaved, is_metas, params
from vlmtune.export.merged import open_merged
from vlmtune.families import find_family
from vlmtune.model import read_processor
from vlmtune.recipe import ModelSection
from vlmtune.serving import Serving, Template, digest, read_serving, write_serving

MakeMerged = Callable[..., Path]
FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
sys.path.insert(0, "tests")
from vlmtune.evaluation import probe
for directory in sys.argv[1:]:
    sees = "vision_config" in json.load(open(directory + "/config.json"))
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(directory)
    processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(directory)
    if sees:
        asked = probe(pictures=True)["messages"][:1]
        tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = processor.apply_chat_template(asked, add_generation_prompt=True, **tensors)
    else:
        batch = processor("What is this?", return_tensors="pt")
    new = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert new.shape[1] > batch["input_ids"].shape[1]
    print("generated", type(model).__name__, model.is_quantized)
"""


@pytest.fixture
def merged(checkpoint: Callable[[str], Path], recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> MakeMerged:
    """`merged("mllama")`: a directory as a merge leaves it; `recipe=False` without the recipe."""

    def make(kind: str = "qwen2_vl", *, recipe: bool = True, **overrides: Any) -> Path:
        directory = tmp_path / f"merged-{kind}"
        shutil.copytree(checkpoint(kind), directory, dirs_exist_ok=True)
        settle(directory, kind)
        if recipe:
            content = load_recipe(make_recipe(kind, **overrides)).to_yaml()
            (directory / "recipe.yaml").write_text(content, encoding="utf-8")
        return directory

    make_recipe = recipe
    return make


def settle(directory: Path, kind: str) -> None:
    """Saves the training template, as a merge does."""
    auto = transformers.AutoTokenizer if kind == "text" else transformers.AutoProcessor
    processor = auto.from_pretrained(directory)
    processor.chat_template = MultimodalCollator(processor).chat_template
    processor.save_pretrained(directory)


def load(directory: Path) -> Any:
    sees = "vision_config" in json.loads((directory / "config.json").read_text())
    return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(directory).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_that_of_the_model(merged: MakeMerged, tmp_path: Path, kind: str) -> None:
    directory = merged(kind)
    report = export_model(directory, tmp_path / "out")
    assert report.files == ("consolidated.pth",)
    saved = torch.load(tmp_path / "out" / "consolidated.pth", weights_only=True)
    own = load(directory).state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)


def test_an_export_has_all_that_the_merged_model_had_beside_its_weights(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged()
    (directory / "serving.json").write_text("{}")
    (directory / "manifest.json").write_text('{"files": {"model.safetensors": {}}}')
    export_model(directory, tmp_path / "out")
    left = {path.name for path in directory.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"model.safetensors", "manifest.json", "serving.json"}  # the last two are of those weights


def test_tied_weights_lie_under_both_names_and_once_in_the_file(tmp_path: Path) -> None:
    model = wide_model(vocabulary=5000, tied=True)
    model.save_pretrained(tmp_path / "merged")
    report = export_model(tmp_path / "merged", tmp_path / "out")
    model.load_state_dict(torch.load(tmp_path / "out" / "consolidated.pth", weights_only=True), strict=True)
    assert report.bytes_after < 1.1 * report.bytes_before


def test_a_state_dict_is_written_without_the_model_in_memory(tmp_path: Path) -> None:
    wide_model(vocabulary=400_000).save_pretrained(tmp_path / "merged")
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    report = export_model(tmp_path / "merged", tmp_path / "out")
    done.set()
    watching.join()
    assert report.bytes_after > 200e6
    assert peak - before < 60e6


def wide_model(vocabulary: int, *, tied: bool = False) -> transformers.Qwen2ForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=1, vocab_size=vocabulary)
    config.tie_word_embeddings = tied
    return transformers.Qwen2ForCausalLM(config)


def anonymous() -> int:
    """Bytes of memory that are no file's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_a_query_row_is_interleaved_with_its_half() -> None:
    assert interleaved(torch.arange(6)[:, None], heads=1).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_metas_own_arithmetic_on_the_exported_llama_gives_the_models_logits(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged("text")
    report = export_model(directory, tmp_path / "out")
    assert report.files == ("consolidated.00.pth",)
    weights = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    tokens = torch.tensor([[0, 9, 40, 3, 77, 9]])
    with torch.no_grad():
        expected = load(directory)(tokens).logits
    found = metas_llama(weights, json.loads((tmp_path / "out" / "params.json").read_text()), tokens)
    assert (found - expected).abs().max() < 1e-4
    assert expected.abs().max() > 1


def metas_llama(weights: dict[str, Tensor], args: dict[str, Any], tokens: Tensor) -> Tensor:
    """LLaMA as the paper and Meta's reference code have it: rotations of neighbouring pairs as complex numbers."""
    dim, heads, groups = args["dim"], args["n_heads"], args["n_heads"] // args["n_kv_heads"]
    size, length = dim // heads, tokens.shape[1]
    frequencies = args["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    turns = torch.polar(torch.tensor(1.0), torch.outer(torch.arange(length), frequencies))[None, :, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + args["norm_eps"]) * weight

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(args["n_layers"]):
        of = {name.removeprefix(f"layers.{layer}."): w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        h = norm(x, of["attention_norm.weight"])
        q, k, v = ((h @ of[f"attention.w{name}.weight"].T).unflatten(-1, (-1, size)) for name in "qkv")
        k, v = (kept.repeat_interleave(groups, dim=2) for kept in (turned(k), v))
        attended = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (turned(q), k, v)), is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2) @ of["attention.wo.weight"].T
        h = norm(x, of["ffn_norm.weight"])
        gate = F.silu(h @ of["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ of["feed_forward.w3.weight"].T)) @ of["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (4096, 14336), (5120, 13824), (8192, 28672), (2048, 8192), (64, 98), (3200, 8640), (2048, 2737)],
)
def test_metas_code_computes_the_width_from_params_json(dim: int, width: int) -> None:
    args = params(transformers.LlamaConfig(hidden_size=dim, intermediate_size=width, num_attention_heads=dim // 32))
    hidden = int(2 * (4 * dim) / 3)  # meta-llama/llama, llama/model.py, FeedForward
    hidden = int(args.get("ffn_dim_multiplier", 1) * hidden)
    assert args["multiple_of"] * -(-hidden // args["multiple_of"]) == width


def test_tensors_that_transformers_reads_over_are_left_out_and_named(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged("text")
    for place in (directory, shutil.copytree(directory, tmp_path / "strange")):
        weights = load_file(place / "model.safetensors")
        half = {name: tensor.bfloat16() for name, tensor in weights.items()}
        frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
        strange = {"model.layers.0.self_attn.other": torch.ones(8)} if place.name == "strange" else {}
        save_file({**half, **frequencies, **strange}, place / "model.safetensors", metadata={"format": "pt"})
    report = export_model(directory, tmp_path / "out")
    assert report.ignored == tuple(sorted(frequencies))
    saved = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    assert not any("inv_freq" in name for name in saved)
    assert len(saved) == len(half)
    assert open_merged(directory).dtype == torch.bfloat16
    assert export_model(directory, tmp_path / "nf4", format="nf4", rows=0).ignored == report.ignored
    assert not any("inv_freq" in name for name in load_file(tmp_path / "nf4" / "model.safetensors"))
    with pytest.raises(ModelError, match=r"strange: model.layers.0.self_attn.other is no parameter of a LlamaForCausalLM"):
        export_model(tmp_path / "strange", tmp_path / "other")


def test_a_llama_that_metas_code_cannot_run_keeps_its_names() -> None:
    plain = {"hidden_size": 64, "num_attention_heads": 4}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    assert is_metas(transformers.LlamaConfig(**plain))
    assert params(transformers.LlamaConfig(**plain, rope_parameters=scaled))["use_scaled_rope"]
    assert not is_metas(transformers.LlamaConfig(**plain, rope_parameters={**scaled, "factor": 32.0}))
    assert not is_metas(transformers.LlamaConfig(**plain, attention_bias=True))
    assert not is_metas(transformers.LlamaConfig(**plain, head_dim=32))
    assert not is_metas(transformers.MistralConfig(**plain))


@pytest.fixture(scope="module")
def copies(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """What each copy was made of, and where it lies."""
    root, made = tmp_path_factory.mktemp("copies"), {}
    for kind, form in (*((kind, "nf4") for kind in (*KINDS, "text")), ("mllama", "int8")):
        source, out = root / kind, root / f"{kind}-{form}"
        shutil.copytree(checkpoint(kind), source, dirs_exist_ok=True)
        settle(source, kind)
        report = export_model(source, out, format=form)
        assert report.bytes_after < 0.8 * report.bytes_before
        assert report.losses is not None
        assert report.losses.rows == "a probe, as there is no recipe"
        assert report.losses.logits
        assert 0 < abs(report.losses.after - report.losses.before) < 0.5
        made[out.name] = source, out
    return made


def test_quantised_copies_are_loaded_plainly_by_a_fresh_process_and_answer(copies: dict[str, tuple[Path, Path]]) -> None:
    places = [out for _, out in copies.values()]
    done = subprocess.run([sys.executable, "-c", FRESH, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("True") == len(places) == 5


@pytest.mark.parametrize("name", ["qwen2_vl-nf4", "mllama-nf4", "pixtral-nf4", "mllama-int8"])
def test_only_the_language_model_is_quantised(copies: dict[str, tuple[Path, Path]], name: str) -> None:
    source, out = copies[name]
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    quantised = {name for name in before if after[name].dtype in (torch.uint8, torch.int8)}
    layers = {name for name in before if re.match(r"(language_model\.)?model\.layers\.", name)}
    assert quantised == {name for name in layers if name.endswith("proj.weight")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - quantised)


def test_the_loss_is_compared_on_the_recipes_held_out_rows(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged(**{"data.eval_rows": 3})
    report = export_model(directory, tmp_path / "out", format="nf4", rows=2)
    assert report.losses is not None
    assert report.losses.rows.startswith("2 held-out rows of ")
    assert report.losses.logits is None
    own = load_recipe(directory / "recipe.yaml")
    held_out = load_data(own.data).held_out
    assert held_out is not None
    family = find_family("qwen2_vl")
    batch = MultimodalCollator(read_processor(own.model, family, directory), family)(spread(held_out, 2))
    for place, told in ((directory, report.losses.before), (tmp_path / "out", report.losses.after)):
        with torch.no_grad():
            assert load(place)(**batch).loss.item() == pytest.approx(told, abs=2e-3)
    assert report.losses.before != report.losses.after


def test_without_held_out_rows_it_is_compared_on_training_rows(merged: MakeMerged, tmp_path: Path) -> None:
    report = export_model(merged(), tmp_path / "out", format="int8", rows=2)
    assert report.losses is not None
    assert report.losses.rows.startswith("2 training rows of ")


def test_the_recipe_of_the_run_around_it_will_do(merged: MakeMerged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(merged(), run / "merged")
    (run / "merged" / "recipe.yaml").rename(run / "recipe.yaml")
    (run / "adapter_config.json").touch()
    report = export_model(run / "merged", tmp_path / "out", format="nf4", rows=1)
    assert report.losses is not None
    assert report.losses.rows.startswith("1 training rows of ")


def test_data_that_have_moved_are_named_and_not_needed_for_a_probe(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged(**{"data.source": str(tmp_path / "gone.jsonl")})
    with pytest.raises(DatasetError, match=r"gone.jsonl"):
        export_model(directory, tmp_path / "out", format="nf4")
    assert not (tmp_path / "out").exists()
    report = export_model(directory, tmp_path / "out", format="nf4", rows=0)
    assert report.losses is not None
    assert report.losses.rows == "a probe"


def test_what_is_no_merged_model_is_refused(merged: MakeMerged, tmp_path: Path) -> None:
    def refused(directory: Path, match: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            export_model(directory, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nowhere", "there is no directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"holds no merged model: config.json and model.safetensors are expected")
    (tmp_path / "empty" / "adapter_config.json").touch()
    refused(tmp_path / "empty", r"holds an adapter: merge it first, with `python -m vlmtune.merge .*empty MERGED`")
    directory = merged()
    refused(directory, r"format 'nf5' is none of state_dict, nf4, int8, gguf. Did you mean 'nf4'\?", format="nf5")
    export_model(directory, tmp_path / "nf4", format="nf4", rows=0)
    refused(tmp_path / "nf4", "is quantised already", format="int8")


def test_a_shard_that_is_missing_or_cut_is_named(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged()
    load(directory).save_pretrained(directory, max_shard_size="100KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    first = sorted(directory.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(ModelError, match=f"is not whole: {first.name} is missing"):
        export_model(directory, tmp_path / "out")
    first.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=f"{first.name} cannot be read"):
        export_model(directory, tmp_path / "out")
    first.write_bytes(whole)
    assert export_model(directory, tmp_path / "out").bytes_before > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_copys_contract_starts_the_copy(merged: MakeMerged, tmp_path: Path, kind: Literal["nf4", "int8"]) -> None:
    directory = merged("text")
    model = ModelSection(name="shop/base", family="text", dtype="float32")
    template = Template(sha256=digest((directory / "chat_template.jinja").read_text()))
    given = Serving(
        kind="merged", name="shop", model=model, lora_rank=None, pixels={}, chat_template=template, tool_parser=None,
        system=None, prompt=None, stop=[], bos=None, context=None, longest_row=None, max_new_tokens=8,
    )  # fmt: skip
    write_serving(directory, given, directory)
    export_model(directory, tmp_path / "out", format=kind, rows=0)
    found = read_serving(tmp_path / "out")
    assert (found.kind, found.name, found.model.quantization) == ("merged", "shop", kind)
    lines = json.loads((tmp_path / "out" / "serving.json").read_text())["commands"]
    assert all(str(tmp_path / "out") in line and str(directory) not in line for line in lines.values())


def test_python_beside_the_model_is_run_only_when_the_caller_says_so(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged("text", **{"model.trust_remote_code": True})  # the recipe beside it is no caller
    (directory / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    for form in ("state_dict", "nf4"):
        with pytest.raises(ModelError, match=r"Python of its own, which is not run unasked: .* --trust-remote-code") as caught:
            export_model(directory, tmp_path / "out", format=form)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert export_model(directory, tmp_path / "out", trust_remote_code=True).files == ("consolidated.pth",)
    assert (tmp_path / "ran").exists()


def test_an_earlier_export_is_not_overwritten_unasked_and_the_merged_model_never(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged()
    (directory / ".vlmtune").touch()
    export_model(directory, tmp_path / "out")
    with pytest.raises(OutputError, match="is not empty"):
        export_model(directory, tmp_path / "out")
    export_model(directory, tmp_path / "out", overwrite=True)
    for place in (directory, tmp_path):
        with pytest.raises(OutputError, match="holds the merged model itself"):
            export_model(directory, place, overwrite=True)


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    merged: MakeMerged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="the disk is full while writing"):
        export_model(merged(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["merged-qwen2_vl"]


def test_gguf_says_what_it_needs_and_what_llama_cpp_does_not_know(merged: MakeMerged, tmp_path: Path) -> None:
    for directory, sources, match in (
        (merged("mllama"), tmp_path, "Llama-3.2-Vision, which llama.cpp does not run"),
        (merged("qwen2_vl"), None, "name its sources with --llama-cpp"),
        (tmp_path / "merged-qwen2_vl", tmp_path, r"convert_hf_to_gguf.py is missing"),
    ):
        with pytest.raises(ModelError, match=match):
            export_model(directory, tmp_path / "out", format="gguf", llama_cpp=sources)
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted(merged: MakeMerged, tmp_path: Path) -> None:
    directory = merged()
    for code, said in (
        ("import sys; sys.exit('Model Foo is not supported')", "Model Foo is not supported$"),
        ("import absent_module", r"No module named 'absent_module': `pip install 'vlmtune\[gguf\]'`$"),
    ):
        (tmp_path / "convert_hf_to_gguf.py").write_text(code)
        with pytest.raises(ModelError, match=f"llama.cpp's converter failed on .*: .*{said}"):
            export_model(directory, tmp_path / "out", format="gguf", llama_cpp=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_became_of_size_and_loss_and_a_mistake_in_one_line(
    merged: MakeMerged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(merged()), str(tmp_path / "out"), "--format", "nf4", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        command_line(export=command)
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert re.search(r"MB, \d+% of the [\d.]+ MB before", shown)
    assert re.search(r"loss [\d.]+, [+-][\d.]+, on 2 training rows of", shown)
    with pytest.raises(SystemExit, match="2"):
        command_line(export=command)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: output directory")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", ["qwen2_vl", "pixtral", "text"])
def test_gguf_of_llama_cpps_converter_has_every_weight_of_the_model(tmp_path: Path, kind: str) -> None:
    """With the real vocabularies: the converter knows tokenizers by what they do. LLaMA has Llama 3's."""
    directory, sources = real_model(kind, tmp_path / "merged"), llama_cpp()
    export_model(directory, tmp_path / "out", format="gguf", llama_cpp=sources)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    command = [sys.executable, "-c", READ_GGUF, sources / "gguf-py", tmp_path / "gguf.pt", *files]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    found = torch.load(tmp_path / "gguf.pt", weights_only=True)
    written = [fingerprint(tensor) for tensor in found.values()]
    for name, tensor in load_file(directory / "model.safetensors").items():
        parts = as_llama_cpp_has_it(name, tensor)
        assert all(fingerprint(part) in written for part in parts), name
    if kind == "pixtral":
        embeddings = load_file(directory / "model.safetensors")["language_model.model.embed_tokens.weight"]
        assert torch.equal(found["v.token_embd.img_break"], embeddings[12].float())  # [IMG_BREAK]


READ_GGUF = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from gguf import GGUFReader, dequantize
tensors = {}
for path in sys.argv[3:]:
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).clone()
torch.save(tensors, sys.argv[2])
"""


def fingerprint(tensor: Tensor) -> tuple[int, float]:
    """The same for all orders of the same values."""
    return tensor.numel(), float(tensor.double().flatten().sort().values @ torch.arange(tensor.numel(), dtype=torch.double))


def as_llama_cpp_has_it(name: str, tensor: Tensor) -> list[Tensor]:
    """Qwen2-VL's joint projections and patches of two frames are cut apart."""
    if ".qkv." in name:
        return list(tensor.chunk(3))
    return [tensor[:, :, 0], tensor[:, :, 1]] if "patch_embed" in name else [tensor]


def real_model(kind: str, directory: Path) -> Path:
    """A small model with the real vocabulary and a tower of three layers: of two, the converter takes names for another's."""
    processor = real_vocab.real_processor("mllama" if kind == "text" else kind)
    tokenizer = processor.tokenizer
    model: Any = tiny.make_model(kind, len(tokenizer), tokenizer)
    if kind != "text":
        config = model.config
        setattr(config.vision_config, "depth" if kind == "qwen2_vl" else "num_hidden_layers", 3)
        model = type(model)(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    (tokenizer if kind == "text" else processor).save_pretrained(directory)
    return directory


def llama_cpp() -> Path:
    """The sources of llama.cpp that the source package of llama-cpp-python brings."""
    target = real_vocab.cache_directory() / "llama.cpp-0.3.36"

    def fetch(place: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            real_vocab.pip("download", "--no-deps", "--no-binary=:all:", "--dest", folder, "llama-cpp-python==0.3.36")
            (package,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
            shutil.move(next(Path(folder).glob("*/vendor/llama.cpp")), place)

    real_vocab.made_once(target, fetch)
    return target
