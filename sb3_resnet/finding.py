"""What a finding about a training run is."""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("warning", "error")


@dataclass(frozen=True)
class Finding:
    """
    Something that is wrong with a run, or about to be.

    :param code: short name, the same for all findings of a kind
    :param seen: what was seen, with numbers
    :param why: why it matters
    :param change: the argument and value to change
    :param severity: ``"warning"``, or ``"error"`` where going on is of no use
    """

    code: str
    seen: str
    why: str
    change: str
    severity: str = "warning"

    def __str__(self) -> str:
        return f"{self.code}: {self.seen} {self.why} {self.change}"
