"""`vlmtune run ...`, `vlmtune plan ...`, and so on: the verbs of `python -m vlmtune.<verb>` under one name."""

from vlmtune import doctor, export, merge, parity, plan, preview, run, serve
from vlmtune.console import command_line


def main() -> None:
    """The console script `vlmtune`."""
    command_line(
        run=run.command,
        plan=plan.command,
        preview=preview.command,
        doctor=doctor.command,
        merge=merge.command,
        export=export.command,
        serve=serve.command,
        parity=parity.command,
    )


if __name__ == "__main__":
    main()
