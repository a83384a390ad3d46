"""Reads gin files into frozen dataclasses. No other package uses gin.

args/ declares the options, rules/ checks them together. gin_io.py reads files (gin_scan.py, gin_builder.py) into a
RunConfig (run_config.py). cli.py is the command line, reference.py generates the documentation. Other packages import
args and RunConfig, and for rules of their own Problem (problems.py).
"""
