"""Is a training run healthy? From the model alone before it starts, from its log while it runs and afterwards."""

from sb3_resnet.diagnosis.findings import THRESHOLDS, Finding, Threshold
from sb3_resnet.diagnosis.log import read_log
from sb3_resnet.diagnosis.log_rules import history_findings
from sb3_resnet.diagnosis.setup_rules import static_findings

__all__ = ["THRESHOLDS", "Finding", "Threshold", "history_findings", "read_log", "static_findings"]
