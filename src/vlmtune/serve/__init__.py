"""`python -m vlmtune.serve DIR`: a tuned model behind OpenAI's interface, asked as it was trained.

The server is transformers' own, or vLLM's where that is installed; which of its settings keep the contract stands in
`serving.json`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vlmtune.console import decisions
from vlmtune.errors import ModelError, OutputError
from vlmtune.serving import Serving, commands, read_serving

NEEDED = ("fastapi", "uvicorn", "openai")


class Engine(StrEnum):
    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"


def serve(
    directory: Path,
    *,
    host: str = "localhost",
    port: int = 8000,
    base: str | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Serves a run's directory or a merged model with transformers' own server, until it is interrupted.

    Args:
        directory: with a `serving.json`.
        host: to listen on; "0.0.0.0" is the whole network.
        port: to listen on; 0 takes a free one.
        base: hub id or directory of an adapter's base, if it has moved.
        use_cpu: leave a GPU alone.
        trust_remote_code: run the code of a checkpoint that comes with its own.

    Raises:
        ModelError: no contract, files that do not keep it, a model that cannot be loaded, or packages that are missing.
        OutputError: the port is taken.

    """
    read_serving(directory)  # a mistake is found before torch's models are imported
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModelError(f"serving needs {', '.join(missing)}: pip install 'vlmtune[serving]'")
    listening = _listen(host, port)
    import uvicorn

    from vlmtune.serve.loading import load_served
    from vlmtune.serve.server import build_app

    served = load_served(directory, base=base, use_cpu=use_cpu, trust_remote_code=trust_remote_code)
    url = f"http://{host}:{listening.getsockname()[1]}/v1"
    decisions("Served", {**in_words(served.contract), "device": served.model.device, "server": "transformers", "URL": url})
    uvicorn.Server(uvicorn.Config(build_app(served), log_level="warning")).run(sockets=[listening])


def in_words(found: Serving) -> dict[str, str]:
    """The contract for people."""
    size = found.pixels.get("size")
    pixels = ", ".join(f"{name} {value}" for name, value in size.items()) if size else "takes no pictures"
    asked = f"{found.context:,} tokens" if found.context else "unknown"
    rows = f", the longest row trained has {found.longest_row:,}" if found.longest_row else ""
    return {
        "model": f"{found.name} ({found.kind} of {found.model.name}, {found.model.family})",
        "computes in": f"{found.model.dtype}{'' if found.model.quantization == 'none' else f', {found.model.quantization}'}",
        "chat template": f"{found.chat_template.file}, sha256 {found.chat_template.sha256[:12]}…",
        "pictures": pixels,
        "stops at": ", ".join(f"{token.text} ({token.id})" for token in found.stop),
        "context": f"{asked}{rows}",
        "answers": f"greedy, at most {found.max_new_tokens} tokens unless a request says otherwise",
    }


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{host}:{port} cannot be listened on ({reason}): name another --port, or 0 for a free one") from None


def _start_vllm(directory: Path, options: list[str], *, base: str | None, trust_remote_code: bool) -> None:
    """Makes this process vLLM's."""
    from vlmtune.serve.loading import read_kept

    found, _, _ = read_kept(directory, base=base, trust_remote_code=trust_remote_code)
    arguments = [*commands(found, directory)["vllm"], *options]
    if shutil.which("vllm") is None:
        raise ModelError(f"vLLM is not installed here; where it is: {shlex.join(arguments)}")
    decisions("Served", {**in_words(found), "server": shlex.join(arguments)})
    os.execvp(arguments[0], arguments)


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, or a merged model.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTION]...", help="More options of vllm serve.")] = None,
    engine: Annotated[Engine, typer.Option(help="auto is vLLM where it is installed, else transformers.")] = Engine.auto,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is the whole network.")] = "localhost",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free one.")] = 8000,
    base: Annotated[str | None, typer.Option(help="Hub id or directory of an adapter's base, if it has moved.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of a checkpoint that comes with its own.")
    ] = False,
) -> None:
    """Serve a tuned model behind OpenAI's interface, with the template, pixels and stop tokens that it was trained with."""
    if engine is Engine.vllm or (engine is Engine.auto and shutil.which("vllm") is not None and not cpu):
        more = ["--host", host, "--port", str(port), *(options or [])]
        _start_vllm(directory, more, base=base, trust_remote_code=trust_remote_code)
    elif options:
        raise ModelError(f"{shlex.join(options)}: options after -- are vLLM's, and the server is transformers'")
    else:
        serve(
            directory,
            host=host,
            port=port,
            base=base,
            use_cpu=cpu,
            trust_remote_code=trust_remote_code,
        )
