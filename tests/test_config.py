from dataclasses import replace

import pytest

from moeray.config import Config, config_from, load_config, overlay
from moeray.errors import ConfigError
from moeray.tree import to_tree


def test_defaults_survive_a_round_trip():
    assert config_from(to_tree(Config())) == Config()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"modle": "x"}, ["modle", "model"]),
        ({"engine": {"blocksize": 16}}, ["engine.blocksize", "engine.block_size"]),
        ({"engine": {"block_size": "many"}}, ["engine.block_size", "int"]),
        ({"engine": {"block_size": 0}}, ["engine.block_size", "at least 1"]),
        ({"engine": {"block_size": True}}, ["engine.block_size", "int"]),
        ({"engine": []}, ["config key engine: ", "mapping"]),
        ({"experts": {"device": "tpu"}}, ["experts.device", "cuda"]),
        ({"experts": {"replicas": 3, "actors": 2}}, ["experts.replicas", "2 actors"]),
        ({"experts": {"groups": [{"name": "a", "thread": 1}]}}, ["experts.groups[0].thread", "threads"]),
        ({"experts": {"groups": [{"name": "a"}, {"name": "a"}]}}, ["differ"]),
        ({"experts": {"groups": [{"name": "router"}]}}, ["experts.groups.name", "choose another"]),
        ({"experts": {"groups": [{"name": "../../x"}]}}, ["experts.groups.name", "letters"]),
        ({"experts": {"groups": [{"name": ""}]}}, ["experts.groups.name"]),
        ({"experts": {"groups": [{"name": "a=b"}]}}, ["experts.groups.name"]),
        ({"engine": {"block_size": "["}}, ["engine.block_size", "int"]),
        ({"engine": {"block_size": "a: b: c"}}, ["engine.block_size", "int"]),
        ({"serve": {"replicas": 0}}, ["serve.replicas", "at least 1"]),
        ({"serve": {"request_timeout_s": 0}}, ["serve.request_timeout_s", "above 0"]),
        ({"control": {"slo_queue_wait_s": -1}}, ["control.slo_queue_wait_s", "at least 0.001"]),
        ({"control": {"slo_queue_wait_s": 1e-320}}, ["control.slo_queue_wait_s", "at least 0.001"]),
        ({"control": {"max_growth": 1e308}}, ["control.max_growth", "above 1, to 1e+06"]),
        ({"control": {"target_utilisation": 1e-320}}, ["control.target_utilisation", "0.01 to 1"]),
        ({"control": {"shrink_votes": 10**23}}, ["control.shrink_votes", "1 to 10000"]),
        ({"control": {"replica_budget": 1e308}}, ["control.replica_budget", "0 to 1000"]),
        ({"control": {"target_running": 10**400}}, ["control.target_running", "1 to 1000000"]),
        ({"control": {"migration_cost": -0.1}}, ["control.migration_cost", "0 or more"]),
        ({"control": {"report_s": float("inf")}}, ["control.report_s", "finite"]),
        ({"control": {"max_skew": ".nan"}}, ["control.max_skew", "finite"]),
        ({"control": {"resources": {"spot": -1}}}, ["control.resources.spot", "0 or more"]),
        ({"router": {"num_cpus": -1}}, ["router.num_cpus", "0 or more"]),
        ({"router": {"resources": {"spot": -1}}}, ["router.resources.spot", "0 or more"]),
        ({"engine": {"kv_cache_bytes": -1}}, ["engine.kv_cache_bytes", "above 0"]),
        ({"wire": {"max_payload_bytes": 10}}, ["wire.max_payload_bytes", "64 KiB"]),
        ({"wire": {"shared_memory_bytes": 1 << 63}}, ["wire.shared_memory_bytes", "below 1 TiB"]),
        ({"experts": {"groups": [{"resources": {"spot": -1}}]}}, ["experts.groups.resources.spot", "0 or more"]),
        ({"serve": {"api_key": ""}}, ["serve.api_key", "MOERAY_API_KEY"]),
        ({"serve": {"api_key": "secret\n"}}, ["serve.api_key", "white space"]),
        ({"serve": {"allowed_origins": ["a.example"]}}, ["serve.allowed_origins", "a.example"]),
        ({"wire": {"tls_cert": "x"}}, ["tls_key"]),
        ({"wire": {"device_rows": "maybe"}}, ["wire.device_rows", "auto, on, off"]),
        ({"wire": {"device_rows": "on", "shared_memory_bytes": 0}}, ["wire.device_rows", "wire.shared_memory_bytes"]),
        ({"experts": {"kernel": True}}, ["experts.kernel", "auto"]),
        ({"serve": {"port": 70000}}, ["serve.port"]),
        ({"control": {"schedule": [{"cron": "0 8 * *"}]}}, ["control.schedule.cron", "5 fields"]),
        ({"control": {"schedule": [{"cron": "0 25 * * *"}]}}, ["control.schedule.cron", "hour"]),
        ({"control": {"schedule": [{"cron": "0 8 * * *", "group": "gpus"}]}}, ["gpus", "experts, router"]),
        (
            {"control": {"schedule": [{"cron": "0 8 * * *", "actors": 3}]}},
            ["schedule.actors", "2 at most", "max_actors"],
        ),
        (
            {"control": {"schedule": [{"cron": "0 8 * * *", "group": "router", "actors": 2}]}},
            ["control.schedule.actors", "2 of router", "1 at most"],
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tree, words):
    with pytest.raises(ConfigError) as error:
        config_from(tree)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")])
def test_on_and_off_are_words_with_quotes_or_without(tmp_path, written, read):
    path = tmp_path / "moeray.yaml"
    path.write_text(f"wire: {{device_rows: {written}}}\nengine: {{overlap: {written}}}\n")
    config = load_config(path, {})
    assert (config.wire.device_rows, config.engine.overlap) == (read, read)


def test_a_section_with_nothing_under_it_is_that_of_the_defaults(tmp_path, monkeypatch):
    assert config_from({"experts": None, "engine": None}) == Config()
    path = tmp_path / "moeray.yaml"
    path.write_text("serve:\n  # port: 9000\nwire:\n  token:\nexperts:\n")
    monkeypatch.setenv("MOERAY_API_KEY", "from-env\n")
    monkeypatch.setenv("MOERAY_CLUSTER_TOKEN", "t0ken")
    config = load_config(path, {"serve.port": 9000, "experts.actors": 3})
    assert (config.serve.api_key, config.wire.token) == ("from-env", "t0ken")
    assert (config.serve.port, config.experts.actors) == (9000, 3)


def test_a_section_with_nothing_under_it_changes_nothing():
    config = config_from({"experts": {"groups": [{"name": "a", "actors": 4}]}, "control": {"slo_ttft_s": 1.0}})
    assert overlay(config, {"experts": None, "control": {"slo_tpot_s": 0.1}}) == replace(
        config, control=replace(config.control, slo_tpot_s=0.1)
    )


def test_keys_of_the_one_group_beside_a_list_of_groups_would_do_nothing(tmp_path):
    path = tmp_path / "moeray.yaml"
    path.write_text("experts: {replicas: 1, groups: [{name: a}]}\n")
    assert load_config(path, {"experts.kernel": "torch"}).experts.groups[0].name == "a"
    for given in ({"experts.actors": 2}, {"experts.memory_gib": 1.0}):
        with pytest.raises(ConfigError, match=rf"{next(iter(given))}: .* give it to each of experts.groups"):
            load_config(path, given)
    later = overlay(config_from({"experts": {"actors": 4}}), {"experts": {"groups": [{"name": "a"}]}})
    assert [group.name for group in later.experts.resolved()] == ["a"]  # of a system that runs


def test_numbers_are_read_as_people_write_them():
    config = config_from({"control": {"slo_ttft_s": "5e-1", "slo_tpot_s": "0.15"}, "engine": {"block_size": "32"}})
    assert (config.control.slo_ttft_s, config.control.slo_tpot_s, config.engine.block_size) == (0.5, 0.15, 32)


def test_a_model_in_a_folder_is_named_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (".", "../tiny", "~/tiny", str(tmp_path / "tiny")):
        config = load_config(None, {"model": words})
        assert (config.model, config.served_model_name) == (str(tmp_path / "tiny"), "tiny")
    # The same wherever it is read, also where the folder is not there.
    for words, path in (("/models/x/", "/models/x"), ("~/other", f"{tmp_path}/other"), ("./m", f"{tmp_path}/tiny/m")):
        assert load_config(None, {"model": words}).model == path
        assert overlay(Config(), {"model": words}).model == path
    for words in ("tiny", "org/model", "x" * 300, "~nobody-of-that-name/x", "a\0b"):  # on the hub, or nowhere
        assert load_config(None, {"model": words}).model == words


def test_overrides_lie_over_the_file(tmp_path):
    path = tmp_path / "moeray.yaml"
    path.write_text("model: a\nengine:\n  block_size: 8\n  max_running: 4\n")
    config = load_config(path, {"engine.block_size": "32", "serve.port": 9000, "router.num_gpus": 1})
    assert (config.model, config.engine.block_size, config.engine.max_running) == ("a", 32, 4)
    assert config.serve.port == 9000
    assert config.router.num_gpus == 1.0


def test_groups_of_different_devices():
    config = config_from(
        {
            "experts": {
                "groups": [{"name": "fast", "device": "cuda", "num_gpus": 0.5}, {"name": "cheap", "device": "cpu"}]
            }
        }
    )
    assert [(g.name, g.device, g.num_gpus) for g in config.experts.resolved()] == [
        ("fast", "cuda", 0.5),
        ("cheap", "cpu", None),
    ]


def test_secrets_are_not_shown():
    config = config_from({"wire": {"token": "s3cret"}, "serve": {"api_key": "k3y"}})
    assert "s3cret" not in repr(config)
    assert "k3y" not in repr(config)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", ": :\n  - ]"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "moeray.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"moeray\.yaml is not UTF-8 text: .* at byte 7"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        load_config(tmp_path / "absent.yaml")


def test_secrets_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOERAY_API_KEY", "from-env")
    monkeypatch.setenv("MOERAY_CLUSTER_TOKEN", "t0ken")
    config = load_config(None, {"serve.port": 1})
    assert (config.serve.api_key, config.wire.token) == ("from-env", "t0ken")
    assert load_config(None, {"serve.api_key": "given"}).serve.api_key == "given"
