"""Quality of frames: metrics as declarations, and error maps."""

from dit_accel.eval.quality.difference import difference_map
from dit_accel.eval.quality.metrics import Metric, Score, SetMetric, prompt_accuracy
from dit_accel.eval.quality.registry import MAKERS, METRICS, make_metric, measure

__all__ = [
    "MAKERS",
    "METRICS",
    "Metric",
    "Score",
    "SetMetric",
    "difference_map",
    "make_metric",
    "measure",
    "prompt_accuracy",
]
