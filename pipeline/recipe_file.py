"""Reading a recipe's YAML: what YAML lets pass and a recipe must not have is refused here.

A key given twice, an alias that multiplies, a number that is none, a path with an unset variable: each would otherwise
change a run without a word. Values are checked in the strict way of JSON afterwards, where `true` is no number.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from ..errors import RecipeError, StoreError
from ..store.files import refuse_url

PATHS: Final = (
    ("run_dir",),
    ("store_dir",),
    ("corpus", "path"),
    ("corpus", "heldout", "path"),
    ("teachers", "*", "model"),
    ("student", "model"),
    ("student", "tokenizer"),
)
"""Keys that hold paths, or names that may be paths; `*` stands for any key."""
_WRITTEN: Final = ("run_dir", "store_dir")
"""Keys of folders that are written to."""
_SECRET: Final = re.compile(
    r"(?:^|_)(?:(?:hub|hf|auth|access|use_auth)_token|api_?key|password|secret(?:_key)?)$", re.IGNORECASE
)
"""Names of settings that are not saved."""
_MOST_NODES: Final = 100_000
"""Values in a recipe, at most, with every alias written out."""
_VARIABLE: Final = re.compile(r"\$\{([^}]*)\}")


class _Loader(yaml.SafeLoader):
    """YAML's safe types, with YAML 1.2's floats (`1e-4` is a number) and without dates, which stay as written."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it.
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: with the reason, and the line if it is known.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{place}: not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from None
    except RecursionError:
        raise RecipeError(": not YAML: it is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        reason = "a number has too many digits" if "integer string conversion" in str(error) else str(error)
        raise RecipeError(f": not YAML: {reason}") from None


def set_key(recipe: dict[str, Any], override: str) -> None:
    """Sets a key of a recipe, in place.

    Args:
        recipe: whose missing sections are added.
        override: `key.sub=value`; the value is YAML.

    Raises:
        RecipeError: if it is not of that form, the value is not YAML, or the key is inside a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"-s {override!r}: write it as key.sub=value, for example -s train.alpha=0.5")
    try:
        value = read_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"-s {override!r}{error}") from None
    *parents, last = key.strip().split(".")
    node = recipe
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        if not isinstance(node[name], dict):
            raise RecipeError(f"-s {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = node[name]
    node[last] = value


def refuse_values(value: Any, key: str = "") -> None:
    """Refuses what JSON does not have: infinite numbers, sets, bytes, keys that are no text.

    Raises:
        RecipeError: naming the key.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RecipeError(f"{key or 'the recipe'}: key {name!r} is not text. Put it in quotes.")
            refuse_values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_values(inner, f"{key}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key}: {value} is not a finite number. Give a number, or leave the key out.")
    elif value is not None and not isinstance(value, str | int | float):
        raise RecipeError(f"{key}: {value} is read as a {type(value).__name__}. Put it in quotes if it is text.")


def expand_paths(recipe: dict[str, Any]) -> None:
    """Expands `~` and `${VARIABLE}` in every path of a recipe, in place.

    Raises:
        RecipeError: naming the key, if a variable is not set or there is no such user.
    """
    for place in PATHS:
        for holder, name, key in list(_holders(recipe, place, "")):
            value = holder[name]
            if isinstance(value, str):
                holder[name] = expand_path(value, key)
            elif isinstance(value, list):
                holder[name] = [expand_path(v, f"{key}.{n}") if isinstance(v, str) else v for n, v in enumerate(value)]


def refuse_urls(recipe: dict[str, Any]) -> None:
    """Refuse addresses such as `s3://bucket/run` as folders that are written to.

    Raises:
        RecipeError: naming the key.
    """
    for key in _WRITTEN:
        if isinstance(recipe.get(key), str):
            try:
                refuse_url(recipe[key], key)
            except StoreError as error:
                raise RecipeError(str(error)) from None


def share_templates(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose chat template settings are those of every model that has none of its own."""
    shared = {k: recipe[k] for k in ("chat_template", "chat_template_date") if recipe.get(k) is not None}

    def filled(model: Any) -> Any:
        return {**shared, **model} if isinstance(model, dict) else model

    teachers = recipe.get("teachers")
    if isinstance(teachers, dict):
        teachers = {name: filled(teacher) for name, teacher in teachers.items()}
    sections = {"teachers": teachers, "student": filled(recipe.get("student"))}
    return recipe | {key: section for key, section in sections.items() if key in recipe}


def without_secrets(section: Any) -> Any:
    """Return sections of a recipe without tokens, keys and passwords, which libraries' arguments may hold."""
    if isinstance(section, dict):
        return {name: without_secrets(value) for name, value in section.items() if not _SECRET.search(str(name))}
    return [without_secrets(value) for value in section] if isinstance(section, list) else section


def expand_path(text: str, key: str) -> str:
    """A path with `~` and `${VARIABLE}` expanded.

    Raises:
        RecipeError: if a variable is not set, or there is no such user.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise RecipeError(f"{key}: the environment variable {name!r} is not set. Set it, or write the path out.")
        return os.environ[name]

    expanded = _VARIABLE.sub(value, text)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError:
        raise RecipeError(
            f"{key}: there is no home folder for {expanded.split('/')[0]!r}. Write the path out."
        ) from None


def _holders(node: Any, place: Sequence[str], key: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The mappings that hold the keys at a place, with those keys and their full names."""
    if not isinstance(node, dict):
        return
    names = list(node) if place[0] == "*" else [place[0]] if place[0] in node else []
    for name in names:
        full = f"{key}.{name}" if key else str(name)
        if len(place) == 1:
            yield node, name, full
        else:
            yield from _holders(node[name], place[1:], full)


def _check(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Number of values in a node with all aliases written out.

    Raises:
        RecipeError: if there are too many, an alias leads to itself, or a key is given twice.
    """
    if id(node) in above:
        raise RecipeError(f" line {_line(node)}: an alias leads to itself. Write the value out.")
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    above.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value != "<<":
                if name.value in seen:
                    raise RecipeError(
                        f" line {_line(name)}: {name.value!r} is given twice, first in line {seen[name.value]}. "
                        "Leave one of them out."
                    )
                seen[name.value] = _line(name)
            size += _check(name, sizes, above) + _check(value, sizes, above)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(value, sizes, above) for value in node.value)
    above.discard(id(node))
    if size > _MOST_NODES:
        raise RecipeError(
            f" line {_line(node)}: more than {_MOST_NODES:,} values, aliases written out. Make it smaller."
        )
    sizes[id(node)] = size
    return size


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
