import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant import progress
from pliant.formatting import duration, human_bytes
from pliant.progress import Console, Events, Progress, peak_memory


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
    """What rich takes for a terminal that can move its cursor."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0s"),
        (0.04, "0.0s"),
        (9.4, "9.4s"),
        (10, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (95.2, "1m35s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3660, "1h01m"),
        (90000, "25h00m"),
    ],
)
def test_a_duration_is_short(seconds, shown):
    assert duration(seconds) == shown


@given(st.floats(0, 1e6))
def test_a_duration_is_never_off_by_more_than_its_last_digit(seconds):
    shown = duration(seconds)
    parts = {unit: float(number) for number, unit in re.findall(r"([\d.]+)([hms])", shown)}
    back = parts.get("h", 0) * 3600 + parts.get("m", 0) * 60 + parts.get("s", 0)
    assert abs(back - seconds) <= (61 if "h" in parts else 0.51)
    assert parts.get("m", 0) < 60
    assert parts.get("s", 0) < 60


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (538060032, "513 MiB"),
        (1023 * 2**20 + 2**19, "1.0 GiB"),
        (2**30, "1.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_a_size_is_short(count, shown):
    assert human_bytes(count) == shown


@given(st.integers(0, 2**50))
def test_a_size_is_never_1024_of_a_smaller_unit(count):
    number, unit = human_bytes(count).split()
    assert float(number) < 1024 or unit == "GiB"
    assert float(number) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit) == pytest.approx(count, rel=0.5, abs=1)


def test_peak_memory_is_in_bytes_and_never_falls():
    before = peak_memory()
    held = bytearray(2**20)
    assert 2**20 < before <= peak_memory() < 2**45
    del held


def test_the_base_class_is_silent(capsys):
    with Progress().stage("work") as shown:
        shown.step(0.5, "half")
        shown.note("a note")
    assert capsys.readouterr() == ("", "")


@settings(max_examples=50)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=20))
def test_the_share_done_never_goes_backwards_nor_past_the_end(shares):
    lines = []
    events = Events(lines.append)
    with events.stage("work"):
        for share in shares:
            events.step(share, "")
    done = [event["done"] for event in map(json.loads, lines) if event["event"] == "step"]
    assert len(done) == len(shares)
    assert done == sorted(done)
    assert 0 <= done[0] <= done[-1] <= 1
    assert done[-1] == max(0, min(1, max(shares)))


def test_a_new_stage_begins_at_nothing():
    lines = []
    events = Events(lines.append)
    for name in ("first", "second"):
        with events.stage(name):
            events.step(0.5 if name == "first" else 0.1, "")
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    assert [(step["name"], step["done"]) for step in steps] == [("first", 0.5), ("second", 0.1)]


def test_the_time_left_is_the_time_so_far_scaled(clock):
    lines = []
    events = Events(lines.append)
    with events.stage("work"):
        events.step(0.0, "nothing yet")
        clock.now += 10
        events.step(0.25, "a quarter")
        clock.now += 30
        events.step(1.0, "all")
    found = [json.loads(line) for line in lines]
    steps = [(event["seconds"], event["eta"]) for event in found if event["event"] == "step"]
    assert steps == [(0, None), (10, 30), (40, 0)]
    assert found[0] == {"event": "note", "text": "work"}
    assert found[-1]["event"] == "stage"
    assert found[-1]["seconds"] == 40
    assert found[-1]["peak_memory"] > 0


@given(st.text())
def test_every_event_is_one_line_of_json_whatever_the_text(text):
    lines = []
    Events(lines.append).note(text)
    assert [line.splitlines() for line in lines] == [lines]
    assert json.loads(lines[0]) == {"event": "note", "text": text}


def test_events_go_to_stderr(capsys):
    Events().note("hello")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert json.loads(shown.err) == {"event": "note", "text": "hello"}


def _steps(console, clock, seconds):
    with console.stage("work"):
        for second in range(seconds):
            clock.now += 1
            console.step((second + 1) / seconds, "still at it")


def test_a_console_that_is_no_terminal_prints_no_more_than_a_line_now_and_then(clock, capsys):
    _steps(Console(every=15), clock, 60)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "still at it" in line]
    assert 3 <= len(lines) <= 4
    assert shown.out == ""
    assert "\x1b" not in shown.err
    assert re.fullmatch(r"work \s*\d+% \| still at it \| \d+s, about \d+s left \| peak .*", lines[1])
    assert shown.err.splitlines()[-1].startswith("work: 1m00s, peak ")


def test_a_console_that_is_asked_to_prints_every_step(clock, capsys):
    _steps(Console(every=0), clock, 5)
    assert capsys.readouterr().err.count("still at it") == 5


def test_a_console_shows_names_as_they_are_on_one_line(capsys):
    name = "loading [bold]:x:[/nothing] " + "deep/" * 40
    console = Console(every=0)
    with console.stage(name):
        console.step(0.5, name)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == name
    assert all(name in line for line in lines)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_names_with_brackets(capsys):
    console = Console()
    with console.stage("loading model[/v2]"):
        console.step(0.5, "on its way")
    assert "loading model[/v2]  50%" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_its_cursor_back(capsys):
    console = Console()
    with console.stage("work"):
        console.step(0.5, "on its way")
    shown = capsys.readouterr().err
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_its_cursor_back_when_the_work_fails(capsys):
    def work():
        console = Console()
        with console.stage("work"):
            console.step(0.5, "on its way")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    shown = capsys.readouterr().err
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1
