"""What a client may ask: a request of OpenAI's chat completions, read as strictly as a row is.

Whatever would change the answer and cannot be done is refused; transformers' server would leave it out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vlmtune.errors import DatasetError, VlmtuneError
from vlmtune.messages import Message, format_messages
from vlmtune.plugins import did_you_mean


class RequestError(VlmtuneError):
    """A request that cannot be answered, with the field that is to blame and the HTTP status that says so."""

    def __init__(self, message: str, *, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


def _not_blank(text: str) -> str:
    if not text:
        raise ValueError("a stop text is empty")
    return text


Word = Annotated[str, AfterValidator(_not_blank)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class Named(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: Named


class ResponseFormat(BaseModel):
    type: Literal["text"]  # JSON by a schema would need constrained decoding


class ChatRequest(BaseModel):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: Word | list[Word] | None = None
    parallel_tool_calls: bool | None = None  # false: of several calls the first is given
    return_token_ids: bool | None = None  # vLLM's field: the ids of prompt and answer come with the answer

    # what changes an answer and is not to be had is taken where it asks for nothing
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    # what does not change an answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @property
    def stops(self) -> list[str]:
        """The texts at which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """How long an answer may be at most, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def calls(self) -> list[dict[str, Any]] | None:
        """The tools that may be called."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    def check_calls(self, names: Sequence[str]) -> None:
        """Sees to it that a call was made where the request insists on one: nothing makes the model do so.

        Raises:
            RequestError: there is none, or another.

        """
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if (self.tool_choice == "required" and not names) or (wanted is not None and wanted not in names):
            asked = f"{wanted!r}" if wanted is not None else "a tool"
            raise RequestError(
                f"`tool_choice` asks for {asked}, and the model did not call it.", field="tool_choice", status=422
            )


def read_request(body: Mapping[str, Any], *, served: str) -> ChatRequest:
    """The request, if it can be answered by the model of the name `served`.

    Raises:
        RequestError: the first mistake in it, as a sentence.

    """
    try:
        asked = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _mistake(error) from None
    if asked.model is not None and asked.model != served:
        raise RequestError(f"model {asked.model!r} is not served here, {served!r} is.", field="model", status=404)
    if asked.stream and asked.return_token_ids:
        raise RequestError("`return_token_ids` does not go with `stream`: leave one out.", field="return_token_ids")
    return asked


def read_messages(asked: ChatRequest) -> list[Message]:
    """The request's messages as those of a row are read, so that the same prompt comes of them.

    Raises:
        RequestError: a conversation that no row could have, or a picture that is not in the request itself.

    """
    last = asked.messages[-1].get("role")
    if last == "assistant":
        raise RequestError("the last message is the assistant's, wanted the user's or a tool's.", field="messages")
    try:
        row = {"messages": asked.messages, "tools": asked.calls}
        messages = format_messages(row, format="openai", images=[], prompt_only=True)
    except DatasetError as error:
        raise RequestError(str(error).removeprefix("format 'openai': "), field="messages") from None
    for part in (part for message in messages for part in message["content"]):
        _check_part(part)
    return messages


def _check_part(part: Mapping[str, Any]) -> None:
    if part["type"] not in ("text", "image"):
        raise RequestError(f"a part has the type {part['type']!r}, wanted text or image_url.", field="messages")
    source = part.get(
        "image", "data:"
    )  # never a path or an address: a client has no business with the server's files and network
    if not isinstance(source, str) or not source.startswith("data:"):
        raise RequestError("a picture is not a data URL, 'data:image/png;base64,...'.", field="messages")


def _mistake(error: ValidationError) -> RequestError:
    """The first mistake of a request, as one sentence."""
    details = error.errors()[0]
    path: Sequence[int | str] = details["loc"]
    field = str(path[0])
    if details["type"] == "missing":
        return RequestError(f"`{field}` is missing.", field=field)
    if details["type"] == "extra_forbidden":
        near = did_you_mean(field, ChatRequest.model_fields)
        return RequestError(f"`{field}` is not known here.{near}", field=field)
    place = ".".join(str(part) for part in path if part in ChatRequest.model_fields or isinstance(part, int))
    found = repr(details["input"])
    found = found if len(found) <= 60 else f"{found[:60]}…"
    return RequestError(f"`{place}` is {found}: {details['msg'][0].lower()}{details['msg'][1:]}.", field=field)
