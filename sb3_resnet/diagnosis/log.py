"""Read SB3's log."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def read_log(path: str | Path) -> dict[str, list[float | None]]:
    """
    Read SB3's ``progress.csv``, also if the run was killed while it wrote the last row.

    :param path: the file
    :return: values by column, ``None`` where a cell is empty or cut off; only columns that hold nothing but numbers
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it cannot be read
    """
    try:
        text = Path(path).read_text().replace("\0", "")  # a crash of the machine may leave some
        header, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read as SB3's log: {error}") from error
    if rows and not text.endswith("\n"):
        rows[-1].pop()  # 1.2 may be the beginning of 1.2e+09
    columns: dict[str, list[float | None]] = {}
    for index, key in enumerate(header if rows else ()):
        cells = [row[index] if index < len(row) else "" for row in rows]
        try:
            columns[key] = [*(_number(cell) for cell in cells[:-1]), _number_or_none(cells[-1])]
        except ValueError:
            continue
    return columns


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _number_or_none(cell: str) -> float | None:
    try:
        return _number(cell)
    except ValueError:
        return None
