"""What Hydra and OmegaConf refuse, told in one line: field, value, requirement, nearest valid name.

Left out: values that only their owner can judge (a clip length that is not 1 + 4k); those are ValueErrors of
the dataclass or of `models.assemble.validate`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
)

YAML_FIX = "a field stands once, as `name: value`, indented by spaces"


class ConfigError(ValueError):
    """A configuration refused before anything is built. The message is one line for the user."""


def leaf_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all values of a composed configuration."""
    keys = []
    for key in cfg:
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() and len(node):
            keys += leaf_keys(node, f"{prefix}{key!s}.")
        else:
            keys.append(f"{prefix}{key!s}")
    return keys


def refuse_added_keys(cfg: DictConfig, prefix: str = "") -> None:
    """Raise for a key that `+key=value` put into a node whose dataclass has no such field."""
    config = OmegaConf.get_type(cfg)
    if dataclasses.is_dataclass(config):
        valid = {field.name for field in dataclasses.fields(config)} | {"hydra"}
        for key in set(cfg) - valid:
            raise _unknown_field(f"{prefix}{key}", leaf_keys(cfg, prefix))
    for key in cfg:
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            refuse_added_keys(node, f"{prefix}{key!s}.")


def nearest(name: str, choices: list[str]) -> list[str]:
    """At most three of `choices` that `name` may have meant; siblings of the same parent first."""
    parent, _, last = name.rpartition(".")
    by_last: dict[str, list[str]] = {}
    for choice in choices:
        by_last.setdefault(choice.rpartition(".")[2], []).append(choice)
    siblings = [c.rpartition(".")[2] for c in choices if c.rpartition(".")[0] == parent]
    found = [f"{parent}.{s}" if parent else s for s in difflib.get_close_matches(last, siblings, 2, 0.6)]
    for close in difflib.get_close_matches(last, list(by_last), 3, 0.75):
        found += difflib.get_close_matches(name, by_last[close], 2, 0.0)
    found += difflib.get_close_matches(name, choices, 1, 0.7)
    return list(dict.fromkeys(found))[:3]


def explain(
    error: Exception,
    conf_dir: Path,
    schema_failures: dict[str, Exception],
    known: Callable[[], list[str]],
    prefix: str = "",
) -> ConfigError:
    """One line for what went wrong; `known` lists the valid field names (called only if needed).

    prefix: of the node that the error's keys are relative to ("optim.").
    """
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, conf_dir, schema_failures)
    for cause in _causes(error):
        if isinstance(cause, ConfigError):
            return cause
        if isinstance(cause, yaml.MarkedYAMLError):
            mark = cause.problem_mark
            where = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
            return ConfigError(f"{where}{cause.problem or cause}; {YAML_FIX}")
        if isinstance(cause, InterpolationKeyError):
            return ConfigError(f"{prefix}{cause.full_key}: {_first_line(cause)}")
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return _unknown_field(prefix + _full_key(cause), known(), _where(error))
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            value = f"={cause.value!r}" if cause.value is not None else ""
            return ConfigError(f"{prefix}{cause.full_key}{value}: {_first_line(cause)}")
    unmatched = re.search(r"Could not override '([^']+)'", str(error))
    if unmatched:
        return _unknown_field(unmatched[1], known())
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{_first_line(error)}; a text is quoted: 'prompt=\"a, b\"'")
    return ConfigError(f"{_first_line(error)}")


def _where(error: Exception) -> str:
    """The YAML file that Hydra was merging, if it says so."""
    found = re.match(r"In '([^']+)':", str(error))
    return f" (in conf/{found[1]}.yaml)" if found else ""


def _unknown_field(name: str, known: list[str], where: str = "") -> ConfigError:
    groups = {key[:dot] for key in known for dot in range(len(key)) if key[dot] == "."}
    known = [*known, *sorted(groups)]
    close = [choice for choice in nearest(name, known) if choice != name]
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else "--cfg job prints the valid ones"
    return ConfigError(f"no field '{name}'{where}; {hint}")


def choices_of(group: Path) -> list[str]:
    """What a group's folder has to choose from, by the names that the command line takes."""
    return sorted(path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml"))


def _missing_choice(
    error: MissingConfigException, conf_dir: Path, schema_failures: dict[str, Exception]
) -> ConfigError:
    wanted = str(error.missing_cfg_file or "")
    file = wanted.removesuffix("_schema")
    if file in schema_failures:
        cause = schema_failures[file]
        return ConfigError(f"conf/{file}.yaml: its _target_ cannot be imported: {type(cause).__name__}: {cause}")
    group, _, name = wanted.partition("/")
    choices = choices_of(conf_dir / group)
    if not name or not choices:
        groups = ", ".join(sorted(path.name for path in conf_dir.iterdir() if path.is_dir()))
        return ConfigError(f"{_first_line(error)}; groups of choices: {groups}")
    close = difflib.get_close_matches(name, choices, 1, 0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return ConfigError(f"no choice '{name}' for '{group}'; {hint}choices: {', '.join(choices)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, innermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return reversed(chain)


def _full_key(error: Any) -> str:
    return str(error.full_key or error.key)


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(useful[:2]) if useful else type(error).__name__
