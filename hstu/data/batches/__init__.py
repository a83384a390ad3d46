"""From a plan to a batch: collate.py and loader.py build HSTUBatch (batch.py) of what a reader gives.

train_batch.py is what a training step computes on; synthetic.py makes random batches for benchmarks.
"""
