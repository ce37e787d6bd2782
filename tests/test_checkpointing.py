"""A network whose parts are computed twice has the gradients of one whose parts are kept,
and is as before afterwards."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from benchmarks.training_memory import MODELS, numbers_a_cell
from profusion.checkpointing import blocks_checkpointed, checkpointed
from profusion.infusion import cross_attention_layers, name_of_unet
from profusion.memory import optimizer_bytes, step_bytes, text_bytes
from profusion.models.configs import UNetConfig
from profusion.models.unet import BasicTransformerBlock, ResBlock, UNet
from profusion.queries import TakenOnce, WaitingQueries
from profusion.residual.training import Reference, ResidualTraining, TrainingOptions
from profusion.text_attention import TEXT, TextCall

SLOW = pytest.mark.slow
TINY = UNetConfig(32, (1, 2), 1, (2, 1), 2, 16, num_heads=2)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(TINY).eval().requires_grad_(False)


def parts_of(unet):
    return [part for part in unet.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]


def gradient(unet, queries, parts=(), preserve=1.0):
    """The residual's gradient in the first step of a training."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 5, TINY.context_dim, generator=generator)
    mask = torch.ones(8, 8)
    mask[:3] = 0
    references = [Reference(torch.randn(4, 8, 8, generator=generator), mask) for _ in range(2)]

    def predict(x, sigma, prompt, patches):
        return unet(x, sigma, context, transformer_options={"patches": patches, "cond_or_uncond": [0]})

    layers = cross_attention_layers(dict(unet.named_parameters()))
    options = TrainingOptions(batch_size=2, preserve=preserve)
    training = ResidualTraining(predict, references, [(1, 2)], layers, "cat", options, queries=queries)
    with torch.no_grad():
        training.delta.copy_(torch.randn(training.delta.shape, generator=generator))
    with checkpointed(parts):
        loss = training.loss(training.batch())
        loss.backward()
    return loss.detach(), training.delta.grad


@pytest.mark.parametrize("preserve", [0.0, 1.0])
def test_the_gradient_is_the_same(unet, preserve):
    loss, expected = gradient(unet, TakenOnce, preserve=preserve)
    again, found = gradient(unet, WaitingQueries, parts_of(unet), preserve)
    assert torch.equal(again, loss) and expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_f_is_computed_once_and_c_twice(unet):
    calls = dict.fromkeys(parts_of(unet), 0)
    for part, forward in {part: part.forward for part in calls}.items():

        def counting(*inputs, part=part, forward=forward):
            calls[part] += 1
            return forward(*inputs)

        part.forward = counting
    gradient(unet, WaitingQueries, calls)
    first = unet.input_blocks[1][0]  # above the first noun: nothing learned reaches it
    assert calls.pop(first) == 2 and set(calls.values()) == {3}


def test_what_is_computed_again_is_where_it_was(unet):
    """The UNet tells its blocks their place in one dict, which has gone on by the way back."""
    seen = []

    def patch(n, context, value, options):
        seen.append((*options["block"], options["block_index"]))
        return n, context, value

    context = torch.randn(1, 5, TINY.context_dim, requires_grad=True)
    with checkpointed(parts_of(unet)):
        out = unet(
            torch.randn(1, 4, 8, 8),
            torch.tensor([3]),
            context,
            transformer_options={"patches": {"attn2_patch": [patch]}, "cond_or_uncond": [0]},
        )
        forward = list(seen)
        out.sum().backward()
    assert sorted(seen[len(forward) :]) == sorted(forward) and len(set(forward)) == len(forward)


class Block(nn.Module):
    """Of a transformer: writes over what it is given, and does what the dict of options tells it."""

    def __init__(self, learned):
        super().__init__()
        self.learned = learned

    def forward(self, x, options):
        options[TEXT].layers += 1
        x.mul_(1 + options["block"])
        return x if self.learned is None else x * self.learned


def test_a_transformers_blocks_are_computed_again_as_they_were():
    """Their model goes on in one dict too; and what nothing is learned of needs no gradient."""
    found = []
    for twice in (False, True):
        learned, options = torch.tensor([2.0, 3.0], requires_grad=True), {TEXT: TextCall(1, (1, 1))}
        blocks = [Block(None), Block(learned), Block(learned)]
        with blocks_checkpointed(blocks) if twice else allow_mutation_on_saved_tensors():
            x = torch.tensor([1.0, 4.0])
            for options["block"], block in enumerate(blocks):
                x = block(x, options)
            x.sum().backward()
        assert options[TEXT].layers == 3
        found.append(learned.grad)
    assert torch.equal(*found)


def test_taking_queries_once_is_told_apart(unet):
    with pytest.raises(RuntimeError, match="left no queries"):
        gradient(unet, TakenOnce, parts_of(unet))


def test_a_module_is_as_before_even_after_an_error(unet):
    parts = parts_of(unet)
    parts[0].forward = own = lambda *inputs: inputs[0]
    with pytest.raises(KeyError), checkpointed(parts):
        raise KeyError
    assert parts[0].forward is own and not any("forward" in vars(part) for part in parts[1:])


def test_without_gradients_nothing_is_computed_twice():
    calls, part = [], nn.Linear(2, 2)
    part.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad(), checkpointed([part]):
        part(torch.ones(1, 2))
    assert calls == [1]


def test_it_keeps_less(unet):
    kept = []
    for parts in ((), parts_of(unet)):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.nbytes), tensor)[1], lambda tensor: tensor
        )
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        with hooks, checkpointed(parts):
            unet(x, torch.tensor([3]), torch.randn(1, 5, TINY.context_dim))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("model", ["sd15", pytest.param("sd2", marks=SLOW), pytest.param("sdxl", marks=SLOW)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("finetuning", [False, True])
def test_the_reckoning_is_what_was_measured(model, checkpointing, finetuning):
    """Not below it, and within a tenth."""
    config = MODELS[model]
    architecture = name_of_unet(config.cross_attentions, config.context_dim)
    reckoned = step_bytes(architecture, 1, 1, 1, checkpointing, finetuning)
    measured = numbers_a_cell(model, checkpointing, finetuning)
    assert measured <= reckoned <= 1.1 * measured


@pytest.mark.parametrize("model", ["sd15", pytest.param("sd2", marks=SLOW), pytest.param("sdxl", marks=SLOW)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_details_are_reckoned_with(model, checkpointing):
    architecture = name_of_unet(MODELS[model].cross_attentions, MODELS[model].context_dim)
    reckoned = step_bytes(architecture, 1, 1, 1, checkpointing, capacity=4)
    measured = numbers_a_cell(model, checkpointing, capacity=4)
    assert measured <= reckoned <= 1.1 * measured


def test_a_text_encoder_and_an_optimizer_are_reckoned_with():
    assert text_bytes(100, 400, 2) == 100  # float32: nothing is cast
    assert text_bytes(100, 200, 2) == 500
    assert optimizer_bytes(16.0) == 4.0


def test_an_unknown_architecture_is_not_guessed():
    assert step_bytes("UNet with 3 cross-attentions of 5", 1, 4096, 2, False) is None
