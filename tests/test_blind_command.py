"""`audiosep blind`: files in, sources and a page out, errors in one line."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

pytest.importorskip("sklearn")

from scipy.io import loadmat, savemat

from audiosep.blind import blocks, command
from audiosep.blind.base import RecordingError
from audiosep.blind.matching import mean_correlation
from audiosep.cli import main
from audiosep.errors import AudioError, UsageError

MIXING = np.array([[1.0, 0.4], [0.2, -0.9]])


def waves(samples=3000):
    t = np.arange(samples)
    return np.stack([np.sin(0.05 * t), np.sin(0.31 * t + 1) ** 3], axis=1)


def recording(path):
    X = waves() @ MIXING.T
    match path.suffix:
        case ".csv":
            np.savetxt(path, X, delimiter=",", header="left,right", comments="")
        case ".tsv":
            np.savetxt(path, X, delimiter="\t")
        case ".npy":
            np.save(path, X.astype(np.float32))
        case ".mat":
            savemat(path, {"X": X, "fs": 100.0})
        case ".edf":
            edfio = pytest.importorskip("edfio")
            edfio.Edf([edfio.EdfSignal(x, 100, label=name) for x, name in zip(X.T, ("Fp1", "Fp2"))]).write(path)
        case _:
            sf.write(path, 0.3 * X, 8000, subtype="FLOAT")
    return path


def written(folder, suffix):
    match suffix:
        case ".csv" | ".tsv":
            return np.loadtxt(folder / f"sources{suffix}", delimiter={".csv": ",", ".tsv": "\t"}[suffix], skiprows=1)
        case ".npy":
            return np.load(folder / "sources.npy")
        case ".mat":
            return loadmat(folder / "sources.mat")["sources"]
        case ".edf":
            signals = pytest.importorskip("edfio").read_edf(folder / "sources.edf").signals
            assert {s.sampling_frequency for s in signals} == {100}
            return np.stack([s.data for s in signals], axis=1)
        case _:
            return np.stack([sf.read(folder / f"source_{j}{suffix}")[0] for j in (1, 2)], axis=1)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy", ".mat", ".edf", ".wav"])
def test_sources_are_files_of_the_same_kind(tmp_path, suffix, capsys):
    path = recording(tmp_path / f"x{suffix}")
    with pytest.raises(SystemExit) as left:
        main(["blind", str(path), "-o", str(tmp_path / "out"), "--n-sources", "2", "--progress", "none"])
    assert left.value.code == 0
    assert mean_correlation(written(tmp_path / "out", suffix), waves()) > 0.999
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].endswith("report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<polyline") == 2
    assert page.count("data:image/png") == 2
    assert ("<audio" in page) == (suffix == ".wav")


def test_audio_sources_have_the_level_at_which_they_are_heard(tmp_path):
    path = recording(tmp_path / "x.wav")
    command.run(path, tmp_path / "out", n_sources=2)
    found = written(tmp_path / "out", ".wav")
    truth = 0.3 * waves() * np.abs(MIXING).max(0)
    np.testing.assert_allclose(np.sort(found.std(0)), np.sort(truth.std(0)), rtol=0.02)


def test_learned_methods_tell_their_loss_and_show_bands(tmp_path):
    messages = []
    facts = command.run(
        recording(tmp_path / "x.csv"),
        tmp_path / "out",
        method="skr-vae",
        options={"max_iter": 12, "posterior": "native"},
        progress=lambda done, total, message: messages.append((done, total, message)),
    )
    assert messages[-1][:2] == (12, 12)
    assert messages[-1][2].startswith("loss ")
    assert facts["sources"] == 2
    assert (tmp_path / "out" / "sources_std.csv").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<polygon") == 2
    assert "loss" in page
    assert "left" in page


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".wav", ".edf"])
def test_long_recordings_are_separated_in_blocks(tmp_path, suffix, monkeypatch):
    path = recording(tmp_path / f"x{suffix}")
    command.run(path, tmp_path / "whole", n_sources=2)
    for name, value in (("LONG", 1000), ("LINES", 700), ("SHOWN", 500)):
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(blocks.transform_in_blocks, "__defaults__", (900, 50))
    mapped = isinstance(command.read(path, tmp_path).samples, np.memmap)
    assert mapped == (suffix != ".edf")
    facts = command.run(path, tmp_path / "out", n_sources=2)
    np.testing.assert_allclose(written(tmp_path / "out", suffix), written(tmp_path / "whole", suffix), atol=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the first 250 samples" in page
    assert facts["samples"] == 3000
    with pytest.raises(UsageError, match=r"auxiva separates whole recordings only.* \(at most 500\)"):
        command.run(path, tmp_path / "out", method="auxiva")


def test_warnings_and_files_of_earlier_runs_reach_the_user(tmp_path, capsys):
    path, out = recording(tmp_path / "x.wav"), tmp_path / "out"
    out.mkdir()
    (out / "source_3.wav").touch()
    (out / "notes.wav").touch()
    arguments = ["--method", "skr-vae", "--set", "max_iter=3", "--n-sources", "2", "--progress", "plain"]
    with pytest.raises(SystemExit):
        main(["blind", str(path), "-o", str(out), *arguments])
    shown = capsys.readouterr().err
    assert "SKRVAE did not converge in 3 iterations" in shown
    assert "sources_std_ is far too small to be the error" in shown
    assert f"{out} also holds source_3.wav of an earlier run" in shown
    assert "notes" not in shown


def test_limited_samples_are_told(tmp_path):
    path = tmp_path / "x.wav"
    sf.write(path, 0.99 * np.tanh(3 * waves() @ MIXING.T), 8000, subtype="PCM_16")
    assert any("beyond full scale" in told for told in command.run(path, tmp_path / "out")["warnings"])


def test_json_and_options(tmp_path, capsys):
    path = recording(tmp_path / "x.npy")
    with pytest.raises(SystemExit):
        main(["blind", str(path), "-o", str(tmp_path / "o"), "--set", "lags=[1,2,3]", "--json", "--progress", "none"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "sobi"
    assert command.parse(["mixing=mlp", "max-iter=5", "beta=0.1"]) == {"mixing": "mlp", "max_iter": 5, "beta": 0.1}


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "text.csv").write_text("a,b\n1,x\n")
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "short.npy", np.zeros((2, 3)))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "empty.mat").touch()
    savemat(tmp_path / "complex.mat", {"X": np.ones((9, 2)) * 1j})
    np.savetxt(tmp_path / "nan.csv", [[1, 2], [np.nan, 3], [2, 4], [1, 1]], delimiter=",")
    for name, code, message in (
        ("missing.csv", 1, "no such file"),
        ("text.csv", 1, "can't be read"),
        ("flat.npy", 1, "rows are samples and columns channels"),
        ("short.npy", 1, "too few"),
        ("empty.npy", 1, "can't be read: No data left in file"),
        ("empty.mat", 1, "can't be read: "),
        ("complex.mat", 1, "holds complex128, not real numbers"),
        ("nan.csv", 1, "sample 1 of channel 0"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["blind", str(tmp_path / name), "-o", str(tmp_path / "out"), "--progress", "none"])
        shown = capsys.readouterr().err
        assert left.value.code == code
        assert shown.startswith("error: ")
        assert message in shown
        assert shown.count("\n") == 1
    with pytest.raises(UsageError, match="sobi has no option beta; it has lags, max_iter, tol"):
        command.build("sobi", None, {"beta": 1}, 0)
    with pytest.raises(AudioError, match="no such file"):
        command.read(tmp_path / "missing.mat")
    (tmp_path / "new.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(100))
    with pytest.raises(AudioError, match="save it with the option -v7"):
        command.read(tmp_path / "new.mat")


def test_facts_are_json(tmp_path):
    options = {"max_iter": 4, "posterior": "native"}
    facts = command.run(recording(tmp_path / "x.csv"), tmp_path / "out", method="skr-vae", options=options)
    assert "noise" not in facts
    json.dumps(facts, allow_nan=False)


def test_what_a_format_cannot_hold_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("outside\nthe range")

    monkeypatch.setattr(command, "_edfio", lambda: SimpleNamespace(Edf=refuse, EdfSignal=refuse))
    estimator = SimpleNamespace(sources_=waves(), n_sources_=2)
    with pytest.raises(AudioError, match=r"sources.edf: can't be written: outside the range"):
        command.write(tmp_path / "x.edf", tmp_path, command.Recording(waves(), rate=100.0), estimator, waves())


def test_edf_without_its_reader_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.edf").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "edfio", None)
    with pytest.raises(UsageError, match="edf files need edfio: pip install"):
        command.read(tmp_path / "x.edf")


def test_edf_channels_of_different_rates_are_refused(tmp_path):
    edfio = pytest.importorskip("edfio")
    signals = [edfio.EdfSignal(np.arange(float(10 * rate)), rate) for rate in (100, 200)]
    edfio.Edf(signals).write(tmp_path / "x.edf")
    with pytest.raises(AudioError, match=r"of one sampling rate are needed, these have \[100"):
        command.read(tmp_path / "x.edf")


def test_the_command_offers_every_method():
    from audiosep.cli import Method

    assert [m.value for m in Method] == list(command.METHODS)


def test_deviations_of_audio_are_at_the_level_of_its_files(tmp_path):
    path, out = recording(tmp_path / "x.wav"), tmp_path / "out"
    facts = command.run(path, out, method="skr-vae", options={"max_iter": 3, "posterior": "native"})
    assert str(out / "sources_std.npy") in facts["files"]
    spread = np.load(out / "sources_std.npy").std(0) + np.load(out / "sources_std.npy").mean(0)
    waves_out = written(out, ".wav")
    assert spread.shape == (2,)
    # Relative to the source, as in the estimator: the same deviation for all samples of unit variance.
    unit = command.build("skr-vae", None, {"max_iter": 3, "posterior": "native"}, 0)
    fitted = unit.fit(command.read(path).samples)
    np.testing.assert_allclose(spread / waves_out.std(0), fitted.sources_std_[0] / fitted.sources_.std(0), rtol=1e-3)


def test_bands_without_noise_are_said_to_be_too_narrow_on_the_page(tmp_path):
    options = {"max_iter": 3, "posterior": "native"}
    command.run(recording(tmp_path / "x.csv"), tmp_path / "out", method="skr-vae", options=options)
    assert "with a band far too narrow" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_time_columns_are_named(tmp_path, suffix):
    X = np.c_[waves() @ MIXING.T, np.round(np.arange(3000) / 128, 4)]
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        np.savetxt(path, X, delimiter=",", header="left,right,time", comments="")
    title = "3" if suffix == ".npy" else r"3 \(time\)"
    with pytest.raises(RecordingError, match=f"column {title} of .* as times and row numbers do: leave it out"):
        command.run(path, tmp_path / "out")


def test_mono_recordings_are_named(tmp_path):
    sf.write(tmp_path / "x.wav", 0.3 * waves()[:, 0], 8000)
    with pytest.raises(RecordingError, match=r"x.wav has one channel \(mono\).*`audiosep separate` takes"):
        command.run(tmp_path / "x.wav", tmp_path / "out")
