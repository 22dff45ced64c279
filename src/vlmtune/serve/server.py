"""transformers' own server, with what it needs to keep the contract. Every line that depends on its version stands here.

Theirs are the application, its routes and the chunks of a stream, the thread that generates, and what reads tool calls.
Ours are the prompt, which is made as in training, the end of an answer, and the refusals. Its other routes are not served:
they load models of any name or make prompts of their own.
https://github.com/huggingface/transformers/tree/main/src/transformers/cli/serving
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.completion_usage import CompletionUsage
from starlette.exceptions import HTTPException
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    GenerationState,
    ReasoningText,
    ToolCall,
    _StreamError,  # pyright: ignore[reportPrivateUsage]
    get_response_template,
    response_events_to_chunks,
)
from transformers.utils.chat_parsing import ResponseParser

from vlmtune.collator import pictures
from vlmtune.errors import DatasetError, one_line
from vlmtune.model import evaluating, on_device
from vlmtune.serve.limits import MOST_BYTES, Door, check_pictures
from vlmtune.serve.loading import Served
from vlmtune.serve.request import ChatRequest, RequestError, read_messages, read_request
from vlmtune.serving import seen

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")


def build_app(served: Served) -> FastAPI:
    """The application, with the routes that keep the contract and no others."""
    state = GenerationState()
    manager = OneModel(served)
    chat = Chat(served, manager, state)
    others: Any = None  # their routes go
    app = build_server(manager, chat, others, others, others, others, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    too_large = RequestError(f"the request's body has more than {MOST_BYTES >> 20} MiB, which is the limit.", status=413)
    app.add_middleware(Door, too_large=_answer(too_large))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _failed)
    return app


class OneModel(ModelManager):
    """The one model there is, where their server would load any."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._entry = {
            "id": served.contract.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vlmtune",
            "max_model_len": served.contract.context,  # under vLLM's name
        }

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [self._entry]

    get_gen_models = list_models  # pyright: ignore  (its name in transformers 5.23, where it is a static method)


class Answering:
    """A model that answers as it does after training: no dropout, no gradients, computing in its own dtype."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, seed: int | None = None, **options: Any) -> Tensor:
        """Called in the thread that generates: autocast is a thread's own, and a seed holds for one answer at a time."""
        if seed is not None:
            torch.manual_seed(seed)
        with evaluating(self._model):
            return self._model.generate(**options)


class Watch(StoppingCriteria):
    """The tokens of an answer as they come, and whether one of the request's stop texts is among them."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        self.ids: list[int] = []
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # pyright: ignore
        self.ids = input_ids[0, self._start :].tolist()
        self.stopped = bool(self._stops) and any(stop in self.text for stop in self._stops)
        return torch.full((1,), self.stopped, device=input_ids.device)

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids, skip_special_tokens=True)


class Cut:
    """A text in pieces, up to the first stop text; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self._done = stops, "", False

    def __call__(self, piece: str) -> str:
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self._done = self._done or bool(places)
        held = "" if self._done else max((_overlap(text, stop) for stop in self._stops), key=len, default="")
        self._held = held
        return text[: min(places)] if places else "" if self._done else text.removesuffix(held)

    def rest(self) -> str:
        """What was held back and is no stop text after all."""
        return self._held


class Reader:
    """Their parser of calls and reasoning. What it cannot read is text, and no reason to lose an answer."""

    def __init__(self, parser: ResponseParser, special: Sequence[str]) -> None:
        self.initial_events = parser.initial_events
        self._parser, self._special, self._unread, self._failed = parser, special, "", False

    def feed(self, text: str) -> list[dict[str, Any]]:
        return self._events(text)

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return {}, self._events(None)

    def _events(self, text: str | None) -> list[dict[str, Any]]:
        """The events of a further text, or of the end."""
        self._unread += text or ""
        try:
            if self._failed:
                raise ValueError
            events = self._parser.feed(text) if text is not None else self._parser.finalize()[1]
            shown = response_events_to_chunks(events)
        except (ValueError, KeyError, TypeError, RuntimeError):
            self._failed = True
            for word in self._special:
                self._unread = self._unread.replace(word, "")
            events = shown = [{"type": "region_chunk", "field": "content", "text": self._unread}]
        self._unread = "" if shown else self._unread
        return events


class Chat(ChatCompletionHandler):
    """Their handler of `/v1/chat/completions`, with our prompt and our end of an answer."""

    def __init__(self, served: Served, manager: ModelManager, state: GenerationState) -> None:
        super().__init__(manager, state)
        self._served, self._contract = served, served.contract
        self._model = Answering(served.model)
        self._tokenizer = served.collator.tokenizer
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")  # two would set one tokenizer's padding at once

    async def handle_request(self, body: dict[str, Any], request_id: str) -> StreamingResponse | JSONResponse:
        asked = read_request(body, served=self._contract.name)
        batch = await asyncio.get_running_loop().run_in_executor(self._reader, self._prompt, asked)
        length = batch["input_ids"].shape[1]
        watch = Watch(self._tokenizer, asked.stops, length)
        items = self._items(asked, batch, self._options(asked, length), watch, request_id)
        if asked.stream:
            return StreamingResponse(self._chunks(asked, items, watch, length, request_id), media_type="text/event-stream")
        return await self._whole(asked, items, watch, batch, request_id)

    def _prompt(self, asked: ChatRequest) -> dict[str, Tensor]:
        """What the model is given: by the same code as in training and in `Run.generate`."""
        messages = read_messages(asked)
        check_pictures(messages)
        row = {"messages": messages, "name": "the request"}
        try:
            if self._contract.context and pictures(row):  # before any of them is decoded
                (least,) = self._served.collator.lengths([row])  # without the beginning of the answer
                if least > self._contract.context:
                    raise _too_long(f"at least {least}", self._contract.context)
            return self._served.collator.prompts([row])
        except DatasetError as error:
            raise RequestError(str(error), field="messages") from None

    def _options(self, asked: ChatRequest, length: int) -> GenerationConfig:
        """Greedy unless a temperature is asked for, and never longer than the model has positions for."""
        room = self._contract.context - length if self._contract.context else None
        if room is not None and room < (asked.most_tokens or 1):
            raise _too_long(str(length), self._contract.context, asked.most_tokens if room > 0 else None)
        longest = asked.most_tokens or min(self._contract.max_new_tokens, room or self._contract.max_new_tokens)
        config = copy.deepcopy(self._model.generation_config)
        config.update(
            max_new_tokens=longest,
            do_sample=bool(asked.temperature),
            temperature=asked.temperature or None,
            top_p=asked.top_p if asked.temperature else None,
            top_k=0 if asked.temperature else None,
            eos_token_id=[token.id for token in self._contract.stop],
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return config

    async def _items(
        self, asked: ChatRequest, batch: dict[str, Tensor], config: GenerationConfig, watch: Watch, request_id: str
    ) -> AsyncGenerator[str]:
        """The answer's text as it comes, with reasoning and calls where the chat template has them."""
        inputs = {**on_device(batch, self._model), "stopping_criteria": [watch], "seed": asked.seed}
        parser: Any = self._parser(asked, batch["input_ids"])
        model: Any = self._model
        manager = self.generation_state.get_manager(self._contract.name)
        queue, streamer = manager.generate_streaming(model, self._tokenizer, inputs, config, request_id, parser)
        cut, said, called = Cut(asked.stops), "", False
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise RequestError(f"the model failed: {item.msg}", status=500)
                if isinstance(item, ToolCall):
                    if not called or asked.parallel_tool_calls is not False:
                        yield item  # pyright: ignore[reportReturnType]
                    called = True
                elif isinstance(item, ReasoningText):
                    yield item  # pyright: ignore[reportReturnType]
                else:
                    said += item
                    yield cut(item)
            if parser is None and watch.text.startswith(said):  # their decoder keeps half a character to itself
                yield cut(watch.text.removeprefix(said))
            yield cut.rest()
        finally:
            streamer.cancel()  # who has gone away waits for nothing

    def _parser(self, asked: ChatRequest, input_ids: Tensor) -> Reader | None:
        """What reads calls and reasoning; None where the chat template has neither, so that all is text."""
        template: Any = get_response_template(self._tokenizer, self._model)  # pyright: ignore[reportArgumentType]
        trained, tools = self._served.collator.chat_template, asked.calls
        if template is None or not ("tool_calls" in trained or "reasoning_content" in trained):
            return None
        prefix = self._tokenizer.decode(input_ids[0])
        parser = ResponseParser(template, prefix=prefix, tools=[*tools] if tools else None)
        return Reader(parser, self._tokenizer.all_special_tokens)

    async def _whole(
        self, asked: ChatRequest, items: AsyncGenerator[Any], watch: Watch, batch: dict[str, Tensor], request_id: str
    ) -> JSONResponse:
        found = [item async for item in items]
        reasoning = "".join(item for item in found if isinstance(item, ReasoningText))
        text = "".join(item for item in found if not isinstance(item, ReasoningText | ToolCall))
        made = [item for item in found if isinstance(item, ToolCall)]
        asked.check_calls([call.name for call in made])
        answer = self._build_completion(
            request_id,
            text or None if made else text,  # pyright: ignore[reportArgumentType]
            self._contract.name,
            self._finish_reason(watch, called=bool(made)),
            _usage(batch["input_ids"].shape[1], watch),
            [_call(call, number, request_id) for number, call in enumerate(made)] or None,
            reasoning or None,
        )
        if asked.return_token_ids:
            answer["prompt_token_ids"] = batch["input_ids"][0].tolist()
            answer["choices"][0]["token_ids"] = watch.ids
            answer["vlmtune"] = {"pictures": seen(batch)}
        return JSONResponse(answer)

    async def _chunks(
        self, asked: ChatRequest, items: AsyncGenerator[Any], watch: Watch, length: int, request_id: str
    ) -> AsyncGenerator[str]:
        model = self._contract.name
        made: list[str] = []  # names of the tools that were called
        yield self._build_chunk_sse(request_id, role="assistant", content="", model=model)
        try:
            async for item in items:
                if isinstance(item, ToolCall):
                    call = {"index": len(made), **_call(item, len(made), request_id)}
                    made.append(item.name)
                    yield self._build_chunk_sse(request_id, tool_calls=[call], model=model)
                elif isinstance(item, ReasoningText):
                    yield self._build_chunk_sse(request_id, reasoning_content=item, model=model)
                elif item:
                    yield self._build_chunk_sse(request_id, content=item, model=model)
            asked.check_calls(made)
        except RequestError as error:
            yield f"data: {json.dumps(_body(error))}\n\n"
            return
        yield self._build_chunk_sse(request_id, finish_reason=self._finish_reason(watch, called=bool(made)), model=model)
        if asked.stream_options is not None and asked.stream_options.include_usage:
            head = {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(length, watch).model_dump()})}\n\n"
        yield "data: [DONE]\n\n"

    def _finish_reason(self, watch: Watch, *, called: bool) -> str:
        ended = watch.stopped or watch.ids[-1:] == [] or watch.ids[-1] in [token.id for token in self._contract.stop]
        return "tool_calls" if called else "stop" if ended else "length"


def _too_long(length: str, context: int | None, most_tokens: int | None = None) -> RequestError:
    wanted = f" and {most_tokens} are asked for" if most_tokens else ""
    said = f"the prompt has {length} tokens{wanted}, and the model has positions for {context}."
    return RequestError(said, field="max_tokens" if most_tokens else "messages")


def _overlap(text: str, stop: str) -> str:
    """The longest end of the text that a stop text begins with."""
    return next((stop[:size] for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), "")


def _call(call: ToolCall, number: int, request_id: str) -> Any:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"{request_id}_tool_call_{number}", "type": "function", "function": function}


def _usage(length: int, watch: Watch) -> CompletionUsage:
    made = len(watch.ids)
    return CompletionUsage(prompt_tokens=length, completion_tokens=made, total_tokens=length + made)


# ---- refusals, in the shape that clients of OpenAI read


def _body(error: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.field, "code": error.status}}


def _answer(error: RequestError) -> JSONResponse:
    return JSONResponse(_body(error), status_code=error.status)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return _answer(error)


def _unreadable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(RequestError(f"the body is no JSON object: {error.errors()[0]['msg'].lower()}."))


def _no_such_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(RequestError(f"{error.detail}; there is {', '.join(ROUTES)}.", status=error.status_code))


def _failed(_: Request, error: Exception) -> JSONResponse:
    return _answer(RequestError(f"the server failed: {one_line(error)}", status=500))
