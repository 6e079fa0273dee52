"""What the README says can be typed can be typed, and the house it draws is the house that stands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs.__main__ import _parser, _with_command
from pipelines.corpora.readers import READERS
from schemas.jobs import CorpusConfig, RebuildJob, load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
    if line.strip()
]


def typed(program: str) -> list[str]:
    found = [command for command in COMMANDS if command.startswith(program)]
    assert found, f"the README shows no {program!r}"
    return found


@pytest.mark.parametrize("command", typed("make "))
def test_make_has_every_target_that_is_shown(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", typed("python -m jobs "))
def test_the_door_takes_every_command_that_is_shown(command: str) -> None:
    arguments = _parser().parse_args(_with_command(shlex.split(command)[3:]))
    if hasattr(arguments, "file"):
        load(ROOT / arguments.file, arguments.overrides)


@pytest.mark.parametrize("command", typed("ray job submit "))
def test_every_submitted_job_file_is_executable_and_valid(command: str) -> None:
    path = ROOT / shlex.split(command)[-1]
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env -S python -m jobs\n")
    load(path)


def test_the_example_of_own_data_is_a_valid_job_file(tmp_path: Path) -> None:
    (example,) = (text for language, text in BLOCKS if language == "yaml")
    path = tmp_path / "own.yaml"
    path.write_text(example, encoding="utf-8")
    assert isinstance(load(path), RebuildJob)


def test_the_table_of_formats_is_the_table_of_readers() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(READERS)
    for _, needs in rows:
        assert set(re.findall(r"`(\w+)`", needs)) <= set(CorpusConfig.model_fields)


def test_the_drawn_house_stands() -> None:
    (house,) = (text for _, text in BLOCKS if text.startswith("schemas/"))
    drawn = {line.split()[0].rstrip("/") for line in house.splitlines()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.split("/")[0] for path in listed.splitlines() if "/" in path}
    assert drawn == {folder for folder in folders if not folder.startswith(".")}


def test_every_linked_file_is_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:xdecoder|jobs|pipelines)/[\w./]+)`", README
    )
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing
