"""Trainings of settings over seeds, which can be stopped and continued. Only scripts import this package."""
