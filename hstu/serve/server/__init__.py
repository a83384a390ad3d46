"""The HTTP server of exported models: FastAPI in front of hstu.serve.runtime. scripts/serve.py starts it.

app.py has the routes, listening.py the connections, logs.py the log. A request passes the ``Guard`` (guard.py), becomes
a ``User`` (model.py) and waits in the ``Batcher`` (batching.py) of its model (traffic.py). The ``ServedModel`` of that
``LiveModel`` (swap.py) answers, for stored users (users.py) too, by rules (rules.py). shown.py writes what answers have
shown. follow.py brings events of other programs. Needs the extra ``serve``, but neither TorchRec nor Megatron.
"""
