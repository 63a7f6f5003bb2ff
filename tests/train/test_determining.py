"""What a student depends on says itself whole: no default that changes later passes for what was trained."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from kava.train import StudentSettings, TrainSettings


class OtherTraining(TrainSettings):
    """The settings of another version, with other defaults."""

    alpha: float | Literal["auto"] = 1.0


class OtherStudent(StudentSettings):
    """The same of a student."""

    seed: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


CONFIG: dict[str, Any] = {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": 300}}


def of(**changes: Any) -> dict[str, Any]:
    return TrainSettings.model_validate(changes).determining()


def test_another_default_is_another_training() -> None:
    other = OtherTraining.model_validate({}).determining()
    assert other != of()
    assert other == of(alpha=1.0)
    student = OtherStudent.model_validate(CONFIG).determining()
    assert student != StudentSettings.model_validate(CONFIG).determining()
    assert student == StudentSettings.model_validate({**CONFIG, "seed": 1, "dtype": "bfloat16"}).determining()


def test_a_default_that_is_stated_is_the_same_training() -> None:
    assert of(alpha="auto", loss="mse", learning_rate=3e-4, layers=None) == of()
    assert StudentSettings.model_validate({**CONFIG, "seed": 0}).determining() == (
        StudentSettings.model_validate(CONFIG).determining()
    )


@pytest.mark.parametrize(
    ("beside", "silent", "heard"),
    [
        ({"alpha": 0}, {"loss": "cosine", "key_weight": 3, "layers": [1]}, {"max_steps": 9}),
        ({"alpha": 2}, {"kv_share": 3, "alpha_steps": 5, "alpha_update_steps": 7}, {"key_weight": 3}),
        ({"alpha": "auto"}, {"magnitude_weight": 3, "relation_heads": 2}, {"kv_share": 3}),
        ({"loss": "cosine_magnitude"}, {"relation_heads": 2}, {"magnitude_weight": 3}),
        ({"loss": "relation"}, {"magnitude_weight": 2}, {"relation_heads": 2}),
        ({}, {"projector_learning_rate": 1e-2}, {"projector": "learned"}),
        ({"projector": "learned"}, {"name": "x", "eval_steps": 3}, {"projector_learning_rate": 1e-2}),
    ],
)
def test_what_says_nothing_makes_nothing_stale(
    beside: dict[str, Any], silent: dict[str, Any], heard: dict[str, Any]
) -> None:
    assert of(**beside, **silent) == of(**beside)
    for key, value in heard.items():
        assert of(**beside, **{key: value}) != of(**beside)


def test_the_seed_of_random_weights_is_not_a_models() -> None:
    found = [StudentSettings(model="some", seed=seed).determining() for seed in (0, 1)]
    assert found[0] == found[1]
    # A model is identified by its content, however the recipe spells it: see `student_origin`.
    assert StudentSettings(model="some", revision="v2").determining() == found[0]
    assert StudentSettings(model="some", dtype="bfloat16").determining() != found[0]
