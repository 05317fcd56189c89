from pathlib import Path

import pytest

from adapters.convert.folders import FolderError, writing


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_appear_together_when_the_body_ends(tmp_path: Path) -> None:
    with writing(tmp_path / "new") as fresh:
        (fresh / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert files(tmp_path / "new") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_existing_files(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "new", replace=True) as fresh:
        (fresh / "a").write_text("1")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["new"] * there
    assert not there or files(tmp_path / "new") == {"a": "old"}


def test_existing_files_are_replaced_on_demand_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("other")
    with pytest.raises(FolderError, match="exists already"), writing(tmp_path):
        raise AssertionError
    with writing(tmp_path, replace=True) as fresh:
        (fresh / "a").write_text("new")
    assert files(tmp_path) == {"a": "new", "b": "other"}


def test_places_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new", tmp_path / "nowhere" / "new"):
        with pytest.raises(FolderError), writing(folder, replace=True):
            raise AssertionError
