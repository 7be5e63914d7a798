"""The shipped weights of the sprites world, made from nothing: `make zoo`.

Runs every stage as the command that a user would type (pipeline.py), then casts the results to bfloat16 and puts them
into models/zoo/sprites, and evaluates them there. Killed and started again, it goes on. The losses of each stage's
first steps are compared with tests/golden/zoo.json when it is done: a recipe that silently changed shows there.
Left out: every setting (conf/experiment/sprites), and what the weights are worth (models/zoo/sprites/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.encode import fingerprint
from data.progress import stamp
from models.vae.folder import replace_folder
from stream.provenance import git_commit, machine
from train.pipeline import PROCESSES, ROOT, Record, Step, record_of, run_all, run_chain

ZOO = ROOT / "models" / "zoo" / "sprites"
GOLDEN = ROOT / "tests" / "golden" / "zoo.json"
FIRST_STEPS = 50  # of each stage, compared with the golden losses
LOSS_TOLERANCE = 0.02  # relative; on the processor that gave the golden losses they come again bit for bit
ELSEWHERE = (
    "another processor rounds otherwise: an AMD EPYC without AMX differs by up to 5 % in the first stage, and by up to "
    "13 % in the next, which starts from that one's weights"
)
PARTS = {  # name in the zoo -> the stage that makes it and the module it exports
    "vae": "vae_whole/export/vae",
    "tiny_vae": "tiny_vae/export/tiny_vae",
    "features": "features/export/features",
    "teacher": "teacher_stage2_again/export/teacher",
    "student": "self_forcing/export/student",
}


def chain(out: Path) -> list[Step]:
    """All that is trained, in order; everything is written under ``out``."""
    data, vae = out / "data", f"model.vae.path={out / PARTS['vae']}"
    teacher = f"model.teacher={out / PARTS['teacher']}"

    def prepare(name: str, step: str, *overrides: str, processes: int = 1) -> Step:
        where = (f"out={data}", f"output_dir={data / 'run'}")
        return Step(name, ("data", f"step={step}", "experiment=sprites/data", *where, *overrides), processes)

    def train(stage: str, *overrides: str, name: str = "") -> Step:
        name = name or stage
        where = (f"shards={data / 'shards'}", f"output_dir={out / name}")
        return Step(name, ("train", f"experiment=sprites/{stage}", *where, *overrides), PROCESSES)

    return [
        prepare("render, track", "all"),
        train("vae"),
        train("vae_whole", f"stage.init_from={out / 'vae/export/vae'}"),
        prepare("encode", "encode", vae, processes=PROCESSES),
        prepare("pack", "pack", vae),
        train("features", vae),
        train("tiny_vae", vae),
        train("teacher_short", vae),
        train("teacher", vae, f"stage.init_from={out / 'teacher_short/export/teacher'}"),
        train("teacher_stage2", vae, f"stage.init_from={out / 'teacher/export/teacher'}"),
        train("teacher_stage2", vae, f"stage.init_from={out / 'teacher_stage2/export/teacher'}", "steps=1500",
              name="teacher_stage2_again"),
        train("causal_teacher", vae, f"stage.init_from={out / PARTS['teacher']}"),
        train("self_forcing", vae, teacher, f"stage.init_from={out / 'causal_teacher/export/student'}"),
    ]  # fmt: skip


def judge(out: Path, zoo: Path = ZOO) -> list[Step]:
    """What is measured on the weights in ``zoo``."""
    weights = (f"model.vae.path={zoo / 'vae'}", f"model.teacher={zoo / 'teacher'}", f"model.student={zoo / 'student'}")
    return [Step("eval", ("eval", "model=sprites", "experiment=sprites/eval", f"out={out / 'eval'}", *weights))]


def ship(out: Path, zoo: Path, parts: Mapping[str, str] = PARTS) -> None:
    """Every part of ``out`` into its folder of ``zoo``, weights in bfloat16; a folder appears whole or not at all."""
    for name, source in parts.items():
        with replace_folder(zoo / name) as fresh:
            for file in sorted((out / source).iterdir()):
                if file.suffix == ".safetensors":
                    _copy_as_bfloat16(file, fresh / file.name)
                else:
                    shutil.copy(file, fresh / file.name)


def _copy_as_bfloat16(source: Path, target: Path) -> None:
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    weights = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in load_file(source).items()
    }
    save_file(weights, target, metadata=metadata)


def first_losses(out: Path, stages: Iterable[str]) -> dict[str, dict[str, float]]:
    """Stage -> {"module/loss at step n": loss} over its first FIRST_STEPS steps, as its log has them."""
    found: dict[str, dict[str, float]] = {}
    for stage in stages:
        log = out / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        losses = {
            f"{key} at step {row['step']}": row[key]
            for row in rows
            for key in row
            if key.endswith("/loss") and row["step"] <= FIRST_STEPS
        }
        if losses:
            found[stage] = losses
    return found


def differences(found: Mapping[str, Mapping[str, float]], golden: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line per loss that is absent or further than LOSS_TOLERANCE from the golden one."""
    lines = []
    for stage, losses in golden.items():
        for name, wanted in losses.items():
            value = found.get(stage, {}).get(name)
            if value is None or abs(value - wanted) > LOSS_TOLERANCE * abs(wanted):
                lines.append(f"{stage}: {name} is {value}, golden {wanted}")
    return lines


def compared(out: Path, stage: str, golden: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What to say of a stage that is done: which of its first losses are not the golden ones, if it has any."""
    if stage not in golden:
        return []
    changed = differences(first_losses(out, [stage]), {stage: golden[stage]})
    if changed:
        return [*changed, f"{stage}: the recipe changed, or {ELSEWHERE}"]
    return [f"{stage}: the first losses are those of {GOLDEN.relative_to(ROOT)}"]


def require_one_commit(steps: Sequence[Step], out: Path) -> None:
    """Raises SystemExit where a step was begun or finished at another commit than is checked out now: its losses are of
    another recipe, perhaps. Files that differ from the commit do not count: the shipped weights are among them.
    """
    commit = git_commit().removesuffix("-dirty")
    records = {step.name: record_of(step, out) for step in steps}
    older = [name for name, record in records.items() if record is not None
             and {made_at.removesuffix("-dirty") for made_at in record.git_commits} != {commit}]  # fmt: skip
    if older:
        raise SystemExit(f"UPDATE_GOLDEN=1: of other commits in {out}: {', '.join(older)}; train in another --out")


def write_training(zoo: Path, records: Mapping[str, Record]) -> None:
    """training.json: seconds and commits per step, and the machine."""
    seconds = {name: record.seconds for name, record in records.items()}
    commits = {name: record.git_commits for name, record in records.items()}
    content = {"seconds": seconds, "git_commits": commits, "machine": machine()}
    (zoo / "training.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.zoo")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "zoo", help="folder of the training runs")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder that the weights are put into")
    arguments = parser.parse_args()
    out, zoo = arguments.out.resolve(), arguments.zoo.resolve()
    steps = chain(out)
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("UPDATE_GOLDEN"):
        require_one_commit(steps, out)
    records = run_all(steps, out, lambda step: compared(out, step.name, golden))
    ship(out, zoo)
    write_training(zoo, records)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(first_losses(out, [step.name for step in steps]), indent=1) + "\n")
    judged = out / "judge" / stamp(*(fingerprint(str(out / source)) for source in PARTS.values()))
    run_all(judge(judged, zoo), judged)
    print(f"Weights in {zoo}, report in {judged / 'eval' / 'report.html'}")


if __name__ == "__main__":
    run_chain(main)
