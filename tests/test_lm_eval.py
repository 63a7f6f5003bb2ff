"""`kava evaluate --tasks` with lm-eval itself: the how-to page's tasks, against plain loops and kava's own exact match."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import KAVA, kava, write_recipe
from fixtures.documents import DOCS, blocks, commands

from kava.store import KVStore, Split
from kava.train import load_student

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries'

PAGE = DOCS / "howto/tasks.md"
LIKELIHOOD = """
task: likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/questions.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


def corpus() -> list[dict[str, Any]]:
    """Questions whose answers no student can know: it learns to write the commoner one."""
    return [
        {
            "id": f"r{n}",
            "prompt": f"{n} and some more?",
            "rationale": "Count. ",
            "answer": f"#### {5 if n % 3 else 1234}",
        }
        for n in range(60)
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Iterator[Path]:
    """A trained student, the page's tasks with the held-out questions, and one of log-likelihoods."""
    import datasets

    root = tmp_path_factory.mktemp("tasks")
    path: Path = write_recipe(root, tiny_models, train={"max_steps": 60, "learning_rate": 5e-3})
    (root / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in corpus()))
    kava("run", path)
    (root / "tasks").mkdir()
    for name, text in zip(("sums", "sums_choice"), blocks(PAGE, "yaml"), strict=True):
        (root / f"tasks/{name}.yaml").write_text(text)
    (root / "tasks/likelihood.yaml").write_text(LIKELIHOOD)
    (root / "tasks/questions.jsonl").write_text("\n".join(json.dumps(row) for row in questions(root)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        yield path


def questions(root: Path) -> list[dict[str, Any]]:
    """The held-out records, with the fields of the page."""
    store = KVStore.open(root / "run/targets/big.zarr")
    heldout = {store.sample(index).sample_id for index in store.indices(Split.HELDOUT)}
    records = [row for row in corpus() if row["id"] in heldout]
    more = [{**row, "prompt": f"{row['prompt']} And then?"} for row in records]
    made = [
        {
            "question": row["prompt"],
            "answer": row["rationale"] + row["answer"],
            "choices": ["12", row["answer"][5:], "1 apple"],
            "right": number % 3,
        }
        for number, row in enumerate(records + more)
    ]
    fields = [set(json.loads(line)) for line in "".join(blocks(PAGE, "json")).splitlines()]
    assert all(set(row) == keys for row in made for keys in fields)
    assert len(made) >= 20
    return made


def evaluate(recipe: Path, *words: Any) -> dict[str, Any]:
    kava("evaluate", recipe, *words)
    found: dict[str, Any] = json.loads((recipe.parent / "run/students/kv/evaluate.json").read_text())
    return found


def log_likelihood(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """Of `text` after `context`, in float32, without batches; and whether it is what greedy decoding writes."""
    ids, start = tokenizer(context + text)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    logs = torch.log_softmax(logits, -1)
    total = sum(float(logs[at - 1, ids[at]]) for at in range(start, len(ids)))
    return total, all(int(logs[at - 1].argmax()) == ids[at] for at in range(start, len(ids)))


def test_the_pages_commands_run(recipe: Path) -> None:
    first, second = [line.split()[1:] for line in commands(PAGE) if line.startswith("kava ")]
    printed = kava(*first)
    assert "exact_match (marked) 0." in printed
    assert "acc_norm 0." in printed
    assert " ± 0.0" in printed
    assert "pretrained" not in printed  # lm-eval's warnings that nobody can heed
    kava(*second)


def test_choices_are_those_of_a_plain_loop(recipe: Path) -> None:
    found = evaluate(recipe, "--no-generate", "--tasks", "sums_choice", "--include-path", "tasks", "--batch-size", 5)
    model, tokenizer = load_student(recipe.parent / "run/students/kv", dtype="float32")
    plain, by_length = [], []
    rows = questions(recipe.parent)
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        sums = [log_likelihood(model, tokenizer, context, f" {choice}")[0] for choice in row["choices"]]
        plain.append(sums.index(max(sums)) == row["right"])
        means = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        by_length.append(means.index(max(means)) == row["right"])
    measured = found["tasks"]["sums_choice"]
    for name, right in (("acc", plain), ("acc_norm", by_length)):
        share = sum(right) / len(rows)
        assert 0 < share < 1
        assert measured[f"{name},none"] == pytest.approx(share)
        assert measured[f"{name}_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / (len(rows) - 1)))


def test_perplexity_is_that_of_a_plain_loop_and_alone_on_stdout(recipe: Path) -> None:
    """In a process of its own, twice: what is printed for programs is one JSON text, and the same again."""
    words = ["evaluate", str(recipe), "--no-generate", "--tasks", "tasks/likelihood.yaml", "--json"]
    runs = [
        subprocess.run([*KAVA, *words, *more], capture_output=True, text=True, check=True)
        for more in ([], ["--batch-size", "1"])
    ]
    assert "bootstrapping" in runs[0].stderr
    first, second = (json.loads(run.stdout)["tasks"]["likelihood"] for run in runs)
    model, tokenizer = load_student(recipe.parent / "run/students/kv", dtype="float32")
    rows = questions(recipe.parent)
    plain = [log_likelihood(model, tokenizer, row["question"], f" {row['answer']}") for row in rows]
    assert first["perplexity,none"] == pytest.approx(math.exp(-sum(total for total, _ in plain) / len(rows)), rel=1e-4)
    assert first["acc,none"] == sum(greedy for _, greedy in plain) / len(rows)
    numbers = [{name: value for name, value in run.items() if not isinstance(value, str)} for run in (first, second)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    bootstrapped = first["perplexity_stderr,none"]
    assert math.isfinite(bootstrapped)
    assert bootstrapped > 0


def test_exact_match_is_kavas_own(recipe: Path) -> None:
    """The same prompts, continued greedily by lm-eval and by kava, and read by a regular expression and by kava."""
    kept = (recipe.parent / "tasks/questions.jsonl").read_text().splitlines()
    (recipe.parent / "tasks/questions.jsonl").write_text("\n".join(kept[: len(kept) // 2]))
    try:
        found = evaluate(recipe, "--tasks", "tasks/sums.yaml", "--max-new-tokens", 32)
    finally:
        (recipe.parent / "tasks/questions.jsonl").write_text("\n".join(kept))
    assert found["exact_match"]["questions"] == len(kept) // 2
    assert 0 < found["exact_match"]["share"] < 1
    assert found["tasks"]["sums"]["exact_match,marked"] == pytest.approx(found["exact_match"]["share"])


def test_a_limit_takes_the_first_samples(recipe: Path) -> None:
    """Also the least one, of which there is no standard error, in a dtype of less precision."""
    words = ("--no-generate", "--tasks", "tasks/likelihood.yaml", "--limit", 1, "--dtype", "bfloat16")
    found = evaluate(recipe, *words)
    text = (recipe.parent / "run/students/kv/evaluate.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    model, tokenizer = load_student(recipe.parent / "run/students/kv", dtype="bfloat16")
    row = questions(recipe.parent)[0]
    total, _ = log_likelihood(model, tokenizer, row["question"], f" {row['answer']}")
    assert found["tasks"]["likelihood"]["perplexity,none"] == pytest.approx(math.exp(-total), rel=0.05)


def test_a_student_with_lora_is_evaluated_merged(recipe: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    path = write_recipe(tmp_path, tiny_models, train={"max_steps": 2, "learning_rate": 0.05, "lora": {"r": 4}})
    kava("run", path)
    found = evaluate(path, "--no-generate", "--tasks", "tasks/likelihood.yaml")
    model, tokenizer = load_student(tmp_path / "run/students/kv", dtype="float32")
    rows = questions(recipe.parent)
    mean = sum(log_likelihood(model, tokenizer, r["question"], f" {r['answer']}")[0] for r in rows) / len(rows)
    assert found["tasks"]["likelihood"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-3)


BROKEN = {
    "gone": LIKELIHOOD.replace("questions.jsonl", "nowhere.jsonl"),
    "damaged": LIKELIHOOD.replace("questions.jsonl", "damaged.jsonl"),
    "fieldless": LIKELIHOOD.replace("{{question}}", "{{problem.text}}"),
    "long": LIKELIHOOD.replace("loglikelihood", "generate_until\ngeneration_kwargs: {max_gen_toks: 256}"),
    "keyless": "task: keyless\nno_such_key: 3\n",
    "unclosed": "task: [unclosed",
}


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (("--tasks", "sums_chioce", "--include-path", "tasks"), ["no such file; did you mean sums_choice?"]),
        (("--tasks", "nosuchtask"), ["--include-path DIR adds a folder of tasks"]),
        (("--tasks", "no_such_*"), ["knows no task that is called so"]),
        (("--tasks", "sums", "--include-path", "recipe.yaml"), ["recipe.yaml is not a folder"]),
        (("--include-path", "tasks"), ["say --tasks TASK too"]),
        (("--tasks", "gsm8k"), ["openai/gsm8k", "in the local cache (HF_HOME), or in files that the task names"]),
        (("--tasks", "broken/gone.yaml"), ["cannot load it", "nowhere.jsonl"]),
        (("--tasks", "broken/damaged.yaml"), ["cannot load it", "JSON"]),
        (("--tasks", "broken/fieldless.yaml"), ["'problem' is undefined"]),
        (("--tasks", "broken/long.yaml"), ["cannot run it", "less than model's maximum sequence length"]),
        (("--tasks", "broken/keyless.yaml"), ["cannot load it", "no_such_key"]),
        (("--tasks", "broken/unclosed.yaml"), ["cannot load it"]),
        (("--tasks", "unclosed", "--include-path", "broken"), ["name the file itself to see why"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "-") if isinstance(value, tuple) else "",
)
def test_mistakes(recipe: Path, words: tuple[str, ...], messages: list[str]) -> None:
    broken = recipe.parent / "broken"
    broken.mkdir(exist_ok=True)
    for name, text in BROKEN.items():
        (broken / f"{name}.yaml").write_text(text)
    (recipe.parent / "tasks/damaged.jsonl").write_text('{"question": "1", ')
    result = recipe.parent / "run/students/kv/evaluate.json"
    result.unlink(missing_ok=True)
    printed = " ".join(kava("evaluate", recipe, "--no-generate", *words, code=2).split())
    for message in messages:
        assert message in printed
    assert not result.exists()
