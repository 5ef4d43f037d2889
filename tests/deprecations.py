"""Whose use of a deprecated name a warning is about: ours ends the test, another package's is listed when the tests are through.

A warning says where it belongs (its file and line), and that is often not who used the old name: a decorator of transformers warns of
an argument, and between it and the caller stand torch's ``Module.__call__`` and whatever else hands arguments on. So the stack is
followed outwards from there, past frames that only hand on what they are given. Deprecations that are logged and not warned of, as
transformers does for its outputs, are treated alike.
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
    """Decides over every deprecation that is warned of or logged.

    Arguments:
        root: the project. What lies in it, beside installed packages, is ours.
    """

    def __init__(self, root: Path):
        super().__init__(logging.WARNING)
        self.root = root
        self.ours: list[str] = []  # kept, because what is raised within other packages may be caught there

    def begin(self) -> None:
        """Judge from now on, until pytest puts back how warnings are shown."""
        shown = warnings.showwarning
        self.ours.clear()
        # transformers logs such messages once a process; every test is to see its own
        getattr(getattr(logging.Logger, "warning_once", None), "cache_clear", lambda: None)()

        def judge(message, category, filename, lineno, file=None, line=None):
            if issubclass(category, KINDS):
                frame = _frame(lambda one: _is_at(one, filename, lineno))
                # where that is the line of the warning itself, who called into its file is meant
                itself = "warn" in linecache.getline(filename, lineno)
                self._blame(_user(frame, itself), f"{category.__name__}: {message}", message)
            shown(message, category, filename, lineno, file, line)

        warnings.showwarning = judge

    def end(self) -> None:
        """Fail where a use of ours was found, even if somebody caught that."""
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
        self.ours.append(f"{frame.f_code.co_filename}:{frame.f_lineno} uses what is deprecated. {text}")
        raise error if isinstance(error, Warning) else FutureWarning(error)

    def _is_ours(self, frame: FrameType) -> bool:
        path = Path(frame.f_code.co_filename)
        return path.is_relative_to(self.root) and "site-packages" not in path.parts


def _frame(wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """The innermost such frame, those of warnings and logging left out."""
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_filename in _MACHINERY or not wanted(frame)):
        frame = frame.f_back
    return frame


def _is_at(frame: FrameType, filename: str, lineno: int) -> bool:
    return frame.f_code.co_filename == filename and frame.f_lineno == lineno


def _user(frame: FrameType | None, itself: bool) -> FrameType | None:
    """Who used the deprecated name.

    Arguments:
        frame: where the warning says it belongs.
        itself: that is what warns, and in its file is what was used.
    """
    if frame is not None and itself:
        deprecating = frame.f_code.co_filename
        while frame is not None and frame.f_code.co_filename == deprecating:
            frame = frame.f_back
    while frame is not None and _hands_on(frame):
        frame = frame.f_back
    return frame


def _hands_on(frame: FrameType) -> bool:
    """Whether a function takes any arguments, to hand them on: a decorator's, ``Module.__call__``, a closure over both."""
    code = frame.f_code
    takes_any = code.co_flags & _ANY == _ANY and code.co_argcount <= 1 and not code.co_kwonlyargcount
    return takes_any or {"args", "kwargs"} <= set(code.co_freevars)


def pytest_configure(config: pytest.Config) -> None:
    judge = Judge(config.rootpath)
    config.pluginmanager.register(_Hooks(judge), "judge of deprecations")
    for name in ("", "transformers"):  # transformers hands nothing on to the outermost logger
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
