"""A folder that a job leaves to the next one."""

import threading
import time

import pytest

from trainstack.storage.kept_folder import pack, pack_when_quiet, unpack


def make(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "kernel.so").write_bytes(b"code")
    (folder / "deep" / "kernel.so").chmod(0o755)
    return folder


def test_a_folder_comes_back_as_it_was(tmp_path):
    archive = tmp_path / "cache" / "a.tar"
    pack(make(tmp_path / "one"), archive)
    assert unpack(archive, tmp_path / "two")
    found = tmp_path / "two" / "deep" / "kernel.so"
    assert found.read_bytes() == b"code" and found.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in archive.parent.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("size", [None, 0, 700])
def test_an_archive_that_is_not_there_or_not_whole_leaves_nothing(tmp_path, size):
    archive = tmp_path / "a.tar"
    if size is not None:
        pack(make(tmp_path / "one"), archive)
        archive.write_bytes(archive.read_bytes()[:size])
    assert not unpack(archive, tmp_path / "two")
    assert not [path for path in tmp_path.iterdir() if "two" in path.name]


def test_what_nobody_changes_any_more_is_packed_by_itself(tmp_path):
    folder, archive = tmp_path / "one", tmp_path / "a.tar"
    threading.Thread(target=pack_when_quiet, args=(folder, archive, 0.05), daemon=True).start()
    time.sleep(0.2)
    assert not archive.exists(), "there is nothing yet"
    make(folder)
    deadline = time.monotonic() + 10
    while not archive.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert unpack(archive, tmp_path / "two")
