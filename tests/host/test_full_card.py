"""A card that is full once the model is on it, and a PromptNet that looks at the noisy
latent: nothing may be unloaded."""

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import tiny  # noqa: E402
from test_promptnet_nodes import Studio  # noqa: E402

from profusion.toybox.pipeline import CELLS  # noqa: E402

CARD = torch.device("cpu:0")  # not the device "cpu" to the host, which so manages its memory


class FullCard:
    """The host's memory management on a card with room until a model samples, and none then.

    `loaded`: the models on it when the first run began. `calls`: what the host loaded and unloaded during the runs.
    """

    def __init__(self, monkeypatch):
        self.calls, self.loaded, self._sampling = [], [], False
        management, guider = comfy.model_management, comfy.samplers.CFGGuider
        self._watch(monkeypatch, management, "load_models_gpu", lambda models, *_, **__: [str(m.model) for m in models])
        self._watch(monkeypatch, management.LoadedModel, "model_unload", lambda loaded, *_: str(loaded.model.model))
        monkeypatch.setattr(management, "get_free_memory", self._free)
        inner_sample = guider.inner_sample

        def sample(*arguments, **options):
            self._sampling = True
            self.loaded = self.loaded or [entry.model for entry in management.current_loaded_models]
            try:
                return inner_sample(*arguments, **options)
            finally:
                self._sampling = False

        monkeypatch.setattr(guider, "inner_sample", sample)

    def _watch(self, monkeypatch, owner, name, told):
        function = getattr(owner, name)

        def watched(*arguments, **options):
            if self._sampling:
                self.calls.append((name, told(*arguments, **options)))
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    def _free(self, device=None, torch_free_too=False):
        free = 1 << 20 if self._sampling else 1 << 40
        return (free, free) if torch_free_too else free


@pytest.fixture
def studio(pack):
    found = Studio(pack, "noisy")
    for patcher in (found.model, found.clip.patcher, found.promptnet.patcher):
        patcher.load_device = CARD
    yield found
    comfy.model_management.current_loaded_models.clear()


@pytest.mark.parametrize("smart_memory", [True, False])
def test_s_is_made_anew_while_the_model_stays(studio, monkeypatch, smart_memory):
    monkeypatch.setattr(comfy.model_management, "DISABLE_SMART_MEMORY", not smart_memory)
    positive, plain = studio.encode()
    expected = studio.draw(positive, text=plain)
    card = FullCard(monkeypatch)
    drawn = studio.draw(positive, text=plain)  # with conditionings one after the other, where there is no room for both
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    assert card.calls == []
    used = [studio.model.model, studio.promptnet.network, studio.clip.cond_stage_model]
    assert all(any(part is loaded.model for loaded in card.loaded) for part in used)


def test_the_host_reckons_with_the_models_that_are_asked(studio, monkeypatch):
    """It makes room for them together with the model, and only for the sampler that asks them."""
    positive, plain = studio.encode()
    asked, load = [], comfy.model_management.load_models_gpu

    def loaded(models, *arguments, **options):
        asked.append({id(patcher.model) for patcher in models})
        return load(models, *arguments, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", loaded)
    studio.draw(positive, fusion_steps=0)
    used = [studio.model.model, studio.promptnet.network, studio.clip.cond_stage_model]
    assert asked[-1] == set(map(id, used))
    tiny.sample(studio.model, positive, plain, size=(CELLS, CELLS))
    assert asked[-1] == {id(studio.model.model)}


def test_training_says_that_it_needs_the_whole_model(pack, monkeypatch):
    """With --novram, where newer hosts cast weights through buffers that the next layers use again."""
    management, evaluation = comfy.model_management, pack.nodes.host.evaluation
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    model = tiny.model()
    model.load_device = CARD
    trained, done = evaluation.TrainedModel(model, [tiny.encode(tiny.clip(), "a ball")]), []
    try:
        if hasattr(management, "get_cast_buffer"):
            with pytest.raises(Exception, match="Start ComfyUI without --novram") as raised:
                trained.run(lambda: done.append(1), (1, 4, 8, 8))
            assert type(raised.value).__name__ == "TrainingError" and not done
        else:
            trained.run(lambda: done.append(1), (1, 4, 8, 8))
            assert done
    finally:
        management.current_loaded_models.clear()
