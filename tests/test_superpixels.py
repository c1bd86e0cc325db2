"""Superpixels behind a net: means over regions of one colour."""

import sys

import numpy as np
import pytest

from kseg.errors import UserError
from kseg.superpixels import Superpixels

HALVES = np.zeros((32, 48, 3), "uint8")
HALVES[:, :20] = (200, 30, 30)
HALVES[:, 20:] = (30, 30, 200)


def test_superpixels_average_within_an_edge():
    logits = np.random.RandomState(0).normal(size=(32, 48, 4)).astype("float32")
    pooled = Superpixels(2).refine(logits, HALVES)
    assert pooled.dtype == logits.dtype
    for half in np.s_[:, :20], np.s_[:, 20:]:
        expected = np.broadcast_to(logits[half].mean((0, 1)), pooled[half].shape)
        np.testing.assert_allclose(pooled[half], expected, atol=1e-6)


def test_many_superpixels_keep_more():
    logits = np.random.RandomState(0).normal(size=(32, 48, 1)).astype("float32")
    few, many = (Superpixels(count).refine(logits, HALVES) for count in (2, 60))
    assert len(np.unique(few)) == 2
    assert 30 <= len(np.unique(many)) <= 90
    # Means of means: the sum over the image stays.
    np.testing.assert_allclose(many.sum(), logits.sum(), atol=1e-2)


def test_superpixels_of_another_image():
    with pytest.raises(UserError, match=r"are \(32, 40\) pixels, the image \(32, 48\)"):
        Superpixels().refine(np.zeros((32, 40, 4), "float32"), HALVES)


def test_superpixels_name_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(UserError, match=r"pip install 'kseg\[superpixels\]'"):
        Superpixels().refine(np.zeros((32, 48, 4), "float32"), HALVES)


def test_no_superpixels():
    with pytest.raises(UserError, match="superpixels is 0; at least 1"):
        Superpixels(0)
