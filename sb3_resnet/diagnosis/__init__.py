"""Find what is wrong with a training run: from its model before it starts, and from its log during and after it."""

from sb3_resnet.diagnosis.findings import THRESHOLDS, Finding, Threshold
from sb3_resnet.diagnosis.log import read_log
from sb3_resnet.diagnosis.log_rules import history_findings
from sb3_resnet.diagnosis.setup_rules import static_findings

__all__ = ["THRESHOLDS", "Finding", "Threshold", "history_findings", "read_log", "static_findings"]
