"""From a plan to a batch: collate.py and loader.py build an HSTUBatch (batch.py) from the rows of a reader.

train_batch.py holds the batches of a training step; synthetic.py generates random batches for benchmarks.
"""
