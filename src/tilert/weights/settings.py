"""Where the user keeps models: MODEL_WEIGHTS_DIR, and the file ~/.tilert/config.toml:

    [weights]
    dir = "/models"                          # folders of models, by their names
    "deepseek-ai/DeepSeek-V3.2" = "/fast/v32"  # the folder of one model

What is given in a call counts before the environment, and that before the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tilert.errors import UserError

ENVIRONMENT = "MODEL_WEIGHTS_DIR"
DIR = "dir"


def config_file() -> Path:
    """The user's file of settings, which need not exist."""
    return Path(os.path.expanduser("~/.tilert/config.toml"))


def find_named(name: str) -> Path | None:
    """The folder that the user's settings give for the name of a model; None when they give none.

    Looked for are $MODEL_WEIGHTS_DIR/NAME, the entry NAME of [weights], and NAME below its `dir`; of a name
    org/name also the last part alone. Raises UserError for settings that are damaged or name no folder.
    """
    given = os.environ.get(ENVIRONMENT)
    if given and (found := _below(_folder(given, ENVIRONMENT), name)):
        return found
    weights = _weights()
    if name in weights and name != DIR:
        return _folder(weights[name], f"'{name}' in {config_file()}")
    if DIR in weights:
        return _below(_folder(weights[DIR], f"dir in {config_file()}"), name)
    return None


def default_folder(name: str) -> Path:
    """The folder of a model that a caller did not name: $MODEL_WEIGHTS_DIR itself, else as `find_named`,
    else `dir` itself. Raises UserError when the settings say nothing."""
    if given := os.environ.get(ENVIRONMENT):
        return _folder(given, ENVIRONMENT)
    if found := find_named(name):
        return found
    if (given := _weights().get(DIR)) is not None:
        return _folder(given, f"dir in {config_file()}")
    raise UserError(
        f"the folder with the weights is not known; give model_weights_dir, or set {ENVIRONMENT}, or write"
        f' {name} = "/path" under [weights] into {config_file()}'
    )


def _weights() -> dict[str, str]:
    """The table [weights]; empty without a file."""
    path = config_file()
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of TOML or of UTF-8; names line and column
        raise UserError(f"{path} is not valid TOML: {error}") from error
    if unknown := sorted(table.keys() - {"weights"}):
        raise UserError(f"{path} has the key '{unknown[0]}'; accepted is the table [weights]")
    weights = table.get("weights", {})
    if not isinstance(weights, dict):
        raise UserError(f"weights in {path} is {weights!r}; accepted is a table")
    for name, folder in weights.items():
        if not isinstance(folder, str):
            raise UserError(f"'{name}' in {path} is {folder!r}; accepted is a folder in quotes")
    return weights


def _folder(given: str, what: str) -> Path:
    folder = Path(os.path.expanduser(given))
    if not folder.is_absolute() and what != ENVIRONMENT:
        raise UserError(f"{what} is '{given}'; accepted are absolute folders")
    if not os.path.isdir(folder):
        raise UserError(f"{what} is '{given}', but there is no such folder")
    return folder


def _below(folder: Path, name: str) -> Path | None:
    """The folder of a model within a folder of models."""
    return next((path for path in _candidates(folder, name) if os.path.isdir(path)), None)


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    parts = name.split("/")
    if len(parts) <= 2 and not any(part in ("", ".", "..") for part in parts):
        yield folder / name
        yield folder / parts[-1]
