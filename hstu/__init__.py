"""Gin-configured distributed training of HSTU models for generative recommendation."""

__version__ = "0.3.0"
