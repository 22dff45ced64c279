"""Token ids by those who made the formats: Mistral's and Meta's own encoders, run in a process of their own.

In this process their presence would change what is tested: mistral-common pins numpy, and where it can be imported
transformers prefers its tokenizer classes for Pixtral. Below `main` nothing of vlmtune or transformers is imported.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def ids_by_oracle(family_name: str, conversations: dict[str, list[dict[str, Any]]], cache: Path) -> dict[str, list[int]]:
    """Ids of every conversation; a picture is written as {"type": "image", "size": [width, height]}."""
    from real_vocab import VOCABULARIES, made_once, pip

    packages = cache / "oracles"
    mistral, llama = VOCABULARIES["pixtral"].package, VOCABULARIES["mllama"].package

    def install(target: Path) -> None:
        pip("install", "--target", str(target), mistral)
        # its dependencies are for downloads and checkpoints; what its chat format imports came with mistral-common
        pip("install", "--target", str(target), "--no-deps", llama)

    made_once(packages, install)
    done = subprocess.run(
        [sys.executable, __file__, family_name],
        input=json.dumps(conversations),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(packages)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def mllama(conversations: dict[str, list[dict[str, Any]]]) -> dict[str, list[int]]:
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer
    from PIL import Image

    chat_format = ChatFormat(Tokenizer.get_instance())

    def content(parts: str | list[dict[str, Any]]) -> Any:
        if isinstance(parts, str):
            return parts
        return [RawTextItem(text=p["text"]) if p["type"] == "text" else RawMediaItem(data=png(p["size"])) for p in parts]

    def png(size: list[int]) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
        return file.getvalue()

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        raw = [RawMessage(role=m["role"], content=content(m["content"])) for m in messages]
        tokens = chat_format.encode_dialog_prompt(raw).tokens  # its own <|image|> 128011 is already 128256 here
        # after an answer, too, it opens the next: <|start_header_id|> assistant <|end_header_id|> and two newlines
        return tokens[:-4] if messages[-1]["role"] == "assistant" else tokens

    return {name: ids(messages) for name, messages in conversations.items()}


def pixtral(conversations: dict[str, list[dict[str, Any]]]) -> dict[str, list[int]]:
    import mistral_common
    import numpy as np
    from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers import image
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from PIL import Image

    # Resizing the pixels needs opencv (50 MB); the ids depend on the sizes alone.
    image.transform_image = lambda picture, size: np.zeros((3, size[1], size[0]), dtype=np.float32)
    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"  # what MistralTokenizer.v3 opens
    roles = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage, "tool": ToolMessage}
    asked = MistralTokenizer.from_file(file, mode=ValidationMode.test)
    by_last_role = {
        "user": asked,
        "tool": asked,
        "assistant": MistralTokenizer.from_file(file, mode=ValidationMode.finetuning),
    }

    def content(parts: str | list[dict[str, Any]]) -> Any:
        if isinstance(parts, str):
            return parts
        return [
            TextChunk(text=p["text"]) if p["type"] == "text" else ImageChunk(image=Image.new("RGB", p["size"])) for p in parts
        ]

    def beside(message: dict[str, Any]) -> dict[str, Any]:
        calls = [ToolCall.from_openai(call) for call in message.get("tool_calls", [])]
        more = {"tool_calls": calls} if calls else {}
        return {**more, "tool_call_id": message["tool_call_id"]} if "tool_call_id" in message else more

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        tools = [Tool.from_openai(tool) for tool in messages[0].get("tools", [])]
        turns = [roles[m["role"]](content=content(m["content"]), **beside(m)) for m in messages]
        request = ChatCompletionRequest(messages=turns, tools=tools or None)
        return by_last_role[messages[-1]["role"]].encode_chat_completion(request).tokens

    return {name: ids(messages) for name, messages in conversations.items()}


def main() -> None:
    oracle = {"mllama": mllama, "pixtral": pixtral}[sys.argv[1]]
    json.dump(oracle(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
