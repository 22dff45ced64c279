"""Two processes that train together, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def in_two_processes(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module after `-m`, with its arguments in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
