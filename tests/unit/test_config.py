"""Configuration: the guide's defaults, clear errors, and no knob that turns nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import job
from job.config import (
    FREE_ON_RESUME,
    PRESETS_DIR,
    Config,
    config_from_dict,
    config_from_yaml,
    differences,
    load_config,
    parse_assignment,
    preset_names,
    valid_keys,
)
from job.errors import ConfigError


def test_what_is_set_and_does_nothing_is_told() -> None:
    assert load_config("guide").without_effect() == []
    for changes, said in (
        ({"train.iterations": 100}, "self-training never begins"),
        ({"data.cutmix": 0.5, "train.batch_size": 1}, "data.cutmix"),
        ({"data.scale_range": [0.5, 2.0]}, "data.random_scale"),
    ):
        (found,) = load_config("guide", changes).without_effect()
        assert said in found
    only = {"train.iterations": 100, "train.supervised_only": True}
    assert load_config("guide", only).without_effect() == []
    (found,) = load_config(
        "guide", {**only, "loss.threshold_st": 0.4, "train.learning_rate_D": 1e-5}
    ).without_effect()
    assert found.endswith("has no use for loss.threshold_st, train.learning_rate_D")


def test_defaults_are_the_guides():
    config = Config()
    assert config.train.iterations == 50_000
    assert config.train.learning_rate == 2.5e-4
    assert config.train.learning_rate_D == 1.0e-4
    assert config.train.power == 0.9
    assert (config.train.batch_size, config.train.accumulate) == (4, 4)
    assert (config.train.log_every, config.train.eval_every) == (100, 500)
    assert config.loss.lambda_fm == 0.1
    assert config.loss.lambda_st == 1.0
    assert config.loss.threshold_st == 0.2
    assert config.loss.st_start == 1000
    assert (config.checkpoint.every, config.checkpoint.keep_every) == ("auto", 5000)
    assert config.data.val_split == 0.2


def test_the_guide_preset_spells_out_every_default():
    raw = yaml.safe_load((PRESETS_DIR / "guide.yaml").read_text())
    assert {f"{section}.{key}" for section, keys in raw.items() for key in keys} == set(
        valid_keys()
    )
    assert load_config("guide") == Config()


def test_the_papers_presets_have_the_references_effective_numbers():
    voc, context, cityscapes = (
        load_config(f"paper-{name}") for name in ("voc", "context", "cityscapes")
    )
    for config in (voc, context, cityscapes):
        # Three updates of 2.5e-4 an iteration in the backbone, one of 2.5e-3 in the head.
        assert config.train.learning_rate == pytest.approx(3 * 2.5e-4)
        head = config.train.learning_rate * config.train.head_factor
        assert head == pytest.approx(10 * 2.5e-4)
        assert (config.train.batch_size, config.train.accumulate) == (8, 1)
        assert (config.model.aspp_branches, config.model.stride_in) == (2, "1x1")
        assert (config.loss.lambda_fm, config.loss.lambda_st, config.loss.st_start) == (0.1, 1, 1)
        assert config.model.batch_norm == "affine_frozen"
        # It knows no early stopping: the iteration that is evaluated is always come to, and saved.
        stop = config.stop
        assert (stop.patience, stop.degrading, stop.target_miou) == (0, False, None)
        assert 30_000 % config.checkpoint.keep_every == 40_000 % config.checkpoint.keep_every == 0
    assert [config.loss.threshold_st for config in (voc, context, cityscapes)] == [0.6, 0.6, 0.7]
    assert [c.train.iterations for c in (voc, context, cityscapes)] == [40_000, 60_000, 40_000]
    assert [c.train.learning_rate_D for c in (voc, context, cityscapes)] == [1e-4, 1e-4, 1e-5]
    assert (voc.data.random_scale, voc.data.random_mirror) == (False, False)
    assert cityscapes.data.crop_size == (256, 512)


def test_the_modern_preset_is_still_s4gan():
    config = load_config("modern")
    assert config.loss.lambda_fm > 0
    assert config.loss.threshold_st > 0
    assert config.data.strong_augment
    assert min(config.data.cutmix, config.train.ema_decay, config.loss.confidence) > 0
    assert config.loss.gate_warmup > 0


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name):
    assert isinstance(load_config(name), Config)


def test_every_key_is_read_somewhere_in_the_program():
    """A knob nobody reads turns nothing."""
    read = {
        node.attr
        for path in Path(job.__file__).parent.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [key for key in valid_keys() if key.rpartition(".")[2] not in read]
    assert unread == []


def test_free_keys_exist():
    assert set(valid_keys()) >= FREE_ON_RESUME


def test_a_file_is_loaded_over_the_defaults_and_overrides_over_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("train:\n  batch_size: 2\n  seed: 3\ndata:\n")
    config = load_config(str(path), {"train.seed": 9, "data.crop_size": [64, 96]})
    assert (config.train.batch_size, config.train.seed) == (2, 9)
    assert config.data.crop_size == (64, 96)
    assert config.train.accumulate == 4


def test_one_number_is_a_square_crop():
    assert load_config("guide", {"data.crop_size": 65}).data.crop_size == (65, 65)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.lerning_rate": 1},
            "unknown key train.lerning_rate (did you mean train.learning_rate?)",
        ),
        ({"loss.learning_rate": 1}, "(did you mean train.learning_rate?)"),
        ({"trian.seed": 1}, "(did you mean train"),
        ({"train.learning_rate": 0}, "train.learning_rate: input should be greater than 0, got 0"),
        ({"train.learning_rate": "fast"}, "train.learning_rate: input should be a valid number"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate: input should be a finite"),
        ({"train.batch_size": 0}, "train.batch_size: input should be greater than or equal to 1"),
        ({"train.batch_size": 2.5}, "train.batch_size"),
        ({"loss.threshold_st": 1.5}, "loss.threshold_st: input should be less than or equal to 1"),
        ({"data.val_split": 1}, "data.val_split"),
        ({"data.crop_size": 8}, "data.crop_size"),
        ({"data.crop_size": [64]}, "data.crop_size"),
        ({"data.workers": -1}, "data.workers"),
        ({"data.workers": "many"}, "data.workers"),
        ({"model.backbone": "resnet19"}, "model.backbone: input should be tiny, resnet18"),
        ({"model.backbone": "timm:"}, "model.backbone: input should be tiny, resnet18"),
        ({"wandb.mode": "on"}, "wandb.mode"),
        ({"data.scale_range": [2, 1]}, "data.scale_range: the first of the two should not be larg"),
        ({"data.scale_range": [0, 1]}, "data.scale_range"),
        ({"model.aspp_branches": 3}, "model.aspp_branches"),
        (
            {"model.aspp_branches": 2, "model.head": "deeplabv3plus"},
            "model.aspp_branches 2 is for the head deeplabv2",
        ),
        (
            {"model.stride_in": "1x1", "model.backbone": "resnet18"},
            "model.stride_in 1x1: resnet18 has no such blocks",
        ),
        (
            {"model.weights": "none", "model.batch_norm": "frozen"},
            "there is nothing to keep",
        ),
        (
            {"model.head": "deeplabv3plus", "train.batch_size": 1},
            "train.batch_size 1: the head deeplabv3plus needs 2 or more",
        ),
        ({"train.ema_decay": 1}, "train.ema_decay"),
        (
            {"model.mlmt_threshold": 0.2},
            "a mean teacher needs train.ema_decay",
        ),
        ({"loss.confidence": 1}, "loss.confidence"),
    ],
)
def test_wrong_keys_and_values_are_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("guide", overrides)
    assert message in str(caught.value)
    assert caught.value.exit_code == 78


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"train": {"seed": -1, "sed": 1}, "los": {}}, source="x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert all(word in str(caught.value) for word in ("train.seed", "train.sed", "los"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "train: [1, 2", "train: 5"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(path))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean guide") as caught:
        load_config("giude")
    assert "demo" in caught.value.mend


@pytest.mark.parametrize("place", ["/dev/null", "/etc"])
def test_what_is_no_file_is_said_to_be_none(place):
    with pytest.raises(ConfigError, match=f"--config {place}: is no file"):
        load_config(place)


def test_a_binary_file_is_no_configuration(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(path))


def test_assignments_are_read_as_yaml():
    assert parse_assignment("train.iterations=20") == ("train.iterations", 20)
    assert parse_assignment("data.crop_size=[64, 96]") == ("data.crop_size", [64, 96])
    assert parse_assignment("model.weights=a=b.pth") == ("model.weights", "a=b.pth")
    # YAML 1.1 takes 1e-4 for text; the field takes the text for a number.
    key, value = parse_assignment("train.learning_rate=1e-4")
    assert load_config("guide", {key: value}).train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["train.seed", "seed=1", "train.seed=[", "=1"])
def test_what_is_no_assignment(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_assignment(text)


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.seed = 1


def test_differences_name_what_would_train_differently_and_nothing_else():
    now = load_config(
        "guide",
        {"train.seed": 1, "data.workers": 3, "wandb.mode": "offline", "checkpoint.every": 7},
    )
    assert differences(Config(), now) == {"train.seed": (0, 1)}


@given(
    learning_rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63 - 1),
    crop=st.tuples(st.integers(32, 4000), st.integers(32, 4000)),
    weights=st.text(min_size=0, max_size=30),
    tags=st.lists(st.text(max_size=10), max_size=3),
)
def test_yaml_round_trip(learning_rate, seed, crop, weights, tags):
    config = config_from_dict(
        {
            "train": {"learning_rate": learning_rate, "seed": seed},
            "data": {"crop_size": list(crop)},
            "model": {"weights": weights},
            "wandb": {"tags": tags},
        },
        source="test",
    )
    assert config_from_yaml(config.to_yaml(), source="test") == config


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("eval.every", "train.eval_every"),
        ("train.lr", "train.learning_rate"),
        ("keep.every", "checkpoint.keep_every"),  # and not checkpoint.every, which ends alike
        ("optimizer.seed", "train.seed"),
    ],
)
def test_words_of_a_key_are_enough_to_name_it(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {re.escape(right)}"):
        load_config("guide", {wrong: 5})


def test_every_key_of_an_unknown_section_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"eval": {"every": 5, "seed": 1}}, source="x.yaml")
    said = str(caught.value)
    assert "unknown key eval.every (did you mean train.eval_every?)" in said
    assert "unknown key eval.seed (did you mean train.seed?)" in said


def test_a_key_without_its_section_is_found() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment("eval_every=100")
    assert caught.value.mend.startswith("did you mean train.eval_every? for example: ")
    with pytest.raises(ConfigError) as caught:
        parse_assignment("qqqq=1")
    assert caught.value.mend == "for example: --set train.iterations=20000"


@pytest.mark.parametrize("is_file", [False, True], ids=["preset", "file"])
def test_a_list_takes_the_place_of_the_ratio_that_stood_there(
    is_file: bool, tmp_path: Path
) -> None:
    name = "paper-voc"
    assert load_config(name).data.labeled_ratio == 0.125
    if is_file:
        (tmp_path / "my.yaml").write_text(load_config(name).to_yaml())
        name = str(tmp_path / "my.yaml")
    assert load_config(name, {"data.labeled_list": "a.txt"}).data.labeled_ratio == 1.0
    both = {"data.labeled_list": "a.txt", "data.labeled_ratio": 0.5}
    with pytest.raises(ConfigError, match="leave the ratio out"):
        load_config(name, both)
    permuted = {"data.labeled_list": "a.txt", "data.permutation": "p.txt"}
    assert load_config(name, permuted).data.labeled_ratio == 0.125


def test_a_list_and_a_ratio_of_one_file_contradict_each_other(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("data: {labeled_list: a.txt, labeled_ratio: 0.5}")
    with pytest.raises(ConfigError, match="leave the ratio out"):
        load_config(str(path))
    path.write_text("data: {permutation: p.txt, labeled_ratio: 0.5}")
    config = load_config(str(path), {"data.labeled_list": "b.txt"})
    assert config.data.labeled_ratio == 0.5  # of the list, which the permutation counts
