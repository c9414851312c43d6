"""Callbacks, one a file; their arguments are plain YAML values."""

from sb3_resnet.callbacks.amp import AMPCallback
from sb3_resnet.callbacks.best_checkpoint import BestCheckpointCallback
from sb3_resnet.callbacks.data_parallel import DataParallelCallback
from sb3_resnet.callbacks.doctor import DoctorCallback
from sb3_resnet.callbacks.feature_cache import FeatureCacheCallback
from sb3_resnet.callbacks.gradient_clip import GradientClipCallback
from sb3_resnet.callbacks.lr_schedule import LRScheduleCallback
from sb3_resnet.callbacks.mlflow_tracker import MLflowTrackerCallback
from sb3_resnet.callbacks.monitor import MonitorCallback
from sb3_resnet.callbacks.nan_guard import NanGuardCallback
from sb3_resnet.callbacks.preemption import PreemptionCallback
from sb3_resnet.callbacks.unfreeze import UnfreezeCallback
from sb3_resnet.callbacks.wandb_tracker import WandbTrackerCallback
from sb3_resnet.common.checkpoints import newest_checkpoint

__all__ = [
    "AMPCallback",
    "BestCheckpointCallback",
    "DataParallelCallback",
    "DoctorCallback",
    "FeatureCacheCallback",
    "GradientClipCallback",
    "LRScheduleCallback",
    "MLflowTrackerCallback",
    "MonitorCallback",
    "NanGuardCallback",
    "PreemptionCallback",
    "UnfreezeCallback",
    "WandbTrackerCallback",
    "newest_checkpoint",
]
