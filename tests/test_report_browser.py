"""The page in a real browser: sorting, filtering, themes, small screens, paper, and no request."""

import base64
import os
import re
import shutil

import pytest

import analysis

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"  # Debian's
PHONE, DESKTOP = (360, 780), (1300, 900)
TABLE = 'table[data-table="headline_backend_jax_torch"]'


@pytest.fixture(scope="module")
def browser():
    trouble = _trouble()
    if trouble and os.environ.get("AERIE_REQUIRE_BROWSER") == "1":
        pytest.fail(trouble)
    if trouble:
        pytest.skip(trouble)
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # a driver that is named is not looked for on the network
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver") or DRIVER))
    yield driver
    driver.quit()


def _trouble() -> str | None:
    if shutil.which("chromium") is None and not os.path.exists(CHROMIUM):
        return "chromium is missing: the package chromium"
    if shutil.which("chromedriver") is None and not os.path.exists(DRIVER):
        return "chromedriver is missing: the package chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is missing: the extra test"
    return None


@pytest.fixture
def opened(browser, quickstart_report):
    """Opens the report (or another page) at a size, in a theme."""

    def open_(size=DESKTOP, theme="light", path=None):
        show(browser, size, theme)
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get((path or quickstart_report[1]).as_uri())
        return browser

    return open_


def show(browser, size, theme):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wanted = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def column(browser, name, table=TABLE):
    """The texts of a column, from top to bottom, of the rows that are shown."""
    return browser.execute_script(
        """const table = document.querySelector(arguments[0]);
        const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
        const place = heads.indexOf(arguments[1]);
        return [...table.tBodies[0].rows].filter((row) => row.offsetParent !== null)
          .map((row) => row.cells[place].querySelector(".lead, a").textContent.trim());""",
        table, name,
    )  # fmt: skip


def head(browser, name, table=TABLE):
    (found,) = [h for h in find(browser, f"{table} thead th") if h.text.split("\n")[0] == name]
    return found


def numbers(texts):
    """What they begin with; a dash is none."""
    found = [re.match(r"[\d,.]+", text) for text in texts]
    return [float(f[0].replace(",", "")) if f else None for f in found]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_overflows_fails_or_is_fetched(opened, quickstart_report, size, theme):
    browser = opened(size, theme)
    for folded in find(browser, "details"):
        browser.execute_script("arguments[0].open = true", folded)
    width, room = browser.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    )
    assert room == size[0]
    assert width <= room
    assert browser.get_log("browser") == []
    asked = re.findall(
        r'"Network.requestWillBeSent".*?"url":"([^"]+)"',
        "\n".join(entry["message"] for entry in browser.get_log("performance")),
    )
    assert set(asked) == {quickstart_report[1].as_uri()}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_and_as_one_wishes(opened, theme):
    browser = opened(theme=theme)

    def is_dark():
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128

    assert is_dark() == (theme == "dark")
    (button,) = find(browser, "header button")
    assert button.text == ("Light theme" if theme == "dark" else "Dark theme")
    button.click()
    assert is_dark() != (theme == "dark")
    browser.refresh()  # remembered in the page alone
    assert is_dark() == (theme == "dark")


def test_a_click_sorts_numbers_as_numbers(opened):
    browser = opened()
    before = column(browser, "jax")
    button = head(browser, "jax").find_element("css selector", "button")
    button.click()
    up = numbers(column(browser, "jax"))
    assert head(browser, "jax").get_attribute("aria-sort") == "ascending"
    known = [value for value in up if value is not None]
    assert known == sorted(known)
    assert len(known) > 5
    assert up[-1] is None  # the run that was lost comes last
    assert known != sorted(known, key=str)  # as texts they would lie otherwise
    button.click()
    down = numbers(column(browser, "jax"))
    assert head(browser, "jax").get_attribute("aria-sort") == "descending"
    assert [value for value in down if value is not None] == known[::-1]
    assert down[-1] is None
    assert sorted(column(browser, "jax")) == sorted(before)


def test_another_column_takes_the_sorting_over(opened):
    browser = opened()
    head(browser, "jax").find_element("css selector", "button").click()
    head(browser, "family").find_element("css selector", "button").click()
    assert head(browser, "jax").get_attribute("aria-sort") == "none"
    families = column(browser, "family")
    assert families == sorted(families)
    assert len(set(families)) == 3


@pytest.mark.parametrize("key", ["\ue007", " "], ids=["Enter", "Space"])
def test_the_keyboard_sorts(opened, key):
    browser = opened()
    button = head(browser, "torch").find_element("css selector", "button")
    browser.execute_script("arguments[0].focus()", button)
    browser.switch_to.active_element.send_keys(key)
    known = [value for value in numbers(column(browser, "torch")) if value is not None]
    assert known == sorted(known)
    assert head(browser, "torch").get_attribute("aria-sort") == "ascending"
    outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button)
    assert outline == "solid"  # the focus is seen


def test_a_filter_keeps_the_rows_that_hold_every_word(opened):
    browser = opened()
    (table,) = find(browser, TABLE)
    section = table.find_element("xpath", "../preceding-sibling::div[@class='bar'][1]")
    box = section.find_element("css selector", "input")
    total = len(column(browser, "family"))
    box.send_keys("GRIFFIN training")
    assert set(column(browser, "family")) == {"griffin"}
    assert set(column(browser, "suite")) == {"training_speed"}
    left = len(column(browser, "family"))
    assert 0 < left < total
    assert section.find_element("css selector", "output").text == f"{left} of {total} rows"
    box.clear()
    box.send_keys("nothing has this")
    assert column(browser, "family") == []
    box.clear()
    box.send_keys(" ")
    assert len(column(browser, "family")) == total


def test_a_number_opens_the_list_of_its_runs(opened, quickstart_report):
    store, _ = quickstart_report
    browser = opened(PHONE)
    link = find(browser, f"{TABLE} tbody tr:nth-child(2) td a[data-runs]:not([tabindex])")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.send_keys("\ue007")
    (dialog,) = find(browser, "dialog[open]")
    assert "From 3 runs." in dialog.text
    paths = [code.text for code in dialog.find_elements("css selector", "code")]
    assert len(paths) == 3
    for path in paths:
        assert path.startswith(str(store))
        assert os.path.isfile(path)
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert not find(browser, "dialog[open]")
    assert browser.switch_to.active_element == link


def test_without_scripts_it_is_a_plain_table(opened, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened()
        source = browser.page_source
        assert not find(browser, f"{TABLE} button")
        (link, *_) = find(browser, f"{TABLE} tbody a")
        assert link.get_attribute("href").endswith("#runs")
        assert source.count("<tr>") > 20
        assert all(row.is_displayed() for row in find(browser, f"{TABLE} tbody tr"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_script_that_is_not_the_page_s_own_does_not_run(opened, tmp_path, quickstart_report):
    text = quickstart_report[1].read_text(encoding="utf-8")
    path = tmp_path / "report.html"
    path.write_text(text.replace("<main", "<script>document.title = 'taken'</script><main"))
    browser = opened(path=path)
    assert browser.title == "Quickstart"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_hostile_labels_are_shown_and_do_nothing(opened, tmp_path):
    from test_report_page import HOSTILE, hostile_store

    store = hostile_store(tmp_path / "store")
    path = analysis.write_report(store, tmp_path / "report", title="T", command="c")
    browser = opened(PHONE, path=path)
    assert browser.get_log("browser") == []
    texts = column(browser, "reason", 'table[data-table="failures"]')
    assert HOSTILE[0] in texts
    width, room = browser.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    )
    assert width <= room


def test_it_has_what_screen_readers_go_by(opened):
    browser = opened()
    assert browser.execute_script("return document.documentElement.lang") == "en"
    for selector in ("main", "nav[aria-label]", "header", "a.skip[href='#content']"):
        assert len(find(browser, selector)) == 1, selector
    for table in find(browser, "table[data-table]"):
        assert table.find_element("css selector", "caption").get_attribute("textContent")
    assert not find(browser, "th:not([scope])")
    assert not find(browser, "section:not([aria-labelledby])")
    assert not find(browser, "figure svg[role=img]:not([aria-label])")
    unnamed = browser.execute_script(
        """return [...document.querySelectorAll("button, input, summary, a[href]")]
          .filter((one) => !(one.textContent.trim() || one.labels?.length)).length"""
    )
    assert unnamed == 0
    levels = [int(h.tag_name[1]) for h in find(browser, "main h2, main h3")]
    assert levels[0] == 2


def test_paper_shows_all_of_it(opened):
    browser = opened()
    made = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    data = base64.b64decode(made["data"])
    assert data[:5] == b"%PDF-"
    assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 5
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    show_all = browser.execute_script(
        """dispatchEvent(new Event("beforeprint"));
        const wide = [...document.querySelectorAll(".wide")].filter((box) => box.clientWidth);
        return [[...document.querySelectorAll("details")].every((one) => one.open),
                wide.every((box) => getComputedStyle(box).overflowX === "visible"), wide.length,
                getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector("nav")).display]"""
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    is_open, is_visible, count, paper, nav = show_all
    assert is_open
    assert is_visible
    assert count > 10
    assert paper == "rgb(255, 255, 255)"
    assert nav == "none"
