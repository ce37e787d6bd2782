"""Infusion with what others put on a MODEL, a line each: of the host's own nodes, and of packs that are here.

Every line is held to the same: with strength 0 the latent is the plain run's, and so is F, bit for bit; with strength 1
it is another, twice the same; and the concept is in its own prompt's rows and in no others; our node before it or
after. To add a line is to add one to COMPOSITIONS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product

import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import packs  # noqa: E402
from infused import NEGATIVE, PROMPT, seen_by_both  # noqa: E402

NOUN_ROW = 5
TILES = {"size": (12, 16), "steps": 2}
STAR, CUP, LEAF = "a star on snow", "a cup on sand", "a leaf"


@dataclass(frozen=True)
class Composition:
    """build: puts it on a MODEL, `build(infused, model) -> MODEL`. options: of the sampling. slow: the long tail."""

    name: str
    build: Callable
    options: dict = field(default_factory=dict)
    slow: bool = False


def core(module, kind, **inputs):
    """A node of the host's own."""

    def build(infused, model):
        found = getattr(pytest.importorskip(f"comfy_extras.{module}"), kind, None)
        if found is None:
            pytest.skip(f"this ComfyUI has no {kind}")
        return packs.node(found, model=model, **inputs)

    return build


def of_pack(pack, module, kind, inputs):
    """A node of another pack. inputs: `inputs(infused) -> dict`."""

    def build(infused, model):
        packs.load(pack)
        found = getattr(import_module(f"other_pack_{pack.replace('-', '_')}{module}"), kind)
        return packs.node(found, model=model, **inputs(infused))

    return build


def tiled_diffusion(method, at_once):
    def build(infused, model):
        kind = packs.load("ComfyUI-TiledDiffusion").NODE_CLASS_MAPPINGS["TiledDiffusion"]
        tiles = {"tile_width": 64, "tile_height": 64, "tile_overlap": 32, "tile_batch_size": at_once}
        return packs.node(kind, model=model, method=method, **tiles)

    return build


def attention_couple(*others):
    """The base prompt on a part of the picture and each of the others on another."""

    def inputs(infused):
        masks = torch.zeros(1 + len(others), 64, 64)
        for mask, part in zip(masks, masks.new_ones(64, 64).chunk(len(masks), dim=1), strict=True):
            mask[:, : part.shape[1]] = 1
        masks = [mask.roll(number * 64 // len(masks), 1)[None] for number, mask in enumerate(masks)]
        masks[0] = torch.ones(1, 64, 64)
        found = {"base_cond": infused.positive, "base_mask": masks[0]}
        for number, text in enumerate(others, 1):
            found |= {f"cond_{number}": infused.encode(text), f"mask_{number}": masks[number]}
        return found

    return of_pack("ComfyUI-ppm", ".src.nodes_ppm.attention_couple_ppm", "AttentionCouplePPM", inputs)


def ip_adapter(infused):
    """Random weights of the tiny model's widths."""
    generator = torch.Generator().manual_seed(2)
    width, tokens = infused.layers[0].context_dim, 4
    projection = {
        "proj.weight": torch.randn(tokens * width, 16, generator=generator) / 4,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    channels = {1: 32, 25: 32, 31: 64}  # by the pack's numbers: the first input, output 3, the middle
    layers = {
        f"{number}.{name}_ip.weight": torch.randn(channels.get(number, 32), width, generator=generator) / 8
        for number in range(1, 32, 2)
        for name in ("to_k", "to_v")
    }
    embeds = torch.randn(1, 16, generator=generator)
    return {
        "ipadapter": {"image_proj": projection, "ip_adapter": layers},
        "pos_embed": embeds,
        "neg_embed": torch.zeros_like(embeds),
        "weight": 1.0,
        "weight_type": "linear",
        "start_at": 0.0,
        "end_at": 1.0,
    }


def momentum_in_place(infused, model):
    """Guidance whose memory is a tensor that it writes to, in an object."""

    class Momentum:
        def __init__(self):
            self.mean = torch.zeros(1)

        def __call__(self, args):
            self.mean = self.mean * torch.ones_like(args["denoised"]) if self.mean.ndim == 1 else self.mean
            self.mean.mul_(0.7).add_(args["denoised"], alpha=0.3)
            return args["denoised"] + 0.2 * self.mean

    model = model.clone()
    model.set_model_sampler_post_cfg_function(Momentum())
    return model


def attention_that_remembers(infused, model):
    """A patch of the attention that counts in a list of its closure."""
    counted = [0]

    def patch(q, k, v, extra_options):
        counted[0] += 1
        return q * (1 + counted[0] / 500), k, v

    model = model.clone()
    model.set_model_attn1_patch(patch)
    return model


def compiled(infused, model):
    """As the host's TorchCompileModel, with a compiler that needs no time."""
    torch_compile = pytest.importorskip("comfy_api.torch_helpers")
    torch._dynamo.reset()
    model = model.clone()
    options = getattr(import_module("comfy_extras.nodes_torch_compile"), "skip_torch_compile_dict", None)
    torch_compile.set_torch_compile_wrapper(model, backend="eager", options=options and {"guard_filter_fn": options})
    return model


COMPOSITIONS = [
    Composition(
        "APG with momentum", core("nodes_apg", "APG", eta=1.0, norm_threshold=5.0, momentum=-0.5), {"steps": 5}
    ),
    Composition("SAG", core("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0), {"steps": 4}),
    Composition("PAG", core("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)),
    Composition("NAG", core("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    Composition("FreeU_V2", core("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)),
    Composition(
        "HyperTile", core("nodes_hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=0, scale_depth=False)
    ),
    Composition("ToMe", core("nodes_tomesd", "TomePatchModel", ratio=0.3)),
    Composition("RescaleCFG", core("nodes_model_advanced", "RescaleCFG", multiplier=0.7)),
    Composition("CFGZeroStar", core("nodes_cfg", "CFGZeroStar")),
    Composition("CFGNorm", core("nodes_cfg", "CFGNorm", strength=1.0)),
    Composition("Mahiro", core("nodes_mahiro", "Mahiro")),
    Composition("TCFG", core("nodes_tcfg", "TCFG")),
    Composition("FreSca", core("nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.25, freq_cutoff=20)),
    Composition(
        "EasyCache",
        core(
            "nodes_easycache", "EasyCacheNode", reuse_threshold=0.4, start_percent=0.1, end_percent=0.95, verbose=False
        ),
        {"steps": 6},
    ),
    Composition(
        "LazyCache",
        core(
            "nodes_easycache", "LazyCacheNode", reuse_threshold=0.4, start_percent=0.1, end_percent=0.95, verbose=False
        ),
        {"steps": 6},
    ),
    Composition("torch.compile", compiled),
    Composition("memory in an object, written in place", momentum_in_place, {"steps": 4}),
    Composition("memory in a closure, of the attention", attention_that_remembers, {"steps": 4}),
    *[
        Composition(f"TiledDiffusion, {method}, {at_once} at once", tiled_diffusion(method, at_once), TILES)
        for method, at_once in product(("MultiDiffusion", "Mixture of Diffusers"), (1, 4))
    ],
    Composition("TiledDiffusion, 4 at once, batch 2", tiled_diffusion("MultiDiffusion", 4), {**TILES, "batch": 2}),
    *[
        Composition(
            f"AttentionCouple, {1 + len(others)} prompts, batch {batch}, cfg {cfg}",
            attention_couple(*others),
            {"batch": batch, "cfg": cfg},
        )
        for others, batch, cfg in product(((STAR,), (STAR, CUP), (STAR, CUP, LEAF)), (1, 2), (1.0, 4.0))
    ],
    Composition("IPAdapter", of_pack("ComfyUI_IPAdapter_plus", ".IPAdapterPlus", "IPAdapterEmbeds", ip_adapter)),
]


@pytest.fixture(scope="module", autouse=True)
def host():
    with packs.host_as_it_was():
        yield


def watched(infused, model, texts=(PROMPT, NEGATIVE, STAR, CUP, LEAF)):
    """The MODEL, and where its attention's value is another than its context: (prompt, rows) of each call's rows."""
    seen, known = seen_by_both(), {text: infused.encode(text)[0][0][0] for text in texts}

    def note(n, context, value, extra_options):
        for keys, values in zip(context, value, strict=True):
            whose = [text for text, rows in known.items() if rows.shape == keys.shape and torch.equal(rows, keys)]
            moved = (keys != values).any(dim=-1).nonzero().flatten().tolist()
            seen.calls.append((*(whose or ["of nobody"]), *moved))
        return n, context, value

    model = model.clone()
    model.set_model_attn2_patch(note)
    return model, seen


def composed(infused, composition, ours_first, **inputs):
    """The node's two outputs, and the composition on its MODEL or under it."""
    if ours_first:
        model, positive = infused.patch(infused.residual(), **inputs)
        return composition.build(infused, model), positive
    return infused.patch(infused.residual(), composition.build(infused, infused.model), **inputs)


lines = pytest.mark.parametrize(
    "composition",
    [pytest.param(line, marks=pytest.mark.slow) if line.slow else line for line in COMPOSITIONS],
    ids=lambda line: line.name,
)


@pytest.mark.parametrize("ours_first", [False, True], ids=["after it", "before it"])
@lines
def test_a_composition(infused, composition, ours_first):
    options = composition.options
    plain_model = infused.model if composition.name == "torch.compile" else composition.build(infused, infused.model)
    plain = infused.run(plain_model, infused.positive, **options)
    assert plain.isfinite().all()
    zero, positive = composed(infused, composition, ours_first, strength=0.0)
    assert torch.equal(infused.run(zero, positive, **options), plain)
    model, positive = composed(infused, composition, ours_first)
    looked_at, seen = watched(infused, model)
    customised, foundation = infused.run_both(looked_at, positive, **options)
    assert torch.equal(foundation, plain)
    assert customised.isfinite().all() and not torch.equal(customised, plain)
    model, positive = composed(infused, composition, ours_first)
    assert torch.equal(infused.run(model, positive, **options), customised)
    moved = {call for call in seen.calls if len(call) > 1}
    assert moved == {(PROMPT, NOUN_ROW)}


AREAS = [{"area": (8, 5, 0, 0)}, {"area": (8, 4, 0, 4)}, {"area": (5, 8, 3, 0)}, {}]


@pytest.mark.parametrize("areas", [False, True], ids=["whole", "areas"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "line", [line for line in COMPOSITIONS if line.name in ("IPAdapter", "PAG")], ids=lambda line: line.name
)
def test_the_fusion_guider_beside_it(infused, pack, monkeypatch, line, terms, areas):
    """Packs see a positive or a negative at every term, and the terms are weighed as if each had been asked alone."""
    seen = seen_by_both()
    texts = [PROMPT, STAR, CUP, LEAF][:terms]
    entries = [
        [[context, {**extras, **(area if areas else {})}] for context, extras in infused.encode(text)]
        for text, area in zip(texts, AREAS, strict=False)
    ]
    more = {f"conditioning_{number}": entry for number, entry in enumerate(entries[1:], 2)}
    weights = {f"weight_{number}": 0.5 for number in range(2, terms + 1)}
    model = line.build(infused, infused.model)

    def note(n, context, value, extra_options):
        seen.calls.extend(extra_options["cond_or_uncond"])
        return n, context, value

    model.set_model_attn2_patch(note)

    def run():
        guider = pack.nodes.fusion.FusionGuiderNode.execute(
            model, entries[0], 1.0, infused.negative, 5.0, 3.0, 0.8, "dependent", **more, **weights
        ).args[0]
        zeros = torch.zeros(2, 4, 8, 8)
        noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(3))
        sampler, sigmas = samplers.sampler_object("euler"), torch.tensor([9.0, 4.0, 0.0])
        with torch.inference_mode():
            return guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=7)

    together = run()
    assert set(seen.calls) == {0, 1} and together.isfinite().all()
    monkeypatch.setattr(infused.model.model, "memory_required", lambda *args, **kwargs: 1e30)  # each in its own batch
    torch.testing.assert_close(run(), together, rtol=1e-3, atol=1e-3 * together.std().item())


COUPLED = [line for line in COMPOSITIONS if line.name.startswith("AttentionCouple") and "cfg 4" in line.name]


@pytest.mark.parametrize("ours_first", [False, True], ids=["after it", "before it"])
@pytest.mark.parametrize("line", COUPLED, ids=lambda line: line.name)
def test_a_region_beside_attention_couple(infused, line, ours_first):
    """Everywhere is nowhere in particular; a half is another picture, at the same prompt's rows."""
    half = torch.zeros(1, 64, 64)
    half[..., 32:] = 1
    drawn = {}
    for name, region in {"none": None, "white": torch.ones(1, 64, 64), "half": half}.items():
        model, positive = composed(infused, line, ours_first, region=region)
        looked_at, seen = watched(infused, model)
        drawn[name] = infused.run(looked_at, positive, **line.options)
        assert {call for call in seen.calls if len(call) > 1} == {(PROMPT, NOUN_ROW)}
    scale = drawn["none"].std().item()
    torch.testing.assert_close(drawn["white"], drawn["none"], rtol=1e-3, atol=1e-3 * scale)
    assert not torch.allclose(drawn["half"], drawn["none"], atol=1e-2 * scale)


def test_a_region_under_tiles_is_refused_by_name(infused):
    line = next(line for line in COMPOSITIONS if line.name.startswith("TiledDiffusion"))
    model, positive = composed(infused, line, ours_first=False, region=torch.ones(1, 64, 64))
    with pytest.raises(RuntimeError, match=r"leave region unconnected, or remove MultiDiffusion\b.* from the model"):
        infused.run(model, positive, **line.options)


@pytest.mark.slow  # tracing takes its time
@pytest.mark.parametrize("order", ["plain first", "infused first"])
@pytest.mark.parametrize("ours_first", [False, True], ids=["after it", "before it"])
def test_compiled_runs_do_not_meet(infused, order, ours_first):
    """A compiled network keeps the patches of its first call: ours must be in no plain run, and a plain run's not in
    ours."""
    model, positive = composed(infused, Composition("torch.compile", compiled), ours_first)
    plain_model = compiled(infused, infused.model)
    uncompiled = infused.run(infused.model, infused.positive)
    expected = infused.run(*infused.patch(infused.residual()))
    for run in ("plain", "infused", "plain") if order == "plain first" else ("infused", "plain", "infused"):
        if run == "plain":
            torch.testing.assert_close(infused.run(plain_model, infused.positive), uncompiled)
        else:
            assert torch.equal(infused.run(model, positive), expected)


@pytest.mark.parametrize("couple", [False, True], ids=["alone", "with AttentionCouple"])
def test_a_clip_that_makes_two_rows_of_a_token(infused, pack, couple):
    """CLIP NegPip has a key's row and a value's row for each; the noun's value moves, and nothing else."""
    packs.load("ComfyUI-ppm")
    kind = import_module("other_pack_ComfyUI_ppm.src.nodes_ppm.clip_negpip").CLIPNegPip
    model, clip = kind.execute(model=infused.model, clip=infused.clip).args
    own = type(infused)(pack, model, clip)
    if couple:
        own.model = attention_couple(STAR)(own, model)
    assert own.positive[0][0].shape[1] == 2 * infused.positive[0][0].shape[1]
    own.assert_node_exact(batch=2)
    patched, positive = own.patch(own.residual())
    looked_at, seen = watched(infused, patched)
    own.run(looked_at, positive)
    assert {call for call in seen.calls if len(call) > 1} == {(PROMPT, NOUN_ROW)}
    layers = pack.nodes.host.families.model_layers(model)
    _, spans = pack.nodes.host.placing.encode_training_prompts(clip, "ball", layers)
    assert all(len(span) == 2 and span[0] % 2 == 0 for span in spans)


@pytest.mark.parametrize(
    "composition",
    [
        line
        for line in COMPOSITIONS
        if line.options.get("steps", 2) > 2 or line.options.get("batch") == 2 or line.name == "ToMe"
    ],
    ids=lambda line: line.name,
)
def test_a_composition_on_a_shared_latent(infused, composition):
    """There F is evaluated on the way, and leaves nothing behind that a plain run would not."""
    plain = infused.run(composition.build(infused, infused.model), infused.positive, **composition.options)
    model, positive = composed(infused, composition, False, strength=0.0, stream="shared latent")
    assert torch.equal(infused.run(model, positive, **composition.options), plain)
    model, positive = composed(infused, composition, True, stream="shared latent")
    looked_at, seen = watched(infused, model)
    assert not torch.equal(infused.run(looked_at, positive, **composition.options), plain)
    assert {call for call in seen.calls if len(call) > 1} == {(PROMPT, NOUN_ROW)}


def test_what_guidance_remembers_after_a_run_is_what_a_plain_one_leaves(infused):
    """APG looks back at the noise level before, over the end of a run, as in sampling in two parts."""
    momentum = core("nodes_apg", "APG", eta=1.0, norm_threshold=5.0, momentum=-0.5)

    def both(model, positive):
        return [infused.run(model, positive, steps=steps, denoise=share) for steps, share in ((4, 1.0), (2, 0.5))]

    plain = both(momentum(infused, infused.model), infused.positive)
    zero = both(*infused.patch(infused.residual(0.0), momentum(infused, infused.model)))
    assert torch.equal(zero[0], plain[0]) and torch.equal(zero[1], plain[1])
