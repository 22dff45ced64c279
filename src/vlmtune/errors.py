"""Everything that vlmtune raises on purpose.

    VlmtuneError
    ├── RecipeError      a recipe that cannot be run: unknown key, wrong type, value out of range
    ├── DatasetError     data that cannot be read: a file, a column, a row
    │   └── ImageError   a picture that cannot be read
    ├── ModelError       a checkpoint, processor, family or adapter that cannot be used
    └── OutputError      a place that cannot be written: not empty, disk full

Every message is one clear sentence that names the place (row, file, field), what was found and what would be right.
The command line prints it without a traceback and exits with code 2.
"""


class VlmtuneError(Exception):
    """Base of all errors that a user can cause and mend."""


class RecipeError(VlmtuneError):
    """A recipe that cannot be run. The message lists all of its mistakes at once, one a line."""


class DatasetError(VlmtuneError):
    """Data that cannot be read or that does not have the stated format."""


class ImageError(DatasetError):
    """A picture that cannot be found, opened or decoded."""


class ModelError(VlmtuneError):
    """A checkpoint, processor, family or adapter that cannot be used."""


class OutputError(VlmtuneError):
    """A directory that cannot be written: it is not empty, or the disk is full."""


def one_line(error: BaseException) -> str:
    """The error's text in one line, cut where a list of everything there is begins to fill the screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
