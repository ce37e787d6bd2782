"""ProFusion_ResidualLoader and ProFusion_ResidualSaver: residuals from and to the models folder."""

from __future__ import annotations

from comfy_api.latest import io
from PIL.Image import Image

from ..profusion.pictures import to_image
from ..profusion.residual import PRECISIONS, load_residual, save_residual
from .host.display import show
from .host.files import find_residual, fingerprint, residual_names, save_residual_numbered, why_not_found


class ResidualLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ResidualLoader",
            display_name="Residual Loader",
            category="ProFusion",
            description="Loads a learned concept from models/profusion_residuals. The file is checked, never executed.",
            inputs=[
                io.Combo.Input(
                    "residual",
                    options=residual_names(),
                    tooltip="A residual file in models/profusion_residuals. Press R to list new files.",
                ),
            ],
            outputs=[
                io.Custom("RESIDUAL").Output(tooltip="The concept, for Infusion Attention Patch or to train on."),
                io.String.Output(
                    display_name="noun", tooltip="The class noun that the concept goes with; the prompt must have it."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, residual=None) -> bool | str:
        return why_not_found(find_residual, residual)

    @classmethod
    def fingerprint_inputs(cls, residual=None) -> str:
        return fingerprint(find_residual, residual)

    @classmethod
    def execute(cls, residual) -> io.NodeOutput:
        loaded = load_residual(find_residual(residual))
        text = f"{loaded.noun}: {loaded.architecture}, {loaded.steps} steps"
        if loaded.capacity > 1:
            text += f", capacity {loaded.capacity}"
        if loaded.origin is not None and loaded.origin.base:
            text += f"\ntrained on {loaded.origin.base}"
        return io.NodeOutput(loaded, loaded.noun, ui=show(cls, text))


class ResidualSaver(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ResidualSaver",
            display_name="Residual Saver",
            category="ProFusion",
            description=(
                "Saves a learned concept in models/profusion_residuals, about 10 KB for SD 1.5, or 48 KB with a "
                "capacity of 4. Files are numbered: "
                "none is ever overwritten."
            ),
            inputs=[
                io.Custom("RESIDUAL").Input("residual", tooltip="The concept, from Residual Trainer."),
                io.String.Input(
                    "filename_prefix",
                    default="%noun%",
                    tooltip=(
                        "The file's name; a number is added. %noun% becomes the class noun, %year%, %month%, %day% and "
                        "so on the date, and 'pets/cat' makes a subfolder."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip=(
                        "int6: the smallest, 2 % off, which pictures do not show. float16: 2.4 times as large. "
                        "float32: exact, and keeps what is needed to resume training where it stopped."
                    ),
                ),
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="A picture that model browsers show for the file. The first of a batch is taken.",
                ),
            ],
            outputs=[
                io.Custom("RESIDUAL").Output(tooltip="The residual that came in, unchanged."),
                io.String.Output(display_name="path", tooltip="The path of the saved file."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, residual, filename_prefix, precision, preview=None) -> io.NodeOutput:
        picture = _picture(preview)
        saved = save_residual_numbered(
            filename_prefix,
            residual.noun,
            lambda path: save_residual(residual, path, precision, picture, overwrite=False),
        )
        text = f"{saved.path}\n{saved.size:,} bytes" + (f"\n{saved.warning}" if saved.warning else "")
        return io.NodeOutput(residual, str(saved.path), ui=show(cls, text))


def _picture(images) -> Image | None:
    """The first of a batch of the host's pictures, (B, H, W, C) in [0, 1]; None for none."""
    if images is None or not len(images):
        return None
    return to_image(images[0, :, :, :3].float().nan_to_num().expand(-1, -1, 3))


NODES = [ResidualLoader, ResidualSaver]
