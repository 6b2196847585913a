"""The page in a real browser (Debian's chromium) on a real stack: launch, watch, look at tokens, compare, cancel.

The tests share one stack, one service and one browser context, and follow one story in order. Whatever the page
prints to the console as an error, asks of another host or moves while loading fails the test that did it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from patience import stretched
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect, sync_playwright
from test_deployment import Stack, stack, until

__all__ = ["stack"]
pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "build" / "screenshots"
AXE = ROOT / "tests" / "vendor" / "axe-4.14.1.min.js"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 860}
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) if (!shift.hadRecentInput)
    window.shifts.push([shift.value, shift.sources.map((s) => (s.node?.outerHTML ?? "").slice(0, 100))]);
}).observe({ type: "layout-shift", buffered: true });
"""
HIDE = """
(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}
"""


@dataclass
class Visit:
    """A tab, and everything in it that should not happen."""

    page: Page
    origin: str
    faults: list[str] = field(default_factory=list)

    def open(self, path: str) -> Page:
        self.page.goto(self.origin + path)
        return self.page

    def check(self, name: str) -> None:
        """Nothing went wrong so far, nothing moved, axe finds nothing serious; and a screenshot to look at."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
        assert self.faults == []
        shifts = self.page.evaluate("window.shifts")
        assert sum(value for value, _ in shifts) < 0.01, shifts
        assert self.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "the page scrolls sideways"
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        assert [
            (v["id"], [node["target"] for node in v["nodes"]][:4])
            for v in found
            if v["impact"] in ("serious", "critical")
        ] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is missing, and the page is tested in it: apt-get install --yes chromium"
    with sync_playwright() as playwright:
        expect.set_options(timeout=1000 * stretched(15))
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def origin(stack: Stack) -> Iterator[str]:
    """A service over the stack's root that launches one small configuration."""
    configs = stack.config.parent / "configs"
    configs.mkdir()
    small = yaml.safe_load(stack.config.read_text())
    (configs / "small.yaml").write_text("# A run of seconds.\n" + yaml.safe_dump(small))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "api.main", "--host", "127.0.0.1", "--port", str(port), "--root", str(stack.root), "--configs"]
    with subprocess.Popen([sys.executable, *command, str(configs)], env=stack.environment, cwd=ROOT) as service:
        try:
            until(lambda: _answers(f"http://127.0.0.1:{port}/healthz"), 60, "the service to answer")
            yield f"http://127.0.0.1:{port}"
        finally:
            service.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def visit(browser: Browser, origin: str) -> Iterator[Visit]:
    with browser.new_context(viewport=DESKTOP) as context:  # type: ignore[arg-type]
        visit = Visit(context.new_page(), origin)

        def say(message: ConsoleMessage) -> None:
            if message.type == "error":
                visit.faults.append(f"console: {message.text} ({message.location})")

        def keep_home(route: Route, request: Request) -> None:
            if request.url.startswith((origin, "data:", "blob:")):
                route.continue_()
            else:
                visit.faults.append(f"asked another host: {request.url}")
                route.abort()

        visit.page.on("console", say)
        visit.page.on("pageerror", lambda error: visit.faults.append(f"uncaught: {error}"))
        context.add_init_script(WATCH_SHIFTS)
        context.route("**/*", keep_home)
        yield visit


def test_a_run_launched_from_the_form_is_seen_live_to_its_end(visit: Visit, stack: Stack) -> None:
    page = visit.open("/launch")
    expect(page.get_by_role("button", name="Launch")).to_be_visible()
    visit.check("launch")
    # Another estimator is another set of fields, sent whole.
    page.locator("[id='field-loss.name']").select_option("dense_reverse_kl")
    expect(page.locator("[id='field-loss.head']")).to_have_count(0)
    page.get_by_label("run id").fill("seen")
    page.locator("[id='field-learner.num_steps']").fill("6")
    heading = page.get_by_role("heading", name="seen")
    for _ in range(4):  # Prefect's server may be too busy for its 30 s; the same form sent again launches once
        page.get_by_role("button", name="Launch").click()
        expect(heading.or_(page.locator("[role=alert] pre"))).to_be_visible(timeout=1000 * stretched(40))
        if heading.is_visible():
            break
    expect(heading).to_be_visible()
    expect(page.locator(".badge")).to_have_text("succeeded", timeout=1000 * stretched(120))
    expect(page.locator(".facts")).to_contain_text("6 of 6")
    assert stack.log("seen").config()["loss"]["name"] == "dense_reverse_kl"
    assert visit.faults == []


def test_the_page_of_a_run_shows_every_part_of_it(visit: Visit, stack: Stack) -> None:
    page = visit.open("/runs/seen")
    for chart in (
        "Loss by step",
        "KL to the teacher by step",
        "Held-out accuracy by version",
        "Drift by step",
        "Throughput by seconds",
        "Effective sample size by step",
    ):
        expect(page.get_by_role("img", name=chart, exact=True).locator("canvas")).to_be_visible()
    expect(page.get_by_role("img", name="Tokens by staleness and step")).to_be_visible()
    expect(
        page.get_by_text("Newest version 6; large green dots were evaluated. The learner never went back.")
    ).to_be_visible()
    roles = page.locator(".card", has=page.get_by_role("heading", name="Roles")).locator("tbody tr")
    for role in ("rollout", "score", "learn"):
        expect(roles.locator("td:first-child").filter(has_text=role).first).to_be_visible()
    expect(page.get_by_text("step 5 trained")).to_be_visible()
    visit.check("run")


def test_a_response_is_shown_token_by_token_and_walked_by_keys(visit: Visit, stack: Stack) -> None:
    visit.open("/runs/seen").get_by_role("link", name="3", exact=True).click()
    page = visit.page
    tokens = page.locator(".token")
    expect(tokens.first).to_be_visible()
    trajectory = next(
        t
        for t in stack.log("seen").read_trajectories(
            next(s for s in stack.log("seen").trajectory_shards() if 3 in s.indices)
        )
        if t.index == 3
    )
    assert tokens.count() == len(trajectory.response_ids)
    assert page.locator(".boundary").count() == len(trajectory.version_runs)
    tokens.first.focus()
    page.keyboard.press("End")
    last = {
        "position": str(len(trajectory.response_ids) - 1),
        "id": str(trajectory.response_ids[-1]),
        "policy version": str(trajectory.version_last),
        "log p when sampled": f"{trajectory.behaviour_logprobs_T[-1]:.3f}",
    }
    facts = page.locator(".detail .facts div")
    for name, value in last.items():
        expect(facts.filter(has=page.get_by_text(name, exact=True)).locator("dd")).to_have_text(value)
    visit.check("trajectory")
    page.keyboard.press("j")
    expect(page.get_by_role("heading", name="index 4")).to_be_visible()


def test_a_run_is_cancelled_from_its_page_and_a_hidden_tab_asks_nothing(visit: Visit, stack: Stack) -> None:
    body = {"config_name": "small", "run_id": "long", "overrides": {"learner.num_steps": 2000, "evaluate.every": 0}}
    headers = {"Idempotency-Key": "long"}
    launch = partial(httpx.post, f"{visit.origin}/v1/runs", json=body, headers=headers, timeout=60)
    until(lambda: launch().is_success, 60, "Prefect to take the launch")
    until(lambda: _steps(stack, "long") >= 2, 120, "two steps of the long run")
    page = visit.open("/runs/long")
    shown = page.locator(".facts dd").first
    expect(shown).to_contain_text("of 2,000")

    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(6000)
    assert 0 < len(asked) <= 30, asked  # read again every few seconds, no more often however fast it trains
    page.evaluate(HIDE, True)
    for _ in range(10):  # what was under way may take a while on a busy machine
        asked.clear()
        page.wait_for_timeout(6000)
        if not asked:
            break
    assert asked == []
    before = shown.inner_text()
    page.evaluate(HIDE, False)
    expect(shown).not_to_have_text(before)
    assert any(url.endswith("/events/stream") for url in asked)

    visit.check("live")

    page = visit.open("/compare?run=seen&run=long")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="long"))
    before = row.inner_text()
    expect(row).not_to_have_text(before, timeout=1000 * stretched(15), use_inner_text=True)
    visit.check("compare-live")

    page = visit.open("/runs/long")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".badge")).to_have_text("cancelled", timeout=1000 * stretched(60))
    until(lambda: not stack.roles(), 20, "its roles to end")
    assert visit.faults == []


def _steps(stack: Stack, run_id: str) -> int:
    return len(list((stack.root / "runs" / run_id / "steps").glob("*.json")))


def test_runs_are_picked_and_compared_on_the_same_axes(visit: Visit) -> None:
    page = visit.open("/")
    expect(page.get_by_role("row", name="seen")).to_contain_text("succeeded")
    expect(page.get_by_role("row", name="long")).to_contain_text("cancelled")
    visit.check("runs")
    for run_id in ("seen", "long"):
        page.get_by_label(f"Compare {run_id}").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("img", name="Loss by steps").locator("canvas")).to_be_visible()
    expect(page.get_by_role("row", name="learner.num_steps")).to_contain_text("2000")
    visit.check("compare")


def test_a_replay_is_compared_step_by_step_with_the_run_it_repeats(visit: Visit, stack: Stack) -> None:
    asked = {"overrides": {"loss.name": "reverse_kl"}, "scores": {"oracle": 1.0}, "evaluate": False}
    answer = httpx.post(f"{visit.origin}/v1/runs/seen/replay", json=asked, timeout=60)
    assert answer.status_code == 202, answer.text
    replay = answer.json()["run_id"]
    until(lambda: _steps(stack, replay) == 6, 120, "the replay to train its six steps")
    page = visit.open(f"/compare?run=seen&run={replay}")
    expect(page.get_by_role("img", name="Paired difference of loss by step").locator("canvas")).to_be_visible()
    expect(page.get_by_role("row", name="loss.name")).to_contain_text("reverse_kl")
    expect(page.get_by_text("B was trained on A's rollouts")).to_be_visible()
    expect(page.get_by_text("B has no held-out evaluations: a replay evaluates only")).to_be_visible()
    visit.check("compare-replay")


def test_sql_answers_stored_questions_with_parameters_and_ones_own(visit: Visit) -> None:
    page = visit.open("/sql")
    page.get_by_label("Stored question").select_option("staleness_by_step")
    expect(page.get_by_text("How stale are the tokens each stretch of steps trains on?")).to_be_visible()
    page.get_by_label("Run", exact=True).select_option("seen")
    page.get_by_label("$every").fill("3")
    page.get_by_role("button", name="Run (Ctrl + Enter)").click()
    rows = page.get_by_role("group", name="Result").locator("tbody tr")
    expect(rows.first).to_be_visible(timeout=1000 * stretched(30))
    assert {row.split("\t")[1] for row in rows.all_inner_texts()} == {"0", "3"}
    expect(page.get_by_role("img", name="share by step").locator("canvas")).to_be_visible()
    visit.check("sql")

    text = page.get_by_label("SQL", exact=True)
    text.fill("SELECT step, num_tokens, 'a, \"b\"' AS odd FROM steps WHERE run = 'seen' ORDER BY step")
    text.press("Control+Enter")
    expect(page.get_by_role("columnheader", name="odd")).to_be_visible(timeout=1000 * stretched(30))
    expect(page.get_by_text("6 rows in")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    lines = download.value.path().read_bytes().decode().split("\r\n")
    assert [lines[0], lines[7:]] == ["step,num_tokens,odd", [""]]
    assert all(line.endswith(',"a, ""b"""') for line in lines[1:7])

    assert visit.faults == []
    text.fill("SELECT stepp FROM steps")
    text.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("stepp", timeout=1000 * stretched(30))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path", ["/", "/runs/seen", "/runs/seen/trajectories/3", "/compare?run=seen", "/sql", "/launch"]
)
def test_every_view_fits_a_phone_in_light_and_dark(visit: Visit, path: str, scheme: str) -> None:
    visit.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    visit.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page = visit.open(path)
    expect(page.locator("h1")).to_be_visible()
    page.wait_for_load_state("networkidle")
    visit.check(f"phone-{scheme}{path.replace('/', '-').replace('?', '-')}")
