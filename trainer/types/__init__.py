"""The values that travel between the stations of the line, all frozen.

Dims used in shape comments, here and everywhere:

    L  tokens of one sequence        T  tokens of one packed micro-batch     S  sequences
    N  label rows                    V  entries of the shared, true vocabulary (never the padded one)
    K  kept ids of a row             H  hidden width                          E  events of a pair

The shift, stated once: row i of anything `[L]` belongs to the logits *after* token i, that is to the prediction of
token i + 1. `loss_mask[i]` therefore says whether the prediction of token i + 1 counts, and `loss_mask[L - 1]` is
always False. Engines shift what they return to this convention; nobody downstream shifts again.
"""

from trainer.types.cursor import (
    AnswerCounters,
    Cursor,
    StreamCounters,
    StreamPlace,
)
from trainer.types.generation import (
    Completion,
    FinishReason,
    GenerationRequest,
    Sampling,
    sample_seed,
    sequence_id,
)
from trainer.types.labels import (
    BlockRef,
    LabelHeader,
    PairedLogProbs,
    RowIds,
    RowIdsRef,
    SoftLabelBlock,
    StoreUse,
    Unit,
    UnitReport,
    hash_tokens,
)
from trainer.types.steps import (
    BatchPart,
    Evaluation,
    RankBatch,
    SampleTokens,
    StepMetrics,
    StepPlan,
    StudentPlan,
    TaskTotals,
    TokenBatch,
    Trained,
)
from trainer.types.texts import (
    WRITTEN,
    Collected,
    Coverage,
    Prompt,
    Reading,
    RowText,
    Sequence,
    tokens_to_read,
)
from trainer.types.weights import (
    BucketHeader,
    BucketRef,
    Probe,
    WeightBucket,
    WeightForm,
    probe_gap,
)

__all__ = [
    "WRITTEN",
    "AnswerCounters",
    "BatchPart",
    "BlockRef",
    "BucketHeader",
    "BucketRef",
    "Collected",
    "Completion",
    "Coverage",
    "Cursor",
    "Evaluation",
    "FinishReason",
    "GenerationRequest",
    "LabelHeader",
    "PairedLogProbs",
    "Probe",
    "Prompt",
    "RankBatch",
    "Reading",
    "RowIds",
    "RowIdsRef",
    "RowText",
    "SampleTokens",
    "Sampling",
    "Sequence",
    "SoftLabelBlock",
    "StepMetrics",
    "StepPlan",
    "StoreUse",
    "StreamCounters",
    "StreamPlace",
    "StudentPlan",
    "TaskTotals",
    "TokenBatch",
    "Trained",
    "Unit",
    "UnitReport",
    "WeightBucket",
    "WeightForm",
    "hash_tokens",
    "probe_gap",
    "sample_seed",
    "sequence_id",
    "tokens_to_read",
]
