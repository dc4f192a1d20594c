"""The conversion against diffusers and transformers themselves (extra `parity`), on random weights."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import sd35
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from sd35 import CONFIG

from convert_weights import convert, export, source
from convert_weights.source import ConversionError
from svdp_jax import checkpoint, flow
from svdp_jax.config import ModelConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from convert_weights import reference, text  # noqa: E402


@pytest.fixture(scope="module")
def published(sd35_file, tmp_path_factory) -> pathlib.Path:
    """The single file as a diffusers folder, by diffusers' converters, in shards."""
    directory = tmp_path_factory.mktemp("published") / "folder"
    opened = source.open_source(sd35_file)
    read_transformer, read_autoencoder = reference.states(opened, CONFIG)
    for name, make, read in ("transformer", reference.make_transformer, read_transformer), ("vae", reference.make_autoencoder, read_autoencoder):
        reference.load(make, CONFIG, read(), torch.float32).half().save_pretrained(directory / name, max_shard_size="2MB")
    return directory


@pytest.fixture(scope="module")
def checkpoints(sd35_file, tmp_path_factory) -> dict[str, pathlib.Path]:
    directory = tmp_path_factory.mktemp("converted")
    for dtype in "float32", "bfloat16":
        convert.convert(sd35_file, directory / dtype, dtype=dtype)
    return {path.name: path for path in directory.iterdir()}


def test_the_file_of_reference_values_is_what_diffusers_puts_out(sd35_file):
    kept = dict(np.load(sd35.REFERENCE))
    live = sd35.kept(sd35.reference(sd35_file))
    assert kept.keys() == live.keys()
    for name in kept:
        np.testing.assert_allclose(live[name], kept[name], rtol=0.05 if name == "bfloat16 error" else 0, atol=2e-5, err_msg=name)


def test_diffusers_own_folder_gives_the_same_bits(published, checkpoints, tmp_path):
    assert len(list((published / "transformer").glob("*-of-*.safetensors"))) > 1
    convert.convert(published, tmp_path / "out")
    (one, *ours), (other, *theirs) = (checkpoint.load_stored(path) for path in (checkpoints["float32"], tmp_path / "out"))
    assert one == other
    ours, theirs = (flatten_dict({"params": params, "frozen": frozen._asdict()}) for params, frozen in (ours, theirs))
    assert ours.keys() == theirs.keys() and all(ours[path].tobytes() == theirs[path].tobytes() for path in ours)


def test_diffusers_loads_what_we_export(checkpoints, published, tmp_path):
    export.export(checkpoints["float32"], tmp_path / "exported.safetensors")
    tensors = load_file(tmp_path / "exported.safetensors")
    for prefix, make in ("transformer.", reference.make_transformer), ("vae.", reference.make_autoencoder):
        new = ("transformer.temporal_blocks.", "transformer.frame_embed.")
        state = {name.removeprefix(prefix): torch.from_numpy(tensor) for name, tensor in tensors.items() if name.startswith(prefix) and not name.startswith(new)}
        model = make(CONFIG)
        model.load_state_dict(state, strict=True)
        original = type(model).from_pretrained(published / prefix.removesuffix("."), torch_dtype=torch.float32).state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("steps", [1, 4, 28, 40, 50])
def test_noise_levels_are_those_of_the_scheduler(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(flow.noise_levels(steps, shift=3.0), scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_passes_what_is_right(dtype, checkpoints, sd35_file, python):
    flags = ["--checkpoint", checkpoints[dtype], "--source", sd35_file]
    result = python("-m", "convert_weights.verify", *flags, JAX_PLATFORMS="one that is busy")  # which nothing asks for
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    names = ["position table", "VAE encode", "VAE decode", "patch embedding", "text embedding", "time embedding"]
    names += [f"block {index}, {stream}" for index in range(5) for stream in ("image", "text")][:-1] + ["velocity"]
    assert [line[:28].strip() for line in lines[1:-1]] == names and all(line.endswith("  pass") for line in lines[1:-1])
    assert lines[-1] == f"all {len(names)} stages agree"


def test_verify_finds_what_is_wrong(checkpoints, published, tmp_path, python):
    config, params, frozen = checkpoint.load_stored(checkpoints["float32"])
    kernel = params["plain"]["joint"]["image_out"]["linear"]["kernel"]
    kernel[1] = kernel[1].swapaxes(0, 1).reshape(kernel[1].shape)  # heads and their sizes, the wrong way round
    checkpoint.write_config(tmp_path, config)
    checkpoint.save_tree(tmp_path / checkpoint.WEIGHTS, params)
    checkpoint.save_frozen(tmp_path, frozen._replace(table=frozen.table.swapaxes(0, 1)))
    result = python("-m", "convert_weights.verify", "--checkpoint", tmp_path, "--source", published)
    assert result.returncode == 1
    failed = [line[:28].strip() for line in result.stdout.splitlines() if line.endswith("  FAIL")]
    assert failed[:2] == ["position table", "patch embedding"] and "velocity" in failed and "VAE decode" not in failed
    assert "stages differ: position table, patch embedding" in result.stdout.splitlines()[-1]


def test_verify_refuses_what_was_made_of_something_else(sd35_file, tmp_path, python):
    demo = pathlib.Path(__file__).parents[1] / "svdp_jax" / "assets" / "demo" / "checkpoint"
    result = python("-m", "convert_weights.verify", "--checkpoint", demo, "--source", sd35_file)
    assert result.returncode == 2 and "its autoencoder is linear" in result.stderr and len(result.stderr.splitlines()) == 1
    _, params, _ = checkpoint.load_stored(demo)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=64, heads=1))
    checkpoint.write_config(tmp_path, other)
    checkpoint.save_tree(tmp_path / checkpoint.WEIGHTS, params)
    result = python("-m", "convert_weights.verify", "--checkpoint", tmp_path, "--source", sd35_file)
    assert result.returncode == 2 and "was not made of" in result.stderr and len(result.stderr.splitlines()) == 1


# --------------------------------------------------------------------------------------------------------------- text

MODEL = ModelConfig(text_width=48, pooled_width=24)
WORDS = ["a", "portrait", "of", "person", "face", "video", "smiling", "photo"]
PROMPTS = ["", "a photo of a person", "a portrait video of a smiling face " * 20]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> pathlib.Path:
    """Random text encoders and small tokenizers, laid out as in the published folder."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    vocabulary = {token: number for number, token in enumerate([*(word + "</w>" for word in WORDS), *map(chr, range(97, 123)), *(chr(i) + "</w>" for i in range(97, 123))])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    for suffix, width, act, pad in ("", 8, "quick_gelu", "<|endoftext|>"), ("_2", 16, "gelu", "a"):
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        config = transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act=act,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
        )
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("\u2581" + word, -1.0) for word in WORDS), ("\u2581", -2.0), *((chr(i), -3.0) for i in range(97, 123))]
    transformers.T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_3")
    config = transformers.T5Config(vocab_size=len(pieces), d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return folder


@pytest.fixture(scope="module")
def pipeline(encoders):
    load = lambda cls, name: cls.from_pretrained(encoders / name)
    return diffusers.StableDiffusion3Pipeline(
        transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=load(transformers.CLIPTextModelWithProjection, "text_encoder").eval(),
        tokenizer=load(transformers.CLIPTokenizer, "tokenizer"),
        text_encoder_2=load(transformers.CLIPTextModelWithProjection, "text_encoder_2").eval(),
        tokenizer_2=load(transformers.CLIPTokenizer, "tokenizer_2"),
        text_encoder_3=load(transformers.T5EncoderModel, "text_encoder_3").eval(),
        tokenizer_3=load(transformers.T5TokenizerFast, "tokenizer_3"),
    )


@pytest.mark.parametrize("prompt", PROMPTS, ids=["empty", "short", "cut"])
@pytest.mark.filterwarnings("ignore:the prompt is cut")
def test_the_embedding_is_that_of_encode_prompt(prompt, encoders, pipeline):
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=77
        )
    ours, ours_pooled = text.encode(encoders, prompt, MODEL)
    assert ours.shape == (154, 48) and ours.std() > 0.1 and ours_pooled.std() > 0.1
    np.testing.assert_array_equal(ours, states[0].numpy())
    np.testing.assert_array_equal(ours_pooled, pooled[0].numpy())


def test_prompts_differ_and_a_long_one_is_said_to_be_cut(encoders):
    one, other = (text.encode(encoders, prompt, MODEL)[0] for prompt in PROMPTS[:2])
    assert np.abs(one - other).max() > 0.1
    with pytest.warns(UserWarning, match="the prompt is cut: text_encoder sees its first 77 tokens"):
        text.encode(encoders, PROMPTS[2], MODEL)


@pytest.mark.parametrize("absent", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_zeros_stand_for_an_encoder_that_is_not_there(absent, encoders, tmp_path, capsys):
    for path in encoders.iterdir():
        if path.name not in (absent, absent.replace("text_encoder", "tokenizer")):
            (tmp_path / path.name).symlink_to(path)
    whole, whole_pooled = text.encode(encoders, "a face", MODEL)
    ours, pooled = text.encode(tmp_path, "a face", MODEL)
    place = {"text_encoder": np.s_[:77, :8], "text_encoder_2": np.s_[:77, 8:24], "text_encoder_3": np.s_[77:]}[absent]
    whole[place] = 0
    if absent != "text_encoder_3":
        whole_pooled[place[1]] = 0
    np.testing.assert_array_equal(ours, whole)
    np.testing.assert_array_equal(pooled, whole_pooled)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and f"({absent}/)" in said[0] and said[0].startswith("zeros stand for")


def test_the_embedding_goes_into_the_checkpoint(encoders, sd35_file, tmp_path):
    convert.convert(sd35_file, tmp_path / "out", text_encoders=encoders, prompt="a face")
    _, _, frozen = checkpoint.load_weights(tmp_path / "out")
    expected = text.encode(encoders, "a face", CONFIG.model)
    np.testing.assert_array_equal(frozen.text, expected[0])
    np.testing.assert_array_equal(frozen.pooled, expected[1])


def test_text_encoders_that_do_not_fit_are_named(encoders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "text_encoder").symlink_to(encoders / "text_encoder")
    (tmp_path / "bad" / "text_encoder").mkdir(parents=True)
    (tmp_path / "bad" / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    (tmp_path / "bad" / "tokenizer").symlink_to(encoders / "tokenizer")
    shutil.copytree(encoders / "text_encoder", tmp_path / "cut" / "text_encoder")
    (tmp_path / "cut" / "tokenizer").symlink_to(encoders / "tokenizer")
    os.truncate(tmp_path / "cut" / "text_encoder" / "model.safetensors", 1000)
    for folder, model, words in [
        (tmp_path / "nowhere", MODEL, "is no directory"),
        (tmp_path / "empty", MODEL, "holds none of text_encoder/"),
        (tmp_path / "lone", MODEL, "but no tokenizer/"),
        (tmp_path / "bad", MODEL, "cannot be read"),
        (tmp_path / "cut", MODEL, "cannot be read"),
        (encoders, ModelConfig(text_width=48, pooled_width=32), "text encoders of another model"),
        (encoders, ModelConfig(text_width=64, pooled_width=24), "text_encoder_3 is 48 wide"),
    ]:
        with pytest.raises(ConversionError, match=words) as caught:
            text.encode(folder, "", model)
        assert "\n" not in str(caught.value)
