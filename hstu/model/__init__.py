"""The HSTU model, without parallelism: hstu.parallel applies that from outside.

gr_model.py is the whole model: tables (embedding.py), then the dense part. stack.py holds the layers and the encoder,
inputs.py what they read, ranking.py and retrieval.py the heads and losses of the tasks. heads.py, precision.py and
compiled.py serve these. Later rooms may import any of these files; outputs.py is what all of them return.
"""
