"""The gates' figures, on autoencoders of which one knows what they are worth."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from profusion.toybox import world
from training import gates
from training.gates import Figure


class Cells(nn.Module):
    """Keeps every pixel in its own cell; `blur` and `spill` make it as bad as one likes.

    blur: of a cell's pixels towards their mean. spill: of the whole picture's mean that each pixel takes.
    """

    def __init__(self, blur=0.0, spill=0.0):
        super().__init__()
        self.blur, self.spill = nn.Parameter(torch.tensor(blur)), spill

    def latents(self, pictures):
        return F.pixel_unshuffle(pictures.movedim(-1, 1), 8)

    @torch.no_grad()
    def pictures(self, latents):
        cells = latents.unflatten(1, (3, 64))
        cells = torch.lerp(cells, cells.mean(dim=2, keepdim=True), self.blur)
        pixels = F.pixel_shuffle(cells.flatten(1, 2), 8)
        return (pixels + self.spill * pixels.mean(dim=(1, 2, 3), keepdim=True)).movedim(1, -1)


def test_a_figure_holds_on_its_side_of_the_bound():
    assert Figure("a", 0.99, 0.99).holds and not Figure("a", 0.98, 0.99).holds
    assert Figure("a", 0.003, 0.003, most=True).holds and not Figure("a", 0.004, 0.003, most=True).holds
    assert str(Figure("share", 0.5, 0.6)).startswith("MISSED share")


def test_a_lossless_autoencoder_passes_what_needs_no_judge():
    perfect, name = Cells(), next(iter(world.CONCEPTS))
    assert gates._psnr(perfect, 3, 0) == math.inf
    assert gates._likeness(perfect, name, 2, 0) == pytest.approx(1, abs=1e-3)
    assert gates._exchange(perfect, 3, 0) < 1e-6


def test_blur_costs_decibels_and_likeness_and_spilling_moves_the_background():
    blurred, name = Cells(blur=0.9), next(iter(world.CONCEPTS))
    assert 10 < gates._psnr(blurred, 3, 0) < 25
    assert gates._psnr(Cells(blur=0.5), 3, 0) == pytest.approx(gates._psnr(Cells(blur=1.0), 3, 0) + 6.02, abs=0.1)
    assert gates._likeness(blurred, name, 2, 0) < 0.97
    assert gates._exchange(blurred, 3, 0) < 1e-4  # only in the cells that the outline crosses
    assert 0.003 < gates._exchange(Cells(spill=0.5), 6, 0) < 0.1


def test_the_gates_verdict_and_its_file(tmp_path, capsys):
    figures = [Figure("good", 1.0, 0.9), Figure("bad", 1.0, 0.9, most=True)]
    assert not gates.report(figures, tmp_path / "gate.json") and gates.report(figures[:1], None)
    assert [row["holds"] for row in json.loads((tmp_path / "gate.json").read_text())] == [True, False]
    assert capsys.readouterr().out.splitlines() == ["GATE NOT PASSED: bad", "GATE PASSED"]


def test_the_vae_gate_asks_the_judge_about_singles_and_pairs(monkeypatch):
    """Every scene is recognised, by a judge that is told: so the shares are one, and only the pictures decide."""
    asked = []

    def outcomes(judge, pictures, scenes):
        asked.append((judge, tuple(pictures.shape), {len(scene.objects) for scene in scenes}))
        return [{"noun": [True], "background": [True], "color": [True], "pattern": [True]} for _ in scenes]

    monkeypatch.setattr(gates.toybox_captions, "outcomes", outcomes)
    judge = SimpleNamespace()
    figures = {figure.name: figure for figure in gates.vae_figures(Cells(), judge, 4)}
    assert [objects for _, _, objects in asked] == [{1}, {1}, {2}, {2}] and all(seen is judge for seen, _, _ in asked)
    assert [shape[0] for _, shape, _ in asked] == [4, 4, 2, 2]
    assert len(figures) == 10 + 1 + len(world.CONCEPTS) + 1 and all(figure.holds for figure in figures.values())
    assert figures["unseen, decoded: noun"].bound == 0.99 and figures["pairs, decoded: color"].bound == 0.9
