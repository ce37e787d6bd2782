"""A residual's training on transformers of the host's own classes: its gradient is the slope of its loss."""

import pytest

pytest.importorskip("comfy.samplers", reason="needs ComfyUI")

import comfyui_version
import tiny_texts
import tiny_transformers as transformers
import torch

ROWS = (7, 8)
WITHOUT_GRADIENT = {"anima", "cosmos2"}  # on hosts whose kernel for their own attention has none
NEW = not comfyui_version.__version__.startswith("0.3.")


class Trained:
    """A training on a small model, evaluated as the node does it."""

    def __init__(self, pack, family, checkpointing=False):
        kernel, host = pack.profusion, pack.nodes.host
        self.model, acting = transformers.shared(family), host.families.acting_on(transformers.shared(family))
        conditioning = transformers.conditioning(family)
        with torch.inference_mode():
            told = {"flow": True, "checkpointing": checkpointing, "blocks_of": acting.blocks_of}
            self.trained = host.evaluation.TrainedModel(self.model, [conditioning], **told)
        shape = transformers.FAMILIES[family][2]
        generator = torch.Generator().manual_seed(2)
        mask = torch.zeros(shape[-2:])
        mask[:4, 2:] = 1
        training, noising = kernel.residual.training, kernel.residual.noising
        latents = torch.randn(2, shape[0], *shape[-2:], generator=generator)
        references = [training.Reference(latent, mask) for latent in latents]
        options = training.TrainingOptions(steps=3, batch_size=2, learning_rate=0.05, flip=False)
        flow = noising.FLOW if host.evaluation.is_flow(self.model) else noising.ADDED
        self.training = training.ResidualTraining(
            self.trained.predict_noise,
            references,
            [(488 + 7, 488 + 8) if family == "flux2" else ROWS],
            acting.layers,
            "cat",
            options,
            sigmas=self.trained.sigmas,
            attending=acting.attending,
            noising=flow,
            **({"queries": kernel.queries.WaitingQueries} if checkpointing else {}),
        )

    def run(self, work):
        with torch.inference_mode():
            self.trained.run(work, (2, *self.training.latent_size))


@pytest.mark.parametrize("family", [name for name in transformers.FAMILIES if name != "pixart"])
def test_the_gradient_is_the_slope_of_the_loss(pack, family):
    run, found = Trained(pack, family), []
    training = run.training

    def work():
        with torch.inference_mode(False), torch.enable_grad():
            batch, delta = training.batch(), training.delta
            some, size = torch.randn(delta.shape, generator=torch.Generator().manual_seed(3)), 0.02
            with torch.no_grad():
                delta.add_(0.3 * some.flip(0))
            training.loss(batch).backward()
            way = delta.grad.sign() * some.abs()  # steep: the loss is only known to six digits
            with torch.no_grad():
                delta.add_(size * way)
                ahead = training.loss(batch).double()
                delta.sub_(2 * size * way)
                slope = (ahead - training.loss(batch)) / (2 * size)
            found.extend([float((delta.grad * way).sum()), float(slope), bool((delta.grad != 0).any(-1).all())])

    if NEW and family in WITHOUT_GRADIENT:
        with pytest.raises(Exception, match=f"ComfyUI {comfyui_version.__version__} computes a part of .* no gradient"):
            run.run(work)
        return
    run.run(work)
    gradient, slope, everywhere = found
    assert gradient == pytest.approx(slope, rel=2e-3) and everywhere


@pytest.mark.parametrize("family", [name for name in transformers.FAMILIES if name != "pixart"])
def test_checkpointing_leaves_the_gradient_what_it_is(pack, family, monkeypatch):
    if NEW and family in WITHOUT_GRADIENT:
        pytest.skip("this ComfyUI has no gradient there, as another test has it")
    found, calls, evaluation = [], [], pack.nodes.host.evaluation

    def counted(*given, own=evaluation._differentiable_attention, **named):
        calls[-1] += 1
        return own(*given, **named)

    monkeypatch.setattr(evaluation, "_differentiable_attention", counted)
    for checkpointing in (False, True):
        monkeypatch.setattr(pack.profusion.text_attention, "_PROVED", set())  # each looks where the text is, or none
        run = Trained(pack, family, checkpointing)
        calls.append(0)

        def work(training=run.training):
            with torch.inference_mode(False), torch.enable_grad():
                some = torch.randn(training.delta.shape, generator=torch.Generator().manual_seed(3))
                with torch.no_grad():
                    training.delta.add_(0.3 * some)
                training.loss(training.batch()).backward()

        run.run(work)
        found.append(run.training.delta.grad)
    blocks = pack.nodes.host.families.blocks_of(run.model.model.diffusion_model)
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()
    assert calls[1] >= calls[0] + len(blocks)
    assert not any("forward" in vars(part) for part in run.model.model.diffusion_model.modules())


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_steps_lower_the_loss_and_are_the_same_twice(pack, family):
    def learned():
        run = Trained(pack, family)
        losses = []
        run.run(lambda: losses.extend(run.training.steps()))
        return run.training.delta.clone(), losses

    (delta, losses), (again, _) = learned(), learned()
    assert torch.equal(delta, again) and delta.any() and len(losses) == 3


class Decoder:
    """(B, C, h, w) to (B, H, W, 3); of a video model, (B, C, T, h, w) to (B, T, H, W, 3)."""

    @staticmethod
    def decode(latents):
        return latents[:, :3].movedim(1, -1)


@pytest.mark.parametrize("family", ["qwen", "wan"])
def test_samples_are_drawn_of_what_was_learned(pack, family):
    training, kernel = pack.nodes.host.residual_training, pack.profusion
    model, clip = transformers.shared(family), tiny_texts.clip(family)
    shape = transformers.FAMILIES[family][2]
    size = (shape[0], *shape[-2:])
    layers = pack.nodes.host.families.acting_on(model).layers
    told = {"network": layers[0].network, "adds_to": "value"}
    delta = 0.1 * torch.ones(len(layers), 1, layers[0].context_dim)
    residual = kernel.residual.Residual(delta, "cat", tuple(layer.name for layer in layers), "tiny", **told)
    with torch.inference_mode():
        drawing = training.SamplePictures(
            model, clip, Decoder(), "a photo of a cat", size, 1, training.Sampling(2, 3.0)
        )
        picture = drawing.draw(residual)
        own = drawing.own("cat", lambda rows: None)
    assert picture.shape == drawing.plain.shape == (1, *size[1:], 3) and own.shape == (2, *size)
    assert not torch.equal(picture, drawing.plain)


def test_the_node_trains_on_toyboxs_mmdit_and_writes_what_it_has_so_far(pack, tmp_path, monkeypatch, caplog):
    import folder_paths

    monkeypatch.setattr(pack.profusion.keeping, "SECONDS", 0.0)
    monkeypatch.setattr(pack.profusion.keeping, "SHARE", 1e6)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(tmp_path)], {".safetensors"}))
    toybox, trainer = pack.nodes.host.toybox, pack.nodes.trainer.ResidualTrainer
    concept = pack.profusion.toybox.concepts.drawn_concept("teal and coral ball", 2, 0)
    model, clip, vae = toybox.load_mmdit(), toybox.load_clip(), toybox.load_vae()
    inputs = {"images": concept.pictures, "masks": concept.masks, "noun": "ball", "steps": 2, "learning_rate": 0.0}
    inputs |= {"batch_size": 2, "seed": 0, "flip": False, "preserve": 1.0, "sample_every": 0}
    inputs |= {"sample_prompt": "a %noun% on grass", "sample_steps": 2, "sample_cfg": 3.0}
    with torch.inference_mode():
        residual = trainer.execute(model=model, clip=clip, vae=vae, **inputs).args[0]
    assert residual.layers[0] == "joint.0" and residual.delta.any() and residual.steps == 2
    assert residual.network == "sd3"
    assert not [record.message for record in caplog.records if "cannot be written" in record.message]
    (file,) = tmp_path.rglob("*.safetensors")
    assert pack.profusion.residual.load_residual(file).layers == residual.layers
