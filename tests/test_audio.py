"""Recordings: what goes in comes out, and each kind of bad file gets one clear line."""

import io
import os
import resource
import subprocess
import sys
import types
import wave as wave_module
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiosep import audio
from audiosep.errors import AudioError, UsageError

RATE = 16000
NAMES = [
    "שלום עולם.wav",
    "録音 テスト.wav",
    "Größe ű.wav",
    "emoji 🎧.wav",
    "a b'c\"d.wav",
    "-x.wav",
]


def noise(channels=2, length=5000, level=0.1, seed=0):
    return (level * np.random.default_rng(seed).standard_normal((channels, length))).astype("f4")


def partials(folder):
    return [p for p in folder.rglob("*") if ".partial" in p.name]


def error_of(path, whole=False):
    """The message of the AudioError that reading raises: one line."""
    with pytest.raises(AudioError) as caught:
        audio.read(path) if whole else audio.open_reader(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("n", [1, 7, 1000, 5000, 70000])
def test_blocks_join_to_the_file(tmp_path, n):
    x = noise()
    sf.write(tmp_path / "x.wav", x.T, RATE, subtype="FLOAT")
    with audio.open_reader(tmp_path / "x.wav") as reader:
        assert (reader.info.sample_rate, reader.info.channels, reader.info.frames) == (
            RATE,
            2,
            5000,
        )
        assert (reader.info.format, reader.info.subtype) == ("WAV", "FLOAT")
        assert reader.info.duration == 5000 / RATE
        for _ in range(2 if n > 1 else 1):  # each call starts anew
            blocks = list(reader.blocks(n))
            assert all(b.shape == (2, n) and b.dtype == np.float32 for b in blocks[:-1])
            assert all(b.flags.c_contiguous for b in blocks)
            np.testing.assert_array_equal(np.concatenate(blocks, axis=1), x)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_round_trip_is_exact_for_what_was_read(tmp_path, subtype):
    audio.write(tmp_path / "a.wav", noise(), RATE, subtype)
    first, rate = audio.read(tmp_path / "a.wav")
    audio.write(tmp_path / "b.wav", first, rate, subtype)
    np.testing.assert_array_equal(first, audio.read(tmp_path / "b.wav")[0])
    step = {"PCM_U8": 2.0**-7, "PCM_16": 2.0**-15, "PCM_24": 2.0**-23}.get(subtype, 2.0**-24)
    assert np.abs(first - noise()).max() <= step / 2


@pytest.mark.parametrize(
    ("suffix", "subtype", "bits"),
    [("wav", "PCM_16", 16), ("flac", "PCM_S8", 8), ("flac", "PCM_24", 24), ("aiff", "PCM_32", 32)],
)
def test_integers_round_to_nearest(tmp_path, suffix, subtype, bits):
    values = np.arange(-50, 50)
    x = ((values + np.linspace(-0.49, 0.49, 100)) / 2.0 ** (bits - 1))[None]
    audio.write(tmp_path / f"x.{suffix}", x, RATE, subtype)
    stored = sf.read(tmp_path / f"x.{suffix}", dtype="int32")[0] >> (32 - bits)
    np.testing.assert_array_equal(stored, values)


def test_limited_samples_are_counted_and_said(tmp_path, caplog):
    x = np.array([[-2.0, -1.0, -0.5, 0.5, 1.0, 3.0]])
    with audio.Writer(tmp_path / "x.wav", RATE, 1, subtype="PCM_16") as writer:
        writer.write(x)
    assert writer.clipped == 3  # -1 is a value of PCM, +1 is not
    np.testing.assert_array_equal(
        sf.read(tmp_path / "x.wav", dtype="int16")[0],
        [-32768, -32768, -16384, 16384, 32767, 32767],
    )
    audio.write(tmp_path / "x.ogg", np.tile(x, 1000), RATE)
    assert "beyond full scale" in caplog.text


def test_float_files_keep_values_beyond_full_scale(tmp_path):
    x = np.array([[-2.5, 1 / 3, 7.0]])
    for subtype, dtype in (("FLOAT", "float32"), ("DOUBLE", "float64")):
        with audio.Writer(tmp_path / "x.wav", RATE, 1, subtype=subtype) as writer:
            writer.write(x)
        assert writer.clipped == 0
        np.testing.assert_array_equal(sf.read(tmp_path / "x.wav")[0], x[0].astype(dtype))


@pytest.mark.parametrize("suffix", sorted(audio.FORMATS))
def test_every_format_is_written_and_read(tmp_path, suffix):
    x = noise(length=150000)
    audio.write(tmp_path / f"x.{suffix}", x, 48000)
    y, rate = audio.read(tmp_path / f"x.{suffix}")
    assert (rate, y.shape) == (48000, x.shape)
    assert np.mean((y - x) ** 2) < 0.7 * np.mean(x**2)
    assert not partials(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_any_script(tmp_path, name):
    audio.write(tmp_path / name, noise(), RATE)
    assert audio.read(tmp_path / name)[0].shape == (2, 5000)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_name_that_is_not_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.wav"))
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system wants text")
    assert "\\udcff\\n.wav: is empty" in error_of(path)
    audio.write(path, noise(), RATE)
    assert audio.read(path)[0].shape == (2, 5000)


def test_bad_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "missing.wav")
    assert "directory" in error_of(tmp_path)
    (tmp_path / "empty.wav").touch()
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.wav")
    sf.write(tmp_path / "none.wav", np.zeros((0, 1)), RATE)
    assert "no samples" in error_of(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not a recording\n" * 100)
    assert "not audio" in error_of(tmp_path / "text.wav")
    (tmp_path / "text\nfile.wav").write_text("not a recording\n" * 100)
    assert "text\\nfile" in error_of(tmp_path / "text\nfile.wav")


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated_file(tmp_path, suffix, kept):
    path = tmp_path / f"x.{suffix}"
    audio.write(path, noise(length=100000), RATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "corrupt" in error_of(path, whole=True)


def test_wav_of_a_stream_without_a_length(tmp_path):
    path = tmp_path / "x.wav"
    with wave_module.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    assert audio.read(path)[0].shape == (1, 1000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_numbers(tmp_path, value):
    x = noise()
    x[1, 4000] = value
    sf.write(tmp_path / "x.wav", x.T, RATE, subtype="FLOAT")
    message = error_of(tmp_path / "x.wav", whole=True)
    assert "NaN or infinite" in message
    assert "0.250 s" in message
    with pytest.raises(AudioError, match="NaN"):
        audio.write(tmp_path / "y.wav", x, RATE)
    assert not (tmp_path / "y.wav").exists()


def test_media_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    assert "pip install 'audiosep[media]'" in error_of(tmp_path / "x.m4a")


def test_media_files(tmp_path):
    av = pytest.importorskip("av")
    t = np.arange(2 * RATE) / RATE
    x = np.stack([0.3 * np.sin(2 * np.pi * 440 * t), 0.3 * np.sin(2 * np.pi * 660 * t)])
    path = tmp_path / "tone.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="stereo", bit_rate=128000)
        frame = av.AudioFrame.from_ndarray(x.astype("f4"), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with audio.open_reader(path) as reader:
        assert (reader.info.sample_rate, reader.info.channels) == (RATE, 2)
        y = np.concatenate(list(reader.blocks(1000)), axis=1)
    assert y.shape == (2, reader.info.frames)
    assert abs(reader.info.frames - 2 * RATE) < 4096
    for channel, hz in enumerate((440, 660)):
        spectrum = np.abs(np.fft.rfft(y[channel, 4096 : 4096 + RATE]))
        assert np.argmax(spectrum) == hz
    path.write_bytes(path.read_bytes()[:2000])
    assert "corrupt" in error_of(path)
    (tmp_path / "text.mp4").write_text("not a recording\n" * 100)
    error_of(tmp_path / "text.mp4")


def write_and_fail(path, failure):
    with audio.Writer(path, RATE, 2) as writer:
        writer.write(noise())
        (partial,) = partials(path.parent)
        assert partial.name.startswith(".")
        assert partial.name.endswith(".partial.wav")
        raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_failure_leaves_the_old_file_and_no_other(tmp_path, failure):
    path = tmp_path / "x.wav"
    audio.write(path, noise(seed=1), RATE)
    old = path.read_bytes()
    with pytest.raises(failure):
        write_and_fail(path, failure)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]


def test_unwritable_places_and_formats(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match=r"file/x\.wav: can't be written"):
        audio.write(tmp_path / "file" / "x.wav", noise(), RATE)
    with pytest.raises(UsageError, match="choose from wav, flac"):
        audio.write(tmp_path / "x.xyz", noise(), RATE)
    with pytest.raises(UsageError, match="choose from PCM_S8, PCM_16, PCM_24"):
        audio.write(tmp_path / "x.flac", noise(), RATE, "FLOAT")
    with pytest.raises(AudioError, match="choose another --format"):
        audio.write(tmp_path / "x.opus", noise(), 44100)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_full_disk(tmp_path, suffix):
    """A limit on the file size stands for the full disk: both make write(2) fail."""
    path = tmp_path / f"x.{suffix}"
    code = f"""
import signal
import numpy as np
from audiosep import audio, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    audio.write({str(path)!r}, np.random.default_rng(0).uniform(-1, 1, (2, 200000)), 16000)
except errors.AudioError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)),
    )
    assert done.stdout.strip() == f"{path}: can't be written further (is the disk full?)"
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_wav_beyond_4_gib(tmp_path):
    with audio.Writer(tmp_path / "x.wav", 48000, 2, subtype="FLOAT", frames=1 << 30) as writer:
        writer.write(noise())
    assert sf.info(tmp_path / "x.wav").format == "RF64"
    writer = audio.Writer(tmp_path / "y.wav", 48000, 2)
    writer.frames = 1 << 30
    with pytest.raises(AudioError, match="4 GiB"):
        writer.write(noise())
    writer.discard()
    assert not partials(tmp_path)


def test_stdin_and_stdout(tmp_path, monkeypatch):
    audio.write(tmp_path / "x.flac", noise(), RATE)
    content = (tmp_path / "x.flac").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=stdout))
    with audio.open_reader("-") as reader:
        spooled = reader._path
        with audio.Writer("-", RATE, 2) as writer:
            for block in reader.blocks(300):
                writer.write(block)
    assert not spooled.exists()
    assert not writer._partial.exists()
    written, rate = sf.read(io.BytesIO(stdout.getvalue()), dtype="float32")
    np.testing.assert_array_equal(written.T, audio.read(tmp_path / "x.flac")[0])
    assert rate == RATE
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert "stdin: is empty" in error_of("-")


@pytest.mark.parametrize("rates", [(44100, 16000), (16000, 44100), (8000, 16000), (48000, 16000)])
def test_resample(rates):
    n = 12345
    t = np.arange(n) / rates[0]
    x = np.stack([np.sin(2 * np.pi * 1000 * t), np.cos(2 * np.pi * 300 * t)]).astype("f4")
    y = audio.resample(x, *rates)
    assert y.dtype == np.float32
    assert y.shape == (2, -(-n * rates[1] // rates[0]))
    middle = slice(500, y.shape[1] - 500)
    t = np.arange(y.shape[1]) / rates[1]
    expected = np.stack([np.sin(2 * np.pi * 1000 * t), np.cos(2 * np.pi * 300 * t)])
    assert np.abs(y - expected)[:, middle].max() < 2e-3


def test_resample_of_next_to_nothing():
    for n in (0, 1, 2):
        assert audio.resample(np.zeros((1, n)), 44100, 16000).shape == (1, n and 1)
    np.testing.assert_array_equal(audio.resample(noise(), RATE, RATE), noise())


def test_find_audio(tmp_path):
    for name in ("b.wav", "cd1/a.FLAC", "cd1/notes.txt", ".hidden/x.wav", "cd1/.a.partial.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "none").mkdir()
    found = audio.find_audio([tmp_path, tmp_path / "cd1" / "notes.txt", "-"])
    assert found == [
        (tmp_path / "b.wav", Path("b.wav")),
        (tmp_path / "cd1" / "a.FLAC", Path("cd1/a.FLAC")),
        (tmp_path / "cd1" / "notes.txt", Path("notes.txt")),
        (Path("-"), Path("-")),
    ]
    with pytest.raises(AudioError, match="no recordings"):
        audio.find_audio([tmp_path / "none"])


@pytest.mark.parametrize(
    ("kept", "suffix", "expected"),
    [
        ("PCM_24", "wav", "PCM_24"),
        ("PCM_24", "flac", "PCM_24"),
        ("FLOAT", "flac", "PCM_24"),
        ("PCM_U8", "flac", "PCM_S8"),
        ("VORBIS", "wav", "FLOAT"),
        ("MPEG_LAYER_III", "wav", "FLOAT"),
        ("PCM_16", "mp3", "MPEG_LAYER_III"),
        ("AAC", "ogg", "VORBIS"),
    ],
)
def test_subtype_for(kept, suffix, expected):
    info = audio.AudioInfo(RATE, 1, 10, "WAV", kept)
    assert audio.subtype_for(info, suffix) == expected
