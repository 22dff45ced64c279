"""The command line `python -m vlmtune.export`."""

from vlmtune.console import command_line
from vlmtune.export import command

if __name__ == "__main__":
    command_line(export=command)
