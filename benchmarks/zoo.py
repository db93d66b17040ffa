"""What the models of the literature in examples/zoo/ reach on a real log, beside the dot products of `criteo-small`.

    python benchmarks/zoo.py train.txt --folder zoo --seeds 10

All train with the settings of criteo-small, which suit the dot products, but for DeepFM and the ensemble, whose
files say others; see benchmarks/better.py for how they are judged, and for resuming.
"""

import re

from better import ZOO, Variant, decay, ensemble, main

SETTINGS = {
    "deepfm": {"model.table_init_scale": 0.1, "table_optimizer.learning_rate": 0.02},
    "ensemble": (ensemble(5) | decay(0.03)).settings,
}


def models() -> dict[str, Variant]:
    """Each file's last class, by the name of the file."""
    found = {"dot": Variant()}
    for path in sorted(ZOO.glob("*.py")):
        *_, name = re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
        found[path.stem] = Variant(SETTINGS.get(path.stem, {}), f"{path}:{name}")
    return found


if __name__ == "__main__":
    main(models(), __doc__)
