"""The command, from recipe to trained student, on tiny random models with different tokenizers and geometry."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.command import KAVA, kava, write_recipe
from fixtures.stores import flip, tree

from kava.extract import Encoder
from kava.hub import find_model, load_tokenizer
from kava.pipeline import Projector, load_recipe
from kava.pipeline.maps.resample import time_map
from kava.pipeline.run import Run
from kava.store import KVStore, Split


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A recipe that was run to the end."""
    recipe: Path = write_recipe(tmp_path_factory.mktemp("run"), tiny_models)
    kava("run", recipe, new_process=True)
    return recipe


def test_a_run_makes_everything_and_a_second_one_nothing(done: Path) -> None:
    root = done.parent / "run"
    before = tree(root)
    printed = kava("run", done)
    assert printed.count("up to date") == 5
    after = tree(root)
    assert before == after
    assert (root / "recipe.yaml").is_file()
    log = [json.loads(line) for line in (root / "students/kv/metrics.jsonl").read_text().splitlines()]
    assert {"ce", "kv", "keys_0", "values_2"} <= set(log[0])
    assert [line["step"] for line in log if "heldout_ce" in line] == [3, 6]
    assert list((root / "students/kv/tensorboard").glob("events*"))


def test_targets_are_what_the_parts_say(done: Path) -> None:
    """Each step again, by hand, on one sample."""
    run = Run(load_recipe(done))
    teacher, targets = (KVStore.open(path) for path in (run.teacher_path("big"), run.target_path("big")))
    projector = Projector.load(run.projector_path("big"))
    student = Encoder(load_tokenizer(find_model(str(run.student_dir))), add_eos=True)
    for index in (0, 7, 23):
        source, made = teacher[index], targets[index]
        tokens = student.encode(run.corpus.records[index])
        time_axis = time_map("last", source, tokens)
        np.testing.assert_array_equal(made.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(made.mask, time_axis.mask)
        assert source.keys is not None
        assert made.keys is not None
        wanted = projector.apply("keys", time_axis.apply(source.keys.float()))
        kept = torch.from_numpy(made.mask)
        torch.testing.assert_close(made.keys[kept], wanted[kept], atol=1e-6, rtol=1e-5)
        assert not made.keys[~kept].any()
    assert targets.manifest.parents["teacher"] == teacher.manifest.fingerprint
    assert len(targets.indices(Split.HELDOUT)) == 6


def test_the_trained_student_loads_without_kava(done: Path) -> None:
    folder = done.parent / "run/students/kv"
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}); t = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "print(m.generate(**t('Natalia', return_tensors='pt'), max_new_tokens=3).shape, 'kava' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip().endswith("False")


def test_fused_and_materialised_targets_are_the_same(done: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, resample={"materialize": True})
    kava("run", recipe, "--until", "project")
    one, two = (Run(load_recipe(r)) for r in (done, recipe))
    assert KVStore.open(two.resampled_path("big")).manifest.kind == "resampled"
    for fused, stepwise in zip(KVStore.open(one.target_path("big")), KVStore.open(two.target_path("big")), strict=True):
        torch.testing.assert_close(fused.keys, stepwise.keys, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fused.values, stepwise.values, atol=1e-6, rtol=1e-5)


def test_targets_straight_from_the_teacher_are_the_same_bits(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Only the calibration's parts are captured, here 3 of 12; a sample that fails is told the same way."""
    made = {}
    for keep in ("capture", "target"):
        folder = tmp_path / keep
        folder.mkdir()
        changes = {"samples_per_part": 2, "extract": {"keep": keep, "too_long": "skip", "dtype": "bfloat16"}}
        recipe = write_recipe(folder, tiny_models, project={"calibration_samples": 4, "dtype": "bfloat16"}, **changes)
        text = (folder / "corpus.jsonl").read_text()
        (folder / "corpus.jsonl").write_text(text.replace("5 + 5 = 10. ", "5 " * 400))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kava.pipeline.parts.CALIBRATION_PARTS", 3)
            printed = kava("run", recipe, "--until", "project")
            assert "0 of 12" not in printed
            rows = {r["stage"]: r for r in json.loads(kava("status", recipe, "--json"))["stages"]}
            assert rows["extract big"]["state"] == rows["project big"]["state"] == "complete"
            assert kava("run", recipe, "--until", "project").count("up to date") == 4
            run = Run(load_recipe(recipe))
            made[keep] = KVStore.open(run.target_path("big"))
            captured = KVStore.open(run.teacher_path("big")).committed_parts()
            if keep == "target":
                assert captured == run.calibration_parts
                assert len(captured) == 3
                assert "3 parts kept of 12" in rows["extract big"]["detail"]
    one, two = made["capture"], made["target"]
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert one.failed == two.failed != {}
    assert one.coverage() == two.coverage()
    files = [{name: data for name, data in tree(s.path).items() if not name.endswith("zarr.json")} for s in (one, two)]
    assert files[0] == files[1]
    with pytest.MonkeyPatch.context() as patch:  # Cut off in the middle, it goes on.
        patch.setattr("kava.pipeline.parts.CALIBRATION_PARTS", 3)
        two.drop_part(next(p for p in range(12) if p not in captured))
        assert "11 of 12 parts" in kava("status", recipe)
        kava("project", recipe)
    assert {n: d for n, d in tree(two.path).items() if not n.endswith("zarr.json")} == files[1]


def test_changed_parameters_are_stale_and_only_what_follows_is_made_again(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    kava("run", recipe, "--until", "project")
    stores = tmp_path / "run"
    teacher = tree(stores / "teachers")
    override = ("-s", "project.heads=mean")
    rows = {r["stage"]: r["state"] for r in json.loads(kava("status", recipe, *override, "--json"))["stages"]}
    assert rows == {"student": "complete", "extract big": "complete", "project big": "stale", "train": "missing"}
    assert "heads" in kava("status", recipe, *override)
    printed = kava("project", recipe, *override)
    assert "stale (" in printed
    assert tree(stores / "teachers") == teacher
    assert KVStore.open(stores / "targets/big.zarr").manifest.parameters["project"]["heads"] == "mean"
    # A capture is costly: it is not replaced without --force.
    printed = kava("extract", recipe, "-s", "extract.dtype=float16", code=2)
    assert "dtype" in printed
    assert "--force" in printed
    assert tree(stores / "teachers") == teacher
    kava("extract", recipe, "-s", "extract.dtype=float16", "--force")
    assert KVStore.open(stores / "teachers/big.zarr").manifest.dtype == "float16"


def test_a_part_captured_again_makes_only_its_targets_stale(
    done: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    # A map that is fitted on nothing: another one would be fitted again when its calibration changes.
    recipe = write_recipe(tmp_path, tiny_models, project={"heads": "random"})
    kava("run", recipe, "--until", "project")
    teacher, targets = (KVStore.open(tmp_path / f"run/{kind}/big.zarr") for kind in ("teachers", "targets"))
    sample = teacher.part(1).sample(0)
    teacher.drop_part(1)
    with teacher.write_part(1) as writer:
        for position, index in enumerate(teacher.manifest.part_samples(1)):
            record = Run(load_recipe(recipe)).corpus.records[index]
            writer.append(position, sample) if position == 0 else writer.fail(
                position, record.sample_id, record.split, "x"
            )
        writer.commit()
    before = {p: targets.part(p).digest for p in targets.committed_parts()}
    assert "1 to be made again" in kava("status", recipe)
    kava("project", recipe)
    after = {p: KVStore.open(targets.path).part(p).digest for p in targets.committed_parts()}
    assert [p for p in before if before[p] != after[p]] == [1]
    assert len(KVStore.open(targets.path).failed) == 4


def test_alpha_zero_sees_the_same_batches(done: Path) -> None:
    kava("train", done, "-s", "train.alpha=0", "-s", "train.name=plain")
    kava("train", done, "-s", "train.alpha=1e-30", "-s", "train.name=nearly")
    logs = [
        [json.loads(line) for line in (done.parent / f"run/students/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "nearly")
    ]
    assert "kv" not in logs[0][0]
    for one, two in zip(*logs, strict=True):
        for name in {"ce", "heldout_ce"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_training_opens_no_teacher(done: Path, tmp_path: Path) -> None:
    """A trace of every file that `kava train` opens: none is the teacher's, and no backend is imported."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import atexit, sys\nopened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "atexit.register(lambda: print('\\n'.join([*opened, *sys.modules]), file=sys.__stdout__))\n"
    )
    recipe = load_recipe(done)
    moved = done.parent / "elsewhere"
    (done.parent / "run/teachers").rename(moved)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        printed = kava("train", done, "-s", "train.name=offline", env={**os.environ, "PYTHONPATH": path})
    finally:
        moved.rename(done.parent / "run/teachers")
    lines = printed.splitlines()
    assert not [line for line in lines if "teachers/big.zarr" in line and "zarr.json" not in line]
    assert any("students/offline" in line for line in lines)
    assert "kava.train.trainer" in lines
    assert not {"vllm", "kava.extract.hf"} & set(lines)
    weights = {line for line in lines if line.endswith(".safetensors")}
    assert weights
    assert not [line for line in weights if line.startswith(recipe.teachers["big"].model)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_training_resumes_where_it_was_stopped(done: Path, number: signal.Signals) -> None:
    """Killed, it goes on at its last checkpoint; asked to stop, it writes one first. The log is that of a whole one."""
    options = ["-s", "train.max_steps=40", "-s", "train.logging_steps=1"]
    if number == signal.SIGKILL:
        options += ["-s", "train.save_steps=5"]
    else:
        options += ["-s", "train.alpha=auto"]
    kava("train", done, *options, "-s", f"train.name=whole-{number.name}")
    students, name = done.parent / "run/students", f"cut-{number.name}"
    waits_for = "checkpoints/checkpoint-*/trainer_state.json" if number == signal.SIGKILL else "metrics.jsonl"
    command = [*KAVA, "train", str(done), *options, "-s", f"train.name={name}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((students / name).glob(waits_for)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate()[1]
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 75
        (stopped,) = re.findall(rf"stopped by {number.name} after step (\d+) with a checkpoint", printed)
        assert [p.name for p in (students / name / "checkpoints").iterdir()] == [f"checkpoint-{stopped}"]
        assert "Traceback" not in printed
    assert "interrupted" in kava("status", done, *options, "-s", f"train.name={name}")
    kava("train", done, *options, "-s", f"train.name={name}")
    timed = {"tokens_per_second", "data_wait_share", "peak_memory_gib"}
    curves = [
        [
            {k: v for k, v in line.items() if k not in timed}
            for line in map(json.loads, (students / trained / "metrics.jsonl").read_text().splitlines())
            if "ce" in line
        ]
        for trained in (f"whole-{number.name}", name)
    ]
    assert [line["step"] for line in curves[1]] == list(range(1, 41))
    assert curves[1] == curves[0]
    assert not (students / name / "checkpoints").exists()
    alpha = f"{curves[1][-1]['alpha']:g}"
    assert [row for row in kava("status", done).splitlines() if name in row and alpha in row.split()]


def test_targets_of_another_student_are_refused_before_the_first_step(done: Path, tiny_models: dict[str, Path]) -> None:
    from kava.errors import StageError
    from kava.train import TrainSettings, train_student

    run = Run(load_recipe(done))
    targets, settings = KVStore.open(run.target_path("big")), TrainSettings.model_validate({"max_steps": 1})
    with pytest.raises(StageError, match=r"another student \(geometry: .*tokenizer: "):
        train_student(tiny_models["teacher"], targets, done.parent / "x", settings)
    with pytest.raises(StageError, match=r"another student \(corpus: "):
        train_student(run.student_dir, targets, done.parent / "x", settings, corpus_digest="other")
    with pytest.raises(StageError, match="is a capture store, not targets"):
        train_student(run.student_dir, KVStore.open(run.teacher_path("big")), done.parent / "x", settings)


def test_inspect_for_people_and_programs(done: Path) -> None:
    store = done.parent / "run/targets/big.zarr"
    printed = kava("inspect", store)
    for wanted in (
        "3 layers x 4 KV heads x 8",
        "18 train, 6 heldout",
        "before rotary embedding",
        "values std",
        "fingerprint",
    ):
        assert wanted in printed
    facts = json.loads(kava("inspect", store, "--json"))
    assert facts["manifest"]["kind"] == "target"
    printed = kava("inspect", store, "--sample", "r3")
    for wanted in ("'<s>'", "'<0x36>'", "'</s>'", "none", "rationale"):
        assert wanted in printed
    assert "prompt" in printed
    assert "answer" in printed
    assert "there is no sample" in kava("inspect", store, "--sample", "nope", code=2)


def test_two_token_rows_against_each_other(done: Path) -> None:
    targets = done.parent / "run/targets/big.zarr"
    printed = kava("inspect", targets, "--align", "r3")
    store = KVStore.open(targets)
    text = Run(load_recipe(done)).corpus.records[3].text
    for side in ("teacher ", "student "):
        lines = [line.removeprefix(side) for line in printed.splitlines() if line.startswith(side)]
        pieces = "".join("".join(lines).split()).replace("␣", " ").replace("⏎", "\n").split("|")
        # Tokens that end inside a character are shown by their bytes.
        raw = [bytes.fromhex(p[1:-1]) if p.startswith("<") else p.encode() for p in pieces]
        assert b"".join(raw).decode() == text
    spans = store[3].spans
    assert f"{(spans[:, 1] > spans[:, 0]).sum()} text tokens, " in printed
    assert "prompt " in kava("inspect", targets)
    assert all(text >= matched for text, matched, _ in store.coverage().values())
    assert store.coverage().keys() == {"prompt", "rationale", "answer"}
    teacher = done.parent / "run/teachers/big.zarr"
    assert "is on the teacher's own tokens; --align shows" in kava("inspect", teacher, "--align", "r3", code=2)


def test_verify_names_the_damage(done: Path, tmp_path: Path) -> None:
    source = done.parent / "run/targets/big.zarr"
    copy = tmp_path / "copy.zarr"
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    assert "5 parts are as they were written" in kava("verify", copy)
    shard = copy / "parts/00002/values/c/0/0/0/0"
    flip(shard, 100)
    assert "part 2, values, chunk 0 (sample r10): checksum mismatch" in kava("verify", copy, code=1)


def test_dry_run_shows_the_plan_and_makes_nothing(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models)
    printed = kava("run", recipe, "--dry-run")
    for wanted in (
        "5 layers x 2 KV heads x 16",
        "0->0 2->1 4->2",
        "procrustes: 32 -> 32",
        "1,280 bytes per token",
        "missing",
    ):
        assert wanted in printed
    assert not (tmp_path / "run").exists()


def test_the_mission_recipe_plans_without_the_hub() -> None:
    recipe = Path(__file__).parents[1] / "workflows/qwen2-7b-tinyllama.yaml"
    printed = kava("run", recipe, "--dry-run")
    for wanted in ("28 layers x 4 KV heads x 128", "22 layers x 4 KV heads x 64", "57,344 bytes per token", "27->21"):
        assert wanted in printed
    assert sum("hub cannot be reached" in line for line in printed.splitlines()) == 1


def test_the_console_script_prints_one_line_and_its_exit_code(tmp_path: Path) -> None:
    printed = kava("run", tmp_path / "none.yaml", code=2, new_process=True)
    assert printed.splitlines() == [
        f"kava: recipe {tmp_path}/none.yaml: No such file or directory; kava init writes a first recipe"
    ]


def test_init_writes_a_recipe_and_keeps_an_old_one(tmp_path: Path) -> None:
    kava("init", tmp_path / "r.yaml")
    load_recipe(tmp_path / "r.yaml")
    assert "there already" in kava("init", tmp_path / "r.yaml", code=2)
