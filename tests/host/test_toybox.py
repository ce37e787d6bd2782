"""Toybox in the host's own classes: the same files, loaded strictly, give the kernel's numbers to 1e-4."""

import inspect

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: Toybox in the host is not tested")

from profusion.models.clip import TextModel, VisionModel
from profusion.models.mmdit import MMDiT
from profusion.models.tokenizer import tokenize
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.toybox.configs import TOYBOX, TOYBOX_MMDIT, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION
from profusion.toybox.drawing import SIZE
from profusion.toybox.joint import JointToybox
from profusion.toybox.pipeline import CELLS, WEIGHTS, Toybox, save_network, save_weights
from training.vision import write_host_config

PROMPT = "a photo of a red and white striped ball by a brick wall"


@pytest.fixture(scope="module", params=["random", "shipped"])
def folder(request, tmp_path_factory):
    if request.param == "shipped":
        if not (WEIGHTS / "toybox_unet.safetensors").exists():
            pytest.skip("no Toybox weights are shipped yet")
        return None
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toybox")
    networks = {
        "unet": UNet(TOYBOX),
        "vae": VAE(TOYBOX_VAE),
        "text": TextModel(TOYBOX_TEXT),
        "vision": VisionModel(TOYBOX_VISION),
    }
    save_weights(folder, **networks, tokens=torch.unique(tokenize(PROMPT)))
    write_host_config(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    return Toybox.load(folder)


@pytest.fixture(scope="module")
def models(pack):
    from profusion_pack.nodes.host import toybox

    return toybox


@pytest.fixture(scope="module")
def joint_kernel(folder, tmp_path_factory):
    """The joint-attention model beside the folder's text tower and autoencoder."""
    if folder is None and not (WEIGHTS / "toybox_mmdit.safetensors").exists():
        pytest.skip("no Toybox MMDiT is shipped yet")
    if folder is not None:
        torch.manual_seed(1)
        save_network("mmdit", MMDiT(TOYBOX_MMDIT), folder)
    return JointToybox.load(folder)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_unet(models, kernel, folder):
    model = models.load_model(folder).model
    x, t, context = torch.randn(2, 4, CELLS, CELLS), torch.tensor([30, 900]), kernel.context([PROMPT, ""])
    close(kernel.unet(x, t, context), model.diffusion_model(x, t, context))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_mmdit(models, joint_kernel, folder, size):
    """At sizes of its own and of others: places are computed, not kept in the file."""
    network = models.load_mmdit(folder).model.diffusion_model
    x, t, context = torch.randn(2, 4, *size), torch.tensor([30.5, 900]), joint_kernel.context([PROMPT, ""])
    close(joint_kernel.mmdit(x, t, context), network(x, t, context))


def test_the_hosts_own_detection_knows_the_mmdit(joint_kernel):
    """Whatever reads checkpoints sees SD3's layout in the file."""
    from comfy.model_detection import detect_unet_config

    found = detect_unet_config(joint_kernel.mmdit.state_dict(), "")
    assert (found["depth"], found["patch_size"], found["in_channels"]) == (3, 2, 4)
    assert found["context_embedder_config"]["params"] == {"in_features": 128, "out_features": 192}


@torch.no_grad()
def test_text_tower_and_tokenizer(models, kernel, folder):
    clip = models.load_clip(folder=folder)
    context, extras = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))[0]
    close(kernel.context(PROMPT), context)
    projected = torch.nn.functional.normalize(kernel.text.text_projection(extras["pooled_output"]), dim=-1)
    close(kernel.text.embed(tokenize(PROMPT)), projected)


@torch.no_grad()
def test_vae(models, kernel, folder):
    vae = models.load_vae(folder)
    pictures = torch.rand(2, 96, 64, 3)
    latents = vae.encode(pictures)
    close(kernel.vae.latents(pictures), latents * TOYBOX_VAE.scale_factor)
    close(kernel.vae.pictures(latents * TOYBOX_VAE.scale_factor), vae.decode(latents))


@torch.no_grad()
def test_image_tower(models, kernel, folder):
    vision = models.load_clip_vision(folder)
    for size in (96, SIZE, 170):
        pictures = torch.rand(2, size, size + 20, 3)
        encoded = vision.encode_image(pictures)
        pixels = kernel.vision.preprocess(pictures)
        close(kernel.vision(pixels), encoded["last_hidden_state"])
        close(kernel.vision.embed(pixels), torch.nn.functional.normalize(encoded["image_embeds"], dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("base", ["load_model", "load_mmdit"])
def test_a_whole_picture(request, models, kernel, folder, base):
    """The host's euler on its "simple" schedule draws the kernel's picture."""
    import comfy.sample

    from profusion.toybox.pipeline import initial_noise, seeded

    ours = request.getfixturevalue("joint_kernel") if base == "load_mmdit" else kernel
    model, clip = getattr(models, base)(folder), models.load_clip(folder=folder)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
    noise = initial_noise(seeded(5))
    theirs = comfy.sample.sample(
        model, noise, 6, 4.0, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=0, disable_pbar=True
    )
    ours = ours.generate([PROMPT], seeded(5), steps=6, guidance=4.0) / TOYBOX_VAE.scale_factor
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("base", ["load_model", "load_mmdit"])
def test_the_host_can_load_the_model_anew(request, models, folder, base):
    """As newer hosts do to train on it, and for each further GPU."""
    if base == "load_mmdit":
        request.getfixturevalue("joint_kernel")
    model = getattr(models, base)(folder)
    load, arguments = model.cached_patcher_init
    anew = load(*arguments, disable_dynamic=True)
    assert anew.model is not model.model
    ours, theirs = model.model.state_dict(), anew.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if "force_deepcopy" in inspect.signature(model.clone).parameters:  # what core's Train LoRA calls
        assert model.clone(force_deepcopy=True).model is not model.model


def test_the_loader_node_gives_all_four(pack):
    if not (WEIGHTS / "toybox_unet.safetensors").exists():
        pytest.skip("no Toybox weights are shipped yet")
    from profusion_pack.nodes.toybox import ToyboxLoader

    model, clip, vae, vision, pictures, masks, noun = ToyboxLoader.execute("gold and navy cup", 3, 0).result
    assert pictures.shape == (3, SIZE, SIZE, 3) and masks.shape == (3, SIZE, SIZE) and noun == "cup"
    assert (
        model.model.diffusion_model is not None
        and clip.tokenizer
        and vae.downscale_ratio == 8
        and vision.image_size == SIZE
    )
