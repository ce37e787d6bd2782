"""PromptNet Trainer in a real ComfyUI: on Toybox as the kernel trains, and on tiny models of SD's shapes."""

import importlib
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402
from reports import on_report  # noqa: E402
from test_checkpoints import Pair  # noqa: E402
from test_finetune_nodes import PooledVision, fingerprint, same, values  # noqa: E402

from tests import shrunken  # noqa: E402

RATE, GRID = 1e-3, 2


@pytest.fixture(scope="module")
def host(pack):
    """The pack's modules that are tested here."""
    nodes = {
        name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}")
        for name in (
            "pretrain",
            "promptnet",
            "host.pretraining",
            "host.picture_folders",
            "host.words",
            "host.weights",
            "host.toybox",
            "host.display",
        )
    }
    names = (
        "promptnet.network",
        "promptnet.training",
        "promptnet.unfinished",
        "promptnet.file",
        "toybox.pipeline",
        "toybox.promptnet",
        "toybox.configs",
        "toybox.picture_sets",
        "models.configs",
        "loop",
        "keeping",
        "references",
    )
    kernel = {
        f"{name.replace('.', '_')}": importlib.import_module(f"{pack.__name__}.profusion.{name}") for name in names
    }
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's folders of PromptNets and of inputs, moved to empty places."""
    import folder_paths

    entry = ([str(tmp_path / "profusion_promptnets")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_promptnets", entry)
    folder_paths.filename_list_cache.clear()
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path


@pytest.fixture(autouse=True)
def small(host, monkeypatch):
    """Pictures of 32 x 32 pixels for models that nobody knows, in place of 128 x 128."""
    network = host.promptnet_network
    usual = network.PromptNetConfig
    monkeypatch.setattr(host.pretraining, "PromptNetConfig", lambda *more: usual(*more, grid=GRID, projection=8))


def defaults(**inputs):
    return {
        "folder": "none",
        "images": pictures(12),
        "steps": 3,
        "learning_rate": RATE,
        "batch_size": 2,
        "seed": 0,
        "filename_prefix": "me/cat",
        "sample_every": 0,
        "sample_steps": 1,
        **inputs,
    }


@pytest.fixture
def train(host, clip, folders):
    """Run the node as the host does, in inference mode: -> (PROMPTNET, file, loss plot, samples)."""

    def run(**inputs):
        with torch.inference_mode():
            given = {"clip": clip, "clip_vision": PooledVision(), "vae": PooledVae()}
            given |= {} if "model" in inputs else {"model": tiny.model()}
            return host.pretrain.PromptNetTrainer.execute(**{**given, **defaults(), **inputs}).args

    yield run
    host.promptnet_unfinished.unsaved.clear()


def framed(host, given, side):
    """A picture (1, H, W, 3) as a square."""
    return host.references.framed(host.references.gather(given), side).pictures[0]


# What comes out


def test_it_gives_a_promptnet_its_file_a_plot_and_samples(host, train, folders, clip):
    model, seen = tiny.model(), []
    untouched = fingerprint(model, clip)
    on_report(lambda done, total, _: seen.append((done, total)))
    made, name, plot, samples = train(model=model)
    assert fingerprint(model, clip) == untouched
    assert name == str(Path("me") / "cat_00001_.safetensors") and plot.shape == (1, 288, 512, 3)
    assert samples.shape == (2, 32, 32, 3) and torch.equal(samples[1], framed(host, pictures(12)[6:7], 32))
    saved = host.promptnet_file.load_promptnet(folders / "profusion_promptnets" / name, torch.float16)
    assert same(values(saved), values(made.network.half()))
    assert (12, 12) in seen and (3, 3) in seen
    assert not any(value.requires_grad for value in made.network.parameters())


def test_the_next_file_has_the_next_number_and_the_same_seed_trains_the_same(train, folders):
    first, again, other = train(steps=2), train(steps=2), train(steps=2, seed=1)
    names = [Path(one[1]).name for one in (first, again, other)]
    assert names == [f"cat_0000{number}_.safetensors" for number in (1, 2, 3)]
    assert same(values(first[0].network), values(again[0].network))
    assert not same(values(first[0].network), values(other[0].network))


# Where it starts


def starting(host, clip, **inputs):
    """A training that has not begun."""
    with torch.inference_mode():
        given = {
            "model": tiny.model(),
            "clip": clip,
            "clip_vision": PooledVision(),
            "vae": PooledVae(),
            "given": host.picture_folders.sources("none", pictures(3)),
            "options": host.promptnet_training.PromptNetOptions(batch_size=2),
            "beginning": host.pretraining.Beginning(),
        }
        return host.pretraining.Pretraining(**{**given, **inputs})


def test_the_encoder_is_the_unets_and_the_word_is_the_mean_of_all_words(host, clip):
    made = starting(host, clip)
    network, unet = made.training.network, tiny.model().model.diffusion_model.state_dict()
    encoder = [name for name in network.state_dict() if name.startswith(host.promptnet_network.ENCODER)]
    assert len(encoder) > 50 and all(torch.equal(network.state_dict()[name], unet[name]) for name in encoder)
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    torch.testing.assert_close(network.start, table.mean(0).expand(1, -1))
    torch.testing.assert_close(network.spread * network.output.weight[0].numel() ** 0.5, table.std(0))
    latent = torch.randn(2, 4, 8, 8)
    word = network(latent, torch.tensor([5, 900]), torch.randn(2, 25, 20))
    assert torch.equal(word, network.start.expand(2, -1, -1))


def test_it_may_start_from_a_word_with_more_pseudo_words_and_noise(host, clip):
    made = starting(host, clip, beginning=host.pretraining.Beginning(3, True, "cat"))
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    config = made.training.network.config
    assert config.tokens == 3 and config.with_noise
    assert torch.equal(made.training.network.start, table[2368].expand(3, -1))


@pytest.mark.parametrize("loaded", [False, True])
def test_patches_on_the_model_are_no_part_of_the_start(host, clip, loaded):
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    model = tiny.model()
    before = model.model.diffusion_model.state_dict()[name.partition(".")[2]].clone()
    model.add_patches({name: ("diff", (torch.ones_like(before),))})
    if loaded:
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        assert not torch.equal(model.model.diffusion_model.state_dict()[name.partition(".")[2]], before)
    start = starting(host, clip, model=model).training.network.state_dict()
    assert torch.equal(start[name.partition(".")[2]], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_half_precision_and_less_are_read(host, clip, dtype):
    with torch.inference_mode():
        model = tiny.model(dtype, torch.float32)
    unet = model.model.diffusion_model.state_dict()
    network = starting(host, clip, model=model).training.network
    weight = network.state_dict()["input_blocks.1.1.proj_in.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, unet["input_blocks.1.1.proj_in.weight"].float())


class Packed(torch.Tensor):
    """As packs have it that quantise: a tensor whose numbers are no weights."""


@pytest.mark.parametrize("how", ["packed", "whole numbers", "meta"])
def test_weights_that_cannot_be_read_are_named(host, clip, how):
    model = tiny.model()
    layer = model.model.diffusion_model.middle_block[0].in_layers[2]
    made = {
        "packed": lambda: torch.nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False),
        "whole numbers": lambda: torch.nn.Parameter(layer.weight.data.to(torch.uint8), requires_grad=False),
        "meta": lambda: torch.nn.Parameter(layer.weight.data.to("meta")),
    }[how]()
    del layer.weight
    layer.weight = made
    said = {"packed": r"Packed", "whole numbers": r"torch\.uint8", "meta": "not in memory"}[how]
    with pytest.raises(ValueError, match=rf"weights of BaseModel, and .*middle_block\.0\.in_layers\.2\.weight.*{said}"):
        starting(host, clip, model=model)


# The same as the kernel's


def test_on_toybox_it_trains_what_the_command_line_trains(host, folders):
    """The pictures as encoded, the network it starts from, the first gradient, and three steps: 1e-5."""
    toybox = host.toybox_pipeline.Toybox.load()
    drawn = torch.stack(list(host.toybox_picture_sets.drawn_pictures(9, 3)))
    options = host.promptnet_training.PromptNetOptions(
        steps=3, learning_rate=3e-4, batch_size=4, seed=5, warmup=2, cosine=True, weight_cap=20.0, level_bias=1.0
    )
    network = host.toybox_promptnet.new_promptnet(toybox, seed=5)
    with torch.inference_mode():
        models = host.toybox
        made = host.pretraining.Pretraining(
            models.load_model(),
            models.load_clip(),
            models.load_clip_vision(),
            models.load_vae(),
            host.picture_folders.sources("none", drawn),
            options,
            host.pretraining.Beginning(),
        )
    found = made.training
    assert found.network.config == network.config
    torch.testing.assert_close(values(found.network), values(network), rtol=0, atol=1e-6)
    kernels = host.toybox_picture_sets.encoded_pictures(toybox, drawn)
    torch.testing.assert_close(made.given.pictures.latents, kernels.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.given.pictures.image_tokens, kernels.image_tokens, rtol=2e-3, atol=1e-3)  # float16
    # Of the same pictures: where rounding to float16 fell the other way, tokens differ by more than 1e-5.
    expected = host.toybox_promptnet.toybox_training(toybox, network, made.given.pictures, options)

    def first_step(training):
        with torch.no_grad():  # at first it is zero, and nothing else would have a gradient
            weight = training.network.output.weight
            weight.copy_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)))
        for _ in training.steps():
            return {name: one.grad.clone() for name, one in training.network.named_parameters()}

    theirs = first_step(expected)
    ours = {}
    with torch.inference_mode():
        made.evaluating(lambda: ours.update(first_step(found)))
    assert theirs.keys() == ours.keys() and all(gradient.any() for gradient in theirs.values())
    mine, kernel = (torch.cat([made[name].flatten() for name in theirs]) for made in (ours, theirs))
    assert (mine - kernel).norm() <= 1e-5 * kernel.norm()
    for _ in expected.steps():
        pass
    with torch.inference_mode():
        made.evaluating(lambda: [None for _ in found.steps()])
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)


# From another PromptNet on


def test_it_goes_on_from_a_promptnet_and_leaves_that_as_it_is(host, train):
    first = train(steps=2)[0]
    before = values(first.network)
    made = train(steps=2, seed=1, promptnet=first)[0]
    assert same(values(first.network), before) and made.config == first.config
    assert torch.equal(made.network.start, first.network.start)
    assert not same(values(made.network), before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": 3}, "tokens=3 is for a new PromptNet"),
        ({"with_noise": True}, "with_noise is for a new PromptNet"),
        ({"start_word": "cat"}, "start_word='cat' is for a new PromptNet"),
        ({"model": tiny.model(channel_mult=(1, 2, 2), num_res_blocks=[1] * 3, transformer_depth=[1] * 3,
                              transformer_depth_output=[1] * 6)}, "was trained for UNet with 7 .* but the model is"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_connected_promptnet_is_refused(train, inputs, message):
    first = train(steps=1)[0]
    with pytest.raises(ValueError, match=message):
        train(promptnet=first, **inputs)


# Models of other families


@pytest.fixture(scope="module", params=["SD 1.x", "SD 2.x", "SDXL"])
def pair(request, tmp_path_factory):
    """A shrunken checkpoint of a family in the host's own classes."""
    kind = "v" if request.param == "SD 2.x" else "eps"
    return Pair(request.param, kind, tmp_path_factory.mktemp("pair"))


def test_models_of_every_family_train_and_are_encoded_with(host, folders, pair):
    """Shrunken random ones. The file goes through PromptNet Loader and PromptNet Encode with the same models."""
    model, clip, vae = pair.model(), pair.clip(), PooledVae()
    untouched = fingerprint(model, clip)
    with torch.inference_mode():
        given = {"model": model, "clip": clip, "vae": vae, "clip_vision": PooledVision()}
        made, name, _, samples = host.pretrain.PromptNetTrainer.execute(**given, **defaults(steps=2)).args
        (loaded,) = host.promptnet.PromptNetLoader.execute(name).args
        del given["model"]
        (word, _) = host.promptnet.PromptNetEncode.execute(
            loaded, **given, images=pictures(1), text="a photo of S* on snow", noun="cat"
        ).args
    sizes, found = shrunken.UNETS[pair.family], made.config.unet  # heads are the same by number or by width
    for name in ("model_channels", "channel_mult", "num_res_blocks", "transformer_depth", "middle_depth"):
        assert getattr(found, name) == getattr(sizes, name)
    assert (found.context_dim, found.use_linear, found.adm_channels) == (
        sizes.context_dim,
        sizes.use_linear,
        sizes.adm_channels,
    )
    widths = [sizes.model_channels * mult for mult in sizes.channel_mult]
    assert [found.heads(width) for width in widths] == [sizes.heads(width) for width in widths]
    assert loaded.config == made.config
    assert made.config.text_widths == tuple(config.width for config in shrunken.TEXTS[pair.family])
    assert made.config.image_width == 20 and samples.shape[1:] == (made.config.frame * 8,) * 2 + (3,)
    assert word[0][0].isfinite().all() and word[0][0].shape[-1] == sizes.context_dim
    assert fingerprint(model, clip) == untouched
