"""`vlmtune run ...`, `vlmtune plan ...`, and so on: the verbs of `python -m vlmtune.<verb>` under one name."""

import sys
from importlib import import_module

from vlmtune.console import command_line, interruptible

VERBS = ("run", "plan", "preview", "doctor", "merge", "export", "serve", "parity")


def main() -> None:
    """The console script `vlmtune`, which imports the verb that is asked for and no other."""
    asked = [verb for verb in VERBS if verb in sys.argv[1:2]]
    with interruptible():
        commands = {verb: import_module(f"vlmtune.{verb}").command for verb in asked or VERBS}
    if asked:
        del sys.argv[1]
    command_line(" ".join(["vlmtune", *asked]), **commands)


if __name__ == "__main__":
    main()
