"""The MLP head: normalise the features, then Linear-ReLU-Linear."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import MlpExtractor, create_mlp
from torch import nn
from torch.nn import functional as F

from sb3_resnet.common.arguments import integer, shown

#: ``standardize``: by mean and variance over observations; ``layer``: LayerNorm; ``none``.
FEATURE_NORMS = ("standardize", "layer", "none")
#: Of standardisers in files that do not hold theirs: so large that ``eps`` is added in any case.
_OLD_EPS_SHARE = 1e30
_TINY = 1e-12  # against a division by zero


class FeatureStandardizer(nn.Module):
    """
    Standardise each feature by its mean and variance over the observations that were trained on.

    A frozen ResNet's features are mostly constant: on Pong a random one gives a mean of 0.7 and a standard deviation
    over frames of 0.09, and the head sees only what varies. Unlike BatchNorm1d, training normalises by the running
    statistics too, so that online and target network, training and acting compute the same function. The buffers'
    names begin with ``running_``: SB3 copies such buffers to the target network, with its weights. Before the first
    update there are no statistics, so features are clipped alone. What is not finite comes out as NaN.

    In train mode with gradients a batch is normalised by the statistics that include it. In a :class:`Head` these are
    kept in the backward pass only, so Q-values can be looked at in any mode and nothing moves.

    :param dim: number of features
    :param horizon: after so many samples the average becomes an exponential one, to follow an unfrozen trunk
    :param eps: added to the variance, as in BatchNorm, or less:
    :param eps_share: at most this share of the features' mean variance is added. Behind ``pooling="spatial_softmax"``
        features of a random ResNet-18 vary with a standard deviation of 0.001 (measured on Pong), so that BatchNorm's
        1e-5 alone would leave them four times too small. It is saved with the statistics: a model keeps the one that it
        was trained with.
    :param clip: largest magnitude of a standardised feature, as SB3's ``VecNormalize``
    """

    running_mean: th.Tensor
    running_var: th.Tensor
    running_count: th.Tensor
    eps_share: th.Tensor

    def __init__(
        self, dim: int, horizon: float = 100_000, eps: float = 1e-5, clip: float = 10.0, eps_share: float = 0.01
    ) -> None:
        super().__init__()
        self.horizon = horizon
        self.eps = eps
        self.clip = clip
        self.register_buffer("eps_share", th.tensor(eps_share))
        self.register_buffer("running_mean", th.zeros(dim))
        self.register_buffer("running_var", th.ones(dim))
        # A float: SB3 multiplies these buffers by 0.0 in place before it copies them.
        self.register_buffer("running_count", th.zeros(()))
        #: Whether statistics wait for :meth:`keep`.
        self.waits = False
        #: Makes the moments of several processes' batches of those of one, while a callback trains with several.
        self.join: Callable[[th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor, int]] | None = None
        self._next: tuple[th.Tensor, ...] | None = None  # mean, variance and count with the latest batch

    def forward(self, features: th.Tensor) -> th.Tensor:
        """:return: standardised features of the same shape, ``(batch, dim)``"""
        mean, variance = self.running_mean, self.running_var
        if self.training and th.is_grad_enabled():
            self._next = mean, variance, _ = self._merged(features.detach())
            if not self.waits:
                self.keep()
        share = self.eps_share * variance.mean()
        added = th.where(share > 0, share, self.eps).clamp(max=self.eps)  # all of it if no feature varies
        scaled = F.batch_norm(features, mean, variance + added, eps=_TINY)
        # Infinity x 0 is NaN: clamped, an overflow of the trunk would pass for a large feature and be trained on.
        return th.add(scaled.clamp(-self.clip, self.clip), features.detach(), alpha=0.0)

    def keep(self) -> None:
        """Keep the statistics with the latest batch, if that is not done."""
        if self._next is not None:
            # In place: SB3 holds these very tensors in order to copy them to the target network.
            for buffer, value in zip(
                (self.running_mean, self.running_var, self.running_count), self._next, strict=True
            ):
                buffer.copy_(value)
            self._next = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": None, "join": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}eps_share", th.tensor(_OLD_EPS_SHARE))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @th.no_grad()
    def _merged(self, features: th.Tensor) -> tuple[th.Tensor, ...]:
        """:return: the running moments with those of the batch (Chan et al. 1983)"""
        rows = len(features)
        mean = features.mean(dim=0)
        variance = (features - mean).square().mean(dim=0)  # th.var_mean takes longer (choices.json)
        if self.join is not None:
            mean, variance, rows = self.join(mean, variance, rows)
        share = (rows / (self.running_count + rows).clamp(max=self.horizon)).clamp(max=1.0)
        # An overflow in float16 costs one skipped update, not the statistics for ever.
        finite = variance < th.inf  # nor NaN; isfinite() is several operations
        delta = th.where(finite, mean - self.running_mean, 0.0)
        spread = th.where(finite, variance - self.running_var, 0.0)
        return (
            self.running_mean + share * delta,
            self.running_var + share * (spread + (1.0 - share) * delta.square()),
            (self.running_count + rows).clamp(max=self.horizon),
        )


class Head(nn.Sequential):
    """
    The layers after the features extractor; statistics of a :class:`FeatureStandardizer` move in updates only.

    One that is the only layer has no parameter behind it, and perhaps no backward pass: its statistics move in each
    forward pass in train mode with gradients.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        if len(layers) > 1 and isinstance(layers[0], FeatureStandardizer):
            layers[0].waits = True

    def forward(self, features: th.Tensor) -> th.Tensor:
        """:return: what the last layer returns, ``(batch, output_dim)``"""
        output: th.Tensor = super().forward(features)  # type: ignore[no-untyped-call]  # PyTorch's
        if self.training and output.requires_grad and len(self) > 1 and isinstance(self[0], FeatureStandardizer):
            output.register_hook(self._keep_statistics)  # type: ignore[no-untyped-call]  # PyTorch's
        return output

    def _keep_statistics(self, gradient: th.Tensor) -> None:
        """As the backward pass begins, whoever's optimizer the update is made by."""
        first: Any = self[0]
        first.keep()


def activation_of(value: Any) -> type[nn.Module]:
    """
    :param value: a class of activations, or its name in ``torch.nn``
    :return: the class
    :raises ValueError: if there is none of that name, or it is no activation: it needs arguments, or its output has
        another shape than its input
    """
    found = getattr(nn, value.removeprefix("torch.nn.").removeprefix("nn."), None) if isinstance(value, str) else value
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"activation_fn must be a class of torch.nn or its name, such as 'ReLU', got {shown(value)}")
    features = th.linspace(-1.0, 1.0, 6).reshape(2, 3)
    try:
        with warnings.catch_warnings(), th.random.fork_rng(devices=[]), th.no_grad():
            warnings.simplefilter("ignore")  # such as Softmax's, about its axis
            shape = found()(features).shape
    except Exception as error:  # whatever a layer says of missing arguments, or of features without height and width
        raise ValueError(
            f"activation_fn={found.__name__} is no activation that can be built without arguments "
            f"({' '.join(str(error).split())[:200]}). Write one such as 'ReLU', 'Tanh' or 'SiLU'."
        ) from error
    if shape != features.shape:
        raise ValueError(
            f"activation_fn={found.__name__} makes {tuple(shape)} of {tuple(features.shape)}, and an activation must "
            "keep the shape: write one such as 'ReLU', 'Tanh' or 'SiLU'"
        )
    return found


def widths_of(net_arch: Any, name: str = "net_arch") -> list[int]:
    """
    :param net_arch: widths of the hidden layers
    :param name: of the argument, for the error
    :return: the same as plain numbers
    :raises TypeError: if they are no list
    :raises ValueError: for a width below 1
    """
    if isinstance(net_arch, (str, dict)) or not hasattr(net_arch, "__iter__"):
        raise TypeError(f"{name} must be a list of layer widths such as [256], got {shown(net_arch)}")
    return [integer(name, width, 1) for width in net_arch]


def make_head(
    features_dim: int,
    output_dim: int,
    net_arch: list[int],
    activation_fn: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
    feature_norm: str = "none",
) -> Head:
    """
    :param features_dim: number of features
    :param output_dim: number of outputs; 0: the last hidden layer is the output
    :param net_arch: widths of the hidden layers; empty for a linear head
    :param activation_fn: activation after each hidden layer
    :param dropout: probability after each activation, in training only
    :param feature_norm: one of :data:`FEATURE_NORMS`
    :return: the head
    """
    norms: dict[str, Callable[[int], nn.Module]] = {"standardize": FeatureStandardizer, "layer": nn.LayerNorm}
    layers: list[nn.Module] = [norms[feature_norm](features_dim)] if feature_norm in norms else []
    for layer in create_mlp(features_dim, output_dim, net_arch, activation_fn):
        layers.append(layer)
        if dropout > 0 and isinstance(layer, activation_fn):
            layers.append(nn.Dropout(dropout))
    return Head(*layers)


class ResNetMlpExtractor(MlpExtractor):
    """
    The hidden layers of actor and critic, each with its own normalisation of the features.

    :param feature_dim: number of features
    :param net_arch: widths of the hidden layers: a list for both, or by ``"pi"`` and ``"vf"``
    :param activation_fn: activation after each hidden layer
    :param device: PyTorch device
    :param dropout: probability after each activation
    :param feature_norm: one of :data:`FEATURE_NORMS`
    """

    def __init__(
        self,
        feature_dim: int,
        net_arch: list[int] | dict[str, list[int]],
        activation_fn: type[nn.Module],
        device: th.device | str,
        dropout: float,
        feature_norm: str,
    ) -> None:
        super().__init__(feature_dim, {}, activation_fn, device)
        widths = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
        pi, vf = (widths.get(name, []) for name in ("pi", "vf"))
        self.policy_net = make_head(feature_dim, 0, pi, activation_fn, dropout, feature_norm).to(device)
        self.value_net = make_head(feature_dim, 0, vf, activation_fn, dropout, feature_norm).to(device)
        self.latent_dim_pi, self.latent_dim_vf = ([feature_dim, *some][-1] for some in (pi, vf))
