"""Attribute each deprecation to its user: our own use fails the test, another package's is listed at the end of the
run.

The file and line of a warning are often not those of the code that used the old name: a decorator of transformers warns
about an argument, and torch's ``Module.__call__`` and other forwarding functions lie between it and the caller. So the
stack is followed outwards from there, past frames that only forward their arguments. Deprecations that are logged
instead, as transformers does for its outputs, are treated alike.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from transformers.utils import logging as transformers_logging

KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_MACHINERY = {warnings.__file__, logging.__file__, transformers_logging.__file__, __file__}
_ANY = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


class Judge(logging.Handler):
    """Judges every deprecation that is warned about or logged.

    Arguments:
        root: the project folder. Code in it is ours, except installed packages.
    """

    def __init__(self, root: Path):
        super().__init__(logging.WARNING)
        self.root = root
        self.ours: list[str] = []  # kept, because other packages may catch the exception

    def begin(self) -> None:
        """Judge from now on, until pytest puts back how warnings are shown."""
        shown = warnings.showwarning
        self.ours.clear()
        # transformers logs such a message once per process; every test should see its own
        getattr(getattr(logging.Logger, "warning_once", None), "cache_clear", lambda: None)()

        def judge(message, category, filename, lineno, file=None, line=None):
            if issubclass(category, KINDS):
                frame = _frame(lambda one: _is_at(one, filename, lineno))
                # if that is the line that calls warn, blame the caller of its file
                itself = "warn" in linecache.getline(filename, lineno)
                self._blame(_user(frame, itself), f"{category.__name__}: {message}", message)
            shown(message, category, filename, lineno, file, line)

        warnings.showwarning = judge

    def end(self) -> None:
        """Fail if our own use was found, even if the exception was caught."""
        found, self.ours = self.ours, []
        if found:
            pytest.fail(found[0], pytrace=False)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "deprecat" in text.lower():
            frame = _frame(lambda _: True)
            self._blame(_user(frame, itself=True), f"{record.name} says: {text}", FutureWarning(text))
            path, line = (
                (record.pathname, record.lineno) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
            )
            warnings.warn_explicit(text, FutureWarning, path, line)

    def _blame(self, frame: FrameType | None, text: str, error: Warning | str) -> None:
        if frame is None or not self._is_ours(frame):
            return
        self.ours.append(f"{frame.f_code.co_filename}:{frame.f_lineno} uses a deprecated name. {text}")
        raise error if isinstance(error, Warning) else FutureWarning(error)

    def _is_ours(self, frame: FrameType) -> bool:
        path = Path(frame.f_code.co_filename)
        return path.is_relative_to(self.root) and "site-packages" not in path.parts


def _frame(wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """The innermost frame for which ``wanted`` holds, outside of warnings and logging."""
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_filename in _MACHINERY or not wanted(frame)):
        frame = frame.f_back
    return frame


def _is_at(frame: FrameType, filename: str, lineno: int) -> bool:
    return frame.f_code.co_filename == filename and frame.f_lineno == lineno


def _user(frame: FrameType | None, itself: bool) -> FrameType | None:
    """The frame that used the deprecated name.

    Arguments:
        frame: the frame at the warning's file and line.
        itself: that frame issues the warning, and the deprecated code is in its file.
    """
    if frame is not None and itself:
        deprecating = frame.f_code.co_filename
        while frame is not None and frame.f_code.co_filename == deprecating:
            frame = frame.f_back
    while frame is not None and _hands_on(frame):
        frame = frame.f_back
    return frame


def _hands_on(frame: FrameType) -> bool:
    """Whether a function takes arbitrary arguments to forward them: a decorator, ``Module.__call__``, a closure over
    both."""
    code = frame.f_code
    takes_any = code.co_flags & _ANY == _ANY and code.co_argcount <= 1 and not code.co_kwonlyargcount
    return takes_any or {"args", "kwargs"} <= set(code.co_freevars)


def pytest_configure(config: pytest.Config) -> None:
    judge = Judge(config.rootpath)
    config.pluginmanager.register(_Hooks(judge), "judge of deprecations")
    for name in ("", "transformers"):  # the logger of transformers does not propagate to the root logger
        logging.getLogger(name).addHandler(judge)
        config.add_cleanup(lambda name=name: logging.getLogger(name).removeHandler(judge))


class _Hooks:
    def __init__(self, judge: Judge):
        self.judge = judge

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        self.judge.begin()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.judge.begin()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        result = yield
        self.judge.end()
        return result
