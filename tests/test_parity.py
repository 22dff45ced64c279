"""`vlmtune.parity`: a server that asks as was trained is proved to, and one that does not is found out."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image
from servers import calling, running, served, tuned
from transformers.cli.serve import Serve

from vlmtune import Run, format_messages, merge_adapter
from vlmtune.errors import ModelError, RecipeError
from vlmtune.families import find_family
from vlmtune.images import Shrunk, load_image
from vlmtune.model import read_processor
from vlmtune.parity import Parity, command, parity
from vlmtune.parity.client import RefusedError, Server, as_openai, data_url
from vlmtune.serve.loading import load_served
from vlmtune.serving import Template, Token, digest, pixels, read_serving, write_serving


@pytest.fixture(scope="module")
def run(checkpoint: Callable[[str], Path], colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tuned(checkpoint("qwen2_vl"), colours, tmp_path_factory.mktemp("parity") / "colours", 60)


@pytest.fixture(scope="module")
def merged(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity") / "merged"
    merge_adapter(run.adapter_dir, directory)
    return directory


@pytest.fixture(scope="module")
def url(run: Run) -> Generator[str]:
    with served(run.adapter_dir) as client:
        yield str(client.base_url)


def verdicts(found: Parity) -> dict[str, set[str]]:
    """What was compared → what came of it."""
    return {what: {each.verdict for each in found.findings if each.what == what} for what in found_in(found)}


def found_in(found: Parity) -> list[str]:
    return list(dict.fromkeys(finding.what for finding in found.findings))


EQUAL = {"contract": {"equal"}, "prompt": {"equal"}, "pictures": {"equal"}, "end": {"equal"}}


def test_a_server_that_keeps_the_contract_is_proved_to(run: Run, url: str) -> None:
    found = parity(url, run.adapter_dir)
    assert verdicts(found) == EQUAL
    assert len(found.findings) == 1 + 3 * 8
    assert not found.broken


def test_so_is_that_of_the_merged_model(merged: Path) -> None:
    with served(merged) as client:
        assert verdicts(parity(str(client.base_url), merged)) == EQUAL


@pytest.mark.parametrize("kind", ["mllama", "pixtral", "text"])
def test_prompts_and_pixels_of_every_family_are_compared(
    checkpoint: Callable[[str], Path], colours: Path, tmp_path: Path, kind: str
) -> None:
    changes = {"data.images": []} if kind == "text" else {}
    run = tuned(checkpoint(kind), colours, tmp_path / kind, 1, **changes)
    with served(run.adapter_dir) as client:
        found = verdicts(parity(str(client.base_url), run.adapter_dir, rows=3))
    assert found["contract"] == found["prompt"] == {"equal"}
    assert found.get("pictures", {"none"}) == ({"none"} if kind == "text" else {"equal"})


# ---- broken


def other_pixels(directory: Path) -> None:
    path = directory / "processor_config.json"
    path.write_text(path.read_text().replace('"longest_edge": 3136', '"longest_edge": 1568'))


def other_colours(directory: Path) -> None:
    path = directory / "processor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.5"))


def other_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are a helpful assistant.", "You are helpful."))


def no_stop(directory: Path) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0]}))


def signed_anew(directory: Path) -> None:
    """Makes the contract say what the files say, as a server has it that knows no other."""
    found = read_serving(directory)
    processor = read_processor(found.model, find_family(found.model.family), directory)
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    stop = [Token(id=number, text=processor.tokenizer.convert_ids_to_tokens(number)) for number in ends]
    template = Template(sha256=digest(processor.chat_template))
    changes = {"chat_template": template, "pixels": pixels(processor), "stop": stop}
    write_serving(directory, found.model_copy(update=changes), directory)


@pytest.mark.parametrize(
    ("plant", "what", "sentence", "contract"),
    [
        (other_pixels, "prompt", "differs: the server's is", "the image processor's size is"),
        (other_colours, "pictures", "the server's are", "the image processor's image_mean is [0.5"),
        (other_template, "prompt", "differs: the server's is", "chat_template.jinja is another chat template"),
        (no_stop, "end", "goes on behind <|im_end|>", "generation_config.json does not stop at <|im_end|>"),
    ],
)
def test_what_is_planted_is_found(
    run: Run, url: str, tmp_path: Path, plant: Callable[[Path], None], what: str, sentence: str, contract: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.adapter_dir, copy)
    plant(copy)

    beside_itself = parity(url, copy)  # the directory is broken, the server is not
    assert [finding.what for finding in beside_itself.broken] == ["contract"]
    assert contract in beside_itself.broken[0].detail
    with pytest.raises(ModelError) as caught:
        load_served(copy)
    assert contract in str(caught.value)

    signed_anew(copy)
    with served(copy) as client:
        found = parity(str(client.base_url), run.adapter_dir, model="colours")
    assert what in {finding.what for finding in found.broken}
    assert any(sentence in finding.detail for finding in found.broken if finding.what == what)
    assert all(finding.where.endswith("of train.jsonl") for finding in found.broken)


@pytest.fixture
def transformers_server() -> Generator[Callable[[Path], str]]:
    """`transformers serve`, as anybody starts it."""
    started: list[Serve] = []

    def start(directory: Path) -> str:
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        server = Serve(str(directory), device="cpu", dtype="float32", port=port, log_level="error", non_blocking=True)
        started.append(server)
        while not server.server.started:
            pass
        return f"http://localhost:{port}"

    yield start
    for server in started:
        server.kill_server()


def test_transformers_own_server_is_compared_as_far_as_it_tells(
    merged: Path, tmp_path: Path, transformers_server: Callable[[Path], str]
) -> None:
    found = parity(transformers_server(merged), merged, rows=2)
    assert verdicts(found) == {"contract": {"equal"}, "prompt": {"unproved"}, "pictures": {"unproved"}, "end": {"equal"}}
    for plant, what in ((other_pixels, "prompt"), (other_template, "prompt"), (no_stop, "end")):
        copy = tmp_path / plant.__name__
        shutil.copytree(merged, copy)
        plant(copy)
        found = parity(transformers_server(copy), merged, rows=2)
        assert {finding.what for finding in found.broken} == {what}


# ---- rows


def test_conversations_with_calls_and_pictures_survive_the_way_to_a_server() -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "crop", "arguments": {"side": "lëft", "n": [1, None]}}}
    picture = Image.effect_noise((9, 7), 80).convert("RGB")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "image", "image": picture}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "cropped", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A kite."},
    ]
    messages = format_messages({"messages": turns})
    again = format_messages({"messages": json.loads(json.dumps([as_openai(message) for message in messages]))}, images=[])
    sent = again[1]["content"][1].pop("image")
    assert load_image(sent).tobytes() == messages[1]["content"][1].pop("image").tobytes()
    assert again == messages


def test_a_picture_is_sent_as_its_file_and_else_without_loss(tmp_path: Path) -> None:
    picture = Image.effect_noise((30, 20), 80).convert("RGB")
    picture.save(tmp_path / "a.jpg")
    assert load_image(data_url(str(tmp_path / "a.jpg"))).tobytes() == load_image(tmp_path / "a.jpg").tobytes()
    assert data_url(str(tmp_path / "a.jpg")).startswith("data:image/jpeg;base64,")
    assert data_url((tmp_path / "a.jpg").read_bytes()) == data_url(str(tmp_path / "a.jpg"))
    for source in (picture, Shrunk(str(tmp_path / "a.jpg"), 15, 10)):
        assert load_image(data_url(source)).tobytes() == load_image(source).tobytes()
        assert data_url(source).startswith("data:image/png;base64,")
    assert data_url("data:image/gif;base64,AA") == "data:image/gif;base64,AA"


def test_calls_and_results_are_part_of_the_prompt(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run = calling(checkpoint("qwen2_vl"), tmp_path)
    with served(run.adapter_dir) as client:
        found = parity(str(client.base_url), run.adapter_dir)
    assert verdicts(found) == {"contract": {"equal"}, "prompt": {"equal"}, "end": {"equal"}}


def test_rows_are_as_the_run_had_them(run: Run, url: str, colours: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in colours.read_text().splitlines()]
    rows[0] |= {"image": "", "description": None}
    rows = [row | {"image": row["image"] and str(colours.parent / row["image"])} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.source": str(tmp_path / "rows.jsonl"), "on_bad_row": "drop"}
    found = parity(url, run.adapter_dir, rows=4, **changes)
    assert verdicts(found) == EQUAL
    assert {finding.where for finding in found.findings[1:]} == {f"row {number} of rows.jsonl" for number in (3, 5, 7)}
    shrunk = parity(url, run.adapter_dir, rows=2, **{"on_too_long": "shrink", "train.max_length": 88})
    assert verdicts(shrunk) == EQUAL
    prompts = parity(url, run.adapter_dir, rows=2, train_on_inputs=True)
    assert verdicts(prompts) == EQUAL


def test_without_the_base_the_processor_beside_the_model_will_do(run: Run, url: str, tmp_path: Path) -> None:
    found = parity(url, run.adapter_dir, rows=1, **{"model.name": str(tmp_path / "gone")})
    assert verdicts(found) == EQUAL


def test_a_recipe_that_makes_another_template_is_found(run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(run.processor.chat_template.replace("helpful", "curt"))
    found = parity(url, run.adapter_dir, rows=1, chat_template=str(tmp_path / "other.jinja"))
    assert [finding.what for finding in found.broken] == ["contract", "prompt"]
    assert "»" in found.broken[1].detail


# ---- mistakes


def test_mistakes_are_a_sentence(run: Run, url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no server answers at http://localhost:1/v1: .*refused"):
        parity("http://localhost:1", run.adapter_dir)
    with pytest.raises(ModelError, match="is no server with OpenAI's interface"):
        parity("localhost", run.adapter_dir)
    with pytest.raises(ModelError, match=r"has no serving\.json"):
        parity(url, tmp_path)
    with pytest.raises(RecipeError, match="0 rows prove nothing"):
        parity(url, run.adapter_dir, rows=0)
    shutil.copytree(run.adapter_dir, tmp_path / "copy")
    (tmp_path / "copy" / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"has no recipe\.yaml: name the one it was trained by with --recipe"):
        parity(url, tmp_path / "copy")
    assert not parity(url, tmp_path / "copy", rows=1, recipe=run.adapter_dir / "recipe.yaml").broken


def test_a_server_that_refuses_the_rows_or_says_nothing_is_broken(run: Run, url: str) -> None:
    found = parity(url, run.adapter_dir, rows=1, model="another")
    assert "the server refuses the row" in found.broken[0].detail
    assert "model 'another' is not served here" in found.broken[0].detail
    empty = FastAPI()
    empty.get("/v1/models")(lambda: JSONResponse({}))
    empty.post("/v1/chat/completions")(lambda: JSONResponse({}))
    with running(empty) as other:
        assert verdicts(parity(other, run.adapter_dir, rows=1))["prompt"] == {"unproved"}


def picky(*, knows_ids: bool) -> FastAPI:
    """A server that refuses one question, and knows the field that asks for ids or not."""
    app = FastAPI()

    def answer(body: dict[str, Any]) -> JSONResponse:
        if "Too much." in str(body["messages"]) or ("return_token_ids" in body and not knows_ids):
            return JSONResponse({}, status_code=400)
        return JSONResponse({"ids": "return_token_ids" in body})

    app.get("/v1/models")(lambda: JSONResponse({}))
    app.post("/v1/chat/completions")(answer)
    return app


@pytest.mark.parametrize("knows_ids", [True, False])
def test_a_row_that_is_refused_does_not_cost_the_ids_of_the_next(knows_ids: bool) -> None:
    def sample(text: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        return {"messages": format_messages({"messages": turns})}

    with running(picky(knows_ids=knows_ids)) as url:
        server = Server(url, None, "colours", 10)
        with pytest.raises(RefusedError):
            server.ask(sample("Too much."), 1)
        for _ in range(2):
            assert server.ask(sample("a"), 1) == {"ids": knows_ids}


def test_where_nothing_is_proved_it_is_said_and_strictly_a_failure(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with running(picky(knows_ids=True)) as silent:
        command(silent, run.adapter_dir, rows=1)
        shown = " ".join(capsys.readouterr().out.split())
        assert "No prompt and no picture is proved: the server does not tell what it made of them" in shown
        with pytest.raises(typer.Exit) as caught:
            command(silent, run.adapter_dir, rows=1, strict=True, as_json=True)
    assert caught.value.exit_code == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_code_of_a_directory_runs_only_where_it_is_allowed_to(run: Run, url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="runs the code that came with its checkpoint: allow it with --trust-remote-code"):
        parity(url, run.adapter_dir, rows=1, **{"model.trust_remote_code": True})
    found = parity(url, run.adapter_dir, rows=1, trust_remote_code=True, **{"model.trust_remote_code": True})
    assert verdicts(found) == EQUAL


def test_the_command_says_by_its_code_and_its_last_line_whether_all_is_equal(
    run: Run, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(url, run.adapter_dir, rows=1, as_json=True, strict=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True
    command(url, run.adapter_dir, rows=1)
    assert " ".join(capsys.readouterr().out.split()).endswith("comparisons are equal: the model is asked as it was trained")
    with pytest.raises(typer.Exit) as caught:
        command(url, run.adapter_dir, rows=1, model="another")
    assert caught.value.exit_code == 1
    shown = capsys.readouterr().out
    assert "row 1 of train.jsonl: prompt: the server refuses the row" in " ".join(shown.split())
    assert " ".join(shown.split()).endswith("comparisons are broken: the model is asked otherwise than it was trained")
