"""Features on the disk: written by many, killed at any moment, and refused where they are of something else."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from profusion.pretraining import cache as cache_module
from profusion.pretraining.cache import (
    DONE,
    UNREADABLE,
    CacheError,
    FeatureCache,
    Sizes,
    features_of,
    fill,
    size_on_disk,
)
from profusion.pretraining.opening import open_source
from profusion.pretraining.order import Share
from profusion.pretraining.stream import PictureStream, StreamError
from tests.pretraining.examples import broken, coded, picture

SIZES = Sizes(20, (4, 2, 2), (3, 5), torch.float32)
ABOUT = {"source": "abc", "encoders": "def", "size": "16"}


def features(entries, sizes=SIZES):
    """Of pictures, told by their numbers."""
    generators = [torch.Generator().manual_seed(entry) for entry in entries]
    latents = torch.stack([torch.randn(sizes.latents, generator=one) for one in generators])
    return latents, torch.stack([torch.randn(sizes.tokens, generator=one) for one in generators])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_comes_back_rounded(tmp_path, dtype):
    sizes = Sizes(20, (4, 2, 2), (3, 5), dtype)
    cache = FeatureCache(tmp_path / "cache", sizes, ABOUT)
    entries = torch.tensor([7, 0, 19])
    latents, tokens = features([7, 0, 19])
    cache.write(entries, latents, tokens)
    cache.close()
    found = FeatureCache(tmp_path / "cache", sizes, ABOUT).read(entries.flip(0))
    assert found[0].dtype == dtype
    assert torch.equal(found[0].flip(0).float(), cache.rounded(latents))
    assert torch.equal(found[1].flip(0).float(), cache.rounded(tokens))


def test_a_row_counts_once_it_is_flushed_and_stays_then(tmp_path):
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    cache.write(torch.tensor([3]), *features([3]))
    with pytest.raises(CacheError, match="picture 3 is not in the cache"):
        cache.read(torch.tensor([3]))
    cache.flush()
    cache.write(torch.tensor([3]), *features([4]))
    cache.flush()
    assert torch.equal(cache.read(torch.tensor([3]))[0], features([3])[0])
    assert cache.states.count_of(DONE) == 1


def test_it_is_flushed_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_FLUSH_ROWS", 4)
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    for entry in range(6):
        cache.write(torch.tensor([entry]), *features([entry]))
    assert [cache.states[entry] for entry in range(6)] == [DONE] * 4 + [0, 0]


def test_a_cache_of_something_else_is_refused_by_name(tmp_path):
    FeatureCache(tmp_path, SIZES, ABOUT).close()
    with pytest.raises(CacheError, match="of something else: encoders is def there, xyz here. Give another folder"):
        FeatureCache(tmp_path, SIZES, {**ABOUT, "encoders": "xyz"})
    with pytest.raises(CacheError, match="count is 20 there, 21 here; dtype is float32 there, float16 here"):
        FeatureCache(tmp_path, Sizes(21, SIZES.latents, SIZES.tokens), ABOUT)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("about.json", b"{", "is damaged"),
        ("about.json", b"[]", "is no cache of features"),
        ("tokens.bin", b"123", "is damaged: tokens.bin has another size"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, name, data, words):
    FeatureCache(tmp_path, SIZES, ABOUT).close()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheError, match=words):
        FeatureCache(tmp_path, SIZES, ABOUT)


def test_one_that_was_killed_while_it_began_goes_on(tmp_path):
    FeatureCache(tmp_path, SIZES, ABOUT).close()
    (tmp_path / "done.bin").unlink()
    (tmp_path / "tokens.bin").write_bytes(b"")
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    cache.write(torch.tensor([19]), *features([19]))
    cache.flush()
    assert torch.equal(cache.read(torch.tensor([19]))[1], features([19])[1])


def test_how_large_it_is_is_known_before(tmp_path):
    FeatureCache(tmp_path, SIZES, ABOUT).close()
    assert size_on_disk(SIZES) == sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    sd_15 = Sizes(70_000, (4, 64, 64), (257, 1024))
    assert 38e9 < size_on_disk(sd_15) < 40e9


def test_a_disk_with_too_little_room_is_told_before(tmp_path):
    with pytest.raises(CacheError, match=r"pictures takes 168\.6 TiB, and there are .* make room, choose another"):
        FeatureCache(tmp_path / "cache", Sizes(2**28, (4, 64, 64), (257, 1280)), ABOUT)
    assert not list((tmp_path / "cache").iterdir())


def test_values_that_the_precision_cannot_hold_are_refused(tmp_path):
    cache = FeatureCache(tmp_path, Sizes(20, SIZES.latents, SIZES.tokens, torch.float16), ABOUT)
    with pytest.raises(CacheError, match="not finite in float16: keep them in bfloat16 or float32"):
        cache.write(torch.tensor([3]), features([3])[0], features([3])[1] + 1e6)
    cache.close()
    assert cache.states.count_of(DONE) == 0


def test_other_precisions_and_shapes_are_refused(tmp_path):
    with pytest.raises(CacheError, match="keeps float32, float16, bfloat16, and not float64"):
        Sizes(1, (1, 1, 1), (1, 1), torch.float64)
    with pytest.raises(CacheError, match="do not fit"):
        FeatureCache(tmp_path, SIZES, ABOUT).write(torch.tensor([3]), features([3])[1], features([3])[0])


WRITER = """
import sys, time, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from profusion.pretraining import cache as module
from tests.pretraining.test_cache import features
sizes = module.Sizes({count}, (4, 32, 32), (64, 64), torch.float32)
module._FLUSH_ROWS = 8
cache = module.FeatureCache(Path({folder!r}), sizes, {{"source": "abc"}})
for entry in range({first}, {count}, {stride}):
    if cache.states[entry] == 0:
        cache.write(torch.tensor([entry]), *features([entry], sizes))
cache.close()
"""
LARGE = Sizes(400, (4, 32, 32), (64, 64), torch.float32)


def writer(root, folder, first=0, stride=1):
    code = WRITER.format(root=str(root), folder=str(folder), count=LARGE.count, first=first, stride=stride)
    return subprocess.Popen([sys.executable, "-c", code], cwd=root)


def check_rows(cache, at_least=0) -> int:
    done = [entry for entry in range(LARGE.count) if cache.states[entry] == DONE]
    for entry in done:
        for found, expected in zip(cache.read(torch.tensor([entry])), features([entry], LARGE), strict=True):
            assert torch.equal(found, expected), entry
    assert len(done) >= at_least
    return len(done)


def test_one_that_is_killed_leaves_no_row_that_is_not_there(root, tmp_path):
    done, rounds = 0, 0
    while done < LARGE.count and rounds < 8:
        process = writer(root, tmp_path)
        path = tmp_path / "done.bin"
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if path.is_file() and np.fromfile(path, np.uint8).sum() >= min(done + 150, LARGE.count):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
        done = check_rows(FeatureCache(tmp_path, LARGE, {"source": "abc"}), done)
        rounds += 1
    assert done == LARGE.count and rounds >= 3


def test_two_processes_write_at_once(root, tmp_path):
    processes = [writer(root, tmp_path, first, 2) for first in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert check_rows(FeatureCache(tmp_path, LARGE, {"source": "abc"})) == LARGE.count


def test_a_full_disk_loses_nothing(tmp_path):
    """The system lets no file grow beyond some bytes, which a disk without room does too."""
    resource = pytest.importorskip("resource")
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    cache.write(torch.arange(3), *features(range(3)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SIZES.row_bytes()[0], before[1]))
    try:
        with pytest.raises(CacheError, match=r"the disk is full: 3 of 20 pictures are in .* Make room for"):
            cache.write(torch.arange(3, 15), *features(range(3, 15)))
        cache.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = FeatureCache(tmp_path, SIZES, ABOUT)
    assert [again.states[entry] for entry in range(20)] == [DONE] * 3 + [0] * 17
    assert torch.equal(again.read(torch.arange(3))[1], features(range(3))[1])


# With a stream.


def encode(pictures):
    """Stands in for a VAE and CLIP."""
    values = pictures.float() / 7
    return values[:, :2, :2].repeat(1, 1, 1, 2)[..., :4].movedim(-1, 1), values[:, :3, :5, 0]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(13):
        (folder / f"{number:02}.png").write_bytes(coded(picture(number)))
    for name, data in broken().items():
        (folder / f"{name}.jpg").write_bytes(data)
    return open_source(str(folder))


def stream_of(source, **options):
    return PictureStream(source, **{"size": 16, "batch": 8, "seed": 2, "workers": 0, **options})


def taken(source, cache, steps=6, start=0, **options):
    batches = stream_of(source, **options).batches(start, cache and cache.states)
    return [
        (batch, cache and features_of(batch, cache, encode)) for batch, _ in zip(batches, range(steps), strict=False)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_decodes_what_the_cache_does_not_have(source, tmp_path, workers, monkeypatch):
    plain = [encode(batch.pictures) for batch, _ in taken(source, None)]
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    monkeypatch.setattr(cache_module, "_FLUSH_ROWS", 1)
    for _ in range(2):
        found = taken(source, cache, workers=workers)
        for (latents, tokens), (_, features) in zip(plain, found, strict=True):
            assert torch.equal(latents, features[0]) and torch.equal(tokens, features[1])
        batches = [batch for batch, _ in found]
    assert all(batch.cached.all() and not len(batch.pictures) for batch in batches)
    assert [batch.keys for batch in batches] == [batch.keys for batch, _ in taken(source, None)]


def test_half_a_batch_from_the_cache(source, tmp_path):
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    (batch, _), (later, _) = taken(source, None, 2)
    some = torch.tensor([0, 3, 7])
    cache.write(batch.entries[some], *encode(batch.pictures[some]))
    cache.flush()
    (found, features), _ = taken(source, cache, 2)
    assert found.cached.nonzero()[:, 0].tolist() == [
        at for at, entry in enumerate(batch.entries.tolist()) if entry in batch.entries[some].tolist()
    ]
    assert torch.equal(found.pictures, batch.pictures[~found.cached])
    assert torch.equal(features[0], encode(batch.pictures)[0]) and torch.equal(features[1], encode(batch.pictures)[1])


def test_a_pass_ahead_fills_it_and_may_stop_anywhere(source, tmp_path):
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    first = fill(stream_of(source), cache, encode)
    assert next(first) == 1
    first.close()
    cache.close()
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    assert 0 < cache.states.count_of(DONE) < 13
    for rank in range(2):
        assert list(fill(stream_of(source, share=Share(rank, 2)), cache, encode)) == [1, 2, 3]
    assert cache.states.count_of(DONE) == 13 and cache.states.count_of(UNREADABLE) == 7
    stream = stream_of(source)
    batches = [batch for batch, _ in zip(stream.batches(0, cache.states), range(6), strict=False)]
    assert all(batch.cached.all() for batch in batches)
    assert stream.skipped.reasons == {"could not be read before, as the cache says": 7}
    assert [batch.keys for batch in batches] == [batch.keys for batch, _ in taken(source, None)]


def test_a_cache_is_of_whole_centres_alone(source, tmp_path):
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    with pytest.raises(StreamError, match="a cache has one square of each picture"):
        next(stream_of(source, crop="random").batches(0, cache.states))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_other_processes_see_what_was_written(tmp_path):
    cache = FeatureCache(tmp_path, SIZES, ABOUT)
    states = cache.states
    cache.write(torch.tensor([5]), *features([5]))
    cache.flush()
    again = states.__reduce__()
    assert states[5] == DONE and again[0](*again[1])[5] == DONE
