"""PromptNet Trainer in a real ComfyUI: on Toybox as the kernel trains, and on tiny models of SD's shapes."""

import copy
import dataclasses
import importlib
import re
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import test_shapes  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402
from reports import cancel_at, on_report, stop_listening  # noqa: E402
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
            "host.budget",
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


def small_networks(monkeypatch, pack):
    """Pictures of 32 x 32 pixels for models that nobody knows, in place of 128 x 128."""
    usual = importlib.import_module(f"{pack.__name__}.profusion.promptnet.network").PromptNetConfig
    pretraining = importlib.import_module(f"{pack.__name__}.nodes.host.pretraining")
    monkeypatch.setattr(pretraining, "PromptNetConfig", lambda *more: usual(*more, grid=GRID, projection=8))


@pytest.fixture(autouse=True)
def small(pack, monkeypatch):
    small_networks(monkeypatch, pack)


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


def compute_in_float64(training, host, toybox, options):
    """Let Toybox's UNet and text encoder compute in float64 and answer in float32, in this training."""
    wide = {name: copy.deepcopy(getattr(toybox, name)).double() for name in ("unet", "text")}
    toybox = dataclasses.replace(toybox, **wide)
    predict, encode = host.toybox_promptnet._evaluation(toybox, training.network, options)
    training._predict_noise = lambda *inputs: predict(*(one.double() for one in inputs)).float()
    training._encode_word = lambda prompt, word: encode(prompt, word.double()).float()


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
    exact = host.toybox_promptnet.toybox_training(
        toybox, host.toybox_promptnet.new_promptnet(toybox, seed=5), made.given.pictures, options
    )
    compute_in_float64(exact, host, toybox, options)

    def first_step(training):
        with torch.no_grad():  # at first it is zero, and nothing else would have a gradient
            weight = training.network.output.weight
            weight.copy_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)))
        for _ in training.steps():
            return {name: one.grad.clone() for name, one in training.network.named_parameters()}

    theirs, truth = first_step(expected), first_step(exact)
    ours = {}
    with torch.inference_mode():
        made.evaluating(lambda: ours.update(first_step(found)))
    assert theirs.keys() == ours.keys() and all(gradient.any() for gradient in theirs.values())
    mine, true = (torch.cat([made[name].flatten() for name in theirs]) for made in (ours, truth))
    # Not against the kernel's own in float32, which is as far from it as this bound: its text encoder rounds so.
    assert (mine - true).norm() <= 1e-5 * true.norm()
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


# Cancel, errors, and what goes on


def partials(folders):
    return list((folders / "profusion_promptnets").rglob("training/*"))


def trained_steps():
    """The steps that are reported from now on, the encoding of the twelve pictures left out."""
    steps = []
    on_report(lambda done, total, _: steps.append(done) if total != 12 else None)
    return steps


def cancelled(train, step, **inputs):
    """Cancel at a step of the training."""
    stop = comfy.model_management.interrupt_current_processing
    on_report(lambda done, total, _: stop(True) if (done, total) == (step, inputs["steps"]) else None)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(**inputs)
    stop_listening()


def shown_text(host, monkeypatch):
    """What is said under the node, from now on."""
    said, show = [], host.pretrain.show
    monkeypatch.setattr(host.pretrain, "show", lambda cls, text, *more, **named: said.append(text) or show(cls, text))
    return said


@pytest.mark.parametrize("sample_every", [0, 2])
def test_after_cancel_the_same_inputs_go_on_bit_for_bit(host, train, folders, clip, monkeypatch, sample_every):
    inputs = {"steps": 5, "sample_every": sample_every, "cosine": True, "with_noise": True}
    at_three = learned_at(host, monkeypatch, 3)
    whole, model = train(**inputs)[0], tiny.model()
    untouched = fingerprint(model, clip)
    cancelled(train, 3, model=model, **inputs)
    assert fingerprint(model, clip) == untouched
    (path,), said, steps = partials(folders), shown_text(host, monkeypatch), trained_steps()
    assert path.name.startswith("pretrain_")
    (kept,) = (folders / "profusion_promptnets" / "me").glob("cat_partial_3_steps_*")
    assert same(values(host.promptnet_file.load_promptnet(kept, torch.float16)), at_three)
    steps.clear()
    again = train(**inputs)[0]
    assert min(steps) == 4 and f"Gone on from step 3, from {path}" in said[-1]
    assert same(values(again.network), values(whole.network)) and not path.exists()


def learned_at(host, monkeypatch, step):
    """What the next training has learned at a step, in half precision, once it has been there."""
    found, one_step = {}, host.loop.TrainingLoop._one_step

    def noting(training):
        loss = one_step(training)
        if training.step == step and not found:
            found.update({name: value.half() for name, value in values(training.network).items()})
        return loss

    monkeypatch.setattr(host.loop.TrainingLoop, "_one_step", noting)
    return found


def test_cancel_while_pictures_are_encoded_leaves_nothing(host, train, folders, clip):
    model = tiny.model()
    untouched = fingerprint(model, clip)
    cancel_at(8)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model=model)
    assert fingerprint(model, clip) == untouched and not list(folders.rglob("*.safetensors"))


def test_an_error_keeps_what_was_learned_and_says_where(host, train, folders, clip):
    model, calls = tiny.model(), []

    def wrapper(apply_model, arguments):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > 2:
            raise RuntimeError("a kernel failed")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)
    untouched = fingerprint(model, clip)
    with pytest.raises(host.loop.TrainingError, match=r"a kernel failed.*\n") as caught:
        train(model=model, steps=5)
    assert fingerprint(model, clip) == untouched
    (path,) = partials(folders)
    assert f"delete\n{path}" in str(caught.value) and "What the 2 steps so far have learned" in str(caught.value)


def test_a_card_without_memory_is_told_what_can_be_changed(host, train):
    model = tiny.model()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.set_model_unet_function_wrapper(full)
    with pytest.raises(Exception, match="out of memory while training on 2 pictures of 4x4 latent cells") as caught:
        train(model=model)
    assert "batch_size\n" in str(caught.value) and "smaller pictures" not in str(caught.value)


def test_a_full_disk_at_the_end_costs_nothing(host, train, folders, monkeypatch):
    whole = train()[0]

    def full(*_, **__):
        raise OSError(28, "the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(host.pretraining, "save_promptnet", full)
        with pytest.raises(host.loop.TrainingError, match="could not be saved as a PromptNet.*full"):
            train()
    (path,), said = partials(folders), shown_text(host, monkeypatch)
    steps = trained_steps()
    again, name = train()[:2]
    assert set(steps) == {3} and f"Gone on from step 3, from {path}" in said[-1] and not path.exists()
    assert same(values(again.network), values(whole.network))
    assert "on 1 pictures kept apart the loss is" in said[-1]
    assert (folders / "profusion_promptnets" / name).is_file()


def test_an_error_after_the_end_names_the_file(host, train, folders, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no picture")

    monkeypatch.setattr(host.pretraining.Pretraining, "draw", fail)
    with pytest.raises(host.loop.TrainingError, match="no picture\nThe training is finished, and saved as") as caught:
        train()
    (path,) = (folders / "profusion_promptnets").rglob("*.safetensors")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"learning_rate": 2e-3},
        {"images": pictures(12).flip(2)},
        {"tokens": 2},
        {"start_word": "cat"},
        {"prompts": "S*"},
        {"warmup": 2},
        {"weight_cap": 5.0},
        {"level_bias": 1.0},
    ],
)
def test_another_training_never_goes_on_from_it(train, folders, changes):
    cancelled(train, 1, steps=2)
    (path,) = partials(folders)
    before, steps = path.read_bytes(), trained_steps()
    train(steps=2, **changes)
    assert min(steps) == 1 and path.read_bytes() == before


# What is said


def test_the_loss_with_s_star_against_the_word_is_said_and_falls(host, train, monkeypatch):
    """Of pictures that differ, and that S* tells apart once it has learned."""
    said = shown_text(host, monkeypatch)
    monkeypatch.setattr(host.pretraining, "CHECK_EVERY", 10)
    made = []
    monkeypatch.setattr(
        host.pretraining.PretrainingRun, "_preview", lambda run: made.append(run._checked) or run.plot()
    )
    train(steps=30, learning_rate=3e-3)
    pattern = re.compile(
        r"step (\d+): on 1 pictures kept apart the loss is ([\d.]+) with S\* and ([\d.]+) with the word"
    )
    checks = [found.groups() for text in dict.fromkeys(made) if (found := pattern.search(text))]
    assert [int(step) for step, *_ in checks] == [10, 20, 30]
    last = pattern.search(said[-1])
    assert last[1] == "30" and float(last[2]) < float(last[3])
    assert "12 pictures of 32x32 pixels, 1 of them kept apart: 0 MB" in said[-1]
    assert "UNet with 7 cross-attentions of 64: 1 pseudo-word, made before sampling" in said[-1]


def test_samples_are_drawn_now_and_then_and_leave_the_training_as_it_is(train):
    made, _, _, samples = train(steps=4, sample_every=1)
    assert samples.shape[0] == 5
    assert same(values(made.network), values(train(steps=4)[0].network))


# Folders


def write_pictures(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(12)[start : start + count]):
        Image.fromarray((picture * 255).byte().numpy()).save(folder / f"{number:02}.png")


def test_a_folder_is_read_with_all_folders_in_it_and_broken_files_are_named(host, train, folders, monkeypatch):
    faces = folders / "input" / "faces"
    write_pictures(faces / "one", 5)
    write_pictures(faces / "two", 5, 5)
    (faces / "two" / "broken.png").write_bytes((faces / "one" / "00.png").read_bytes()[:2000])
    (faces / "two" / "drawing.psd").write_bytes(b"8BPS")
    (faces / "raw.dng").write_bytes((faces / "one" / "00.png").read_bytes())
    (faces / "one" / "00.txt").write_text("a caption")
    (faces / ".hidden.png").write_bytes(b"nothing")
    Image.new("RGB", (4, 4)).save(faces / "tiny.png")
    said = shown_text(host, monkeypatch)
    train(folder="faces", images=None, steps=1)
    assert "10 pictures of 32x32 pixels, 1 of them kept apart" in said[-1]
    assert "4 left out, which cannot be read:" in said[-1]
    for name in ("two/broken.png: ", "two/drawing.psd: ", "raw.dng: ", "tiny.png: "):
        assert name in said[-1]
    train(folder="faces/two", images=pictures(2), steps=1)
    assert "7 pictures of 32x32 pixels: 0 MB" in said[-1]


def test_folders_are_listed_links_too(host, folders):
    names = host.picture_folders.folder_names
    assert names() == ["none"]
    write_pictures(folders / "input" / "faces" / "one", 1)
    write_pictures(folders / "elsewhere", 1)
    (folders / "input" / "linked").symlink_to(folders / "elsewhere")
    (folders / "input" / "<b>").mkdir()
    assert names() == ["none", "faces", "faces/one", "linked"]
    assert len(host.picture_folders.sources("linked", None)) == 1
    options = host.pretrain.PromptNetTrainer.define_schema().inputs[0].options
    assert options == names()


@pytest.mark.parametrize("name", ["", "..", "faces/../..", "/etc", "C:/x", "gone", "a\\..\\..\\b", "<b>", 3, "a\0b"])
def test_a_folder_that_is_none_is_refused_before_the_graph_runs(host, folders, name):
    (folders / "input" / "faces").mkdir()
    node = host.pretrain.PromptNetTrainer
    for given in (name, [name]):  # as a host asks a node that takes lists
        said = node.validate_inputs(given)
        assert isinstance(said, str) and "folder" in said
    assert node.validate_inputs("faces") is True and node.validate_inputs(["none"]) is True


def test_a_folder_is_read_anew_where_a_file_of_it_changed(host, folders):
    node = host.pretrain.PromptNetTrainer
    write_pictures(folders / "input" / "faces", 2)
    before = node.fingerprint_inputs(["faces"])
    assert node.fingerprint_inputs(["faces"]) == before
    write_pictures(folders / "input" / "faces" / "more", 1)
    assert node.fingerprint_inputs(["faces"]) != before


# Bad input


class Narrow(PooledVae):
    """A VAE of three channels."""

    def encode(self, pictures):
        return super().encode(pictures)[:, :3]


class Blind(PooledVision):
    def encode_image(self, images):
        return {"last_hidden_state": None}


class Overflowing(PooledVision):
    def encode_image(self, images):
        return {"last_hidden_state": super().encode_image(images)["last_hidden_state"] * 1e6}


def flow_model():
    import comfy.model_sampling

    model = tiny.model()
    model.add_object_patch("model_sampling", comfy.model_sampling.CONST())
    return model


def distilled():
    return tiny.model(num_res_blocks=[1, 2], transformer_depth=[1] * 3, transformer_depth_output=[1] * 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": None}, "no pictures: choose a folder, or connect images"),
        ({"folder": "gone"}, "there is no folder 'gone'"),
        ({"images": torch.ones(1, 3, 3, 3)}, "none of the 1 pictures can be read"),
        ({"clip": None}, "clip is None"),
        ({"clip_vision": None}, "clip_vision is None"),
        ({"vae": None}, "vae is None"),
        ({"vae": Narrow()}, "the VAE makes latents of shape"),
        ({"clip_vision": Blind()}, "gives no image tokens"),
        ({"clip_vision": Overflowing()}, "image tokens are not finite"),
        ({"model": lambda: tiny.model(context_dim=32)}, "width 64 and the model takes 32"),
        ({"model": lambda: tiny.model(in_channels=9)}, "takes 9 channels and gives 4, as those for inpainting"),
        ({"model": distilled}, "blocks within a level that differ"),
        ({"model": flow_model}, "is a flow model"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"prompts": "\n"}, "prompts: give at least one"),
        ({"prompts": "a photo"}, "there is no S"),
        ({"sample_prompt": "a photo"}, "there is no S"),
        ({"start_word": "", "tokens": -1}, "tokens"),
        ({"filename_prefix": "../x"}, "filename_prefix"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(train, folders, inputs, message):
    inputs = {name: value() if callable(value) else value for name, value in inputs.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(**inputs)
    assert not list(folders.rglob("*.safetensors"))


def test_pictures_that_do_not_fit_into_main_memory_are_refused(host, train, monkeypatch):
    monkeypatch.setattr(host.pretraining, "_free_memory", lambda: 5000.0)
    seen = []
    on_report(lambda *report: seen.append(report))
    with pytest.raises(host.loop.TrainingError, match=r"12 encoded pictures take .*: give at most \d+"):
        train()
    assert not seen


@pytest.mark.parametrize("what", ["prefix", "folder"])
def test_a_file_that_cannot_be_written_is_known_before_pictures_are_encoded(train, folders, what):
    if what == "folder":
        (folders / "profusion_promptnets").touch()
    seen = []
    on_report(lambda *report: seen.append(report))
    with pytest.raises(ValueError, match="cannot be used|is no name within"):
        train(**({"filename_prefix": "../x"} if what == "prefix" else {}))
    assert not seen


def test_a_text_encoder_without_a_gradient_is_named(train):
    broken = tiny.clip()
    tower = broken.cond_stage_model.clip_l.transformer
    tower.register_forward_hook(lambda _, __, out: tuple(part if part is None else part.detach() for part in out))
    with pytest.raises(ValueError, match="cannot be trained through the text encoder SD1ClipModel.*no gradient"):
        train(clip=broken)


# The schema, frozen: only append


def test_the_schema_is_frozen_and_explained(host):
    schema = host.pretrain.PromptNetTrainer.GET_SCHEMA()
    assert schema.node_id == "ProFusion_PromptNetTrainer"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "folder:COMBO",
        "model:MODEL",
        "clip:CLIP",
        "clip_vision:CLIP_VISION",
        "vae:VAE",
        "steps:INT",
        "learning_rate:FLOAT",
        "batch_size:INT",
        "seed:INT",
        "filename_prefix:STRING",
        "images:IMAGE",
        "promptnet:PROMPTNET",
        "start_word:STRING",
        "tokens:INT",
        "with_noise:BOOLEAN",
        "prompts:STRING",
        "warmup:INT",
        "cosine:BOOLEAN",
        "weight_cap:FLOAT",
        "level_bias:FLOAT",
        "sample_every:INT",
        "sample_prompt:STRING",
        "sample_steps:INT",
        "sample_cfg:FLOAT",
        "gradient_checkpointing:COMBO",
    ]
    assert [output.io_type for output in schema.outputs] == ["PROMPTNET", "STRING", "IMAGE", "IMAGE"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    folded = [entry.id for entry in schema.inputs if entry.as_dict().get("advanced")]
    assert folded == [entry.id for entry in schema.inputs][12:] and all(entry.optional for entry in schema.inputs[10:])
    root = Path(host.pretrain.__file__).parents[1]
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()
    assert host.pretrain.PromptNetTrainer in host.pack.NODES


# At full size, and on a card


@pytest.mark.parametrize(
    ("family", "widths", "vision"),
    [("SD15", (768,), 1024), ("SD20", (1024,), 1280), ("SDXL", (768, 1280), 1280)],
)
def test_the_sizes_of_real_models_are_those_of_the_released_kinds(host, monkeypatch, family, widths, vision):
    """The host's own networks, built without memory, whose weights nobody reads here."""
    found = test_shapes.detected(test_shapes.LAYERS[family][0])[1]
    model = comfy.model_patcher.ModelPatcher(
        found.get_model({}, "", torch.device("meta")), torch.device("cpu"), torch.device("cpu")
    )
    network = host.promptnet_network
    monkeypatch.setattr(host.weights, "own_weights", lambda *_: {})
    monkeypatch.setattr(host.pretraining, "PromptNetConfig", network.PromptNetConfig)
    unet, _ = host.weights.own_unet(model)
    config = host.pretraining._new_config(unet, vision, widths, host.pretraining.Beginning())
    known = {"SD15": "SD15", "SD20": "SD21", "SDXL": "SDXL"}[family]
    assert config == getattr(network, f"{known}_PROMPTNET")
    assert config.frame == (128 if family == "SDXL" else 64)


def test_there_is_room_on_the_card_before_the_network_is_put_there(host, clip, monkeypatch):
    """And pictures are encoded before either, and wait in main memory."""
    card, done = torch.device("cpu:0"), []  # not the device "cpu" to the host
    management, encode = comfy.model_management, host.pretraining.encoded
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(management, "free_memory", lambda size, device, *_, **__: done.append((size, device)))
    monkeypatch.setattr(host.budget, "_memory_of", lambda device: float("inf"))
    monkeypatch.setattr(host.pretraining, "encoded", lambda *more: (done.append("pictures"), encode(*more))[1])
    move = torch.nn.Module.to

    def moved(module, *more, **named):
        if isinstance(module, host.promptnet_network.PromptNet):
            done.append(("network", *more))
        return move(module, *more, **named)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    model = tiny.model()
    model.load_device = card
    made = starting(host, clip, model=model)
    learned = sum(value.numel() for value in made.training.groups[0].parameters.values())
    first = done.index(("network", card))
    assert done.index("pictures") < done.index((16 * learned, card)) < first
    assert made.given.pictures.latents.device == made.given.pictures.image_tokens.device == torch.device("cpu")
