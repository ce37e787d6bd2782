"""Concept Augment in a real ComfyUI, on a tiny random model: the object stays, the rest comes
from noise and the prompt."""

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


@pytest.fixture(scope="module")
def host(pack):
    """The pack, its node, and a text encoder."""
    return types.SimpleNamespace(
        pack=pack, augment=importlib.import_module(f"{pack.__name__}.nodes.augment"), clip=tiny.clip()
    )


def mask():
    """A square of 4 x 4 latent cells in the middle."""
    found = torch.zeros(1, 64, 64)
    found[:, 16:48, 16:48] = 1
    return found


def test_one_variant_is_no_variants(augment, host, monkeypatch):
    shown = []
    monkeypatch.setattr(host.augment, "show", lambda _, text, *__, **___: shown.append(text) or {})
    augment(count=1)
    augment(count=2)
    assert [text.split(" of ")[0] for text in shown] == ["1 variant", "2 variants"]


@pytest.fixture
def augment(host):
    """Run the node as the host does, in inference mode: -> (images, masks)."""

    def run(model=None, **inputs):
        defaults = {
            "clip": host.clip,
            "vae": PooledVae(),
            "image": pictures(1),
            "mask": mask(),
            "noun": "ball",
            "prompts": "a %noun% on snow\na %noun% on grass",
            "count": 2,
            "seed": 3,
            "steps": 2,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "feather": 2,
            "include_picture": False,
        }
        with torch.inference_mode():
            model = tiny.model() if model is None else model
            return host.augment.ConceptAugment.execute(model, **{**defaults, **inputs}).args

    return run


def test_the_schema_is_frozen_and_explained(host):
    schema = host.augment.ConceptAugment.GET_SCHEMA()
    assert schema.node_id == "ProFusion_ConceptAugment"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "model:MODEL",
        "clip:CLIP",
        "vae:VAE",
        "image:IMAGE",
        "mask:MASK",
        "noun:STRING",
        "prompts:STRING",
        "count:INT",
        "seed:INT",
        "steps:INT",
        "cfg:FLOAT",
        "sampler_name:COMBO",
        "scheduler:COMBO",
        "feather:INT",
        "include_picture:BOOLEAN",
        "object_place:COMBO",
    ]
    assert [output.io_type for output in schema.outputs] == ["IMAGE", "MASK"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    root = Path(host.augment.__file__).parents[1]
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()
    ids = [node.GET_SCHEMA().node_id for node in host.pack.NODES]
    assert schema.node_id in ids and len(ids) == len(set(ids))


def test_the_object_stays_to_the_bit_and_the_rest_is_drawn(augment):
    seen = []
    on_report(lambda done, total, _: seen.append((done, total)))
    images, masks = augment(count=3, include_picture=True)
    assert images.shape == (4, 64, 64, 3) and masks.shape == (4, 64, 64) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1
    inside = mask()[0] == 1
    picture = pictures(1)[0]
    assert torch.equal(images[0], picture) and all(torch.equal(one, mask()[0]) for one in masks)
    assert all(torch.equal(image[inside], picture[inside]) for image in images)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[14:50, 14:50] = False  # the edge of 2 pixels
    drawn = [image[outside] for image in images[1:]]
    assert all((one - picture[outside]).abs().mean() > 0.05 for one in drawn)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert [value for value, total in seen if total == 6] == [1, 2, 3, 4, 5, 6]


def test_nothing_of_the_old_background_is_left(augment):
    """Two pictures that differ around the object only: with an autoencoder that mixes no cells, the same variants."""
    picture, other = pictures(1), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    other = torch.where(mask()[..., None] == 1, picture, other)
    one, same = augment(image=picture, feather=0)[0], augment(image=other, feather=0)[0]
    assert torch.equal(one, same)


def test_what_is_drawn_knows_the_object(augment):
    other = pictures(1).clone()
    other[:, 16:48, 16:48] = 1 - other[:, 16:48, 16:48]
    outside = mask()[0] == 0
    one, changed = augment(count=1)[0][0], augment(count=1, image=other)[0][0]
    assert (one[outside] - changed[outside]).abs().max() > 1e-3


def test_the_same_seed_draws_the_same_and_more_variants_do_not_change_the_first(augment):
    three = augment(count=3)[0]
    assert torch.equal(augment(count=2)[0], three[:2]) and not torch.equal(augment(count=1, seed=4)[0], three[:1])
    # the second has the next seed and the next prompt; the third the first prompt again
    assert torch.equal(augment(count=1, seed=4, prompts="a %noun% on grass")[0], three[1:2])
    assert torch.equal(augment(count=1, seed=5)[0], three[2:])


def test_an_inpainting_model_is_shown_what_to_keep(augment):
    model, seen = tiny.model(in_channels=9), []
    model.model.concat_keys = ("mask", "masked_image")

    def wrapper(apply_model, arguments):
        seen.append(arguments["c"]["c_concat"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)
    images, _ = augment(model, count=1)
    redrawn = torch.ones(8, 8)
    redrawn[2:6, 2:6] = 0
    assert images.isfinite().all() and torch.equal(seen[0][0, 0], redrawn)
    kept = PooledVae().encode(pictures(1))[0] * 0.18215
    torch.testing.assert_close(seen[0][0, 1:], kept * (1 - redrawn), rtol=0, atol=1e-6)  # grey around it is zero


@pytest.mark.parametrize("place", ["move and turn", "move, turn and mirror"])
def test_the_object_may_be_elsewhere_in_each_variant(augment, place):
    images, masks = augment(count=4, include_picture=True, object_place=place, feather=0)
    assert images.shape == (5, 64, 64, 3) and masks.shape == (5, 64, 64) and images.isfinite().all()
    assert torch.equal(images[0], pictures(1)[0]) and torch.equal(masks[0], mask()[0])
    areas = masks.sum(dim=(1, 2)) / mask().sum()
    assert (areas[1:] < 1.01).all() and (areas[1:] > 0.3).all() and len({round(float(area), 4) for area in areas}) == 5
    assert torch.equal(augment(count=2, object_place=place, feather=0)[0], images[1:3])


def test_variants_of_several_pictures_are_drawn_in_turn(augment):
    two = [pictures(2)[:1], pictures(2)[1]]
    images, masks = augment(image=two, count=3, include_picture=True)
    assert images.shape == (5, 64, 64, 3) and masks.shape == (5, 64, 64)
    inside = mask()[0] == 1
    for index, which in enumerate((0, 1, 0, 1, 0)):
        assert torch.equal(images[index][inside], pictures(2)[which][inside])
    assert torch.equal(augment(count=1, image=pictures(2)[:1])[0], images[2:3])


def test_cancel_stops_within_a_step(augment):
    def cancel(done, *_):
        steps.append(done)
        comfy.model_management.interrupt_current_processing(done == 3)

    steps = []
    on_report(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        augment()
    assert steps == [1, 2, 3]


def test_soft_masks_and_transparent_and_odd_pictures_are_taken(augment):
    soft = torch.nn.functional.avg_pool2d(mask(), 9, 1, 4)
    images, masks = augment(count=1, mask=soft)
    assert images.isfinite().all() and torch.equal(images[0][soft[0] == 1], pictures(1)[0][soft[0] == 1])
    assert torch.equal(masks[0], soft[0])
    assert augment(count=1, image=pictures(1, 61, 75), mask=torch.ones(61, 75).tril()[None])[0].shape == (1, 56, 72, 3)
    assert augment(count=1, image=pictures(1, channels=1))[0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": pictures(2), "mask": mask().expand(3, -1, -1)}, "3 masks for 2 pictures"),
        ({"object_place": "anywhere"}, "object_place is 'anywhere': choose stay, move and turn"),
        ({"mask": torch.zeros(1, 64, 64)}, "mask 1 is all black"),
        ({"mask": torch.ones(1, 64, 64)}, "covers the whole picture"),
        ({"prompts": " \n"}, "one a line"),
        ({"noun": ""}, "noun is empty"),
        ({"clip": None}, "clip is None"),
        ({"vae": None}, "vae is None"),
    ],
)
def test_bad_input_is_named(augment, inputs, message):
    with pytest.raises(ValueError, match=message):
        augment(**inputs)
