"""ProFusion_ConceptAugment: variants of one picture, the same object on other backgrounds."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..profusion.augment import NOUN, composite, redrawn_cells, soft_edge, variant_prompts
from ..profusion.pictures import PictureError, concept_pictures, to_image
from .host_promptnet import shown
from .host_training import Progress, encode_references
from .messages import show

PROMPTS = "\n".join(f"a photo of a {NOUN} {place}" for place in ("on grass", "on snow", "on sand", "in a room"))
_SEEDS = 2**64


class _Inpainting:
    """Draws what is around one object anew, with the host's own sampler under a denoise mask."""

    def __init__(self, model: Any, clip: Any, vae: Any, picture: Tensor, mask: Tensor):
        """picture (H, W, 3), mask (H, W)."""
        self._model, self._clip, self._vae = model, clip, vae
        (reference,) = encode_references(model, vae, picture[None], mask[None])
        latent = reference.latent[None].cpu()
        self._redrawn = redrawn_cells(mask, tuple(latent.shape[-2:])).to(latent)[None, None]
        # Zero where it is drawn anew: the highest noise level still holds some of the latent under it.
        self._latent = model.model.process_latent_out(latent * (1 - self._redrawn))
        self._extras = {}
        if getattr(model.model, "concat_keys", ()):  # an inpainting model, which is shown what to keep
            masked = vae.encode(shown(picture[None], mask[None]))
            self._extras = {"concat_latent_image": masked, "concat_mask": self._redrawn}
        self._negative = self._encode("")

    def _encode(self, text: str) -> list:
        encoded = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
        return [[context, {**extras, **self._extras}] for context, extras in encoded]

    def draw(
        self, prompt: str, seed: int, steps: int, cfg: float, sampler: str, scheduler: str, callback: Any
    ) -> Tensor:
        """One picture (H, W, 3), the object's place included."""
        noise = comfy.sample.prepare_noise(self._latent, seed)
        drawn = comfy.sample.sample(
            self._model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            self._encode(prompt),
            self._negative,
            self._latent,
            noise_mask=self._redrawn,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return self._vae.decode(drawn).float().cpu()[0, ..., :3]


class ConceptAugment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ConceptAugment",
            display_name="Concept Augment",
            category="ProFusion",
            description=(
                "Draws variants of a picture: the object inside the mask stays exactly as it is, and everything around it is "
                "drawn anew (ProFusion, arXiv 2305.13579). For PromptNet Finetune and Residual Trainer, which then learn the "
                "object and not its background."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model that draws pictures; one for inpainting draws the best backgrounds."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="The picture of the object."),
                io.Mask.Input("mask", tooltip="White where the object is."),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip=f"What the object is, such as cat: it takes the place of {NOUN} in the prompts.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=PROMPTS,
                    tooltip="What the variants show, one prompt a line, used in turn. Name the object, which the model sees.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="How many variants to draw."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the first variant's noise; the second has the next seed, and so on.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each variant."),
                io.Float.Input(
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="As in KSampler."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="As in KSampler."
                ),
                io.Int.Input(
                    "feather",
                    default=4,
                    min=0,
                    max=128,
                    tooltip="Pixels outside the mask over which the picture fades into the new background.",
                ),
                io.Boolean.Input(
                    "include_picture", default=True, tooltip="Put the picture itself before its variants."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The picture, if it is included, and its variants."),
                io.Mask.Output(display_name="masks", tooltip="The object's mask, once for each of them."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        image,
        mask,
        noun,
        prompts,
        count,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        feather,
        include_picture,
    ) -> io.NodeOutput:
        for name, part in (("clip", clip), ("vae", vae)):
            if part is None:
                raise ValueError(f"{name} is None: the checkpoint that was loaded has none")
        texts = variant_prompts(prompts, noun)
        pictures, masks = concept_pictures(image, mask, vae.spacial_compression_encode())
        if len(pictures) > 1:
            raise PictureError(f"{len(pictures)} pictures: give one, of which variants are drawn")
        picture, mask = pictures[0].cpu(), masks[0].cpu()
        inpainting, edge = _Inpainting(model, clip, vae, picture, mask), soft_edge(mask, feather)
        progress, variants = Progress(count * steps), []
        for index in range(count):

            def report(step: int, *_: Any, index: int = index) -> None:
                progress.report(index * steps + step + 1, to_image(variants[-1]) if step == 0 and variants else None)

            text = texts[index % len(texts)]
            drawn = inpainting.draw(text, (seed + index) % _SEEDS, steps, cfg, sampler_name, scheduler, report)
            variants.append(composite(drawn, picture, edge))
        images = torch.stack([picture] * include_picture + variants)
        message = f"{count} variants of a picture of {picture.shape[1]}x{picture.shape[0]} pixels"
        return io.NodeOutput(images, mask.expand(len(images), -1, -1).clone(), ui=show(cls, message))


NODES = [ConceptAugment]
