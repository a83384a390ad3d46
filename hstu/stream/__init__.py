"""Trains without end on parts of data as they arrive, and knows how good yesterday's model was today. Only scripts
import this package.

parts.py finds the next part: in a directory, here or at any URL of fsspec, or in a Kafka topic. loop.py does for each
part what a user could type: append it to the store, evaluate the model on it, train on it, export what has changed.
report.py writes the page of a stream, with what events.py finds in the parts themselves.
"""
