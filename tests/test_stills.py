"""Images, still and animated: upright RGB on white, whatever they are stored as."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from small_videos import clip, numbers

from svdp_jax.data import video


def test_a_still_image_is_a_video_of_one_frame(tmp_path, strict):
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.png")
    assert video.probe(tmp_path / "a.png") == video.VideoInfo(96, 64, Fraction(25), 1, False)
    (frame,) = video.read_frames(tmp_path / "a.png")
    np.testing.assert_array_equal(frame, clip(1)[0])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animated_image_is_a_video(tmp_path, strict, name):
    first, *rest = (Image.fromarray(frame) for frame in clip(4))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=40)
    assert video.probe(tmp_path / name) == video.VideoInfo(96, 64, Fraction(25), 4, False)
    assert numbers(video.read_frames(tmp_path / name)) == [0, 1, 2, 3]


def test_a_gif_of_one_frame_is_a_still_image(tmp_path, strict):
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.gif", save_all=True)
    assert video.probe(tmp_path / "a.gif") == video.VideoInfo(96, 64, Fraction(25), 1, False)
    (frame,) = video.read_frames(tmp_path / "a.gif")
    assert np.abs(frame.astype(int) - clip(1)[0]).mean() < 4


def test_a_cut_off_gif_gives_its_frames_and_one_warning(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    first, *rest = (Image.fromarray(frame) for frame in noise)
    first.save(tmp_path / "whole.gif", save_all=True, append_images=rest, duration=40)
    data = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="[23] of [4567] frames can be read") as caught:
        frames = list(video.read_frames(tmp_path / "a.gif"))
    assert len(caught) == 1 and len(frames) == video.probe(tmp_path / "a.gif").frames


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_a_transparent_animation_lies_on_white(tmp_path, strict, name):
    alpha = np.full((3, 64, 96, 1), 255, np.uint8)
    alpha[:, :20] = 0
    first, *rest = (Image.fromarray(frame) for frame in np.concatenate([clip(3), alpha], -1))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=40, lossless=True)
    frames = list(video.read_frames(tmp_path / name))
    assert numbers(frames) == [0, 1, 2] and all((frame[:20] == 255).all() for frame in frames)


def test_images_of_any_kind_become_rgb(tmp_path):
    rgb = clip(1)[0]
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turn clockwise to show
    image.save(tmp_path / "exif.png", exif=exif)
    np.testing.assert_array_equal(video.read_image(tmp_path / "exif.png"), np.rot90(rgb, -1))

    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:20], alpha[20:30] = 0, 51
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "alpha.png")
    got = video.read_image(tmp_path / "alpha.png").astype(int)
    assert (got[:20] == 255).all() and (got[30:] == rgb[30:]).all()
    assert np.abs(got[20:30] - (0.2 * rgb[20:30] + 0.8 * 255)).max() <= 1

    image.convert("L").save(tmp_path / "grey.png")
    assert (video.read_image(tmp_path / "grey.png") == np.asarray(image.convert("L"))[..., None]).all()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "grey16.png")
    assert (video.read_image(tmp_path / "grey16.png") == 40000 // 257).all()
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 64, 96, "rgb48be", Fraction(1, 25)
    (packet,) = encoder.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="rgb48be"))
    (tmp_path / "rgb16.png").write_bytes(bytes(packet))
    assert np.abs(video.read_image(tmp_path / "rgb16.png").astype(int) - rgb).max() <= 1
    palette = image.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert (video.read_image(tmp_path / "palette.png")[0, 0] == 255).all()
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(video.read_image(tmp_path / "cmyk.jpg").astype(int) - rgb).mean() < 6
