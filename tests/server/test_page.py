"""The chat page, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from tests.server.conftest import KEY

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = '<img src=x onerror="window.evil = 1"><script>window.evil = 2</script>**&amp;'


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: uv sync")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is on PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page of a phone's size; an error in its script fails the test."""
    page = browser.new_page(viewport={"width": 390, "height": 700})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(20_000)
    yield page
    page.close()
    assert complaints == []


def send(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answer_with(page, *texts: str) -> None:
    """Lets the server's answers be these texts, one an event."""
    events = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    lines = [*map(json.dumps, [*events, {"choices": [], "usage": {"completion_tokens": 7}}]), "[DONE]"]
    body = "".join(f"data: {line}\n\n" for line in lines)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def ask_at_random(route) -> None:
    """Lets the tiny model write something: by itself it writes one byte, again and again."""
    more = {"temperature": 20, "seed": 5, "ignore_eos": True, "max_tokens": 900}
    route.continue_(post_data=json.dumps(route.request.post_data_json | more))


def stop_the_next_answer(page):
    """Clicks on Stop when it has begun: from inside the page, since the tiny model is soon done."""
    page.evaluate("""() => {
        const answers = document.getElementsByClassName("assistant"), next = answers.length;
        new MutationObserver((changes, observer) => {
            if ((answers[next]?.innerText.length ?? 0) < 3) return;
            observer.disconnect();
            document.getElementById("stop").click();
        }).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""")


def test_a_chat_with_a_server_that_asks_for_a_key(page, server):
    # The first request that draws at random waits for its step to be compiled.
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "temperature": 20}, timeout=120)
    page.route("**/v1/chat/completions", ask_at_random)
    page.goto(server.url)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use key").click()
    page.locator(".error").nth(1).wait_for()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    page.get_by_role("heading", name="tiny").wait_for()
    assert page.get_by_label("API key").is_hidden()
    stop_the_next_answer(page)
    send(page, "Hello")
    page.get_by_text(re.compile(r"\d+ tokens, .* tokens/s, first after .* s, stopped")).wait_for()
    assert page.get_by_role("button", name="Send").is_visible()
    server.wait_until_idle()
    said = page.locator(".assistant").inner_text()
    # The conversation is sent again with the next question, and is still there after a reload.
    stop_the_next_answer(page)
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "And?")
    messages = asked.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == said.strip()
    page.get_by_text("stopped").nth(1).wait_for()
    page.reload()
    page.get_by_role("heading", name="tiny").wait_for()
    assert page.locator(".user").all_inner_texts()[0] == "Hello"
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0


def test_what_a_model_writes_is_text(page, open_server):
    answer_with(page, EVIL[:20], EVIL[20:])
    page.goto(open_server.url)
    send(page, EVIL)
    page.get_by_text("7 tokens").wait_for()
    assert page.locator(".user").inner_text() == page.locator(".assistant").inner_text() == EVIL
    assert page.evaluate("window.evil") is None
    assert page.locator("main img, main script").count() == 0
    # Were there a hole in the script, the policy would still stop what came through it.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.evil = 3\">')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.evil") is None


def test_it_asks_nobody_else_and_fits_a_phone(page, open_server):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(open_server.url)
    page.get_by_role("heading", name="smollm2").wait_for()
    assert {url.partition("/v1")[0].rstrip("/") for url in asked if not url.startswith("data:")} == {open_server.url}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colors = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colors)) == 2


def test_an_error_gives_the_question_back(page, open_server):
    page.goto(open_server.url)
    failure = {"error": {"message": "the queue is full"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=failure))
    send(page, "Hello")
    page.get_by_text("the queue is full").wait_for()
    assert page.get_by_label("Message").input_value() == "Hello"
    assert page.locator(".user").count() == 0
