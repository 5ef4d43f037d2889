"""Files and folders are replaced as a whole, have the permissions of new ones, and leave nothing behind."""

import json
import os
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from pliant.files import replacing, settle, write_json, write_text


def test_a_text_replaces_a_file_and_creates_its_folder(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    write_text(path, "first")
    write_text(path, "größer")
    assert path.read_text("utf-8") == "größer"
    write_json(path, {"a": [1, 2.5]})
    assert json.loads(path.read_text("utf-8")) == {"a": [1, 2.5]}
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(error), replacing(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(error), replacing(tmp_path / "folder") as aside:  # noqa: PT012
        aside.mkdir()
        (aside / "file").write_text("half")
        raise error
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_process_left_is_no_part_of_a_new_folder(tmp_path):
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "stale").touch()
    with replacing(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "fresh").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["fresh"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    with replacing(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "weights").write_bytes(b"1")
    assert done == ["weights", "model.part", "renamed", tmp_path.name]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_private_files_get_the_permissions_of_new_ones(umask, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "state.safetensors") as aside:
            save_file({"a": torch.ones(1)}, aside)
        folder = tmp_path / os.path.basename(tempfile.mkdtemp(dir=tmp_path))
        save_file({"a": torch.ones(1)}, folder / "weights")
        settle(folder)
    finally:
        os.umask(before)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (folder / "weights").stat().st_mode & 0o777 == 0o666 & ~umask
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
