"""Unfinished work has a name that is known beforehand: whatever else is there is neither written to nor removed."""

import os

import pytest

from torchdlrm.files import claim_folder, clear_folder, remove_folder, replacing


@pytest.fixture
def victim(tmp_path):
    """A folder that holds what must stay."""
    (tmp_path / "victim" / "folder").mkdir(parents=True)
    (tmp_path / "victim" / "folder" / "file").write_text("precious")
    return tmp_path / "victim"


def claimed(path):
    folder = claim_folder(path, ("data", "more"))
    clear_folder(folder)
    os.close(folder)
    return [*path.iterdir()]


def test_a_folder_is_made_and_what_a_job_left_in_it_is_cleared(tmp_path):
    path = tmp_path / "a" / ".b.partial"
    assert claimed(path) == []
    (path / "data" / "x").mkdir(parents=True)
    (path / "more").touch()
    (path / ".more.12345678").touch()
    assert claimed(path) == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "fifo", "content"])
def test_something_else_is_refused_and_stays(tmp_path, victim, kind):
    path = tmp_path / ".b.partial"
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        path.write_text("precious")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
        (path / "thesis").write_text("precious")
    with pytest.raises(OSError, match=r"\.b\.partial is not what an interrupted job leaves there"):
        claimed(path)
    assert (victim / "folder" / "file").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert kind != "content" or (path / "thesis").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder of another user's")
def test_a_folder_of_another_user_is_refused(tmp_path):
    path = tmp_path / ".b.partial"
    path.mkdir()
    os.chown(path, 12345, 12345)
    with pytest.raises(OSError, match="it belongs to another user"):
        claimed(path)


def test_links_inside_are_removed_and_not_followed(tmp_path, victim):
    path = tmp_path / ".b.partial"
    (path / "data").mkdir(parents=True)
    (path / "more").symlink_to(victim)
    (path / "data" / "deep").symlink_to(victim / "folder")
    assert claimed(path) == []
    assert (victim / "folder" / "file").read_text() == "precious"


def test_what_takes_the_place_of_a_claimed_folder_is_not_cleared(tmp_path, victim):
    path = tmp_path / ".b.partial"
    folder = claim_folder(path, ("data",))
    path.rmdir()
    path.symlink_to(victim)
    clear_folder(folder)
    os.close(folder)
    assert (victim / "folder" / "file").read_text() == "precious"


def test_a_file_is_replaced_through_a_name_that_nobody_knows_beforehand(tmp_path):
    names = set()
    for _ in range(2):
        with replacing(tmp_path / "plan.json") as beside:
            beside.write_text("{}")
            names.add(beside.name)
    assert len(names) == 2
    assert [*tmp_path.iterdir()] == [tmp_path / "plan.json"]


def test_a_folder_is_removed_also_where_a_killed_process_had_begun(tmp_path):
    folder = tmp_path / "old"
    remove_folder(folder)
    for name in ("old", ".old.removed"):
        (tmp_path / name / "inner").mkdir(parents=True)
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
