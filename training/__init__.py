"""Developer scripts that make the shipped weights. Not part of the pack that ComfyUI Manager installs."""
