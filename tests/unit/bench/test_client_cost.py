"""What the client benchmark asks is answered as by an engine, and every client has its row."""

import asyncio

import client_cost
import pytest

from syncline.types import VersionSpan


def test_the_stand_in_answers_as_an_engine_does() -> None:
    async def asked(url: str) -> list:
        async with client_cost.by_engine_client(url, 1) as ask:
            return await ask(0)

    with client_cost.stand_in(5, 0.0) as url:
        [completion] = asyncio.run(asked(url))
    assert (len(completion.token_ids), completion.versions) == (5, (VersionSpan(3, 0, 5),))


def test_every_client_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--in-flight", "4", "--seconds", "0", "--rounds", "1", "--repeats", "1", "--httpx-pools", "1", "2"]
    assert client_cost.main(words) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    proxies = "aiohttp, looking for proxies"
    assert rows[2:] == ["EngineClient", "aiohttp", proxies, "httpx, pools of 1", "httpx, pools of 2"]
