"""From a plan to a batch: rows.py what a reader gives, collate.py and loader.py build HSTUBatch (batch.py) of it.

train_batch.py is what a training step computes on; synthetic.py makes random batches for benchmarks.
"""
