"""Infusion on transformers of the host's own classes, small and random: F is plain, and the noun's column acts."""

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("comfy.samplers", reason="needs ComfyUI")

import tiny
import tiny_transformers as transformers
import torch

from profusion.text_attention import TEXT

NOUN, OTHER = (7, 8), (12,)
ACTED_ON = [name for name in transformers.FAMILIES if name != "pixart"]
TWO = ["flux", "wan"]
"""One joint attention and one cross-attention, for what is the same in all families."""


class Family:
    """A model with the streams, its prompts, and residuals; `run` samples."""

    def __init__(self, pack, name):
        self.host, self.kernel, self.name = pack.nodes.host, pack.profusion, name
        self.model = transformers.shared(name)
        self.negative = self.conditioning(seed=2)

    def conditioning(self, seed=1, rows=transformers.ROWS):
        conditioning = transformers.conditioning(self.name, rows, seed)
        if self.name == "anima":  # whose context is made of other tokens than the text encoder's
            ids = torch.randint(1, 1000, (rows + 3,), generator=torch.Generator().manual_seed(seed))
            conditioning[0][1].update(t5xxl_ids=ids, t5xxl_weights=torch.ones(rows + 3))
        return conditioning

    def placed(self, size=3.0, rows=NOUN, seed=5, **given):
        """The prompt with a residual at these rows, which may have none of its numbers (size 0)."""
        layers = self.host.families.acting_on(self.model).layers
        generator = torch.Generator().manual_seed(seed)
        delta = size * torch.randn(len(layers), 1, layers[0].context_dim, generator=generator)
        placement = self.kernel.infusion.Placement(delta, tuple(layer.name for layer in layers), rows, **given)
        return self.kernel.infusion.PlacedConcept(placement)

    def carrying(self, *placed):
        return self.host.placing.carrying(self.conditioning(), placed)

    def streams(self, lock="column", model=None, shared=False, **options):
        """A MODEL with the streams, and what F finishes."""
        model, found = self.model if model is None else model, []
        acting = self.host.families.acting_on(model, lock)
        watch = None if shared else found.append
        told = {"attending": acting.attending, **options}
        return self.host.streams.add_streams(model, acting.layers, shared, watch, **told), found

    def run(self, model, positive, **options):
        negative = options.pop("negative", self.negative)
        return transformers.sample(self.name, model, positive, negative, **{"steps": 2, **options})

    def finished(self, found):
        return self.model.model.process_latent_out(found[-1].float())

    def assert_exact(self, lock="column", shared=False, model=None, **options):
        """F, and C with nothing to add, are the plain run bit for bit; C with something is not."""
        model = self.model if model is None else model
        plain = self.run(model, self.conditioning(), **options)
        patched, found = self.streams(lock, model, shared)
        assert plain.isfinite().all() and torch.equal(
            self.run(patched, self.carrying(self.placed(0.0)), **options), plain
        )
        customised = self.run(patched, self.carrying(self.placed()), **options)
        assert shared or torch.equal(self.finished(found), plain)
        assert customised.isfinite().all() and not torch.equal(customised, plain)
        return plain, customised


@pytest.fixture
def family(pack, request):
    return Family(pack, request.param)


def each(names):
    return pytest.mark.parametrize("family", names, indirect=True)


@each(ACTED_ON)
@pytest.mark.parametrize("lock", ["column", "whole"])
def test_f_and_nothing_to_add_are_the_plain_run(family, lock):
    family.assert_exact(lock)


@each(TWO)
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpmpp_2m"},
        {"sampler": "euler_ancestral", "batch": 2},
        {"cfg": 1.0},
        {"shared": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_so_they_are_however_it_is_sampled(family, options):
    family.assert_exact(**options)


@each(ACTED_ON)
def test_so_they_are_beside_a_negative_of_another_length(family):
    family.assert_exact(negative=family.conditioning(3, transformers.ROWS + 9))


def without_the_noun(before, function, query, key, value, heads, *others, **named):
    """Another pack's override, under which no row looks at the noun. before: rows that come before the prompt's."""
    call = named["transformer_options"].get(TEXT)
    options = dict(zip(("mask", "attn_precision", "skip_reshape", "skip_output_reshape"), others, strict=False)) | named
    axis = 2 if options.get("skip_reshape") else 1
    if call is not None and key.shape[axis] >= call.text:
        mask = torch.zeros(1, 1, query.shape[axis], key.shape[axis])
        mask[..., [before + row for row in NOUN]] = float("-inf")
        options["mask"] = mask
    return function(query, key, value, heads, **options)


@each(ACTED_ON)
@pytest.mark.parametrize("lock", ["column", "whole"])
def test_only_the_nouns_column_acts(family, lock):
    """Where nothing looks at the noun nothing moves."""
    blind = family.model.clone()
    override = partial(without_the_noun, 512 - transformers.ROWS if family.name == "flux2" else 0)
    blind.model_options["transformer_options"]["optimized_attention_override"] = override
    patched, found = family.streams(lock, blind)
    customised = family.run(patched, family.carrying(family.placed()), cfg=1.0)
    assert torch.equal(customised, family.finished(found))
    moved = family.run(patched, family.carrying(family.placed(rows=OTHER)), cfg=1.0)
    assert not torch.equal(moved, customised)


@each(["flux", "zimage", "wan"])
@pytest.mark.parametrize("concepts", ["together", "each apart"])
def test_two_concepts_are_held_and_carried_on(family, concepts):
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    both = family.carrying(family.placed(region=left), family.placed(rows=OTHER, seed=6, region=left.flip(1)))
    plain = family.run(family.model, family.conditioning(), steps=4)
    patched, found = family.streams(background="held", concepts=concepts, every=2)
    family.host.streams.FOUNDATIONS.clear()
    customised = family.run(patched, both, steps=4)
    assert torch.equal(family.finished(found), plain) and not torch.equal(customised, plain)
    assert torch.equal(family.run(patched, both, steps=4), customised)  # with F's evaluations of before
    alone = family.run(patched, family.carrying(family.placed(region=left)), steps=4)
    region = left.bool().expand_as(plain)
    assert torch.equal(alone[~region], plain[~region]) and (alone != plain)[region].any()
    assert torch.equal(customised[region], alone[region]) == (concepts == "each apart")


@each(TWO)
def test_the_region_is_found_in_fs_map(family, monkeypatch):
    monkeypatch.setattr(family.kernel.holding.region_of, "__defaults__", (0.95, 0))  # a random model's maps are even
    patched, found = family.streams(background="held")
    customised = family.run(patched, family.carrying(family.placed()))
    plain, region = family.finished(found), family.host.streams.drawn_region(patched, customised)
    outside = (region == 0).view(1, 1, *[1] * (plain.ndim - 4), 8, 8).expand_as(plain)
    assert 0 < outside.float().mean() < 1
    assert torch.equal(customised[outside], plain[outside]) and not torch.equal(customised, plain)


def test_a_family_that_the_host_has_changed_is_refused_by_name(pack, monkeypatch):
    family, families = Family(pack, "flux"), pack.nodes.host.families
    longer = replace(families.FAMILIES["Flux"], text=lambda network: lambda call: call.text + 1)
    monkeypatch.setitem(families.FAMILIES, "Flux", longer)
    patched, _ = family.streams()
    with pytest.raises(RuntimeError, match="Flux.1's attention with text was not seen: another pack or this version"):
        family.run(patched, family.carrying(family.placed()))
    monkeypatch.setitem(families.FAMILIES, "Flux", replace(longer, shape=lambda network: network.gone))
    with pytest.raises(ValueError, match=r"Flux \(Flux\) is not supported: it is not as Flux.1 is known to be"):
        families.acting_on(family.model)


def test_what_comfyui_lets_nobody_see_is_refused_with_what_is_true_of_it(pack):
    model = transformers.shared("pixart")
    with pytest.raises(ValueError, match="PixArt.*it has cross-attention between picture and text, and ComfyUI lets"):
        pack.nodes.host.families.acting_on(model)
    with pytest.raises(ValueError, match="Flux.1 is drawn with by joint attention .*, and this takes a UNet"):
        pack.nodes.host.families.model_layers(transformers.shared("flux"))


@pytest.fixture(scope="module")
def toybox(pack):
    return pack.nodes.host.toybox.load_mmdit(), pack.nodes.host.toybox.load_clip()


@pytest.mark.parametrize("lock", ["column", "whole"])
def test_the_node_draws_on_toyboxs_mmdit(pack, toybox, lock):
    model, clip = toybox
    layers = pack.nodes.host.families.acting_on(model).layers
    delta = torch.randn(len(layers), 1, layers[0].context_dim, generator=torch.Generator().manual_seed(5))
    names, architecture = [layer.name for layer in layers], pack.profusion.infusion.architecture_name(layers)
    assert architecture == f"transformer with {len(layers)} joint attentions of {layers[0].context_dim}"

    def drawn(size, **given):
        told = {"network": "sd3", "adds_to": "value"}
        residual = pack.profusion.residual.Residual(size * delta, "ball", names, architecture, **told)
        node = pack.nodes.infusion.InfusionAttentionPatch
        common = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "occurrence": "auto"}
        inputs = {**common, "stream": "own trajectory", "lock": lock, **given}
        patched, positive = node.execute(model, clip, "a photo of a ball on grass", residual, **inputs).args
        return tiny.sample(patched, positive, negative, **options)

    negative, options = tiny.encode(clip, ""), {"latent": torch.zeros(1, 4, 16, 16), "steps": 2, "scheduler": "simple"}
    plain = tiny.sample(model, tiny.encode(clip, "a photo of a ball on grass"), negative, **options)
    assert torch.equal(drawn(0.0), plain)
    customised = drawn(2.0, background="held")
    moved = (customised != plain).any(1)
    assert moved.any() and not moved.all()
