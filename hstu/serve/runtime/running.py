"""The running statistics of the data room; an export has a copy of that file in this place."""

from hstu.data.features.running import Questions, RunningStatistics

__all__ = ["Questions", "RunningStatistics"]
