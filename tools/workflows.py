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


HUB = "https://huggingface.co"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
LUMINA = f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files"
Z_IMAGE = f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"


def file_of(directory: str, url: str) -> dict[str, str]:
    """What the frontend offers to download where models/DIRECTORY lacks it."""
    return {"name": url.rsplit("/", 1)[1], "url": url, "directory": directory}


FLUX_FILES = {
    "unet": file_of("diffusion_models", f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "texts": [file_of("text_encoders", f"{FLUX_TEXT}/{name}.safetensors") for name in ("clip_l", "t5xxl_fp16")],
    "vae": file_of("vae", f"{LUMINA}/vae/ae.safetensors"),
}
Z_IMAGE_FILES = {
    "unet": file_of("diffusion_models", f"{Z_IMAGE}/diffusion_models/z_image_turbo_bf16.safetensors"),
    "texts": [file_of("text_encoders", f"{Z_IMAGE}/text_encoders/qwen_3_4b.safetensors")],
    "vae": file_of("vae", f"{Z_IMAGE}/vae/ae.safetensors"),
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
    capacity: int = 4,
) -> Node:
    """Pictures into a residual, with its plot, samples and file. capacity: 1 is the paper's, 4 is more alike."""
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
        capacity=capacity,
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


def transformer(graph: Graph) -> None:
    base = graph.add("ProFusion_ToyboxLoader", (0, 0), wide=380, base="MMDiT")
    shown = graph.add("PreviewImage", base.below, "Pictures to learn from", wide=380, tall=200, images=base["pictures"])
    graph.note(
        "### Infusion on a transformer\nPress *Run*. Toybox's *MMDiT* has joint attention over text and picture and "
        "draws by flow matching, as Stable Diffusion 3 and Flux do. It learns a toy that it has never seen and draws "
        "it beside the plain picture of the same seed. About a minute on a CPU.\n\n**lock** says what of the plain "
        "picture's attention is kept: *column*, where the toy lands; *whole*, all of it, which holds the layout more "
        "and lets less of the toy through.",
        shown.below,
        (380, 340),
    )
    trained = concept(graph, (420, 0), base, base["pictures"], base["masks"], base["noun"], 200, 0.15, 3.0, 1)
    generate(graph, 1140, 0, base, "a photo of a mushroom on snow", [trained["RESIDUAL"]], SIZE, 25, 3.0, lock="column")


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


def transformer_files(graph: Graph, files: dict, kind: str) -> dict[str, tuple]:
    """A transformer, its text encoders (one, or two) and its VAE, each from a file of its own."""
    unet, texts, vae = files["unet"], files["texts"], files["vae"]
    model = graph.add("UNETLoader", (0, 0), wide=380, unet_name=unet["name"], properties={"models": [unet]})
    names = [text["name"] for text in texts]
    chosen = {"clip_name": names[0]} if len(names) == 1 else {"clip_name1": names[0], "clip_name2": names[1]}
    loader = "CLIPLoader" if len(names) == 1 else "DualCLIPLoader"
    clip = graph.add(loader, model.below, wide=380, **chosen, properties={"models": texts})
    clip.values["type"] = kind  # a name that `add` has for itself
    decoder = graph.add("VAELoader", clip.below, wide=380, vae_name=vae["name"], properties={"models": [vae]})
    return {"MODEL": model["MODEL"], "CLIP": clip["CLIP"], "VAE": decoder["VAE"], "below": decoder.below}


def with_residual(graph: Graph, base: dict[str, tuple], note: str, guided: float | None, **sampling: Any) -> None:
    """A concept from its file, drawn with a transformer beside the plain picture of its seed; guided: for FluxGuidance,
    where the network takes it as an input."""
    with graph.group("2. The concept"):
        residual = graph.add("ProFusion_ResidualLoader", (440, 0), wide=340, residual="cat.safetensors")
        prompt = graph.add(
            "PrimitiveStringMultiline", residual.below, "Prompt", wide=340, value="a photo of a cat in the snow"
        )
        patch = graph.add(
            "ProFusion_InfusionAttentionPatch",
            prompt.below,
            wide=340,
            model=base["MODEL"],
            clip=base["CLIP"],
            text=prompt["STRING"],
            residual=residual["RESIDUAL"],
            lock="column",
        )
    with graph.group("3. The prompt"):
        plain = graph.add(
            "CLIPTextEncode", (840, 0), "Plain prompt", wide=280, clip=base["CLIP"], text=prompt["STRING"]
        )
        negative = graph.add(
            "ConditioningZeroOut", plain.below, "No negative", wide=280, conditioning=plain["CONDITIONING"]
        )
        latent = graph.add("EmptySD3LatentImage", negative.below, wide=280, width=1024, height=1024, batch_size=1)
        prompts, at = (patch["CONDITIONING"], plain["CONDITIONING"]), latent.below
        if guided is not None:
            with_guidance = []
            for text in prompts:
                node = graph.add("FluxGuidance", at, wide=280, conditioning=text, guidance=guided)
                with_guidance.append(node["CONDITIONING"])
                at = node.below
            prompts = tuple(with_guidance)
    with graph.group("4. Drawn"):
        titles = ("With the concept", "Plain, same seed")
        for row, (title, model, text) in enumerate(zip(titles, (patch["MODEL"], base["MODEL"]), prompts, strict=True)):
            sampler = graph.add(
                "KSampler",
                (1180, row * 580),
                title,
                wide=280,
                model=model,
                positive=text,
                negative=negative["CONDITIONING"],
                latent_image=latent["LATENT"],
                seed=1,
                cfg=1.0,
                scheduler="simple",
                **sampling,
            )
            picture = graph.add("VAEDecode", (1500, row * 580), wide=180, samples=sampler["LATENT"], vae=base["VAE"])
            kind, options = ("SaveImage", {"filename_prefix": "infusion"}) if row == 0 else ("PreviewImage", {})
            graph.add(kind, picture.below, title, wide=340, tall=260, images=picture["IMAGE"], **options)
    graph.note(note, base["below"], (380, 440))


def files_note(title: str, files: dict, about: str) -> str:
    """What a graph says that needs files: which, where, and that nobody has run it."""
    listed = "\n".join(
        f"- `models/{file['directory']}/{file['name']}`" for file in (files["unet"], *files["texts"], files["vae"])
    )
    return (
        f"### {title}\n**Untried on real weights**: tests hold this model's layout to ComfyUI's own classes with small "
        "random weights. How well a concept comes is not known; *Attention Probe* shows what the model sees at its "
        f"noun.\n\nIt needs\n{listed}\n- `models/profusion_residuals/cat.safetensors`, a concept that *Residual "
        f"Trainer* has learned on this very model\n\n{about}"
    )


def flux(graph: Graph) -> None:
    with graph.group("1. Flux.1 dev"):
        base = transformer_files(graph, FLUX_FILES, "flux")
    about = "Distilled: its guidance is *FluxGuidance*, and **cfg** stays 1, where a negative says nothing."
    note = files_note("Infusion on Flux.1", FLUX_FILES, about)
    with_residual(graph, base, note, 3.5, steps=20, sampler_name="euler")


def z_image(graph: Graph) -> None:
    with graph.group("1. Z-Image Turbo"):
        base = transformer_files(graph, Z_IMAGE_FILES, "lumina2")
    about = "A ComfyUI that knows Z-Image is newer than 0.3.64. Turbo has 8 steps, and **cfg** stays 1."
    note = files_note("Infusion on Z-Image Turbo", Z_IMAGE_FILES, about)
    with_residual(graph, base, note, None, steps=8, sampler_name="res_multistep")


WORKFLOWS = {
    "infusion_train_and_generate": train_and_generate,
    "infusion_transformer": transformer,
    "infusion_two_concepts": two_concepts,
    "infusion_sd15": sd15,
    "infusion_flux": flux,
    "infusion_z_image": z_image,
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
