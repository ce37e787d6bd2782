"""Pre-training: what it minimises, what moves, how it resumes, what it refuses."""

import math

import pytest
import torch

from profusion.diffusion import noise_predictor, timestep_of, training_sigmas
from profusion.loop import Group, TrainingError, generator_of
from profusion.losses import weighted_noise_error
from profusion.promptnet import PromptNetError
from profusion.promptnet.pseudo_word import PlaceholderError, encode_tokens, prompt_tokens
from profusion.promptnet.training import PictureSet, PromptNetOptions, PromptNetTraining, learning_rate_at, noise_weight


def pictures(count=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return PictureSet(torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 5, 20, generator=generator))


def training(small, network=None, given=None, predict=None, sigmas=None, **options):
    options = PromptNetOptions(**{"steps": 3, "batch_size": 2, "learning_rate": 1e-3, **options})
    prompts = [prompt_tokens(prompt) for prompt in options.prompts]

    def evaluate(x, sigma, context):
        return noise_predictor(lambda x, t: small.unet(x, t, context))(x, sigma)

    def encode(prompt, word):
        return encode_tokens(small.text, *prompts[prompt], word)

    network, predict = network or small.promptnet(), predict or evaluate
    return PromptNetTraining(network, predict, encode, given or pictures(), options, sigmas=sigmas)


def guess(x, sigma, context):
    """A model that can only guess the picture's level from the row of S*."""
    return (x - context[:, 1, :1, None, None]) / sigma.view(-1, 1, 1, 1)


def parameters(run):
    return {name: value.clone() for name, value in run.network.state_dict().items()}


def test_the_loss_is_a_weighted_mean_of_the_noise_error():
    predicted, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    square = ((predicted - noise) ** 2).flatten(1).sum(1) / 60
    expected = (2 * square[0] + 5 * square[1]) / 2
    torch.testing.assert_close(weighted_noise_error(predicted, noise, torch.tensor([2.0, 5.0])), expected)
    assert noise_weight(torch.tensor([0.0, 1.0, 9.0]), 20).tolist() == [1, 2, 20]
    assert noise_weight(torch.tensor([0.5, 9.0]), 1).tolist() == [1, 1]


def test_the_learning_rate_rises_and_falls():
    plain = PromptNetOptions(steps=10, learning_rate=0.5)
    assert [learning_rate_at(step, plain) for step in (0, 9)] == [0.5, 0.5]
    shaped = PromptNetOptions(steps=10, learning_rate=0.5, warmup=2, cosine=True)
    rates = [learning_rate_at(step, shaped) for step in range(10)]
    assert rates[:3] == [0.25, 0.5, 0.5] and rates[6] == pytest.approx(0.25) and 0 < rates[9] < 0.03


@pytest.mark.parametrize(("bias", "lower_half"), [(0.0, 0.5), (1.0, 0.25), (2.0, 0.125)])
def test_noisier_levels_are_drawn_more_often(small, bias, lower_half):
    sigma = training(small, batch_size=20_000, level_bias=bias).draw(generator_of(1)).sigma
    assert (sigma < training_sigmas()[500]).float().mean().item() == pytest.approx(lower_half, abs=0.02)
    assert sigma.min() >= training_sigmas()[0] and sigma.max() > training_sigmas()[990]


def test_training_learns_to_tell_pictures_apart_and_moves_nothing_else(small):
    """Pictures that are flat, at 2 or at -2, and a model that can only guess the level from the row of S*."""
    frozen = {name: value.clone() for name, value in small.text.state_dict().items()}
    flat = torch.ones(2, 4, 8, 8) * torch.tensor([2.0, -2.0]).view(2, 1, 1, 1)
    given = PictureSet(flat, torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)))
    model = {"predict": guess, "sigmas": torch.linspace(1, 5, 20)}
    run = training(small, given=given, steps=40, batch_size=4, learning_rate=1e-2, prompts=("S*",), **model)
    before = run.loss_on(given, 8)
    one_word = run.loss_on(given, 8, word=run.network.start)
    assert before == pytest.approx(one_word, rel=1e-5)  # S* starts as that word
    losses = list(run.steps())
    assert len(losses) == 40 == run.step and all(math.isfinite(loss) for loss in losses)
    assert run.loss_on(given, 8) < 0.5 * before
    assert run.loss_on(given, 8, word=run.network.start) == one_word
    assert all(torch.equal(value, small.text.state_dict()[name]) for name, value in frozen.items())
    assert all(item.grad is None for item in small.text.parameters())


def test_the_models_stay_as_they_are(small):
    frozen = {name: value.clone() for name, value in small.unet.state_dict().items()}
    list(training(small).steps())
    assert all(torch.equal(value, small.unet.state_dict()[name]) for name, value in frozen.items())
    assert all(item.grad is None for item in small.unet.parameters())


def test_a_step_is_adamw_on_the_papers_loss(small):
    """The naive way: every tensor by hand, plain backward, the optimizer's formula."""
    run = training(small, network=small.stirred(second_latent="noisy"), clip=1e9)
    batch, naive, given = run.batch(), small.stirred(second_latent="noisy").requires_grad_(True), pictures()
    clean, image_tokens = given.latents[batch.rows], given.image_tokens[batch.rows]
    alpha_bar = (1 / (1 + batch.sigma**2)).view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * batch.noise
    t = torch.tensor([int((training_sigmas() - sigma).abs().argmin()) for sigma in batch.sigma])
    ids, (row,) = prompt_tokens(run.options.prompts[batch.prompt])
    embeddings = small.text.text_model.embeddings
    words = embeddings.token_embedding(ids).expand(2, -1, -1).clone()
    words[:, row] = naive(clean, t, image_tokens, x_t)[:, 0]
    context = small.text.encode_embeddings(words + embeddings.position_embedding.weight)
    ((small.unet(x_t, t, context) - batch.noise) ** 2).mean().backward()
    started = parameters(run)
    next(run.steps())
    for name, parameter in naive.named_parameters():
        moved, solid = run.network.state_dict()[name] - started[name], parameter.grad.abs() > 1e-5
        expected = -1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(moved[solid], expected[solid], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_resumed_training_is_the_same_bit_for_bit(small, tmp_path, cosine):
    options = {"steps": 4, "warmup": 2, "cosine": cosine}
    whole = training(small, **options)
    losses = list(whole.steps())
    first = training(small, **options)
    steps = first.steps()
    next(steps), next(steps)
    first.save(tmp_path / "two.safetensors")
    again = training(small, network=small.stirred(), **options)
    again.resume(tmp_path / "two.safetensors")
    assert again.step == 2 and again.losses == losses[:2]
    assert list(again.steps()) == losses[2:] and again.losses == losses
    assert all(torch.equal(value, parameters(again)[name]) for name, value in parameters(whole).items())
    assert all(torch.equal(value, again.state()[name]) for name, value in whole.state().items())


def test_a_checkpoint_before_the_first_step_resumes(small, tmp_path):
    run = training(small)
    run.save(tmp_path / "none.safetensors")
    again = training(small)
    again.resume(tmp_path / "none.safetensors")
    assert list(again.steps()) == list(run.steps())


def test_only_what_is_named_learns(small):
    network = small.promptnet()
    run = PromptNetTraining(
        network,
        lambda x, sigma, context: small.unet(x, timestep_of(sigma), context),
        lambda prompt, word: encode_tokens(small.text, *prompt_tokens("S*"), word),
        pictures(),
        PromptNetOptions(steps=1, batch_size=2, prompts=("S*",)),
        groups=[Group("the bias", {"output.bias": network.output.bias}, "")],
    )
    before = parameters(run)
    list(run.steps())
    assert [name for name, value in parameters(run).items() if not torch.equal(value, before[name])] == ["output.bias"]


def test_every_prompt_is_drawn_and_is_the_one_that_s_is_put_into(small):
    drawn, encoded = [], []
    run = training(small, steps=12, batch_size=1, prompts=("S*", "a S*", "the S*"))
    for seed in range(12):
        batch = run.draw(generator_of(seed))
        drawn.append(batch.prompt)
        run.loss(batch)
    assert set(drawn) == {0, 1, 2}

    def encode(prompt, word):
        encoded.append(prompt)
        return encode_tokens(small.text, *prompt_tokens("S*"), word)

    options = PromptNetOptions(steps=12, batch_size=1, prompts=("S*", "a S*", "the S*"))
    list(PromptNetTraining(small.promptnet(), guess, encode, pictures(), options).steps())
    assert set(encoded) == {0, 1, 2}


def test_large_gradients_are_clipped(small):
    run = training(small, clip=1e-6)
    next(run.steps())
    total = math.hypot(*(p.grad.norm().item() for p in run.network.parameters() if p.grad is not None))
    assert total == pytest.approx(1e-6, rel=1e-3)


def test_a_checkpoint_of_another_beginning_is_refused_where_that_matters(small, tmp_path):
    path, other = tmp_path / "one.safetensors", pictures()
    run = training(small)
    run.save(path)
    for again in (
        training(small, network=small.stirred()),
        training(small, given=PictureSet(other.latents, other.image_tokens + 1)),
    ):
        assert again.identity != run.identity
        with pytest.raises(TrainingError, match="began with another PromptNet or image encoder"):
            again.resume(path, same_start=True)
    same = training(small, steps=9)
    same.resume(path, same_start=True)
    assert same.identity == run.identity != training(small, steps=9, cosine=True).identity


def test_a_first_loss_tells_whether_a_training_began_alike(small):
    run = training(small)
    assert run.begins_like({}) and not run.losses
    list(run.steps())
    assert training(small).begins_like(run.state())
    assert not training(small, predict=guess).begins_like(run.state())
    fresh = training(small)
    before = parameters(fresh)
    fresh.begins_like(run.state())
    assert fresh.step == 0 and all(torch.equal(value, before[name]) for name, value in parameters(fresh).items())
    assert list(fresh.steps()) == run.losses, "asking leaves nothing behind"


def test_another_trainings_checkpoint_is_refused(small, tmp_path):
    path = tmp_path / "one.safetensors"
    training(small).save(path)
    for changed, message in (
        (training(small, seed=1), "seed=0, not 1"),
        (training(small, batch_size=3), "batch_size=2, not 3"),
        (training(small, given=pictures(seed=9)), "other pictures"),
        (training(small, network=small.promptnet(projection=4)), "another size"),
    ):
        before = parameters(changed)
        with pytest.raises(TrainingError, match=message):
            changed.resume(path)
        assert all(torch.equal(value, before[name]) for name, value in parameters(changed).items())
    training(small, steps=9).resume(path)
    cosine = training(small, cosine=True)
    cosine.save(path)
    with pytest.raises(TrainingError, match="steps=3, not 9"):
        training(small, cosine=True, steps=9).resume(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PromptNetError, match="cut short"):
        training(small).resume(path)


def test_a_loss_that_is_not_finite_stops_it(small):
    run = training(small, predict=lambda x, sigma, context: x * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        next(run.steps())
    assert run.step == 0 and run.losses == []


def test_a_model_without_gradients_is_named(small):
    run = training(small, predict=lambda x, sigma, context: guess(x, sigma, context.detach()))
    with pytest.raises(TrainingError, match="no gradient reaches PromptNet"):
        next(run.steps())


def test_it_trains_inside_a_host_that_infers(small):
    with torch.inference_mode():
        run = training(small, given=pictures())
        assert math.isfinite(next(run.steps()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps=0"),
        ({"learning_rate": 0}, ValueError, "learning_rate=0"),
        ({"weight_cap": 0.5}, ValueError, "weight_cap=0.5"),
        ({"level_bias": -1.0}, ValueError, "level_bias=-1.0"),
        ({"clip": float("nan")}, ValueError, "clip=nan"),
        ({"prompts": ()}, ValueError, "at least one"),
        ({"prompts": ("a photo",)}, PlaceholderError, "there is no"),
    ],
)
def test_options_are_validated(options, error, message):
    with pytest.raises(error, match=message):
        PromptNetOptions(**options)


def test_pictures_are_validated():
    good = pictures()
    with pytest.raises(ValueError, match="same pictures"):
        PictureSet(good.latents[:2], good.image_tokens)
    with pytest.raises(TrainingError, match="no pictures"):
        PictureSet(good.latents[:0], good.image_tokens[:0])
    with pytest.raises(TrainingError, match="not finite"):
        PictureSet(good.latents * float("inf"), good.image_tokens)


def test_the_memory_order_of_the_pictures_changes_no_bit(small):
    given = pictures()
    turned = PictureSet(given.latents.contiguous(memory_format=torch.channels_last), given.image_tokens)
    one, other = training(small, given=given, steps=2), training(small, given=turned, steps=2)
    assert list(one.steps()) == list(other.steps())
    assert all(torch.equal(value, parameters(other)[name]) for name, value in parameters(one).items())
    assert given.fingerprint() == turned.fingerprint()
