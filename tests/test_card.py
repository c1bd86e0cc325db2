"""The card rides in every kind of file and does not disturb it."""

import json
import zipfile

import keras
import pytest
from tiny import CARD, tiny_model

from kseg import card as cards
from kseg.card import ModelCard
from kseg.errors import UserError


def test_json_round_trip_keeps_tuples():
    card = ModelCard(
        model="fastscnn",
        options={"bins": (1, 2), "pairs": ((1, 2), (3,)), "aux": True, "backbone": None},
        classes=("Straße", "b"),
        palette=((1, 2, 3), (4, 5, 6)),
        size=(96, 128),
        extra={"seed": 1},
    )
    assert ModelCard.from_json(card.to_json()) == card


def test_keras_file(tmp_path):
    path = tmp_path / "m.keras"
    tiny_model().save(path)
    assert cards.read(path) is None
    cards.embed(path, CARD)
    assert cards.read(path) == CARD
    assert keras.saving.load_model(path, compile=False).name == "tiny"


def test_zip_tail_leaves_the_front_alone(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"TFL3" * 100)
    assert cards.read(path) is None
    cards.embed(path, CARD)
    assert path.read_bytes().startswith(b"TFL3" * 100)
    assert cards.read(path) == CARD
    assert zipfile.ZipFile(path).testzip() is None


def test_folder(tmp_path):
    assert cards.read(tmp_path) is None
    cards.embed(tmp_path, CARD)
    assert cards.read(tmp_path) == CARD
    # TF Serving leaves assets.extra alone, whatever lies there.
    assert (tmp_path / "assets.extra" / "kseg.json").is_file()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model": 1}', json.dumps({"classes": 3, "palette": [], "size": []})]
)
def test_damaged_card_names_its_file(tmp_path, text):
    path = tmp_path / "m.tflite"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kseg.json", text)
    with pytest.raises(UserError, match="m.tflite: its kseg.json is damaged"):
        cards.read(path)


def test_card_of_a_newer_kseg_is_no_crash(tmp_path):
    path = tmp_path / "m.tflite"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kseg.json", json.dumps({**json.loads(CARD.to_json()), "later": 1}))
    with pytest.raises(UserError, match="later"):
        cards.read(path)


def test_damaged_archive_is_no_crash(tmp_path):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kseg.json", CARD.to_json() * 50)
    whole = bytearray(path.read_bytes())
    whole[60:70] = b"x" * 10
    path.write_bytes(whole)
    with pytest.raises(UserError, match="m.keras"):
        cards.read(path)


def test_a_second_card_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    cards.embed(path, CARD)
    with pytest.raises(ValueError, match="card"):
        cards.embed(path, CARD)
