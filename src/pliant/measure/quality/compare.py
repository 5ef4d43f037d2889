"""Compare two models on the same windows and questions, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from pliant.errors import DataError

RESAMPLES = 10_000
_AT_ONCE = 2**21  # drawn indices held in memory


def compare(a: dict[str, Any], b: dict[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """The differences between two results, with confidence intervals.

    Arguments:
        a, b: results of :func:`pliant.evaluate` with ``items=True`` for two models, on the same texts and questions.
        seed: of the resamples.

    Returns:
        In the layout of the results, for each text under ``loss`` (nats per token) and for each task under its metrics
        ``{"difference": mean of a - b, "low", "high", "p", "items"}``. ``low`` and ``high`` bound the 95 % interval of
        a paired bootstrap with 10,000 resamples; ``p`` is the two-sided probability of a difference at least as far
        from 0 if the models do not differ. These three are None for a single item, or if a value is not finite.

    Raises:
        DataError: results without items, or on different items.
    """
    compared: dict[str, Any] = {}
    for part in dict.fromkeys([*a, *b]):
        ours, theirs = _items(a.get(part, {})), _items(b.get(part, {}))
        if ours.keys() != theirs.keys():
            alone = sorted(ours.keys() ^ theirs.keys())
            raise DataError(
                f"the results are not on the same {part}: {', '.join(map(repr, alone))} is only in one of them; "
                "evaluate both models on the same files"
            )
        compared[part] = {name: _pair(name, ours[name], theirs[name], seed) for name in ours}
    if not any(compared.values()):
        raise DataError("these results have no items to compare; make both with pliant.evaluate(..., items=True)")
    return compared


def without_items(result: dict[str, Any]) -> dict[str, Any]:
    """A result as :func:`pliant.evaluate` returns it without ``items=True``."""
    return {
        part: {name: {key: value for key, value in row.items() if key != "items"} for name, row in rows.items()}
        for part, rows in result.items()
    }


def _items(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row["items"] for name, row in rows.items() if "items" in row}


def _pair(name: str, ours: dict[str, Any], theirs: dict[str, Any], seed: int) -> dict[str, Any]:
    if ours["digest"] != theirs["digest"]:
        raise DataError(
            f"the two results for {name!r} are not on the same items: the file, its limit, the windows or the "
            "tokenizer differ; evaluate both models with the same settings"
        )
    return {
        metric: difference(np.asarray(values, float) - np.asarray(theirs[metric], float), seed)
        for metric, values in ours.items()
        if metric != "digest"
    }


def difference(paired: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mean of paired differences with its bootstrap interval and p value; see :func:`compare`.

    Arguments:
        paired: shape ``(items,)``.
    """
    count = len(paired)
    result: dict[str, Any] = {"difference": float(paired.mean()), "low": None, "high": None, "p": None, "items": count}
    if count < 2 or not np.isfinite(paired).all():
        return result
    random = np.random.default_rng(seed)
    each = max(1, _AT_ONCE // count)
    means = np.concatenate(
        [
            paired[random.integers(count, size=(min(each, RESAMPLES - start), count))].mean(1)
            for start in range(0, RESAMPLES, each)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    # the sample itself counts as one more resample, so that p is never 0
    return {**result, "low": float(low), "high": float(high), "p": min(1.0, 2 * float(beyond + 1) / (RESAMPLES + 1))}
