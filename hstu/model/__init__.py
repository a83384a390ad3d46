"""The HSTU model, without parallelism: hstu.parallel applies that from outside.

layer.py is one HSTU layer in plain PyTorch: read it first. stack.py has the layer on kernels and the encoder of such
layers, inputs.py what they read, ranking.py and retrieval.py the heads and losses of the tasks. gr_model.py is the
whole model: tables (embedding.py), then the dense part. heads.py, precision.py and compiled.py serve these. Later rooms
may import any of these files; outputs.py is what all of them return.
"""
