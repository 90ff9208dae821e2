"""A machine's place among several, as AWS Batch tells it."""

from __future__ import annotations

import pytest

from job import nodes
from job.errors import ConfigError
from job.nodes import Node


def say(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("COUNT", "INDEX", "MAIN_INDEX", "MAIN_ADDRESS", "PORT_VARIABLE"):
        monkeypatch.delenv(getattr(nodes, name), raising=False)
        if name in variables:
            monkeypatch.setenv(getattr(nodes, name), variables[name])


def test_who_is_told_nothing_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch)
    node = Node.here()
    assert node == Node()
    assert node.alone
    assert node.is_main


@pytest.mark.parametrize(
    ("index", "main", "position"),
    [(0, 0, 0), (2, 0, 2), (2, 2, 0), (0, 2, 1), (1, 2, 2), (3, 2, 3)],
)
def test_the_main_one_comes_first(
    monkeypatch: pytest.MonkeyPatch, index: int, main: int, position: int
) -> None:
    say(monkeypatch, COUNT="4", INDEX=str(index), MAIN_INDEX=str(main), MAIN_ADDRESS="10.0.0.7")
    assert Node.here() == Node(4, position, "10.0.0.7", nodes.PORT)
    assert Node.here().is_main == (index == main)


def test_the_main_one_is_told_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, COUNT="2", INDEX="0", MAIN_INDEX="0", PORT_VARIABLE="1234")
    assert Node.here() == Node(2, 0, "", 1234)


@pytest.mark.parametrize(
    "variables",
    [
        {"COUNT": "2", "INDEX": "1"},
        {"COUNT": "2", "INDEX": "5", "MAIN_ADDRESS": "10.0.0.7"},
        {"COUNT": "two"},
    ],
)
def test_what_contradicts_itself_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    say(monkeypatch, **variables)
    with pytest.raises(ConfigError, match="AWS_BATCH_JOB_NUM_NODES"):
        Node.here()


def test_the_interface_is_the_one_towards_the_others() -> None:
    assert Node(2, 1, "127.0.0.1").interface() == "lo"
