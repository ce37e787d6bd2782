"""What a PromptNet's training goes on from, when the same one is begun again after a Cancel, a crash or a full disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..files import save_in_one, write_numbered
from ..keeping import Partial, digest, seconds_to_write
from ..loop import TrainingError
from .file import SUFFIX
from .network import PromptNetError
from .training import PromptNetTraining

FOLDER = "training"  # below a folder of PromptNets
MOST_SERVERS = 100  # that work on the same training at a time

unsaved: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
"""The last training of which no file could be written: PromptNet and state by its identity, to go on from."""


class Unfinished:
    """The file of a training that is not finished: training/<kind>_<digits>.safetensors in one of these folders.

    identity: of the training, digits that tell it from any other. places: folders of PromptNets; the first that has
    room is taken. warn: told where the training so far cannot be written while it runs. `partial` is for
    `TrainingLoop.steps`; `said` is what became of an earlier run's file, as lines.
    """

    def __init__(
        self,
        training: PromptNetTraining,
        kind: str,
        identity: str,
        places: Sequence[Path],
        warn: Callable[[str], None],
    ):
        self._training, self._kind, self._identity, self._places = training, kind, identity, list(places)
        numbers = sum(value.numel() for group in training.groups for value in group.parameters.values())
        size = 3 * 4 * numbers  # each in float32, and AdamW's two moments of it
        self.partial = Partial(self._save, seconds_to_write(self._places[0] / FOLDER / "x", size), warn)
        self.said = ""

    def go_on(self) -> None:
        """Go on from what could not be saved, or else from the file of an unfinished training, if there is one.

        What is not of this training is left alone, and said.
        """
        training = self._training
        while True:
            path = self._taken()
            try:
                if self._identity in unsaved:
                    network, state = unsaved[self._identity]
                    training.check_state(state)
                    training.go_on(network, state)
                    where = "memory"
                elif path is not None:
                    training.resume(path, same_start=True)
                    where = str(path)
                else:
                    return
            except (PromptNetError, TrainingError) as problem:
                self.said += f"Begun anew. {problem}\n"
                self._identity = digest(self._identity, "anew")  # what was found keeps its name, and its file
                self.partial.leave()
                continue
            self.said += f"Gone on from step {training.step}, from {where}\n"
            return

    def finished(self) -> None:
        """All that was learned is saved elsewhere."""
        self.partial.discard()
        unsaved.pop(self._identity, None)

    def keep(self) -> str:
        """Keep what the training can go on from, in a file or else in memory, and say so."""
        training = self._training
        try:
            path = self.partial.save()
        except Exception as problem:  # whatever it is, the work of hours must not be lost to it
            network = {name: value.detach().cpu() for name, value in training.network.state_dict().items()}
            unsaved.clear()
            unsaved[self._identity] = network, {name: value.cpu() for name, value in training.state().items()}
            return (
                "They are in memory until ComfyUI is closed or another training cannot be saved: queue the same inputs "
                f"again to go on from there, or to save them. No file to go on from could be written: {problem}"
            )
        return (
            f"Queue the same inputs again to go on from step {training.step}, or delete\n{path}\n"
            f"{path.stat().st_size:,} bytes"
        )

    def _taken(self) -> Path | None:
        """The newest file of an unfinished training of the same inputs, which no other server works on."""
        paths = [path for folder in self._places for path in self._names(folder) if path.is_file()]
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first:
            if self.partial.take(path):
                return path
            self.said += f"Another server works on the same training, and keeps it in {path}\n"
        return None

    def _names(self, folder: Path) -> Iterator[Path]:
        """What the file may be called: other servers may work on the same training."""
        yield folder / FOLDER / f"{self._kind}_{self._identity}{SUFFIX}"
        for number in range(2, MOST_SERVERS):
            yield folder / FOLDER / f"{self._kind}_{self._identity}_{number}{SUFFIX}"

    def _save(self) -> Path:
        """Write the training so far where there is room."""
        return save_in_one(self._places, self._save_in, PromptNetError)

    def _save_in(self, folder: Path) -> Path:
        training, own = self._training, self.partial.path
        if own is not None and own.is_relative_to(folder):
            training.save(own)
            return own

        def save(path: Path) -> Path:
            training.save(path, overwrite=False)
            return path

        return write_numbered(self._names(folder), save)
