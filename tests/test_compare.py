"""The evaluation of folders: what belongs together, figures by hand, what is said of what does not fit, and the page."""

import argparse
import json
from fractions import Fraction

import av
import cv2
import imageio.v3 as iio
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svdp_jax.config import ConfigError
from svdp_jax.data import synthetic, video
from svdp_jax.data.detectors import write_landmarks
from svdp_jax.evaluation import __main__ as command
from svdp_jax.evaluation import compare, frechet, learned, metrics, page
from svdp_jax.files import MediaError

FPS = Fraction(25)


def write(path, frames, *, fps=FPS):
    video.write_video(path, list(frames), fps=fps, audio_from=None, metadata={})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two true videos of 20 frames with landmarks, and what stands for generated ones: the same with noise, which grows with time in the second."""
    root = tmp_path_factory.mktemp("videos")
    generated, reference = root / "generated", root / "reference"
    generated.mkdir(), reference.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        clip = synthetic.pair("test", number, frames=20, size=64)
        write(reference / f"clip{number}.mp4", clip.target)
        write_landmarks(reference / f"clip{number}.npz", clip.target_landmarks)
        noise = rng.normal(0, 1, clip.target.shape) * (4 + number * np.arange(20)[:, None, None, None])
        write(generated / f"face--clip{number}.mp4", np.clip(clip.target + noise, 0, 255).astype(np.uint8))
    return generated, reference


# ---------------------------------------------------------------------------------------------------------------- formulas


def test_errors_by_hand():
    output, truth = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    output[1] = 51
    np.testing.assert_allclose(metrics.l1(output, truth), [0, 0.2], atol=1e-6)
    assert metrics.temporal_error(output, truth) == pytest.approx(0.2) and metrics.temporal_error(output[:1], truth[:1]) == 0
    assert metrics.temporal_error(output + np.uint8(7), truth) == pytest.approx(0.2), "what does not change is no temporal error"


def test_ssim_is_that_of_scikit_image():
    clip = synthetic.pair("test", 0, frames=3, size=64).target
    rng = np.random.default_rng(0)
    noise = np.clip(clip + rng.normal(0, 20, clip.shape), 0, 255).astype(np.uint8)
    for output in noise, np.roll(clip, 3, axis=2), np.zeros_like(clip), np.full_like(clip, 255):  # at 255, nothing varies but by rounding
        published = [structural_similarity(*frames, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False) for frames in zip(output, clip, strict=True)]
        np.testing.assert_allclose(metrics.ssim(output, clip), published, atol=1e-5)
    np.testing.assert_allclose(metrics.ssim(clip, clip), 1)
    with pytest.raises(ValueError, match="frames are 10x64"):
        metrics.ssim(clip[:, :, :10], clip[:, :, :10])


def test_frechet_distance_of_normal_distributions_is_the_formulas():
    """Means and covariances that samples have exactly: diagonal ones, whose square root is known."""
    rng = np.random.default_rng(0)
    whitened = rng.normal(size=(64, 5))
    whitened -= whitened.mean(0)
    whitened = np.linalg.qr(whitened)[0] * np.sqrt(64)  # mean 0, covariance 1
    one, other = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 2, 1, 4, 9])
    found = frechet.distance(whitened * np.sqrt(one) + 1, whitened * np.sqrt(other) - 1)
    assert found == pytest.approx(5 * 4 + np.square(np.sqrt(one) - np.sqrt(other)).sum(), rel=1e-9)


def test_frechet_distance_where_features_are_more_than_samples():
    rng = np.random.default_rng(1)
    few, others = rng.normal(size=(6, 20)), rng.normal(size=(9, 20)) + 0.5
    covariances = [np.cov(x.T, ddof=0) for x in (few, others)]
    roots = np.sqrt(np.abs(np.linalg.eigvals(covariances[0] @ covariances[1]))).sum()  # of a product whose eigenvalues are real
    expected = np.square(few.mean(0) - others.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * roots
    assert frechet.distance(few, others) == pytest.approx(expected, rel=1e-5)
    assert frechet.distance(few, few) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        frechet.distance(few[:1], others)
    with pytest.raises(ValueError, match="same length"):
        frechet.distance(few, others[:, :3])


# ---------------------------------------------------------------------------------------------------------------- folders


def test_a_video_belongs_to_the_one_of_its_name_or_of_its_drivers(folders, tmp_path):
    pairs = compare.pairs(*folders)
    assert [(pair.name, pair.reference.name, pair.source) for pair in pairs] == [("face--clip0", "clip0.mp4", "face"), ("face--clip1", "clip1.mp4", "face")]
    assert [pair.reference for pair in compare.pairs(folders[1], folders[1])] == [pair.reference for pair in pairs]
    (tmp_path / "other.mp4").write_bytes(pairs[0].reference.read_bytes())
    assert compare.unused(pairs[:1], folders[1]) == [pairs[1].reference] and compare.unused(pairs, folders[1]) == []
    with pytest.raises(ConfigError, match="has nothing for face--clip0.mp4, face--clip1.mp4"):
        compare.pairs(folders[0], tmp_path)


def test_figures_are_those_of_all_frames_however_they_are_divided(folders):
    pair = compare.pairs(*folders)[1]
    found = []
    for size in (6, 20):
        errors = compare.Errors(parts=False)
        for window in compare.windows(pair, size=size):
            errors.add(window)
        found.append(errors.figures())
    output, truth = (np.stack(list(video.read_frames(path))) for path in (pair.generated, pair.reference))
    for figures in found:
        assert figures["l1"] == pytest.approx(np.abs(output.astype(float) - truth).mean() / 255, rel=1e-5)
        assert figures["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(*frames) for frames in zip(truth, output, strict=True)]), rel=1e-5)
        assert figures["temporal"] == pytest.approx(metrics.temporal_error(output, truth), rel=1e-5)
        assert "without_face" not in figures and "l1_eyes" not in figures, "none was looked for"
    windows = found[0]["windows"]["l1"]
    assert len(windows) == 4 and windows == sorted(windows) and windows[-1] > 2 * windows[0], "the noise grows"


def test_errors_of_parts_are_of_the_pixels_in_their_boxes(folders):
    pair = compare.pairs(*folders)[0]
    frames = np.stack(list(video.read_frames(pair.reference)))
    with np.load(pair.reference.with_suffix(".npz")) as stored:
        landmarks = stored["landmarks"]
    changed, mouth = frames.copy(), landmarks[:, 48:68]
    for frame, points in zip(changed, mouth, strict=True):
        x, y = points.mean(0).astype(int)
        frame[y - 1 : y + 2, x - 1 : x + 2] ^= 255
    errors = compare.Errors(parts=True)
    errors.add(compare.Window(changed, frames, [None] * 20, [*landmarks[:19], None]))
    figures = errors.figures()
    assert figures["l1_mouth"] > 0 and figures["l1_eyes"] == figures["l1_rest"] == 0 and figures["psnr_eyes"] == compare.EXACT
    assert figures["without_face"] == 1


def test_videos_that_are_of_other_times_are_one_line(folders, tmp_path):
    frames = list(video.read_frames(folders[1] / "clip0.mp4"))
    write(tmp_path / "short.mp4", frames[:12])
    write(tmp_path / "fast.mp4", frames, fps=Fraction(30))
    pair = lambda name: compare.Pair("x", tmp_path / name, folders[1] / "clip0.mp4")
    with pytest.raises(MediaError, match="short.mp4 ends after 12 frames, .*clip0.mp4 goes on: they are compared frame by frame"):
        list(compare.windows(pair("short.mp4"), size=8))
    with pytest.raises(MediaError, match="fast.mp4 has 30 frames a second, .*clip0.mp4 25"):
        list(compare.windows(pair("fast.mp4"), size=8))


def test_a_reference_of_another_size_is_brought_to_that_of_the_video(folders, tmp_path):
    large = synthetic.pair("test", 0, frames=20, size=128)
    write(tmp_path / "clip0.mp4", large.target)
    (window, *_) = compare.windows(compare.Pair("x", folders[0] / "face--clip0.mp4", tmp_path / "clip0.mp4"), size=20, looks=(None, lambda frame: large.target_landmarks[:1]))
    assert window.reference.shape == window.generated.shape and metrics.psnr(window.generated, window.reference).mean() > 25
    small = synthetic.pair("test", 0, frames=1, size=64).target_landmarks[0]
    np.testing.assert_allclose(window.faces[0], small, atol=0.02)


# ------------------------------------------------------------------------------------------------------------ command, page


def test_the_command_prints_a_table_and_writes_figures_and_a_page(folders, tmp_path, python):
    flags = ["--generated", folders[0], "--reference", folders[1], "--window", 8, "--report", tmp_path / "page.html", "--json", tmp_path / "figures.json"]
    done = python("-m", "svdp_jax.evaluation", *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert "PSNR, mouth, dB" in done.stdout and record["videos"] == 2 and {"l1", "psnr_eyes"} <= set(record["figures"])
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["figures"] == record["figures"] and [len(one["windows"]["l1"]) for one in kept["per_video"]] == [3, 3]
    text = (tmp_path / "page.html").read_text()
    assert text.index("face--clip1") < text.index("face--clip0"), "the worst first"
    assert text.count("<svg") == 2 and "22.97" in text and "the paper, on other data" in text
    first = next(video.read_frames(tmp_path / "page_clips" / "000.mp4"))
    assert first.shape == (page.HEIGHT, 2 * page.HEIGHT, 3)
    page.clips_folder(tmp_path / "page.html")  # of an earlier page, which goes
    (tmp_path / "page_clips" / "mine.mp4").touch()
    with pytest.raises(ConfigError, match="page_clips, which is there and holds other things"):
        page.clips_folder(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--metrics", "fid"], "--metrics fid: there is lpips, fvd, csim, sync, gaze"),
        (["--protocol", "cross"], "--protocol cross has no true frames to compare with"),
        (["--protocol", "cross", "--metrics", "csim"], "give their folder with --sources"),
        (["--window", "0"], "--window 0 must be at least 1"),
        (["--report", "nowhere/page.html"], "there is no directory nowhere"),
        (["--protocol", "cross", "--metrics", "lpips"], "compares with true frames"),
        (["--metrics", "gaze"], "--metrics gaze needs the faces of the generated videos"),
        (["--json", "."], "it is a directory"),
    ],
)
def test_a_mistake_is_one_line(folders, python, flags, said):
    done = python("-m", "svdp_jax.evaluation", "--generated", folders[0], "--reference", folders[1], *flags)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


class Counting:
    """A metric that counts frames, and wants no weights."""

    name, uses, needs, protocol = "counting", ("audio",), (), "Frames are counted."

    def __init__(self, folder):
        self.clips = []

    def begin(self, clip):
        self.clip, self.number = clip, 0

    def add(self, chunk):
        assert chunk.generated.shape == chunk.reference.shape and len(chunk.generated_landmarks) == len(chunk.generated)
        self.number += len(chunk.generated)

    def finish(self):
        self.clips.append(self.number)
        return learned.Outcome({"csim": float(len(self.clips))}, {"frames": self.number, "generated_without_face": 3})

    def overall(self):
        return learned.Outcome({"fvd": float(sum(self.clips))}, {"windows": len(self.clips)})


def test_learned_metrics_see_all_frames_and_what_they_count_is_told(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learned, "METRICS", {"csim": Counting, "fvd": Counting})
    for pair in compare.pairs(*folders):
        (tmp_path / pair.generated.name).write_bytes(pair.generated.read_bytes())
    picture = synthetic.pair("test", 0, frames=1, size=64)
    (tmp_path / "sources").mkdir()
    iio.imwrite(tmp_path / "sources" / "face.png", picture.target[0])
    write_landmarks(tmp_path / "sources" / "face.npz", picture.target_landmarks[:1])
    flags = ["--generated", tmp_path, "--reference", folders[1], "--protocol", "cross", "--sources", tmp_path / "sources", "--metrics", "csim, fvd"]
    monkeypatch.setattr("sys.argv", ["evaluation", *map(str, flags), "--report", str(tmp_path / "page.html")])
    command.main()
    said = capsys.readouterr().out
    record = json.loads(said.splitlines()[-1])
    assert record["figures"] == {"csim": 1.5, "fvd": 40.0} and record["together"]["fvd"]["counts"] == {"windows": 2}
    assert "csim: generated without face" in said and "all together: 2 windows" in said
    text = (tmp_path / "page.html").read_text()
    assert text.index("face--clip0") < text.index("face--clip1") and "the worst first, by csim" in text and "Frames are counted." in text
    shown = next(video.read_frames(tmp_path / "page_clips" / "000.mp4"))
    assert "Portrait, reference and generated" in text and shown.shape == (page.HEIGHT, 3 * page.HEIGHT, 3)
    portrait = cv2.resize(picture.target[0], (page.HEIGHT, page.HEIGHT), interpolation=cv2.INTER_CUBIC)
    assert np.abs(shown[:, : page.HEIGHT].astype(int) - portrait).mean() < 6


def test_a_video_in_which_no_face_was_found_is_the_worst(folders, tmp_path):
    flags = argparse.Namespace(report=tmp_path / "page.html", generated=folders[0], protocol="cross", sources=None, shown=1, window=16)
    rows = [{"name": "face--clip0", "csim": 0.2, "frames": 20, "counts": {}}, {"name": "face--clip1", "frames": 20, "counts": {"csim": {"generated_without_face": 20}}}]
    command.write_page(flags, compare.pairs(*folders), rows, [], {})
    assert "<b>face--clip1</b><br><small>csim: generated without face 20</small>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("channels", "rate"), [(1, 44100), (2, 48000)])
def test_sound_is_heard_at_the_rate_that_is_asked_for(tmp_path, channels, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    with av.open(str(tmp_path / "tone.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono" if channels == 1 else "stereo")
        frame = av.AudioFrame.from_ndarray(np.repeat(tone[None], channels, 0).astype(np.float32), format="fltp", layout=stream.layout.name)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    video.write_video(tmp_path / "video.mp4", [np.zeros((32, 32, 3), np.uint8)] * 25, fps=FPS, audio_from=tmp_path / "tone.mp4", metadata={})
    heard = video.read_audio(tmp_path / "video.mp4", 16000)
    assert abs(len(heard) - 16000) < 2100  # AAC fills up its last frame
    middle = heard[2000:10000]
    assert np.abs(np.fft.rfft(middle)).argmax() * 16000 / 8000 == pytest.approx(440, abs=2)
    assert np.sqrt(np.square(middle).mean()) == pytest.approx(np.sqrt(0.5), rel=0.1), "as loud as it was, to what AAC changes"


@pytest.mark.parametrize("late", [0.0, 0.6, -0.2])
def test_sound_is_heard_from_the_first_frame_on(tmp_path, late):
    """A click 0.5 s into the sound, which begins `late`, and stops for 0.4 s behind it."""
    rate, samples = 16000, np.zeros(1600, np.int16)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=rate, layout="mono")
        picture.width = picture.height = 32
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            frame.pts = number + 10
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        for tenth in (*range(6), *range(10, 12)):
            samples[:] = 20000 if tenth in (5, 10) else 0
            part = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            part.sample_rate, part.time_base, part.pts = rate, Fraction(1, rate), round((0.4 + late + tenth / 10) * rate)
            container.mux(sound.encode(part))
    heard = np.flatnonzero(np.abs(video.read_audio(tmp_path / "a.mkv", rate)) > 0.3)
    first, second = heard[heard < (0.75 + late) * rate], heard[heard > (0.75 + late) * rate]
    for found, begin in ((first, 0.5), (second, 1.0)):
        assert (found.min() / rate, found.max() / rate) == pytest.approx((begin + late, begin + late + 0.1), abs=2e-3)


def test_a_video_without_sound_has_none(folders):
    assert video.read_audio(folders[0] / "face--clip0.mp4", 16000) is None


def test_a_video_that_cannot_be_measured_does_not_stop_the_others(folders, tmp_path, python):
    for pair in compare.pairs(*folders):
        (tmp_path / pair.generated.name).write_bytes(pair.generated.read_bytes())
    write(tmp_path / "face--clip0.mp4", list(video.read_frames(folders[1] / "clip0.mp4"))[:5])
    done = python("-m", "svdp_jax.evaluation", "--generated", tmp_path, "--reference", folders[1], "--report", tmp_path / "page.html")
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 2 and (record["videos"], record["not_measured"]) == (1, 1)
    assert "<tr><td>videos that could not be measured<td>1<td>" in (tmp_path / "page.html").read_text()
    assert "failed: face--clip0: " in done.stderr and "1 of 2 videos could not be measured" in done.stderr.splitlines()[-1]


def test_whatever_goes_wrong_with_a_video_it_does_not_stop_the_others(folders, tmp_path, monkeypatch, capsys):
    measure = command.measure

    def failing(pair, *given):
        if pair.name == "face--clip0":
            raise RuntimeError("out of memory")
        return measure(pair, *given)

    monkeypatch.setattr(command, "measure", failing)
    monkeypatch.setattr("sys.argv", ["evaluation", "--generated", str(folders[0]), "--reference", str(folders[1])])
    with pytest.raises(SystemExit):
        command.main()
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["videos"] == 1 and "failed: face--clip0: RuntimeError: out of memory" in said.err


def test_a_face_that_was_no_face_is_given_up(tmp_path):
    def faces_at(x):
        return lambda _: np.full((1, 68, 2), x, np.float32) + np.random.default_rng(0).uniform(0, 10, (1, 68, 2)).astype(np.float32)

    calls = iter([400] + [50] * 19)
    frames = [np.zeros((32, 32, 3), np.uint8)] * 20
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, frames)
    pair = compare.Pair("a", tmp_path / "a.mp4", tmp_path / "b.mp4")
    (window,) = compare.windows(pair, size=20, looks=(lambda image: faces_at(next(calls))(image), None))
    found = [face is not None for face in window.generated_faces]
    assert found == [True] + [False] * 6 + [True] * 13
