"""The sub-commands of `stillhouse bench`. Nothing heavy is imported before a command runs, so help comes at once."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

bench_app = typer.Typer(
    help="Measure: CPU per token, cost of scoring, start-up, waiting. docs/benchmarks.md says how to read it.",
    no_args_is_help=True,
)

Teacher = Annotated[
    Path, typer.Option("--teacher", metavar="FOLDER", exists=True, file_okay=False, help="Model folder.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write every number as JSON too.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often all sides take their turn.")]
RunFolderOption = Annotated[
    Path, typer.Option("--run", metavar="RUN", exists=True, file_okay=False, help="Folder of a run.")
]


@bench_app.command(epilog="Example: stillhouse bench distil --teacher models/smollm2 --out distil.json")
def distil(
    teacher: Teacher,
    labels: Annotated[Literal["topk", "hidden", "both"], typer.Option("--labels", help="Of the pipeline.")] = "both",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each turn.")] = 4,
    rounds: Rounds = 3,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences of a step.")] = 8,
    depth: Annotated[int, typer.Option("--depth", min=0, help="Steps the teacher may be ahead.")] = 2,
    out: Out = None,
) -> None:
    """CPU time per token of the whole pipeline, in turns with the plain recipe (transformers, one process).

    The student is a Llama of 6 layers x 384 made on the spot; the text has about 210 tokens a sequence.
    """
    from rich.console import Console

    from launch.bench.distil import DistilPlan
    from launch.bench.distil import distil as measure
    from launch.bench.workload import LABELS, Workload

    plan = DistilPlan(
        teacher=teacher,
        labels=tuple(LABELS) if labels == "both" else (labels,),
        steps=steps,
        rounds=rounds,
        workload=Workload(sequences_per_step=sequences, depth=depth),
    )
    with _work_folder() as work:
        result = measure(plan, work, note=_note)
    Console(width=max(Console().width, 170)).print(result.table())
    _write(out, result.to_json())


@bench_app.command(epilog="Example: stillhouse bench scoring --teacher models/smollm2 --out scoring.json")
def scoring(
    teacher: Teacher,
    batch: Annotated[
        list[str], typer.Option("--batch", metavar="NxL", help="Sequences x tokens; may be given several times.")
    ] = ["32x256", "8x1024"],  # noqa: B006 (typer copies it)
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """CPU time of scoring a batch in the vLLM engine, against vLLM's bare prefill of the same batch."""
    from rich.console import Console

    from launch.bench.scoring import Batch, ScoringPlan
    from launch.bench.scoring import scoring as measure

    plan = ScoringPlan(teacher=teacher, batches=tuple(Batch.parse(text) for text in batch), rounds=rounds)
    with _work_folder() as work:
        result = measure(plan, work, note=_note)
    Console(width=max(Console().width, 120)).print(result.table())
    _write(out, result.to_json())


@bench_app.command(epilog="Example: stillhouse bench start --run runs/demo")
def start(run: RunFolderOption, out: Out = None) -> None:
    """What the time from the command to the first trained step was made of, from a run's own records."""
    from rich.console import Console

    from launch.bench.run_times import start_phases, start_table
    from trainer.run_folder import RunFolder

    phases = start_phases(RunFolder(run))
    Console().print(start_table(phases))
    _write(out, {"phases_s": {phase.name: phase.seconds for phase in phases}})


@bench_app.command(epilog="Example: stillhouse bench waits --run runs/demo")
def waits(run: RunFolderOption, out: Out = None) -> None:
    """Busy and waiting shares of student and teachers at steady state, from a run's own records."""
    from dataclasses import asdict

    from rich.console import Console

    from launch.bench.run_times import read_waits, waits_table
    from trainer.run_folder import RunFolder

    found = read_waits(RunFolder(run))
    Console().print(waits_table(found))
    _write(out, {"depth": found.depth, "tokens_per_s": found.tokens_per_s, "lanes": [asdict(s) for s in found.shares]})


_STARTED = time.monotonic()


def _note(text: str) -> None:
    typer.echo(f"[{time.monotonic() - _STARTED:6.0f} s] {text}", err=True)


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Kept where the measurement fails, since the logs of its processes are in it."""
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-bench-"))
    with ExitStack() as failed:
        failed.callback(typer.echo, f"the logs of the benchmark are in {folder}", err=True)
        yield folder
        failed.pop_all()
    shutil.rmtree(folder)


def _write(out: Path | None, numbers: Mapping[str, Any]) -> None:
    """The numbers with what is needed to repeat them: command, date, versions, processor, revision."""
    if out is None:
        return
    from launch.report.environment import manifest_environment
    from trainer.run_folder import plain

    made = {"command": ["stillhouse", *sys.argv[1:]], "time": time.time(), **manifest_environment()}
    out.write_text(json.dumps(plain({**made, **numbers}), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"written: {out}")
