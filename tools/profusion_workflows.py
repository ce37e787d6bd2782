"""The shipped workflows of ProFusion: pictures of toys into S*, and S* into pictures, on Toybox."""

from __future__ import annotations

from typing import Any

from profusion.toybox.drawing import SIZE
from tools.graph import Graph, Node

TOY, OTHER_TOY = "slate and apricot mushroom", "gold and navy cup"
TO_LEARN = "magenta and lime fish", "teal and coral ball"  # beside the first, for a PromptNet of its own
BATCH, SEED, CFG = 4, 1, 4.0
SCHEDULE = {"steps": 25, "scheduler": "simple"}
KSAMPLER = {"seed": SEED, "cfg": CFG, "sampler_name": "euler", **SCHEDULE}
ROW = 960  # from one sampler and its pictures down to the next
ALONE = "a photo of a S* on snow"
BOTH, BOTH_OTHER = "a photo of a S* and a cup on grass", "a photo of a mushroom and a S* on grass"
BOTH_PLAIN = "a photo of a mushroom and a cup on grass"
NOTE = (-440, 0)
NEXT_GROUP = 80  # from the end of a group's last node, besides what stands between two nodes
At = tuple[int, int]
Output = tuple[Node, int]


def studio(graph: Graph, toy: str = TOY, count: int = 1) -> tuple[Node, Node]:
    """Toybox with pictures of a toy, and its PromptNet."""
    base = graph.add("ProFusion_ToyboxLoader", (0, 0), wide=380, toy=toy, count=count)
    return base, graph.add("ProFusion_PromptNetLoader", base.below, wide=380, promptnet="Toybox")


def preview(graph: Graph, at: At, title: str, images: Output, wide: int = 380) -> Node:
    return graph.add("PreviewImage", at, title, wide=wide, tall=200, images=images)


def encode(
    graph: Graph, at: At, base: Node, promptnet: Output, shown: Node, text: Output, title: str | None = None
) -> Node:
    """S* of the toy whose picture the loader `shown` draws, in a prompt."""
    return graph.add(
        "ProFusion_PromptNetEncode",
        at,
        title,
        wide=340,
        promptnet=promptnet,
        clip=base["CLIP"],
        clip_vision=base["CLIP_VISION"],
        vae=base["VAE"],
        images=shown["pictures"],
        noun=shown["noun"],
        text=text,
    )


def residual_trainer(graph: Graph, at: At, base: Node, capacity: int) -> Node:
    """Infusion's training on the loader's pictures; capacity: 1 is the paper's, 4 is more alike."""
    return graph.add(
        "ProFusion_ResidualTrainer",
        at,
        wide=340,
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        images=base["pictures"],
        masks=base["masks"],
        noun=base["noun"],
        steps=150,
        learning_rate=0.0,
        sample_cfg=2.0,
        capacity=capacity,
    )


def finetuner(graph: Graph, at: At, base: Node, promptnet: Output, images: Output) -> Node:
    """ProFusion's fine-tuning to pictures, at the rates that a model as small as Toybox needs."""
    return graph.add(
        "ProFusion_PromptNetFinetune",
        at,
        wide=340,
        promptnet=promptnet,
        model=base["MODEL"],
        clip=base["CLIP"],
        clip_vision=base["CLIP_VISION"],
        vae=base["VAE"],
        images=images,
        learning_rate=1e-4,
        attention_learning_rate=1e-3,
    )


def canvas(graph: Graph, at: At, base: Node) -> dict[str, Output]:
    """What all samplers start from."""
    negative = graph.add("CLIPTextEncode", at, "Negative prompt", wide=340, clip=base["CLIP"], text="")
    latent = graph.add("EmptyLatentImage", negative.below, wide=340, width=SIZE, height=SIZE, batch_size=BATCH)
    return {"negative": negative["CONDITIONING"], "latent_image": latent["LATENT"]}


def show(graph: Graph, at: At, base: Node, latent: Output, title: str, saved: bool = False) -> Node:
    """Decode what was drawn and show it; returns the decoder. A workflow's own result is saved."""
    picture = graph.add("VAEDecode", at, wide=180, samples=latent, vae=base["VAE"])
    kind, options = ("SaveImage", {"filename_prefix": "profusion"}) if saved else ("PreviewImage", {})
    graph.add(kind, picture.below, title, wide=340, tall=260, images=picture["IMAGE"], **options)
    return picture


def fused(graph: Graph, at: At, base: Node, title: str, saved: bool = False, **linked: Any) -> None:
    """Fusion KSampler in a group of its own, with what it draws."""
    with graph.group(title):
        sampler = graph.add("ProFusion_FusionKSampler", at, wide=300, **linked, **KSAMPLER)
        show(graph, (at[0] + 340, at[1]), base, sampler["LATENT"], title, saved)


def control(graph: Graph, at: At, base: Node, text: Output, start: dict[str, Output]) -> None:
    """The same seed in plain words."""
    with graph.group("Plain words, same seed"):
        sampler = graph.add("KSampler", at, wide=300, model=base["MODEL"], positive=text, **start, **KSAMPLER)
        show(graph, (at[0] + 340, at[1]), base, sampler["LATENT"], "Plain words, same seed")


def one_picture(graph: Graph, note: str) -> tuple[Node, Node]:
    """The first group, and what the workflow says of itself."""
    with graph.group("1. A model, and one picture"):
        base, promptnet = studio(graph)
        preview(graph, promptnet.below, "The one picture", base["pictures"])
    graph.note(note, NOTE, (380, 340))
    return base, promptnet


def one_image(graph: Graph) -> None:
    base, promptnet = one_picture(
        graph,
        "### ProFusion: one picture, no training\nPress *Run*. PromptNet looks at one picture of a toy that the model "
        "has never seen and writes it into the prompt as the word `S*`. Fusion KSampler draws it together with the "
        "rest of the text. Below it: the same seed with the toy's noun in plain words.\n\nChange the **Prompt**: it "
        "needs `S*` once. With a checkpoint of your own, use a PromptNet and a CLIP Vision model that belong to it.",
    )
    with graph.group("2. The picture becomes a word"):
        prompt = graph.add("PrimitiveStringMultiline", (440, 0), "Prompt", wide=340, value=ALONE)
        word = encode(graph, prompt.below, base, promptnet["PROMPTNET"], base, prompt["STRING"])
        start = canvas(graph, word.below, base)
    fused(
        graph,
        (840, 0),
        base,
        "3. The word, drawn with the text",
        saved=True,
        model=base["MODEL"],
        positive=word["with_word"],
        text=word["plain_text"],
        **start,
    )
    control(graph, (840, ROW), base, word["plain_text"], start)


def finetune(graph: Graph) -> None:
    base, promptnet = one_picture(
        graph,
        "### Fine-tune to one picture\n*PromptNet Finetune* takes 50 steps on the picture and on variants that "
        "*Concept Augment* draws of it: the toy stays, what is around it changes. To train on the picture alone, "
        "bypass Concept Augment (Ctrl+B). A minute or two on a CPU.\n\nThe model that comes in stays as it is: its "
        "changes are saved in `models/loras`, and the PromptNet that goes with them in `models/profusion_promptnets`.",
    )
    with graph.group("2. Variants of the picture"):
        variants = graph.add(
            "ProFusion_ConceptAugment",
            (440, 0),
            wide=340,
            model=base["MODEL"],
            clip=base["CLIP"],
            vae=base["VAE"],
            image=base["pictures"],
            mask=base["masks"],
            noun=base["noun"],
            cfg=CFG,
            prompts="\n".join(
                f"a photo of a %noun% {place}" for place in ("on grass", "on the sea", "on sand", "at night")
            ),
        )
        preview(graph, variants.below, "To be learned from", variants["images"], 340)
    with graph.group("3. Fine-tune"):
        trainer = finetuner(graph, (840, 0), base, promptnet["PROMPTNET"], variants["images"])
        loss = preview(graph, trainer.below, "Loss", trainer["loss_plot"], 340)
        graph.text(loss.below, "Saved in models/loras as", trainer["patch_file"])
    with graph.group("4. The picture becomes a word"):
        prompt = graph.add("PrimitiveStringMultiline", (1240, 0), "Prompt", wide=340, value=ALONE)
        after = encode(graph, prompt.below, base, trainer["PROMPTNET"], base, prompt["STRING"], "Fine-tuned")
        before = encode(graph, after.below, base, promptnet["PROMPTNET"], base, prompt["STRING"], "Not fine-tuned")
        start = canvas(graph, before.below, base)
    fused(
        graph,
        (1640, 0),
        base,
        "5. After 50 steps",
        saved=True,
        model=trainer["MODEL"],
        positive=after["with_word"],
        text=after["plain_text"],
        **start,
    )
    fused(
        graph,
        (1640, ROW),
        base,
        "Before, same seed",
        model=base["MODEL"],
        positive=before["with_word"],
        text=before["plain_text"],
        **start,
    )
    control(graph, (1640, 2 * ROW), base, before["plain_text"], start)


def pretrain(graph: Graph) -> None:
    graph.note(
        "### A PromptNet of your own\n*PromptNet Trainer* makes a PromptNet for the model that is connected: from the "
        "encoder of its own UNet, on pictures alone. Here it has 18 pictures of three toys, and 150 steps: a minute on "
        "a CPU. That is enough to say colours and patterns, and not much more; Toybox's own saw 12,000.\n\nFor your "
        "checkpoint: connect it with a CLIP Vision model, put a folder of pictures into ComfyUI's `input`, choose it "
        "as **folder**, and set steps to thousands. The node says whether `S*` helps with pictures that it has not "
        "trained on. Cancel keeps what was learned, and *Run* goes on.",
        NOTE,
        (380, 420),
    )
    with graph.group("1. A model, and pictures to learn from"):
        base = graph.add("ProFusion_ToyboxLoader", (0, 0), wide=380, toy=TOY, count=6)
        more, images, at = [], base["pictures"], base.below
        for toy in TO_LEARN:
            more.append(graph.add("ProFusion_ToyboxLoader", at, "Pictures of another toy", wide=380, toy=toy, count=6))
            joined = graph.add("ImageBatch", more[-1].below, wide=380, image1=images, image2=more[-1]["pictures"])
            images, at = joined["IMAGE"], joined.below
        preview(graph, at, "To be learned from", images)
    with graph.group("2. Train"):
        trainer = graph.add(
            "ProFusion_PromptNetTrainer",
            (440, 0),
            wide=380,
            folder="none",
            model=base["MODEL"],
            clip=base["CLIP"],
            clip_vision=base["CLIP_VISION"],
            vae=base["VAE"],
            images=images,
            steps=150,
            learning_rate=1e-3,
            batch_size=8,
            filename_prefix="profusion/toys",
            warmup=20,
            cosine=True,
            weight_cap=20.0,
            level_bias=1.0,
            sample_every=50,
            sample_cfg=CFG,
        )
        samples = preview(graph, trainer.below, "Drawn with S*, and the picture it is of", trainer["samples"])
        graph.text(samples.below, "For PromptNet Loader", trainer["promptnet_file"])
    with graph.group("3. A picture becomes a word"):
        prompt = graph.add("PrimitiveStringMultiline", (880, 0), "Prompt", wide=340, value=ALONE)
        word = encode(graph, prompt.below, base, trainer["PROMPTNET"], more[0], prompt["STRING"])
        start = canvas(graph, word.below, base)
    fused(
        graph,
        (1280, 0),
        base,
        "4. The word, drawn with the text",
        saved=True,
        model=base["MODEL"],
        positive=word["with_word"],
        text=word["plain_text"],
        **start,
    )
    control(graph, (1280, ROW), base, word["plain_text"], start)


def two_references(graph: Graph) -> None:
    with graph.group("1. A model, and a picture of each of two things"):
        base, promptnet = studio(graph)
        other = graph.add(
            "ProFusion_ToyboxLoader", promptnet.below, "A picture of another toy", wide=380, toy=OTHER_TOY, count=1
        )
        first = preview(graph, other.below, "The first picture", base["pictures"])
        preview(graph, first.below, "The second picture", other["pictures"])
    graph.note(
        "### Two things, each from one picture\nA prompt has one `S*`, so each picture has a prompt of its own, in "
        "which the other thing is a plain noun. *Fusion Guider* follows both prompts, and the plain text, in one "
        "batched call a step. Its **weights** say what counts how much: raise the first for more of the first "
        "thing.\n\nSeveral pictures of the *same* thing are something else: batch them into one PromptNet Encode, "
        "which takes their mean.",
        NOTE,
        (380, 360),
    )
    with graph.group("2. Each picture becomes a word"):
        prompts = [graph.add("PrimitiveStringMultiline", (440, 0), "Prompt of the first picture", wide=340, value=BOTH)]
        prompts.append(
            graph.add("PrimitiveStringMultiline", prompts[0].below, "Prompt of the second", wide=340, value=BOTH_OTHER)
        )
        words = [encode(graph, prompts[1].below, base, promptnet["PROMPTNET"], base, prompts[0]["STRING"], "The first")]
        words.append(
            encode(graph, words[0].below, base, promptnet["PROMPTNET"], other, prompts[1]["STRING"], "The second")
        )
        start = canvas(graph, words[1].below, base)
    with graph.group("3. Both words, drawn with the text"):
        guider = graph.add(
            "ProFusion_FusionGuider",
            (840, 0),
            wide=300,
            model=base["MODEL"],
            conditioning=words[0]["with_word"],
            weight=1.0,
            conditioning_2=words[1]["with_word"],
            weight_2=1.0,
            conditioning_3=words[0]["plain_text"],
            weight_3=0.5,
            negative=start["negative"],
            cfg=CFG,
        )
        refinement = graph.add("KSamplerSelect", guider.below, wide=300, sampler_name="euler")
        sampler = graph.add("ProFusion_FusionSampler", refinement.below, wide=300, sampler=refinement["SAMPLER"])
        levels = graph.add("BasicScheduler", sampler.below, wide=300, model=base["MODEL"], **SCHEDULE)
        noise = graph.add("RandomNoise", levels.below, wide=300, noise_seed=SEED)
        drawn = graph.add(
            "SamplerCustomAdvanced",
            (1180, 0),
            wide=340,
            noise=noise["NOISE"],
            guider=guider["GUIDER"],
            sampler=sampler["SAMPLER"],
            sigmas=levels["SIGMAS"],
            latent_image=start["latent_image"],
        )
        show(graph, drawn.below, base, drawn["output"], "Both, each from one picture", saved=True)
    control(graph, (1580, 0), base, words[0]["plain_text"], start)


def with_infusion(graph: Graph) -> None:
    with graph.group("1. A model; pictures of one thing, and one of another"):
        base, promptnet = studio(graph, OTHER_TOY, 4)
        other = graph.add(
            "ProFusion_ToyboxLoader", promptnet.below, "A picture of another toy", wide=380, toy=TOY, count=1
        )
        first = preview(graph, other.below, "Four pictures, to train on", base["pictures"])
        preview(graph, first.below, "The one picture", other["pictures"])
    graph.note(
        "### Both methods in one prompt\nThe cup is learned by Infusion, from four pictures in a training; the "
        "mushroom is ProFusion's `S*`, from one picture and without any. *Infusion Attention Patch* places the "
        "residual at the noun *cup*: once in the prompt that has `S*`, which comes in as *conditioning*, and once in "
        "the plain text beside it. Fusion KSampler draws both.\n\nChange both **prompts** together: the one is the "
        "other in plain words.",
        NOTE,
        (380, 380),
    )
    with graph.group("2. Infusion: train a residual"):
        trainer = residual_trainer(graph, (440, 0), base, 4)
        loss = preview(graph, trainer.below, "Loss", trainer["loss_plot"], 340)
        saver = graph.add(
            "ProFusion_ResidualSaver", loss.below, wide=340, residual=trainer["RESIDUAL"], preview=trainer["samples"]
        )
        graph.text(saver.below, "Saved as", saver["path"])
    with graph.group("3. ProFusion: the picture becomes a word"):
        prompt = graph.add("PrimitiveStringMultiline", (840, 0), "Prompt", wide=340, value=BOTH)
        word = encode(graph, prompt.below, base, promptnet["PROMPTNET"], other, prompt["STRING"])
        plain = graph.add("PrimitiveStringMultiline", word.below, "The same in plain words", wide=340, value=BOTH_PLAIN)
        start = canvas(graph, plain.below, base)

    with graph.group("4. The residual goes into both prompts"):
        residual = {"clip": base["CLIP"], "residual": trainer["RESIDUAL"]}
        first = graph.add(
            "ProFusion_InfusionAttentionPatch",
            (1240, 0),
            "Into the prompt with S*",
            wide=340,
            model=base["MODEL"],
            text=prompt["STRING"],
            conditioning=word["with_word"],
            **residual,
        )
        second = graph.add(
            "ProFusion_InfusionAttentionPatch",
            first.below,
            "Into the plain text",
            wide=340,
            model=first["MODEL"],
            text=plain["STRING"],
            **residual,
        )
    fused(
        graph,
        (1640, 0),
        base,
        "5. Both, drawn",
        saved=True,
        model=second["MODEL"],
        positive=first["CONDITIONING"],
        text=second["CONDITIONING"],
        **start,
    )
    control(graph, (1640, ROW), base, word["plain_text"], start)
