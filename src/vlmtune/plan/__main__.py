"""`python -m vlmtune.plan RECIPE ...`"""

from vlmtune.console import command_line
from vlmtune.plan import command

if __name__ == "__main__":
    command_line(plan=command)
