"""Distributes a finished model over ranks.

- ``mesh``: device and process groups; ``collectives``: communication, also used by other packages.
- ``tables``: shards embedding tables with TorchRec; ``table_kernels``, ``table_optimizer``: train them; ``dynamic``:
  tables for ids without a vocabulary; ``group``: merges the batches of ranks that compute on the same sequences.
- ``layer_comm``: splits HSTU layers over ranks.
- ``ddp``: averages gradients; ``fsdp``, ``shards``: sharded weights and tensors.
"""
