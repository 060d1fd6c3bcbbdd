"""The models of a run: where they come from, on which nodes their processes sit, and how they are held there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, JsonValue, PositiveFloat, field_validator, model_validator

from configs.engines import AnyEngine, Hf, Vllm
from configs.paths import expand_home, with_known_home
from configs.refusal import refusal
from configs.section import HUB_NAME, NAME, Bytes, DType, Positive, Section

LABEL_NAME = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
COMMIT = r"[0-9a-f]{40}"


class ModelSource(Section):
    """Where a model comes from."""

    path: str = Field(min_length=1, description="Local folder in Hugging Face format, or a hub name.")
    revision: str | None = Field(None, description="Hub revision (branch, tag, commit); None for local folders.")
    trust_remote_code: bool = Field(False, description="Run code shipped with this model. Off unless named per model.")
    licence: str | None = Field(None, description="SPDX id or name of the licence, written into the model card.")
    local_copy: Path | None = Field(
        None, description="Folder on a disk of each node: the model is copied there once, and read from there."
    )

    @field_validator("path")
    @classmethod
    def _home_is_a_folder(cls, path: str) -> str:
        return str(expand_home(path)) if path.startswith("~") else with_known_home(path)

    @field_validator("local_copy")
    @classmethod
    def _copy_has_a_home(cls, folder: Path | None) -> Path | None:
        return folder if folder is None else Path(with_known_home(str(folder)))

    @model_validator(mode="after")
    def _foreign_code_is_pinned(self) -> ModelSource:
        looks_like_hub = re.fullmatch(HUB_NAME, self.path) is not None
        if self.trust_remote_code and looks_like_hub and not re.fullmatch(COMMIT, self.revision or ""):
            text = (
                "trust_remote_code runs whatever the hub holds on that day: name the commit that you have read, "
                f"revision: <40 hexadecimal digits>; or, where {self.path} is a local folder, write path: ./{self.path}"
            )
            raise refusal(("revision",), self.revision, text)
        return self


class Constraints(Section):
    """On which nodes the processes of a role may sit. Without it: wherever there is room, close together."""

    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack",
        description="pack: few nodes; spread: many; strict_pack: one node or an error; strict_spread: a node each. Of "
        "student ranks among each other, of a teacher's replicas among each other.",
    )
    accelerator_type: str | None = Field(None, min_length=1, description="Ray's name of a kind of GPU, such as H100.")
    node_labels: dict[Annotated[str, Field(pattern=LABEL_NAME)], Annotated[str, Field(pattern=LABEL_VALUE)]] = Field(
        {}, description="Labels that a node must have, as given to `ray start --labels`."
    )
    nodes: Positive | None = Field(None, description="Exactly so many nodes; None: as many as it takes.")

    @model_validator(mode="after")
    def _strict_pack_is_one_node(self) -> Constraints:
        if self.strategy == "strict_pack" and self.nodes not in (None, 1):
            text = "strategy: strict_pack means one node: write nodes: 1, or another strategy"
            raise refusal(("nodes",), self.nodes, text)
        return self

    def check_members(self, members: int, noun: str) -> None:
        """Raises the refusal of a number of nodes that `members` processes cannot fill."""
        if self.nodes is None:
            return
        if self.nodes > members:
            text = f"is more than the {members} {noun}, and every node needs one: write at most {members}"
            raise refusal(("placement", "nodes"), self.nodes, text)
        if self.strategy == "strict_spread" and self.nodes != members:
            text = f"strategy: strict_spread gives each of the {members} {noun} a node: write nodes: {members}"
            raise refusal(("placement", "nodes"), self.nodes, text)


class LoRA(Section):
    """Low-rank adapters (arXiv 2106.09685) through peft."""

    rank: Positive = Field(16, description="Inner width of an adapter.")
    alpha: PositiveFloat = Field(32.0, description="An adapter is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Of the input of an adapter.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the layers that get an adapter."
    )


class Trained(NamedTuple):
    """Which weights of a student learn: adapters, or all but the frozen ones."""

    lora: LoRA | None = None
    freeze: tuple[str, ...] = ()

    @property
    def everything(self) -> bool:
        return self.lora is None and not self.freeze


EVERYTHING = Trained()


class Student(Section):
    """The model that learns, and how DeepSpeed shards it."""

    model: ModelSource
    ranks: Positive = Field(1, description="Training processes; one GPU each on GPU nodes, one core each on CPU.")
    dtype: DType = Field("auto", description="auto: bfloat16 on GPUs and on CPUs with amx_bf16, else float32.")
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="What is sharded over ranks: 1 optimizer states, 2 gradients too, 3 parameters too."
    )
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = Field(
        "none", description="Keep ZeRO state in host memory. parameters need zero_stage 3."
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "varlen"] = Field(
        "auto", description="auto: the fastest packed attention this device offers (trainer/model/attention.py)."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, slower."
    )
    lora: LoRA | None = Field(None, description="Train adapters alone; None: all weights.")
    freeze: tuple[str, ...] = Field(
        (), description="Weights that stay as they are: embeddings, or names in the model, as model.layers.0.*"
    )
    loss_chunk_rows: Positive = Field(512, description="Rows whose logits exist at once; bounds loss memory.")
    compile_loss: bool = Field(
        True, description="On accelerators, fuse the element-wise part of the loss (torch.compile)."
    )
    placement: Constraints = Constraints()

    @model_validator(mode="after")
    def _every_node_has_a_rank(self) -> Student:
        self.placement.check_members(self.ranks, "ranks")
        return self

    @property
    def trained(self) -> Trained:
        return Trained(self.lora, self.freeze)

    @model_validator(mode="after")
    def _adapters_freeze_the_rest(self) -> Student:
        if self.lora is not None and self.freeze:
            text = "goes without saying: lora trains adapters alone; remove one of the two"
            raise refusal(("freeze",), list(self.freeze), text)
        return self

    @model_validator(mode="after")
    def _offload_needs_stage_three(self) -> Student:
        if self.offload == "optimizer_and_parameters" and self.zero_stage != 3:
            text = f"needs zero_stage: 3, here it is {self.zero_stage}; write zero_stage: 3 or offload: optimizer"
            raise refusal(("offload",), self.offload, text)
        return self


class Replicas(Section):
    """Engine processes of one kind that share the work."""

    engine: AnyEngine = Field(Vllm(), description="The software that runs the model.")
    replicas: Positive = Field(1, description="Copies of the model, which share the work by tokens.")
    tensor_parallel_size: Positive = Field(1, description="Devices that hold one copy together.")
    dtype: DType = Field("auto", description="auto: bfloat16 on GPUs and on CPUs with amx_bf16, else float32.")
    placement: Constraints = Constraints()
    may_span_nodes: bool = Field(
        False, description="Let one copy be split over nodes where it is larger than each; the network then slows it."
    )

    @model_validator(mode="after")
    def _every_node_has_a_replica(self) -> Replicas:
        if self.may_span_nodes and self.placement.nodes is not None:
            text = "counts whole replicas a node, and may_span_nodes: true splits them; remove one of the two"
            raise refusal(("placement", "nodes"), self.placement.nodes, text)
        self.placement.check_members(self.replicas, "replicas")
        return self

    @model_validator(mode="after")
    def _hf_is_one_device(self) -> Replicas:
        if isinstance(self.engine, Hf) and self.tensor_parallel_size != 1:
            text = "engine hf runs on one device: write tensor_parallel_size: 1, or engine: vllm"
            raise refusal(("tensor_parallel_size",), self.tensor_parallel_size, text)
        return self


class Generator(Replicas):
    """Engine processes that write, or engines that write in the processes that judge."""

    beside_scorer: bool = Field(
        False,
        description="Without GPUs: write in the scorer's processes, with the weights that are there, which saves a "
        "process and its memory; both engines take turns. Where that cannot be, the run says so and starts its own.",
    )


class Rollouts(Replicas):
    """Engine processes that hold the student and write, for tasks with `answers: student`.

    After every `sync_every` optimizer steps they take in the student's weights, and a fixed text is then scored by
    both: where they differ by more than their dtypes explain, the run ends. The text of a step is at most
    `training.depth` + `sync_every` - 1 steps old when it is trained.
    """

    sync_every: Positive = Field(1, description="Optimizer steps between two transfers of the weights.")
    bucket_bytes: Bytes = Field(64 * 2**20, description="Of weights that travel together, about.")
    max_probe_gap: float | None = Field(
        None,
        gt=0,
        description="Mean difference of log-probabilities, in nats, by which an engine may differ from the student on "
        "a fixed text; None: what the dtypes explain.",
    )


class Teacher(Section):
    """The model that judges, and writes if asked."""

    name: str = Field("teacher", pattern=NAME, description="In metrics; under teachers it is the key.")
    model: ModelSource
    chat_template: str | None = Field(None, description="Path of a jinja file; None: the teacher's own template.")
    template_arguments: dict[str, JsonValue] = Field(
        {},
        description="Variables handed to the chat template wherever it is rendered, such as {enable_thinking: false}; "
        "those of a row (chat_template_kwargs) win.",
    )
    scorer: Replicas = Field(default_factory=Replicas)
    generator: Generator | None = Field(None, description="Needed where the teacher writes answers.")

    @field_validator("chat_template")
    @classmethod
    def _template_has_a_home(cls, path: str | None) -> str | None:
        return path if path is None else with_known_home(path)

    def roles(self) -> dict[str, Replicas]:
        """The replicas by role, `scorer` first."""
        return {"scorer": self.scorer} | ({} if self.generator is None else {"generator": self.generator})
