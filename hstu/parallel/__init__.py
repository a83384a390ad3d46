"""All that distributes the model over ranks, applied to a finished model from outside.

mesh.py chooses device and process groups. tables.py shards embedding tables with TorchRec, table_kernels.py and
table_optimizer.py train them, dynamic/ holds tables for ids without a vocabulary. layer_comm.py splits HSTU layers over
ranks and has what these send; tensor.py is a tensor-parallel layer in Megatron-core's linears, to read. group.py brings
together the samples of the ranks that share a model or its tokens. ddp.py averages gradients over data-parallel ranks,
which can share optimizer states (flat_weights.py) or weights (fsdp.py). shards.py has views of distributed tensors, and
what optim sees of weights that ranks share. collectives.py serves the other rooms, too.
"""
