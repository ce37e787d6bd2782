"""Shards that can only be read on: in lanes, the same for any ranks and workers, and up to where they fail."""

import pickle
import tarfile

import pytest
import torch

from profusion.decoding import PictureError
from profusion.pretraining import lanes as lanes_module
from profusion.pretraining.lanes import Streamed
from profusion.pretraining.opening import open_source
from profusion.pretraining.order import Share
from profusion.pretraining.patterns import shards
from profusion.pretraining.rows import LaneRows
from profusion.pretraining.squares import Framing
from profusion.pretraining.stream import PictureStream
from tests.pretraining.examples import broken, coded, packed, picture

BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five shards of 6, 7, 8, 9 and 10 pictures."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        members = {f"{shard}-{number}.png": coded(picture(7 * shard + number)) for number in range(6 + shard)}
        packed(folder / f"{shard}.tar", members)
    return folder


def streamed(folder, which="{0..4}", command="cat", **options):
    return Streamed(shards(f"pipe:{command} {folder}/{which}.tar"), "the pipes", pause=0, **options)


def taken(source, steps=6, start=0, **options):
    stream = PictureStream(source, **{"size": 16, "batch": BATCH, "seed": 5, "workers": 0, **options})
    return [batch for batch, _ in zip(stream.batches(start), range(steps), strict=False)], stream


def same(first, second) -> bool:
    return (first.step, first.keys) == (second.step, second.keys) and torch.equal(first.pictures, second.pictures)


def names(batches, shard=None) -> list[str]:
    found = [key.rsplit("/", 1)[1] for batch in batches for key in batch.keys]
    return [name for name in found if shard is None or name.startswith(f"{shard}-")]


def test_a_command_is_known_by_its_prefix(folder):
    source = open_source(f"pipe:cat {folder}/{{0..4}}.tar", lanes=2)
    assert isinstance(source, Streamed) and len(source.shards) == 5
    assert PictureStream(source, batch=BATCH, workers=0).epoch_of(3) is None


@pytest.mark.parametrize("lanes, world", [(4, 2), (4, 4), (2, 4), (4, 8), (1, 2)])
def test_ranks_share_the_batches_of_one_process(folder, lanes, world):
    source = streamed(folder, lanes=lanes)
    shares = [taken(source, share=Share(rank, world))[0] for rank in range(world)]
    for step, batch in enumerate(taken(source)[0]):
        assert batch.positions.tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        assert batch.keys == sum((parts[step].keys for parts in shares), ())
        assert torch.equal(batch.pictures, torch.cat([parts[step].pictures for parts in shares]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    source = streamed(folder, lanes=4)
    assert all(map(same, taken(source)[0], taken(source, workers=workers)[0]))


@pytest.mark.parametrize("start", [1, 3, 11])
def test_a_run_goes_on_anywhere(folder, start):
    source = streamed(folder, lanes=4, buffer=5)
    whole, rest = taken(source, 14, crop="random")[0], taken(source, 14 - start, start, crop="random")[0]
    assert len(rest) == 14 - start and all(map(same, whole[start:], rest))


def test_whole_epochs_are_passed_over(folder, monkeypatch):
    source = streamed(folder, "{0..1}", lanes=1)
    whole = taken(source, 12)[0]
    read = []
    command = lanes_module._command_class()
    monkeypatch.setattr(lanes_module, "_command_class", lambda: lambda text: read.append(text) or command(text))
    assert same(whole[11], taken(source, 1, 11)[0][0])  # 88 pictures in, of epochs of 13
    assert len(read) == 2 * 3  # the first epoch, by which they are counted, and the two of this batch


def test_each_picture_of_a_lane_comes_once_in_its_epoch(folder):
    batches, _ = taken(streamed(folder, "{0..0}", lanes=1), 9)  # 72 rows of 6 pictures
    every = names(batches)
    epochs = [every[at : at + 6] for at in range(0, 72, 6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 6


def test_the_seed_decides_the_order(folder):
    source = streamed(folder, lanes=4)
    assert names(taken(source)[0]) != names(taken(source, seed=6)[0])


def test_a_small_buffer_shuffles_nearby(folder):
    once = names(taken(streamed(folder, "4", lanes=1, buffer=2), 1)[0])
    assert once != sorted(once) and all(int(name[2]) <= at + 2 for at, name in enumerate(once))


def test_the_lanes_must_divide_the_batch(folder):
    with pytest.raises(PictureError, match="lanes=3 must divide the global batch of 8, and be at most the 5 shards"):
        PictureStream(streamed(folder, lanes=3), batch=8)
    assert streamed(folder).lanes_for(8) == 4 and streamed(folder).lanes_for(7) == 1


@pytest.mark.parametrize("mode, name", [("w:gz", "a.tar.gz"), ("w:xz", "a.tar")])
def test_a_compressed_shard_is_only_read_on(tmp_path, mode, name):
    packed(tmp_path / name, {f"0-{number}.png": coded(picture(number)) for number in range(8)}, mode)
    source = open_source(str(tmp_path / name))
    assert isinstance(source, Streamed)
    batches, stream = taken(source, 2)
    assert len(set(names(batches[:1]))) == 8 and not len(stream.skipped)


def test_the_next_one_that_can_be_read_stands_in_for_any_ranks(tmp_path):
    good = {f"0-{number}.png": coded(picture(number)) for number in range(7)}
    bad = {f"1-{name}.jpg": data for name, data in broken().items()}
    packed(tmp_path / "0.tar", dict(sorted({**good, **bad}.items(), key=lambda one: one[0][2:])))
    source = streamed(tmp_path, "0", lanes=1)
    whole, stream = taken(source, 4)
    assert set(names(whole)) == set(good) and len(stream.skipped) == 7
    assert stream.skipped.reasons["cannot be read as a picture"] == 3
    shares = [taken(source, 4, share=Share(rank, 4))[0] for rank in range(4)]
    assert [batch.keys for batch in whole] == [sum((parts[step].keys for parts in shares), ()) for step in range(4)]
    assert all(map(same, whole[2:], taken(source, 2, 2)[0]))


def test_a_stream_without_pictures_says_so(tmp_path):
    packed(tmp_path / "0.tar", {"a.txt": b"text"})
    with pytest.raises(PictureError, match="no picture comes from the pipes"):
        taken(streamed(tmp_path, "0"))
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(PictureError, match="no picture comes from the pipes: pipe:cat .*0.tar, which is no tar"):
        taken(streamed(tmp_path, "0"))


def test_a_lane_whose_shards_are_empty_reads_the_next_ones(folder, tmp_path):
    packed(tmp_path / "0.tar", {"a.txt": b"text"})
    (tmp_path / "1.tar").write_bytes((folder / "1.tar").read_bytes())
    batches, _ = taken(streamed(tmp_path, "{0..1}", lanes=2), 2)
    assert len(names(batches)) == 16 and set(names(batches)) == set(names(batches, 1))


def test_what_is_before_a_cut_is_used(folder, tmp_path):
    whole = (folder / "1.tar").read_bytes()
    with tarfile.open(folder / "1.tar") as archive:
        at = archive.getmembers()[4].offset_data
    (tmp_path / "1.tar").write_bytes(whole[: at + 40])
    batches, stream = taken(streamed(tmp_path, "1"), 2)
    assert set(names(batches)) == {f"1-{number}.png" for number in range(4)}
    assert len(stream.skipped) == 1 and stream.skipped.reasons == {"shards damaged or cut short": 1}
    assert stream.skipped.names[0].startswith(f"pipe:cat {tmp_path}/1.tar, which is damaged or cut short")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_command_that_fails_in_the_middle_is_tried_again(folder, tmp_path, workers):
    """It fails twice half way, then it does not."""
    script = tmp_path / "fetch.sh"
    script.write_text(
        f'echo once >> {tmp_path}/tries; if [ $(wc -l < {tmp_path}/tries) -le 2 ]; then head -c 4000 "$1"; '
        'echo "connection lost" >&2; exit 7; fi; cat "$1"'
    )
    batches, stream = taken(streamed(folder, "2", f"sh {script}"), 1, workers=workers)
    assert batches[0].keys == tuple(
        key.replace("cat", f"sh {script}") for key in taken(streamed(folder, "2"), 1)[0][0].keys
    )
    assert stream.skipped.reasons == {"failed, and tried again": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_command_that_keeps_failing_is_an_error_with_its_exit_code(folder, workers):
    source = streamed(folder, "1", "echo 'no such bucket' >&2; exit 22; #", retries=1)
    with pytest.raises(PictureError, match="exit 22; # .*' failed 2 times, with exit code 22: no such bucket"):
        taken(source, 1, workers=workers)


def test_a_command_that_is_not_there(folder):
    with pytest.raises(PictureError, match="failed 1 times, with exit code 127"):
        taken(streamed(folder, "1", "no_such_command_here", retries=0), 1)


def test_where_the_commands_are_left_out_that_is_said(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "profusion.pretraining.pipes", None)
    with pytest.raises(PictureError, match="use a checkout of the repository, or shards on this machine"):
        streamed(folder)


def test_local_shards_among_them_must_be_there(folder):
    with pytest.raises(PictureError, match=r"^not there: .*9\.tar"):
        open_source(f"{folder}/9.tar,pipe:cat {folder}/0.tar")


def test_it_can_be_sent_to_processes_that_are_begun_anew(folder):
    """As on systems that cannot copy a process."""
    source = streamed(folder, lanes=4)
    rows = LaneRows(source, BATCH, range(2, 6), 5, Framing(16), 3)
    chunks = [next(iter(one)) for one in (rows, pickle.loads(pickle.dumps(rows)))]
    assert not any(isinstance(part, torch.Tensor) for part in chunks[0])  # those go through /dev/shm
    assert chunks[0].keys == chunks[1].keys and (chunks[0].pictures == chunks[1].pictures).all()
