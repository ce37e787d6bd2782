"""Files that appear whole or not at all, under names that nobody else gets, and what a kill leaves behind."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from profusion import files
from profusion.promptnet.changes import save_patch
from profusion.residual import Residual, save_residual

RESIDUAL = Residual(torch.ones(1, 1, 8), "cat", ("input.1.0",), "tiny")


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def without_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")  # as exFAT and some network folders have it


@pytest.fixture(params=["links", "no links"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", without_links)
    return tmp_path


# Names


def test_a_name_that_is_taken_is_left_alone(folder):
    path = folder / "one.safetensors"
    files.write_atomically(path, b"first", overwrite=False)
    with pytest.raises(files.NameTaken, match="one.safetensors"):
        files.write_atomically(path, b"second", overwrite=False)
    assert path.read_bytes() == b"first" and list(folder.iterdir()) == [path]
    files.write_atomically(path, b"third")
    assert path.read_bytes() == b"third" and list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_residual(RESIDUAL, path, overwrite=False),
        lambda path: save_patch({"a": torch.ones(2)}, path, overwrite=False),
    ],
)
def test_every_kind_of_file_can_be_asked_not_to_replace_another(folder, save):
    path = folder / "one.safetensors"
    save(path)
    before = path.read_bytes()
    with pytest.raises(files.NameTaken):
        save(path)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_a_picture_beside_the_name_is_not_replaced_either(folder):
    picture = folder / "one.png"
    picture.write_bytes(b"somebody's own")
    saved = save_residual(RESIDUAL, folder / "one.safetensors", preview=Image.new("RGB", (8, 8)), overwrite=False)
    assert picture.read_bytes() == b"somebody's own" and saved.preview is None and "one.png" in saved.warning
    again = save_residual(RESIDUAL, folder / "one.safetensors", preview=Image.new("RGB", (8, 8)))
    assert again.preview == picture and picture.read_bytes() != b"somebody's own"


def test_a_reserved_name_is_given_back_where_the_file_cannot_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(Path, "replace", without_links)
    with pytest.raises(OSError, match="not permitted"):
        files.write_atomically(tmp_path / "one.safetensors", b"x", overwrite=False)
    assert not list(tmp_path.iterdir())


def _save_numbered(folder: str, writer: int, count: int, links: bool, start) -> None:
    if not links:
        os.link = without_links
    start.wait()
    for number in range(count):
        paths = (Path(folder) / f"cat_{index:05}_.safetensors" for index in range(1, 10_000))
        content = f"{writer} {number}".encode()
        files.write_numbered(paths, lambda path, data=content: files.write_atomically(path, data, overwrite=False))


@pytest.mark.parametrize("links", [True, False])
def test_two_processes_never_get_the_same_name(tmp_path, links):
    context = multiprocessing.get_context("spawn")
    count, start = 120, context.Barrier(2)
    arguments = [(str(tmp_path), writer, count, links, start) for writer in range(2)]
    processes = [context.Process(target=_save_numbered, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    contents = sorted(path.read_bytes() for path in tmp_path.iterdir())
    assert contents == sorted(f"{writer} {number}".encode() for writer in range(2) for number in range(count))


# Temporaries


def _aged(path: Path, seconds: float) -> Path:
    path.write_bytes(b"half")
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_an_old_temporary_is_removed_at_the_next_write(tmp_path):
    old = _aged(files.temporary_beside(tmp_path / "x"), files.LEFT_BEHIND + 5)
    young = _aged(files.temporary_beside(tmp_path / "x"), files.LEFT_BEHIND - 60)
    others = [
        _aged(tmp_path / name, 1e6) for name in ("mine.tmp", ".profusion-1.tmp", "a.safetensors", ".0123456789ab.tmp")
    ]
    files.write_atomically(tmp_path / "new", b"x")
    assert not old.exists() and young.exists() and all(path.exists() for path in others)


def _hold(path: str, ready, done) -> None:
    with files.opened_temporary(Path(path)) as file:
        file.write(b"half")
        file.flush()
        ready.set()
        done.wait(60)


@pytest.mark.skipif(os.name == "nt", reason="Windows itself refuses to remove a file that is open")
def test_a_temporary_that_a_live_process_writes_is_not_removed_however_old(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done, path = context.Event(), context.Event(), files.temporary_beside(tmp_path / "x")
    process = context.Process(target=_hold, args=(str(path), ready, done))
    process.start()
    assert ready.wait(60)
    then = time.time() - files.LEFT_BEHIND - 1000
    os.utime(path, (then, then))
    files.write_atomically(tmp_path / "one", b"x")
    assert path.exists()
    process.kill()
    process.join()
    files.write_atomically(tmp_path / "two", b"x")
    assert not path.exists()


def _network_folder(monkeypatch):
    """flock as network folders have it: no exclusive lock of a file that is not open for writing."""
    fcntl, flock = files.fcntl, files.fcntl.flock

    def locked(file, how):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", locked)


needs_locks = pytest.mark.skipif(files.fcntl is None, reason="this system has no locks")


@needs_locks
def test_a_temporary_that_is_written_on_a_network_folder_is_not_removed(tmp_path, monkeypatch):
    _network_folder(monkeypatch)
    path = files.temporary_beside(tmp_path / "x")
    with files.opened_temporary(path) as file:
        file.write(b"half")
        file.flush()
        _aged_again(path)
        files.write_atomically(tmp_path / "one", b"x")
        assert path.exists()
    _aged_again(path)
    files.write_atomically(tmp_path / "two", b"x")
    assert not path.exists()


def _aged_again(path):
    then = time.time() - files.LEFT_BEHIND - 1000
    os.utime(path, (then, then))


@needs_locks
@pytest.mark.parametrize(
    ("number", "kept"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EACCES, True), (errno.EIO, True)]
)
def test_without_locks_the_age_of_a_temporary_must_do(tmp_path, monkeypatch, number, kept):
    """Any other answer may mean that somebody has it: then it stays."""

    def refused(*_):
        raise OSError(number, "no")

    path = _aged(files.temporary_beside(tmp_path / "x"), files.LEFT_BEHIND + 1000)
    monkeypatch.setattr(files.fcntl, "flock", refused)
    files.write_atomically(tmp_path / "one", b"x")
    assert path.exists() == kept and (tmp_path / "one").read_bytes() == b"x"


@needs_locks
def test_a_temporary_of_another_user_is_left_alone(tmp_path, monkeypatch):
    path, opening = _aged(files.temporary_beside(tmp_path / "x"), files.LEFT_BEHIND + 1000), Path.open

    def denied(self, mode="r", *more, **named):
        if self == path and mode != "rb":
            raise PermissionError(errno.EACCES, "no")
        return opening(self, mode, *more, **named)

    monkeypatch.setattr(Path, "open", denied)
    files.write_atomically(tmp_path / "one", b"x")
    assert path.exists()


@needs_locks
def test_a_file_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "x"
    assert files.hold(path) is None, "there is none"
    path.write_bytes(b"x")
    release = files.hold(path)
    assert files.hold(path) is None
    release()
    files.hold(path)()
    assert path.read_bytes() == b"x"


def test_an_interrupt_leaves_no_temporary(tmp_path):
    def pieces():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "one", pieces())
    assert not list(tmp_path.iterdir())
