"""Asks a server through LangChain and LlamaIndex; run by a Python that has them: `clients.py URL MODEL PICTURE TEXT`."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def through_langchain(url: str, model: str, picture: str, text: str) -> dict[str, Any]:
    chat = ChatOpenAI(base_url=url, model=model, api_key="none", max_retries=0)
    asked = HumanMessage([{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}])
    answer = chat.invoke([asked])
    return {
        "plain": answer.content,
        "reason": answer.response_metadata["finish_reason"],
        "streamed": "".join(chunk.content for chunk in chat.stream([asked])),
        "stopped": chat.invoke([asked], stop=[","]).content,
        "turns": chat.invoke([asked, AIMessage("Yes."), asked]).content,
    }


def through_llama_index(url: str, model: str, picture: str, text: str) -> dict[str, Any]:
    chat = OpenAILike(model=model, api_base=url, api_key="none", is_chat_model=True, temperature=0, max_retries=0)
    asked = ChatMessage(role="user", blocks=[ImageBlock(url=picture), TextBlock(text=text)])
    return {
        "plain": chat.chat([asked]).message.content,
        "streamed": "".join(chunk.delta or "" for chunk in chat.stream_chat([asked])),
        "turns": chat.chat([asked, ChatMessage(role="assistant", content="Yes."), asked]).message.content,
    }


class look(BaseModel):  # noqa: N801 - the tool's name
    """Looks somewhere."""

    at: str


def calls(url: str, model: str) -> dict[str, Any]:
    chat = ChatOpenAI(base_url=url, model=model, api_key="none", max_retries=0)
    (made,) = chat.bind_tools([look]).invoke("Rain?").tool_calls
    structured = chat.with_structured_output(look, method="function_calling")
    return {"made": [made["name"], made["args"]], "structured": structured.invoke("Rain?").at}


if __name__ == "__main__":
    url, model, *question = sys.argv[1:]
    if question:
        picture = f"data:image/png;base64,{base64.b64encode(Path(question[0]).read_bytes()).decode()}"
        found = {ask.__name__: ask(url, model, picture, question[1]) for ask in (through_langchain, through_llama_index)}
    else:
        found = {"calls": calls(url, model)}
    print(json.dumps(found))
