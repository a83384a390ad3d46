"""What a run shows: logs, metrics, throughput, plots."""
