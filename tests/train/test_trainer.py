"""Training on targets that no teacher made: what is logged, what stops it, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models import tiny_model
from fixtures.stores import write_store

from kava.errors import STOP_SIGNALS, RecipeError, RetryLaterError, StageError, TrainingError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVStore
from kava.tap import KVTap
from kava.train import TrainSettings, load_student, train_student
from kava.train.arguments import OWN_KEYS, REFUSED, training_arguments
from kava.train.callbacks import StopOnSignal
from kava.train.diagnostics import CollapseAlarm, spread_ratio
from kava.train.feed import Feed
from kava.train.losses import LOSSES, KVLoss
from kava.train.ranks import Ranks

LENGTHS = [9, 14, 6, 11, 8, 17, 5, 12, 10]
TIMED = {"tokens_per_second", "data_wait_share", "peak_memory_gib"}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> KVStore:
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    store: KVStore = write_store(
        tmp_path_factory.mktemp("targets") / "t.zarr",
        LENGTHS,
        kind="target",
        geometry=KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8),
        tokenizer_digest=digest,
    )[0]
    return store


@pytest.fixture
def train(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> Train:
    """Trains, and gives the lines of the log."""

    def train(name: str, student: Path | None = None, on_step: Any = None, **changes: Any) -> list[dict[str, Any]]:
        settings = {"max_steps": 4, "alpha": 1.0, "batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, **changes}
        train_student(
            student or tiny_models["student"],
            targets,
            tmp_path / name,
            TrainSettings.model_validate(settings),
            on_step=on_step or (lambda step, total: None),
        )
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return train


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the log that are of training, without what a clock has measured."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines if "ce" in line]


def test_auto_alpha_makes_the_share_and_is_frozen(train: Train) -> None:
    lines = _steps(train("auto", alpha="auto", kv_share=0.25, alpha_steps=2, max_steps=5, measure_steps=1))
    assert lines[0]["kv_gradient_share"] == pytest.approx(0.25)
    assert lines[1]["alpha"] != lines[0]["alpha"]
    assert {line["alpha"] for line in lines[1:]} == {lines[1]["alpha"]}
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["alpha"] * line["kv"], rel=1e-5)
        assert 0.05 < line["kv_gradient_share"] < 1
        assert TIMED.isdisjoint(line)


def test_a_schedule_and_everything_else_in_the_log(train: Train) -> None:
    lines = train("fade", alpha=2, alpha_schedule={"kind": "linear_decay", "steps": 2})
    assert [line["alpha"] for line in lines if "ce" in line] == [2, 1, 0, 0]
    assert [("kv_gradient_share" in line) for line in lines if "ce" in line] == [True, False, False, False]
    first = lines[0]
    assert {"keys_spread_0", "values_spread_2", "grad_norm", *TIMED} <= first.keys()
    assert first["tokens_per_second"] > 0
    assert 0 < first["data_wait_share"] < 1
    assert 0.05 < first["peak_memory_gib"] < 64


def _gradients(checkpointing: bool | None, name: str = "mse") -> tuple[dict[str, torch.Tensor], bool]:
    """Of every layer's key and value projection, from the KV loss alone; None for reentrant checkpointing."""
    model = tiny_model("llama", layers=3, heads=4, kv_heads=2, head_dim=8).train()
    if checkpointing is not False:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing is None})
    generator = torch.Generator().manual_seed(0)
    target = {side: torch.randn(2, 7, 3, 2, 8, generator=generator) for side in ("keys", "values")}
    loss = KVLoss(name, 1, 1, (0, 1, 2), dict.fromkeys(target, (1.0, 1.0, 1.0)))
    with KVTap(model) as tap:
        logits = model(input_ids=torch.arange(14).view(2, 7), use_cache=False).logits
    if checkpointing is None:
        return {}, any(t.requires_grad for t in [*tap.keys.values(), *tap.values.values()])
    mask = torch.rand(2, 7, generator=generator) < 0.8
    term = loss({"keys": tap.keys, "values": tap.values}, target, mask)["kv"]
    (term + 0 * logits.sum()).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if n.split(".")[-2] in ("k_proj", "v_proj")}
    return wanted, True


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_checkpointing_keeps_the_gradient_of_every_layer(name: str) -> None:
    (plain, _), (checkpointed, _) = _gradients(False, name), _gradients(True, name)
    assert len(plain) == 6
    for parameter, gradient in plain.items():
        assert gradient.abs().max() > 1e-6, parameter
        torch.testing.assert_close(checkpointed[parameter], gradient, rtol=1e-5, atol=1e-8)


def test_reentrant_checkpointing_would_lose_it_and_is_refused(train: Train) -> None:
    assert not _gradients(None)[1]
    with pytest.raises(RecipeError, match=r"gradient_checkpointing_kwargs: use_reentrant"):
        train("x", gradient_checkpointing=True, arguments={"gradient_checkpointing_kwargs": {"use_reentrant": True}})
    one = _steps(train("plain"))
    for name, changes in (
        ("two", {"gradient_checkpointing": True}),
        ("three", {"gradient_checkpointing": True, "arguments": {"gradient_checkpointing_kwargs": {}}}),
    ):
        for line, plain in zip(_steps(train(name, **changes)), one, strict=True):
            assert line == pytest.approx(plain, rel=1e-4)


def _damaged(student: Path, folder: Path, token: int) -> Path:
    """The student, with an embedding that is not a number for one token."""
    model, tokenizer = load_student(student)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_loss_that_is_not_finite_names_its_samples(
    train: Train, targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    samples = [targets[index] for index in range(len(LENGTHS)) if index % 3 != 2]
    counts = {t: [s for s in samples if t in s.input_ids] for t in range(90)}
    token, (owner,) = next((t, found) for t, found in counts.items() if len(found) == 1)
    student = _damaged(tiny_models["student"], tmp_path / "damaged", token)
    with pytest.raises(TrainingError, match=r"the loss \(ce, kv, keys_.*is not finite in step") as error:
        train("nan", student, max_steps=9, batch_size=1, save_steps=1)
    assert f"samples {owner.sample_id};" in str(error.value)
    step = int(re.findall(r"in step (\d+)", str(error.value))[0])
    assert (tmp_path / f"nan/checkpoints/checkpoint-{step - 1}/trainer_state.json").is_file() == (step > 1)
    assert not (tmp_path / "nan/model.safetensors").exists()


def test_a_gradient_that_is_not_finite_names_its_term(train: Train) -> None:
    """Of a loss that is just finite in float32."""
    with pytest.raises(TrainingError, match=r"the gradient \(kv\) is not finite in step 1, samples sample-\d+, sample"):
        train("huge", alpha=1e37)


@pytest.mark.parametrize(
    ("cut", "changes"),
    [(4, {}), (5, {"group_by_length": True}), (5, {"pack_tokens": 24}), (4, {"num_workers": 1, "pack_tokens": 24})],
    ids=str,
)
def test_a_cut_training_ends_as_the_whole_one(
    train: Train, tiny_models: dict[str, Path], tmp_path: Path, cut: int, changes: dict[str, Any]
) -> None:
    """Every number of the log but for the clock's, bit for bit: with dropout, alpha from gradients, a log that spans the
    checkpoint, and batches of the end of one epoch and the beginning of the next."""
    student = tmp_path / "student"
    shutil.copytree(tiny_models["student"], student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    settings = {
        "alpha": "auto",
        "alpha_steps": 3,
        "alpha_update_steps": 2,
        "max_steps": 8,
        "save_steps": 2,
        "eval_steps": 4,
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
        "measure_steps": 1,
        **changes,
    }
    whole = train("whole", student, **settings)

    def fall(step: int, total: int) -> None:
        if step == cut:
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train("cut", student, on_step=fall, **settings)
    reached = max(int(p.name.split("-")[1]) for p in (tmp_path / "cut/checkpoints").iterdir())
    assert reached == (cut - 1) // 2 * 2
    (tmp_path / f"cut/checkpoints/checkpoint-{reached + 2}").mkdir()  # Begun, and never finished.
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = train("cut", student, **settings)
    assert _steps(again) == _steps(whole)
    for one, two in zip(again, whole, strict=True):
        assert {n: v for n, v in one.items() if n.startswith("heldout")} == {
            n: v for n, v in two.items() if n.startswith("heldout")
        }
    models = [load_student(tmp_path / name)[0].state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_loss_does_not_depend_on_how_a_step_is_cut(train: Train) -> None:
    """Six training samples a step, which is all of them: in one pass, in several, or packed into rows."""
    cuts: dict[str, dict[str, Any]] = {
        "one": {"batch_size": 6},
        "passes": {"batch_size": 2, "gradient_accumulation_steps": 3},
        "uneven": {"batch_size": 3, "gradient_accumulation_steps": 2},
        "rows": {"batch_size": 2, "pack_tokens": 34},
        "relation": {"batch_size": 6, "loss": "relation"},
        "relation-rows": {"batch_size": 1, "gradient_accumulation_steps": 2, "pack_tokens": 34, "loss": "relation"},
    }
    found = {}
    for name, changes in cuts.items():
        weights = {"rationale": 3.0, "prompt": 0.5}
        lines = _steps(train(name, measure_steps=100, segment_weights=weights, ce_segments=["answer"], **changes))
        found[name] = [{n: v for n, v in line.items() if "_share" not in n and "_spread_" not in n} for line in lines]
    for name in ("passes", "uneven", "rows"):
        for line, one in zip(found[name], found["one"], strict=True):
            assert line == pytest.approx(one, rel=2e-5)
    for line, one in zip(found["relation-rows"], found["relation"], strict=True):
        assert line == pytest.approx(one, rel=2e-5)


def test_only_the_sides_and_layers_with_a_weight_are_read_and_logged(train: Train) -> None:
    lines = _steps(train("keys", value_weight=0, layers=[2, 1], logging_steps=1))
    names = {name for name in lines[0] if name.startswith(("keys", "values"))}
    assert names == {"keys_1", "keys_2", "keys_spread_1", "keys_spread_2"}
    both = _steps(train("both", layers=[2, 1], logging_steps=1))
    assert {name: lines[0][name] for name in names} == {name: both[0][name] for name in names}


def test_other_ranks_and_batches_than_the_checkpoint_s_are_refused(train: Train, tmp_path: Path) -> None:
    def fall(step: int, total: int) -> None:
        if step == 3:
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train("cut", on_step=fall, save_steps=2)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kava-read")]
    with pytest.raises(StageError, match=r"1 processes of 2 rows each, this one has 1 of 4: go on as it was begun"):
        train("cut", save_steps=2, batch_size=4)
    with pytest.raises(StageError, match="of another order of samples"):
        train("cut", save_steps=2, group_by_length=True)
    with pytest.raises(StageError, match="alpha: a number, this one has auto: go on as it was begun"):
        train("cut", save_steps=2, alpha="auto")
    with pytest.raises(RuntimeError, match="power"):
        train("auto", on_step=fall, save_steps=2, alpha="auto")
    with pytest.raises(StageError, match="alpha: auto, this one has a number"):
        train("auto", save_steps=2)
    state = json.loads((tmp_path / "cut/checkpoints/checkpoint-2/kava.json").read_text())["feed"]
    assert (state["epoch"], state["row"], state["ranks"]) == (0, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"fsdp": "full_shard"}}, "train.arguments.fsdp: set train.fsdp, which shards"),
        ({"fsdp": True, "lora": {"r": 4}}, "adapters are not sharded here; leave out one of fsdp and lora"),
        ({"fsdp": True, "projector": "learned"}, "a learned projector is not sharded here"),
        ({"fsdp": True, "arguments": {"fp16": True}}, "train.arguments.fp16: not together with train.fsdp"),
        ({"arguments": {"train_sampling_strategy": "random"}}, "the order of samples is kava's own"),
        ({"arguments": {"save_strategy": "best"}}, "train.arguments.save_strategy: best: .* set save_steps"),
        ({"arguments": {"eval_strategy": "epoch"}}, "train.arguments.eval_strategy: epoch: .* set eval_steps"),
        ({"pack_tokens": 24, "group_by_length": True}, "packed rows are of about equal length already"),
    ],
)
def test_what_training_here_does_otherwise_is_refused(train: Train, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train("x", **changes)


@pytest.mark.parametrize("name", [*REFUSED, *OWN_KEYS])
def test_an_argument_that_would_do_nothing_or_half_is_refused(tmp_path: Path, name: str) -> None:
    settings = TrainSettings.model_validate({"arguments": {name: 1}})
    reason = REFUSED.get(name) or f"set train.{OWN_KEYS[name]}"
    with pytest.raises(RecipeError, match=rf"train\.arguments\.{name}: {re.escape(reason)}"):
        training_arguments(settings, tmp_path, has_heldout=True)


def test_every_argument_with_a_key_of_its_own_gets_that(tmp_path: Path) -> None:
    """None is left out of the table, and none is of a key that there is not."""
    assert set(OWN_KEYS.values()) <= set(TrainSettings.model_fields)
    changes: dict[str, Any] = {"lr_scheduler": "linear", "bf16": True, "gradient_checkpointing": True}
    changes |= {key: 7 for key in OWN_KEYS.values() if key not in changes}
    plain, changed = (
        training_arguments(TrainSettings.model_validate(found), tmp_path, has_heldout=True).to_dict()
        for found in ({}, changes)
    )
    derived = {"do_eval", "eval_strategy", "save_strategy"}
    assert {name for name in plain if plain[name] != changed[name]} - derived == OWN_KEYS.keys()


@pytest.mark.parametrize(
    ("last", "number"), [(2, signal.SIGUSR1), (4, signal.SIGUSR1), (2, signal.SIGINT)], ids=["first", "last", "ctrl-c"]
)
def test_a_signal_leaves_a_checkpoint_and_the_old_handlers(
    train: Train, tmp_path: Path, last: int, number: signal.Signals
) -> None:
    """In the middle, and in the last step of all, behind which nothing is left but to save."""
    whole = train("whole", eval_steps=2)

    def ask(step: int, total: int) -> None:
        if step == last:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RetryLaterError, match=rf"stopped by {number.name} after step {last} with a checkpoint"):
        train("cut", eval_steps=2, on_step=ask)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert (tmp_path / f"cut/checkpoints/checkpoint-{last}/kava.json").is_file()
    again = train("cut", eval_steps=2)
    assert _steps(again) == _steps(whole)
    assert [line["step"] for line in again if "heldout_kv" in line] == [2, 4]
    models = [load_student(tmp_path / name)[0].state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_signal_in_the_last_evaluation_without_checkpoints_ends_in_the_whole_student(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to go on from: what is left is less than to begin again."""
    heldout = Feed.heldout

    def asked(feed: Feed) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return heldout(feed)

    monkeypatch.setattr(Feed, "heldout", asked)
    lines = train("asked", eval_steps=4)
    monkeypatch.undo()
    assert any("heldout_kv" in line for line in lines)
    assert _steps(lines) == _steps(train("whole", eval_steps=4))
    models = [load_student(tmp_path / name)[0].state_dict() for name in ("whole", "asked")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_torn_checkpoints_are_removed_and_do_not_push_out_whole_ones(train: Train, tmp_path: Path) -> None:
    def ask(step: int, total: int) -> None:
        if step in (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = tmp_path / "cut/checkpoints"
    with pytest.raises(RetryLaterError, match="after step 2 with a checkpoint"):
        train("cut", on_step=ask)
    (checkpoints / "checkpoint-5").mkdir()
    (checkpoints / "checkpoint-6").mkdir()
    (checkpoints / "checkpoint-6/trainer_state.json").write_text('{"epoch": 0.5, "glo')
    with pytest.raises(RetryLaterError, match="after step 3 with a checkpoint"):
        train("cut", on_step=ask)
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    assert _steps(train("cut")) == _steps(train("whole"))


def test_spread_is_what_varies_from_token_to_token() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(200, 2, 4, generator=generator) + 100
    assert spread_ratio(target * 0.3 + 5, target) == pytest.approx(0.3, rel=1e-4)
    assert spread_ratio(torch.full_like(target, 7.0), target) == 0
    assert spread_ratio(target[:1], target[:1]) is None
    assert spread_ratio(target, torch.ones_like(target)) is None
    alarm = CollapseAlarm(0.1)
    assert alarm.check({"a": 0.05, "b": 0.5}) == []
    assert alarm.check({"a": 0.04, "b": 0.09}) == ["b"]
    assert alarm.check({"a": 0.2, "b": 0.08}) == []
    assert alarm.check({"a": 0.01, "b": 0.2}) == ["a"]


def test_a_collapse_is_told(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Targets are noise here: the best that the student can do is to say the same for every token."""
    settings: dict[str, Any] = {"max_steps": 6, "learning_rate": 3e-2, "alpha": 100}
    spreads = [line["values_spread_1"] for line in _steps(train("quiet", collapse_threshold=0, **settings))]
    threshold = (spreads[0] * min(spreads)) ** 0.5
    assert min(spreads) < 0.9 * spreads[0]
    capsys.readouterr()
    lines = train("loud", collapse_threshold=threshold, **settings)
    told = [line for line in lines if "values_spread_1 fell to" in line.get("warning", "")]
    assert told
    assert told[0]["step"] == next(n for n, spread in enumerate(spreads, 1) if spread < threshold)
    assert f"kava: step {told[0]['step']}: {told[0]['warning']}" in capsys.readouterr().err


def test_a_second_interruption_ends_at_once_and_an_ignored_one_never() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with StopOnSignal(Ranks()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.caught == "SIGINT"
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is before
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopOnSignal(Ranks()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.caught is None
    finally:
        signal.signal(signal.SIGINT, before)
