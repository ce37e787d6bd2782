"""The file of a PromptNet: round trips, damage, misfits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from profusion import files
from profusion.promptnet import PromptNetError, load_promptnet, save_promptnet
from profusion.promptnet.file import load_training


@pytest.fixture
def saved(small, tmp_path):
    network = small.stirred(second_latent="noisy", tokens=2, holds_position=True)
    path = tmp_path / "new" / "word.safetensors"
    save_promptnet(network, path, "float32", notes={"trained on": "pictures"})
    return network, path


def rewritten(path, change, metadata=None):
    """The file again with something changed, its checksum made afresh."""
    tensors, old = files.read_tensors(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    kept = {name: old[name] for name in ("format", "format_version", "architecture", "config", "precision")}
    path.write_bytes(files.tensors_to_bytes(tensors, kept | (metadata or {})))


def test_a_round_trip_is_exact_and_keeps_the_configuration(saved):
    network, path = saved
    again = load_promptnet(path)
    assert again.config == network.config
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())


def test_any_tool_can_read_it(saved):
    network, path = saved
    assert load_file(path).keys() == network.state_dict().keys()
    _, metadata = files.read_tensors(path)
    assert metadata["architecture"] == "UNet with 7 cross-attentions of 24"
    assert json.loads(metadata["config"])["unet"]["context_dim"] == 24 and metadata["notes.trained on"] == "pictures"


def test_half_precision_is_half_the_size_and_close(small, tmp_path):
    network = small.stirred()
    path = tmp_path / "half.safetensors"
    size = save_promptnet(network, path)
    numbers = sum(value.numel() for value in network.state_dict().values())
    assert size == path.stat().st_size and 2 * numbers < size < 2 * numbers + 16_384
    assert load_promptnet(path).output.weight.dtype == torch.float32
    assert load_promptnet(path, dtype=None).output.weight.dtype == torch.float16
    torch.testing.assert_close(load_promptnet(path).output.weight, network.output.weight, rtol=1e-3, atol=1e-4)


def test_the_same_network_makes_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        save_promptnet(small.stirred(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_loaded_file_may_be_replaced_while_it_is_in_use(saved, small):
    network, path = saved
    again = load_promptnet(path)
    save_promptnet(small.stirred(), path)
    assert torch.equal(again.output.weight, network.output.weight)


def test_loaded_in_inference_mode_it_can_still_be_trained(saved):
    with torch.inference_mode():
        network = load_promptnet(saved[1])
    network.requires_grad_(True)
    latent = torch.randn(1, 4, 4, 4)
    network(latent, torch.tensor([5]), torch.randn(1, 3, 20), latent).square().sum().backward()
    assert network.output.weight.grad.any()


def test_damage_is_noticed(saved):
    _, path = saved
    whole = path.read_bytes()
    for data, reason in (
        (whole[:-1000], "cut short"),
        (whole[:30], "cut short"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"<!DOCTYPE html>" + bytes(60), "web page"),
        (whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:], "checksum"),
    ):
        path.write_bytes(data)
        with pytest.raises(PromptNetError, match=reason) as caught:
            load_promptnet(path)
        assert str(path) in str(caught.value)


def test_values_that_are_not_finite_are_named(saved, small, tmp_path):
    _, path = saved
    rewritten(path, lambda tensors: tensors["output.bias"].__setitem__(3, float("nan")))
    with pytest.raises(PromptNetError, match="output.bias has values that are not finite"):
        load_promptnet(path)
    network = small.stirred()
    network.output.bias[0] = 1e6
    with pytest.raises(PromptNetError, match="cannot be saved as float16: output.bias"):
        save_promptnet(network, tmp_path / "large.safetensors")
    assert not (tmp_path / "large.safetensors").exists()


def test_tensors_that_do_not_fit_are_named(saved):
    _, path = saved
    rewritten(path, lambda tensors: tensors.__setitem__("output.bias", torch.zeros(7)))
    with pytest.raises(PromptNetError, match=r"output.bias; the first should be \(48,\) and is \(7,\)"):
        load_promptnet(path)
    rewritten(path, lambda tensors: tensors.pop("output.bias"))
    with pytest.raises(PromptNetError, match="and is absent"):
        load_promptnet(path)
    rewritten(path, lambda tensors: tensors.__setitem__("output.bias", torch.zeros(48, dtype=torch.uint8)))
    with pytest.raises(PromptNetError, match=r"output.bias is torch.uint8"):
        load_promptnet(path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": "something"}, "something else than a PromptNet"),
        ({"format_version": "7"}, "format version 7, and this ProFusion reads 1"),
        ({"config": "{"}, "makes no sense"),
        ({"config": "[]"}, "makes no sense"),
        ({"config": '{"unet": {"model_channels": 33}}'}, "makes no sense"),
    ],
)
def test_metadata_is_checked(saved, metadata, reason):
    rewritten(saved[1], lambda tensors: None, metadata)
    with pytest.raises(PromptNetError, match=reason):
        load_promptnet(saved[1])


def test_a_configuration_from_the_future_or_out_of_range_is_refused(saved):
    _, path = saved
    config = json.loads(files.read_tensors(path)[1]["config"])
    rewritten(path, lambda tensors: None, {"config": json.dumps(config | {"colour": 1})})
    with pytest.raises(PromptNetError, match="colour, unknown here: ProFusion needs an update"):
        load_promptnet(path)
    rewritten(path, lambda tensors: None, {"config": json.dumps(config | {"tokens": 1.5})})
    with pytest.raises(PromptNetError, match="makes no sense"):
        load_promptnet(path)
    rewritten(path, lambda tensors: None, {"config": json.dumps(config | {"tokens": 3})})
    with pytest.raises(PromptNetError, match="do not fit"):
        load_promptnet(path)


def test_another_models_file_is_no_promptnet(small, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({name: value.contiguous() for name, value in small.unet.state_dict().items()}, path)
    with pytest.raises(PromptNetError, match="it is a diffusion model alone"):
        load_promptnet(path)
    with pytest.raises(PromptNetError, match="No such file"):
        load_promptnet(tmp_path / "none.safetensors")
    with pytest.raises(PromptNetError, match="folder"):
        load_promptnet(tmp_path)


def test_where_saving_fails_nothing_changes(saved, small, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PromptNetError, match="disk is full"):
        save_promptnet(small.stirred(), path)
    assert path.read_bytes() == before and [item.name for item in path.parent.iterdir()] == [path.name]
    with pytest.raises(PromptNetError, match="no precision 'int6'"):
        save_promptnet(small.stirred(), path, "int6")
    with pytest.raises(PromptNetError, match="ends in .safetensors"):
        save_promptnet(small.stirred(), path.with_suffix(".pt"))


def test_a_training_is_kept_beside_the_network(saved, small, tmp_path):
    network, state = small.stirred(), {"exp_avg.output.bias": torch.randn(24), "step": torch.tensor([3.0])}
    path = tmp_path / "training.safetensors"
    save_promptnet(network, path, "float32", {"seed": "4"}, state)
    again, found, notes = load_training(path)
    assert notes == {"seed": "4"} and found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    assert torch.equal(again.output.weight, network.output.weight)
    assert torch.equal(load_promptnet(path).output.weight, network.output.weight)
    with pytest.raises(PromptNetError, match="keeps no training"):
        load_training(saved[1])
