"""Captions to the vectors that a DiT attends to: UMT5 for Wan, a fixed code for the sprites world.

Every encoder gives [B, text_len, text_dim], exactly zero beyond a caption's last token: Wan cuts the padding
after the encoder and before its own text MLP, and attends to all text_len positions without a mask.

The sprites encoder has no weights, and neither has its sibling for captions in any words. A token is a sparse
code, one-hot word | one-hot word before it | one-hot position, and the DiT's text MLP, which every Wan DiT
has, is the learned embedding of it. The word before binds an attribute to its noun ("red disc") without a
text transformer.
"""

from __future__ import annotations

import html
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.pretrained import load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "spiece.model")  # that hold the words of a T5 tokenizer; one is enough
VOCABULARY_CAPACITY = 128  # slots for words: a DiT keeps its text_dim, and its weights, while the vocabulary grows
INNER_MARKS = "-\u2010\u2011'\u2019"  # hyphens and apostrophes

# The order is part of every trained sprites model. Append; never reorder, rename or remove.
# fmt: off
SPRITES_VOCABULARY: tuple[str, ...] = (
    "a", "an", "the", "and", "of", "in", "on", "over", "to", "with", "then", "while", "from", "into",
    "one", "two", "three",
    "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white", "gray", "black",
    "teal",
    "disc", "square", "triangle", "ring", "cross", "discs", "squares", "triangles", "rings", "crosses",
    "sprite", "sprites",
    "striped", "two-tone", "spotted", "plain", "checkered",
    "background", "smooth", "panning", "static", "dark", "light", "bright", "pale", "camera", "scene",
    "turns", "becomes", "moves", "slides", "drifts", "spins", "rotates", "grows", "shrinks", "stays", "still",
    "circles", "bounces", "leaves", "enters", "returns", "passes", "hides", "appears", "stops",
    "pans", "zooms", "is", "are",
    "left", "right", "up", "down", "clockwise", "counterclockwise", "away", "back", "around", "across",
    "slowly", "quickly", "fast", "slow", "small", "large",
    "behind", "front", "above", "below", "beside", "near", "between",
)
# fmt: on


@runtime_checkable
class TextEncoder(Protocol):
    """What the rest of the code knows of a text encoder."""

    @property
    def text_len(self) -> int: ...  # tokens

    @property
    def text_dim(self) -> int: ...  # width of a token

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> [B, text_len, text_dim], zero beyond the true length."""
        ...

    def null(self) -> Tensor:
        """[1, text_len, text_dim]: what a dropped text means."""
        ...


class VocabularyEncoder:
    """A fixed sparse code over a closed vocabulary; the null text is the empty caption, all zeros.

    Raises ValueError for a word that is not in the vocabulary, or a caption of more than text_len words.
    """

    def __init__(self, text_len: int, vocabulary: Sequence[str] = SPRITES_VOCABULARY) -> None:
        if len(set(vocabulary)) != len(vocabulary) or len(vocabulary) > VOCABULARY_CAPACITY:
            raise ValueError(
                f"a vocabulary of {len(vocabulary)} words must have no word twice, and at most {VOCABULARY_CAPACITY}"
            )
        self.text_len = text_len
        self._index = {word: index for index, word in enumerate(vocabulary)}

    @staticmethod
    def dim_for(text_len: int) -> int:
        """text_dim of an encoder of this length."""
        return 2 * VOCABULARY_CAPACITY + text_len

    @property
    def text_dim(self) -> int:
        return self.dim_for(self.text_len)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> [B, text_len, text_dim] of zeros and ones. Case and punctuation do not matter."""
        codes = torch.zeros(len(captions), self.text_len, self.text_dim)
        for row, caption in enumerate(captions):
            for position, (word, before) in enumerate(self._pairs(caption)):
                codes[row, position, word] = 1.0
                codes[row, position, 2 * VOCABULARY_CAPACITY + position] = 1.0
                if before is not None:
                    codes[row, position, VOCABULARY_CAPACITY + before] = 1.0
        return codes

    def null(self) -> Tensor:
        return self.encode([""])

    def _pairs(self, caption: str) -> Iterable[tuple[int, int | None]]:
        words = split_words(caption)
        if unknown := [word for word in words if word not in self._index]:
            raise ValueError(
                f"unknown word {', '.join(map(repr, unknown))} in caption {caption!r}; the sprites world "
                f"knows: {' '.join(self._index)}"
            )
        if len(words) > self.text_len:
            raise ValueError(
                f"caption of {len(words)} words; text_len={self.text_len} is the most: shorten {caption!r}"
            )
        indices = [self._index[word] for word in words]
        return zip(indices, [None, *indices])


class HashedEncoder(VocabularyEncoder):
    """The same code for captions in any words, for small models on real video: a word takes the slot that its
    checksum says, and may share it with others. Words beyond text_len are cut, as T5 tokenizers do.
    """

    def __init__(self, text_len: int) -> None:
        super().__init__(text_len, vocabulary=())

    def _pairs(self, caption: str) -> Iterable[tuple[int, int | None]]:
        words = split_words(caption)[: self.text_len]
        indices = [zlib.crc32(word.encode()) % VOCABULARY_CAPACITY for word in words]
        return zip(indices, [None, *indices])


def split_words(caption: str) -> list[str]:
    """Words in lower case, without punctuation marks, but for those within a word (two-tone, it's)."""
    spaced = "".join(" " if _is_mark(character) else character for character in caption.lower())
    return [word for part in spaced.split() if (word := part.strip(INNER_MARKS))]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in INNER_MARKS


class Umt5Encoder(nn.Module):
    """The encoder of UMT5-XXL (or a smaller one of its family) from a folder, frozen.

    The folder holds text_encoder/ and tokenizer/, as Wan repositories in diffusers format do, or the files of
    both.
    """

    def __init__(
        self,
        path: str | Path,
        text_len: int = 512,
        null_caption: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import UMT5EncoderModel

        super().__init__()
        encoder_folder = _part(Path(path), "text_encoder", "config.json")
        self.tokenizer = _load_tokenizer(_part(Path(path), "tokenizer", "tokenizer_config.json"))
        # Wan's files hold one table and tie_word_embeddings=false: transformers 5.0 to 5.2 leave the encoder's random
        model = load_whole(UMT5EncoderModel, encoder_folder, unread=["encoder.embed_tokens.weight"], dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.model.set_input_embeddings(self.model.shared)
        self.text_len = text_len
        self.text_dim: int = self.model.config.d_model
        self.null_caption = null_caption

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> [B, text_len, text_dim], float32; longer ones are cut at text_len tokens."""
        tokens = self.tokenizer(
            [clean(caption) for caption in captions],
            padding="max_length", max_length=self.text_len, truncation=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        mask = tokens["attention_mask"]
        hidden = self.model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return hidden.float().masked_fill(mask[..., None] == 0, 0.0)

    def null(self) -> Tensor:
        """[1, text_len, text_dim] of ``null_caption``: empty, or the negative prompt used in training."""
        return self.encode([self.null_caption])


def clean(caption: str) -> str:
    """Wan's cleaning: broken Unicode repaired, HTML entities resolved, white space collapsed."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises FileNotFoundError where the words are absent, ValueError where a file is damaged."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARY_FILES):  # transformers 5: each word would be unknown
        raise FileNotFoundError(
            f"no words in the tokenizer of {folder}: neither {' nor '.join(VOCABULARY_FILES)} is there; download the "
            "whole tokenizer/ of a Wan model"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # of many kinds
        reason = (str(error) or repr(error)).partition("\n")[0]
        raise ValueError(f"{folder} cannot be read as a tokenizer: {reason}; download it again") from error


def _part(path: Path, name: str, marker: str) -> Path:
    """``path/name`` or ``path`` itself, whichever holds the marker file."""
    for folder in (path / name, path):
        if (folder / marker).is_file():
            return folder
    raise FileNotFoundError(
        f"no UMT5 {name} in {path}: neither {name}/{marker} nor {marker} is there. Download text_encoder/ "
        "and tokenizer/ of a Wan model in diffusers format (such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
    )
