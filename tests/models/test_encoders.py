"""Text and image encoders, on tiny random instances saved to a folder."""

from __future__ import annotations

import json
import shutil
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.wan.image_encoder import CLIP_MEAN, CLIP_STD, ClipImageEncoder
from models.wan.text_encoder import (
    SPRITES_VOCABULARY,
    VOCABULARY_CAPACITY,
    HashedEncoder,
    TextEncoder,
    Umt5Encoder,
    VocabularyEncoder,
    clean,
    split_words,
)

SENTENCES = [
    "a red disc turns yellow",
    "a blue square on a dark background",
    "the ring moves slowly left and right",
]


# ---------------------------------------------------------------------------- vocabulary
captions = st.lists(st.sampled_from(SPRITES_VOCABULARY), max_size=12).map(" ".join)


@given(one=captions, other=captions)
def test_different_captions_have_different_codes(one, other):
    first, second = VocabularyEncoder(text_len=12).encode([one, other])
    assert torch.equal(first, second) == (one == other)
    assert not first[len(one.split()) :].any()


def test_code_is_word_then_previous_word_then_position():
    encoder = VocabularyEncoder(text_len=6)
    code = encoder.encode(["The disc, turns!"])[0]
    assert code.shape == (6, encoder.text_dim) == (6, 2 * VOCABULARY_CAPACITY + 6)
    words = [SPRITES_VOCABULARY.index(word) for word in ("the", "disc", "turns")]
    expected = [
        [words[0], 2 * VOCABULARY_CAPACITY],
        [words[1], VOCABULARY_CAPACITY + words[0], 2 * VOCABULARY_CAPACITY + 1],
        [words[2], VOCABULARY_CAPACITY + words[1], 2 * VOCABULARY_CAPACITY + 2],
    ]
    assert [row.nonzero().flatten().tolist() for row in code[:3]] == expected


def test_punctuation_of_any_kind_is_no_part_of_a_word():
    plain = ["a", "red", "two-tone", "disc", "turns", "yellow"]
    for caption in (
        "a \"red\" (two-tone) disc turns 'yellow'",
        "“a red”, two-tone disc – turns yellow…",
        "«a red» two-tone disc—turns [yellow]。",
        "-- a red/two-tone disc: turns *yellow*",
    ):
        assert split_words(caption) == plain
    assert split_words("It's the dog’s well-worn mat") == ["it's", "the", "dog’s", "well-worn", "mat"]


def test_null_text_is_the_empty_caption():
    encoder = VocabularyEncoder(text_len=5)
    assert torch.equal(encoder.null(), torch.zeros(1, 5, encoder.text_dim))
    assert torch.equal(encoder.null(), encoder.encode([""]))


def test_unknown_words_and_long_captions_are_refused():
    encoder = VocabularyEncoder(text_len=4)
    with pytest.raises(ValueError, match="unknown word 'dics', 'elephant' in caption 'a red dics elephant'"):
        encoder.encode(["a disc", "a red dics elephant"])
    with pytest.raises(ValueError, match="caption of 5 words; text_len=4"):
        encoder.encode(["a red disc turns yellow"])


def test_the_vocabulary_has_room_and_no_double_words():
    assert len(SPRITES_VOCABULARY) <= VOCABULARY_CAPACITY
    with pytest.raises(ValueError, match="no word twice"):
        VocabularyEncoder(4, vocabulary=["a", "a"])


# ---------------------------------------------------------------------------- hashed words
def test_hashed_words_take_any_caption_and_cut_a_long_one():
    encoder = HashedEncoder(text_len=4)
    bear, same, cut = encoder.encode(["A bear walks!", "a Bear, walks", "a bear walks over large rocks"])
    assert bear.shape == (4, VocabularyEncoder.dim_for(4))
    assert torch.equal(bear, same)
    assert torch.equal(cut[:3], bear[:3]) and cut[3].any()
    assert not torch.equal(encoder.encode(["a bear swims"])[0], bear)
    assert torch.equal(encoder.null(), torch.zeros(1, 4, encoder.text_dim))


def test_hashed_slots_do_not_depend_on_the_process():
    slot = int(HashedEncoder(text_len=1).encode(["bear"])[0, 0].argmax())
    assert slot == zlib.crc32(b"bear") % VOCABULARY_CAPACITY == 41


# ---------------------------------------------------------------------------- UMT5
@pytest.fixture(scope="module")
def umt5_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("umt5")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(fast), "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    return folder


def test_umt5_has_one_table_of_words_as_in_wans_files(umt5_folder, tmp_path):
    shutil.copytree(umt5_folder, tmp_path / "wan")
    config, weights = (tmp_path / "wan/text_encoder" / name for name in ("config.json", "model.safetensors"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    state = load_file(weights)
    assert "shared.weight" in state
    save_file({key: value for key, value in state.items() if "embed_tokens" not in key}, weights, {"format": "pt"})
    encoder = Umt5Encoder(tmp_path / "wan", text_len=24)
    assert torch.equal(encoder.model.encoder.embed_tokens.weight, state["shared.weight"])
    torch.testing.assert_close(encoder.encode(SENTENCES), Umt5Encoder(umt5_folder, text_len=24).encode(SENTENCES))


def test_umt5_is_zero_beyond_the_true_length_and_padding_changes_nothing(umt5_folder):
    encoder, longer = Umt5Encoder(umt5_folder, text_len=40), Umt5Encoder(umt5_folder, text_len=48)
    codes = encoder.encode(SENTENCES[:2])
    assert codes.shape == (2, 40, encoder.text_dim) and encoder.text_dim == 24 and codes.dtype == torch.float32
    for row, caption in zip(codes, SENTENCES):
        length = len(encoder.tokenizer(caption)["input_ids"])
        assert length < 40 and not row[length:].any() and row[:length].abs().sum(-1).min() > 0
    torch.testing.assert_close(longer.encode(SENTENCES[:2])[:, :40], codes, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(SENTENCES[:1]), codes[:1], atol=1e-5, rtol=0)


def test_umt5_cleans_truncates_and_has_a_null(umt5_folder):
    encoder = Umt5Encoder(umt5_folder, text_len=24)
    plain, spaced = encoder.encode(["a red disc", "  a\n red \t disc "])
    assert torch.equal(plain, spaced)
    assert Umt5Encoder(umt5_folder, text_len=3).encode([SENTENCES[1]]).shape == (1, 3, 24)
    assert torch.equal(encoder.null(), encoder.encode([""]))
    negative = Umt5Encoder(umt5_folder, text_len=24, null_caption="dark")
    assert torch.equal(negative.null(), encoder.encode(["dark"]))


def test_clean_resolves_entities_twice():
    assert clean("a &amp;amp; b &lt;c&gt;\n") == "a & b <c>"


def test_umt5_reads_a_flat_folder_and_names_what_is_missing(umt5_folder, tmp_path):
    for part in ("tokenizer", "text_encoder"):
        for file in (umt5_folder / part).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    nested, flat = Umt5Encoder(umt5_folder, text_len=8), Umt5Encoder(tmp_path, text_len=8)
    assert torch.equal(nested.encode(SENTENCES[:1]), flat.encode(SENTENCES[:1]))
    with pytest.raises(FileNotFoundError, match=r"neither text_encoder/config\.json"):
        Umt5Encoder(tmp_path / "nowhere")


def test_umt5_without_its_words_is_refused(umt5_folder, tmp_path):
    """T5's tokenizer would know no word, and encode every caption as unknown ones."""
    shutil.copytree(umt5_folder, tmp_path / "t5")
    settings, words = (tmp_path / "t5/tokenizer" / name for name in ("tokenizer_config.json", "tokenizer.json"))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "T5Tokenizer"}))
    words.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"t5/tokenizer cannot be read as a tokenizer: .*; download it again"):
        Umt5Encoder(tmp_path / "t5", text_len=8)
    words.unlink()
    with pytest.raises(FileNotFoundError, match=r"no words in the tokenizer of .*: neither tokenizer.json nor spiece"):
        Umt5Encoder(tmp_path / "t5", text_len=8)


def test_umt5_without_all_its_weights_is_refused(umt5_folder, tmp_path):
    """T5's folder is one: its blocks share the bias of the first. They would be drawn at random."""
    shutil.copytree(umt5_folder, tmp_path / "t5")
    weights = tmp_path / "t5/text_encoder/model.safetensors"
    absent = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({key: value for key, value in load_file(weights).items() if key != absent}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"t5/text_encoder is not a whole UMT5EncoderModel: .*{absent}; download"):
        Umt5Encoder(tmp_path / "t5", text_len=8)


def test_both_are_text_encoders(umt5_folder):
    assert isinstance(VocabularyEncoder(4), TextEncoder)
    assert isinstance(Umt5Encoder(umt5_folder, text_len=8), TextEncoder)


# ---------------------------------------------------------------------------- CLIP
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    cfg = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(cfg).save_pretrained(folder)
    return folder


def test_clip_gives_the_tokens_before_the_last_block(clip_folder):
    encoder = ClipImageEncoder(clip_folder)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = encoder.encode(pixels)
    assert features.shape == (2, encoder.num_tokens, encoder.clip_dim) == (2, 17, 24)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    captured = []
    last = next(part for name, part in encoder.model.named_modules() if name.endswith("encoder.layers.2"))
    hook = last.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        encoder.model(pixel_values=((pixels + 1) / 2 - mean) / std)
    hook.remove()
    torch.testing.assert_close(features, captured[0], atol=1e-5, rtol=0)


def test_clip_squeezes_the_whole_frame_without_cropping(clip_folder):
    encoder = ClipImageEncoder(clip_folder)
    pixels = torch.zeros(1, 3, 48, 80)
    marked = pixels.clone()
    marked[..., :8] = 1.0  # a square crop would lose these columns
    assert not torch.allclose(encoder.encode(pixels), encoder.encode(marked))
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\]"):
        encoder.encode(pixels[:, :, None])
    with pytest.raises(FileNotFoundError, match="image_encoder/"):
        ClipImageEncoder(clip_folder / "nowhere")


def test_clip_of_another_shape_or_cut_short_is_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = tmp_path / "clip/model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    save_file(state | {name: torch.zeros(3, 24)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"clip is not a whole CLIPVisionModel: .*position_embedding.weight; download"):
        ClipImageEncoder(tmp_path / "clip")
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(ValueError, match=r"clip cannot be read as CLIPVisionModel: .*; download it again"):
        ClipImageEncoder(tmp_path / "clip")
