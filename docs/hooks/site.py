"""
Publishes files of the repository that lie outside ``docs/``, and makes links to them work on the site.

Pages link to such a file as it lies in the repository, so that the same link works where the pages are read there.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
# By path in the repository: files that are pages of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "examples/README.md": "examples.md"}
# Folders and files that are copied as they are.
COPIED = (
    "benchmarks/results/**/*.json",
    "benchmarks/results/**/*.csv",
    "benchmarks/results/**/*.png",
    "zoo_configs/*.yml",
    "examples/*.ipynb",
    "examples/*.py",
    "examples/*.yml",
    "LICENSE",
)

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """
    Hook of MkDocs: add the files outside ``docs/``.

    :param files: what MkDocs found in ``docs/``
    :param config: MkDocs' configuration
    :return: the same with more files
    """
    copied = [path.relative_to(ROOT).as_posix() for pattern in COPIED for path in sorted(ROOT.glob(pattern))]
    for source, target in {**PAGES, **{path: path for path in copied}}.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """
    Hook of MkDocs: turn links between files of the repository into links between files of the site.

    :param markdown: text of a page
    :param page: the page
    :param kwargs: not used
    :return: the text with its links changed
    """
    target = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == target), f"docs/{target}")

    def changed(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        path = normpath(f"{Path(source).parent.as_posix()}/{link}")
        if not (ROOT / path).exists():  # an address, or a broken link, which MkDocs will report
            return match[0]
        on_site = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, path)
        return f"{before}{relpath(on_site, Path(target).parent.as_posix())}{anchor or ''}{after}"

    return _LINK.sub(changed, markdown)
