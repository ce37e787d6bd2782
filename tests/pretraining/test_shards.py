"""Tar shards: the same pictures as in a folder, looked through once, and used up to where they are damaged."""

import os
import pickle
import tarfile

import pytest
import torch

from profusion.decoding import PictureError
from profusion.pretraining import shards as shards_module
from profusion.pretraining.opening import open_source
from profusion.pretraining.order import Order
from profusion.pretraining.rows import IndexedRows, Task
from profusion.pretraining.shards import INDEX_SUFFIX, index_of
from profusion.pretraining.squares import Framing
from profusion.pretraining.stream import PictureStream
from tests.pretraining.examples import coded, packed, picture

COUNT = 10


@pytest.fixture
def folder(tmp_path):
    """The same pictures in a folder and in two shards."""
    (tmp_path / "folder").mkdir()
    data = {f"{number:04}.png": coded(picture(number)) for number in range(COUNT)}
    for name, one in data.items():
        (tmp_path / "folder" / name).write_bytes(one)
    names = sorted(data)
    packed(tmp_path / "0.tar", {name: data[name] for name in names[:6]})
    packed(tmp_path / "1.tar", {name: data[name] for name in names[6:]})
    return tmp_path


def taken(source, steps=5, **options):
    stream = PictureStream(source, **{"size": 16, "batch": 4, "seed": 1, "workers": 0, **options})
    return [batch for batch, _ in zip(stream.batches(), range(steps), strict=False)], stream


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_and_a_folder_give_the_same_pictures(folder, workers):
    in_folder, _ = taken(open_source(str(folder / "folder")))
    in_shards, _ = taken(open_source(f"{folder}/{{0..1}}.tar"), workers=workers)
    for one, other in zip(in_folder, in_shards, strict=True):
        assert torch.equal(one.pictures, other.pictures) and torch.equal(one.positions, other.positions)
        assert [key.split("/")[-1] for key in other.keys] == list(one.keys)
    assert {key.split("/")[0] for batch in in_shards for key in batch.keys} == {"0.tar", "1.tar"}


def test_a_shard_is_looked_through_once_and_again_when_it_changed(folder, monkeypatch):
    looked = []
    monkeypatch.setattr(shards_module, "index_of", lambda path: looked.append(path.name) or index_of(path))
    prints = [open_source(f"{folder}/*.tar").fingerprint() for _ in range(2)]
    assert looked == ["0.tar", "1.tar"] and prints[0] == prints[1]
    packed(folder / "1.tar", {"a.png": coded(picture(3)), "b.png": coded(picture(4))})
    source = open_source(f"{folder}/*.tar")
    assert looked[2:] == ["1.tar"] and len(source) == 8 and source.fingerprint() != prints[0]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"1"])
def test_a_damaged_index_is_made_anew(folder, damage):
    expected = open_source(f"{folder}/*.tar").fingerprint()
    path = folder / f"0.tar{INDEX_SUFFIX}"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert open_source(f"{folder}/*.tar").fingerprint() == expected
    assert path.read_bytes() == whole


def test_an_index_may_be_elsewhere(folder):
    open_source(f"{folder}/*.tar", index=folder / "known")
    assert len(list((folder / "known").iterdir())) == 2
    assert not list(folder.glob(f"*{INDEX_SUFFIX}"))


def test_where_nothing_can_be_written_nothing_is_kept(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards_module.files, "write_atomically", refuse)
    assert len(open_source(f"{folder}/*.tar")) == COUNT


def test_members_follow_webdatasets_conventions(tmp_path):
    good = coded(picture(1))
    names = ["a.JPG", "a.txt", "a.json", "a.mask.png", "in/b.webp", ".hidden.png", "in/._c.png", "d.psd", "e"]
    packed(tmp_path / "x.tar", dict.fromkeys(names, good))
    source = open_source(str(tmp_path / "x.tar"))
    assert [source.key(entry) for entry in range(len(source))] == ["x.tar/a.JPG", "x.tar/in/b.webp"]
    assert source.left_out == {".psd is not read": 1, "named KEY.PART.png, which is not the picture KEY": 1}
    assert "2 left out" in source.note()


@pytest.mark.parametrize("cut", ["in data", "in a header", "before the end mark"])
def test_a_shard_that_is_cut_short_is_used_up_to_there(folder, cut):
    path = folder / "0.tar"
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3]
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    at = {"in data": third.offset_data + 99, "in a header": third.offset + 100, "before the end mark": end}[cut]
    path.write_bytes(path.read_bytes()[:at])
    source = open_source(f"{folder}/*.tar")
    used = 6 if cut == "before the end mark" else 3
    assert len(source) == used + 4 and list(source.damaged) == ["0.tar"]
    assert "Damaged shards, of which the rest is not seen: 0.tar is " in source.note() and "cut short" in source.note()
    assert source.left_out == ({"cut off at the end of its shard": 1} if cut == "in data" else {})
    batches, stream = taken(source)
    assert len({key for batch in batches for key in batch.keys}) == used + 4 and not len(stream.skipped)


def test_a_shard_that_is_damaged_inside_is_used_up_to_there(folder):
    path = folder / "0.tar"
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = os.urandom(512)
    path.write_bytes(data)
    source = open_source(f"{folder}/*.tar")
    assert len(source) == 2 + 4 and list(source.damaged) == ["0.tar"]


@pytest.mark.parametrize("content", [b"", b"<html>an error page</html>" * 100])
def test_what_is_no_tar_is_named(folder, content):
    (folder / "0.tar").write_bytes(content)
    source = open_source(f"{folder}/*.tar")
    assert len(source) == 4 and "0.tar is no tar" in source.note()
    with pytest.raises(PictureError, match="0.tar holds no picture. Damaged shards.*0.tar is no tar"):
        open_source(str(folder / "0.tar"))


def test_shards_that_are_missing_are_named_before_anything_runs(folder):
    with pytest.raises(PictureError, match=r"^not there: .*2\.tar, .*3\.tar\. Give a folder of"):
        open_source(f"{folder}/{{0..3}}.tar")
    with pytest.raises(PictureError, match="given twice"):
        open_source(f"{folder}/0.tar,{folder}/0.tar")


def test_a_shard_that_becomes_shorter_is_counted(folder):
    source = open_source(f"{folder}/*.tar")
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:1000])
    batches, stream = taken(source, 10)
    assert {key.split("/")[0] for batch in batches for key in batch.keys} == {"1.tar"}
    assert stream.skipped.reasons == {"cannot be opened": 6}


def test_long_names_and_folders_of_the_same_shard_names(tmp_path):
    good = coded(picture(1))
    for inner in ("a", "b"):
        (tmp_path / inner).mkdir()
        packed(tmp_path / inner / "0.tar", {f"{'x' * 200}/é.png": good})
    source = open_source(f"{tmp_path}/{{a,b}}/0.tar")
    assert [source.key(entry) for entry in range(2)] == [f"{one}/0.tar/{'x' * 200}/é.png" for one in "ab"]
    assert source.read(1) == good


def test_a_window_of_shards_still_shows_each_once(folder):
    batches, _ = taken(open_source(f"{folder}/*.tar"), 5, window=1)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:10])) == 10 and len({key.split("/")[0] for key in keys[:4]}) == 1


def test_it_can_be_sent_to_processes_that_are_begun_anew(folder):
    """As on systems that cannot copy a process."""
    source = open_source(f"{folder}/*.tar")
    rows = IndexedRows(source, Order(len(source), 3, source.parts, 1), Framing(16))
    task = Task(2, 14, rows._order.entries(14, 4).tolist())
    chunks = [one[task] for one in (rows, pickle.loads(pickle.dumps(rows)))]
    assert not any(isinstance(part, torch.Tensor) for part in chunks[0])  # those go through /dev/shm
    assert chunks[0].keys == chunks[1].keys and (chunks[0].pictures == chunks[1].pictures).all()
