"""What the README says can be typed can be typed, and the house it draws is the house that stands."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import _parser, _with_command, main
from pipelines.catalog import Catalog
from pipelines.corpora.readers import READERS
from schemas.jobs import USES, CorpusConfig, RebuildJob, load

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
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
    assert all(
        set(re.findall(r"`(\w+)`", needs)) <= {*USES[name], "root"}  # type: ignore[index]
        for name, needs in rows
    )


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


# ------------------------------------------------------------------------------------------ "Your own data"


OWN = (ROOT / "pipelines/corpora/README.md").read_text(encoding="utf-8")
OWN_BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", OWN, re.MULTILINE | re.DOTALL))
OWN_ROWS = re.findall(r"^\| (?:`(\w+)`|\.\.\.)[^|]*\|[^|]*\| `(.*)` \|$", OWN, re.MULTILINE)


def test_the_page_of_own_data_shows_every_format_with_valid_lines() -> None:
    assert {name for name, _ in OWN_ROWS if name} == set(READERS)
    form = ""
    for name, lines in OWN_ROWS:
        form = name or form
        settings = yaml.safe_load(f"{{{lines}}}")
        CorpusConfig.model_validate({"name": "mine", "format": form, "split": "train"} | settings)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
def test_the_page_of_own_data_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    """Its files, its Python and its commands on real photographs; only /data lies elsewhere."""
    shutil.copytree(SHARED / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDECODER_STORE", str(tmp_path / "store"))
    block = {language: text.replace("/data/", f"{tmp_path}/data/") for language, text in OWN_BLOCKS.items()}
    exec(compile(block["python"], "README.md", "exec"), {})
    (tmp_path / "own.yaml").write_text(block["yaml"], encoding="utf-8")
    for command in block["sh"].splitlines():
        assert main(shlex.split(command)[3:]) == 0, capsys.readouterr().err
    card = Catalog(tmp_path / "store", "own").open().card
    counts = card.counts["train"]
    assert counts.segments > 4500 and counts.captions > 600 and counts.referring == 11
    assert set(card.taxonomies) == {"things", "nuclei"}
    assert card.num_read == card.num_kept + sum(card.rejects.values())
    assert (tmp_path / "own.html").stat().st_size > 10**5
