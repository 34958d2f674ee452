"""The manifest, training windows, and mixtures made as the paper makes them."""

import csv
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, Subset

from audiosep import data
from audiosep.data import (
    Cache,
    MixtureDataset,
    SourceDataset,
    Undecoded,
    active_spans,
    class_names,
    load_clip,
    parse_task,
    read_manifest,
)
from audiosep.errors import AudioError, UsageError

RATE = 16000
COLUMNS = ["path", "split", "kind", "speaker_or_class", "duration_s", "group", "remark"]


def tone(seconds, frequency, rate=RATE):
    """Never exactly 0, so that zeros are the silence around it."""
    n = np.arange(round(seconds * rate))
    return 0.1 * np.sin(2 * np.pi * frequency * n / rate + 0.3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two short-winded speakers and a long one, three classes of sound; every clip is a tone."""
    root = tmp_path_factory.mktemp("corpus")
    rows = []

    def add(name, kind, label, wave, split="test", rate=RATE):
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, wave, rate)
        rows.append([name, split, kind, label, len(wave) / rate, label + "1", "x"])

    add("speech/a1.flac", "speech", "ann", tone(1.0, 200))
    add("speech/a2.flac", "speech", "ann", 0.1 * tone(1.5, 210))
    add("speech/b1.wav", "speech", "bob", tone(0.5, 300))
    add("speech/c1.ogg", "speech", "cyd", tone(9.0, 400))
    silence = np.zeros(RATE)
    add("sound/k1.wav", "sound", "Knock", np.concatenate([silence, tone(0.2, 1000), silence]))
    add("sound/g1.wav", "sound", "Gong", tone(6.0, 2000, 44100), rate=44100)
    add("sound/r1.wav", "sound", "Rain", tone(1.0, 3000))
    add("sound/r2.wav", "sound", "Rain", tone(1.0, 3100), split="train")
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return root / "manifest.csv"


@pytest.fixture
def items(corpus):
    return read_manifest(corpus, split="test")


def frequency(wave):
    return float(np.abs(np.fft.rfft(wave)).argmax()) * RATE / len(wave)


def rms_db(wave):
    return 10 * np.log10(np.mean(np.square(np.asarray(wave, dtype=np.float64)), axis=-1))


# The manifest


def test_read_manifest_filters_and_sorts(corpus):
    assert len(read_manifest(corpus)) == 8
    speech = read_manifest(corpus, split="test", kind="speech")
    assert [item.id for item in speech] == sorted(item.id for item in speech)
    assert {item.label for item in speech} == {"ann", "bob", "cyd"}
    assert speech[0].path == corpus.parent / "speech/a1.flac"
    assert read_manifest(corpus, root="elsewhere")[0].path.parts[0] == "elsewhere"


def test_ids_do_not_depend_on_where_the_manifest_lies(corpus, tmp_path):
    text = corpus.read_text()
    moved = tmp_path / "moved.csv"
    for kind in ("speech", "sound"):
        text = text.replace(f"{kind}/", f"{corpus.parent}/{kind}/")
    moved.write_text(text)
    assert read_manifest(moved) == read_manifest(corpus)
    moved.write_text("\n".join(text.splitlines()[:2]))
    assert [item.id for item in read_manifest(moved)] == ["a1.flac"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,split\n", "no column kind, speaker_or_class, duration_s, group"),
        ("HEAD\na.wav,test,music,x,1,g\n", ":2: kind is speech or sound, got 'music'"),
        ("HEAD\na.wav,test,sound,x,long,g\n", "duration_s is seconds above 0, got 'long'"),
        ("HEAD\na.wav,test,sound,x,nan,g\n", "duration_s"),
        ("HEAD\na.wav,test,sound\n", "fewer cells"),
        ("HEAD\na.wav,test,sound,,1,g\n", "can't be empty"),
        ("HEAD\na.wav,test,sound,x,1,g\n/b.wav,test,sound,x,1,g\n", "partly absolute"),
        ("HEAD\n,test,sound,x,1,g\n", "can't be empty"),
        ("HEAD\na.wav,train,sound,x,1,g\n", "no rows of test; it has train sound"),
    ],
)
def test_a_bad_manifest_says_where(tmp_path, text, says):
    path = tmp_path / "m.csv"
    path.write_text(text.replace("HEAD", ",".join(COLUMNS[:6])))
    with pytest.raises(UsageError, match=says):
        read_manifest(path, split="test")


def test_no_manifest(tmp_path):
    with pytest.raises(UsageError, match=r"prepare\.py"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="manifest"):
        read_manifest(tmp_path / "m.csv")


def test_class_names_are_those_with_enough_clips(corpus):
    items = read_manifest(corpus)
    assert class_names(items, least=2) == ["Rain"]
    assert class_names(items, least=1) == ["Gong", "Knock", "Rain"]
    assert class_names(items) == []


# Clips


def test_load_clip_mixes_down_and_resamples(tmp_path):
    left = tone(1.0, 500, 44100)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], 1), 44100)
    wave = load_clip(tmp_path / "a.wav", RATE)
    assert wave.shape == (RATE,)
    assert wave.dtype == np.float32
    assert rms_db(wave) == pytest.approx(rms_db(left) - 6.02, abs=0.05)


def test_load_clip_takes_a_part(tmp_path):
    ramp = np.arange(1000) / 1000
    soundfile.write(tmp_path / "a.wav", ramp, 1000, "FLOAT")
    part = load_clip(tmp_path / "a.wav", 1000, seconds=0.1, where=0.5)
    assert np.allclose(part, ramp[450:550])
    assert load_clip(tmp_path / "a.wav", 1000, seconds=5, where=0.9).size == 1000


def test_clips_that_cannot_be_had(tmp_path):
    with pytest.raises(AudioError, match="no such file"):
        load_clip(tmp_path / "a.wav", RATE)
    (tmp_path / "b.ogg").write_bytes(b"not audio")
    with pytest.raises(AudioError, match=r"b\.ogg: can't be decoded"):
        load_clip(tmp_path / "b.ogg", RATE)
    soundfile.write(tmp_path / "c.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match="no samples"):
        load_clip(tmp_path / "c.wav", RATE)
    soundfile.write(tmp_path / "d.wav", np.full(10, np.nan), RATE, "FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        load_clip(tmp_path / "d.wav", RATE)


def test_headers_that_promise_too_much(tmp_path):
    """A flipped bit asks for more memory than there is."""
    soundfile.write(tmp_path / "a.flac", np.zeros(1000), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] |= 0x0F  # the highest bits of the number of samples
    (tmp_path / "a.flac").write_bytes(content)
    assert soundfile.info(tmp_path / "a.flac").frames > 2**35
    with pytest.raises(AudioError, match=r"a\.flac: can't be decoded"):
        load_clip(tmp_path / "a.flac", RATE)
    soundfile.write(tmp_path / "b.wav", np.zeros(10), 1)
    with pytest.raises(AudioError, match=r"b\.wav: can't be decoded"):
        load_clip(tmp_path / "b.wav", 2**40)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_active_spans_find_the_events(rate):
    quiet = np.zeros(rate)
    wave = np.concatenate([quiet, tone(0.5, 440, rate), quiet, tone(0.25, 440, rate)])
    spans = active_spans(wave.astype(np.float32), rate)
    expected = [(1.0, 1.5), (2.5, 2.75)]
    assert len(spans) == 2
    for (start, end), (true_start, true_end) in zip(spans, expected):
        assert true_start - 0.05 <= start / rate <= true_start
        assert true_end <= end / rate <= true_end + 0.05
    assert spans[-1][1] == wave.size


def test_active_spans_at_the_edges():
    assert active_spans(np.zeros(RATE, np.float32), RATE) == []
    assert active_spans(np.full(100, 0.1, np.float32), RATE) == [(0, 100)]
    # -73 dBFS is the threshold.
    constant = np.ones(RATE, np.float32)
    assert active_spans(10 ** (-73 / 20) * constant, RATE) == [(0, RATE)]
    assert active_spans(10 ** (-74 / 20) * constant, RATE) == []


# Mixtures


def test_parse_task():
    assert parse_task("1speech+1sound") == (1, 1)
    assert parse_task("2sound") == (0, 2)
    assert parse_task(" speech + 12 Sounds") == (1, 12)
    for wrong in ("", "2", "0speech", "2music", "speech+", "-1sound"):
        with pytest.raises(UsageError, match="a task is like"):
            parse_task(wrong)


@pytest.mark.parametrize("task", ["1speech+1sound", "1speech+2sound", "3sound", "2speech", "sound"])
def test_a_mixture_is_what_the_protocol_says(items, task):
    dataset = MixtureDataset(items, task, count=20, seed=3)
    speech, sound = parse_task(task)
    assert len(list(dataset)) == 20
    by_id = {item.id: item for item in items}
    for item in dataset:
        sources = item["sources"]
        assert sources.shape == (speech + sound, 4 * RATE)
        assert sources.dtype == torch.float32
        assert torch.equal(item["mixture"], sources.sum(0))
        levels = rms_db(sources)
        assert ((levels >= -25.01) & (levels <= -19.99)).all()
        assert len(set(item["labels"])) == len(sources)
        assert [by_id[id].label for id in item["ids"]] == item["labels"]
        assert item["names"] == ["speech"] * speech + item["labels"][speech:]
        extents = [(s.nonzero()[0].item(), s.nonzero()[-1].item()) for s in sources]
        for (start, end), (next_start, next_end) in pairwise(extents):
            # A span reaches up to 50 ms into the silence around its event.
            assert max(start, next_start) <= min(end, next_end) + 0.1 * RATE
        if not sound:
            assert all(start < 100 for start, _ in extents)


def test_levels_and_places_differ(items):
    dataset = MixtureDataset(items, "1speech+1sound", count=40, seed=0)
    levels = np.concatenate([rms_db(item["sources"]) for item in dataset])
    assert levels.min() < -24
    assert levels.max() > -21
    starts = {item["sources"][1].nonzero()[0].item() for item in dataset}
    assert len(starts) > 20


def test_a_sound_is_one_active_span(items):
    dataset = MixtureDataset(items, "1sound", count=5, seed=0, classes=["knock"])
    for item in dataset:
        assert item["names"] == ["Knock"]
        assert 0.2 * RATE <= (item["sources"] != 0).sum() <= 0.3 * RATE


def test_an_item_depends_on_seed_and_index_alone(items):
    one = MixtureDataset(items, "1speech+1sound", count=5, seed=7)
    last = one[4]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    other = MixtureDataset(reversed(items), "1speech+1sound", count=500, seed=7)
    assert torch.equal(last["mixture"], other[4]["mixture"])
    assert last["ids"] == other[4]["ids"]
    different = MixtureDataset(items, "1speech+1sound", count=5, seed=8)[4]
    assert not torch.equal(last["mixture"], different["mixture"])


def test_the_draws_are_these_on_every_machine(items):
    dataset = MixtureDataset(items, "1speech+2sound", count=2, seed=17)
    assert [dataset[i]["ids"] for i in range(2)] == [
        ["speech/b1.wav", "sound/k1.wav", "sound/g1.wav"],
        ["speech/b1.wav", "sound/r1.wav", "sound/k1.wav"],
    ]
    # The gong is longer than what is left after the knock: it starts at 0.
    starts = [s.nonzero()[0].item() for s in dataset[0]["sources"]]
    assert starts == [46612, 47306, 0]


def test_what_cannot_be_mixed(items, tmp_path):
    with pytest.raises(UsageError, match="needs 4 speakers, the items have 3"):
        MixtureDataset(items, "4speech", count=1, seed=0)
    with pytest.raises(UsageError, match="needs 2 classes of sound, the items have 1"):
        MixtureDataset(items, "2sound", count=1, seed=0, classes=["Rain", "Bark"])
    with pytest.raises(UsageError, match="count"):
        MixtureDataset(items, "2sound", count=0, seed=0)
    with pytest.raises(UsageError, match="seed"):
        MixtureDataset(items, "2sound", count=1, seed=-1)


def test_a_mixture_never_goes_on_without_a_clip(corpus, tmp_path):
    items = read_manifest(corpus, root=tmp_path)
    with pytest.raises(AudioError, match="no such file"):
        MixtureDataset(items, "2sound", count=1, seed=0)[0]


def test_mixtures_to_train_with_are_made_of_other_clips(items, damaged):
    def clips(dataset):
        return [item["ids"] for item in dataset]

    plain = MixtureDataset(items, "1speech+1sound", count=30, seed=0)
    skipping = MixtureDataset(items, "1speech+1sound", count=30, seed=0, skip=Undecoded(items))
    assert all(torch.equal(a["sources"], b["sources"]) for a, b in zip(plain, skipping, strict=True))
    assert skipping.failed == []
    skip = Undecoded(damaged)
    dataset = MixtureDataset(damaged, "1speech+1sound", count=30, seed=0, skip=skip)
    with pytest.warns(UserWarning, match="left out of training") as caught:
        drawn = clips(dataset)
    assert len(caught) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips(MixtureDataset(damaged, "1speech+1sound", count=30, seed=1, skip=skip))
    assert dataset.failed == ["sound/r1.wav", "speech/a1.flac"]
    assert not {"sound/r1.wav", "speech/a1.flac"} & {id for ids in drawn for id in ids}
    assert clips(dataset) == drawn  # known or not, the mixtures are the same
    with pytest.raises(AudioError, match="can't be decoded"):
        clips(MixtureDataset(damaged, "1speech+1sound", count=30, seed=0))


@pytest.mark.filterwarnings("ignore:left out")
def test_a_class_without_a_clip_that_decodes_is_left_out(damaged):
    test = [item for item in damaged if item.split == "test"]
    dataset = MixtureDataset(test, "2sound", count=20, seed=0, skip=Undecoded(test))
    assert all(set(item["labels"]) == {"Gong", "Knock"} for item in dataset)
    knocks = [item for item in test if item.label in ("Rain", "Knock")]
    with pytest.raises(AudioError, match="silent or can't be decoded"):
        MixtureDataset(knocks, "2sound", count=1, seed=0, skip=Undecoded(knocks))[0]


# Training windows


def test_windows_have_length_level_and_label(items):
    classes = ["rain", "Knock"]
    dataset = SourceDataset(items, count=60, classes=classes)
    seen = set()
    for item in dataset:
        assert item["wave"].shape == (4 * RATE,)
        assert item["wave"].dtype == torch.float32
        assert -25.01 <= rms_db(item["wave"]) <= -19.99
        seen.add(item["label"])
    assert seen == {0, 1, 2}


def test_short_speech_is_joined_within_a_speaker(items):
    ann = [item for item in items if item.label == "ann"]
    dataset = SourceDataset(ann, count=10, join=1.0, polarity=False)
    for item in dataset:
        wave = item["wave"].numpy()
        assert (wave == 0).mean() < 0.01
        # The second clip is 20 dB quieter on disk.
        seconds = rms_db(wave.reshape(8, -1))
        assert seconds.max() - seconds.min() < 1
        assert 195 < frequency(wave) < 215


def test_speech_that_is_not_joined_lies_in_silence(items):
    bob = [item for item in items if item.label == "bob"]
    for dataset in (SourceDataset(bob, 5, join=0.0), SourceDataset(bob, 5, join=1.0)):
        for item in dataset:
            active = item["wave"].nonzero()
            assert active[-1] - active[0] < 0.5 * RATE


def test_long_speech_starts_anywhere(items):
    cyd = [item for item in items if item.label == "cyd"]
    waves = [item["wave"] for item in SourceDataset(cyd, count=4)]
    assert all((wave == 0).float().mean() < 0.01 for wave in waves)
    assert not torch.equal(waves[0], waves[1])


def test_balance_evens_out_the_labels(items):
    def share(balance):
        dataset = SourceDataset(items, 300, classes=["Knock"], balance=balance, segment=1.0)
        return np.mean([item["label"] == 0 for item in dataset])

    assert share(0.0) == pytest.approx(1 / 6, abs=0.05)
    assert share(1.0) == pytest.approx(1 / 7.5, abs=0.05)


def test_equaliser_and_room():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 32000)
    plain = np.abs(np.fft.rfft(noise)) ** 2
    bands = [slice(4000 // 2**k, 8000 // 2**k) for k in range(5)]  # octaves
    heard = [np.abs(np.fft.rfft(data.equalised(rng, noise, 6.0, 16000))) ** 2 for _ in range(20)]
    gains = 10 * np.log10([[wave[band].sum() / plain[band].sum() for band in bands] for wave in heard])
    assert np.abs(gains).max() < 6.3
    assert gains.std() > 1.5
    click = np.zeros(16000)
    click[100] = 1.0
    for _ in range(5):
        room = data._in_room(rng, click, 16000)
        assert room[100] == pytest.approx(1.0)
        assert not room[:100].round(9).any()
        echoes = np.square(room[101:]).sum()
        assert 10**-1.2 <= echoes <= 1.0
        # Reverberation time by Schroeder's backward integral, between -5 and -25 dB.
        left = 10 * np.log10(np.cumsum(np.square(room[140:])[::-1])[::-1] / np.square(room[140:]).sum() + 1e-12)
        fall = (np.argmax(left < -25) - np.argmax(left < -5)) / 16000
        assert 0.1 * 0.8 < 3 * fall < 0.6 * 1.2


def test_equaliser_and_room_are_options_of_the_windows(items):
    plain = SourceDataset(items, 6, seed=1)
    varied = SourceDataset(items, 6, seed=1, equaliser=6.0, room=1.0)
    again = SourceDataset(items, 6, seed=1, equaliser=6.0, room=1.0)
    for k in range(6):
        assert not torch.equal(varied[k]["wave"], plain[k]["wave"])
        assert torch.equal(varied[k]["wave"], again[k]["wave"])
        level = 20 * varied[k]["wave"].square().mean().sqrt().log10()
        assert -25.01 <= level <= -19.99
    with pytest.raises(UsageError, match="room a share"):
        SourceDataset(items, 1, room=2.0)


def test_gain_polarity_and_speed(items):
    rain = [item for item in items if item.label == "Rain"]
    levels = [rms_db(item["wave"]) for item in SourceDataset(rain, 40, gain=10.0)]
    assert min(levels) < -28
    assert max(levels) > -17
    assert len(rain) == 1
    plain = [item["wave"] for item in SourceDataset(rain, 20, segment=0.5, polarity=False)]
    flipped = [item["wave"] for item in SourceDataset(rain, 20, segment=0.5, polarity=True)]
    signs = [round((a @ b / a.norm() / b.norm()).item()) for a, b in zip(plain, flipped)]
    assert set(signs) == {1, -1}
    heard = [frequency(item["wave"]) for item in SourceDataset(rain, 20, speed=0.1)]
    assert min(heard) < 2900
    assert max(heard) > 3100
    assert 2690 < min(heard) < max(heard) < 3310


def test_workers_and_resuming_give_the_same_windows(items):
    dataset = SourceDataset(items, count=8, seed=5, speed=0.05, gain=3)
    expected = torch.stack([dataset[i]["wave"] for i in range(8)])
    loader = DataLoader(Subset(dataset, range(4, 8)), batch_size=2, num_workers=2)
    resumed = torch.cat([batch["wave"] for batch in loader])
    assert torch.equal(resumed, expected[4:])
    other = SourceDataset(items, count=8, seed=6)[0]["wave"]
    assert not torch.equal(other, expected[0])


@pytest.fixture
def damaged(corpus, tmp_path):
    """The corpus with one clip of ann's cut to nothing and one of rain absent."""
    root = tmp_path / "damaged"
    for item in read_manifest(corpus):
        target = root / item.id
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(item.path.read_bytes())
    (root / "speech/a1.flac").write_bytes(b"fLaC")
    (root / "sound/r1.wav").unlink()
    return read_manifest(corpus, root=root)


def test_an_unreadable_clip_is_named_once_and_left_out(damaged):
    dataset = SourceDataset(damaged, count=60)
    with pytest.warns(UserWarning, match="left out of training") as caught:
        waves = [item["wave"] for item in dataset]
    assert sorted(str(w.message).split(":")[1].split("/")[-1] for w in caught) == [
        "a1.flac",
        "r1.wav",
    ]
    assert dataset.failed == ["sound/r1.wav", "speech/a1.flac"]
    # Known or not, the windows are the same.
    assert all(torch.equal(dataset[i]["wave"], waves[i]) for i in range(60))


@pytest.mark.filterwarnings("ignore:left out")
def test_what_workers_cannot_read_is_counted(damaged):
    dataset = SourceDataset(damaged, count=40)
    for _ in DataLoader(dataset, batch_size=4, num_workers=2):
        pass
    assert dataset.failed == ["sound/r1.wav", "speech/a1.flac"]


@pytest.mark.filterwarnings("ignore:left out")
def test_nothing_to_train_on(corpus, tmp_path):
    with pytest.raises(UsageError, match="no recordings"):
        SourceDataset([], count=1)
    with pytest.raises(AudioError, match="no usable recording"):
        SourceDataset(read_manifest(corpus, root=tmp_path), count=1)[0]


# The cache


def test_a_cache_gives_the_same_windows(items, tmp_path):
    plain = SourceDataset(items, 200, seed=1, classes=["Gong"], speed=0.1)
    cached = SourceDataset(items, 200, seed=1, classes=["Gong"], speed=0.1, cache=tmp_path)
    batches = DataLoader(cached, batch_size=1, num_workers=2)
    for i, batch in enumerate(batches):
        assert batch["label"] == plain[i]["label"]
        if i >= 20:
            break
    assert len(pickle.dumps(cached.cache)) < 2000  # a worker process maps the samples itself
    # Where the rate is not the file's own, a part's ends are resampled otherwise: compare whole recordings.
    for position, item in enumerate(cached.items):
        wave = load_clip(item.path, RATE)
        assert cached.cache.clip(position) == pytest.approx(wave, abs=float(np.abs(wave).max()) / 60000)
        part = cached.cache.clip(position, 0.25, 0.5)
        assert part.size == min(wave.size, RATE // 4)
    assert cached.cache.clip(0, 0.25, 1.0) == pytest.approx(load_clip(items[0].path, RATE)[-RATE // 4 :], abs=1e-5)


def test_a_cache_is_made_once_and_again_for_other_recordings(items, tmp_path, monkeypatch):
    Cache(items, RATE, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("audiosep.data.load_clip", None)
    Cache(items, RATE, tmp_path)
    monkeypatch.undo()
    Cache(items[1:], RATE, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_leaves_out_what_cannot_be_read(damaged, tmp_path):
    with pytest.warns(UserWarning, match="left out of training"):
        dataset = SourceDataset(damaged, 100, cache=tmp_path / "cache")
    assert dataset.failed == ["sound/r1.wav", "speech/a1.flac"]
    assert all(dataset[i]["wave"].any() for i in range(20))
    with pytest.warns(UserWarning, match="left out of training") as again:  # by those, too, that find the cache
        SourceDataset(damaged, 100, cache=tmp_path / "cache")
    assert len(again) == 2
    assert all("can't be decoded" in str(warning.message) for warning in again)
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match="can't be written"):
        Cache(damaged, RATE, tmp_path / "file")
