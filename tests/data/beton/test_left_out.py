"""What a conversion leaves out is listed, by name and reason."""

import os
from pathlib import Path

import pytest

from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.forecast import forecast
from irpe_ds.data.beton.left_out import ListedFile, by_extension, list_line, read_list
from irpe_ds.data.beton.manifest import LEFT_OUT, SKIPPED, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source

ODD = ["a\tb", "a\nb", "a\\tb", "a\\", "\r\n", os.fsdecode(b"\xff\x80"), "\u2028\x0b", ""]


def test_every_line_reads_back(tmp_path: Path) -> None:
    listed = [ListedFile(name, reason) for name in ODD for reason in ODD]
    path = tmp_path / "list"
    path.write_bytes(b"".join(list_line(*file) for file in listed))
    assert list(read_list(path)) == listed
    assert len(path.read_bytes().split(b"\n")) == len(listed) + 1
    assert list(read_list(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["a/b.TXT", "c.txt", "d.gif"], ".txt 2, .gif 1"),
        (["no", "x.1234567890", "a.b c"], "others 3"),
        ([f"a.{n}{n}" for n in range(8)] + ["none"], ".00 1, .11 1, .22 1, .33 1, .44 1, others 4"),
    ],
)
def test_extensions_are_counted(tmp_path: Path, names: list[str], expected: str) -> None:
    (tmp_path / "list").write_bytes(b"".join(list_line(name, "why") for name in names))
    assert by_extension(tmp_path / "list") == expected


def test_files_left_out_are_listed(mixed: Path) -> None:
    for name in ("cat/._a.jpg", "dog/b.gif", "dog/tab\tand\nline.gif", "readme"):
        (mixed / name).write_bytes(b"x")
    (mixed / "cat" / "bad\tand\nline.jpg").write_bytes(b"x")
    out, how = mixed.parent / "out.beton", {"workers": 1, "on_bad": "skip"}
    manifest = convert(open_source([mixed]), out, StorageOptions(), **how)
    assert list(read_list(beside(out, LEFT_OUT))) == [
        ("cat/._a.jpg", "a hidden file"),
        ("dog/b.gif", "no extension of an image"),
        ("dog/notes.txt", "no extension of an image"),
        ("dog/tab\tand\nline.gif", "no extension of an image"),
        ("readme", "no extension of an image"),
    ]
    assert manifest.left_out == 5
    ((name, reason),) = read_list(beside(out, SKIPPED))
    assert (name, reason[:10]) == ("cat/bad\tand\nline.jpg", "not a JPEG")
    coming = forecast(open_source([mixed]), out, StorageOptions(), workers=1)
    assert (
        coming.extensions
        == by_extension(beside(out, LEFT_OUT))
        == ".gif 2, .jpg 1, .txt 1, others 1"
    )
    for pattern in ("*line*", "*.gif", "*.txt", "._a.jpg", "readme"):
        for path in mixed.rglob(pattern):
            path.unlink()
    convert(open_source([mixed]), out, StorageOptions(), overwrite=True, **how)
    assert not beside(out, LEFT_OUT).exists()
    assert not beside(out, SKIPPED).exists()
