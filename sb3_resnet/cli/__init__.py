"""Entry point of the ``sb3-resnet`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command with the arguments of the process. If a library is missing, say in one line what to install."""
    try:
        import rich  # noqa: F401  # only whether it is installed
        import typer  # noqa: F401  # likewise
    except ImportError as error:
        sys.exit(f"Error: sb3-resnet needs {error.name}: pip install 'sb3_resnet[tools]'")
    from sb3_resnet.cli.app import app

    app(prog_name="sb3-resnet")
