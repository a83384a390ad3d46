"""Reference implementations, correct on every device and in float64."""
