"""Ablations of training on the sprites world: models that differ in one thing each, over several seeds.

Every variant is a training run of the zoo's recipe with a few overrides and a fraction of its steps, from the shipped
weights or from what is made of them here (a causal start; a video model without tracks), judged on held-out clips as
soon as it is trained. What is seen goes straight into one file (models/zoo/sprites/ablations.json) that
`python -m eval bench=claims` reads, with the settings that made it; what that file has under the same settings and the
same shipped weights is not made again. Killed and started again, it goes on. Left out: what the comparison means
(eval/benchmarks/claim_rows.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.app import compose_config
from data.encode import fingerprint
from data.progress import stamp
from models.files import write_json
from models.vae.folder import replace_folder
from models.wan.checkpoint import load_dit, save_dit, without_tracks
from train.pipeline import PROCESSES, ROOT, Step, forget_outdated, run, run_chain
from train.zoo import ZOO

VAE, TEACHER = ZOO / "vae", ZOO / "teacher"  # shipped: what every run starts from, sees the clips through or follows
FEATURES = ZOO / "features"  # shipped: lpips_sprites of long streams is measured in them
SHIPPED_TEACHER, VIDEO_MODEL = "shipped teacher", "shipped teacher without its tracks"  # that a run may start from
NUM_CLIPS = 3000  # rendered and encoded for all variants
KEPT_METRICS = (
    "epe_px", "psnr_db", "lpips_sprites", "registration_correlation", "registration_position_px",
    "registration_position_px_last_window", "seconds_per_frame", "chunk_seconds", "denoise_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One training run: a stage of the zoo with overrides, starting from another run's weights."""

    name: str
    stage: str  # experiment=sprites/<stage>
    steps: int
    init_from: str | None = None  # name of a run, SHIPPED_TEACHER or VIDEO_MODEL; null: the stage's own start
    overrides: tuple[str, ...] = ()
    shared: bool = False  # by all seeds

    @property
    def exported(self) -> str:
        return "teacher" if self.stage.startswith("teacher") else "student"

    def described(self) -> dict[str, Any]:
        """Its settings and those of the runs that it goes on from: equal where it need not be run again."""
        start = BY_NAME[self.init_from].described() if self.init_from in BY_NAME else self.init_from
        pairs = {"pairs": PAIRS.described()} if self.stage == "causal_init" else {}
        settings = {"stage": self.stage, "steps": self.steps, "init_from": start, "overrides": list(self.overrides)}
        return settings | pairs


@dataclass(frozen=True)
class Judged:
    """One observation: a model under a benchmark."""

    name: str
    training: str  # name of the run whose weights are judged
    overrides: tuple[str, ...] = ()
    bench: str = "eval"  # experiment=sprites/<bench>

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the evaluation."""
        return (*JUDGED_CLIPS, *self.overrides) if self.bench == "eval" else self.overrides

    def described(self) -> dict[str, Any]:
        """What made it, as the result file tells."""
        evaluation: dict[str, Any] = {"bench": self.bench, "overrides": list(self.settings)}
        if BY_LOOKS in self.settings:
            evaluation["features"] = fingerprint(str(FEATURES))
        training = BY_NAME[self.training].described()
        return {"shipped": shipped_weights(), "training": training, "evaluation": evaluation}


@cache
def shipped_weights() -> str:
    """Tells the shipped VAE and teacher from those that another `make zoo` may put in their place."""
    return "-".join(fingerprint(str(folder)) for folder in (VAE, TEACHER))


@cache
def recipe(app: str, experiment: str) -> dict[str, Any]:
    """The zoo's configuration of a stage or of the clips: what overrides are added to, and an edit of conf changes."""
    return OmegaConf.to_container(compose_config(app, [f"experiment=sprites/{experiment}"]))  # type: ignore[return-value]


AS_PUBLISHED = ("model.rollout.merged_cache=false",)  # of every run: a cache pass of its own
FLOORED = ("model.dit.track_offsets=false",)  # as the paper has it
RGB = ("model.dit.track_encoding=rgb", *FLOORED)
NO_MID_MASK = ("stage.mid_mask_probability=0.0",)
# Part of a clip: the VAE, which RGB tracks go through in every step, is most of their time.
ADAPTED = (*NO_MID_MASK, "stage.freeze_track_head=false", "stage.num_frames=21")
ABSOLUTE = ("model.rollout.positions=absolute",)
CHUNK_1 = ("model.rollout.chunk_frames=1",)
ALL_THE_PAST = ("stage.sink_chunks=[0]", "stage.window_chunks=[null]")
MERGED = ("model.rollout.merged_cache=true",)
START = "causal_init"
PAIRS = Training("ode_pairs", "ode_pairs", 10, shared=True)  # what every causal_init learns from
TRAININGS = [
    PAIRS,
    Training(START, "causal_init", 150, shared=True),
    Training("base_teacher", "teacher_stage2", 300, VIDEO_MODEL, (*ADAPTED, *FLOORED)),
    Training("offsets", "teacher_stage2", 300, VIDEO_MODEL, ADAPTED),
    Training("rgb_tracks", "teacher_stage2", 300, VIDEO_MODEL, (*ADAPTED, *RGB)),
    Training("mid_mask", "teacher_stage2", 100, SHIPPED_TEACHER),
    Training("no_mid_mask", "teacher_stage2", 100, SHIPPED_TEACHER, NO_MID_MASK),
    Training("base_student", "self_forcing", 40, START),
    Training("no_ode", "self_forcing", 40),
    Training("merged_cache", "self_forcing", 40, START, MERGED),
    Training("random_context", "self_forcing", 40, START, ("stage.sink_chunks=[0,1]", "stage.window_chunks=[1,2]")),
    Training("causal_teacher", "causal_teacher", 100, SHIPPED_TEACHER),
    Training("causal_teacher_student", "self_forcing", 40, "causal_teacher"),
    Training("zoo_start", "causal_teacher", 300, SHIPPED_TEACHER),  # as long as those of the shipped student
    Training("zoo_student", "self_forcing", 120, "zoo_start"),
    Training("chunk_3_init", "causal_init", 100, START),  # as many steps as chunk 1 gets
    Training("chunk_3", "self_forcing", 40, "chunk_3_init"),
    Training("chunk_1_init", "causal_init", 100, START, CHUNK_1),
    Training("chunk_1", "self_forcing", 40, "chunk_1_init", CHUNK_1),
    Training("chunk_1_init_all_the_past", "causal_init", 100, START, (*CHUNK_1, *ALL_THE_PAST)),
    Training("chunk_1_all_the_past", "self_forcing", 40, "chunk_1_init_all_the_past", (*CHUNK_1, *ALL_THE_PAST)),
]  # fmt: skip
BY_NAME = {training.name: training for training in TRAININGS}
SHORT = ("model.clip.num_frames=21",)  # as long as these teachers' clips
RELEASED = ("bench.release_frame=17", "bench.registration.first_frame=17")
# One grid of tracks for the whole stream, as the paper's. Its points would leave with their sprite if that could, and
# of two sprites that stay in so small a frame one is often covered: the tracker loses it, the student forgets it.
STAYING = ("bench.world.max_sprites=1", "bench.tracker.max_layers=2", "bench.world.leave_margin=-0.2",
           "bench.requery_frames=0", "bench.frame_stride=2", "bench.num_floor_clips=1")  # fmt: skip
BY_LOOKS = "bench.features=models/zoo/sprites/features"  # lpips_sprites beside the end-point error
LONG = (*STAYING, BY_LOOKS, "bench.num_clips=32")  # of 241 frames
MANY_LONG = (*STAYING, "bench.num_clips=48")  # more of them: what a window chunk adds is little
LONGER = (*STAYING, BY_LOOKS, "bench.num_clips=48", "bench.num_frames=481")  # fifteen times as long as a clip
VERY_LONG = (*STAYING, "bench.num_clips=8", "bench.num_frames=1001")
TIMED = ("bench.num_chunks=60",)
WINDOW_2, WINDOW_3, WINDOW_6 = (f"model.rollout.window_chunks={chunks}" for chunks in (2, 3, 6))
NO_SINK = "model.rollout.sink_chunks=0"
JUDGED = [
    Judged("base_student", "base_student"),
    Judged("base_latency", "base_student", TIMED, "latency"),
    Judged("no_ode", "no_ode"),
    Judged("mid_mask", "mid_mask", RELEASED),
    Judged("no_mid_mask", "no_mid_mask", RELEASED),
    Judged("chunk_3_long", "chunk_3", LONG, "long_video"),
    Judged("chunk_1_latency", "chunk_1", (*CHUNK_1, *TIMED), "latency"),
    Judged("chunk_1_long", "chunk_1", (*LONG, *CHUNK_1), "long_video"),  # three chunks of three never roll
    Judged("chunk_1_all_the_past_long", "chunk_1_all_the_past", (*LONG, *CHUNK_1), "long_video"),
    Judged("base_teacher", "base_teacher", (*SHORT, *FLOORED)),
    Judged("offsets", "offsets", SHORT),
    Judged("rgb_tracks", "rgb_tracks", (*SHORT, *RGB)),
    Judged("merged_cache", "merged_cache", MERGED),
    Judged("causal_teacher", "causal_teacher_student"),
    Judged("random_context", "random_context"),
    Judged("base_long_window_2", "base_student", (*MANY_LONG, WINDOW_2), "long_video"),
    Judged("random_context_long", "random_context", MANY_LONG, "long_video"),
    Judged("random_context_long_no_sink", "random_context", (*MANY_LONG, NO_SINK), "long_video"),
    Judged("random_context_long_window_2", "random_context", (*MANY_LONG, WINDOW_2), "long_video"),
    Judged("random_context_long_window_3", "random_context", (*MANY_LONG, WINDOW_3), "long_video"),
    Judged("random_context_long_window_6", "random_context", (*MANY_LONG, WINDOW_6), "long_video"),
    Judged("zoo_longer", "zoo_student", LONGER, "long_video"),
    Judged("zoo_longer_absolute", "zoo_student", (*LONGER, *ABSOLUTE), "long_video"),  # three chunks train both alike
    Judged("random_context_very_long", "random_context", VERY_LONG, "long_video"),
    Judged("random_context_very_long_no_sink", "random_context", (*VERY_LONG, NO_SINK), "long_video"),
]
JUDGED_CLIPS = ("bench.num_clips=96", "bench.num_floor_clips=1", "bench.num_inference_steps=12",
                "bench.withhold_tracks=false", "bench.features=null")  # fmt: skip


class Plan:
    """The commands of every run; everything is written under ``out``."""

    def __init__(self, out: Path) -> None:
        self.out, self.data = out, out / "shared" / "data"

    def prepare(self) -> list[Step]:
        """Clips of the training split, rendered, tracked, encoded and packed."""
        where = ("experiment=sprites/data", f"out={self.data}", f"output_dir={self.data / 'run'}")
        clips = f"source.num_clips={NUM_CLIPS}"
        vae = f"model.vae.path={VAE}"
        return [
            Step("render, track", ("data", "step=all", *where, clips)),
            Step("encode", ("data", "step=encode", *where, clips, vae), PROCESSES),
            Step("pack", ("data", "step=pack", *where, clips, vae)),
        ]

    def make_video_model(self) -> None:
        """The shipped teacher without its tracks: what motion control is added to in the paper."""
        if not (folder := self.weights(VIDEO_MODEL, 0)).exists():
            with replace_folder(folder) as fresh:
                save_dit(without_tracks(load_dit(TEACHER)), fresh, stage="teacher", made_from=shipped_weights())

    def folder(self, training: Training, seed: int) -> Path:
        """Where the run of a seed is: one of other settings would go on from the checkpoints in the same place, and
        what goes on from it would not be made anew.
        """
        place = self.out / ("shared" if training.shared else f"seed_{seed}")
        recipes = [recipe("data", "data"), *(recipe("train", run.stage) for run in needed(training))]
        return place / f"{training.name}_{stamp(training.described(), NUM_CLIPS, recipes)}"

    def weights(self, name: str, seed: int) -> Path:
        """What the run exported, or what is shipped."""
        if name == VIDEO_MODEL:
            return self.out / "shared" / "video_model"
        if name not in BY_NAME:
            return TEACHER
        return self.folder(BY_NAME[name], seed) / "export" / BY_NAME[name].exported

    def train(self, training: Training, seed: int) -> Step:
        """One training run."""
        where = [f"shards={self.data / 'shards'}", f"output_dir={self.folder(training, seed)}"]
        if not training.shared:
            where.append(f"seed={seed}")
        if training.init_from is not None:
            where.append(f"stage.init_from={self.weights(training.init_from, seed)}")
        if training.stage == "causal_init":
            where.append(f"stage.pairs={self.folder(PAIRS, seed) / 'pairs'}")
        settings = (f"steps={training.steps}", *AS_PUBLISHED, *training.overrides)
        return Step(training.name, ("train", f"experiment=sprites/{training.stage}", *where, *settings), PROCESSES)

    def judge(self, judged: Judged, seed: int) -> Step:
        """One observation."""
        role = BY_NAME[judged.training].exported
        weights = (f"model.{role}={self.weights(judged.training, seed)}", f"seed={seed}")
        roles = (f"bench.roles=[{role}]",) if judged.bench == "eval" else ()
        where = f"out={self.judged_in(judged, seed)}"
        settings = (*roles, *AS_PUBLISHED, *judged.settings)
        arguments = ("eval", f"experiment=sprites/{judged.bench}", where, *weights, *settings)
        return Step(f"judge {judged.name}", arguments)

    def judged_in(self, judged: Judged, seed: int) -> Path:
        """Folder of an observation's results."""
        return self.out / f"seed_{seed}" / "judged" / judged.name


def needed(training: Training) -> list[Training]:
    """The runs that must be there before it, first things first, and itself."""
    before = [BY_NAME[training.init_from]] if training.init_from in BY_NAME else []
    pairs = [PAIRS] if training.stage == "causal_init" else []
    return list(dict.fromkeys([*pairs, *(run for one in before for run in needed(one)), training]))


def missing(stored: Mapping[str, Any], seed: int) -> list[Judged]:
    """Observations of a seed that the results do not have, or have from other settings."""
    return [
        judged for judged in JUDGED
        if not _is_made_with(stored.get(judged.name), judged) or str(seed) not in stored[judged.name]["seeds"]
    ]  # fmt: skip


def _is_made_with(entry: Mapping[str, Any] | None, judged: Judged) -> bool:
    settings = judged.described()
    return entry is not None and all(entry.get(key) == settings[key] for key in settings)


def outdated(stored: Mapping[str, Any]) -> list[str]:
    """Names of what was made with other settings or is judged no more; rows would compare it with what is new."""
    current = {judged.name: judged for judged in JUDGED}
    return [name for name, entry in stored.items() if name not in current or not _is_made_with(entry, current[name])]


def schedule(
    plan: Plan, stored: Mapping[str, Any], seed: int, only: Collection[str] = ()
) -> list[tuple[Step, Judged | None]]:
    """What is still to be done for a seed: each run when it is first needed, each observation after its run.

    only: names of the observations wanted; empty: all.
    """
    steps: list[tuple[Step, Judged | None]] = []
    trained: set[str] = set()
    for judged in missing(stored, seed):
        if only and judged.name not in only:
            continue
        if not steps:
            steps = [(step, None) for step in plan.prepare()]
        for training in needed(BY_NAME[judged.training]):
            if training.name not in trained:
                trained.add(training.name)
                steps.append((plan.train(training, seed), None))
        steps.append((plan.judge(judged, seed), judged))
    return steps


def store(result: Path, judged: Judged, seed: int, folder: Path) -> None:
    """Add an observation of a seed to the results; what is `outdated` makes way."""
    stored = read_results(result)
    for name in outdated(stored):
        del stored[name]
    per_clip = json.loads((folder / "per_clip.json").read_text())
    seen = {
        "git_commit": json.loads((folder / "meta.json").read_text())["git_commit"],
        "per_clip": {
            key: [None if value is None else round(value, 5) for value in values]
            for key, values in per_clip.items()
            if key.split(".")[0] in ("teacher", "student") and key.split(".")[-1] in KEPT_METRICS
        },
    }
    seeds = stored[judged.name]["seeds"] if judged.name in stored else {}
    stored[judged.name] = {**judged.described(), "seeds": {**seeds, str(seed): seen}}
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, stored)


def read_results(result: Path) -> dict[str, Any]:
    """Observation -> its settings and, by seed, one value per clip of each metric; empty where there is no file."""
    return json.loads(result.read_text()) if result.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.ablations")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablations", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one set of models each")
    parser.add_argument(
        "--result",
        type=Path,
        default=ZOO / "ablations.json",
        help="file that the claims read; what it has of these weights and settings is not made again",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[judged.name for judged in JUDGED],
        metavar="OBSERVATION",
        help=f"make these alone, with the runs that they need: {', '.join(judged.name for judged in JUDGED)}",
    )
    arguments = parser.parse_args()
    plan = Plan(arguments.out.resolve() / shipped_weights())
    if names := outdated(read_results(arguments.result)):
        print(f"made with other settings, leaves {arguments.result} with the first new observation: {', '.join(names)}")
    for seed in arguments.seeds:
        steps = schedule(plan, read_results(arguments.result), seed, arguments.only)
        if steps:
            plan.make_video_model()
        print(f"seed {seed}: {len(steps)} steps" if steps else f"seed {seed}: {arguments.result} has what is wanted")
        for number, (step, judged) in enumerate(steps, start=1):
            is_shared = judged is None and (step.name not in BY_NAME or BY_NAME[step.name].shared)
            where = plan.out / ("shared" if is_shared else f"seed_{seed}")
            forget_outdated([step], where)
            run(step, number, len(steps), where)
            if judged is not None:
                store(arguments.result, judged, seed, plan.judged_in(judged, seed))


if __name__ == "__main__":
    run_chain(main)
