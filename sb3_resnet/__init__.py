"""ResNet features for Stable-Baselines3 agents."""

from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.optim import param_group_summary
from sb3_resnet.policies import ResNetCnnPolicy, register_policies

__version__ = "0.1.0"

__all__ = ["ResNetCnnPolicy", "ResNetExtractor", "param_group_summary", "register_policies"]

register_policies()
