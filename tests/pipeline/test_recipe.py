from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava.errors import RecipeError
from kava.pipeline.parts import PART_BYTES, samples_per_part
from kava.pipeline.recipe import load_recipe

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
