"""Pretraining data: sources, and validation places held out."""

from __future__ import annotations

import numpy as np
import pytest

from training.datasets.points import crops_us_2021
from training.datasets.stacks import read_stack
from training.licences import TERMS
from training.pretrain import FIRST
from training.pretraining_data import (
    NoScene,
    Places,
    SourceNotGiven,
    SourcesConfig,
    StackSource,
    open_sources,
)

pytestmark = pytest.mark.slow


def test_weights_are_shared_by_the_scenes_of_a_source(tmp_path):
    config = SourcesConfig(stacks=(), synthetic=4, synthetic_weight=2.0, series=(), eurosat=False)
    sources = open_sources(config, Places(data=tmp_path), seed=0)
    assert list(sources.weights) == [0.5] * 4
    assert not any(s.validation for s in sources.scenes)
    assert [s.validation for s in sources.held_out] == [True]
    assert sources.counts() == {"synthetic": 4 * 64 * 64}


def test_no_scene_is_an_error(tmp_path):
    config = SourcesConfig(stacks=(), synthetic=0, series=(), eurosat=False)
    with pytest.raises(NoScene, match="at least one scene"):
        open_sources(config, Places(data=tmp_path), seed=0)


@pytest.mark.parametrize("name", ["romania", "pastis"])
def test_a_source_whose_place_is_unknown_is_named(tmp_path, name):
    config = SourcesConfig(stacks=(), series=(), eurosat=False).model_copy(update={name: 1.0})
    with pytest.raises(SourceNotGiven, match=name):
        open_sources(config, Places(data=tmp_path), seed=0)


def test_held_out_places_are_never_learned_from(shared_data):
    config = SourcesConfig(
        stacks=(StackSource(folder="flanders_2017_2018"),),
        synthetic=0,
        series=("crops_us_2021",),
        eurosat=False,
    )
    sources = open_sources(config, Places(data=shared_data), seed=0)
    complete = read_stack(shared_data / "flanders_2017_2018").values
    np.testing.assert_array_equal(sources.scenes[0].values, complete[:, :, 16:])
    np.testing.assert_array_equal(sources.held_out[0].values, complete[:, :, :16])
    crops = crops_us_2021(shared_data / "crops_us_2021")[0]
    held = set(crops.places[crops.validation])
    assert held
    assert not held & set(sources.series[0].places)
    assert sources.series[0].bands == ("B02", "B04", "B08")


def test_every_source_of_the_zoos_run_has_its_terms():
    config = FIRST.sources
    names = {s.folder for s in config.stacks} | set(config.series)
    assert names | {"romania", "pastis", "synthetic", "eurosat"} <= set(TERMS)
