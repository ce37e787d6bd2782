"""The four networks of a Stable Diffusion checkpoint, with ComfyUI's parameter names, so one file loads in both."""
