import subprocess
import sys

import pytest

import vlmtune


def test_the_public_names_are_these() -> None:
    assert vlmtune.__all__ == [
        "DatasetError",
        "Family",
        "ImageError",
        "ModelError",
        "MultimodalCollator",
        "OutputError",
        "Plan",
        "Recipe",
        "RecipeError",
        "Run",
        "VlmtuneError",
        "export_model",
        "finetune",
        "format_messages",
        "load_model",
        "load_recipe",
        "make_plan",
        "merge_adapter",
    ]
    for name in vlmtune.__all__:
        assert getattr(vlmtune, name).__name__ == name


def test_importing_vlmtune_is_quick_and_brings_no_torch() -> None:
    code = "import sys, time; t = time.perf_counter(); import vlmtune; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < 0.3
    assert torch == "False"


def test_messages_recipes_and_plans_bring_no_torch() -> None:
    code = "import sys; from vlmtune import format_messages, load_recipe, make_plan, Recipe; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize(
    "words", ["merge /nowhere out", "serve /nowhere", "parity http://localhost /nowhere", "run /nowhere.yaml"]
)
def test_a_mistake_is_told_before_torch_is_imported(words: str) -> None:
    code = (
        "import sys; from vlmtune.__main__ import main; sys.argv = ['vlmtune', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert done.stdout.strip() == "False"


def test_an_interrupt_while_a_verb_is_imported_leaves_no_traceback() -> None:
    code = (
        "import signal, sys, threading; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start(); "
        "sys.argv = ['vlmtune', 'doctor', 'nowhere.yaml']; from vlmtune.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_the_command_lines_say_how_they_are_used() -> None:
    for verb in (".run", ".merge", ".export", ".plan", ".preview", ".doctor", ".serve", ".parity", ""):
        help_text = subprocess.check_output([sys.executable, "-m", f"vlmtune{verb}", "--help"], text=True)
        assert "Usage" in help_text
