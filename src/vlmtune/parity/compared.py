"""One row, as training made it and as a server made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.batch import IGNORE
from vlmtune.collator import MultimodalCollator
from vlmtune.errors import one_line
from vlmtune.evaluation import question
from vlmtune.parity.client import RefusedError, Server
from vlmtune.parity.findings import Finding, Verdict, What
from vlmtune.serving import Serving, seen

AROUND = 6  # tokens shown on each side of the first difference


def compare(sample: Mapping[str, Any], server: Server, collator: MultimodalCollator, found: Serving) -> list[Finding]:
    """Asks the server for the row's last answer: whether prompt and pixels are those trained, and whether it ends."""
    batch = collator([sample])
    prompt = _trained_prompt(sample, batch, collator)
    trained = batch["input_ids"].shape[1] - len(prompt)  # tokens of the answer
    most = max(found.max_new_tokens, 2 * trained)
    most = min(most, found.context - len(prompt)) if found.context else most
    try:
        answer = server.ask(sample, most)
    except RefusedError as error:
        return [Finding(sample["name"], "prompt", "broken", f"the server refuses the row: {one_line(error)}")]
    compared: dict[What, tuple[Verdict, str] | None] = {
        "prompt": _prompt(prompt, answer, collator.tokenizer),
        "pictures": _pictures(seen(batch), answer),
        "end": _end(answer, most, found, collator.tokenizer),
    }
    return [Finding(sample["name"], what, *result) for what, result in compared.items() if result is not None]


def _prompt(trained: list[int], answer: Mapping[str, Any], tokenizer: Any) -> tuple[Verdict, str]:
    given = answer.get("prompt_token_ids")
    if not given:
        count = (answer.get("usage") or {}).get("prompt_tokens")
        if count is not None and count != len(trained):
            return "broken", f"the server's has {count} tokens, the one trained {len(trained)}"
        many = f"as many tokens as trained, {count}" if count is not None else "the server tells no number of tokens"
        return "unproved", f"{many}; it does not tell which (return_token_ids)"
    if given == trained:
        return "equal", f"{len(trained)} tokens"
    pairs = zip(given, trained, strict=False)
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(given), len(trained)))
    here, there = (_around(ids, place, tokenizer) for ids in (given, trained))
    return "broken", f"token {place + 1} differs: the server's is {here} ({len(given)}), trained was {there} ({len(trained)})"


def _around(ids: Sequence[int], place: int, tokenizer: Any) -> str:
    before, after = tokenizer.decode(ids[max(place - AROUND, 0) : place]), tokenizer.decode(ids[place + 1 : place + 1 + AROUND])
    here = tokenizer.decode(ids[place : place + 1]) if place < len(ids) else "its end"
    return repr(f"{before}»{here}«{after}")


def _pictures(trained: Mapping[str, Any], answer: Mapping[str, Any]) -> tuple[Verdict, str] | None:
    if not trained["shapes"]:
        return None
    given = (answer.get("vlmtune") or {}).get("pictures")
    if given is None:
        return "unproved", "the server does not tell what it made of the pixels; their number of tokens is part of the prompt"
    if given["digest"] == trained["digest"]:
        return "equal", str(trained["shapes"])
    now, before = (f"{each['shapes']} (mean {each['mean']})" for each in (given, trained))
    return "broken", f"the server's are {now}, trained were {before}"


def _end(answer: Mapping[str, Any], most: int, found: Serving, tokenizer: Any) -> tuple[Verdict, str]:
    choice: Any = (answer.get("choices") or [{}])[0]
    stops = {token.id: token.text for token in found.stop}
    ids: list[int] = choice.get("token_ids") or []
    passed = next((number for number in ids[:-1] if number in stops), None)
    if passed is not None:
        return "broken", f"the answer goes on behind {stops[passed]}"
    if choice.get("finish_reason") == "length":
        return "broken", f"the answer does not end within {most} tokens"
    text = (choice.get("message") or {}).get("content") or ""
    if written := [word for word in tokenizer.all_special_tokens if word in text]:
        return "broken", f"the answer's text holds {written[0]}"
    if not ids:
        return "equal", "it ends, and no special token is in its text"
    if ids[-1] not in stops:
        return "broken", f"the answer ends with {tokenizer.decode(ids[-1:])!r}, trained was {' or '.join(stops.values())}"
    return "equal", f"it ends with {stops[ids[-1]]}"


def _trained_prompt(sample: Mapping[str, Any], batch: Mapping[str, Any], collator: MultimodalCollator) -> list[int]:
    """The row's tokens up to its last answer."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    if collator.train_on_inputs:
        return ids[: collator.prompts([question(sample)])["input_ids"].shape[1]].tolist()
    trained = (labels != IGNORE).tolist()
    end = len(trained) - trained[::-1].index(True)
    start = end - next((size for size, each in enumerate(trained[:end][::-1]) if not each), end)
    return ids[:start].tolist()
