"""The archive of scores: what was put is there again, whatever happened to the file."""

import json
import math
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pliant.elastic import Subnet
from pliant.errors import ArtefactError
from pliant.searches import Archive, ArchiveError

SEARCH = {"model": "abc", "data": "def", "step": {"step": "multipruner", "samples": 8, "split": "44:52:4"}}
SUBNETS = [
    Subnet(),
    Subnet().without("layers.3.mlp"),
    Subnet().without("layers.3.mlp").keeping("layers.1.mlp.channels", 20),
    Subnet().keeping("layers.0.attention.kv", 2),
]
WHOLE_FILE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bits(number):
    return struct.pack("<d", number)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "search.jsonl"


def filled(path, scores=(0.1, 2.5, 3.25, 1 / 3)):
    archive = Archive(path, SEARCH)
    for subnet, score in zip(SUBNETS, scores, strict=True):
        archive.put("blocks", subnet, score, 0.25)
    return path


def held(path):
    """What an archive opened on ``path`` knows of the four sub-networks."""
    archive = Archive(path, SEARCH)
    return [archive.get("blocks", subnet) for subnet in SUBNETS]


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_put_is_got_by_pool_and_subnet(path, on_disk):
    archive = Archive(path if on_disk else None, SEARCH)
    assert archive.get("blocks", SUBNETS[1]) is None
    archive.put("blocks", SUBNETS[1], 1.5, 0.1)
    archive.put("heads", SUBNETS[1], 2.5, 0.1)
    assert archive.get("blocks", SUBNETS[1]) == 1.5
    assert archive.get("heads", SUBNETS[1]) == 2.5
    assert archive.get("blocks", SUBNETS[2]) is None
    assert len(archive) == 2
    archive.put("blocks", SUBNETS[1], 1.25, 0.1)
    assert archive.get("blocks", SUBNETS[1]) == 1.25
    assert len(archive) == 2
    assert path.exists() == on_disk


def test_an_archive_survives_reopening_and_grows_on(path):
    filled(path)
    again = Archive(path, SEARCH)
    assert len(again) == 4
    assert [again.get("blocks", subnet) for subnet in SUBNETS] == [0.1, 2.5, 3.25, 1 / 3]
    again.put("heads", SUBNETS[0], 9.0, 0.1)
    third = Archive(path, SEARCH)
    assert len(third) == 5
    assert third.get("heads", Subnet()) == 9.0
    assert len(path.read_text().splitlines()) == 6


def test_a_score_is_on_disk_before_put_returns(path):
    archive = Archive(path, SEARCH)
    archive.put("blocks", SUBNETS[2], 1.5, 0.0)
    assert json.loads(path.read_text().splitlines()[-1])["score"] == 1.5


@given(score=st.floats())
@example(math.nan)
@example(math.inf)
@example(-math.inf)
@example(-0.0)
@example(5e-324)
@WHOLE_FILE
def test_every_float_comes_back_bit_for_bit(tmp_path, score):
    path = tmp_path / "search.jsonl"
    path.unlink(missing_ok=True)
    archive = Archive(path, SEARCH)
    archive.put("blocks", SUBNETS[1], score, 0.0)
    again = Archive(path, SEARCH)
    found = again.get("blocks", SUBNETS[1])
    assert isinstance(found, float)
    assert math.isnan(found) if math.isnan(score) else bits(found) == bits(score)


def test_a_truncated_last_line_is_dropped_and_the_file_goes_on(path):
    filled(path)
    os.truncate(path, path.stat().st_size - 5)
    again = Archive(path, SEARCH)
    assert len(again) == 3
    again.put("blocks", SUBNETS[3], 7.0, 0.0)
    assert held(path) == [0.1, 2.5, 3.25, 7.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@given(data=st.data())
@WHOLE_FILE
def test_cut_at_any_byte_the_archive_opens_with_the_first_of_what_was_put_and_goes_on(tmp_path, data):
    path = filled_once(tmp_path)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    place = tmp_path / "cut.jsonl"
    place.write_bytes(whole[:cut])
    complete = max(0, whole[:cut].count(b"\n") - 1)
    assert held(place) == [0.1, 2.5, 3.25, 1 / 3][:complete] + [None] * (4 - complete)
    archive = Archive(place, SEARCH)
    archive.put("blocks", Subnet().without("layers.0.mlp"), 8.0, 0.0)
    again = Archive(place, SEARCH)
    assert len(again) == complete + 1


def filled_once(tmp_path):
    path = tmp_path / "whole.jsonl"
    return path if path.exists() else filled(path)


GARBAGE = [
    b"\x00\x00\x00\n",
    b"\xff\xfe\n",
    b"{\n",
    b"[1, 2]\n",
    b"3\n",
    b"\n",
    b"{}\n",
    b'{"pool":"blocks"}\n',
    b'{"pool":"blocks","score":1.0,"seconds":0,"skip":[]}\n',
    b'{"pool":"blocks","score":1.0,"seconds":0,"skip":3,"keep":{}}\n',
    b'{"pool":"blocks","score":1.0,"seconds":0,"skip":[[1]],"keep":{}}\n',
    b'{"pool":"blocks","score":1.0,"seconds":0,"skip":[],"keep":{"a":"wide"}}\n',
    b'{"pool":["blocks"],"score":1.0,"seconds":0,"skip":[],"keep":{}}\n',
    b'{"pool":"blocks","score":"low","seconds":0,"skip":[],"keep":{}}\n',
    b'{"pool":"blocks","score":null,"seconds":0,"skip":[],"keep":{}}\n',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_the_middle_ends_what_is_read_and_the_file_goes_on(path, garbage):
    lines = filled(path).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], garbage, *lines[3:]]))
    archive = Archive(path, SEARCH)
    assert [archive.get("blocks", subnet) for subnet in SUBNETS] == [0.1, 2.5, None, None]
    archive.put("blocks", SUBNETS[2], 4.0, 0.0)
    assert held(path) == [0.1, 2.5, 4.0, None]
    assert len(path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "xyz"}, "model: 'abc' in the file, 'xyz' now"),
        ({"data": "other"}, "data: 'def' in the file, 'other' now"),
        ({"step": {"step": "blockpruner"}}, "step: "),
        ({"revision": 3}, "revision: None in the file, 3 now"),
    ],
)
def test_an_archive_of_another_search_is_refused_naming_what_differs_and_left_alone(path, change, told):
    before = filled(path).read_bytes()
    with pytest.raises(ArchiveError, match=told) as refused:
        Archive(path, SEARCH | change)
    for other in {"model", "data", "step"} - set(change):
        assert f"{other}: " not in str(refused.value)
    assert path.read_bytes() == before


def test_a_file_that_is_no_archive_is_refused_and_left_alone(path):
    path.parent.mkdir()
    path.write_text('{"event": "note", "text": "somebody else\'s log"}\n')
    before = path.read_bytes()
    with pytest.raises(ArchiveError, match="another search"):
        Archive(path, SEARCH)
    assert path.read_bytes() == before


def test_an_archive_of_another_version_of_the_format_is_refused(path):
    lines = filled(path).read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b'"archive":1', b'"archive":2') + b"".join(lines[1:]))
    with pytest.raises(ArchiveError, match="archive: 2 in the file, 1 now"):
        Archive(path, SEARCH)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "search.jsonl", tmp_path, Path("/proc/search.jsonl")):
        with pytest.raises(ArtefactError, match=f"cannot (read|write) the search archive '{re.escape(str(path))}'"):
            Archive(path, SEARCH).put("blocks", Subnet(), 1.0, 0.0)


def test_an_archive_that_is_only_asked_writes_nothing(path):
    archive = Archive(path, SEARCH)
    assert archive.get("blocks", Subnet()) is None
    assert not path.parent.exists()
