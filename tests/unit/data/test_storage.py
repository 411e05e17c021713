import pytest

from cellray.core.errors import ConfigError
from cellray.data import storage
from cellray.data.soma import open_store

SERVER = {
    "vfs.s3.endpoint_override": "localhost:9000",
    "vfs.s3.scheme": "http",
    "vfs.s3.use_virtual_addressing": "false",
}


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "key",
    [
        "vfs.s3.aws_secret_access_key",
        "vfs.s3.aws_access_key_id",
        "vfs.s3.aws_session_token",
        "vfs.s3.proxy_password",
        "vfs.azure.storage_account_key",
        "vfs.azure.storage_sas_token",
        "rest.token",
    ],
)
def test_secrets_are_refused_and_not_repeated(key):
    with pytest.raises(
        ConfigError, match=f"tiledb '{key}' is a secret.*set it in the env"
    ) as found:
        storage.settings({key: "hunter2"})
    assert "hunter2" not in str(found.value)


def test_a_password_in_an_address_is_a_secret():
    with pytest.raises(ConfigError, match="'vfs.s3.endpoint_override' is a secret"):
        storage.settings({"vfs.s3.endpoint_override": "http://me:hunter2@localhost:9000"})


def test_an_unknown_setting_suggests_one():
    with pytest.raises(ConfigError, match=r"'vfs.s3.regoin'. Did you mean 'vfs.s3.region'\?"):
        storage.settings({"vfs.s3.regoin": "us-west-2"})
    with pytest.raises(ConfigError, match=r"no setting 'sm.nosuch'"):
        open_store("/nowhere", tiledb={"sm.nosuch": "1"})


def test_an_address_with_its_scheme_is_a_whole_server():
    given = {"vfs.s3.endpoint_override": "http://localhost:9000"}
    assert dict(storage.settings(given)) == SERVER
    own = {**given, "vfs.s3.use_virtual_addressing": "true"}
    assert dict(storage.settings(own))["vfs.s3.use_virtual_addressing"] == "true"
    assert dict(storage.settings({"vfs.s3.endpoint_override": "h:1"})) == {
        "vfs.s3.endpoint_override": "h:1"
    }


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_server_of_the_environment_is_carried_along(monkeypatch, name):
    monkeypatch.setenv(name, "http://localhost:9000")
    assert dict(storage.settings()) == SERVER
    assert storage.settings(remote=False) == ()
    other = {"vfs.s3.endpoint_override": "h:1"}
    assert dict(storage.settings(other)) == other


def test_our_defaults_and_the_users_settings_reach_tiledb():
    config = storage.context((("vfs.s3.connect_max_tries", "3"),)).native_context.config()
    assert config["vfs.s3.connect_max_tries"] == "3"
    assert config["vfs.s3.request_timeout_ms"] == "10000"
    assert config["sm.compute_concurrency_level"] == "1"


def test_tiles_are_not_merged_by_tasks_that_outlive_the_read():
    """With them TileDB 2.30 crashes now and then: tests/benchmarks/tile_merge.py."""
    for remote in (False, True):
        config = storage.context(remote=remote).tiledb_config
        assert config["sm.query.sparse_global_order.preprocess_tile_merge"] == "0"


@pytest.mark.parametrize("key", ["nonsense.key", "vfs.s3.regoin", "", "sm.x"])
def test_a_setting_that_tiledb_does_not_know_is_refused(key):
    with pytest.raises(ConfigError, match=f"tiledb has no setting '{key}'"):
        storage.settings({key: "1"})
    assert storage.settings({"soma.init_buffer_bytes": "1"}, remote=False)


def test_an_object_store_is_read_with_more_requests_and_larger_pieces_than_a_disk():
    keys = ("sm.io_concurrency_level", "sm.mem.tile_upper_memory_limit")
    near = storage.context().native_context.config()
    far = storage.context(remote=True).native_context.config()
    assert [near[k] for k in keys] == ["1", str(8 << 20)]
    assert [far[k] for k in keys] == ["16", str(128 << 20)]
    own = storage.context(((keys[1], "1000000"),), remote=True).native_context.config()
    assert own[keys[1]] == "1000000"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("[HTTP Response Code: 404] [Exception: NoSuchBucket]", "there is no such bucket"),
        ("[HTTP Response Code: 403] : AccessDenied", "access is denied; set AWS_ACCESS_KEY_ID"),
        ("curlCode: 6, Could not resolve hostname", "the server cannot be reached"),
        ("[HTTP Response Code: 503] : SlowDown", "the server fails or is too slow"),
        ("curlCode: 28, Timeout was reached", "the server fails or is too slow"),
        ("Cannot get file size", ""),
    ],
)
def test_errors_of_an_object_store_come_with_advice(error, advice):
    said = storage.hint(RuntimeError(error))
    assert said.startswith(advice)
    assert bool(said) == bool(advice)


def test_headers_are_left_out_of_messages():
    text = "S3: no [HTTP Response Code: 503] [Remote IP: 1.2.3.4] [Headers: 'a' = 'b'] : busy"
    assert storage.brief(text) == "S3: no [HTTP Response Code: 503] : busy"
