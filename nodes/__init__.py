"""The pack's nodes: schemas and host glue, no mathematics."""

from . import augment, finetune, fusion, infusion, overfit, promptnet, residual, scores, toybox, trainer

NODES = [
    *toybox.NODES,
    *trainer.NODES,
    *residual.NODES,
    *infusion.NODES,
    *promptnet.NODES,
    *fusion.NODES,
    *finetune.NODES,
    *augment.NODES,
    *scores.NODES,
    *overfit.NODES,
]
