"""What a PromptNet's training goes on from: the file, the memory where there is none, and what is not its own."""

import pytest
import torch

from profusion import files
from profusion.promptnet import unfinished
from profusion.promptnet.unfinished import Unfinished
from tests.promptnet.test_training import parameters, training


@pytest.fixture(autouse=True)
def nothing_unsaved():
    unfinished.unsaved.clear()
    yield
    unfinished.unsaved.clear()


def stopped(small, places, step=2, identity="0123", **options):
    """A training of three steps that was stopped, and what it has kept."""
    run = training(small, **options)
    kept = Unfinished(run, "kind", identity, places, [].append)
    for _ in run.steps():
        if run.step == step:
            break
    said = kept.keep()
    kept.partial.leave()
    return said


def begun_again(small, places, identity="0123", **options):
    run = training(small, **options)
    kept = Unfinished(run, "kind", identity, places, [].append)
    kept.go_on()
    return run, kept


def test_it_goes_on_bit_for_bit_and_the_file_is_gone_when_it_is_finished(small, tmp_path):
    whole = training(small)
    list(whole.steps())
    path = tmp_path / "training" / "kind_0123.safetensors"
    assert f"go on from step 2, or delete\n{path}\n" in stopped(small, [tmp_path])
    run, kept = begun_again(small, [tmp_path])
    assert run.step == 2 and kept.said == f"Gone on from step 2, from {path}\n"
    list(run.steps(kept.partial))
    assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(run).items())
    kept.finished()
    assert not path.exists()


def test_where_the_first_folder_cannot_be_written_the_next_is_taken(small, tmp_path):
    (tmp_path / "one").write_text("no folder")
    stopped(small, [tmp_path / "one", tmp_path / "two"])
    run, _ = begun_again(small, [tmp_path / "one", tmp_path / "two"])
    assert run.step == 2 and len(list((tmp_path / "two" / "training").iterdir())) == 1


def test_without_any_room_it_is_kept_in_memory_until_it_is_finished(small, tmp_path):
    place = tmp_path / "one"
    place.write_text("no folder")
    assert "They are in memory" in stopped(small, [place])
    run, kept = begun_again(small, [place])
    assert run.step == 2 and kept.said == "Gone on from step 2, from memory\n"
    kept.finished()
    assert not unfinished.unsaved and begun_again(small, [place])[0].step == 0


def test_what_is_of_another_training_or_damaged_is_said_and_left_alone(small, tmp_path):
    stopped(small, [tmp_path])
    (path,) = (tmp_path / "training").iterdir()
    before = path.read_bytes()
    run, kept = begun_again(small, [tmp_path], learning_rate=2e-3)  # under the same digits, as if they had collided
    assert run.step == 0 and kept.said.startswith("Begun anew. the checkpoint was trained with learning_rate=0.001")
    kept.keep()
    kept.partial.leave()
    assert path.read_bytes() == before and len(list((tmp_path / "training").iterdir())) == 2
    path.write_bytes(before[:-10])
    run, kept = begun_again(small, [tmp_path])
    assert run.step == 0 and str(path) in kept.said and path.read_bytes() == before[:-10]


def test_what_another_server_works_on_is_left_to_it(small, tmp_path):
    stopped(small, [tmp_path])
    (path,) = (tmp_path / "training").iterdir()
    release = files.hold(path)
    run, kept = begun_again(small, [tmp_path])
    assert run.step == 0 and kept.said == f"Another server works on the same training, and keeps it in {path}\n"
    kept.keep()
    assert kept.partial.path == path.with_name("kind_0123_2.safetensors")
    release()
