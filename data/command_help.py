"""What `--help` prints: what a command does, the groups and experiments that fit it, the fields of what is chosen.

Left out: fields below a field (`bench.tracker.rows`); `--cfg job --package bench.tracker` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

FOOTER = """
Overrides: any field of any group, e.g. seed=1 output_dir=outputs/try; an unknown one is refused.
  --cfg job           print the composed configuration and stop; with --package bench.world, that part of it
  --multirun a=1,2    one run for each value; each writes into a folder of its number
  --hydra-help        the options of Hydra itself
  MARIONETTE_DEBUG=1  show tracebacks of refused configurations"""


def help_text(conf_dir: Path, config_name: str, cfg: DictConfig, overrides: Sequence[str] = ()) -> str:
    """The opening comment of conf/<config_name>.yaml, its groups with their choices, the command's fields, those of
    the groups that only this command has or that `overrides` name, and how to override.

    cfg: composed from the overrides.
    """
    groups = dict(group_defaults(conf_dir, config_name))
    others = [path.stem for path in conf_dir.glob("*.yaml") if path.stem != config_name]
    shared = {group for other in others for group, _ in group_defaults(conf_dir, other)}
    named = {override.split("=")[0] for override in overrides}
    lines = [f"python -m {config_name} [group=choice …] [field=value …]", ""]
    lines += [*_opening_comment(conf_dir / f"{config_name}.yaml"), "", "Groups (group=choice, * = default):"]
    for group, default in groups.items():
        lines += _choices(conf_dir, config_name, group, default)
    added = {"_target_"} | ({"name"} if cfg._get_node("name") == config_name else set())
    plain = [key for key in cfg if key not in groups and key not in added]
    lines += ["", "Fields of this command and their values:", *_fields(cfg, plain)]
    for group in groups:
        if group != "experiment" and (group not in shared or group in named):
            lines += ["", f"Fields of {group}={cfg[group].name} and their values:"]
            lines += _fields(cfg[group], [key for key in cfg[group] if key not in ("_target_", "name")], f"{group}.")
    return "\n".join(lines) + "\n" + FOOTER


def _choices(conf_dir: Path, config_name: str, group: str, default: str | None) -> Iterator[str]:
    """A line for each choice, with the first line of its comment."""
    for file in sorted((conf_dir / group).rglob("*.yaml")):
        if group == "experiment" and not fits(conf_dir, config_name, file):
            continue
        choice = file.relative_to(conf_dir / group).with_suffix("").as_posix()
        mark, first = "*" if choice == default else " ", (_opening_comment(file) or [""])[0]
        yield f"  {mark} {group + '=' + choice:<38} {first}".rstrip()


def fits(conf_dir: Path, config_name: str, experiment: Path) -> bool:
    """Whether a command has every group that an experiment chooses."""
    groups = {group for group, _ in group_defaults(conf_dir, config_name)}
    chosen = [next(iter(entry)) for entry in _read(experiment).get("defaults", []) if isinstance(entry, dict)]
    return all(_place(key) in groups for key in chosen)


def _place(key: str) -> str:
    """The group of a key of `defaults`: stage of `override /stage`, bench of `override /world@bench.world`."""
    group, _, package = key.split()[-1].lstrip("/").partition("@")
    return package.split(".")[0] or group


def _fields(node: DictConfig, keys: Sequence[Any], prefix: str = "") -> Iterator[str]:
    """A line for each value, as it would be set; one for a group of values."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict), "a configuration has names"
    for key in keys:
        if isinstance(plain[key], dict) and plain[key]:
            yield f"    {prefix}{key}.…  ({len(plain[key])} field(s), {', '.join(list(plain[key])[:2])} …)"
        else:
            yield f"    {prefix}{key}={_as_yaml(plain[key])}"


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _opening_comment(path: Path) -> list[str]:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("#").strip())
    return lines


def group_defaults(conf_dir: Path, config_name: str) -> Iterator[tuple[str, str | None]]:
    """(group, choice) of the defaults of conf/<config_name>.yaml."""
    for entry in _read(conf_dir / f"{config_name}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            for group, choice in entry.items():
                name = group.removeprefix("optional ").removeprefix("override ").split("@")[0]
                if (conf_dir / name).is_dir():
                    yield name, choice


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}
