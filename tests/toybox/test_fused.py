"""Fusion Sampling on Toybox itself, against the paper's algorithm written straight down in its own symbols."""

import copy

import pytest
import torch

from profusion.diffusion import alphas_cumprod, sampling_sigmas, timestep_of
from profusion.fusion import FusionOptions, Guidance
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.network import KNOTS
from profusion.promptnet.pseudo_word import encode
from profusion.toybox.drawing import SIZE
from profusion.toybox.fused import FusedToybox
from profusion.toybox.picture_sets import drawn_pictures
from profusion.toybox.pipeline import NETWORKS, WEIGHTS, Toybox, initial_noise, seeded

pytestmark = pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in (*NETWORKS, "promptnet")),
    reason="Toybox's weights are not there: train them with `python -m training.toybox`",
)
STEPS, M, ETA, GAMMA, FUSION_CFG, CFG = 4, 2, 0.9, 0.7, 3.0, 5.0  # four steps: all levels are knots


@pytest.fixture(scope="module")
def fused():
    return FusedToybox(Toybox.load(), load_promptnet(WEIGHTS / "toybox_promptnet.safetensors"))


def pictures(seed, count=1):
    return torch.rand(count, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def straight(fused, picture, weights, generator, noises):
    """The paper's Algorithm 1, one picture, alpha-bar form: m fusion steps and a DDIM step at each timestep."""
    toybox, levels = fused.toybox, sampling_sigmas(STEPS)[:-1]
    times = timestep_of(levels).tolist()
    assert set(times) < set(KNOTS)
    bars = [*alphas_cumprod()[times].double().tolist(), 1.0]
    plain, nothing = toybox.context("a photo of a ball on snow"), toybox.context("")
    x = initial_noise([generator])
    for t, a_t, a_p in zip(times, bars, bars[1:], strict=False):
        word = fused.words(picture, torch.tensor([t]))

        def guided(x, gamma, scale, t=t, word=word):
            contexts = (
                encode(toybox.text, "a photo of a S* on snow", word, gamma, holds_position=True),
                plain,
                nothing,
            )
            both, text, empty = (toybox.unet(x, torch.tensor([t]), context) for context in contexts)
            total = sum(weights)
            return empty + scale * weights[0] / total * (both - empty) + scale * weights[1] / total * (text - empty)

        for _ in range(M if a_p < 1 else 0):
            s2 = ETA**2 * (1 - a_p) / (1 - a_t) * (1 - a_t / a_p)
            eps, z = guided(x, GAMMA, FUSION_CFG), torch.randn(x.shape, generator=noises)
            x = x - s2 * (1 - a_t) ** 0.5 / (1 - a_p) * eps
            x = x + s2**0.5 * ((1 - a_t) * (2 - 2 * a_p - s2)) ** 0.5 / (1 - a_p) * z
        eps = guided(x, 1.0, CFG)
        x = a_p**0.5 * (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5 + (1 - a_p) ** 0.5 * eps
    return x


@pytest.fixture
def doubled(fused):
    """Everything in float64: in float32 the rounding of each step is amplified by the guidance of the next."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    copied = copy.deepcopy(fused)
    for module in (copied.toybox.unet, copied.toybox.text, copied.toybox.vae, copied.toybox.vision, copied.promptnet):
        module.double()
    yield copied
    torch.set_default_dtype(before)


def test_the_two_stage_loop_is_the_papers_algorithm(doubled):
    fused = doubled
    guidance = Guidance((1.0, 0.5), CFG, FUSION_CFG, GAMMA)
    noises = torch.Generator().manual_seed(9)
    result = fused.generate(
        "a photo of a S* on snow", ["ball"], [pictures(1)], seeded(3), guidance, FusionOptions(M, ETA), STEPS, noises
    )
    expected = straight(fused, pictures(1), (1.0, 0.5), *seeded(3), torch.Generator().manual_seed(9))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_context_at_a_few_knots_serves_all_levels(fused):
    """Against S* and the text encoder at each of 20 levels: far nearer than the S* of another picture."""
    times, prompt = timestep_of(sampling_sigmas(20)[:-1]), "a photo of a S* on snow"
    drawn = [picture[None] for picture in drawn_pictures(4, seed=5)]
    exact = [encode(fused.toybox.text, prompt, fused.words(picture, times), holds_position=True) for picture in drawn]
    for index, picture in enumerate(drawn):
        at = fused.contexts(prompt, [picture])
        errors = apart(torch.cat([at(t[None], 1.0) for t in times]), exact[index])
        assert errors[[0, 5, 10, 15]].max() < 1e-5  # the knots
        assert errors.max() > 1e-4 and errors.mean() < 0.2 * apart(exact[index - 1], exact[index]).mean()


def apart(one, other):
    """How far contexts (T, 77, width) lie apart, in the size of the other."""
    return (one - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))


def test_each_row_has_its_own_picture(fused):
    guidance = Guidance((1.0, 0.0), CFG)
    both = fused.generate(
        "a S*", ["ball", "cup"], [pictures(1), pictures(2)], seeded(3, 4), guidance, FusionOptions(0), 3
    )
    alone = fused.generate("a S*", ["cup"], [pictures(2)], seeded(4), guidance, FusionOptions(0), 3)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_rows_are_counted(fused):
    before = fused.rows
    fused.generate(
        "a S*", ["ball"] * 2, [pictures(1)] * 2, seeded(1, 2), Guidance((1.0, 0.5)), FusionOptions(1), 4, seeded(0)[0]
    )
    assert (
        fused.rows - before == (3 + 4) * 3 * 2
    )  # no fusion stage before the last step; three conditions; two pictures


def test_refresh_is_for_several_conditions(fused):
    """With one there is nothing to save: the run is the same, to the bit. With two, plain
    guidance's rows are enough."""
    given = ("a S*", ["ball"], [pictures(1)])
    drawn = [
        fused.generate(*given, seeded(1), Guidance((1.0,), refresh=refresh), FusionOptions(0), 4) for refresh in (1, 2)
    ]
    assert torch.equal(*drawn)
    before = fused.rows
    fused.generate(*given, seeded(1), Guidance((1.0, 0.5), refresh=2), FusionOptions(0), 4)
    assert fused.rows - before == 2 * 4


def test_s_alone_says_nothing_of_the_prompt(fused):
    """independent: the rest of the prompt reaches the picture through the plain text only, which has no weight here."""
    guidance = Guidance((1.0, 0.0), CFG, mode="independent")
    drawn = [
        fused.generate(prompt, ["ball"], [pictures(1)], seeded(1), guidance, FusionOptions(0), 2)
        for prompt in ("a S* on snow", "a S* at night")
    ]
    assert torch.equal(*drawn)
