"""`python -m vlmtune.parity URL DIR`"""

from vlmtune.console import command_line
from vlmtune.parity import command

if __name__ == "__main__":
    command_line(parity=command)
