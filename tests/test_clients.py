"""The demo's tuned model, served: the openai client, LangChain and LlamaIndex get the answers that the run gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from real_vocab import cache_directory, made_once
from servers import calling, picture_url, seen_and_asked, served

from vlmtune import Run, finetune, format_messages
from vlmtune.evaluation import answers
from vlmtune.parity import parity

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PACKAGES = ("langchain-openai>=1.7,<2", "llama-index-llms-openai-like>=0.8,<0.9")  # 340 MB, and another openai than ours


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return finetune("recipes/demo.yaml", **{"train.output_dir": str(tmp_path_factory.mktemp("demo") / "demo")})


@pytest.fixture(scope="module")
def ask_clients() -> Callable[..., dict[str, Any]]:
    """Runs clients.py with a Python of its own, made once."""
    home = cache_directory() / f"clients-{sys.version_info[0]}.{sys.version_info[1]}"

    def install(target: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
        subprocess.run([str(target / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES], check=True)

    try:
        made_once(home, install)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no package registry: {error}")

    def ask(*arguments: Any) -> dict[str, Any]:
        line = [str(home / "bin" / "python"), str(Path(__file__).with_name("clients.py")), *map(str, arguments)]
        return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)

    return ask


def questions(run: Run, count: int) -> list[tuple[dict[str, Any], Path, str]]:
    """Rows that were held out: row, picture, text."""
    rows = [run.held_out.raw(place * len(run.held_out) // count) for place in range(count)]
    text = "Create a short product description for the shop.\nCategory: {}"
    return [(row, ROOT / "recipes" / "demo" / row["image"], text.format(row["title"])) for row in rows]


def test_fifty_clients_of_the_demo_get_each_its_answer(run: Run) -> None:
    asked = questions(run, 50)
    expected = [run.generate(row) for row, _, _ in asked]
    assert len(set(expected)) >= 30
    with served(run.adapter_dir) as client:

        def answer(question: tuple[dict[str, Any], Path, str]) -> str:
            message = seen_and_asked(picture_url(question[1]), question[2])
            return client.chat.completions.create(model="demo", messages=[message]).choices[0].message.content

        with ThreadPoolExecutor(50) as threads:
            assert list(threads.map(answer, asked)) == expected
        assert not parity(str(client.base_url), run.adapter_dir).broken


def test_the_openai_client_streams_stops_and_takes_turns(run: Run) -> None:
    (row, picture, text), (other, other_picture, other_text) = questions(run, 2)
    asked, then = seen_and_asked(picture_url(picture), text), seen_and_asked(picture_url(other_picture), other_text)
    expected = run.generate(row)
    turns = [asked, {"role": "assistant", "content": expected}, then]
    conversation = {"messages": format_messages({"messages": turns}, prompt_only=True)}
    (in_turn,) = answers(run.model, run.prompter, [conversation], max_new_tokens=32)
    with served(run.adapter_dir) as client:

        def create(*messages: Any, **options: Any) -> Any:
            return client.chat.completions.create(model="demo", messages=messages, **options)

        chunks = list(create(asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        stopped = create(asked, stop=["picked", ","]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == (expected.partition(",")[0], "stop")
        assert create(*turns).choices[0].message.content.strip() == in_turn
        assert create(then).choices[0].message.content == run.generate(other)


def test_langchain_and_llama_index_get_the_answers_of_the_run(run: Run, ask_clients: Callable[..., dict[str, Any]]) -> None:
    with served(run.adapter_dir) as client:
        for row, picture, text in questions(run, 2):
            expected = run.generate(row)
            for name, given in ask_clients(client.base_url, "demo", picture, text).items():
                assert given["plain"] == given["streamed"] == expected, name
                assert given["turns"]
                assert given.get("reason", "stop") == "stop"
                assert given.get("stopped", expected.partition(",")[0]) == expected.partition(",")[0]


def test_langchain_gets_calls_and_structured_output(
    checkpoint: Callable[[str], Path], tmp_path: Path, ask_clients: Callable[..., dict[str, Any]]
) -> None:
    with served(calling(checkpoint("qwen2_vl"), tmp_path).adapter_dir) as client:
        found = ask_clients(client.base_url, "rain")
    assert found == {"calls": {"made": ["look", {"at": "sky"}], "structured": "sky"}}


def test_the_merged_demo_answers_as_the_merged_model(run: Run) -> None:
    merged = run.adapter_dir / "merged"
    asked = questions(run, 16)
    with served(merged) as client:
        messages = [seen_and_asked(picture_url(picture), text) for _, picture, text in asked]
        given = [client.chat.completions.create(model="demo", messages=[m]).choices[0].message.content for m in messages]
        assert sum(text == row["description"] for text, (row, _, _) in zip(given, asked, strict=True)) >= 14
        assert not parity(str(client.base_url), merged).broken
