from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from kava.errors import RecipeError
from kava.pipeline.parts import PART_BYTES, samples_per_part
from kava.pipeline.recipe import Recipe, load_recipe
from kava.pipeline.recipe_file import PATHS

ROOT = Path(__file__).resolve().parents[2]
MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "corpus": {"path": "c.jsonl"},
    "teachers": {"t": {"model": "a/b"}},
    "student": {"model": "c/d"},
}


def _write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "workflows").glob("*.yaml")), ROOT / "pipeline/starter.yaml"], ids=lambda p: p.name
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    load_recipe(path)


def test_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "workflows/demo.yaml", ["train.alpha=0.25", "project.layers=[0,1,2,[3,4],5,6]"])
    assert recipe.train.alpha == 0.25
    assert recipe.project.layers == [0, 1, 2, [3, 4], 5, 6]
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_overrides_make_sections(tmp_path: Path) -> None:
    recipe = load_recipe(
        _write(tmp_path / "r.yaml"), ["train.arguments.gradient_checkpointing=true", "corpus.heldout={ratio: 0.5}"]
    )
    assert recipe.train.arguments == {"gradient_checkpointing": True}
    assert recipe.corpus.heldout is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.alhpa=1"], r"unknown key 'train.alhpa'; did you mean 'alpha'\?"),
        (["trian.alpha=1"], r"unknown key 'trian'; did you mean 'train'\?"),
        (["teachers.t.modle=x"], r"unknown key 'teachers.t.modle'; did you mean 'model'\?"),
        (["corpus.fields.promt=x"], r"unknown key 'corpus.fields.promt'; did you mean 'prompt'\?"),
        (["corpus.heldout={rate: 0.1}"], "unknown key 'corpus.heldout.rate'"),
        (["train.alpha=-1"], r"train.alpha: .*greater than or equal to 0 \(got -1\)"),
        (["train.loss=huber"], "train.loss: .*'mse'.*got 'huber'"),
        (["project.heads=procustes"], r"project.heads: 'procustes' is unknown; did you mean 'procrustes'\?"),
        (["resample.method=lst"], "did you mean 'last'"),
        (["extract.codec=zip"], "use one of blosc-zstd, none, int8, int4"),
        (["student.config={hidden_size: 3}"], "student: give either model or config"),
        (["teachers={}"], "teachers: .*at least 1"),
        (["corpus.heldout={ratio: 0.1, path: x}"], "give exactly one of ratio, values or path"),
        (["train"], "write it as key.sub=value"),
        (["run_dir.x=1"], "run_dir is a value, not a section"),
        (["train.name=../x"], "train.name: "),
        (["teachers={a/b: {model: x}}"], "it names files"),
        (["train.key_weight=0", "train.value_weight=0"], "both 0"),
    ],
)
def test_mistakes_are_one_line_with_the_mend(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(_write(tmp_path / "r.yaml"), overrides)
    assert "\n" not in str(error.value)


def test_chat_templates_are_one_decision(tmp_path: Path) -> None:
    dated = load_recipe(
        _write(tmp_path / "r.yaml"),
        ["chat_template=true", "chat_template_date=2025-01-02", "student.chat_template=false"],
    )
    (teacher,) = dated.teachers.values()
    assert (teacher.chat_template, dated.student.chat_template) == (True, False)
    assert teacher.chat_template_date == dated.student.chat_template_date == datetime.date(2025, 1, 2)
    saved = tmp_path / "saved.yaml"
    dated.save(saved)
    assert load_recipe(saved) == dated
    plain = load_recipe(_write(tmp_path / "r.yaml"))
    assert not plain.student.chat_template
    assert plain.student.determining() == dated.student.determining()


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"No such file.*kava init"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(RecipeError, match="mapping of sections, not list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(RecipeError, match="line 2: not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "short.yaml").write_text("run_dir: x")
    with pytest.raises(RecipeError, match="'corpus' is missing; 'teachers' is missing; 'student' is missing"):
        load_recipe(tmp_path / "short.yaml")


def test_samples_per_part_keeps_parts_small_and_several() -> None:
    assert samples_per_part([1.0] * 160) == 20
    assert samples_per_part([1.0] * 3) == 1
    half = PART_BYTES / 2
    assert samples_per_part([half] * 100) == 2
    assert samples_per_part([PART_BYTES * 3.0] * 10) == 1


_BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {max_steps: 20}\ntrain: {max_steps: 1000}", r"line \d+: 'train' is given twice, first in line \d+"),
        ("train:\n  max_steps: 20\n  max_steps: 1000", "'max_steps' is given twice"),
        ("train: {max_steps: 20, max_steps: 1000}", "'max_steps' is given twice"),
        (_BOMB, "more than 100,000 values"),
        ("x: &x [*x]", "an alias leads to itself"),
        ("x: " + "[" * 100_000, "nested too deeply"),
        ("x: " + "9" * 5000, "a number has too many digits"),
        ("x: \x00", "not YAML: unacceptable character"),
        ("1: x", "key 1 is not text"),
        ("yes: x", "key True is not text"),
        ("x: !!set {a, b}", "is read as a set"),
    ],
)
def test_yaml_that_would_be_misread_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.alpha=.inf", "train.alpha: inf is not a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: nan is not a finite number"),
        ("train.arguments={weight_decay: -.inf}", r"train.arguments.weight_decay: -inf is not"),
        ("train.max_steps=true", r"train.max_steps: .*valid integer \(got True\)"),
        ("train.learning_rate=true", r"train.learning_rate: .*valid number \(got True\)"),
        ("train.alpha=false", r"train.alpha: .*got False"),
        ("corpus.heldout={ratio: true}", "corpus.heldout.ratio: .*valid number"),
        ("project.calibration_samples=true", "project.calibration_samples: .*valid integer"),
        ("train.max_steps='20'", r"train.max_steps: .*valid integer \(got '20'\)"),
        ("train.max_steps=1e3", r"train.max_steps: .*valid integer \(got 1000.0\)"),
        ("extract.importance=1", r"extract.importance: .*valid boolean \(got 1\)"),
        ("compare={arms: {none: {}, kv: {learning_rate: true}}}", "learning_rate: .*valid number"),
        ("train={max_steps: 1, max_steps: 2}", "'max_steps' is given twice"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(_write(tmp_path / "r.yaml"), [override])
    assert "\n" not in str(error.value)


def test_values_that_are_numbers_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(
        _write(tmp_path / "r.yaml"),
        ["train.learning_rate=1e-4", "train.alpha=1", "train.name=2024-01-05", "corpus.path=[a.jsonl, b.csv]"],
    )
    assert (recipe.train.learning_rate, recipe.train.alpha, recipe.train.name) == (1e-4, 1.0, "2024-01-05")
    assert recipe.corpus.path == ("a.jsonl", "b.csv")
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    aliased = tmp_path / "aliased.yaml"
    aliased.write_text(yaml.safe_dump(MINIMAL).replace("path: c.jsonl", "path: &name c.jsonl") + "store_dir: *name\n")
    assert load_recipe(aliased).store_dir == "c.jsonl"


def test_variables_and_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAVA_TEST", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("KAVA_NONE", raising=False)
    recipe = load_recipe(
        _write(
            tmp_path / "r.yaml",
            run_dir="${KAVA_TEST}/run",
            store_dir="~/stores",
            corpus={"path": ["${KAVA_TEST}/a.jsonl", "~/b.jsonl"], "heldout": {"path": "~/held.jsonl"}},
            teachers={"t": {"model": "${KAVA_TEST}/t"}, "u": {"model": "~/u"}},
            student={"model": "~/s", "tokenizer": "${KAVA_TEST}/tok"},
            train={"teacher": "t"},
        )
    )
    assert (recipe.run_dir, recipe.store_dir) == ("/data/run", "/home/me/stores")
    assert recipe.corpus.path == ("/data/a.jsonl", "/home/me/b.jsonl")
    assert recipe.corpus.heldout is not None
    assert recipe.corpus.heldout.path == "/home/me/held.jsonl"
    assert [t.model for t in recipe.teachers.values()] == ["/data/t", "/home/me/u"]
    assert (recipe.student.model, recipe.student.tokenizer) == ("/home/me/s", "/data/tok")
    for override in ("run_dir", "store_dir", "corpus.path", "teachers.t.model", "student.model", "student.tokenizer"):
        with pytest.raises(RecipeError, match=f"{override}: the environment variable 'KAVA_NONE' is not set"):
            load_recipe(_write(tmp_path / "r.yaml"), [f"{override}=${{KAVA_NONE}}/x"])
    with pytest.raises(RecipeError, match="run_dir: there is no home folder for '~nobody-here'"):
        load_recipe(_write(tmp_path / "r.yaml"), ["run_dir=~nobody-here/x"])


def test_every_path_of_the_recipe_is_expanded() -> None:
    """Fields that are paths by their names are in the table of those that are expanded."""
    names = ("path", "model", "tokenizer")
    found = set()

    def walk(model: Any, place: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            here = (*place, name)
            if name in names or name.endswith(("_dir", "_path", "_file")):
                found.add(here)
            for inner in _models(field.annotation):
                walk(inner, (*here, "*") if "dict" in str(field.annotation) else here)

    walk(Recipe, ())
    assert found == set(PATHS)


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def test_lists_of_files_and_values(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {"run_dir": "r", "corpus": {"path": "x"}, "teachers": {"a": {"model": "x"}}, "student": {"model": "y"}}
        )
    )
    listed = load_recipe(path, ["corpus.path=[a.jsonl, b.jsonl]", "corpus.heldout={group: g, values: [u, v]}"]).corpus
    assert listed.paths == ("a.jsonl", "b.jsonl")
    assert listed.heldout is not None
    assert listed.heldout.values == ("u", "v")
    listed = load_recipe(path, ["corpus.heldout.path=[a.jsonl, b.jsonl]", "chat_template=true"]).corpus
    assert listed.heldout is not None
    assert listed.heldout.path == ("a.jsonl", "b.jsonl")
