"""The page holds everything itself: what is in it is what was given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile as sf

from audiosep import report
from audiosep.errors import AudioError

RATE = 16000


def tone(hz, seconds=1.0, rate=RATE, channels=1):
    t = np.arange(round(rate * seconds)) / rate
    return np.tile(0.2 * np.sin(2 * np.pi * hz * t), (channels, 1)).astype("f4")


class Tags(HTMLParser):
    """The opening tags, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def data(url):
    return base64.b64decode(url.partition("base64,")[2])


def test_page_holds_its_tracks(tmp_path):
    path = tmp_path / "new" / "report.html"
    tracks = [("mix <1>", tone(440, channels=2), RATE), ("録音", tone(880, 0.5, 44100), 44100)]
    report.write_page(path, "a & b", {"steps": 30, "nested": {"x": [1.23456, None]}}, tracks)
    text = path.read_text(encoding="utf-8")
    assert "<title>a &amp; b</title>" in text
    assert "mix &lt;1&gt;" in text
    assert "1.235" in text
    tags = Tags(text)
    assert all(a["src"].startswith("data:") for tag in ("img", "audio") for a in tags.all(tag))
    assert not re.search(r'(src|href)="?(https?:)?//', text)
    assert not tags.all("link")
    for attributes, (_, wave, rate) in zip(tags.all("audio"), tracks, strict=True):
        sound, read_rate = sf.read(io.BytesIO(data(attributes["src"])), always_2d=True)
        assert read_rate == rate
        assert sound.T.shape == wave.shape
        assert np.mean((sound.T - wave) ** 2) < 0.05 * np.mean(wave**2)
    assert all(a["alt"] for a in tags.all("img"))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_png_is_the_picture():
    pillow = pytest.importorskip("PIL.Image")
    picture = np.zeros((8, 5))
    picture[0, 0] = 1.0  # lowest band, first column
    image = np.asarray(pillow.open(io.BytesIO(report.png(picture))).convert("RGB"))
    assert image.shape == (8, 5, 3)
    assert tuple(image[-1, 0]) == (254, 252, 205)
    assert tuple(image[0, 0]) == (8, 6, 30)


@pytest.mark.parametrize("hz", [200, 1000, 5000])
def test_tone_is_drawn_at_its_pitch(hz):
    librosa = pytest.importorskip("librosa")
    picture = report.mel_picture(tone(hz, 2.0), RATE)
    assert picture.shape[0] == report.HEIGHT
    assert picture.shape[1] <= report.WIDTH + 1
    centres = librosa.mel_frequencies(report.HEIGHT + 2, fmax=RATE / 2)[1:-1]
    row = np.argmax(picture[:, picture.shape[1] // 2])
    assert abs(centres[row] - hz) < 0.06 * hz + 10


@pytest.mark.parametrize("length", [1, 100, 1_000_000])
def test_any_length_and_silence(length):
    picture = report.mel_picture(np.zeros((1, length), dtype="f4"), RATE)
    assert np.isfinite(picture).all()
    assert picture.shape[1] <= report.WIDTH + 1


def test_place_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match="can't be written"):
        report.write_page(tmp_path / "file" / "x.html", "t", {}, [])
