"""The doctor: every planted fault is found by name, in its row, with a remedy; and the healthy are left in peace."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vlmtune import ModelError, MultimodalCollator, finetune, load_recipe
from vlmtune.checks import Finding, Patient, look
from vlmtune.console import command_line, console
from vlmtune.data import Rows, Split, spread
from vlmtune.doctor import CHECKS, Report, admit, after_training, at_start, command, examine, examined
from vlmtune.model import load_processor

ROOT = Path(__file__).parents[1]
KINDS = ("qwen2_vl", "mllama", "pixtral", "text", "smolvlm", "qwen2_5_vl")
QWEN = ("qwen2_vl", "qwen2_5_vl")  # their template adds a system prompt
MakeRecipe = Callable[..., dict[str, Any]]
Admit = Callable[..., Patient]
TURN = "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
PARTS = "{% for p in m.content %}{{ '<|image_pad|>' if p.type == 'image' else p.text }}{% endfor %}"
ANSWER = "{% generation %}" + PARTS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chat_template(*, turn: str = TURN, parts: str = PARTS, answer: str = ANSWER, prompt: str = PROMPT) -> str:
    """A training template of Qwen's shape; a piece may be exchanged for a faulty one."""
    asked = f"{parts}{{{{ '<|im_end|>\\n' }}}}"
    return (
        f"{{% for m in messages %}}{turn}{{% if m.role == 'assistant' %}}{answer}"
        f"{{% else %}}{asked}{{% endif %}}{{% endfor %}}{prompt}"
    )


@pytest.fixture
def admitted(recipe: MakeRecipe) -> Admit:
    """`admitted("mllama", template=..., **{"lora.r": 4})`: the patient of a small run, with a chat template of one's own."""

    def make(kind: str = "qwen2_vl", *, template: str | None = None, **overrides: Any) -> Patient:
        checked = load_recipe(recipe(kind, **overrides))
        processor, family = load_processor(checked)
        if template is not None:
            processor.chat_template = template
        return admit(checked, processor, family)

    return make


def told(patient: Patient, check: str) -> Finding:
    """What one check says, the worst first."""
    found = look({check: CHECKS[check]}, patient)
    return max(found, key=lambda finding: ("ok", "warning", "failure").index(finding.verdict))


def with_rows(patient: Patient, rows: Sequence[Mapping[str, Any]]) -> Patient:
    """The patient with rows of one's own, `{"messages": [...]}`, read as row 1, 2, … of given.jsonl."""
    content = Rows(rows, "given.jsonl", Path(), {"format": "openai"}, range(len(rows)))
    return replace(patient, split=Split(content, None), rows=spread(content, 64))


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}


def conversation(*answers: str) -> dict[str, Any]:
    return {"messages": [message for answer in answers for message in (said("user", "What?"), said("assistant", answer))]}


class Broken(MultimodalCollator):
    """A collator whose labels are spoilt afterwards."""

    def __init__(self, patient: Patient, spoil: Callable[[dict[str, Any], MultimodalCollator], None]) -> None:
        super().__init__(patient.collator.processor, patient.collator.family)
        self.spoil = spoil

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        self.spoil(batch, self)
        return batch


# ---- the healthy


@pytest.mark.parametrize("kind", KINDS)
def test_no_alarm_about_a_healthy_run(recipe: MakeRecipe, kind: str) -> None:
    report = examine(recipe(kind, **{"data.eval_rows": 2}))
    assert report.failures == ()
    assert [finding.check for finding in report.warnings] == ["template: default system prompt"] * (kind in QWEN)
    assert {finding.check for finding in report.findings} == {*CHECKS, "data: rows", "data: processor"}
    assert report.exit_code == 0


def test_no_alarm_about_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    report = examine("recipes/demo.yaml")
    assert report.failures == ()
    assert [finding.check for finding in report.warnings] == ["template: default system prompt"]


AMAZON = {"qwen2vl_amazon": "qwen2_vl", "llama32_vision_amazon": "mllama", "pixtral_amazon": "pixtral"}
PRODUCT = {"Product Name": "Kurio Glow Smartwatch", "Category": "Toys & Games", "description": "A smartwatch, in blue."}


@pytest.mark.parametrize(("name", "kind"), AMAZON.items())
def test_no_alarm_about_the_recipes_that_are_shipped(
    name: str, kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for number in range(4):
        Image.new("RGB", (50 + number, 50), (60 * number, 90, 200)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", **PRODUCT} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    here = {"model.name": str(checkpoint(kind)), "data.source": str(tmp_path / "rows.jsonl"), "train.tf32": False}
    report = examine(ROOT / "recipes" / f"{name}.yaml", **here)
    assert [*report.failures, *report.warnings] == []


def test_no_alarm_about_the_alpaca_recipe(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"output": f"{n + n}", "input": "", "instruction": f"Double {n}."} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    here = {"model.name": str(checkpoint("text")), "data.source": str(tmp_path / "rows.json"), "data.eval_rows": 2}
    report = examine(ROOT / "recipes/alpaca_lora.yaml", **here)
    assert [*report.failures, *report.warnings] == []


def test_conversations_of_several_turns_and_pictures_are_no_alarm(admitted: Admit) -> None:
    colours = [Image.new("RGB", (30 + n, 40), (50 * n, 20, 90)) for n in range(4)]
    rows = [
        {"messages": [said("user", "A?", *colours[:2]), said("assistant", "B"), said("user", "C?"), said("assistant", "D, E")]},
        {"messages": [said("user", "No picture?"), said("assistant", "None at all.")]},
        {"messages": [said("system", "Be short."), said("user", "F?", colours[3]), said("assistant", "G")]},
    ]
    for kind in ("qwen2_vl", "mllama", "pixtral"):
        report = examined(with_rows(admitted(kind), rows))
        assert report.failures == ()
        assert [finding.check for finding in report.warnings] == ["template: default system prompt"] * (kind in QWEN)


# ---- template


def copied(checkpoint: Path, directory: Path, template: str | None) -> Path:
    """The checkpoint with another chat template, or with none."""
    shutil.copytree(checkpoint, directory)
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def test_fault_template_missing(recipe: MakeRecipe, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    bare = copied(checkpoint("qwen2_vl"), tmp_path / "bare", None)
    (finding,) = examine(recipe(**{"model.name": str(bare)})).findings
    assert (finding.check, finding.verdict) == ("template: missing", "failure")
    assert "has no chat template" in finding.found
    assert "save a template" in finding.remedy


def test_fault_template_without_markers(recipe: MakeRecipe, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plain = chat_template().replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked = copied(checkpoint("qwen2_vl"), tmp_path / "unmarked", plain)
    (finding,) = examine(recipe(**{"model.name": str(unmarked)})).failures
    assert finding.check == "template: missing"
    assert "answers cannot be told from prompts" in finding.found


SPELT = "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{% generation %}{{ m.content }}{{ eos_token }}"
SPELT += "{% endgeneration %}{% endfor %}"


def taught(patient: Patient, token: str, *merge: str) -> None:
    """Gives a text model's tokenizer one more token of its vocabulary, made by a merge or by nothing."""
    content = json.loads(patient.tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][token] = len(patient.tokenizer)
    content["model"]["merges"] = [list(merge)] if merge else []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )
    patient.collator = MultimodalCollator(tokenizer, patient.collator.family)


def test_fault_special_token_that_the_vocabulary_has_is_split(admitted: Admit) -> None:
    patient = admitted("text", template=SPELT)
    taught(patient, "<|user|>")  # as ChatGLM3's: known, and never found in a text
    patient.collator.chat_template = SPELT
    finding = told(patient, "template: special tokens")
    assert finding.verdict == "failure"
    assert "<|user|> of the template is split into 8 tokens in row 1 of train.jsonl" in finding.found
    assert finding.found.endswith("so are <|assistant|>, though the vocabulary has it")
    assert finding.remedy == "add it to the tokenizer as a special token"


def test_fault_special_token_of_another_model(admitted: Admit) -> None:
    finding = told(admitted("text", template=SPELT), "template: special tokens")
    assert finding.verdict == "warning"
    assert "<|user|> of the template is split into 8 tokens in row 1 of train.jsonl; so are <|assistant|>" in finding.found
    assert "the template that belongs to this tokenizer" in finding.remedy


def test_fault_prompt_is_no_prefix_of_the_training_text(admitted: Admit) -> None:
    prompt = PROMPT.replace("assistant\\n", "assistant:\\n")
    finding = told(admitted(template=chat_template(prompt=prompt)), "template: prompt is a prefix")
    assert finding.verdict == "failure"
    assert finding.found.startswith("row 1 of train.jsonl: the prompt with the generation prompt is not how")
    assert "add_generation_prompt" in finding.remedy


def test_fault_prompt_melts_into_the_answer(admitted: Admit) -> None:
    patient = admitted("text", **{"data.prompt": "Colour: "})
    taught(patient, "Ġr", "Ġ", "r")
    finding = told(patient, "template: prompt is a prefix")
    assert finding.verdict == "warning"
    assert finding.found == "row 1 of train.jsonl: the prompt's end melts into the answer, ' ' becomes ' red</s>'"
    assert "without a space" in finding.remedy


def test_fault_turn_is_no_prefix_of_the_next(admitted: Admit) -> None:
    forgets = f"{{% if loop.last %}}{ANSWER}{{% else %}}{{{{ '…<|im_end|>' }}}}{{% endif %}}"
    reads_back = f"{{% if loop.index0 == 0 and messages | length > 2 %}}{{{{ 'Earlier: ' }}}}{{% endif %}}{PARTS}"
    rows = [conversation("one"), conversation("one", "two")]
    patient = with_rows(admitted(template=chat_template(answer=forgets, parts=reads_back)), rows)
    finding = told(patient, "template: turns are prefixes")
    assert finding.verdict == "warning"
    assert finding.found.startswith("row 2 of given.jsonl: what is asked before turn 2 reads otherwise")
    assert "rows of one answer each" in finding.remedy


def test_fault_picture_placeholder_lost(admitted: Admit) -> None:
    blind = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    report = examined(admitted(template=chat_template(parts=blind)))
    finding = next(finding for finding in report.failures if finding.check == "template: picture placeholders")
    assert finding.found == "row 1 of train.jsonl has 1 picture, and the template writes placeholders for 0"
    assert "once for each part of type image" in finding.remedy


def test_fault_placeholder_of_only_the_first_picture(admitted: Admit) -> None:
    first = "{{ '<|image_pad|>' if m.content[0].type == 'image' }}{% for p in m.content %}{{ p.text }}{% endfor %}"
    pair = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    rows = [{"messages": [said("user", "A?", *pair[:count]), said("assistant", "B")]} for count in (0, 1, 2)]
    finding = told(with_rows(admitted(template=chat_template(parts=first)), rows), "template: picture placeholders")
    assert finding.verdict == "failure"
    assert finding.found == "row 3 of given.jsonl has 2 pictures, and the template writes placeholders for 1"


def test_fault_default_system_prompt_added_in_silence(admitted: Admit) -> None:
    finding = told(admitted(), "template: default system prompt")
    assert finding.verdict == "warning"
    assert finding.found == "row 1 of train.jsonl has no system prompt and the template adds 'You are a helpful assistant.'"
    assert "data.system" in finding.remedy
    assert told(admitted(**{"data.system": "Name it."}), "template: default system prompt").verdict == "ok"


def test_fault_two_tokens_of_beginning(admitted: Admit) -> None:
    said = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    twice = f"{{{{ bos_token }}}}{{{{ bos_token }}}}{{% for m in messages %}}{said}{{% endfor %}}"
    finding = told(admitted("text", template=twice), "template: double BOS")
    assert finding.verdict == "failure"
    assert finding.found == "row 1 of train.jsonl begins with <s> twice"
    assert "add_special_tokens=False" in finding.remedy


def test_fault_own_template_renders_another_text(admitted: Admit) -> None:
    shouts = "{{ bos_token }}{% for m in messages %}### {{ m.role }}{% endfor %}"
    finding = told(admitted("mllama", template=shouts), "template: same text as the model's own")
    assert finding.verdict == "warning"
    assert "row 1 of train.jsonl: the training template writes '<|start_header_id|>user" in finding.found
    assert "where the checkpoint's own writes '### user" in finding.found
    assert "saved beside the adapter" in finding.remedy


def test_fault_own_template_refuses_what_is_trained(admitted: Admit) -> None:
    picky = "{{ raise_exception('no system beside pictures') }}"
    finding = told(admitted("mllama", template=picky), "template: same text as the model's own")
    assert finding.verdict == "warning"
    assert finding.found.endswith("of the checkpoint's own template, the chat template refuses it: no system beside pictures")


def test_the_recipe_s_own_template_is_told(admitted: Admit, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(chat_template())
    assert told(admitted(chat_template=str(tmp_path / "mine.jinja")), "template: missing").found.startswith("the recipe's, /")


# ---- stop token


def test_fault_stop_token_outside_of_the_answer(admitted: Admit) -> None:
    late = "{% generation %}" + PARTS + "{% endgeneration %}{{ '<|im_end|>\\n' }}"
    report = examined(admitted(template=chat_template(answer=late)))
    finding = report.failures[0]
    assert finding.check == "stop: trained"
    assert "trains no stop token in row 1 of train.jsonl: its {% generation %} block should hold" in finding.found
    assert report.failures == (finding,)  # told once, though it ends many checks


def test_fault_stop_token_not_trained(admitted: Admit) -> None:
    def spoil(batch: dict[str, Any], collator: MultimodalCollator) -> None:
        batch["labels"][batch["labels"] == collator.stop_token_id] = -100

    patient = admitted()
    finding = told(replace(patient, collate=Broken(patient, spoil)), "stop: trained")
    assert finding.verdict == "failure"
    assert finding.found == "row 1 of train.jsonl: 0 of 1 answers end with a trained stop token, <|im_end|>"
    assert "{% generation %}" in finding.remedy


def test_fault_stop_token_of_an_earlier_turn_not_trained(admitted: Admit) -> None:
    def spoil(batch: dict[str, Any], collator: MultimodalCollator) -> None:
        for labels in batch["labels"]:
            for place in (labels == collator.stop_token_id).nonzero()[:-1]:
                labels[place] = -100

    patient = with_rows(admitted(), [conversation("one"), conversation("one", "two")])
    finding = told(replace(patient, collate=Broken(patient, spoil)), "stop: trained")
    assert finding.found == "row 2 of given.jsonl: 1 of 2 answers end with a trained stop token, <|im_end|>"


def mask_by_id(batch: dict[str, Any], collator: MultimodalCollator) -> None:
    batch["labels"][batch["input_ids"] == collator.tokenizer.pad_token_id] = -100


def test_fault_stop_token_lost_with_the_padding(admitted: Admit) -> None:
    patient = admitted("text")  # LLaMA has no padding token: vlmtune takes the stop token
    finding = told(replace(patient, collate=Broken(patient, mask_by_id)), "stop: not lost with padding")
    assert finding.verdict == "failure"
    assert finding.found == "</s> is both padding and stop token, and is trained in no row"
    assert "attention mask" in finding.remedy
    assert told(patient, "stop: not lost with padding").verdict == "ok"


def test_fault_stop_token_not_in_generation_config(admitted: Admit) -> None:
    patient = admitted("mllama")
    patient.model.generation_config.eos_token_id = 0
    finding = told(patient, "stop: in generation_config")
    assert finding.verdict == "warning"
    assert finding.found.startswith("generation_config ends at <|begin_of_text|> and not at <|eot_id|>")
    assert "generation_config.json" in finding.remedy


# ---- labels


def train_all(batch: dict[str, Any], collator: MultimodalCollator) -> None:
    batch["labels"] = batch["input_ids"].clone()


def test_fault_prompt_in_the_loss(admitted: Admit) -> None:
    patient = admitted("text")
    finding = told(replace(patient, collate=Broken(patient, train_all)), "labels: share trained")
    assert finding.verdict == "failure"
    assert finding.found == "row 1 of train.jsonl: 19 tokens of the prompt are in the loss"
    assert "train_on_inputs" in finding.remedy


def test_fault_rows_without_a_trained_token(admitted: Admit) -> None:
    def spoil(batch: dict[str, Any], collator: MultimodalCollator) -> None:
        batch["labels"][:] = -100

    patient = admitted()
    finding = told(replace(patient, collate=Broken(patient, spoil)), "labels: rows without any")
    assert finding.verdict == "failure"
    assert finding.found.startswith("row 1 of train.jsonl, row 2 of train.jsonl, row 3 of train.jsonl and 5 more: no token")


@pytest.mark.parametrize(("kind", "token"), [("qwen2_vl", "<|vision_start|>"), ("mllama", "<|image|>"), ("pixtral", "[IMG]")])
def test_fault_picture_among_the_labels(admitted: Admit, kind: str, token: str) -> None:
    patient = admitted(kind)
    finding = told(replace(patient, collate=Broken(patient, train_all)), "labels: pictures")
    assert finding.verdict == "failure"
    assert finding.found == f"row 1 of train.jsonl: {token}, which stands for a picture, is among the labels"
    assert "make_labels" in finding.remedy


def test_fault_padding_among_the_labels(admitted: Admit) -> None:
    patient = admitted()
    finding = told(replace(patient, collate=Broken(patient, train_all)), "labels: padding")
    assert finding.verdict == "failure"
    assert "padding tokens are trained" in finding.found
    assert "row 1 of train.jsonl beside" in finding.found
    assert "attention mask" in finding.remedy


def test_fault_labels_lost_beside_a_longer_row(admitted: Admit) -> None:
    def spoil(batch: dict[str, Any], collator: MultimodalCollator) -> None:
        if len(batch["labels"]) > 1:
            batch["labels"][:, -4:] = -100  # as if all rows ended with padding

    patient = admitted()
    finding = told(replace(patient, collate=Broken(patient, spoil)), "labels: padding")
    assert finding.verdict == "failure"
    assert "another number of tokens is trained beside a longer row than alone" in finding.found


# ---- pictures


def test_fault_patches_of_another_size_than_the_tower_s(admitted: Admit) -> None:
    patient = admitted()
    patient.collator.processor.image_processor.patch_size = 16
    finding = told(patient, "images: processor and tower")
    assert finding.verdict == "failure"
    assert finding.found == "the processor has patch_size 16 and the vision tower patch_size 14"
    assert "preprocessor_config.json" in finding.remedy


def test_fault_fewer_tokens_than_features(admitted: Admit) -> None:
    patient = admitted("pixtral")
    patient.collator.processor.patch_size = 32  # of the processor, and not of its image processor: it only counts
    finding = told(patient, "images: tokens and features")
    assert finding.verdict == "failure"
    assert "tokens stand for a picture of 4" in finding.found
    assert "the tower makes 16 features of it" in finding.found
    assert "row 1 of train.jsonl" in finding.found


def test_fault_picture_smaller_than_a_patch(admitted: Admit) -> None:
    colours = [Image.new("RGB", size, "red") for size in ((40, 40), (40, 10))]
    rows = [{"messages": [said("user", "A?", picture), said("assistant", "B")]} for picture in colours]
    finding = told(with_rows(admitted(), rows), "images: smaller than a patch")
    assert finding.verdict == "warning"
    assert finding.found == "row 2 of given.jsonl (40×10): smaller than the 28×28 pixels of one token"


def test_fault_picture_that_dominates_its_row(admitted: Admit) -> None:
    rows = [{"messages": [said("user", "A?", Image.new("RGB", (1000, 1000))), said("assistant", "B")]}]
    patient = with_rows(admitted(**{"images.max_pixels": 1024 * 1024}), rows)
    finding = told(patient, "images: dominating")
    assert finding.verdict == "warning"
    assert finding.found.startswith("row 1 of given.jsonl (1,298 of 1,")
    assert "images.max_pixels" in finding.remedy


def test_fault_the_same_row_twice(admitted: Admit) -> None:
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    rows = [{"messages": [said("user", "A?", picture), said("assistant", "B")]} for picture in (red, blue, red.copy())]
    finding = told(with_rows(admitted(), rows), "images: duplicates")
    assert finding.verdict == "warning"
    assert finding.found.startswith("row 3 of given.jsonl (as row 1 of given.jsonl): the same pictures and texts again")
    other_question = [*rows[:2], {"messages": [said("user", "C?", red), said("assistant", "B")]}]
    found = told(with_rows(admitted(), other_question), "images: duplicates").found
    assert found.endswith("2 of them distinct; 2 rows show what others show: `packing.group_by_image` brings them together")
    for kind, settings in (
        ("mllama", {}),
        ("qwen2_vl", {"packing": "off"}),
        ("qwen2_vl", {"packing": {"group_by_image": True}}),
    ):
        patient = with_rows(admitted(kind, **settings), other_question)
        assert told(patient, "images: duplicates").found.endswith("3 pictures, 2 of them distinct")


def test_fault_the_same_picture_to_train_and_to_evaluate(admitted: Admit, colours: Path) -> None:
    copied = colours.with_name("leak.jsonl")
    rows = [json.loads(line) for line in colours.read_text().splitlines()]
    copied.write_text("\n".join(json.dumps(row) for row in rows[2:4]))
    finding = told(admitted(**{"data.eval_source": str(copied)}), "images: in train and eval")
    assert finding.verdict == "warning"
    assert finding.found.startswith("2 held-out pictures are trained on too: row 1 of leak.jsonl (as row 3 of train.jsonl)")
    assert "one side of the split" in finding.remedy


def test_a_picture_that_is_made_smaller_is_still_the_same(admitted: Admit, colours: Path) -> None:
    copied = colours.with_name("twice.jsonl")
    copied.write_text(colours.read_text().splitlines()[0])
    patient = admitted(**{"data.eval_source": str(copied)})
    assert patient.split.held_out is not None
    smaller = replace(patient.split, held_out=patient.split.held_out.shrink({0: {0: (20, 25)}}))
    assert told(replace(patient, split=smaller), "images: in train and eval").verdict == "warning"


# ---- rows and lengths


@pytest.fixture
def spoilt(colours: Path, tmp_path: Path) -> Path:
    """The colours, the second row's picture missing."""
    rows = [json.loads(line) | {"image": str(colours.parent / json.loads(line)["image"])} for line in colours.open()]
    rows[1]["image"] = "nowhere.png"
    (tmp_path / "spoilt.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "spoilt.jsonl"


@pytest.mark.parametrize(("policy", "verdict"), [("raise", "failure"), ("drop", "warning")])
def test_fault_row_that_cannot_be_read(recipe: MakeRecipe, spoilt: Path, policy: str, verdict: str) -> None:
    report = examine(recipe("text", **{"data.source": str(spoilt), "data.images": "image", "on_bad_row": policy}))
    assert report.findings[0].verdict == verdict
    assert report.findings[0].check == "data: rows"
    assert "1 of 8 rows cannot be used: row 2 of spoilt.jsonl: picture" in report.findings[0].found
    assert "on_bad_row: drop" in report.findings[0].remedy


def test_fault_row_that_the_processor_refuses(admitted: Admit) -> None:
    pictures = [Image.new("RGB", size) for size in ((40, 40), (3000, 20))]
    rows = [{"messages": [said("user", "A?", picture), said("assistant", "B")]} for picture in pictures]
    report = examined(with_rows(admitted("pixtral"), rows))
    (finding,) = report.failures
    assert finding.check == "data: processor"
    assert "row 2 of given.jsonl: the model's processor refuses it (its pictures have 3000×20 pixels)" in finding.found


@pytest.mark.parametrize(("policy", "verdict"), [("raise", "failure"), ("drop", "warning"), ("shrink", "warning")])
def test_fault_rows_over_the_limit(admitted: Admit, policy: str, verdict: str) -> None:
    rows = [conversation("short"), conversation("long " * 30)]
    patient = with_rows(admitted(**{"train.max_length": 120, "on_too_long": policy}), rows)
    chart, finding = (each for each in examined(patient).findings if each.check == "length: tokens")
    assert finding.verdict == verdict
    assert "1 of 2 rows are over the limit, row 2 of given.jsonl (" in finding.found
    assert f"`on_too_long` is {policy}, so " in finding.found
    assert "train.max_length" in finding.remedy
    assert "limit 120" in chart.found
    assert "█" in chart.found


# ---- adapter


def test_fault_targets_that_match_nothing(recipe: MakeRecipe) -> None:
    report = examine(recipe("text", **{"lora.targets": ["query"]}))
    (finding,) = report.failures
    assert finding.check == "adapter: modules"
    assert "`lora.targets` names query" in finding.found


def test_a_model_that_cannot_be_loaded_is_tried_once(admitted: Admit) -> None:
    tried: list[int] = []

    def load() -> Any:
        tried.append(1)
        raise ModelError("there are no weights")

    report = examined(replace(admitted("text"), load=load))
    assert [finding.found for finding in report.failures] == ["there are no weights"]
    assert tried == [1]


def test_fault_adapter_reaches_into_the_tower(admitted: Admit) -> None:
    patient = admitted("pixtral", **{"lora.scope": "all"})
    patient.recipe = load_recipe(patient.recipe, **{"lora.scope": "language"})
    finding = told(patient, "adapter: modules")
    assert finding.verdict == "warning"
    assert "in the vision tower and projector are outside of it" in finding.found


def test_fault_model_without_an_adapter(admitted: Admit) -> None:
    patient = admitted("text")
    merged = patient.model.merge_and_unload()
    finding = told(replace(patient, load=lambda: merged), "adapter: modules")
    assert (finding.verdict, finding.found) == ("failure", "no module has an adapter")
    assert "all-linear" in finding.remedy


def weights(patient: Patient, part: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in patient.model.named_parameters() if part in name)


def test_fault_b_is_frozen(admitted: Admit) -> None:
    patient = admitted("text")
    next(weights(patient, "lora_B"))[1].requires_grad_(False)
    finding = told(patient, "adapter: gradients")
    assert finding.verdict == "failure"
    assert finding.found.startswith(
        "B of 1 LoRA modules is frozen, and so nothing is learnt there: model.layers.0.self_attn.q_proj"
    )


def test_fault_no_gradient_at_all(admitted: Admit) -> None:
    patient = admitted()
    for _, weight in weights(patient, "lora_A"):
        weight.data.zero_()  # A and B at zero: neither moves the other
    finding = told(patient, "adapter: gradients")
    assert finding.verdict == "failure"
    assert finding.found == "row 1 of train.jsonl: no LoRA module gets a gradient"
    assert "detaches the loss" in finding.remedy


def close_gates(patient: Patient) -> None:
    for part in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
        for _, weight in weights(patient, part):
            weight.data.zero_()


def test_fault_lora_modules_that_the_loss_does_not_reach(admitted: Admit) -> None:
    patient = admitted("mllama")
    close_gates(patient)
    finding = told(patient, "adapter: gradients")
    assert finding.verdict == "warning"
    assert "14 of 28 LoRA modules get no gradient: model.language_model.layers.1.cross_attn" in finding.found
    assert "lora.targets" in finding.remedy


def test_fault_base_is_trained(admitted: Admit) -> None:
    patient = admitted()
    patient.model.get_input_embeddings().weight.requires_grad_(True)
    finding = told(patient, "adapter: base is frozen")
    assert finding.verdict == "failure"
    assert "1 parameters of the base are trained: " in finding.found
    assert "embed_tokens" in finding.found


def test_fault_base_changes_with_a_step(admitted: Admit) -> None:
    patient = admitted("text")
    (first, *_) = patient.model.get_base_model().parameters()

    def drift(*_: Any) -> None:
        first.data.add_(0.1)

    patient.model.register_forward_pre_hook(drift)
    finding = told(patient, "adapter: a step")
    assert (finding.verdict, finding.found) == ("failure", "a step on the adapter changed weights of the base")


def test_fault_adapter_changes_nothing(admitted: Admit) -> None:
    patient = admitted("text")
    for module in patient.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 0.0
    finding = told(patient, "adapter: a step")
    assert finding.verdict == "failure"
    assert "with the adapter and without: it changes nothing" in finding.found
    assert "active_adapters" in finding.remedy


def test_fault_a_is_frozen(admitted: Admit) -> None:
    patient = admitted("text")
    for _, weight in weights(patient, "lora_A"):
        weight.requires_grad_(False)
    assert told(patient, "adapter: a step").found.endswith("A of no LoRA module gets a gradient after a step")


def test_the_step_is_taken_back(admitted: Admit) -> None:
    patient = admitted()
    before = {name: value.clone() for name, value in patient.model.state_dict().items()}
    assert told(patient, "adapter: a step").verdict == "ok"
    assert all(torch.equal(value, before[name]) for name, value in patient.model.state_dict().items())


# ---- looks and loss


def test_fault_model_does_not_look(admitted: Admit) -> None:
    patient = admitted("mllama")
    close_gates(patient)
    finding = told(patient, "looks: at pictures")
    assert finding.verdict == "warning"
    assert "the model does not look (row" in finding.found
    assert "gates" in finding.remedy


def test_fault_tuned_model_does_not_look(admitted: Admit) -> None:
    patient = admitted("mllama")
    assert after_training(patient.recipe, patient.collator, patient.split, patient.model).verdict != "failure"
    close_gates(patient)
    finding = after_training(patient.recipe, patient.collator, patient.split, patient.model)
    assert (finding.check, finding.verdict) == ("looks: at pictures", "failure")


def test_fault_first_loss_worse_than_guessing(admitted: Admit) -> None:
    patient = admitted("text")
    patient.model.get_output_embeddings().weight.data.mul_(20)
    finding = told(patient, "loss: first")
    assert finding.verdict == "warning"
    assert "a guess among all tokens has 5.55" in finding.found
    assert "of one checkpoint" in finding.remedy


def test_fault_loss_is_no_number(admitted: Admit) -> None:
    patient = admitted("text")
    patient.model.get_output_embeddings().weight.data[0, 0] = float("nan")
    finding = told(patient, "loss: first")
    assert finding.verdict == "failure"
    assert "the loss is not a number" in finding.found


def test_fault_adapter_is_not_the_base_at_the_start(admitted: Admit) -> None:
    patient = admitted("text")
    for _, weight in weights(patient, "lora_B"):
        weight.data.fill_(0.3)
    finding = told(patient, "loss: same as the base's")
    assert finding.verdict == "failure"
    assert "before the first step the loss is" in finding.found
    assert "B at zero" in finding.remedy


# ---- environment


def test_faults_of_the_machine(admitted: Admit) -> None:
    patient = admitted("text", **{"model.dtype": "bfloat16", "merge": True})
    sick = replace(patient.machine, requires=["torch>=99", "no-such-package>=1"], bf16=False, free_memory=1000, free_disk=1000)
    patient = replace(patient, machine=sick)
    found = {name: told(patient, name) for name in CHECKS if name.startswith("environment")}
    assert {finding.verdict for finding in found.values()} == {"failure"}
    assert all(finding.remedy for finding in found.values())
    assert "and should be >=99, no-such-package is 0 and should be >=1" in found["environment: versions"].found
    assert found["environment: versions"].remedy == "pip install --upgrade 'torch>=99' 'no-such-package>=1'"
    assert "float16" in found["environment: bfloat16"].remedy
    assert "the weights take about" in found["environment: memory"].found
    assert "save_total_limit" in found["environment: disk"].remedy


SAVED = [  # of 8 rows, 4 a step: two steps an epoch
    ({"max_steps": -1, "num_train_epochs": 3}, 3),
    ({"max_steps": 5}, 3),
    ({"max_steps": 100, "save_strategy": "steps", "save_steps": 10}, 10),
    ({"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}, 2),  # the last step is saved, too
    ({"max_steps": 100, "save_strategy": "steps", "save_steps": 0.25}, 4),
    ({"max_steps": 100, "save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}, 3),  # and the one being written
    ({"max_steps": 100, "save_strategy": "steps", "save_steps": 60, "save_total_limit": 5}, 2),
    ({"max_steps": 100, "save_strategy": "no"}, 0),
    ({"max_steps": 100, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 20}, 5),  # at each evaluation
]


@pytest.mark.parametrize(("train", "count"), SAVED)
def test_room_is_wanted_for_the_checkpoints_that_lie_there_at_once(admitted: Admit, train: dict[str, Any], count: int) -> None:
    best = {"data.eval_rows": 2, "eval.early_stop_patience": 9} if train.get("save_strategy") == "best" else {}
    patient = admitted("text", **best, **{f"train.{key}": value for key, value in train.items()})
    assert f"the adapter, {count} checkpoint{'s' * (count != 1)} take" in told(patient, "environment: disk").found


def test_the_weights_of_a_hub_id_are_looked_for_in_the_hubs_cache(
    admitted: Admit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--shop--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--shop--model" / "refs").mkdir()
    (tmp_path / "models--shop--model" / "refs" / "main").write_text("0" * 40)
    patient = admitted("text")
    patient = replace(patient, recipe=load_recipe(patient.recipe, **{"model.name": "shop/model"}))
    patient = replace(patient, machine=replace(patient.machine, free_memory=2**20))
    assert told(patient, "environment: memory").verdict == "warning"
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (snapshot / "1.safetensors").write_bytes(bytes(2**20))
    found = told(patient, "environment: memory")
    assert found.verdict == "warning"
    assert found.found.startswith("not known: the weights of shop/model are neither")
    (snapshot / "2.safetensors").write_bytes(bytes(2**20))
    found = told(patient, "environment: memory")
    assert (found.verdict, found.found) == ("failure", "the weights take about 2 MiB, and 1 MiB are free")


# ---- at the start of a run


def test_at_start_leaves_a_healthy_run_as_it_is(admitted: Admit, capsys: pytest.CaptureFixture[str]) -> None:
    patient = admitted("mllama")
    model = patient.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    capsys.readouterr()
    at_start(patient.recipe, patient.collator, patient.split, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert capsys.readouterr().out == ""


def test_at_start_takes_eight_passes_through_the_model_of_which_one_goes_back(admitted: Admit) -> None:
    patient, kept = admitted("pixtral"), list[bool]()
    patient.model.register_forward_hook(lambda model, inputs, output: kept.append(output.loss.requires_grad))
    at_start(patient.recipe, patient.collator, patient.split, patient.model)
    assert (len(kept), sum(kept)) == (8, 1)


def test_at_start_warns(admitted: Admit, capsys: pytest.CaptureFixture[str]) -> None:
    patient = admitted("mllama")
    close_gates(patient)
    at_start(patient.recipe, patient.collator, patient.split, patient.model)
    assert "the model does not look" in " ".join(capsys.readouterr().out.split())


def test_at_start_stops_a_run_that_would_fail_in_silence(admitted: Admit) -> None:
    patient = admitted("text")
    for _, weight in weights(patient, "lora_B"):
        weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"adapter: gradients: B of 14 LoRA modules is frozen.*remedy: leave"):
        at_start(patient.recipe, patient.collator, patient.split, patient.model)


def test_a_run_says_how_long_it_was_examined_and_that_it_was_not(
    recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(**options: Any) -> tuple[dict[str, Any], str]:
        run = finetune(recipe("text", doctor=True), overwrite=True, **options)
        return run.metrics, " ".join(capsys.readouterr().out.replace("│", "").split())

    metrics, table = shown()
    assert 0 <= metrics["doctor_seconds"] <= 20
    assert re.search(r"doctor no failure, in \d+\.\d s", table)
    metrics, table = shown(collator=MultimodalCollator(load_processor(load_recipe(recipe("text")))[0]))
    assert metrics["doctor_seconds"] is None
    assert "doctor left out: a collator of your own, which vlmtune.doctor.examine takes" in table


# ---- the command line


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: MakeRecipe) -> Callable[..., int]:
    """`shell("--json")`: the exit code of `python -m vlmtune.doctor` on a small recipe."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipe("text")))  # JSON is YAML
    monkeypatch.setattr(console, "stderr", False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["doctor", str(tmp_path / "recipe.json"), *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line(doctor=command)
        return int(ended.value.code or 0)

    return run


def test_command_line_ends_with_0_and_a_table(shell: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell() == 0
    shown = capsys.readouterr().out
    assert "0 failures" in shown
    assert "environment" in shown


def test_command_line_ends_with_1_and_one_object(shell: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("train.max_length=3", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 1
    assert {"check", "verdict", "found", "remedy"} == set(found["findings"][0])


def test_command_line_ends_with_2_for_a_mistake_in_the_recipe(
    shell: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell("model.nane=x") == 2
    assert "Did you mean 'name'?" in capsys.readouterr().err
    assert shell("data.source=nowhere.jsonl") == 2


def test_report_shows_every_check_in_words() -> None:
    report = Report((Finding("loss: first", "warning", "[b] is 9", "look"), Finding("labels: padding", "ok", "fine")))
    assert "2 checks: 1 warning and 0 failures" in str(report)
    assert "[b] is 9" in str(report)


def test_report_tells_faults_in_full_and_gives_what_passes_a_line_for_each_group() -> None:
    fault = Finding("loss: first", "failure", "row 7 has a loss of 9", "look at the tokenizer")
    hint = Finding("images: duplicates", "warning", "row 2 (as row 1)", "leave it out")
    passed = [Finding(f"labels: {name}", "ok", "fine") for name in ("padding", "pictures")]
    report = Report((*passed, hint, Finding("length: tokens", "ok", "at most 86"), fault))
    file = io.StringIO()
    Console(width=80, file=file).print(report)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "5 checks: 1 warning and 1 failure",
        "",
        "failure  loss: first",
        "  row 7 has a loss of 9",
        "  remedy: look at the tokenizer",
        "",
        "warning  images: duplicates",
        "  row 2 (as row 1)",
        "  remedy: leave it out",
        "",
        "ok  labels  padding, pictures",
        "ok  length  at most 86",
    ]


def test_every_check_has_a_row_on_the_page_about_the_doctor() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    assert [name for name in [*CHECKS, "data: rows", "data: processor"] if f"| {name} |" not in page] == []


# ---- tools


def tools(name: str = "rain", description: str = "Will it rain?") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "description": description, "parameters": {"type": "object"}}}]


def calling(arguments: dict[str, Any], *, question: str = "What?", **columns: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "abcdefgh1", "function": {"name": "rain", "arguments": arguments}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": '{"rain": 0}', "tool_call_id": "abcdefgh1"}
    return {"messages": [said("user", question), asks, result, said("assistant", "No.")], **columns}


OF_TOOLS = (
    "{% if tools %}{{ '<|im_start|>' }}{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}"
)
CALLS = (
    "{% generation %}" + PARTS + "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}"
)


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "pixtral"])
def test_rows_whose_tools_differ_are_no_alarm(admitted: Admit, kind: str) -> None:
    rows = [
        calling({"city": "Paris"}, tools=tools()),
        calling({}, question="No tools?"),
        calling({"n": [1]}, tools=tools("rain", "[IMG] <|image|> <|im_end|> <|made_up|>")),
        {**calling({"city": "Rome"}), "tools": tools() + tools("roll")},
        {"messages": [said("user", "What?", Image.new("RGB", (40, 50), (9, 90, 200))), said("assistant", "A kite.")]},
    ]
    template = OF_TOOLS + chat_template(answer=CALLS) if kind == "qwen2_vl" else None
    report = examined(with_rows(admitted(kind, template=template), rows))
    assert [f"{each.check}: {each.found}" for each in (*report.failures, *report.warnings)] == []


def test_each_row_is_rendered_with_its_own_tools(admitted: Admit) -> None:
    patient = admitted(template=OF_TOOLS + chat_template(answer=CALLS))
    patient = with_rows(patient, [calling({}, tools=tools("rain")), calling({}), calling({}, tools=tools("roll"))])
    texts = [patient.rendered(row["messages"]) for row in patient.rows]
    assert [('rain", "description' in text, 'roll", "description' in text) for text in texts] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_pixtrals_results_are_rendered_as_they_are_trained(admitted: Admit) -> None:
    patient = with_rows(admitted("pixtral"), [calling({}, tools=tools())])
    assert '[TOOL_RESULTS]{"content": {"rain": 0}, "call_id"' in patient.rendered(patient.rows[0]["messages"])


def test_a_token_that_the_template_writes_for_tools_alone_is_looked_at(admitted: Admit) -> None:
    patient = admitted(template=OF_TOOLS.replace("<|im_start|>", "<|tools|>") + chat_template(answer=CALLS))
    patient = with_rows(patient, [calling({}), calling({}, tools=tools())])
    finding = told(patient, "template: special tokens")
    assert (finding.verdict, "<|tools|>" in finding.found, "row 2 of" in finding.found) == ("warning", True, True)


def test_rows_that_differ_in_calls_or_tools_alone_are_no_duplicates(admitted: Admit) -> None:
    rows = [calling({"n": 1}, tools=tools()), calling({"n": 2}, tools=tools()), calling({"n": 1}, tools=tools("roll"))]
    patient = admitted(template=OF_TOOLS + chat_template(answer=CALLS))
    assert told(with_rows(patient, rows), "images: duplicates").verdict == "ok"
    assert told(with_rows(patient, [*rows, rows[1]]), "images: duplicates").found.startswith("row 4 of given.jsonl (as row 2")
