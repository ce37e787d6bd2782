"""PromptNet for checkpoints of SD 1.x, SD 2.x and SDXL, from their files on."""

import json

import pytest
import torch

from profusion import __main__ as program
from profusion.pretraining import released
from profusion.pretraining.arguments import Data
from profusion.pretraining.command import Command
from profusion.pretraining.engine import PretrainingOptions
from profusion.pretraining.material import sizes_of
from profusion.pretraining.peak import tensors_of
from profusion.pretraining.plan import CARDS, need, report
from profusion.pretraining.promptnet import new_promptnet
from profusion.promptnet import PromptNetError, load_promptnet
from profusion.promptnet.file import load_training, official_promptnet
from profusion.promptnet.released import check_archive, config_beside
from profusion.stable_diffusion import StableDiffusion
from profusion.toybox.pretraining import DrawnPictures
from tests.pretraining.small import base, network_for
from tests.shrunken import FAMILIES, VISIONS, checkpoint, vision_state, written


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "pictures").mkdir()
    for entry in range(10):
        (folder / "pictures" / f"{entry}.png").write_bytes(DrawnPictures(10, 0).read(entry))
    written(folder / "vision.safetensors", vision_state(VISIONS["ViT-L/14"]))
    for family in FAMILIES:
        written(folder / f"{family}.safetensors", checkpoint(family))
    return folder


def arguments(files, family, out, *more):
    given = ["promptnet", "train", "--checkpoint", str(files / f"{family}.safetensors"), "--out", str(out)]
    given += ["--clip-vision", str(files / "vision.safetensors"), "--data", str(files / "pictures"), "--size", "32"]
    few = ["--steps", "2", "--batch", "2", "--validation", "1", "--workers", "0", "--warmup", "0"]
    return [*given, *few, *more]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_promptnet_of_a_checkpoint_is_trained_and_loads(files, family, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    assert program.main(arguments(files, family, out, "--learning-rate", "1e-3", "--ema", "0.9")) == 0
    found = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert found["steps"] == 2 and found["validation"]["similarity"] is not None
    network, model = load_promptnet(out), base(family)
    assert network.config.text_widths == tuple(tower.sizes.width for tower in model.towers)
    assert network.config.unet == model.unet.config
    state = load_training(out.with_suffix(".training") / "step-00000002.safetensors")[1]
    assert state["exp_avg.output.weight"].any()
    assert not (tmp_path / "one").exists()


def test_a_plan_is_made_of_headers_and_is_what_a_step_takes(files, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    assert program.main(arguments(files, "SDXL", out, "--plan", "--bf16", "--gradient-checkpointing")) == 0
    assert "DOES NOT FIT" not in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize(
    ("family", "prediction", "size"), [("SD 2.x", "eps", 512), ("SD 2.x", "v", 768), ("SDXL", "eps", 1024)]
)
def test_a_plan_is_for_the_size_that_is_trained(files, tmp_path, family, prediction, size):
    path = written(tmp_path / "one.safetensors", checkpoint(family, prediction))
    options = PretrainingOptions(batch_size=4)
    planned = sizes_of(Command(tmp_path / "x.safetensors", options), Data(""), path, files / "vision.safetensors")
    assert planned.size == StableDiffusion.load(path).size == size


def test_the_authors_layout_is_read_back_as_the_same_network(files, tmp_path):
    out = tmp_path / "theirs.safetensors"
    assert program.main(arguments(files, "SD 1.x", out, "--layout", "authors", "--learning-rate", "1e-2")) == 0
    ours = load_promptnet(out)
    path = tmp_path / "theirs" / "promptnet" / "diffusion_pytorch_model.bin"
    check_archive(path)
    beside = config_beside(path, pytest.fail)
    theirs = official_promptnet(torch.load(path, weights_only=True), unet=ours.config.unet, beside=beside)
    assert theirs.config == ours.config and ours.config.with_noise
    generator = torch.Generator().manual_seed(0)
    latent, noisy = torch.randn(2, 3, 4, 16, 16, generator=generator)
    tokens, timesteps = torch.randn(3, 17, 32, generator=generator), torch.tensor([1, 501, 981])
    word = ours(latent, timesteps, tokens, noisy)
    found = theirs(latent, timesteps, tokens, noisy)
    torch.testing.assert_close(found, word, rtol=0, atol=2e-3 * word.std().item())  # ours was kept in float16
    said = json.loads((tmp_path / "theirs" / "promptnet" / "config.json").read_text())
    assert said["_class_name"] == "PromptNetModel" and said["with_noise"] is True


def test_what_theirs_cannot_be_is_refused(files, tmp_path, capsys):
    network = network_for(base("SD 1.x"))
    with pytest.raises(PromptNetError, match="--layout authors"):
        released.authors_state(network.state_dict(), network.config)
    assert program.main(arguments(files, "SDXL", tmp_path / "one.safetensors", "--layout", "authors")) == 1
    assert "one word for one text encoder" in capsys.readouterr().err


def test_a_plan_counts_what_is_held(files):

    options = PretrainingOptions(batch_size=4, ema=0.9)
    sizes = sizes_of(
        Command(files / "x.safetensors", options),
        Data("", size=32),
        files / "SD 1.x.safetensors",
        files / "vision.safetensors",
    )
    found = need(sizes, options, bfloat16=False, encode=False)
    model = base("SD 1.x")
    network = new_promptnet(model, sizes.config)
    learned = sum(value.numel() for value in network.parameters())
    frozen = [*tensors_of(model.unet, model.towers[0]), *network.buffers()]
    expected = 4 * 4 * learned + sum(value.nbytes for value in frozen)  # weights, two moments, the average
    steps = 4 * len(list(network.parameters()))  # AdamW counts its steps for each
    assert found.parameters == learned
    assert 0 <= found.held - expected - steps < 16 << 10, "the schedule and a prompt's ids"
    assert found.step > found.held + 4 * learned, "gradients and what waits for them"
    two, four = (need(sizes, PretrainingOptions(batch_size=4, micro=m), bfloat16=False) for m in (2, 4))
    assert four.step > two.step and abs(four.held - two.held) < 16 << 10
    spared = need(sizes, options, bfloat16=False, encode=False, checkpointing=True)
    assert spared.step < found.step and spared.operations > found.operations
    text = report(found, options, [CARDS["rtx3090"]], 1, price=1.0)
    assert "fits" in text and "1 a card and hour" in text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_counts_what_a_real_step_allocates(files, checkpointing):
    from profusion.pretraining.engine import Engine
    from profusion.pretraining.objective import Objective
    from profusion.pretraining.peak import PeakMemory
    from profusion.pretraining.ranks import Ranks

    options = PretrainingOptions(batch_size=4, micro=2, ema=0.9)
    command = Command(files / "x.safetensors", options)
    sizes = sizes_of(command, Data("", size=32), files / "SD 1.x.safetensors", files / "vision.safetensors")
    planned = need(sizes, options, bfloat16=False, checkpointing=checkpointing, encode=False)
    model = base("SD 1.x")
    network = new_promptnet(model, sizes.config)
    engine = Engine(Objective(network, model, options.prompts), options, Ranks(), checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(4, 4, 16, 16, generator=generator), torch.randn(4, 17, 32, generator=generator)
    engine.take(*given)
    known = [*tensors_of(model.unet, *model.towers, network), *engine.average.values()]
    known += [value for state in engine._optimizer.state.values() for value in state.values()]
    engine._optimizer.zero_grad()
    with PeakMemory(known) as memory:  # of the optimizer: on a card it is one kernel, on the CPU it has more copies
        engine._gradient(*given)
    assert memory.peak == pytest.approx(planned.step, rel=0.05)
