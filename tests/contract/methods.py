"""Every method of the kernel, and combinations of them, behind one face: what tests/contract/test_contract.py holds
all to.

A method is attached to one small frozen model and changes what that predicts. The face is the tests' own, a thin one:
what is under it is the kernel's public interface, called as the demo and the nodes call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from profusion.diffusion import noise_predictor
from profusion.infusion import (
    Patches,
    Placement,
    architecture_name,
    cross_attention_layers,
    customised_patches,
    foundation_patches,
    on_conditional,
)
from profusion.loop import LoopOptions, TrainingLoop
from profusion.models.configs import UNetConfig
from profusion.models.unet import UNet
from profusion.promptnet import PromptNetError
from profusion.promptnet.changes import attention_layers, changed, patch_tensors, save_patch, start_changes
from profusion.promptnet.file import load_promptnet, save_promptnet
from profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from profusion.promptnet.network import PromptNet, PromptNetConfig
from profusion.promptnet.training import PictureSet, PromptNetOptions, PromptNetTraining
from profusion.residual import Residual, ResidualError, load_residual, save_residual
from profusion.residual.training import Reference, ResidualTraining, TrainingOptions

UNET = UNetConfig(32, (1,), 1, (1,), 1, 24, num_heads=2)
LENGTH, NOUN_ROW, WIDTH = 9, 4, UNET.context_dim
IMAGE_WIDTH = 20
STEPS = 2


def drawn(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Models:
    """A UNet and what stands for a text encoder: a table of words, the noun's at NOUN_ROW of the prompt."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32):
        self.device, self.dtype, self.factor = device, dtype, 1.0
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.unet = UNet(UNET).eval().requires_grad_(False).to(device, dtype)
        self.prompt = drawn(1, LENGTH, WIDTH, seed=1).to(device)
        self.x = drawn(2, 4, 8, 8, seed=2).to(device)
        self.sigma = torch.tensor([0.7, 4.0], device=device)
        self.latents = drawn(3, 4, 8, 8, seed=4).to(device)
        self.image_tokens = drawn(3, 5, IMAGE_WIDTH, seed=5).to(device)

    def with_word(self, word: Tensor | None, rows: int) -> Tensor:
        """The prompt's context (B, L, D), with S* (B, 1, D) in the noun's place where one is given."""
        context = self.prompt.expand(rows, -1, -1)
        if word is None:
            return context
        return torch.cat([context[:, :NOUN_ROW], word.to(context), context[:, NOUN_ROW + 1 :]], dim=1)

    def predict(self, x: Tensor, sigma: Tensor, context: Tensor, patches: Patches | None = None) -> Tensor:
        """eps (B, C, H, W) in float32, computed in the model's own type; times `factor`, by which tests break it."""
        options = {"patches": patches or {}, "cond_or_uncond": [0]}

        def network(x: Tensor, t: Tensor) -> Tensor:
            eps = self.unet(x.to(self.dtype), t, context.to(self.dtype), transformer_options=options)
            return eps.float() * self.factor

        return noise_predictor(network)(x, sigma)

    def tensors(self) -> dict[str, Tensor]:
        """All that no method may move."""
        return {**self.unet.state_dict(), "prompt": self.prompt, "latents": self.latents, "tokens": self.image_tokens}


class Method(ABC):
    """One method on `models`. As it is made, it has learned nothing."""

    error: type[Exception]  # what its files raise
    suffix = ".safetensors"

    def __init__(self, models: Models):
        self.models = models

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What it may move."""

    @abstractmethod
    def training(self, options: LoopOptions, around: Callable[[], AbstractContextManager]) -> TrainingLoop:
        """A run that trains this very method; `around()` is entered where the model is evaluated."""

    @abstractmethod
    def options(self, **options) -> LoopOptions:
        """For a short training."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write what was learned, exactly."""

    @abstractmethod
    def save_small(self, path: Path) -> None:
        """Write it in the precision that users are given."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Take over what a file of either kind has."""

    @abstractmethod
    def learned(self) -> None:
        """Take over what `training` left; nothing more is to be learned."""

    @contextmanager
    def changed_model(self) -> Iterator[None]:
        """Where the method acts on the network itself."""
        yield

    def word(self, rows: int) -> Tensor | None:
        """S* (rows, 1, D) for the noun's place, of a method that makes one."""
        return None

    def placements(self) -> Sequence[Placement]:
        """Residuals, of a method that has them."""
        return ()

    def stir(self) -> None:
        """Put something into the parameters, as if it had been learned."""
        with torch.no_grad():
            for seed, value in enumerate(self.parameters().values()):
                value.add_(drawn(*value.shape, seed=seed, size=0.3).to(value))


class ResidualMethod(Method):
    """Infusion: a residual at the noun."""

    name, error = "residual", ResidualError

    def __init__(self, models: Models):
        super().__init__(models)
        self.layers = cross_attention_layers(models.unet.state_dict())
        self.delta = torch.zeros(len(self.layers), 1, WIDTH, device=models.device)
        self.strength = 1.0
        self._run: ResidualTraining | None = None

    def parameters(self):
        return {"delta": self.delta}

    def placements(self):
        names = tuple(layer.name for layer in self.layers)
        return [Placement(self.delta, names, (NOUN_ROW,), strength=self.strength)]

    def options(self, **options):
        return TrainingOptions(**{"steps": STEPS, "batch_size": 2, **options})

    def references(self) -> list[Reference]:
        return [Reference(latent, torch.ones(8, 8)) for latent in self.models.latents]

    def training(self, options, around=nullcontext):
        def predict_noise(x, sigma, prompt, patches):
            with around():
                return self.models.predict(x, sigma, self.models.with_word(None, len(x)), patches)

        given = self.references(), ((NOUN_ROW,),), self.layers, "ball", options
        start = self._residual() if self.delta.any() else None
        self._run = ResidualTraining(predict_noise, *given, resume=start)
        return self._run

    def learned(self):
        self.delta.copy_(self._run.residual().delta)

    def _residual(self) -> Residual:
        names = tuple(layer.name for layer in self.layers)
        return Residual(self.delta.detach(), "ball", names, architecture_name(self.layers))

    def save(self, path):
        save_residual(self._residual(), path, "float32")

    def save_small(self, path):
        save_residual(self._residual(), path)

    def load(self, path):
        self.delta.copy_(load_residual(path).delta)


class PromptNetMethod(Method):
    """ProFusion: S* of a picture in the noun's place. Having learned nothing, it says the noun itself."""

    name, error = "PromptNet", PromptNetError

    def __init__(self, models: Models):
        super().__init__(models)
        config = PromptNetConfig(UNET, IMAGE_WIDTH, (WIDTH,), grid=2, projection=8)
        generator, noun = torch.Generator().manual_seed(6), models.prompt[0, NOUN_ROW].cpu()
        unet = {name: value.float().cpu() for name, value in models.unet.state_dict().items()}
        network = PromptNet.from_unet(unet, config, generator, noun, torch.ones(WIDTH))
        self.network = network.eval().requires_grad_(False).to(models.device)

    def parameters(self):
        return dict(self.network.named_parameters())

    def word(self, rows):
        timesteps = torch.full((rows,), 400, device=self.models.device)
        latents, tokens = self.models.latents[:1], self.models.image_tokens[:1]
        return self.network(latents.expand(rows, -1, -1, -1), timesteps, tokens.expand(rows, -1, -1))

    def options(self, **options):
        return PromptNetOptions(**{"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, **options})

    def training(self, options, around=nullcontext):
        pictures = PictureSet(self.models.latents, self.models.image_tokens)
        return PromptNetTraining(self.network, self._predict(around), self._encode, pictures, options)

    def _predict(self, around):
        def predict_noise(x, sigma, context):
            with around():
                return self.models.predict(x, sigma, context)

        return predict_noise

    def _encode(self, prompt: int, word: Tensor) -> Tensor:
        return self.models.with_word(word, len(word))

    def learned(self):
        self.network.requires_grad_(False)

    def save(self, path):
        save_promptnet(self.network, path, "float32")

    def save_small(self, path):
        save_promptnet(self.network, path)

    def load(self, path):
        self.network.load_state_dict(load_promptnet(path).state_dict())


class AttentionMethod(PromptNetMethod):
    """ProFusion's fine-tuning: changes of the attention layers, and the PromptNet that learns with them.

    PromptNet is trained beside them, as it always is, so both are the method's own.
    """

    name, rank = "low-rank changes", 4

    def __init__(self, models: Models):
        super().__init__(models)
        self.network = trainable_copy(self.network)
        layers = attention_layers(dict(models.unet.named_parameters()))
        self.changes = start_changes(layers, self.rank, torch.Generator().manual_seed(7), models.device)

    def parameters(self):
        own = {
            f"{layer}.{name}": value
            for layer, change in self.changes.items()
            for name, value in change.parameters().items()
        }
        return own | super().parameters()

    @contextmanager
    def changed_model(self):
        with changed(self.models.unet, self.changes):
            yield

    def options(self, **options):
        short = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, "attention_learning_rate": 1e-2}
        return FinetuneOptions(**{**short, "rank": self.rank, **options})

    def training(self, options, around=nullcontext):
        pictures = FinetunePictures(self.models.latents, self.models.image_tokens)

        @contextmanager
        def with_changes():
            with around(), self.changed_model():
                yield

        given = self._predict(with_changes), self._encode, pictures, options
        return FinetuneTraining(self.network, *given, self.changes)

    def learned(self):
        for value in self.parameters().values():
            value.requires_grad_(False)

    def save(self, path):
        run = self.training(self.options())
        run.save(path)
        self.learned()

    def save_small(self, path):
        save_patch(patch_tensors(self.changes), path)

    def load(self, path):
        run = self.training(self.options())
        run.resume(path)
        self.learned()


class FullAttentionMethod(AttentionMethod):
    """The same in full differences."""

    name, rank = "full changes", 0


METHODS = (ResidualMethod, PromptNetMethod, AttentionMethod, FullAttentionMethod)
COMBINATIONS = tuple((ResidualMethod, other) for other in (PromptNetMethod, AttentionMethod, FullAttentionMethod))


def evaluate(models: Models, methods: Sequence[Method] = ()) -> Tensor:
    """eps of the prompt with all of these methods on."""
    words = [word for method in methods if (word := method.word(len(models.x))) is not None]
    context = models.with_word(words[0] if words else None, len(models.x))
    placements = [placement for method in methods for placement in method.placements()]
    with torch.no_grad(), ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.changed_model())
        if not placements:
            return models.predict(models.x, models.sigma, context)
        queries = {}
        models.predict(models.x, models.sigma, context, foundation_patches(queries))
        return models.predict(models.x, models.sigma, context, customised_patches(queries, on_conditional(placements)))
