"""Arms: what each changes, what must stay equal, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kava.train import TrainSettings
from kava.train.arms import ARMS, CompareSettings
from kava.train.compare import Trained, summarise
from kava.train.heldout import Heldout

BASE = TrainSettings.model_validate({"alpha": 2.0, "loss": "cosine", "max_steps": 60, "seed": 9, "name": "mine"})


def settings(arm: Any, base: TrainSettings = BASE, seed: int = 3) -> TrainSettings:
    """Of an arm beside a baseline."""
    found = CompareSettings.model_validate({"arms": ["none", arm]}).resolve(base)[1]
    return found.settings(base, seed, 5)


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ("kv", {"alpha": 2.0, "loss": "cosine", "key_weight": 1.0, "value_weight": 1.0}),
        ("keys", {"alpha": 2.0, "key_weight": 1.0, "value_weight": 0.0}),
        ("values", {"alpha": 2.0, "key_weight": 0.0, "value_weight": 1.0}),
        ("shuffled", {"alpha": 2.0, "loss": "cosine"}),
        ("random", {"alpha": 2.0, "loss": "cosine"}),
        ({"mine": {"alpha": 7, "loss": "mse"}}, {"alpha": 7.0, "loss": "mse"}),
        ({"kv": {"alpha": 9}}, {"alpha": 9.0, "loss": "cosine"}),
    ],
)
def test_an_arm_is_the_recipes_training_with_something_changed(arm: Any, wanted: dict[str, Any]) -> None:
    found = settings(arm)
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert (found.max_steps, found.batch_size, found.seed, found.eval_steps) == (60, BASE.batch_size, 3, 5)
    assert found.name.endswith("-3")


def test_an_arm_without_kv_does_not_know_of_its_settings() -> None:
    (none, _) = CompareSettings.model_validate({"arms": ["none", "kv"]}).resolve(BASE)
    other = BASE.model_copy(update={"loss": "mse", "key_weight": 3.0})
    assert none.settings(BASE, 0, 5) == none.settings(other, 0, 5)
    assert not none.settings(BASE, 0, 5).with_kv


def test_a_list_and_a_mapping_are_the_same() -> None:
    listed = CompareSettings.model_validate({"arms": ["none", {"mine": {"alpha": 3}}, "kv"]})
    mapped = CompareSettings.model_validate({"arms": {"none": None, "mine": {"alpha": 3}, "kv": {}}})
    assert listed == mapped
    assert list(listed.arms) == ["none", "mine", "kv"]


def test_the_targets_of_an_arm() -> None:
    arms = ["none", "kv", "shuffled", "random", {"mine": {"targets": "shuffled", "alpha": 4}}]
    found = CompareSettings.model_validate({"arms": arms}).resolve(BASE)
    assert [arm.targets for arm in found] == ["true", "true", "shuffled", "random", "shuffled"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"arms": ["none", "shufled"]}, "did you mean 'shuffled'"),
        ({"arms": ["none", "kv"], "baseline": "shuffled"}, "is none of the arms"),
        ({"arms": ["none", "kv"], "seeds": [1, 1]}, "a seed is there twice"),
        ({"arms": ["none", "none"]}, "is there twice"),
        ({"arms": ["none", 7]}, "an arm is a name"),
        ({"arms": ["none", {"../x": {"alpha": 1}}]}, "it names files"),
        ({"arms": ["none"]}, "at least 2"),
    ],
)
def test_sections_that_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CompareSettings.model_validate(section)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"mine": {"max_steps": 9}}, "compare.arms.mine.max_steps: is the same in all arms"),
        ({"mine": {"ce_segments": ["answer"]}}, "is the same in all arms"),
        ({"mine": {"arguments": {"data_seed": 7}}}, "compare.arms.mine.arguments.data_seed: is the same in all arms"),
        ({"mine": {"arguments": {"per_device_train_batch_size": 2}}}, "per_device_train_batch_size: is the same"),
        ({"kv": {"arguments": {"max_steps": 3}}}, "arguments.max_steps: is the same in all arms"),
        ({"mine": {"arguments": {"seed": 3, "adam_beta1": 0.8}}}, "arguments.seed: is the same in all arms"),
        ({"mine": {"alfa": 1}}, "did you mean 'alpha'"),
        ({"mine": {"targets": "other"}}, "is none of true, shuffled"),
    ],
)
def test_overrides_that_are_refused(arm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(arm)


def test_an_arm_that_was_looked_at_more_often_is_not_earlier_by_that() -> None:
    section = CompareSettings.model_validate({"arms": ["none", "kv"], "seeds": [0, 1]})
    curves = {
        ("none", 0): [(4, 5.0), (8, 3.0)],
        ("none", 1): [(4, 5.0), (8, 3.0)],
        ("kv", 0): [(2, 2.9), (4, 2.8), (6, 2.7), (8, 2.6)],
        ("kv", 1): [],  # Its log was lost.
    }
    heldout = Heldout(["a", "b"], [3.0, 4.0], [2, 2], [9, 9], {})
    trained = [Trained(arm, seed, Path(f"{arm}-{seed}"), heldout, curve, {}) for (arm, seed), curve in curves.items()]
    found = summarise(trained, section.resolve(BASE), section)
    assert found["curve_steps"] == [4, 8]
    assert found["arms"]["kv"]["steps_to_baseline"] == {"0": 4, "1": None}
    assert [point["step"] for point in found["arms"]["kv"]["curve"]] == [4, 8]
    assert found["arms"]["kv"]["runs"][0]["curve"] == curves["kv", 0]
    assert summarise(trained[2:3], section.resolve(BASE), section)["curve_steps"] == [2, 4, 6, 8]


def test_an_arm_may_have_arguments_that_leave_it_equal() -> None:
    base = BASE.model_copy(update={"arguments": {"data_seed": 7, "adam_beta1": 0.9}})
    assert settings({"mine": {"arguments": {"data_seed": 7, "adam_beta1": 0.8}}}, base).arguments["adam_beta1"] == 0.8
    assert settings({"mine": {"alpha": 3}}, base).arguments == base.arguments
    with pytest.raises(ValueError, match=r"data_seed: is the same .* must repeat"):
        settings({"mine": {"arguments": {"adam_beta1": 0.8}}}, base)


@pytest.mark.parametrize("arm", [name for name, kind in ARMS.items() if kind.kv and not kind.logits])
def test_an_arm_with_kv_needs_a_weight(arm: str) -> None:
    plain = TrainSettings.model_validate({"alpha": 0})
    with pytest.raises(ValueError, match=r"train\.alpha above 0"):
        settings(arm, plain)
    assert settings({arm: {"alpha": 1}}, plain).with_kv
