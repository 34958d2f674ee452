"""The refiner moves regions of stems and nothing else, and learns from stems of known sources which."""

import numpy as np
import pytest
import soundfile as sf
import torch

from audiosep.data import Item, MixtureDataset
from audiosep.errors import UsageError
from audiosep.metrics import si_sdr
from audiosep.refiner import BOUND, Refiner, Stems, faulty, read_stems, resized, write_stems
from audiosep.stft import stft

RATE = 16000


def tone(frequency, level=0.1, length=RATE):
    return level * torch.sin(2 * np.pi * frequency * torch.arange(length) / RATE)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return Refiner(["Low", "High"], **{"width": 8, "mels": 16, **options})


def test_an_untrained_refiner_leaves_stems_as_they_are():
    x = torch.randn(2, 3, RATE, generator=torch.Generator().manual_seed(0))
    (moved,) = small().eval().refine([x], torch.tensor([[0, 2, 3]] * 2), 1.0)
    torch.testing.assert_close(moved, x, atol=1e-6, rtol=0)


class Known(Refiner):
    """Says of every bin of stem k that its log power is k nats more than it looks."""

    def forward(self, bins, labels):
        return torch.arange(bins.shape[1]).view(1, -1, 1, 1).expand(bins.shape).float()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fields_move_the_shares_of_the_sum(share):
    """Two stems that hold half of a noise each have the shares 1 and exp(share), by the softmax."""
    noise = 0.1 * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(0))
    stems = noise.expand(-1, 2, -1) / 2
    refined = Known(["Low", "High"], width=8, mels=16).refine([stems, 2 * stems], torch.tensor([[2, 3]]), share)
    part = np.exp(share) / (1 + np.exp(share))
    for scale, moved in zip((1, 2), refined):
        expected = scale * torch.cat(((1 - part) * noise[0], part * noise[0]))
        torch.testing.assert_close(moved[0], expected, atol=1e-5, rtol=0)


def test_the_sum_stays_what_it_was_at_any_level_and_length():
    refiner = small().eval()
    torch.nn.init.normal_(refiner.out.weight, std=5.0)
    for length in (16000, 5001, 300):
        for level in (1.0, 1e-4, 0.0):
            x = level * torch.randn(1, 2, length, generator=torch.Generator().manual_seed(1))
            (moved,) = refiner.refine([x], torch.tensor([[0, 2]]), 1.0)
            assert moved.isfinite().all()
            torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-5 * max(level, 1e-9), rtol=1e-4)
            assert level == 0 or not torch.allclose(moved, x, atol=1e-3 * level)


def test_fields_are_bounded_where_a_sound_has_no_class():
    refiner = small().eval()
    torch.nn.init.normal_(refiner.out.weight, std=5.0)
    x = torch.randn(3, 3, RATE, generator=torch.Generator().manual_seed(1))
    fields = refiner(stft(x, 1024, 256), torch.tensor([[0, 1, 2], [0, 2, 3], [0, 1, -1]]))
    largest = fields.abs().amax((1, 2, 3))
    assert largest[1] > 2 * BOUND
    assert (largest[[0, 2]] <= BOUND + 1e-4).all()
    assert (largest[[0, 2]] > 0.9 * BOUND).all()
    assert not fields[2, 2].any()


def test_a_field_does_not_depend_on_the_level():
    refiner = small().eval()
    torch.nn.init.normal_(refiner.out.weight)
    x = torch.randn(1, 2, RATE, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 2]])
    quiet, loud = (refiner(stft(level * x, 1024, 256), labels) for level in (1e-3, 1.0))
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_trained_in_half_precision(dtype):
    """A tone's energy is far out of float16's range."""
    refiner = small()
    stems = torch.stack((tone(1000), 1e-3 * torch.randn(RATE)))[None]
    batch = {"stems": stems, "sources": stems, "labels": torch.tensor([[0, 2]])}
    whole = refiner.eval().loss(batch)
    with torch.autocast("cpu", dtype):
        half = refiner.loss(batch)
        bins = stft(stems, 1024, 256)
        assert refiner(bins, batch["labels"]).dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.1, rtol=0)


def test_what_is_no_source_is_left_out():
    refiner = small().eval()
    torch.nn.init.normal_(refiner.out.weight)
    generator = torch.Generator().manual_seed(1)
    stems, sources = (torch.randn(1, 2, RATE, generator=generator) for _ in "ab")
    two = {"stems": stems, "sources": sources, "labels": torch.tensor([[0, 2]])}
    more = {key: torch.nn.functional.pad(two[key], (0, 0, 0, 1)) for key in ("stems", "sources")}
    three = more | {"labels": torch.tensor([[0, 2, -1]])}
    torch.testing.assert_close(refiner.loss(three), refiner.loss(two), atol=1e-3, rtol=1e-4)


def test_the_loss_is_the_snr():
    """Stems that are 0.9 of a source and 0.1 of the other one, alike in power: 20 dB each, on an untrained network."""
    noise = torch.randn(1, 2, RATE, generator=torch.Generator().manual_seed(0))
    batch = {"stems": 0.9 * noise + 0.1 * noise.flip(1), "sources": noise, "labels": torch.tensor([[0, 2]])}
    error = (0.1 * (noise[:, 0] - noise[:, 1])).square().sum() / noise.square().sum((1, 2)) * 2
    expected = -10 * torch.log10(1 / (error + 1e-3))
    torch.testing.assert_close(small().loss(batch), expected, atol=0.05, rtol=0)


def test_it_knows_sources_of_different_names_only():
    refiner = small()
    assert refiner.labels == ("speech", "sound", "Low", "High")
    assert refiner.knows(["SPEECH", "low", "High"])
    assert refiner.knows(["speech", "sound"])
    for names in (["speech", "speech"], ["Low", "low"], ["sound", "sound"], ["speech"], ["speech", "Bell"]):
        assert not refiner.knows(names)
    more = Refiner(["Low", "Mid", "High"], width=2, mels=8)
    assert more.knows(["speech", "Low", "Mid"])
    assert not more.knows(["speech", "Low", "Mid", "High"])  # it never heard four
    assert refiner.numbers(["high", "speech", "Bell"]).tolist() == [3, 0, -1]


@pytest.mark.parametrize("options", [{"width": 7}, {"mels": 15}, {"width": 0}, {"sample_rate": 0}])
def test_sizes_are_even_numbers_above_0(options):
    with pytest.raises(UsageError, match=r"even numbers|at least 1"):
        small(**options)


def tones(names):
    """A mixture of a tone around 400 Hz, "Low", and one around 3500 Hz, "High", which come and go."""
    rng = np.random.default_rng(len(names))
    while True:
        low, high = 400 + 200 * rng.random(), 3500 + 1000 * rng.random()
        swell = torch.from_numpy(np.repeat(rng.random((2, 8)), RATE // 8, -1)).float()
        yield torch.stack((tone(low), tone(high))) * swell + 1e-3 * torch.randn(2, RATE), rng


def test_it_learns_whose_regions_are_whose():
    refiner = small(width=16)
    adam = torch.optim.Adam(refiner.parameters(), 5e-3)
    made = tones(["Low", "High"])

    def batch(count):
        items = [next(made) for _ in range(count)]
        sources = torch.stack([item for item, _ in items])
        stems = torch.stack([faulty(item, RATE, rng) for item, rng in items])
        return {"stems": stems, "sources": sources, "labels": torch.tensor([[2, 3]] * count)}

    for _ in range(60):
        refiner.loss(batch(8)).mean().backward()
        adam.step()
        adam.zero_grad()
    held = batch(16)
    (moved,) = refiner.eval().refine([held["stems"]], held["labels"], 1.0)
    truth = held["sources"].double()
    gain = si_sdr(moved.double(), truth) - si_sdr(held["stems"].double(), truth)
    assert gain.mean() > 4
    # Called by each other's names they are taken for each other: the names are heard.
    (other,) = refiner.refine([held["stems"]], held["labels"].flip(1), 1.0)
    loss = si_sdr(moved.double(), truth) - si_sdr(other.double(), truth)
    assert loss.mean() > 4


def test_faulty_masks_leave_the_sum_and_little_else():
    sources = 0.1 * torch.randn(3, RATE, generator=torch.Generator().manual_seed(0))
    scores = []
    for seed in range(20):
        stems = faulty(sources, RATE, np.random.default_rng(seed))
        torch.testing.assert_close(stems.sum(0), sources.sum(0), atol=1e-4, rtol=0)
        scores.append(si_sdr(stems.double(), sources.double()).mean().item())
    assert np.ptp(scores) > 3
    again = faulty(sources, RATE, np.random.default_rng(19))
    assert torch.equal(again, stems)


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1])
def test_what_lasts_longer_is_lower(ratio):
    x = tone(1000)[None]
    longer = resized(x, ratio)
    assert longer.shape == x.shape
    expected = tone(1000 / ratio)[None, : round(min(1, ratio) * RATE)]
    torch.testing.assert_close(longer[:, : expected.shape[1]], expected, atol=2e-2, rtol=0)
    assert not longer[:, expected.shape[1] :].any()


def row(seed, count=2, length=400):
    generator = torch.Generator().manual_seed(seed)
    stems, sources = (torch.randn(count, length, generator=generator) for _ in "ab")
    return stems, sources, ["speech", "Low", "High"][:count]


def test_stems_on_the_disk(tmp_path):
    path = tmp_path / "1speech+1sound.00000.safetensors"
    rows = [row(0), row(1)]
    write_stems(path, rows, RATE)
    found = read_stems(path, small())
    assert len(found) == 2
    for (stems, sources, names), (a, b, called) in zip(rows, (found[0], found[1])):
        torch.testing.assert_close(a, stems, atol=2e-3, rtol=0)
        torch.testing.assert_close(b, sources, atol=2e-3, rtol=0)
        assert called == names
    with pytest.raises(IndexError):
        found[2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    with pytest.raises(UsageError, match=r"bad\.safetensors: not a file of stems"):
        read_stems(tmp_path / "bad.safetensors", small())
    with pytest.raises(UsageError, match="stems at 16000 Hz, the refiner hears at 8000 Hz"):
        read_stems(path, small(sample_rate=8000))
    with pytest.raises(UsageError, match="stems of Low, which the refiner has no label for"):
        read_stems(path, Refiner(["High"], width=8, mels=16))


@pytest.fixture
def mixtures(tmp_path):
    items = []
    for label, frequency in (("ann", 200), ("Low", 400), ("High", 3500)):
        path = tmp_path / f"{label}.wav"
        sf.write(path, tone(frequency).numpy(), RATE)
        kind = "speech" if label == "ann" else "sound"
        items.append(Item(path.name, path, "train", kind, label, 1.0, path.name))
    return {task: MixtureDataset(items, task, 20, 3, 0.5) for task in ("1speech+1sound", "1speech+2sound")}


def test_items_are_stems_of_all_sources(mixtures, tmp_path):
    refiner, folder = small(), tmp_path / "stems"
    folder.mkdir()
    write_stems(folder / "1speech+1sound.00000.safetensors", [row(5, length=8000)], RATE)
    plain = {"equaliser": 0.0, "speed": 0.0, "unnamed": 0.0, "joined": 0.0}
    data = Stems(list(mixtures.values()), refiner, folder, separated=1.0, **plain)
    assert (len(data), data.count, data.segment) == (40, 3, 0.5)
    saved, made = data[0], data[1]
    # The first task's are of the file, turned, the others of mixtures.
    assert saved["labels"].tolist() == [0, 2, -1]
    assert sorted(made["labels"].tolist()) == [0, 2, 3]
    assert not saved["stems"][2].any()
    spectra = [torch.fft.rfft(x).abs() for x in (saved["stems"][0], row(5, length=8000)[0][0])]
    torch.testing.assert_close(*spectra, atol=0.3, rtol=1e-2)
    source = mixtures["1speech+2sound"][0]
    torch.testing.assert_close(made["sources"], source["sources"])
    torch.testing.assert_close(made["stems"].sum(0), source["mixture"], atol=1e-5, rtol=0)
    for i in (0, 1, 7):
        assert all(torch.equal(a, b) for a, b in zip(data[i].values(), data[i].values()))
    with pytest.raises(IndexError):
        data[40]


def test_what_varies_varies_stems_and_sources_alike(mixtures):
    data = Stems([mixtures["1speech+1sound"]], small(), unnamed=1.0)
    for i in range(4):
        item = data[i]
        assert item["labels"].tolist() == [0, 1]  # its class isn't told
        torch.testing.assert_close(item["stems"].sum(0), item["sources"].sum(0), atol=1e-4, rtol=0)
    plain = Stems([mixtures["1speech+1sound"]], small(), equaliser=0.0)
    assert not torch.allclose(plain[0]["sources"], data[0]["sources"], atol=1e-3)


def test_any_sound_of_three_may_be_the_one_that_is_kept(mixtures):
    data = Stems([mixtures["1speech+1sound"]], small(), joined=1.0, unnamed=1.0)
    waves, names = torch.randn(2, 3, 5), ["Low", "High", "Bell"]
    seen = set()
    for seed in range(20):
        stems, sources, found = data._less_named(*waves, names, np.random.default_rng(seed))
        k = names.index(found[0])
        seen.add(k)
        assert found == [names[k], "sound"]
        for x, whole in ((stems, waves[0]), (sources, waves[1])):
            torch.testing.assert_close(x, torch.stack((whole[k], whole.sum(0) - whole[k])))
    assert seen == {0, 1, 2}
    rows = (*waves[:, :2], ["speech", "sound"])  # as they were written
    assert data._less_named(*rows, np.random.default_rng(0)) == rows


def test_one_sound_has_no_class_or_is_all_others(mixtures):
    three = [mixtures["1speech+2sound"]]
    named, unnamed, joined = (
        Stems(three, small(), equaliser=0.0, unnamed=share, joined=other) for share, other in ((0, 0), (1, 0), (0, 1))
    )
    for i in range(6):
        # Two without a class could not be told apart.
        assert sorted(unnamed[i]["labels"].tolist()) in ([0, 1, 2], [0, 1, 3])
        assert joined[i]["labels"].tolist() == [0, 1, -1]
        for key in ("stems", "sources"):
            voice, others = named[i][key][0], named[i][key][1:].sum(0)
            torch.testing.assert_close(joined[i][key], torch.stack((voice, others, 0 * voice)))


def test_stems_are_refused_in_words(mixtures, tmp_path):
    tasks = list(mixtures.values())
    write_stems(tmp_path / "1speech+1sound.00000.safetensors", [row(0)], RATE)
    with pytest.raises(UsageError, match="no tasks"):
        Stems([], small())
    for options, words in (
        ({"separated": 1.1}, "separated is a share"),
        ({"unnamed": -1}, "unnamed is a share"),
        ({"equaliser": -1}, "equaliser is dB"),
        ({"speed": 1.0}, "speed a share"),
        ({"folder": tmp_path / "none"}, "no stems of 1speech"),
        ({"folder": tmp_path}, "stems of 400 samples, the recipe's segments have 8000"),
    ):
        with pytest.raises(UsageError, match=words):
            Stems(tasks, small(), **options)
