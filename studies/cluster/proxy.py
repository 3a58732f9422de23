"""Optuna's gRPC proxy in front of a database: connections, and seconds of storage calls, beside a direct connection.

mergefront does not speak to the proxy (see the README); what is measured here is Optuna's own storage interface.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from reality import connections
from sqlalchemy.exc import SQLAlchemyError

DIMENSIONS = 10
EACH = 2  # trials of a client
_SPACE = {f"x{i}": FloatDistribution(-0.2, 1.2) for i in range(DIMENSIONS)}


@dataclass(frozen=True)
class Calls:
    """One way to a storage: median milliseconds of a call by one client, and connections while many clients call.

    Attributes:
        history: of `get_all_trials` of `trials` trials, first and again. connections: None for SQLite.
    """

    way: str
    create: float
    tell: float
    history: tuple[float, float]
    trials: int
    clients: int
    connections: int | None
    rate: (
        float | None
    )  # trials created and told a second, all clients together; None if the server refused them


def measure_calls(url: str, clients: int, trials: int = 128) -> list[Calls]:
    """Direct connections, then through the proxy. Each client is a thread with a storage of its own."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    found = [_measured("direct", url, lambda: RDBStorage(url), clients, trials)]
    from optuna.storages import GrpcStorageProxy, get_storage
    from optuna.storages._grpc.server import make_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = make_server(get_storage(url), "127.0.0.1", port)
    server.start()
    try:
        proxy = lambda: GrpcStorageProxy(host="127.0.0.1", port=port)  # noqa: E731
        found.append(_measured("gRPC proxy", url, proxy, clients, trials))
    finally:
        server.stop(None).wait()
    return found


def _measured(way: str, url: str, make: Callable[[], Any], clients: int, trials: int) -> Calls:
    storage = make()
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    study_id = study._study_id
    creates, tells = [], []
    for _ in range(trials):
        begin = time.perf_counter()
        trial = _create(storage, study_id)
        creates.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        _tell(storage, trial)
        tells.append(time.perf_counter() - begin)
    reads = []
    fresh = make()
    for _ in range(2):
        begin = time.perf_counter()
        fresh.get_all_trials(study_id, deepcopy=False)
        reads.append(time.perf_counter() - begin)
    storages: list[Any] = []
    rate: float | None = None
    count, most, stop = connections(url), [0], threading.Event()

    def look() -> None:
        while count is not None and not stop.wait(0.02):
            most[0] = max(most[0], count())

    def work(storage: Any) -> None:
        for _ in range(EACH):
            _tell(storage, _create(storage, study_id))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(clients):
            storages.append(make())
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(work, storages))
        rate = EACH * clients / (time.perf_counter() - begin)
    except (SQLAlchemyError, StorageInternalError):  # too many clients
        pass
    finally:
        stop.set()
        looking.join()
    milliseconds = [1000.0 * statistics.median(part) for part in (creates, tells)]
    for one in (*storages, storage, fresh):
        one.remove_session()
        if isinstance(one, RDBStorage):
            one.engine.dispose()
    return Calls(
        way,
        milliseconds[0],
        milliseconds[1],
        (1000.0 * reads[0], 1000.0 * reads[1]),
        trials,
        clients,
        None if count is None else most[0],
        rate,
    )


def _create(storage: Any, study_id: int) -> int:
    template = create_trial(
        state=TrialState.RUNNING, params=dict.fromkeys(_SPACE, 0.5), distributions=dict(_SPACE)
    )
    return int(storage.create_new_trial(study_id, template_trial=template))


def _tell(storage: Any, trial: int) -> None:
    storage.set_trial_user_attr(trial, "evidence", "0" * 64)
    storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5, 0.5])
