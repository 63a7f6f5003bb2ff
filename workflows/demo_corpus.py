"""Writes the demo corpus: grade-school word problems with worked steps, from reasoning-gym's GSM-Symbolic templates.

Usage: python workflows/demo_corpus.py OUT.jsonl [SAMPLES]
"""

import json
import sys
from pathlib import Path
from random import Random

import reasoning_gym
from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok


def main(out: str, samples: int) -> None:
    """Goes round the templates, each time with new names and numbers."""
    generators = reasoning_gym.create_dataset("gsm_symbolic", size=1, seed=0).generators
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(samples):
        template = tasks_ok[number % len(tasks_ok)]
        item = generators[template](Random(number), 1.0)
        record = {
            "id": f"gsm-symbolic-{number:05d}",
            "template": str(template),
            "prompt": item["question"],
            "rationale": item["metadata"]["answer_cot"].rsplit("####", 1)[0].strip(),
            "answer": f"#### {item['answer']}",
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 160)
