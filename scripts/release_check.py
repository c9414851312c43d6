"""Refuse a release whose tag, changelog, citation file and addresses do not fit: ``release_check.py v0.1.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """
    :param tag: the tag of the release, such as ``v0.1.0``
    :param root: the repository
    :return: what has to be put right first
    """
    package = (root / "sb3_resnet" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)[0]
    found = []
    if tag != f"v{version}":
        found.append(f"The tag {tag} does not name the version of the package: {version}")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    if dated is None:
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if unreleased is not None and unreleased[1].strip():
        found.append("CHANGELOG.md has entries under [Unreleased], which would be released: name a version for them")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if f"\nversion: {version}\n" not in citation:
        found.append(f"CITATION.cff does not name the version {version}")
    if dated is not None and f"\ndate-released: {dated[1]}\n" not in citation:
        found.append(f"CITATION.cff does not name the date of the changelog: {dated[1]}")
    if "https://example.org/" in (root / "pyproject.toml").read_text(encoding="utf-8"):
        found.append("pyproject.toml still has example.org as the address of the project: write the real one")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("Usage: release_check.py TAG", file=sys.stderr)
        return 2
    found = problems(arguments[0])
    print(*(found or [f"{arguments[0]} can be released"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
