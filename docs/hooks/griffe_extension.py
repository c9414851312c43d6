"""Lets mkdocstrings read Markdown where the docstrings have Sphinx's markup."""

from __future__ import annotations

from typing import Any

import griffe

from docs.hooks.docstrings import markdown_of


class MarkdownDocstrings(griffe.Extension):
    """Translate each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """
        Called by griffe for each module, class, function and attribute.

        :param obj: what was read
        :param kwargs: not used
        """
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)
