"""The image-prompt baseline: without its tokens it is the plain model, and training moves nothing but itself."""

import pytest
import torch

from benchmarks.image_prompt import Examples, ImagePrompt, cross_attentions, train
from profusion.infusion import cross_attention_layers
from profusion.toybox.pipeline import Toybox


@pytest.fixture(scope="module")
def toybox():
    return Toybox.load()


def predict(toybox, x, patches, kinds):
    context = toybox.context("a photo of a cat").expand(len(x), -1, -1)
    options = {"patches": patches, "cond_or_uncond": kinds}
    return toybox.unet(x, torch.full((len(x),), 500), context, transformer_options=options)


@torch.no_grad()
def test_it_adds_to_every_layer_and_nothing_at_scale_0(toybox, generator):
    assert list(cross_attentions(toybox.unet)) == [one.name for one in cross_attention_layers(toybox.unet.state_dict())]
    adapter = ImagePrompt(toybox.unet)
    x, embeddings = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(1, 128, generator=generator)
    plain = predict(toybox, x, {}, [0, 1])
    assert torch.equal(predict(toybox, x, adapter.patches(embeddings, 0.0), [0, 1]), plain)
    seen, unseen = predict(toybox, x, adapter.patches(embeddings), [0, 1])
    other, still = predict(toybox, x, adapter.patches(-embeddings), [0, 1])
    assert not torch.equal(seen, other) and torch.equal(unseen, still)  # the picture enters the conditional row alone


def test_training_moves_the_adapter_and_nothing_of_the_model(toybox, generator):
    adapter = ImagePrompt(toybox.unet)
    before = {name: value.clone() for name, value in toybox.unet.state_dict().items()}
    one = Examples(torch.randn(1, 4, 6, 6, generator=generator), torch.randn(1, 128, generator=generator), ["a cat"])
    started = {name: value.clone() for name, value in adapter.state_dict().items()}
    assert len(list(train(toybox, adapter, one, 2, batch=1))) == 2
    assert all(not torch.equal(value, started[name]) for name, value in adapter.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in toybox.unet.state_dict().items())
