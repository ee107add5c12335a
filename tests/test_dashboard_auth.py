"""A tracking server that asks for a password: MLflow's own basic-auth app."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flask_wtf", reason="MLflow's basic-auth app needs it: pip install 'mlflow[auth]'")

from dashboard_stores import Server, log, make_store
from mlflow import MlflowClient
from zolightning_dashboard.source import RestSource, SourceError

pytestmark = pytest.mark.integration

SECRET = "long-and-secret-1234"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Knows one user, ``kim``, and has a run."""
    folder: Path = tmp_path_factory.mktemp("auth")
    make_store(folder / "store.db")
    config = folder / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\nadmin_username = kim\n"
        f"admin_password = {SECRET}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    found = Server(
        folder / "store.db",
        ("--app-name", "basic-auth"),
        {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for a test"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "kim")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        found.start()
        try:
            client = MlflowClient(found.url)
            run = client.create_run("0", run_name="behind a password").info.run_id
            log(client, run, "loss", [(1, 1000, 0.5), (2, 2000, 0.25)])
            client.log_text(run, "hello", "samples/one.txt")
            patch.undo()
            yield found
        finally:
            found.stop()


def test_user_and_password_in_the_address(server: Server) -> None:
    source = RestSource(server.url.replace("://", f"://kim:{SECRET}@"))
    (run,) = source.runs([one.id for one in source.experiments()])
    assert run.name == "behind a password"
    assert source.series(run.id, "loss").value.tolist() == [0.5, 0.25]
    assert [(one.path, one.size) for one in source.artifacts(run)] == [("samples/one.txt", 5)]
    assert source.artifact(run, "samples/one.txt", 100) == b"hello"
    source.close()


def test_user_and_password_as_mlflow_s_own_client_takes_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "kim")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    source = RestSource(server.url)
    assert len(source.runs([one.id for one in source.experiments()])) == 1
    source.close()


@pytest.mark.parametrize("user", ["", "kim:wrong-and-long@", f"someone:{SECRET}@"])
def test_a_refusal_is_said_without_the_password(user: str, server: Server) -> None:
    with pytest.raises(SourceError, match="401") as error:
        RestSource(server.url.replace("://", f"://{user}"))
    assert SECRET not in str(error.value) and "wrong-and-long" not in str(error.value)
