"""Configs: impossible values name their field, JSON gives back what went in, and no field is there for nothing."""

import dataclasses
import json
import pathlib
import re

import pytest

from svdp_jax import config as c

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTIONS = (c.ModelConfig, c.AutoencoderConfig, c.DataConfig, c.TrainConfig, c.SampleConfig, c.MeshConfig)


@pytest.mark.parametrize(
    "section, values, field",
    [
        *((c.ModelConfig, {name: 0}, f"model.{name}") for name in ("width", "depth", "heads", "mlp_ratio", "patch", "latent_channels")),
        *((c.ModelConfig, {name: 0}, f"model.{name}") for name in ("text_tokens", "text_width", "pooled_width", "table_size")),
        *((c.ModelConfig, {name: 0}, f"model.{name}") for name in ("frame_frequencies", "position_step")),
        *((c.ModelConfig, {name: "other"}, f"model.{name}") for name in ("temporal", "dropped", "prediction", "dtype")),
        (c.ModelConfig, {"heads": 7}, "model.heads"),
        (c.ModelConfig, {"width": 6, "heads": 2}, "model.width"),
        (c.ModelConfig, {"dual_blocks": -1}, "model.dual_blocks"),
        (c.ModelConfig, {"dual_blocks": 24}, "model.dual_blocks"),
        *((c.AutoencoderConfig, {name: 0}, f"autoencoder.{name}") for name in ("latent_channels", "blocks", "groups", "patch", "scale")),
        (c.AutoencoderConfig, {"kind": "other"}, "autoencoder.kind"),
        (c.AutoencoderConfig, {"channels": (100,)}, "autoencoder.channels"),
        *((c.DataConfig, {name: 0}, f"data.{name}") for name in ("size", "frames", "fps", "face_scale")),
        (c.DataConfig, {"history": -1}, "data.history"),
        (c.DataConfig, {"region_margin": -0.1}, "data.region_margin"),
        (c.DataConfig, {"workers": -1}, "data.workers"),
        (c.DataConfig, {"frames": 4, "history": 4}, "data.history"),
        (c.LevelConfig, {"nothing": -0.1, "source": 0.3}, "levels"),
        (c.LevelConfig, {"driving": 0.9}, "levels"),
        *((c.TrainConfig, {name: 0}, f"train.{name}") for name in ("batch", "steps", "learning_rate", "learning_rate_new", "clip")),
        *((c.TrainConfig, {name: 0}, f"train.{name}") for name in ("time_shift", "log_every", "sample_every", "checkpoint_every", "keep")),
        (c.TrainConfig, {"remat": "other"}, "train.remat"),
        (c.TrainConfig, {"seed": -1}, "train.seed"),
        (c.TrainConfig, {"seed": 2**32}, "train.seed"),
        (c.TrainConfig, {"ema": 1.0}, "train.ema"),
        (c.TrainConfig, {"decay": 1.5}, "train.decay"),
        (c.TrainConfig, {"warmup": -1}, "train.warmup"),
        (c.TrainConfig, {"stage1": c.LevelConfig(driving=0.5, history=0.3)}, "train.stage1.history"),
        *((c.SampleConfig, {name: 0}, f"sample.{name}") for name in ("steps", "shift", "chunk")),
        (c.SampleConfig, {"guidance": (1.0, float("nan"), 1.0)}, "sample.guidance"),
        (c.MeshConfig, {"strategy": "other"}, "mesh.strategy"),
        (c.MeshConfig, {"fsdp": 0}, "mesh"),
        (c.MeshConfig, {"fsdp": -1}, "mesh"),  # data is -1, too
        (c.Config, {"model": c.ModelConfig(latent_channels=4)}, "model.latent_channels"),
        (c.Config, {"data": c.DataConfig(size=100)}, "data.size"),
        (c.Config, {"data": c.DataConfig(size=4096)}, "data.size"),  # three crops of 256 tokens on a table of 384
        (c.Config, {"data": c.DataConfig(frames=5), "mesh": c.MeshConfig(context=2)}, "data.frames"),
    ],
)
def test_an_impossible_value_names_its_field_on_one_line(section, values, field):
    with pytest.raises(c.ConfigError) as caught:
        section(**values)
    assert str(caught.value).startswith(f"{field}=")
    assert "\n" not in str(caught.value)


def test_what_a_size_that_is_too_large_could_be_instead_works():
    with pytest.raises(c.ConfigError, match="at most 2048 pixels"):
        c.Config(data=c.DataConfig(size=2064))
    assert c.Config(data=c.DataConfig(size=2048)).grid == 128


def test_the_second_stage_begins_at_its_step_if_there_is_history():
    train = c.TrainConfig(history_from_step=5)
    assert [c.Config(train=train).has_history(step) for step in (0, 4, 5, 6)] == [False, False, True, True]
    assert not any(c.Config(train=train, data=c.DataConfig(history=0)).has_history(step) for step in (0, 4, 5, 6))
    assert [c.Config(train=train).as_trained(steps).data.history for steps in (1, 5, 6)] == [0, 0, 3], "weights that have seen no history are sampled without"
    assert c.Config(train=train, model=c.ModelConfig(dropped="zero")).as_trained(1).data.history == 3


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_survives_json(path, tmp_path):
    config = c.load_config(path)
    written = tmp_path / "config.json"
    written.write_text(json.dumps(c.to_dict(config)))
    again = c.load_config(written)
    assert again == config
    assert hash(again) == hash(config), "lists must come back as tuples: the config is a static argument"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("missing.py", None, "does not exist"),
        ("broken.json", "{", "is not what a run has written"),
        ("unknown.json", '{"model": {"widht": 3}}', "widht"),
        ("impossible.json", '{"model": {"width": 0}}', "model.width=0"),
        ("notes.txt", "width: 3", "neither a .py nor a .json"),
        ("empty.py", "", "defines no `config`"),
        ("other.py", "config = {}", "defines no `config`"),
    ],
)
def test_a_file_that_is_no_config_is_named(name, text, says, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(c.ConfigError, match=re.escape(says)) as caught:
        c.load_config(path)
    assert "\n" not in str(caught.value)


# Fields that the config itself reads, to answer what others ask: field -> what they ask.
READ_THROUGH = {
    c.TrainConfig: {"history_from_step": "has_history"},
    c.LevelConfig: dict.fromkeys(("nothing", "source", "driving", "history"), "probabilities"),
}


def test_every_field_is_read_somewhere():
    files = [path for path in (ROOT / "svdp_jax").rglob("*.py") if path.name != "config.py"] + [ROOT / "train.py", ROOT / "sample.py"]
    text = "\n".join(path.read_text() for path in files)
    # The axes of the mesh are read by getattr, from a table of names.
    read = lambda name: re.search(rf"\.{name}\b|\"{name}\"", text)
    for section in (*SECTIONS, c.Config):
        asked = [READ_THROUGH.get(section, {}).get(field.name, field.name) for field in dataclasses.fields(section)]
        assert not [name for name in asked if not read(name)], section.__name__
    levels = c.LevelConfig(0.1, 0.2, 0.3, 0.4)
    assert levels.probabilities == (0.1, 0.2, 0.3, 0.4)
