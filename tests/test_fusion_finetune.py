"""The benchmark of fine-tuning: what its variants show, and that its penalty pulls."""

import pytest
import torch

from benchmarks import fusion_finetune as bench
from benchmarks.fusion_ablation import SHIPPED
from benchmarks.fusion_judging import references
from profusion.models.tokenizer import words_to_ids
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.pseudo_word import prompt_tokens
from profusion.toybox.fused import FusedToybox
from profusion.toybox.pipeline import CELLS, Toybox

pytestmark = pytest.mark.skipif(not SHIPPED.is_file(), reason="Toybox's PromptNet is not there")


@pytest.fixture(scope="module")
def fused():
    return FusedToybox(Toybox.load(), load_promptnet(SHIPPED))


@pytest.fixture(scope="module")
def known():
    return references(2, 3)


def test_variants_have_the_object_itself_on_other_backgrounds(fused, known):
    picture, mask = known.pictures[0], known.masks[0]
    shown = bench.augmented(fused.toybox, picture, mask, known.nouns[0], seed=1, steps=3, cfg=2.0)
    assert torch.equal(shown[0], picture) and len(shown) == 1 + len(bench.PLACES)
    inside, around = mask == 1, bench.soft_edge(mask, bench.EDGE) == 0
    for variant in shown[1:]:
        assert torch.equal(variant[inside], picture[inside])
        assert (variant - picture).abs()[around].mean() > 0.05


def trained(fused, known, setting, steps=3):
    recipe = bench.Recipe(SHIPPED, 2, steps, 1e-3, 1e-3, 2, 2.0, 0.5, 3)
    return bench.finetuned(fused, known, 0, setting, recipe.options(0), (2, 2.0))


def words(fused, known):
    return fused.words(known.pictures[:1], torch.tensor([499]))


def test_each_picture_has_a_promptnet_of_its_own_and_the_shipped_one_stays(fused, known):
    before = words(fused, known)
    own, within, cost = trained(fused, known, bench.SETTINGS[1])
    assert torch.equal(words(fused, known), before) and not torch.equal(words(own, known), before)
    x, context = torch.ones(1, 4, CELLS, CELLS), fused.toybox.context("a cat")
    with torch.no_grad():
        plain = fused.toybox.unet(x, torch.tensor([500]), context)
        with within:
            assert not torch.equal(fused.toybox.unet(x, torch.tensor([500]), context), plain)
        assert torch.equal(fused.toybox.unet(x, torch.tensor([500]), context), plain)
    assert cost["patch_bytes"] > 10_000
    own, _, cost = trained(fused, known, bench.NONE)
    assert own is fused and not cost


def test_the_penalty_pulls_s_to_the_noun(fused, known):
    """The more of it, the nearer; what is measured is the distance that it names."""
    embeddings = fused.toybox.text.text_model.embeddings
    rows = list(prompt_tokens("a photo of S*", 4)[1])
    noun = (
        embeddings.token_embedding.weight[words_to_ids(known.nouns[0])].mean(dim=0)
        + embeddings.position_embedding.weight[rows]
    )
    apart = []
    for penalty in (0.0, 100.0):
        own, *_ = trained(fused, known, bench.Setting("", attention=False, penalty=penalty), steps=5)
        apart.append((words(own, known)[0] - noun).square().mean().item())
    assert apart[1] < 0.8 * apart[0]
