"""Names that lead to folders under a root, and nowhere else."""

from __future__ import annotations

import os

import pytest

from lorafx import AdapterFormatError, AdapterMismatchError
from lorafx.file_paths import find_regular, inside, read_bytes

FILES = ("adapter_config.json",)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root/team/sql").mkdir(parents=True)
    (tmp_path / "root/plain").mkdir()
    (tmp_path / "root/plain/adapter_config.json").write_text("{}")
    (tmp_path / "rootless").mkdir()  # begins as the root's name does
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["plain", "team/sql", "not there", "..sql", "a.b", "sql..", "ключ"])
def test_names_of_folders_below(root, name):
    assert inside(root, name, FILES) == root / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../rootless", "plain/..", "plain/../../secret", "/etc", "//etc", "a//b", "a/", "./plain", "a/./b",
     "a\0b", "..\\secret", "C:\\x", "C:x", None, 3, b"plain", ["plain"]],
)  # fmt: skip
def test_names_that_lead_out(root, name):
    with pytest.raises(AdapterMismatchError, match="as the name of an adapter; expected the name of a folder in"):
        inside(root, name, FILES)


def test_links_that_stay_below_are_followed(root):
    """As in the cache of Hugging Face's hub: snapshots/abc/file -> ../../blobs/123."""
    (root / "link").symlink_to(root / "plain")
    (root / "blob").write_text("{}")
    (root / "team/sql/adapter_config.json").symlink_to("../../blob")
    assert inside(root, "link", FILES) == root / "link"
    assert inside(root, "team/sql", FILES) == root / "team/sql"


def test_a_root_that_is_a_link_itself(root, tmp_path):
    (tmp_path / "shortcut").symlink_to(root)
    assert inside(tmp_path / "shortcut", "plain", FILES) == tmp_path / "shortcut/plain"


@pytest.mark.parametrize("target", ["/etc", "../rootless", "../secret", "plain/../../rootless"])
def test_folders_that_are_links_out(root, target):
    (root / "link").symlink_to(target)
    with pytest.raises(AdapterMismatchError, match="is a link out of"):
        inside(root, "link", FILES)
    with pytest.raises(AdapterMismatchError, match="is a link out of"):
        inside(root, "link/deeper", FILES)


def test_files_that_are_links_out(root):
    (root / "team/sql/adapter_config.json").symlink_to(root.parent / "secret")
    with pytest.raises(AdapterMismatchError, match=r"adapter_config.json' is a link out of"):
        inside(root, "team/sql", FILES)


def test_loops_of_links(root):
    (root / "loop").symlink_to("loop")
    with pytest.raises(AdapterMismatchError, match="can't be reached"):
        inside(root, "loop", FILES)


def test_only_regular_files_are_found(root, tmp_path):
    assert find_regular("a", root / "nothing") is None
    assert find_regular("a", root / "plain/adapter_config.json").st_size == 2
    os.mkfifo(tmp_path / "pipe")
    for path, text in ((tmp_path / "pipe", "a named pipe"), (root, "a folder")):
        with pytest.raises(AdapterFormatError, match=f"is {text}; expected a regular file"):
            find_regular("a", path)


def test_reading_has_a_limit_and_never_waits(root, tmp_path):
    file = root / "plain/adapter_config.json"
    assert read_bytes("a", file, 2) == b"{}"
    with pytest.raises(AdapterFormatError, match="more than 1 bytes"):
        read_bytes("a", file, 1)
    os.mkfifo(tmp_path / "pipe")  # it has become one after it was looked at
    with pytest.raises(AdapterFormatError, match="no regular file"):
        read_bytes("a", tmp_path / "pipe", 10)
    with pytest.raises(AdapterFormatError, match="can't be read"):
        read_bytes("a", root / "nothing", 10)
