"""ProFusion for ComfyUI."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES

WEB_DIRECTORY = "./web"


class ProFusionExtension(ComfyExtension):
    async def get_node_list(self) -> list:
        return NODES


async def comfy_entrypoint() -> ProFusionExtension:
    return ProFusionExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
