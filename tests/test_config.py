"""Settings: defaults, overrides, errors that name the option and the remedy."""

import pytest

from unet_ray.config import ModelConfig, PredictConfig, TrainConfig, UserError
from unet_ray.settings import load_train_config, recipe_names, recipe_text, setting_names


def test_a_config_written_as_yaml_is_read_back_the_same():
    config = load_train_config(
        settings=[
            ("data.mask_values", "[0, 255]"),
            ("data.image_size", "[32, 48]"),
            ("data.val_groups", "[a, b]"),
            ("data.group_by", "^."),
            ("model.norm", "none"),
            ("train.learning_rate", "3e-4"),
        ]
    )
    assert config.data.size_hw == (32, 48)
    assert config.train.learning_rate == 3e-4
    assert load_train_config(config_file=config.to_yaml()) == config


def test_later_settings_win_over_the_recipe():
    config = load_train_config(recipe="carvana", settings=[("train.epochs", 1)])
    assert (config.train.epochs, config.train.batch_size, config.model.norm) == (1, 32, "none")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_has_a_summary_and_a_source(name):
    text = recipe_text(name)
    assert text.startswith("# ")
    assert "\n# Source: " in text
    assert isinstance(load_train_config(recipe=name), TrainConfig)


def test_the_carvana_recipe_has_the_settings_of_the_guide():
    config = load_train_config(recipe="carvana")
    assert (config.model.base_channels, config.model.depth, config.model.norm) == (64, 4, "none")
    assert (config.data.image_size, config.data.val_fraction, config.data.group_by) == (512, 0.2, None)
    train = config.train
    assert (train.epochs, train.batch_size, train.learning_rate, train.seed) == (6, 32, 3e-4, 42)
    assert (train.optimizer, train.loss, train.schedule) == ("adamw", "bce", "constant")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([("model.base_chanels", "8")], "unknown setting 'model.base_chanels': did you mean 'model.base_channels'?"),
        ([("train.image_size", "8")], "did you mean 'data.image_size'?"),
        ([("train.epochs", "many")], "setting train.epochs is 'many': int is needed"),
        ([("train.epochs", "0")], "train.epochs is 0: must be 1 or more"),
        (
            [("model.name", "unett")],
            "model.name is 'unett': one of unet, attention_unet, unet++, fcn, deeplabv3, smp, otsu",
        ),
        ([("model.norm", "layer")], "model.norm is 'layer': one of none, batch, group, instance"),
        ([("train.loss", "bce+dise")], "'dise' is not a loss: did you mean 'dice'?"),
        ([("train.loss", "ce")], "needs model.num_classes of 2 or more"),
        ([("model.num_classes", "3"), ("train.loss", "bce")], "is for one class: use ce"),
        ([("data.mask_values", "[0, 1, 2]")], "data.mask_values has 3 entries: 2 are needed"),
        ([("data.group_by", "(")], "is not a regular expression"),
        ([("model.padding", "valid"), ("data.image_size", "400")], "use 388 or 404"),
        ([("data", "3")], "unknown setting 'data'"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_remedy(settings, message):
    with pytest.raises(UserError) as error:
        load_train_config(settings=settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'carvanna': did you mean 'carvana'"):
        load_train_config(recipe="carvanna")


def test_the_2015_network_takes_92_pixels_from_each_side():
    assert ModelConfig(padding="valid").margin == 92
    assert ModelConfig(padding="same").margin == 0
    ModelConfig(padding="valid").check_size(388, "--image-size")


def test_channels_double_from_level_to_level_or_grow_in_steps_of_4():
    assert ModelConfig().channels == [64, 128, 256, 512, 1024]
    assert ModelConfig(base_channels=16, growth=1.5, depth=5).channels == [16, 24, 36, 56, 80, 120]


def test_every_setting_has_a_section():
    assert "train.batch_size" in setting_names()
    assert all(name.count(".") == 1 for name in setting_names())


def test_an_unknown_format_is_an_error():
    with pytest.raises(UserError, match="--format 'pgn' is not one: did you mean 'png'"):
        PredictConfig(model="m", inputs=("i",), out="o", formats=("pgn",))
