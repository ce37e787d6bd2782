"""A checkpoint as a model without a host: pictures, and a residual's training, of all families, for eps and for v."""

import pytest
import torch

from profusion.checkpoints import CheckpointError
from profusion.pipeline import seeded
from profusion.residual import load_residual, save_residual
from profusion.residual.training import TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from tests import shrunken

SIZE = 16


@pytest.fixture(scope="module", params=shrunken.KINDS, ids="-".join)
def model(request, tmp_path_factory):
    family, prediction = request.param
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    loaded = StableDiffusion.load(shrunken.written(path, shrunken.checkpoint(family, prediction)), SIZE)
    assert (loaded.family, loaded.prediction, loaded.size) == (family, prediction, SIZE)
    return loaded


def trained(model, steps=3, resume=None):
    pictures = torch.rand(2, SIZE, SIZE, 3, generator=torch.manual_seed(0))
    training = model.training(pictures, torch.ones(2, SIZE, SIZE), "cat", TrainingOptions(steps=steps), resume)
    return training, list(training.steps())


def test_a_prompt_draws_its_own_picture_alone_and_in_a_batch(model):
    both = model.generate(["a cat", "snow"], seeded(1, 2), steps=2)
    assert both.shape == (2, 4, 8, 8) and both.isfinite().all()
    alone = model.generate(["snow"], seeded(2), steps=2)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)
    other = model.generate(["a cat"], seeded(2), steps=2)
    assert (other - alone).abs().max() > 1e-2
    assert model.vae.pictures(alone).shape == (1, SIZE, SIZE, 3)


def test_no_residual_draws_the_plain_picture_in_both_streams(model):
    plain, customised = model.generate_customised("a photo of a cat", [], seeded(1, 2), steps=2)
    expected = model.generate(["a photo of a cat"] * 2, seeded(1, 2), steps=2)
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(customised, expected, rtol=1e-3, atol=1e-3)


def test_a_residual_is_trained_kept_and_drawn(model, tmp_path):
    training, losses = trained(model)
    residual = training.residual()
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert len(residual.layers) == model.unet.config.cross_attentions
    loaded = load_residual(save_residual(residual, tmp_path / "residual.safetensors", "float32").path)
    plain, customised = model.generate_customised("a photo of a cat", [loaded], seeded(1), steps=2, strength=50.0)
    assert (plain - customised).abs().max() > 1e-3


def test_a_training_goes_on_from_its_file_with_the_losses_it_would_have_had(model, tmp_path):
    whole, losses = trained(model, 3)
    begun = model.training(
        torch.rand(2, SIZE, SIZE, 3, generator=torch.manual_seed(0)),
        torch.ones(2, SIZE, SIZE),
        "cat",
        TrainingOptions(steps=3),
    )
    steps = begun.steps()
    next(steps)
    path = save_residual(begun.residual(), tmp_path / "begun.safetensors", "float32").path
    again, rest = trained(model, 3, load_residual(path))
    assert rest == losses[1:]
    assert torch.equal(again.residual().delta, whole.residual().delta)


@pytest.mark.parametrize(("kind", "size"), list(zip(shrunken.KINDS, (512, 512, 768, 1024, 1024), strict=True)))
def test_a_size_that_is_left_out_is_that_of_the_models_training(tmp_path, kind, size):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint(*kind))
    assert StableDiffusion.load(path).size == size


def test_a_size_that_no_latent_has_is_refused(tmp_path):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint("SD 1.x"))
    with pytest.raises(CheckpointError, match="size=17: give a multiple of 2"):
        StableDiffusion.load(path, 17)


@pytest.mark.parametrize("kind", [("SD 2.x", "v"), ("SDXL", "eps")], ids="-".join)
def test_it_draws_and_trains_on_any_device_as_on_the_cpu(tmp_path, device, kind):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint(*kind))
    found = []
    for place in ("cpu", device):
        model = StableDiffusion.load(path, SIZE).to(place)
        latents = model.generate(["a cat"], seeded(1), steps=2)
        assert latents.device.type == torch.device(place).type
        _, losses = trained(model, 2)
        found.append((model.pictures(latents), losses))
    (pictures, losses), (others, other_losses) = found
    torch.testing.assert_close(pictures, others, rtol=1e-3, atol=1e-3)
    assert other_losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("kind", shrunken.KINDS, ids="-".join)
def test_weights_in_half_precision_draw_and_train_in_single(tmp_path, kind):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint(*kind), torch.bfloat16)
    model = StableDiffusion.load(path, SIZE, torch.bfloat16)
    latents = model.generate(["a cat"], seeded(1), steps=2)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert model.pictures(latents).dtype == torch.float32
    training, losses = trained(model, 2)
    assert training.residual().delta.dtype == torch.float32 and all(0 < loss < 100 for loss in losses)
