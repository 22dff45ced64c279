"""From the sizes of pictures alone: the very tensors that the processor returns for real pictures, pixels apart."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import KINDS, make_processor, make_tokenizer

from vlmtune.collator import training_template
from vlmtune.escape import Escape
from vlmtune.families import Family, find_family
from vlmtune.sizes import blank, without_pixels

ALL = (*KINDS, "qwen2_5_vl", "smolvlm")
NOISE = np.random.default_rng(0).integers(0, 256, (2100, 2100, 3), dtype=np.uint8)
Rows = list[list[tuple[int, int]]]  # of every row the (width, height) of its pictures


def conversations(rows: Rows, picture: Any, text: str = "What is it?") -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": picture(*size)} for size in sizes),
                    {"type": "text", "text": text * (number + 1)},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A lamp."}]},
        ]
        for number, sizes in enumerate(rows)
    ]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(NOISE[:height, :width])


def process(processor: Any, rows: Rows, picture: Any, family: Any = None, **options: Any) -> dict[str, Any]:
    family = family or find_family(processor=processor)
    if "chat_template" not in options:
        options["chat_template"] = training_template(processor, family)
    options.setdefault("processor_kwargs", {"padding": True, "padding_side": "right"})
    options.setdefault("return_assistant_tokens_mask", True)
    return family.process(processor, conversations(rows, picture), **options)


def assert_same(processor: Any, rows: Rows, **options: Any) -> None:
    """The stand-in gives what the real processor gives for the same sizes: names, types and values."""
    family = find_family(processor=processor)
    real = process(processor, rows, noise, **options)
    found = process(without_pixels(processor, family), rows, blank, family=family, **options)
    assert found.keys() == {name for name in real if not name.startswith("pixel_")}
    for name, values in found.items():
        assert type(values) is type(real[name]), name
        if isinstance(values, torch.Tensor):
            assert values.dtype == real[name].dtype, name
            assert torch.equal(values, real[name]), name
        else:
            assert values == real[name], name


def some_rows(seed: int, longest: int) -> Rows:
    """One to four rows of no to three pictures, some of them long and thin."""
    draw = random.Random(seed)

    def size() -> tuple[int, int]:
        edge = draw.randint(1, longest)
        other = draw.choice([edge, draw.randint(1, longest), max(1, edge // draw.randint(2, 30))])
        return (edge, other) if draw.random() < 0.5 else (other, edge)

    rows = [[size() for _ in range(draw.choice([0, 1, 1, 2, 3]))] for _ in range(draw.randint(1, 4))]
    return rows if any(rows) else [[size()], *rows]


def accepted(processor: Any, rows: Rows) -> bool:
    try:
        process(processor, rows, noise)
    except (ValueError, RuntimeError, IndexError):
        return False
    return True


def realistic(kind: str) -> Any:
    """The hub's settings of pictures around a tokenizer of bytes."""
    processor = make_processor(kind)
    processor.image_processor = {
        "qwen2_vl": transformers.Qwen2VLImageProcessor,
        "qwen2_5_vl": transformers.Qwen2VLImageProcessor,
        "mllama": lambda: transformers.MllamaImageProcessor(size={"height": 560, "width": 560}, max_image_tiles=4),
        "pixtral": transformers.PixtralImageProcessor,
        "smolvlm": transformers.SmolVLMImageProcessor,
    }[kind]()
    return processor


@pytest.mark.parametrize("kind", ALL)
def test_sizes_tell_what_real_pictures_tell(kind: str) -> None:
    processor = make_processor(kind)
    compared = 0
    for seed in range(25):
        rows = some_rows(seed, longest=200)
        if accepted(processor, rows):
            assert_same(processor, rows)
            compared += 1
        else:
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                process(without_pixels(processor, find_family(processor=processor)), rows, blank)
    assert compared >= 12


@pytest.mark.parametrize("kind", ALL)
def test_sizes_tell_it_with_the_settings_of_the_hub(kind: str) -> None:
    processor = realistic(kind)
    for seed in range(3):
        assert_same(processor, some_rows(seed, longest=1500))
    assert_same(processor, [[(2100, 900)], [], [(20, 1000), (1, 1)]])


@pytest.mark.parametrize("kind", ALL)
def test_every_small_size(kind: str) -> None:
    processor = make_processor(kind)
    sizes = [(width, height) for width in (1, 2, 3, 27, 28, 29, 57, 100) for height in (1, 3, 4, 28, 42, 70)]
    sizes = [size for size in sizes if accepted(processor, [[size]])]
    assert len(sizes) > 30
    assert_same(processor, [sizes[start : start + 8] for start in range(0, len(sizes), 8)])


@pytest.mark.parametrize(
    ("kind", "size"), [("qwen2_vl", (2100, 10)), ("qwen2_5_vl", (10, 2100)), ("pixtral", (2000, 1)), ("pixtral", (1, 2000))]
)
def test_a_size_that_the_processor_refuses_is_refused_with_its_words(kind: str, size: tuple[int, int]) -> None:
    processor = realistic(kind)
    with pytest.raises((ValueError, RuntimeError)) as real:
        process(processor, [[size]], noise)
    with pytest.raises(real.type) as found:
        process(without_pixels(processor, find_family(processor=processor)), [[size]], blank)
    assert str(found.value) == str(real.value)


@pytest.mark.parametrize("kind", ALL)
def test_rows_without_pictures_and_prompts(kind: str) -> None:
    processor = make_processor(kind)
    assert_same(processor, [[], []])
    assert_same(processor, [[(50, 40)], []])
    assert_same(processor, [[], [(50, 40)], [], [(9, 9), (80, 40)], []])
    padding = {"padding": True, "padding_side": "left"}
    prompts = {"add_generation_prompt": True, "return_assistant_tokens_mask": False, "processor_kwargs": padding}
    assert_same(processor, [[(50, 40)], []], **prompts)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("qwen2_vl", {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}}),
        ("pixtral", {"size": {"longest_edge": 128}}),
        ("mllama", {"size": {"height": 56, "width": 56}}),
        ("smolvlm", {"do_image_splitting": True, "size": {"longest_edge": 100}}),
        ("qwen2_vl", {"do_resize": False}),
        ("pixtral", {"do_resize": False}),
    ],
)
def test_settings_given_with_the_call_count(kind: str, setting: dict[str, Any]) -> None:
    options = {"processor_kwargs": {"padding": True, "images_kwargs": setting}}
    assert_same(make_processor(kind), [[(112, 56)], [(56, 168), (280, 84)]], **options)


@pytest.mark.parametrize("kind", ALL)
def test_together_with_escape_in_either_order(kind: str) -> None:
    processor = make_processor(kind)
    family = find_family(processor=processor)
    escape = Escape(processor)
    template = training_template(processor, family)
    real = family.process(
        escape.processor, [escape(c) for c in conversations([[(50, 40)]], noise, "<image>[IMG]\n")], chat_template=template
    )
    sizes_only = Escape(without_pixels(processor, family))
    for escaped, stand_in in [(escape, without_pixels(escape.processor, family)), (sizes_only, sizes_only.processor)]:
        talks = [escaped(c) for c in conversations([[(50, 40)]], blank, "<image>[IMG]\n")]
        found = family.process(stand_in, talks, chat_template=template)
        assert torch.equal(escaped.restore(found["input_ids"]), escape.restore(real["input_ids"]))


def test_the_processor_given_stays_and_the_copy_can_be_copied_and_sent_to_workers() -> None:
    processor = make_processor("qwen2_vl")
    family = find_family(processor=processor)
    stand_in = without_pixels(processor, family)
    assert isinstance(processor.image_processor, transformers.Qwen2VLImageProcessor)
    assert stand_in.image_processor.merge_size == 2
    first = process(stand_in, [[(50, 40)]], blank, family=family)
    for other in (copy.deepcopy(stand_in), pickle.loads(pickle.dumps(stand_in))):
        again = process(other, [[(50, 40)]], blank, family=family)
        assert torch.equal(again["image_grid_thw"], first["image_grid_thw"])
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = stand_in.image_processor.nothing_like_it


def test_what_is_returned_is_the_callers_own() -> None:
    processor = make_processor("qwen2_vl")
    family = find_family(processor=processor)
    stand_in = without_pixels(processor, family)
    process(stand_in, [[(50, 40)]], blank, family=family)["image_grid_thw"].zero_()
    assert process(stand_in, [[(50, 40)]], blank, family=family)["image_grid_thw"].all()


def test_a_processor_that_counts_tokens_by_the_shape_of_pixels() -> None:
    """As LLaVA's does; without the family's own arithmetic."""
    tokenizer = make_tokenizer("smolvlm")
    image_processor = transformers.CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}{% endfor %}"
    )
    processor = transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=template
    )
    assert_same(processor, [[(50, 40)], []], chat_template=template, return_assistant_tokens_mask=False)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_familys_own_arithmetic_the_processor_tells_the_same(kind: str) -> None:
    """Mllama's on black pictures, for it puts its tensors on the pictures' device; the others on none."""
    processor = make_processor(kind)
    family = find_family(processor=processor)
    pictures = [[blank(50, 40), blank(9, 100)], [blank(3, 3)]]
    fast = family.picture_inputs(processor.image_processor, pictures, return_tensors="pt")
    slow = Family.picture_inputs(family, processor.image_processor, pictures, return_tensors="pt")
    assert fast.keys() == slow.keys()
    assert all(torch.equal(torch.as_tensor(fast[name]), slow[name]) for name in fast if name != "num_tiles")
    assert fast.get("num_tiles") == slow.get("num_tiles")


def test_blank_takes_no_memory() -> None:
    assert blank(4000, 3000).shape == (3000, 4000, 3)
    assert blank(4000, 3000).strides == (0, 0, 0)
