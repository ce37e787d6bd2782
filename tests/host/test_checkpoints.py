"""Checkpoints in the kernel against the host's own classes, given the same tensors: each part, and pictures to 1e-4."""

import json
from random import Random

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: checkpoints are not compared with the host's classes")

import comfy.clip_vision
import comfy.conds
import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.sd2_clip
import folder_paths
import tiny
from PIL import Image

from profusion import __main__ as program
from profusion import draw_command
from profusion.checkpoints import load_checkpoint, load_image_tower, plan
from profusion.diffusion import denoiser, sample_euler, sampling_sigmas
from profusion.infusion import Placement, on_conditional
from profusion.learning import weights_sample
from profusion.models.chunks import chunks
from profusion.models.conditioning import size_vector
from profusion.models.unet import UNet
from profusion.pipeline import noun_rows, noun_spans
from profusion.residual import save_residual
from profusion.residual.training import TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from profusion.streams import two_stream_denoiser
from tests import shrunken

CONFIGS = {
    "SD 1.x": comfy.supported_models.SD15,
    "SD 2.x": comfy.supported_models.SD20,
    "SDXL": comfy.supported_models.SDXL,
}
PREFIX = "model.diffusion_model."


class Pair:
    """One checkpoint in both: `ours`, and the host's MODEL, CLIP and VAE of it."""

    def __init__(self, family, prediction, folder):
        self.family, self.prediction = family, prediction
        self.tensors = shrunken.checkpoint(family, prediction)
        self.path = shrunken.written(folder / "model.safetensors", self.tensors)
        self.ours = load_checkpoint(self.path)
        self.config = CONFIGS[family](comfy.model_detection.detect_unet_config(dict(self.tensors), PREFIX))
        self.config.set_inference_dtype(torch.float32, None)

    def model(self):
        network = self.config.get_model(self.tensors, PREFIX, torch.device("cpu")).eval()
        network.load_model_weights(dict(self.tensors), PREFIX)
        missing, strange = network.diffusion_model.load_state_dict(
            {name[len(PREFIX) :]: x for name, x in self.tensors.items() if name.startswith(PREFIX)}, strict=True
        )
        assert not missing and not strange
        return comfy.model_patcher.ModelPatcher(
            network, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
        )

    def clip(self):
        target = self.config.clip_target(state_dict=self.tensors)
        names = {"SD 1.x": ["clip_l"], "SD 2.x": ["clip_h"], "SDXL": ["clip_l", "clip_g"]}[self.family]
        options = {"dtype": torch.float32}
        for name, config in zip(names, shrunken.TEXTS[self.family], strict=True):
            options[f"{name}_model_config"] = {
                "hidden_size": config.width,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "intermediate_size": config.intermediate,
                "projection_dim": config.width,
            }
        clip = comfy.sd.CLIP(target, model_options=options)
        state = self.config.process_clip_state_dict(dict(self.tensors))
        missing, _ = clip.load_sd(state, full_model=True)
        allowed = ("logit_scale", "clip_l.transformer.text_projection.weight")
        assert not [name for name in missing if not name.endswith(allowed)]
        return clip

    def vae(self):
        state = {k.removeprefix("first_stage_model."): x for k, x in self.tensors.items() if k.startswith("first")}
        config = shrunken.vae_config(self.family)
        sizes = {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": config.channels,
            "ch_mult": list(config.channel_mult),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        return comfy.sd.VAE(sd=state, config={"params": {"ddconfig": sizes, "embed_dim": 4}}, dtype=torch.float32)


@pytest.fixture(scope="module", params=shrunken.KINDS, ids=lambda kind: "-".join(kind))
def pair(request, tmp_path_factory):
    return Pair(*request.param, tmp_path_factory.mktemp("pair"))


def close(ours, theirs):
    assert ours.shape == theirs.shape and ours.isfinite().all()
    assert ours.std() > 1e-2  # not nothing against nothing
    assert (ours - theirs).abs().max() <= 1e-4


def test_what_the_network_predicts_is_as_the_host_decides(pair):
    theirs = pair.config.model_type(pair.tensors, PREFIX)
    assert theirs.name == {"eps": "EPS", "v": "V_PREDICTION"}[pair.ours.prediction]
    assert pair.ours.prediction == pair.prediction


@torch.no_grad()
def test_unet(pair):
    config = shrunken.UNETS[pair.family]
    x, t, context = torch.randn(2, 4, 9, 8), torch.tensor([30, 900]), torch.randn(2, 77, config.context_dim)
    y = torch.randn(2, config.adm_channels) if config.adm_channels else None
    close(pair.ours.unet(x, t, context, y), pair.model().model.diffusion_model(x, t, context, y=y))


def test_its_weights_are_known_again_in_the_host(pair, pack):
    kernel = StableDiffusion(pair.ours.unet, pair.ours.vae, pair.ours.text, pair.prediction, 16, pair.family)
    sample = weights_sample(kernel)
    assert sample.numbers and sample == tuple(pack.nodes.host.identity.weights_sample(pair.model()))


@torch.no_grad()
def test_vae(pair):
    theirs, pictures = pair.vae(), torch.rand(2, 16, 24, 3)
    mean = theirs.first_stage_model.encode(pictures.movedim(-1, 1) * 2 - 1)
    close(pair.ours.vae.encode(pictures.movedim(-1, 1) * 2 - 1), mean)
    scaled = pair.config.latent_format.process_in(mean)
    close(pair.ours.vae.latents(pictures), scaled)
    decoded = ((theirs.first_stage_model.decode(mean) + 1) / 2).clamp(0, 1).movedim(1, -1)
    close(pair.ours.vae.pictures(scaled), decoded)


def encoded(pair, clip, text):
    context, extras = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    return context, extras["pooled_output"]


@torch.no_grad()
def test_text_towers_and_their_tokens(pair):
    clip = pair.clip()
    contexts, pooled = pair.ours.text.encode(shrunken.PROMPTS)
    for index, prompt in enumerate(shrunken.PROMPTS):
        context, theirs = encoded(pair, clip, prompt)
        close(contexts[index : index + 1], context)
        if pooled is not None:
            close(pooled[index : index + 1], theirs)


LONG = "a quiet, wide street in the old town at dawn, " * 9 + "and on it (a small cat:1.4) that sleeps"
WEIGHED = [
    "a photo of a (cat:1.3) on [grass]",
    "((fluffy)) (cat:0.5), \\(really\\)",
    "(a (red:1.5) ball:0.8) beside (a box",
    LONG,
    "(" + "snow and ice " * 50 + ":1.2) cat",
]


@torch.no_grad()
def test_weights_and_long_prompts_are_encoded_as_by_the_host(pair):
    clip = pair.clip()
    for prompt in WEIGHED:
        (ours, pooled), (theirs, their_pooled) = pair.ours.text.encode(prompt), encoded(pair, clip, prompt)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        if pooled is not None:
            assert (pooled - their_pooled).abs().max() <= 1e-5 * their_pooled.abs().max()
    assert theirs.shape[1] > 77


def test_any_prompt_is_parted_as_by_the_host(pair):
    """Brackets in every order, escaped and not, numbers and none; words that do not fit into what is left."""
    clip, random = pair.clip(), Random(0)
    parts = [
        "(",
        ")",
        ")",
        ":1.2)",
        ":0)",
        ":x)",
        "\\(",
        "\\)",
        ":",
        " ",
        " cat",
        " a very long-winded phrase,",
        "()",
        "\n",
    ]
    for _ in range(300):
        text = "".join(random.choices(parts, k=random.choice([3, 8, 20, 90])))
        for key, theirs in clip.tokenize(text, return_word_ids=True).items():
            ours = chunks(text, pair.ours.text.towers[-1 if key == "g" else 0].sizes.pad)
            assert [[token[:2] for token in chunk] for chunk in ours] == [[x[:2] for x in chunk] for chunk in theirs], (
                text
            )
            words = [[token.part > 0 for token in chunk] for chunk in ours]
            assert words == [[entry[2] > 0 for entry in chunk] for chunk in theirs], text


def test_a_noun_is_found_where_the_node_finds_it(pair, pack):
    placing, clip = pack.nodes.host.placing, pair.clip()
    for prompt in [*WEIGHED, f"cat. {LONG}", "a catalogue", "cat (cat:1.2) CAT", "a snow(cat)"]:
        assert noun_spans(prompt, "cat") == placing.noun_spans(clip, prompt, "cat"), prompt
    assert max(noun_spans(LONG, "cat")[0]) > 77


@torch.no_grad()
def test_the_projected_state_of_sd_2s_tower(tmp_path):
    pair = Pair("SD 2.x", "eps", tmp_path)
    (tower,) = pair.ours.text.towers
    from profusion.models.tokenizer import tokenize

    tokens = tokenize(shrunken.PROMPTS[0], tower.sizes.pad)
    close(tower.project(tower.encode(tokens)[1], tokens), encoded(pair, pair.clip(), shrunken.PROMPTS[0])[1])


@torch.no_grad()
@pytest.mark.parametrize("size", [{}, {"width": 832, "height": 1216, "crop_w": 8, "crop_h": 16, "target_width": 640}])
def test_sdxls_vector_of_sizes(tmp_path, size):
    pair, pooled = Pair("SDXL", "eps", tmp_path), torch.randn(2, 128)
    theirs = pair.model().model.encode_adm(pooled_output=pooled, device=torch.device("cpu"), **size)
    height, width = size.get("height", 768), size.get("width", 768)
    crop = size.get("crop_h", 0), size.get("crop_w", 0)
    close(size_vector(pooled, (height, width), crop, (height, size.get("target_width", width))), theirs)


@torch.no_grad()
def test_an_euler_run_from_the_prompt_to_the_latent(pair):
    """The host's own sampler, guidance and conditionings, and the kernel's."""
    clip, model = pair.clip(), pair.model()
    positive, negative = (tiny.encode(clip, text) for text in shrunken.PROMPTS[:2])
    theirs = tiny.sample(model, positive, negative, scheduler="simple", steps=4, cfg=3.0, size=(8, 8))
    ours, (context, pooled) = pair.ours, pair.ours.text.encode(shrunken.PROMPTS[:2])
    y = None if pooled is None else size_vector(pooled, (64, 64))

    def predict(x_t, t):
        conditional, unconditional = ours.unet(x_t.expand(2, -1, -1, -1), t.expand(2), context, y).chunk(2)
        return unconditional + 3.0 * (conditional - unconditional)

    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(7))
    latent = sample_euler(denoiser(predict, ours.prediction), noise, sampling_sigmas(4))
    theirs = pair.config.latent_format.process_in(theirs)
    assert theirs.std() > 1e-2 and ((latent - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("family", shrunken.FAMILIES)
def test_the_hosts_full_size_networks_are_what_the_kernel_makes_of_their_names(tmp_path, family):
    """Names, shapes and sizes by the host's classes at full size, on no memory at all."""
    parameters = {"SD 1.x": 859_520_964, "SD 2.x": 865_910_724, "SDXL": 2_567_463_684}[family]
    sizes = {
        "SD 1.x": {"num_res_blocks": [2] * 4, "channel_mult": (1, 2, 4, 4), "transformer_depth": [1] * 6 + [0] * 2},
        "SDXL": {"num_res_blocks": [2] * 3, "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 2, 2, 10, 10]},
    }
    outputs = {"SD 1.x": [1] * 9 + [0] * 3, "SDXL": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    like = "SDXL" if family == "SDXL" else "SD 1.x"
    unet = {
        **tiny.UNET,
        **CONFIGS[family].unet_config,
        **sizes[like],
        "transformer_depth_output": outputs[like],
        "transformer_depth_middle": 10 if family == "SDXL" else 1,
        "num_classes": "sequential" if family == "SDXL" else None,
    }
    config = CONFIGS[family](unet)
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "", torch.device("meta")).diffusion_model
    theirs = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    tensors = {name: x for name, x in shrunken.checkpoint(family).items() if not name.startswith(PREFIX)}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()} | {PREFIX + name: x for name, x in theirs.items()}
    made = plan(shrunken.sparse(tmp_path / "model.safetensors", shapes))
    with torch.device("meta"):
        ours = UNet(made.unet)
    assert {name: tuple(x.shape) for name, x in ours.state_dict().items()} == theirs
    assert sum(p.numel() for p in ours.parameters()) == parameters


@torch.no_grad()
@pytest.mark.parametrize("open_clip", [False, True])
@pytest.mark.parametrize("name", shrunken.VISIONS)
def test_the_image_tower_gives_what_promptnet_takes(tmp_path, monkeypatch, name, open_clip):
    """The host's own reader of such a file, which tells it by its names; its sizes are the shrunken ones."""
    config = shrunken.VISIONS[name]
    state = {key: x.half().float() for key, x in shrunken.vision_state(config).items()}  # as the host keeps them
    if open_clip:
        state = {f"visual.{key}": x for key, x in shrunken.as_open_clip(state).items()}
    ours = load_image_tower(shrunken.written(tmp_path / "clip.safetensors", state))
    shrunk = {
        "hidden_size": config.width,
        "intermediate_size": config.intermediate,
        "projection_dim": config.projection,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    read = json.load
    monkeypatch.setattr(comfy.clip_vision.json, "load", lambda file: read(file) | shrunk)
    theirs = comfy.clip_vision.load_clipvision_from_sd(dict(state), "visual." if open_clip else "", open_clip)
    pictures = torch.rand(2, 40, 30, 3)
    output, pixels = theirs.encode_image(pictures), ours.preprocess(pictures)
    close(ours(pixels), output["last_hidden_state"])
    close(ours.embed(pixels), torch.nn.functional.normalize(output["image_embeds"], dim=-1))


def test_a_residual_of_the_kernel_draws_in_the_host_what_it_draws_in_the_kernel(pair, pack, tmp_path):
    """Trained on the checkpoint without a host, loaded by the node's own loader, patched in by the node."""
    from infused import Infused

    kernel = StableDiffusion(pair.ours.unet, pair.ours.vae, pair.ours.text, pair.prediction, 16, pair.family)
    options = TrainingOptions(steps=2, learning_rate=5.0)
    training = kernel.training(torch.rand(1, 16, 16, 3), torch.ones(1, 16, 16), "cat", options)
    list(training.steps())
    path = save_residual(training.residual(), tmp_path / "residual.safetensors", "float32").path
    infused, prompt = Infused(pack, pair.model(), pair.clip()), "a photo of a cat"
    residual = pack.profusion.residual.load_residual(path)
    assert residual.layers == tuple(layer.name for layer in infused.layers)
    patched, positive = infused.patch(residual, text=prompt)
    run = {"negative": infused.encode(""), "scheduler": "simple", "steps": 3, "cfg": 3.0, "size": (8, 8)}
    theirs, foundation = (pair.config.latent_format.process_in(x) for x in infused.run_both(patched, positive, **run))
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(7))
    kernel.size = 64  # what the host takes a latent of 8 cells for, whatever its VAE does
    context, y = kernel.embedded(prompt, (64, 64))
    evaluate = kernel.evaluator(context, 3.0, y)
    placement = Placement(residual.delta, residual.layers, noun_rows(prompt, "cat"))
    denoise = two_stream_denoiser(evaluate, on_conditional([placement]))
    with torch.no_grad():
        plain, ours = sample_euler(denoise, torch.cat([noise, noise]), sampling_sigmas(3)).chunk(2)
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (plain - foundation).abs().max() <= 1e-4 * plain.abs().max()
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_a_residual_of_the_command_line_is_drawn_by_the_node_as_by_the_command_line(pair, pack, tmp_path, monkeypatch):
    """`residual train`, Residual Loader, Infusion Attention Patch and the host's VAE against `draw`."""
    from infused import Infused

    (images := tmp_path / "images").mkdir()
    Image.radial_gradient("L").convert("RGB").save(images / "one.png")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(tmp_path)], {".safetensors"}))
    model = ["--checkpoint", str(pair.path), "--size", "16"]
    path, prompt = tmp_path / "cat.safetensors", "a (cat:1.2) on grass"
    given = ["--images", str(images), "--noun", "cat", "--steps", "2", "--learning-rate", "5", "--out", str(path)]
    assert program.main(["residual", "train", *given, *model]) == 0
    drawn = {}
    keep = draw_command.save_stamped
    monkeypatch.setattr(
        draw_command,
        "save_stamped",
        lambda names, picture, how: (drawn.update({how["stream"]: picture}), keep(names, picture, how))[1],
    )
    given = ["--prompt", prompt, "--negative", "snow", "--residual", str(path), "--out", str(tmp_path / "drawn")]
    assert program.main(["draw", *given, "--seeds", "7", "--steps", "3", "--cfg", "3", *model]) == 0

    infused = Infused(pack, pair.model(), pair.clip())
    residual, noun = pack.nodes.residual.ResidualLoader.execute("cat.safetensors").result
    assert noun == "cat" and residual.origin.base == "model.safetensors"
    assert pack.nodes.host.identity.other_bases([residual], infused.model) == []
    patched, positive = infused.patch(residual, text=prompt)
    # The VAE is shrunken too: where the host takes 8 pixels for a cell, it has 2.
    sized = [
        [[context, {**extras, "width": 16, "height": 16}] for context, extras in conditioning]
        for conditioning in (positive, infused.encode("snow"))
    ]
    run = {"negative": sized[1], "scheduler": "simple", "steps": 3, "cfg": 3.0, "size": (8, 8)}
    vae = pair.vae().first_stage_model
    for stream, latent in zip(("customised", "plain"), infused.run_both(patched, sized[0], **run), strict=True):
        with torch.no_grad():
            theirs = ((vae.decode(latent) + 1) / 2).clamp(0, 1).movedim(1, -1)
        close(drawn[stream][None], theirs)
    assert (drawn["customised"] - drawn["plain"]).abs().max() > 1e-2
