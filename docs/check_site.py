"""Checks a built site: its links, that it loads nothing from other sites, and how it looks.

    python -m docs.check_site runs/docs/html                 # the last step of `make docs`
    python -m docs.check_site runs/docs/html --shots FOLDER  # also a picture of every page

`make linkcheck` checks links to other sites, which needs a network. Each page is opened in a
browser (Chromium, driven by Playwright; without them this part is skipped with a message), at the
width of a desktop (light) and of a phone (dark). There must be no error on the console, no request
other than file://, nothing wider than the window, no picture without a description, no level of
headings left out, and no text with less contrast than WCAG asks for [1]. Equations must have the
site's font. The search must lead to the pages in SEARCHES.
[1] https://www.w3.org/TR/WCAG22/#contrast-minimum
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SCHEMES = {1280: "light", 390: "dark"}  # px: a desktop, a phone
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Page(HTMLParser):
    """The links of a page, the files that it loads, and the anchors in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])


def link_errors(site: Path) -> list[str]:
    """Links and loaded files that are missing or belong to another site."""
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    errors = [] if pages else [f"{site}: no pages there"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in page.links + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded and parts.scheme != "data":
                    errors.append(f"{name}: loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                errors.append(f"{name}: no {address}")
            elif parts.fragment and target in pages:
                fragments = pages[target].ids
                if unquote(parts.fragment) not in fragments and parts.fragment not in fragments:
                    errors.append(f"{name}: no place {address}")
    for path in site.rglob("*.css"):
        for address in re.findall(
            r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", path.read_text("utf-8")
        ):
            errors.append(f"{path.relative_to(site)}: loads {address}")
    return errors


def browser_missing() -> str:
    """Why the browser cannot be used; "" if it can."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "no playwright: pip install -r requirements-docs.txt"
    return "" if shutil.which("chromium") else "no chromium: apt-get install chromium"


@contextmanager
def open_browser() -> Iterator:
    """Debian's Chromium, without a display."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(browser, served: str = "file:", **options) -> Iterator:
    """A page, and a list that collects its errors and its requests, except for addresses that begin
    with `served`."""
    context, errors = browser.new_context(**options), []
    page = context.new_page()
    page.on("console", lambda m: m.type == "error" and errors.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: errors.append(f"script: {error}"))
    page.on(  # the icon may still be loading when the next page is opened
        "requestfailed",
        lambda r: r.failure == "net::ERR_ABORTED" or errors.append(f"failed: {r.url}"),
    )
    page.on(
        "request",
        lambda r: r.url.startswith((served, "data:", "blob:")) or errors.append(f"asks {r.url}"),
    )
    try:
        yield page, errors
    finally:
        context.close()


LOOKS = """async () => {
    await document.fonts.ready;
    const found = [], seen = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 1;
    const wide = document.documentElement.scrollWidth - window.innerWidth;
    if (wide > 0) found.push(`${wide} px wider than the window`);
    if (document.querySelector("math") && !document.fonts.check("16px 'STIX Two Math'"))
        found.push("the font of the equations was not loaded");
    for (const image of document.querySelectorAll("img:not([alt]), img[alt='']"))
        found.push(`nothing describes ${image.src}`);
    let level = 0;
    for (const heading of [...document.querySelectorAll("h1, h2, h3, h4, h5")].filter(seen)) {
        if (heading.tagName[1] > level + 1) found.push(`h${level} before ${heading.textContent}`);
        level = Number(heading.tagName[1]);
    }
    const light = (c) => c.reduce((sum, v, i) => sum + [0.2126, 0.7152, 0.0722][i] *
        (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4), 0);
    const colour = (text) => text.match(/[\\d.]+/g).map(  // r, g, b of 255 and perhaps alpha
        (v, i) => text.startsWith("color(srgb") && i < 3 ? 255 * v : Number(v));
    const mixed = (over, under) => [0, 1, 2].map((i) => {
        const alpha = over[3] ?? 1;
        return over[i] * alpha + under[i] * (1 - alpha);
    });
    const ground = (e) => e ? mixed(colour(getComputedStyle(e).backgroundColor),
        ground(e.parentElement)) : [255, 255, 255];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = new Set();
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || e.closest("script, style, svg") || !seen(e)) continue;
        const under = ground(e), style = getComputedStyle(e);
        const [a, b] = [light(mixed(colour(style.color), under)), light(under)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const large = parseFloat(style.fontSize) >= 24 || // or bold and nearly so
            (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
        if (ratio < (large ? 3 : 4.5))
            low.add(`contrast ${ratio.toFixed(1)} of ${e.tagName}.${e.className}: ${style.color}`);
    }
    return [...found, ...low];
}"""
SEARCHES = {  # words: the page that must come first
    "lambda": "tutorials/02_equation_3.html",
    "λ": "tutorials/02_equation_3.html",
    "install": "guides/install.html",
}
FOUND = "#search-results li > a"


def search_errors(browser, site: Path) -> list[str]:
    """Words for which the search does not find the right page first."""
    found = []
    for words, page in SEARCHES.items() if (site / "search.html").exists() else ():
        with watched_page(browser) as (search, _):  # summaries of pages need a server
            search.goto(f"{(site / 'search.html').resolve().as_uri()}?q={quote(words)}")
            search.wait_for_function(f"document.querySelector({FOUND!r})", timeout=20_000)
            if (first := search.get_attribute(FOUND, "href")) != page:
                found.append(f"search for {words}: {first} comes first, not {page}")
    return found


def browser_errors(site: Path, shots: Path | None) -> list[str]:
    """The faults of the pages in a browser; writes pictures to `shots`."""
    found = []
    shown = [p for p in sorted(site.rglob("*.html")) if "_modules" not in p.relative_to(site).parts]
    with open_browser() as browser:
        found += search_errors(browser, site)
        for width in SCHEMES:
            for scheme in ("light", "dark") if shots else (SCHEMES[width],):
                options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
                with watched_page(browser, **options) as (page, errors):
                    for path in shown:
                        name = path.relative_to(site)
                        page.goto(path.resolve().as_uri())
                        errors += page.evaluate(LOOKS)
                        found += [f"{name} at {width} px, {scheme}: {e}" for e in errors]
                        errors.clear()
                        if shots:
                            shot = f"{'-'.join(name.with_suffix('').parts)}-{width}-{scheme}.png"
                            page.screenshot(path=shots / shot, full_page=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a built site.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", type=Path, help="folder for a picture of every page")
    args = parser.parse_args()
    errors, missing = link_errors(args.site), browser_missing()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    if not missing:
        errors += browser_errors(args.site, args.shots)
    for error in errors:
        print(error, file=sys.stderr)
    pages = len(list(args.site.rglob("*.html")))
    print(
        f"{pages} pages, {len(errors)} errors"
        + (f"; not seen in a browser: {missing}" if missing else "")
    )
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
