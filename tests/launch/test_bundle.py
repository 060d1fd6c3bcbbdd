"""The bundle: the code that travels is the code that is here, rows go along, and equal inputs give equal bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from configs.labels import LABELS
from configs.load import config_hash, load_run
from configs.losses import LOSSES
from launch.bundle import Bundle, make_bundle
from launch.own_code import plugin_code
from launch.submit import left_out_lines
from trainer.build import build_hash
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "trainer", "cluster", "launch")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user works in it: rows, a template and two model folders, named by relative paths."""
    folder = tmp_path / "project"
    for name in ("models/teacher", "models/student", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "data/train.jsonl").write_text('{"text": "a"}\n')
    (folder / "data/eval.jsonl").write_text('{"text": "b"}\n')
    (folder / "chat.jinja").write_text("{{ messages }}")
    config = {
        "name": "small",
        "student": {"model": {"path": "models/student"}},
        "teacher": {"model": {"path": "models/teacher"}, "chat_template": "chat.jinja"},
        "prompts": {"path": "data/train.jsonl"},
        "data": {"evaluation": {"path": "data/eval.jsonl"}},
        "training": {"steps": 3},
    }
    with (folder / "run.yaml").open("w") as file:
        YAML(typ="safe").dump(config, file)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def bundled(project: Path, tmp_path: Path) -> Callable[..., Bundle]:
    def make(*overrides: str, name: str = "bundle", **options: Any) -> Bundle:
        return make_bundle(Path("run.yaml"), list(overrides), folder=tmp_path / name, **options)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_rows_and_template_travel_and_everything_else_is_named_absolutely(
    bundled: Callable[..., Bundle], project: Path
) -> None:
    bundle = bundled()
    run = load_run(bundle.folder / "run.yaml").run
    assert run == bundle.run
    for path, source in (
        (run.prompts.path, "data/train.jsonl"),
        (run.data.evaluation.path, "data/eval.jsonl"),
        (run.teacher.chat_template, "chat.jinja"),
    ):
        assert path.startswith("prompts/")
        assert path.endswith(f"-{Path(source).name}")
        assert (bundle.folder / path).read_bytes() == (project / source).read_bytes()
    assert run.student.model.path == str(project / "models/student")
    assert run.teacher.model.path == str(project / "models/teacher")
    assert run.folder == project / "runs/small"


def test_the_rows_of_a_task_travel_too_held_out_ones_included(bundled: Callable[..., Bundle]) -> None:
    tasks = "{chat: {}, own: {prompts: {path: data/train.jsonl}, evaluation: {path: data/eval.jsonl}}}"
    bundle = bundled(f"tasks={tasks}")
    own = bundle.run.tasks["own"]
    assert own.prompts is not None
    assert own.evaluation is not None
    for rows, content in ((own.prompts, b'{"text": "a"}\n'), (own.evaluation, b'{"text": "b"}\n')):
        assert (bundle.folder / rows.path).read_bytes() == content
    assert bundle.run.tasks["chat"].evaluation is None


def test_equal_inputs_give_equal_bytes_and_changed_rows_another_name(
    bundled: Callable[..., Bundle], project: Path
) -> None:
    first, again = bundled(name="one"), bundled(name="two")
    assert contents(first.folder) == contents(again.folder)
    (project / "data/train.jsonl").write_text('{"text": "c"}\n')
    changed = bundled(name="three")
    assert changed.run.prompts.path != first.run.prompts.path
    assert config_hash(changed.run) == config_hash(first.run), "what rows hold is compared with the checkpoint's"


def test_a_folder_of_rows_travels_whole(bundled: Callable[..., Bundle], project: Path) -> None:
    (project / "data/.notes").write_text("hidden")
    run = bundled("prompts.path=data").run
    place = project.parent / "bundle" / run.prompts.path
    assert contents(place) == {"eval.jsonl": b'{"text": "b"}\n', "train.jsonl": b'{"text": "a"}\n'}


def test_what_is_no_row_stays_here_and_is_named_and_links_out_are_refused(
    bundled: Callable[..., Bundle], project: Path
) -> None:
    (project / "data/id_rsa").write_text("private")
    bundle = bundled("prompts.path=data")
    assert bundle.left_out == ("data/id_rsa",)
    assert not any("id_rsa" in name for name in contents(bundle.folder))
    (project / "data/more.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"prompts\.path: data/more.jsonl is a link to /etc/passwd"):
        bundled("prompts.path=data", name="again")
    (project / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no files of rows"):
        bundled("prompts.path=empty", name="again")


def test_the_files_of_a_list_and_of_a_pattern_travel_and_urls_stay(
    bundled: Callable[..., Bundle], project: Path
) -> None:
    (project / "more").mkdir()
    for name, text in (("b.csv", "text\nb\n"), ("a.jsonl", '{"text": "c"}\n'), ("note.md", "no rows")):
        (project / "more" / name).write_text(text)
    bundle = bundled('prompts.path=[data/train.jsonl, "more/[ab].*", "s3://bucket/*.jsonl", owner/rows]')
    one, pattern, url, hub = bundle.run.prompts.paths
    assert (bundle.folder / one).read_bytes() == b'{"text": "a"}\n'
    folder, star = pattern.rsplit("/", 1)
    assert star == "*"
    assert contents(bundle.folder / folder) == {"00001-a.jsonl": b'{"text": "c"}\n', "00002-b.csv": b"text\nb\n"}
    assert (url, hub) == ("s3://bucket/*.jsonl", "owner/rows")
    assert bundle.fetched == ("s3://bucket/*.jsonl", "owner/rows")
    assert left_out_lines(bundle) == ["the nodes must reach: s3://bucket/*.jsonl, owner/rows"]
    (project / "more/z.jsonl").write_text('{"text": "z"}\n')
    again = bundled('prompts.path=[data/train.jsonl, "more/[ab].*", "s3://bucket/*.jsonl", owner/rows]', name="again")
    assert again.run == bundle.run, "what is not matched does not count"
    (project / "more/api_key.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"prompts\.path: more/api_key.jsonl has the name of a secret"):
        bundled("prompts.path=more/*.jsonl", name="third")
    shared = bundled("prompts.path=more/[ab].*", name="fourth", shared=[project / "more"])
    assert shared.run.prompts.path == str(project / "more/[ab].*")


def test_names_of_a_hub_and_absolute_paths_of_the_nodes_stay(bundled: Callable[..., Bundle]) -> None:
    run = bundled("prompts.path=owner/rows", "student.model.path=/models/a", "teacher.model.path=owner/model").run
    assert run.prompts.path == "owner/rows"
    assert run.student.model.path == "/models/a"
    assert run.teacher.model.path == "owner/model"


def test_rows_in_a_shared_folder_are_named_and_not_sent(bundled: Callable[..., Bundle], project: Path) -> None:
    bundle = bundled(shared=[project / "data"])
    assert bundle.run.prompts.path == str(project / "data/train.jsonl")
    assert [file.path for file in bundle.files if file.path.startswith("prompts/")] == [
        bundle.run.teacher.chat_template
    ]


@pytest.mark.parametrize("path", ["./rows", "data/more/rows", "rows.jsonl"])
def test_a_path_that_leads_nowhere_is_refused_before_anything_is_sent(
    bundled: Callable[..., Bundle], path: str
) -> None:
    with pytest.raises(ConfigError, match=rf"prompts\.path: {path} does not exist .*needs an absolute path"):
        bundled(f"prompts.path={path}")


def test_a_large_upload_is_refused_with_its_largest_files_named(bundled: Callable[..., Bundle], project: Path) -> None:
    (project / "data/train.jsonl").write_bytes(b"x" * (5 * 2**20))
    with pytest.raises(ConfigError) as caught:
        bundled(max_bytes=4 * 2**20)
    lines = str(caught.value).splitlines()
    assert "MiB, more than the 4 MiB allowed" in lines[0]
    assert lines[1].split() == ["5.0", "MiB", "data/train.jsonl", "(prompts.path)"]
    assert "--shared" in lines[-1]
    assert not (project.parent / "bundle").exists()
    assert bundled(max_bytes=8 * 2**20, name="larger").num_bytes > 5 * 2**20


def test_the_code_that_travels_has_the_hash_and_the_entry_point_of_the_code_here(
    bundled: Callable[..., Bundle],
) -> None:
    bundle = bundled()
    code = (
        "import importlib.metadata as m, trainer.build as b;"
        "print(b.__file__, b.build_hash(), [e.value for e in m.entry_points(group='vllm.general_plugins')"
        " if e.name == 'stillhouse_labels'])"
    )
    done = run_with(bundle.folder / "code", "-c", code)
    file, found, points = done.split(" ", 2)
    assert file == str(bundle.folder / "code/trainer/build.py")
    assert found == bundle.build == build_hash()
    assert points.strip() == "['cluster.engines.vllm_labels:register']"


def test_the_code_that_travels_says_which_packages_it_needs(bundled: Callable[..., Bundle]) -> None:
    """A node is asked whether it has them, by the metadata of the code that runs there."""
    asked = "m.requires('stillhouse'), m.metadata('stillhouse')['Requires-Python']"
    code = f"import importlib.metadata as m; print({asked})"
    here = (metadata.requires("stillhouse"), metadata.metadata("stillhouse")["Requires-Python"])
    assert run_with(bundled().folder / "code", "-c", code).strip() == " ".join(map(str, here))


def test_a_bundle_is_the_same_from_a_checkout_an_installation_and_a_bundle(
    bundled: Callable[..., Bundle], project: Path, tmp_path: Path
) -> None:
    first = bundled()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    copy, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "tests", "*.egg-info"))
    subprocess.run([*build, copy], check=True, timeout=120)
    (wheel,) = tmp_path.glob("stillhouse-*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    make = "from launch.bundle import make_bundle; from pathlib import Path; import sys;"
    make += "print(make_bundle(Path('run.yaml'), [], folder=Path(sys.argv[1])).build)"
    for name, code in (("from-wheel", installed), ("from-bundle", first.folder / "code")):
        assert run_with(code, "-c", make, str(tmp_path / name)).strip() == first.build
        assert contents(tmp_path / name) == contents(first.folder)


def test_somebodys_own_plug_in_travels_too(bundled: Callable[..., Bundle], project: Path, tmp_path: Path) -> None:
    (project / "mine").mkdir()
    (project / "mine/encodings.py").write_text(
        "from configs.labels import Labels\n\n\nclass Encoding(Labels):\n    k: int = 4\n"
    )
    (project / "mine/helper.py").write_text("x = 1\n")
    make = "from launch.bundle import make_bundle; from pathlib import Path; import sys;"
    make += "make_bundle(Path('run.yaml'), ['labels={kind: mine.encodings}'], folder=Path(sys.argv[1]))"
    run_with(project, "-c", make, str(tmp_path / "bundle"))
    names = contents(tmp_path / "bundle" / "code")
    assert {"mine/encodings.py", "mine/helper.py"} <= names.keys()


def test_data_of_a_plug_in_with_the_name_of_a_secret_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugged"
    package.mkdir()
    (package / "topk.py").write_text("from configs.labels import Labels\n\nclass Encoding(Labels):\n    pass\n")
    (package / "secret_words.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = load_run(ROOT / "configs/demo.yaml").run
    run = run.model_copy(update={"labels": LABELS.validate("plugged.topk")})
    assert {file.path for file in plugin_code(run)} == {"plugged/topk.py", "plugged/secret_words.py"}
    (package / "gap.py").write_text("from configs.losses import Divergence\n\nclass Term(Divergence):\n    pass\n")
    term = run.model_copy(update={"labels": LABELS.validate("topk"), "objective": (LOSSES.validate("plugged.gap"),)})
    assert "plugged/gap.py" in {file.path for file in plugin_code(term)}
    (package / "credentials.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"credentials\.json has the name of a secret"):
        plugin_code(run)


def test_code_without_metadata_says_how_to_install_it(project: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, bare / package, ignore=shutil.ignore_patterns("__pycache__"))
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "stillhouse" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    code = f"import sys; sys.path[:0] = [{str(bare)!r}, {str(packages)!r}]\n"
    code += "from launch.own_code import own_code\nfrom trainer.errors import ConfigError\n"
    code += "try: own_code()\nexcept ConfigError as error: print(error)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert f"pip install --no-deps -e {bare}" in done.stdout, done.stderr


def run_with(code: Path, *arguments: str) -> str:
    """Python with `code` first on its path; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_files_is_what_lies_there(bundled: Callable[..., Bundle]) -> None:
    bundle = bundled()
    assert {file.path: file.num_bytes for file in bundle.files} == {
        name: len(content) for name, content in contents(bundle.folder).items()
    }
    assert bundle.num_bytes == sum(file.num_bytes for file in bundle.files)
