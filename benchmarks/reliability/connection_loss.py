"""Restarts and cut connections under workers: how many die, and what is lost or done twice.

For each server, several processes work on one study with tensors through a proxy that cuts their connections,
before and after what they ask is carried out, while the server is stopped or killed and started again. Then a
single worker, of whose requests every one in turn loses its answer, must arrive where an undisturbed one does,
to the bit. Plain Optuna is beside it for comparison. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from _table import write_table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import optuna
from connection_losses import (
    Damage,
    campaign,
    compare_with_undisturbed,
    lose_each_answer,
    open_study,
)
from cutting_proxy import CuttingProxy
from servers import SERVERS, Server

from optuna_hypergrad import RetryingStorage

optuna.logging.set_verbosity(optuna.logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=200, help="over all servers")
    parser.add_argument("--restarts", type=int, default=20, help="over all servers")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=list(SERVERS), choices=SERVERS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failures = 0
    cuts, restarts = (n // len(arguments.kinds) for n in (arguments.cuts, arguments.restarts))
    with tqdm(total=2 * len(arguments.kinds) * (cuts + restarts)) as bar:
        for kind in arguments.kinds:
            server = SERVERS[kind]()
            try:
                for plain in (False, True):
                    with tempfile.TemporaryDirectory() as directory:
                        damage = campaign(
                            server,
                            Path(directory),
                            workers=arguments.workers,
                            cuts=cuts,
                            restarts=restarts,
                            plain=plain,
                            tick=bar.update,
                        )
                    rows.append(_row(kind, arguments.workers, damage, plain))
                    failures += 0 if plain else damage.failures
                    for error in [] if plain else damage.errors:
                        tqdm.write(f"{kind}:\n{error}", file=sys.stderr)
                for request in (b"COMMIT", b""):
                    row, differences = _each_answer(kind, server, request)
                    rows.append(row)
                    failures += differences
            finally:
                server.close()
    write_table(
        __file__,
        "Restarted servers and cut connections: no worker dies, no trial is lost, no step is done twice",
        rows,
        [
            "lost: trials that a worker had finished and that are not stored as it finished them",
            "doubled: steps worked on twice, and trials that no worker knows of",
            "every answer in turn: in the k-th trial of one worker, the answer to the k-th commit (request) is "
            "lost; failures are attributes, values and tensors that differ from an undisturbed study's",
            "plain Optuna: RDBStorage and TPESampler; the campaign ends when all of its workers are dead",
        ],
    )
    return int(failures > 0)


def _row(kind: str, workers: int, damage: Damage, plain: bool) -> dict[str, Any]:
    return {
        "server": kind,
        "who": f"{workers} workers" + (", plain Optuna" if plain else ""),
        "cuts": damage.num_cuts,
        "restarts": damage.num_restarts,
        "trials": damage.num_trials,
        "dead workers": damage.dead_workers,
        "lost": damage.lost,
        "doubled": damage.doubled,
        "failures": damage.failures,
    }


def _each_answer(kind: str, server: Server, request: bytes) -> tuple[dict[str, Any], int]:
    with CuttingProxy(server.port) as proxy:
        study = open_study(RetryingStorage(proxy.url(server.new_database())))
        cuts = lose_each_answer(study, proxy, request)
        differences = compare_with_undisturbed(study)
    what = "commit" if request else "request"
    return {
        "server": kind,
        "who": f"1 worker, the answer to every {what} in turn",
        "cuts": cuts,
        "restarts": 0,
        "trials": len(study.trials),
        "dead workers": 0,
        "lost": 0,
        "doubled": 0,
        "failures": differences,
    }, differences


if __name__ == "__main__":
    sys.exit(main())
