"""ODE pairs on disk: exact round trip, one recipe per folder, nothing half-written."""

import pytest
import torch

from distill.pair_store import OdePair, PairStore, stack_states

RECIPE = {"num_pairs": 3, "shift": 6.0, "step_indices": [0, 16, 32]}
NULL = torch.zeros(1, 7, 5)


def make_pair(seed: int) -> OdePair:
    rng = torch.Generator().manual_seed(seed)
    prompt = torch.zeros(7, 5)
    prompt[0], prompt[2] = 1.0, torch.randn(5, generator=rng)  # an empty row inside, a zero tail
    return OdePair(
        states=torch.randn(4, 2, 3, 4, 4, generator=rng).half(),
        prompt_embeds=prompt,
        points=torch.rand(9, 6, 2, generator=rng),
        visibility=torch.rand(9, 6, generator=rng) > 0.5,
        ids=torch.randint(0, 10_000, (6,), generator=rng),
        image_latents=torch.randn(2, 1, 4, 4, generator=rng),
    )


def test_a_pair_comes_back_as_it_was(tmp_path):
    store = PairStore.create(tmp_path, RECIPE, NULL)
    store.write(1, make_pair(1))
    read = store.read(1)
    for name, value in vars(make_pair(1)).items():
        got = vars(read)[name]
        assert (got is None and value is None) or (got.dtype == value.dtype and torch.equal(got, value)), name
    assert stack_states([read, read]).shape == (2, 4, 2, 3, 4, 4)


def test_unfinished_or_absent_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="stage=ode_pairs"):
        PairStore.open(tmp_path)
    store = PairStore.create(tmp_path, RECIPE, NULL)
    store.write(0, make_pair(0))
    assert store.missing() == [1, 2]
    with pytest.raises(ValueError, match="has 1 of num_pairs=3"):
        PairStore.open(tmp_path)
    for index in store.missing():
        store.write(index, make_pair(index))
    assert PairStore.open(tmp_path).missing() == []


def test_one_folder_holds_one_recipe_but_may_grow(tmp_path):
    PairStore.create(tmp_path, RECIPE, NULL)
    with pytest.raises(ValueError, match=r"shift=6.0 \(now 5.0\)"):
        PairStore.create(tmp_path, RECIPE | {"shift": 5.0}, NULL)
    assert len(PairStore.create(tmp_path, RECIPE | {"num_pairs": 5}, NULL).missing()) == 5


def test_pairs_that_are_there_are_not_hidden_by_a_smaller_number(tmp_path):
    store = PairStore.create(tmp_path, RECIPE | {"num_pairs": 9}, NULL)
    for index in (0, 1, 2, 5):
        store.write(index, make_pair(index))
    assert PairStore.create(tmp_path, RECIPE | {"num_pairs": 2}, NULL).num_pairs == 3
    assert PairStore.open(tmp_path).num_pairs == 3


def test_a_recipe_that_differs_in_a_field_is_another(tmp_path):
    PairStore.create(tmp_path, RECIPE | {"precision": "bfloat16"}, NULL)
    with pytest.raises(ValueError, match=r"precision=bfloat16 \(now float32\)"):
        PairStore.create(tmp_path, RECIPE | {"precision": "float32"}, NULL)


def test_the_folder_of_the_run_is_told_from_that_of_its_pairs(tmp_path):
    PairStore.create(tmp_path / "pairs", RECIPE, NULL)
    with pytest.raises(FileNotFoundError, match=f"is a run; its pairs are in {tmp_path / 'pairs'}"):
        PairStore.open(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 60])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, kept_bytes):
    store = PairStore.create(tmp_path, RECIPE, NULL)
    store.write(1, make_pair(1))
    for name in ("pair_000001.safetensors", "shared.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"pair_000001.safetensors .* is not whole: .*delete it and run that stage"):
        store.read(1)
    with pytest.raises(ValueError, match=r"shared.safetensors .* is not whole: .*; copy it again$"):
        _ = store.null_prompt_embeds
