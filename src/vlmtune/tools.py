"""What a message has beside its content, on its way into a chat template: tool calls, tools, reasoning.

A template that knows nothing of tools drops them without a word. So every shape of conversation that has any is rendered
once with marks in their places, and what is not found in the text is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
BESIDE = ("tools", "tool_calls", "reasoning_content", "tool_call_id", "name")

# `apply_chat_template` takes one list of tools for all rows of a batch. A row's own stand in its messages.
TOOLS_OF_THE_ROW = "{% set tools = messages | map(attribute='tools') | select | first | default(none) +%}"


def with_tools(chat_template: str, conversations: Sequence[Sequence[Message]]) -> str:
    """The template that sees each conversation's own tools; as it is where there are none."""
    has_tools = any("tools" in message for messages in conversations for message in messages)
    return TOOLS_OF_THE_ROW + chat_template if has_tools else chat_template


def beside(message: Message) -> dict[str, Any]:
    """What a message has beside role and content."""
    return {name: message[name] for name in BESIDE if name in message}


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """The same lists and mappings, every text in them changed."""
    if isinstance(value, Mapping):
        return {replaced(key, change): replaced(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [replaced(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def texts(value: Any) -> Iterator[str]:
    """Every text in lists and mappings."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from (*texts(key), *texts(each))
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str):
        yield value


def harmless(message: Message) -> dict[str, Any]:
    """What a message has beside role and content, "a" for all that is the user's; ids are nine letters, as Pixtral wants."""

    def function(entry: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "a", **found}} if "function" in entry else {"name": "a", **found}

    def call(made: Mapping[str, Any]) -> dict[str, Any]:
        return function(made, arguments={"a": "a"}) | ({"id": "a" * 9} if "id" in made else {})

    found = {name: "a" * 9 if name == "tool_call_id" else "a" for name in beside(message)}
    described = {"description": "a", "parameters": {"type": "object", "properties": {}}}
    lists = {"tools": lambda tool: function(tool, **described), "tool_calls": call}
    return {**found, **{name: [make(each) for each in message[name]] for name, make in lists.items() if name in message}}


def marked(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The conversation with "a" for every text and a mark for each tool, call, result and reasoning; mark → what it is."""
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        marks[name := f"mark{len(marks)}x"] = what
        return name

    def content(message: Message) -> list[dict[str, Any]]:
        has_text = any(part["type"] == "text" for part in message["content"])
        text = mark("tool results") if message["role"] == "tool" and has_text else "a"
        return [{"type": "text", "text": text} if p["type"] == "text" else {"type": p["type"]} for p in message["content"]]

    def function(entry: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        return {**entry, "function": {**entry["function"], **changes}} if "function" in entry else {**entry, **changes}

    def other(message: Message) -> dict[str, Any]:
        found = beside(message)
        if "tools" in found:
            found["tools"] = [function(tool, name=mark("tools")) for tool in found["tools"]]
        if "reasoning_content" in found:
            found["reasoning_content"] = mark("reasoning")
        if "tool_calls" in found:
            found["tool_calls"] = [function(call, arguments={"a": mark("tool calls")}) for call in found["tool_calls"]]
        return found

    return [{"role": m["role"], "content": content(m), **other(m)} for m in messages], marks
