"""Record the golden loss curves: `python tests/golden/make_curves.py [--device cuda] [NAME ...]`.

Do so after a change of numerics that is meant, and say in the change what moved and why. Each curve
is computed twice; how far the two are apart is printed, and belongs well inside the tolerance.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from curves import CONFIGURATIONS, CURVES, curve, recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CONFIGURATIONS], help="all by default")
    parser.add_argument("--device", default="cpu", help="whose curves are recorded by default")
    parser.add_argument("--once", action="store_true", help="do not compute curves again")
    arguments = parser.parse_args()
    chosen = arguments.names or [
        name for name, its in CONFIGURATIONS.items() if its.device == arguments.device
    ]
    for name in chosen:
        configuration = CONFIGURATIONS[name]
        if configuration.missing:
            sys.stdout.write(f"{name}: left out: {configuration.missing}\n")
            continue
        started = time.perf_counter()
        before, losses = recorded(name), curve(configuration)
        taken = time.perf_counter() - started
        again = losses if arguments.once else curve(configuration)
        moved = "new" if before is None else f"moved by {apart(losses, before):.2g}"
        sys.stdout.write(
            f"{name}: {losses[0]:.4f} to {losses[-1]:.4f} in {taken:.0f} s; {moved}; "
            f"again, {apart(losses, again):.2g} apart\n"
        )
        sys.stdout.flush()
        on_gpu = configuration.device == "cuda"
        made = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "losses": [round(loss, 6) for loss in losses],
        }
        (CURVES / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def apart(one: list[float], other: list[float]) -> float:
    """Return the largest difference between two curves at the same step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
