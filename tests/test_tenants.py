"""The tenants file: who a key belongs to, what cannot be written, what happens when it changes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from scalellm_plugins import cli, config
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.frontends import tenants as tenants_module
from scalellm_plugins.frontends.admission import Admission
from scalellm_plugins.frontends.tenants import Tenant, TenantBook, TenantFile, load


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


ACME = {"name": "acme", "keys": [sha("k1"), sha("k2")], "weight": 2, "max_requests": 8}


def write(path: Path, entries: Any) -> str:
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.json"


def test_a_yaml_file_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(
        f"tenants:\n- name: acme\n  keys: [{sha('k1')}, {sha('k2').upper()}]\n  weight: 0.5\n"
        "  priority: -1\n  max_requests: 8\n  max_queued_requests: 4\n  max_prompt_tokens: 1000\n"
        "  max_queued_prompt_tokens: 500\n  max_running: 3\n  kv_floor: 0\n  kv_ceiling: 1\n"
        "  tokens_per_minute: 600\n  ttft_ms: 250\n  tpot_ms: 12.5\n  isolate_prefix: true\n"
        f"- {{name: solo, key_hash: {sha('k3')}}}\n"
    )
    acme, solo = load(str(file))
    assert (acme.weight, acme.priority, acme.by_gauge()) == (0.5, -1, (8, 4, 1000, 500))
    assert (acme.max_running, acme.kv_floor, acme.kv_ceiling) == (3, 0, 1)
    assert (acme.tokens_per_minute, acme.ttft_ms, acme.tpot_ms) == (600, 250, 12.5)
    assert (acme.isolate_prefix, solo.isolate_prefix) == (True, False)
    assert solo.by_gauge() == (None,) * 4
    book = TenantBook([acme, solo])
    found = [book.of(bearer(key)) for key in ("k1", "k2", "k3")]
    assert [tenant and tenant.name for tenant in found] == ["acme", "acme", "solo"]


def test_who_a_request_belongs_to() -> None:
    book = TenantBook([Tenant(name="acme", keys=(sha("k1"),))], api_keys=["server-key"])
    assert book.of(bearer("k1")) is book.by_name["acme"]
    assert book.of(b"bearer k1") is book.by_name["acme"], "vLLM takes the scheme in any case"
    assert book.of(bearer("server-key")) is book.default
    for nobody in (None, b"", b"Bearer", b"Bearer ", b"k1", b"Basic k1", bearer("k1 "), bearer("")):
        assert book.of(nobody) is None, nobody


def test_keys_beyond_ascii_are_hashed_as_vllm_does() -> None:
    book = TenantBook([], api_keys=["clé"])
    # A header holds the bytes; Starlette reads them as Latin-1, and so does the hash.
    assert book.of("Bearer clé".encode("latin-1")) is book.default


def test_without_keys_everybody_is_the_default_tenant() -> None:
    book = TenantBook([Tenant(name="default", max_requests=3)])
    assert book.of(None) is book.of(b"Bearer whatever") is book.default
    assert book.default.max_requests == 3


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = tenants_module.secrets.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(tenants_module.secrets, "compare_digest", compare)
    book = TenantBook([Tenant(name=name, keys=(sha(name),)) for name in ("a", "b", "c")])
    assert book.of(bearer("a")) is book.by_name["a"]
    assert len(compared) == 3, "the time must not say which key it was"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"acme": {}}, "not a list of tenants"),
        ([3], "tenant 1: 3 is not a mapping"),
        ([{"keys": []}], "tenant 1: has no name"),
        ([{"name": "a b"}], "tenant 1 ('a b'): name: 'a b' is not valid"),
        ([ACME, {"name": "b", "max_request": 1}], "tenant 2 ('b'): unknown field 'max_request'"),
        ([{"name": "a", "max_requests": 0}], "max_requests: 0 is not valid"),
        ([{"name": "a", "max_requests": "8"}], "max_requests: '8' is not valid"),
        ([{"name": "a", "weight": 0}], "weight: 0 is not valid"),
        ([{"name": "a", "weight": 1e-300}], "weight: 1e-300 is not valid"),
        ([{"name": "a", "max_running": 0}], "max_running: 0 is not valid"),
        ([{"name": "a", "max_running": 1.5}], "max_running: 1.5 is not valid"),
        ([{"name": "a", "tokens_per_minute": 0}], "tokens_per_minute: 0 is not valid"),
        ([{"name": "a", "kv_floor": -0.1}], "kv_floor: -0.1 is not valid"),
        ([{"name": "a", "kv_floor": 30}], "kv_floor: 30 is not valid"),
        ([{"name": "a", "kv_ceiling": 0}], "kv_ceiling: 0 is not valid"),
        ([{"name": "a", "kv_ceiling": 1.1}], "kv_ceiling: 1.1 is not valid"),
        ([{"name": "a", "kv_floor": 0.5, "kv_ceiling": 0.4}], "0.5 is above kv_ceiling 0.4"),
        ([{"name": "a", "kv_floor": 0.6}, {"name": "b", "kv_floor": 0.5}], "come to 1.1"),
        ([{"name": "a", "ttft_ms": 0}], "ttft_ms: 0 is not valid"),
        ([{"name": "a", "tpot_ms": "5"}], "tpot_ms: '5' is not valid"),
        ([{"name": "a", "priority": 0.5}], "priority: 0.5 is not valid"),
        ([{"name": "a", "isolate_prefix": "yes"}], "isolate_prefix: 'yes' is not valid"),
        ([ACME, {"name": "acme"}], "two tenants named 'acme'"),
        ([ACME, {"name": "b", "keys": [sha("k2").upper()]}], "belongs to both 'acme' and 'b'"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(path: Path, entries: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(path, entries))
    assert said in str(error.value)
    assert "tenants.json" in str(error.value)


@pytest.mark.parametrize("field", [{"keys": ["sk-secret"]}, {"key_hash": "sk-secret"}])
def test_a_key_in_place_of_its_hash_is_not_repeated(path: Path, field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="scalellm tenants hash") as error:
        load(write(path, [{"name": "a", **field}]))
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.json", "[", "is not JSON"),
        ("x.yaml", "a: [", "is not YAML"),
        ("x.yaml", "", "is not a list"),
        ("x.yaml", None, "cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(str(tmp_path / name))


# Changes


def test_a_changed_file_is_read_again(path: Path) -> None:
    file = TenantFile(write(path, [ACME]))
    assert not file.poll()
    # Replaced, as editors and ConfigMaps do: another inode, maybe within the clock's resolution.
    other = path.with_name("new")
    write(other, [{**ACME, "max_requests": 9}])
    os.replace(other, path)
    assert file.poll()
    assert file.book.by_name["acme"].max_requests == 9
    assert not file.poll()


def test_a_broken_file_keeps_what_was_known_and_is_said_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TenantFile(write(path, [ACME]))
    path.write_text('[{"name": "acme", "max_requests": -1}]')
    with caplog.at_level(logging.ERROR, logger="vllm.scalellm"):
        assert not file.poll()
        assert not file.poll()
        path.unlink()
        assert not file.poll()
    assert file.book.of(bearer("k1")) is file.book.by_name["acme"]
    first, second = [record.getMessage() for record in caplog.records]
    assert "max_requests: -1 is not valid" in first
    assert "stay as they were" in first
    assert "cannot be read" in second
    write(path, [])
    assert file.poll()


def test_striking_off_the_last_key_lets_nobody_in(path: Path) -> None:
    file = TenantFile(write(path, [ACME]))
    write(path, [{"name": "default"}])
    assert file.poll()
    assert file.book.of(None) is None
    assert file.book.of(bearer("k1")) is None


def test_a_worker_that_starts_when_the_file_is_broken_knows_what_the_others_know(
    path: Path,
) -> None:
    """Else a typing error would end every worker that is to replace or help another."""
    shared = Admission.create(2)
    first = TenantFile(write(path, [ACME]), memory=shared.for_slot(0))
    path.write_text("[{")
    second = TenantFile(str(path), memory=shared.for_slot(1))
    assert second.book.by_name == first.book.by_name
    assert second.book.of(bearer("k1")) is not None
    write(path, [{"name": "default"}])
    assert second.poll()
    third = TenantFile(str(path), memory=shared.for_slot(0))
    assert third.book.of(None) is None, "there were keys once: no way in without one"


def test_a_server_does_not_start_with_a_broken_file(path: Path) -> None:
    with pytest.raises(ConfigError):
        TenantFile(str(path))
    assert TenantFile(None).book.of(None) is not None


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"tenants": "file"}, True),
        ({"tenants": "file", "enabled": False}, False),
        ({"max_requests": 3}, False),
    ],
)
def test_no_server_without_the_gate_where_tenants_show_keys(
    clean_environment: pytest.MonkeyPatch, options: dict[str, Any], refused: bool
) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    from scalellm_plugins.frontends.gate import check_off

    config.raw_to_env({"frontend": options})
    if not refused:
        check_off()
        return
    with pytest.raises(ConfigError, match=r"'file' would not be looked at.*--api-key"):
        check_off()


# The command


def test_hash_prints_what_the_file_wants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-secret\n"))
    assert cli.main(["tenants", "hash"]) == 0
    assert capsys.readouterr().out == sha("sk-secret") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert cli.main(["tenants", "hash"]) == cli.USAGE_ERROR
    assert "no key" in capsys.readouterr().err


def test_check_says_what_is_there_and_what_is_wrong(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tenants", "check", write(path, [ACME])]) == 0
    shown = capsys.readouterr().out
    assert "acme" in shown
    assert sha("k1") not in shown
    assert "kv_floor" not in shown, "nobody has one"
    more = {**ACME, "kv_floor": 0.25, "ttft_ms": 1234567.5, "isolate_prefix": True}
    assert cli.main(["tenants", "check", write(path, [more, {"name": "b"}])]) == 0
    head, acme, other = capsys.readouterr().out.splitlines()[-3:]
    assert head.split()[-3:] == ["kv_floor", "ttft_ms", "isolate_prefix"]
    assert acme.split()[-3:] == ["0.25", "1234567.5", "yes"]
    assert other.split()[-3:] == ["-", "-", "no"]
    assert cli.main(["tenants", "check", write(path, [{"name": "a", "x": 1}])]) == cli.USAGE_ERROR
    assert "unknown field 'x'" in capsys.readouterr().err
