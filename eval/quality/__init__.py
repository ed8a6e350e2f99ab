"""Quality of frames: metrics as declarations, and error maps."""

from dit_accel.eval.quality.difference import difference_map
from dit_accel.eval.quality.metrics import METRICS, Metric, Score, measure, prompt_accuracy

__all__ = ["METRICS", "Metric", "Score", "difference_map", "measure", "prompt_accuracy"]
