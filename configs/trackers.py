"""Trackers: where the numbers of a run go beside its own folder. One class of parameters per kind.

`kind: wandb` is `launch/trackers/wandb.py`, whose class `Tracker` has these fields. Keys and passwords are no fields:
each library takes them from the environment, or from where its own login command put them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from configs.paths import expand_home
from configs.refusal import refusal
from configs.stations import Choice, Station

DEFAULT_PROJECT = "stillhouse"


class TrackerChoice(Choice):
    """Base of all trackers, those of a user's included."""

    extra: ClassVar[str | None] = None
    """The module of the library that is needed, and of our extra that installs it."""
    described_by: ClassVar[frozenset[str]] = frozenset()
    """Fields that say nothing of where the numbers go: a run that goes on with others of them keeps its curves."""

    def destination(self) -> dict[str, Any]:
        """What decides where the numbers go, as plain values."""
        return {name: value for name, value in self.flat().items() if name not in self.described_by}


class TensorBoard(TrackerChoice):
    """Event files, for `tensorboard --logdir`."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: Path | None = Field(None, description="Of the event files; default tensorboard/ in the run folder.")

    extra: ClassVar[str | None] = "tensorboard"

    @field_validator("folder")
    @classmethod
    def _folder_has_a_home(cls, folder: Path | None) -> Path | None:
        return folder if folder is None else expand_home(folder)


class Wandb(TrackerChoice):
    """Weights & Biases, the service or a server of your own (WANDB_BASE_URL, WANDB_API_KEY)."""

    kind: Literal["wandb"] = "wandb"
    project: str | None = Field(None, min_length=1, description="Default: WANDB_PROJECT, else stillhouse.")
    entity: str | None = Field(None, min_length=1, description="User or team; default: WANDB_ENTITY, else your own.")
    group: str | None = Field(None, min_length=1, description="Runs that are shown together.")
    tags: tuple[str, ...] = Field((), description="Words to find the run by.")
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="offline: written to wandb/ in the run folder, for `wandb sync`; default: WANDB_MODE, else online.",
    )

    extra: ClassVar[str | None] = "wandb"
    described_by: ClassVar[frozenset[str]] = frozenset({"group", "tags"})


class Mlflow(TrackerChoice):
    """An MLflow server, or a database file."""

    kind: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = Field(
        None,
        min_length=1,
        description="http(s)://host:port or sqlite:///file; default: MLFLOW_TRACKING_URI, else mlflow.db in the folder "
        "of the run.",
    )
    experiment: str | None = Field(None, min_length=1, description="Default: MLFLOW_EXPERIMENT_NAME, else stillhouse.")
    tags: dict[str, str] = Field({}, description="Of the run.")

    extra: ClassVar[str | None] = "mlflow"
    described_by: ClassVar[frozenset[str]] = frozenset({"tags"})


class Trackio(TrackerChoice):
    """Trackio: files of this machine (TRACKIO_DIR), a Space of the Hugging Face hub, or a server of your own."""

    kind: Literal["trackio"] = "trackio"
    project: str = Field(DEFAULT_PROJECT, min_length=1, description="Runs that are shown together.")
    group: str | None = Field(None, min_length=1, description="Of runs in the project.")
    space_id: str | None = Field(
        None, min_length=1, description="user/name of a Space, made where there is none (HF_TOKEN)."
    )
    server_url: str | None = Field(None, min_length=1, description="Of a server of yours (TRACKIO_WRITE_TOKEN).")

    extra: ClassVar[str | None] = "trackio"
    described_by: ClassVar[frozenset[str]] = frozenset({"group"})

    @field_validator("server_url")
    @classmethod
    def _one_place(cls, server_url: str | None, info: Any) -> str | None:
        if server_url is not None and info.data.get("space_id") is not None:
            raise refusal((), server_url, "space_id is given too; keep one of space_id and server_url")
        return server_url


TRACKERS = Station(
    TrackerChoice,
    (TensorBoard, Wandb, Mlflow, Trackio),
    package="launch.trackers",
    class_name="Tracker",
    members=("reach", "begin"),
    contract="launch/trackers/protocol.py",
)
AnyTracker = Annotated[TrackerChoice, TRACKERS]
