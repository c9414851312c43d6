"""What a finding about a training run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """
    Something that is wrong with a run, or about to be.

    :param code: short name
    :param seen: what was seen, with numbers
    :param why: why it matters
    :param change: the argument and value to change
    :param severity: ``"warning"`` or ``"error"``
    """

    code: str
    seen: str
    why: str
    change: str
    severity: str = "warning"
