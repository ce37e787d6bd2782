"""Pictures in their order: the same batches for any number of ranks and workers, and from any step on."""

import pytest
import torch

from profusion.decoding import PictureError
from profusion.pretraining.opening import open_source
from profusion.pretraining.order import Order, OrderError, Share, epoch_order
from profusion.pretraining.stream import PictureStream
from tests.pretraining.examples import broken, coded, picture

COUNT, SIZE, BATCH = 13, 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more" / "still").mkdir(parents=True)
    for number in range(COUNT):
        inner = ("", "more", "more/still")[number % 3]
        picture(number).save(folder / inner / f"{number:03}.{('png', 'webp')[number % 2]}", lossless=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"no picture either")
    return folder


def taken(source, steps: int, start: int = 0, **options) -> list:
    stream = PictureStream(source, **{"size": SIZE, "batch": BATCH, "seed": 3, "workers": 0, **options})
    return [batch for batch, _ in zip(stream.batches(start), range(steps), strict=False)]


def same(first, second) -> bool:
    return (
        torch.equal(first.pictures, second.pictures)
        and torch.equal(first.positions, second.positions)
        and torch.equal(first.entries, second.entries)
        and first.keys == second.keys
    )


def test_each_picture_comes_once_an_epoch_and_in_another_order_in_the_next(folder):
    source = open_source(str(folder))
    assert len(source) == COUNT
    keys = [key for batch in taken(source, 2 * COUNT) for key in batch.keys]
    epochs = [keys[at : at + COUNT] for at in range(0, len(keys), COUNT)]
    assert all(len(set(epoch)) == COUNT for epoch in epochs[:-1]) and len(epochs) >= 8
    assert epochs[0] != epochs[1]
    assert keys[0] in {source.key(entry) for entry in range(COUNT)}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_batches_of_one_process(folder, world):
    source = open_source(str(folder))
    whole = taken(source, 4)
    shares = [taken(source, 4, share=Share(rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert batch.step == step
        assert torch.equal(batch.pictures, torch.cat([parts[step].pictures for parts in shares]))
        assert torch.equal(batch.positions, torch.cat([parts[step].positions for parts in shares]))
        assert batch.keys == sum((parts[step].keys for parts in shares), ())


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(folder, start, crop):
    source = open_source(str(folder))
    whole, rest = taken(source, 7, crop=crop), taken(source, 7 - start, start, crop=crop)
    assert all(map(same, whole[start:], rest)) and len(rest) == 7 - start


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    source = open_source(str(folder))
    assert all(map(same, taken(source, 5, crop="random"), taken(source, 5, crop="random", workers=workers)))


def test_the_seed_decides_the_order(folder):
    source = open_source(str(folder))
    assert taken(source, 1)[0].keys != taken(source, 1, seed=4)[0].keys


def test_the_epoch_of_a_step(folder):
    stream = PictureStream(open_source(str(folder)), size=SIZE, batch=BATCH, workers=0)
    assert [stream.epoch_of(step) for step in range(5)] == [0, 0, 1, 1, 2]


def test_a_batch_that_cannot_be_shared_says_what_can(folder):
    with pytest.raises(OrderError, match="8 cannot be shared by 3 processes: give a multiple of 3, such as 6"):
        PictureStream(open_source(str(folder)), batch=BATCH, share=Share(0, 3))
    with pytest.raises(OrderError, match="rank=2 must lie in 0..1"):
        Share(2, 2)


def test_what_is_no_place_for_pictures_says_so(tmp_path):
    with pytest.raises(PictureError, match="no pictures are given"):
        open_source(" ")
    with pytest.raises(PictureError, match="not there: .*nowhere. Give a folder of pictures, or tar shards"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(PictureError, match="a is a folder: give one folder alone"):
        open_source(f"{tmp_path}/a,{tmp_path}/b")


def test_a_folder_without_pictures_says_so(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(PictureError, match=r"holds no picture.* Its 1 tar shards are given as .*\*\.tar"):
        open_source(str(tmp_path))


def test_the_order_of_ten_million_places():
    order = epoch_order(10_000_000, seed=0, epoch=0)
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, torch.arange(len(order), dtype=torch.int32))
    assert Order(10_000_000, 0).entries(9_999_998, 4).tolist()[:2] == order[-2:].tolist()


def test_an_order_within_windows_of_shards():
    parts = [5, 1, 7, 0, 3, 9]
    orders = [epoch_order(25, seed=1, epoch=epoch, parts=parts, window=2).tolist() for epoch in range(2)]
    assert all(sorted(order) == list(range(25)) for order in orders) and orders[0] != orders[1]
    shards = torch.repeat_interleave(torch.arange(6), torch.tensor(parts))
    for order in orders:
        seen = shards[order].tolist()
        first = {shard: seen.index(shard) for shard in set(seen)}
        last = {shard: len(seen) - 1 - seen[::-1].index(shard) for shard in set(seen)}
        open_at_once = [sum(first[shard] <= at <= last[shard] for shard in first) for at in range(25)]
        assert max(open_at_once) == 2
    assert epoch_order(25, 1, 0, parts, 6).tolist() == epoch_order(25, 1, 0).tolist()


def test_links_are_followed_once_and_hidden_ones_left_out(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for inner in (outside, folder / "a", folder / ".cache"):
        inner.mkdir(parents=True)
        picture(1).save(inner / "x.png")
    try:
        (folder / "b").symlink_to(outside)
        (folder / "a" / "again").symlink_to(folder)
        (folder / "y.png").symlink_to(outside / "x.png")
    except OSError:
        pytest.skip("links cannot be made here")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "photo.psd").touch()
    source = open_source(str(folder))
    assert [source.key(entry) for entry in range(len(source))] == ["a/x.png", "b/x.png", "y.png"]
    assert source.note() == " 1 left out (1 .psd is not read)."


def test_names_of_any_bytes(tmp_path):
    names = ["\udce9.png", "a b,{c}.png", "é.png"]
    try:
        for name in names:
            (tmp_path / name).write_bytes(coded(picture(1)))
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    source = open_source(str(tmp_path))
    assert {source.key(entry) for entry in range(3)} == set(names)
    assert len(taken(source, 1)[0].keys) == BATCH


def test_other_pictures_have_another_fingerprint(folder, tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    prints = {open_source(str(one)).fingerprint() for one in (folder, tmp_path, tmp_path)}
    picture(9, (50, 50)).save(tmp_path / "1.png")
    assert len(prints | {open_source(str(tmp_path)).fingerprint()}) == 3


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder of good pictures and as many of no use."""
    folder = tmp_path_factory.mktemp("damaged")
    for number, (name, data) in enumerate(broken().items()):
        (folder / f"{number}-{name}.jpg").write_bytes(data)
        (folder / f"{number}-good.png").write_bytes(coded(picture(number)))
    return folder


def test_the_next_one_that_can_be_read_stands_in(damaged):
    source = open_source(str(damaged))
    order = Order(len(source), 3)
    for batch in taken(source, 6):
        for position, entry in zip(batch.positions.tolist(), batch.entries.tolist(), strict=True):
            following = (order.entry_after(position, tries) for tries in range(len(source)))
            assert entry == next(one for one in following if "good" in source.key(one))
        assert [source.key(entry) for entry in batch.entries.tolist()] == list(batch.keys)


@pytest.mark.parametrize("world, workers", [(2, 0), (4, 2), (1, 2)])
def test_the_same_ones_stand_in_for_any_ranks_and_workers(damaged, world, workers):
    source = open_source(str(damaged))
    shares = [taken(source, 5, share=Share(rank, world), workers=workers) for rank in range(world)]
    for step, batch in enumerate(taken(source, 5)):
        assert batch.keys == sum((parts[step].keys for parts in shares), ())
        assert torch.equal(batch.pictures, torch.cat([parts[step].pictures for parts in shares]))


def test_what_is_skipped_is_counted_once_and_named(damaged):
    stream = PictureStream(open_source(str(damaged)), size=SIZE, batch=BATCH, workers=2)
    for _ in zip(stream.batches(), range(6), strict=False):
        pass
    assert stream.skipped.reasons == {
        "cannot be read as a picture": 3,
        "too large": 2,
        "too small": 1,
        "wholly transparent": 1,
    }
    assert len(stream.skipped) == 7 and "3-bomb.jpg" in stream.skipped.names
    assert str(stream.skipped).startswith("7 skipped (3 cannot be read as a picture, 2 too large, 1 ")


def test_what_ranks_skipped_is_put_together(damaged):
    source = open_source(str(damaged))
    streams = [PictureStream(source, size=SIZE, batch=BATCH, share=Share(rank, 2), workers=0) for rank in range(2)]
    for stream in streams:
        for _ in zip(stream.batches(), range(6), strict=False):
            pass
    together = streams[0].skipped
    together.update(streams[1].skipped)
    assert len(together) == together.reasons.total() == 7 and len(set(together.names)) == len(together.names)
    assert [source.key(entry)[0] for entry in together.entries] == list("0123456")


def test_a_picture_that_goes_away_is_skipped(folder, tmp_path):
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    (tmp_path / "2.png").unlink()
    stream = PictureStream(source, size=SIZE, batch=4, workers=0)
    assert "2.png" not in next(stream.batches()).keys
    assert stream.skipped.reasons == {"cannot be opened": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_that_can_be_read_is_an_error(tmp_path, workers):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    stream = PictureStream(open_source(str(tmp_path)), size=SIZE, batch=4, workers=workers)
    with pytest.raises(PictureError, match=r"^none of 5 pictures in a row of .* can be read: \d.png cannot be read as"):
        next(stream.batches())
