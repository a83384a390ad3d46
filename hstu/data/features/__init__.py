"""What a model reads of the data: roles of features (roles.py), and their values as numbers (values.py)."""
