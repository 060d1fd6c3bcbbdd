"""The command `stillhouse`: its sub-commands, their help, and how errors are reported.

Every command imports what it needs inside its function, so that help and messages about a configuration come at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from typer.main import get_command

from launch.bench import bench_app
from launch.cli_jobs import Config, Overrides, job_app
from launch.identity import refuse_foreign_packages
from launch.log_level import LOG_LEVEL, LogLevel, set_log_level

app = typer.Typer(
    name="stillhouse",
    help="Distil a large language model into a small one: Ray actors host vLLM teachers, DeepSpeed trains the student.",
    epilog="Exit codes: 0 done, 2 configuration, 3 data, 4 infrastructure, 5 diverged, 75 preempted after saving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Look at a configuration, without running it.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(job_app)

RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, for example runs/demo.")]


def main() -> None:
    """Entry point of the command. Ends the process with the exit codes of the help."""
    refuse_foreign_packages()
    from launch.process import ProcessEnd, prepare_streams

    end = ProcessEnd()
    prepare_streams()
    with end.noted():
        run_app(app)


def run_app(commands: typer.Typer, *, name: str = "stillhouse") -> NoReturn:
    """Run what the command line names. An error meant for a person is its text on stderr and its exit code, a stop that
    was asked for its text alone; STILLHOUSE_TRACEBACK=1 shows where it was raised. An unexpected one is its
    traceback, and exit code 1."""
    from configs.errors import StillhouseError, without_controls
    from configs.secrets import without_secrets
    from launch.process import system_errors, tell_defect
    from trainer.errors import Preempted

    sys.excepthook = tell_defect
    try:
        with system_errors():
            get_command(commands)(prog_name=name)
    except StillhouseError as error:
        if os.environ.get("STILLHOUSE_TRACEBACK") == "1":
            raise
        if not isinstance(error, Preempted):
            typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
        typer.echo(without_controls(without_secrets(str(error), environment=os.environ)), err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"stillhouse {version('stillhouse')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
Parent = Annotated[int | None, typer.Option("--parent", metavar="PID", hidden=True)]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level",
        envvar=LOG_LEVEL,
        case_sensitive=False,
        show_default="info",
        help="What is shown. debug: every event, piece of work and step, and all that libraries say, vLLM and "
        "DeepSpeed in logs/ of the run folder; info: phases, steps, evaluations, notes; warning: evaluations and "
        "notes; error: what ends the run.",
    ),
]
SkipSelfTest = Annotated[
    bool, typer.Option("--skip-self-test", help="Do not test the devices first; recorded in the manifest.")
]


@app.callback()
def _root(version: Version = False) -> None:
    pass


@app.command(epilog="Example: stillhouse train configs/demo.yaml --set training.steps=20 --set name=short")
def train(
    config: Config,
    overrides: Overrides = None,
    skip_self_test: SkipSelfTest = False,
    wait_for_nodes: Annotated[
        int | None,
        typer.Option("--wait-for-nodes", metavar="N", min=1, help="Begin when N nodes of the Ray cluster are alive."),
    ] = None,
    level: LogLevelOption = None,
    ending: Annotated[Path | None, typer.Option("--ending", metavar="FILE", hidden=True)] = None,
    parent: Parent = None,
) -> None:
    """Run a distillation on this machine, or on the Ray cluster that RAY_ADDRESS names.

    The same command again resumes it from the last checkpoint in its run folder.
    \f
    A job that was submitted notes in `ending` how the command ended, for `stillhouse status`; one that the Python API
    started, for the API.
    """
    from configs.errors import StillhouseError
    from launch.process import end_with_parent, system_errors

    end_with_parent(parent)
    try:
        with system_errors():
            set_log_level(level)
            _refuse_bad_configuration(config, overrides)
            from trainer.imports import uncollected

            with uncollected():
                from launch.train import train as run_training

            code = run_training(config, overrides or [], skip_self_test=skip_self_test, wait_for_nodes=wait_for_nodes)
    except StillhouseError as error:
        _note_ending(ending, error.exit_code, str(error))
        raise
    _note_ending(ending, code, "")
    raise typer.Exit(code)


@app.command(epilog="Example: stillhouse label configs/demo.yaml --set store.path=labels")
def label(
    config: Config, overrides: Overrides = None, skip_self_test: SkipSelfTest = False, level: LogLevelOption = None
) -> None:
    """Make the labels of a run and keep them in its store: teachers alone, no student.

    The same command again goes on where it stopped. A run with store.mode: only is then trained without a teacher.
    """
    set_log_level(level)
    _refuse_bad_configuration(config, overrides)
    from trainer.imports import uncollected

    with uncollected():
        from launch.label import label as make_labels

    raise typer.Exit(make_labels(config, overrides or [], skip_self_test=skip_self_test))


@app.command(
    epilog="Examples: stillhouse check configs/demo.yaml · stillhouse check configs/demo.yaml --rows 3 --from 120"
)
def check(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1,
            help="Show so many rows of each dataset as trained, with what is learnt.",
        ),
    ] = None,
    first: Annotated[int, typer.Option("--from", metavar="ROW", min=1, help="The first one to show.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens", help="With --rows: a table of their tokens too.")] = False,
    level: LogLevelOption = None,
    parent: Parent = None,
) -> None:
    """Check all that needs no accelerator: configuration, models, rows, memory, trackers, licences, disk.

    One line for each thing looked at. Exit code 0 where a run may start, 2 for the configuration, 3 for the data.
    """
    from launch.process import end_with_parent

    end_with_parent(parent)
    set_log_level(level)
    _refuse_bad_configuration(config, overrides)
    from trainer.imports import uncollected

    with uncollected():
        from launch.check.run import check as run_check
        from launch.check.shown_rows import Wanted

    shown = rows if rows is not None or (first == 1 and not tokens) else 1
    wanted = None if shown is None else Wanted(shown, first, tokens)
    raise typer.Exit(run_check(config, overrides or [], wanted=wanted))


@config_app.command("show", epilog="Example: stillhouse config show configs/demo.yaml --origins")
def config_show(
    config: Config,
    overrides: Overrides = None,
    origins: Annotated[bool, typer.Option("--origins", help="One line a value, with the place it comes from.")] = False,
) -> None:
    """Print the configuration with all defaults filled in; it loads back to the same run."""
    from launch.show import show

    typer.echo(show(config, overrides or [], origins=origins))


@config_app.command("schema", epilog="Example: stillhouse config schema > run.schema.json")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, for completion and checks in an editor."""
    from launch.show import schema

    typer.echo(schema())


@config_app.command("dashboard", epilog="Example: stillhouse config dashboard > stillhouse.json")
def config_dashboard() -> None:
    """Print a Grafana dashboard of runs, to import there (docs/monitoring.md)."""
    typer.echo(Path(__file__).with_name("report").joinpath("grafana.json").read_text(), nl=False)


@app.command(epilog="Example: stillhouse sync runs/demo --set 'trackers=[{kind: wandb, project: distil}]'")
def sync(run: RunFolderArgument, overrides: Overrides = None) -> None:
    """Send the numbers of a run that is over to its trackers, or to others: what they do not have yet."""
    from launch.sync import sync as send

    send(run, overrides or [])


@app.command(epilog="Example: stillhouse prune models/teacher models/student --keep-layers 0-9,20-29")
def prune(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Model folder to cut from.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder for the smaller model.")],
    keep_layers: Annotated[str, typer.Option("--keep-layers", metavar="LAYERS", help="Numbers and ranges from 0.")],
) -> None:
    """Make a student out of a model by keeping some of its layers."""
    from trainer.imports import uncollected

    with uncollected():
        from launch.quiet import quiet_libraries
        from trainer.model.prune import parse_layers
        from trainer.model.prune import prune as cut

    layers = parse_layers(keep_layers)
    quiet_libraries()
    cut(source, target, layers)
    typer.echo(f"student: {target} keeps {len(layers)} layers of {source} ({keep_layers})")


@app.command(epilog="Example: stillhouse export runs/demo models/my-student --dtype bfloat16")
def export(
    run: RunFolderArgument,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder in Hugging Face format.")],
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Write one whole model in place of base model and LoRA adapter.")
    ] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", help="Round the weights; default: as they were trained."),
    ] = None,
) -> None:
    """Write the student of a run as a folder that transformers and vLLM load.

    It is loaded once, and with --dtype compared with the student before: a number that the dtype cannot hold, or an
    answer that rounding alone does not explain, and nothing is written.
    """
    from trainer.imports import uncollected

    with uncollected():
        from launch.export import export as write_student
        from launch.quiet import quiet_libraries

    quiet_libraries()
    write_student(run, target, merge_adapter=merge_adapter, dtype=dtype)


@app.command(epilog="Example: stillhouse report runs/demo")
def report(run: RunFolderArgument) -> None:
    """Write report.html of a run, from what its folder holds."""
    from launch.report.page import write_report
    from trainer.run_folder import RunFolder

    typer.echo(write_report(RunFolder(run)))


@app.command(epilog="Example: stillhouse prepare smollm2-135m-instruct models/smollm2")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m-instruct")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for the model.")],
) -> None:
    """Get a small real teacher: fetched once, checked by its hash, converted to safetensors."""
    from trainer.imports import uncollected

    with uncollected():
        from launch.prepare import prepare_command

    typer.echo(prepare_command(name, target))


def _note_ending(file: Path | None, code: int, reason: str) -> None:
    if file is not None:
        from launch.jobs import note_ending

        note_ending(file, code, reason)


@app.command(epilog="Example: stillhouse doctor configs/demo.yaml --address 10.0.0.5:6379")
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this run needs.")] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Ray cluster to check too; default RAY_ADDRESS."),
    ] = None,
) -> None:
    """Look at this machine, and at every node of a cluster: one line a thing, and what to do.

    Versions, GPUs, disk, shared memory, ports, token, names, models; between nodes versions, clocks, the shared run
    folder, connections and an all-reduce. Exit code 0 without problems, 1 with, 2 for a configuration.
    """
    if config is not None:
        _refuse_bad_configuration(config, overrides)
    from launch.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(config, overrides or [], address=address))


def _refuse_bad_configuration(config: Path, overrides: list[str] | None) -> None:
    """Before torch is imported, which takes longer than reading the mistakes."""
    from configs.load import load_run

    load_run(config, overrides or [])
