"""The training step and the pipelines that overlap it with the batches that follow.

- step: one optimizer step from top to bottom, in ``TrainStep``.
- finite: the check that keeps a loss or gradient that is not finite out of every weight, with the loss scale of float16
  that follows it; and the stop signals.
- pipelines: their interface, and one for each TrainerArgs.pipeline_type.
"""
