"""Copying weights between models: what fits, what may differ, what is said otherwise."""

import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from kseg.errors import UserError
from kseg.models import build
from kseg.weights import (
    Published,
    copy_weights,
    initialise_from,
    load_backbone_weights,
    read_model,
)


def tiny(classes=3, *, width=8, aux=False, size=32):
    """A network with the parts that matter: body, two class-shaped layers, an auxiliary head."""
    image = keras.Input((size, size, 3), name="image")
    x = layers.Conv2D(width, 3, padding="same", strides=2, name="body")(image)
    x = layers.BatchNormalization(name="body_bn")(x)
    score = layers.Conv2D(classes, 1, name="score")(x)
    up = layers.Conv2DTranspose(classes, 4, strides=2, padding="same", name="up")(score)
    outputs = {"logits": layers.Activation("linear", name="logits")(up)}
    if aux:
        outputs["aux"] = layers.Conv2D(classes, 1, name="aux_score")(x)
    return keras.Model(image, outputs)


def shuffled(model, seed=0):
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(size=w.shape).astype("float32") for w in model.get_weights()])
    return model


def same(a, b, name):
    pairs = zip(a.get_layer(name).get_weights(), b.get_layer(name).get_weights(), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_copy_weights_to_another_size():
    source, target = shuffled(tiny(aux=True)), tiny(size=64)
    copy_weights(source, target)
    assert all(same(source, target, name) for name in ("body", "body_bn", "score", "up"))


def test_copy_weights_names_the_first_misfit_and_changes_nothing():
    source, target = shuffled(tiny(5)), tiny(3)
    before = target.get_weights()
    with pytest.raises(UserError, match=r"score/kernel \(1, 1, 8, 3\) is kernel \(1, 1, 8, 5\)"):
        copy_weights(source, target)
    assert all(np.array_equal(x, y) for x, y in zip(before, target.get_weights(), strict=True))
    with pytest.raises(UserError, match=r"aux_score/kernel .* is missing there"):
        copy_weights(tiny(), tiny(aux=True))


def test_copy_weights_is_of_the_same_class_not_of_auto_names():
    def two_heads():
        x = keras.Input((4, 8), name="x")
        return keras.Model(x, layers.MultiHeadAttention(2, 4, name="attention")(x, x))

    source, target = shuffled(two_heads()), two_heads()
    copy_weights(source, target)
    assert same(source, target, "attention")


def test_initialise_from_file_and_run(tmp_path):
    source = shuffled(tiny())
    source.save(tmp_path / "best.keras")
    for path in (tmp_path / "best.keras", str(tmp_path)):
        model = tiny(aux=True)
        assert initialise_from(model, path) == ["aux_score"]
        assert all(same(source, model, name) for name in ("body", "body_bn", "score", "up"))


def test_initialise_from_other_classes(tmp_path):
    source = shuffled(tiny(11))
    source.save(tmp_path / "m.keras")
    model = tiny(2)
    fresh = model.get_layer("score").get_weights()
    assert initialise_from(model, tmp_path / "m.keras") == ["score", "up"]
    assert same(source, model, "body") and same(source, model, "body_bn")
    assert np.array_equal(fresh[0], model.get_layer("score").get_weights()[0])


def test_staged_training_of_fcn_starts_from_the_coarser_net(tmp_path):
    options = {"backbone": "mobilenetv3_small", "fc_channels": 8}
    coarse, fine = (
        build("fcn", (64, 64, 3), 3, options | {"finest_stride": stride}) for stride in (32, 8)
    )
    shuffled(coarse).save(tmp_path / "m.keras")
    assert initialise_from(fine, tmp_path / "m.keras") == ["score16", "score8"]
    assert all(same(coarse, fine, layer.name) for layer in coarse.layers)
    assert not any(weight.any() for weight in fine.get_layer("score16").get_weights())
    # A layer that is missing, and would add something, is refused.
    with pytest.raises(UserError, match="score8/kernel .* is missing there"):
        initialise_from(shuffled(fine), tmp_path / "m.keras")


def test_initialise_from_another_model_lists_what_differs(tmp_path):
    tiny(11, width=4).save(tmp_path / "m.keras")
    with pytest.raises(UserError) as caught:
        initialise_from(tiny(2), tmp_path / "m.keras")
    message = str(caught.value)
    assert "m.keras does not fit this model" in message
    assert "body/kernel (3, 3, 3, 8) is kernel (3, 3, 3, 4) there" in message
    assert "body_bn/gamma (8,) is gamma (4,) there" in message
    assert "score/kernel" in message and "up/kernel" not in message


def test_initialise_from_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="no file .*gone.keras"):
        initialise_from(tiny(), tmp_path / "gone.keras")
    with pytest.raises(UserError, match="no file .*best.keras"):
        initialise_from(tiny(), tmp_path)
    (tmp_path / "bad.keras").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="bad.keras cannot be opened: it is no .keras file"):
        initialise_from(tiny(), tmp_path / "bad.keras")
    image = keras.Input((8, 8, 3))
    keras.Model(image, layers.Conv2D(2, 1)(image)).save(tmp_path / "other.keras")
    with pytest.raises(UserError, match="other.keras: not a model of kseg"):
        initialise_from(tiny(), tmp_path / "other.keras")


def test_initialise_from_a_damaged_file(tmp_path):
    path = tmp_path / "m.keras"
    tiny().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="m.keras cannot be opened: .* cut short"):
        initialise_from(tiny(), path)
    path.write_bytes(whole[:200] + bytes(30) + whole[230:])
    with pytest.raises(UserError, match="m.keras cannot be opened: .* The file is damaged"):
        initialise_from(tiny(), path)


@keras.saving.register_keras_serializable("another program's")
class Strange(layers.Layer):
    """A layer that no other process knows."""

    def call(self, x):
        return x


def test_a_layer_of_another_program_is_named(tmp_path, monkeypatch):
    image = keras.Input((8, 8, 3))
    path = tmp_path / "m.keras"
    keras.Model(image, Strange()(image)).save(path)
    name = keras.saving.get_registered_name(Strange)
    monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    with pytest.raises(UserError, match="it holds Strange, which is neither of Keras nor of kseg"):
        read_model(path)


def test_what_is_wrong_with_a_layer_is_told(tmp_path):
    whole, path = tmp_path / "whole.keras", tmp_path / "m.keras"
    image = keras.Input((8, 8, 3))
    keras.Model(image, layers.Conv2D(2, 1)(image)).save(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as changed:
        for name in source.namelist():
            text = source.read(name)
            changed.writestr(name, text.replace(b'"filters": 2', b'"filters": -2'))
    with pytest.raises(UserError, match=r"opened: Invalid .*filters=-2\. The file is damaged"):
        read_model(path)


def test_initialise_from_refuses_code(tmp_path):
    image = keras.Input((8, 8, 3))
    output = {"logits": layers.Lambda(lambda x: x * 2)(image)}
    keras.Model(image, output).save(tmp_path / "unsafe.keras")
    with pytest.raises(UserError, match="unsafe.keras holds Python code"):
        initialise_from(tiny(), tmp_path / "unsafe.keras")


def test_download_offline_says_what_to_do():
    """Nothing listens on port 9 of this machine: the real download fails at once."""
    url = "https://127.0.0.1:9/kseg_test_notop.h5"
    image = keras.Input((64, 64, 3))
    with pytest.raises(UserError, match=f"could not download {url} .*give its path") as caught:
        load_backbone_weights(
            image, image, "imagenet", published=Published("VGG16", url), form="keras"
        )
    assert "\n" not in str(caught.value)
