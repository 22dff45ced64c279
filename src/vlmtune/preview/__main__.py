"""`python -m vlmtune.preview RECIPE ...`"""

from vlmtune.console import command_line
from vlmtune.preview import command

if __name__ == "__main__":
    command_line(preview=command)
