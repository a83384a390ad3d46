"""From raw files to batches; later rooms may import any of these files.

datasets/ declares the datasets, preprocess/ turns raw files into a sequence store (store.py, store_*.py).
samples.py and sampler.py decide which events form which batch; store_reader.py, collate.py and loader.py read and build
it, in processes that end with their parent (processes.py); batch.py is what the model receives, train_batch.py what a
training step computes on.
jagged.py, hashing.py and negatives.py hold arithmetic, synthetic.py random data for benchmarks, rules.py the rules of a
configuration that need the registry of datasets.
"""
