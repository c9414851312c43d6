"""Mixed precision under Stable-Baselines3's own ``train()``."""

from __future__ import annotations

import logging
import warnings
from functools import partial

from sb3_resnet.callbacks._evaluations import refusals_end_the_search, walk
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, extractors_of, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice
from sb3_resnet.common.nonfinite import RewardCheck
from sb3_resnet.common.ranks import ranks_of
from sb3_resnet.nn.precision import DTYPES, LossScaler, MixedPrecision, resolve_dtype
from sb3_resnet.optim.groups import optimizer_of, recall, remember

_STATE = "amp"  # key of our state in the optimizer's groups, where it is saved
_log = logging.getLogger("sb3_resnet")


class AMPCallback(LendingCallback):
    """
    Run the stages that train in reduced precision; features, head, targets, loss and optimizer stay in float32.

    Frozen stages compute in the extractor's ``frozen_dtype``, with and without this callback.

    float16 uses dynamic loss scaling with the rules and defaults of ``torch.amp.GradScaler``: SB3 clips unscaled
    gradients, an update with NaN or infinity in its gradient is skipped and counted (``train/amp_skipped``), the scale
    (``train/amp_scale``) backs off and grows. A skipped update counts as one for learning-rate schedules. The scale is
    saved with the model; a resumed run goes on with it. For DQN and QR-DQN, and for PPO and A2C with a
    :class:`~sb3_resnet.extractor.ResNetExtractor`. Example::

        AMPCallback(dtype="auto")

    :param dtype: ``"auto"``: bfloat16 where the device has it in hardware, float16 on older GPUs, float32 elsewhere;
        or one of these
    :param verbose: 1 to print what was chosen (it is logged in any case); 0 for silence
    :param init_scale: float16: the first scale (default 65536, this and the following as GradScaler's)
    :param growth_factor: float16: factor of the scale after ``growth_interval`` updates in a row (default 2)
    :param backoff_factor: float16: factor of the scale after a skipped update (default 0.5)
    :param growth_interval: float16: gradient updates (default 2000)
    :raises ValueError: for values that cannot work; in training, for NaN or infinity in rewards, and where no scale
        helps any more
    :raises TypeError: at the start of training for a policy without a ResNetExtractor
    """

    def __init__(
        self,
        dtype: str = "auto",
        verbose: int = 1,
        *,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        super().__init__(verbose)
        self.dtype = choice("dtype", dtype, ["auto", *DTYPES])
        self._new_scaler = partial(LossScaler, init_scale, growth_factor, backoff_factor, growth_interval)
        self._new_scaler()  # wrong values are an error now
        self._scaler: LossScaler | None = None
        self._precision: MixedPrecision | None = None
        self._rewards = RewardCheck()
        self._updates = UpdateHook(self._before_step)

    def _init_callback(self) -> None:
        """Before any callback has changed anything."""
        if not extractors_of(self.model):
            raise TypeError(
                f"AMPCallback needs ResNetCnnPolicy or features_extractor_class=ResNetExtractor, but "
                f"{type(self.model.policy).__name__} has no ResNetExtractor"
            )
        optimizer_of(self.model)

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        optimizer = optimizer_of(self.model)
        dtype = resolve_dtype(self.dtype, self.model.device)
        name = str(dtype).removeprefix("torch.")
        self._scaler = None
        if name == "float16":
            self._scaler = self._new_scaler()
            self._scaler.state = {**self._scaler.state, **recall(optimizer, _STATE)}
            self._scaler.share(ranks_of(self.model).size)
        self._precision = None if name == "float32" else MixedPrecision(dtype, self._scaler, self.lending)
        self._updates.attach(self.model, first=True)
        self._lend(self._precision)
        self._rewards(self.model)
        line = self._says(name)
        _log.info(line)
        if self.verbose:
            print(line)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rewards(self.model)
        self._record()

    def _on_training_end(self) -> None:
        """From here on the model computes as without this callback."""
        self._updates.detach()
        self._lend(None)

    def _before_step(self, n: int) -> None:
        if self._scaler is None:
            return
        optimizer = optimizer_of(self.model)
        try:
            self._scaler.before_step(optimizer)
        finally:
            remember(optimizer, _STATE, self._scaler.state)
            self._record()

    def _says(self, dtype: str) -> str:
        """:return: what computes in which type, for the log; a warning where nothing will"""
        trunks = [extractor.trunk for extractor in extractors_of(self.model)]
        frozen = extractors_of(self.model)[0].frozen_dtype
        scale = "" if self._scaler is None else f", loss scale {self._scaler.scale:g}"
        live = [*dict.fromkeys(stage for trunk in trunks for stage in trunk.live_stages)]
        unfreezes = any(type(one).__name__ == "UnfreezeCallback" for one in walk(host.root_callback(self)))
        if not live and not unfreezes:
            warnings.warn(
                f"AMPCallback has nothing to do: all stages are frozen, and frozen stages compute in their own type, "
                f"frozen_dtype={frozen!r}. Write features_extractor_kwargs=dict(frozen_dtype='auto') in policy_kwargs, "
                "or freeze_backbone=False, or add an UnfreezeCallback.",
                stacklevel=4,
            )
        stages = f"{', '.join(live)} compute" if live else "stages that are unfrozen will compute"
        rest = f"; frozen stages in frozen_dtype={frozen!r}" if any(trunk.frozen_stages for trunk in trunks) else ""
        return f"AMP: {stages} in {dtype} on {self.model.device.type}{scale} (dtype={self.dtype!r}){rest}"

    def _record(self) -> None:
        if self._scaler is not None:
            values = {"train/amp_skipped": float(self._scaler.skipped), "train/amp_scale": self._scaler.scale}
            record(self.model, values)

    def _lend(self, precision: MixedPrecision | None) -> None:
        for extractor in extractors_of(self.model):
            if extractor.precision is not None:
                extractor.precision.release()
            extractor.precision = precision
