"""What is registered is documented: every argument named, what comes back, and where it is from."""

import inspect
import re

import pytest

from kseg import catalogue
from kseg.registry import BACKBONES, DATASETS, HEAD_LOSSES, LOSSES, METRICS, MODELS
from tools import model_table

DOCUMENTED_BY_ARGUMENT = (MODELS, BACKBONES, LOSSES, HEAD_LOSSES, METRICS)


def cases(*registries):
    return [
        pytest.param(registry[name], id=f"{registry.kind} {name}")
        for registry in registries
        for name in registry
    ]


def docstring(item) -> str:
    """Return the text of a function or class, with that of the family member it refers to.

    ResNet101 says "Args, Returns, Source: as `ResNet50`" rather than the same page again; that
    holds only where both take the same arguments.
    """
    parts = [item, item.__init__] if inspect.isclass(item) else [item]
    text = "\n".join(inspect.cleandoc(part.__doc__ or "") for part in parts)
    reference = re.search(r"^Args,.*: as `(\w+)`", text, re.MULTILINE)
    if reference:
        model = getattr(inspect.getmodule(item), reference.group(1))
        assert inspect.signature(model) == inspect.signature(item)
        return docstring(model)
    return text


def section(text: str, title: str) -> str:
    """Return the indented lines under `Title:`, or an empty string."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def undocumented(item) -> list[str]:
    arguments = section(docstring(item), "Args")
    named = set()
    for line in re.findall(r"^ {4}([\w*][\w, *]*)(?: \([^)]*\))?:", arguments, re.MULTILINE):
        named |= {name.strip(" *") for name in line.split(",")}
    return [name for name in inspect.signature(item).parameters if name not in named]


@pytest.mark.parametrize("item", cases(*DOCUMENTED_BY_ARGUMENT))
def test_every_argument_is_described(item):
    assert not undocumented(item)


@pytest.mark.parametrize("item", cases(*DOCUMENTED_BY_ARGUMENT))
def test_what_comes_back_is_described(item):
    assert inspect.isclass(item) or section(docstring(item), "Returns")


@pytest.mark.parametrize("item", cases(*DOCUMENTED_BY_ARGUMENT))
def test_source_is_named(item):
    assert re.search(r"^Source:", docstring(item), re.MULTILINE)


@pytest.mark.parametrize("name", list(DATASETS))
def test_data_set_shows_what_to_type(name):
    # Its one argument is the text behind the colon, so the spec says more than an Args section.
    assert re.search(rf"`{name}(:[\w\[\]:]+)?`", docstring(DATASETS[name]))


@pytest.mark.parametrize(
    "registry", (*DOCUMENTED_BY_ARGUMENT, DATASETS), ids=lambda registry: registry.kind
)
def test_registry_is_not_empty(registry):
    assert len(registry)


def test_readme_lists_every_model_as_it_is_now():
    text = model_table.README.read_text()
    assert model_table.readme(text) == text
    assert list(catalogue.table()) == [row.name for row in catalogue.rows()]


def test_a_measurement_is_forgotten_when_a_count_changes():
    counts = {"parameters": 5, "macs": 7, "dilates": False}
    old = counts | {"int8_ms": 3.0}
    assert model_table._merged(old, counts) == old
    assert model_table._merged(old, counts | {"macs": 8}) == counts | {"macs": 8}


@pytest.mark.slow
def test_a_row_of_the_table_is_measured():
    numbers = model_table.measured_apart(catalogue.Row("fastscnn"))
    # 1.14 million weights of four bytes or one, less the batch normalisations that were folded
    # (some 2 %), and what describes the graph.
    assert 4.4 < numbers["float32_mb"] < 5.0
    assert 1.1 < numbers["int8_mb"] < 1.9
    assert numbers["float32_ms"] > 0 and numbers["int8_ms"] > 0
    assert numbers["machine"] and numbers["date"]


@pytest.mark.slow
def test_counts_of_the_table_are_those_of_the_models():
    assert model_table.counted() == catalogue.table()


def test_the_check_itself_notices_a_missing_argument():
    def build(size, *, depth, width):
        """Build.

        Args:
            size (tuple): height: and width.
            depth: how deep; nothing is
                width: said of the third.
        """

    assert undocumented(build) == ["width"]
    assert not section(docstring(build), "Returns")
