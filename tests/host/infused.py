"""One model, one CLIP and the node, with the few ways in which the tests use them."""

import tiny
import torch

PROMPT = "a photo of a ball on grass"
NEGATIVE = "blurry"


def seen_by_both() -> type:
    """Where a patch of a test notes what it sees. Closures are each stream's own, and classes are not."""
    return type("Seen", (), {"calls": []})


class Infused:
    """`run` samples; `run_both` returns C's latent and F's."""

    def __init__(self, pack, model=None, clip=None):
        self.pack = pack
        self.model = tiny.model() if model is None else model
        self.clip = tiny.clip() if clip is None else clip
        self.positive, self.negative = self.encode(PROMPT), self.encode(NEGATIVE)
        self.layers = pack.nodes.host.families.model_layers(self.model)
        self.node = pack.nodes.infusion.InfusionAttentionPatch

    def encode(self, text):
        return tiny.encode(self.clip, text)

    def residual(self, size=3.0, noun="ball", seed=5, capacity=1):
        generator = torch.Generator().manual_seed(seed)
        delta = size * torch.randn(len(self.layers), 1, self.layers[0].context_dim, generator=generator)
        names = tuple(layer.name for layer in self.layers)
        architecture = self.pack.profusion.infusion.architecture_name(self.layers)
        details = self._details(capacity, size, generator) if capacity > 1 else None
        return self.pack.profusion.residual.Residual(delta, noun, names, architecture, details=details)

    def _details(self, capacity, size, generator):
        kernel, widths = self.pack.profusion.details, tuple(layer.width for layer in self.layers)
        begun = kernel.beginning(capacity, len(widths), self.layers[0].context_dim, widths, generator)
        values = size * torch.randn(begun.values.shape, generator=generator)
        return kernel.Details(values, begun.gates, widths)

    def patch(self, residual, model=None, text=PROMPT, **inputs):
        """The node's two outputs."""
        defaults = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "occurrence": "auto"}
        inputs = {**defaults, "stream": "own trajectory", **inputs}
        return self.node.execute(self.model if model is None else model, self.clip, text, residual, **inputs).args

    def run(self, model, positive, negative=None, **options):
        return tiny.sample(model, positive, self.negative if negative is None else negative, **options)

    def run_both(self, model, positive, **options):
        foundations = []
        watched = self.pack.nodes.host.streams.add_streams(model, self.layers, False, foundations.append)
        customised = self.run(watched, positive, **options)
        (foundation,) = foundations
        return customised, model.model.process_latent_out(foundation.float())

    def assert_exact(self, model, patched, zero, positive, zero_positive, plain_positive, **options):
        """F, and C with nothing to add, are the plain run bit for bit; C with something is not, twice the same."""
        plain = self.run(model, plain_positive, **options)
        assert plain.isfinite().all()
        assert torch.equal(self.run(zero, zero_positive, **options), plain)
        customised, foundation = self.run_both(patched, positive, **options)
        assert torch.equal(foundation, plain)
        assert customised.isfinite().all() and not torch.equal(customised, plain)
        assert torch.equal(self.run(patched, positive, **options), customised)

    def assert_node_exact(self, model=None, text=PROMPT, change=lambda conditioning: conditioning, **options):
        """The same for the node on a model, with `change` applied to every positive conditioning."""
        model = self.model if model is None else model
        patched, positive = self.patch(self.residual(), model, text)
        zero, zero_positive = self.patch(self.residual(0.0), model, text)
        plain = self.encode(text)
        self.assert_exact(model, patched, zero, change(positive), change(zero_positive), change(plain), **options)
