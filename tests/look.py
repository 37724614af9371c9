"""Open pages in headless Chromium, from disk, as a reader would; `make look` calls this.

    .venv-look/bin/python tests/look.py OUT PAGE [PAGE …]

Every page is opened in light and dark, 400 and 1,600 pixels wide, with JavaScript on and off, and
as it prints. Fails, naming page and way, at a message on the console, a request for anything but
the page itself, a page wider than the window, a picture that did not load, or words whose contrast
with the ground is below 4.5. Screenshots go to OUT: look at them. Needs playwright
(requirements-look.txt) and a Chromium: on the PATH, in $CHROMIUM, or playwright's own.
"""
import os
import shutil
import sys
from itertools import product
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS, THEMES = (400, 1600), ("light", "dark")

# Every text on the page: the contrast of its colour with the ground behind it (WCAG 2).
CONTRAST = """() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const rgba = s => [...s.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; }
    return [255, 255, 255, 1] };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const e = node.parentElement, name = e.tagName.toLowerCase();
    if (!node.textContent.trim() || name === "title" || name === "style") continue;
    const how = getComputedStyle(e);
    const a = light(rgba(e.closest("svg") ? how.fill : how.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, node.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""
SHAPE = """() => [document.documentElement.scrollWidth, window.innerWidth,
  [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
  document.images.length]"""


def chromium(browsers):
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    try:
        return browsers.launch(executable_path=path, args=["--no-sandbox"])
    except Exception as e:
        raise SystemExit(f"error: no Chromium could be started ({str(e).splitlines()[0]}); install "
                         f"one (apt-get install chromium), or name it in $CHROMIUM")


def look(browser, page, width, theme, scripts, out):
    """One way to open a page; → what is wrong with it, and the least contrast."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme,
                                  java_script_enabled=scripts)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on("request", lambda request: request.url.startswith("data:") or request.url == url
           or wrong.append(f"request: {request.url}"))
    url = page.resolve().as_uri()
    tab.goto(url)
    tab.wait_for_load_state("load")
    wide, window, broken, count = tab.evaluate(SHAPE)
    if wide > window:
        wrong.append(f"{wide} pixels wide in a window of {window}")
    if broken:
        wrong.append(f"{broken} of {count} pictures did not load")
    contrast = tab.evaluate(CONTRAST)
    wrong += [f"contrast {ratio:.2f}: {said}" for ratio, said in contrast if ratio < 4.5]
    way = f"{width}-{theme}{'' if scripts else '-noscript'}"
    tab.screenshot(path=out / f"{page.parent.name}-{way}.png", full_page=True)
    if scripts and width == 1600 and theme == "light":
        tab.pdf(path=out / f"{page.parent.name}.pdf", format="A4")
    context.close()
    return [f"{page}, {way}: {line}" for line in wrong], contrast[0][0], len(contrast)


def main():
    out, *pages = map(Path, sys.argv[1:])
    for page in pages:
        if not page.exists():
            raise SystemExit(f"error: no page at {page}; python -m tools.page RUN writes one")
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser, wrong = chromium(play.chromium), []
        for page in pages:
            ways = [look(browser, page, *way, out)
                    for way in product(WIDTHS, THEMES, (True, False))]
            wrong += [line for lines, *_ in ways for line in lines]
            print(f"{page}: {len(ways)} ways, {ways[0][2]} texts, least contrast "
                  f"{min(least for _, least, _ in ways):.2f}")
        browser.close()
    print(f"screenshots: {out}")
    if wrong:
        raise SystemExit("\n".join(["error: what is wrong:", *dict.fromkeys(wrong)]))


if __name__ == "__main__":
    main()
