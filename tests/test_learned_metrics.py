"""The learned metrics: formulas by hand, networks against independent ones on random weights, the layout of every published file, and mistakes.

No published weights are needed. What needs PyTorch, transformers or onnxruntime is skipped without them.
"""

import json
import types
from fractions import Fraction

import cv2
import numpy as np
import pytest
import scipy.signal

from svdp_jax.config import ConfigError
from svdp_jax.data import detectors, faces
from svdp_jax.evaluation import frechet
from svdp_jax.evaluation.learned import METRICS, Chunk, Clip, boxes, csim, fvd, gaze, lpips, sync, weights

AVERAGE = detectors.average_face()  # 68 landmarks, in sides of a box
CLIP = Clip(Fraction(25))


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def landmarks_at(x, y, side):
    return (AVERAGE * side + [x, y]).astype(np.float32)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_state(torch, shapes):
    """Tensors of these shapes that keep what goes through a network about as large as it was."""
    state = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            state[name] = torch.randn(shape) * (2 / int(np.prod(shape[1:]))) ** 0.5
        else:
            state[name] = torch.rand(shape) + 0.5 if name.endswith(("weight", "var")) else torch.randn(shape) * 0.1
    return state


def batch_norm(name, width):
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def empty(torch, shapes):
    """Zeros of these shapes that take no memory, nor space in a file."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


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
            assert metric.finish() == ({}, {"frames": 40, "windows": windows})
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
    assert metric.finish().counts["windows"] == 0 and metric.overall().counts["windows"] == 0


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


# ---------------------------------------------------------------------------------------------------------------- CSIM


def turned(points, scale, degrees, move):
    angle = np.deg2rad(degrees)
    return scale * points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + move


def test_alignment_takes_five_points_onto_the_template():
    for degrees in (0, 30, -170):
        points = turned(csim.TEMPLATE, 2.5, degrees, (300, -20))
        matrix = csim.similarity(points, csim.TEMPLATE)
        np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], csim.TEMPLATE, atol=1e-9)


def test_alignment_is_the_least_squares_similarity(rng):
    points = rng.uniform(0, 200, (5, 2))
    best = csim.similarity(points, csim.TEMPLATE)
    np.testing.assert_allclose([best[0, 0], best[0, 1]], [best[1, 1], -best[1, 0]])  # no shear, no mirror
    error = lambda matrix: np.square(points @ matrix[:, :2].T + matrix[:, 2] - csim.TEMPLATE).sum()
    for change in np.array([[[1, 0, 0], [0, 1, 0]], [[0, -1, 0], [1, 0, 0]], [[0, 0, 9], [0, 0, 0]], [[0, 0, 0], [0, 0, 9]]]) * 1e-3:
        assert error(best) < min(error(best + change), error(best - change))


@pytest.mark.parametrize("count", [68, 478])
def test_the_five_points_are_eyes_nose_and_corners_of_the_mouth(count):
    landmarks = np.zeros((count, 2), np.float32)
    left, right = (range(42, 48), range(36, 42)) if count == 68 else ([263, 362], [33, 133])
    if count == 68:
        landmarks[left], landmarks[right], landmarks[[30, 48, 54]] = (70, 50), (30, 50), [(50, 70), (35, 90), (65, 90)]
    else:
        layout = faces._LAYOUTS[478]
        landmarks[layout.left_eye], landmarks[layout.right_eye], landmarks[[4, 61, 291]] = (70, 50), (30, 50), [(50, 70), (35, 90), (65, 90)]
    np.testing.assert_array_equal(csim.five_points(landmarks), [(30, 50), (70, 50), (50, 70), (35, 90), (65, 90)])


def test_an_aligned_face_has_its_points_where_the_template_has_them():
    landmarks = turned(landmarks_at(0, 0, 150), 1, 20, (150, 60)).astype(np.float32)
    frame = np.zeros((300, 300, 3), np.uint8)
    for x, y in csim.five_points(landmarks):
        cv2.circle(frame, (round(x), round(y)), 3, (255, 255, 255), -1)
    face = csim.aligned(frame, landmarks)[..., 0].astype(float)
    matrix = csim.similarity(csim.five_points(landmarks), csim.TEMPLATE)
    for x, y in csim.five_points(landmarks) @ matrix[:, :2].T + matrix[:, 2]:
        assert face[round(y), round(x)] > 200
    assert np.abs(csim.five_points(landmarks) @ matrix[:, :2].T + matrix[:, 2] - csim.TEMPLATE).max() < 8  # an average face is nearly the template


def colour_session(batch="N"):
    """In place of ArcFace: the mean of each channel."""
    run = lambda _, inputs: [inputs["data"].mean((2, 3)) if batch == "N" or len(inputs["data"]) == batch else pytest.fail("a larger batch")]
    return types.SimpleNamespace(get_inputs=lambda: [types.SimpleNamespace(name="data", shape=[batch, 3, 112, 112])], run=run)


def plain(*colours, size=200):
    return np.repeat(np.uint8(colours), size * size, axis=0).reshape(-1, size, size, 3)


WHITE, GREY_RED = (255, 255, 255), (255, 127, 127)  # (1, 1, 1) and (1, -.004, -.004) to the network
FACE = landmarks_at(30, 30, 140)  # whose aligned crop is within a frame of 200 pixels
COSINE = (1 - 2 / 255) / np.sqrt(3 * (1 + 2 / 255**2))


@pytest.fixture
def csim_metric(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(csim, "session", lambda path: colour_session())
    (tmp_path / "w600k_r50.onnx").touch()
    return csim.Csim(tmp_path)


def test_csim_compares_with_the_reference_frame_by_frame(csim_metric):
    csim_metric.begin(CLIP)
    csim_metric.add(Chunk(plain(WHITE, GREY_RED), plain(WHITE, WHITE), [FACE, FACE], [FACE, FACE]))
    csim_metric.add(Chunk(plain(GREY_RED, GREY_RED), plain(WHITE, WHITE), [None, FACE], [FACE, None]))
    figures, counts = csim_metric.finish()
    assert figures == {"csim": pytest.approx((1 + COSINE) / 2, abs=1e-5)}
    assert counts == {"frames": 4, "generated_without_face": 1, "reference_without_face": 1}


def test_csim_compares_with_the_source_where_there_is_one(csim_metric):
    source = Clip(Fraction(25), source=plain(GREY_RED)[0], source_landmarks=FACE)
    csim_metric.begin(source)
    csim_metric.add(Chunk(plain(*[WHITE] * 20, GREY_RED), plain(*[WHITE] * 21), [FACE] * 21, [None] * 21))  # more than go through the network at once
    assert csim_metric.finish() == (
        {"csim": pytest.approx((1 + 20 * COSINE) / 21, abs=1e-5)},
        {"frames": 21, "generated_without_face": 0, "source_without_face": 0},
    )
    csim_metric.begin(source._replace(source_landmarks=None))
    csim_metric.add(Chunk(plain(WHITE), plain(WHITE), [FACE], [FACE]))
    assert csim_metric.finish() == ({}, {"frames": 1, "generated_without_face": 0, "source_without_face": 1})


def test_a_network_of_a_fixed_batch_is_given_one_face_at_a_time():
    assert csim.embeddings(colour_session(batch=1), np.full((3, 112, 112, 3), 255, np.uint8)).shape == (3, 3)


def test_the_network_is_read_by_onnxruntime(tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    info = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["data"], ["pooled"]), onnx.helper.make_node("Flatten", ["pooled"], ["embedding"])]
    graph = onnx.helper.make_graph(nodes, "colour", [info("data", ["N", 3, 112, 112])], [info("embedding", ["N", 3])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "w600k_r50.onnx"
    onnx.save(model, path)
    metric = csim.Csim(tmp_path)
    metric.begin(CLIP)
    metric.add(Chunk(plain(GREY_RED), plain(WHITE), [FACE], [FACE]))
    assert metric.finish().figures == {"csim": pytest.approx(COSINE, abs=1e-5)}
    path.write_text("<html>404</html>")
    with pytest.raises(ConfigError, match="damaged") as caught:
        csim.Csim(tmp_path)
    one_line(caught)


# ---------------------------------------------------------------------------------------------------------------- boxes of faces


def test_a_box_reaches_from_chin_to_forehead_by_either_landmarks():
    landmarks = np.float32([[10, 40], [90, 40], [50, 120], [50, 60]] + [[50, 60]] * 64)
    np.testing.assert_allclose(boxes.detector_box(landmarks), [10, 40 - 0.2 * 80, 90, 120])
    np.testing.assert_allclose(boxes.detector_box(np.concatenate([landmarks, np.float32([[50, 20]] * 410)])), [10, 20, 90, 120])


# ---------------------------------------------------------------------------------------------------------------- sync

SYNCNET = {  # the convolutions' numbers and shapes; each is followed by batch normalisation
    "netcnnaud": {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3), 14: (256, 256, 3, 3), 18: (512, 256, 5, 4)},
    "netcnnlip": {
        0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: (256, 256, 1, 3, 3), 11: (256, 256, 1, 3, 3), 14: (256, 256, 1, 3, 3), 18: (512, 256, 1, 6, 6),
    },
}  # fmt: skip


def syncnet_layout():
    shapes = {}
    for part, convolutions in SYNCNET.items():
        for number, shape in convolutions.items():
            shapes |= {f"{part}.{number}.weight": shape, f"{part}.{number}.bias": shape[:1]} | batch_norm(f"{part}.{number + 1}", shape[0])
    for part in ("netfcaud", "netfclip"):
        shapes |= {f"{part}.0.weight": (512, 512), f"{part}.0.bias": (512,), f"{part}.3.weight": (1024, 512), f"{part}.3.bias": (1024,)} | batch_norm(
            f"{part}.1", 512
        )
    return shapes


def test_coefficients_of_silence_and_of_a_click():
    eps = np.log(np.finfo(float).eps)
    silent = sync.mfcc(np.zeros(1600))
    assert silent.shape == (9, 13)  # the last is half full
    np.testing.assert_allclose(silent, [[eps] + [0] * 12] * 9, atol=1e-9)
    click = np.zeros(400)
    click[0] = 1000
    # Emphasised, it is 1000 and -970, whose power at frequency w is 1000^2 (1 + 0.97^2 - 2 * 0.97 cos w) / 512.
    power = 1e6 * (1 + 0.97**2 - 1.94 * np.cos(np.arange(257) * 2 * np.pi / 512)) / 512
    mels = np.arange(28) * 2595 * np.log10(1 + 8000 / 700) / 27
    edges = [int(513 * 700 * (10 ** (mel / 2595) - 1) / 16000) for mel in mels]
    energies = [
        sum(power[i] * ((i - low) / (peak - low) if i < peak else (high - i) / (high - peak)) for i in range(low, high))
        for low, peak, high in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    cosines = lambda k: sum(np.log(energy) * np.cos(np.pi * k * (n + 0.5) / 26) for n, energy in enumerate(energies)) * np.sqrt(2 / 26)
    expected = [np.log(power.sum())] + [cosines(k) * (1 + 11 * np.sin(np.pi * k / 22)) for k in range(1, 13)]
    np.testing.assert_allclose(sync.mfcc(click), [expected], rtol=1e-9, atol=1e-9)


def test_coefficients_are_those_of_python_speech_features():
    signal = np.rint(8000 * scipy.signal.chirp(np.arange(800) / 16000, 200, 0.05, 3000))
    found = sync.mfcc(signal)
    assert found.shape == (4, 13)
    np.testing.assert_allclose(found[[0, 3]], PUBLISHED, atol=1e-4)


# python_speech_features 0.6: mfcc(signal.astype(np.int16), 16000)[[0, 3]]
PUBLISHED = [
    [20.672, 6.5789, -23.2214, -38.8469, -7.806, 5.6024, -11.4709, -21.2531, -5.7425, 4.7345, -1.1552, -6.6024, -0.3046],
    [22.1755, -15.9026, -39.244, 34.9991, 11.7122, -34.0878, 8.6791, 13.7113, -11.1997, -0.4947, -1.4034, -2.6961, 5.273],
]


def test_distances_of_sound_that_comes_three_frames_late():
    """Unit vectors, each orthogonal to all others: distance 0 where they are the same, else sqrt 2, and 1 to the zeros beyond the ends."""
    vectors = np.eye(43)
    lips, sounds = vectors[3:], vectors[:40]  # what sounds at n + 3 is what lips say at n
    found = sync.distances(lips, sounds)
    expected = [((40 - abs(k)) * (0 if k == 3 else np.sqrt(2)) + abs(k)) / 40 for k in range(-15, 16)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_crop_is_around_the_face_and_lower_and_grey_beyond_the_frame(rng):
    frame = rng.integers(0, 256, (300, 320, 3), dtype=np.uint8)
    np.testing.assert_array_equal(sync.crop(frame, np.array([150.0, 140, 50])), cv2.resize(frame[90:230, 80:220], (224, 224)))
    corner = sync.crop(frame, np.array([0.0, 0, 100]))  # from -140 to 140, and from -100 to 180
    np.testing.assert_array_equal(corner[:78], 110)
    np.testing.assert_array_equal(corner[:, :110], 110)
    assert corner[81:, 113:].std() > 30
    assert (sync.crop(frame, np.array([-500.0, 900, 0])).shape) == (224, 224, 3)


@pytest.fixture
def syncnet(torch, tmp_path):
    """A random network in the layout of the published file, which is too old to count batches."""
    torch.save(random_state(torch, syncnet_layout()), tmp_path / "syncnet_v2.model")
    return sync.Sync(tmp_path)


def test_syncnet_is_read_and_one_pass_has_all_windows_in_bgr(torch, syncnet, rng):
    crops = rng.integers(0, 256, (7, 14, 14, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    found = sync.lips(syncnet.network, crops)
    frames = torch.from_numpy(crops[..., [2, 1, 0]].copy()).float().permute(3, 0, 1, 2)
    windows = torch.stack([frames[:, start : start + 5] for start in range(3)])
    expected = syncnet.network["netfclip"](syncnet.network["netcnnlip"](windows).flatten(1))
    assert found.shape == (3, 1024) and np.abs(found[0] - found[1]).max() > 1e-2 * np.abs(found).max()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(found).max())
    cepstrum = rng.normal(0, 10, (40, 13))
    sounds = sync.sounds(syncnet.network, cepstrum, 6)
    steps = torch.from_numpy(cepstrum[20:40].T.astype(np.float32).copy())[None, None]  # of frames 5 to 9
    last = syncnet.network["netfcaud"](syncnet.network["netcnnaud"](steps).flatten(1))
    assert sounds.shape == (6, 1024)
    np.testing.assert_allclose(sounds[5:], last, rtol=1e-3, atol=1e-4 * np.abs(sounds).max())


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Sync without a network: lips are the mean colours of five crops, sounds are zeros; (metric, colour and place of each crop, cepstrum of each clip)."""
    colours, heard = [], []

    def crop(frame, place):
        colours.append((int(frame[0, 0, 0]), *np.round(place, 6).tolist()))
        return np.full((224, 224, 3), frame[0, 0], np.uint8)

    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(weights, "filled", lambda module, path: None)
    monkeypatch.setattr(sync, "network", lambda: None)
    monkeypatch.setattr(sync, "crop", crop)
    monkeypatch.setattr(sync, "lips", lambda network, crops: np.lib.stride_tricks.sliding_window_view(crops[:, 0, 0].astype(float), 5, 0).mean(-1))
    monkeypatch.setattr(sync, "sounds", lambda network, cepstrum, windows: heard.append(cepstrum) or np.zeros((windows, 3)))
    (tmp_path / "syncnet_v2.model").touch()
    return sync.Sync(tmp_path), colours, heard


def measured(metric, clip, count, part, landmarks):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(20, 1).repeat(20, 2).repeat(3, 3)
    metric.begin(clip)
    for start in range(0, count, part):
        these = slice(start, start + part)
        metric.add(Chunk(frames[these], frames[these], landmarks[these], landmarks[these]))
    return metric.finish()


def test_frames_come_at_25_a_second_and_the_track_begins_with_the_first_face(seen, rng):
    metric, colours, heard = seen
    audio = rng.integers(-32768, 32768, 200 * 640).astype(np.float32) / 32768
    box = landmarks_at(0, 0, 10)
    whole = [box] * 100
    outcome = measured(metric, Clip(Fraction(25), audio), 100, 100, whole)
    assert [colour[0] for colour in colours] == list(range(100))
    assert outcome.counts == {"frames": 100, "generated_without_face": 0, "windows": 95}
    means = np.sqrt(3) * (np.arange(95) + 2)  # of five frames each, to zeros: the same at every offset
    assert outcome.figures == {"sync_d": pytest.approx(means.mean()), "sync_c": pytest.approx(0)}
    for part in (1, 7, 33):
        assert measured(metric, Clip(Fraction(25), audio), 100, part, whole) == outcome
    colours.clear()
    assert measured(metric, Clip(Fraction(50), audio), 100, 30, whole).counts["windows"] == 45
    assert [colour[0] for colour in colours] == list(range(0, 100, 2))
    colours.clear()
    measured(metric, Clip(Fraction(25, 2), audio), 20, 30, whole[:20])
    assert [colour[0] for colour in colours] == [n // 2 for n in range(40)]
    colours.clear()
    gaps = [None] * 4 + [box] * 10 + [None] * 6
    outcome = measured(metric, Clip(Fraction(25), audio), 20, 3, gaps)
    assert [colour[0] for colour in colours] == list(range(4, 20))
    assert outcome.counts == {"frames": 20, "generated_without_face": 10, "windows": 11}
    np.testing.assert_array_equal(heard[-1], sync.mfcc(audio[4 * 640 : 20 * 640].astype(np.float64) * 32768))  # the sound of these frames, as 16 bits


def test_a_box_is_the_median_of_thirteen_and_the_last_is_held(seen):
    metric, colours, _ = seen
    faces_of = [landmarks_at(10 * n, 0, 10) for n in range(20)]
    measured(metric, Clip(Fraction(25)), 22, 4, faces_of + [None, None])
    middles = np.array([sync.place(face)[0] for face in faces_of] + [sync.place(faces_of[-1])[0]] * 2)
    padded = np.pad(middles, 6, mode="edge")
    np.testing.assert_allclose([colour[1] for colour in colours], [np.median(padded[n : n + 13]) for n in range(22)], atol=1e-5)
    assert colours[0][1] == pytest.approx(middles[0]) and colours[10][1] == pytest.approx(middles[10])


def test_without_audio_face_or_length_there_is_no_figure(seen):
    metric, _, _ = seen
    box = landmarks_at(0, 0, 10)
    assert measured(metric, CLIP, 10, 5, [box] * 10) == ({}, {"frames": 10, "generated_without_face": 0, "windows": 0, "without_audio": 1})
    audio = np.zeros(10 * 640, np.float32)
    assert measured(metric, Clip(Fraction(25), audio), 10, 5, [None] * 10) == ({}, {"frames": 10, "generated_without_face": 10, "windows": 0})
    assert measured(metric, Clip(Fraction(25), audio[: 5 * 640]), 10, 5, [box] * 10) == ({}, {"frames": 10, "generated_without_face": 0, "windows": 0})
    assert measured(metric, Clip(Fraction(25), audio[: 6 * 640]), 10, 5, [box] * 10).counts["windows"] == 1


# ---------------------------------------------------------------------------------------------------------------- gaze


def l2cs_layout():
    shapes = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    inputs = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes |= {
                f"{name}.conv1.weight": (width, inputs, 1, 1),
                f"{name}.conv2.weight": (width, width, 3, 3),
                f"{name}.conv3.weight": (4 * width, width, 1, 1),
            }
            shapes |= batch_norm(f"{name}.bn1", width) | batch_norm(f"{name}.bn2", width) | batch_norm(f"{name}.bn3", 4 * width)
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * width, inputs, 1, 1)} | batch_norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes | {f"fc_{angle}_gaze.{part}": (90, 2048)[: 2 - (part == "bias")] for angle in ("yaw", "pitch") for part in ("weight", "bias")}


def test_the_expected_angle_of_bins():
    logits = np.full((4, 90), -1e3)
    logits[0, 45] = logits[1, [40, 50]] = logits[3, 0] = 5
    logits[2] = 0
    np.testing.assert_allclose(gaze.expectation(logits), [0, 0, -2, -180], atol=1e-9)  # all alike: 44.5 * 4 - 180
    logits[3, 1] = 5 + np.log(3)  # three times as likely
    assert gaze.expectation(logits)[3] == pytest.approx(-177)


def test_the_angle_between_gazes():
    """Looking up by 60 degrees, a turn by 90 to the side is one of arccos(sin^2 60 + cos^2 60 cos 90)."""
    one = gaze.directions(np.array([[0.0, 0], [0, 0], [10, 20], [0, 60]]))
    other = gaze.directions(np.array([[90.0, 0], [0, 30], [10, 20], [90, 60]]))
    np.testing.assert_allclose(one[0], [0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(gaze.between(one, other), [90, 30, 0, np.rad2deg(np.arccos(0.75))], atol=1e-6)


def test_the_face_is_cut_at_the_frame(rng):
    frame = rng.integers(0, 256, (100, 120, 3), dtype=np.uint8)
    landmarks = np.float32([[20, 30], [70, 30], [45, 90]] + [[45, 60]] * 475)
    expected = cv2.resize(cv2.resize(frame[30:90, 20:70], (224, 224)), (448, 448))
    np.testing.assert_array_equal(gaze.face(frame, landmarks), expected)
    np.testing.assert_array_equal(gaze.face(frame, landmarks - np.float32([50, 40])), cv2.resize(cv2.resize(frame[0:50, 0:20], (224, 224)), (448, 448)))
    assert gaze.face(frame, landmarks + 1000).shape == gaze.face(frame, landmarks - 1000).shape == (448, 448, 3)


def test_gaze_is_of_frames_with_both_faces(monkeypatch, tmp_path):
    """A network that tells yaw from red and pitch from green."""
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(weights, "filled", lambda module, path, unused: None)
    monkeypatch.setattr(gaze, "network", lambda: None)
    monkeypatch.setattr(gaze, "angles", lambda network, crops: crops[:, 0, 0, :2].astype(float))
    (tmp_path / "L2CSNet_gaze360.pkl").touch()
    metric = gaze.Gaze(tmp_path)
    metric.begin(CLIP)
    generated, reference = plain((10, 0, 0), (0, 5, 0), (90, 0, 0), (90, 0, 0), size=20), plain((0, 0, 0), (0, 25, 0), (0, 0, 0), (0, 0, 0), size=20)
    face = landmarks_at(2, 2, 16)
    metric.add(Chunk(generated[:3], reference[:3], [face, face, None], [face, face, face]))
    metric.add(Chunk(generated[3:], reference[3:], [face], [None]))
    figures, counts = metric.finish()
    assert figures == {"gaze_angle": pytest.approx(15), "gaze_mae": pytest.approx(7.5), "gaze_yaw": pytest.approx(5), "gaze_pitch": pytest.approx(10)}
    assert counts == {"frames": 4, "generated_without_face": 1, "reference_without_face": 1}
    metric.begin(CLIP)
    assert metric.finish().figures == {}


def test_l2cs_is_read_and_is_transformers_resnet_50_with_two_heads(torch, tmp_path, rng):
    transformers = pytest.importorskip("transformers")
    state = random_state(torch, l2cs_layout())
    state |= {name: value / 3 for name, value in state.items() if name.endswith("bn3.weight")}  # else 16 residuals add up
    state |= {name: value / 10 for name, value in state.items() if name.startswith("fc_")}  # else one bin has it all
    counters = {f"{name.removesuffix('.running_var')}.num_batches_tracked": torch.tensor(1) for name in state if name.endswith("running_var")}
    torch.save(state | counters | {"fc_finetune.weight": torch.zeros(3, 2051), "fc_finetune.bias": torch.zeros(3)}, tmp_path / "L2CSNet_gaze360.pkl")
    metric = gaze.Gaze(tmp_path)
    crops = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8).repeat(112, 1).repeat(112, 2)
    found = gaze.angles(metric.network, crops)

    model = transformers.ResNetModel(transformers.ResNetConfig()).eval().requires_grad_(False)
    names = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
    for stage, blocks in enumerate([3, 4, 6, 3], start=1):
        for block in range(blocks):
            here, there = f"layer{stage}.{block}", f"encoder.stages.{stage - 1}.layers.{block}"
            names |= {
                f"{there}.layer.{n}.{kind}": f"{here}.{short}{n + 1}" for n in range(3) for kind, short in (("convolution", "conv"), ("normalization", "bn"))
            }
            names |= {f"{there}.shortcut.convolution": f"{here}.downsample.0", f"{there}.shortcut.normalization": f"{here}.downsample.1"}
    everything = state | counters
    model.load_state_dict({name: everything[f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"] for name in model.state_dict()})
    pictures = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    normalised = (pictures - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pooled = model(normalised).pooler_output.flatten(1)
    bins = torch.arange(90.0)
    expected = [((pooled @ state[f"fc_{angle}_gaze.weight"].T + state[f"fc_{angle}_gaze.bias"]).softmax(1) @ bins) * 4 - 180 for angle in ("yaw", "pitch")]
    assert np.abs(found[0] - found[1]).min() > 0.1 and np.abs(found[:, 0] - found[:, 1]).min() > 0.1
    np.testing.assert_allclose(found, np.stack(expected, 1), atol=1e-2)
