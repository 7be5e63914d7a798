"""data/app.py: one-line refusals, exit codes, run directory; every YAML of the repository composes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data.app as app
from data.command_help import fits, group_defaults, help_text
from data.config_errors import ConfigError, nearest

REPO = Path(app.__file__).resolve().parent.parent

STAGE_MODULE = """
import dataclasses

@dataclasses.dataclass
class Inner:
    depth: int = 2  # layers

@dataclasses.dataclass
class TopConfig:
    stage: dict = dataclasses.field(default_factory=dict)
    output_dir: str = "outputs/x"
    out: str = "outputs/result"
    width: int = 8
    inner: Inner = dataclasses.field(default_factory=Inner)

class Stage:
    @dataclasses.dataclass
    class Config:
        init_from: str = "???"
        window_chunks: int = 1
        sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
        decay: float | None = None
        def __post_init__(self):
            if self.window_chunks < 0:
                raise ValueError(f"window_chunks={self.window_chunks} must be >= 0; give 0 for no window")
    def __init__(self, cfg):
        self.cfg = cfg
"""
MAIN = """
import sys
sys.path[:0] = [{repo!r}, {here!r}]
import data.app as app
from pathlib import Path
app.CONF_DIR = Path({here!r}) / "conf"
app.REPO_DIR = Path({here!r})
def main(cfg):
    stage = app.build_target(cfg.stage)
    (Path(cfg.output_dir) / "ran.txt").write_text(type(stage.cfg).__name__)
    Path(cfg.out).mkdir(parents=True)
    if stage.cfg.window_chunks == 77:
        int("not ours")
    if stage.cfg.window_chunks == 66:
        raise app.RunFailedError("the disk is full;\\nmake room")
    if stage.cfg.window_chunks == 88:
        raise OSError(28, "No space left on device")
    if stage.cfg.window_chunks == 99:
        raise OSError(5, "Input/output error")
    if stage.cfg.window_chunks == 33:
        raise KeyboardInterrupt
    if stage.cfg.window_chunks == 44:
        raise KeyboardInterrupt("two chunks are kept")
    return 5 if stage.cfg.window_chunks == 55 else None
app.run_app("top", main, kept="the rest is kept")
"""


@pytest.fixture
def small_app(tmp_path, monkeypatch):
    conf = tmp_path / "conf" / "stage"
    conf.mkdir(parents=True)
    (tmp_path / "app_stages.py").write_text(STAGE_MODULE)
    (tmp_path / "conf" / "top.yaml").write_text(
        textwrap.dedent("""\
        # Does nothing, well.
        defaults: [top_schema, stage: causal, _self_]
        _target_: app_stages.TopConfig
        width: 16
        output_dir: outputs/${stage.name}
    """)
    )
    for name in ("causal", "rl"):
        (conf / f"{name}.yaml").write_text(
            f"# The {name} stage.\ndefaults: [{name}_schema, _self_]\n_target_: app_stages.Stage\ninit_from: a\n"
        )
    (conf / "broken.yaml").write_text("defaults: [broken_schema, _self_]\n_target_: no_such_module.Stage\n")
    (conf / "typo.yaml").write_text("defaults: [typo_schema, _self_]\n_target_: app_stages.Stage\nwindo_chunks: 1\n")
    (conf / "missing.yaml").write_text("defaults: [missing_schema, _self_]\n_target_: app_stages.Stage\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(app, "CONF_DIR", tmp_path / "conf")
    yield tmp_path
    sys.modules.pop("app_stages", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.windo_chunks=2", "no field 'stage.windo_chunks'; did you mean 'stage.window_chunks'?"),
        ("+stage.windo_chunks=2", "no field 'stage.windo_chunks'; did you mean 'stage.window_chunks'?"),
        ("window_chunks=2", "no field 'window_chunks'; did you mean 'stage.window_chunks'?"),
        ("inner.dept=2", "no field 'inner.dept'; did you mean 'inner.depth'?"),
        ("widht=2", "no field 'widht'; did you mean 'width'?"),
        ("stage=casual", "no choice 'casual' for 'stage'; did you mean 'causal'? choices: broken, causal, "),
        ("stage=broken", "conf/stage/broken.yaml: its _target_ cannot be imported"),
        (
            "stage=typo",
            "no field 'stage.windo_chunks' (in conf/stage/typo.yaml); did you mean 'stage.window_chunks'",
        ),
        ("stage.window_chunks=many", "stage.window_chunks='many': "),
    ],
)
def test_refused_in_one_line(small_app, override, message):
    with pytest.raises(ConfigError) as info:
        app.compose_config("top", [override])
    assert message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("init_from: a\ninit_from: b\n", "line 2: found duplicate key init_from"),
        ("init_from: a\n\tdecay: 0.1\n", "line 2: found character '\\t' that cannot start any token"),
        ("sizes: [1, 2\n", "line 2: expected ',' or ']'"),
    ],
)
def test_a_file_that_is_no_yaml_is_told_with_its_line(small_app, text, problem):
    (small_app / "conf/stage/causal.yaml").write_text(text)
    with pytest.raises(ConfigError) as info:
        app.compose_config("top")
    assert f"conf/stage/causal.yaml, {problem}" in str(info.value) and "\n" not in str(info.value)
    done = _run(small_app)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_group_choice_gives_typed_values_and_the_dataclass(small_app):
    cfg = app.compose_config("top", ["stage=rl", "stage.sizes=[3]", "stage.decay=0.5"])
    assert (cfg.output_dir, cfg.width, cfg.inner.depth) == ("outputs/rl", 16, 2)
    stage = app.build_target(cfg.stage)
    assert type(stage.cfg).__qualname__ == "Stage.Config"
    assert (stage.cfg.sizes, stage.cfg.decay, stage.cfg.init_from) == ([3], 0.5, "a")


def test_missing_value_and_dataclass_validation(small_app):
    with pytest.raises(ConfigError, match=r"init_from.*needs one"):
        app.build_config(app.compose_config("top", ["stage=missing"]).stage)
    with pytest.raises(ValueError, match="window_chunks=-1 must be >= 0; give 0 for no window"):
        app.build_config(app.compose_config("top", ["stage.window_chunks=-1"]).stage)


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    script = folder / "main.py"
    script.write_text(MAIN.format(repo=str(REPO), here=str(folder)))
    return subprocess.run([sys.executable, str(script), *args], cwd=folder, capture_output=True, text=True, timeout=60)


def test_command_line(small_app):
    ok = _run(small_app, "stage=rl", "output_dir=outputs/here")
    assert (ok.returncode, ok.stdout, ok.stderr) == (0, "", "")
    assert (small_app / "outputs/here/ran.txt").read_text() == "Config"
    assert sorted(p.name for p in small_app.iterdir() if p.name != "__pycache__") == [
        "app_stages.py",
        "conf",
        "main.py",
        "outputs",
    ]
    assert (small_app / "outputs/here/.hydra/config.yaml").exists()

    bad = _run(small_app, "stage.windo_chunks=2")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: no field 'stage.windo_chunks'; did you mean 'stage.window_chunks'?\n"


def test_one_run_per_value(small_app):
    done = _run(small_app, "--multirun", "stage=rl", "width=1,2", "output_dir=outputs/many")
    assert done.returncode == 0, done.stderr
    assert [(small_app / f"outputs/many/{n}/ran.txt").exists() for n in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        (["width=1,2"], ["outputs/0/result", "outputs/1/result"]),
        (["width=1,2", "out=a"], ["0/a", "1/a"]),
        (["out=a,b"], ["a", "b"]),
        (["out=a,b", "width=1,2"], ["0/a", "1/a", "2/b", "3/b"]),
        (["width=1,2", "out=n${hydra:job.num}"], ["n0", "n1"]),
        (["width=1,2", "out='a,b'"], ["0/a,b", "1/a,b"]),
    ],
)
def test_jobs_do_not_write_over_each_other(small_app, overrides, places):
    done = _run(small_app, "--multirun", *overrides)
    assert done.returncode == 0, done.stderr
    assert [place for place in places if not (small_app / place).is_dir()] == []


def test_a_file_in_the_way_of_the_run_directory_is_told_in_one_line(small_app):
    done = _run(small_app, "output_dir=main.py/run")
    assert done.returncode == 2
    assert re.fullmatch(r"error: main.py/run: \S+main.py is a file where a folder is needed; .*\n", done.stderr)


def test_a_place_that_cannot_be_written_is_told_in_one_line(small_app):
    (small_app / "outputs/run/top.log").mkdir(parents=True)
    done = _run(small_app, "output_dir=outputs/run")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \S+/run/top.log cannot be written \(Is a directory\); name another place\n", done.stderr
    )
    full = _run(small_app, "stage.window_chunks=88")
    assert full.returncode == 1 and full.stderr.count("\n") == 1
    assert full.stderr.startswith("error: what the command makes cannot be written (No space left on device); name")
    broken = _run(small_app, "stage.window_chunks=99", "out=outputs/other")
    assert broken.returncode == 1 and "Traceback" in broken.stderr and "Input/output error" in broken.stderr


def test_where_a_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    app.require_folder(tmp_path, "out=x")
    app.require_folder(tmp_path / "new" / "newer", "out=x")
    for place, found in (("file", "a file"), ("link", "a link to nothing")):
        for path in (tmp_path / place, tmp_path / place / "new" / "newer"):
            with pytest.raises(ConfigError, match=rf"out=x: \S+/{place} is {found} where a folder is needed"):
                app.require_folder(path, "out=x")


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    """Each would take the other's unfinished checkpoints for leftovers of a crash, or pack its shards."""
    first = app.claim(tmp_path / "run", "out=run")
    with pytest.raises(ValueError, match=rf"out=run is being written by process {os.getpid()} on"):
        app.claim(tmp_path / "run", "out=run")
    first.close()
    app.claim(tmp_path / "run", "out=run").close()


def test_an_interrupt_is_told_in_one_line(small_app):
    for number, kept in ((33, "the rest is kept"), (44, "two chunks are kept")):
        done = _run(small_app, f"stage.window_chunks={number}", f"out=outputs/{number}")
        assert (done.returncode, done.stderr) == (130, f"\ninterrupted: {kept}\n")


def test_value_errors_of_our_code_are_one_line_others_keep_their_traceback(small_app):
    refused = _run(small_app, "stage.window_chunks=-1")
    assert refused.returncode == 2
    assert refused.stderr == "error: window_chunks=-1 must be >= 0; give 0 for no window\n"
    assert "Traceback" in (small_app / "outputs/causal/traceback.txt").read_text()
    assert _run(small_app, "stage.window_chunks=55").returncode == 5


def test_a_run_that_cannot_go_on_says_why_in_one_line(small_app):
    failed = _run(small_app, "stage.window_chunks=66")
    assert (failed.returncode, failed.stderr) == (1, "error: the disk is full; make room\n")
    assert "RunFailedError" in (small_app / "outputs/causal/traceback.txt").read_text()
    (small_app / "outputs/second/traceback.txt").mkdir(parents=True)  # nothing more can be written there
    again = _run(small_app, "stage.window_chunks=66", "output_dir=outputs/second", "out=outputs/second/out")
    assert (again.returncode, again.stderr) == (1, failed.stderr)


def test_help(small_app):
    text = _help("top", "stage=rl", "stage.sizes=[3]", "width=9")
    for part in ("Does nothing, well.", "* stage=causal", "The rl stage.", "    width=9\n", "--cfg job"):
        assert part in text
    assert "Fields of stage=rl and their values:\n    stage.init_from=a\n    stage.window_chunks=1\n" in text
    assert "    stage.sizes=[3]\n    stage.decay=null\n" in text
    assert "    inner.…  (1 field(s), depth …)\n" in text
    assert "schema" not in text and "_target_" not in text


def _help(name, *overrides):
    return help_text(app.CONF_DIR, name, app.compose_config(name, overrides), overrides)


def test_help_is_printed_by_the_command(small_app):
    done = _run(small_app, "stage=rl", "--help")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", _help("top", "stage=rl") + "\n")
    refused = _run(small_app, "stage=lr", "--help")
    assert (refused.returncode, refused.stdout) == (2, "") and "no choice 'lr' for 'stage'" in refused.stderr


def test_nearest_prefers_siblings():
    keys = ["stage.lr", "stage.window_chunks", "model.rollout.window_chunks", "seed"]
    assert nearest("stage.window_chunk", keys)[0] == "stage.window_chunks"
    assert nearest("model.rollout.windows_chunks", keys)[0] == "model.rollout.window_chunks"
    assert nearest("zzz", keys) == []


# ------------------------------------------------------------------------------ the repository's own YAML
TOP_LEVEL = sorted(path.stem for path in app.CONF_DIR.glob("*.yaml"))
CASES = [
    (name, f"{group}={file.stem}")
    for name in TOP_LEVEL
    for group, _ in group_defaults(app.CONF_DIR, name)
    for file in sorted((app.CONF_DIR / group).glob("*.yaml"))
    if group != "experiment"
]
EXPERIMENTS = [
    path.relative_to(app.CONF_DIR / "experiment").with_suffix("").as_posix()
    for path in sorted((app.CONF_DIR / "experiment").rglob("*.yaml"))
]


HALLMARKS = {"train": "stage", "data": "source", "eval": "bench"}  # the group that only this command has


def _text(experiment: str) -> str:
    return (app.CONF_DIR / "experiment" / f"{experiment}.yaml").read_text()


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_every_choice_composes(name, choice):
    cfg = app.compose_config(name, [choice])
    assert "output_dir" in cfg


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    """With at least one command: an experiment is written for one."""
    errors = []
    for name in sorted(TOP_LEVEL, key=lambda name: f"/{HALLMARKS.get(name)}:" not in _text(experiment)):
        try:
            app.compose_config(name, [f"experiment={experiment}"])
            return
        except ConfigError as error:
            errors.append(f"{name}: {error}")
    pytest.fail("; ".join(errors))


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_help_lists_the_experiments_that_compose(name):
    """One of each kind: those of another model differ in values alone."""
    text = _help(name)
    for path in (app.CONF_DIR / "experiment").glob("quickstart/*.yaml"):
        try:
            app.compose_config(name, [f"experiment=quickstart/{path.stem}"])
            composes = True
        except ConfigError:
            composes = False
        assert fits(app.CONF_DIR, name, path) == composes, path
        assert (f"experiment=quickstart/{path.stem} " in text) == composes


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_help_of_one_command_alone_lists_an_experiment(experiment):
    file = app.CONF_DIR / "experiment" / f"{experiment}.yaml"
    assert len([name for name in TOP_LEVEL if fits(app.CONF_DIR, name, file)]) == 1


def test_help_lists_the_fields_of_the_groups_that_are_the_commands_own_or_named():
    assert "    bench.num_frames=241\n" in _help("eval", "experiment=sprites/long_video")
    assert "drag.lr=" not in _help("eval") and "    drag.lr=" in _help("eval", "drag=paper")
    assert "    prompt=''\n    tracks=null\n    tracks_resize=false\n" in _help("stream")


def test_unknown_key_is_refused_by_each_command():
    for name in TOP_LEVEL:
        with pytest.raises(ConfigError, match="no field 'no_such_key'"):
            app.compose_config(name, ["no_such_key=1"])


REUSED = """
import resource, sys
import numpy as np
from data.app import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if not keep_freed_memory():
    sys.exit(77)
np.ones(64 << 20, np.uint8)
before = faults()
for _ in range(10):
    np.ones(64 << 20, np.uint8)
print(faults() - before)
"""


def test_freed_buffers_are_used_again():
    command = [sys.executable, "-c", REUSED]
    done = subprocess.run(command, cwd=app.REPO_DIR, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert int(done.stdout) < 100, "page faults; ten buffers that are mapped afresh make thousands"


@pytest.mark.parametrize(
    "text",
    [
        "a bear, walking",
        "ein Bär",
        "what? (yes) = no!",
        'say "hi"',
        "back\\slash\\",
        "一只熊",
        "/tmp/ünï/x (1).mp4",
        "it's; so",
        "2024_01",
        "1.10",
        "1e5",
        "3E-6",
        "true",
        "FALSE",
    ],
)
def test_any_text_is_a_value(text):
    """A caption or a path as a shell hands it over, without a second pair of quotes."""
    cfg = app.compose_config("stream", [f"prompt={text}", "image=x"])
    assert cfg.prompt == text


@pytest.mark.parametrize(
    "override",
    [
        "steps=3",
        "++optim.modules.critic.lr=3e-6",
        "a=-1.5",
        "a=True",
        "hydra.verbose=true",
        "a=[1,2]",
        "a={b:1}",
        'a="x, y"',
        "stage=teacher,vae",
        "~a",
        "+a.b=null",
        "prompt=a bear",
        "a=",
    ],
)
def test_what_parses_and_choices_of_a_group_stay_as_they_are(override):
    assert app.as_value(override) == override


@pytest.mark.parametrize("value", ["null", ""])
def test_a_group_without_a_choice_is_refused(value):
    """Hydra's own answer would be a traceback."""
    with pytest.raises(ConfigError, match=f"^stage={value} names no choice; choices: .*teacher"):
        app.compose_config("train", [f"stage={value}"])


def test_a_number_may_be_written_in_any_way():
    cfg = app.compose_config("train", ["stage=teacher", "seed=1_000", "optim.lr=.10", "optim.betas=[.90,.95]"])
    assert (cfg.seed, cfg.optim.lr) == (1000, 0.1)
    cfg = app.compose_config("stream", ["image=x", "tracks_resize=TRUE", "tracker.window_px=1.5E1"])
    assert (cfg.tracks_resize, cfg.tracker.window_px) == (True, 15.0)


def test_sweeps_are_for_multirun():
    assert app.as_value("seed=1,2", sweeps=True) == "seed=1,2" and app.as_value("seed=1,2") == 'seed="1,2"'
    with pytest.raises(ConfigError, match=r"optim.lr='0,001'.* could not be converted to Float"):
        app.compose_config("train", ["optim.lr=0,001"])


@pytest.mark.parametrize("choice", ["teacher", "wan_1.3b/teacher_stage1"])
def test_a_choice_in_a_folder_of_its_group_is_named(choice):
    with pytest.raises(ConfigError, match=rf"no choice '{choice}' for 'experiment'; did you mean '\w+/teacher"):
        app.compose_config("train", [f"experiment={choice}"])
