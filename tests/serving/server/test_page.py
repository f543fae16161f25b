"""The page, in a headless Chromium over a server that runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.serving.server.browser import Page, chromium
from tests.serving.server.fake_engine import FakeEngine
from tests.serving.server.serving import Served, serve, wait_for

from prefillshare_train.serving.api import GenerationRequest

HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'


def script(request: GenerationRequest) -> str:
    prompt = ENCODER.decode(request.prompt_ids)
    if "slow" in prompt:
        return "z" * 200
    return HOSTILE if "markup" in prompt else f"{request.decoder} says 4."


ENCODER = FakeEngine().renderer


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(FakeEngine(script, delay_s=0.005)) as running:
        yield running


@pytest.fixture
def page(tab: Page, served: Served) -> Iterator[Page]:
    tab.problems.clear()
    tab.open(f"http://127.0.0.1:{served.port}/")
    tab.wait("document.querySelectorAll('input[name=decoder]').length === 2")
    yield tab
    assert tab.problems == []
    tab.open("about:blank")


def ask(page: Page, text: str) -> None:
    page.js("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter", 13)


def answers(page: Page) -> list[str]:
    found: list[str] = page.js(
        "[...document.querySelectorAll('.answer:not([aria-busy]) .body')].map(e => e.textContent)"
    )
    return found


def choose(page: Page, name: str) -> None:
    page.js(f"document.querySelector('input[value={name}]').click()")


def costs(page: Page) -> list[tuple[int, int]]:
    """Cached and prefilled tokens of each answer."""
    return [
        (int(cached), int(prefilled))
        for cached, prefilled in page.js(
            "[...document.querySelectorAll('.answer')]"
            ".map(e => [e.dataset.cached, e.dataset.prefilled])"
        )
    ]


def test_two_decoders_go_on_over_one_context(page: Page, served: Served) -> None:
    ask(page, "What is 2 + 2?")
    wait_for(lambda: answers(page) == ["math says 4."])
    choose(page, "code")
    ask(page, "Are you sure?")
    wait_for(lambda: len(answers(page)) == 2)
    assert answers(page)[1] == "code says 4."
    first, second = served.engine.requests
    assert (first.decoder, second.decoder) == ("math", "code")
    assert first.session == second.session is not None
    prompt = ENCODER.decode(second.prompt_ids)
    assert prompt.startswith(ENCODER.decode(first.prompt_ids) + "math says 4.")
    (cached, prefilled), (then_cached, then_prefilled) = costs(page)
    assert cached == 0 < prefilled
    assert then_cached > 0
    assert then_cached + then_prefilled + 1 == len(second.prompt_ids)
    shown = page.js("document.querySelectorAll('.cost')[1].textContent")
    assert f"{then_cached} cached, {then_prefilled} prefilled" in shown
    assert "first token after" in shown


def test_the_charts_follow_the_server(page: Page) -> None:
    ask(page, "What is 2 + 2?")
    wait_for(lambda: answers(page) == ["math says 4."])
    ask(page, "And again?")
    page.wait("/^[1-9][0-9]* %$/.test(document.querySelector('#chart-hits output').textContent)")
    page.wait("document.querySelector('#chart-ttft output').textContent.startsWith('median ')")
    page.wait("document.querySelector('#chart-blocks output').textContent.endsWith(' of 64')")
    for chart in ("hits", "ttft", "blocks"):
        page.wait(
            f"[...document.querySelectorAll('#chart-{chart} polyline')]"
            ".some(e => e.getAttribute('points').split(' ').length > 1)"
        )
    assert page.js("document.getElementById('server').textContent") == "ready"


def test_markup_in_an_answer_is_text(page: Page) -> None:
    ask(page, "markup " + HOSTILE)
    wait_for(lambda: answers(page) == [HOSTILE])
    assert page.js("window.hacked === undefined && document.querySelector('.log img') === null")


def test_escape_stops_and_the_conversation_goes_on(page: Page, served: Served) -> None:
    ask(page, "slow")
    page.wait("document.querySelector('.answer .body').textContent.length > 5")
    page.press("Escape", 27)
    wait_for(lambda: served.engine.live == 0)
    assert len(served.engine.cancelled) == 1
    wait_for(lambda: len(answers(page)) == 1)
    kept = answers(page)[0]
    assert 0 < len(kept) < 200
    assert page.js("!document.getElementById('send').disabled")
    page.js("document.getElementById('new').click()")
    assert page.js("document.querySelectorAll('.log article').length") == 0
    ask(page, "What is 2 + 2?")
    wait_for(lambda: answers(page) == ["math says 4."])
    assert "slow" not in ENCODER.decode(served.engine.requests[-1].prompt_ids)
    assert served.engine.requests[0].session != served.engine.requests[-1].session


def test_a_refusal_is_told_and_the_question_comes_back(page: Page, served: Served) -> None:
    served.engine.max_waiting = 0
    ask(page, "What is 2 + 2?")
    page.wait("!document.getElementById('problem').hidden")
    assert "waiting" in page.js("document.getElementById('problem').textContent")
    page.wait("document.getElementById('text').value === 'What is 2 + 2?'")
    # The browser reports the refused request itself.
    assert all("429" in problem for problem in page.problems)
    page.problems.clear()
    served.engine.max_waiting = 64
    page.press("Enter", 13)
    wait_for(lambda: answers(page) == ["math says 4."])
    assert page.js("document.getElementById('problem').hidden")


def test_everything_has_a_name_and_the_keyboard_reaches_it(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "radio", "spinbutton", "image", "radiogroup", "log")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in roles
    ]
    assert {role for role, _ in named} >= {"button", "textbox", "radio", "image"}
    assert all(name for _, name in named), named
    assert page.js("document.activeElement.id") == "text"
    page.press("Tab", 9, modifiers=8)
    assert page.js("document.activeElement.name") == "decoder"
    page.press("ArrowRight", 39)
    assert page.js("document.querySelector('input[name=decoder]:checked').value") == "code"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page: Page, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.call("Emulation.setEmulatedMedia", features=[feature])
    assert page.js(CONTRAST) >= 4.5
    page.call("Emulation.setEmulatedMedia", features=[])


CONTRAST = """
(() => {
  const light = (rgb) => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
  };
  const texts = "p, h1, button:enabled, label, figcaption, dt, dd";
  return Math.min(...[...document.querySelectorAll(texts)]
    .filter((node) => node.textContent.trim() && node.checkVisibility())
    .map((node) => {
      const [high, low] = [light(getComputedStyle(node).color), light(ground(node))]
        .sort((a, b) => b - a);
      return (high + 0.05) / (low + 0.05);
    }));
})()
"""


def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=700,
        deviceScaleFactor=1,
        mobile=True,
    )
    assert page.js("document.documentElement.scrollWidth") <= 360
    page.call("Emulation.clearDeviceMetricsOverride")


def test_a_key_is_asked_for(tab: Page) -> None:
    with serve(FakeEngine(script), api_key="secret") as served:
        tab.open(f"http://127.0.0.1:{served.port}/")
        tab.wait("document.activeElement.id === 'key'")
        tab.type("secret")
        tab.press("Enter", 13)
        tab.wait("document.querySelectorAll('input[name=decoder]').length === 2")
        ask(tab, "What is 2 + 2?")
        wait_for(lambda: answers(tab) == ["math says 4."])
        tab.open("about:blank")
