"""The baseline of train_mamba2.py: an n-gram model with interpolated modified Kneser-Ney smoothing.

    python benchmarks/kneser_ney.py

checks itself on a toy corpus. After Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling" (1998), section 4.1.6: three discounts per order, from the counts of counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class KneserNey:
    """Probabilities of tokens after at most ``order - 1`` earlier tokens of their document.

    Arguments:
        documents: the tokens of each, without separators.
        vocabulary: number of tokens; ``vocabulary ** order`` must fit into 63 bits.
        separator: the token before and after a document; the model predicts the one after it.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocabulary: int, separator: int, order: int = 5):
        if vocabulary**order >= 2**63:
            raise ValueError(f"{order}-grams of {vocabulary} tokens do not fit into 63 bits")
        self.vocabulary, self.separator, self.order = vocabulary, separator, order
        keys = self._keys(documents)
        self._levels = []  # of each order: (n-grams, discounted counts, contexts, totals, weights of the lower order)
        longer = None
        for length in range(order, 0, -1):
            grams, counts = np.unique(keys % vocabulary**length, return_counts=True)
            if longer is not None:
                # distinct tokens before an n-gram; only the separator can be before one that begins with it, so there
                # occurrences count
                _, before = np.unique(longer % vocabulary**length, return_counts=True)
                alone = (grams // vocabulary ** (length - 1) == separator) & (length > 1)
                counts = np.where(alone, counts, before)
            self._levels.append(_level(grams, counts, vocabulary))
            longer = grams
        self._levels.reverse()

    def _keys(self, documents: Iterable[Sequence[int]]) -> np.ndarray:
        """Every token with the tokens before it, as one number in base ``vocabulary``; shape ``(tokens,)``."""
        padding = [self.separator] * (self.order - 1)
        rows = []
        for document in documents:
            ids = np.asarray([*padding, *document, self.separator], dtype=np.int64)
            key = np.zeros(len(document) + 1, dtype=np.int64)
            for place in range(self.order):
                key = key * self.vocabulary + ids[place : place + len(key)]
            rows.append(key)
        return np.concatenate(rows)

    def log2(self, documents: Iterable[Sequence[int]]) -> np.ndarray:
        """log2 of the probability of every token and of the separator after each document, shape ``(tokens,)``."""
        keys = self._keys(documents)
        found = np.full(len(keys), 1 / self.vocabulary)
        for length, (grams, discounted, contexts, totals, weights) in enumerate(self._levels, start=1):
            key = keys % self.vocabulary**length
            at, seen = _find(contexts, key // self.vocabulary)
            gram, known = _find(grams, key)
            own = np.where(known, discounted[gram], 0) / totals[at]
            found = np.where(seen, own + weights[at] * found, found)
        return np.log2(found)


def _level(grams: np.ndarray, counts: np.ndarray, vocabulary: int) -> tuple[np.ndarray, ...]:
    """What one order needs: counts less their discount, and per context the total and the share that is discounted."""
    n1, n2, n3, n4 = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2) if n1 else 0.0
    following = ((n1, n2), (n2, n3), (n3, n4))
    discounts = [k - (k + 1) * share * (b / a if a else 0) for k, (a, b) in enumerate(following, start=1)]
    # a toy corpus may lack some counts of counts: a discount stays between nothing and the count
    discounts = [min(max(discount, 0.0), float(k)) for k, discount in enumerate(discounts, start=1)]
    removed = np.asarray([0.0, *discounts])[np.minimum(counts, 3)]
    contexts, place = np.unique(grams // vocabulary, return_inverse=True)
    totals = np.bincount(place, counts)
    return grams, counts - removed, contexts, totals, np.bincount(place, removed) / totals


def _find(ordered: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, whether it is there) of every key."""
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return at, ordered[at] == keys


def self_check() -> None:
    """The probabilities after any context sum to one, and a seen sentence is likelier than a shuffled one."""
    generator = np.random.default_rng(0)
    corpus = [[1 + (start + step) % 5 for step in range(6)] for start in generator.integers(0, 5, 40)]
    corpus += [generator.integers(1, 7, 8).tolist() for _ in range(20)]
    for order in (1, 2, 3, 5):
        model = KneserNey(corpus, vocabulary=8, separator=0, order=order)
        for context in ([], [1], [1, 2], [6, 6, 6], [7, 7, 7, 7], [1, 2, 3, 4, 5]):
            each = [model.log2([[*context, token]])[len(context)] for token in range(1, 8)]
            each.append(model.log2([context])[-1])
            assert abs(np.exp2(each).sum() - 1) < 1e-12, (order, context, np.exp2(each).sum())
        if order > 1:
            assert model.log2([[1, 2, 3, 4, 5, 1]]).sum() > model.log2([[1, 3, 5, 2, 4, 1]]).sum() + 5
    # by hand, of the bigrams 01, 12, 22 twice, 20 three times, 02 once: n1 = 1, n2 = 3, n3 = 1, so that the discounts
    # are 1/7, 13/7 and 3; each unigram follows one or three others, and the discounts 1, 2 and 3 leave the even
    # distribution
    by_hand = KneserNey([[1, 2], [1, 2], [2, 2, 2]], vocabulary=3, separator=0, order=2)
    expected = (2 - 13 / 7) / 3 + (13 / 7 + 1 / 7) / 3 * (1 / 3)
    assert abs(np.exp2(by_hand.log2([[1]])[0]) - expected) < 1e-12
    print("kneser_ney.py: as expected")


if __name__ == "__main__":
    self_check()
