"""The page of one run and of two: what is in it, and that no file name can harm it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from result_files import explained, row, write_results

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.command import main
from pyiqa_clipkd.report.charts import Axis, change_axis, score_axis
from pyiqa_clipkd.report.gallery import href
from pyiqa_clipkd.report.thumbnails import SIDE, make_thumbnail

EVIL = '<script>alert(1)</script>&"\'.jpg'


class Page(HTMLParser):
    """The elements of a page, and the text of each by its kind."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.html = file.read_text(encoding='utf-8')
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else '', data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        """All text that is shown."""
        shown = [t for tag, t in self.texts if tag not in ('style', 'script')]
        return ' '.join(' '.join(shown).split())

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        text = re.search(r'<script [^>]*id="data">(.*?)</script>', self.html, re.S)
        assert text
        data: dict[str, Any] = json.loads(text[1])
        return data

    def column(self, key: str) -> list[Any]:
        values: list[Any] = next(
            column['values'] for column in self.data['columns'] if column['key'] == key
        )
        return values


def report(folder: Path, *arguments: str) -> Page:
    """Run the command and read its page."""
    file = folder / 'report.html'
    assert main(['report', *arguments, '-o', str(file)]) == 0
    return Page(file)


def photograph(path: Path, size: tuple[int, int] = (300, 200)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (200, 40, 40)).save(path)
    return path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Twenty rows of which three are there as files and one is bad."""
    monkeypatch.chdir(tmp_path)
    for i in (0, 1, 18):
        photograph(Path(f'photos/{i:02d}.jpg'))
    scores: dict[str, Any] = {f'photos/{i:02d}.jpg': 1 + i / 5 for i in range(19)}
    scores['photos/broken.jpg'] = row(
        'photos/broken.jpg', None, 'truncated: 12 bytes are missing'
    )
    return str(write_results(tmp_path / 'run.csv', scores))


# --- one run --------------------------------------------------------------------------


def test_it_tells_what_was_scored_and_how_scores_lie(
    results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = report(tmp_path, results, '--title', 'Holidays & more')
    assert '19 scores, 1 bad files' in capsys.readouterr().out
    for words in (
        'Holidays & more',
        '19 photographs scored, mean 2.80.',
        '19 scored, 1 could not be',
        'clipkd_efficientnet_lite.safetensors, SHA-256 0123456789abcdef',
        '1 bad, 2 poor, 3 fair, 4 good, 5 perfect. Higher is better.',
        'Median 2.80',
        '75th percentile 3.70',
        'broken.jpg truncated: 12 bytes are missing',
    ):
        assert words in page.words
    assert page.data['files'][0]['names'][:2] == ['00.jpg', '01.jpg']
    assert page.column('score')[0] == 1
    assert page.column('score')[-1] is None
    assert page.column('error')[-1] == 'truncated: 12 bytes are missing'
    assert not any(c['key'] == 'notes' for c in page.data['columns'])  # all empty


def test_bars_count_every_score_once(results: str, tmp_path: Path) -> None:
    page = report(tmp_path, results)
    bars = [g for g in page.all('g') if g.get('role') == 'button']
    counts = [int(str(bar['aria-label']).split(', ')[-1].split()[0]) for bar in bars]
    assert sum(counts) == 19
    scores = [score for score in page.column('score') if score is not None]
    for bar, count in zip(bars, counts, strict=True):
        low = float(bar['data-from'] or -1)
        high = float(bar['data-below'] or 9)
        assert count == sum(low <= score < high for score in scores)


def test_the_words_on_scores_hold_for_every_metric(
    results: str, tmp_path: Path
) -> None:
    words = report(tmp_path, results).words
    assert '1 bad, 2 poor, 3 fair, 4 good, 5 perfect. Higher is better' in words
    assert 'of single photographs small differences mean little' in words


def test_thumbnails_are_inside_and_missing_files_leave_their_name(
    results: str, tmp_path: Path
) -> None:
    page = report(tmp_path, results, '--thumbnails', '3')
    images = page.all('img')
    assert [image['alt'] for image in images] == [
        'Photograph 00.jpg',
        'Photograph 01.jpg',
        'Photograph 18.jpg',
    ]
    for image in images:
        source = str(image['src'])
        assert source.startswith('data:image/jpeg;base64,')
        with Image.open(io.BytesIO(base64.b64decode(source.split(',')[1]))) as small:
            assert small.size == (192, 128)
    assert '02.jpg: no such file' in page.words
    for heading in ('Worst', 'Around the median', 'Best'):
        assert heading in page.words
    assert not report(tmp_path, results, '--thumbnails', '0').all('img')


def test_few_photographs_are_shown_once(results: str, tmp_path: Path) -> None:
    page = report(tmp_path, results, '--thumbnails', '12')
    assert 'All photographs, worst to best' in page.words
    assert len([li for li in page.all('li') if li.get('class') == 'card']) == 19


def test_a_thumbnail_is_small_and_upright(tmp_path: Path) -> None:
    file = tmp_path / 'turned.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (1200, 600)).save(file, exif=exif)
    code, problem = make_thumbnail(file)
    assert code
    assert not problem
    with Image.open(io.BytesIO(base64.b64decode(code.split(',')[1]))) as small:
        assert small.size == (SIDE // 2, SIDE)
    file.write_bytes(b'')
    assert make_thumbnail(file) == (None, 'the file is empty')


MEMORY = """
import re, sys
from pathlib import Path
from pyiqa_clipkd.report.thumbnails import make_thumbnails
made = make_thumbnails(Path(name) for name in sys.argv[1:])
assert all(code for code, _ in made.values()), made
print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='asks its /proc')
def test_thumbnails_of_large_photographs_take_little_memory(tmp_path: Path) -> None:
    files = [tmp_path / f'{number}.jpg' for number in range(4)]
    Image.new('RGB', (8000, 6000)).save(files[0])
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    shown = subprocess.run(
        [sys.executable, '-c', MEMORY, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(shown.stdout) < 150_000


def test_links_lead_to_the_files(results: str, tmp_path: Path) -> None:
    page = report(tmp_path, results)
    links = [a['href'] for a in page.all('a') if 'photos' in str(a['href'])]
    assert './photos/00.jpg' in links
    assert page.data['files'][0]['root'] == './photos'


def test_files_elsewhere_get_a_file_url(tmp_path: Path) -> None:
    file = photograph(tmp_path / 'here #1' / 'ä %.jpg')
    link = href(file, tmp_path / 'elsewhere' / 'report.html')
    assert link.startswith('file:///')
    assert Path(unquote(urlsplit(link).path)) == file
    odd = tmp_path / 'javascript:alert(1)'
    assert href(odd, tmp_path / 'report.html') == './javascript%3Aalert%281%29'


def test_a_path_beside_the_results_is_found_from_anywhere(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert len(report(tmp_path, '../run.csv').all('img')) == 3


# --- safety ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', [EVIL, '</script><img src=x onerror=alert(1)>.jpg'])
def test_no_name_becomes_an_element(tmp_path: Path, name: str) -> None:
    scores: dict[str, Any] = {'p/fine.jpg': 3.0, f'p/{name}': 2.0}
    scores[f'p/bad{name}'] = row(f'p/bad{name}', None, name, notes=name)
    plain: dict[str, Any] = {
        'p/fine.jpg': 3.0,
        'p/plain.jpg': 2.0,
        'p/bad': row('p/bad', None, 'x'),
    }
    pages = [
        report(tmp_path, str(write_results(tmp_path / f'{word}.csv', rows)))
        for word, rows in (('evil', scores), ('plain', plain))
    ]
    assert [tag for tag, _ in pages[0].elements] == [
        tag for tag, _ in pages[1].elements
    ]
    names = pages[0].data['files'][0]['names']
    assert names[1] == name
    evil = report(tmp_path, str(tmp_path / 'evil.csv'), '--title', name)
    assert len(evil.all('script')) == 2


def test_nothing_but_its_own_script_and_style_may_run(
    results: str, tmp_path: Path
) -> None:
    page = report(tmp_path, results)
    policies = [str(m['content']) for m in page.all('meta') if 'http-equiv' in m]
    assert len(policies) == 1
    rules = dict(rule.strip().split(' ', 1) for rule in policies[0].split(';'))
    assert rules['default-src'] == rules['base-uri'] == rules['form-action'] == "'none'"
    assert rules['img-src'] == 'data:'
    for rule, tag in (('style-src', 'style'), ('script-src', 'script')):
        body = re.search(f'<{tag}>(.*?)</{tag}>', page.html, re.S)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not any('style' in a or 'onclick' in a for _, a in page.elements)
    assert 'http' not in re.sub('http-equiv', '', page.html)


def test_a_name_that_is_no_utf_8_does_no_harm(tmp_path: Path) -> None:
    name = b'\xe9t\xe9.jpg'.decode('utf-8', 'surrogateescape')
    file = write_results(tmp_path / 'run.jsonl', {'a.jpg': 3.0, name: 2.0})
    assert '?t?.jpg' in report(tmp_path, str(file)).words
    assert href(tmp_path / name, tmp_path / 'r.html') == './%E9t%E9.jpg'


# --- two runs -------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A and B: twelve pairs, one alone on each side, one that is bad in B."""
    monkeypatch.chdir(tmp_path)
    photograph(Path('a/0.jpg'))
    photograph(Path('b/0.webp'))
    before: dict[str, Any] = {f'a/{i}.jpg': 2 + i / 10 for i in range(12)}
    after: dict[str, Any] = {f'b/{i}.webp': 2.5 + i / 12 for i in range(12)}
    before |= {'a/alone.jpg': 1.5, 'a/bad.jpg': 4.0}
    after |= {'b/other.webp': 4.5, 'b/bad.webp': None}
    return [
        str(write_results(tmp_path / 'a.csv', before)),
        str(write_results(tmp_path / 'b.csv', after)),
    ]


def test_two_runs_are_paired_row_by_row(two: list[str], tmp_path: Path) -> None:
    page = report(tmp_path, *two)
    first, second = (files['names'] for files in page.data['files'])
    rows = dict(
        zip(zip(first, second, strict=True), page.column('change'), strict=True)
    )
    assert rows['0.jpg', '0.webp'] == 0.5
    assert rows['6.jpg', '6.webp'] == pytest.approx(0.4, abs=1e-4)
    assert rows['bad.jpg', 'bad.webp'] is None
    assert rows['alone.jpg', None] is None
    assert rows[None, 'other.webp'] is None
    assert len(rows) == 15
    assert page.column('error')[12] == 'B: not an image'
    assert 'over 12 pairs; without a scored partner: 2 of A, 1 of B' in page.words
    assert 'B scores 0.41 higher' in page.words
    assert 'Rose most in B' in page.words
    assert 'Fell most in B' not in page.words
    assert 'Files of B that could not be scored' in page.words
    alts = [image['alt'] for image in page.all('img')]
    assert alts[:2] == ['Photograph 0.jpg', 'Photograph 0.webp']


def test_two_metrics_side_by_side_are_a_warning(two: list[str], tmp_path: Path) -> None:
    assert 'may mislead' not in report(tmp_path, *two).words
    scores: dict[str, Any] = {f'{i}.jpg': 3.0 for i in range(9)}
    other = write_results(tmp_path / 'c.csv', scores, metric='clipkd_swin')
    page = report(tmp_path, two[0], str(other))
    assert 'metric: clipkd_efficientnet_lite against clipkd_swin' in page.words


@pytest.mark.parametrize('count', [1, 2])
def test_a_run_without_any_score_has_a_page(tmp_path: Path, count: int) -> None:
    files = [
        str(write_results(tmp_path / f'{i}.csv', {'p/1.jpg': None, 'p/2.jpg': None}))
        for i in range(count)
    ]
    assert '0 photographs scored' in report(tmp_path, *files).words


# --- attributes -----------------------------------------------------------------------

LIGHT = {'good': 0.6, 'dark': 0.05}


@pytest.fixture
def why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A and B: 24 photographs; in B eight more are dark, and eight are noisy."""
    monkeypatch.chdir(tmp_path)
    runs = []
    for name, dark, noisy in (('a', 2, 0), ('b', 10, 8)):
        rows: dict[str, Any] = {}
        for i in range(24):
            light = LIGHT['dark' if i < dark else 'good'] + i / 1000
            values = (0.8, light, 0.5, 0.5, 0.05 if i < noisy else 0.7)
            rows[f'{i}'] = explained(f'{name}/{i}.jpg', 2 + i / 10, values)
        broken = f'{name}/broken.jpg'
        bad = dict.fromkeys(rows['0'], None) | {'faults': ''}
        rows['broken'] = bad | row(broken, None, 'the file is empty')
        runs.append(str(write_results(tmp_path / f'{name}.csv', rows)))
    return runs


def test_attributes_are_columns_and_faults_are_counted_and_on_cards(
    why: list[str], tmp_path: Path
) -> None:
    page = report(tmp_path, why[1])
    kinds = {column['key']: column['kind'] for column in page.data['columns']}
    keys = [*kinds]
    start = keys.index('sharpness')
    assert keys[start - 1 : start + 7] == [
        *('score_100', *ATTRIBUTES, 'faults', 'width')
    ]
    assert {kinds[name] for name in ATTRIBUTES} == {'attribute'}
    assert page.column('brightness')[8:11] == pytest.approx([0.058, 0.059, 0.61])
    assert page.column('brightness')[-1] is None
    assert page.column('faults')[7:9] == ['too dark; noisy', 'too dark']
    assert 'Faults 10 too dark, 8 noisy' in page.words
    assert 'too dark 10 (42%)' in page.words
    assert 'blurred 0 (0%)' in page.words
    assert 'Brightness 0.38' in page.words
    buttons = [b['data-fault'] for b in page.all('button') if 'data-fault' in b]
    assert buttons == ['blurred', 'too dark', 'flat', 'pale', 'noisy']
    assert '7.jpg 2.70 fair too dark, noisy 8.jpg' in page.words
    assert [s['name'] for s in page.all('select')] == ['column', 'level', 'fault']


def test_two_runs_show_the_differences_of_their_attributes(
    why: list[str], tmp_path: Path
) -> None:
    page = report(tmp_path, *why)
    assert 'B is noisier and darker than A.' in page.words
    assert 'Attributes, B - A Mean 99% interval Sharpness +0.000' in page.words
    assert 'too dark 2 (8%) 10 (42%)' in page.words
    assert page.column('brightness_change')[:3] == pytest.approx([0, 0, -0.55])
    assert page.column('noisiness_change')[0] == pytest.approx(-0.65)
    faults = [page.column(f'faults_{run}')[2] for run in 'ab']
    assert faults == ['', 'too dark; noisy']


def test_without_attributes_nothing_is_said_of_them(
    why: list[str], results: str, tmp_path: Path
) -> None:
    for files in ([results], [why[0], results], [results, results]):
        page = report(tmp_path, *files)
        told = page.words.lower()
        told += ' '.join(column['key'] for column in page.data['columns'])
        assert not re.search('attribute|sharpness|brightness_change', told)
        assert ('Faults' in page.words) == (why[0] in files)  # A's own, of its faults
        assert not any('data-fault' in button for button in page.all('button'))
        assert 'fault' not in [select['name'] for select in page.all('select')]


def test_a_fault_is_text_whatever_the_file_says(tmp_path: Path) -> None:
    odd = explained('p/1.jpg', 3.0, [0.5] * 5) | {'faults': f'{EVIL}; noisy'}
    page = report(tmp_path, str(write_results(tmp_path / 'odd.csv', {'1': odd})))
    assert f'{EVIL}, noisy' in page.words
    assert len(page.all('script')) == 2


# --- axes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'axis', [score_axis(['bad', 'good']), change_axis(np.array([-0.02, 0.3]))]
)
def test_outer_bars_have_no_end(axis: Axis) -> None:
    values = np.array([-99, *axis.edges, 99])
    assert axis.counts(values).sum() == len(values)
    assert axis.limits(0)[0] is None
    assert axis.limits(15)[1] is None
    assert axis.limits(8)[0] == pytest.approx(axis.edges[8])


def test_the_axis_of_changes_holds_nearly_all_of_them() -> None:
    draw = np.random.default_rng(0).normal(0, 0.1, 1000)
    assert change_axis(draw).edges[[0, 8, -1]].tolist() == [-0.5, 0, 0.5]
    assert change_axis(np.zeros(5)).edges[-1] == 0.1
    assert change_axis(np.array([-4.0, 4.0])).edges[-1] == 4


# --- mistakes -------------------------------------------------------------------------


def test_the_page_is_named_after_the_results(results: str) -> None:
    assert main(['report', results]) == 0
    assert Path('run.html').is_file()


def test_mistakes_are_one_clear_line(
    results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = photograph(tmp_path / 'x.png')
    for arguments, words in [
        ([results, results, results], '`results` must be one or two files, but got 3.'),
        ([results, '--thumbnails', '-1'], '`--thumbnails` must be >= 0, but got -1.'),
        ([results, '-o', 'none/x.html'], 'There is no folder none for the page.'),
        ([results, '-o', results], '`--output` would overwrite the results'),
        ([str(other)], 'x.png'),
        (['gone.csv'], 'gone.csv'),
    ]:
        assert main(['report', *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert words in lines[0]
    assert not (tmp_path / 'report.html').exists()
