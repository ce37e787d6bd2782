"""Toybox: a small diffusion stack and the drawn world it was trained on."""
