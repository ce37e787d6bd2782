"""`python -m profusion promptnet train`: one command from pictures to a PromptNet, on one process or many, resumable
at any moment."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..interrupts import gathered
from ..keeping import digest
from ..learning import Report, Say
from ..loop import TrainingError
from ..pipeline import Pipeline
from ..problems import why
from ..promptnet.file import SUFFIX, load_promptnet, save_weights
from ..promptnet.network import PromptNet, PromptNetConfig, PromptNetError
from . import released
from .checking import Checked, Validation, written
from .encoding import Encoders
from .engine import Engine, GivenUp, PretrainingOptions, Step, rounds
from .feeds import Feed
from .objective import Objective
from .promptnet import Layout, new_promptnet
from .ranks import Ranks, answering
from .saving import Log, Saver, held, newest
from .stream import ended_worker

if TYPE_CHECKING:
    from ..models.clip import VisionModel

SECONDS = 600.0  # of work between two checkpoints, at most, whatever --save-every says
ADVICE = "Give what it was trained with, or begin anew in another file"


@dataclass(frozen=True)
class Command:
    """What was asked for, beside the data and the model.

    noun: the word that S* starts as. start: a PromptNet to begin from. tokens: pseudo-words in S*. minutes: after which
    it stops, to go on later. keep: checkpoints. report_every, save_every, validate_every, sheet_every: steps.
    """

    out: Path
    options: PretrainingOptions
    noun: str | None = None
    start: Path | None = None
    with_noise: bool = False
    tokens: int = 1
    layout: Layout = "profusion"
    bfloat16: bool = False
    checkpointing: bool = False
    shard: bool = False
    minutes: float | None = None
    report_every: int = 50
    save_every: int = 1000
    validate_every: int = 1000
    sheet_every: int = 2000
    keep: int = 3
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.suffix != SUFFIX:
            raise ValueError(f"--out {self.out}: give it a name that ends in {SUFFIX}")
        whole = ("tokens", "report_every", "save_every", "validate_every", "sheet_every", "keep")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes}: give a time above 0, or leave it out to train to the end")

    @property
    def folder(self) -> Path:
        """Where checkpoints, the log and sheets are put."""
        return self.out.with_suffix(".training")


@dataclass(frozen=True)
class Material:
    """What a training stands on: the base and its image tower on their device, what each step is fed, pictures kept
    apart (V, H, W, 3), uint8, the PromptNet's sizes, and what says whether two runs have the same data."""

    base: Pipeline
    vision: VisionModel
    feed: Feed
    kept: Tensor
    config: PromptNetConfig
    data: str


def run(command: Command, material: Material, ranks: Ranks, say: Say = print) -> Report:
    """Train, with the other processes where there are any, and return what to report.

    Checkpoints are written while it goes on, at Ctrl-C and SIGTERM, and when the minutes are over; where there is one
    already, it goes on from that. At the end the PromptNet, or its average, is written to `out` in float16. Raises
    KeyboardInterrupt after an interrupted step, when it is saved, TrainingError, and PromptNetError.
    """
    rounds(command.options, ranks.world)
    if command.shard and ranks.world == 1 and ranks.first:
        say("--shard: there is one process, and nothing to cut between; start the command with torchrun")
    with answering(), held(command.folder, ranks):
        return _run(command, material, ranks, say if ranks.first else silent)


def _run(command: Command, material: Material, ranks: Ranks, say: Say) -> Report:
    network = _begun(command, material, ranks, say)
    bfloat16 = command.bfloat16
    objective = Objective(network, material.base, command.options.prompts, command.options.weight_cap, bfloat16)
    identity = _identity(command, material, network)
    engine = Engine(objective, command.options, ranks, command.shard, command.checkpointing)
    _begin(command, engine, identity, say)
    validation = Validation(engine, Encoders(material.base.vae, material.vision), material.kept)
    notes = {"identity": identity, **command.notes}
    saver = Saver(command.folder, network.config, notes, command.keep) if ranks.first else None
    course = _Course(command, material, engine, validation, saver, say)
    try:
        course.train()
    except RuntimeError as error:  # while there are workers, torch may say anywhere that one of them ended
        ended = ended_worker(error)
        if ended is None:
            raise
        raise ended from error
    if engine.step < command.options.steps:
        say("the minutes are over; the same command goes on from here")
        return {"steps": engine.step, "seconds": round(course.seconds, 1), "folder": str(command.folder)}
    return _finished(command, material, engine, course)


def silent(_: str) -> None:
    """Another process reports."""


def _begun(command: Command, material: Material, ranks: Ranks, say: Say) -> PromptNet:
    config = material.config
    if command.start is None:
        network = new_promptnet(material.base, config, command.noun, command.options.seed)
    else:
        network = load_promptnet(command.start)
        if network.config != config:
            raise PromptNetError(
                f"--start {command.start}: its sizes are {network.config}, and these are to be trained: {config}"
            )
    count = sum(value.numel() for value in network.parameters())
    processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
    say(f"{count:,} numbers to train, for {config.architecture}, in {processes}")
    return network.to(ranks.device)


def _identity(command: Command, material: Material, network: PromptNet) -> str:
    """What must be the same for one run to go on as another: not how many processes, nor how they compute."""
    options = asdict(command.options)
    for name in ("micro", *(() if command.options.cosine else ("steps",))):
        del options[name]
    return digest(options, material.data, asdict(network.config), dict(network.state_dict()))


def _begin(command: Command, engine: Engine, identity: str, say: Say) -> None:
    """Go on from the last checkpoint, if any, where all processes do so."""
    problem = None
    try:
        _go_on(command, engine, identity, say)
    except TrainingError as error:
        problem = error
    engine.ranks.agree(problem)
    steps = engine.ranks.gathered(engine.step)
    if len(set(steps)) > 1:
        raise TrainingError(
            f"the processes see different checkpoints in {command.folder}, of the steps {steps}: give an --out in a "
            "folder that all machines share"
        )


def _go_on(command: Command, engine: Engine, identity: str, say: Say) -> None:
    found = newest(command.folder, say)
    if found is None:
        return
    path, network, state, notes = found
    if network.config != engine.objective.network.config:
        raise TrainingError(f"{path} is of a PromptNet of another size. {ADVICE}")
    if notes.get("identity") != identity:
        raise TrainingError(
            f"{path} was trained otherwise: on other data, from another start, or with other options. {ADVICE}"
        )
    if int(state["step"]) > command.options.steps:
        raise TrainingError(f"{path} has more than {command.options.steps} steps already. {ADVICE}")
    engine.restore(network.state_dict(), state)
    say(f"going on from step {engine.step} of {path}")


class _Course:
    """The steps of a run, and what is done beside them."""

    def __init__(
        self,
        command: Command,
        material: Material,
        engine: Engine,
        validation: Validation,
        saver: Saver | None,
        say: Say,
    ):
        self.command, self.material, self.engine = command, material, engine
        self.validation, self.saver, self.say = validation, saver, say
        self.log = Log(command.folder, engine.step) if engine.ranks.first else None
        self.seconds, self.checked, self.last_loss = 0.0, None, math.nan
        self._saved_at, self._saved_step = time.monotonic(), engine.step

    def train(self) -> None:
        """To the end, or as long as there is time."""
        command, engine = self.command, self.engine
        started, first, losses = time.monotonic(), engine.step, []
        _reset_peak(engine.ranks)
        with gathered() as interrupts:
            for step in self._steps():
                if not step.skipped:
                    losses.append(step.loss)
                self.seconds = time.monotonic() - started
                last = engine.step == command.options.steps
                late = command.minutes is not None and self.seconds > 60 * command.minutes
                old = time.monotonic() - self._saved_at > SECONDS
                stop, late, old = (flag > 0 for flag in engine.ranks.sums([bool(interrupts), late, old]))
                if step.skipped:
                    self.say(f"step {step.number} is left out: {step.skipped}")
                if engine.step % command.report_every == 0 or last:
                    self._report(step, losses, self.seconds / (engine.step - first))
                    losses = []
                value = self._look(last)
                if engine.step % command.save_every == 0 or last or late or stop or old:
                    self._save(value)
                if (stop or late) and not last:
                    self._settle()
                    if stop:
                        raise KeyboardInterrupt
                    return
        self._settle()

    def _steps(self) -> Iterator[Step]:
        engine = self.engine
        feed = self.material.feed.batches(engine.step)
        while engine.step < self.command.options.steps:
            problem, features = None, None
            try:
                features = next(feed)
            except Exception as error:  # whatever it is: the others must not wait for this process
                problem = error
            # Asked at each step: a process that waits in a step for one that has given up waits for long.
            if engine.ranks.sums([problem is not None])[0]:
                self._keep()
                engine.ranks.agree(problem)
            try:
                step = engine.take(*features)
            except GivenUp:  # in all processes
                self._keep()
                raise
            self.last_loss = step.loss
            yield step

    def _report(self, step: Step, losses: list[float], pace: float) -> None:
        engine, steps = self.engine, self.command.options.steps
        loss = sum(losses) / len(losses) if losses else None
        rate = self.command.options.batch_size / pace
        peak = _peak(engine.ranks)
        skipped = self.material.feed.skipped()
        said = "-" if loss is None else f"{loss:.4f}"
        self.say(
            f"step {step.number}/{steps}  loss {said}  {pace:.2f} s a step, {rate:.1f} pictures a second, "
            f"{_time(pace * (steps - step.number))} left" + (f", {peak / (1 << 30):.1f} GiB at most" if peak else "")
        )
        if skipped:
            self.say(skipped)
        self._log(
            loss=loss,
            last_loss=_finite(step.loss),
            gradient_norm=_finite(step.norm),
            learning_rate=step.learning_rate,
            epoch=self.material.feed.epoch_of(step.number),
            pictures_a_second=rate,
            **({"peak_bytes": peak} if peak else {}),
        )

    def _log(self, **values: object) -> None:
        if self.log is not None:
            self._put_down(lambda: self.log.add(self.engine.step, values))

    def _put_down(self, write: Callable[[], object]) -> None:
        """Write what people look at. Where that fails the training goes on: its checkpoints count."""
        try:
            write()
        except OSError as problem:
            self.say(f"a sheet or a line of the log could not be written: {why(problem)}")

    def _look(self, last: bool) -> float | None:
        """Validate and draw where it is time; the validation's loss."""
        command, step = self.command, self.engine.step
        checks = step % command.validate_every == 0 or last
        draws = step % command.sheet_every == 0 or last
        if not (checks or draws):
            return None
        found = self.validation.loss()
        if draws:
            sheet, alike = self.validation.drawn()
            found = Checked(found.loss, found.word_loss, alike)
            if self.engine.ranks.first:
                self._put_down(lambda: self.say(f"look at {written(sheet, command.folder, step)}"))
        self.say(str(found))
        self.checked = found
        self._log(**{name: value for name, value in asdict(found).items() if value is not None})
        return found.loss

    def _save(self, value: float | None) -> None:
        """Begin to write a checkpoint; what was wrong with the one before ends all processes."""
        engine = self.engine
        self._written()  # there is to be one copy of all at a time
        weights, state = engine.weights(), engine.state()
        if self.saver is not None:
            self.saver.save(engine.step, weights, state, value)
        self._saved_at, self._saved_step = time.monotonic(), engine.step

    def _keep(self) -> None:
        """Save what was learned, as the training ends by a problem, which counts more than one with saving."""
        with contextlib.suppress(TrainingError):
            if self.engine.step > self._saved_step:
                self._save(None)
            self._settle()

    def _settle(self) -> None:
        """Until the last checkpoint is written."""
        self._written()
        if self.saver is not None and self.saver.written:
            self.say(f"saved {self.saver.written[-1]}")

    def _written(self) -> None:
        """Wait for the checkpoint before. Raises TrainingError, in all processes, where it could not be written."""
        problem = None
        if self.saver is not None:
            try:
                self.saver.wait()
            except TrainingError as error:
                problem = error
        self.engine.ranks.agree(problem)


def _finished(command: Command, material: Material, engine: Engine, course: _Course) -> Report:
    weights, config = engine.weights(averaged=True), engine.objective.network.config
    notes = {**command.notes, "data": material.data, "steps": str(engine.step), "seed": str(command.options.seed)}
    report: Report = {"promptnet": str(command.out)}
    if engine.ranks.first:
        report["bytes"] = save_weights(weights, config, command.out, notes=notes)
        if command.layout == "authors":
            report["authors"] = str(released.save(weights, config, command.out.with_suffix("")))
    report |= {
        "parameters": sum(weights[name].numel() for name in engine.parameters),
        "steps": engine.step,
        "seconds": round(course.seconds, 1),
        "loss": round(course.last_loss, 5) if math.isfinite(course.last_loss) else None,
    }
    if course.checked is not None:
        report["validation"] = {name: value for name, value in asdict(course.checked).items() if value is not None}
    return report


def _finite(value: float) -> float | None:
    """A number as JSON has it."""
    return value if math.isfinite(value) else None


def _reset_peak(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)


def _peak(ranks: Ranks) -> int:
    """Bytes that tensors took at most on this process's card; on a CPU, the process's own memory at most."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
