"""The benchmark's LoRA: trained by the host, merged by its loader, evaluated in the kernel."""

import pytest

pytest.importorskip("comfy.samplers", reason="needs ComfyUI")

import torch

from benchmarks.peers import Peer
from benchmarks.peers.lora import Lora, host_nodes, merged
from profusion.diffusion import timestep_of
from profusion.residual.training import TrainingOptions
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.pipeline import Toybox

PROMPT = "a photo of a sks mushroom"


@torch.no_grad()
def test_what_the_host_trains_and_merges_is_what_the_kernel_evaluates(pack, generator):
    toybox, concept = Toybox.load(), drawn_concept(count=1)
    peer, plain = Lora(toybox, concept.noun), Peer(toybox, concept.noun)
    x, sigma = torch.randn(2, 4, 6, 6, generator=generator), torch.tensor([0.7, 4.0])
    assert torch.equal(peer.predict_noise(x, sigma, PROMPT), plain.predict_noise(x, sigma, PROMPT))

    optimizer = torch.optim.AdamW
    recipe = TrainingOptions(steps=2, learning_rate=0.01, batch_size=1, flip=False)
    predictions = [peer.predict_noise(x, sigma, PROMPT) for _ in peer.steps(concept, recipe)]
    assert len(predictions) == 2 and not torch.equal(*predictions)
    assert torch.optim.AdamW is optimizer

    lora = {name: value.detach().clone() for name, value in peer.trained().items()}
    model = merged(host_nodes().load_model(), lora)
    model.patch_model()
    context = peer.context(PROMPT).expand(2, -1, -1)
    denoised = model.model.apply_model(x, sigma, c_crossattn=context)
    model.unpatch_model()
    assert timestep_of(sigma).tolist() == model.model.model_sampling.timestep(sigma).tolist()
    ours = x - sigma.view(-1, 1, 1, 1) * predictions[-1]
    torch.testing.assert_close(denoised, ours, rtol=0, atol=1e-4)
    assert (denoised - (x - sigma.view(-1, 1, 1, 1) * plain.predict_noise(x, sigma, PROMPT))).abs().max() > 1e-2
