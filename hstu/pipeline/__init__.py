"""The training step, and pipelines that overlap it with the loading of later batches.

- step: one optimizer step from top to bottom, ``TrainStep``.
- finite: keeps non-finite losses and gradients out of every weight; loss scale of float16; stop signals.
- pipelines: their interface, and one class per TrainerArgs.pipeline_type.
"""
