"""PromptNet Finetune in a real ComfyUI, on tiny random models: through its CLIP and its model, as
a patch its loader reads."""

import importlib
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402
from reports import cancel_at, on_report, stop_listening  # noqa: E402

VALUES = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
RATES = {"learning_rate": 1e-3, "attention_learning_rate": 5e-3}


class PooledVision:
    """A CLIP_VISION whose tokens are the picture's own colours, at 5 x 5 places and 20 wide."""

    def encode_image(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), 5).flatten(2).mT  # (B, 25, 3)
        return {"last_hidden_state": torch.cat([cells * (index + 1) for index in range(7)], dim=-1)[..., :20]}


@pytest.fixture(scope="module")
def host(pack):
    """The pack's modules that are tested here."""
    nodes = {
        name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}")
        for name in ("finetune", "host.finetuning", "host.budget", "host.display", "host.words", "host.evaluation")
    }
    names = (
        "files",
        "promptnet.network",
        "promptnet.finetune",
        "promptnet.changes",
        "promptnet.file",
        "promptnet.unfinished",
        "promptnet.pseudo_word",
        "models.configs",
        "models.clip",
        "loop",
        "keeping",
    )
    kernel = {
        name.split(".")[-1] + "_kernel": importlib.import_module(f"{pack.__name__}.profusion.{name}") for name in names
    }
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's folders of patch files and PromptNets, moved to empty places."""
    import folder_paths

    for name in ("loras", "profusion_promptnets"):
        entry = ([str(tmp_path / name)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
    folder_paths.filename_list_cache.clear()
    return tmp_path


def promptnet(host, seed=4, **changes):
    """A random PromptNet that serves the tiny model, loaded as the host loads it: in inference mode."""
    unet = host.configs_kernel.UNetConfig(32, (1, 2), 1, (1, 1), 1, tiny.CONTEXT, num_heads=2)
    sizes = {"image_width": 20, "text_widths": (tiny.CONTEXT,), "grid": 2, "projection": 8, **changes}
    with torch.inference_mode():
        network = host.network_kernel.PromptNet(host.network_kernel.PromptNetConfig(unet, **sizes))
        network = tiny.randomise(network, seed).eval().requires_grad_(False)
        return host.words.handed_to_the_host(network, "random")


def defaults(**inputs):
    return {
        "images": pictures(1),
        "steps": 2,
        "train_attention": True,
        "rank": 2,
        "batch_size": 2,
        "seed": 0,
        "filename_prefix": "me/cat",
        "save_promptnet": False,
        **RATES,
        **inputs,
    }


@pytest.fixture
def finetune(host, clip, folders):
    """Run the node as the host does, in inference mode: -> (PROMPTNET, MODEL, patch file, loss plot)."""

    def run(**inputs):
        with torch.inference_mode():
            parts = {"model": tiny.model, "promptnet": lambda: promptnet(host)}
            given = {name: make() for name, make in parts.items() if name not in inputs}
            given |= {"clip": clip, "clip_vision": PooledVision(), "vae": PooledVae()}
            return host.finetune.PromptNetFinetune.execute(**{**given, **defaults(), **inputs}).args

    yield run
    host.unfinished_kernel.unsaved.clear()


def references(host):
    return importlib.import_module(f"{host.pack.__name__}.profusion.references")


def make_finetuning(host, clip, model, masks=None, options=None, **kwargs):
    options = host.finetune_kernel.FinetuneOptions(
        **{"steps": 2, "batch_size": 2, "rank": 2, **RATES, **(options or {})}
    )
    given = references(host).gather(pictures(1) if masks is None else pictures(len(masks)), masks)
    with torch.inference_mode():
        return host.finetuning.Finetuning(
            promptnet(host, **kwargs.get("sizes", {})),
            model,
            clip,
            PooledVision(),
            PooledVae(),
            given,
            masks is not None,
            kwargs.get("attention", True),
            options,
        )


def values(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def fingerprint(model, clip):
    """What must be as before, once a training is over."""
    found = {
        "options": repr(model.model_options),
        "wrappers": repr((model.wrappers, model.object_patches, model.patches)),
    }
    for name, network in (("model", model.model), ("clip", clip.cond_stage_model)):
        found[name] = [
            [(key, id(value), value.requires_grad, value.grad) for key, value in network.named_parameters()],
            [part.training for part in network.modules()],
            [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in network.modules()],
        ]
    return found


# The schema, frozen: only append


def test_the_schema_is_frozen_and_explained(host):
    schema = host.finetune.PromptNetFinetune.GET_SCHEMA()
    assert schema.node_id == "ProFusion_PromptNetFinetune"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "promptnet:PROMPTNET",
        "model:MODEL",
        "clip:CLIP",
        "clip_vision:CLIP_VISION",
        "vae:VAE",
        "images:IMAGE",
        "steps:INT",
        "learning_rate:FLOAT",
        "train_attention:BOOLEAN",
        "attention_learning_rate:FLOAT",
        "rank:INT",
        "batch_size:INT",
        "seed:INT",
        "filename_prefix:STRING",
        "save_promptnet:BOOLEAN",
        "masks:MASK",
        "gradient_checkpointing:COMBO",
        "mix_variants:BOOLEAN",
    ]
    assert [output.io_type for output in schema.outputs] == ["PROMPTNET", "MODEL", "STRING", "IMAGE"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    root = Path(host.finetune.__file__).parents[1]
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()
    assert host.finetune.PromptNetFinetune in host.pack.NODES


# What comes out


def test_it_gives_a_promptnet_a_model_a_file_and_a_plot(host, finetune, folders, clip):
    source, model, seen = promptnet(host), tiny.model(), []
    before, untouched = values(source.network), fingerprint(model, clip)
    on_report(lambda done, total, _: seen.append((done, total)))
    tuned, patched, name, plot = finetune(promptnet=source, model=model, save_promptnet=True)
    assert same(values(source.network), before) and fingerprint(model, clip) == untouched
    assert tuned.network is not source.network and not same(values(tuned.network), before)
    assert not any(value.requires_grad for value in tuned.network.parameters()) and tuned.config == source.config
    assert not model.patches and len(patched.patches) == 7 * 8 and patched.is_clone(model)
    assert name == str(Path("me") / "cat_00001_.safetensors") and plot.shape == (1, 288, 512, 3)
    assert (folders / "loras" / name).is_file() and seen[-1] == (2, 2) and {value for value, _ in seen} == {1, 2}
    saved = host.file_kernel.load_promptnet(folders / "profusion_promptnets" / name, torch.float16)
    assert same(values(saved), values(tuned.network.half()))


def test_the_next_file_has_the_next_number(finetune, folders):
    first, second = finetune(steps=1)[2], finetune(steps=1, seed=1)[2]
    assert [Path(name).name for name in (first, second)] == ["cat_00001_.safetensors", "cat_00002_.safetensors"]
    contents = [comfy.utils.load_torch_file(str(folders / "loras" / name)) for name in (first, second)]
    assert not same(*contents)


def test_the_same_seed_trains_the_same_and_another_one_another(finetune):
    (one, _, _, _), (again, _, _, _), (other, _, _, _) = finetune(), finetune(), finetune(seed=1)
    assert same(values(one.network), values(again.network)) and not same(values(one.network), values(other.network))


def test_without_the_attention_layers_there_is_no_file(finetune, folders):
    tuned, model, name, _ = finetune(train_attention=False)
    assert name == "" and not model.patches and not list(folders.rglob("*.safetensors"))
    assert tuned.network.output.bias.isfinite().all()


# The patch file


def predicted(model, x, sigma, context):
    """The noise that a MODEL predicts, by its own means and nothing of the pack's."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        return (x - model.model.apply_model(x, sigma, c_crossattn=context)) / sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_hosts_loader_makes_of_the_file_what_was_trained(host, clip, folders, rank):
    model = tiny.model()
    finetuning = make_finetuning(host, clip, model, options={"rank": rank})
    x, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7, 5.0])
    context, own = tiny.encode(clip, "a photo of a cat")[0][0].expand(2, -1, -1), []
    with torch.inference_mode():
        finetuning.run(lambda: None)
        finetuning.evaluating(
            lambda: own.append(finetuning._trained.predict_noise_with(x, sigma, 0, context)), (2, 4, 8, 8)
        )
        size = host.changes_kernel.save_patch(finetuning.patch(), folders / "loras" / "one.safetensors")
    import nodes

    loader = nodes.LoraLoaderModelOnly()
    (loaded,) = loader.load_lora_model_only(model, "one.safetensors", 1.0)
    assert len(loaded.patches) == 7 * 8 and size == (folders / "loras" / "one.safetensors").stat().st_size
    plain, found = predicted(model, x, sigma, context), predicted(loaded, x, sigma, context)
    torch.testing.assert_close(found, own[0], rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 2e-3  # or it would prove nothing
    with torch.inference_mode():
        assert torch.equal(predicted(finetuning.patched_model(), x, sigma, context), found)
    assert torch.equal(predicted(model, x, sigma, context), plain)


def test_every_key_of_the_file_is_one_that_the_host_knows(host, clip):
    model = tiny.model()
    tensors = make_finetuning(host, clip, model).patch()
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    stems = {name.split(".")[0] for name in tensors}
    assert stems <= known.keys() and len({known[stem] for stem in stems}) == 7 * 8


# On a card


@pytest.mark.parametrize("rank", [0, 2])
def test_there_is_room_on_the_card_before_anything_of_the_training_is_put_there(host, finetune, monkeypatch, rank):
    card, done = torch.device("cpu:0"), []  # not the device "cpu" to the host
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda size, device, *_, **__: done.append((size, device))
    )
    monkeypatch.setattr(host.budget, "_memory_of", lambda device: float("inf"))
    copy, start = host.finetuning.trainable_copy, host.finetuning.start_changes
    monkeypatch.setattr(host.finetuning, "trainable_copy", lambda *more: done.append("copy") or copy(*more))

    def changes(layers, rank, generator, device):
        done.extend(["changes"] if device == card else [])
        return start(layers, rank, generator, device)

    monkeypatch.setattr(host.finetuning, "start_changes", changes)
    model, source = tiny.model(), promptnet(host)
    model.load_device = card
    finetuning = make_finetuning(host, tiny.clip(), model, options={"rank": rank})
    first = done.index("changes")
    size, device = done[first - 1]
    learned = sum(value.numel() for group in finetuning.training.groups for value in group.parameters.values())
    assert device == card and size == 16 * learned > 16 * sum(one.numel() for one in source.network.parameters())
    assert done.index("copy") > first


# Through the host's own text encoder and model


def test_the_gradient_through_the_hosts_clip_is_the_kernels(host, clip):
    config = host.configs_kernel.TextConfig(tiny.CONTEXT, 2, 2, 96)
    text = host.clip_kernel.TextModel(config).eval().requires_grad_(False)
    own = clip.cond_stage_model.clip_l.transformer.state_dict()
    text.load_state_dict({name: own[name] for name in text.state_dict()})
    words = 0.1 * torch.randn(2, 1, tiny.CONTEXT, generator=torch.Generator().manual_seed(2))
    target, prompt = (
        torch.randn(2, 77, tiny.CONTEXT, generator=torch.Generator().manual_seed(3)),
        "a photo of S* on snow",
    )
    encoder = host.words.WordEncoder(clip, promptnet(host).config, [prompt], host.evaluation.differentiable)
    found = []
    for encode in (
        lambda word: encoder.encode(0, word),
        lambda word: host.pseudo_word_kernel.encode(text, prompt, word),
    ):
        word = words.clone().requires_grad_(True)
        with encoder.running():
            (encode(word) * target).sum().backward()
        found.append(word.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert found[1].abs().max() > 0.1


def test_a_text_encoder_without_a_gradient_is_named(host, finetune):
    broken = tiny.clip()
    tower = broken.cond_stage_model.clip_l.transformer
    tower.register_forward_hook(lambda _, __, out: tuple(part if part is None else part.detach() for part in out))
    with pytest.raises(ValueError, match="cannot be trained through the text encoder SD1ClipModel.*no gradient"):
        finetune(clip=broken)


def test_weights_loaded_in_inference_mode_train_alike(host, finetune):
    with torch.inference_mode():
        inside, encoder = tiny.model(), tiny.clip()
    assert inside.model.diffusion_model.input_blocks[0][0].weight.is_inference()
    untouched = fingerprint(inside, encoder)
    tuned = finetune(model=inside, clip=encoder)[0]
    assert fingerprint(inside, encoder) == untouched
    assert same(values(tuned.network), values(finetune()[0].network))


def test_a_patch_on_the_model_takes_part(finetune):
    change = 0.3 * torch.randn(32, tiny.CONTEXT, generator=torch.Generator().manual_seed(8))
    patched, baked = tiny.model(), tiny.model()
    patched.add_patches({VALUES: ("diff", (change,))})
    with torch.no_grad():
        dict(baked.model.named_parameters())[VALUES].add_(change)
    (one, model, _, _), (other, _, _, _), (plain, _, _, _) = finetune(model=patched), finetune(model=baked), finetune()
    assert same(values(one.network), values(other.network)) and not same(values(one.network), values(plain.network))
    assert len(model.patches[VALUES]) == 2


@pytest.mark.parametrize("rank", [0, 2])
def test_half_precision_models_train_float32_changes(host, finetune, rank):
    with torch.inference_mode():
        model = tiny.model(torch.float16, torch.float32)
    tuned, patched, _, _ = finetune(model=model, rank=rank, steps=1)
    assert {value.dtype for value in model.model.diffusion_model.parameters()} == {torch.float16} and patched.patches
    assert all(value.isfinite().all() for value in tuned.network.state_dict().values())


def test_masks_grey_what_is_shown_and_weigh_what_is_drawn(host, clip):
    masks = torch.zeros(2, 64, 64)
    masks[:, 16:48, 8:40] = 1
    given = make_finetuning(host, clip, tiny.model(), masks, sizes={"grid": 4}).training.pictures
    drawn = PooledVae().encode(pictures(2)) * 0.18215
    torch.testing.assert_close(given.targets, drawn)
    inside = given.masks.bool()
    assert given.masks.shape == (2, 8, 8) and inside.sum() == 2 * 16
    cells = inside[:, None].expand_as(drawn)
    torch.testing.assert_close(given.latents[cells], drawn[cells])
    assert not given.latents[~cells].any()  # grey


def test_pictures_of_any_size_are_shown_in_the_native_frame_and_drawn_as_one_size(host, finetune, clip):
    """A PromptNet of 32x32 pixels, which also sees the noisy latents of what is drawn."""
    given = [pictures(1, 64, 96), pictures(1, 80, 64)]
    with torch.inference_mode():
        network = promptnet(host, second_latent="noisy")
    tuned, patched, _, _ = finetune(promptnet=network, images=given, steps=2)
    assert patched.patches and any(
        not torch.equal(value, network.network.state_dict()[name]) for name, value in tuned.network.state_dict().items()
    )
    options = host.finetune_kernel.FinetuneOptions(steps=2, batch_size=2, rank=2, **RATES)
    with torch.inference_mode():
        made = host.finetuning.Finetuning(
            network,
            tiny.model(),
            clip,
            PooledVision(),
            PooledVae(),
            references(host).gather(given),
            False,
            True,
            options,
        )
    assert made.training.pictures.latents.shape == (2, 4, 4, 4) and made.training.pictures.targets.shape == (2, 4, 9, 9)
    assert "2 pictures of 72x72 pixels, cropped and resized from 96x64, 64x80" in made.about
    assert "PromptNet sees 2 pictures of 32x32 pixels, cropped and resized from 96x64, 64x80" in made.about


def test_variants_may_be_mixed_and_old_graphs_do_not_mix_them(finetune):
    plain, _, _, plot = finetune(images=pictures(3))
    same_again, _, _, _ = finetune(images=pictures(3), mix_variants=False)
    mixed, _, _, _ = finetune(images=pictures(3), mix_variants=True)
    assert same(values(plain.network), values(same_again.network))
    assert not same(values(plain.network), values(mixed.network))


def test_a_promptnet_that_looks_at_the_noisy_latent_learns(host, finetune):
    tuned = finetune(promptnet=promptnet(host, second_latent="noisy"), steps=1)[0]
    assert tuned.config.with_noise and tuned.network.second_latent[0].weight.isfinite().all()


# Cancel and errors


def test_cancel_stops_within_a_step_keeps_what_was_learned_and_leaves_nothing_behind(host, finetune, folders, clip):
    source, model = promptnet(host), tiny.model()
    before, untouched = values(source.network), fingerprint(model, clip)
    cancel_at(1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        finetune(promptnet=source, model=model, steps=4, save_promptnet=True)
    stop_listening()
    assert fingerprint(model, clip) == untouched and same(values(source.network), before)
    name = "cat_partial_1_steps_00001_.safetensors"
    partial = host.file_kernel.load_promptnet(folders / "profusion_promptnets" / "me" / name, torch.float16)
    once, _, whole, _ = finetune(steps=1)
    assert same(values(partial), values(once.network.half()))
    contents = [comfy.utils.load_torch_file(str(folders / "loras" / file)) for file in (Path("me") / name, whole)]
    assert same(*contents)


def test_an_error_keeps_what_was_learned_says_where_and_leaves_nothing_behind(host, finetune, folders, clip):
    model, calls = tiny.model(), []

    def wrapper(apply_model, arguments):
        calls.append(0)
        if len(calls) > 1:
            raise RuntimeError("a kernel failed")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)
    untouched = fingerprint(model, clip)
    with pytest.raises(host.loop_kernel.TrainingError, match=r"a kernel failed.*\nWhat the 1 steps") as caught:
        finetune(model=model)
    assert fingerprint(model, clip) == untouched
    (path,) = (folders / "loras").rglob("*.safetensors")
    assert str(path) in str(caught.value)


def test_what_is_saved_before_another_file_fails_is_saved_once_and_named(host, finetune, folders, monkeypatch):
    def full_disk(*_):
        raise host.network_kernel.PromptNetError("the disk is full")

    monkeypatch.setattr(host.finetuning, "save_promptnet", full_disk)
    with pytest.raises(host.loop_kernel.TrainingError, match="the disk is full") as caught:
        finetune(steps=1, save_promptnet=True)
    (path,) = (folders / "loras").rglob("*.safetensors")
    assert f"Saved before: {path}" in str(caught.value)


# What is on the disk at any moment, and what goes on from it


def partials(folders):
    return list((folders / "profusion_promptnets").rglob("training/*"))


def trained_steps():
    """The steps that are reported from now on."""
    steps = []
    on_report(lambda done, *_: steps.append(done))
    return steps


def cancelled(finetune, step, **inputs):
    cancel_at(step)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        finetune(**inputs)
    stop_listening()


def shown_text(host, monkeypatch):
    """What is said under the node, from now on."""
    said = []
    show = host.finetune.show
    monkeypatch.setattr(host.finetune, "show", lambda cls, text, *more, **named: said.append(text) or show(cls, text))
    return said


def test_a_kill_at_any_step_leaves_a_file_from_which_the_same_inputs_go_on(host, finetune, folders, monkeypatch):
    whole, _, name, _ = finetune(steps=4)
    patch = comfy.utils.load_torch_file(str(folders / "loras" / name))
    assert not partials(folders)
    monkeypatch.setattr(host.keeping_kernel, "SECONDS", 0.0)
    monkeypatch.setattr(host.keeping_kernel, "SHARE", 1e9)
    found = {}

    def note(done, *_):
        paths = partials(folders)
        found.setdefault(done, {path.name: path.read_bytes() for path in paths})

    on_report(note)
    finetune(steps=4)
    stop_listening()
    assert sorted(found) == [1, 2, 3, 4] and all(len(files) == 1 for files in found.values()) and not partials(folders)
    said = shown_text(host, monkeypatch)
    for done in (1, 2, 3):
        ((name, content),) = found[done].items()
        (folders / "profusion_promptnets" / "training" / name).write_bytes(content)
        steps = trained_steps()
        again, _, file, plot = finetune(steps=4)
        stop_listening()
        assert sorted(set(steps)) == list(range(done + 1, 5)) and f"Gone on from step {done}, from " in said[-1]
        assert same(values(again.network), values(whole.network)) and not partials(folders)
        assert same(comfy.utils.load_torch_file(str(folders / "loras" / file)), patch)


def test_cancel_leaves_what_the_same_inputs_go_on_from(host, finetune, folders, monkeypatch):
    whole = finetune(steps=4)[0]
    cancelled(finetune, 3, steps=4)
    (path,), said, steps = partials(folders), shown_text(host, monkeypatch), trained_steps()
    again = finetune(steps=4)[0]
    assert set(steps) == {4} and str(path) in said[-1] and same(values(again.network), values(whole.network))
    assert not path.exists()


def other_pictures():
    return pictures(1).flip(2)


def patched_model():
    model = tiny.model()
    model.add_patches({VALUES: ("diff", (0.01 * torch.ones(32, tiny.CONTEXT),))})
    return model


def hooked_model():
    """A model whose weights are the same, but not what it computes."""
    model = tiny.model()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (0.5 * q, k, v))
    return model


def other_clip():
    clip = tiny.clip()
    tiny.randomise(clip.cond_stage_model, seed=9)
    return clip


@pytest.mark.parametrize(
    "changes",
    [
        lambda host: {"seed": 1},
        lambda host: {"learning_rate": 2e-3},
        lambda host: {"rank": 3},
        lambda host: {"batch_size": 1},
        lambda host: {"train_attention": False},
        lambda host: {"images": other_pictures()},
        lambda host: {"masks": torch.ones(1, 64, 64).triu()},
        lambda host: {"promptnet": promptnet(host, seed=5)},
        lambda host: {"model": patched_model()},
        lambda host: {"model": hooked_model()},
        lambda host: {"clip": other_clip()},
        lambda host: {"steps": 1},
    ],
)
def test_another_training_never_goes_on_from_it(host, finetune, folders, changes):
    cancelled(finetune, 2, steps=3)
    (path,) = partials(folders)
    before, inputs = path.read_bytes(), {"steps": 3, **changes(host)}
    steps = trained_steps()
    finetune(**inputs)
    assert set(steps) == set(range(1, inputs["steps"] + 1))
    assert not path.exists() or path.read_bytes() == before


def test_a_damaged_file_is_said_and_begun_anew(host, finetune, folders, monkeypatch):
    cancelled(finetune, 2, steps=3)
    (path,), said = partials(folders), shown_text(host, monkeypatch)
    path.write_bytes(path.read_bytes()[:-100])
    steps = trained_steps()
    finetune(steps=3)
    assert set(steps) == {1, 2, 3} and "Begun anew." in said[-1] and str(path) in said[-1]


@pytest.mark.parametrize(
    "problem", [OSError(28, "the disk is full"), RuntimeError("can't allocate"), MemoryError("full")]
)
def test_a_disk_that_is_full_at_the_end_costs_neither_file(host, finetune, folders, monkeypatch, problem):
    """The folder of patches is full: PromptNet is saved in the other, and the patch at the second try."""
    whole, _, name, _ = finetune(steps=3, save_promptnet=True)
    patch = comfy.utils.load_torch_file(str(folders / "loras" / name))

    def full(*_, **__):
        raise problem

    with monkeypatch.context() as broken:
        broken.setattr(host.finetuning, "save_patch", full)
        with pytest.raises(host.loop_kernel.TrainingError, match="could not all be saved") as caught:
            finetune(steps=3, save_promptnet=True)
    saved = folders / "profusion_promptnets" / "me" / "cat_00002_.safetensors"
    assert f"Saved before: {saved}" in str(caught.value) and "Queue the same inputs again" in str(caught.value)
    loaded = host.file_kernel.load_promptnet(saved, torch.float16)
    assert same(values(loaded), values(whole.network.half()))
    steps = trained_steps()
    name = finetune(steps=3, save_promptnet=True)[2]
    assert not steps and same(comfy.utils.load_torch_file(str(folders / "loras" / name)), patch)


def test_where_nothing_at_all_can_be_written_it_is_kept_in_memory(host, finetune, folders, monkeypatch):
    whole = finetune(steps=3)[0]

    def full(*_, **__):
        raise OSError(28, "the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(host.finetuning, "save_patch", full)
        broken.setattr(host.finetuning.FinetuneTraining, "save", full)
        cancelled(finetune, 2, steps=3)
    assert not partials(folders) and len(host.unfinished_kernel.unsaved) == 1
    finetune(steps=1, seed=9)
    assert len(host.unfinished_kernel.unsaved) == 1, "another training's success is no reason to forget it"
    said, steps = shown_text(host, monkeypatch), trained_steps()
    assert same(values(finetune(steps=3)[0].network), values(whole.network))
    assert set(steps) == {3} and "from memory" in said[-1] and not host.unfinished_kernel.unsaved


def save_at_every_step(host, monkeypatch):
    monkeypatch.setattr(host.keeping_kernel, "SECONDS", 0.0)
    monkeypatch.setattr(host.keeping_kernel, "SHARE", 1e9)


def test_a_copy_that_cannot_be_written_stops_no_training_and_is_said_under_the_node(
    host, finetune, folders, monkeypatch
):
    save_at_every_step(host, monkeypatch)
    told, saving = warnings(host, monkeypatch), host.finetuning.FinetuneTraining.save

    def full(training, *more, **named):
        if training.step < 3:
            raise RuntimeError("can't allocate memory")
        return saving(training, *more, **named)

    monkeypatch.setattr(host.finetuning.FinetuneTraining, "save", full)
    name = finetune(steps=3)[2]
    assert (folders / "loras" / name).is_file() and not partials(folders)
    assert [text.split(" (")[0].split(": /")[0] for text in told[:-1]] == [
        "What has been learned so far cannot be written",
        "What has been learned so far is written again",
    ]
    assert "memory ran out" in told[0] and told[-1].startswith("3 steps")


def warnings(host, monkeypatch):
    """What is told under the node while it runs."""
    told = []
    monkeypatch.setattr(host.display, "_tell", lambda _, text, preview: told.append(text))
    return told


def test_another_servers_training_of_the_same_keeps_its_file(host, finetune, folders, monkeypatch):
    cancelled(finetune, 2, steps=3)
    (path,), said = partials(folders), shown_text(host, monkeypatch)
    before, seen = path.read_bytes(), []
    release = host.files_kernel.hold(path)  # as a server that goes on from it
    save_at_every_step(host, monkeypatch)
    steps = trained_steps()
    on_report(lambda done, *_: (steps.append(done), seen.append({one.name for one in partials(folders)})))
    finetune(steps=3)
    stop_listening()
    assert set(steps) == {1, 2, 3} and f"Another server works on the same training, and keeps it in {path}" in said[-1]
    assert {path.name, f"{path.stem}_2.safetensors"} in seen, "it keeps its own"
    assert partials(folders) == [path] and path.read_bytes() == before
    release()
    steps.clear()
    steps = trained_steps()
    finetune(steps=3)
    assert set(steps) == {3} and not partials(folders)


def test_a_run_that_another_server_has_overtaken_removes_nothing_of_it(host, finetune, folders, monkeypatch):
    """As where nothing can be locked: the other one has put its own in the place of this one's."""
    save_at_every_step(host, monkeypatch)

    def overtake(done, *_):
        for path in partials(folders) if done == 2 else ():
            new = path.with_name("new")
            new.write_bytes(b"the other's")
            new.replace(path)

    on_report(overtake)
    finetune(steps=4)
    (path,) = partials(folders)
    assert path.read_bytes() == b"the other's"


def test_where_the_first_folder_fails_another_one_is_tried(host, finetune, folders, tmp_path, monkeypatch):
    import folder_paths

    entry = ([str(folders / "loras"), str(tmp_path / "other")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", entry)
    saving = host.finetuning.save_patch

    def fail(tensors, path, *more):
        if path.is_relative_to(folders / "loras"):
            raise OSError(28, "full")
        return saving(tensors, path, *more)

    monkeypatch.setattr(host.finetuning, "save_patch", fail)
    with pytest.raises(host.loop_kernel.TrainingError, match="have learned") as caught:
        finetune(steps=2)
    (path,) = (tmp_path / "other").rglob("*.safetensors")
    assert str(path) in str(caught.value)


def test_an_overflow_names_the_way_out_and_writes_nothing(host, finetune, folders):
    model = tiny.model()
    model.set_model_unet_function_wrapper(lambda apply, arguments: arguments["input"] * float("nan"))
    with pytest.raises(host.loop_kernel.TrainingError, match="the loss is nan at step 0.*\nNothing had been learned"):
        finetune(model=model)
    assert not list(folders.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_used_stops_it_before_the_training(finetune, folders):
    (folders / "loras").touch()
    seen = []
    on_report(lambda *report: seen.append(report))
    with pytest.raises(ValueError, match="cannot be used"):
        finetune()
    assert not seen


# Bad input


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": torch.ones(0, 64, 64, 3)}, "no pictures"),
        ({"images": torch.ones(1, 3, 3, 3)}, "too small"),
        ({"masks": torch.zeros(1, 64, 64)}, "mask 1 is all black"),
        ({"clip": None}, "clip is None"),
        ({"clip_vision": None}, "clip_vision is None"),
        ({"vae": None}, "vae is None"),
        ({"steps": 0}, "steps=0"),
        ({"rank": -1}, "rank=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"filename_prefix": "../x"}, "filename_prefix"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(finetune, folders, inputs, message):
    with pytest.raises(ValueError, match=message):
        finetune(**inputs)
    assert not list(folders.rglob("*.safetensors"))


def test_a_promptnet_of_another_model_is_refused_by_both_names(host, finetune):
    with pytest.raises(ValueError, match=r"width 24 .*width 64"):
        finetune(promptnet=promptnet(host, text_widths=(24,)))
    with pytest.raises(
        ValueError, match="trained for UNet with 7 cross-attentions of 64, but the model is UNet with 7 cross"
    ):
        finetune(model=tiny.model(context_dim=32))
    with pytest.raises(ValueError, match="width 16, but the CLIP vision model makes them of width 20"):
        finetune(promptnet=promptnet(host, image_width=16))
