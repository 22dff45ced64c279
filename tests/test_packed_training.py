"""Packed rows learn what padded rows learn: the same losses and gradients, and no row of a pack hears of another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from processes import in_two_processes
from tiny import KINDS
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

from vlmtune import MultimodalCollator, RecipeError, finetune, head, load_recipe
from vlmtune.attention import IMPLEMENTATION
from vlmtune.collator import PackingCollator
from vlmtune.console import console
from vlmtune.families import Family, qwen2_vl
from vlmtune.model import attend_by_row, kept_apart, load_model, positions_model, share_prefixes_in, use_checkpointing
from vlmtune.proof import packing_fault
from vlmtune.result import Run
from vlmtune.trainer import Trainer

MakeRecipe = Callable[..., dict[str, Any]]
SEEING = (*KINDS, "qwen2_5_vl", "smolvlm")
EVERY = (*SEEING, "text")
MIXING = [kind for kind in EVERY if kind != "mllama"]  # whose padded rows do not see what fills up their neighbours' pictures


def longer(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- rows


def noise(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def row(pictures: Sequence[Image.Image], question: str, answer: str) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    asked = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    return {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def without_pictures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    texts = [["".join(part.get("text", "") for part in message["content"]) for message in row["messages"]] for row in rows]
    return [row([], *text) for text in texts]


ONE_EACH = [
    row([noise(1)], "What?", "A cat."),
    row([noise(2, (60, 40))], "What is on this picture, please, in a sentence?", "A very small dog – 犬."),
    row([noise(3, (30, 90))], "And?", "It is a longer answer than the other two together, and it goes on and on."),
]
MIXED = [
    *ONE_EACH[:2],
    row([], "Hi", "Hello there, whoever you are."),
    row([noise(4), noise(5, (70, 33))], "Which of these two?", "Both."),
]


OF_ONE_PICTURE = [
    row([noise(1)], "What?", "A cat."),
    row([noise(4), noise(5, (70, 33))], "Which of these two?", "Both."),
    row([noise(1)], "What colour has it, do you think?", "It is grey."),
    row([noise(2, (60, 40))], "What?", "A dog."),
    row([noise(5, (70, 33)), noise(4)], "Which of these two?", "Neither, they are other ones."),
    row([noise(4), noise(5, (70, 33))], "Which of these two is it?", "The first."),
    row([noise(1)], "What?", "A cat, and a very small one."),
]


# ---- models


class Loaded:
    """A small model with an adapter that does something, and its collators."""

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        torch.manual_seed(1)
        self.model, processor, self.family = load_model(load_recipe(recipe))
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zeros at birth
                parameter.data.normal_(std=0.05)
        self.padded = {rule: MultimodalCollator(processor, self.family, train_on_inputs=rule) for rule in (False, True)}
        attend_by_row(self.model)
        self.shares = not share_prefixes_in(self.model)

    def collator(self, *, train_on_inputs: bool = False, multiple: int = 1) -> PackingCollator:
        attend_by_row(self.model)
        shares = {"shares": self.shares, "shares_pictures": self.shares}
        return PackingCollator(self.padded[train_on_inputs], positions_model(self.model), multiple, **shares)

    def pack(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        return self.collator(**options)(rows)

    def pad(self, rows: Sequence[Mapping[str, Any]], *, train_on_inputs: bool = False) -> dict[str, Any]:
        self.model.get_base_model().set_attn_implementation("sdpa")  # transformers' own
        return self.padded[train_on_inputs](rows)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = self.family.model_inputs({name: values for name, values in batch.items() if name != "labels"})
        autocast = torch.autocast("cpu", torch.bfloat16) if self.model.dtype == torch.bfloat16 else nullcontext()
        with autocast:
            return self.model(**inputs, use_cache=False).logits.float()

    def learn(self, batch: Mapping[str, Any], tokens: int | None = None) -> tuple[float, Tensor]:
        """The mean loss of the trained tokens, or their sum over so many tokens; and the gradients of the adapter."""
        self.model.zero_grad()
        loss = loss_sum(self.logits(batch), batch["labels"]) / (tokens or trained_tokens(batch["labels"]))
        loss.backward()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]  # none: mllama without a picture
        return loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients])

    def learn_alone(self, rows: Sequence[Mapping[str, Any]], *, train_on_inputs: bool) -> tuple[float, Tensor]:
        """Row by row, no other in the batch: the truth."""
        batches = [self.pad([row], train_on_inputs=train_on_inputs) for row in rows]
        tokens = sum(trained_tokens(batch["labels"]) for batch in batches)
        losses, gradients = zip(*(self.learn(batch, tokens) for batch in batches), strict=True)
        return sum(losses), torch.stack(gradients).sum(0)


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def trained_tokens(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def computed_tokens(batch: Mapping[str, Any]) -> int:
    """That the language model goes over."""
    return len(batch["unique"]) if "unique" in batch else batch["input_ids"].shape[1]


def losses_of_rows(logits: Tensor, batch: Mapping[str, Any]) -> list[float]:
    """Of each row of a pack."""
    pieces = zip(logits.split(batch["segments"], 1), batch["labels"].split(batch["segments"], 1), strict=True)
    return [float(loss_sum(*piece)) / trained_tokens(piece[1]) for piece in pieces]


@pytest.fixture
def load(recipe: MakeRecipe) -> Callable[..., Loaded]:
    return lambda kind, **settings: Loaded(recipe(kind, **settings))


Load = Callable[..., Loaded]


def same(found: tuple[float, Tensor], wanted: tuple[float, Tensor], rel: float = 1e-5) -> None:
    """Loss and gradients, the latter by the norm of their difference."""
    assert found[0] == pytest.approx(wanted[0], rel=rel)
    assert wanted[1].norm() > 1e-3
    assert (found[1] - wanted[1]).norm() <= rel * wanted[1].norm()


# ---- one batch


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(load: Load, kind: str, train_on_inputs: bool) -> None:
    loaded = load(kind)
    batches = [ONE_EACH, MIXED] if kind in MIXING else [ONE_EACH]
    for rows in map(without_pictures, batches) if kind == "text" else batches:
        packed = loaded.learn(loaded.pack(rows, train_on_inputs=train_on_inputs))
        same(packed, loaded.learn(loaded.pad(rows, train_on_inputs=train_on_inputs)))


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("kind", SEEING)
def test_packed_rows_with_two_one_and_no_pictures_learn_what_each_learns_alone(
    load: Load, kind: str, train_on_inputs: bool
) -> None:
    loaded = load(kind)
    packed = loaded.learn(loaded.pack(MIXED, train_on_inputs=train_on_inputs))
    same(packed, loaded.learn_alone(MIXED, train_on_inputs=train_on_inputs))


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("kind", [*SEEING, "qwen3_vl"])
def test_rows_that_show_the_same_pictures_learn_what_each_learns_alone(load: Load, kind: str, train_on_inputs: bool) -> None:
    loaded = load(kind)
    pack = loaded.pack(OF_ONE_PICTURE, train_on_inputs=train_on_inputs)
    same(loaded.learn(pack), loaded.learn_alone(OF_ONE_PICTURE, train_on_inputs=train_on_inputs))
    assert loaded.shares == (kind != "mllama")
    if loaded.shares:
        image_ids = torch.tensor(sorted(loaded.padded[False].never_trained))
        distinct = loaded.pad([OF_ONE_PICTURE[place] for place in (0, 1, 3, 4)])
        computed = pack["input_ids"][0, pack["unique"]]
        assert torch.isin(computed, image_ids).sum() == torch.isin(distinct["input_ids"], image_ids).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EVERY)
def test_a_pack_that_is_filled_up_learns_what_it_learns_without(load: Load, kind: str, dtype: str) -> None:
    loaded = load(kind, **{"model.dtype": dtype})
    rows = without_pictures(MIXED) if kind == "text" else MIXED
    packed, filled = loaded.pack(rows), loaded.pack(rows, multiple=500)
    assert computed_tokens(filled) == 500 > computed_tokens(packed)
    assert filled["attention_mask"].sum() == packed["attention_mask"].sum()
    wanted = loaded.learn(packed)
    same(loaded.learn(kept_apart(loaded.model, filled)), wanted, rel=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("kind", EVERY)
def test_what_fills_a_pack_up_makes_no_mask_over_it(load: Load, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would cost the square of the pack, and attention that is written out or FlashAttention cannot have one."""
    loaded, masks = load(kind), list[Tensor | None]()
    packed_attention = AttentionInterface()[IMPLEMENTATION]

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        masks.extend([mask] if getattr(module, "is_causal", False) else [])
        return packed_attention(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, look)
    filled = loaded.pack(without_pictures(MIXED) if kind == "text" else MIXED, multiple=500)
    loaded.logits(kept_apart(loaded.model, filled))
    assert masks
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("kind", EVERY)
def test_a_pack_of_one_row_is_that_row(load: Load, kind: str) -> None:
    loaded = load(kind)
    rows = without_pictures(ONE_EACH[:1]) if kind == "text" else ONE_EACH[:1]
    same(loaded.learn(loaded.pack(rows)), loaded.learn(loaded.pad(rows)))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", EVERY)
def test_another_neighbour_changes_no_bit_of_a_row(load: Load, kind: str, place: int) -> None:
    loaded = load(kind)
    before = ONE_EACH[:2] if kind != "text" else without_pictures(ONE_EACH[:2])
    others = [row([noise(71)], "Wher?", "A bat."), row([noise(72, (60, 40))], *turns(before[1], "x"))]
    after = without_pictures(others) if kind == "text" else others
    own = row([noise(9, (50, 50))] if kind != "text" else [], "Is it?", "It is, I should say.")
    found = []
    for neighbours in (before, after):
        batch = loaded.pack([*neighbours[:place], own, *neighbours[place:]])
        with torch.no_grad():
            found.append(loaded.logits(batch).split(batch["segments"], 1))
    assert found[0][place].shape == found[1][place].shape
    assert torch.equal(found[0][place], found[1][place])
    assert all(not torch.equal(found[0][other], found[1][other]) for other in {0, 1, 2} - {place})


def turns(row: Mapping[str, Any], letter: str) -> list[str]:
    """The texts of a row, every letter another one: as many tokens, and other ones."""
    texts = [message["content"][-1]["text"] for message in row["messages"]]
    return ["".join(letter if mark.isascii() and mark.isalpha() else mark for mark in text) for text in texts]


@pytest.mark.parametrize("kind", EVERY)
def test_a_neighbour_of_another_length_leaves_a_row_its_loss(load: Load, kind: str) -> None:
    loaded = load(kind)
    seen: list[list[float]] = []
    for answer, pictures in (("Yes.", [noise(1)]), ("No, and that is why." * 9, [noise(2, (60, 40)), noise(3)]), ("No.", [])):
        rows = [row(pictures, "So?", answer), MIXED[1], row(pictures, "?", answer)]
        batch = loaded.pack(without_pictures(rows) if kind == "text" else rows)
        with torch.no_grad():
            seen.append(losses_of_rows(loaded.logits(batch), batch))
    assert {round(losses[0], 3) for losses in seen} != {round(seen[0][0], 3)}
    assert [losses[1] for losses in seen] == pytest.approx([seen[0][1]] * 3, rel=1e-6)


@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize("kind", EVERY)
def test_packed_is_padded_where_layers_are_recomputed(load: Load, kind: str, every_n_layers: int) -> None:
    loaded = load(kind)
    rows = without_pictures(MIXED) if kind == "text" else MIXED
    wanted = loaded.learn_alone(rows, train_on_inputs=False)
    use_checkpointing(loaded.model, every_n_layers)
    loaded.model.train()
    packed = loaded.pack(rows)
    recomputed: list[int] = []
    for module in loaded.model.modules():
        if type(module).__name__.endswith("SelfAttention") or type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    same(loaded.learn(packed), wanted)
    with torch.no_grad():
        taken, _ = len(recomputed), recomputed.clear()
        loaded.logits(packed)
    assert taken > len(recomputed)  # layers were indeed run twice


@pytest.mark.parametrize("kind", EVERY)
def test_packed_is_padded_on_four_bits(load: Load, kind: str) -> None:
    loaded = load(kind, **{"model.quantization": "nf4"})
    rows = without_pictures(MIXED) if kind == "text" else MIXED
    same(loaded.learn(loaded.pack(rows)), loaded.learn_alone(rows, train_on_inputs=False), rel=2e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_packed_is_padded_in_bfloat16_but_for_rounding(load: Load, kind: str) -> None:
    loaded = load(kind, **{"model.dtype": "bfloat16"})
    rows = without_pictures(MIXED) if kind == "text" else MIXED
    packed = loaded.learn(loaded.pack(rows))
    loss, gradients = loaded.learn_alone(rows, train_on_inputs=False)
    assert packed[0] == pytest.approx(loss, rel=5e-3)
    assert (packed[1] - gradients).norm() <= 5e-2 * gradients.norm()  # bfloat16 keeps 8 bits: 0.4 % a rounding


@pytest.mark.parametrize("window", [4, 16, 1000])
def test_packed_is_padded_where_tokens_see_only_so_far_back(recipe: MakeRecipe, tmp_path: Path, window: int) -> None:
    sizes = {**tiny.TEXT, "num_hidden_layers": 2, "sliding_window": window, "pad_token_id": None}
    tokenizer = tiny.make_tokenizer("text")
    config = transformers.MistralConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, head_dim=16, **sizes)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    model.get_input_embeddings().weight.data.mul_(10)
    model.save_pretrained(tmp_path / "window")
    tokenizer.save_pretrained(tmp_path / "window")
    loaded = Loaded(recipe("text", **{"model.name": str(tmp_path / "window")}))
    rows = without_pictures(MIXED)
    packed = loaded.pack(rows)
    assert max(packed["segments"]) > 16
    same(loaded.learn(packed), loaded.learn(loaded.pad(rows)))


# ---- a model that cannot be packed


class Forgetful(Family):
    """A family that packs rows and does not say where each ends."""

    def flatten(self, batch: Mapping[str, Any], core: Any) -> dict[str, Any]:
        return {name: values for name, values in super().flatten(batch, core).items() if name != "segments"}


FORGETFUL = Forgetful(**{entry.name: getattr(qwen2_vl.FAMILY, entry.name) for entry in fields(Family)})


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 500)  # no sentence is folded


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_is_wrong_with_packs_of_the_families_we_have(load: Load, kind: str) -> None:
    loaded = load(kind)
    rows = without_pictures(MIXED) if kind == "text" else MIXED
    for pair in (rows[:2], rows[1:3], rows[2:], rows[3:] + rows[:1]):
        for multiple in (1, 500):
            assert packing_fault(loaded.model, loaded.collator(multiple=multiple), pair) is None


@pytest.mark.slow  # flex attention is compiled
def test_flex_attention_keeps_packed_rows_apart(load: Load) -> None:
    loaded = load("text", **{"model.attention": "flex_attention"})
    attend_by_row(loaded.model)
    assert loaded.model.config._attn_implementation == "flex_attention"
    packing = PackingCollator(loaded.padded[False], positions_model(loaded.model))
    assert packing_fault(loaded.model, packing, without_pictures(MIXED)[:2]) is None


def test_rows_of_mllama_with_and_without_pictures_are_packed(bucketed: MakeRecipe, tmp_path: Path) -> None:
    settings = bucketed("mllama", name="run")
    lines = (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()
    shortest = {"role": "user", "content": [{"type": "image", "image": "0-0.png"}]}
    next_shortest = {"role": "user", "content": "Hi there"}
    short = [json.dumps({"messages": [asked, {"role": "assistant", "content": "A."}]}) for asked in (shortest, next_shortest)]
    (tmp_path / "rows" / "rows.jsonl").write_text("\n".join([*short, *lines[2:]]))
    assert finetune(settings).trainer.plan.packed


@pytest.mark.usefixtures("wide")
def test_a_family_that_packs_wrongly_is_told_and_not_packed(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune(recipe(), family=FORGETFUL)
    assert "off: one row of a pack sees another" in capsys.readouterr().out
    assert not run.trainer.plan.packed
    assert losses(run) == losses(finetune(recipe(packing="off"), overwrite=True))


def test_a_family_that_packs_wrongly_is_refused_where_packs_are_asked_for(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"`packing\.length` is 500, and one row of a pack sees another"):
        finetune(recipe(packing={"length": 500}), family=FORGETFUL)


class Misplaced(Family):
    """A family that packs rows and takes their tokens to be further apart than they are."""

    def flatten(self, batch: Mapping[str, Any], core: Any) -> dict[str, Any]:
        packed = super().flatten(batch, core)
        return {**packed, "position_ids": packed["position_ids"] ** 2}


def test_a_packed_row_that_comes_out_otherwise_is_told(load: Load) -> None:
    loaded = load("qwen2_vl")
    attend_by_row(loaded.model)
    family = Misplaced(**vars(qwen2_vl.FAMILY))
    for multiple in (1, 500):
        collator = MultimodalCollator(loaded.padded[False].processor, family)
        packing = PackingCollator(collator, positions_model(loaded.model), multiple)
        assert packing_fault(loaded.model, packing, ONE_EACH[:2]) == "a packed row comes out other than by itself"


# ---- whole runs


def losses(run: Run) -> list[float]:
    return figures(run, "loss")


def figures(run: Run, name: str) -> list[float]:
    return [entry[name] for entry in run.history if name in entry and "loss" in entry]


def rows_file(directory: Path, *, pictures: Sequence[int], count: int = 14, distinct: int = 14) -> Path:
    """A .jsonl file of messages: of four lengths, with so many pictures in turn."""
    directory.mkdir(exist_ok=True)
    lines: list[str] = []
    for number in range(count):
        names = [f"{number % distinct}-{place}.png" for place in range(pictures[number % len(pictures)])]
        for place, name in enumerate(names):
            noise(10 * (number % distinct) + place, (40 + 7 * place, 50)).save(directory / name)
        content = [{"type": "image", "image": name} for name in names]
        question, answer = f"Question {number}?", f"Answer {number}. " * (1, 2, 5, 9)[number * 7 % 4]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": answer.strip()}]}))
    (directory / "rows.jsonl").write_text("\n".join(lines))
    return directory / "rows.jsonl"


@pytest.fixture
def bucketed(recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """`bucketed("pixtral")`: like `recipe`, on rows of several lengths, two micro-batches of about two rows a step."""

    def make(kind: str, *, name: str, **overrides: Any) -> dict[str, Any]:
        pictures = {"text": [0], "mllama": [1]}.get(kind, [1, 2, 0, 1, 1])
        settings = {
            "data": {"source": str(rows_file(tmp_path / "rows", pictures=pictures)), "format": "openai"},
            "train.output_dir": str(tmp_path / name),
            "train.per_device_train_batch_size": 2,
            "train.gradient_accumulation_steps": 2,
            "train.max_steps": 6,  # an epoch and a half
            "train.save_strategy": "no",
            "train.learning_rate": 1e-3,
            "vision_cache": "off",
        }
        return recipe(kind, **{**settings, **overrides})

    return make


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """All micro-batches that are trained on, as they come."""
    seen: list[dict[str, Any]] = []
    step = Trainer.training_step

    def look(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        seen.append(dict(inputs))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", look)
    return seen


@pytest.mark.parametrize(
    ("kind", "train_on_inputs"),
    [*((kind, False) for kind in EVERY), ("mllama", True), *(longer(kind, True) for kind in MIXING)],
)
def test_a_packed_run_has_the_losses_and_the_tokens_of_a_padded_one(
    bucketed: MakeRecipe, batches: list[dict[str, Any]], kind: str, train_on_inputs: bool
) -> None:
    settings = {"train_on_inputs": train_on_inputs, "train.train_sampling_strategy": "sequential"}
    packed = finetune(bucketed(kind, name="packed", **settings))
    assert all("segments" in batch and batch["attention_mask"].all() for batch in batches)
    real = [int(batch["attention_mask"].sum()) for batch in batches]
    rows = [len(batch["segments"]) for batch in batches]
    batches.clear()
    padded = finetune(bucketed(kind, name="padded", packing="off", **settings))
    assert not any("segments" in batch for batch in batches)
    assert sum(rows) == sum(len(batch["input_ids"]) for batch in batches) == 14 + 2 * 4
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert figures(packed, "num_tokens") == figures(padded, "num_tokens")
    assert figures(packed, "num_tokens")[-1] == sum(real) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert figures(packed, "grad_norm") == pytest.approx(figures(padded, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_batches_are_filled_up_has_the_losses_and_the_tokens_of_one_without(
    bucketed: MakeRecipe, batches: list[dict[str, Any]], kind: str, packing: str
) -> None:
    plain = finetune(bucketed(kind, name="plain", packing=packing))
    lengths = [computed_tokens(batch) for batch in batches]
    batches.clear()
    filled = finetune(bucketed(kind, name="filled", packing=packing, **{"train.pad_to_multiple_of": 96}))
    assert [computed_tokens(batch) for batch in batches] == [-(-length // 96) * 96 for length in lengths] != lengths
    for name in ("loss", "mean_token_accuracy", "entropy"):
        assert figures(filled, name) == pytest.approx(figures(plain, name), rel=1e-5)
    assert figures(filled, "num_tokens") == figures(plain, "num_tokens")


@pytest.mark.parametrize("multiple", [0, -64, "-64"])
def test_a_multiple_below_one_is_refused(bucketed: MakeRecipe, multiple: int | str) -> None:
    with pytest.raises(RecipeError, match=r"`train\.pad_to_multiple_of` is (0|-64): it is a number of tokens, 1 or more"):
        finetune(bucketed("text", name="run", **{"train.pad_to_multiple_of": multiple}))


def test_packs_of_a_cpu_in_bfloat16_and_what_goes_through_the_head_have_few_lengths(
    bucketed: MakeRecipe, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    score = head.score
    monkeypatch.setattr(head, "score", lambda logits, targets: (scored.append(len(logits)), score(logits, targets))[1])
    runs = []
    for multiple in (None, 1):
        batches.clear()
        scored.clear()
        settings = {"model.dtype": "bfloat16", "train.pad_to_multiple_of": multiple, "data.eval_rows": 2}
        runs.append(finetune(bucketed("qwen2_vl", name=str(multiple), **settings, **{"train.logging_steps": 4})))
        lengths = [computed_tokens(batch) for batch in batches] + scored
        assert all(length % 128 == 0 for length in lengths) == (multiple is None)
    counts = [[value for entry in run.history for name, value in entry.items() if "num_tokens" in name] for run in runs]
    assert counts[0] == counts[1]
    assert len(counts[0]) > len(losses(runs[0]))  # those of evaluations and of the whole run too
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=5e-3)


@pytest.mark.parametrize("kind", [*KINDS, *map(longer, EVERY[3:])])
def test_a_packed_run_has_the_token_accuracy_and_the_entropy_of_a_padded_one(bucketed: MakeRecipe, kind: str) -> None:
    settings = {"train.train_sampling_strategy": "sequential", "train.per_device_train_batch_size": 4}
    settings |= {"train.gradient_accumulation_steps": 1, "packing": {"length": 2000}}
    packed = finetune(bucketed(kind, name="packed", **settings))
    padded = finetune(bucketed(kind, name="padded", **{**settings, "packing": "off"}))
    for name in ("mean_token_accuracy", "entropy"):
        assert figures(packed, name) == pytest.approx(figures(padded, name), abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_vl", "text"])
def test_a_shuffled_packed_run_learns_from_the_same_rows_in_each_step_as_a_padded_one(bucketed: MakeRecipe, kind: str) -> None:
    packed = finetune(bucketed(kind, name="packed"))
    padded = finetune(bucketed(kind, name="padded", packing="off"))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_shuffled_run_begins_with_its_costliest_micro_batch(
    bucketed: MakeRecipe, batches: list[dict[str, Any]], packing: str
) -> None:
    for seed in range(3):
        batches.clear()
        settings = {"train.seed": seed, "train.max_steps": 4, "packing": packing}
        run = finetune(bucketed("text", name="run", **settings), overwrite=True)
        sizes = [batch["input_ids"].numel() for batch in batches]
        full = sizes[: 3 * run.trainer.plan.micro_batches]  # the fourth step has what is left
        assert sizes[0] == max(full)


# ---- the head at trained positions only


def by_hand(recipe: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, float]:
    """Loss, token accuracy and entropy of the untrained model, from the logits of all positions."""
    torch.manual_seed(0)
    model, processor, family = load_model(load_recipe(recipe))
    batch = MultimodalCollator(processor, family, train_on_inputs=bool(recipe.get("train_on_inputs")))(rows)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1].float()
    logits, labels = logits[labels != -100], labels[labels != -100]
    log_probabilities = logits.log_softmax(-1)
    return {
        "loss": cross_entropy(logits, labels).item(),
        "mean_token_accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1).mean().item(),
    }


@pytest.mark.parametrize("train_on_inputs", [False, longer(True)])
@pytest.mark.parametrize("packing", [{"length": 2000}, "off"], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", EVERY)
def test_loss_accuracy_and_entropy_are_those_of_all_logits(
    recipe: MakeRecipe, kind: str, packing: Any, train_on_inputs: bool
) -> None:
    settings = {"train.per_device_train_batch_size": 8, "train.max_steps": 1, "train_on_inputs": train_on_inputs}
    asked = recipe(kind, packing=packing, **settings)
    run = finetune(asked)
    wanted = by_hand(asked, [run.train_rows[position] for position in range(8)])
    assert {name: run.history[0][name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_the_head_scores_no_position_that_is_not_trained(
    recipe: MakeRecipe, batches: list[dict[str, Any]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    step = Trainer.training_step

    def listen(self: Trainer, model: Any, *args: Any) -> Any:
        if not scored:  # what comes out of the model's body after the trainer's own hook is what its head gets
            core = self.model.get_base_model().base_model
            core.register_forward_hook(lambda _, __, output: scored.append(output.last_hidden_state.shape[:2].numel()))
        return step(self, model, *args)

    monkeypatch.setattr(Trainer, "training_step", listen)
    finetune(recipe(kind, **{"eval.samples": 0}))
    assert scored == [trained_tokens(batch["labels"]) for batch in batches]
    assert 0 < sum(scored) < sum(batch["input_ids"].numel() for batch in batches) / 2


@pytest.mark.parametrize("packed", [True, False])
def test_rows_without_a_trained_token_have_a_loss_of_zero(recipe: MakeRecipe, packed: bool) -> None:
    def nothing(rows: Any) -> dict[str, Any]:
        batch = loaded.pack(rows) if packed else loaded.padded[False](rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    loaded = Loaded(recipe())
    run = finetune(recipe(), collator=nothing)
    assert losses(run) == [0, 0]
    assert figures(run, "grad_norm") == [0, 0]
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_smoothed_labels_still_train(recipe: MakeRecipe, packing: str) -> None:
    settings = {"train.label_smoothing_factor": 0.1, "train.max_steps": 12, "packing": packing}
    run = finetune(recipe("pixtral", **settings))
    assert losses(run)[-1] < 0.8 * losses(run)[0]


def test_smoothed_labels_give_packed_rows_the_losses_of_padded_ones(bucketed: MakeRecipe) -> None:
    settings = {"train.label_smoothing_factor": 0.1, "train.train_sampling_strategy": "sequential"}
    packed = finetune(bucketed("qwen2_vl", name="packed", **settings))
    padded = finetune(bucketed("qwen2_vl", name="padded", packing="off", **settings))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


# ---- two processes


WHOLE_AND_STOPPED = """
import sys
from vlmtune import finetune
from vlmtune.trainer import Trainer

finetune(sys.argv[1])
step = Trainer.training_step

def stop(self, *args, **kwargs):
    if self.state.global_step == 4:
        raise KeyboardInterrupt
    return step(self, *args, **kwargs)

Trainer.training_step = stop
try:
    finetune(sys.argv[2])
    sys.exit("the run was not stopped")
except KeyboardInterrupt:
    Trainer.training_step = step
finetune(sys.argv[2], resume=True)
"""


@pytest.mark.parametrize(
    ("kind", "grouped"), [("qwen2_vl", False), ("qwen2_vl", True), *(longer(kind, False) for kind in EVERY[1:])]
)
def test_two_processes_pack_like_one_and_resume_in_the_middle_of_an_epoch_exactly(
    bucketed: MakeRecipe, tmp_path: Path, kind: str, grouped: bool
) -> None:
    shared: dict[str, Any] = {"lora.dropout": 0, "eval.samples": 0}
    if kind in ("mllama", "text"):  # smaller packs would open with another step: the order is shuffled for the others alone
        shared |= {"train.train_sampling_strategy": "sequential"}
    if grouped:
        rows = rows_file(tmp_path / "questions", pictures=[1], distinct=4)
        shared |= {"lora.scope": "all", "packing": {"group_by_image": True}, "data": {"source": str(rows), "format": "openai"}}
    one = finetune(bucketed(kind, name="one", **shared))
    shared |= {"train.per_device_train_batch_size": 1, "train.save_strategy": "steps", "train.save_steps": 3}
    for name in ("whole", "stopped"):
        content = load_recipe(bucketed(kind, name=name, **shared)).to_yaml()
        (tmp_path / f"{name}.yaml").write_text(content)
    (tmp_path / "script.py").write_text(WHOLE_AND_STOPPED)
    done = in_two_processes(tmp_path / "script.py", tmp_path / "whole.yaml", tmp_path / "stopped.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (logged(tmp_path / name) for name in ("whole", "stopped"))
    assert whole == resumed
    assert [entry["loss"] for entry in whole] == pytest.approx(losses(one), rel=1e-3)
    assert [entry["num_tokens"] for entry in whole] == figures(one, "num_tokens")


def logged(directory: Path) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy")
    log = json.loads((directory / "history.json").read_text())["log"]
    return [{name: entry[name] for name in names} for entry in log if "loss" in entry]
