"""Runs quickstart.ipynb and stores it with what a reader wants to see: pictures, tables and texts, but no progress bars.

python notebooks/execute.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).with_name("quickstart.ipynb")
# warnings and bars that stand still, and the terminal's pictures: the notebook shows real ones in the next table
NOISE = ("ipywidgets", "widget-view", "IProgress", "▀")


def is_noise(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr"
    text, kinds = output.data.get("text/plain", ""), " ".join(output.data)
    return not text.strip() or any(word in text + kinds for word in NOISE)


notebook = nbformat.read(PATH, as_version=4)
NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}).execute()
for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if not is_noise(output)]
notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
nbformat.write(notebook, PATH)
