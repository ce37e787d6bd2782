"""What some devices lack is done elsewhere, with the same numbers, and nothing calls it another way."""

import ast
from pathlib import Path

import pytest
import torch

from profusion import devices
from profusion.infusion import crop_region, region_weights
from profusion.pictures import latent_masks
from profusion.promptnet.seed import least_squares

KERNEL = Path(devices.__file__).parent
LACKED = {"adaptive_avg_pool2d", "solve"}


def pictures(generator):
    return torch.rand(2, 3, 13, 11, generator=generator)


def functions(generator):
    masks = pictures(generator)[:, 0]
    weights, energy = torch.randn(2, 4, 6, generator=generator), torch.rand(2, generator=generator)
    wanted = torch.randn(2, 4, generator=generator)
    return {
        "area_means": lambda: devices.area_means(pictures(generator), (5, 4)),
        "smoothly_resized": lambda: devices.smoothly_resized(pictures(generator), (5, 4)),
        "latent_masks": lambda: latent_masks(masks, (5, 4)),
        "region_weights": lambda: region_weights(masks, 2, (5, 4)),
        "crop_region": lambda: crop_region(masks, (9, 7), (4, 4, 1, 2)),
        "least_squares": lambda: least_squares(weights, energy, wanted),
    }


@pytest.mark.parametrize("name", list(functions(torch.Generator())))
def test_the_other_path_gives_the_same_numbers(monkeypatch, name):
    def result():
        return functions(torch.Generator().manual_seed(0))[name]()

    direct, moved, cpu = result(), [], torch.Tensor.cpu
    monkeypatch.setattr(devices, "LACKING", {"cpu"})
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (moved.append(1), cpu(tensor))[1])
    assert torch.equal(result(), direct) and moved


def test_area_means_are_what_the_host_calls_area(generator):
    x = pictures(generator)
    expected = torch.nn.functional.interpolate(x, size=(5, 4), mode="area")
    assert torch.equal(devices.area_means(x, (5, 4)), expected)


def test_the_other_path_is_differentiable(monkeypatch, generator):
    gradients = []
    for lacking in (set(), {"cpu"}):
        monkeypatch.setattr(devices, "LACKING", lacking)
        x = pictures(torch.Generator().manual_seed(0)).requires_grad_(True)
        devices.area_means(x, (5, 4)).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_nothing_asks_a_device_for_what_it_may_lack():
    for path in KERNEL.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name == "devices.py":
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert called not in LACKED and given.get("mode") != "area", f"{path}:{node.lineno}"
            bilinear = given.get("antialias") and given.get("mode") == "bilinear"
            assert not bilinear, f"{path}:{node.lineno}"
