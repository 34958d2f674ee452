import json
import zlib

import numpy as np
import pytest
import torch

from audiosep import hub
from audiosep.backbones.triple_path_unet import TriplePathUNet


def published_weights(golden, kind):
    """A state dict under the published names, filled as the references were."""
    state = {}
    for name, shape in json.loads((golden / "checkpoint_keys.json").read_text())[kind].items():
        scale = 0.02 if len(shape) < 2 else 0.7 / np.sqrt(np.prod(shape[1:]))
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


@pytest.mark.parametrize(("num_classes", "count"), [(50, 37_243_376), (1, 37_212_016)])
def test_default_arguments_are_the_published_size(num_classes, count):
    with torch.device("meta"):
        parameters = [torch.empty_like(p) for p in TriplePathUNet(num_classes).parameters()]
    assert sum(p.numel() for p in parameters) == count


@pytest.mark.parametrize(
    ("kind", "case", "n", "t", "label"),
    [
        ("sound", "2s", 32000, 20, 30),
        ("speech", "2s", 32000, 20, 0),
        pytest.param("sound", "4s", 64000, 149, 7, marks=pytest.mark.slow),
        pytest.param("speech", "4s", 64000, 149, 0, marks=pytest.mark.slow),
    ],
)
def test_imported_weights_compute_the_published_outputs(golden, kind, case, n, t, label):
    prior = hub.import_unasdiff({"model": {}, "ema": published_weights(golden, kind)})
    rng = np.random.default_rng(zlib.crc32(f"{kind}-{case}".encode()))
    x = torch.from_numpy(rng.standard_normal((1, n)).astype(np.float32))
    with torch.no_grad():
        output = prior.backbone(x, torch.tensor([t]), torch.tensor([label])).numpy()
    reference = np.load(golden / "triple_path_unet_reference.npz")[f"{kind}_{case}_output"]
    assert np.abs(output - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return TriplePathUNet(3, width=8, depth=(1, 1, 1, 1, 1), heads=2, condition_dim=16, squeeze=4, n_fft=126)


@pytest.mark.parametrize("n", [1, 62, 63, 64, 755, 756, 757, 1000, 1785, 4000])
def test_any_length_comes_back_whole(small, n):
    with torch.no_grad():
        output = small(torch.randn(2, n), torch.tensor([3, 150]))
    assert output.shape == (2, n)
    assert output.isfinite().all()


def test_no_label_is_the_null_row(small):
    x, t = torch.randn(2, 2000), torch.tensor([10, 20])
    with torch.no_grad():
        null = small(x, t)
        assert torch.equal(null, small(x, t, torch.tensor([3, 3])))
        assert not torch.allclose(null, small(x, t, torch.tensor([0, 1])), atol=1e-4)


def test_items_of_a_batch_do_not_touch(small):
    x, t, label = torch.randn(3, 3000), torch.tensor([5, 50, 150]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        together = small(x, t, label)
        alone = torch.cat([small(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_checkpointing_changes_no_gradient(small):
    gradients = []
    for small.checkpointing in (False, True):
        x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).requires_grad_()
        small(x, torch.tensor([9])).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_new_models_start_without_effect_and_masks_stay_below_one():
    options = dict(width=8, depth=(1, 1, 1, 1, 1), heads=2, condition_dim=16, squeeze=4, n_fft=126)
    fresh = TriplePathUNet(0, adaln_zero=True, patch=(1, 2), **options)
    x = torch.randn(1, 2000)
    with torch.no_grad():
        assert fresh(x, torch.tensor([9])).abs().max() == 0
        masked = TriplePathUNet(0, head="mask", **options)
        assert masked(x, torch.tensor([9])).square().sum() < x.square().sum()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        TriplePathUNet(n_fft=512)
    with pytest.raises(ValueError, match="head"):
        TriplePathUNet(head="both")
