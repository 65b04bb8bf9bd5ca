"""The page in a real browser: opened from the file system, offline, and used."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from result_files import explained, row, write_results

from pyiqa_clipkd.command import main

playwright = pytest.importorskip(
    'playwright.sync_api', reason="needs playwright: pip install '.[browser]'"
)

pytestmark = pytest.mark.slow

OPTIONS = (
    *('--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-sync'),
    *('--disable-background-networking', '--disable-component-update'),
)
EVIL = [
    '<script>window.ran = 1</script>.jpg',
    '</script><script>window.ran = 2</script>.jpg',
    '<img src=x onerror="window.ran = 3">.jpg',
    '" onmouseover="window.ran = 4" x=".jpg',
    'javascript:window.ran=5',
]
COUNT = 10_000
MOST_MILLISECONDS = 300

# Text whose contrast is below WCAG's AA; what is disabled or hidden doesn't count.
LOW_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3)
    .map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const rgb = parse(getComputedStyle(e).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.ariaDisabled === 'true') continue;
    if (['SCRIPT', 'TITLE', 'title'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.textContent} ${ratio}`);
  }
  return low;
}"""


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    names = ('chromium', 'chromium-browser', 'google-chrome')
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip('needs Chromium (Debian: apt-get install chromium)')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end nothing may have gone wrong or been asked for."""
    contexts, problems, requests = [], [], []

    def open_page(file: Path, **options: Any) -> Any:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on('console', lambda message: problems.append(message.text))
        page.on('pageerror', lambda error: problems.append(str(error)))
        page.on('dialog', lambda dialog: problems.append(dialog.message))
        page.on('request', lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert all(url.startswith(('file:', 'data:')) for url in requests)
    assert len([url for url in requests if url.startswith('file:')]) == len(contexts)


def make(folder: Path, *results: Path) -> Path:
    file = folder / 'report.html'
    assert main(['report', *map(str, results), '-o', str(file)]) == 0
    return file


@pytest.fixture(scope='module')
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 scores from 1 to 5, two bad files, five names that want to run."""
    folder = tmp_path_factory.mktemp('one run')
    (folder / 'photos').mkdir()
    Image.new('RGB', (60, 40), 'teal').save(folder / 'photos' / 'a#%?0.jpg')
    scores: dict[str, Any] = {
        f'photos/a#%?{i}.jpg': float(s) for i, s in enumerate(np.linspace(1, 5, 120))
    }
    scores |= {
        f'photos/bad{i}.jpg': row(f'photos/bad{i}.jpg', None, 'the file is empty')
        for i in (1, 2)
    }
    scores |= {f'photos/{name}': 1.1 for name in EVIL}
    return make(folder, write_results(folder / 'run.csv', scores))


@pytest.fixture(scope='module')
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('two')
    draw = np.random.default_rng(0)
    scores = draw.uniform(2, 4, 80)
    change = draw.normal(0.1, 0.2, 80)
    a: dict[str, Any] = {f'a/{i}.jpg': float(s) for i, s in enumerate(scores)}
    b: dict[str, Any] = {f'b/{i}.jpg': float(s) for i, s in enumerate(scores + change)}
    a['a/alone.jpg'] = 3.0
    files = [write_results(folder / f'{n}.csv', s) for n, s in (('a', a), ('b', b))]
    return make(folder, *files)


@pytest.fixture(scope='module')
def why(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pages of a run with attributes, the i-th of 20 as sharp as i / 19; and of two."""
    folder = tmp_path_factory.mktemp('why')
    files = []
    for name, light in (('a', 0.05), ('b', 0.6)):
        rows: dict[str, Any] = {
            f'{i}': explained(f'{name}/{i}.jpg', 3.0, [i / 19, light, 0.5, 0.5, 0.5])
            for i in range(20)
        }
        files.append(write_results(folder / f'{name}.csv', rows))
    (folder / 'both').mkdir()
    return [make(folder, files[0]), make(folder / 'both', *files)]


def cells(page: Any, heading: str) -> list[str]:
    """What the rows show below a heading."""
    heads = page.locator('#rows thead th').all_inner_texts()
    place = [head.strip() for head in heads].index(heading)
    texts: list[str] = page.evaluate(
        'place => [...document.querySelectorAll("#rows tbody tr")]'
        '.map((row) => row.children[place].textContent)',
        place,
    )
    return texts


def status(page: Any) -> str:
    return str(page.get_by_role('status').inner_text())


def field(page: Any, role: str, name: str) -> Any:
    return page.get_by_role(role, name=name, exact=True)


def heading(page: Any, name: str) -> Any:
    return page.locator('#rows').get_by_role('columnheader', name=name, exact=True)


def test_a_heading_sorts_and_sorts_back(one: Path, show: Callable[..., Any]) -> None:
    page = show(one)
    assert heading(page, 'Score').get_attribute('aria-sort') == 'ascending'
    scores = [float(text) for text in cells(page, 'Score')]
    assert scores == sorted(scores)
    assert len(scores) == 50
    page.get_by_role('button', name='Score', exact=True).click()
    assert heading(page, 'Score').get_attribute('aria-sort') == 'descending'
    assert cells(page, 'Score')[:2] == ['5.00', '4.97']
    page.get_by_role('button', name='Photograph', exact=True).click()
    assert heading(page, 'Score').get_attribute('aria-sort') is None
    names = [text for text in cells(page, 'Photograph') if text.startswith('a#')]
    assert names[:3] == ['a#%?0.jpg', 'a#%?1.jpg', 'a#%?2.jpg']  # 2 before 10
    page.get_by_role('button', name='Last', exact=True).click()
    assert status(page) == 'Rows 101 to 127 of 127.'


def test_files_without_a_score_come_last_either_way(
    one: Path, show: Callable[..., Any]
) -> None:
    page = show(one)
    for _ in range(2):
        page.get_by_role('button', name='Last', exact=True).click()
        assert cells(page, 'Score')[-2:] == ['', '']
        assert cells(page, 'Score')[-3] != ''
        page.get_by_role('button', name='Score', exact=True).click()


def test_filters_leave_what_fits_them(one: Path, show: Callable[..., Any]) -> None:
    page = show(one)
    field(page, 'searchbox', 'Text').fill('A#%?11')
    assert status(page) == 'Rows 1 to 11 of 11, out of 127.'
    field(page, 'searchbox', 'Text').fill('is EMPTY')
    assert cells(page, 'Photograph') == ['bad1.jpg', 'bad2.jpg']
    page.get_by_role('button', name='Reset').click()
    page.get_by_text('Rows 1 to 50 of 127.').wait_for()
    field(page, 'checkbox', 'only errors').check()
    assert cells(page, 'Error') == ['the file is empty'] * 2
    field(page, 'checkbox', 'only errors').uncheck()
    field(page, 'spinbutton', 'from').fill('4')
    field(page, 'spinbutton', 'to below').fill('4.5')
    assert all(4 <= float(text) <= 4.5 for text in cells(page, 'Score'))
    assert status(page) == 'Rows 1 to 15 of 15, out of 127.'
    field(page, 'spinbutton', 'to below').fill('5')
    assert status(page) == 'Rows 1 to 30 of 30, out of 127.'  # 5 is in
    field(page, 'combobox', 'Level').select_option('good')
    assert set(cells(page, 'Level')) == {'good'}
    field(page, 'searchbox', 'Text').fill('nothing has this')
    assert status(page) == 'No row of 127 fits these filters.'


def test_bars_and_levels_filter_and_let_go(one: Path, show: Callable[..., Any]) -> None:
    page = show(one)
    bar = page.get_by_role('button', name='Scores: 2 to below 2.25, 8 photographs')
    bar.click()
    assert bar.get_attribute('aria-pressed') == 'true'
    assert status(page) == 'Rows 1 to 8 of 8, out of 127.'
    assert field(page, 'spinbutton', 'from').input_value() == '2'
    bar.press('Enter')
    assert bar.get_attribute('aria-pressed') == 'false'
    assert status(page) == 'Rows 1 to 50 of 127.'
    first = page.get_by_role('button', name='Scores: below 1.25, 13 photographs')
    first.press(' ')
    assert status(page) == 'Rows 1 to 13 of 13, out of 127.'
    first.click()
    page.get_by_role('button', name='perfect', exact=True).click()
    assert set(cells(page, 'Level')) == {'perfect'}
    assert field(page, 'combobox', 'Level').input_value() == 'perfect'


def test_the_keyboard_is_enough(one: Path, show: Callable[..., Any]) -> None:
    page = show(one)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.textContent') == 'Skip to the table'
    page.keyboard.press('Enter')
    page.keyboard.press('Tab')
    page.keyboard.type('bad1')
    assert cells(page, 'Photograph') == ['bad1.jpg']
    page.keyboard.press('Control+A')
    page.keyboard.press('Delete')
    for _ in range(20):
        page.keyboard.press('Tab')
        if (
            page.evaluate('document.activeElement.closest("th")?.dataset.key')
            == 'score'
        ):
            break
    page.keyboard.press('Enter')
    assert cells(page, 'Score')[0] == '5.00'
    outline = 'getComputedStyle(document.activeElement).outlineStyle'
    assert page.evaluate(outline) == 'solid'
    page.get_by_role('button', name='Next', exact=True).focus()
    for _ in range(4):
        page.keyboard.press('Enter')
    assert page.get_by_text('Page 3 of 3').is_visible()
    assert page.evaluate('document.activeElement.textContent') == 'Next'


def test_names_that_want_to_run_are_only_text(
    one: Path, show: Callable[..., Any]
) -> None:
    page = show(one)
    field(page, 'searchbox', 'Text').fill('window.ran')
    assert sorted(cells(page, 'Photograph')) == sorted(EVIL)
    for link in page.locator('#rows tbody a').all():
        link.hover()
        assert link.get_attribute('href').startswith('./photos/')
    assert page.evaluate('window.ran') is None


def test_a_link_leads_to_the_file(one: Path, show: Callable[..., Any]) -> None:
    page = show(one)
    url = page.evaluate('document.querySelector("#rows tbody a").href')
    assert Path(unquote(urlsplit(url).path)) == one.parent / 'photos' / 'a#%?0.jpg'


@pytest.mark.parametrize('protected', [True, False])
def test_the_page_can_load_and_run_nothing_else(
    browser: Any, one: Path, tmp_path: Path, protected: bool
) -> None:
    file = tmp_path / 'page.html'
    text = one.read_text()
    file.write_text(text if protected else text.replace('Content-Security', 'No'))
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(file.as_uri())
        page.evaluate(
            """async (url) => {
              const script = document.createElement('script');
              script.textContent = 'window.ran = 1';
              document.body.append(script);
              const image = new Image();
              const done = new Promise((resolve) => { image.onerror = resolve; });
              image.src = `${url}/image`;
              await done;
              await fetch(`${url}/fetch`).catch(() => 0);
            }""",
            f'http://127.0.0.1:{server.server_port}',
        )
        ran = page.evaluate('window.ran')
        page.close()
        server.shutdown()
    # Without its policy the page could: the test would see it.
    assert (ran, asked) == ((None, []) if protected else (1, ['/image', '/fetch']))


def test_ten_thousand_rows_sort_and_filter_at_once(
    tmp_path: Path, show: Callable[..., Any], record_property: Callable[..., None]
) -> None:
    draw = np.random.default_rng(0)
    scores: dict[str, Any] = {
        f'holidays/set {i % 40}/IMG_{i:05d}.jpg': float(score)
        for i, score in enumerate(draw.uniform(1, 5, COUNT))
    }
    file = make(tmp_path, write_results(tmp_path / 'run.csv', scores))
    page = show(file)
    assert status(page) == 'Rows 1 to 50 of 10,000.'
    assert page.locator('#rows tbody tr').count() == 50
    click = """key => {
      const button = document.querySelector(`th[data-key="${key}"] button`);
      const start = performance.now();
      button.click();
      button.getBoundingClientRect();  // the layout, too
      return performance.now() - start;
    }"""
    fill = """([name, value]) => {
      const field = document.querySelector(`#filters [name="${name}"]`);
      const start = performance.now();
      field.value = value;
      field.dispatchEvent(new Event('input', { bubbles: true }));
      field.getBoundingClientRect();
      return performance.now() - start;
    }"""
    times = {f'sort by {key}': page.evaluate(click, key) for key in ('name', 'score')}
    for name, value in (('text', 'img_09'), ('from', '3'), ('level', 'good')):
        times[f'filter by {name}'] = page.evaluate(fill, [name, value])
    assert 'out of 10,000' in status(page)
    record_property('milliseconds', times)
    record_property('megabytes', file.stat().st_size / 1e6)
    print(times, file.stat().st_size)
    assert max(times.values()) < MOST_MILLISECONDS


def test_two_runs_sort_and_filter_by_their_difference(
    two: Path, show: Callable[..., Any]
) -> None:
    page = show(two)
    changes = [float(text) for text in cells(page, 'B - A')]
    assert changes == sorted(changes)
    bar = page.locator('.bar[data-column="change"]').last
    count = str(bar.get_attribute('aria-label')).split(', ')[1].split()[0]
    bar.press('Enter')
    assert status(page) == f'Rows 1 to {count} of {count}, out of 81.'
    assert field(page, 'combobox', 'Of').input_value() == 'change'
    page.get_by_role('button', name='Reset').click()
    field(page, 'searchbox', 'Text').fill('alone')
    assert cells(page, 'Score A') == ['3.00']
    assert cells(page, 'Score B') == ['']


def test_attributes_and_faults_sort_and_filter(
    why: list[Path], show: Callable[..., Any]
) -> None:
    page = show(why[0])
    page.get_by_role('button', name='blurred', exact=True).click()
    assert set(cells(page, 'Faults')) == {'blurred; too dark'}
    assert status(page) == 'Rows 1 to 4 of 4, out of 20.'
    assert field(page, 'combobox', 'Fault').input_value() == 'blurred'
    page.get_by_role('button', name='blurred', exact=True).click()
    field(page, 'combobox', 'Of').select_option('sharpness')
    field(page, 'spinbutton', 'from').fill('0.9')
    field(page, 'spinbutton', 'to below').fill('1')
    assert cells(page, 'Sharpness') == ['0.95', '1.00']  # 1 is in
    page.get_by_role('button', name='Sharpness', exact=True).click()
    page.get_by_role('button', name='Sharpness', exact=True).click()
    assert cells(page, 'Sharpness') == ['1.00', '0.95']
    page = show(why[1])
    page.get_by_role('button', name='too dark', exact=True).click()
    assert status(page) == 'Rows 1 to 20 of 20.'
    assert set(cells(page, 'Brightness B - A')) == {'+0.55'}
    field(page, 'combobox', 'Of').select_option('brightness_change')
    field(page, 'spinbutton', 'to below').fill('0.4')
    assert status(page) == 'No row of 20 fits these filters.'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1200])
def test_it_fits_narrow_screens_and_can_be_read(
    one: Path,
    two: Path,
    why: list[Path],
    show: Callable[..., Any],
    scheme: str,
    width: int,
) -> None:
    for file in (one, two, *why):
        page = show(file, color_scheme=scheme, viewport={'width': width, 'height': 800})
        page.evaluate(
            'for (const d of document.querySelectorAll("details")) d.open = true'
        )
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.evaluate(LOW_CONTRAST) == []


def test_who_wants_no_motion_gets_none(one: Path, show: Callable[..., Any]) -> None:
    behaviour = 'getComputedStyle(document.documentElement).scrollBehavior'
    for motion, expected in (('reduce', 'auto'), ('no-preference', 'smooth')):
        assert show(one, reduced_motion=motion).evaluate(behaviour) == expected
