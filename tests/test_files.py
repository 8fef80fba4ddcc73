"""Files are complete or absent, and a lock is one process's alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from irpe_ds.files import atomic_write, lock_file, open_own, read_regular, replace_file


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one\r\n", "zwei ä\n"):
        replace_file(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    replace_file(tmp_path / "a.txt", "x")
    assert events == ["fsync", "rename"]


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as partial, partial.open("w") as file:
        file.write(b"not text")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    mine, path = tmp_path / "mine", tmp_path / "a.txt"
    mine.write_text("precious")
    (tmp_path / ".a.txt.partial").symlink_to(mine)
    replace_file(path, "new")
    assert (path.read_text(), mine.read_text()) == ("new", "precious")
    assert not path.is_symlink()


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    code = "import sys, pathlib, irpe_ds.files as f; f.lock_file(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with lock_file(tmp_path / "lock"):
        done = subprocess.run(command, capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
    assert subprocess.run(command).returncode == 0


def test_a_planted_link_is_not_followed_and_a_lock_keeps_what_the_file_holds(
    tmp_path: Path,
) -> None:
    mine, link = tmp_path / "mine.txt", tmp_path / ".lock"
    mine.write_text("mine")
    link.symlink_to(mine)
    for opens in (lock_file, open_own):
        with pytest.raises(OSError, match="a symbolic link in place of a file"):
            opens(link)
    lock_file(mine).close()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "folder"])
def test_only_regular_files_are_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path if what == "folder" else what)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(path, 100)


def test_a_file_is_read_up_to_a_limit_whatever_size_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    for larger in (path, "/proc/self/maps"):  # whose size is 0, says the file system
        with pytest.raises(OSError, match="more than 4 bytes"):
            read_regular(larger, 4)
