"""The training step and the pipelines that overlap it with the batches that follow.

- step: one optimizer step from top to bottom, in ``TrainStep``.
- finite: the check that keeps a loss or gradient that is not finite out of every weight; and the stop signals.
- none, native, prefetch: the pipelines, named as TrainerArgs.pipeline_type. ``none`` also has their interface.
"""
