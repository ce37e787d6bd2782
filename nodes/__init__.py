"""The pack's nodes: schemas and host glue, no mathematics."""

from . import fusion, infusion, residual, toybox, trainer

NODES = [*toybox.NODES, *trainer.NODES, *residual.NODES, *infusion.NODES, *fusion.NODES]
