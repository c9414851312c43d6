"""
The lowest versions that ``pyproject.toml`` allows, as constraints for pip.

::

    python scripts/lowest.py > lowest.txt
    pip install -c lowest.txt -e '.[atari,zoo,contrib,tools,dev]'

pip has no option for this. What the dependencies themselves need is left to pip. Needs ``packaging``, and before
Python 3.11 ``tomli``.
"""

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def floor(requirement: Requirement) -> Version:
    """
    Return the lowest version that a requirement allows.

    :param requirement: with a lower bound that is itself allowed (``>=``, ``~=`` or ``==``)
    :raises ValueError: without one
    """
    bounds = [
        Version(one.version.removesuffix(".*")) for one in requirement.specifier if one.operator in (">=", "~=", "==")
    ]
    if not bounds:
        raise ValueError(f"{requirement} has no lowest version in pyproject.toml: write {requirement.name}>=...")
    return max(bounds)


def constraints(project: dict[str, Any]) -> list[str]:
    """
    Return one ``name==version`` per dependency, in alphabetical order.

    Where extras name the same package, the highest of their lower bounds counts, as all extras are installed together.

    :param project: the table ``[project]``: its dependencies and those of all extras
    :raises ValueError: for a dependency without a lower bound
    """
    floors: dict[str, Version] = {}
    for group in (project.get("dependencies", []), *project.get("optional-dependencies", {}).values()):
        for requirement in map(Requirement, group):
            name = canonicalize_name(requirement.name)
            floors[name] = max(floors.get(name, Version("0")), floor(requirement))
    return [f"{name}=={version}" for name, version in sorted(floors.items())]


if __name__ == "__main__":
    print(*constraints(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]), sep="\n")
