"""The pack's nodes: schemas and host glue, no mathematics."""

from . import infusion, residual

NODES = [*infusion.NODES, *residual.NODES]
