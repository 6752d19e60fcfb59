"""The long part of the fault suite: `python -m tests.faults [--minutes N] [--only NAME] …`."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Campaign, CampaignOptions

CAMPAIGNS = {"crash": 3.0, "network": 2.0, "load": 2.0, "soak": 1.5, "fuzz": 1.0}
"""The modules of `tests.faults` with a campaign, in order, each with its share of the time."""

BY_NAME_ONLY = {"day": 1.0, "troubles": 1.0}
"""Those that run only if `--only` names them: they need root, and many programs or a fixed time."""


def campaign_of(name: str) -> Campaign:
    campaign: Campaign = importlib.import_module(f"tests.faults.{name}").campaign
    return campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all campaigns together (10)")
    parser.add_argument(
        "--only",
        choices=[*CAMPAIGNS, *BY_NAME_ONLY],
        action="append",
        help="run this campaign alone; may be repeated",
    )
    parser.add_argument("--archives", type=int, help="archives of the load campaign, however long it takes")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="repeat this run")
    arguments = parser.parse_args()
    chosen = arguments.only or [*CAMPAIGNS]
    shares = CAMPAIGNS | BY_NAME_ONLY
    print(f"seed {arguments.seed}", flush=True)
    broken = 0
    for name in chosen:
        share = arguments.minutes * 60 * shares[name] / sum(shares[other] for other in chosen)
        with tempfile.TemporaryDirectory(prefix="backupd-faults-") as base:
            Path(base).chmod(0o755)  # some cases run as another user
            began = time.monotonic()
            options = CampaignOptions(Path(base), began + share, arguments.seed, arguments.archives)
            report = campaign_of(name)(options)
        seconds = time.monotonic() - began
        print(f"{name}: {report.tried} cases, {report.held} held, {seconds:.0f} s", flush=True)
        for figure, value in report.figures.items():
            print(f"  {figure}: {value}", flush=True)
        for fault in report.broken:
            print(f"  BROKEN {fault}", flush=True)
        broken += len(report.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
