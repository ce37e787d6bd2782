"""The benchmark's runner, tables and toy mixtures; what the peers themselves do is in test_peers.py."""

import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from benchmarks import charts, infusion_capacity, infusion_pairs, judging, mixtures, report, results, run
from benchmarks.jobs import Job, Runner
from benchmarks.peers import OURS, PEERS
from profusion.diffusion import eps_denoiser, sample_euler, sampling_sigmas, training_sigmas
from profusion.pictures import INK
from profusion.toybox import world
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox


def bench(folder, **more):
    return run.Bench(run.SETTINGS["tiny"], run.CURVES["tiny"], folder, 0, say=lambda line: None, **more)


def runner(**setting):
    return Runner(setting, 0, say=lambda line: None)


def jobs(folder, made, stop_at=None):
    def work(number):
        if number == stop_at:
            raise KeyboardInterrupt
        made.append(number)
        return {"number": number}

    return [Job(folder / f"{number}.json", partial(work, number), str(number)) for number in range(4)]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    made = []
    with pytest.raises(KeyboardInterrupt):
        runner().run(jobs(tmp_path, made, stop_at=2))
    assert made == [0, 1]
    assert runner().run(jobs(tmp_path, made)) == [{"number": number} for number in range(4)]
    assert made == [0, 1, 2, 3]


def test_results_of_another_setting_are_made_anew(tmp_path):
    made = []
    runner().run(jobs(tmp_path, made))
    runner(seeds=2).run(jobs(tmp_path, made))
    assert made == [0, 1, 2, 3] * 2


def test_half_a_file_is_no_result(tmp_path):
    made = []
    (tmp_path / "0.part").write_text('{"setting"')
    runner().run(jobs(tmp_path, made))
    assert made == [0, 1, 2, 3]


def test_the_best_trial_is_found_over_rates_and_guidances():
    trials = [{"rate": 0.1, "scores": {"2.0": 0.3, "4.0": 0.5}}, {"rate": 0.2, "scores": {"2.0": 0.6, "4.0": 0.5}}]
    assert run.best(trials) == (0.2, 2.0)


def test_training_stops_at_its_marks():
    assert list(run.stops(iter([0.5] * 10), {2, 7})) == [2, 7]


def test_concepts_are_tuned_on_or_judged_never_both():
    assert len(run.TABLE) == 8 and not set(run.TABLE) & set(run.TUNING)
    quick = run.SETTINGS["quick"]
    assert quick.concepts >= 8 and quick.prompts >= 8 and quick.seeds >= 4
    assert len({len(kind.rates) for kind in PEERS}) == 1  # as many trials for each


def test_prompts_name_places_and_second_objects_of_the_world():
    nouns = {noun for noun, _ in world.CONCEPTS.values()}
    for prompt in judging.PEER_PROMPTS:
        assert world.BACKGROUND_PHRASES[prompt.place] in prompt.text
        assert prompt.second is None or (prompt.second in world.FIXED_NOUNS and f" {prompt.second} " in prompt.text)
        assert prompt.second not in nouns


def test_a_part_runs_once_and_its_files_are_copied(tmp_path, monkeypatch):
    work, out, said = tmp_path / "work", tmp_path / "out", []
    out.mkdir()
    part = run.Part("bytes", ("benchmarks.residual_bytes",))
    part.run("quick", work, out, said.append)
    assert {path.name for path in out.iterdir()} == {"bytes.json", "bytes.md"}
    assert "| Toybox | 10 of width 128 | 1.9 KB |" in (out / "bytes.md").read_text()
    ran = len(said)
    (work / "bytes.png").write_text("picture")
    part.run("quick", work, out, said.append)
    assert ran == len(said) == 2 and (out / "bytes.png").is_file()
    monkeypatch.setattr(run, "find_host", lambda: None)
    replace(part, name="other", host=True).run("quick", work, out, said.append)
    assert said[-1].startswith("SKIPPED other: no ComfyUI") and not list(out.glob("other*"))


def test_what_takes_times_runs_after_the_rest_and_alone():
    running, order, most = [], [], []

    def work(part):
        running.append(part)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(part)
        order.append((part.name, part.alone, len(running)))

    parts = [run.Part("timed", (), alone=True), *(run.Part(str(number), ()) for number in range(4))]
    run.run_parts(parts, 2, work)
    assert order[-1] == ("timed", True, 0) and max(most) == 2 and most[-1] == 1 and len(order) == 5


def test_documents_say_what_the_results_say(tmp_path):
    (tmp_path / "one.md").write_text("| 2 |\n")
    text = "before\n<!-- bench: one -->\n| 1 |\n| old |\n<!-- /bench -->\nafter <!-- bench: one -->\n<!-- /bench -->"
    now = results.included(text, tmp_path)
    assert (
        now == "before\n<!-- bench: one -->\n| 2 |\n<!-- /bench -->\nafter <!-- bench: one -->\n| 2 |\n<!-- /bench -->"
    )
    assert results.included(now, tmp_path) == now
    with pytest.raises(FileNotFoundError):
        results.included(text.replace("one", "two"), tmp_path)


@pytest.mark.parametrize("document", results.DOCUMENTS, ids=lambda path: path.name)
def test_no_document_was_left_behind(document):
    text = document.read_text()
    assert "<!-- bench: " in text
    assert results.included(text) == text, "run `python -m benchmarks.results`"


@pytest.mark.parametrize("prompt", judging.PEER_PROMPTS[:2], ids=["one object", "two objects"])
def test_what_moved_is_judged_where_the_concept_is_not(prompt):
    """Repainting the concept's half moves nothing where the concept fills it; repainting the other half does."""
    yardstick, concept = judging.Yardstick(Toybox.load(), Judge.load()), drawn_concept(run.TABLE[0])
    plain = concept.pictures
    same, *_ = yardstick.figures(concept, prompt, plain, plain)
    assert same["moved"] == 0 < same["other_seeds"] and {*judging.METRICS, "other_seeds"} == set(same)
    object_only = torch.where(concept.masks[..., None] > 0.5, 1 - plain, plain)
    elsewhere = plain.clone()
    elsewhere[:, :, 80:] = 1 - elsewhere[:, :, 80:]
    own, other = (yardstick.figures(concept, prompt, drawn, plain)[0]["moved"] for drawn in (object_only, elsewhere))
    assert other > 0.05
    if prompt.second is None:
        assert own < 0.1 * other


def final(peer, concept, score):
    pictures = [{key: value for key in (*judging.METRICS, "other_seeds")} for value in (score - 0.1, score + 0.1)]
    return {"peer": peer, "concept": concept, "bytes": 10, "numbers": 5, "pictures": pictures}


def test_intervals_are_over_concepts_not_over_pictures():
    finals = [final(OURS.name, "a", 0.2), final(OURS.name, "b", 0.4)]
    score = next(one for one in report.table(finals).scores if one.metric == "CLIP-T")
    assert score.mean == pytest.approx(0.3) and score.count == 2 and score.backbone


def test_differences_are_taken_concept_by_concept():
    other = PEERS[3].name
    finals = [final(OURS.name, "a", 0.2), final(OURS.name, "b", 0.9), final(other, "a", 0.3), final(other, "b", 1.0)]
    _, moved, score = report.difference(finals).scores
    assert moved.mean == pytest.approx(0) and moved.better == "lower"  # of each, as far as another seed
    assert score.subject == other and score.mean == pytest.approx(0.1) and score.high == pytest.approx(0.1)


def test_zeros_stand_at_the_bottom_of_a_logarithmic_chart():
    image = charts.lines(
        {"moved": [(50, 0.1), (100, 1.0)], "not moved": [(50, 0.0), (100, 0.0)]}, "title", "steps", log_up=True
    )
    color, height = charts.COLORS[1], image.height
    rows = {y for y in range(height) for x in range(80, 400) if image.getpixel((x, y)) == color}
    assert rows and min(rows) > height - 46
    assert any(image.getpixel((x, 18)) == INK for x in range(12, 60))


def test_a_logarithmic_chart_without_zeros_has_none_on_its_axis():
    def label(series):
        image = charts.lines({"line": series}, "title", "steps", log_up=True)
        return image.crop((0, image.height - 50, 62, image.height - 30)).tobytes()

    assert label([(50, 0.3), (100, 0.0)]) != label([(50, 0.3), (100, 0.3)])
    assert label([(50, 0.3), (100, 0.0)]) == label([(50, 0.6), (100, 0.0)])  # a 0, whatever else there is


def test_the_whole_of_it_on_one_peer(tmp_path, monkeypatch):
    """A trial, curves, table, charts; and Infusion leaves prompts without the concept exactly alone."""
    monkeypatch.setattr(run, "TUNING", run.TUNING[:1])
    monkeypatch.setattr(run, "GUIDANCES", run.GUIDANCES[:1])
    one = bench(tmp_path / "work", kinds=(OURS,))
    report.write_peers(one.finals(), one.trials, one.absent, asdict(one.setting), one.work, tmp_path)
    report.write_curves(one.curves(), one.absent, asdict(one.curve_setting), tmp_path)
    (curve,) = json.loads((tmp_path / "curves.json").read_text())["figures"]["curves"].values()
    assert [point["fisher"] for point in curve] == [0.0, 0.0]
    assert all(point["wasserstein"] > 0 for point in curve)
    assert all(OURS.name in (tmp_path / name).read_text() for name in ("peers.md", "peers.short.md", "curves.md"))
    assert {"peers.png", "samples.jpg", "fisher.png", "wasserstein.png"} <= {path.name for path in tmp_path.iterdir()}


def test_overfitting_curves_are_means_over_concepts():
    def curve(peer, *fishers):
        return {
            "peer": peer,
            "curve": [{"steps": 50 * i, "fisher": f, "wasserstein": 2 * f} for i, f in enumerate(fishers, start=1)],
        }

    found = report.overfitting_curves([curve(OURS.name, 1.0, 2.0), curve(OURS.name, 3.0, 6.0)])
    assert found == {
        OURS.name: [{"steps": 50, "fisher": 2.0, "wasserstein": 4.0}, {"steps": 100, "fisher": 4.0, "wasserstein": 8.0}]
    }


def test_the_exact_noise_is_the_score_of_the_noised_mixture(generator):
    x, sigma = torch.randn(6, 2, generator=generator, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    peaks = mixtures.CORNERS.double()
    x.requires_grad_(True)
    variance = mixtures.SPREAD**2 + 0.4**2
    density = (-(x[:, None] - peaks).square().sum(dim=2) / (2 * variance)).logsumexp(dim=1)
    (score,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(mixtures.exact_noise(x.detach(), sigma, peaks), -sigma[:, None] * score)


def test_sampling_with_the_exact_noise_draws_every_peak(generator):
    def predict(x, t):
        sigma = training_sigmas()[t]
        points = x.flatten(1) * (sigma[:, None] ** 2 + 1).sqrt()
        return mixtures.exact_noise(points, sigma, mixtures.GRID)[..., None, None]

    noise = torch.randn(2000, 2, 1, 1, generator=generator)
    drawn = sample_euler(eps_denoiser(predict), noise, sampling_sigmas(40)).flatten(1)
    assert mixtures.peaks_drawn(drawn, mixtures.GRID) == 25
    seen = mixtures.mixture(mixtures.GRID[mixtures.SEEN], 500, generator)
    assert mixtures.peaks_drawn(seen, mixtures.GRID) == 5


def test_one_vector_leaves_the_other_words_alone_and_every_weight_does_not():
    figure = mixtures.figures()[0]
    base = mixtures.pretrained(figure, 3)
    one, every = (mixtures.customised(base, figure, 3, every_weight) for every_weight in (False, True))
    assert mixtures.measure(figure, base, one, 8)["fisher"] == 0
    assert mixtures.measure(figure, base, every, 8)["fisher"] > 0
    moved = one.words.weight[0] != base.words.weight[0]
    assert moved.any() and torch.equal(one.words.weight[1:], base.words.weight[1:])


def test_the_command_line_knows_its_settings(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--setting", "none"])
    with pytest.raises(SystemExit):
        run.main()
    assert "quick" in capsys.readouterr().err


def test_shares_of_nouns_sum_to_one_and_sharpen():
    """The map's own size says nothing: a noun that is seen faintly all over the picture still has its place."""
    maps = torch.tensor([[[[0.8, 0.4, 0.0]]], [[[0.05, 0.1, 0.1]]]])
    shares = infusion_pairs.normalised(maps)
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(1, 1, 3))
    torch.testing.assert_close(shares[0, 0, 0], torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        infusion_pairs.normalised(maps, 64.0)[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-5
    )
    nowhere = infusion_pairs.normalised(torch.zeros(2, 1, 1, 3), 64.0)
    assert torch.equal(nowhere, torch.full((2, 1, 1, 3), 0.5))


def test_a_ratio_of_what_goes_together_has_no_interval():
    of = torch.tensor([0.2, 0.5, 0.9])
    assert infusion_pairs.ratio(0.9 * of, of) == pytest.approx([0.9, 0.0], abs=1e-6)
    share, half = infusion_pairs.ratio(of + torch.tensor([0.1, -0.1, 0.0]), of)
    assert share == pytest.approx(1.0) and half > 0.1


def test_capacities_are_compared_with_their_intervals(monkeypatch):
    one = infusion_capacity.Gathered()
    one.add({"way": torch.tensor([0.2, 0.4])}, {"bytes": 1000.0})
    one.add({"way": torch.tensor([0.6, 0.8])}, {"bytes": 3000.0})
    way, half = one.figures()["way"]
    assert way == pytest.approx(0.5) and half == pytest.approx(1.96 * torch.tensor([0.2, 0.4, 0.6, 0.8]).std() / 2)
    shown = infusion_capacity.report({"Infusion, capacity 4": one}, 2, 4, 100)
    assert "| Infusion, capacity 4 | 0.500 ± 0.253 |  |  |  | 2,000 |  |" in shown
    monkeypatch.setattr(infusion_capacity.Lora, "why_unavailable", lambda: "no host")
    found = list(infusion_capacity.ways((1, 4), (0.01,), 100))
    assert [(name, recipe.capacity) for name, _, recipe in found] == [
        ("Infusion, capacity 1", 1),
        ("Infusion, capacity 4", 4),
    ]
    monkeypatch.setattr(infusion_capacity.Lora, "why_unavailable", lambda: "")
    name, kind, recipe = list(infusion_capacity.ways((), (0.01,), 100))[0]
    assert (name, kind, recipe.learning_rate) == ("LoRA at 0.01", infusion_capacity.Lora, 0.01)
