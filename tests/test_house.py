"""The house as a newcomer meets it: its commands, its configurations, its lock, and what its wheel carries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FIXED = {"trainer", "launch", "cluster", "configs", "tests", "setup.py", "README.md"}
BESIDE = {
    "benchmarks",
    "docs",
    "docker",
    "requirements",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "pyproject.toml",
}
PACKAGES = ("configs", "trainer", "cluster", "launch")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}  # requirements/overrides.txt says why
GUIDES = ["README.md", "CONTRIBUTING.md", "docs/first-run.md"]


def tracked() -> list[Path]:
    """Files of the project, as git lists them; skips where this is no checkout."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def setup_requirements() -> dict[str, list[Requirement]]:
    """install_requires and extras, read from setup.py without running it."""
    source = (ROOT / "setup.py").read_text()
    groups = {"": re.search(r"install_requires=\[(.*?)\]\s*,\s*extras_require", source, re.S)[1]}
    extras = re.search(r"extras_require=\{(.*?)\n    \}", source, re.S)[1]
    groups |= dict(re.findall(r'"(\w+)": \[(.*?)\]', extras, re.S))
    return {name: [Requirement(text) for text in re.findall(r'"([^"]+)"', body)] for name, body in groups.items()}


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^=]+", line) for line in lines), "the lock holds exact versions only"
    return {canonical(name): Version(version) for name, version in (line.split("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_top_level_holds_what_is_fixed_and_little_else() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert names >= FIXED
    assert {name for name in names - FIXED - BESIDE if not name.startswith(".")} == set()


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_the_guides_exists(guide: str) -> None:
    from typer.main import get_command

    from launch.cli import app

    text = (ROOT / guide).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", text))
    assert named
    assert named <= targets
    known = get_command(app).commands
    for line in re.findall(r"^\$ stillhouse (\w+)", text, re.M):
        assert line in known, f"{guide}: stillhouse {line}"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("make test")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda file: file.name)
def test_every_shipped_configuration_loads(file: Path) -> None:
    from configs.load import load_run

    load_run(file)


def test_the_configuration_of_the_readme_loads(tmp_path: Path) -> None:
    from configs.load import load_run

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    (tmp_path / "run.yaml").write_text(blocks[0])
    load_run(tmp_path / "run.yaml")


def test_links_inside_the_documents_lead_somewhere() -> None:
    for file in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.relative_to(ROOT)}: {target}"


def test_the_lock_meets_setup_py() -> None:
    versions = locked()
    for name in ("", "cpu", "dev", "tensorboard", "wandb", "mlflow", "trackio"):
        for requirement in setup_requirements()[name]:
            found = versions[canonical(requirement.name)]
            assert requirement.specifier.contains(found, prereleases=True), f"{requirement}: locked {found}"
    assert not LEFT_OUT & versions.keys()
    assert versions["torch"].local == "cpu"


def test_the_locked_packages_meet_what_they_ask_of_each_other() -> None:
    versions = locked()
    problems = []
    for name in versions:
        for requirement in map(Requirement, requires(name) or []):
            wanted = canonical(requirement.name)
            if wanted in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            if wanted not in versions or not requirement.specifier.contains(versions[wanted], prereleases=True):
                problems.append(f"{name} asks for {requirement}, locked is {versions.get(wanted)}")
    assert problems == []


def test_no_file_names_a_registry_or_a_place_of_one_machine() -> None:
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "--index" + "-url http"]
    places = re.compile(r"(?<![\w.])/(?:root|work|opt|mnt)/\w")
    for path in tracked():
        if path.suffix in {".png", ".bin"}:
            continue
        text = path.read_text(encoding="utf-8")
        assert not [host for host in hosts if host in text], path
        assert places.search(text) is None, f"{path}: {places.search(text)}"
        assert str(ROOT) not in text, path


@pytest.mark.parametrize("split", ["train", "eval"])
def test_demo_rows_are_chats_that_end_with_a_question(split: str) -> None:
    rows = demo_rows(split)
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"][-1]["role"] == "user"
        assert row["completion"] is None or [turn["role"] for turn in row["completion"]] == ["assistant"]
        turns = row["prompt"] + (row["completion"] or [])
        assert all(turn["content"].strip() == turn["content"] != "" for turn in turns)


def test_held_out_rows_are_answered_and_never_in_training() -> None:
    train, held_out = demo_rows("train"), demo_rows("eval")
    assert all(row["completion"] for row in held_out)
    prompts = [json.dumps(row["prompt"]) for row in train + held_out]
    assert len(set(prompts)) == len(prompts) == 740
    assert 80 <= sum(row["completion"] is None for row in train) <= 95


def demo_rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "configs/data" / f"demo_{split}.jsonl").read_text().splitlines()]


def test_the_wheel_holds_every_module_and_every_file_that_is_read_at_run_time(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    for path in tracked():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("stillhouse-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in tracked() if path.relative_to(ROOT).parts[0] in PACKAGES}
    missing = {name for name in code - names if not name.startswith(".")}
    assert missing == set(), f"not in the wheel, add them to package_data of setup.py: {sorted(missing)}"
    assert not [name for name in names if name.startswith("tests/")]


def test_pyproject_holds_tool_settings_and_no_packaging() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings) == {"build-system", "tool"}
