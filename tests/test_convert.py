"""Conversion: coverage both ways, types, layouts, the way back, and what happens on bad input."""

import errno
import functools
import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd35
from conftest import ROOT
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from sd35 import CONFIG

from convert_weights import __main__ as command
from convert_weights import convert, export, rules, source, verify
from convert_weights.source import ConversionError
from svdp_jax import checkpoint, cli, train_state
from svdp_jax.config import Config
from svdp_jax.files import MediaError

DEMO = ROOT / "svdp_jax" / "assets" / "demo" / "checkpoint"


def read_all(directory: pathlib.Path):
    config, params, frozen = checkpoint.load_stored(directory)
    return config, flatten_dict({"params": params, "frozen": frozen._asdict()})


def assert_equal_to_the_bit(one: pathlib.Path, other: pathlib.Path):
    (config_one, one), (config_other, other) = read_all(one), read_all(other)
    assert config_one == config_other and one.keys() == other.keys()
    assert [path for path in one if one[path].dtype != other[path].dtype or one[path].tobytes() != other[path].tobytes()] == []


@pytest.fixture(scope="module")
def checkpoints(sd35_file, sd35_folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The single file converted in both types, and the folder."""
    made = tmp_path_factory.mktemp("checkpoints")
    convert.convert(sd35_file, made / "float32")
    convert.convert(sd35_file, made / "bfloat16", dtype="bfloat16")
    convert.convert(sd35_folder, made / "folder")
    return {path.name: path for path in made.iterdir()}


def test_both_layouts_give_the_same_bits(checkpoints):
    assert_equal_to_the_bit(checkpoints["float32"], checkpoints["folder"])


def test_a_checkpoint_is_the_sources_values_and_fresh_new_parts(checkpoints, sd35_file):
    config, arrays = read_all(checkpoints["float32"])
    assert config == CONFIG
    tensors = load_file(sd35_file)
    np.testing.assert_array_equal(arrays["params", "final", "kernel"], tensors["model.diffusion_model.final_layer.linear.weight"].T.astype(np.float32))
    np.testing.assert_array_equal(arrays["frozen", "autoencoder", "decoder", "conv_out", "bias"], tensors["first_stage_model.decoder.conv_out.bias"])
    fresh = flatten_dict({"params": jax.jit(functools.partial(train_state.init_params, CONFIG))(jax.random.key(0))})
    new = {path: leaf for path, leaf in fresh.items() if "temporal" in path or "frame_encoding" in path}
    assert len(new) == 3 * 8 + 4
    for path, leaf in new.items():
        np.testing.assert_array_equal(arrays[path], leaf.unbox())
    other = convert.new_parameters(CONFIG, 1, "float32")
    kernel = ("params", "frame_encoding", "out", "kernel")
    assert other.keys() == new.keys() and not np.array_equal(other[kernel], arrays[kernel])
    assert not arrays["frozen", "text"].any() and not arrays["frozen", "pooled"].any()


def test_bfloat16_is_of_the_network_alone(checkpoints):
    _, arrays = read_all(checkpoints["bfloat16"])
    assert {(path[0], leaf.dtype.name) for path, leaf in arrays.items()} == {("params", "bfloat16"), ("frozen", "float32")}
    _, exact = read_all(checkpoints["float32"])
    path = "params", "dual", "joint", "image_qkv", "linear", "kernel"
    np.testing.assert_array_equal(arrays[path], exact[path].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_export_convert_is_exact(dtype, checkpoints, tmp_path):
    export.export(checkpoints[dtype], tmp_path / "exported.safetensors")
    convert.convert(tmp_path / "exported.safetensors", tmp_path / "again")
    assert_equal_to_the_bit(checkpoints[dtype], tmp_path / "again")
    names = load_file(tmp_path / "exported.safetensors").keys()
    assert {"transformer.transformer_blocks.4.norm1_context.linear.weight", "vae.decoder.up_blocks.3.resnets.2.conv2.bias"} <= names
    assert {"transformer.temporal_blocks.4.attn.to_q.weight", "transformer.frame_embed.linear_2.bias", "prompt.text"} <= names


def test_any_checkpoint_goes_out_and_in(tmp_path):
    export.export(DEMO, tmp_path / "demo.safetensors")
    convert.convert(tmp_path / "demo.safetensors", tmp_path / "again")
    assert_equal_to_the_bit(DEMO, tmp_path / "again")


def test_the_ways_out_and_in_ask_for_no_accelerator(python, tmp_path):
    for arguments in (
        ["convert_weights.export", "--checkpoint", DEMO, "--output", tmp_path / "demo.safetensors"],
        ["convert_weights", "--input", tmp_path / "demo.safetensors", "--output", tmp_path / "again"],
    ):
        done = python("-m", *arguments, JAX_PLATFORMS="one that is busy")
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"a second attention, {checkpoint.stored_dtype(DEMO / checkpoint.WEIGHTS)}\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_published_type_is_read(dtype, checkpoints, tmp_path):
    sd35.write_source(tmp_path / "source.safetensors", dtype)
    convert.convert(tmp_path / "source.safetensors", tmp_path / "converted", dtype="bfloat16")
    if dtype == "float32":  # the same numbers as in float16: rounded once, from the same value
        assert_equal_to_the_bit(checkpoints["bfloat16"], tmp_path / "converted")
    else:
        _, arrays = read_all(tmp_path / "converted")
        kernel = load_file(tmp_path / "source.safetensors")["model.diffusion_model.final_layer.linear.weight"].T
        assert arrays["params", "final", "kernel"].tobytes() == np.ascontiguousarray(kernel).tobytes()


def test_shards_and_settings_of_a_folder(sd35_folder, checkpoints, tmp_path):
    sharded = shutil.copytree(sd35_folder, tmp_path / "sharded")
    file = sharded / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file.with_name(shard))
        index |= dict.fromkeys(part, shard)
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (sharded / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 1.25, "shift_factor": 0.5, "norm_num_groups": 16}))
    convert.convert(sharded, tmp_path / "converted")
    config, arrays = read_all(tmp_path / "converted")
    assert (config.autoencoder.scale, config.autoencoder.shift, config.autoencoder.groups) == (1.25, 0.5, 16)
    assert arrays.keys() == read_all(checkpoints["folder"])[1].keys()

    file.with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match="lacks diffusion_pytorch_model-00002-of-00002.safetensors"):
        convert.convert(sharded, tmp_path / "other")
    assert not (tmp_path / "other").exists()


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
OTHER_SHARDS = ["model.fp16-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    ("whole", "indices", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], {"model.safetensors.index.json": SHARDS}, ["model.safetensors"]),
        (["model.fp16.safetensors"], {"model.safetensors.index.json": SHARDS, "model.safetensors.index.fp16.json": OTHER_SHARDS}, SHARDS),
        (["model.fp16.safetensors"], {}, ["model.fp16.safetensors"]),
        ([], {"model.safetensors.index.fp16.json": OTHER_SHARDS}, OTHER_SHARDS),
    ],
)
def test_of_several_variants_the_one_without_a_suffix_is_read(tmp_path, whole, indices, chosen):
    for name in [*whole, *SHARDS, *OTHER_SHARDS]:
        (tmp_path / name).touch()
    for name, shards in indices.items():
        (tmp_path / name).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    assert [file.name for file in source._weight_files(tmp_path)] == chosen


def test_all_problems_come_at_once_and_nothing_is_left(sd35_file, tmp_path):
    tensors = load_file(sd35_file)
    prefix = "model.diffusion_model."
    tensors.pop(prefix + "joint_blocks.3.x_block.mlp.fc1.bias")
    tensors[prefix + "joint_blocks.9x.bias"] = np.zeros(3, np.float16)
    tensors[prefix + "final_layer.linear.weight"] = np.zeros((3, 5), np.float16)
    tensors[prefix + "final_layer.linear.bias"] = tensors[prefix + "final_layer.linear.bias"].astype(np.int8)
    tensors["text_encoders.clip_l.logit_scale"] = np.zeros((), np.float16)  # on the list of what may be there
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert.convert(tmp_path / "broken.safetensors", tmp_path / "out")
    assert caught.value.problems == [
        "missing model.diffusion_model.joint_blocks.3.x_block.mlp.fc1.bias [512]",
        "no place for model.diffusion_model.joint_blocks.9x.bias [3]",
        "model.diffusion_model.final_layer.linear.bias is I8, must be one of F32, F16, BF16 (quantised weights do not convert)",
        "model.diffusion_model.final_layer.linear.weight is [3, 5], must be [64, 128]",
    ]
    assert "4 problems: missing" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_the_full_size_is_the_published_one():
    expected = rules.expected(Config(), "original")
    sizes = {prefix: [np.prod(shape) for name, (shape, _) in expected.items() if name.startswith(prefix)] for prefix in rules.PREFIXES["original"]}
    assert {prefix: (len(values), sum(values)) for prefix, values in sizes.items()} == {
        "model.diffusion_model.": (665, 2_243_171_520 + 226_492_416),
        "first_stage_model.": (244, 83_819_683),
    }
    theirs = [name for name, (_, new) in rules.expected(Config(), "diffusers").items() if not new]
    assert len([name for name in theirs if name.startswith("transformer.")]) == 909 and len(theirs) == 909 + 244


# --------------------------------------------------------------------------------------------------------- bad input


def header_only(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> pathlib.Path:
    """A safetensors file of these shapes whose numbers take no room on the disk."""
    export.write_safetensors(path, {name: (np.dtype(np.float16), shape) for name, shape in shapes.items()}, [], metadata={})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + sum(2 * int(np.prod(shape)) for shape in shapes.values()))
    return path


def sd3_like(path: pathlib.Path, *, depth: int, table: int, normed: bool) -> pathlib.Path:
    """A header like that of Stable Diffusion 3 Medium, or with normed queries like 3.5 Large's."""
    width, prefix = 64 * depth, "model.diffusion_model."
    shapes = {prefix + "x_embedder.proj.weight": (width, 16, 2, 2), prefix + "pos_embed": (1, table**2, width)}
    for block in range(depth):
        shapes[f"{prefix}joint_blocks.{block}.x_block.attn.qkv.weight"] = (3 * width, width)
        if normed:
            shapes[f"{prefix}joint_blocks.{block}.x_block.attn.ln_q.weight"] = (64,)
    return header_only(path, shapes)


def bad_inputs(tmp_path: pathlib.Path, sd35_file: pathlib.Path):
    """(what is wrong, the input, words of the message)"""
    write = lambda name, data: (tmp_path / name).write_bytes(data) and tmp_path / name
    yield "absent", tmp_path / "nowhere.safetensors", "does not exist"
    yield "short", write("short.safetensors", sd35_file.read_bytes()[:-1000]), "was cut short"
    yield "text", write("text.safetensors", b"<html>not found</html>" * 9), "no safetensors file"
    yield "empty", write("empty.safetensors", b"\0" * 8), "no safetensors file"
    yield "pointer", write("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"
    yield "gguf", write("model.gguf", b"GGUF" + b"\0" * 90), "quantised"
    yield "ckpt", write("model.ckpt", b"PK\x03\x04" + b"\0" * 90), "is a pickle, and opening one runs whatever code it carries"
    yield "renamed", write("renamed.safetensors", b"\x80\x02}q\x00." + b"\0" * 90), "is a pickle"
    yield "sd3", sd3_like(tmp_path / "sd3.safetensors", depth=24, table=192, normed=False), "is Stable Diffusion 3 Medium"
    yield "large", sd3_like(tmp_path / "large.safetensors", depth=38, table=192, normed=True), "is Stable Diffusion 3.5 Large (38 blocks of width 2432"
    yield "flux", header_only(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": (9, 3)}), "FLUX"
    unet = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    yield "unet", header_only(tmp_path / "unet.safetensors", unet), "a U-Net"
    yield "lora", header_only(tmp_path / "lora.safetensors", {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}), "a LoRA"
    yield "vae", header_only(tmp_path / "vae.safetensors", {"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}), "an autoencoder without"
    yield "other", header_only(tmp_path / "other.safetensors", {"lm_head.weight": (8, 3)}), "no model known here (it has lm_head.weight)"
    part = {"transformer_blocks.0.attn.to_q.weight": (8, 8)}
    yield "part of a folder", header_only(tmp_path / "diffusion_pytorch_model.safetensors", part), "is one part of a diffusers folder"
    trunk = {name: value for name, value in load_file(sd35_file).items() if not name.startswith("first_stage_model.")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    yield "no autoencoder", tmp_path / "trunk.safetensors", "no autoencoder"
    (tmp_path / "bare").mkdir()
    yield "no transformer", tmp_path / "bare", "has no transformer/"
    (tmp_path / "bin" / "transformer").mkdir(parents=True)
    (tmp_path / "bin" / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    yield "folder of pickles", tmp_path / "bin", "is a pickle"
    (tmp_path / "void" / "transformer").mkdir(parents=True)
    yield "empty folder", tmp_path / "void", "holds no *.safetensors file"


def test_bad_input_is_one_line(tmp_path, sd35_file):
    out = tmp_path / "out"
    for what, path, words in bad_inputs(tmp_path, sd35_file):
        with pytest.raises(ConversionError) as caught:
            convert.convert(path, out)
        message = str(caught.value)
        assert words in message and "\n" not in message and str(path) in message, f"{what}: {message}"
        assert not out.exists() and not list(tmp_path.glob(".out*")), what


def test_command_lines_exit_2_with_one_line(tmp_path, sd35_file, checkpoints, python):
    existing = tmp_path / "existing"
    existing.mkdir()
    calls = [
        (["convert_weights", "--input", tmp_path / "no.safetensors", "--output", tmp_path / "out"], "does not exist"),
        (["convert_weights", "--input", sd35_file, "--output", existing], "exists already"),
        (["convert_weights", "--input", sd35_file, "--output", tmp_path / "out", "--prompt", "a face"], "needs --text-encoders"),
        (["convert_weights", "--input", sd35_file, "--output", tmp_path / "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert_weights", "--input", sd35_file, "--output", tmp_path / "out", "--seed", -1], "must be 0 to"),
        (["convert_weights.export", "--checkpoint", tmp_path, "--output", tmp_path / "x.safetensors"], "is not a checkpoint"),
        (["convert_weights.export", "--checkpoint", checkpoints["float32"], "--output", sd35_file], "exists already"),
        (["convert_weights.verify", "--checkpoint", tmp_path, "--source", tmp_path / "no.safetensors"], ""),
    ]
    for arguments, words in calls:
        result = python("-m", *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes that orbax leaves behind
def test_a_full_disk_leaves_nothing(tmp_path, sd35_file):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(ConversionError, match="but the disk has 0.01 GB left"):
            convert.convert(sd35_file, small / "out")
        assert list(small.iterdir()) == []
        with pytest.MonkeyPatch.context() as patch:  # as if the disk filled up while we write
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**12))
            with pytest.raises(MediaError, match="out: cannot be written .*No space left") as caught:
                convert.convert(sd35_file, small / "out")
            assert "\n" not in str(caught.value)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def said(main, monkeypatch, capsys, *arguments):
    """The one line that a command says of a mistake, run within this process, where other tests may want an accelerator."""
    monkeypatch.setattr(cli, "on_host", lambda: None)
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (command.main, ["--output", "out", "--input"]),
        (command.main, ["--input", "in", "--output"]),
        (command.main, ["--input", "in", "--output", "out", "--text-encoders"]),
        (export.main, ["--checkpoint", "in", "--output"]),
        (verify.main, ["--checkpoint", "in", "--source"]),
    ],
)
def test_an_address_is_no_local_path(main, flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = said(main, monkeypatch, capsys, *flags, "gs://bucket/x")
    assert f"argument {flags[-1]}: gs://bucket/x is not on this machine" in line and not list(tmp_path.iterdir())


def test_a_checkpoint_to_verify_may_be_at_an_address(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: True)  # PyTorch is not reached
    monkeypatch.setattr(verify, "open_source", lambda path: None)
    assert "s3://bucket/x: a place is a local path or gs://" in said(verify.main, monkeypatch, capsys, "--checkpoint", "s3://bucket/x", "--source", tmp_path)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        ("write_config", MediaError("config.json: cannot be written (Disk quota exceeded)")),
        ("save_frozen", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("save_frozen", ValueError("UNKNOWN: Failed to write: Disk quota exceeded [os_error_code='122']\nSource locations: ...")),  # tensorstore's
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(write, error, sd35_file, monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, write, fail)
    line = said(command.main, monkeypatch, capsys, "--input", sd35_file, "--output", tmp_path / "out")
    assert "cannot be written" in line and "Disk quota exceeded" in line and not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(export, "write_safetensors", fail)
    line = said(export.main, monkeypatch, capsys, "--checkpoint", DEMO, "--output", tmp_path / "out.safetensors")
    assert "out.safetensors: cannot be written" in line and "Input/output error" in line and not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_is_one_line(sd35_file, monkeypatch, capsys, tmp_path):
    assert "File name too long" in said(command.main, monkeypatch, capsys, "--input", sd35_file, "--output", tmp_path / ("x" * 300))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, sd35_file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "new_parameters", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(sd35_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
