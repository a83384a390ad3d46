"""Dynamic embedding tables: any int64 id gets a row, and loses it to another id when the table is full.

- ``slots``: assignment of ids to rows; ``create``: chooses its implementation; ``hashing``: hashes and initial rows.
- ``table``: one rank's shard, and what checkpoints store of it; ``rows``: its rows in GPU or host memory.
- ``memory``: the plan for both memories; ``collection``: dynamic tables in TorchRec's sharding.
"""
