"""The pack's nodes: schemas and host glue, no mathematics."""

from . import infusion, residual, toybox, trainer

NODES = [*toybox.NODES, *trainer.NODES, *residual.NODES, *infusion.NODES]
