"""What every method must keep, whatever it does: see methods.py for them.

Off is the plain model, bit for bit. Training moves the method's own parameters alone. What is saved comes back. Bad
input raises and changes nothing. All of it on every device, and in every type that a model may have.
"""

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from profusion.loop import TrainingError
from tests.contract.methods import COMBINATIONS, METHODS, Models, evaluate

TYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = {"ids": lambda value: value.name if isinstance(value, type) else " + ".join(one.name for one in value)}
every_method = pytest.mark.parametrize("kind", METHODS, **IDS)
every_combination = pytest.mark.parametrize("kinds", COMBINATIONS, **IDS)


@pytest.fixture(params=TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def models(request, device):
    """Models of every type on every device; on the pretended one, where they compute alike, of one type."""
    return Models(device, request.param)


@pytest.fixture
def exact(device):
    """Models in float32, for what does not depend on their type."""
    return Models(device)


def copies(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(tensors, before):
    return tensors.keys() == before.keys() and all(torch.equal(tensors[name], before[name]) for name in before)


def train(method, around=nullcontext, **options):
    losses = list(method.training(method.options(**options), around).steps())
    method.learned()
    return losses


# Off is the plain model


@every_method
def test_what_has_learned_nothing_is_the_plain_model_bit_for_bit(kind, models):
    assert torch.equal(evaluate(models, [kind(models)]), evaluate(models))


@every_method
def test_what_has_learned_something_is_not_and_leaves_the_model_as_it_was(kind, models):
    method, plain, before = kind(models), evaluate(models), copies(models.tensors())
    method.stir()
    on = evaluate(models, [method])
    assert on.isfinite().all() and not torch.equal(on, plain)
    assert torch.equal(evaluate(models, [method]), on)
    assert torch.equal(evaluate(models), plain) and same(models.tensors(), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in models.unet.modules())


@every_combination
def test_of_two_methods_the_one_that_is_off_is_not_there(kinds, models):
    one, other = (kind(models) for kind in kinds)
    plain = evaluate(models)
    assert torch.equal(evaluate(models, [one, other]), plain)
    one.stir()
    assert torch.equal(evaluate(models, [one, other]), evaluate(models, [one]))
    alone = evaluate(models, [one])
    other.stir()
    both, other_alone = evaluate(models, [one, other]), evaluate(models, [other])
    assert not any(torch.equal(both, each) for each in (plain, alone, other_alone))
    assert torch.equal(evaluate(models, [other, one]), both)
    one.strength = 0.0
    assert torch.equal(evaluate(models, [one, other]), other_alone)


# Training


@every_method
def test_training_moves_its_own_parameters_alone(kind, models):
    method, before, state = kind(models), copies(models.tensors()), torch.get_rng_state()
    own = copies(method.parameters())
    losses = train(method)
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    moved = {name for name, value in method.parameters().items() if not torch.equal(value, own[name])}
    assert moved and all(value.isfinite().all() for value in method.parameters().values())
    assert same(models.tensors(), before) and torch.equal(torch.get_rng_state(), state)
    assert all(value.grad is None for value in models.unet.parameters())
    assert not torch.equal(evaluate(models, [method]), evaluate(models))


@every_combination
def test_training_one_method_leaves_the_other_alone(kinds, exact):
    for trains, stands in (kinds, kinds[::-1]):
        method, other = trains(exact), stands(exact)
        other.stir()
        before, models_before = copies(other.parameters()), copies(exact.tensors())
        train(method, around=other.changed_model)
        assert same(other.parameters(), before) and same(exact.tensors(), models_before)


@every_method
@pytest.mark.real_device
def test_the_seed_decides_the_whole_training(kind, exact):
    def after(seed):
        method = kind(exact)
        train(method, seed=seed)
        return copies(method.parameters())

    first = after(0)
    assert same(after(0), first) and not same(after(1), first)


@every_method
def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_what_was_learned(kind, exact):
    method, before = kind(exact), copies(exact.tensors())
    run = method.training(method.options(), nullcontext)
    next(run.steps())
    method.learned()
    kept = copies(method.parameters())
    exact.factor = torch.nan
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        next(run.steps())
    method.learned()
    assert run.step == 1 and same(method.parameters(), kept) and same(exact.tensors(), before)


@every_method
def test_pictures_that_are_no_numbers_are_refused(kind, exact):
    method = kind(exact)
    before = copies(method.parameters())
    exact.latents[1, 0, 0, 0] = torch.nan
    with pytest.raises((TrainingError, ValueError), match="not finite"):
        method.training(method.options(), nullcontext)
    assert same(method.parameters(), before)


# Files


@every_method
def test_what_is_saved_exactly_comes_back_bit_for_bit(kind, models, tmp_path):
    method, path = kind(models), tmp_path / f"new folder/method{kind.suffix}"
    method.stir()
    path.parent.mkdir()
    method.save(path)
    loaded = kind(models)
    loaded.load(path)
    assert same(loaded.parameters(), copies(method.parameters()))
    assert torch.equal(evaluate(models, [loaded]), evaluate(models, [method]))
    assert {value.device for value in loaded.parameters().values()} == {models.x.device}


@every_method
def test_saving_writes_the_same_bytes_again(kind, exact, tmp_path):
    method, paths = kind(exact), [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    method.stir()
    for path in paths:
        method.save_small(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(paths), "something was left beside the files"


@pytest.mark.parametrize("kind", METHODS[:2], **IDS)
def test_the_users_precision_comes_back_as_it_was_rounded(kind, exact, tmp_path):
    """Close to what was saved, and to the byte once it has been rounded. (The host reads the files of changes.)"""
    method, path, again = kind(exact), tmp_path / "small.safetensors", tmp_path / "again.safetensors"
    method.stir()
    method.save_small(path)
    loaded = kind(exact)
    loaded.load(path)
    loaded.save_small(again)
    assert again.read_bytes() == path.read_bytes()
    for name, value in method.parameters().items():
        assert (loaded.parameters()[name] - value).abs().max() < 0.05 * value.abs().max()


# Bad input


@every_method
@pytest.mark.parametrize("save", ["save", "save_small"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_broken_is_not_saved_and_the_file_there_stays(kind, exact, tmp_path, save, bad):
    method, path = kind(exact), tmp_path / "method.safetensors"
    method.stir()
    getattr(method, save)(path)
    data = path.read_bytes()
    with torch.no_grad():
        next(iter(method.parameters().values())).view(-1)[0] = bad
    before = copies(exact.tensors())
    with pytest.raises(kind.error):
        getattr(method, save)(path)
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path] and same(exact.tensors(), before)


@every_method
@pytest.mark.parametrize("damage", ["nothing there", "empty", "half", "a bit", "a folder", "another method's"])
def test_a_file_that_cannot_be_used_is_refused_and_changes_nothing(kind, exact, tmp_path, damage):
    method, path = kind(exact), tmp_path / "method.safetensors"
    method.stir()
    method.save(path)
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "another method's":
        other = METHODS[1] if kind is METHODS[0] else METHODS[0]
        other(exact).save(path)
    elif damage != "nothing there":
        flipped = data[:-9] + bytes([data[-9] ^ 0x40]) + data[-8:]
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "a bit": flipped}[damage])
    own, models_before = copies(method.parameters()), copies(exact.tensors())
    with pytest.raises(kind.error, match="method.safetensors"):
        method.load(path)
    assert same(method.parameters(), own) and same(exact.tensors(), models_before)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field.name)
        for kind in METHODS
        for field in fields(kind.options(kind))
        if field.type in ("int", "float", int, float)
    ],
    ids=lambda value: value.name if isinstance(value, type) else value,
)
def test_no_option_may_be_no_number(kind, field):
    with pytest.raises(ValueError, match=f"{field}=nan"):
        kind.options(kind, **{field: float("nan")})
