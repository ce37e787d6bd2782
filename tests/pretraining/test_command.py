"""`python -m profusion promptnet train`, a few steps of it: stopped at any moment, by one process or several."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from profusion import __main__ as program
from profusion import files
from profusion.loop import TrainingError
from profusion.pretraining import command as commands
from profusion.pretraining import saving
from profusion.pretraining.arguments import command_of, data_of
from profusion.pretraining.engine import Engine
from profusion.pretraining.ranks import LostProcess, Ranks
from profusion.pretraining.saving import checkpoints, step_of
from profusion.pretraining.stream import StreamError
from profusion.promptnet import PromptNetError, load_promptnet
from profusion.promptnet.file import load_training
from profusion.toybox.pipeline import Toybox
from profusion.toybox.pretraining import DrawnPictures, on_toybox
from tests.pretraining.processes import said, start, together

FEW = ("--pictures", "20", "--batch", "2", "--warmup", "0", "--workers", "0", "--validation", "2")
RARELY = ("--validate-every", "1000", "--sheet-every", "1000")


@pytest.fixture(scope="module")
def toybox():
    return Toybox.load()


def arguments(out, *more):
    return ["promptnet", "train", "--out", str(out), *FEW, *RARELY, "--report-every", "1", *more]


def run(toybox, out, *more, say=lambda text: None):
    given = program.parser().parse_args(arguments(out, *more))
    command, ranks = command_of(given), Ranks()
    return commands.run(command, on_toybox(command, data_of(given), ranks, say, toybox), ranks, say)


def losses(out):
    """The loss of each step, the last said of it counting."""
    lines = map(json.loads, (out.with_suffix(".training") / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["last_loss"] for line in lines if "last_loss" in line}


def weights(path):
    return load_promptnet(path, dtype=None).state_dict()


def assert_equal(one, other):
    found, expected = weights(one), weights(other)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.fixture(scope="module")
def whole(toybox, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    lines = []
    report = run(toybox, out, "--steps", "4", "--ema", "0.5", say=lines.append)
    return out, report, lines


def test_a_run_writes_what_it_made_and_says_how_it_went(whole):
    out, report, lines = whole
    assert report["steps"] == 4 and report["parameters"] == 4_178_848 and out.stat().st_size == report["bytes"]
    folder = out.with_suffix(".training")
    assert [step_of(path) for path in checkpoints(folder)] == [4] and (folder / "sheets/00000004.png").is_file()
    assert list(losses(out)) == [1, 2, 3, 4]
    assert any("18 pictures of toybox, and 2 kept apart" in line for line in lines)
    assert any(line.startswith("step 4/4  loss") and "pictures a second" in line for line in lines)
    assert report["validation"]["loss"] != report["validation"]["word_loss"]
    assert -1 <= report["validation"]["similarity"] <= 1
    average = load_training(folder / "step-00000004.safetensors")[1]
    written = weights(out)
    assert torch.equal(written["output.weight"], average["ema.output.weight"].half()), "the average is what is written"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(toybox, whole, tmp_path, number, monkeypatch):
    out = tmp_path / "halved.safetensors"
    take = Engine.take

    def interrupted(engine, *features):
        if engine.step == 1:
            os.kill(os.getpid(), number)
        return take(engine, *features)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "take", interrupted)
        run(toybox, out, "--steps", "4", "--ema", "0.5")
    assert [step_of(path) for path in checkpoints(out.with_suffix(".training"))] == [2] and not out.exists()
    lines = []
    run(toybox, out, "--steps", "4", "--ema", "0.5", say=lines.append)
    assert any("going on from step 2" in line for line in lines)
    assert losses(out) == losses(whole[0])
    assert_equal(out, whole[0])


def test_minutes_end_a_run_for_now(toybox, whole, tmp_path):
    out, runs = tmp_path / "sliced.safetensors", 0
    while not out.exists():
        run(toybox, out, "--steps", "4", "--ema", "0.5", "--minutes", "1e-6")
        runs += 1
    assert runs == 4
    assert_equal(out, whole[0])


def test_the_last_checkpoints_and_the_best_are_kept_and_a_damaged_one_is_passed_over(toybox, tmp_path, monkeypatch):
    out, values = tmp_path / "kept.safetensors", iter([0.5, 0.2, 0.4, 0.3, 0.3, 0.6])
    found = commands.Checked(0.0, 1.0)
    monkeypatch.setattr(commands.Validation, "loss", lambda self: commands.Checked(next(values), found.word_loss))
    more = ("--save-every", "1", "--validate-every", "1", "--keep", "2")
    run(toybox, out, "--steps", "4", *more, "--constant")
    folder = out.with_suffix(".training")
    assert [step_of(path) for path in checkpoints(folder)] == [3, 4]
    best = folder / saving.BEST
    assert files.read_tensors(best)[1]["notes.step"] == "2", "which had the least loss"
    assert load_promptnet(best, dtype=None).output.weight.dtype == torch.float16
    newest = checkpoints(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    lines = []
    run(toybox, out, "--steps", "5", *more, "--constant", say=lines.append)
    assert any("step-00000004" in line and "The one before it is taken." in line for line in lines)
    assert any("going on from step 3" in line for line in lines)


@pytest.mark.parametrize("more", [("--seed", "1"), ("--noun", "ball"), ("--batch", "4"), ("--pictures", "30")])
def test_it_never_goes_on_from_another_training(toybox, whole, tmp_path, more):
    out, before = whole[0], whole[0].read_bytes()
    with pytest.raises(TrainingError, match="was trained otherwise"):
        run(toybox, out, "--steps", "4", "--ema", "0.5", "--cache", str(tmp_path / "features"), *more)
    assert out.read_bytes() == before


def test_a_full_disk_ends_it_and_nothing_is_lost(toybox, tmp_path, monkeypatch):
    out = tmp_path / "full.safetensors"
    run(toybox, out, "--steps", "1", "--constant")
    save = saving.save_weights

    def full(*given, **named):
        raise PromptNetError("The PromptNet could not be saved: the disk is full.")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"the disk is full.*goes on from step 1"):
        patch.setattr(saving, "save_weights", full)
        run(toybox, out, "--steps", "3", "--constant", "--save-every", "1")
    assert saving.save_weights is save
    assert run(toybox, out, "--steps", "3", "--constant")["steps"] == 3


def test_a_process_that_gives_up_is_heard_of_in_the_same_step_and_nothing_is_lost(toybox, tmp_path):
    """Between two reports too: who waits for it in a step waits for ten minutes."""
    flags, said = iter([False, False, True]), []

    class Together(Ranks):
        def sums(self, values):
            if values != [False]:
                return super().sums(values)
            if failed := next(flags):
                said[:] = ["the disk is gone", None, None]  # after it has agreed to have saved
            return [float(failed)]

        def gathered(self, thing):
            return [thing, said.pop()] if said else [thing]

    out = tmp_path / "two.safetensors"
    given = program.parser().parse_args(arguments(out, "--steps", "9", "--report-every", "9"))
    command, ranks = command_of(given), Together()
    material = on_toybox(command, data_of(given), ranks, str, toybox)
    with pytest.raises(TrainingError, match="process 1 of 1 says: the disk is gone"):
        commands.run(command, material, ranks, str)
    assert [step_of(path) for path in checkpoints(out.with_suffix(".training"))] == [2]


def test_a_loss_that_stays_not_finite_ends_it_and_nothing_is_lost(toybox, tmp_path, monkeypatch):
    out, gradient = tmp_path / "nan.safetensors", Engine._gradient

    def broken(engine, *features):
        return gradient(engine, *features) if engine.step < 1 else torch.nan

    monkeypatch.setattr(Engine, "_gradient", broken)
    monkeypatch.setattr(Engine, "_norm", lambda engine: 1.0)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        run(toybox, out, "--steps", "20")
    (path,) = checkpoints(out.with_suffix(".training"))
    assert load_training(path)[1]["updates"].item() == 1


def test_two_trainings_never_write_in_one_folder(toybox, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "WAIT", 0.0, raising=False)
    out = tmp_path / "one.safetensors"

    def meanwhile(text):
        if text.startswith("step 1/"):
            with pytest.raises(TrainingError, match="another training is at work"):
                run(toybox, out, "--steps", "1")

    run(toybox, out, "--steps", "1", say=meanwhile)
    assert run(toybox, out, "--steps", "1")["steps"] == 1


def test_processes_that_see_different_checkpoints_are_told(toybox, tmp_path):
    """As those of two machines do that share no folder."""

    class Apart(Ranks):
        def gathered(self, thing):
            return [thing, thing + 100] if type(thing) is int else [thing]

    given = program.parser().parse_args(arguments(tmp_path / "one.safetensors", "--steps", "1"))
    command, ranks = command_of(given), Apart()
    with pytest.raises(TrainingError, match="different checkpoints .*that all machines share"):
        commands.run(command, on_toybox(command, data_of(given), ranks, str, toybox), ranks, str)


def test_a_damaged_checkpoint_pushes_out_no_later_one(toybox, tmp_path):
    out = tmp_path / "one.safetensors"
    run(toybox, out, "--steps", "1", "--constant", "--keep", "1")
    folder = out.with_suffix(".training")
    (folder / "step-00000009.safetensors").write_bytes(b"cut")
    run(toybox, out, "--steps", "2", "--constant", "--keep", "1")
    assert [step_of(path) for path in checkpoints(folder)] == [2, 9]


def test_a_step_that_is_left_out_is_in_no_mean_and_the_log_stays_json(toybox, tmp_path, monkeypatch):
    out, gradient = tmp_path / "one.safetensors", Engine._gradient

    def broken(engine, *features):
        return gradient(engine, *features) if engine.step in (1, 3) else torch.nan

    monkeypatch.setattr(Engine, "_gradient", broken)
    monkeypatch.setattr(Engine, "_norm", lambda engine: 1.0)
    run(toybox, out, "--steps", "3", "--report-every", "1")

    def refused(name):
        raise ValueError(name)

    text = (out.with_suffix(".training") / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refused) for line in text.splitlines()]
    assert [line["loss"] is None for line in lines[:3]] == [True, False, True]


def test_what_makes_no_sense_is_refused_before_a_checkpoint_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "on_checkpoint", lambda *_: pytest.fail("read"))
    model = ("--checkpoint", "a.safetensors", "--clip-vision", "b.safetensors", "--data", str(tmp_path))
    for more, message in (
        (("--batch", "3", "--micro", "2"), "cannot be taken 2"),
        (("--layout", "authors", "--tokens", "2"), "--tokens at 1"),
        (("--cache", str(tmp_path), "--crop", "random"), "--crop random draws another"),
    ):
        assert program.main(arguments(tmp_path / "one.safetensors", *model, *more)) == 1
        assert message in capsys.readouterr().err


def test_a_process_lost_while_a_checkpoint_is_put_together_is_told(toybox, tmp_path, monkeypatch):
    """FSDP's processes put it together, and what torch raises there is no error of ours."""

    def gone(engine):
        raise RuntimeError("gloo/transport/tcp/pair.cc:545 Read error [127.0.0.1]:12702: Connection reset by peer")

    monkeypatch.setattr(Engine, "state", gone)
    with pytest.raises(LostProcess, match="another process of this training ended .*start the same command again"):
        run(toybox, tmp_path / "one.safetensors", "--steps", "1")


def test_it_begins_from_another_of_the_same_sizes(toybox, tmp_path):
    first = tmp_path / "first.safetensors"
    run(toybox, first, "--steps", "1")
    second = tmp_path / "second.safetensors"
    run(toybox, second, "--steps", "1", "--start", str(first), "--learning-rate", "1e-9")
    begun, ended = weights(first), weights(second)
    for name, value in ended.items():
        torch.testing.assert_close(value, begun[name], rtol=1e-3, atol=1e-6)
    with pytest.raises(PromptNetError, match="--start .*sizes"):
        run(toybox, tmp_path / "third.safetensors", "--tokens", "2", "--start", str(first))


def test_broken_pictures_are_counted_and_passed_over(toybox, tmp_path):
    folder, drawn = tmp_path / "pictures", DrawnPictures(12, 3)
    folder.mkdir()
    for entry in range(12):
        data = drawn.read(entry)
        (folder / f"{entry:02}.png").write_bytes(data[: len(data) // 2] if entry == 5 else data)
    lines = []
    report = run(toybox, tmp_path / "one.safetensors", "--steps", "6", "--data", str(folder), say=lines.append)
    assert report["steps"] == 6
    assert any(line.startswith("pictures: 1 skipped") and "05.png" in line for line in lines)
    assert drawn.read(3) == DrawnPictures(12, 3).read(3) != DrawnPictures(12, 4).read(3)


def test_the_command_line_reports_and_says_what_is_wrong(toybox, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("profusion.toybox.pretraining.Toybox.load", lambda: toybox)
    assert program.main(arguments(tmp_path / "one.safetensors", "--steps", "1")) == 0
    report = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert report["steps"] == 1 and report["parameters"] == 4_178_848
    for more, message in (
        (("--steps", "0"), "steps=0"),
        (("--save-every", "0"), "--save-every"),
        (("--data", str(tmp_path / "none")), "none"),
        (("--batch", "3", "--micro", "2"), "3 rows a process cannot be taken 2"),
        (("--device", "nosuch"), "nosuch"),
        (("--checkpoint", "a.safetensors"), "go together"),
        (("--checkpoint", "a.safetensors", "--clip-vision", "b.safetensors"), "--data"),
        (("--layout", "authors", "--tokens", "2"), "--tokens at 1"),
        (("--start", "a.safetensors", "--noun", "ball"), "give one of them"),
        (("--cache", str(tmp_path), "--crop", "random"), "--crop random draws another"),
    ):
        assert program.main(arguments(tmp_path / "two.safetensors", *more)) == 1, more
        assert message in capsys.readouterr().err, more
    assert program.main(arguments(tmp_path / "two.pt")) == 1
    assert "ends in .safetensors" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    assert program.main(arguments(tmp_path / "one.safetensors")) == 130


def test_a_plan_says_what_it_takes_and_runs_nothing(tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    assert program.main(arguments(out, "--plan", "--cards", "2", "--card", "rtx4090", "--price", "0.5")) == 0
    said = capsys.readouterr().out
    assert "4 million numbers learn" in said and "2 x rtx4090 (24 GiB): fits" in said and "0.5 a card and hour" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_end_as_one_and_when_one_is_killed_so_does_the_other(whole, toybox, tmp_path):
    more = ("--steps", "4", "--ema", "0.5")
    out, log = tmp_path / "two.safetensors", tmp_path / "log"
    together(["-m", "profusion", *arguments(out, *more)], 2, log)
    alone = losses(whole[0])
    assert losses(out) == pytest.approx(alone, rel=1e-5)
    killed = tmp_path / "killed.safetensors"
    given = ("--steps", "4000", "--save-every", "2", "--constant", "--ema", "0.5")
    first, second = start(["-m", "profusion", *arguments(killed, *given)], 2, tmp_path / "lost")
    try:
        deadline = time.monotonic() + 120
        while not checkpoints(killed.with_suffix(".training")) and time.monotonic() < deadline:
            time.sleep(0.2)
        second.send_signal(signal.SIGKILL)
        gone = time.monotonic()
        assert first.wait(60) == 1 and time.monotonic() - gone < 60
    finally:
        first.kill()
    assert "another process of this training ended" in said(tmp_path / "lost"), said(tmp_path / "lost")
    step = step_of(checkpoints(killed.with_suffix(".training"))[-1])
    assert step >= 2
    once = tmp_path / "once.safetensors"
    steps = str(step + 2)
    run(toybox, killed, "--steps", steps, "--constant", "--ema", "0.5")  # by one process, where two were
    run(toybox, once, "--steps", steps, "--constant", "--ema", "0.5")
    assert losses(killed)[step + 2] == pytest.approx(losses(once)[step + 2], rel=1e-5)


def test_squares_to_check_with_are_spread_over_all_and_not_trained_on():
    from profusion.pretraining.material import Rest, kept_apart

    source = DrawnPictures(100, 0)
    kept = kept_apart(source, 7)
    rest = Rest(source, kept)
    names = [rest.key(entry) for entry in range(len(rest))]
    assert len(kept) == 7 and len(rest) == 93 and kept[0] == 0 and kept[-1] == 99
    assert sorted([*names, *(source.key(int(entry)) for entry in kept)]) == [source.key(n) for n in range(100)]
    assert len(kept_apart(DrawnPictures(9, 0), 7)) == 0


def test_pictures_are_read_as_they_are(tmp_path):
    from profusion.pretraining.material import read_squares
    from profusion.pretraining.sources import Folder

    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    found = read_squares(Folder(tmp_path), np.arange(2), 16)
    assert found.shape == (1, 16, 16, 3) and np.array_equal(found[0].numpy(), picture)


def test_a_worker_that_ended_by_itself_is_named_wherever_torch_says_it(toybox, tmp_path, monkeypatch):
    def ended(engine, *features):
        raise RuntimeError("DataLoader worker (pid 1234) is killed by signal: Killed. ")

    monkeypatch.setattr(Engine, "take", ended)
    with pytest.raises(StreamError, match="ended by itself.*Use fewer workers"):
        run(toybox, tmp_path / "one.safetensors", "--steps", "2")
