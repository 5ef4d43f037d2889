"""The commit of a hub repository that a model was loaded from.

transformers up to 5.23 records it in the config under a private name. Later versions do not; then it is unknown.
"""

from __future__ import annotations

from typing import Any


def revision_of(model: Any) -> str | None:
    """The commit; None, which stands for the newest, if it is unknown."""
    return getattr(model.config, "_commit_hash", None)


def copy_revision(source: Any, target: Any) -> None:
    """Record on ``target`` the commit that ``source`` was loaded from, if it is known."""
    if hasattr(source.config, "_commit_hash"):
        target.config._commit_hash = source.config._commit_hash
