"""Toybox's own pair as judge, what it makes of a wrong pair, and the libraries' backbones."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from profusion.metrics import MetricError
from profusion.metrics.concept import LEAST_COLORS
from profusion.metrics.encoders import DISCS, color_check
from profusion.metrics.libraries import CLIP_MODELS, OpenClip, Timm
from profusion.metrics.similarity import cosine
from profusion.toybox import world
from profusion.toybox.drawing import SIZE


def test_a_picture_is_closest_to_its_own_caption(toybox):
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(16)]
    pictures = torch.stack([torch.from_numpy(world.render(scene).image).float() / 255 for scene in scenes])
    cosines = cosine(toybox.images(pictures), toybox.texts([world.full_caption(scene).text for scene in scenes]))
    right = cosines.argmax(dim=1) == torch.arange(16)
    others = cosines[~torch.eye(16, dtype=torch.bool)]
    assert right.sum() >= 13 and cosines.diagonal().mean() > others.mean() + 2 * others.std()


def test_the_discs_have_the_colours_that_toybox_was_taught():
    assert DISCS == world.PALETTE


def test_the_discs_have_the_size_that_toyboxs_pair_takes_alone():
    class Pair:
        def images(self, pictures):
            self.seen = tuple(pictures.shape)
            return torch.ones(len(pictures), 4)

        def texts(self, texts):
            return torch.ones(len(texts), 4)

    pair = Pair()
    color_check(pair)
    assert pair.seen == (len(DISCS), SIZE, SIZE, 3)


def test_a_pair_that_was_not_trained_together_is_found_out(toybox, mismatched):
    assert color_check(toybox) >= LEAST_COLORS
    assert max(color_check(mismatched(seed)) for seed in range(20)) < LEAST_COLORS


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_projection_that_was_never_loaded_is_found_out(mismatched, value):
    pair = mismatched(0)
    pair._mixing.fill_(value)
    assert color_check(pair) == 0


def test_all_nine_models_of_the_table_are_known_to_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: its CLIP models are not tested")
    released = {model for model, tag in open_clip.list_pretrained() if tag == "openai"}
    assert len(CLIP_MODELS) == 9 and set(CLIP_MODELS.values()) <= released


def test_open_clips_own_model_and_preprocessing(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: its adapter is not tested")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    path = tmp_path / "tiny-test.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    encoder = OpenClip("tiny-test", None)
    pictures = torch.rand(2, 40, 56, 3)
    found, texts = encoder.images(pictures), encoder.texts(["a cat", "a ball"])
    assert found.shape == texts.shape == (2, 16) and "tiny-test" in encoder.name
    torch.testing.assert_close(encoder.images(pictures[:1]), found[:1])
    assert not torch.allclose(texts[0], texts[1])
    with pytest.raises(MetricError, match="cannot make no-such-model"):
        OpenClip("no-such-model", None)


def test_timms_features():
    pytest.importorskip("timm", reason="timm is not installed: its adapter is not tested")
    torch.manual_seed(0)
    encoder = Timm("test_vit.r160_in1k", weights=False)
    found = encoder.images(torch.rand(2, 50, 40, 3))
    assert found.ndim == 2 and len(found) == 2 and encoder.measure == "image similarity"
    assert not torch.allclose(found[0], found[1])
    with pytest.raises(MetricError, match="cannot make no-such-model"):
        Timm("no-such-model", weights=False)


def test_weights_that_cannot_be_had_are_named(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed: its adapter is not tested")

    def unreachable(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(MetricError, match=r"cannot make vit_small_patch16_224\.dino: no connection"):
        Timm()


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MetricError, match="pip install open_clip_torch"):
        OpenClip("ViT-B/32")
    with pytest.raises(MetricError, match="pip install timm"):
        Timm()
