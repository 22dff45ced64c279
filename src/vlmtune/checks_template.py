"""Chat template, stop token and labels: what a row becomes, told without the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vlmtune.checks import Check, Encoded, Finding, Message, Patient, Row, failure, named, ok, warning
from vlmtune.collator import has_markers, pictures
from vlmtune.errors import ModelError
from vlmtune.evaluation import question
from vlmtune.tools import harmless

# how chat templates write special tokens: `<|im_end|>`; and others, which may be plain text by intention, as Llama 2's [INST]
SPECIAL = re.compile(r"(<[|｜][^\s<>]+[|｜]>)|\[/?[A-Z][A-Z_]+\]|</?[a-z_]+>")
SHOWN = 40  # characters of two texts where they part


def missing(patient: Patient) -> Finding:
    """`training_template` has found one, or there would be no collator: which?"""
    template = patient.collator.chat_template
    if patient.recipe.chat_template is not None:
        return ok(f"the recipe's, {patient.recipe.chat_template}")
    if not has_markers(template):
        return ok("the checkpoint's own; the loss is on prompts too, so it needs no {% generation %} markers")
    if template == _own(patient):
        return ok("the checkpoint's own, with {% generation %} markers")
    return ok(f"a training template for {patient.collator.family.name}, with {{% generation %}} markers")


def special_tokens(patient: Patient) -> Finding:
    """The ChatGLM3 trap: the vocabulary has `<|user|>`, and the tokenizer makes five tokens of it, which no model ever saw."""
    vocabulary = patient.tokenizer.get_vocab()
    written: dict[str, str] = {}  # special token → first row
    for row, text in _plain_renderings(patient):
        for match in SPECIAL.finditer(text):
            if match[1] or match[0] in vocabulary:
                written.setdefault(match[0], str(row["name"]))
    split = {token: pieces for token in written if (pieces := _pieces(patient, token)) != 1}
    if not split:
        return ok(f"each of {len(written)} in the template is one token")
    token, pieces = next(((token, split[token]) for token in split if token in vocabulary), next(iter(split.items())))
    others = [other for other in split if other != token]
    found = f"{token} of the template is split into {pieces} tokens in {written[token]}"
    found += f"; so are {named(others)}" if others else ""
    if token in vocabulary:
        return failure(f"{found}, though the vocabulary has it", "add it to the tokenizer as a special token")
    return warning(
        found, "use the template that belongs to this tokenizer; it is right only where the model was pretrained with it"
    )


def prompt_prefix(patient: Patient) -> Finding:
    """What the model is asked is what stands before the answer that it learns."""
    for each in patient.encoded:
        prompt = patient.prompt(question(each.row), len(each.row["messages"]) - 1)
        if (place := _parting(prompt, each.ids)) is None:
            continue
        if patient.tokenizer.decode(each.ids).startswith(patient.tokenizer.decode(prompt)):
            return warning(
                f"{each.name}: the prompt's end melts into the answer, {_around(patient, prompt, place)} becomes "
                f"{_around(patient, each.ids, place)}",
                "end the prompt without a space, or with a newline",
            )
        return failure(
            f"{each.name}: the prompt with the generation prompt is not how the training text begins; at token {place + 1} "
            f"it has {_around(patient, prompt, place)} where training has {_around(patient, each.ids, place)}",
            "have `add_generation_prompt` add exactly what the template writes before an answer",
        )
    return ok(f"the prompt begins the training text in each of {len(patient.encoded)} rows")


def turn_prefix(patient: Patient) -> Finding:
    """What an earlier answer is learnt from is what the model is asked at that point of a conversation."""
    longer = [each for each in patient.encoded if each.answers > 1]
    for each in longer:
        roles = [message["role"] for message in each.row["messages"]]
        for turns in [place for place, role in enumerate(roles) if role == "assistant"][:-1]:
            if _parting(patient.prompt(each.row, turns), each.ids) is not None:
                return warning(
                    f"{each.name}: what is asked before turn {turns + 1} reads otherwise once the conversation goes on",
                    "make rows of one answer each, or use a template that leaves earlier turns as they are",
                )
    return ok(f"each turn begins the next in {len(longer)} rows of several" if longer else "no row has several turns")


def placeholders(patient: Patient) -> Finding:
    """A template that knows only texts drops pictures without a word, and the run trains blind."""
    if not patient.takes_images:
        return ok("the model takes no pictures")
    known = patient.tokenizer.convert_ids_to_tokens(sorted(patient.collator.family.image_token_ids(patient.collator.processor)))
    count = 0
    for row, text in _plain_renderings(patient, each_shape_once=False):
        wanted, counts = len(pictures(row)), [text.count(token) for token in known]
        count += wanted
        if wanted in counts or (not any(counts) and text != patient.rendered(_harmless(row["messages"], pictures=False))):
            continue  # or it has another way to write them
        return failure(
            f"{row['name']} has {wanted} picture{'s' * (wanted != 1)}, and the template writes placeholders for {max(counts)}",
            "have the template write the placeholder once for each part of type image",
        )
    return ok(f"{count} pictures, {count} placeholders")


def default_system(patient: Patient) -> Finding:
    """A system prompt that nobody wrote: it has to be there at inference too."""
    for row in patient.rows:
        messages = row["messages"]
        if messages[0]["role"] == "system":
            continue
        try:
            asked = patient.rendered([{"role": "system", "content": [{"type": "text", "text": "vlmtune"}]}, *messages])
        except ModelError:  # no system prompts at all
            return ok("the template takes no system prompt")
        head, _, tail = asked.partition("vlmtune")
        given = patient.rendered(messages)
        if len(given) > len(head) + len(tail) and given.startswith(head) and given.endswith(tail):
            added = given[len(head) : len(given) - len(tail)]
            return warning(
                f"{row['name']} has no system prompt and the template adds {added!r}",
                "write `data.system` to choose the text, or serve the model with the same template",
            )
        return ok("the template adds none")
    return ok("every row brings its own")


def double_bos(patient: Patient) -> Finding:
    bos = patient.tokenizer.bos_token_id
    for each in patient.encoded:
        if bos is not None and each.ids[:2].tolist() == [bos, bos]:
            return failure(
                f"{each.name} begins with {patient.tokenizer.bos_token} twice",
                "leave it to the template or to the tokenizer: render with tokenize=True, or pass add_special_tokens=False",
            )
    return ok("no row begins with two")


def same_text(patient: Patient) -> Finding:
    """The model knows its own template, and servers use it unless they are given the one that was trained."""
    own = _own(patient)
    if own is None or own == patient.collator.chat_template:
        return ok("there is only one" if own else "the checkpoint has none of its own")
    for row in patient.rows:
        trained = patient.rendered(row["messages"])
        try:
            known = patient.rendered(row["messages"], own)
        except ModelError as error:
            return warning(
                f"{row['name']}: of the checkpoint's own template, {error}",
                "serve the model with the template that is saved beside the adapter",
            )
        if trained != known:
            place = next((at for at, (a, b) in enumerate(zip(trained, known, strict=False)) if a != b), None)
            place = min(len(trained), len(known)) if place is None else place
            return warning(
                f"{row['name']}: the training template writes {trained[place : place + SHOWN]!r} where the checkpoint's own "
                f"writes {known[place : place + SHOWN]!r}",
                "serve the model with the template that is saved beside the adapter, or save a training template that agrees",
            )
    return ok(f"the checkpoint's own renders the same text in {len(patient.rows)} rows")


def stop_trained(patient: Patient) -> Finding:
    stop = patient.stop
    token = patient.tokenizer.convert_ids_to_tokens(stop)
    special = set(patient.tokenizer.added_tokens_decoder)
    for each in patient.encoded:
        ends = [int(each.labels[end - 1]) for _, end in each.spans()]
        learnt = int((each.labels == stop).sum()) if patient.recipe.train_on_inputs else sum(end in special for end in ends)
        if ends and learnt < each.answers:
            return failure(
                f"{each.name}: {learnt} of {each.answers} answers end with a trained stop token, {token}",
                "have the template's {% generation %} block hold the token that ends the answer, and mask it nowhere",
            )
    return ok(f"{token} ends every trained answer")


def stop_is_not_padding(patient: Patient) -> Finding:
    """Pad = stop is fine where padding is told by the mask, and lost where the next tool tells it by the id."""
    pad, stop = patient.tokenizer.pad_token_id, patient.stop
    if pad != stop:
        return ok("stop token and padding token are two")
    learnt = any(bool((each.labels == stop).any()) for each in patient.encoded)
    if learnt:
        return ok("one token is both, and it is trained: padding is told by the attention mask")
    return failure(
        f"{patient.tokenizer.pad_token} is both padding and stop token, and is trained in no row",
        "tell padding by the attention mask and never by its id",
    )


def trained_share(patient: Patient) -> Finding:
    trained = sum(int(each.trained.sum()) for each in patient.encoded)
    total = sum(len(each.ids) for each in patient.encoded)
    said = f"{trained:,} of {total:,} tokens are trained, {trained / max(total, 1):.1%}"
    if patient.recipe.train_on_inputs:
        return ok(f"{said}; prompts too, as `train_on_inputs` says")
    for each in patient.encoded:
        first = [message["role"] for message in each.row["messages"]].index("assistant")
        prompt = patient.prompt(each.row, first)
        count = int(each.trained[: _parting(prompt, each.ids) or len(prompt)].sum())
        if count:
            return failure(
                f"{each.name}: {count} tokens of the prompt are in the loss",
                "have the collator mask what stands before the answer, or set `train_on_inputs: true` if it is meant",
            )
    return ok(said)


def nothing_trained(patient: Patient) -> Finding:
    none = [each.name for each in patient.encoded if not bool(each.trained.any())]
    if none:
        return failure(
            f"{named(none)}: no token is trained, every label is -100",
            "look at the template's {% generation %} markers and at what the collator masks",
        )
    return ok(f"each of {len(patient.encoded)} rows has some")


def picture_labels(patient: Patient) -> Finding:
    collator = patient.collator
    never = collator.family.image_token_ids(collator.processor) | collator.family.video_token_ids(collator.processor)
    for each in patient.encoded:
        found = sorted(never & set(each.labels.tolist()))
        if found:
            token = patient.tokenizer.convert_ids_to_tokens(found[0])
            return failure(
                f"{each.name}: {token}, which stands for a picture, is among the labels",
                "mask the ids of `family.image_token_ids` in the labels; `batch.make_labels` does",
            )
    return ok("none stands for a picture")


def padding_labels(patient: Patient) -> Finding:
    lengths = sorted(patient.encoded, key=lambda each: len(each.ids))
    if len(lengths) < 2 or len(lengths[0].ids) == len(lengths[-1].ids):
        return ok("all rows looked at are of one length")
    pair: list[Encoded] = [lengths[0], lengths[-1]]
    batch = patient.batch([each.row for each in pair])
    if "attention_mask" not in batch or len(batch["labels"]) != 2:
        return ok("the collator does not pad")
    padded = (batch["attention_mask"] == 0) & (batch["labels"] != -100)
    if padded.any():
        return failure(
            f"{pair[0].name} beside {pair[1].name}: {int(padded.sum())} padding tokens are trained",
            "set the labels to -100 where the attention mask is 0; `batch.make_labels` does",
        )
    apart = [each.name for each, labels in zip(pair, batch["labels"], strict=True) if _count(labels) != _count(each.labels)]
    if apart:
        return failure(
            f"{apart[0]}: another number of tokens is trained beside a longer row than alone",
            "tell padding by the attention mask and never by its id",
        )
    return ok("padding is not trained, and takes no label away")


TEMPLATE: dict[str, Check] = {  # those that only render
    "template: missing": missing,
    "template: special tokens": special_tokens,
    "template: picture placeholders": placeholders,
    "template: default system prompt": default_system,
    "template: same text as the model's own": same_text,
}
ENCODED: dict[str, Check] = {
    "stop: trained": stop_trained,
    "stop: not lost with padding": stop_is_not_padding,
    "template: prompt is a prefix": prompt_prefix,
    "template: turns are prefixes": turn_prefix,
    "template: double BOS": double_bos,
    "labels: share trained": trained_share,
    "labels: rows without any": nothing_trained,
    "labels: pictures": picture_labels,
    "labels: padding": padding_labels,
}


def _own(patient: Patient) -> str | None:
    own = patient.collator.processor.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _plain_renderings(patient: Patient, *, each_shape_once: bool = True) -> Iterable[tuple[Row, str]]:
    """Rows with harmless texts, rendered: what is in them then comes from the template."""
    known: set[str] = set()
    for row in patient.rows:
        plain = _harmless(row["messages"])
        shape = str([{**message, "content": [part["type"] for part in message["content"]]} for message in plain])
        if each_shape_once and shape in known:
            continue
        known.add(shape)
        try:
            text = patient.rendered(plain)
        except ModelError as error:
            raise ModelError(f"{row['name']}: {error}") from error
        yield row, text


def _harmless(messages: Sequence[Message], *, pictures: bool = True) -> list[Message]:
    """The messages with "a" for every text, in tools and calls too, and perhaps without their pictures."""
    text = {"type": "text", "text": "a"}

    def parts(message: Message) -> list[Any]:
        return [text if part["type"] == "text" else dict(part) for part in message["content"] if pictures or "text" in part]

    return [{"role": message["role"], "content": parts(message), **harmless(message)} for message in messages]


def _pieces(patient: Patient, token: str) -> int:
    return len(patient.tokenizer.encode(token, add_special_tokens=False))


def _parting(prefix: torch.Tensor, ids: torch.Tensor) -> int | None:
    """The first place where `prefix` is not how `ids` begin."""
    begin = ids[: len(prefix)]
    if len(begin) == len(prefix) and torch.equal(begin, prefix):
        return None
    same = min(len(begin), len(prefix))
    apart = (begin[:same] != prefix[:same]).nonzero().flatten()
    return int(apart[0]) if len(apart) else same


def _around(patient: Patient, ids: torch.Tensor, place: int) -> str:
    return repr(patient.tokenizer.decode(ids[place : place + 8])) if place < len(ids) else "nothing"


def _count(labels: torch.Tensor) -> int:
    return int((labels != -100).sum())
