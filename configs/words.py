"""Keys that people write and that are none here: words of other trainers, of older versions, and what is no setting.

Advice that is wrong is worse than none: tests follow every word.
"""

OTHER_WORDS = {
    "answers.max_tokens": "max_new_tokens",
    "answers.num_return_sequences": "n",
    "answers.num_samples": "n",
    "answers.stop_strings": "stop",
    "batch_size": "sequences_per_step",
    "cutoff_len": "max_length",
    "eval_dataset": "evaluation",
    "eval_every": "evaluate_every",
    "eval_steps": "evaluate_every",
    "gradient_checkpointing": "activation_checkpointing",
    "license": "licence",
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_model_len": "max_length",
    "model_name_or_path": "path",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "folder",
    "num_gpus": "ranks",
    "r": "rank",
    "student.replicas": "ranks",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "top_k": "k",
    "train_batch_size": "sequences_per_step",
    "train_dataset": "prompts",
    "tp": "tensor_parallel_size",
    **dict.fromkeys(("logger", "mlflow", "report_to", "tensorboard", "trackio", "wandb"), "trackers"),
}
"""Words of other trainers, by key or by whole path, and what is nearest to them here."""

NOT_NEEDED = {
    "api_key": "keys stay out of a configuration; trackers take them from the environment (WANDB_API_KEY, "
    "MLFLOW_TRACKING_TOKEN, HF_TOKEN)",
    "gradient_accumulation_steps": "micro-batches follow from training.micro_batch_tokens and sequences_per_step",
    "optimizer.kind": "the optimizer is AdamW",
    "optimizer.name": "the optimizer is AdamW",
    "optimizer.type": "the optimizer is AdamW",
}
"""What is no setting here, by key or by whole path, and why."""

NEW_SPELLING = {
    "elicitation": "answers, at the top level, and its kinds are dataset (was feature) and teacher (was labeling)",
    "data.train": "prompts, at the top level, with what stood below train",
    "teacher.writer": "generator",
    "report.tensorboard": "trackers: [tensorboard], at the top level",
}
"""Keys of older versions, by whole path, and what to write now."""

MANY_MEANINGS = frozenset({"name", "path", "kind", "model", "format", "revision", "split"})
"""Keys that mean something else in every section: one of another section is meant only where it lies below."""
