"""`python -m vlmtune.serve DIR`"""

from vlmtune.console import command_line
from vlmtune.serve import command

if __name__ == "__main__":
    command_line(serve=command)
