"""The door for third parties: families and row formats that other packages bring along as entry points.

A package lists them in its pyproject under `[project.entry-points."vlmtune.formats"]` and needs nothing else. A caller
who has the object at hand passes it straight in, without an entry point.
"""

import difflib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

FAMILIES = "vlmtune.families"
FORMATS = "vlmtune.formats"


@cache  # a scan reads the metadata of every installed package, and formats are looked up once a row
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def names(group: str) -> list[str]:
    """The names that installed packages offer in an entry-point group, sorted."""
    return sorted(_entry_points(group))


def load(group: str, name: str) -> object:
    """The object behind an entry point.

    Raises `LookupError`, with the names there are, where no installed package offers this one. What an import inside
    the plugin raises passes through: it is the plugin's to mend.
    """
    found = _entry_points(group)
    if name not in found:
        there = ", ".join(names(group)) or "none"
        raise LookupError(f"{group} has no entry point {name!r}, there is {there}.{did_you_mean(name, found)}")
    return found[name].load()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the last sentence of an error message, or nothing where none is near.

    >>> did_you_mean("Categroy", ["Category", "image"])
    " Did you mean 'Category'?"
    >>> did_you_mean("price", ["Category", "image"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
