"""Images, sounds and videos, from wherever a sample has them: a path, a data URI, base64 or bytes."""

import base64
import binascii
import io
import math
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FRAMES_PER_S = 2.0  # of videos: what the published vision models were trained with
MOST_FRAMES = 768


class Video(NamedTuple):
    """frames: uint8 [T, H, W, 3]. fps: frames a second, of these."""

    frames: np.ndarray
    fps: float


def image(reference: Any, folder: Path):
    """A PIL image, in RGB and upright. Raises FileNotFoundError and ValueError, as all functions here that read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(_stream(reference, folder)) as found:
            return ImageOps.exif_transpose(found).convert("RGB")  # cameras write down how they were held
    except UnidentifiedImageError:
        raise ValueError(f"{shown(reference)} is not an image of a known format") from None


def sound(reference: Any, folder: Path, rate: int) -> np.ndarray:
    """One channel, float32 in [-1, 1], at `rate` samples a second."""
    raw = _stream(reference, folder).read()
    try:
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, own, n = file.getparams()[:4]
            data = file.readframes(n)
    except (wave.Error, EOFError):
        samples, own = _by_soundfile(reference, raw)
    else:
        if width == 1:
            samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
        elif width == 3:
            bytes_ = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = np.pad(bytes_, ((0, 0), (1, 0))).view("<i4")[:, 0].astype(np.float32) / (1 << 31)
        else:
            samples = np.frombuffer(data, f"<i{width}").astype(np.float32) / (1 << 8 * width - 1)
        samples = samples.reshape(-1, channels).mean(1)
    return resampled(samples, own, rate)


def _by_soundfile(reference: Any, raw: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            f"{shown(reference)} is not a WAV file with whole numbers: other formats need soundfile "
            "(pip install ftrain[omni])"
        ) from None
    try:
        samples, own = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{shown(reference)} is not a sound of a known format ({error})") from None
    return samples.mean(1), own


def resampled(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """The same sound at another rate: its spectrum, cut off or filled up, since a lower rate cannot tell all of it."""
    if own == rate or not len(samples):
        return samples.astype(np.float32)
    step, to = own // math.gcd(own, rate), rate // math.gcd(own, rate)
    # Silence after it: lengths that correspond exactly, and an end that does not touch the beginning.
    times = -(-len(samples) // step) + 1
    spectrum = np.fft.rfft(samples, times * step)
    kept = (min(step, to) * times + 1) // 2  # below both rates' limit
    wide = np.zeros(times * to // 2 + 1, spectrum.dtype)
    wide[:kept] = spectrum[:kept]
    return (np.fft.irfft(wide, times * to) * (to / step)).astype(np.float32)[: round(len(samples) * rate / own)]


def video(reference: Any, folder: Path) -> Video:
    """Frames of a video, about FRAMES_PER_S of them a second; a list of images is taken as they are, at that rate."""
    if isinstance(reference, list):
        frames = [np.asarray(image(frame, folder)) for frame in reference]
        if not frames or len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"a video of {len(frames)} images: there must be some, all of one size")
        return Video(np.stack(frames), FRAMES_PER_S)
    stream = _stream(reference, folder)
    try:
        import av
    except ImportError:
        raise ValueError(f"{shown(reference)}: videos need PyAV (pip install ftrain[omni])") from None
    try:
        with av.open(stream) as container:
            frames, start, last = [], None, -1
            for frame in container.decode(video=0):
                at = frame.time or 0.0
                start = at if start is None else start
                if (period := int((at - start) * FRAMES_PER_S + 1e-6)) > last:  # the first frame of each
                    frames.append(frame.to_ndarray(format="rgb24"))
                    last = period
                if len(frames) == MOST_FRAMES:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{shown(reference)} is not a video of a known format ({error})") from None
    if not frames:
        raise ValueError(f"{shown(reference)} has no frames")
    # Periods without a frame: the video has fewer of them a second.
    return Video(np.stack(frames), FRAMES_PER_S * (len(frames) - 1) / last if last > 0 else FRAMES_PER_S)


def size(reference: Any, folder: Path) -> int:
    """Something that changes with what a reference stands for, without reading it: bytes, or -1."""
    try:
        path = _path(reference, folder)
        return path.stat().st_size if path else -1
    except (OSError, ValueError):
        return -1


def shown(reference: Any) -> str:
    """The reference, for a message."""
    text = reference if isinstance(reference, str) else f"{type(reference).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _path(reference: Any, folder: Path) -> Path | None:
    """The file that is meant, or None where the reference holds the bytes itself."""
    if isinstance(reference, dict):
        reference = reference.get("path") if not reference.get("bytes") else None
    if not isinstance(reference, str) or reference.startswith("data:"):
        return None
    if reference.startswith(("http://", "https://")):
        raise ValueError(
            f"{shown(reference)}: nothing is downloaded while training; give a path, or the bytes in base64"
        )
    name = reference.removeprefix("file://")
    try:
        path = folder / name  # an absolute one stays as it is
        if path.is_file() or len(name) < 128 or Path(name).suffix:
            return path
    except OSError:  # too long for a name
        pass
    return None


def _stream(reference: Any, folder: Path) -> io.BufferedIOBase:
    path = _path(reference, folder)
    if path is not None:
        try:
            return open(path, "rb")
        except OSError:
            if (raw := _decoded(reference)) is None:
                raise FileNotFoundError(
                    f"{shown(reference)}: there is no such file (paths start at {folder})"
                ) from None
            return io.BytesIO(raw)
    if isinstance(reference, dict):
        reference = reference.get("bytes")
    raw = _decoded(reference)
    if raw is None:
        raise ValueError(f"{shown(reference)} is no path, no data URI and no base64")
    return io.BytesIO(raw)


def _decoded(reference: Any) -> bytes | None:
    if isinstance(reference, bytes):
        return reference
    if not isinstance(reference, str):
        return None
    text = reference.partition("base64,")[2] if reference.startswith("data:") else reference
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None
