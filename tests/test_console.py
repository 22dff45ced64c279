"""What goes to the standard output and what to the standard error."""

from __future__ import annotations

import subprocess
import sys

BAR = "from vlmtune.console import bar, console; print(len([*bar(range(3), 'Counting')])); console.print('the result')"


def test_bars_stay_out_of_a_standard_output_that_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True)
    assert done.stdout == "3\nthe result\n"
    assert "Counting" in done.stderr


def test_bars_of_other_processes_than_the_first_are_nowhere() -> None:
    code = f"import os; os.environ['RANK'] = '1'; {BAR}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
