"""The learned metrics: what is missing or wrong, and LPIPS and FVD: formulas by hand, networks against independent ones on random weights.

No published weights are needed. What needs PyTorch, transformers or onnxruntime is skipped without them.
"""

import json

import numpy as np
import pytest
from learned_weights import CLIP, empty, one_line, random_state

from svdp_jax.config import ConfigError
from svdp_jax.evaluation import frechet
from svdp_jax.evaluation.learned import METRICS, Chunk, fvd, lpips, sync, weights

# ---------------------------------------------------------------------------------------------------------------- what is missing


def test_networks_are_imported_when_a_metric_is_made_and_not_before(python):
    done = python("-c", "import sys, svdp_jax.evaluation.learned; print([name for name in ('torch', 'onnxruntime', 'transformers') if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", METRICS)
def test_files_that_are_missing_are_named_in_one_line_with_where_they_are_published(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda package: package)
    with pytest.raises(ConfigError) as caught:
        METRICS[name](tmp_path)
    message = one_line(caught)
    assert message.startswith(f"{name} needs in {tmp_path}")
    assert METRICS[name].needs and all(need.file in message and need.published in message for need in METRICS[name].needs)


@pytest.mark.parametrize(("name", "package"), [("lpips", "torch"), ("fvd", "torch"), ("csim", "onnxruntime"), ("sync", "torch"), ("gaze", "torch")])
def test_a_package_that_is_missing_is_named_with_what_to_install(name, package, tmp_path, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        METRICS[name](tmp_path)
    assert one_line(caught) == f"{name} needs {package}: pip install -e '.[metrics]'"


def test_files_that_are_others_are_refused_in_one_line(torch, tmp_path):
    path = tmp_path / "syncnet_v2.model"
    path.write_text("<html>404</html>")
    with pytest.raises(ConfigError, match="damaged") as caught:
        sync.Sync(tmp_path)
    one_line(caught)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="holds a list") as caught:
        sync.Sync(tmp_path)
    expected = {"a.weight": (2, 3), "a.bias": (2,)}
    whole = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "a.num_batches_tracked": torch.tensor(7), "head.bias": torch.zeros(5)}
    assert list(weights.checked(whole, expected, path, unused=("head.",))) == ["a.weight", "a.bias"]
    for change, problem in (
        ({"a.bias": torch.zeros(3)}, r"a\.bias is of shape \[3\], should be of shape \[2\]"),
        ({"b.bias": torch.zeros(3)}, r"b\.bias is of shape \[3\], should be absent"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            weights.checked(whole | change, expected, path, unused=("head.",))
        one_line(caught)
    with pytest.raises(ConfigError, match=r"a\.bias is absent, should be of shape \[2\]; 1 of 2"):
        weights.checked({"a.weight": torch.zeros(2, 3)}, expected, path)


# ---------------------------------------------------------------------------------------------------------------- LPIPS

ALEXNET = {"0": (64, 3, 11, 11), "3": (192, 64, 5, 5), "6": (384, 192, 3, 3), "8": (256, 384, 3, 3), "10": (256, 256, 3, 3)}
CLASSIFIER = {"1": (4096, 9216), "4": (4096, 4096), "6": (1000, 4096)}


@pytest.fixture
def lpips_folder(torch, tmp_path):
    """Random weights in the layout of the published files, the heads not negative."""
    shapes = {f"features.{layer}.{part}": shape if part == "weight" else shape[:1] for layer, shape in ALEXNET.items() for part in ("weight", "bias")}
    unused = {f"classifier.{layer}.{part}": shape if part == "weight" else shape[:1] for layer, shape in CLASSIFIER.items() for part in ("weight", "bias")}
    torch.save(random_state(torch, shapes) | empty(torch, unused), tmp_path / "alexnet-owt-7be5be79.pth")
    heads = {f"lin{layer}.model.1.weight": torch.rand(1, shape[0], 1, 1) for layer, shape in enumerate(ALEXNET.values())}
    torch.save(heads, tmp_path / "lpips_alex.pth")
    return tmp_path


def naive_lpips(state, heads, one, other):
    """By the paper's formula, in NumPy: convolutions as correlations, one channel at a time."""

    def pool(x):
        return np.array([[x[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, x.shape[2] - 2, 2)] for i in range(0, x.shape[1] - 2, 2)]).transpose(2, 0, 1)

    def features(frame):
        x = ((frame / 127.5 - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])).transpose(2, 0, 1)
        for layer, stride, padding in ("0", 4, 2), ("3", 1, 2), ("6", 1, 1), ("8", 1, 1), ("10", 1, 1):
            weight, bias = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
            padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
            x = np.maximum(np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None], 0)
            yield x / np.sqrt(np.square(x).sum(0))
            x = pool(x) if layer in ("0", "3") else x

    pairs = zip(features(one), features(other), heads, strict=True)
    return sum((np.square(a - b) * head.reshape(-1, 1, 1)).sum(0).mean() for a, b, head in pairs)


def test_lpips_is_the_papers_formula_and_none_between_equal_frames(torch, lpips_folder, rng):
    metric = lpips.Lpips(lpips_folder)
    one, other = rng.integers(0, 256, (2, 3, 63, 90, 3), dtype=np.uint8)
    metric.begin(CLIP)
    metric.add(Chunk(one[:2], other[:2]))
    metric.add(Chunk(one[2:], other[2:]))
    figures, counts = metric.finish()
    state, heads = (torch.load(lpips_folder / need.file, weights_only=True) for need in metric.needs)
    state = {name: value.double().numpy() for name, value in state.items() if name.startswith("features")}
    expected = [naive_lpips(state, [head.double().numpy() for head in heads.values()], *pair) for pair in zip(one, other, strict=True)]
    assert min(expected) > 0.5 and counts == {"frames": 3}
    assert figures == {"lpips": pytest.approx(np.mean(expected), rel=1e-4)}
    metric.begin(CLIP)
    metric.add(Chunk(one, one))
    assert metric.finish().figures == {"lpips": 0}
    with pytest.raises(ValueError, match="one size"):
        metric.add(Chunk(one, other[:, :-1]))
    metric.begin(CLIP)
    assert metric.finish() == ({}, {"frames": 0}) and metric.overall() == ({}, {})


# ---------------------------------------------------------------------------------------------------------------- FVD

SMALL = fvd.Sizes(width=48, depth=2, heads=4, hidden=80, patch=32)


def authors_layout(sizes):
    """Name -> shape in the authors' file."""
    shapes = {"patch_embed.proj.weight": (sizes.width, 3, 2, sizes.patch, sizes.patch), "patch_embed.proj.bias": (sizes.width,)}
    for layer in range(sizes.depth):
        vectors = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias"]
        shapes |= {f"blocks.{layer}.{name}": (sizes.width,) for name in vectors} | {f"blocks.{layer}.mlp.fc1.bias": (sizes.hidden,)}
        shapes |= {f"blocks.{layer}.attn.qkv.weight": (3 * sizes.width, sizes.width), f"blocks.{layer}.attn.proj.weight": (sizes.width, sizes.width)}
        shapes |= {f"blocks.{layer}.mlp.fc1.weight": (sizes.hidden, sizes.width), f"blocks.{layer}.mlp.fc2.weight": (sizes.width, sizes.hidden)}
    return shapes | {"fc_norm.weight": (sizes.width,), "fc_norm.bias": (sizes.width,), "head.weight": (174, sizes.width), "head.bias": (174,)}


@pytest.fixture
def vit(torch, tmp_path, monkeypatch):
    """A small network in the layout of the authors' file."""
    monkeypatch.setattr(fvd, "VIT_G", SMALL)
    torch.save({"module": random_state(torch, authors_layout(SMALL))}, tmp_path / "vit_g_hybrid_pt_1200e_ssv2_ft.pth")
    return tmp_path


def test_the_authors_file_has_a_billion_parameters_in_this_layout(torch, tmp_path):
    assert sum(np.prod(shape) for shape in authors_layout(fvd.VIT_G).values()) == pytest.approx(1.01e9, rel=0.01)
    torch.save({"module": empty(torch, authors_layout(fvd.VIT_G))}, tmp_path / "vit_g_hybrid_pt_1200e_ssv2_ft.pth")
    assert "ViT-g" in fvd.Fvd(tmp_path).protocol


def test_features_are_those_of_transformers_by_either_name_of_the_biases(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    config = transformers.VideoMAEConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, patch_size=32, num_labels=174)
    model = transformers.VideoMAEForVideoClassification(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    folder = tmp_path / "videomae-base-finetuned-ssv2"
    config.save_pretrained(folder)
    mean, deviation = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": deviation}))
    windows = torch.rand(1, 16, 3, 224, 224)
    normalised = (windows - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    expected = model.fc_norm(model.videomae(normalised).last_hidden_state.mean(1))
    state = dict(model.state_dict())
    old = {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value for name, value in state.items()}
    assert old.keys() != state.keys()
    save_file(state, folder / "model.safetensors")
    torch.save(old, folder / "pytorch_model.bin")
    for _ in range(2):
        metric = fvd.Fvd(tmp_path)
        found = fvd.features(metric.state, windows, metric.sizes, *metric.normalisation)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        (folder / "model.safetensors").unlink(missing_ok=True)  # then the other is read
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="holds no weights") as caught:
        fvd.Fvd(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="no folder of a VideoMAE") as caught:
        fvd.Fvd(tmp_path)
    one_line(caught)


def test_hugging_faces_layout_is_that_of_vit_b(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        state = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(num_labels=174)).state_dict()
    sizes = fvd.Sizes(width=768, depth=12, heads=12, hidden=3072, patch=16)
    assert weights.checked(fvd.renamed(state), fvd.layout(sizes), tmp_path, unused=("head.",)).keys() == fvd.layout(sizes).keys()


def test_every_window_of_all_videos_counts_however_frames_arrive(vit, rng):
    videos = rng.integers(0, 256, (2, 2, 40, 8, 8, 3), dtype=np.uint8)  # generated and reference; two clips
    for stride, windows, part in (16, 2, 7), (16, 2, 40), (12, 3, 5), (20, 2, 1):
        metric = fvd.Fvd(vit, stride=stride)
        for generated, reference in videos.swapaxes(0, 1):
            metric.begin(CLIP)
            for start in range(0, 40, part):
                metric.add(Chunk(generated[start : start + part], reference[start : start + part]))
            assert metric.finish() == ({}, {"frames": 40, "windows": windows, "without_a_window": 0})
        torch = pytest.importorskip("torch")
        parts = [[video[start : start + 16] for video in who for start in range(0, 40 - 15, stride)] for who in videos]
        features = [
            np.concatenate([fvd.features(metric.state, fvd.prepared(window)[None], SMALL, [0.0] * 3, [1.0] * 3) for window in windows_of])
            for windows_of in parts
        ]
        expected = frechet.distance(*features)
        assert expected > 0 and torch.is_tensor(metric.state["fc_norm.bias"])
        assert metric.overall() == ({"fvd": pytest.approx(expected, rel=1e-3)}, {"windows": 2 * windows, "feature_size": 48})
    assert "every 20 frames" in metric.protocol


def test_a_clip_that_is_not_finished_does_not_count(vit):
    metric = fvd.Fvd(vit)
    metric.begin(CLIP)
    metric.add(Chunk(*np.zeros((2, 40, 8, 8, 3), np.uint8)))  # and then its video ends before the reference
    metric.begin(CLIP)
    assert metric.finish().counts == {"frames": 0, "windows": 0, "without_a_window": 1} and metric.overall().counts["windows"] == 0


def test_one_window_gives_no_distance(vit):
    metric = fvd.Fvd(vit)
    metric.begin(CLIP)
    metric.add(Chunk(*np.zeros((2, 31, 8, 8, 3), np.uint8)))
    assert metric.finish().counts["windows"] == 1 and metric.overall().figures == {}


def test_the_middle_square_is_seen(torch):
    frames = np.zeros((1, 40, 100, 3), np.uint8)
    frames[:, :, 30:70] = (255, 51, 0)
    seen = fvd.prepared(frames)
    assert seen.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(seen.amin((0, 2, 3)), [1, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(seen.amax((0, 2, 3)), [1, 0.2, 0], atol=1e-6)
