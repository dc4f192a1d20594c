"""Sync-C and Sync-D: cepstra and distances by hand, the network on random weights in the published layout, which frames are seen.

No published weights are needed. What needs PyTorch, transformers or onnxruntime is skipped without them.
"""

from fractions import Fraction

import cv2
import numpy as np
import pytest
import scipy.signal
from learned_weights import CLIP, batch_norm, landmarks_at, random_state

from svdp_jax.evaluation.learned import Chunk, Clip, sync, weights

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
    assert measured(metric, Clip(Fraction(25), audio), 21, 3, [*gaps, None]).figures == {}, "of most of it no face is seen"
    colours.clear()
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
