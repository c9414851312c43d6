"""Print findings and tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_resnet.cli.texts import printable
from sb3_resnet.diagnosis import Finding

_STYLES = {"error": "bold red", "warning": "yellow"}


def show_groups(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """
    Print a table of parameter groups.

    :param console: where to print
    :param rows: those of :func:`~sb3_resnet.optim.groups.param_group_summary`
    """
    table = _table("Parameter groups")
    table.show_header = True
    table.add_column("group", overflow="fold")
    for name in ("lr", "weight decay", "parameters", "trainable"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        counts = (f"{row['parameters']:,}", f"{row['trainable_parameters']:,}")
        style = "" if row["trainable_parameters"] else "dim"
        table.add_row(Text(row["name"]), f"{row['lr']:.3g}", f"{row['weight_decay']:.3g}", *counts, style=style)
    total = [f"{sum(row[key] for row in rows):,}" for key in ("parameters", "trainable_parameters")]
    table.add_row("all", "", "", *total, style="bold")
    console.print(table)


def show_pairs(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """
    Print a table of names and values.

    :param console: where to print
    :param title: title of the table
    :param rows: names and values
    """
    console.print(pairs_table(title, rows))


def pairs_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """
    :param title: title of the table
    :param rows: names and values
    :return: a table of them
    """
    table = _table(title)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"), title_justify="left", box=box.ROUNDED, show_header=False, title_style=""
    )


def show_findings(console: Console, findings: Sequence[Finding], strict: bool) -> bool:
    """
    Print one line per finding, errors first; a terminal may wrap it.

    :param console: where to print
    :param findings: what was found
    :param strict: whether warnings are as bad as errors
    :return: whether the command fails
    """
    for finding in sorted(findings, key=lambda finding: finding.severity != "error"):
        parts = [finding.seen, finding.why, finding.change]
        style = _STYLES.get(finding.severity, "")
        text = Text.assemble((f"{finding.severity} ", style), (f"{finding.code}: ", "bold"))
        text.append(printable(" ".join(part for part in parts if part)))
        console.print(text, soft_wrap=not console.record)
    errors = sum(finding.severity == "error" for finding in findings)
    if not findings:
        console.print(Text("Nothing is wrong.", style="bold green"))
    else:
        console.print(f"{_count(errors, 'error')}, {_count(len(findings) - errors, 'warning')}", highlight=False)
    return errors > 0 or (strict and len(findings) > 0)


def gigabytes(count: float) -> str:
    """
    :param count: number of bytes
    :return: the same as text, in GB or MB
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
