"""Docstrings of the package as Markdown: they are written for Sphinx, and MkDocs reads Markdown."""

from __future__ import annotations

import re

_ROLE = re.compile(r":[a-z]+:`~?(?:[^`<]*<)?([^`>]+)>?`")
_CODE = re.compile(r"``(.+?)``")
_BLOCK = re.compile(r"^(?P<indent> *)(?P<before>.*)::\n\n(?P<code>(?:(?P=indent) {4}.*\n?|\n)+)", re.MULTILINE)
_PARAM = re.compile(r"^:param (?P<name>\w+):(?P<text>.*(?:\n(?: +.*|(?=\n)))*)", re.MULTILINE)


def markdown_of(text: str) -> str:
    """
    Translate what our docstrings use of Sphinx's markup.

    :param text: a docstring, or a part of one, without its indentation
    :return: the same as Markdown: roles and double backquotes as code, ``::`` blocks as fenced code
    """
    text = _BLOCK.sub(_fenced, text)
    text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return _CODE.sub(r"`\1`", text)


def parameters_of(text: str) -> dict[str, str]:
    """
    Read the ``:param:`` lines of a docstring.

    :param text: a docstring without its indentation
    :return: the description of each parameter as one line of Markdown
    """
    return {match["name"]: markdown_of(" ".join(match["text"].split())) for match in _PARAM.finditer(text)}


def _fenced(match: re.Match[str]) -> str:
    indent, before, code = match["indent"], match["before"], match["code"].rstrip("\n")
    language = "yaml" if "YAML" in before else "python"
    lines = [line[4:] for line in code.split("\n")]
    return "\n".join([f"{indent}{before}:", "", f"{indent}```{language}", *lines, f"{indent}```", "", ""])
