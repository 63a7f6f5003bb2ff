"""A plan for people, and for programs."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from ...store import SEGMENTS
from .plan import Plan, human

_SEGMENTS = [name for name, segment in SEGMENTS.items() if segment]


def describe(plan: Plan) -> dict[str, Any]:
    """A plan for programs: what `kava plan --json` prints; docs/plan.md has its keys."""
    counts = plan.counts
    tokens: dict[str, Any] = {}
    if counts is not None:
        for key, count in [*((n, counts.teacher(n)) for n in plan.geometries), ("student", counts.student)]:
            bound = ("student" if key == "student" else f"teacher {key}") in counts.bounds
            tokens[key] = {
                "tokens": count.rows(),
                "how": "bound" if bound else "exact" if count.is_exact else "sampled",
                "interval": [round(count.rows() * (1 - count.error)), round(count.rows() * (1 + count.error))],
                "longest": count.longest,
                "segments": count.segments,
            }
    return {
        "run_dir": str(plan.run.root),
        "samples": None if plan.corpus is None else len(plan.corpus),
        "corpus": [] if plan.corpus is None else list(plan.corpus.notes),
        "tokens": tokens,
        "stores": [
            {
                "stage": store.label,
                "path": str(store.path),
                "geometry": store.manifest.geometry.model_dump(),
                "dtype": store.manifest.dtype,
                "codec": store.manifest.codec,
                "parts": store.parts,
                "samples_per_part": store.manifest.samples_per_part,
                "files": store.size.files,
                "tokens": store.size.tokens,
                "bytes": store.size.bytes,
                "bytes_per_token": round(store.size.bytes_per_token, 1),
                "raw_bytes_per_token": store.size.raw_bytes_per_token,
                "estimated": store.size.estimated or None,
            }
            for store in plan.stores
        ],
        "bytes": plan.bytes,
        "weights": [{"of": w.label, "path": str(w.path), "bytes": w.bytes} for w in plan.students],
        "disks": [{"path": d.path, "needed": d.needed, "free": d.free, "fits": d.fits} for d in plan.disks],
        "memory": [memory.describe() for memory in plan.memory],
        "seconds": {stage: round(seconds, 1) for stage, seconds in plan.times.items()} or None,
        "break_even_epochs": None if plan.break_even_epochs is None else round(plan.break_even_epochs, 2),
        "smaller": [{"change": s.change, "bytes": s.bytes, "saves": s.saves} for s in plan.savings],
        "refusals": plan.refusals,
        "broken": plan.broken,
        "problems": [*plan.problems, *(f"the hub cannot be reached for {name}" for name in plan.unreached)],
    }


def size_tables(plan: Plan) -> list[Table]:
    """Tokens, stores, disks, memory, times and savings."""
    found = describe(plan)
    tables = []
    if found["tokens"]:
        tables.append(table := _table("tokens of", "", "", "longest", *_SEGMENTS))
        for name, t in found["tokens"].items():
            low, high = t["interval"]
            how = {"exact": "counted", "bound": "at most"}.get(t["how"], f"of a sample, 95 %: {low:,} to {high:,}")
            by_segment = [f"{t['segments'][segment]:,}" if t["segments"] else "" for segment in _SEGMENTS]
            table.add_row(escape(name), f"{t['tokens']:,}", how, f"{t['longest']:,}", *by_segment)
    if found["stores"]:
        tables.append(table := _table("store", "as", "parts", "files", "bytes/token", "size", ""))
        for s in found["stores"]:
            kind = f"{s['dtype']}, {s['codec']}"
            per_token = f"{s['bytes_per_token']:,.0f} of {s['raw_bytes_per_token']:,} raw"
            note = s["estimated"] or ""
            cells = (str(s["parts"]), str(s["files"]), per_token, human(s["bytes"]), note)
            table.add_row(escape(s["stage"]), kind, *cells)
        table.add_row("all", "", "", str(sum(s["files"] for s in found["stores"])), "", human(plan.bytes), "")
    if found["weights"]:
        tables.append(table := _table("weights", "size"))
        for w in found["weights"]:
            table.add_row(escape(w["of"]), human(w["bytes"]))
    if found["disks"] or found["memory"]:
        tables.append(table := _table("room", "needed", "free", ""))
        for d in found["disks"]:
            note = "" if d["fits"] else "[red]too little[/]"
            table.add_row(escape(d["path"]), human(d["needed"]), human(d["free"]), note)
        for m in found["memory"]:
            parts = {"weights": "weights", "kv": "keys and values", "activations": "activations"}
            note = ", ".join(f"{label} {human(m[key])}" for key, label in parts.items())
            free = "not known" if m["available"] is None else human(m["available"])
            label = f"{escape(m['teacher'])} on {m['device']}"
            table.add_row(label, f"about {human(m['needed'])}", free, note if m["fits"] else "[red]too little[/]")
    if found["seconds"]:
        tables.append(table := _table("time on this machine", ""))
        for stage, seconds in found["seconds"].items():
            table.add_row(escape(stage), duration(seconds))
        if plan.break_even_epochs is not None:
            table.add_row("shorter than running the teachers live from", f"{plan.break_even_epochs:.1f} epochs")
    if found["smaller"]:
        tables.append(table := _table("smaller by", "all stores", "saves"))
        for s in found["smaller"]:
            table.add_row(escape(s["change"]), human(s["bytes"]), human(s["saves"]))
    return tables


def duration(seconds: float) -> str:
    """For people: `12 s`, `3.4 min`, `5.0 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)
