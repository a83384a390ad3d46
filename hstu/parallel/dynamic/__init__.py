"""Dynamic embedding tables: any int64 id gets a row, and loses it to another id when the table is full.

slots.py specifies and decides which id has which row, and create.py chooses C++ for CPUs. table.py is one rank's share
of a table, rows.py its rows in GPU or host memory, memory.py the plan that decides which. collection.py puts tables
into TorchRec's sharding. content.py is what checkpoints store. Other rooms need ``dynamic_tables`` of
hstu.parallel.tables, and TableContent.
"""
