"""What is said of a file that cannot be used: one line. Below everything else that reads or writes files, so that all can raise it."""

from __future__ import annotations


class MediaError(ValueError):
    """A file that cannot be used. The message is one line: which file, what is wrong, what to do."""


def one_line(error: BaseException) -> str:
    """The message of another library's exception, to stand in one of ours; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
