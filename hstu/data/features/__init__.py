"""What a model reads of the data: roles of features (roles.py), labels, statistics of numbers, and time features."""
