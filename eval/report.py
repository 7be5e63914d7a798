"""One HTML file that shows a run: text, tables, curves and videos, all inside it, to be opened without a
server.

A report is a list of sections; the evaluation and the quickstart write theirs through `write_report`. Curves
are SVG, videos H.264 in mp4, both as data URIs. Small videos are enlarged (nearest neighbour, by a whole
factor), so that a 64 px clip can be looked at. Leaves out scripts: nothing in the page runs.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.video import write_video
from models.files import replace_file

MIN_VIDEO_SIDE_PX = 256
GAP_PX = 8  # between the columns of a side-by-side video, after enlarging
LINE_COLORS = ("#4c78dd", "#e0803a", "#3aa675", "#b25fc4", "#c94f5b", "#8a8f3c")
AXIS_COLOR = "#8a8f98"  # readable on a light and on a dark page

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1d2129; --soft: #626a76; --line: #dfe2e6; --card: #ffffff;
  --tint: #f1f3f6 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --ink: #e6e8eb; --soft: #9aa2ad; --line: #2c3138; --card: #1b1e24; --tint: #22262d }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px }
h2 { font-size: 1.25rem; margin: 0 0 10px }
.note { color: var(--soft); margin: 0 0 28px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin: 0 0 22px }
p { margin: 0 0 14px; max-width: 75ch; white-space: pre-line }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line) }
th, td { padding: 6px 12px 6px 0; vertical-align: top }
td { border-bottom: 1px solid var(--line) }
td:first-child { font-family: ui-monospace, monospace; font-size: .86rem }
tr:last-child td { border-bottom: 0 }
.row { display: flex; flex-wrap: wrap; gap: 20px }
figure { margin: 0 0 16px; max-width: 100%; width: fit-content }
figure img, figure video { max-width: 100%; height: auto; border-radius: 8px; display: block }
figure video { background: var(--tint) }
figcaption { color: var(--soft); font-size: .88rem; margin-top: 6px; max-width: 75ch }
.labels { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; font-size: .86rem; font-weight: 600;
  text-align: center; padding: 4px 0 }
"""


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text; each row has one entry a column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {list(row)} has {len(row)} entries; the table has {len(self.columns)} columns")

    def as_text(self) -> str:
        """The table for a terminal, columns aligned; empty without rows."""
        if not self.rows:
            return ""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        return (
            "\n".join(
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines
            )
            + "\n"
        )

    def as_markdown(self) -> str:
        """The table for a document."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


@dataclass(frozen=True)
class Figure:
    """A picture as a data URI, with a caption."""

    data_uri: str
    caption: str = ""


@dataclass(frozen=True)
class Video:
    """An mp4 as a data URI; `labels` name its columns from left to right."""

    data_uri: str
    labels: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One card of the page."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = field(default_factory=tuple)
    videos: Sequence[Video] = field(default_factory=tuple)
    links: Mapping[str, str] = field(default_factory=dict)  # text -> address, relative to the page


def write_report(
    path: str | Path, sections: Sequence[Section], *, title: str = "Marionette report", note: str = ""
) -> Path:
    """Write the page, atomically, and return its path. All texts are escaped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(_section_html(section) for section in sections)
    note_html = f'<p class="note">{html.escape(note)}</p>' if note else ""
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1>{note_html}\n{body}\n</main></body></html>\n"
    )
    with replace_file(path) as fresh:
        fresh.write_text(page, encoding="utf-8")
    return path


def video_side_by_side(columns: Mapping[str, np.ndarray], fps: float, caption: str = "") -> Video:
    """One video with the named clips beside each other, frame-locked because they are one file.

    columns: label -> uint8 [T, H, W, 3]; equal H and W. A shorter clip holds its last frame.
    """
    if not columns:
        raise ValueError("columns is empty; a video needs at least one clip")
    sizes = {clip.shape[1:] for clip in columns.values()}
    if len(sizes) > 1:
        raise ValueError(f"clips of sizes {sorted(sizes)} cannot stand side by side; resize them to one size")
    longest = max(len(clip) for clip in columns.values())
    padded = [np.concatenate([clip, np.repeat(clip[-1:], longest - len(clip), axis=0)]) for clip in columns.values()]
    large = [enlarge(clip)[0] for clip in padded]
    gap = np.full((longest, large[0].shape[1], GAP_PX, 3), 128, dtype=np.uint8)
    parts = [part for clip in large for part in (clip, gap)][:-1]
    return Video(_mp4_uri(np.concatenate(parts, axis=2), fps), list(columns), caption)


def contact_sheet(rows: Mapping[str, np.ndarray], *, num_frames: int = 7, caption: str = "") -> Figure:
    """Frames at equal distances, a row per video with its name before it, as one PNG.

    rows: name -> uint8 [T, H, W, 3], all of one shape.
    """
    from matplotlib.figure import Figure as Plot

    length, height, width = next(iter(rows.values())).shape[:3]
    picked = np.linspace(0, length - 1, min(num_frames, length)).round().astype(int)
    cell = 1.2  # inches
    plot = Plot(figsize=(cell * width / height * (len(picked) + 1), cell * len(rows) + 0.3), layout="constrained")
    grid = plot.subplots(len(rows), len(picked), squeeze=False)
    for (name, frames), line in zip(rows.items(), grid, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, frame in zip(line, picked, strict=True):
            axes.imshow(frames[frame])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, frame in zip(grid[-1], picked, strict=True):
        axes.set_xlabel(f"frame {frame}")
    stream = io.BytesIO()
    plot.savefig(stream, format="png", dpi=110)
    return Figure(_data_uri("image/png", stream.getvalue()), caption)


def enlarge(frames: np.ndarray) -> tuple[np.ndarray, int]:
    """Frames [T, H, W, 3] repeated by the least whole factor that makes both sides big enough to look at."""
    factor = max(1, math.ceil(MIN_VIDEO_SIDE_PX / min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2), factor


def line_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
) -> Figure:
    """Curves as an inline SVG; lines: name -> (x values, y values). Points that are nan leave a gap."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Plot

    with rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "text.color": AXIS_COLOR,
            "axes.labelcolor": AXIS_COLOR,
            "axes.edgecolor": AXIS_COLOR,
            "xtick.color": AXIS_COLOR,
            "ytick.color": AXIS_COLOR,
        }
    ):
        plot = Plot(figsize=(6.4, 3.2), layout="constrained")
        axes = plot.add_subplot()
        for (name, (x, y)), color in zip(
            lines.items(), LINE_COLORS * (1 + len(lines) // len(LINE_COLORS)), strict=False
        ):
            axes.plot(x, y, label=name, color=color, linewidth=1.8)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=AXIS_COLOR)
        if lines:
            axes.legend(frameon=False, labelcolor=AXIS_COLOR)
        stream = io.StringIO()
        plot.savefig(stream, format="svg", transparent=True)
    return Figure(_data_uri("image/svg+xml", stream.getvalue().encode()), caption)


def curves_from_log(path: str | Path, keys: Sequence[str], *, caption: str = "") -> Figure:
    """Curves over the steps of a `metrics.jsonl` (one JSON object a line); lines that lack a key leave it out there."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = {}
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if "step" in row and row.get(key) is not None]
        if points:
            lines[key] = ([x for x, _ in points], [y for _, y in points])
    if not lines:
        seen = sorted({key for row in rows for key in row})
        raise ValueError(f"{path} has none of the keys {list(keys)}; it has {seen}")
    return line_figure(lines, x_label="step", y_label="value", caption=caption)


def _section_html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table:
        parts.append(_table_html(section.table))
    if section.figures:
        figures = "".join(
            f'<figure><img src="{item.data_uri}" alt="{html.escape(item.caption)}">'
            f"{_caption_html(item.caption)}</figure>"
            for item in section.figures
        )
        parts.append(f'<div class="row">{figures}</div>')
    for video in section.videos:
        labels = "".join(f"<span>{html.escape(label)}</span>" for label in video.labels)
        parts.append(
            f'<figure><div class="labels">{labels}</div><video src="{video.data_uri}" autoplay loop muted '
            f"playsinline controls></video>{_caption_html(video.caption)}</figure>"
        )
    for text, address in section.links.items():
        parts.append(f'<p><a href="{html.escape(address)}">{html.escape(text)}</a></p>')
    return f"<section>{''.join(parts)}</section>"


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _caption_html(caption: str) -> str:
    return f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""


def _mp4_uri(frames: np.ndarray, fps: float) -> str:
    """H.264 needs even sides: a last odd row or column is repeated."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps)
        return _data_uri("video/mp4", path.read_bytes())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
