"""The mean of two refiners' weights: of a run and of the checkpoint that it was started from.

What a run has forgotten of what it began with, the mean may still know (Mitchell Wortsman et al., "Robust fine-tuning
of zero-shot models", 2021, https://arxiv.org/abs/2109.01903). The statistics of the normalisations are averaged, too.
The card is the run's, with what the mean adds to held-out stems; `card.py` credits the recordings.

    python recipes/open16k/mean.py earlier/refiner runs/refiner --stems data/stems-valid -o runs/mean
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from audiosep import hub, recipe
from audiosep.fit import RefinerProbe
from audiosep.refiner import Refiner


def between(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two states; what is counted is the other's."""
    return {key: (one[key] + x) / 2 if x.is_floating_point() else x for key, x in other.items()}


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="a checkpoint")
    parser.add_argument("later", type=Path, help="one of a run that was started from it")
    parser.add_argument("--stems", default="data/stems-valid", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    earlier, refiner = (hub.load_model(path.absolute()) for path in (options.earlier, options.later))
    if not isinstance(refiner, Refiner) or type(earlier) is not Refiner or earlier.config != refiner.config:
        raise SystemExit(
            f"{options.earlier} and {options.later} are not two refiners of one size with the same classes"
        )
    probe = RefinerProbe(options.stems)
    refiner.load_state_dict(between(earlier.state_dict(), refiner.state_dict()))
    facts = {key: value for key, value in hub.read_config(options.later).items() if key in ("data", "training")}
    facts["training"] |= {"mean with": f"{options.earlier.name} ({earlier.origin['sha256'][:12]})"}
    facts["metrics"] = probe.metrics([{f"probe/{key}": value for key, value in probe(refiner, 0, None).items()}])
    words = recipe.load(Path(__file__).parent / "refiner.toml")["card"]
    print(hub.save_model(refiner, options.output, words | facts))


if __name__ == "__main__":
    main()
