"""ProFusion_FusionGuider, ProFusion_FusionSampler and ProFusion_FusionKSampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..profusion.fusion import FusionOptions, Guidance
from . import inputs
from .host.display import show
from .host.drawing import Sampling
from .host.fusion import Drawn, FusionGuider, FusionSampling, sample_latent

MORE_TERMS = ("_2", "_3", "_4")
MODES = ["dependent", "independent"]


def _guidance_inputs() -> list:
    return [
        inputs.cfg(
            "Guidance of the refinement stage, as in KSampler: of S* and the other conditionings together. The "
            "authors' notebook has 7 for S* and 5 for the plain text, 12 in all; their code 5 for S* alone."
        ),
        inputs.cfg(
            "Guidance of the fusion stage. The authors' code has 3, their notebook 7.", "fusion_cfg", default=3.0
        ),
        io.Float.Input(
            "gamma",
            default=0.8,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="Strength of S* in the fusion stage. Lower leaves more to the text. The authors' code has 0.8, "
            "their notebook 0.6.",
        ),
        io.Combo.Input(
            "mode",
            options=MODES,
            default="dependent",
            tooltip="dependent: evaluate S* within its prompt. independent: evaluate S* in a prompt of its own; only "
            "the other conditionings say the text.",
        ),
    ]


def _refresh_input() -> io.Int.Input:
    return io.Int.Input(
        "refresh",
        default=2,
        min=1,
        max=10,
        optional=True,
        tooltip="Evaluate all conditionings only every N-th call; in between, evaluate the first and reuse the others' "
        "last difference. 2 costs about as much as plain CFG. 1 is the paper's.",
    )


def _text_in_fusion_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "text_in_fusion",
        default=False,
        optional=True,
        tooltip="Off: S* in its prompt alone guides the fusion stage, as in the authors' code. On: conditionings "
        "without S*, such as the plain text, guide it too.",
    )


def _stage_inputs() -> list:
    return [
        io.Int.Input(
            "fusion_steps",
            default=1,
            min=0,
            max=20,
            tooltip="Fusion steps at each noise level (m in the paper). 0: none, which is the plain sampler.",
        ),
        io.Float.Input(
            "eta",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much noise a fusion step swaps for fresh noise.",
        ),
        inputs.share("fusion_start", 0.0, "Share of sampling after which the fusion stage acts."),
        inputs.share(
            "fusion_end",
            0.2,
            "Share of sampling until which the fusion stage acts. Each level in it costs an extra evaluation. 1 is the "
            "paper's.",
        ),
    ]


def _terms(first: tuple[list, float], more: dict[str, Any]) -> tuple[list[list], tuple[float, ...]]:
    """The conditionings that are connected, and their weights."""
    terms = [first] + [
        (more[f"conditioning{suffix}"], more.get(f"weight{suffix}", 1.0))
        for suffix in MORE_TERMS
        if more.get(f"conditioning{suffix}") is not None
    ]
    conditionings, weights = zip(*terms, strict=True)
    return list(conditionings), weights


class FusionGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_FusionGuider",
            display_name="Fusion Guider",
            category="ProFusion",
            description=(
                "Guides by several conditionings at once, each with a weight, in one batched call per step (ProFusion, "
                "arXiv 2305.13579). With Fusion Sampler, each stage has its own guidance; with any other sampler it is "
                "plain guidance. Give it to SamplerCustomAdvanced."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any model."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The first conditioning: the prompt with S*, from PromptNet Encode, or any other.",
                ),
                inputs.weight("weight", "Weight of the first conditioning. Only the proportions of the weights count."),
                inputs.negative(),
                *_guidance_inputs(),
                *[entry for suffix in MORE_TERMS for entry in _term_inputs(suffix)],
                _refresh_input(),
                _text_in_fusion_input(),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        conditioning,
        weight,
        negative,
        cfg,
        fusion_cfg,
        gamma,
        mode,
        refresh=2,
        text_in_fusion=False,
        **more,
    ) -> io.NodeOutput:
        conditionings, weights = _terms((conditioning, weight), more)
        guider = FusionGuider(model)
        guidance = Guidance(weights, cfg, fusion_cfg, gamma, mode, refresh)
        guider.set_terms(conditionings, negative, guidance, text_in_fusion)
        return io.NodeOutput(guider)


def _term_inputs(suffix: str) -> list:
    number = suffix.strip("_")
    return [
        io.Conditioning.Input(
            f"conditioning{suffix}", optional=True, tooltip=f"Conditioning {number}, such as the plain text."
        ),
        inputs.weight(f"weight{suffix}", f"Weight of conditioning {number}.", optional=True),
    ]


class FusionSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_FusionSampler",
            display_name="Fusion Sampler",
            category="ProFusion",
            description=(
                "Puts a fusion stage before the steps of another sampler: it swaps part of the predicted noise for "
                "fresh noise at the same noise level (ProFusion, arXiv 2305.13579). Give it to SamplerCustomAdvanced, "
                "with Fusion Guider or any other guider."
            ),
            inputs=[
                io.Sampler.Input("sampler", tooltip="The refinement stage, from KSamplerSelect."),
                *_stage_inputs(),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler, fusion_steps, eta, fusion_start, fusion_end) -> io.NodeOutput:
        return io.NodeOutput(FusionSampling(sampler, FusionOptions(fusion_steps, eta), fusion_start, fusion_end))


class FusionKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_FusionKSampler",
            display_name="Fusion KSampler",
            category="ProFusion",
            description=(
                "KSampler with Fusion Sampling (ProFusion, arXiv 2305.13579): draws the S* of a picture together with "
                "any text. Without fusion steps and text it is KSampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that draws."),
                inputs.seed("Random seed. The same seed draws the same picture.", changes_after_run=True),
                inputs.steps(20, "Sampling steps, as in KSampler.", largest=10_000),
                *_guidance_inputs()[:1],
                inputs.sampler_name("Sampler of the refinement stage."),
                inputs.scheduler("Noise schedule."),
                io.Conditioning.Input("positive", tooltip="The prompt with S*, from PromptNet Encode."),
                inputs.negative(),
                io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from."),
                inputs.share("denoise", 1.0, "How much of latent_image is drawn anew."),
                *_stage_inputs(),
                *_guidance_inputs()[1:],
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="The same prompt in plain words, from PromptNet Encode. The picture follows it besides S*.",
                ),
                inputs.weight("text_weight", "Weight of the plain text. S* has weight 1.", default=0.5, optional=True),
                _refresh_input(),
                _text_in_fusion_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The drawn latent.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        denoise,
        fusion_steps,
        eta,
        fusion_start,
        fusion_end,
        fusion_cfg,
        gamma,
        mode,
        text=None,
        text_weight=0.5,
        refresh=2,
        text_in_fusion=False,
    ) -> io.NodeOutput:
        terms, weights = ([positive], (1.0,)) if text is None else ([positive, text], (1.0, text_weight))
        guider = FusionGuider(model)
        guider.set_terms(terms, negative, Guidance(weights, cfg, fusion_cfg, gamma, mode, refresh), text_in_fusion)
        drawn = sample_latent(
            guider,
            latent_image,
            seed,
            Sampling(steps, cfg, sampler_name, scheduler),
            denoise,
            FusionOptions(fusion_steps, eta),
            (fusion_start, fusion_end),
        )
        said = _said(drawn, cfg, fusion_cfg, wanted=fusion_steps > 0 and fusion_end > fusion_start)
        return io.NodeOutput(drawn.latent, ui=show(cls, said))


def _said(drawn: Drawn, cfg: float, fusion_cfg: float, wanted: bool) -> str:
    """What a run cost, and what of it may not be what was meant. wanted: whether a fusion stage was asked for."""
    lines = [f"{drawn.rows_per_step:.2f} evaluations a step and picture (KSampler: {1 if cfg == 1 else 2})"]
    if wanted and not drawn.fusion_calls:
        lines.append(
            "There was no fusion stage: so few steps have no noise level between fusion_start and fusion_end that one "
            "could act at. Raise fusion_end, or steps"
        )
    if drawn.fusion_calls and cfg == 1 and fusion_cfg != 1:
        lines.append(
            f"cfg is 1, and the fusion stage is guided away from the negative, by fusion_cfg {fusion_cfg:g}. A model "
            "with its guidance built in, as Flux, Turbo, Lightning and LCM have it, wants fusion_cfg 1 too"
        )
    return "\n".join(lines)


NODES = [FusionGuiderNode, FusionSamplerNode, FusionKSampler]
