"""What a report says first: what won, by how much, what lost, and where nothing was shown."""

from __future__ import annotations

from dataclasses import dataclass

from . import statistics
from .statistics import Interval
from .table import KINDS

_KINDS_OF_CONTROL = {"nature_head": "the same head: what sees is all that differs", "nature": "as SB3 has it"}


@dataclass(frozen=True)
class Compared:
    """
    What a report says of the arms.

    :param iqm: by kind of score, by arm
    :param gains: difference, by arm and control
    :param chances: with which such a difference is one of chance, likewise
    :param better: probability of improvement, likewise
    :param kind: of the scores that these three are of
    """

    iqm: dict[str, dict[str, Interval]]
    gains: dict[tuple[str, str], Interval]
    chances: dict[tuple[str, str], float]
    better: dict[tuple[str, str], Interval]
    kind: str

    @property
    def verdict(self) -> dict[str, dict[str, list[str]]]:
        """Which arms won and lost, by control."""
        return statistics.verdict(self.iqm[self.kind], self.chances)


def summary(compared: Compared, shown: str, unit: str, decides: bool) -> list[str]:
    """
    The first lines of a report.

    :param compared: what was found
    :param shown: how many seeds, games and steps
    :param unit: of the scores
    :param decides: whether so many runs can show a difference at all
    :return: what won over each control, by how much, with which interval, what lost, and where nothing was shown
    """
    lines = []
    if not compared.verdict:
        ((arm, found),) = compared.iqm[compared.kind].items()
        lines.append(f"**Nothing was compared**: there is one arm, `{arm}`, IQM {found}.")
    for control, arms in compared.verdict.items():
        told = _against(compared, control, arms, decides)
        lines += told if len(compared.verdict) == 1 else [" ".join(told)]
    return [*lines, f"**Measured:** {KINDS[compared.kind]}, {shown}; {unit}."]


def _against(compared: Compared, control: str, found: dict[str, list[str]], decides: bool) -> list[str]:
    iqm = compared.iqm[compared.kind]

    def listed(arms: list[str]) -> str:
        return "; ".join(f"`{arm}` by {compared.gains[arm, control]}, IQM {iqm[arm]}" for arm in arms)

    won = f"**Won** over `{control}`" if found["won"] else f"**Nothing was shown to win** over `{control}`"
    won += f" ({_KINDS_OF_CONTROL[control]})" if control in _KINDS_OF_CONTROL else ""
    won += f", IQM {iqm[control]}" + (f": {listed(found['won'])}." if found["won"] else ".")
    lost = f"**Lost** to it: {listed(found['lost'])}." if found["lost"] else "**Nothing was shown to lose** to it."
    why = "" if decides else " So few runs can show no difference, however large it is."
    rest = "No arm is left undecided."
    if found["open"]:
        differences = (f"`{arm}` (difference {compared.gains[arm, control]}, IQM {iqm[arm]})" for arm in found["open"])
        rest = f"**Nothing was shown** of {'; '.join(differences)}.{why}"
    return [won, lost, rest]
