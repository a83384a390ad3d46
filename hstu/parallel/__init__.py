"""Distributes a finished model over ranks.

- ``mesh``: device and process groups; ``collectives``: communication, also used by other packages.
- ``tables``: shards embedding tables with TorchRec; ``table_kernels``, ``table_optimizer``: train them; ``dynamic``:
  tables for ids without a vocabulary; ``group``: merges the batches of ranks that compute on the same sequences.
- ``layer_comm``: splits HSTU layers over ranks.
- ``data_parallel``: replicated or sharded dense weights; ``shards``: sharded tensors.
"""
