"""The HTTP server of exported models: FastAPI in front of hstu.serve.runtime. scripts/serve.py starts it.

app.py has the routes, schemas.py what they read and write, limits included. A request becomes a ``Query`` (model.py),
waits in a ``Batcher`` (batching.py), and is answered by the ``ServedModel`` that ``LiveModel`` (swap.py) has then.
Needs the extra ``serve``; nothing here imports TorchRec or Megatron.
"""
