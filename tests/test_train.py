"""The training loop, on a small model that draws noise: resumed runs, killed runs, full disks, two processes."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from audiosep import train as module
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.compiling import compile_blocks
from audiosep.errors import AudiosepError, UsageError
from audiosep.prior import Prior
from audiosep.schedules import ve
from audiosep.train import LOG, STATE, Options, read_log, train

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")
ROOT = Path(__file__).parents[1]


class Numbers(torch.utils.data.Dataset):
    """Item i is a pure function of i."""

    def __init__(self, count=10**6):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.sin(torch.arange(6.0) * (index + 1))}


class Model(nn.Module):
    """Denoise, with each item's own noise; and a batch norm's buffers, to see that they are kept."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def loss(self, batch):
        self.count += 1
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in batch["seed"]]
        return (self.net(batch["x"] + torch.stack(rows)) - batch["x"]).square().mean(-1)


def level(batch):
    return torch.tensor([(0.618 * i) % 1 for i in batch["index"]])


def options(**changes):
    return Options(**{"max_steps": 12, "log_every": 2, "save_every": 5, "probe_every": 0, "warmup": 3} | changes)


def go(folder, model=None, **changes):
    names = ("save", "probe", "about", "start", "resume", "progress", "stop_minutes", "level")
    call = {name: changes.pop(name) for name in names if name in changes}
    data = changes.pop("data", Numbers())
    return train(model or Model(), data, folder, options(**changes), device="cpu", **({"level": level} | call))


def following(folder):
    """The step that a run of this folder takes first."""
    return module._read(folder / STATE)[0]["step"] + 1 if (folder / STATE).exists() else 1


def go_on(folder, model=None, **changes):
    """Resume a run and see that it begins after its state: one that began anew would have the same losses."""
    shown, first = [], following(folder)
    result = go(folder, model, resume=True, progress=lambda done, *_: shown.append(done), **changes)
    assert shown[0] == first > 1
    return result


def losses(folder):
    return [(row["step"], row["loss"], row.get("loss/level_3")) for row in read_log(folder) if "loss" in row]


def test_a_run_learns_logs_and_averages(tmp_path):
    seen, saved, shown = [], [], []

    def probe(average, step, board):
        seen.append((step, average.net[0].weight.clone()))
        return {"held_out": 1.0}

    model = Model()
    result = go(
        tmp_path,
        model,
        max_steps=60,
        probe_every=25,
        probe=probe,
        save=lambda average, facts: saved.append((facts["step"], facts["final"], average)),
        progress=lambda *told: shown.append(told),
        learning_rate=1e-2,
    )
    assert (result["finished"], result["step"]) == (True, 60)
    assert result["loss"] < 0.7 * losses(tmp_path)[0][1]
    assert [step for step, _ in seen] == [0, 25, 50, 60]
    assert [told[:2] for told in saved] == [*((step, False) for step in range(5, 65, 5)), (60, True)]
    average = saved[-1][2]
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    assert average.count == 60
    assert not torch.equal(average.net[0].weight, model.net[0].weight)
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows if "probe/held_out" in row] == [0, 25, 50, 60]
    assert rows[1].keys() >= {"loss", "gradient", "learning_rate", "items_per_second", "waiting_for_data", "minutes"}
    assert shown[-1][:2] == (60, 60)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_probe_that_fails_later_does_not_end_the_run(tmp_path, caplog):
    def probe(average, step, board):
        if step in broken:
            raise RuntimeError("out of memory")
        return {}

    broken = [4]
    assert go(tmp_path / "a", probe=probe, probe_every=4)["finished"]
    assert "step 4 can't be probed, training goes on: out of memory" in caplog.text
    broken = [0]
    with pytest.raises(RuntimeError, match="out of memory"):
        go(tmp_path / "b", probe=probe, probe_every=4)


def test_a_run_ends_with_its_items(tmp_path):
    result = go(tmp_path, max_steps=None, max_minutes=60, data=Numbers(22))
    assert (result["step"], result["finished"]) == (5, True)


def test_the_average_is_the_recursion_with_a_warm_up():
    averaged, weights = [torch.zeros(3), torch.zeros((), dtype=torch.long)], [torch.ones(3), torch.tensor(4)]
    module._follow(averaged, weights, 0.75)
    torch.testing.assert_close(averaged[0], torch.full((3,), 0.25))
    assert averaged[1] == 4


def test_the_schedule_follows_the_nearer_budget():
    by_steps = Options(max_steps=100, warmup=10, learning_rate=1.0, floor=0.0)
    assert by_steps.rate(0, 0.0) == pytest.approx(0.1)
    assert by_steps.rate(50, by_steps.fraction(50, 1e9)) == pytest.approx(0.5)
    both = Options(max_steps=100, max_minutes=2, warmup=0)
    assert both.fraction(10, 60.0) == pytest.approx(0.5)
    assert both.fraction(90, 60.0) == pytest.approx(0.9)
    assert Options(max_steps=9, decay="constant", warmup=0).rate(8, 0.9) == 1e-3
    for wrong in ({}, {"decay": "none"}, {"precision": "int8"}, {"batch_size": 0}, {"ema": 1.0}):
        with pytest.raises(UsageError):
            Options(**({"max_steps": 3} if wrong else {}) | wrong)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = Model()
    go(whole, first, precision=precision)
    stopped = iter([False] * 7)

    class Stop(Exception):
        pass

    def progress(*_):
        if next(stopped, None) is None:
            raise Stop

    with pytest.raises(Stop):  # at step 8: the state is that of step 5, between two rows of the log
        go(parts, progress=progress, precision=precision)
    assert losses(parts)[-1][0] == 8
    second = Model()
    go_on(parts, second, precision=precision)
    assert losses(parts) == losses(whole)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    go_on(parts, max_steps=14, precision=precision)
    assert losses(parts)[-1][0] == 14


def test_accumulating_and_workers_change_nothing(tmp_path):
    go(tmp_path / "a")
    go(tmp_path / "b", accumulate=4)
    go(tmp_path / "c", workers=2)
    one = torch.tensor([loss for _, loss, _ in losses(tmp_path / "a")])
    torch.testing.assert_close(torch.tensor([loss for _, loss, _ in losses(tmp_path / "b")]), one)
    assert losses(tmp_path / "c") == losses(tmp_path / "a")


def test_what_cannot_be_resumed_is_refused(tmp_path):
    go(tmp_path, max_steps=5, about={"data": "one"})
    with pytest.raises(UsageError, match="--resume"):
        go(tmp_path, max_steps=5)
    with pytest.raises(UsageError, match="batch_size 4, here 8"):
        go(tmp_path, batch_size=8, resume=True, about={"data": "one"})
    with pytest.raises(UsageError, match="data 'one', here 'other'"):
        go(tmp_path, resume=True, about={"data": "other"})
    with pytest.raises(UsageError, match="another network"):  # but not for what the state says nothing of
        go(tmp_path, nn.Linear(2, 2), resume=True, about={"data": "one", "more": 2})
    wider = Model()
    wider.net[2] = nn.Linear(8, 6, bias=False)
    with pytest.raises(UsageError, match="another network"):
        go(tmp_path, wider, resume=True, about={"data": "one"})
    (tmp_path / STATE).write_bytes(b"rubbish")
    with pytest.raises(UsageError, match="not the state of a run"):
        go(tmp_path, resume=True)
    with pytest.raises(UsageError, match="3 micro-batches"):
        go(tmp_path / "new", accumulate=3)
    with pytest.raises(UsageError, match="has 10 items, the run needs 48"):
        go(tmp_path / "new", data=Numbers(10))


def test_a_resumed_run_remembers_its_start(tmp_path):
    told = []
    call = {"save": lambda average, facts: told.append(facts["start"]), "resume": True}
    go(tmp_path / "a", max_steps=5, start={"from": "one"}, **call)
    go(tmp_path / "a", max_steps=7, **call)
    go(tmp_path / "a", max_steps=9, start={"from": "one"}, **call)
    with pytest.raises(UsageError, match="a run with start from one, here from two; resume it without start"):
        go(tmp_path / "a", start={"from": "two"}, **call)
    assert told[-1] == {"from": "one"} == told[0]
    go(tmp_path / "b", max_steps=5, **call)
    with pytest.raises(UsageError, match="a run with start none, here from one; resume it without start"):
        go(tmp_path / "b", start={"from": "one"}, **call)
    facts, tensors = module._read(tmp_path / "b" / STATE)
    del facts["start"]  # as an older version wrote it: what it is told first it keeps
    module._write(tmp_path / "b" / STATE, tensors, facts)
    go_on(tmp_path / "b", max_steps=7, start={"from": "one"}, save=call["save"])
    go_on(tmp_path / "b", max_steps=9, save=call["save"])
    assert told[-1] == {"from": "one"}


def test_a_resumed_run_remembers_its_settings(tmp_path):
    told = []
    for steps, rate in ((5, 1.0), (7, 1.0), (9, 2.0), (9, 1.0), (11, 3.0)):  # at step 9 nothing was left to do with 1.0
        go(
            tmp_path,
            max_steps=steps,
            learning_rate=rate,
            resume=True,
            save=lambda average, facts: told.append([[step, row["learning_rate"]] for step, row in facts["settings"]]),
        )
    assert told[-1] == [[0, 1.0], [7, 2.0], [9, 3.0]]
    facts, tensors = module._read(tmp_path / STATE)
    del facts["settings"]  # as an older version wrote it
    module._write(tmp_path / STATE, tensors, facts)
    go_on(tmp_path, max_steps=12)
    assert module._read(tmp_path / STATE)[0]["settings"][0][0] == 11


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_a_resumed_run_lets_go_of_the_state_that_it_read(tmp_path):
    def progress(*_):
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()

    go(tmp_path, max_steps=5)
    go(tmp_path, max_steps=8, resume=True, progress=progress)


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch, caplog):
    go(tmp_path, max_steps=5)
    good = (tmp_path / STATE).read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AudiosepError, match=r"step 12 can't be written.*No space left"):
        go(tmp_path, resume=True)
    assert "step 10 can't be written, training goes on" in caplog.text
    assert (tmp_path / STATE).read_bytes() == good
    assert not list(tmp_path.glob(".*partial"))
    monkeypatch.undo()
    go_on(tmp_path)
    assert losses(tmp_path)[-1][0] == 12


def test_a_board_that_cannot_be_written_is_made_anew(tmp_path, monkeypatch, caplog):
    def broken(self, *_):
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", broken)
    assert go(tmp_path)["finished"]
    assert "TensorBoard's file can't be written" in caplog.text
    assert len(losses(tmp_path)) == 6


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    go(tmp_path, max_steps=5)
    good = (tmp_path / STATE).read_bytes()
    model = Model()
    model.loss = lambda batch: model.net(batch["x"]).mean(-1) * float("nan")
    with pytest.raises(AudiosepError, match="not finite"):
        go(tmp_path, model, resume=True)
    assert (tmp_path / STATE).read_bytes() == good


def test_a_budget_of_time_ends_a_run_and_a_pause_does_not(tmp_path):
    result = go(tmp_path / "a", max_steps=None, max_minutes=0.3 / 60)
    assert result["finished"]
    assert result["step"] >= 1
    paused = go(tmp_path / "b", max_steps=10**5, stop_minutes=0.2 / 60)
    assert not paused["finished"]
    assert 1 <= paused["step"] < 10**5
    assert (tmp_path / "b" / STATE).exists()


def test_a_signal_ends_a_run_in_good_order(tmp_path):
    def progress(done, total, message):
        if done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    assert go(tmp_path, progress=progress)["step"] == 7
    assert go_on(tmp_path)["finished"]
    go(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_blocks_of_many_widths_are_all_compiled():
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + self.linear(x).tanh()

    model = nn.Module()
    model.blocks = nn.ModuleList(Block(width) for width in range(1, 21))
    names = list(model.state_dict())
    torch._dynamo.reset()
    compile_blocks(model, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for width, block in enumerate(model.blocks, 1):
            x = torch.ones(2, width)
            torch.testing.assert_close(block(x), x + block.linear(x).tanh())
    assert list(model.state_dict()) == names
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu(tmp_path, precision):
    torch.manual_seed(0)
    net = TriplePathUNet(3, width=32, depth=(1, 1, 1, 1, 1), heads=2, patch=(4, 4), head="mask", adaln_zero=True)
    prior = Prior(net, ve(), parameterization="edm", classes=list("abc"))

    class Tones(Numbers):
        def __getitem__(self, index):
            wave = 0.1 * torch.sin(0.01 * (1 + index % 7) * torch.arange(8000.0) + index)
            return {"wave": wave, "label": index % 4}

    chosen = Options(
        max_steps=60,
        batch_size=8,
        precision=precision,
        compile=precision == "bf16",
        workers=2,
        log_every=10,
        save_every=30,
        probe_every=0,
        warmup=10,
    )
    result = train(prior, Tones(), tmp_path, chosen, level=lambda batch: prior.steps_of(batch["index"]) / 199)
    assert result["loss"] < 0.9 * losses(tmp_path)[0][1]
    shown = []
    assert train(prior, Tones(), tmp_path, chosen, resume=True, progress=lambda *told: shown.append(told))["step"] == 60
    assert not shown


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import test_train
def progress(done, total, message):
    print(done, flush=True)
test_train.go(sys.argv[1], resume=True, progress=progress, **eval(sys.argv[2]))
"""


def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    return path


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    torch.set_num_threads(1)
    folder, path = tmp_path / "killed", script(tmp_path)
    go(tmp_path / "whole", max_steps=200, save_every=3)
    command = [sys.executable, str(path), str(folder), "{'max_steps': 200, 'save_every': 3, 'workers': 1}"]
    for kill_at in (4, 61, 133):
        first = following(folder)
        assert (first > 1) == (kill_at > 4)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert int(process.stdout.readline()) == first
            for line in process.stdout:
                if int(line) >= kill_at:
                    time.sleep(0.01)  # anywhere within a step or a save
                    process.kill()
                    break
            process.wait()
        assert process.returncode == -signal.SIGKILL
    first = following(folder)
    last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert int(last.stdout.split()[0]) == first > 130
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path):
    folder, path = tmp_path / "two", script(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    for budget in (7, 12):  # the second launch resumes
        changes = {"max_steps": budget, "decay": "constant", "save_every": 7}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        launch = partial(
            subprocess.run, [*command, str(folder), repr(changes)], env=environment, stdout=subprocess.PIPE, text=True
        )
        first = following(folder)
        assert first == {7: 1, 12: 8}[budget]
        launched = launch()
        assert int(launched.stdout.split()[0]) == first
        # torch's threads sometimes abort a process at its very end; the same launch then goes on where it was.
        if launched.returncode:
            launch(check=True)
    go(tmp_path / "constant", decay="constant")
    two, one = read_log(folder), read_log(tmp_path / "constant")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for key in ("loss", "gradient"):
        ours, theirs = ([row[key] for row in rows] for rows in (two, one))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))
    averages = [module._read(path / STATE)[1] for path in (folder, tmp_path / "constant")]
    for name in averages[0]:
        torch.testing.assert_close(averages[0][name], averages[1][name], rtol=1e-4, atol=1e-6)
    assert json.loads((folder / LOG).read_text().splitlines()[0])["step"] == 2


@pytest.mark.slow
def test_processes_that_see_different_states_do_not_go_on(tmp_path):
    go(tmp_path / "0", max_steps=2)  # what the first machine has; the second has nothing
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script(tmp_path)), str(tmp_path / rank), "{}"],
            env=os.environ | common | {"RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            told = process.communicate(timeout=300)[1]
            assert process.returncode
            assert "would go on from steps 2, 0; the run's folder has to be one that all of them see" in told
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_compiled_network_has_the_losses_of_the_plain_one():
    torch.manual_seed(0)
    net = TriplePathUNet(3, width=16, depth=(2, 2, 2, 2, 2), heads=2, patch=(4, 4), head="mask")
    prior = Prior(net, ve(), parameterization="edm", classes=list("abc"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batches = [
        {"wave": 0.07 * torch.randn(2, n), "label": torch.tensor([0, 3]), "index": [5, 6], "seed": [7, 8]}
        for n in (4000, 9000)
    ]
    plain = [prior.loss(batch) for batch in batches]
    compile_blocks(prior, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch, expected in zip(batches, plain):
            torch.testing.assert_close(prior.loss(batch), expected)
            prior.loss(batch).mean().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
