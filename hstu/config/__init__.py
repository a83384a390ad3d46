"""What a user edits: gin files become frozen dataclasses here, and gin stops here.

args/ declares the options, rules/ what holds between them. gin_io.py reads files (gin_scan.py, gin_builder.py) into
a RunConfig (run_config.py); cli.py is the command line, reference.py the documentation.
option.py, problems.py and incomplete.py serve args and rules. Later rooms import args, RunConfig, the errors of
errors.py, and Problem for rules.
"""
