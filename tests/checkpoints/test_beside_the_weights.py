"""What comes with weights: the tokenizer's files, and how images are prepared."""

import json

import golden_cases
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import ModelError, load_model
from checkpoints.importers.importing import import_model
from checkpoints.preprocessing import prepare_images


@pytest.fixture
def source(tmp_path):
    import shutil

    ignored = shutil.ignore_patterns("io.npz", "case.json")
    shutil.copytree(golden_cases.FOLDER / "gpt2_hub", tmp_path / "source", ignore=ignored)
    return tmp_path / "source"


def imported(source, name="model"):
    import_model(str(source), source.parent / name)
    return load_model(source.parent / name)


def test_a_tokenizer_comes_with_the_weights(source):
    tokenizer = Tokenizer(models.WordLevel({"kin": 0, "dred": 1, "[UNK]": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text("{}")
    model = imported(source)
    assert model.tokenizer().encode("dred kin zoo").ids == [1, 0, 2]
    kept = {p.name: p.read_bytes() for p in (source.parent / "model" / "tokenizer").iterdir()}
    assert kept == {n: (source / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}


@pytest.mark.parametrize(("lower", "ids"), [(True, [3, 4]), (False, [0])])
def test_a_word_piece_vocabulary_will_do(source, lower, ids):
    (source / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nkin\n##dred\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    tokenizer = imported(source).tokenizer()
    assert tokenizer.encode("Kindred", add_special_tokens=False).ids == ids
    assert tokenizer.encode("kindred").ids == [1, 3, 4, 2]


def test_byte_pairs_will_do(source):
    (source / "vocab.json").write_text(json.dumps({"k": 0, "i": 1, "n": 2, "ki": 3, "kin": 4}))
    (source / "merges.txt").write_text("#version: 0.2\nk i\nki n\n")
    assert imported(source).tokenizer().encode("kin").ids == [4]


def test_without_a_tokenizer_the_model_says_so(source):
    with pytest.raises(ModelError, match="holds no tokenizer"):
        imported(source).tokenizer()
    (source / "spiece.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"holds spiece.model; a tokenizer.json"):
        imported(source, "other").tokenizer()
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="unreadable"):
        imported(source, "third").tokenizer()


def test_an_imported_vision_model_prepares_images_as_it_was_trained():
    case = golden_cases.FOLDER / "resnet_timm_d"
    config = json.loads((case / "config.json").read_text())["pretrained_cfg"]
    from checkpoints.importers.recognition import layouts

    facts = layouts()["torchvision-resnet"].preprocessing({"pretrained_cfg": config}, None)
    image = np.random.default_rng(0).integers(0, 256, (301, 400, 3), np.uint8)
    out = prepare_images(image, **facts)
    assert out.shape == (1, 288, 288, 3) and out.dtype == np.float32
    # by hand: the shorter side to floor(288 / 0.95), bicubic, the middle
    side = int(288 / 0.95)
    resized = np.asarray(Image.fromarray(image).resize((int(side * 400 / 301), side), Image.Resampling.BICUBIC))
    top, left = round((resized.shape[0] - 288) / 2), round((resized.shape[1] - 288) / 2)
    middle = resized[top : top + 288, left : left + 288] / 255
    np.testing.assert_allclose(out[0], (middle - config["mean"]) / config["std"], atol=1e-5)


def test_images_of_many_kinds():
    rng = np.random.default_rng(0)
    wide, tall = rng.integers(0, 256, (20, 30, 3), np.uint8), rng.integers(0, 256, (30, 20, 3), np.uint8)
    both = prepare_images([wide, Image.fromarray(tall)], size=8)
    assert both.shape == (2, 8, 8, 3) and 0 <= both.min() < both.max() <= 1
    np.testing.assert_allclose(both[0], prepare_images(wide, size=8)[0])
    squeezed = prepare_images(wide, size=(8, 10), crop=None)
    expected = np.asarray(Image.fromarray(wide).resize((10, 8), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(squeezed[0], expected, atol=1e-6)
    grey = prepare_images(wide[..., :1], size=4, mean=(0.5,), std=(0.5,))
    assert grey.shape == (1, 4, 4, 1) and grey.min() < 0
    np.testing.assert_allclose(prepare_images(wide), wide[None] / 255, atol=1e-6)
    rgba = Image.fromarray(np.dstack([wide, wide[..., :1]]))
    assert prepare_images(rgba, size=4).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (np.zeros((4, 4, 3)), {}, r"uint8 \[H, W, 3\].*float64\[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), {}, "uint8"),
        (np.zeros((4, 4, 3), np.uint8), {"interpolation": "cubic"}, "interpolation must be one of .*'cubic'"),
        (np.zeros((4, 4, 3), np.uint8), {"mean": (0.5,), "std": (0.5,)}, "3 channels, but mean has 1"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], {}, "different sizes"),
        (np.zeros((4, 4, 3), np.uint8), {"size": 8, "crop": 2.0}, "choose crop <= 1"),
    ],
)
def test_wrong_images_and_settings_are_named(images, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(images, **settings)


def test_a_text_model_prepares_no_images(source):
    with pytest.raises(ModelError, match="does not say how its images are prepared"):
        imported(source).preprocess(np.zeros((4, 4, 3), np.uint8))


def test_vit_squeezes_and_clip_crops_as_their_processors_do(tmp_path):
    from checkpoints.importers.recognition import layouts

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), np.uint8)
    vit = layouts()["hub-vit"].preprocessing(None, {"size": {"height": 32, "width": 32}, "resample": 2})
    squeezed = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(prepare_images(image, **vit)[0], (squeezed - 0.5) / 0.5, atol=1e-5)
    said = {
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    }
    clip = layouts()["hub-clip"].preprocessing(None, said)
    resized = np.asarray(Image.fromarray(image).resize((int(36 * 70 / 50), 36), Image.Resampling.BICUBIC)) / 255
    left = round((resized.shape[1] - 32) / 2)
    middle = resized[2:34, left : left + 32]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(prepare_images(image, **clip)[0], (middle - mean) / std, atol=1e-5)
