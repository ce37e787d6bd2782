"""The training tool as a whole, on a recipe of a few steps: from drawing to weights, in one go or in slices."""

import contextlib
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from profusion.models.tokenizer import tokenize
from profusion.toybox import world
from profusion.toybox.configs import TOYBOX_VAE
from profusion.toybox.drawing import SIZE
from profusion.toybox.joint import JointToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CELLS, NETWORKS, WEIGHTS, Toybox, load_network, seeded
from training import toybox as tool
from training.data import Captions, DataSet
from training.mmdit import sample_sigmas
from training.recipe import STAGES, Recipe
from training.session import Session, Stopped
from training.text import check_vocabulary, compact, train_text, vocabulary, whole
from training.unet import context_of, localisation_loss, sample_timesteps
from training.vae import rectangles, spliced, standardise

TINY = Recipe(
    pictures=6,
    vae_steps=3,
    decoder_steps=2,
    judge_scenes=6,
    judge_steps=2,
    text_steps=2,
    unet_steps=4,
    vision_steps=2,
    mmdit_steps=3,
    batch=2,
    sheet_every=2,
)
SHEETS = [
    "1-drawn",
    "2-vae",
    "3-decoder",
    "4-unet-00002",
    "4-unet-finished",
    "5-mmdit-00002",
    "5-mmdit-finished",
]


@dataclass
class Sliced(Session):
    """A session that is over after a few looks at the clock."""

    looks_left: int = 3

    @property
    def over(self):
        self.looks_left -= 1
        return self.looks_left < 0


def session(folder, kind=Session, **options):
    return kind(folder, TINY, sheet_scenes=2, sheet_steps=2, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work folder in which the tool has run through."""
    folder = tmp_path_factory.mktemp("toybox")
    tool.train(session(folder), folder / "weights")
    return folder


@pytest.mark.slow
def test_the_tool_trains_weights_that_load_and_draw(trained):
    toybox, judge = Toybox.load(trained / "weights"), Judge.load(trained / "weights")
    for model in (toybox, JointToybox.load(trained / "weights")):
        latents = model.generate(["a photo of a red ball on grass"], seeded(0), steps=2)
        assert latents.shape == (1, 4, CELLS, CELLS)
        pictures = model.vae.pictures(latents)
        assert pictures.shape == (1, SIZE, SIZE, 3) and judge.look(pictures).nouns[0] in world.NOUNS
    known = toybox.text.text_model.embeddings.token_embedding.weight.any(dim=1)
    assert known.nonzero().flatten().tolist() == vocabulary().tolist()
    networks = [f"toybox_{network}.safetensors" for network in (*NETWORKS, "mmdit", "judge")]
    written = [path.name for path in sorted((trained / "weights").iterdir())]
    assert written == ["clip_vision_config.json", *sorted(networks), "unfinished"]
    for network in ("unet", "mmdit"):  # as they were when they were last looked at
        early, late = (
            load_network(network, folder) for folder in (trained / "weights/unfinished", trained / "weights")
        )
        assert early.keys() == late.keys() and not all(torch.equal(early[name], late[name]) for name in early)


@pytest.mark.slow
def test_a_finished_autoencoder_is_taken_as_it_is(trained, tmp_path):
    with pytest.raises(Stopped):
        tool.train(session(tmp_path, Sliced, looks_left=0), tmp_path / "weights", trained / "weights")
    assert not list(tmp_path.glob("vae.*")) and not list(tmp_path.glob("judge.*"))
    for network in ("vae", "judge"):
        given, taken = (load_network(network, folder / "weights") for folder in (trained, tmp_path))
        assert all(torch.equal(value, taken[name]) for name, value in given.items())


@pytest.mark.slow
def test_the_image_towers_sizes_are_written_for_the_host(trained):
    shipped, written = (
        json.loads((folder / "clip_vision_config.json").read_text()) for folder in (WEIGHTS, trained / "weights")
    )
    assert written["image_size"] == SIZE and written.keys() == shipped.keys()
    assert {key for key in shipped if shipped[key] != written[key]} <= {"image_size", "patch_size"}


@pytest.mark.slow
def test_there_is_a_sheet_after_every_stage(trained):
    assert sorted(path.stem for path in (trained / "sheets").iterdir()) == SHEETS
    heights = [Image.open(trained / "sheets" / f"{name}.png").height for name in SHEETS]
    assert heights == [SIZE, 2 * SIZE, 2 * SIZE, *[3 * SIZE] * 4]
    drawn = np.asarray(Image.open(trained / "sheets" / "4-unet-finished.png"))[:SIZE]
    assert (drawn == np.asarray(Image.open(trained / "sheets" / "1-drawn.png"))).all()


@pytest.mark.slow
def test_the_tool_in_slices_makes_the_same_weights_bit_for_bit(trained, tmp_path):
    sittings, finished = 0, False
    while not finished and sittings < 40:
        sittings += 1
        with contextlib.suppress(Stopped):
            tool.train(session(tmp_path, Sliced), tmp_path / "weights")
            finished = True
    assert finished and sittings > 3
    for path in (trained / "weights").glob("*.safetensors"):
        once, sliced = load_file(path), load_file(tmp_path / "weights" / path.name)
        assert once.keys() == sliced.keys()
        assert all(torch.equal(value, sliced[name]) for name, value in once.items()), path.name


def test_a_slice_of_no_minutes_keeps_what_was_drawn_and_says_how_to_go_on(tmp_path, capsys):
    command = ["--work", str(tmp_path), "--minutes", "0", "--device", "cpu", "--pictures", "6", "--vae-steps", "3"]
    tool.main(command)
    assert "vae stopped at step 0 of 3; the same command goes on from there" in capsys.readouterr().out
    assert (tmp_path / "pictures.npy").exists() and (tmp_path / "sheets" / "1-drawn.png").exists()
    with pytest.raises(SystemExit, match="vae_steps=3, not 4"):
        tool.main([*command[:-1], "4"])


def test_options_reach_the_session():
    arguments = tool.parse_arguments(["--device", "cuda:1", "--minutes", "9", "--unet-steps", "5"])
    assert arguments.device == torch.device("cuda", 1) and arguments.minutes == 9 and arguments.unet_steps == 5
    assert tool.recipe_of(arguments) == Recipe(unet_steps=5)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(SystemExit, match=missing):
        tool.main(["--device", missing])


def test_what_is_trained_goes_where_the_session_says(tmp_path):
    at = Session(tmp_path, TINY, torch.device("meta"))
    assert at.put(torch.zeros(2, 3, 8, 8)).device.type == "meta"
    assert session(tmp_path).put(torch.zeros(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    batch = Captions.of([world.full_caption(scene) for scene in scenes(2)], at)
    assert {value.device.type for value in vars(batch).values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.slow
def test_the_tool_on_an_accelerator(tmp_path):
    tool.train(session(tmp_path, device=torch.device("cuda")), tmp_path / "weights")
    Toybox.load(tmp_path / "weights")


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(count)]


def test_pictures_are_drawn_once(tmp_path):
    first = DataSet.draw(session(tmp_path))
    written = (tmp_path / "pictures.npy").stat().st_mtime_ns
    again = DataSet.draw(session(tmp_path))
    assert (tmp_path / "pictures.npy").stat().st_mtime_ns == written
    assert first.scenes == again.scenes and (first.pictures == again.pictures).all()
    assert (first.pictures[2] == world.render(first.scenes[2]).image).all()
    assert first.masks.shape == (6, 2, CELLS, CELLS) and first.masks.max() == 1
    assert first.pixels(torch.tensor([1, 3])).shape == (2, 3, SIZE, SIZE)


def test_the_world_is_in_the_vocabulary():
    check_vocabulary()
    tokens = tokenize(["a photo of a lemon at night", ""])
    assert torch.equal(vocabulary()[compact(tokens)], tokens)


def test_the_whole_tower_says_what_the_small_one_does(tmp_path):
    data = DataSet(scenes(6), np.zeros((6, 1)), torch.zeros(6))
    text = train_text(session(tmp_path), data)
    tokens = tokenize(["a photo of a red ball on grass"])
    assert torch.equal(whole(text)(tokens), text(compact(tokens)))


def test_end_and_padding_rows_are_the_empty_prompts(tmp_path):
    at = session(tmp_path)
    text = train_text(at, DataSet(scenes(6), np.zeros((6, 1)), torch.zeros(6)))
    caption = world.full_caption(scenes(1)[0])
    words = len(caption.text.split())
    batch = Captions.of([caption], at)
    with torch.no_grad():
        kept, replaced = (context_of(text, batch, keep_padding=keep) for keep in (True, False))
        empty = text(compact(tokenize("")))
    assert torch.allclose(kept[:, : words + 1], replaced[:, : words + 1], atol=1e-5)
    assert torch.equal(replaced[0, words + 1 :], empty[0, words + 1 :])
    assert not torch.allclose(kept[0, words + 1 :], empty[0, words + 1 :], atol=1e-3)


def test_the_noun_is_asked_to_own_its_object(tmp_path):
    rng = np.random.default_rng(1)
    scene = next(s for s in iter(lambda: world.sample_scene(rng), None) if len(s.objects) == 1)
    batch = Captions.of([world.full_caption(scene)], session(tmp_path))
    masks = torch.zeros(1, 2, CELLS, CELLS)
    masks[0, 0, 4:12, 4:12] = 1
    inside = masks[0, 0].flatten()[:, None]

    def attention(noun_inside, place_outside):
        maps = torch.zeros(1, CELLS**2, 77)
        maps[0, :, batch.nouns[0, 0]] = noun_inside * inside[:, 0]
        maps[0] += place_outside * (1 - inside) * batch.background[0]
        return [maps]

    (good, share), (bad, none) = (
        localisation_loss(attention(*shares), masks, batch, torch.ones(1)) for shares in ((0.7, 0.5), (0.0, 0.0))
    )
    assert good == 0 and bad > 0.5 and none == 0 and share == pytest.approx(0.7)
    assert localisation_loss(attention(0, 0), masks, batch, torch.zeros(1))[0] == 0  # nobody was told


def test_timesteps_gather_where_shapes_are_decided():
    t = sample_timesteps(4000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 999
    assert 0.5 < ((t > 400) & (t < 850)).float().mean() < 0.8 and (t < 100).float().mean() > 0.015


def test_sigmas_gather_there_too():
    sigma = sample_sigmas(4000, torch.Generator().manual_seed(0))
    assert sigma.min() >= 0 and sigma.max() <= 1
    assert 0.5 < ((sigma > 0.35) & (sigma < 0.85)).float().mean() < 0.8 and (sigma < 0.1).float().mean() > 0.02


@pytest.mark.slow
def test_the_transformer_learns_beside_the_unet_in_a_run_of_its_own(trained, tmp_path):
    """Two runs share a folder: what one of them makes alone is what both make in turn."""
    tool.train(session(tmp_path), tmp_path / "weights", networks=("mmdit",))
    assert not list(tmp_path.glob("unet.*"))
    alone, inturn = (load_network("mmdit", folder / "weights") for folder in (tmp_path, trained))
    assert all(torch.equal(value, inturn[name]) for name, value in alone.items())


def test_spliced_pictures_are_spliced_where_their_latents_are():
    region = rectangles(torch.Size((4, 4, 8, 8)), torch.Generator().manual_seed(1))
    assert not region[1::2].any() and all(0 < part.mean() < 1 for part in region[::2])
    latents = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 4, 8, 8)
    pictures = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    small, large = spliced(latents, region), spliced(pictures, region)
    assert torch.equal(large[:, :, ::8, ::8], small[:, :3]) and torch.equal(small[1::2], latents[1::2])
    assert torch.equal(small[2][0] != 2, region[2, 0] > 0)


def test_standardised_latents_have_unit_variance_and_decode_to_the_same(tmp_path):
    class Linear(nn.Module):
        """An autoencoder without the networks: the two 1 x 1 convolutions around means of 8 x 8 pixels."""

        config = TOYBOX_VAE

        def __init__(self):
            super().__init__()
            self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

        def posterior(self, pixels):
            h = nn.functional.avg_pool2d(pixels, 8)
            return self.quant_conv(torch.cat([h, h.square(), h[:, :2]], dim=1)).chunk(2, dim=1)

        def encode(self, pixels):
            return self.posterior(pixels)[0]

    at, vae = session(tmp_path), Linear()
    data = DataSet.draw(at)
    pixels = data.pixels(torch.arange(6))
    with torch.no_grad():
        before, (_, spread) = vae.post_quant_conv(vae.encode(pixels)), vae.posterior(pixels)
        standardise(at, vae, data)
        mean, log_variance = vae.posterior(pixels)
        scaled = mean * vae.config.scale_factor
        assert torch.allclose(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
        assert torch.allclose(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
        assert torch.allclose(vae.post_quant_conv(mean), before, atol=1e-4)
        shrunk = (spread - log_variance).mean(dim=(0, 2, 3))  # the posterior's width is scaled as its mean is
        assert torch.allclose((spread - log_variance).amax(dim=(0, 2, 3)), shrunk, atol=1e-4)


def test_by_the_recipe_all_of_it_takes_at_most_six_hours(tmp_path):
    at = Session(tmp_path, Recipe())
    assert all(0 < at.minutes_left(name, 0, None) < 6 * 60 for name in STAGES)
