"""Profiles: shipped ones are whole, files come back as they were, and what makes no sense is one sentence."""

from pathlib import Path

import msgspec
import pytest
from support.imitation import a_profile, rows_of

from moetrace.generators import ProfileDrawer, list_profiles, load_profile, save_profile
from moetrace.generators.profile import Profile
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError, UsageError


def test_four_models_have_profiles():
    assert {"deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b", "tiny-olmoe"} <= set(list_profiles())


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profile_is_that_of_a_preset_model(name):
    profile = load_profile(name)
    model = load_model(profile.model)
    assert profile.name == name
    assert (profile.layers, profile.experts) == (model.moe_layers, model.experts)
    assert 0.05 < profile.request + profile.slow + profile.fast < 1
    assert 0 < profile.fast_rows < profile.slow_rows
    assert profile.curve == sorted(profile.curve, reverse=True)


def test_every_value_is_explained():
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    assert [field for field in Profile.__struct_fields__ if f"`{field}`" not in page] == []


def test_file_comes_back_as_it_was(tmp_path):
    profile = a_profile(name='na"me', skew=[0.5, 1e-5, 2.0])
    save_profile(profile, tmp_path / "p.toml", "two\nlines")
    assert load_profile(tmp_path / "p.toml") == profile
    assert load_profile(str(tmp_path / "p.toml")) == profile
    assert (tmp_path / "p.toml").read_text().startswith("# two\n# lines\n")
    assert load_profile(profile) == profile


def test_refused_file_leaves_nothing(tmp_path):
    with pytest.raises(
        MoetraceError, match=r"missing/p\.toml could not be written: there is no folder .*; nothing was changed"
    ):
        save_profile(a_profile(), tmp_path / "missing" / "p.toml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 17}, "top_k wants at most the 16 experts"),
        ({"skew": [0.5]}, "skew wants one number for each of the 3 layers, got 1"),
        ({"skew": [0.5, -1.0, 0.5]}, "skew"),
        ({"request": 0.9}, "sum to 1.5"),
        ({"fast": 1.5}, "fast wants a number from 0 to 1"),
        ({"slow_rows": 0.0}, "slow_rows wants a number from 1e-09 to"),
        ({"slow_rows": float("inf")}, "slow_rows wants a finite number"),
        ({"dimensions": 1000}, "dimensions"),
        ({"layers": 65535, "experts": 65535}, "too many for a profile of 6 dimensions"),
        ({"vocabulary": 10**9}, "vocabulary"),
        ({"curve": [1.0]}, "curve"),
        ({"model": "x\ny"}, "model wants printable"),
    ],
)
def test_values_without_sense_are_refused_by_key(tmp_path, changes, words):
    profile = msgspec.structs.replace(a_profile(), **changes)
    with pytest.raises(UsageError, match=words):
        load_profile(profile)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "line 1: not TOML"),
        ('name = "x"', "model is missing"),
        ('nam = "x"', "nam is unknown"),
        ("skew = 3", "skew"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, text, words):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(MoetraceError, match=words) as error:
        load_profile(tmp_path / "p.toml")
    assert "p.toml" in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="nearest is 'mixtral-8x7b'"):
        load_profile("mixtral-8x7")
    with pytest.raises(UsageError, match="got int"):
        load_profile(7)  # pyright: ignore[reportArgumentType]


def test_extremes_can_be_drawn():
    values = {field: getattr(a_profile(), field) for field in Profile.__struct_fields__}
    for changes in (
        {"skew": [8.0] * 3, "curve": [100.0, -100.0]},
        {"request": 1.0, "slow": 0.0, "fast": 0.0, "token": 0.0},
        {"request": 0.0, "slow": 0.0, "fast": 0.0, "token": 1.0, "vocabulary": 1, "token_zipf": 8.0},
        {"slow_rows": 1e6, "fast_rows": 1e-6, "depth": 1.0, "phase": 1.0},
        {"top_k": 16, "curve": [0.0, 0.0]},
    ):
        profile = load_profile(Profile(**values | changes))
        drawn = ProfileDrawer(profile, 0, slots=1).draw(*rows_of(1, 10))
        assert drawn.max() < 16
