"""From rows to a batch: one call of the processor, then labels."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL.Image import Image
from torch import Tensor

from vlmtune.album import Album
from vlmtune.batch import end_at_stop_token, fill_up, make_labels
from vlmtune.errors import DatasetError, ImageError, ModelError, one_line
from vlmtune.escape import Escape
from vlmtune.families import Family, find_family
from vlmtune.families.text import PLAIN
from vlmtune.features import FeatureStore
from vlmtune.prefixes import common_prefix, share_prefixes
from vlmtune.sizes import TokenCounter, blank, without_pixels
from vlmtune.tools import marked, with_tools

Row = Mapping[str, Any]


class MultimodalCollator:
    """A batch that a model can be trained on, from rows `{"messages": [...]}`.

    The batch holds what the processor returns and `labels`, all `[batch, seq, ...]` and right-padded. With
    `train_on_inputs=False` the labels are the assistant's turns with their stop tokens and nothing else; with `True` they
    are everything but padding and the tokens that stand for pictures.

    Args:
        processor: of a vision-language model, or the tokenizer of a language model.
        family: a `Family`, the name of one, or None to tell it from the processor.
        train_on_inputs: train on prompts too.
        max_length: longest row, in tokens.
        pad_to_multiple_of: batches have a multiple of so many tokens, by padding.
        chat_template: a template of one's own; None: as `training_template` finds it.

    Attributes:
        features: what the vision tower makes of the pictures, or None. A batch whose pictures are all in there has
            `image_features` in place of their pixels, and none of them is decoded: `Family.model_inputs` makes of it what a
            model's forward takes.

    Raises:
        ModelError: the chat template cannot tell answers from prompts, or trains no stop token.
        DatasetError: a row that the processor refuses or that is longer than `max_length`; the message names it by the
            row's `"name"`, or by its place in the batch.

    """

    def __init__(
        self,
        processor: Any,
        family: Family | str | None = None,
        train_on_inputs: bool = False,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.processor = processor
        self.family = find_family(family, processor=processor)
        self.train_on_inputs = train_on_inputs
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.features: FeatureStore | None = None
        self.album = Album()
        self._told: dict[tuple[int, int], tuple[int, int]] = {}  # width, height → tokens, and how long its features are
        self._counters: dict[bool, TokenCounter] = {}
        self._sizes_only: dict[bool, Any] = {}  # processors without pixels: for plain texts, and for escaped ones
        self._template_faults: dict[int, str] = {}  # a conversation with tools or reasoning → what the template makes of it
        self.chat_template = training_template(processor, self.family, masked=not train_on_inputs, given=chat_template)
        self.never_trained = self.family.image_token_ids(processor) | self.family.video_token_ids(processor)
        if self.tokenizer.pad_token is None:  # safe: padding is told by the attention mask
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def __call__(self, rows: Sequence[Row], *, apart: bool = False) -> dict[str, Any]:
        """The batch of these rows.

        Args:
            rows: with a `"name"` each, or told by their place.
            apart: in the place of pixels whose features are not known come `distinct`, what the processor makes of the
                pictures, each once and apart from the rows, and `shown`, which of these each picture of the rows is.
                `model.with_features` goes on from there.

        """
        features = self._known_features(rows)
        pictures = _Distinct(self.album) if apart and features is None else None
        batch = self._encode(
            rows, trained=not self.train_on_inputs, pixels=features is None and pictures is None, open_picture=pictures
        )
        trained = batch.pop("assistant_masks", None)
        if trained is not None:
            trained = self._answers(batch["input_ids"], trained, rows)
        batch["labels"] = make_labels(
            batch["input_ids"], batch["attention_mask"], image_token_ids=self.never_trained, trained=trained
        )
        self._check_lengths(batch["attention_mask"], rows)
        if features:
            batch["image_features"] = self.family.join_features(batch, features)
        if pictures is not None and pictures.shown:
            batch |= {"distinct": self.opened_pictures(pictures.images), "shown": pictures.shown}
        return self.filled(batch, self.pad_to_multiple_of or 1)

    def filled(self, batch: Mapping[str, Any], multiple: int) -> dict[str, Any]:
        """`fill_up`, with this tokenizer's pad token."""
        return fill_up(batch, multiple, pad_token_id=self.tokenizer.pad_token_id)

    def with_features(self, features: FeatureStore) -> MultimodalCollator:
        """The same collator, with `features`."""
        other = copy.copy(self)
        other.features = features
        return other

    def pictures(self, sources: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows that hold one picture each and nothing else to speak of, for the vision tower."""
        return self.opened_pictures([self.album.open(source) for source in sources])

    def opened_pictures(self, images: Sequence[Image]) -> dict[str, Any]:
        """The same, of pictures that the album has opened."""
        return self._encode([_alone(image) for image in images], open_picture=_as_it_is)

    def picture_tokens(self, source: Any) -> int:
        """How many tokens stand for a picture, told from its size."""
        return self._told_from_size(source)[0]

    def feature_length(self, source: Any) -> int:
        """`Family.feature_length` of a picture, told from its size."""
        return self._told_from_size(source)[1]

    def _told_from_size(self, source: Any) -> tuple[int, int]:
        size = self.album.size(source)
        if size not in self._told:
            batch = self._encode([_alone(source)], pixels=False)
            placeholder = self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            tokens = int((batch["input_ids"] == placeholder).sum())
            self._told[size] = tokens, self.family.feature_length(batch, tokens)
        return self._told[size]

    def shown(self, row: Row) -> tuple[str, ...]:
        """The fingerprints of a row's pictures, in order. Videos have none: a row's are like no other row's."""
        parts = [part for message in row["messages"] for part in message["content"] if part["type"] != "text"]
        own = str(row.get("name") or id(row))
        return tuple(self.album.fingerprint(part["image"]) if part["type"] == "image" else own for part in parts)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row, those counted that stand for its pictures; no picture is decoded."""
        conversations = [self._with_pictures(row, place, self._blank) for place, row in enumerate(rows, 1)]
        escaped = any(self.escape.is_needed(messages) for messages in conversations)
        if escaped not in self._counters:
            self._counters[escaped] = TokenCounter(self._processor(escaped=escaped, pixels=False))
        shaped = [self._shape(self.escape(messages) if escaped else messages) for messages in conversations]
        try:
            return self._counters[escaped](shaped, with_tools(self.chat_template, shaped))
        except ModelError:
            raise
        except Exception as error:
            raise self._refusal(rows, conversations, error, pixels=False) from error

    def prompts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What a model is given to answer: the rows without a last answer, left-padded, ready for `generate`."""
        return self._encode(rows, add_generation_prompt=True, padding_side="left")

    def answer(self, row: Row) -> str:
        """The row's last answer as the model would write it, its calls and reasoning as the chat template has them."""
        whole = self._encode([row], pixels=False)["input_ids"][0]
        asked = {**row, "messages": row["messages"][:-1]}
        prompt = self._encode([asked], pixels=False, add_generation_prompt=True)["input_ids"][0]
        same = common_prefix(whole.tolist(), prompt.tolist())
        return self.tokenizer.decode(whole[same:], skip_special_tokens=True).strip()

    @cached_property
    def stop_token_id(self) -> int:
        """The token that ends an answer in the chat template: generation stops there."""
        if not has_markers(self.chat_template):
            return int(self.tokenizer.eos_token_id)
        text = [{"type": "text", "text": "a"}]
        row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        batch = self._encode([row], trained=True)
        trained = self._answers(batch["input_ids"], batch["assistant_masks"], [row])
        return int(batch["input_ids"][trained][-1])

    def _encode(
        self, rows: Sequence[Row], *, pixels: bool = True, open_picture: Callable[[Any], Any] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """The processor's batch; where it refuses, the rows are tried one by one to name the one at fault.

        Without `pixels`, pictures are not decoded, and all is there but `pixel_values`.
        """
        open_picture = open_picture or (self.album.open if pixels else self._blank)
        conversations = [self._with_pictures(row, place, open_picture) for place, row in enumerate(rows, 1)]
        options["pixels"] = pixels
        try:
            return self._process(conversations, **options)
        except ModelError:
            raise
        except Exception as error:
            raise self._refusal(rows, conversations, error, **options) from error

    def _refusal(self, rows: Sequence[Row], conversations: list[Any], error: Exception, **options: Any) -> Exception:
        """The error that names the row at fault, or the one given where each row is taken by itself."""
        for place, (row, conversation) in enumerate(zip(rows, conversations, strict=True), 1):
            try:
                self._process([conversation], **options)
            except Exception as own:
                if isinstance(own, TemplateSyntaxError):
                    return ModelError(f"the chat template is no valid Jinja: line {own.lineno}: {one_line(own)}")
                who = "chat template" if isinstance(own, TemplateError) else "processor"
                sizes = ", ".join(_picture_sizes(conversation))
                seen = f" (its pictures have {sizes} pixels)" if sizes else ""
                return DatasetError(f"{_name(row, place)}: the model's {who} refuses it{seen}: {one_line(own)}")
        return error

    def _process(
        self,
        conversations: list[list[dict[str, Any]]],
        *,
        pixels: bool = True,
        trained: bool = False,
        add_generation_prompt: bool = False,
        padding_side: str = "right",
    ) -> dict[str, Tensor]:
        if trained and pixels and self.family.takes_images:  # the mask is made much faster without pixels
            blanks = [_with_blanks(messages) for messages in conversations]
            masks = self._process(blanks, pixels=False, trained=True, padding_side=padding_side)["assistant_masks"]
            return {**self._process(conversations, padding_side=padding_side), "assistant_masks": masks}
        escaped = any(self.escape.is_needed(messages) for messages in conversations)
        processor = self._processor(escaped=escaped, pixels=pixels)
        if escaped:
            conversations = [self.escape(messages) for messages in conversations]
        batch = self.family.process(
            processor,
            [self._shape(messages) for messages in conversations],
            chat_template=with_tools(self.chat_template, conversations),
            return_assistant_tokens_mask=trained,
            add_generation_prompt=add_generation_prompt,
            **self._padding(padding_side),
        )
        if escaped:
            batch["input_ids"] = self.escape.restore(batch["input_ids"])
        if trained:
            batch["assistant_masks"] = torch.as_tensor(batch["assistant_masks"])
        return batch

    @cached_property
    def escape(self) -> Escape:
        return Escape(self.processor)

    def _processor(self, *, escaped: bool, pixels: bool) -> Any:
        if pixels or not self.family.takes_images:
            return self.escape.processor if escaped else self.processor
        if escaped not in self._sizes_only:
            self._sizes_only[escaped] = without_pixels(self._processor(escaped=escaped, pixels=True), self.family)
        return self._sizes_only[escaped]

    def _blank(self, source: Any) -> Any:
        """A picture of the source's size, for a processor without pixels."""
        return blank(*self.album.size(source))

    def _known_features(self, rows: Sequence[Row]) -> list[Tensor] | None:
        """The features of all pictures of the rows, in order; None where one is missing."""
        if self.features is None:
            return None
        keys = [self.album.fingerprint(source) for row in rows for source in pictures(row)]
        try:
            return [self.features[key] for key in keys]
        except KeyError:
            return None

    def _padding(self, side: str) -> dict[str, Any]:
        if self.tokenizer is self.processor:
            return {"padding": True, "tokenizer_kwargs": {"padding_side": side}}
        return {"processor_kwargs": {"padding": True, "padding_side": side}}

    def _with_pictures(self, row: Row, place: int, open_picture: Callable[[Any], Any]) -> list[dict[str, Any]]:
        """The row's messages, every picture opened."""

        def decoded(part: Mapping[str, Any]) -> dict[str, Any]:
            if part["type"] != "text" and not self.family.takes_images:
                kind = {"image": "picture"}.get(part["type"], part["type"])
                raise DatasetError(f"{_name(row, place)} has a {kind}, and {self.family.name} models take none")
            if part["type"] != "image":
                return dict(part)
            try:
                return {"type": "image", "image": open_picture(part["image"])}
            except ImageError as error:
                raise ImageError(f"{_name(row, place)}: {error}") from None

        messages = [{**m, "content": [decoded(part) for part in m["content"]]} for m in row["messages"]]
        messages = self.as_written(messages)
        if fault := self._template_fault(messages):
            raise DatasetError(f"{_name(row, place)} {fault}")
        return messages

    def as_written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the family's own chat template takes them; as they are for any other."""
        return self.family.as_written(messages) if self.chat_template == self.family.chat_template else messages

    def _template_fault(self, messages: list[dict[str, Any]]) -> str:
        """What the chat template does not write of tools, calls, results and reasoning, or nothing."""
        probe, marks = marked(messages)
        if not marks:
            return ""
        if (key := hash(repr(probe))) not in self._template_faults:
            template = with_tools(self.chat_template, [probe])
            try:
                text = self.processor.apply_chat_template(self._shape(probe), tokenize=False, chat_template=template)
                lost = " and ".join(dict.fromkeys(what for mark, what in marks.items() if mark not in text))
                why = lost and f"leaves {lost} out"
            except Exception as error:  # a template raises what it likes
                why = f"refuses it: {one_line(error).rstrip('.')}"
            has = ", ".join(dict.fromkeys(marks.values()))
            remedy = "take a model whose template has them, set `chat_template` to one that has, or write them into the texts"
            fault = f"has {has}, and the chat template of {type(self.processor).__name__} {why}: {remedy}"
            self._template_faults[key] = fault if why else ""
        return self._template_faults[key]

    def _shape(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the chat template wants them: templates of language models take plain texts."""
        if self.tokenizer is not self.processor:
            return messages
        return [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]

    def _answers(self, input_ids: Tensor, assistant_mask: Tensor, rows: Sequence[Row]) -> Tensor:
        """`[batch, seq]`, true on the answers and their stop tokens."""
        special = torch.isin(input_ids, torch.tensor(sorted(self.tokenizer.added_tokens_decoder), dtype=input_ids.dtype))
        trained = end_at_stop_token(assistant_mask, special)
        for place, row in enumerate(rows):
            if _spans(trained[place]) < max(_spans(assistant_mask[place].bool()), 1):
                raise ModelError(
                    f"the chat template of {type(self.processor).__name__} trains no stop token in {_name(row, place + 1)}: "
                    "its {% generation %} block should hold the answer and the token that ends it"
                )
            if not bool((trained[place] & ~special[place]).any()):
                raise ModelError(
                    f"the chat template of {type(self.processor).__name__} leaves the answers of {_name(row, place + 1)} out: "
                    "nothing but its stop token would be trained"
                )
        return trained

    def _check_lengths(self, attention_mask: Tensor, rows: Sequence[Row]) -> None:
        if self.max_length is None:
            return
        for place, (row, length) in enumerate(zip(rows, attention_mask.sum(1).tolist(), strict=True), 1):
            if length > self.max_length:
                raise DatasetError(
                    f"{_name(row, place)} has {length} tokens and the limit is {self.max_length}: shorten it, lower "
                    "images.max_pixels, raise train.max_length, or set `on_too_long: drop`"
                )


@dataclass(frozen=True)
class PackingCollator:
    """A batch that is one sequence, in which no row sees another, without padding but for what makes it a multiple."""

    collator: MultimodalCollator
    core: Any  # the model without its head, for its positions: on the meta device
    multiple: int = 1  # of tokens
    shares: bool = False  # what rows begin with alike is computed once
    shares_pictures: bool = False  # also the same pictures
    apart: bool = False  # pictures without known features go through the tower once

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        packed = self.collator.family.flatten(self.collator(rows, apart=self.apart), self.core)
        if self.shares:
            shown = [self.collator.shown(row) if self.shares_pictures else number for number, row in enumerate(rows)]
            packed = share_prefixes(packed, image_token_ids=self.collator.never_trained, pictures=shown)
        return self.collator.filled(packed, self.multiple)


class _Distinct:
    """Opens each picture of some rows once, and puts blanks of its size into their place."""

    def __init__(self, album: Album) -> None:
        self.images: list[Image] = []
        self.shown: list[int] = []  # of each picture, its number among the images
        self._album, self._numbers = album, dict[str, int]()

    def __call__(self, source: Any) -> Any:
        key = self._album.fingerprint(source)
        if key not in self._numbers:
            self._numbers[key] = len(self.images)
            self.images.append(self._album.open(source))
        number = self._numbers[key]
        self.shown.append(number)
        return blank(*self.images[number].size)


def pictures(row: Row) -> list[Any]:
    """What the row's pictures are read from, in order."""
    return [part["image"] for message in row["messages"] for part in message["content"] if part["type"] == "image"]


def _with_blanks(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with pictures that have a size and no memory."""

    def blanked(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, "image": blank(*part["image"].size)} if part["type"] == "image" else dict(part)

    return [{**m, "content": [blanked(part) for part in m["content"]]} for m in messages]


def _as_it_is(image: Image) -> Image:
    return image


def _alone(source: Any) -> dict[str, Any]:
    """A row of one picture and nothing else to speak of."""
    text = {"type": "text", "text": "a"}
    asked = {"role": "user", "content": [{"type": "image", "image": source}, text]}
    return {"messages": [asked, {"role": "assistant", "content": [text]}]}


def training_template(processor: Any, family: Family, *, masked: bool = True, given: str | None = None) -> str:
    """The chat template to train with; where `masked`, with `{% generation %}` markers around the answers.

    In this order: the one that is given; the processor's own where it has markers; the family's; the one that TRL ships for the
    processor's own (https://huggingface.co/docs/trl/chat_templates); for a text model that has no template at all, the plain
    texts; where the loss is on prompts too, the processor's own without markers.

    Raises:
        ModelError: none of these.

    """
    if given is not None and masked and not has_markers(given):
        raise ModelError(
            "the chat template that is given has no {% generation %} markers, so that answers cannot be told from prompts: put "
            "them around the answers and their stop tokens, or set `train_on_inputs: true`"
        )
    if given is not None:
        return given
    own = processor.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own and has_markers(own):
        return own
    found = family.chat_template or (own and _shipped_by_trl(own)) or (own if not masked else None)
    if found:
        return found
    if own is None and not family.takes_images:
        return PLAIN
    kind = type(processor).__name__
    if own is None:
        raise ModelError(f"{kind} has no chat template: save one with the checkpoint's processor")
    raise ModelError(
        f"the chat template of {kind} has no {{% generation %}} markers, so that answers cannot be told from prompts: "
        "save one that has them with the checkpoint's processor, or set `train_on_inputs: true`"
    )


def has_markers(chat_template: str) -> bool:
    """Whether a template marks what the assistant says."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None


def _shipped_by_trl(own: str) -> str | None:
    """TRL's training template for a checkpoint's own. Read as files, for importing trl takes seconds."""
    spec = importlib.util.find_spec("trl")
    templates = Path(next(iter(spec.submodule_search_locations or []))) / "chat_templates" if spec else Path()
    for training in templates.glob("*_training.jinja"):
        original = training.with_name(training.name.replace("_training", ""))
        if original.exists() and original.read_text(encoding="utf-8") == own:
            return training.read_text(encoding="utf-8")
    return None


def _picture_sizes(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    opened = pictures({"messages": messages})
    shapes = [picture.shape[1::-1] if hasattr(picture, "shape") else picture.size for picture in opened]
    return [f"{width}×{height}" for width, height in shapes]


def _spans(mask: Tensor) -> int:
    """How many runs of true a mask `[seq]` has."""
    return int(mask[:1].sum() + (mask[1:] & ~mask[:-1]).sum())


def _name(row: Row, place: int) -> str:
    return str(row.get("name") or f"row {place} of the batch")
