"""Drawn data and small models that tests share, and where the real images are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kseg.quiet import prepare_tensorflow

prepare_tensorflow()  # before a test's module imports it

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("KSEG_SHARED", ROOT.parent / "shared"))
CAMVID = SHARED / "camvid"


@pytest.fixture
def camvid() -> Path:
    """The folder of real street images; the test skips where it is missing."""
    if not CAMVID.is_dir():
        pytest.skip(f"no CamVid at {CAMVID}; set KSEG_SHARED to the folder that holds it")
    return CAMVID


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Fail a CamVid test that skips although the images are there."""
    report = yield
    if report.skipped and "camvid" in getattr(item, "fixturenames", ()) and CAMVID.is_dir():
        report.outcome = "failed"
        report.longrepr = f"skipped although {CAMVID} exists: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small drawn `folder:` data set."""
    from street import write_street

    return write_street(tmp_path_factory.mktemp("street") / "data")


@pytest.fixture(scope="session")
def run_folder(street: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default model, made narrow, on the drawn data."""
    from street import train_words

    from kseg.cli import main

    folder = tmp_path_factory.mktemp("runs") / "street"
    assert main(train_words(street, folder)) == 0
    return folder
