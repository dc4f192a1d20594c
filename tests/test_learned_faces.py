"""CSIM and gaze: formulas by hand, networks against independent ones on random weights, the layout of the published files.

No published weights are needed. What needs PyTorch, transformers or onnxruntime is skipped without them.
"""

import types
from fractions import Fraction

import cv2
import numpy as np
import pytest
from learned_weights import CLIP, batch_norm, landmarks_at, one_line, random_state

from svdp_jax.config import ConfigError
from svdp_jax.data import faces
from svdp_jax.evaluation.learned import Chunk, Clip, boxes, csim, gaze, weights

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
