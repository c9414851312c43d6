"""ResNet features for Stable-Baselines3 agents."""

from sb3_resnet.callbacks.recipes import fine_tuning_callbacks
from sb3_resnet.common.checkpoints import newest_checkpoint
from sb3_resnet.common.normalizer_state import restore_vec_normalize
from sb3_resnet.common.seeding import restore_random_states, seed_everything
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.extractor_combined import ResNetCombinedExtractor
from sb3_resnet.optim.search.registering import register_samplers
from sb3_resnet.optim.summary import param_group_summary
from sb3_resnet.policies import (
    ResNetActorCriticCnnPolicy,
    ResNetCnnPolicy,
    ResNetMultiInputActorCriticPolicy,
    ResNetMultiInputPolicy,
)
from sb3_resnet.registration import register_policies

__version__ = "0.1.0"

__all__ = [
    "ResNetActorCriticCnnPolicy",
    "ResNetCnnPolicy",
    "ResNetCombinedExtractor",
    "ResNetExtractor",
    "ResNetMultiInputActorCriticPolicy",
    "ResNetMultiInputPolicy",
    "fine_tuning_callbacks",
    "newest_checkpoint",
    "param_group_summary",
    "register_policies",
    "register_samplers",
    "restore_random_states",
    "restore_vec_normalize",
    "seed_everything",
]

register_policies()
register_samplers()
