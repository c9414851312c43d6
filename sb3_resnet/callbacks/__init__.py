"""Callbacks, one a file; their arguments are plain YAML values."""

from sb3_resnet.callbacks.lr_schedule import LRScheduleCallback

__all__ = ["LRScheduleCallback"]
