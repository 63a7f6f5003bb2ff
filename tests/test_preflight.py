"""Broken recipes: refused before any work by every command, with the reason first, and nothing is written."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures.command import kava, rows, write_recipe

from kava import hub, notices, tokenizer
from kava.errors import STOP_SIGNALS
from kava.extract import hf
from kava.pipeline import load_recipe
from kava.pipeline.cli import main
from kava.store import KVStore
from kava.train import student

Spoil = Callable[[Path, dict[str, Any]], None]
"""What breaks a recipe: changes its sections in place, or files beside it."""


def _set(key: str, value: Any) -> Spoil:
    def spoil(root: Path, raw: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for name in parents:
            raw = raw.setdefault(name, {})
        raw[last] = value.replace("ROOT", str(root)) if isinstance(value, str) else value

    return spoil


def _damaged_weights(root: Path, raw: dict[str, Any]) -> None:
    folder = shutil.copytree(raw["teachers"]["big"]["model"], root / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    raw["teachers"]["big"]["model"] = str(folder)


def _no_rationale(root: Path, raw: dict[str, Any]) -> None:
    lines = [json.dumps({key: row[key] for key in ("id", "prompt", "answer")}) for row in rows()]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    raw["select"] = {"tokens": 4, "method": "uniform"}


def _everything_held_out(root: Path, raw: dict[str, Any]) -> None:
    lines = [json.dumps({**row, "group": "one"}) for row in rows()]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    raw["corpus"]["heldout"] = {"group": "group", "values": ["one"], "ratio": None}


def _half_precision_shards(root: Path, raw: dict[str, Any]) -> None:
    raw["train"] |= {"fsdp": True, "bf16": True}
    raw["student"]["dtype"] = "float16"


BROKEN: dict[str, tuple[Spoil, str]] = {
    "train.teacher": (_set("train.teacher", "bigg"), "train.teacher: there is no teacher 'bigg' in the recipe, only big"),
    "arm-teacher": (
        _set("compare.arms", {"none": {}, "far": {"teacher": "other"}}),
        "compare.arms.far: train.teacher: there is no teacher 'other'",
    ),
    "arm-layers": (
        _set("compare.arms", {"none": {}, "deep": {"layers": [9]}}),
        "compare.arms.deep: train.layers: 9 is not one of the student's layers 0..2",
    ),
    "wandb": (_set("train.report_to", ["wandb"]), "train.report_to: wandb is not installed: pip install 'kava[wandb]'"),
    "trackio": (_set("train.report_to", ["trackio"]), "train.report_to: trackio is not installed"),
    "vllm": (_set("extract.backend", "vllm"), "needs vLLM, which is not installed"),
    "argument": (_set("train.arguments", {"nonsense": 1}), "transformers.TrainingArguments has no 'nonsense'"),
    "argument-value": (
        _set("train.arguments", {"optim": "adamw_nonsense"}),
        "train: adamw_nonsense is not a valid OptimizerNames, please select one of",
    ),
    "optimizer": (_set("train.arguments", {"optim": "apollo_adamw"}), "train.arguments.optim: "),
    "scheduler": (_set("train.lr_scheduler", "cosin"), "train: cosin is not a valid SchedulerType"),
    "schedule": (_set("train.lr_scheduler", "cosine_with_min_lr"), "train.lr_scheduler: cosine_with_min_lr: "),
    "lora": (
        _set("train.lora", {"target_modules": ["w_q"]}),
        "train.lora.target_modules: LlamaForCausalLM has no module 'w_q'",
    ),
    "train.layers": (_set("train.layers", [0, 7]), "train.layers: 7 is not one of the student's layers 0..2"),
    "layer_weights": (_set("train.layer_weights", [1.0, 2.0]), "train.layer_weights: 2 weights for 3 layers"),
    "project.layers": (_set("project.layers", [0, 1, 5]), "project.layers: teacher layer 5 is not one of 0..4"),
    "project.heads": (_set("project.heads", "identity"), "project.heads: identity needs equal heads"),
    "device": (_set("teachers.big.device", "cuda:99"), "teachers.big.device: device 'cuda:99' cannot be used here"),
    "fsdp": (
        _half_precision_shards,
        "train.fsdp: the student's weights are float16",
    ),
    "corpus": (_set("corpus.path", "ROOT/none.jsonl"), "none.jsonl: No such file or folder"),
    "segment": (_no_rationale, "select needs a rationale, and no record has one"),
    "heldout": (_everything_held_out, "every sample is held out"),
    "teacher": (_set("teachers.big.model", "./none"), "model './none': there is no such file or folder"),
    "student": (_set("student.model", "./none"), "model './none': there is no such file or folder"),
    "student.geometry": (
        _set("student.geometry", {"num_layers": 9, "num_key_value_heads": 1, "head_dim": 4}),
        "student.geometry: the recipe states",
    ),
    "weights": (_damaged_weights, "model.safetensors is damaged or not a weight file"),
    "run_dir": (_set("run_dir", "/proc/kava"), "run_dir: /proc/kava: cannot write here"),
    "run_dir-url": (_set("run_dir", "s3://bucket/run"), "run_dir: 's3://bucket/run' is a URL, which is not supported"),
    "store_dir-url": (_set("store_dir", "gs://bucket/x"), "store_dir: 'gs://bucket/x' is a URL, which is not supported"),
    "generate": (_set("extract.generate", {"teacher": "bib"}), "extract.generate.teacher: there is no teacher 'bib'"),
}  # fmt: skip
COMMANDS = ("plan", "dry-run", "run", "extract", "project", "train", "compare")
EXPENSIVE = ("train.teacher", "wandb", "device", "project.layers")
"""Kinds that are tried with every command; each other one with two."""


def _cases() -> Iterator[Any]:
    for number, name in enumerate(BROKEN):
        commands = COMMANDS[:4] if name in EXPENSIVE else ("plan", ("run", "extract", "dry-run")[number % 3])
        for command in commands:
            yield pytest.param(name, command, id=f"{name}-{command}")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where any model is loaded with weights."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are loaded")

    for module in (hf, student, hub):
        monkeypatch.setattr(module, "load_model", refuse)


def _words(command: str, recipe: Path) -> list[str]:
    return ["run", str(recipe), "--dry-run"] if command == "dry-run" else [command, str(recipe)]


def _spoiled(root: Path, models: dict[str, Path], spoil: Spoil) -> Path:
    recipe: Path = write_recipe(root, models)
    raw = yaml.safe_load(recipe.read_text())
    spoil(root, raw)
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def _run(*words: Any) -> tuple[int, str, list[str]]:
    """The exit code of a command, and what it prints: on stdout, and the lines on stderr."""
    out, err = StringIO(), StringIO()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["kava", *map(str, words)])
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue().splitlines()


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(("name", "command"), list(_cases()))
def test_a_broken_recipe_is_refused_before_any_work(
    tmp_path: Path, tiny_models: dict[str, Path], no_weights: None, name: str, command: str
) -> None:
    spoil, reason = BROKEN[name]
    recipe = _spoiled(tmp_path, tiny_models, spoil)
    before = _names(tmp_path)
    code, out, lines = _run(*_words(command, recipe))
    assert code == 2
    assert lines[0].startswith("kava: ")
    assert reason in lines[0]
    assert _names(tmp_path) == before
    if command in ("plan", "dry-run") and not name.endswith("-url"):
        assert "teacher big" in out, "the plan is printed as far as it can be told"
        assert "extract big" in out


def test_every_problem_is_listed_and_each_once(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    names = ("train.teacher", "wandb", "argument", "train.layers", "project.layers", "corpus", "device")

    def spoil(root: Path, raw: dict[str, Any]) -> None:
        for name in names:
            BROKEN[name][0](root, raw)

    recipe = _spoiled(tmp_path, tiny_models, spoil)
    listed = {}
    for command in ("plan", "run", "extract", "train"):
        code, _, lines = _run(*_words(command, recipe))
        assert code == 2
        listed[command] = [line for line in lines if line.startswith("kava: ")]
        wanted = [name for name in names if name != "device" or command != "train"]  # The teacher runs elsewhere.
        assert len(listed[command]) == len(wanted)
        for name in wanted:
            assert sum(BROKEN[name][1] in line for line in listed[command]) == 1, name
    assert listed["plan"] == listed["run"] == listed["extract"]
    plan = _run("plan", recipe, "--json")[1]
    assert [f"kava: {line}" for line in json.loads(plan)["broken"]] == listed["plan"]


def test_notices_follow_the_reason(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Whatever a library says while the recipe is checked comes after the reason."""
    recipe = _spoiled(tmp_path, tiny_models, BROKEN["train.layers"][0])
    for command in ("plan", "extract"):
        hub.load_config.cache_clear()
        tokenizer.load_tokenizer.cache_clear()
        notices._printed.clear()
        _, _, lines = _run(*_words(command, recipe))
        assert BROKEN["train.layers"][1] in lines[0]
        assert any(line.startswith(("note: ", "warning: ")) for line in lines[1:]), lines


def test_half_precision_needs_a_device(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a device here")
    recipe = write_recipe(tmp_path, tiny_models)
    for option in ("fp16", "tf32"):
        printed = kava("plan", recipe, "-s", f"train.arguments.{option}=true", code=2)
        assert f"train.arguments.{option}: needs a GPU" in printed


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "PMI_SIZE"])
def test_processes_of_a_launcher_do_not_wait_for_each_other(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Where several processes capture, accelerate would join them for a training: arguments are checked by name."""
    monkeypatch.setenv(variable, "2")
    recipe = write_recipe(tmp_path, tiny_models)
    words = ("extract", recipe, "--rank", "0", "--world-size", "2", "-s")
    assert "has no 'nonsense'" in kava(*words, "train.arguments.nonsense=1", code=2)
    assert "extract big" in kava(*words, "train.arguments.adam_beta1=0.8")
    assert not torch.distributed.is_initialized()


def test_packages_that_only_some_recipes_need(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if none of them were installed; here some are."""
    from importlib.util import find_spec

    absent = {"peft", "distributed", "gguf", "sentencepiece", "tensorboard", "google.protobuf"}
    for module in ("preflight.extras", "parallel"):
        monkeypatch.setattr(
            f"kava.pipeline.{module}.find_spec", lambda name: None if name in absent else find_spec(name)
        )
    for module in ("lora", "trackers"):
        monkeypatch.setattr(f"kava.train.{module}.find_spec", lambda name: None if name in absent else find_spec(name))
    folder = shutil.copytree(tiny_models["teacher"], tmp_path / "pieces")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    recipe = write_recipe(tmp_path, tiny_models, train={"lora": {}})
    raw = yaml.safe_load(recipe.read_text())
    raw["teachers"]["pieces"] = {"model": str(folder)}
    raw["teachers"]["packed"] = {"model": str(tmp_path / "model.gguf")}
    recipe.write_text(yaml.safe_dump(raw))
    printed = kava("run", recipe, "--scheduler", "processes:2", "-s", "train.teacher=big", code=2)
    for line in (
        "--scheduler needs dask.distributed: pip install 'kava[distributed]'",
        "and sentencepiece is not installed: pip install 'kava[sentencepiece]'",
        "and google.protobuf is not installed: pip install 'kava[sentencepiece]'",
        "is a GGUF file, and gguf is not installed: pip install 'kava[gguf]'",
        "train.report_to: tensorboard is not installed: pip install 'tensorboard'",
        "train.lora needs peft: pip install 'kava[lora]'",
    ):
        assert line in printed


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe with copies of the models, captured and with an untrained student."""
    root = tmp_path_factory.mktemp("captured")
    models = {name: shutil.copytree(path, root / name) for name, path in tiny_models.items()}
    recipe: Path = write_recipe(root, models, train={"max_steps": 2, "eval_steps": None})
    kava("extract", recipe)
    assert (root / "run/recipe.yaml").is_file()
    kava("run", recipe, "--only", "student")
    return recipe


@pytest.fixture
def elsewhere(captured: Path, tmp_path: Path) -> Path:
    """The captured run on a machine without the teacher and without the student's origin."""
    root = tmp_path / "here"
    shutil.copytree(captured.parent, root)
    shutil.rmtree(root / "teacher")
    shutil.rmtree(root / "student")
    recipe = root / "recipe.yaml"
    # The student's folder was made of the same settings: its key holds the model's name.
    text = recipe.read_text().replace(f"{captured.parent}/run", f"{root}/run")
    recipe.write_text(text.replace(f"{captured.parent}/corpus", f"{root}/corpus"))
    raw = yaml.safe_load(recipe.read_text())
    raw["teachers"]["big"] |= {"model": str(root / "teacher"), "device": "cuda:99"}
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def test_a_captured_teacher_may_be_on_another_machine(elsewhere: Path) -> None:
    kava("project", elsewhere)
    kava("train", elsewhere)
    code, _, lines = _run("extract", elsewhere, "--force")
    assert code == 2
    assert "there is no such file or folder" in lines[0]
    shutil.rmtree(elsewhere.parent / "run/teachers")
    shutil.rmtree(elsewhere.parent / "run/targets")
    for command in ("extract", "project", "plan"):
        code, _, lines = _run(command, elsewhere)
        assert code == 2
        assert any("there is no such file or folder" in line for line in lines)


def test_a_model_of_an_unreachable_hub_is_no_problem_of_a_plan(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    model = ("-s", "teachers.big.model=no/such-model")
    assert "The hub cannot be reached for no/such-model" in kava("plan", recipe, *model)
    assert "the hub cannot be reached" in _run("extract", recipe, *model)[2][0]


def test_the_recipe_is_saved_by_whatever_writes(elsewhere: Path) -> None:
    saved, run = elsewhere.parent / "run/recipe.yaml", elsewhere.parent / "run"
    for command, key, value in (
        ("project", "project.calibration_samples", 200),
        ("train", "train.reader_threads", 1),
    ):
        saved.unlink()
        kava(command, elsewhere, "-s", f"{key}={value}")
        section, name = key.split(".")
        assert getattr(getattr(load_recipe(saved), section), name) == value
        if command == "project":
            assert "teacher" in kava("inspect", run / "targets/big.zarr", "--align", "r0")
        kava(command, elsewhere, "-s", f"{key}={value}", "-s", "extract.batch_tokens=9")
        assert load_recipe(saved).extract.batch_tokens != 9, "nothing was written"
    saved.unlink()
    kava("select", elsewhere, "-s", "select={tokens: 4, method: uniform}")
    assert load_recipe(saved).select is not None
    saved.unlink()
    kava("train", elsewhere, "-s", "train.name=x", "-s", "train.layers=[8]", code=2)
    assert not saved.exists()


def test_secrets_are_not_saved(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, train={"arguments": {"hub_token": "hf_SECRET", "adam_beta1": 0.8}})
    kava("run", recipe, "--until", "student")
    text = (tmp_path / "run/recipe.yaml").read_text()
    assert "hf_SECRET" not in text
    assert load_recipe(tmp_path / "run/recipe.yaml").train.arguments == {"adam_beta1": 0.8}


URLS = ("s3://bucket/a.zarr", "gs://bucket/a.zarr", "az://box/a.zarr", "hf://datasets/a/b.zarr", "file:///tmp/a.zarr")


@pytest.mark.parametrize("url", URLS)
def test_addresses_are_refused(tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    store = captured.parent / "run/teachers/big.zarr"
    for words in (
        ("transcode", store, url, "--codec", "none"),
        ("transcode", url, "copy.zarr", "--codec", "none"),
        ("inspect", url),
        ("verify", url),
        ("init", url),
        ("run", captured, "-s", f"run_dir={url}"),
        ("status", captured, "-s", f"store_dir={url}"),
    ):
        code, _, lines = _run(*words)
        assert code == 2
        assert "is a URL, which is not supported here. Give a local path, or mount the bucket" in lines[0], words
    assert not list(tmp_path.iterdir())


def test_a_sample_that_is_too_long_names_what_limits_it(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    records = rows()
    for number in (3, 17):
        records[number]["rationale"] *= 200
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in records))
    for command in ("extract", "run"):
        code, _, lines = _run(command, recipe)
        assert code == 2
        assert "sample 'r3': " in lines[-1]
        assert "the model reads at most 256 (max_position_embeddings and rope scaling of its config)" in lines[-1]
        assert "(2 of 24 samples cannot be read); shorten it, or set extract.too_long: skip" in lines[-1]
        assert not (tmp_path / "run/teachers").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert "extract big" in kava("extract", recipe, "-s", "extract.too_long=skip")
    assert len(KVStore.open(tmp_path / "run/teachers/big.zarr").failed) == 2


def test_the_engines_limit_is_named(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from kava.errors import CorpusError
    from kava.pipeline.context import context_limit, refuse_too_long
    from kava.pipeline.run import Run

    recipe = write_recipe(tmp_path, tiny_models, extract={"backend": "vllm"})
    run = Run(load_recipe(recipe, ["teachers.big.engine.max_model_len=20"]))
    assert context_limit(run, "big") == (20, "engine.max_model_len")
    with pytest.raises(CorpusError, match=r"reads at most 20 \(engine.max_model_len\)"):
        refuse_too_long(run, "big", run.corpus, range(24))
    run = Run(load_recipe(recipe))
    assert context_limit(run, "big")[0] == 256
    refuse_too_long(run, "big", run.corpus, range(24))


@pytest.mark.parametrize("template", [False, True])
def test_tokens_are_counted_as_they_are_encoded(tiny_models: dict[str, Path], template: bool) -> None:
    from fixtures.tokenizers import byte_level_tokenizer

    from kava.extract import Encoder
    from kava.extract.record import Piece, assemble
    from kava.store import Segment

    tokenizer = byte_level_tokenizer(400)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    records = []
    for number in range(7):
        pieces = [
            Piece("user", f"é{number} " * number + "?", Segment.PROMPT, "q"),
            Piece("assistant", f"= {number}", Segment.ANSWER, "a"),
        ]
        records.append(assemble(pieces, " ", str(number), "here"))
    for add_eos in (False, True):
        encoder = Encoder(tokenizer, chat_template=template, add_eos=add_eos)
        assert encoder.count(records) == [len(encoder.encode(record)) for record in records]
    assert encoder.count([]) == []


def test_a_store_in_which_every_sample_failed_is_a_fault(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, corpus={"separator": " x" * 300})
    for command in ("extract", "extract", "run"):
        code, _, lines = _run(command, recipe, "-s", "extract.too_long=skip")
        assert code == 1
        assert "extract big: all 24 samples of " in lines[-1]
        assert "failed, 24 of them like this: " in lines[-1]
        assert "the model reads at most 256" in lines[-1]
    assert not (tmp_path / "run/targets").exists()


def test_inspect_of_a_recipe_shows_all_its_stores(captured: Path) -> None:
    printed = kava("inspect", captured)
    assert "extract big" in printed
    assert "5 of 5" in printed
    assert "does not exist" in next(line for line in printed.splitlines() if line.startswith("project big"))
    found = json.loads(kava("inspect", captured, "--json"))
    store = KVStore.open(captured.parent / "run/teachers/big.zarr")
    capture = found["stores"][0]
    assert capture["stage"] == "extract big"
    assert (capture["tokens"], capture["samples"]) == (store.num_tokens, 24)
    assert capture["bytes"] == store.size_on_disk()
    assert "parts" not in found["stores"][-1]
    assert "needs one store" in kava("inspect", captured, "--sample", "0", code=2)
