"""Failures of the hub's client are one line each."""

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError
from support.errors import refused

from esm2kit.models import hub

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "http://lab.invalid"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx.RemoteProtocolError("peer closed connection (received 1000 bytes, expected 115720)"), "hub.interrupted"),
        (httpx.ReadTimeout("timed out"), "hub.interrupted"),
        (GatedRepoError("restricted", response=RESPONSE), "hub.gated"),
    ],
)
def test_a_failure_of_the_client_is_one_line(error, code, monkeypatch):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "_explain_unreachable", lambda: "")
    with refused(code, name="lab/x") as caught:
        hub._HubRevision("lab/x", "main").download("model.safetensors")
    assert "\n" not in str(caught.value)
    assert code == "hub.gated" or str(error) in str(caught.value)


@pytest.mark.parametrize("name", ["https://huggingface.co/lab/x", "lab/a b", "a/b/c"])
def test_a_name_that_is_not_one_of_the_hub_is_refused_before_any_request(name, monkeypatch):
    monkeypatch.setattr(hub, "_explain_unreachable", lambda: pytest.fail("asked the hub"))
    with refused("hub.name", name=name):
        hub.fetch(name)
