"""The pack's nodes: schemas alone. What they do in the host is in host/, and the mathematics in the kernel."""

from . import (
    augment,
    finetune,
    fusion,
    infusion,
    overfit,
    pretrain,
    probe,
    promptnet,
    region,
    residual,
    scores,
    toybox,
    trainer,
)
from .host.guarding import guarded
from .host.sets import taking_sets

_NODES = [
    *toybox.NODES,
    *trainer.NODES,
    *residual.NODES,
    *infusion.NODES,
    *region.NODES,
    *probe.NODES,
    *promptnet.NODES,
    *fusion.NODES,
    *pretrain.NODES,
    *finetune.NODES,
    *augment.NODES,
    *scores.NODES,
    *overfit.NODES,
]
NODES = [taking_sets(guarded(node)) for node in _NODES]
