"""F's queries while they wait for C: as many as are let on the device, the rest elsewhere, and not a bit different."""

import pytest
import torch

from benchmarks.query_memory import measure
from profusion import queries
from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches, on_conditional
from profusion.models.configs import SD15, SDXL, UNetConfig
from profusion.models.unet import UNet
from profusion.queries import KEPT, TakenOnce, WaitingQueries, bytes_on_device, query_numbers

TINY = UNetConfig(32, (1, 2), 1, (1, 1), 1, 16, num_heads=2)


@pytest.fixture
def apart(monkeypatch):
    """A CPU whose memory is not the main memory."""
    monkeypatch.setattr(queries, "OWN_MEMORY", ("cpu",))


def rows(count, size=1):
    return torch.full((count, size, 256), float(count))


def test_what_fits_stays_and_the_rest_is_spilled(apart):
    spilled = []
    store = WaitingQueries(kept=2048, spill=lambda x: (spilled.append(x), x.clone())[1])
    for layer in range(4):
        store[layer, 0] = rows(2)  # 1024 bytes a picture
    assert store.on_device == 4096 and len(spilled) == 2 and len(store) == 4
    assert all(torch.equal(store.get((layer, 0)), rows(2)) for layer in range(4))
    assert store.get((4, 0)) is None
    store[0, 0] = rows(2)  # the next step's takes its place
    assert store.on_device == 4096 and len(store) == 4
    del store[0, 0], store[3, 0]
    assert store.on_device == 2048 and len(store) == 2


def test_a_model_without_cross_attention_leaves_nothing():
    assert bytes_on_device(query_numbers({}), 4096, 2, 2) == 0


def test_a_kept_chunk_does_not_hold_its_batch(apart):
    store, batch = WaitingQueries(), rows(2)
    store["layer"] = batch.chunk(2)[0]
    assert store["layer"].untyped_storage().nbytes() == 1024


def test_where_all_memory_is_one_nothing_is_copied():
    store, x = WaitingQueries(kept=0), rows(2)
    store["layer"] = x
    assert store["layer"] is x and store.on_device == 0


def test_main_memory_gets_the_same_bits():
    x = torch.randn(2, 3, 4).half()
    copy = queries.in_main_memory(x)
    assert copy.device.type == "cpu" and torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


def evaluated(store, latents):
    """F and C of a small UNet, twice, in a batch of a conditional and an unconditional chunk."""
    torch.manual_seed(0)
    device = latents[0].device
    unet = UNet(TINY).eval().to(device)
    names = tuple(layer.name for layer in cross_attention_layers(dict(unet.named_parameters())))
    placed = Placement(torch.randn(len(names), 1, TINY.context_dim).to(device), names, (2,))
    context, found = torch.randn(2, 5, TINY.context_dim).to(device), []
    for latent in latents:
        for patches in (foundation_patches(store), customised_patches(store, on_conditional([placed]))):
            options = {"patches": patches, "cond_or_uncond": [0, 1]}
            with torch.no_grad():
                found.append(
                    unet(latent, torch.tensor([500, 500], device=device), context, transformer_options=options)
                )
    return found


@pytest.mark.parametrize("kept", [0, 4096, 2**30])
def test_c_is_the_same_to_the_bit(apart, kept, generator):
    latents = torch.randn(2, 1, 4, 8, 8, generator=generator).expand(-1, 2, -1, -1, -1)
    expected, store = evaluated({}, latents), WaitingQueries(kept=kept)
    assert all(map(torch.equal, evaluated(store, latents), expected))
    assert store.on_device <= kept


def test_c_is_the_same_on_a_device_that_has_its_own_memory(device, monkeypatch, generator):
    """Queries that came back from main memory are those that stayed."""
    latent = torch.randn(1, 4, 8, 8, generator=generator).expand(2, -1, -1, -1).to(device)
    monkeypatch.setattr(queries, "OWN_MEMORY", (device.type,))
    stayed, spilled = (evaluated(WaitingQueries(kept=kept), [latent]) for kept in (2**30, 0))
    assert all(map(torch.equal, spilled, stayed)) and spilled[0].device.type == device.type


@pytest.mark.parametrize(("model", "left", "most"), [("sd15", 705 * 2**18, 70e6), ("sdxl", 400 * 2**20, 60e6)])
def test_the_host_is_told_no_less_than_what_waits(model, left, most):
    found = measure(model, (128, 128), 2)
    assert found.left == left and found.kept <= KEPT
    assert found.kept + found.layer <= found.reckoned <= most


def test_taken_once_is_empty_after_c(generator):
    latent = torch.randn(1, 4, 8, 8, generator=generator).expand(2, -1, -1, -1)
    store = TakenOnce()
    evaluated(store, [latent])
    assert not store


@pytest.mark.parametrize("config", [TINY, SD15, SDXL], ids=["tiny", "SD 1.5", "SDXL"])
def test_the_reckoning_is_what_f_leaves(config):
    with torch.device("meta"):
        unet, store = UNet(config), {}
        options = {"patches": foundation_patches(store), "cond_or_uncond": [0]}
        added = torch.empty(1, config.adm_channels) if config.adm_channels else None
        unet(torch.empty(1, 4, 32, 64), torch.empty(1), torch.empty(1, 77, config.context_dim), added, options)
    left = sorted(value.numel() / (32 * 64) for value in store.values())
    assert sorted(query_numbers(dict(unet.named_parameters()))) == left


@pytest.mark.parametrize(("config", "cells"), [(SD15, 64**2), (SD15, 128**2), (SDXL, 128**2), (SDXL, 192 * 128)])
def test_a_picture_leaves_little_on_the_device(config, cells):
    with torch.device("meta"):
        numbers = query_numbers(dict(UNet(config).named_parameters()))
    assert bytes_on_device(numbers, cells, 2, 2) <= 70e6
    if cells == 128**2 and config is SDXL:
        assert sum(numbers) * cells * 2 * 2 == 400 * 2**20
        assert bytes_on_device(numbers, cells, 2, 2) <= 60e6
    if cells == 64**2 and config is SD15:
        assert sum(numbers) * cells * 2 * 2 <= KEPT  # nothing is spilled
