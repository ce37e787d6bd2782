"""What people would use instead of Infusion, on the same base, pictures, masks, steps and sampler."""

from benchmarks.peers.base import Peer
from benchmarks.peers.lora import Lora
from benchmarks.peers.residuals import Infusion, InfusionPaperLoss, InfusionSharedLatent, WithoutLock
from benchmarks.peers.weights import CustomDiffusion, DreamBooth
from benchmarks.peers.words import KeyLock, TextualInversion

PEERS: tuple[type[Peer], ...] = (
    Infusion,
    InfusionSharedLatent,
    InfusionPaperLoss,
    WithoutLock,
    TextualInversion,
    Lora,
    DreamBooth,
    CustomDiffusion,
    KeyLock,
)
OURS = Infusion
PLAIN = Peer

__all__ = ["OURS", "PEERS", "PLAIN", "Peer"]
