"""The `learn` command: folders to checkpoints that separate what they were learned from; bad folders and tables."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from typer.testing import CliRunner

from audiosep import learn
from audiosep.cli import app
from audiosep.errors import UsageError
from audiosep.metrics import si_sdr
from audiosep.separator import Separator

RATE = 4000


def sounds(rng, seconds):
    """A hum of two low partials with drifting phase, and a high hiss."""
    time = np.arange(round(seconds * RATE)) / RATE
    hum = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in (200.0, 320.0))
    white = np.fft.rfft(rng.standard_normal(len(time)))
    white[: len(white) * 2 // 3] = 0
    hiss = np.fft.irfft(white, n=len(time))
    return 0.1 * hum, 0.1 * hiss / hiss.std()


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
        for i in range(3):
            hum, hiss = sounds(rng, 2.0)
            sf.write(tmp_path / name / f"{i}.wav", hum + (hiss if name == "both" else 0), RATE, subtype="FLOAT")
    return tmp_path


def tables(folder, **views):
    return {
        "learn": {"sample_rate": RATE, "block": 32, "laps": 1},
        "plan": {"max_steps": 300, "batch_size": 256, "steps": 12, "sigma_max": 1.5, "start_laps": 30, "rows": 4096},
        "backbone": {"name": "mlp", "width": 64, "depth": 2},
        "sources": {"hum": {"covariance": "full"}, "hiss": {"covariance": "full"}},
        "views": {
            "alone": {"folder": str(folder / "alone"), "gains": {"hum": 1.0}},
            "both": {"folder": str(folder / "both"), "gains": {"hum": 1.0, "hiss": 1.0}},
            **views,
        },
    }


def as_toml(tables):
    lines = []
    for name, table in tables.items():
        nested = {key: value for key, value in table.items() if isinstance(value, dict)}
        for key, value in nested.items() or [(None, table)]:
            lines.append(f"[{name}.{key}]" if key else f"[{name}]")
            for setting, item in value.items():
                shown = "{" + ", ".join(f"{k} = {v}" for k, v in item.items()) + "}" if isinstance(item, dict) else None
                lines.append(f"{setting} = {shown or json.dumps(item)}")
    return "\n".join(lines)


def long_blocks(folder):
    """Spectra per frame to start from, and networks of Wiener gains."""
    read = tables(folder)
    read["learn"] = {"sample_rate": RATE, "laps": 1, "block": 1024}
    read["plan"] = {"max_steps": 150, "batch_size": 8, "steps": 8, "rows": 8}
    read["backbone"] = {"width": 24, "depth": 1}
    read["sources"] = {name: {"components": 2} for name in ("hum", "hiss")}
    return read


@pytest.mark.parametrize("made", [tables, long_blocks])
def test_what_was_never_alone_is_learned_and_separated(folders, made):
    file = folders / "views.toml"
    file.write_text(as_toml(made(folders)))
    result = CliRunner().invoke(app, ["learn", str(file), "-o", str(folders / "priors"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    assert [(row["stage"], row["lap"]) for row in facts["laps"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert facts["warnings"] == []
    assert (folders / "priors" / "report.html").stat().st_size > 10_000
    hum, hiss = sounds(np.random.default_rng(9), 2.0)
    separator = Separator.from_pretrained(facts["checkpoints"], device="cpu", sampler="mmps-exact", samples=2)
    stems = separator((hum + hiss)[None].astype(np.float32), RATE).sources
    for name, truth in (("hum", hum), ("hiss", hiss)):
        truth = torch.from_numpy(truth).float()
        assert si_sdr(torch.from_numpy(stems[name][0]), truth) > 4, name  # 0 dB in the mixture
    # Nothing is left to do for the same command; another seed is another run.
    again = CliRunner().invoke(app, ["learn", str(file), "-o", str(folders / "priors"), "--json"])
    assert json.loads(again.stdout.splitlines()[-1])["laps"] == facts["laps"]
    other = CliRunner().invoke(app, ["learn", str(file), "-o", str(folders / "priors"), "--set", "plan.seed=13"])
    assert other.exit_code == 2
    assert "different seed" in other.stderr


def test_recordings_that_can_not_be_used_are_named_and_left_out(folders, caplog):
    sf.write(folders / "both" / "bad.wav", np.array([0.1, np.nan] * 100), RATE, subtype="FLOAT")
    sf.write(folders / "both" / "short.wav", np.zeros(20), RATE)
    sf.write(folders / "both" / "stereo.wav", np.zeros((400, 2)), RATE)
    (folders / "both" / "text.wav").write_text("no sound")
    read = tables(folders)
    views, left_out = learn.read_views(read["views"], ["hum", "hiss"], learn.Settings(RATE, 32))
    reasons = {path.rsplit("/")[-1]: reason for path, reason in left_out.items()}
    assert set(reasons) == {"bad.wav", "short.wav", "stereo.wav", "text.wav"}
    assert reasons["bad.wav"].startswith("holds NaN")
    assert "2 channels" in reasons["stereo.wav"]
    assert len(views[1].y) == 3 * (2 * RATE // 32)
    assert "bad.wav: left out" in caplog.text


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"folder": "alone"}, "has to be known"),
        ({"folder": "alone", "gains": {}}, "has to be known"),
        ({"folder": "alone", "gains": {"dog": 1.0}}, "dog: no such source"),
        ({"folder": "alone", "gains": {"hum": [1.0, 0.5], "hiss": 1.0}}, "different numbers of channels"),
        ({"folder": "alone", "gains": {"hum": [1.0, 0.5]}}, "can be used; .*0.wav: it has 1 channels"),
        ({"folder": "alone", "gains": {"hum": "loud"}}, "finite numbers.*hum = 'loud'"),
        ({"folder": "alone", "gains": {"hum": [[1.0], [1.0, 0.5]]}}, "finite numbers"),
        ({"folder": "alone", "gains": {"hum": []}}, "finite numbers"),
        ({"folder": "alone", "gains": {"hum": True}}, "finite numbers"),
        ({"folder": "alone", "gains": {"hum": 0.0}}, "all gains are 0"),
        ({"folder": "alone", "gains": {"hum": float("nan")}}, "finite"),
        ({"folder": "nowhere", "gains": {"hum": 1.0}}, r"views.x\]: .*nowhere: no such folder"),
        ({"folder": "empty", "gains": {"hum": 1.0}}, r"views.x\]: .*no recordings in this directory"),
        ({"folder": "silent", "gains": {"hum": 1.0}}, r"views.x\]: all recordings in .* are silent"),
    ],
)
def test_views_that_do_not_fit_are_refused(folders, view, message):
    (folders / "empty").mkdir()
    (folders / "silent").mkdir()
    sf.write(folders / "silent" / "0.wav", np.zeros(400), RATE)
    view = {**view, "folder": str(folders / view["folder"])}
    with pytest.raises(UsageError, match=message):
        learn.read_views({"x": view}, ["hum", "hiss"], learn.Settings(RATE, 32))


def test_tables_that_are_no_tables_are_refused(folders):
    with pytest.raises(UsageError, match=r"\[views.x\] takes folder"):
        learn.read_views({"x": 3}, ["hum"], learn.Settings(RATE, 32))
    for changed, message in (
        ({"learn": {"noise_db": float("-inf")}}, "noise_db is from -80 to 0"),
        ({"learn": {"noise_db": float("nan")}}, "noise_db is a number, got nan"),
        ({"learn": {"block": 64.5}}, "learn.block is a whole number or left out, got 64.5"),
        ({"plan": {"tau": -1.0}}, "tau is above 0"),
        ({"plan": {"steps": "many"}}, "plan.steps is a whole number, got 'many'"),
        ({"plan": {"seed": 1.5}}, "plan.seed is a whole number, got 1.5"),
        ({"plan": {"fresh": "yes"}}, "plan.fresh is true or false, got 'yes'"),
        ({"plan": {"again": [0.1]}}, r"plan.again is a number or left out, got \[0.1\]"),
        ({"plan": {"sigma_max": float("inf")}}, "sigma_max is above 0 and finite"),
        ({"plan": {"ema": 2.0}}, "ema is at least 0 and below 1"),
        ({"sources": {"hum": {"rank": 0}, "hiss": {}}}, "sources.hum.: rank is at least 1, got 0"),
        ({"views": 3}, "views"),
        ({"sources": ["hum"]}, "sources"),
        ({"sources": {"hum": 3, "hiss": {}}}, "sources.hum"),
    ):
        with pytest.raises(UsageError, match=message):
            learn.run({**tables(folders), **changed}, folders / "priors")


def test_sources_are_learned_one_after_the_other_where_views_allow_it(folders):
    views, _ = learn.read_views(tables(folders)["views"], ["hum", "hiss"], learn.Settings(RATE, 32))
    assert [(stage.learn, stage.views) for stage in learn.stages_of(views, ["hum", "hiss"], 2)] == [
        (("hum",), ("alone",)),
        (("hiss",), ("both",)),
    ]
    together = learn.stages_of(views[1:], ["hum", "hiss"], 2)
    assert [(stage.learn, stage.views) for stage in together] == [(("hum", "hiss"), ("both",))]
