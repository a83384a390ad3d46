"""Use an exported model with plain PyTorch: recommend items, score candidates, embed users.

    import hstu_serving

    model = hstu_serving.load("exports/quickstart/serving")
    history = hstu_serving.History(items=[50, 181], actions=[5, 4], timestamps=[880000000, 880000060])
    print(model.recommend(history, k=10))

Each export contains a copy of this package, named hstu_serving. It needs only Python 3.11 or newer and torch. All ids
are ids of the raw data. An id that the model does not have is unknown: its row is zeros.
"""

from .files import Table
from .model import Model, Recommendation, load
from .requests import Candidates, History, ServingError

__all__ = ["Candidates", "History", "Model", "Recommendation", "ServingError", "Table", "load"]
