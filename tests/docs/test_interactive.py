"""The interactive page in a browser: sliders move, what is shown is compared with the formula."""

import math

import numpy as np
import pytest

from docs import check_site, export_lambda

pytestmark = pytest.mark.slow
MISSING = check_site.browser_missing()
PAGE = (export_lambda.FOLDER / "index.html").resolve().as_uri()


@pytest.fixture(scope="module")
def browser():
    if MISSING:
        pytest.skip(MISSING)
    with check_site.open_browser() as browser:
        yield browser


@pytest.fixture
def page(browser):
    with check_site.watched_page(browser, viewport={"width": 1280, "height": 900}) as (
        page,
        errors,
    ):
        page.goto(PAGE)
        yield page
        assert errors == []  # no error on the console, no request but file://


def slide(page, name: str, value: int) -> None:
    """Move a slider of whole steps by keys, from its low end."""
    page.focus(f"#{name}")
    page.keyboard.press("Home")
    for _ in range(value):
        page.keyboard.press("ArrowRight")


def shown(page, name: str) -> str:
    return page.text_content(f"#{name}")


@pytest.mark.parametrize(
    "stop, gate_steps, token, layer, head",
    [(1, 20, 0, 0, 0), (2, 1, 7, 3, 5), (3, 50, 20, 7, 2), (4, 80, 37, 5, 1), (4, 0, 12, 0, 4)],
)
def test_numbers_follow_the_formula(page, stop, gate_steps, token, layer, head):
    for name, value in [
        ("P", stop), ("g", gate_steps), ("token", token), ("layer", layer), ("head", head)
    ]:  # fmt: skip
        slide(page, name, value)
    data, gate = export_lambda.read_data(), gate_steps * 0.05
    entry = data["prefixes"][stop - 1]
    shape = (data["layers"], data["heads"], len(data["tokens"]))
    lse_p, lse_s = (export_lambda.unpacked(entry[k], shape) for k in ("lse_p", "lse_s"))
    r = gate * np.exp(lse_p - lse_s)
    lam, here = r / (1 + r), (layer, head, token)
    assert shown(page, "P-value") == str(entry["P"]) and shown(page, "g-value") == f"{gate:.2f}"
    assert math.isclose(float(shown(page, "lse-p")), lse_p[here], abs_tol=6e-4)  # three decimals
    assert math.isclose(float(shown(page, "lse-s")), lse_s[here], abs_tol=6e-4)
    assert math.isclose(float(shown(page, "r")), r[here], rel_tol=6e-4, abs_tol=1e-12)  # 4 digits
    assert math.isclose(float(shown(page, "lambda")), lam[here], abs_tol=6e-5)
    tokens = [float(x) for x in page.locator("#tokens small").all_text_contents()]
    assert np.abs(np.array(tokens) - 100 * lam[layer, head]).max() <= 0.501  # whole percents
    heat = [float(x) for x in page.locator("#heat td").all_text_contents()]
    assert np.abs(np.array(heat) - 100 * lam[..., token].ravel()).max() <= 0.501
    assert math.isclose(float(shown(page, "mean")), 100 * lam[..., token].mean(), abs_tol=0.051)


def test_without_a_prefix_there_is_no_share(page):
    slide(page, "P", 0)
    assert shown(page, "lambda") == "0.0000" and shown(page, "r") == "0.000"
    assert shown(page, "lse-p") == "−∞"
    assert set(page.locator("#heat td").all_text_contents()) == {"0"}


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_positions_and_mask_follow_the_prefix_length(page, stop):
    slide(page, "P", stop)
    slide(page, "token", 3)
    P, T = [0, *export_lambda.LENGTHS][stop], len(export_lambda.read_data()["tokens"])
    places = [int(x) for x in page.locator("#positions .where").all_text_contents()]
    assert places == [*range(P), *range(P, P + T)]
    page.uncheck("#offset")
    places = [int(x) for x in page.locator("#positions .where").all_text_contents()]
    assert places == [*range(P), *range(T)]
    cells = {
        kind: page.get_attribute(f"#mask path.{kind}", "d").count("M")
        for kind in ("prefix", "text", "hidden")
    }
    causal = T * (T + 1) // 2
    assert cells == {"prefix": P * T, "text": causal, "hidden": T * T - causal}
    assert f"{P + 4} keys" in shown(page, "mask-text")


def test_a_click_chooses_token_layer_and_head(page):
    page.locator("#tokens span").nth(5).click()
    page.locator("#heat tr").nth(3).locator("td").nth(4).click()  # row 0 is the head of the table
    chosen = [page.input_value(f"#{name}") for name in ("token", "layer", "head")]
    assert chosen == ["5", "2", "4"]
    assert page.locator("#tokens [aria-current]").count() == 1


def test_every_control_is_labelled_and_reached_by_tab(page):
    names = page.eval_on_selector_all("input", "all => all.map(e => [e.id, e.labels.length])")
    assert [n for _, n in names] == [1] * len(names) and len(names) == 6
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [x for x in reached if x in dict(names)] == [name for name, _ in names]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, scheme):
    options = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with check_site.watched_page(browser, **options) as (page, errors):
        page.goto(PAGE)
        assert page.evaluate(check_site.LOOKS)["wide"] <= 0 and errors == []
        assert page.get_attribute("html", "data-theme") == scheme
