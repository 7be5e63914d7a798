"""Ablations of training on the quickstart's world: models that differ in one thing each, over several seeds.

Every variant is a training run of the quickstart with a few overrides, judged on the same held-out clips; the results
go into one file (models/zoo/sprites/ablations.json) that `python -m eval bench=claims` reads. Killed and started
again, it goes on. Data and VAE are those of the quickstart's first seed.
Left out: what the comparison means (eval/benchmarks/claim_rows.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.results import write_json
from train.pipeline import PROCESSES, ROOT, Step, run_all
from train.quickstart import chain as quickstart_chain
from train.zoo import ZOO

NUM_PREPARED = 4  # steps of the quickstart that every seed shares: clips, VAE, latents
KEPT_METRICS = ("epe_px", "psnr_db", "registration_correlation", "registration_position_px", "seconds_per_frame",
                "chunk_seconds", "denoise_seconds")  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One training run: a stage of the quickstart with overrides, starting from other runs' results."""

    name: str
    stage: str  # experiment=quickstart/<stage>
    teacher: str | None = None  # name of the run whose teacher is used
    init_from: str | None = None  # name of the run whose weights it starts from
    pairs: str | None = None  # name of the run whose ODE pairs are learned
    overrides: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        return "teacher" if self.stage == "teacher" else "student"


@dataclass(frozen=True)
class Judged:
    """One observation: a model under a benchmark."""

    name: str
    training: str  # name of the run whose weights are judged
    overrides: tuple[str, ...] = ()
    bench: str = "motion_transfer"


RGB = ("model.dit.track_encoding=rgb",)
ABSOLUTE = ("model.rollout.positions=absolute",)
CHUNK_1 = ("model.rollout.chunk_frames=1",)
MERGED = ("model.rollout.merged_cache=true",)
STAGE_2 = ("steps=120", "optim.lr=3e-4", "stage.freeze_track_head=true")
LONG = ("bench.num_frames=129", "bench.num_clips=16", "bench.requery_frames=32")
RELEASED = ("bench.release_frame=17",)
TRAININGS = [
    Training("base_teacher", "teacher"),
    Training("offsets", "teacher", overrides=("model.dit.track_offsets=true",)),
    Training("rgb_tracks", "teacher", overrides=RGB),
    Training("mid_mask", "teacher", init_from="base_teacher", overrides=(*STAGE_2, "stage.mid_mask_probability=0.2")),
    Training("no_mid_mask", "teacher", init_from="base_teacher", overrides=STAGE_2),
    Training("pairs", "ode_pairs", teacher="base_teacher"),
    Training("init", "causal_init", teacher="base_teacher", pairs="pairs"),
    Training("base_student", "self_forcing", teacher="base_teacher", init_from="init"),
    Training("no_ode", "self_forcing", teacher="base_teacher"),
    Training("no_rolling", "self_forcing", teacher="base_teacher", init_from="init",
             overrides=("stage.sink_chunks=[0]", "stage.window_chunks=[null]")),
    Training("absolute", "self_forcing", teacher="base_teacher", init_from="init", overrides=ABSOLUTE),
    Training("merged_cache", "self_forcing", teacher="base_teacher", init_from="init", overrides=MERGED),
    Training("random_context", "self_forcing", teacher="base_teacher", init_from="init",
             overrides=("stage.sink_chunks=[0,1]", "stage.window_chunks=[1,2]")),
    Training("causal_teacher", "causal_teacher", init_from="base_teacher"),
    Training("causal_teacher_student", "self_forcing", teacher="base_teacher", init_from="causal_teacher"),
    Training("chunk_1_init", "causal_init", teacher="base_teacher", pairs="pairs", overrides=CHUNK_1),
    Training("chunk_1", "self_forcing", teacher="base_teacher", init_from="chunk_1_init", overrides=CHUNK_1),
]  # fmt: skip
JUDGED = [
    Judged("base_teacher", "base_teacher"),
    Judged("offsets", "offsets", ("model.dit.track_offsets=true",)),
    Judged("rgb_tracks", "rgb_tracks", RGB),
    Judged("mid_mask", "mid_mask", RELEASED),
    Judged("no_mid_mask", "no_mid_mask", RELEASED),
    Judged("base_student", "base_student"),
    Judged("base_window_2", "base_student", ("model.rollout.window_chunks=2",)),
    Judged("base_long", "base_student", LONG, "long_video"),
    Judged("base_latency", "base_student", ("bench.num_chunks=60",), "latency"),
    Judged("no_ode", "no_ode"),
    Judged("causal_teacher", "causal_teacher_student"),
    Judged("no_rolling_long", "no_rolling", LONG, "long_video"),
    Judged("absolute_long", "absolute", (*LONG, *ABSOLUTE), "long_video"),
    Judged("merged_cache", "merged_cache", MERGED),
    Judged("random_context", "random_context"),
    Judged("random_context_window_2", "random_context", ("model.rollout.window_chunks=2",)),
    Judged("chunk_1", "chunk_1", CHUNK_1),
    Judged("chunk_1_latency", "chunk_1", (*CHUNK_1, "bench.num_chunks=60"), "latency"),
]


def chain(out: Path, seed: int) -> list[Step]:
    """Everything of one seed; the quickstart's data and VAE are in out/shared."""
    shared, folder = out / "shared", out / f"seed_{seed}"
    by_name = {training.name: training for training in TRAININGS}
    vae = f"model.vae.path={shared / 'vae_whole/export/vae'}"

    def exported(name: str) -> Path:
        return folder / name / "export" / by_name[name].exported

    def train(training: Training) -> Step:
        where = [f"shards={shared / 'data/shards'}", f"output_dir={folder / training.name}", f"seed={seed}", vae]
        if training.teacher is not None:
            where.append(f"model.teacher={exported(training.teacher)}")
        if training.init_from is not None:
            where.append(f"stage.init_from={exported(training.init_from)}")
        if training.pairs is not None:
            where.append(f"stage.pairs={folder / training.pairs / 'pairs'}")
        arguments = ("train", f"experiment=quickstart/{training.stage}", *where, *training.overrides)
        return Step(training.name, arguments, PROCESSES)

    def judge(judged: Judged) -> Step:
        role = by_name[judged.training].exported
        weights = (vae, f"model.{role}={exported(judged.training)}", f"seed={seed}")
        where = f"out={folder / 'judged' / judged.name}"
        experiment = "quickstart/eval" if judged.bench == "motion_transfer" else f"quickstart/{judged.bench}"
        roles = (f"bench.roles=[{role}]", "bench.withhold_tracks=false") if judged.bench == "motion_transfer" else ()
        arguments = ("eval", f"experiment={experiment}", where, *weights, *roles, *judged.overrides)
        return Step(f"judge {judged.name}", arguments)

    return [*(train(training) for training in TRAININGS), *(judge(judged) for judged in JUDGED)]


def collect(out: Path, seeds: Sequence[int]) -> dict[str, dict]:
    """Observation -> the commands that made it and, per seed, one value per clip of each metric."""
    found: dict[str, dict] = {}
    for judged in JUDGED:
        folders = [out / f"seed_{seed}" / "judged" / judged.name for seed in seeds]
        per_clip = [json.loads((folder / "per_clip.json").read_text()) for folder in folders]
        meta = json.loads((folders[0] / "meta.json").read_text())
        training = next(training for training in TRAININGS if training.name == judged.training)
        found[judged.name] = {
            "training": {"stage": training.stage, "overrides": list(training.overrides)},
            "evaluation": {"bench": judged.bench, "overrides": list(judged.overrides)},
            "seeds": list(seeds),
            "git_commit": meta["git_commit"],
            "per_clip": [
                {
                    key: [None if value is None else round(value, 5) for value in values]
                    for key, values in one.items()
                    if key.split(".")[0] in ("teacher", "student") and key.split(".")[-1] in KEPT_METRICS
                }
                for one in per_clip
            ],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.ablations")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablations", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one set of models each")
    parser.add_argument("--result", type=Path, default=ZOO / "ablations.json", help="file that the claims read")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    run_all(quickstart_chain(out / "shared", "scratch")[:NUM_PREPARED], out / "shared")
    for seed in arguments.seeds:
        print(f"seed {seed}")
        run_all(chain(out, seed), out / f"seed_{seed}")
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.result, collect(out, arguments.seeds))
    print(arguments.result)


if __name__ == "__main__":
    main()
