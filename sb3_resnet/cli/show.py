"""Findings and tables on the terminal, by rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_resnet.cli.check import Report, gigabytes
from sb3_resnet.cli.texts import printable
from sb3_resnet.diagnosis.findings import Finding

_TWO_COLUMNS = 100  # characters
_STYLES = {"error": "bold red", "warning": "yellow"}


def show_report(console: Console, report: Report) -> None:
    """Print what a check found, findings last; tables stand side by side where there is room."""
    memory = [(name, gigabytes(count)) for name, count in report.memory]
    shapes = [(name, str(shape)) for name, shape in report.shapes]
    parts = {"Model": report.model, "Memory": memory, "Shapes of a batch": shapes, "Speed, measured": report.speed}
    tables = [_pairs(title, rows) for title, rows in parts.items() if rows]
    if len(tables) == len(parts) and console.width >= _TWO_COLUMNS:
        grid = Table.grid(padding=(0, 4))
        grid.add_row(tables[0], tables[2])
        grid.add_row(tables[1], tables[3])
        tables = [grid]
    for table in tables:
        console.print(table)
    if report.groups:
        show_groups(console, report.groups)
    show_findings(console, report.findings)


def show_groups(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print :func:`~sb3_resnet.optim.groups.param_group_summary`'s rows."""
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
    """Print names and values."""
    console.print(_pairs(title, rows))


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
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


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print one line a finding, errors first; a terminal may wrap it."""
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


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
