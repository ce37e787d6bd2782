"""PromptNet in the host, on Toybox's own models in the host's classes: S* in a prompt, anew for
each step, and bad input."""

import importlib
import json
import sys

import pytest
import torch

comfy_samplers = pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import comfy.model_patcher  # noqa: E402
import tiny  # noqa: E402
from live import REPOSITORY  # noqa: E402
from reports import on_report  # noqa: E402

from profusion.toybox.drawing import SIZE  # noqa: E402
from profusion.toybox.pipeline import CELLS  # noqa: E402

TEXT = "a photo of S* on snow"


def modules(pack):
    return {
        name: importlib.import_module(f"{pack.__name__}.{name}")
        for name in (
            "nodes.host.toybox",
            "nodes.host.words",
            "nodes.host.files",
            "nodes.promptnet",
            "nodes.host.fusion",
            "nodes.fusion",
            "profusion.diffusion",
            "profusion.fusion",
            "profusion.promptnet.network",
            "profusion.promptnet.pseudo_word",
            "profusion.toybox.configs",
            "profusion.toybox.pipeline",
            "profusion.toybox.fused",
            "nodes.trainer",
            "profusion.residual",
        )
    }


class Studio:
    """Toybox and a random PromptNet that serves it, and the nodes on them."""

    def __init__(self, pack, second_latent="none"):
        from dataclasses import replace

        self.pack, self.modules = pack, modules(pack)
        models, configs = self.modules["nodes.host.toybox"], self.modules["profusion.toybox.configs"]
        self.model, self.clip = models.load_model(), models.load_clip()
        self.vae, self.clip_vision = models.load_vae(), models.load_clip_vision()
        config = replace(configs.TOYBOX_PROMPTNET, second_latent=second_latent)
        self.promptnet = self.random_promptnet(config)

    def random_promptnet(self, config):
        network = self.modules["profusion.promptnet.network"]
        built = tiny.randomise(network.PromptNet(config), seed=4).eval().requires_grad_(False)
        patcher = comfy.model_patcher.ModelPatcher(built, torch.device("cpu"), torch.device("cpu"))
        return self.modules["nodes.host.words"].LoadedPromptNet(built, patcher, "random")

    def encode(self, text=TEXT, noun="cat", pictures=None, **inputs):
        pictures = self.pictures() if pictures is None else pictures
        arguments = {"promptnet": self.promptnet, "clip": self.clip, "clip_vision": self.clip_vision, "vae": self.vae}
        with torch.inference_mode():
            node = self.modules["nodes.promptnet"].PromptNetEncode
            return node.execute(**{**arguments, "images": pictures, "text": text, "noun": noun, **inputs}).args

    def seed(self, noun="cat", pictures=None, **inputs):
        pictures = self.pictures() if pictures is None else pictures
        arguments = {"promptnet": self.promptnet, "clip": self.clip, "clip_vision": self.clip_vision, "vae": self.vae}
        with torch.inference_mode():
            node = self.modules["nodes.promptnet"].ResidualFromPromptNet
            return node.execute(**{**arguments, "model": self.model, "images": pictures, "noun": noun, **inputs}).args[
                0
            ]

    def pictures(self, count=1, size=SIZE, channels=3, seed=0):
        return torch.rand(count, size, size, channels, generator=torch.Generator().manual_seed(seed))

    def draw(self, positive, model=None, **inputs):
        defaults = {
            "seed": 7,
            "steps": 4,
            "cfg": 4.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
            "latent_image": {"samples": torch.zeros(1, 4, CELLS, CELLS)},
            "fusion_steps": 1,
            "eta": 1.0,
            "fusion_start": 0.0,
            "fusion_end": 1.0,
            "fusion_cfg": 3.0,
            "gamma": 0.8,
            "mode": "dependent",
            "refresh": 1,
        }
        negative = tiny.encode(self.clip, "")
        with torch.inference_mode():
            node = self.modules["nodes.fusion"].FusionKSampler
            arguments = {**defaults, "positive": positive, "negative": negative, **inputs}
            return node.execute(self.model if model is None else model, **arguments).args[0]["samples"]

    def watched(self, seen):
        """The model, noting each evaluation's (sigma, stage, contexts): 0 the first term, 1 the negative, 2 the text.

        Packs see both terms as 0, positive; the host has the last of its conditionings come first in a batch.
        """
        model, stage = self.model.clone(), self.modules["nodes.host.fusion"].STAGE

        def wrapper(apply_model, arguments):
            options, which = arguments["c"]["transformer_options"], arguments["cond_or_uncond"]
            assert set(which) <= {0, 1}
            contexts = {}
            for kind, context in zip(which[::-1], arguments["c"]["c_crossattn"].chunk(len(which))[::-1], strict=True):
                contexts[2 if kind in contexts else kind] = context
            seen.append((float(arguments["timestep"][0]), options.get(stage), contexts))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return model


@pytest.fixture(scope="module")
def studio(pack):
    return Studio(pack)


def test_the_conditioning_is_the_kernels(studio):
    """The node's static context against the kernel's own networks on the same picture: 1e-4."""
    positive, plain = studio.encode()
    toybox = studio.modules["profusion.toybox.pipeline"].Toybox.load()
    picture, network = studio.pictures(), studio.promptnet.network
    latent, tokens = toybox.vae.latents(picture), toybox.vision(toybox.vision.preprocess(picture))
    words = network.embed_all(latent, tokens, torch.tensor(studio.modules["profusion.promptnet.network"].KNOTS))
    expected = studio.modules["profusion.promptnet.pseudo_word"].encode(
        toybox.text, TEXT, words.mean(0, keepdim=True), holds_position=True
    )
    torch.testing.assert_close(positive[0][0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain[0][0], toybox.context("a photo of cat on snow"), rtol=0, atol=1e-4)


def test_the_conditioning_works_in_any_sampler(studio):
    positive, plain = studio.encode()
    negative = tiny.encode(studio.clip, "")
    drawn = [tiny.sample(studio.model, one, negative, size=(CELLS, CELLS)) for one in (positive, plain)]
    assert drawn[0].isfinite().all() and not torch.equal(*drawn)


@pytest.mark.parametrize("both", [False, True])
def test_s_is_made_anew_for_each_level_and_scaled_in_the_fusion_stage(studio, both):
    positive, plain = studio.encode()
    seen = []
    studio.draw(positive, studio.watched(seen), text=plain, gamma=0.5, text_in_fusion=both)
    word = positive[0][1][studio.modules["nodes.host.words"].WORD]
    at = word.contexts(studio.model.get_model_object("model_sampling"), False)
    rows = list(word.rows)
    assert [stage for _, stage, _ in seen] == ["fusion", None] * 3 + [None]
    for sigma, stage, contexts in seen:
        expected = at(None, sigma).clone()
        expected[:, rows] *= 0.5 if stage == "fusion" else 1.0
        assert torch.equal(contexts[0], expected)
        assert set(contexts) == ({0, 1} if stage == "fusion" and not both else {0, 1, 2})
        if 2 in contexts:
            assert torch.equal(contexts[2], plain[0][0])  # the plain text stays what it is
    assert not torch.equal(seen[1][2][0], seen[3][2][0])


def test_what_guides_the_fusion_stage(studio):
    """The conditionings with S*, by their weights; where none of them counts, all that is connected."""
    positive, plain = studio.encode()
    for terms, weights, expected in (
        ([positive, plain], (1.0, 0.5), (1.0, 0.0)),
        ([plain, positive, positive], (0.5, 4.0, 2.0), (0.0, 4.0, 2.0)),
        ([plain, plain], (1.0, 0.5), None),
        ([positive, plain], (0.0, 1.0), None),
    ):
        for both in (False, True):
            guider = studio.modules["nodes.host.fusion"].FusionGuider(studio.model)
            guidance = studio.modules["profusion.fusion"].Guidance(weights)
            guider.set_terms(terms, tiny.encode(studio.clip, ""), guidance, both)
            assert guider.guidance.fusion_weights == (None if both else expected)


def test_s_at_every_level_is_the_kernels_and_made_before_the_run(studio):
    """Between the knots too; the run itself asks neither PromptNet nor the text encoder."""
    positive, _ = studio.encode()
    word = positive[0][1][studio.modules["nodes.host.words"].WORD]
    kernel = importlib.import_module(f"{studio.pack.__name__}.profusion.toybox.fused")
    fused = kernel.FusedToybox(studio.modules["profusion.toybox.pipeline"].Toybox.load(), studio.promptnet.network)
    expected, seen = fused.contexts(TEXT, [studio.pictures()]), []
    hooks = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (studio.promptnet.network.middle_block, studio.clip.cond_stage_model)
    ]
    at = word.contexts(studio.model.get_model_object("model_sampling"), False)
    for t in (999, 800, 640, 130, 0):
        sigma = float(studio.modules["profusion.diffusion"].training_sigmas()[t])
        context = at(None, sigma)
        assert not seen
        torch.testing.assert_close(context, expected(torch.tensor([t]), 1.0), rtol=0, atol=1e-4)
    for hook in hooks:
        hook.remove()


def test_independent_mode_evaluates_s_in_a_prompt_of_its_own(studio):
    seen = []
    positive, plain = studio.encode()
    studio.draw(positive, studio.watched(seen), text=plain, mode="independent", fusion_steps=0)
    alone, _ = studio.encode("a photo of S*")
    word = alone[0][1][studio.modules["nodes.host.words"].WORD]
    at = word.contexts(studio.model.get_model_object("model_sampling"), False)
    for sigma, _, contexts in seen:
        torch.testing.assert_close(contexts[0], at(None, sigma), rtol=0, atol=1e-5)


def test_a_promptnet_that_looks_at_the_noisy_latent_is_asked_at_every_call(pack):
    studio = Studio(pack, "noisy")
    positive, plain = studio.encode()
    seen = []
    latent = {"samples": torch.zeros(2, 4, CELLS, CELLS)}
    drawn = studio.draw(positive, studio.watched(seen), text=plain, latent_image=latent)
    assert drawn.isfinite().all()
    contexts = [contexts[0] for _, _, contexts in seen]
    assert all(not torch.equal(one, other) for one, other in zip(contexts, contexts[1:], strict=False))
    assert not torch.equal(contexts[0][0], contexts[0][1])  # two latents, two words


def test_several_pictures_of_one_thing_give_one_word_whatever_their_order_and_number(studio):
    """As their mean does, which the kernel's own tests pin."""
    one, other = studio.pictures(seed=1), studio.pictures(seed=2)
    word, turned, twice, alone, other_alone = (
        studio.encode(pictures=torch.cat(pictures))[0][0][0]
        for pictures in ((one, other), (other, one), (one, other, one, other), (one,), (other,))
    )
    torch.testing.assert_close(turned, word, rtol=0, atol=1e-4)
    torch.testing.assert_close(twice, word, rtol=0, atol=1e-4)
    assert all((word - single).abs().max() > 1e-2 for single in (alone, other_alone))


def test_weights_and_long_prompts_keep_s_in_its_place(studio):
    plain_rows = studio.encode()[0][0][1]["profusion_word"].rows
    weighted, _ = studio.encode("a photo of (S*:1.4) on snow")
    assert weighted[0][1]["profusion_word"].rows == plain_rows
    assert not torch.equal(weighted[0][0], studio.encode()[0][0][0])
    long, _ = studio.encode("a photo of snow, " * 25 + "S* on grass")
    assert long[0][0].shape[1] == 154 and long[0][1]["profusion_word"].rows[0] > 77
    assert studio.draw(long, fusion_steps=0, steps=2).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_transparent_pictures_are_taken(studio, channels):
    assert studio.encode(pictures=studio.pictures(channels=channels))[0][0][0].isfinite().all()


def test_masks_make_the_rest_grey(studio):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 20:70, 20:70] = 1
    one, other = studio.pictures(seed=1), studio.pictures(seed=1)
    other[:, :10] = 0.9  # outside the mask
    contexts = [studio.encode(pictures=picture, masks=mask)[0][0][0] for picture in (one, other)]
    torch.testing.assert_close(*contexts, rtol=0, atol=1e-5)
    assert not torch.allclose(studio.encode(pictures=one)[0][0][0], contexts[0], rtol=0, atol=1e-4)


def test_a_conditioning_that_was_zeroed_out_stays_so(studio):
    seen = []
    positive, _ = studio.encode()
    zeroed = [[torch.zeros_like(context), dict(extras)] for context, extras in positive]
    studio.draw(zeroed, studio.watched(seen), fusion_steps=0, steps=2)
    assert all(not contexts[0].any() for _, _, contexts in seen)


@pytest.mark.parametrize("refresh", [1, 2])
def test_residuals_and_s_meet_in_one_graph(studio, infused_toybox, refresh):
    """Infusion's two streams under Fusion Sampling: F is the run without residuals, bit for bit."""
    residual = infused_toybox.residual(size=2.0, noun="snow")
    positive, plain = studio.encode()
    expected = studio.draw(positive, text=plain, refresh=refresh)
    patched, placed = infused_toybox.patch(residual, model=studio.model, text="a photo of cat on snow")
    foundations = []
    watched = studio.pack.nodes.host.streams.add_streams(patched, infused_toybox.layers, False, foundations.append)
    customised = studio.draw(positive, watched, text=placed, refresh=refresh)
    assert torch.equal(studio.model.model.process_latent_out(foundations[0].float()), expected)
    assert customised.isfinite().all() and not torch.equal(customised, expected)


def test_a_residual_of_nothing_leaves_kept_differences_as_they_were(studio, infused_toybox):
    """Both streams keep their own: with nothing to add, C is the plain run, too."""
    positive, plain = studio.encode()
    expected = studio.draw(positive, text=plain, refresh=2)
    residual = infused_toybox.residual(size=0.0, noun="snow")
    patched, placed = infused_toybox.patch(residual, model=studio.model, text="a photo of cat on snow")
    assert torch.equal(studio.draw(positive, patched, text=placed, refresh=2), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_residual_from_a_promptnet_is_the_kernel_s(studio, masked):
    kernel, pictures, masks = studio.modules["profusion.toybox.fused"], studio.pictures(2), torch.ones(2, SIZE, SIZE)
    masks[:, :, :40] = 1 - masked
    toybox = studio.modules["profusion.toybox.pipeline"].Toybox.load()
    expected = kernel.FusedToybox(toybox, studio.promptnet.network).seed(pictures, masks, "cat")
    residual = studio.seed(" cat ", pictures, masks=masks if masked else None)
    assert (residual.noun, residual.steps, residual.layers) == ("cat", 0, expected.layers)
    assert residual.architecture == "Toybox" and expected.delta.norm() > 1
    assert (residual.delta - expected.delta).norm() < 1e-3 * expected.delta.norm()


def test_cancel_stops_a_residual_from_a_promptnet(studio):
    import comfy.model_management as management

    reported = []

    def cancel(done, *_):
        reported.append(done)
        management.interrupt_current_processing(done == 2)

    on_report(cancel)
    with pytest.raises(management.InterruptProcessingException):
        studio.seed()
    assert reported == [1, 2]


def test_a_residual_from_a_promptnet_is_drawn_and_saved(studio, infused_toybox, tmp_path):
    residual, files = studio.seed(), studio.modules["profusion.residual"]
    patched, positive = infused_toybox.patch(residual, model=studio.model, text="a photo of cat on snow")
    drawn = [
        tiny.sample(model, positive, tiny.encode(studio.clip, ""), size=(CELLS, CELLS))
        for model in (patched, studio.model)
    ]
    assert drawn[0].isfinite().all() and not torch.equal(*drawn)
    path = files.save_residual(residual, tmp_path / "start.safetensors", "float32").path
    assert torch.equal(files.load_residual(path).delta, residual.delta)
    origin = files.load_residual(path).origin
    sample = sys.modules[f"{studio.pack.__name__}.nodes.host.identity"].weights_sample(studio.model)
    assert origin == residual.origin and origin.sample == sample and sample.numbers
    assert origin.version and origin.day and "a photo of a {}" in origin.prompts


def test_a_training_starts_from_a_residual_from_a_promptnet(studio, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(tmp_path)], {".safetensors"}))
    start, rate = studio.seed(), 0.01
    arguments = {
        "images": studio.pictures(),
        "noun": "cat",
        "steps": 1,
        "learning_rate": rate,
        "batch_size": 1,
        "seed": 5,
        "flip": False,
        "preserve": 1.0,
        "sample_every": 0,
        "sample_prompt": "a %noun%",
        "sample_steps": 1,
        "sample_cfg": 2.0,
    }
    with torch.inference_mode():
        trainer = studio.modules["nodes.trainer"].ResidualTrainer
        trained = trainer.execute(studio.model, studio.clip, studio.vae, **arguments, resume=start).args[0]
    moved = (trained.delta - start.delta).abs()
    assert trained.steps == 1 and trained.seed == 5 and 0 < moved.max() <= 1.01 * rate


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"noun": " "}, "noun=''"),
        ({"noun": "(cat:1.2)"}, "without brackets"),
        ({"pictures": torch.rand(0, SIZE, SIZE, 3)}, "no picture"),
        ({"clip": None}, "clip is None"),
        ({"clip_vision": None}, "clip_vision is None"),
        ({"vae": None}, "vae is None"),
        ({"model": tiny.model}, "trained for Toybox, but the model is UNet with 7 cross-attentions of 64"),
        ({"clip": tiny.clip}, "width 64 and the model takes 128"),
    ],
)
def test_bad_inputs_of_a_residual_from_a_promptnet_are_explained(studio, inputs, message):
    with pytest.raises(ValueError, match=message):
        studio.seed(**{name: value() if callable(value) else value for name, value in inputs.items()})


def test_a_residual_is_placed_in_the_prompt_that_has_s(studio, infused_toybox):
    """At its noun, wherever S* has moved it to; S* stays what it was, and F is the run
    without residuals, bit for bit."""
    text, residual = "a photo of (S*:1.2) on snow", infused_toybox.residual(size=2.0, noun="snow")
    positive, plain = studio.encode(text=text)
    expected = studio.draw(positive, text=plain)
    patched, placed = infused_toybox.patch(residual, model=studio.model, text=text, conditioning=positive)
    (context, extras), host = placed[0], studio.pack.nodes.host.streams
    assert torch.equal(context, positive[0][0]) and host.KEY not in positive[0][1]
    assert extras[studio.modules["nodes.host.words"].WORD] is positive[0][1][studio.modules["nodes.host.words"].WORD]
    (concept,) = extras[host.KEY]
    assert concept.placement.rows == (9,)  # <start> a photo of S* (four pseudo-words) on snow
    foundations = []
    watched = host.add_streams(patched, infused_toybox.layers, False, foundations.append)
    customised = studio.draw(placed, watched, text=plain)
    assert torch.equal(studio.model.model.process_latent_out(foundations[0].float()), expected)
    assert customised.isfinite().all() and not torch.equal(customised, expected)


def test_residuals_are_placed_one_after_another_in_one_conditioning(studio, infused_toybox):
    text = "a star and a ball"
    encoded = tiny.encode(studio.clip, text)
    one, another = infused_toybox.residual(noun="star"), infused_toybox.residual(noun="ball")
    _, placed = infused_toybox.patch(one, model=studio.model, text=text, conditioning=encoded)
    _, placed = infused_toybox.patch(another, model=studio.model, text=text, conditioning=placed)
    _, both = infused_toybox.patch(one, model=studio.model, text=text, residual_2=another)
    key = studio.pack.nodes.host.streams.KEY
    assert [concept.placement.rows for concept in placed[0][1][key]] == [c.placement.rows for c in both[0][1][key]]
    assert torch.equal(placed[0][0], both[0][0])


def test_a_conditioning_with_s_of_another_text_is_refused(studio, infused_toybox):
    positive, _ = studio.encode()
    with pytest.raises(ValueError, match=r"of the prompt 'a photo of S\* on snow', and text is 'a S\* on snow'"):
        infused_toybox.patch(infused_toybox.residual(noun="snow"), text="a S* on snow", conditioning=positive)


# Pictures and latents of any size


def shown_under(studio, pictures, **inputs):
    """What PromptNet Encode shows: its text, and the size of its picture."""
    node = studio.modules["nodes.promptnet"].PromptNetEncode
    parts = {"promptnet": studio.promptnet, "clip": studio.clip, "clip_vision": studio.clip_vision, "vae": studio.vae}
    with torch.inference_mode():
        made = node.execute(**parts, images=pictures, text=TEXT, noun="cat", **inputs)
    return made.ui["text"][0], made.ui["images"]


def test_a_reference_of_any_shape_is_brought_to_the_native_frame_as_in_training(studio):
    from PIL import Image

    pictures_of = sys.modules[f"{studio.pack.__name__}.profusion.pictures"]
    wide = torch.rand(1, 200, 300, 3, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    square = pictures_of.to_image(wide[0]).crop((50, 0, 250, 200)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    framed = pictures_of.from_image(square)[None]
    assert torch.equal(studio.encode(pictures=wide)[0][0][0], studio.encode(pictures=framed)[0][0][0])
    text, images = shown_under(studio, wide)
    seen = f"PromptNet sees 1 picture of {SIZE}x{SIZE} pixels"
    assert text == f"{seen}, cropped and resized from 300x200" and len(images) == 1
    assert shown_under(studio, framed)[0] == seen
    mixed, _ = studio.encode(pictures=[wide, framed, torch.rand(40, 40, 4)])
    assert mixed[0][0].isfinite().all()


def test_a_mask_says_where_to_crop(studio):
    wide = studio.pictures().repeat(1, 1, 3, 1)
    mask, around = torch.zeros(1, SIZE, 3 * SIZE), slice(230 - SIZE // 2, 230 + SIZE // 2)
    mask[:, 20:60, 210:250] = 1
    seen = sys.modules[f"{studio.pack.__name__}.profusion.references"].framed
    gathered = sys.modules[f"{studio.pack.__name__}.profusion.references"].gather(wide, mask)
    pictures, weights, _ = seen(gathered, SIZE)
    assert torch.equal(pictures[0], wide[0, :, around]) and weights.sum() == 1600
    alone = studio.encode(pictures=wide[:, :, around], masks=mask[:, :, around])
    assert torch.equal(studio.encode(pictures=wide, masks=mask)[0][0][0], alone[0][0][0])


@pytest.mark.parametrize("size", [(12, 20), (2 * CELLS, CELLS), (CELLS, CELLS), (6, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_promptnet_that_sees_the_noise_draws_at_any_size(pack, size, batch):
    noisy = Studio(pack, "noisy")
    positive, plain = noisy.encode(pictures=noisy.pictures(size=160)[:, :100])
    latent = {"samples": torch.zeros(batch, 4, *size)}
    for more in ({}, {"text": plain}, {"mode": "independent"}):
        drawn = noisy.draw(positive, latent_image=latent, steps=2, **more)
        assert drawn.shape == (batch, 4, *size) and drawn.isfinite().all()
    drawn = tiny.sample(noisy.model, positive, tiny.encode(noisy.clip, ""), size=size, batch=batch)
    assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "a photo of a cat"}, r"no S\* in the prompt 'a photo of a cat'"),
        ({"text": "S* and S*"}, r"S\* is 2 times in the prompt"),
        ({"text": ""}, r"no S\* in the prompt"),
        ({"noun": " "}, "no class noun"),
        ({"pictures": torch.rand(1, 3, 3, 3)}, "3"),
        ({"pictures": torch.rand(0, SIZE, SIZE, 3)}, "no picture"),
        ({"clip": None}, "clip is None"),
        ({"clip_vision": None}, "clip_vision is None"),
        ({"vae": None}, "vae is None"),
    ],
)
def test_bad_inputs_are_explained(studio, inputs, message):
    with pytest.raises(ValueError, match=message):
        studio.encode(**inputs)


def test_a_promptnet_of_another_width_is_refused_by_both_widths(studio):
    from dataclasses import replace

    config = studio.modules["profusion.toybox.configs"].TOYBOX_PROMPTNET
    with pytest.raises(ValueError, match=r"width 96 .*width 128"):
        studio.encode(promptnet=studio.random_promptnet(replace(config, text_widths=(96,))))
    with pytest.raises(ValueError, match=r"width 64.*width 128"):
        studio.encode(promptnet=studio.random_promptnet(replace(config, image_width=64)))


def test_the_loader_says_what_is_missing(pack, tmp_path):
    loader = modules(pack)["nodes.promptnet"].PromptNetLoader
    assert "There is no PromptNet 'nothing.safetensors'" in loader.validate_inputs("nothing.safetensors")
    assert loader.validate_inputs(None) is True


def test_the_loader_loads_a_file_of_the_folder(studio, tmp_path, monkeypatch):
    import folder_paths

    save = sys.modules[f"{studio.pack.__name__}.profusion.promptnet.file"].save_promptnet
    nodes, folders = studio.modules["nodes.promptnet"], studio.modules["nodes.host.files"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.PROMPTNETS, ([str(tmp_path)], {".safetensors"}))
    save(studio.promptnet.network, tmp_path / "mine.safetensors", "float32")
    assert nodes.PromptNetLoader.validate_inputs("mine.safetensors") is True
    loaded = nodes.PromptNetLoader.execute("mine.safetensors").args[0]
    assert loaded.name == "mine" and loaded.config == studio.promptnet.config
    first, kept = studio.encode(promptnet=loaded)[0][0][0], studio.encode()[0][0][0]
    torch.testing.assert_close(first, kept, rtol=0, atol=1e-5)
    before = nodes.PromptNetLoader.fingerprint_inputs("mine.safetensors")
    save(studio.promptnet.network, tmp_path / "mine.safetensors", "float16")
    assert nodes.PromptNetLoader.fingerprint_inputs("mine.safetensors") != before


def test_the_authors_release_is_read_as_it_is(studio, tmp_path, monkeypatch):
    from dataclasses import replace

    import folder_paths

    file = sys.modules[f"{studio.pack.__name__}.profusion.promptnet.file"]
    nodes, folders = studio.modules["nodes.promptnet"], studio.modules["nodes.host.files"]
    network = studio.modules["profusion.promptnet.network"]
    configs = studio.modules["profusion.toybox.configs"]
    config = replace(configs.TOYBOX_PROMPTNET, second_latent="noisy", normalise=False, holds_position=True, tokens=1)
    written = tiny.randomise(network.PromptNet(config), seed=5).state_dict()
    named = {
        file.diffusers_name(name, config.unet): value
        for name, value in written.items()
        if name not in ("start", "spread")
    }
    suffixes = folder_paths.folder_names_and_paths[folders.PROMPTNETS][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.PROMPTNETS, ([str(tmp_path)], suffixes))
    torch.save(named, tmp_path / "released.bin")
    assert "released.bin" in folder_paths.get_filename_list(folders.PROMPTNETS)
    loaded = nodes.PromptNetLoader.execute("released.bin").args[0].network
    assert loaded.config.with_noise and loaded.config.holds_position and not loaded.config.normalise
    for name, value in written.items():
        if name not in ("start", "spread"):
            assert torch.equal(loaded.state_dict()[name], value), name
    pipeline = tmp_path / "pretrained" / "promptnet"
    pipeline.mkdir(parents=True)
    torch.save({f"module.{name}": value for name, value in named.items()}, pipeline / "diffusion_pytorch_model.bin")
    said = {"_class_name": "PromptNetModel", "with_noise": False, "attention_head_dim": config.unet.num_heads}
    widths = [mult * config.unet.model_channels for mult in config.unet.channel_mult]
    (pipeline / "config.json").write_text(json.dumps({**said, "block_out_channels": widths}))
    again = nodes.PromptNetLoader.execute("pretrained/promptnet/diffusion_pytorch_model.bin").args[0].network
    assert again.config.second_latent == "reference" and again.config.unet == config.unet
    assert again.state_dict().keys() == loaded.state_dict().keys()
    (pipeline / "config.json").write_text(json.dumps({**said, "_class_name": "UNet2DConditionModel"}))
    shown = nodes.PromptNetLoader.execute("pretrained/promptnet/diffusion_pytorch_model.bin")
    assert shown.args[0].config.with_noise
    assert "config.json' is of 'UNet2DConditionModel' and not PromptNetModel, so it was not used" in shown.ui["text"][0]
    (pipeline / "config.json").write_text("{")
    with pytest.raises(network.PromptNetError, match="config.json' beside it cannot be read as JSON"):
        nodes.PromptNetLoader.execute("pretrained/promptnet/diffusion_pytorch_model.bin")
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.bin")
    (tmp_path / "damaged.bin").write_bytes(b"not a checkpoint")
    torch.save([torch.zeros(3)], tmp_path / "list.bin")
    torch.save((torch.zeros(3),), tmp_path / "tuple.bin")
    torch.save(torch.zeros(3), tmp_path / "tensor.bin")
    torch.save(torch.nn.Parameter(torch.zeros(3)), tmp_path / "parameter.bin")
    for name, said in {"list": "a list", "tuple": "a list", "tensor": "one tensor", "parameter": "one tensor"}.items():
        with pytest.raises(network.PromptNetError, match=f"it is {said}.* without a name"):
            nodes.PromptNetLoader.execute(f"{name}.bin")
    file.save_promptnet(loaded, tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename(tmp_path / "mine.bin")
    assert nodes.PromptNetLoader.execute("mine.bin").args[0].config == loaded.config
    for name in ("other.bin", "damaged.bin"):
        with pytest.raises(network.PromptNetError, match="authors' released checkpoint"):
            nodes.PromptNetLoader.execute(name)


def test_the_schemas_are_valid(pack):
    for node in modules(pack)["nodes.promptnet"].NODES:
        schema = node.GET_SCHEMA()
        assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
        assert (REPOSITORY / "web" / "docs" / f"{schema.node_id}.md").read_text().startswith(f"# {schema.display_name}")


# Hooks on the text encoder


def hooked(clip, change, schedule):
    """Core's Set CLIP Hooks: a LoRA on the text encoder in the second half of sampling."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    hook, keyframes, group = comfy.hooks.WeightHook(), comfy.hooks.HookKeyframeGroup(), comfy.hooks.HookGroup()
    hook.need_weight_init, hook.weights, hook.weights_clip = False, {}, change
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength, start))
    group.add(hook)
    group.set_keyframes_on_hooks(keyframes)
    return SetClipHooks().apply_hooks(clip.clone(), schedule, True, group)[0]


@pytest.mark.parametrize("second_latent", ["none", "noisy"])
def test_scheduled_hooks_of_the_text_encoder_hold_for_s_too(pack, second_latent):
    studio = Studio(pack, second_latent)
    name = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    shape = studio.clip.patcher.model.state_dict()[name].shape
    change = {name: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(3)),))}
    sampling, x = studio.model.get_model_object("model_sampling"), torch.ones(1, 4, 12, 12)

    def said(clip):
        """Each entry's static context, the one at a noise level, and the rest of the entry."""
        positive, plain = studio.encode(clip=clip)
        words = [extras[studio.modules["nodes.host.words"].WORD] for _, extras in positive]
        return [(word.context, word.contexts(sampling, False)(x, 5.0)) for word in words], positive, plain

    lora = studio.clip.clone()
    lora.add_patches(change)
    (before,), *_ = said(studio.clip)
    (after,), *_ = said(lora)
    (first, second), positive, plain = said(hooked(studio.clip, change, schedule=True))
    assert all(map(torch.equal, first, before)) and not any(map(torch.equal, before, after))
    assert all(map(torch.equal, second, after))
    for (_, ours), (_, theirs) in zip(positive, plain, strict=True):
        assert theirs.keys() <= ours.keys() and "hooks" in ours
        assert ours["clip_start_percent"] == theirs["clip_start_percent"]
    assert studio.draw(positive).isfinite().all()


def test_hooks_without_a_schedule_hold_for_s_too(studio):
    positive, plain = studio.encode(clip=hooked(studio.clip, {}, schedule=False))
    assert positive[0][1]["hooks"] is plain[0][1]["hooks"]
