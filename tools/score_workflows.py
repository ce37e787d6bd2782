"""The shipped workflow that measures: what a concept brought, and what it changed besides."""

from __future__ import annotations

from profusion.toybox.drawing import SIZE
from tools.graph import Graph
from tools.profusion_workflows import (
    KSAMPLER,
    NEXT_GROUP,
    NOTE,
    canvas,
    control,
    encode,
    finetuner,
    preview,
    residual_trainer,
    show,
    studio,
)

OTHERS = "\n".join(
    (
        "a photo of a cup on grass",
        "a photo of a ball on snow",
        "a picture of a cat at night",
        "a photo of a star by a brick wall",
    )
)
CLASS = "a photo of a S*"


def overfitting(graph: Graph) -> None:
    with graph.group("1. A model, and pictures of a toy"):
        base, promptnet = studio(graph, count=4)
        preview(graph, promptnet.below, "The pictures", base["pictures"])
    graph.note(
        "### Does it overfit?\nPress *Run*. The same toy is learned twice: as an Infusion residual, and by tuning the "
        "model's attention layers. *Overfit Report* compares both with the base model, on prompts without the toy and "
        "on pictures of its class; 0 means that nothing moved. *Concept Scores* measures how much of the toy is "
        "there. A few minutes on a CPU.\n\nTo measure your own model, connect it, with its LoRA, to **customised**, "
        "and the model without it to **model**. Then write its class noun, and **prompts** without that noun.",
        NOTE,
        (380, 400),
    )
    with graph.group("2. Learn it as a residual"):
        residual = residual_trainer(graph, (440, 0), base, 1)
    with graph.group("3. Learn it by tuning attention layers"):
        tuned = finetuner(graph, (440, residual.below[1] + NEXT_GROUP), base, promptnet["PROMPTNET"], base["pictures"])
        text = graph.add("PrimitiveStringMultiline", tuned.below, "The concept", wide=340, value=CLASS)
        word = encode(graph, text.below, base, tuned["PROMPTNET"], base, text["STRING"])
    with graph.group("4. What changed besides the toy"):
        many = graph.add(
            "EmptyLatentImage",
            (840, 0),
            "Pictures of the class",
            wide=340,
            width=SIZE,
            height=SIZE,
            batch_size=16,
        )
        report = graph.add(
            "ProFusion_OverfitReport",
            many.below,
            wide=340,
            model=base["MODEL"],
            clip=base["CLIP"],
            latent=many["LATENT"],
            noun=base["noun"],
            prompts=OTHERS,
            steps=15,
            cfg=KSAMPLER["cfg"],
            customised=tuned["MODEL"],
            conditioning=word["with_word"],
            residual=residual["RESIDUAL"],
            vae=base["VAE"],
        )
        chart = graph.add(
            "SaveImage",
            report.below,
            "Report",
            wide=340,
            tall=400,
            images=report["chart"],
            filename_prefix="overfit_report",
        )
        graph.text(chart.below, "The report's table", report["table"])
    with graph.group("5. The toy in a new place"):
        prompt = graph.add(
            "PrimitiveStringMultiline", (1240, 0), "Prompt", wide=340, value="a photo of a mushroom on snow"
        )
        plain = graph.add(
            "CLIPTextEncode", prompt.below, "Plain prompt", wide=340, clip=base["CLIP"], text=prompt["STRING"]
        )
        start = canvas(graph, plain.below, base)
        patch = graph.add(
            "ProFusion_InfusionAttentionPatch",
            start["latent_image"][0].below,
            wide=340,
            model=base["MODEL"],
            clip=base["CLIP"],
            text=prompt["STRING"],
            residual=residual["RESIDUAL"],
        )
    with graph.group("6. Drawn, and measured against the pictures"):
        sampler = graph.add(
            "KSampler",
            (1640, 0),
            "With the residual",
            wide=300,
            model=patch["MODEL"],
            positive=patch["CONDITIONING"],
            **start,
            **KSAMPLER,
        )
        drawn = show(graph, (1980, 0), base, sampler["LATENT"], "With the residual", saved=True)
        scores = graph.add(
            "ProFusion_ConceptScores",
            (2360, 0),
            wide=340,
            images=drawn["IMAGE"],
            references=base["pictures"],
            prompt=prompt["STRING"],
        )
        chart = preview(graph, scores.below, "Scores", scores["chart"], 340)
        table = graph.text(chart.below, "The scores' table", scores["table"])
    control(graph, (1640, table.below[1] + NEXT_GROUP), base, plain["CONDITIONING"], start)
