"""CLIP's image towers from files in both layouts, alone and as part of a whole CLIP."""

from dataclasses import replace

import pytest
import torch

from profusion.checkpoints import CheckpointError, load_image_tower, vision_plan
from profusion.models.clip import VisionModel
from profusion.models.configs import TextConfig, VisionConfig
from tests import shrunken

LARGE = VisionConfig(1024, 24, 16, 4096, image_size=224, patch_size=14, projection=768)
HUGE = VisionConfig(1280, 32, 16, 5120, image_size=224, patch_size=14, projection=1024, activation="gelu")


@pytest.fixture(scope="module", params=shrunken.VISIONS.values(), ids=shrunken.VISIONS)
def config(request):
    return request.param


def whole_clip(config, open_clip):
    """A tower as it is in the file of a whole CLIP, whose text tower nobody asks for here."""
    state, text = shrunken.vision_state(config), shrunken.text_state(TextConfig(64, 2, 1, 96), 9)
    if not open_clip:
        positions = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
        return state | text | positions | {"logit_scale": torch.tensor(4.6)}
    visual = {f"visual.{name}": x for name, x in shrunken.as_open_clip(state).items()}
    return visual | shrunken.as_open_clip(text) | {"logit_scale": torch.tensor(4.6)}


@pytest.mark.parametrize("open_clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_weight_is_where_it_was_drawn_for(tmp_path, config, open_clip, dtype):
    path = shrunken.written(tmp_path / "clip.safetensors", whole_clip(config, open_clip), dtype)
    assert vision_plan(path)[1] == config
    tower, drawn = load_image_tower(path), shrunken.vision_state(config)
    state = tower.state_dict()
    assert state.keys() == drawn.keys() and len(state) > 300
    assert all(torch.equal(state[name], x.to(dtype).float()) for name, x in drawn.items())
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    tokens = tower(tower.preprocess(torch.rand(2, 40, 30, 3)))
    cells = (config.image_size // config.patch_size) ** 2
    assert tokens.shape == (2, 1 + cells, config.width) and tokens.isfinite().all()


def test_a_tower_without_a_projection_gives_tokens_and_no_embeddings(tmp_path, config):
    state = shrunken.vision_state(config)
    state.pop("visual_projection.weight")
    tower = load_image_tower(shrunken.written(tmp_path / "clip.safetensors", state))
    pixels = tower.preprocess(torch.rand(1, 40, 30, 3))
    assert tower(pixels).isfinite().all()
    with pytest.raises(ValueError, match="no projection"):
        tower.embed(pixels)


@pytest.mark.parametrize(("config", "parameters"), [(LARGE, 303_966_208), (HUGE, 632_076_800)])
@pytest.mark.parametrize("open_clip", [False, True])
def test_full_size_files_are_told_by_their_names(tmp_path, config, parameters, open_clip):
    with torch.device("meta"):
        state = VisionModel(config).state_dict()
    if open_clip:
        state = {f"visual.{name}": x for name, x in shrunken.as_open_clip(state).items()}
    path = shrunken.sparse(tmp_path / "clip.safetensors", {name: tuple(x.shape) for name, x in state.items()})
    assert vision_plan(path)[1] == config
    assert sum(x.numel() for x in state.values()) == parameters


def test_what_is_no_image_tower_of_clips_is_named(tmp_path):
    path, base = tmp_path / "clip.safetensors", shrunken.VISIONS["ViT-L/14"]

    def said(tensors):
        shrunken.written(path, tensors)
        with pytest.raises(CheckpointError, match="'clip.safetensors' cannot be loaded: ") as raised:
            load_image_tower(path)
        return str(raised.value)

    state = shrunken.vision_state(base)
    assert "12 layers" in said(shrunken.vision_state(replace(base, layers=12)))
    assert "none of CLIP's" in said({name: x for name, x in state.items() if "pre_layrnorm" not in name})
    assert "1 tensors more, such as 'extra'" in said(state | {"extra": torch.zeros(2)})
    missing = "vision_model.encoder.layers.7.mlp.fc1.bias"
    assert missing in said({name: x for name, x in state.items() if name != missing})
    assert "it is a whole checkpoint" in said(shrunken.checkpoint("SD 1.x"))
    assert "it is a text encoder" in said(shrunken.text_state(TextConfig(64, 2, 1, 96), 1))
    assert "it holds 'something'" in said({"something": torch.zeros(2)})
