"""`python -m vlmtune.merge ADAPTER OUT`"""

from vlmtune.console import command_line
from vlmtune.merge import command

if __name__ == "__main__":
    command_line(merge=command)
