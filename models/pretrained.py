"""Weights in files and folders, whole or not at all: what is cut short, absent or of another model is refused.

Files are safetensors, or pickles restricted to tensors; folders are those of `transformers` and `diffusers`. Left out:
what the weights mean (`models/wan/checkpoint.py`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN_NAMES, SHOWN_LETTERS = 3, 100  # in an error


def read_weights(path: Path) -> Any:
    """Content of a .safetensors file, or of a pickle: tensors by name, if it is one of weights."""
    with reading_weights(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)  # torch < 1.6 wrote files that cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


@contextmanager
def reading_weights(path: Path) -> Iterator[None]:
    """Raises ValueError, naming the file, where what is read in the block is no file of weights, or not a whole one."""
    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        reason = (str(error) or repr(error)).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {reason[:SHOWN_LETTERS]}; if it is cut "
            "short or a pointer of Git LFS, get it again; if it holds more than tensors, save these alone"
        ) from error


def load_whole(kind: Any, folder: str | Path, *, unread: Collection[str] = (), **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)`; ``unread``: weights that it may lack, as nothing reads them.

    Raises ValueError where files are absent or damaged, and where they lack weights of this class or have them in other
    shapes, as another model's do: `from_pretrained` would draw these at random, and say so in a warning alone.
    """
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder} cannot be read as {kind.__name__}: {reason}; download it again") from error
    if drawn := {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])} - set(unread):
        raise ValueError(
            f"{folder} is not a whole {kind.__name__}: absent, or of another shape, are {shortened(drawn)}; "
            "download it again, or give the folder of the right model"
        )
    return model


def load_state(module: nn.Module, state: Any, path: str | Path, *, assign: bool = False) -> None:
    """The weights that ``path`` held into a module; ValueError naming what is absent, unknown or of another shape."""
    own, found = module.state_dict(), state if isinstance(state, Mapping) else {}
    kinds = {
        "absent": own.keys() - found.keys(),
        "unknown": found.keys() - own.keys(),
        "of another shape": [
            name
            for name in own.keys() & found.keys()
            if not isinstance(found[name], Tensor) or found[name].shape != own[name].shape
        ],
    }
    if told := "; ".join(f"{kind}: {shortened(map(str, names))}" for kind, names in kinds.items() if names):
        raise ValueError(f"{path} does not hold the weights of this {type(module).__name__} ({told}); give another")
    module.load_state_dict(found, assign=assign)


def shortened(names: Iterable[str], limit: int = SHOWN_NAMES) -> str:
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
