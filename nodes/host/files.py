"""Where residuals, PromptNets and patch files are on disk: in models/, and in what extra_model_paths.yaml adds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import folder_paths

from ...profusion.files import save_in_one, try_writing, why_not_written, write_numbered
from ...profusion.problems import hidden_character, printable, why, why_no_name
from ...profusion.promptnet.network import PromptNetError
from ...profusion.residual import PREVIEW_SUFFIX, SUFFIX, ResidualError
from ...profusion.toybox.pipeline import WEIGHTS

RESIDUALS = "profusion_residuals"
PROMPTNETS = "profusion_promptnets"
PATCHES = "loras"  # the host's own
_LONGEST_END = f"_partial_100000_steps_00001_{SUFFIX}"  # of a file's name, after the prefix
Saved = TypeVar("Saved")
TOYBOX = "Toybox"  # as the loader lists the embedded PromptNet
_TOYBOX_FILE = WEIGHTS / "toybox_promptnet.safetensors"


def register(folder: str, suffixes: Sequence[str] = (SUFFIX,)) -> None:
    """Tell the host of a folder, and of the files to list in it.

    Paths that extra_model_paths.yaml added before stay: after models/ as usual, or before it where the yaml says
    `is_default`. The host's `add_model_folder_path` would list files of every kind in it.
    """
    own = str(Path(folder_paths.models_dir) / folder)
    known, _ = folder_paths.folder_names_and_paths.get(folder, ([], set()))
    added, defaults = [path for path in known if path != own], _default_bases()
    first = [path for path in added if Path(path).parent in defaults]
    rest = [path for path in added if path not in first]
    folder_paths.folder_names_and_paths[folder] = ([*first, own, *rest], set(suffixes))


def _default_bases() -> set[Path]:
    """The base folders that extra_model_paths.yaml calls `is_default`.

    The host keeps no note of it but puts their paths before models/ in its own lists, and that is where it shows.
    """
    models = Path(folder_paths.models_dir)
    bases = set()
    for kind, (paths, _) in folder_paths.folder_names_and_paths.items():
        places = [Path(path) for path in paths]
        if models / kind in places:
            bases |= {path.parent for path in places[: places.index(models / kind)]}
    return bases


def residual_names() -> list[str]:
    """The residuals on disk, as the loader lists them."""
    return _listed(RESIDUALS)


def find_residual(name: str) -> Path:
    """The path of a listed residual. Raises ResidualError, which says where it was looked for and what is there."""
    advice = "or make one with Residual Trainer and Residual Saver"
    return find(RESIDUALS, name, residual_names(), ResidualError, "residual", advice)


def promptnet_names() -> list[str]:
    """The embedded one, if it is there, and those in models/profusion_promptnets."""
    return [*([TOYBOX] if _TOYBOX_FILE.is_file() else []), *_listed(PROMPTNETS)]


def _listed(kind: str) -> list[str]:
    """The files of a folder that a loader offers. Older frontends put a list's entries into their menu as HTML."""
    return [name for name in folder_paths.get_filename_list(kind) if not _unfit(name)]


def _unfit(name: str) -> str | None:
    """What no name that comes from the outside may have."""
    return hidden_character(name) or next((mark for mark in "<>\n\r\t" if mark in name), None)


def find_promptnet(name: str) -> Path:
    """The path of a listed PromptNet. Raises PromptNetError, which says where it was looked for."""
    if name == TOYBOX and _TOYBOX_FILE.is_file():
        return _TOYBOX_FILE
    advice = "or train one with PromptNet Trainer"
    return find(PROMPTNETS, name, promptnet_names(), PromptNetError, "PromptNet", advice)


def find(kind: str, name: str, names: Sequence[str], error: type[ValueError], what: str, advice: str) -> Path:
    """The path of a file in one of our folders. names: those that a loader lists, for the error, which also says where
    it was looked for."""
    if not isinstance(name, str) or not name or _unfit(name):
        raise error(
            f"There can be no {what} {name!r:.80}: choose a file of the list, renamed without < and > if need be."
        )
    path = folder_paths.get_full_path(kind, name)
    if path is not None:
        return Path(path)
    found = f"{', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}" or f"no {what}"
    searched = " and ".join(folder_paths.get_folder_paths(kind))
    raise error(
        f"There is no {what} '{name}'. Searched: {searched}. Found: {found}. Choose one of these, put the file there "
        f"and refresh the node definitions (R), {advice}."
    )


def why_not_found(find: Callable[[str], Path], name: str | None) -> bool | str:
    """What a loader's `validate_inputs` returns in place of the host's check of the list, whose message does not say
    where the list comes from. name is None where it comes from another node."""
    try:
        if name is not None:
            find(name)
    except Exception as problem:  # it is logged and shown, whatever it is
        return printable(str(problem)) if isinstance(problem, ValueError) else why(problem)
    return True


def fingerprint(find: Callable[[str], Path], name: str | None) -> str:
    """Changes when the file does, so that a loader reads it anew."""
    try:
        path = find(name)
        return f"{path}:{path.stat().st_mtime_ns}:{path.stat().st_size}"
    except Exception:  # the node itself will say what is wrong
        return "missing"


def next_residual_path(prefix: str, noun: str) -> Path:
    """A path no file has yet: `<prefix>_<number>_.safetensors`, as the host numbers pictures, in the first folder.

    The prefix may hold subfolders, the host's %year% etc., and %noun%. Raises ResidualError where it leads elsewhere.
    """
    folder = folder_paths.get_folder_paths(RESIDUALS)[0]
    return next(_free_paths(folder, with_noun(prefix, noun), ResidualError, PREVIEW_SUFFIX))


def save_residual_numbered(prefix: str, noun: str, save: Callable[[Path], Saved], everywhere: bool = False) -> Saved:
    """`save(path)` under the next number, see `next_residual_path`. It must raise NameTaken where the name is taken
    meanwhile, as it is where two servers share the folder: then the number after it is tried.

    everywhere: where it fails, try every folder of residuals. Raises what it raised there.
    """
    return _save_numbered(RESIDUALS, with_noun(prefix, noun), save, everywhere, ResidualError, PREVIEW_SUFFIX)


def save_numbered(folder: str, prefix: str, save: Callable[[Path], Saved], everywhere: bool = False) -> Saved:
    """The same for PROMPTNETS and PATCHES. Raises PromptNetError."""
    return _save_numbered(folder, prefix, save, everywhere, PromptNetError)


def check_writable(kind: str, prefix: str, size: int, error: type[ValueError]) -> None:
    """Find out before a training whether so many bytes can be saved under this prefix. Raises `error`."""
    path = next(_free_paths(folder_paths.get_folder_paths(kind)[0], prefix, error))
    try:
        try_writing(path, size)
    except OSError as problem:
        raise error(f"'{path}' could not be saved: {why_not_written(problem)}") from problem


def folders(kind: str) -> list[Path]:
    """Every folder of a kind; files are saved in the first."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]


def listed_name(kind: str, path: Path) -> str:
    """How the host's loaders list a file of one of its folders."""
    return next(str(path.relative_to(folder)) for folder in folders(kind) if path.is_relative_to(folder))


def with_noun(prefix: str, noun: str) -> str:
    """A prefix with the noun, as a file can have it, in place of %noun%."""
    return prefix.replace("%noun%", re.sub(r"\W+", "_", noun))


def _save_numbered(
    kind: str,
    prefix: str,
    save: Callable[[Path], Saved],
    everywhere: bool,
    error: type[ValueError],
    companion: str = SUFFIX,
) -> Saved:
    def save_in(folder: Path) -> Saved:
        return write_numbered(_free_paths(str(folder), prefix, error, companion), save)

    return save_in_one(folders(kind)[: None if everywhere else 1], save_in, error)


def _free_paths(folder: str, prefix: str, error: type[ValueError], companion: str = SUFFIX) -> Iterator[Path]:
    """Paths that no file has, nor one beside it with the other suffix, by number."""
    prefix = prefix.replace("\\", "/")  # as Windows has it
    if not prefix.strip(" ./") or prefix.startswith("/") or ".." in prefix.split("/"):
        raise error(f"filename_prefix {prefix!r} is no name within {folder}: use one such as 'pets/cat'.")
    parts = [part for part in prefix.split("/") if part not in ("", ".")]
    names = *parts[:-1], f"{parts[-1]}{_LONGEST_END}"
    refused = next((reason for name in names if (reason := why_no_name(name))), None)
    if refused:
        raise error(f"filename_prefix {prefix!r} cannot be used: {refused}. Use one such as 'pets/cat'.")
    try:
        subfolder, stem, number, _, _ = folder_paths.get_save_image_path(prefix, folder)
    except Exception as problem:  # the host raises a bare one where a link leads out of the folder
        raise error(
            f"The folder {folder} cannot be used for {prefix!r}: {why(problem)}. Check that it may be written to, and "
            "that no link leads out of it."
        ) from problem
    for free in itertools.count(number):
        path = Path(subfolder) / f"{stem}_{free:05}_{SUFFIX}"
        if not path.exists() and not path.with_suffix(companion).exists():
            yield path


register(RESIDUALS)
register(PROMPTNETS, (SUFFIX, ".bin"))  # as it is trained here, and as its authors released it
