"""The Hydra entry that every command shares: schemas, composing, the command line, errors of one line.

A YAML file with a `_target_: package.module.Class` is typed by the dataclass of that class (`Class.Config`,
or the class itself where it is a dataclass). The file lists `<file name>_schema` first in its defaults, so a
key that the dataclass does not have is refused when the configuration is composed, before anything is built.
`stage.name` (the file's name) is added to each schema that has no such field.

Left out: what a configuration means. `build_config` returns the plain dataclass; its owner validates it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import importlib
import logging
import logging.config
import os
import re
import socket
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TextIO

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.command_help import help_text
from data.config_errors import ConfigError, choices_of, explain, leaf_keys, refuse_added_keys

log = logging.getLogger(__name__)

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
REPO_DIR = CONF_DIR.parent
REFUSALS = (HydraException, OmegaConfBaseException, yaml.MarkedYAMLError)  # while a configuration is composed
REFUSED = (ValueError, FileNotFoundError, ImportError)  # of our own code: told in one line
LOCK_FILE = ".running"  # in a folder: who writes there
EXIT_FAILED = 1  # exit code of a run that began and cannot go on
EXIT_CONFIG = 2  # exit code of a refused configuration
EXIT_INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # what the system says of a place
_ADDED_FIELDS = ("_target_", "name")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt, in glibc's malloc.h
KEPT_BYTES = 1 << 30  # of freed memory at the top of the heap

# why a schema could not be registered ("stage/teacher" -> error): told only if that file is asked for
_schema_failures: dict[str, Exception] = {}
# file that each registered schema came from, and when it was written: unchanged files are not read again
_schema_files: dict[str, tuple[Path, int]] = {}


class RunFailedError(RuntimeError):
    """A run that began cannot go on. The message says in one line why, and what to do about it."""


# --------------------------------------------------------------------------------------------- schemas
def target_class(target: str) -> type:
    """The class at a dotted path. Raises ImportError or AttributeError."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def target_config(target: str) -> type:
    """The dataclass that types a YAML file: `<target>.Config`, or the target if it is a dataclass itself."""
    cls = target_class(target)
    config = cls.__dict__["Config"] if isinstance(cls, type) and "Config" in cls.__dict__ else cls
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"_target_={target} has no dataclass named Config and is none itself; give it one")
    return config


def register_schemas(conf_dir: Path | None = None) -> list[str]:
    """Put `<name>_schema` into Hydra's ConfigStore for each YAML under `conf_dir` with a `_target_`.

    Returns the registered names ("stage/teacher_schema"). A target that cannot be imported is remembered, and
    reported when a configuration that needs it is composed. Raises MarkedYAMLError for a file that is no YAML.
    """
    conf_dir = conf_dir or CONF_DIR
    registered = []
    for path in sorted(conf_dir.rglob("*.yaml")):
        group, name = path.parent.relative_to(conf_dir).as_posix(), path.stem
        schema, version = _config_id(group, f"{name}_schema"), (path, path.stat().st_mtime_ns)
        if _schema_files.get(schema) == version:
            registered.append(schema)
            continue
        with path.open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
        if not isinstance(content, dict) or "_target_" not in content:
            continue
        try:
            node = _schema_node(target_config(content["_target_"]), content["_target_"], name)
        except Exception as error:  # any failure of a foreign import: kept, and raised where it matters
            _schema_failures[_config_id(group, name)] = error
            continue
        _schema_failures.pop(_config_id(group, name), None)
        ConfigStore.instance().store(name=f"{name}_schema", group=None if group == "." else group, node=node)
        registered.append(schema)
        _schema_files[schema] = version
    return registered


def _config_id(group: str, name: str) -> str:
    return name if group == "." else f"{group}/{name}"


def _schema_node(config: type, target: str, name: str) -> type:
    have = {field.name for field in dataclasses.fields(config)}
    defaults = {"_target_": target, "name": name}
    added: list[Any] = [
        (key, str, dataclasses.field(default=defaults[key], kw_only=True)) for key in _ADDED_FIELDS if key not in have
    ]
    open_keys = {key: hint for key, hint in typing.get_type_hints(config).items() if _values_are_dataclasses(hint)}
    added += [(key, dict[str, Any], dataclasses.field(default_factory=dict)) for key in open_keys]
    return dataclasses.make_dataclass(config.__name__, added, bases=(config,), namespace={"__post_init__": _unchecked})


def _values_are_dataclasses(hint: Any) -> bool:
    """Whether the keys are the user's: OmegaConf adds no `+group.key.field=…` below them; `build_config` types it."""
    values = typing.get_args(hint)[1:]
    return typing.get_origin(hint) is dict and dataclasses.is_dataclass(values[0])


def _unchecked(self: Any) -> None:
    """A schema holds defaults, perhaps incomplete ones: only `build_config` runs the real `__post_init__`."""


# --------------------------------------------------------------------------------------------- composing
def compose_config(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose conf/<config_name>.yaml as the command line would. Raises ConfigError (one line)."""
    GlobalHydra.instance().clear()
    overrides = [as_value(override) for override in overrides]
    try:
        register_schemas()
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            cfg = hydra.compose(config_name, overrides=list(overrides))
        refuse_added_keys(cfg)
        return cfg
    except REFUSALS as error:
        raise explain(error, CONF_DIR, _schema_failures, lambda: _known_keys(config_name, overrides)) from error


def as_value(override: str, sweeps: bool = False) -> str:
    """`key=value` with the value quoted where Hydra's grammar would not take it for one: a sentence, a path with
    letters beyond ASCII, what a text field would get as another text (2024_01, 1.10, 1e5, true). What else parses, and
    choices of a group, stay as they are; with ``sweeps`` also `key=a,b`.

    Raises ConfigError for a group without a choice.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    if (group := CONF_DIR / key.lstrip("+")).is_dir():
        if value in ("", "null"):
            raise ConfigError(f"{override} names no choice; choices: {', '.join(choices_of(group))}")
        return override
    is_untyped = key.startswith(("+", "hydra."))  # other fields take their quoted value as what they are
    try:
        parsed = OverridesParser.create().parse_override(override)
        if sweeps if parsed.is_sweep_override() else is_untyped or not _is_respelled(parsed.value(), value):
            return override
    except HydraException:
        log.debug("%s is quoted", key)
    escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value)
    return f'{key}="{escaped}"'


def _is_respelled(value: Any, text: str) -> bool:
    """Whether a number or a truth value becomes another text."""
    return type(value) in (int, float, bool) and str(value) != text


def _known_keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Dotted names of all fields, with the group choices of `overrides` but none of their values."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    choices = [o for o in overrides if o.split("=")[0].lstrip("+") in groups and "," not in o]
    for attempt in (choices, [c for c in choices if not c.lstrip("+").startswith("experiment")], []):
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
                return leaf_keys(hydra.compose(config_name, overrides=list(attempt)))
        except (HydraException, OmegaConfBaseException) as error:
            log.debug("no field names from %s %s: %s", config_name, attempt, error)
    return _schema_keys()


def _schema_keys() -> list[str]:
    """Dotted names of the fields of all registered schemas: for when the YAML files do not compose."""
    keys: list[str] = []
    for schema in _schema_files:
        group = schema.rpartition("/")[0]
        node = ConfigStore.instance().load(f"{schema}.yaml").node
        keys += leaf_keys(node, f"{group.replace('/', '.')}." if group else "")
    return sorted(set(keys))


def build_config(node: DictConfig, config: type | None = None) -> Any:
    """The dataclass instance of a composed node (`config`, or the one its `_target_` names), validated.

    Interpolations are resolved. Raises ConfigError for a missing mandatory value, and lets through the
    ValueError that the dataclass's own `__post_init__` raises.
    """
    config = config or target_config(node["_target_"])
    names = {field.name for field in dataclasses.fields(config)}
    for key in sorted(OmegaConf.missing_keys(node)):
        key = ".".join(part for part in (node._get_full_key(None), key) if part)
        raise ConfigError(f"{key} has no value and needs one; set it: {key}=…")
    prefix = ""
    try:
        plain = OmegaConf.to_container(node, resolve=True)
        assert isinstance(plain, dict), "a composed node is a mapping"
        kept = {key: value for key, value in plain.items() if key in names or key not in _ADDED_FIELDS}
        prefix = f"{node._get_full_key(None)}.".lstrip(".")  # what is merged knows no parent
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), kept))
    except OmegaConfBaseException as error:
        raise explain(error, CONF_DIR, _schema_failures, lambda: leaf_keys(node, prefix), prefix) from error


def build_target(node: DictConfig) -> Any:
    """The object of a composed node: `<_target_>(build_config(node))`."""
    config = build_config(node)
    cls = target_class(node["_target_"])
    return config if isinstance(config, cls) else cls(config)


# --------------------------------------------------------------------------------------------- running
def run_app(config_name: str, main: Callable[[DictConfig], int | None], kept: str = "nothing is kept") -> None:
    """Run `main(cfg)` as the Hydra app conf/<config_name>.yaml, and exit.

    The run directory is the config's `output_dir`; the working directory is not changed. A refused
    configuration, and any ValueError, FileNotFoundError or ImportError raised by this repository's own code,
    is told in one line (exit code 2; the traceback goes to <output_dir>/traceback.txt, or to the terminal
    with MARIONETTE_DEBUG=1 or hydra.verbose=true), and so is a RunFailedError, or a disk that cannot be written
    to (exit code 1). An integer returned by `main` is the exit code. Ctrl-C is told in one line too (exit code 130):
    the message of the KeyboardInterrupt, or else `kept`, what it leaves.
    """
    overrides = [arg for arg in sys.argv[1:] if arg.startswith("~") or ("=" in arg and arg[0] != "-")]
    options = [arg for arg in sys.argv[1:] if arg not in overrides]
    try:
        overrides = [as_value(override, sweeps=bool({"-m", "--multirun"} & set(options))) for override in overrides]
        if {"-h", "--help"} & set(options):
            print(help_text(CONF_DIR, config_name, compose_config(config_name, overrides), overrides))
            sys.exit(0)
        _run_hydra(config_name, main, options, overrides)
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted: {str(stop) or kept}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (*REFUSALS, ConfigError) as error:
        if _debug():
            raise
        line = explain(error, CONF_DIR, _schema_failures, lambda: _known_keys(config_name, overrides))
        print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


def _run_hydra(
    config_name: str, main: Callable[[DictConfig], int | None], options: list[str], overrides: list[str]
) -> None:
    keep_freed_memory()
    register_schemas()
    sys.argv = [sys.argv[0], *options, *_hydra_settings(config_name), *overrides]
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing them

    def task(cfg: DictConfig) -> None:
        refuse_added_keys(cfg)
        _restore_env("HYDRA_FULL_ERROR", full_error)
        if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
            _give_own_places(cfg, overrides)
        code = _guarded(main, cfg)
        if code:
            sys.exit(code)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(task)()
    except (FileExistsError, NotADirectoryError) as error:  # Hydra could not make the run directory
        require_folder(Path(str(error.filename)), str(error.filename))
        raise
    except OSError as error:
        if (told := _told_of_place(error, UNWRITABLE)) is None:
            raise
        raise ConfigError(told) from error
    except ValueError as error:
        if _last_file(error) != logging.config.__file__ or not isinstance(error.__cause__, OSError):
            raise
        cause = error.__cause__  # of the log, the first file of a run
        raise ConfigError(_told_of_place(cause, (cause.errno,))) from error


def _told_of_place(error: OSError, kinds: Collection[int | None]) -> str | None:
    """A line for a place that cannot be written; None where the error is of none of these kinds (errno)."""
    is_denied = isinstance(error, PermissionError)  # for reading too, and not of files alone
    if error.errno not in kinds or (is_denied and error.filename is None):
        return None
    place, what = error.filename or "what the command makes", "read or written" if is_denied else "written"
    return f"{place} cannot be {what} ({error.strerror}); name another place"


def _give_own_places(cfg: DictConfig, overrides: list[str]) -> None:
    """Jobs of --multirun must not write over each other: each has its number in `output_dir`, and in `out` too where
    that is not all that is swept and does not have ${hydra:job.num}.
    """
    cfg.output_dir = HydraConfig.get().runtime.output_dir
    swept = {override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)
             if override.is_sweep_override()}  # fmt: skip
    numbered = any(override.startswith("out=") and "hydra:job.num" in override for override in overrides)
    if "out" in cfg and swept != {"out"} and not numbered:
        out = Path(cfg.out)
        cfg.out = str(out.parent / str(HydraConfig.get().job.num) / out.name)
        log.info("out=%s for this job of --multirun", cfg.out)


def require_folder(folder: Path, given: str) -> None:
    """Raises ConfigError, naming what was given ("out=a/b"), where no folder can be made as a file or a link to nothing
    is in its way.
    """
    found = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        what = "a file" if found.exists() else "a link to nothing"
        raise ConfigError(f"{given}: {found} is {what} where a folder is needed; name another place")


def claim(folder: Path, given: str) -> TextIO:
    """A lock on the folder for as long as the file is open; the system lets go of it when the process ends, however.

    Raises ValueError, naming what was given ("out=a/b") and who has it, where another run writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"{given} is being written by {lock.read().strip()}; stop that run, or name another place"
        ) from None
    except OSError as error:  # a file system without locks
        log.debug("%s is not locked: %s", folder, error)
    lock.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    lock.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
    lock.flush()
    return lock


def keep_freed_memory() -> bool:
    """Let this process reuse its freed buffers instead of returning them to the system; whether that could be set.

    glibc maps every big buffer afresh, and the kernel clears its pages again: on a CPU that took a third of the time
    of generating a batch of clips. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None if os.name == "posix" else "msvcrt")
    if not hasattr(library, "mallopt"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: KEPT_BYTES // 16}
    return all(library.mallopt(name, value) for name, value in settings.items())


def _hydra_settings(config_name: str) -> list[str]:
    """All that Hydra writes goes into `output_dir`; the user's own hydra.* overrides come later and win."""
    return [
        "hydra.run.dir=${output_dir}",
        "hydra.sweep.dir=${output_dir}",
        "hydra.job.chdir=false",
        f"hydra.job.name={config_name}",
    ]


def _restore_env(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _debug() -> bool:
    return bool(os.environ.get("MARIONETTE_DEBUG")) or any(
        arg.startswith("hydra.verbose=") and not arg.endswith("=false") for arg in sys.argv
    )


def _guarded(main: Callable[[DictConfig], int | None], cfg: DictConfig) -> int:
    try:
        return main(cfg) or 0
    except (RunFailedError, ValueError, OSError, ImportError) as error:
        if _debug() or (told := _told(error)) is None:
            raise
        print(f"error: {' '.join(told.split())}", file=sys.stderr)
        _keep_traceback(error)
        return EXIT_CONFIG if isinstance(error, REFUSED) else EXIT_FAILED


def _told(error: Exception) -> str | None:
    """The line in place of a traceback; None where the traceback is needed."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return _told_of_place(error, UNWRITABLE)
    return str(error) if isinstance(error, (RunFailedError, ConfigError)) or raised_here(error) else None


def _keep_traceback(error: Exception) -> None:
    log.debug("refused", exc_info=error)
    file = Path(HydraConfig.get().runtime.output_dir) / "traceback.txt"
    try:
        file.write_text("".join(traceback.format_exception(error)))
    except OSError as unwritten:  # the disk may be full, which may be what is told
        log.debug("%s is not written: %s", file, unwritten)


def raised_here(error: Exception) -> bool:
    """Whether our own code raised it on purpose: an error out of a library keeps its traceback."""
    file = _last_file(error)
    return file is not None and Path(file).resolve().is_relative_to(REPO_DIR) and "site-packages" not in file


def _last_file(error: Exception) -> str | None:
    """The source file that raised it; None for an error that was never raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else None
