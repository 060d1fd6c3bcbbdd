"""The model card: front matter a hub can read, and nothing that the run does not know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from configs.schema import Run
from launch.report.metrics import Records
from launch.report.model_card import NOT_STATED, is_hub_name, model_card, public_name
from trainer.types import Evaluation, StepMetrics


def run(**changes: Any) -> Run:
    fields: dict[str, Any] = {
        "name": "small-one",
        "student": {"model": {"path": "/home/somebody/secret/student-20", "licence": "Apache-2.0"}},
        "teacher": {"model": {"path": "owner/Large-Instruct", "licence": "llama3.3"}},
        "prompts": {"path": "owner/prompts"},
        "data": {"evaluation": {"path": "/data/held_out.jsonl"}},
        "objective": [{"loss": "forward_kl", "weight": 0.9}, {"loss": "jsd", "beta": 0.5}],
        "training": {"steps": 100},
    }
    return Run.model_validate(fields | changes)


def evaluation(step: int, kl: float) -> Evaluation:
    return Evaluation(step=step, num_rows=2310, forward_kl=kl, agreement=0.5, perplexity=12.0, teacher_perplexity=8.0)


RECORDS = Records(
    steps=(StepMetrics(100, {"train/loss": 1.0}),), evaluations=(evaluation(0, 6.31), evaluation(100, 1.05)), events=()
)
MANIFEST = {"versions": {"torch": "2.13.0"}, "counters": {"trained_tokens": 33_000, "trained_loss_tokens": 22_000}}


def front_matter(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    return YAML(typ="safe").load(front)


def test_the_card_says_what_the_student_puts_on_ids_that_do_not_exist_where_it_is_noticeable() -> None:
    before, after = (
        replace(e, padding_mass=mass) for e, mass in zip(RECORDS.evaluations, (0.054, 0.0002), strict=True)
    )
    card = model_card(run(), manifest=MANIFEST, records=replace(RECORDS, evaluations=(before, after)))
    assert "| probability on ids that do not exist | 5.40% | 0.02% |" in card
    assert "ids that do not exist" not in model_card(run(), manifest=MANIFEST, records=RECORDS)


def test_the_card_says_what_became_of_written_answers() -> None:
    counters = {"answers_written": 1200, "answers_empty": 3, "answers_cut_off": 40, "answers_dropped": 3}
    card = model_card(run(), manifest={"counters": counters}, records=RECORDS)
    assert "| answers of the teacher | 1,200 written, 3 empty, 40 cut off, 3 dropped |" in card
    assert "answers of the teacher" not in model_card(run(), manifest=MANIFEST, records=RECORDS)


def test_the_card_says_what_the_chat_template_was_given() -> None:
    teacher = {"model": {"path": "owner/big"}, "template_arguments": {"enable_thinking": False, "effort": "low"}}
    card = model_card(run(teacher=teacher), manifest=MANIFEST, records=RECORDS)
    assert '| variables of the chat template | enable\\_thinking=false, effort="low" |' in card
    assert "variables of the chat" not in model_card(run(), manifest=MANIFEST, records=RECORDS)


def test_the_card_names_teacher_data_settings_and_quality() -> None:
    card = model_card(run(), manifest=MANIFEST, records=RECORDS)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["owner/prompts"],
        "tags": ["distillation", "knowledge-distillation", "stillhouse"],
        "model-index": [
            {
                "name": "small-one",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "held_out.jsonl", "type": "held_out.jsonl"},
                        "metrics": [
                            {"type": "forward_kl", "value": 1.05},
                            {"type": "agreement", "value": 0.5},
                            {"type": "perplexity", "value": 12.0},
                        ],
                    }
                ],
            }
        ],
    }
    for line in (
        "| teacher | owner/Large-Instruct | llama3.3 |",
        "| base of the student | student-20 | Apache-2.0 |",
        "| KL(teacher, student), nats per token | 6.310 | 1.050 | 0 |",
        "| perplexity | 12.00 | 12.00 | 8.00 |",
        "| objective | 0.9 x forward\\_kl + jsd (beta 0.5) |",
        "| tokens trained | 33,000 |",
        "- training: owner/prompts, split train; licence not stated",
        "- held out: held\\_out.jsonl, split train; licence not stated",
        "Made with torch 2.13.0.",
    ):
        assert line in card.splitlines()


def test_the_rows_of_every_task_are_training_data() -> None:
    objective = [{"loss": "forward_kl"}]
    tasks = {name: {"prompts": {"path": f"owner/{name}"}, "objective": objective} for name in ("chat", "code")}
    fields = run().model_dump(exclude={"prompts", "objective"}, exclude_unset=True)
    card = model_card(Run.model_validate(fields | {"tasks": tasks}), manifest={}, records=RECORDS)
    lines = [line.split(",")[0] for line in card.splitlines() if line.startswith(("- training", "- held out"))]
    assert lines == ["- training: owner/chat", "- training: owner/code", "- held out: held\\_out.jsonl"]


def test_the_card_says_how_well_each_task_is_learned_and_names_its_rows() -> None:
    several = run(
        tasks={"chat": {}, "sft": {"labels": "none", "objective": [{"loss": "cross_entropy"}]}},
        data={"evaluation": {"path": "owner/held-out"}},
    )
    alone = Evaluation(0, 10, None, None, 30.0, None)
    tasks = [{"chat": evaluation(0, 6.5), "sft": alone}, {"chat": evaluation(100, 1.5), "sft": alone}]
    evaluations = tuple(replace(e, tasks=t) for e, t in zip(RECORDS.evaluations, tasks, strict=True))
    card = model_card(several, manifest=MANIFEST, records=replace(RECORDS, evaluations=evaluations))
    for line in (
        "| all tasks: KL(teacher, student), nats per token | 6.310 | 1.050 | 0 |",
        "| chat: KL(teacher, student), nats per token | 6.500 | 1.500 | 0 |",
        "| sft: perplexity | 30.00 | 30.00 |  |",
        "- held out: owner/held-out, split train; licence not stated",
    ):
        assert line in card.splitlines()
    assert "sft: KL" not in card
    (model,) = front_matter(card)["model-index"]
    assert [(one["dataset"]["config"], len(one["metrics"])) for one in model["results"]] == [("chat", 3), ("sft", 1)]


def test_a_card_does_not_tell_where_files_lay() -> None:
    card = model_card(run(), manifest={}, records=RECORDS)
    assert "somebody" not in card
    assert "/data" not in card


def test_an_unknown_licence_is_said_to_be_unknown() -> None:
    unknown = run(student={"model": {"path": "owner/base"}}, teacher={"model": {"path": "owner/Large"}})
    card = model_card(unknown, manifest={}, records=RECORDS)
    assert "license" not in front_matter(card)
    assert front_matter(card)["base_model"] == "owner/base"
    assert f"| teacher | owner/Large | {NOT_STATED} |" in card
    assert "A licence above was not stated" in card
    found = model_card(unknown, manifest={}, records=RECORDS, licences={"student": "mit", "teacher": "mit"})
    assert front_matter(found)["license"] == "mit"
    assert "A licence above" not in found


def test_a_licence_the_hub_does_not_list_keeps_its_name() -> None:
    own = run(student={"model": {"path": "owner/base", "licence": "Our Own Licence: v1"}})
    front = front_matter(model_card(own, manifest={}, records=RECORDS))
    assert (front["license"], front["license_name"]) == ("other", "Our Own Licence: v1")


def test_the_distance_from_a_reference_is_not_called_closeness_to_a_teacher() -> None:
    close, far = "how close the student is to its teacher", "how far\nthe student has moved away from it"
    pairs = {"labels": "token", "objective": [{"loss": "dpo"}]}
    both = {"tasks": {"pairs": pairs, "chat": {}}}
    for changes, said in (({}, {close}), (pairs, {far}), (both, {close, far})):
        card = model_card(run(**changes), manifest=MANIFEST, records=RECORDS)
        assert {text for text in (close, far) if text in card} == said


def test_terms_on_features_are_named_with_their_layers() -> None:
    term = {"loss": "features", "student_layer": 4, "teacher_layer": 8, "projector": "linear", "weight": 0.5}
    own = run(labels={"kind": "hidden", "layers": [8]}, objective=[{"loss": "forward_kl"}, term])
    card = model_card(own, manifest=MANIFEST, records=RECORDS)
    told = "0.5 x features (distance l2, student_layer 4, teacher_layer 8, projector linear, normalised, temperature 1)"
    assert told in card.replace("\\", "")


def test_a_run_without_evaluation_claims_no_quality() -> None:
    card = model_card(run(), manifest={}, records=Records((), (), ()))
    assert "It was not evaluated" in card
    assert "before | after" not in card


def test_names_cannot_break_out_of_their_cell() -> None:
    bad = run(teacher={"model": {"path": "a | b\n# <script>x</script>"}})
    card = model_card(bad, manifest={}, records=RECORDS)
    assert "\n# <script>" not in card
    assert "<script>" not in card.replace("\\<script\\>", "")


def test_an_adapter_says_what_it_needs() -> None:
    lora = run(student={"model": {"path": "owner/base"}, "lora": {"rank": 8}})
    card = model_card(lora, manifest={}, records=RECORDS, adapter=True)
    assert front_matter(card)["library_name"] == "peft"
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "AutoPeftModelForCausalLM" in card
    assert "| LoRA | rank 8, alpha 32 |" in card


def test_a_folder_is_no_hub_name(tmp_path: Path) -> None:
    assert is_hub_name("owner/name")
    assert not is_hub_name(str(tmp_path))
    assert not is_hub_name("./owner/name")
    assert public_name("models/deep/er") == "er"
