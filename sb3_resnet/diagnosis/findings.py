"""A finding about a training run, and the limits beyond which a number becomes one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """
    Something that is wrong with a run, or will be.

    :param code: short name of this kind of finding
    :param seen: what was seen, with numbers
    :param why: why it matters
    :param change: which argument to change, and to what value
    :param severity: ``"warning"``, or ``"error"`` if there is no use in training on
    """

    code: str
    seen: str
    why: str
    change: str
    severity: str = "warning"

    def __str__(self) -> str:
        return f"{self.code}: {self.seen} {self.why} {self.change}"


@dataclass(frozen=True)
class Threshold:
    """
    A limit, and where it comes from.

    :param value: the limit
    :param source: a paper, a property of the arithmetic, a measurement, or own judgement
    """

    value: float
    source: str


#: All limits by name, with their sources.
THRESHOLDS: dict[str, Threshold] = {
    "values": Threshold(10, "own judgement: fewer logged values than this say nothing"),
    "loss_growth": Threshold(10.0, "own judgement: factor between the first and the last third of the log"),
    "loss_swing": Threshold(1.2, "own judgement: factor between successive values; 1.6 at a learning rate of 0.1"),
    "loss_swing_alone": Threshold(10.0, "own measurement: 3.3 in a healthy run on Pong, where rewards are rare"),
    "td_size": Threshold(3.0, "own judgement: errors far beyond any reward come from bootstrapping; 0.1 on Pong"),
    "q_bound": Threshold(1.0, "share of reward / (1 - gamma); larger values have diverged: arXiv 1812.02648"),
    "q_overestimation": Threshold(1.0, "own judgement, share of the largest return seen; as in arXiv 1509.06461"),
    "slow_after": Threshold(200_000, "own judgement: long enough for the first gains on Atari's easy games"),
    "slow_curve": Threshold(2.0, "Welch's test at about 95 %: standard errors that a gain must exceed"),
    "overfitting": Threshold(0.25, "own judgement: share of the range of all rewards so far"),
    "dead_features": Threshold(0.5, "own judgement"),
    "dormant_units": Threshold(0.5, "own judgement; dormant as defined in arXiv 2302.12902"),
    "vanishing": Threshold(1e-7, "Adam adds 1e-8 to the root of each squared gradient: below it steps shrink too"),
    "exploding": Threshold(10.0, "own judgement: the clip leaves less than a tenth of the gradient"),
    "norm_growth": Threshold(10.0, "own judgement, for QR-DQN, PPO and A2C: factor between the thirds of the log"),
    "lr_zero": Threshold(1e-9, "a thousandth of 1e-6, the smallest rate in the seed document"),
    "update_ratio": Threshold(6e-8, "half the distance of float32 numbers: smaller updates are rounded away"),
    "batchnorm_drift": Threshold(0.5, "own measurement, in running deviations: 0.05 on Pong after 30 updates"),
    "final_epsilon": Threshold(0.2, "twice the largest in use: 0.1 (Nature DQN), 0.05 (SB3), 0.01 (RL-Zoo)"),
    "amp_skips": Threshold(0.05, "own judgement: normal is 0.0005: GradScaler tries a larger scale each 2000 updates"),
    "amp_updates": Threshold(100, "own judgement: fewer updates than this say nothing"),
    "exploration_fraction": Threshold(0.9, "own judgement: SB3's default is 0.1; at 1 epsilon ends with training"),
    "lr_order": Threshold(1.0, "SGI, VRL3, fastai: the backbone learns at 0.01 to 1 times the head's rate"),
    "buffer_memory": Threshold(1.0, "share of the available memory that the full buffer may take"),
}
