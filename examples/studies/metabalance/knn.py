"""Item-based nearest neighbours: what a method without training reaches."""

from collections.abc import Callable

import numpy as np
from scipy import sparse

from examples.studies.recommender.data import Dataset

ITEMS_AT_ONCE = 512


def item_knn_scores(
    dataset: Dataset, tasks: list[int], neighbours: int = 100, shrink: float = 10.0
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from users `[n]` to scores `[n, items]`, by the training positives of `tasks`.

    An item's score is the sum of its similarities to the items of the user. Two items are similar by the
    cosine of their users, `together / (sqrt(users of one * users of the other) + shrink)`. A pair that is a
    positive of several tasks counts once.

    Args:
      dataset: only its training set is read.
      tasks: whose positives count.
      neighbours: an item of the user adds only to the items that are most similar to it, so many.
      shrink: lessens similarities that rest on few users. On tmall_ijcai15, NDCG@10 on the validation set
        is 3.55 % with 10 and 2.47 % with 0 for purchases alone, 3.65 % and 3.74 % with views.
    """
    chosen = (dataset.train.values[:, tasks] > 0).any(axis=1)
    users, items = dataset.train.pairs[chosen].T
    shape = (dataset.num_users, dataset.num_items)
    table = sparse.csr_array((np.ones(len(users), np.float32), (users, items)), shape)
    similar = _similarities(table, min(neighbours, dataset.num_items - 1), shrink)

    def scores(users: np.ndarray) -> np.ndarray:
        return (table[users] @ similar).toarray()

    return scores


def _similarities(table: sparse.csr_array, neighbours: int, shrink: float) -> sparse.csr_array:
    """The similarities `[items, items]` to the `neighbours` most similar items of each row's item."""
    by_item = table.T.tocsr()
    num_items = by_item.shape[0]
    norms = np.sqrt(np.diff(by_item.indptr)).astype(np.float32)
    blocks = []
    for start in range(0, num_items, ITEMS_AT_ONCE):
        rows = np.arange(start, min(start + ITEMS_AT_ONCE, num_items))
        together = (by_item[rows] @ table).toarray()
        # Of items without users: 0 over anything but 0.
        cosine = together / np.maximum(norms[rows, None] * norms + shrink, 1e-9)
        cosine[np.arange(len(rows)), rows] = 0  # no item is its own neighbour
        nearest = np.argpartition(-cosine, neighbours - 1, axis=1)[:, :neighbours]
        values = np.take_along_axis(cosine, nearest, axis=1)
        ends = np.arange(len(rows) + 1) * neighbours
        block = sparse.csr_array(
            (values.ravel(), nearest.ravel(), ends), (len(rows), num_items), dtype=np.float32
        )
        block.eliminate_zeros()
        blocks.append(block)
    return sparse.csr_array(sparse.vstack(blocks))
