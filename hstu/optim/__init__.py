"""Dense and table optimizers and the one schedule that drives both."""
