"""The whole chain on the sprites world, on a laptop: `make quickstart`.

Runs the commands that a user would type (pipeline.py), each with the time it took, and ends with one report to open.
Left out: every setting. What each stage does is in conf/experiment/quickstart_zoo/*.yaml, which goes on from the
shipped weights, and in conf/experiment/quickstart/*.yaml, which starts from nothing (`--start scratch`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from data.video import read_video
from eval.report import Figure, Section, Table, Video, curves_from_log, video_side_by_side, write_report
from models.device import usable_cores
from train.pipeline import PROCESSES, ROOT, Record, Step, run_all, run_chain
from train.zoo import ZOO

SEED_SHOWN = 1  # index of the held-out clip that the student continues at the end
CONFIGS = {"zoo": "quickstart_zoo", "scratch": "quickstart"}  # start -> folder in conf/experiment
MODELS = {"zoo": "sprites", "scratch": "sprites_quick"}  # start -> the model of these experiments
CURVES = {  # stage -> what of its log is worth a look
    "vae": ("vae/loss",),
    "vae_whole": ("vae/loss",),
    "teacher": ("teacher/loss",),
    "causal_init": ("student/loss",),
    "self_forcing": ("student/loss", "critic/loss"),
}


def chain(out: Path, start: str) -> list[Step]:
    """The stages in order, from the weights of ``start`` (zoo | scratch); everything is written under ``out``."""
    configs, data, held_out = CONFIGS[start], out / "data", out / "held_out"
    vae = f"model.vae.path={out / ('vae' if start == 'zoo' else 'vae_whole') / 'export/vae'}"
    teacher = f"model.teacher={out / 'teacher/export/teacher'}"
    student = f"model.student={out / 'self_forcing/export/student'}"

    def prepare(name: str, *overrides: str) -> Step:
        return Step(name, ("data", f"experiment={configs}/data", *overrides))

    def train(stage: str, *overrides: str, begin: str | Path | None = None) -> Step:
        where = (f"shards={data / 'shards'}", f"output_dir={out / stage}")
        begun = () if begin is None else (f"stage.init_from={begin}",)
        return Step(stage, ("train", f"experiment={configs}/{stage}", *where, *overrides, *begun), PROCESSES)

    def shipped(part: str) -> Path | None:
        return ZOO / part if start == "zoo" else None

    weights = (vae, teacher, student)
    clip = ("source.split=test", f"source.first_index={SEED_SHOWN}", "source.num_clips=1", "num_workers=0")
    return [
        prepare("render, track", f"out={data}", "model.vae.path=null"),
        train("vae", begin=shipped("vae")),
        *([] if start == "zoo" else [train("vae_whole", begin=out / "vae/export/vae")]),
        prepare("encode", f"out={data}", vae),
        train("teacher", vae, begin=shipped("teacher")),
        train("ode_pairs", vae, teacher),
        train("causal_init", vae, teacher, f"stage.pairs={out / 'ode_pairs/pairs'}", begin=shipped("student")),
        train("self_forcing", vae, teacher, begin=out / "causal_init/export/student"),
        prepare("held-out clip", *clip, f"out={held_out}", "model.vae.path=null"),
        Step("stream", ("stream", f"model={MODELS[start]}", *weights, *_stream_inputs(held_out, out))),
        Step("eval", ("eval", f"experiment={configs}/eval", *weights, f"out={out / 'eval'}")),
    ]


def _stream_inputs(held_out: Path, out: Path) -> tuple[str, ...]:
    key = f"test-{SEED_SHOWN:06d}"
    clip, tracks = held_out / "clips" / f"{key}.mp4", held_out / "tracks" / f"{key}.npz"
    return (f"image={clip}", f"tracks={tracks}", f"out={out / 'stream.mp4'}", f"output_dir={out / 'stream'}")


def report(out: Path, records: Mapping[str, Record]) -> Path:
    """One page: what was reached, what it looks like, how it was learned, how long it took."""
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    total = sum(record.seconds for record in records.values())
    rows = [*([name, f"{record.seconds:.0f}"] for name, record in records.items()), ["all", f"{total:.0f}"]]
    everything = {"Videos with and without tracks, curves, every figure with its interval": "eval/report.html"}
    sections = [
        Section("Does the video follow the tracks?", _verdict(metrics), _headline(metrics), links=everything),
        Section("A stream", "A held-out first frame, continued along the tracks of its clip.", videos=[_video(out)]),
        Section("How it was learned", "Losses over the steps of each stage.", figures=_loss_figures(out, records)),
        Section("Where the time went", table=Table(["stage", "seconds"], rows)),
    ]
    start = "from nothing" if "vae_whole" in records else "on from the shipped weights"
    note = f"make quickstart: trained {start} in {total / 60:.1f} minutes on {usable_cores()} CPU cores"
    return write_report(out / "report.html", sections, title="Marionette quickstart", note=note)


def _verdict(metrics: dict) -> str:
    lines = []
    for role in ("teacher", "student"):
        gain, low = metrics[f"{role}.epe_gain_from_tracks_px"], metrics[f"{role}.epe_gain_from_tracks_px_low"]
        word = "follows" if low > 0 else "does not measurably follow"
        lines.append(f"The {role} {word} the tracks: they lower its end-point error by {gain:.2f} px "
                     f"(95 % interval from {low:.2f} px).")  # fmt: skip
    return "\n".join(lines)


def _headline(metrics: dict) -> Table:
    def interval(key: str) -> str:
        return f"{metrics[key]:.2f} [{metrics[f'{key}_low']:.2f}, {metrics[f'{key}_high']:.2f}]"

    rows = [
        [role, interval(f"{role}.epe_px"), interval(f"{role}.epe_without_tracks_px"), interval(f"{role}.psnr_db"),
         f"{metrics[f'{role}.frames_per_second']:.1f}"]
        for role in ("teacher", "student")
    ]  # fmt: skip
    columns = ["", "EPE with tracks, px", "EPE with tracks withheld, px", "PSNR, dB", "frames per second"]
    return Table(columns, rows)


def _video(out: Path) -> Video:
    truth = read_video(out / "held_out" / "clips" / f"test-{SEED_SHOWN:06d}.mp4")
    columns = {"source of the tracks": truth, "student": read_video(out / "stream.mp4")}
    return video_side_by_side(columns, fps=16)


def _loss_figures(out: Path, stages: Collection[str]) -> list[Figure]:
    return [
        curves_from_log(out / stage / "metrics.jsonl", keys, caption=stage)
        for stage, keys in CURVES.items()
        if stage in stages
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.quickstart")
    parser.add_argument("--start", choices=CONFIGS, default="zoo", help="shipped weights to go on from, or none")
    parser.add_argument("--out", type=Path, help="folder for everything; default: outputs/quickstart[_scratch]")
    arguments = parser.parse_args()
    default = "quickstart" if arguments.start == "zoo" else "quickstart_scratch"
    out = (arguments.out or ROOT / "outputs" / default).resolve()
    records = run_all(chain(out, arguments.start), out)
    page = report(out, records)
    print(f"\n{sum(record.seconds for record in records.values()) / 60:.1f} minutes. Open {page}")


if __name__ == "__main__":
    run_chain(main)
