"""README and docs keep their word: commands exist, the README's Python runs, files are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from uniad_fast.cli.main import app
from uniad_fast.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str = README) -> list[str]:
    joined = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split("&&") if part.strip()]


@pytest.mark.parametrize(
    "command",
    sorted({c for page in PAGES for c in commands(page.read_text()) if c.startswith("uniad-fast")}),
)
def test_commands_parse(command):
    """Names and options are the command line's own; test_cli and test_weights run each of the README's."""
    name, *arguments = shlex.split(command, comments=True)[1:]
    subcommand = get_command(app).commands[name]
    subcommand.make_context(name, arguments)


def test_every_command_is_of_a_kind_that_is_run():
    known = ("uniad-fast ", "pip install ", "python3 -m venv ", ". .venv/bin/activate", "pytest")
    assert commands()
    for command in commands():
        assert command.startswith(known), command


def test_the_python_runs(made_up_classes, tmp_path, monkeypatch):
    code = "\n".join(blocks("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "fast", RECIPES["fast"].with_epochs(2))  # as it is written, in less time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good, image = made_up_classes / "class0/train/good", made_up_classes / "class0/test/square/000.png"
    assert "path/to/good/images" in code and "path/to/image.png" in code
    code = code.replace("path/to/good/images", str(good)).replace("path/to/image.png", str(image))
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_it_shows_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_shows_a_picture():
    assert re.search(r"!\[.+\]\(.+\.png\)", README)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_what_pages_import_is_there(page):
    for block in blocks("python", page.read_text()):
        compile(block, page.name, "exec")
        for line in re.findall(r"^from uniad_fast.* import .+$", block, re.M):
            exec(line, {})
