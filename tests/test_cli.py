"""The command, with a small stand-in for the separator: files, refusals, exit codes, streams."""

import io
import json
import os
import signal
import subprocess
import sys
import tomllib
import types
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import audiosep
from audiosep import audio, doctor, progress, report
from audiosep.cli import main
from audiosep.errors import ModelError, UsageError

RATE = 16000
ROOT = Path(__file__).parents[1]


class HalfSeparator:
    """Each stem is an equal share of the mixture. A recording at 8000 Hz breaks it."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, names, device="auto", dtype="auto", **options):
        cls.calls.append((names, device, dtype, options))
        if "missing" in names:
            raise ModelError("missing: no such checkpoint")
        return cls()

    def source_names(self, sources):
        sources = sources or ["speech", "sound"]
        if not set(sources) <= {"speech", "sound", "bark"}:
            raise UsageError(f"no source {sources}; choose from bark, sound, speech")
        return sources

    def separate_file(self, path, out, sources=None, *, format=None, subtype=None, residual=False, progress=None):
        stems = self.source_names(sources) + ["residual"] * residual
        with audio.open_reader(path) as reader, ExitStack() as stack:
            info = reader.info
            if info.sample_rate == 8000:
                raise RuntimeError("cannot\nseparate this")
            subtype = subtype or audio.subtype_for(info, format or "wav")
            writers = [
                stack.enter_context(
                    audio.Writer(out(stem), info.sample_rate, info.channels, format=format, subtype=subtype)
                )
                for stem in stems
            ]
            done = 0
            for block in reader.blocks(1000):
                for writer in writers:
                    writer.write(block / len(stems))
                done += block.shape[1]
                progress(done, info.frames, "separating")
        clipped = dict.fromkeys(stems, 0) | {stems[0]: 7}
        return {"ratio": float("nan"), "notes": ["half of it"], "clipped_samples": clipped}


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    fakes = types.SimpleNamespace(load=HalfSeparator.from_pretrained)
    monkeypatch.setitem(sys.modules, "audiosep.direct", fakes)
    monkeypatch.chdir(tmp_path)
    HalfSeparator.calls.clear()
    tone("mix.wav")


def tone(name, rate=RATE, seconds=0.5):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(rate * seconds)) / rate
    sf.write(path, 0.3 * np.sin(2 * np.pi * 440 * t), rate, subtype="PCM_24")
    return path


def run(*arguments):
    """The exit code of the command."""
    with pytest.raises(SystemExit) as caught:
        main([os.fspath(a) for a in arguments])
    return caught.value.code


def files(folder="separated"):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def test_stems_and_report(capsys):
    assert run("separate", "mix.wav") == 0
    folder = "speech+sound/mix/"
    assert files() == [folder + "report.json", folder + "sound.wav", folder + "speech.wav"]
    assert sf.info("separated/speech+sound/mix/speech.wav").subtype == "PCM_24"
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"separated/{folder}{s}.wav" for s in ("speech", "sound")]
    assert "mix.wav: half of it" in err
    assert "speech: 7 samples beyond full scale were limited" in err
    report = json.loads(Path("separated", folder, "report.json").read_text())
    assert report["ratio"] is None  # JSON has no NaN


def test_options_reach_the_separator():
    arguments = (
        "mix.wav -o out -n speech,./my/sounds -s speech -d cpu --segment 3 --overlap 0.5 --steps 7"
        " --sampler dsg --preset paper --samples 2 --guidance 0 --low-rank 0 --refine 0 --restarts 0 --least-noise 0.01"
        " --combine mean --seed 9 --dtype bfloat16 --compile"
    )
    code = run("separate", *arguments.split())
    assert code == 0
    (call,) = HalfSeparator.calls
    assert call[:3] == (["speech", "./my/sounds"], "cpu", "bfloat16")
    assert call[3] == {
        "preset": "paper",
        "sampler": "dsg",
        "steps": 7,
        "segment": 3.0,
        "overlap": 0.5,
        "samples": 2,
        "guidance": 0.0,
        "low_rank": 0.0,
        "refine": 0.0,
        "restarts": 0,
        "least_noise": 0.01,
        "combine": "mean",
        "seed": 9,
        "compile": True,
        "mixing": None,
    }
    assert files("out") == ["speech+sounds/mix/report.json", "speech+sounds/mix/speech.wav"]


def test_existing_stems(capsys):
    assert run("separate", "mix.wav") == 0
    stem = Path("separated/speech+sound/mix/speech.wav")
    stem.write_bytes(b"mine")
    capsys.readouterr()
    assert run("separate", "mix.wav") == 1
    assert "exists; choose --overwrite, --skip-existing" in capsys.readouterr().err
    assert run("separate", "mix.wav", "--skip-existing") == 0
    assert stem.read_bytes() == b"mine"
    assert run("separate", "mix.wav", "--overwrite") == 0
    assert stem.read_bytes() != b"mine"
    stem.unlink()
    assert run("separate", "mix.wav", "--skip-existing") == 0
    assert stem.exists()


def test_a_batch_goes_on_after_bad_files(capsys):
    Path("bad.wav").write_text("no audio")
    Path("empty.wav").touch()
    tone("slow.wav", 8000)
    assert run("separate", "bad.wav", "empty.wav", "none.wav", "slow.wav", "mix.wav") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [
        "bad.wav",
        "empty.wav",
        "none.wav",
        "slow.wav",
    ]
    assert "RuntimeError: cannot separate this" in errors[3]
    assert "4 of 5 recordings failed" in err
    assert "Traceback" not in err
    assert [f for f in files() if not f.startswith("speech+sound/mix/")] == []
    run("separate", "slow.wav", "-v")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", ["1", "3"])
def test_directories(parallel, capsys):
    for name in ("album/cd1/תו.wav", "album/cd1/ab.flac", "album/cd2/歌.wav"):
        tone(name)
    assert run("separate", "album", "-o", "album/out", "-j", parallel) == 0
    expected = [
        f"speech+sound/{track}/{name}"
        for track in ("cd1/ab", "cd1/תו", "cd2/歌")
        for name in ("report.json", "sound.wav", "speech.wav")
    ]
    assert files("album/out") == expected
    assert run("separate", "album", "-o", "album/out", "--skip-existing", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [line["status"] for line in lines] == ["skipped"] * 3  # and not its own stems
    Path("nothing").mkdir()
    assert run("separate", "nothing", "mix.wav") == 1
    assert "no recordings" in capsys.readouterr().err


def test_names_that_are_not_text(capfdbinary):
    name = os.fsdecode(b"\xff.wav")
    try:
        tone("x.wav").rename(name)
    except OSError:
        pytest.skip("this file system wants text")
    assert run("separate", name, "--report", "--progress", "plain") == 0
    out, err = capfdbinary.readouterr()
    assert out.splitlines()[0] == b"separated/speech+sound/\xff/speech.wav"
    assert b"\\udcff.wav: half of it" in err


def test_two_recordings_for_one_place():
    tone("a/mix.wav")
    assert run("separate", "mix.wav", "a/mix.wav") == 2
    assert not Path("separated").exists()
    assert run("separate", "mix.wav", "./mix.wav") == 0  # the same one


def test_templates_formats_and_residual(capsys):
    arguments = ["separate", "mix.wav", "--filename", "{stem} of {track}.{ext}", "--residual"]
    assert run(*arguments, "--format", "flac", "--subtype", "pcm_16") == 0
    assert files() == [
        "speech+sound/report of mix.json",
        "speech+sound/residual of mix.flac",
        "speech+sound/sound of mix.flac",
        "speech+sound/speech of mix.flac",
    ]
    assert sf.info("separated/speech+sound/speech of mix.flac").subtype == "PCM_16"
    for wrong in ("{track}.wav", "{stem}.wav", "{artist}/{stem}.{ext}", "{stem.{ext}", "{0}{stem}"):
        assert run("separate", "mix.wav", "--filename", wrong) == 2
    assert run("separate", "mix.wav", "--format", "xyz") == 2
    assert run("separate", "mix.wav", "--format", "flac", "--subtype", "float") == 2
    assert "choose from PCM_S8, PCM_16, PCM_24" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "mix.wav -d gpu",
        "mix.wav --steps 0",
        "mix.wav --preset best",
        "mix.wav --overlap 0.6",
        "mix.wav -s meow",
        "mix.wav -q -v",
        "mix.wav --overwrite --skip-existing",
        "mix.wav -o - --json",
        "mix.wav mix.wav -o -",
        "mix.wav --nonsense",
    ],
)
def test_usage_errors(wrong, capsys):
    assert run("separate", *wrong.split()) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("separated").exists()


def test_no_model(capsys):
    assert run("separate", "mix.wav", "-n", "missing") == 3
    assert capsys.readouterr().err == "error: missing: no such checkpoint\n"


def test_dry_run(capsys):
    Path("bad.wav").write_text("no audio")
    assert run("separate", "mix.wav", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "separated/speech+sound/mix/speech.wav"
    assert "mix.wav: would be separated" in err
    assert run("separate", "bad.wav", "--dry-run") == 1
    assert not Path("separated").exists()


def test_streams(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("mix.wav").read_bytes())))
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("separate", "-", "-o", "-") == 0
    x, _ = sf.read(io.BytesIO(stdout.buffer.getvalue()))
    np.testing.assert_allclose(x, sf.read("mix.wav")[0] / 2, atol=2**-23)
    assert not Path("separated").exists()
    assert not Path("-").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("mix.wav").read_bytes())))
    assert run("separate", "-") == 0
    assert "speech+sound/stdin/speech.wav" in files()


def test_json_and_progress_modes(capsys, monkeypatch):
    monkeypatch.setattr(progress.JsonDisplay, "seconds", 0.0)
    monkeypatch.setattr(progress.PlainDisplay, "seconds", 0.0)
    assert run("separate", "mix.wav", "--json", "--progress", "json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["input"], result["status"]) == ("mix.wav", "done")
    assert list(result["stems"]) == ["speech", "sound"]
    events = [json.loads(line) for line in err.splitlines()]
    shown = [e for e in events if e["event"] == "progress"]
    assert [e["done"] for e in shown] == [1000 * i for i in range(1, 9)]
    assert shown[-1]["total"] == 8000
    assert run("separate", "mix.wav", "--overwrite", "--progress", "plain") == 0
    assert "mix.wav: separating 4000/8000 (50%)" in capsys.readouterr().err
    assert run("separate", "mix.wav", "--overwrite", "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_bar(capsys):
    with progress.BarDisplay() as bar:
        callback = bar.file("[b]mix[/b].wav")
        callback(1, 4, "separating")
        bar.note("a note")
        callback(4, 4, "done")
        bar.ended("[b]mix[/b].wav")
        bar.result("a result")
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert "a note" in err
    assert progress.clock(3725.2) == "1:02:05"


def test_page(capsys):
    assert run("separate", "mix.wav", "--report", "--json") == 0
    page = Path(json.loads(capsys.readouterr().out)["page"])
    assert page.name == "report.html"
    assert page.read_text(encoding="utf-8").count("<audio") == 3


INTERRUPTED = """
import sys, time, types
sys.path[:0] = [{tests!r}, {root!r}]
import test_cli
class Slow(test_cli.HalfSeparator):
    def separate_file(self, path, out, sources=None, *, progress=None, **options):
        def slow(done, total, message):
            progress(done, total, message)
            print("started", file=sys.stderr, flush=True)
            time.sleep(0.1)
        return super().separate_file(path, out, sources, progress=slow, **options)
sys.modules["audiosep.direct"] = types.SimpleNamespace(load=Slow.from_pretrained)
from audiosep.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_interrupt(parallel):
    tone("long.wav", seconds=60)
    tone("longer.wav", seconds=60)
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), root=str(ROOT))
    arguments = ["separate", "long.wav", "longer.wav", "-j", parallel]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("started")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert files() == []


def test_help_imports_nothing_slow():
    code = (
        "import sys\nfrom audiosep.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print([m for m in ('torch', 'torchaudio', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "separate" in done.stdout


def test_version_and_module(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == audiosep.__version__
    for command in ([], ["separate"], ["models"], ["models", "import"], ["evaluate"], ["doctor"]):
        assert run(*command, "-h") == 0


def test_models(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "shelf" / "speech"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Card\n")
    saved = []

    def read_config(folder):
        if folder.name != "speech":
            raise ModelError(f"{folder} is no checkpoint")
        return {"kind": "speech", "sample_rate": 16000}

    hub = types.SimpleNamespace(
        list_checkpoints=lambda: [{"name": "speech", "path": str(folder), "kind": "speech"}],
        read_config=read_config,
        find=lambda name: tmp_path / "shelf" / name,
        import_unasdiff=lambda path: "prior",
        save_prior=lambda *a: saved.append(a),
        UNASDIFF_CARD={},
    )
    monkeypatch.setitem(sys.modules, "audiosep.hub", hub)
    monkeypatch.setattr(audiosep, "hub", hub, raising=False)
    assert run("models", "list") == 0
    assert capsys.readouterr().out.split() == ["speech", "speech", str(folder)]
    assert run("models", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "speech"
    assert run("models", "info", "speech") == 0
    out = capsys.readouterr().out
    assert "sample_rate: 16000" in out
    assert "# Card" in out
    assert run("models", "info", "none") == 3
    Path("sound_source.pt").touch()
    assert run("models", "import", "sound_source.pt") == 0
    assert saved[0][:2] == ("prior", Path("sound_source"))
    assert run("models", "import", "none.pt") == 3
    assert run("models", "import", "sound_source.pt", "-o", "shelf") == 2


def test_evaluate(monkeypatch, capsys, tmp_path):
    seen = []

    def run_evaluate(tables, out, progress):
        progress(1, 3, "scoring")
        seen.append((tables, out))
        return [{"mean": 1.5}]

    table = types.SimpleNamespace(
        table=lambda summaries, published: f"mean {summaries[0]['mean']} {published}",
        notes=lambda summaries, published: ["one left out"],
    )
    for name, module in (("evaluate", types.SimpleNamespace(run=run_evaluate)), ("results", table)):
        monkeypatch.setitem(sys.modules, f"audiosep.{name}", module)
        monkeypatch.setattr(audiosep, name, module, raising=False)
    arguments = "--task 2speech --task 2sound --count 3 --seed 4 -n a,./b --steps 5 -o r"
    assert run("evaluate", *arguments.split()) == 0
    assert capsys.readouterr().out == "mean 1.5 {}\none left out\nr/report.html\n"
    asked = {"manifest": "data/open16k.csv", "tasks": ["2speech", "2sound"], "count": 3, "seed": 4}
    separators = {"a+b": {"models": "a,./b", "steps": 5}}
    assert seen.pop() == ({"evaluate": asked, "separators": separators}, Path("r"))
    assert run("evaluate", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"mean": 1.5}]
    recipe = tmp_path / "table.toml"
    recipe.write_text('[evaluate]\nmanifest = "m.csv"\n[separators.ours]\n[published.paper]\n2sound = { sdr = 3.0 }\n')
    assert run("evaluate", str(recipe), "--set", "separators.ours.steps=7", "--count", "2") == 0
    tables, out = seen.pop()
    assert tables["evaluate"] == {"manifest": "m.csv", "count": 2}
    assert tables["separators"] == {"ours": {"steps": 7}}
    assert out is None
    assert "{'2sound': {'sdr': 3.0}}" in capsys.readouterr().out
    assert run("evaluate", str(recipe), "--preset", "paper") == 2
    assert "--set separators.NAME.preset=paper" in capsys.readouterr().err


def test_doctor(capsys, monkeypatch):
    assert run("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["audiosep"] == audiosep.__version__
    assert facts["devices"][0].startswith("cpu")
    facts["extras"] = {"media": {"av": None}, "blind": {"scipy": "1.11"}}
    text = doctor.as_text(facts)
    assert "media: lacks av: pip install 'audiosep[media]'" in text
    assert "blind: complete" in text
    assert doctor._mismatch("2.11.0", "2.11.0") == []
    assert doctor._mismatch("2.11.0+cpu", "2.11.0+cpu") == []
    assert len(doctor._mismatch("2.12.1", "2.11.0")) == 1
    assert len(doctor._mismatch("2.11.0+cpu", "2.11.0")) == 1


def test_doctor_knows_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, packages in doctor.EXTRAS.items():
        assert [line.partition(">")[0] for line in extras[extra]] == list(packages)
    assert [line.partition(">")[0] for line in project["dependencies"]] == list(doctor.CORE)


def test_reports_are_plain_json(tmp_path):
    value = {"a": np.float32(1.5), "b": [np.nan, float("inf")], "c": (np.arange(2), Path("x"))}
    report.write_json(tmp_path / "r.json", value)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written == {"a": 1.5, "b": [None, None], "c": [[0, 1], "x"]}
