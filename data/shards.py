"""Shards: webdataset tar files with an index that gives O(1) reads of any sample.

Members of a sample: {key}.mp4, .tracks.npy (float32 [T, N, 2]), .visibility.npy (bool [T, N]),
.latents.npy (float16 [C, F, h, w]), .text.npy (float16 [l, D], trailing zeros cut), .clip.npy (float16),
.json (caption and where the clip came from). `index.json` holds the byte range of every member, the clip
geometry and the fingerprints of the VAE and text encoder that made latents and embeddings, so that stale
ones are refused.

The tars are ordinary webdataset: any of its readers can stream them. What webdataset leaves out, and the
index is for: exact resume and a sample order that does not depend on workers or world size (`loader.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Sample
from data.video import read_video
from models.condition import ClipGeometry
from models.files import bring_to_disk, file_state, replace_file
from models.motion.tracks import Tracks

INDEX_NAME = "index.json"
INDEX_VERSION = 1
# what can be loaded -> members of the shard that it is read from
FIELD_PARTS = {
    "pixels": ("mp4",),
    "latents": ("latents.npy",),
    "prompt_embeds": ("text.npy",),
    "clip_embeds": ("clip.npy",),
    "tracks": ("tracks.npy", "visibility.npy"),
}


class ShardError(ValueError):
    """A shard or index that cannot be used; the message names shard, key and remedy."""


@dataclass
class SampleEntry:
    key: str
    shard: int  # position in ShardIndex.shards
    parts: dict[str, tuple[int, int]]  # member suffix -> (offset, size) in bytes


class SampleTable:
    """Entries of all samples, in arrays: as objects they take five times the memory, in every loading process."""

    def __init__(self, entries: Iterable[SampleEntry]) -> None:
        entries = list(entries)
        self.keys = [entry.key for entry in entries]
        self.suffixes = list(dict.fromkeys(suffix for entry in entries for suffix in entry.parts))
        self.shard = np.array([entry.shard for entry in entries], np.int32)  # [S]
        ranges = [[entry.parts.get(suffix, (-1, -1)) for suffix in self.suffixes] for entry in entries]
        self.ranges = np.array(ranges, np.int64).reshape(
            len(entries), len(self.suffixes), 2
        )  # offset, size; -1: absent

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> SampleEntry:
        parts = zip(self.suffixes, self.ranges[position].tolist())
        found = {suffix: (offset, size) for suffix, (offset, size) in parts if offset >= 0}
        return SampleEntry(self.keys[position], int(self.shard[position]), found)

    def __iter__(self) -> Iterator[SampleEntry]:
        return (self[position] for position in range(len(self)))

    def all_have(self, suffix: str) -> bool:
        """Whether there are samples, and each has this member."""
        return suffix in self.suffixes and bool((self.ranges[:, self.suffixes.index(suffix), 0] >= 0).all())

    def beyond(self, sizes: Sequence[int]) -> tuple[SampleEntry, str] | None:
        """The first sample and member that ends after its shard does, by the sizes of the shards in bytes."""
        ends = np.array(sizes, np.int64)[self.shard]
        found = np.argwhere(self.ranges.sum(axis=2) > ends[:, None])
        return (self[int(found[0, 0])], self.suffixes[found[0, 1]]) if len(found) else None


@dataclass
class ShardIndex:
    geometry: ClipGeometry
    shards: list[str]  # file names
    samples: SampleTable
    text_len: int | None = None  # tokens that text embeddings are padded to
    fingerprints: dict[str, str] = field(default_factory=dict)  # "vae", "text", "clip" -> what made them

    @property
    def fields(self) -> list[str]:
        """Fields that every sample has."""
        return [name for name, parts in FIELD_PARTS.items() if all(map(self.samples.all_have, parts))]

    @property
    def identity(self) -> str:
        """Hash of the keys in their order: what the numbers of a sampler mean."""
        return hashlib.sha256("\n".join(self.samples.keys).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        samples = [asdict(sample) for sample in self.samples]
        content = {"version": INDEX_VERSION, "fields": self.fields, **asdict(self), "samples": samples}
        with replace_file(Path(folder) / INDEX_NAME) as fresh, fresh.open("w") as file:
            json.dump(content, file)

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        path = Path(folder) / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {INDEX_NAME} in {folder}; make it with `python -m data step=pack out=…`")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ShardError(f"{path} is damaged ({error}); copy it again or run step=pack again") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != INDEX_VERSION:
            raise ShardError(f"{path}: version {version} must be {INDEX_VERSION}; run step=pack again")
        samples = SampleTable(SampleEntry(**sample) for sample in content["samples"])
        geometry = ClipGeometry(**content["geometry"])
        return cls(geometry, content["shards"], samples, content["text_len"], content["fingerprints"])

    def require(self, fields: Sequence[str], geometry: ClipGeometry | None, fingerprints: dict[str, str]) -> None:
        """Refuse, before training, data that lacks a field or was made for another model.

        Only the fingerprints that both sides state are compared. Raises ShardError.
        """
        unknown = sorted(set(fields) - set(FIELD_PARTS))
        if unknown:
            raise ShardError(f"fields={unknown} must be among {list(FIELD_PARTS)}")
        missing = [name for name in fields if name not in self.fields]
        if missing:
            raise ShardError(
                f"fields={missing} are not in these shards (they hold {self.fields}); run step=encode and step=pack"
            )
        if geometry is not None and geometry != self.geometry:
            raise ShardError(f"shards hold {self.geometry}, model.clip is {geometry}; prepare the data for this model")
        for name in sorted(set(fingerprints) & set(self.fingerprints)):
            if fingerprints[name] != self.fingerprints[name]:
                raise ShardError(
                    f"{name} fingerprint of the shards is {self.fingerprints[name]}, the model's is "
                    f"{fingerprints[name]}; run step=encode and step=pack with this model"
                )


# ------------------------------------------------------------------------------------------ writing
def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shards(
    samples: Iterable[tuple[str, dict[str, bytes]]],
    folder: str | Path,
    geometry: ClipGeometry,
    *,
    max_shard_bytes: float = 1e9,
    text_len: int | None = None,
    fingerprints: dict[str, str] | None = None,
) -> ShardIndex:
    """Write (key, {suffix: bytes}) samples to <folder>/clips-000000.tar … and index.json.

    The same samples give the same bytes. An older index is removed first and the new one written last: a
    folder with an index is complete. ValueError if a key holds a dot (webdataset ends keys there) or repeats.
    """
    import webdataset

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for old in folder.glob("clips-*.tar"):
        old.unlink()
    seen: set[str] = set()
    # absolute, since webdataset takes "a:b/…" for an address
    pattern = str(folder.resolve()).replace("%", "%%") + "/clips-%06d.tar"
    with webdataset.ShardWriter(
        pattern, maxcount=1_000_000, maxsize=max_shard_bytes, encoder=False, mtime=0.0, verbose=0
    ) as writer:
        for key, parts in samples:
            if "." in key or key in seen:
                raise ValueError(f"key={key!r} must hold no dot and be unique within the data set")
            seen.add(key)
            writer.write({"__key__": key, **parts})
    shards = sorted(path.name for path in folder.glob("clips-*.tar") if seen)
    for shard in shards:
        bring_to_disk(folder / shard)
    table = SampleTable(entry for n, shard in enumerate(shards) for entry in _scan(folder / shard, n))
    index = ShardIndex(geometry, shards, table, text_len, dict(fingerprints or {}))
    index.save(folder)
    return index


def _scan(path: Path, number: int) -> Iterator[SampleEntry]:
    entry: SampleEntry | None = None
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if entry is None or entry.key != key:
                if entry is not None:
                    yield entry
                entry = SampleEntry(key, number, {})
            entry.parts[suffix] = (member.offset_data, member.size)
    if entry is not None:
        yield entry


# ------------------------------------------------------------------------------------------ reading
class ShardDataset(Dataset):
    """Map-style access to a folder of shards; `fields` says what to load (pixels are decoded only if asked
    for).

    cache=True keeps every loaded sample in memory. Raises ShardError for missing fields, another geometry,
    other fingerprints, a truncated shard, naming the first sample that is cut off, or, when a sample is read, damaged
    bytes, or shards that were packed anew: the byte ranges of the index that was opened are those of other samples
    there.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Sequence[str] = ("latents", "prompt_embeds", "tracks"),
        *,
        geometry: ClipGeometry | None = None,
        fingerprints: dict[str, str] | None = None,
        cache: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.fields = tuple(fields)
        self.index = ShardIndex.load(folder)
        self._digest = self._index_digest()
        self.index.require(self.fields, geometry, fingerprints or {})
        self._states = self._checked_states()
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, position: int) -> Sample:
        if self._cache is not None and position in self._cache:
            return self._cache[position]
        entry = self.index.samples[position]
        try:
            sample = self._load(position, entry.key)
        except ShardError:
            raise
        except (ValueError, KeyError, TypeError, EOFError) as error:  # what decoders say of bytes that are not theirs
            shard = self.index.shards[entry.shard]
            raise ShardError(
                f"{shard}: sample {entry.key}: {error}; copy the shard again or run step=pack again"
            ) from error
        if self._cache is not None:
            self._cache[position] = sample
        return sample

    def meta(self, position: int) -> dict:
        """The sample's json: caption, source and, for sprites, the seed and the configuration it was drawn
        with.
        """
        return json.loads(self.read_part(position, "json"))

    def read_part(self, position: int, suffix: str) -> bytes:
        """Raw bytes of one member. ShardError if the shard ends before it does."""
        entry = self.index.samples[position]
        if suffix not in entry.parts:
            raise ShardError(f"sample {entry.key}: no member .{suffix}; it has {sorted(entry.parts)}")
        offset, size = entry.parts[suffix]
        path = self._unchanged(entry.shard)
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise self._truncated(entry, suffix, offset + len(content))
        return content

    def _load(self, position: int, key: str) -> Sample:
        geometry = self.index.geometry
        sample = Sample(position, key, self.meta(position)["caption"])
        if "pixels" in self.fields:
            sample.pixels = self._pixels(position)
        if "latents" in self.fields:
            sample.latents = self._array(position, "latents.npy").float()
        if "prompt_embeds" in self.fields:
            sample.prompt_embeds = pad_text(self._array(position, "text.npy").float(), self.index.text_len)
        if "clip_embeds" in self.fields:
            sample.clip_embeds = self._array(position, "clip.npy").float()
        if "tracks" in self.fields:
            points, visibility = (self._array(position, part) for part in FIELD_PARTS["tracks"])
            sample.tracks = Tracks.from_arrays(points, visibility, geometry.height, geometry.width)
        return sample

    def _array(self, position: int, suffix: str) -> Tensor:
        return torch.from_numpy(np.load(io.BytesIO(self.read_part(position, suffix)), allow_pickle=False))

    def _pixels(self, position: int) -> Tensor:
        return torch.from_numpy(read_video(self.read_part(position, "mp4"))).permute(3, 0, 1, 2).contiguous()

    def _checked_states(self) -> list[tuple[int, int] | None]:
        """Size and time of each shard. ShardError for one that is absent or cut off."""
        states = [file_state(self.folder / shard) for shard in self.index.shards]
        for shard, state in zip(self.index.shards, states):
            if state is None:
                raise ShardError(f"{shard}: listed in {INDEX_NAME} but absent from {self.folder}; run step=pack again")
        sizes = [state[0] for state in states if state is not None]
        if (cut := self.index.samples.beyond(sizes)) is not None:
            entry, suffix = cut
            raise self._truncated(entry, suffix, sizes[entry.shard])
        return states

    def _unchanged(self, shard: int) -> Path:
        """Path of a shard that still is what the index says: the same samples packed again are the same bytes."""
        path = self.folder / self.index.shards[shard]
        state = file_state(path)
        if state != self._states[shard]:
            if state is None or self._index_digest() != self._digest:
                raise ShardError(
                    f"{path} was packed anew while it was in use; start the command again (a training goes on from its "
                    "last checkpoint)"
                )
            self._states[shard] = state
        return path

    def _index_digest(self) -> bytes:
        path = self.folder / INDEX_NAME
        return hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""

    def _truncated(self, entry: SampleEntry, suffix: str, end: int) -> ShardError:
        offset, size = entry.parts[suffix]
        return ShardError(
            f"{self.index.shards[entry.shard]}: truncated in sample {entry.key}: {suffix} needs bytes "
            f"{offset}..{offset + size}, the file ends at {end}; copy the shard again or run step=pack again"
        )


def trim_text(embeds: np.ndarray) -> np.ndarray:
    """Cut the zero rows after the true length: [L, D] -> [l, D], l >= 1."""
    used = np.flatnonzero(np.abs(embeds).max(axis=1) > 0)
    return embeds[: max(1, int(used[-1]) + 1 if len(used) else 1)]


def pad_text(embeds: Tensor, text_len: int | None) -> Tensor:
    """The inverse of `trim_text`: [l, D] -> [text_len, D]."""
    if text_len is None or len(embeds) == text_len:
        return embeds
    return torch.cat([embeds, embeds.new_zeros(text_len - len(embeds), embeds.shape[1])])
