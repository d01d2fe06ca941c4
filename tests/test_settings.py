"""Where models are looked for: argument, environment, file, in this order."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from tilert import LLM
from tilert.errors import UserError
from tilert.serve import cli
from tilert.text import write_gguf_tokenizer
from tilert.weights import resolve_model, settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv(settings.ENVIRONMENT, raising=False)
    (tmp_path / "home" / ".tilert").mkdir(parents=True)
    return tmp_path


def write(home: Path, text: str) -> None:
    (home / "home" / ".tilert" / "config.toml").write_text(text)


def folder(home: Path, name: str) -> Path:
    path = home / name
    path.mkdir(parents=True)
    return path


def resolve(name: str) -> Path:
    return resolve_model(name, write_gguf_tokenizer)


def test_nothing_is_set(home: Path) -> None:
    assert settings.find_named("org/name") is None
    with pytest.raises(UserError, match="give model_weights_dir, or set MODEL_WEIGHTS_DIR"):
        settings.default_folder("deepseek_v3_2")


def test_argument_before_environment_before_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, env, named, below = (
        folder(home, name) for name in ("given/m", "env/m", "named", "dir/org/m")
    )
    write(home, f'[weights]\ndir = "{home}/dir"\n')
    assert resolve("org/m") == below
    write(home, f'[weights]\ndir = "{home}/dir"\n"org/m" = "{named}"\n')
    assert resolve("org/m") == named
    monkeypatch.setenv(settings.ENVIRONMENT, str(home / "env"))
    assert resolve("org/m") == env  # by the last part of the name
    assert resolve(str(given)) == given
    assert settings.default_folder("m") == home / "env"
    monkeypatch.setenv(settings.ENVIRONMENT, "")
    assert settings.default_folder("org/m") == named
    assert settings.default_folder("x") == home / "dir"


def test_the_command_line_takes_a_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families.make("llama", home / "models" / "tiny")
    monkeypatch.setenv(settings.ENVIRONMENT, str(home / "models"))
    assert LLM("tiny", skip_tokenizer_init=True).path == home / "models" / "tiny"
    assert cli.main(["inspect", "org/tiny"]) == 0
    assert "llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[weights]\ndir = "/x\n', r"not valid TOML: .*line 2"),
        ("\xff", "not valid TOML"),
        ('[weight]\ndir = "/x"\n', r"has the key 'weight'; accepted is the table \[weights\]"),
        ("weights = 3\n", "weights in .* is 3; accepted is a table"),
        ("[weights]\nm = 3\n", "'m' in .* is 3; accepted is a folder in quotes"),
        ('[weights]\nm = "here"\n', "'m' in .* is 'here'; accepted are absolute folders"),
        ('[weights]\nm = "/no/where"\n', "'m' in .* is '/no/where', but there is no such folder"),
        ('[weights]\ndir = "/no/where"\n', "dir in .* is '/no/where', but there is no such folder"),
    ],
)
def test_damaged_settings_are_one_sentence(home: Path, text: str, message: str) -> None:
    (home / "home" / ".tilert" / "config.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        resolve("m")


def test_a_weights_dir_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.ENVIRONMENT, "/no/where")
    with pytest.raises(UserError, match="MODEL_WEIGHTS_DIR is '/no/where', but there is no such"):
        resolve("org/m")


@pytest.mark.parametrize("name", ["../m", "org/../m", "a/b/c", "."])
def test_names_do_not_leave_the_folder(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(home, "m")
    monkeypatch.setenv(settings.ENVIRONMENT, str(folder(home, "dir")))
    assert settings.find_named(name) is None
