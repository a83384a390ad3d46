"""What a model sees of the data: roles of features (roles.py), labels, numbers and their statistics, time features."""
