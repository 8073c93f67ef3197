"""What a run writes down about itself: metrics, samples, evaluations, curves, live progress."""

from megatron_mapo.tracking.plots import plot_run
from megatron_mapo.tracking.tracker import Tracker

__all__ = ["Tracker", "plot_run"]
