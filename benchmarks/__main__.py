"""What a token costs, measured so that anybody can repeat it; run from the root of a checkout.

python -m benchmarks distil  --teacher FOLDER    CPU time per token of the pipeline, against the plain recipe (plain.py)
python -m benchmarks scoring --teacher FOLDER    CPU time of a labelled batch, against vLLM's bare prefill of it
python -m benchmarks store   --teacher FOLDER    CPU time of labels from the label store, against scoring them
python -m benchmarks memory  CONFIG              peak memory of each role of a run, beside what `check` predicts
python -m benchmarks losses                      CPU time and memory of every divergence with every encoding
python -m benchmarks exactness                   the bias of every divergence with every encoding, on real models
python -m benchmarks learning                    held-out KL after equal steps, by encoding and by divergence
python -m benchmarks draft RUN TEACHER           how many tokens a student saves its teacher in speculative decoding
python -m benchmarks other-student FOLDER        a small student with a tokenizer of its own, for docs/tokenizers.md

docs/benchmarks.md says how to read the numbers. How fast a run of yours is: `stillhouse bench`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from launch.bench import Out, write_numbers

app = typer.Typer(help="What a token costs. docs/benchmarks.md says how to read it.", no_args_is_help=True)

Teacher = Annotated[
    Path, typer.Option("--teacher", metavar="FOLDER", exists=True, file_okay=False, help="Model folder.")
]
Student = Annotated[
    Path, typer.Option("--student", metavar="FOLDER", exists=True, file_okay=False, help="Model folder.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often all sides take their turn.")]


@app.command(epilog="Example: python -m benchmarks other-student models/other")
def other_student(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the model is written.")],
    rows: Annotated[Path, typer.Option("--rows", exists=True, dir_okay=False, help="Text of the tokenizer.")] = Path(
        "configs/data/demo_train.jsonl"
    ),
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=300, help="Tokens, at most.")] = 4096,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Of the Llama.")] = 6,
    width: Annotated[int, typer.Option("--width", min=64, help="Of its hidden states, a multiple of 64.")] = 384,
) -> None:
    """A small student of random weights with a tokenizer that no teacher has, to distil into with `align`."""
    from benchmarks.other_student import make_other_student

    make_other_student(folder, rows, vocabulary=vocabulary, layers=layers, width=width)
    typer.echo(f"{folder}: {layers} layers of {width}, tokenizer of {rows}")


@app.command(epilog="Example: python -m benchmarks distil --teacher models/smollm2 --out distil.json")
def distil(
    teacher: Teacher,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", help="topk, hidden or given_ids; may be given several times; all three if none."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each turn.")] = 4,
    rounds: Rounds = 3,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences of a step.")] = 8,
    depth: Annotated[int, typer.Option("--depth", min=0, help="Steps the teacher may be ahead.")] = 2,
    dtype: Annotated[str, typer.Option("--dtype", help="Of all models: auto, float32 or bfloat16.")] = "auto",
    out: Out = None,
) -> None:
    """CPU time per token of the whole pipeline, in turns with the plain recipe (transformers, one process), and the
    multiple that each is of the floor: the arithmetic alone, measured in the same run.

    The student is a Llama of 6 layers x 384 made on the spot; the text has about 210 tokens a sequence.
    """
    from rich.console import Console

    from benchmarks.distil import DistilPlan
    from benchmarks.distil import distil as measure
    from benchmarks.workload import LABELS, Workload

    if unknown := set(labels or ()) - {*LABELS}:
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(LABELS)}", param_hint="--labels")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is none of auto, float32, bfloat16", param_hint="--dtype")
    plan = DistilPlan(
        teacher=teacher,
        labels=tuple(labels or LABELS),
        steps=steps,
        rounds=rounds,
        workload=Workload(sequences_per_step=sequences, depth=depth, scorer_dtype=dtype, student_dtype=dtype),
    )
    with _work_folder() as work:
        result = measure(plan, work, note=_note)
    Console(width=max(Console().width, 200)).print(result.table())
    write_numbers(out, result.to_json())


@app.command(epilog="Example: python -m benchmarks scoring --teacher models/smollm2 --out scoring.json")
def scoring(
    teacher: Teacher,
    batch: Annotated[
        list[str], typer.Option("--batch", metavar="NxL", help="Sequences x tokens; may be given several times.")
    ] = ["16x256"],  # noqa: B006 (typer copies it)
    rounds: Rounds = 3,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16, of the teacher.")] = "auto",
    out: Out = None,
) -> None:
    """CPU time of labelling a batch in the vLLM engine with every encoding, against vLLM's bare prefill of the same
    batch, and the least that arithmetic allows: minutes."""
    from rich.console import Console

    from benchmarks.scoring import Batch, ScoringPlan
    from benchmarks.scoring import scoring as measure

    plan = ScoringPlan(teacher=teacher, batches=tuple(Batch.parse(text) for text in batch), rounds=rounds, dtype=dtype)
    with _work_folder() as work:
        result = measure(plan, work, note=_note)
    Console(width=max(Console().width, 120)).print(result.table())
    write_numbers(out, result.to_json())


@app.command(epilog="Example: python -m benchmarks store --teacher models/smollm2 --out store.json")
def store(
    teacher: Teacher,
    batch: Annotated[str, typer.Option("--batch", metavar="NxL", help="Sequences x tokens.")] = "16x256",
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """CPU time of a batch's labels read from the label store, against the vLLM scorer that makes them."""
    from rich.console import Console

    from benchmarks.scoring import Batch
    from benchmarks.store import StorePlan, measure

    with _work_folder() as work:
        result = measure(StorePlan(teacher, Batch.parse(batch), rounds), work, note=_note)
    Console(width=max(Console().width, 120)).print(result.table())
    write_numbers(out, result.to_json())


@app.command(epilog="Example: python -m benchmarks memory configs/demo.yaml --set training.steps=8 --out memory.json")
def memory(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one value; may be given several times.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="With models of one layer: what is left is the processes' own.")
    ] = False,
    out: Out = None,
) -> None:
    """Peak memory of each role of a run on this machine's processor, beside what `check` predicts."""
    from rich.console import Console

    from benchmarks.memory import measure
    from benchmarks.workload import small_models

    with _work_folder() as work:
        given = [*(overrides or []), *(small_models(config, overrides or [], work) if small else [])]
        result = measure(config, given, work)
    Console(width=max(Console().width, 120)).print(result.table())
    write_numbers(out, result.to_json())


@app.command(epilog="Example: python -m benchmarks losses --vocabulary 151936 --labels hidden --out losses.json")
def losses(
    rows: Annotated[int, typer.Option("--rows", min=1, help="Of the micro-batch.")] = 2048,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=2, help="Ids.")] = 49152,
    width: Annotated[int, typer.Option("--width", min=1, help="Of hidden states.")] = 576,
    labels: Annotated[list[str] | None, typer.Option("--labels", help="Kinds; several; all if none.")] = None,
    loss: Annotated[list[str] | None, typer.Option("--loss", help="Divergences; several; all if none.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """CPU time and peak memory of the loss with its gradients, every divergence with every encoding, in turns with the
    plain formula and Liger's chunked loss."""
    from rich.console import Console

    from benchmarks.cells import divergences, encodings
    from benchmarks.losses import LossPlan
    from benchmarks.losses import losses as measure

    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is neither float32 nor bfloat16", param_hint="--dtype")
    known = {"labels": {one.kind for one in encodings()}, "loss": {one.loss for one in divergences()}}
    for option, given in (("labels", labels), ("loss", loss)):
        if unknown := set(given or ()) - known[option]:
            text = f"{min(unknown)!r} is none of {', '.join(sorted(known[option]))}"
            raise typer.BadParameter(text, param_hint=f"--{option}")
    kinds, chosen = tuple(labels or ()), tuple(loss or ())
    if chosen and "forward_kl" not in chosen:
        chosen = ("forward_kl", *chosen)  # what the others are compared with
    plan = LossPlan(rows, vocabulary, width, rounds, kinds, losses=chosen, dtype=dtype)
    result = measure(plan, note=_note)
    Console(width=max(Console().width, 100)).print(result.table())
    write_numbers(out, result.to_json())


@app.command(epilog="Example: python -m benchmarks exactness, then python docs/exactness_table.py > docs/exactness.md")
def exactness(
    teacher: Teacher = Path(".cache/models/smollm2-135m-instruct"),
    student: Student = Path(".cache/models/smollm2-135m-20-layers"),
    texts: Annotated[int, typer.Option("--texts", min=1, help="Held-out rows of the demo.")] = 16,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Of each text, spread over its answer.")] = 8,
    labels: Annotated[
        list[str] | None, typer.Option("--labels", help="Kinds; several; others stay as the file has them.")
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option("--loss", help="Terms; several; others stay as the file has them.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Written as JSON.")] = Path("docs/exactness.json"),
) -> None:
    """How far value and gradient of every divergence with every encoding are from those over the whole vocabulary."""
    from benchmarks.exactness import ExactnessPlan
    from benchmarks.exactness import exactness as measure

    wanted = {"kinds": tuple(labels or ()), "losses": tuple(loss or ())}
    plan = ExactnessPlan(teacher, student, Path("configs/data/demo_eval.jsonl"), texts, rows, **wanted)
    found = measure(plan, note=_note)
    if labels or loss:
        before = json.loads(out.read_text(encoding="utf-8"))["cells"]
        found["cells"] = before | {kind: before.get(kind, {}) | cells for kind, cells in found["cells"].items()}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _note(f"written: {out}")


@app.command(
    epilog="Example: python -m benchmarks learning --steps 20 --cell 'topk 64, forward_kl' --out learning.json"
)
def learning(
    teacher: Teacher = Path(".cache/models/smollm2-135m-instruct"),
    student: Student = Path(".cache/models/smollm2-135m-20-layers"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each run.")] = 30,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Of a step.")] = 4,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Rows that measure.")] = 32,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each cell.")] = 3,
    cell: Annotated[
        list[str] | None, typer.Option("--cell", help="By name, such as 'topk 64, forward_kl'; several; else all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Goes on where it was.")] = Path("learning.json"),
) -> None:
    """What a student has learnt after equal steps, under each encoding and each divergence; hours on two cores."""
    from benchmarks.learning import LearningPlan, cells
    from benchmarks.learning import learning as measure
    from cluster.placement.hardware import Hardware

    known = {one.name: one for one in cells()}
    if unknown := [name for name in cell or () if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--cell")
    wanted = [known[name] for name in cell] if cell else list(known.values())
    rows = (Path("configs/data/demo_train.jsonl"), Path("configs/data/demo_eval.jsonl"))
    plan = LearningPlan(
        teacher=teacher,
        student=student,
        train=rows[0],
        held_out=rows[1],
        steps=steps,
        sequences_per_step=sequences,
        learning_rate=7e-4,
        warmup_steps=min(3, steps),
        num_held_out=held_out,
        max_length=256,
        dtype="bfloat16" if Hardware.local().nodes[0].cpu_has_amx_bf16 else "float32",
    )
    measure(plan, range(seeds), wanted, out, note=_note)
    _note(f"written: {out}")


@app.command(epilog="Example: python -m benchmarks draft runs/demo .cache/models/smollm2-135m-instruct")
def draft(
    student: Annotated[
        Path, typer.Argument(metavar="RUN_OR_STUDENT", exists=True, file_okay=False, help="Run or model folder.")
    ],
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", exists=True, file_okay=False, help="Model folder.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", exists=True, dir_okay=False, help="JSON lines with `prompt`.")
    ] = Path("configs/data/demo_eval.jsonl"),
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Of the file, from its beginning.")] = 32,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", min=1, help="The student writes at a time.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 64,
    out: Out = None,
) -> None:
    """How many tokens a student saves its teacher as the draft model of speculative decoding in vLLM.

    Of a run folder the student before training is measured too, as a control.
    """
    from rich.console import Console

    from benchmarks.draft import DraftPlan
    from benchmarks.draft import draft as measure

    plan = DraftPlan(student, teacher, prompts, num_prompts, draft_tokens, max_new_tokens)
    with _work_folder() as work:
        result = measure(plan, work, note=_note)
    Console(width=max(Console().width, 120)).print(result.table())
    write_numbers(out, result.to_json())


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


if __name__ == "__main__":
    from launch.cli import run_app

    run_app(app, name="python -m benchmarks")
