"""The HSTU model without parallelism, which hstu.parallel adds from outside. All files may be imported from elsewhere.

Start with layer.py: one HSTU layer in plain PyTorch. stack.py runs such layers on kernels, on the tokens of inputs.py.
ranking.py and retrieval.py are heads and losses. gr_model.py is the whole model with its embedding tables.
program.py is the same dense part as a function of tensors, which torch.export can trace.
"""
