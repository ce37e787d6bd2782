"""Developer scripts that make what ships. Not part of the pack that ComfyUI Manager installs."""
