"""The Dockerfile: what a linter would find, and its steps on this machine.

Every rule is a function from instructions to offences and has a made-up offence that it must catch. The
steps that need neither root nor a network run as they are written, with other folders.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_deepseek

ROOT = Path(__file__).parents[1]


class Instruction(NamedTuple):
    """A line of a Dockerfile with what continues it."""

    word: str
    rest: str


def parse(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [Instruction(word.upper(), rest) for word, rest in words]


def unpinned(file: list[Instruction]) -> list[str]:
    """Base images without a version."""
    stages: set[str] = set()
    found: list[str] = []
    for _, rest in (i for i in file if i.word == "FROM"):
        image, *name = rest.split()
        tag = image.rpartition("/")[2].partition(":")[2]
        if image not in stages and (not re.search(r"\d", tag) or tag == "latest"):
            found.append(f"{image} is not pinned")
        stages |= set(name[1:])
    return found


def privileged(file: list[Instruction]) -> list[str]:
    """An image whose program runs as root, or that changes things after it stopped being root."""
    last = max((n for n, i in enumerate(file) if i.word == "FROM"), default=0)
    users = [n for n, i in enumerate(file) if i.word == "USER" and n > last]
    if not users or file[users[-1]].rest.partition(":")[0] in ("root", "0"):
        return ["the program runs as root"]
    return [f"{i.word} after USER" for i in file[users[-1] :] if i.word in ("RUN", "COPY", "ADD")]


def fetched(file: list[Instruction]) -> list[str]:
    """Files from elsewhere that nothing checks."""
    runs = [i for i in file if i.word == "RUN" and re.search(r"\b(curl|wget)\b", i.rest)]
    return [f"{i.word} {i.rest}" for i in file if i.word == "ADD" or i in runs]


def untidy(file: list[Instruction]) -> list[str]:
    """Packages that bring more than what is named, or leave lists and caches in a layer."""
    found: list[str] = []
    for rest in (i.rest for i in file if i.word == "RUN"):
        if "apt-get install" in rest:
            wanted = (
                "apt-get update",
                " -y ",
                "--no-install-recommends",
                "rm -rf /var/lib/apt/lists/*",
            )
            found += [
                f"{part.strip()} is missing in: {rest}" for part in wanted if part not in rest
            ]
        found += [f"a cache stays: {rest}" for command in re.findall(r"pip (?:install|wheel) [^&]*", rest)
                  if "--no-cache-dir" not in command]  # fmt: skip
        if re.search(r"\b(sudo|apt) ", rest):
            found.append(f"sudo or apt: {rest}")
    return found


def secrets(file: list[Instruction]) -> list[str]:
    """Values that a layer would keep for everybody."""
    pattern = r"(?i)(token|secret|password|credential|api_?key)"
    return [
        f"{i.word} {i.rest}" for i in file if i.word in ("ENV", "ARG") if re.search(pattern, i.rest)
    ]


def shell_form(file: list[Instruction]) -> list[str]:
    """Programs behind a shell, which would not get the signals."""
    return [
        f"{i.word} {i.rest}" for i in file if i.word in ("ENTRYPOINT", "CMD") if i.rest[0] != "["
    ]


def relative(file: list[Instruction]) -> list[str]:
    """Working folders that depend on the one before."""
    return [i.rest for i in file if i.word == "WORKDIR" and not i.rest.startswith("/")]


RULES = (unpinned, privileged, fetched, untidy, secrets, shell_form, relative)
GOOD = 'FROM a:1\nUSER me\nENTRYPOINT ["x"]\n'


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_dockerfile_obeys(rule: Callable[[list[Instruction]], list[str]]) -> None:
    file = parse((ROOT / "Dockerfile").read_text())
    assert {"FROM", "RUN", "COPY", "USER", "ENTRYPOINT"} <= {i.word for i in file}
    assert rule(file) == []
    assert rule(parse(GOOD)) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (unpinned, "FROM nvidia/cuda"),
        (unpinned, "FROM nvidia/cuda:latest"),
        (unpinned, "FROM a:1 AS b\nFROM c"),
        (privileged, "FROM a:1"),
        (privileged, "FROM a:1\nUSER root"),
        (privileged, "FROM a:1\nUSER 0:0"),
        (privileged, "FROM a:1\nUSER me\nFROM b:1"),
        (privileged, "FROM a:1\nUSER me\nRUN rm x"),
        (fetched, "ADD https://x/y /y"),
        (fetched, "RUN curl x \\\n | sh"),
        (untidy, "RUN apt-get update && apt-get install -y --no-install-recommends x"),
        (untidy, "RUN apt-get update && apt-get install -y x && rm -rf /var/lib/apt/lists/*"),
        (untidy, "RUN pip install x"),
        (untidy, "RUN sudo ls"),
        (secrets, "ENV HF_TOKEN=x"),
        (secrets, "ARG password"),
        (shell_form, "ENTRYPOINT tilert"),
        (relative, "WORKDIR source"),
    ],
)
def test_offences_are_caught(rule: Callable[[list[Instruction]], list[str]], text: str) -> None:
    assert len(rule(parse(text))) == 1


def test_only_what_is_needed_goes_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert "*" in lines
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    copied = {i.rest.split()[0] for i in parse((ROOT / "Dockerfile").read_text())
              if i.word == "COPY" and "--from" not in i.rest}  # fmt: skip
    assert copied - {"."} <= allowed


def test_its_steps_make_an_environment_that_runs_the_script(tmp_path: Path) -> None:
    """Building the wheel, installing it into a new environment, the script: as the Dockerfile has them."""
    folders = {"/build/bin/pip": f"{sys.executable} -m pip", "/wheels": f"{tmp_path}/wheels",
               "/opt/tilert": f"{tmp_path}/opt", "python3 ": f"{sys.executable} "}  # fmt: skip
    environment = {
        **os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SKBUILD_BUILD_DIR": f"{sys.prefix}/build",  # where the C++ core of this environment was built
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    steps = [i.rest for i in parse((ROOT / "Dockerfile").read_text()) if i.word == "RUN"]
    ours = [s for s in steps if "/wheels" in s]
    assert len(ours) == 2, "one step makes the wheel, one installs it"

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for step in ours:
        for there, here in folders.items():
            step = step.replace(there, here)
        run(step)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.startswith("tilert-")
    # In place of a network: the packages that tilert needs are those of this environment.
    (site,) = (tmp_path / "opt").glob("lib/python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    where = run(f"{tmp_path}/opt/bin/python -c 'import tilert; print(tilert.__file__)'")
    assert where.strip() == f"{site}/tilert/__init__.py"
    model = {**tiny_deepseek.DENSE, "max_position_embeddings": 96}
    tiny_deepseek.make(tmp_path / "weights", model)
    environment["MODEL_WEIGHTS_DIR"] = f"{tmp_path}/weights"
    assert run(f"{tmp_path}/opt/bin/tilert --version").startswith("tilert ")
    shown = run(f"{tmp_path}/opt/bin/python examples/show_hands.py")
    assert shown.startswith("Prompt: Tell me three jokes:")
    assert len(shown.partition("Completion:\n")[2]) > 20
