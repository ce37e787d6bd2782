"""Make the shipped workflows: `COMFYUI_PATH=... python -m tools.workflows`. Needs a host, whose
node definitions it reads."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

from profusion.toybox.drawing import SIZE
from tools import profusion_workflows as profusion
from tools import score_workflows as scores
from tools.graph import Graph, Node
from tools.hosts import needed_host

ROOT = Path(__file__).parents[1]
OUT = ROOT / "workflows"
SD15_FILE = "v1-5-pruned-emaonly-fp16.safetensors"
SD15 = {
    "name": SD15_FILE,
    "url": f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{SD15_FILE}",
    "directory": "checkpoints",
}


def definitions(host: Path) -> tuple[dict[str, Any], str]:
    """The host's nodes with ours among them, as the host itself loads them, and our version."""
    sys.path.insert(0, str(host))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    spec = importlib.util.spec_from_file_location(
        "profusion_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules["profusion_pack"] = pack
    spec.loader.exec_module(pack)
    ours = {node.GET_SCHEMA().node_id: node for node in pack.NODES}
    return {**nodes.NODE_CLASS_MAPPINGS, **ours}, sys.modules["profusion_pack.profusion"].__version__


def concept(
    graph: Graph,
    at: tuple[int, int],
    base: Node,
    pictures: tuple,
    masks: tuple | None,
    noun: tuple | str,
    steps: int,
    rate: float,
    cfg: float,
) -> Node:
    """Pictures into a residual, with its plot, samples and file."""
    linked = {"masks": masks} if masks else {}
    x, y = at
    trainer = graph.add(
        "ProFusion_ResidualTrainer",
        at,
        wide=340,
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        images=pictures,
        noun=noun,
        steps=steps,
        learning_rate=rate,
        sample_cfg=cfg,
        **linked,
    )
    loss = graph.add("PreviewImage", (x + 380, y), "Loss", tall=220, images=trainer["loss_plot"])
    samples = graph.add("PreviewImage", loss.below, "Samples while training", tall=220, images=trainer["samples"])
    saver = graph.add(
        "ProFusion_ResidualSaver", samples.below, residual=trainer["RESIDUAL"], preview=trainer["samples"]
    )
    graph.text(trainer.below, "Saved as", saver["path"])
    return trainer


def generate(
    graph: Graph,
    x: int,
    y: int,
    base: Node,
    text: str,
    residuals: list[tuple],
    size: int,
    steps: int,
    cfg: float,
    **choices: Any,
) -> None:
    """The same prompt and seed twice: the plain picture and the one with the concepts; choices: of the patch."""
    prompt = graph.add("PrimitiveStringMultiline", (x, y), "Prompt", wide=340, value=text)
    more = {f"residual_{number}": residual for number, residual in enumerate(residuals[1:], 2)}
    patch = graph.add(
        "ProFusion_InfusionAttentionPatch",
        prompt.below,
        wide=340,
        model=base["MODEL"],
        clip=base["CLIP"],
        text=prompt["STRING"],
        residual=residuals[0],
        **more,
        **choices,
    )
    positive = graph.add(
        "CLIPTextEncode", (x + 380, y), "Plain prompt", wide=280, clip=base["CLIP"], text=prompt["STRING"]
    )
    negative = graph.add("CLIPTextEncode", positive.below, "Negative prompt", wide=280, clip=base["CLIP"], text="")
    latent = graph.add("EmptyLatentImage", negative.below, wide=280, width=size, height=size, batch_size=4)
    for row, (title, model, condition) in enumerate(
        (
            ("With the concept", patch["MODEL"], patch["CONDITIONING"]),
            ("Plain, same seed", base["MODEL"], positive["CONDITIONING"]),
        )
    ):
        top = y + row * 580
        sampler = graph.add(
            "KSampler",
            (x + 700, top),
            title,
            wide=280,
            model=model,
            positive=condition,
            negative=negative["CONDITIONING"],
            latent_image=latent["LATENT"],
            seed=1,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
        )
        picture = graph.add("VAEDecode", (x + 1020, top), wide=180, samples=sampler["LATENT"], vae=base["VAE"])
        kind, options = ("SaveImage", {"filename_prefix": "infusion"}) if row == 0 else ("PreviewImage", {})
        graph.add(kind, picture.below, title, wide=340, tall=260, images=picture["IMAGE"], **options)


def train_and_generate(graph: Graph) -> None:
    base = graph.add("ProFusion_ToyboxLoader", (0, 0), wide=380)
    shown = graph.add("PreviewImage", base.below, "Pictures to learn from", wide=380, tall=200, images=base["pictures"])
    graph.note(
        "### Infusion on Toybox\nPress *Run*. It learns a toy that the model has never seen from four pictures, then "
        "draws it in a new place, beside the plain picture of the same seed. About two minutes on a CPU.\n\nChange "
        "the **Prompt**: it needs the toy's noun. The other words, the layout and the background stay the plain "
        "model's.",
        shown.below,
        (380, 320),
    )
    trained = concept(graph, (420, 0), base, base["pictures"], base["masks"], base["noun"], 200, 0.0, 2.0)
    generate(graph, 1140, 0, base, "a photo of a mushroom on snow", [trained["RESIDUAL"]], SIZE, 25, 2.0)


def two_concepts(graph: Graph) -> None:
    base = graph.add("ProFusion_ToyboxLoader", (0, 0), wide=380, toy="slate and apricot mushroom")
    other = graph.add(
        "ProFusion_ToyboxLoader", base.below, "Pictures of another toy", wide=380, toy="gold and navy cup"
    )
    graph.note(
        "### Two concepts in one prompt\nEach is learned apart, from its own pictures, and drawn at its own noun. "
        "Apart, each is what it is alone and costs an evaluation at every so manyth step; *together*, their number "
        "costs nothing, and a little of each reaches the other.",
        other.below,
        (380, 190),
    )
    first = concept(graph, (420, 0), base, base["pictures"], base["masks"], base["noun"], 150, 0.0, 2.0)
    lower = max(node.below[1] for node in graph.nodes)
    second = concept(graph, (420, lower), base, other["pictures"], other["masks"], other["noun"], 150, 0.0, 2.0)
    generate(
        graph,
        1140,
        0,
        base,
        "a photo of a mushroom and a cup on grass",
        [first["RESIDUAL"], second["RESIDUAL"]],
        SIZE,
        25,
        2.0,
        background="held",
        concepts="each apart",
    )


def sd15(graph: Graph) -> None:
    base = graph.add("CheckpointLoaderSimple", (0, 0), wide=380, ckpt_name=SD15["name"], properties={"models": [SD15]})
    first = graph.add("LoadImage", base.below, "Picture 1", wide=214, tall=240)
    second = graph.add("LoadImage", first.below, "Picture 2", wide=214, tall=240)
    third = graph.add("LoadImage", second.below, "Picture 3", wide=214, tall=240)
    at = 240, base.below[1]
    pair = graph.add("ImageBatch", at, wide=240, image1=first["IMAGE"], image2=second["IMAGE"])
    batch = graph.add("ImageBatch", pair.below, wide=240, image1=pair["IMAGE"], image2=third["IMAGE"])
    graph.note(
        "### Infusion on Stable Diffusion 1.5\n1. Choose your checkpoint.\n2. Load three pictures of your thing, of "
        "one size (up to five: add Load Image and Batch Images). Paint masks in the mask editor, or leave them "
        "out.\n3. Write its class noun (*cat*, *backpack*, *car*) into the trainer, and a prompt that has the noun.",
        third.below,
        (480, 260),
    )
    trained = concept(graph, (520, 0), base, batch["IMAGE"], None, "cat", 300, 0.0, 7.0)
    generate(graph, 1240, 0, base, "a photo of a cat in the snow, detailed", [trained["RESIDUAL"]], 512, 30, 7.0)


WORKFLOWS = {
    "infusion_train_and_generate": train_and_generate,
    "infusion_two_concepts": two_concepts,
    "infusion_sd15": sd15,
    "profusion_one_image": profusion.one_image,
    "profusion_finetune": profusion.finetune,
    "profusion_pretrain": profusion.pretrain,
    "profusion_two_references": profusion.two_references,
    "profusion_with_infusion": profusion.with_infusion,
    "overfitting": scores.overfitting,
}


def main() -> None:
    host = needed_host()
    known, version = definitions(host)
    OUT.mkdir(exist_ok=True)
    for name, draw in WORKFLOWS.items():
        graph = Graph(known, version)
        draw(graph)
        graph.save(OUT / f"{name}.json")
        print(OUT / f"{name}.json")


if __name__ == "__main__":
    main()
