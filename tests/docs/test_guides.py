"""The usage guides and the page on torch: every command and snippet runs and prints what is shown, and the guides leave
no option out."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest

from cosmos_export import CosmosAdvancedConfig, CosmosAdvancedModel
from cosmos_export.cli import main as export_commands
from cosmos_export.config import SECTIONS
from cosmos_export.model import generation
from cosmos_export.resources import preset_names, recipe_names
from cosmos_runtime.cli import main as run_commands

from .guide import blocks, heading_levels, prose, section
from .guide_run import ROOT, GuideRun

ENGLISH, ARABIC = ROOT / "docs" / "USAGE_GUIDE.md", ROOT / "docs" / "ar" / "USAGE_GUIDE.md"
GUIDES = [pytest.param(guide, id=str(guide.relative_to(ROOT))) for guide in (ENGLISH, ARABIC)]
TORCH, DIFF, README = ROOT / "docs" / "TORCH.md", ROOT / "docs" / "DIFF.md", ROOT / "README.md"
BLOCKS = blocks(ENGLISH)
RUNNABLE = [
    pytest.param(guide, i, id=f"{guide.stem}-line-{b.line}")
    for guide in (ENGLISH, TORCH, DIFF)
    for i, b in enumerate(blocks(guide))
    if b.language != "bash install"
]
COMMANDS = [
    pytest.param(f"{program} {name}", command, id=f"{program}-{name}")
    for program, group in (("cosmos-export", export_commands), ("cosmos-run", run_commands))
    for name, command in group.commands.items()
]


@pytest.fixture(scope="module")
def guide_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, GuideRun]:
    return {guide: GuideRun(tmp_path_factory.mktemp(guide.stem), blocks(guide)) for guide in (ENGLISH, TORCH, DIFF)}


@pytest.mark.parametrize(("guide", "index"), RUNNABLE)
def test_a_block_runs_and_prints_what_is_shown(guide_runs: dict[Path, GuideRun], guide: Path, index: int) -> None:
    run = guide_runs[guide]
    block = run.blocks[index]
    failed, printed = run.result(index)
    where = f"{guide.name}, line {block.line}:\n{block.code}\nprinted:\n{printed}"
    assert failed == block.fails, where
    assert block.first_missing_from(printed) is None, f"not printed: {block.first_missing_from(printed)!r}\n{where}"


def test_both_guides_have_the_same_blocks() -> None:
    """So that running one guide's is running the other's."""
    assert [(b.language, b.code, b.output) for b in blocks(ARABIC)] == [(b.language, b.code, b.output) for b in BLOCKS]


def test_both_guides_have_the_same_outline() -> None:
    assert heading_levels(ARABIC) == heading_levels(ENGLISH)
    assert _code_names(ENGLISH)
    assert _code_names(ARABIC) == _code_names(ENGLISH)


def _code_names(guide: Path) -> set[str]:
    """What stands as code in the text, such as options and settings."""
    return set(re.findall("`([^`\n]+)`", prose(guide)))


def test_install_commands_name_what_there_is() -> None:
    lines = [line for block in BLOCKS if block.language == "bash install" for line in block.code.splitlines()]
    assert lines
    for words in map(shlex.split, lines):
        INSTALL_CHECKS[words[0]](words[1:])


def _check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirement = re.fullmatch(r"\.\[([\w,]+)\]", arguments[-1])
    assert arguments[:3] == ["install", "-c", "constraints.txt"]
    assert requirement is not None
    assert set(requirement[1].split(",")) <= extras.keys()
    assert (ROOT / "constraints.txt").is_file()


def _check_make(arguments: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True, timeout=60)


def _check_python(arguments: list[str]) -> None:
    assert arguments == ["-m", "venv", ".venv"]


def _check_activation(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"]


def _check_cmake(arguments: list[str]) -> None:
    if arguments[0] == "-S":
        assert (ROOT / arguments[1] / "CMakeLists.txt").is_file()
        assert arguments[2:4] == ["-B", CPP_BUILD]
    else:
        assert arguments == ["--build", CPP_BUILD]


def _check_cpp_example(arguments: list[str]) -> None:
    """It is built and run by `test_cpp_example`."""
    option, count, bundle, *ids = arguments
    assert f'"{option}"' in (ROOT / "examples" / "cpp" / "main.cpp").read_text()
    assert any(f"cosmos-export torchscript --head lm --out {bundle} " in block.code for block in BLOCKS)
    assert [int(number) for number in (count, *ids)]


CPP_BUILD = "build/cpp"
INSTALL_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "pip": _check_pip, "make": _check_make, "python3": _check_python, ".": _check_activation, "cmake": _check_cmake,
    f"{CPP_BUILD}/cosmos_decode": _check_cpp_example,
}  # fmt: skip


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_option_of_a_command_is_explained(guide: Path, name: str, command: click.Command) -> None:
    text = section(guide, f"`{name}`")
    options = [p for p in command.params if isinstance(p, click.Option)]
    missing = [o.opts[0] for o in options if not re.search(rf"`{re.escape(o.opts[0])}[ /`=]", text)]
    assert not missing


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(
    ("heading", "function"),
    [
        ("`model(input_ids, ...)`", CosmosAdvancedModel.forward),
        ("`model.generate(input_ids, ...)`", generation.generate),
        ("`CosmosAdvancedModel.from_pretrained(folder, ...)`", CosmosAdvancedModel.from_pretrained),
    ],
)
def test_every_argument_of_a_call_is_explained(guide: Path, heading: str, function: Callable[..., object]) -> None:
    text = section(guide, heading)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert not [name for name in names if name not in ("self", "model") and f"`{name}`" not in text]


@pytest.mark.parametrize("guide", GUIDES)
def test_every_setting_recipe_and_preset_is_named(guide: Path) -> None:
    text = prose(guide)
    settings = [f.name for f in fields(CosmosAdvancedConfig) if f.name not in {*SECTIONS, "extra"}]
    for group, kind in SECTIONS.items():
        settings += [f"{group}.{name}" for name in kind.known_names()]
    assert not [name for name in [*settings, *recipe_names(), *preset_names()] if f"`{name}`" not in text]


@pytest.mark.parametrize("guide", [*GUIDES, pytest.param(TORCH, id="TORCH"), pytest.param(README, id="README")])
def test_links_lead_somewhere(guide: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", prose(guide))
    assert not [target for target in targets if not (guide.parent / target).exists()]
