"""Ranking that also learns the next item: both losses on the tokens of one sequence encoder."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torchrec import JaggedTensor

from hstu.data.batches.batch import HSTUBatch, labels_with_history
from hstu.model.outputs import ModelOutput
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import RetrievalDense, newest_elements
from hstu.ops.layout import to_device


class JointDense(nn.Module):
    """The dense parts of ranking and of retrieval over one encoder (generative recommendation, arXiv 2402.17152).

    The token of a labelled item predicts its action; the token before it predicts the item, if an item comes before.
    The loss is that of ranking plus ``weight`` times that of retrieval, both summed over the labelled items. Evaluation
    gives the predictions of ranking. Weights have the names that they have in a model of one task, so that a
    checkpoint of either fits.

    Args:
        ranking, retrieval: built around the same encoder.
        weight: of the next item's loss.
    """

    def __init__(self, ranking: RankingModel, retrieval: RetrievalDense, weight: float) -> None:
        super().__init__()
        for task in (ranking, retrieval):
            for name, module in task.named_children():
                self.add_module(name, module)
        self.weight = weight
        self._tasks = ranking, retrieval  # in a tuple, which does not register them: their parts are registered above

    @property
    def ranking(self) -> RankingModel:
        """The part that predicts actions."""
        return self._tasks[0]

    @property
    def retrieval(self) -> RetrievalDense:
        """The part that predicts next items."""
        return self._tasks[1]

    def forward(self, embeddings: dict[str, JaggedTensor], batch: HSTUBatch) -> ModelOutput:
        """In training mode the loss of both; the predicted actions. Collective as in RetrievalDense.forward."""
        tokens, layout = self.ranking.encoder(embeddings, batch)
        output = self.ranking.predict(tokens, layout, batch)
        if not self.training:
            return output
        of_items = self.retrieval.loss_sum(tokens, layout, embeddings, next_items(batch, self.retrieval.item_feature))
        return dataclasses.replace(output, loss_sum=output.loss_sum + self.weight * of_items)


def next_items(batch: HSTUBatch, item_feature: str) -> HSTUBatch:
    """The batch with the items themselves as labels, where there is an item before them."""
    counts = labels_with_history(batch.num_labels_host, batch.item_lengths)
    total = int(counts.sum())
    num_labels = to_device(counts, batch.num_labels.device)
    items = batch.features[item_feature]
    labels: Tensor = items.values()[newest_elements(items.offsets()[1:], num_labels, total)]
    return dataclasses.replace(batch, num_labels=num_labels, labels=labels, num_labels_host=counts)
