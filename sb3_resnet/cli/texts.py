"""What is printed: errors in one line, and nothing that a terminal would obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

_PICTURE_WIDTH = 116  # characters


def printable(text: str) -> str:
    """
    :param text: any text
    :return: the same with control characters written out, since a file could rewrite a terminal with them
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def one_line(error: object) -> str:
    """
    :param error: any error
    :return: its message without line breaks; the name of its class if it has no message
    """
    return printable(" ".join(str(error).split())) or type(error).__name__


def console_for(svg: Path | None) -> Console:
    """
    :param svg: picture of what is printed, if there shall be one
    :return: a console that prints texts as they are: names of files may hold what looks like markup
    """
    width = None if svg is None else _PICTURE_WIDTH
    return Console(record=svg is not None, width=width, markup=False, emoji=False)


def at_home(value: Any) -> Any:
    """
    :param value: a value of the command line
    :return: the same, with ``~`` expanded in paths
    """
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


def check_picture(svg: Path) -> None:
    """
    :param svg: where the picture shall be written
    :raises ValueError: if it is a folder, or a file that is no picture would be overwritten
    :raises FileNotFoundError: if there is no such folder
    """
    if svg.is_dir():
        raise ValueError(f"--svg {svg} is a folder: write the name of a file in it")
    if not svg.parent.is_dir():
        raise FileNotFoundError(f"--svg {svg}: {svg.parent} is no folder, make it first")
    if svg.suffix.lower() != ".svg":
        raise ValueError(f"--svg {svg}: the name of the picture must end with .svg")
    if svg.exists():
        with svg.open("rb") as file:
            if b"\0" in file.read(4096):  # models, pictures of other kinds, archives; never SVG, which is text
                raise ValueError(f"--svg {svg} is a file that is no SVG, and is not overwritten: write another name")
