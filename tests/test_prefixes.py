"""What rows of a pack begin with alike is computed once, and everything comes out as if it were not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_attention import DEVICES, layer, tensors
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlmtune import MultimodalCollator, batching, collator, finetune, load_recipe, model, proof
from vlmtune.attention import BLOCK, packed_attention
from vlmtune.batch import fill_up, flatten
from vlmtune.batching import usable_rows
from vlmtune.collator import PackingCollator
from vlmtune.console import console
from vlmtune.errors import RecipeError
from vlmtune.model import attend_by_row, load_model, positions_model, share_prefixes_in
from vlmtune.prefixes import compute_once, share_prefixes
from vlmtune.proof import packing_fault
from vlmtune.trainer import Trainer

MakeRecipe = Callable[..., dict[str, Any]]
PICTURE = 5


def pack(*rows: list[int]) -> dict[str, Any]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return flatten({"input_ids": ids, "attention_mask": mask, "labels": ids})


def shared(*rows: list[int], pictures: Sequence[str] | None = None) -> dict[str, Any]:
    """Each with a picture of its own, unless it is said which."""
    return share_prefixes(pack(*rows), image_token_ids={PICTURE}, pictures=pictures or range(len(rows)))


# ---- which tokens


def test_a_beginning_that_two_rows_have_is_computed_in_one_of_them() -> None:
    batch = shared([7, 8, 9], [7, 8, 5, 6])
    assert batch["unique"].tolist() == [0, 1, 2, 5, 6]
    assert batch["inverse"].tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert batch["computed"] == [3, 2]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 7]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 4)
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    plain = pack([7, 8, 9], [7, 8, 5, 6])
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        assert torch.equal(batch[name], plain[name])


def test_each_row_shares_with_the_one_that_is_most_like_it() -> None:
    batch = shared([1, 2, 3, 4, 8], [1, 9, 8], [1, 2, 3, 6, 8], [2, 8])
    assert sorted(batch["computed"]) == [2, 2, 2, 5]
    assert len(batch["unique"]) == 11


@pytest.mark.parametrize(
    "rows",
    [
        ([1, 2, 3], [2, 2, 3]),
        ([PICTURE, 2, 3], [PICTURE, 2, 3]),  # of another picture
        ([4], [4]),
        ([4, 5, 6],),
    ],
)
def test_rows_that_do_not_begin_alike_stay_as_they_are(rows: tuple[list[int], ...]) -> None:
    assert shared(*rows).keys() == pack(*rows).keys()


def test_a_picture_that_two_rows_show_is_computed_in_one_of_them() -> None:
    rows = ([7, PICTURE, PICTURE, 8, 1], [7, PICTURE, PICTURE, 8, 2], [7, PICTURE, PICTURE, 9, 1])
    batch = shared(*rows, pictures=["cat", "cat", "cat"])
    assert batch["computed"] == [5, 1, 2]
    assert batch["inverse"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 6, 7]
    assert shared(*rows, pictures=["cat", "dog", "cat"])["computed"] == [5, 4, 2]
    assert shared(*rows, pictures=["cat", "dog", "cow"])["computed"] == [5, 4, 4]


def test_other_pictures_and_the_last_token_are_each_row_s_own() -> None:
    assert shared([1, 2, PICTURE, 3], [1, 2, PICTURE, 3])["computed"] == [4, 2]
    assert shared([1, 2, 3], [1, 2, 3])["computed"] == [3, 1]
    assert shared([1, 2], [1, 2, 3])["computed"] == [2, 2]


def test_rows_whose_positions_differ_are_not_alike() -> None:
    batch = pack([1, 2, 3], [1, 2, 4])
    elsewhere = {**batch, "position_ids": torch.arange(6)[None]}
    assert "unique" in share_prefixes(batch, image_token_ids=[], pictures=[(), ()])
    assert "unique" not in share_prefixes(elsewhere, image_token_ids=[], pictures=[(), ()])


ROWS = st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.integers(0, 2)), min_size=1, max_size=6)


@given(ROWS)
def test_a_token_is_only_ever_taken_for_one_with_the_same_before_it(given_rows: list[tuple[list[int], int]]) -> None:
    rows, pictures = zip(*given_rows, strict=True)
    batch = share_prefixes(pack(*rows), image_token_ids={3}, pictures=pictures)
    if "unique" not in batch:
        return
    sights = [[(token, shown) if token == 3 else token for token in row] for row, shown in given_rows]
    before = [sight[: place + 1] for sight in sights for place in range(len(sight))]
    unique, inverse = batch["unique"].tolist(), batch["inverse"].tolist()
    assert [before[unique[place]] for place in inverse] == before
    assert unique == sorted(unique)
    assert all(inverse[place] == number for number, place in enumerate(unique))
    assert sum(batch["computed"]) == len(unique) < len(before)
    for row, own, place in zip(rows, batch["computed"], torch.tensor([0, *map(len, rows)]).cumsum(0).tolist(), strict=False):
        assert unique[inverse[place + len(row) - 1]] == place + len(row) - 1
        assert all(unique[inverse[there]] == there for there in range(place + len(row) - own, place + len(row)))


def test_what_is_computed_is_filled_up() -> None:
    batch = fill_up(shared([7, 8, 9], [7, 8, 4, 6]), 8, pad_token_id=0)
    assert batch["unique"].tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert batch["inverse"].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert batch["computed"] == [3, 2, 3]
    assert batch["segments"] == [3, 4, 3]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 7, 10]
    assert batch["input_ids"].tolist() == [[7, 8, 9, 7, 8, 4, 6, 0, 0, 0]]


# ---- attention

COMPUTED = (700, 300, 1, BLOCK + 9, 64)  # of rows that begin with the first one's tokens
BEFORE = (0, 250, 130, 130, 1)


def inverse_of(device: str) -> Tensor:
    starts = torch.tensor([0, *COMPUTED]).cumsum(0).tolist()
    own = [torch.arange(start, start + count) for start, count in zip(starts, COMPUTED, strict=False)]
    parts = [part for before, rest in zip(BEFORE, own, strict=True) for part in (torch.arange(before), rest)]
    return torch.cat(parts).to(device)


def together(query: Tensor, key: Tensor, value: Tensor, inverse: Tensor) -> Tensor:
    segments = [before + own for before, own in zip(BEFORE, COMPUTED, strict=True)]
    queries, keys = (torch.tensor([0, *lengths], device=query.device).cumsum(0).int() for lengths in (COMPUTED, segments))
    options: dict[str, Any] = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys, "max_length_q": 700, "max_length_k": 700}
    options |= {"segments": segments, "computed": COMPUTED, "inverse": inverse, "scaling": 0.25}
    return packed_attention(layer(), query, key, value, None, **options)[0]


def row_by_row(query: Tensor, key: Tensor, value: Tensor, inverse: Tensor) -> Tensor:
    """What SDPA makes of each whole row, and of that what is not another's."""
    found: list[Tensor] = []
    start = 0
    for before, own in zip(BEFORE, COMPUTED, strict=True):
        places = inverse[start : start + before + own]
        start += before + own
        whole = sdpa_attention_forward(layer(), *(tensor[:, :, places] for tensor in (query, key, value)), None, scaling=0.25)[
            0
        ]
        found.append(whole[:, before:])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rows_attend_to_a_beginning_that_another_has_computed(device: str, dtype: torch.dtype, close: float) -> None:
    inverse, found = inverse_of(device), list[list[Tensor]]()
    for attend, kind in ((together, dtype), (row_by_row, torch.float32)):
        inputs = tensors(sum(COMPUTED), kind, device)
        seen = attend(*inputs, inverse)
        found.append([seen.detach(), *torch.autograd.grad(seen.float().square().sum(), inputs)])
    for rounded, wanted in zip(*found, strict=True):
        assert (rounded.float() - wanted).norm() <= close * wanted.norm()


# ---- runs


def run_with(recipe: Mapping[str, Any], shares: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    step = Trainer.training_step

    def look(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        seen.append(dict(inputs))
        return step(self, model, inputs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", look)
        if not shares:
            patch.setattr(collator, "share_prefixes", lambda packed, **_: packed)
            patch.setattr(proof, "packing_fault", lambda *_: None)
        return finetune(recipe, overwrite=True), seen


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2_vl", {"train_on_inputs": True}),
        ("qwen2_vl", {"model.dtype": "bfloat16", "train.bf16": True, "train_on_inputs": True}),
        ("qwen2_vl", {"lora.scope": "all", "lora.dropout": 0.0, "train.gradient_checkpointing": True}),
        ("pixtral", {"vision_cache": "memory"}),
        ("qwen2_5_vl", {}),
        ("qwen3_vl", {}),
        ("text", {"train_on_inputs": True}),
        ("text", {"train.label_smoothing_factor": 0.1}),
    ],
)
def test_a_run_learns_what_it_learns_without(
    recipe: MakeRecipe, kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (with_it, batches), (without, others) = (run_with(recipe(kind, **settings), on, monkeypatch) for on in (True, False))
    assert all(len(batch["unique"]) < batch["input_ids"].shape[1] for batch in batches)
    assert not any("unique" in batch for batch in others)
    for entry, wanted in zip(with_it.history, without.history, strict=True):
        for name in {"loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens"} & wanted.keys():
            assert entry[name] == pytest.approx(wanted[name], rel=2e-2 if "train.bf16" in settings else 1e-4), name


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Twelve rows, three about each of four pictures, these never side by side."""
    for number in range(4):
        Image.new("RGB", (56, 56), (60 * number, 100, 200)).save(tmp_path / f"{number}.png")
    names = ({"image": f"{number % 4}.png", "Product Name": f"Nr. {number}"} for number in range(12))
    rows = [{**name, "description": "a" * number} for number, name in enumerate(names, 1)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "questions.jsonl")


def pictures_computed(batch: Mapping[str, Any], image_token: int) -> int:
    computed = batch["unique"] if "unique" in batch else torch.arange(batch["input_ids"].shape[1])
    return int((batch["input_ids"][0, computed] == image_token).sum()) // 4  # of two by two


@pytest.mark.parametrize("settings", [{"vision_cache": "memory"}, {"vision_cache": "off", "lora.scope": "all"}])
def test_rows_of_a_picture_come_together_where_asked_and_learn_the_same(
    recipe: MakeRecipe,
    questions: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "width", 500)  # no sentence is folded
    few = {"data.source": questions, "train.max_steps": -1, "train.num_train_epochs": 2, **settings}
    few |= {"train.per_device_train_batch_size": 6}
    grouped = recipe(packing={"group_by_image": True}, **few)
    (with_it, batches), (without, others) = (run_with(grouped, on, monkeypatch) for on in (True, False))
    image_token = with_it.model.config.image_token_id
    assert "common prefixes and pictures once (8 rows show another's), at most" in capsys.readouterr().out
    assert len(batches) == len(others) == 4
    assert [pictures_computed(batch, image_token) for batch in batches] == [2] * 4
    assert [pictures_computed(batch, image_token) for batch in others] == [6] * 4
    for entry, wanted in zip(with_it.history, without.history, strict=True):
        for name in {"loss", "grad_norm", "mean_token_accuracy", "num_tokens"} & wanted.keys():
            assert entry[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2_vl", {"lora.scope": "all", "train.gradient_checkpointing": True}),
        ("qwen2_vl", {"model.dtype": "bfloat16", "train.bf16": True}),
        ("qwen2_vl", {"model.dtype": "bfloat16", "train.bf16": True, "lora.scope": "all"}),
        ("pixtral", {"lora.scope": "vision"}),
        ("smolvlm", {"lora.scope": "all"}),
    ],
)
def test_a_tower_without_kept_features_sees_a_picture_once_for_all_rows_of_a_micro_batch(
    recipe: MakeRecipe, questions: str, kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"data.source": questions, "train.per_device_train_batch_size": 6, "vision_cache": "off", "lora.dropout": 0.0}
    grouped = recipe(kind, packing={"group_by_image": True}, **{**few, **settings})
    seen: list[int] = []
    encode = model.encoded

    def counted(*args: Any) -> list[Tensor]:
        features = encode(*args)
        seen.append(len(features))
        return features

    monkeypatch.setattr(model, "encoded", counted)
    once, batches = run_with(grouped, True, monkeypatch)
    steps = len(batches)
    assert seen[-steps:] == [2] * steps
    assert all(sorted(batch["shown"]) == [0, 0, 0, 1, 1, 1] for batch in batches)
    assert not any("pixel_values" in batch for batch in batches)
    tried = batching.packs_tried_out
    monkeypatch.setattr(batching, "packs_tried_out", lambda *args, **options: (*tried(*args, **options)[:2], False))
    every, others = run_with(grouped, True, monkeypatch)
    assert all("pixel_values" in batch and "distinct" not in batch for batch in others)
    for entry, wanted in zip(once.history, every.history, strict=True):
        for name in {"loss", "grad_norm", "mean_token_accuracy", "num_tokens"} & wanted.keys():
            assert entry[name] == pytest.approx(wanted[name], rel=2e-2 if "train.bf16" in settings else 1e-4), name


def test_a_model_that_takes_no_pictures_apart_from_rows_sees_each_row_s_own(
    recipe: MakeRecipe, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.encoded
    monkeypatch.setattr(model, "encoded", lambda *args: [-feature for feature in encode(*args)])
    given = {"data.source": questions, "train.per_device_train_batch_size": 6, "lora.scope": "all"}
    _, batches = run_with(recipe(packing={"group_by_image": True}, **given), True, monkeypatch)
    assert all("pixel_values" in batch and "unique" in batch for batch in batches)


def test_rows_of_a_picture_are_not_brought_together_unasked(
    recipe: MakeRecipe, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(**{"data.source": questions, "train.max_steps": 4, "train.per_device_train_batch_size": 3})
    run, batches = run_with(given, True, monkeypatch)
    assert sum(pictures_computed(batch, run.model.config.image_token_id) for batch in batches) > 4


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mllama", {}, "pictures are read through cross-attention here"),
        ("qwen2_vl", {"model.attention": "eager"}, "eager"),
        ("qwen2_vl", {"train.torch_compile": True, "train.torch_compile_backend": "eager"}, "`train.torch_compile` is on"),
    ],
)
def test_a_model_that_gains_nothing_from_it_refuses_to_group(
    recipe: MakeRecipe, questions: str, kind: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=rf"`packing.group_by_image` is on, and .*{said}"):
        finetune(recipe(kind, packing={"group_by_image": True}, **{"data.source": questions}, **settings))


def test_grouping_goes_with_packs_and_with_our_collator(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"packing\.group_by_image is for packs, and packing\.mode is off"):
        load_recipe(recipe(packing={"mode": "off", "group_by_image": True}))
    with pytest.raises(RecipeError, match=r"`packing\.group_by_image` is for vlmtune's collator"):
        finetune(recipe(packing={"group_by_image": True}), collator=lambda rows: {})


def test_rows_are_alike_that_show_the_same_pictures_in_the_same_order(recipe: MakeRecipe, questions: str) -> None:
    _, processor, family = load_model(load_recipe(recipe()))
    cat, dog = (Path(questions).with_name(name) for name in ("0.png", "1.png"))
    copied = cat.with_name("copy.png")
    copied.write_bytes(cat.read_bytes())
    film = {"type": "video", "video": "film.mp4"}
    shown = [[cat], [dog], [copied], [cat, dog], [dog, cat], [cat, dog], [], [], [film], [film]]
    parts = [[{"type": "image", "image": str(part)} if isinstance(part, Path) else part for part in row] for row in shown]
    rows = [{"messages": [{"role": "user", "content": [*each, {"type": "text", "text": "Well?"}]}]} for each in parts]
    assert [*batching.by_pictures(MultimodalCollator(processor, family), rows)] == [0, 1, 0, 3, 4, 3, 6, 7, 8, 9]


def test_where_pictures_are_shared_rows_with_pictures_are_tried_and_the_first_s_picture_twice() -> None:
    def row(name: str, *pictures: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": picture} for picture in pictures]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "abcd"}]}
        return {"name": name, "messages": [{"role": "user", "content": parts}, answer]}

    def tried(rows: list[dict[str, Any]], shares_pictures: bool) -> list[tuple[str, str]]:
        packing = PackingCollator(cast("Any", None), None, shares_pictures=shares_pictures)
        chosen = proof._samples(packing, cast("Any", rows), range(1, len(rows) + 1))
        return [(one["name"], one["messages"][-1]["content"][0]["text"]) for one in chosen]

    texts = [row(f"text {number}") for number in range(proof.LOOKED_AT)]
    shown = [row("cat", "cat.png"), row("dog", "dog.png")]
    assert tried([*texts, *shown], True) == [("cat", "abcd"), ("cat", "ab"), ("dog", "abcd")]
    assert tried([texts[0], *shown], True) == [("cat", "abcd"), ("cat", "ab"), ("dog", "abcd")]
    assert tried([*texts, shown[0]], True) == [("cat", "abcd"), ("cat", "ab"), ("text 0", "abcd")]
    assert tried(shown[:1], True) == [("cat", "abcd"), ("cat", "ab")]
    assert tried(texts, True) == [("text 0", "abcd"), ("text 0", "ab"), ("text 1", "abcd")]
    assert tried([texts[0], *shown], False) == [("cat", "abcd"), ("dog", "abcd")]
    assert tried(shown[:1], False) == [("cat", "abcd")] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_in_the_few_tokens_that_a_borrowing_row_computes_is_told(
    recipe: MakeRecipe, questions: str, dtype: str
) -> None:
    checked = load_recipe(recipe(**{"data.source": questions, "model.dtype": dtype}))
    model, processor, family = load_model(checked)
    attend_by_row(model)
    assert not share_prefixes_in(model)
    shares = {"shares": True, "shares_pictures": True}
    packing = PackingCollator(MultimodalCollator(processor, family), positions_model(model), **shares)
    rows = usable_rows(checked, 0, check_images=False).train
    tried = [rows[11], proof._cut_short(rows[11]), rows[10]]
    assert packing_fault(model, packing, tried) is None
    apart = replace(packing, apart=True)
    assert packing_fault(model, apart, tried) is None
    assert packing_fault(model, OtherPictures(**vars(apart)), tried) == "a packed row comes out other than by itself"
    assert packing_fault(model, OtherWayRound(**vars(packing)), tried) == "a packed row comes out other than by itself"

    def forget(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        if "computed" in inputs:
            _, end = (sum(inputs["segments"][:place]) for place in (1, 2))
            output.last_hidden_state[:, end - inputs["computed"][1] : end] = 0

    model.get_base_model().base_model.get_decoder().register_forward_hook(forget, with_kwargs=True)
    assert packing_fault(model, packing, tried) == "a packed row comes out other than by itself"


class OtherWayRound(PackingCollator):
    """Gives rows each other's pictures, which are of one size."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        if len(rows) > 1:
            batch["pixel_values"] = torch.cat(batch["pixel_values"].chunk(len(rows))[::-1])
        return batch


class OtherPictures(PackingCollator):
    """Gives rows each other's pictures, which come apart from them."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, "shown": [1 - number for number in batch["shown"]]}


def test_a_row_is_cut_short_by_half_of_what_it_ends_with() -> None:
    def answered(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"name": "row 1", "messages": [{"role": "user", "content": []}, {"role": "assistant", "content": [*parts]}]}

    for text, half in (("abcd", "ab"), ("  abc ", "ab"), ("a", "a")):
        assert proof._cut_short(answered({"type": "text", "text": text})) == answered({"type": "text", "text": half})
    for row in (answered(), answered({"type": "text", "text": " "}), answered({"type": "image", "image": "a.png"})):
        assert proof._cut_short(row) == row


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mllama", {}),  # tokens before the picture see it
        ("text", {"train.torch_compile": True, "train.torch_compile_backend": "eager"}),
    ],
)
def test_where_a_beginning_cannot_be_shared_it_is_not(
    recipe: MakeRecipe, kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batches = run_with(recipe(kind, **settings), True, monkeypatch)
    assert not any("unique" in batch for batch in batches)
    assert all("segments" in batch for batch in batches)


def test_a_model_that_looks_another_way_at_its_tokens_computes_all(recipe: MakeRecipe) -> None:
    model, _, _ = load_model(load_recipe(recipe("text")))
    attend_by_row(model)
    assert not share_prefixes_in(model)
    config: Any = model.config
    for name, value in {
        "sliding_window": 4,
        "attention_chunk_size": 4,
        "layer_types": ["full_attention", "linear_attention"],
        "output_router_logits": False,  # a mixture: TRL sets it
        "_attn_implementation": "flash_attention_2",
    }.items():
        other = copy.copy(config)
        setattr(other, name, value)
        model.get_base_model().config = other
        assert share_prefixes_in(model), name


def test_a_model_that_cannot_share_is_told_and_packed_without(
    recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 500)  # no sentence is folded
    finetune(recipe())
    assert "on: no padding, common prefixes once, at most" in capsys.readouterr().out
    for broken in (lambda _: None, spoilt, partial(spoilt, borrowers_only=True)):
        monkeypatch.setattr("vlmtune.model.compute_once", broken)
        run = finetune(recipe(), overwrite=True)
        said = capsys.readouterr().out
        assert "on: no padding, at most" in said
        assert run.trainer.plan.packed


def spoilt(decoder: Any, *, borrowers_only: bool = False) -> None:
    """Takes the right tokens, and gives other ones back: everywhere, or only where another row has computed them."""

    def take(module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        unique = inputs.get("unique")
        if unique is None:
            return args, inputs
        taken = {name: inputs[name][:, unique] for name in ("inputs_embeds", "attention_mask")}
        return args, {**inputs, **taken, "position_ids": inputs["position_ids"][..., unique]}

    def give(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> Any:
        if "unique" in inputs:
            inverse = inputs["inverse"]
            borrowed = inputs["unique"][inverse] != torch.arange(len(inverse))
            output.last_hidden_state = output.last_hidden_state[:, inverse if borrowers_only else inverse.flip(0)]
            output.last_hidden_state = torch.where(borrowed[:, None] & borrowers_only, 0.0, output.last_hidden_state)
        return output

    decoder.register_forward_pre_hook(take, with_kwargs=True)
    decoder.register_forward_hook(give, with_kwargs=True)


def test_the_row_that_is_held_against_itself_is_one_that_borrows(recipe: MakeRecipe) -> None:
    checked = load_recipe(recipe())
    model, processor, family = load_model(checked)
    attend_by_row(model)
    assert not share_prefixes_in(model)
    packing = PackingCollator(MultimodalCollator(processor, family), positions_model(model), shares=True)
    rows = usable_rows(checked, 0, check_images=False).train
    for pair in ([rows[0], rows[1]], [rows[1], rows[0]]):
        assert packing_fault(model, packing, pair) is None
    spoilt_model, _, _ = load_model(checked)
    attend_by_row(spoilt_model)
    spoilt(spoilt_model.get_base_model().base_model.get_decoder(), borrowers_only=True)
    for pair in ([rows[0], rows[1]], [rows[1], rows[0]]):
        assert packing_fault(spoilt_model, packing, pair) == "a packed row comes out other than by itself"


def test_a_decoder_that_is_called_by_place_gets_the_same() -> None:
    decoder = Decoder()
    compute_once(decoder)
    batch = {**shared([7, 8, 9], [7, 8, 4, 6])}
    ids, keys = batch.pop("input_ids"), ("unique", "inverse")
    inputs = {name: batch[name] for name in keys}
    for output in (decoder(ids, **inputs), decoder(input_ids=ids, **inputs)):
        assert decoder.seen == [[7, 8, 9, 4, 6]]
        assert output.last_hidden_state.tolist() == ids.tolist()
    with pytest.raises(ValueError, match=r"`attention_mask` is \[1, 1, 7, 7\], and the pack has 7 tokens"):
        decoder(ids, torch.ones(1, 1, 7, 7), **inputs)


class Decoder(nn.Module):
    """Gives its tokens back as if they were states."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        self.seen = input_ids.tolist()
        return SimpleNamespace(last_hidden_state=input_ids)
