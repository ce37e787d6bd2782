"""Where residuals, PromptNets and patch files are on disk: in models/, and in what extra_model_paths.yaml adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

import folder_paths

from ...profusion.promptnet.network import PromptNetError
from ...profusion.residual import PREVIEW_SUFFIX, SUFFIX, ResidualError
from ...profusion.toybox.pipeline import WEIGHTS

RESIDUALS = "profusion_residuals"
PROMPTNETS = "profusion_promptnets"
PATCHES = "loras"  # the host's own
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
    return folder_paths.get_filename_list(RESIDUALS)


def find_residual(name: str) -> Path:
    """The path of a listed residual. Raises ResidualError, which says where it was looked for and what is there."""
    advice = "or make one with Residual Trainer and Residual Saver"
    return find(RESIDUALS, name, residual_names(), ResidualError, "residual", advice)


def promptnet_names() -> list[str]:
    """The embedded one, if it is there, and those in models/profusion_promptnets."""
    return [*([TOYBOX] if _TOYBOX_FILE.is_file() else []), *folder_paths.get_filename_list(PROMPTNETS)]


def find_promptnet(name: str) -> Path:
    """The path of a listed PromptNet. Raises PromptNetError, which says where it was looked for."""
    if name == TOYBOX and _TOYBOX_FILE.is_file():
        return _TOYBOX_FILE
    advice = "or train one with `python -m profusion promptnet train`"
    return find(PROMPTNETS, name, promptnet_names(), PromptNetError, "PromptNet", advice)


def find(kind: str, name: str, names: Sequence[str], error: type[ValueError], what: str, advice: str) -> Path:
    """The path of a file in one of our folders. names: those that a loader lists, for the error, which also says where
    it was looked for."""
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
    except ValueError as problem:
        return str(problem)
    return True


def fingerprint(find: Callable[[str], Path], name: str | None) -> str:
    """Changes when the file does, so that a loader reads it anew."""
    try:
        path = find(name)
        return f"{path}:{path.stat().st_mtime_ns}:{path.stat().st_size}"
    except (ValueError, OSError):
        return "missing"


def next_residual_path(prefix: str, noun: str) -> Path:
    """A path no file has yet: `<prefix>_<number>_.safetensors`, as the host numbers pictures, in the first folder.

    The prefix may hold subfolders, the host's %year% etc., and %noun%. Raises ResidualError where it leads elsewhere.
    """
    prefix = prefix.replace("%noun%", re.sub(r"\W+", "_", noun))
    return _next_path(RESIDUALS, prefix, ResidualError, PREVIEW_SUFFIX)


def next_path(folder: str, prefix: str) -> Path:
    """The same for PROMPTNETS and PATCHES. Raises PromptNetError."""
    return _next_path(folder, prefix, PromptNetError)


def listed_name(folder: str, path: Path) -> str:
    """How the host's loaders list a file of the first folder."""
    return str(path.relative_to(folder_paths.get_folder_paths(folder)[0]))


def _next_path(kind: str, prefix: str, error: type[ValueError], companion: str = SUFFIX) -> Path:
    folder = folder_paths.get_folder_paths(kind)[0]
    if not prefix.strip(" ./\\") or PurePath(prefix).is_absolute() or ".." in re.split(r"[/\\]", prefix):
        raise error(f"filename_prefix '{prefix}' is no name within {folder}: use one such as 'pets/cat'.")
    try:
        subfolder, stem, number, _, _ = folder_paths.get_save_image_path(prefix, folder)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(
            f"The folder {folder} cannot be used for '{prefix}': {reason}. Check that it may be written to."
        ) from problem
    while True:
        path = Path(subfolder) / f"{stem}_{number:05}_{SUFFIX}"
        if not path.exists() and not path.with_suffix(companion).exists():
            return path
        number += 1


register(RESIDUALS)
register(PROMPTNETS, (SUFFIX, ".bin"))  # as it is trained here, and as its authors released it
