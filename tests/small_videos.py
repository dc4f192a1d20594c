"""Small videos of all kinds, made with av alone: `clip` is what they show, and `numbers` reads it off their frames."""

import os
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

NTSC = Fraction(30000, 1001)


def clip(count=12, height=64, width=96):
    """Frames that tell their number by their brightness, and which way is up by colours: red top left, blue bottom right."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (40 + 12 * (np.arange(count) % 16))[:, None, None, None]
    frames[:, : height // 4, : width // 4] = [220, 0, 0]
    frames[:, -height // 4 :, -width // 4 :] = [0, 0, 220]
    return frames


def numbers(frames):
    """The numbers that `clip` gave to frames."""
    return [round((float(frame[frame.shape[0] // 2, frame.shape[1] // 2].mean()) - 40) / 12) for frame in frames]


def tone(seconds=1):
    samples = (8000 * np.sin(np.arange(16000 * seconds) * 0.2)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
    return frame


def write(path, *, pts=None, codec="libx264", audio=None, damaged=(), options=None):
    """A file of `clip`, made with av alone. `pts` in ms, or 25 fps; `audio` a codec for one second; `damaged` packets are zeros."""
    pts = [40 * number for number in range(12)] if pts is None else pts
    with av.open(os.path.abspath(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream(audio, rate=16000, layout="mono") if audio else None
        packets = []
        for time, frame in zip(pts, clip(len(pts)), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            packets += stream.encode(picture)
        for number, packet in enumerate(packets + stream.encode()):
            if number in damaged:
                packet.update(bytes(packet.size))
            container.mux(packet)
        if sound:
            container.mux(sound.encode(tone()))
            container.mux(sound.encode())
    return path


def store(path, frames, codec="libx264", pix_fmt="yuv420p", options=None, reformat=None, **context):
    """`frames`, RGB or RGBA, at 25 fps, with whatever av lets one say about a stream (`context`) and about the conversion to YUV (`reformat`)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24" if frame.shape[-1] == 3 else "rgba")
            picture = picture.reformat(format=pix_fmt, **(reformat or {}))
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def copy(sources, path, keep=lambda packet: True, cover=None):
    """The first video streams of `sources` in one file, of their packets those to `keep`, and a picture as its cover."""
    with av.open(str(path), "w") as container:
        inputs = [av.open(str(source)) for source in sources]
        outputs = [container.add_stream_from_template(each.streams.video[0]) for each in inputs]
        if cover is not None:
            outputs[cover].disposition = Disposition.attached_pic
        for each, stream in zip(inputs, outputs, strict=True):
            for packet in each.demux(video=0):
                if packet.size and keep(packet):
                    packet.stream = stream
                    container.mux(packet)
            each.close()
    return path


def two_sizes(path, *heights):
    """Frames of these heights in one mjpeg stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for number, height in enumerate(heights):
            (frame,) = clip(1, height=height)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = height, 96, "yuvj420p", Fraction(1, 25)
            (packet,) = encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p"))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            container.mux(packet)
    return path
