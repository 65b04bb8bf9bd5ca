"""Tables from recipes: the plan, raw rows, Markdown, processes that get killed."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
import yaml
from training_data import SIZE, data_options, finished, start, write_images

from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.model import iterations_that_run
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.reproduce import hours
from pyiqa_clipkd.reproduce.command import main
from pyiqa_clipkd.reproduce.cross import cross_markdown, cross_run
from pyiqa_clipkd.reproduce.data import iterations, make_split_file, own_data
from pyiqa_clipkd.reproduce.jobs import LOCKS, Jobs, clear_unfinished
from pyiqa_clipkd.reproduce.plan import VARIANTS, Run, expand
from pyiqa_clipkd.reproduce.recipe import Recipe
from pyiqa_clipkd.reproduce.report import markdown, read_paper
from pyiqa_clipkd.reproduce.results import COLUMNS, RawResults, Row

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
SCRIPT = ROOT / 'scripts' / 'reproduce.py'
PAPER = CONFIGS / 'results' / 'paper.csv'
STUDENTS = ('timm:test_efficientnet', 'timm:test_vit')


def variant_files(*names: str) -> list[Path]:
    return [CONFIGS / 'variants' / f'{name}.yml' for name in names]


def plan(data: str, **changes: Any) -> list[Run]:
    """Table II of a shipped recipe, or of a folder."""
    arguments: dict[str, Any] = {'variants': variant_files(*VARIANTS), **changes}
    return expand(Recipe(CONFIGS / data), **arguments)


# --- a tiny recipe -----------------------------------------------------------------


def write_recipe(folder: Path, data: Path, **train: Any) -> Path:
    """Recipes with a tiny teacher and two tiny students; `data` needn't be there."""
    folder.mkdir(exist_ok=True)
    augment = {'hflip': True, 'center_crop': SIZE}
    facts = {'protocol': 'tiny', 'images': 28}
    shared = data_options(data, augment=augment, **facts)['train']
    options: dict[str, Any] = {
        '_base_': str(CONFIGS / '_base_' / 'common.yml'),
        'num_gpu': 0,
        'data': {**shared, 'override_phase': 'test'},
        'datasets': {'train': {'override_phase': 'train'}, 'val': {}},
        'train': {'total_epoch': 2, 'optim': {'type': 'AdamW', 'lr': 1e-3}, **train},
        'logger': {'save_checkpoint_freq': 8, 'use_tb_logger': False},
    }
    teacher = options | {
        'name': 'teacher',
        'network': {
            'type': 'CLIPLikert',
            'encoder': 'timm:test_resnet',
            'pretrained': None,
            'input_size': SIZE,
            'embed_dim': 24,
        },
        'train': {**options['train'], 'mos_loss_opt': {'type': 'MSELoss'}},
    }
    student = options | {
        'name': 'student',
        'students': dict.fromkeys(STUDENTS),
        'network': {
            'type': 'CLIPKDStudent',
            'encoder': STUDENTS[0],
            'input_size': SIZE,
        },
        'teacher': {'cache': 'experiments/teacher_cache'},
        'train': {
            **options['train'],
            'distillation_loss_opt': {'type': 'CosineSoftHardLoss'},
        },
    }
    for stage, content in (('2_teacher', teacher), ('3_student', student)):
        text = yaml.safe_dump(json.loads(json.dumps(content)))
        (folder / f'stage{stage}.yml').write_text(text)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe whose data is missing; `tmp_path` is the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / 'recipe', tmp_path / 'data')


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """`main` takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --- the plan ----------------------------------------------------------------------


def test_table_2_of_koniq_has_each_variant_of_each_student_on_each_split() -> None:
    runs = plan('koniq10k', splits=range(1, 11))
    assert len(runs) == (10 + 1) * (1 + 4 * 7)
    assert len({run.name for run in runs}) == len(runs)
    assert {run.protocol for run in runs} == {'by_image', 'official'}
    assert {run.split for run in runs} == {*map(str, range(1, 11)), 'official'}
    assert runs[0].name.startswith(
        'koniq10k_by_image_ViT-B-32-quickgelu_teacher_split01_seed123_'
    )


def test_a_student_learns_from_the_teacher_of_its_own_split_and_seed() -> None:
    runs = plan('csiq', splits=(1, 2), seeds=(5, 6))
    for place, run in enumerate(runs):
        if run.variant in ('teacher', 'regression'):
            assert run.teacher is None
            assert not any(o.startswith('teacher:') for o in run.overrides)
            continue
        teacher = run.teacher
        assert teacher in runs[:place]
        assert teacher is not None
        same = ('data', 'protocol', 'split', 'seed')
        assert all(getattr(run, key) == getattr(teacher, key) for key in same)
        assert f'teacher:weights={teacher.weights}' in run.overrides


def test_what_a_run_is_started_with_expands_to_what_was_planned() -> None:
    for run in plan('csiq', splits=(3,), seeds=(9,)):
        options = load_options(run.files, run.overrides)
        options.pop('save_final_results_path')
        planned = dict(run.options)
        planned.pop('save_final_results_path')
        assert options == planned
        assert options['name'] == run.name


def test_table_1_also_has_the_untrained_network_where_there_is_a_recipe() -> None:
    def variants(data: str) -> list[str]:
        runs = plan(data, variants=variant_files('ours'), zeroshot=True)
        return [run.variant for run in runs if run.protocol != 'official']

    assert variants('koniq10k') == ['zeroshot', 'teacher', *['ours'] * 4]
    assert variants('biq2021') == ['teacher', *['ours'] * 2]


def test_synthetic_sets_are_split_by_reference_and_by_image() -> None:
    for data in ('csiq', 'live'):
        files = {
            run.protocol: run.options['datasets']['train']['meta_info_file']
            for run in plan(data)
        }
        assert set(files) == {'by_reference', 'by_image'}
        assert files['by_image'] == files['by_reference'][:-4] + '_by_image.csv'


def hashes(recipe: Path) -> dict[str, str]:
    runs = expand(Recipe(recipe), variants=variant_files('regression', 'ours'))
    return {run.variant: run.config for run in runs if run.student != STUDENTS[1]}


def edit(file: Path, **changes: Any) -> None:
    options = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        options[key] = {**options.get(key, {}), **value}
    file.write_text(yaml.safe_dump(options))


def test_an_edited_recipe_gets_new_names(recipe: Path) -> None:
    before = hashes(recipe)
    edit(recipe / 'stage3_student.yml', network={'input_size': 48})
    after = hashes(recipe)
    assert after['teacher'] == before['teacher']
    assert after['ours'] != before['ours']
    assert after['regression'] != before['regression']


def test_an_edited_teacher_renames_those_who_learn_from_it(recipe: Path) -> None:
    before = hashes(recipe)
    edit(recipe / 'stage2_teacher.yml', network={'embed_dim': 16})
    after = hashes(recipe)
    assert after['teacher'] != before['teacher']
    assert after['ours'] != before['ours']
    assert after['regression'] == before['regression']


def test_settings_of_the_machine_change_no_name(recipe: Path) -> None:
    before = hashes(recipe)
    student = recipe / 'stage3_student.yml'
    edit(
        student,
        data={'num_worker_per_gpu': 7, 'pin_memory': True, 'images': 3},
        logger={'print_freq': 3, 'save_checkpoint_freq': 5},
        teacher={'cache': 'elsewhere'},
    )
    text = student.read_text().replace('num_gpu: 0', 'num_gpu: 4')
    student.write_text(text.replace('name: student', 'name: other'))
    assert hashes(recipe) == before


def test_a_hash_says_nothing_of_split_and_seed(recipe: Path) -> None:
    runs = expand(
        Recipe(recipe),
        variants=variant_files('ours'),
        students=STUDENTS[:1],
        splits=(1, 2),
        seeds=(1, 2),
    )
    assert len(runs) == 2 * 4
    assert len({run.config for run in runs}) == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--data', 'imagenet'], "one of biq2021, .*spaq.* but got 'imagenet'"),
        (['--students', 'vgg'], "student must be one of timm:.* but got 'vgg'"),
        (['--variants', 'harder'], "variant must be one of .*ridge.*'harder'"),
        (['--protocol', 'official'], "protocol must be one of tiny .*'official'"),
        (['--data', 'own.yml', '--recipe', 'none'], '`--recipe`: there is no'),
    ],
)
def test_a_wrong_word_is_one_clear_line(
    recipe: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path('own.yml').write_text('data: {name: own}\n')
    assert main(ROOT, ['table2', '--data', str(recipe), *arguments, '--dry-run']) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ('images', 'batch', 'total'),
    [
        (22, 4, {'total_epoch': 2}),
        (22, 5, {'total_epoch': 7}),
        (16, 4, {'total_iter': 9}),
    ],
)
def test_the_planned_iterations_are_those_that_run(
    recipe: Path, images: int, batch: int, total: dict[str, int]
) -> None:
    options = load_options(recipe / 'stage2_teacher.yml')
    options['train'] = {'total_epoch': None, **total}
    options['dist'] = False
    options['datasets']['train'] |= {'batch_size_per_gpu': batch, 'phase': 'train'}
    # Without data: four fifths of what the recipe says.
    options['datasets']['train']['images'] = images * 5 / 4
    expected = iterations(options)
    write_images(Path('data'), train=images)
    assert iterations(options) == iterations_that_run(options) == expected


# --- dry run -----------------------------------------------------------------------


def test_a_dry_run_needs_no_data_and_writes_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps are timed: a tenth of a second each, however busy the machine is.
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.1).__next__)
    monkeypatch.setattr(hours, 'time', clock)
    before = sorted(recipe.parent.rglob('*'))
    arguments = ['--variants', 'soft', 'ours', '--splits', '1-3', '--dry-run']
    assert main(ROOT, ['table2', '--data', str(recipe), *arguments]) == 0
    output = capsys.readouterr().out
    assert output.startswith('tiny: there is no ')
    lines = [line.split() for line in output.splitlines() if '_split0' in line]
    assert len(lines) == 3 * (1 + 2 * 2)
    assert {' '.join(line[:2]) for line in lines} == {'data missing'}
    assert {line[2] for line in lines} == {'12'}
    assert '15 runs, 0 of them finished; 180 iterations to do, about 0.0' in output
    assert 'timm:test_resnet (4 images of 32 px)' in output
    assert sorted(recipe.parent.rglob('*')) == before


def test_expected_hours_come_from_finished_runs(recipe: Path) -> None:
    runs = expand(Recipe(recipe), variants=variant_files('ours'), splits=(1, 2))
    student = next(run for run in runs if run.student == STUDENTS[0])
    rows = [
        row(data=student.data, student=student.student, seconds=s, iterations='10')
        for s in ('3000', '4000', '9000')
    ]
    assert hours.Hours(rows).of(student, 12) == pytest.approx(12 * 400 / 3600)


def test_missing_data_is_one_message_a_set_and_the_others_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(ROOT, ['table1', '--data', 'csiq', 'biq2021', '--splits', '1']) == 1
    output = capsys.readouterr().out
    assert output.count('csiq: there is no') == 1
    assert 'CSIQ/dst_imgs' in output
    assert 'csiq.tgz) is at https://huggingface.co/' in output
    assert 'at https://github.com/nisarahmedrana/BIQ2021' in output


def test_download_asks_the_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pyiqa

    asked = []

    def load_dataset(name: str, data_root: str) -> None:
        asked.append((name, data_root))
        raise ConnectionError('no network')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyiqa, 'load_dataset', load_dataset)
    arguments = ['--splits', '1', '--download']
    assert main(ROOT, ['table1', '--data', 'csiq', 'spaq', *arguments]) == 1
    assert asked == [('csiq', 'datasets'), ('spaq', 'datasets')]
    output = capsys.readouterr().out
    assert 'The download of spaq failed (ConnectionError: no network).' in output


# --- data --------------------------------------------------------------------------


def test_splits_by_image_are_made_from_the_hosts_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path('datasets/meta_info')
    folder.mkdir(parents=True)
    original = folder / 'meta_info_CSIQDataset.csv'
    rows = [[f'r{i // 20}', f'd{i}', i / 100, 'train'] for i in range(100)]
    columns = ['ref_name', 'dist_name', 'dmos', 'ratio802_seed123_split_01']
    pd.DataFrame(rows, columns=columns).to_csv(original, index=False)
    before = original.read_bytes()
    recipe = Recipe(CONFIGS / 'csiq')
    run = plan('csiq', protocols=['by_image'])[0]
    made = make_split_file(recipe, run)
    assert made == folder / 'meta_info_CSIQDataset_by_image.csv'
    table = pd.read_csv(made)
    held_out = table[table['ratio802_seed123_split_02'] == 'val']
    assert len(held_out) == 20
    assert held_out['ref_name'].nunique() > 1  # contents are on both sides
    assert set(table) == {
        *columns,
        *(f'ratio802_seed123_split_{i:02d}' for i in range(1, 11)),
    }
    assert original.read_bytes() == before
    assert make_split_file(recipe, run) is None


def test_own_scores_become_an_option_file_with_splits(tmp_path: Path) -> None:
    meta = write_images(tmp_path / 'data')
    file = own_data(meta, tmp_path / 'data/images', tmp_path / 'out', group='mos')
    runs = expand(
        Recipe(CONFIGS / 'koniq10k', (file,)),
        variants=variant_files('ours'),
        students=['swin'],
        splits=(4,),
    )
    assert [run.data for run in runs] == ['meta', 'meta']
    assert {run.protocol for run in runs} == {'by_group'}
    data = runs[1].options['datasets']['train']
    scores = pd.read_csv(meta)['mos']
    assert data['mos_range'] == [scores.min(), scores.max()]
    assert data['source'] is None
    table = pd.read_csv(data['meta_info_file'])
    assert (table['ratio802_seed123_split_04'] == 'train').sum() == 22
    before = runs[1].config
    meta.write_text(meta.read_text().replace('0.', '0.1'))
    again = own_data(meta, tmp_path / 'data/images', tmp_path / 'out', group='mos')
    assert file.is_file()
    changed = expand(
        Recipe(CONFIGS / 'koniq10k', (again,)),
        variants=variant_files('ours'),
        students=['swin'],
    )
    assert changed[1].config != before


def test_other_groups_are_another_configuration(tmp_path: Path) -> None:
    meta = write_images(tmp_path / 'data')
    table = pd.read_csv(meta)
    table.assign(scene=table.index // 4).to_csv(meta, index=False)
    hashes = []
    for group in (None, 'scene', 'scene'):
        file = own_data(meta, tmp_path / 'data/images', tmp_path / 'out', group=group)
        recipe = Recipe(CONFIGS / 'koniq10k', (file,))
        runs = expand(recipe, variants=variant_files('ours'), students=['swin'])
        hashes.append(runs[1].config)
    assert hashes[0] != hashes[1] == hashes[2]


def test_own_scores_that_are_none_are_refused(tmp_path: Path) -> None:
    meta = write_images(tmp_path / 'data')
    images = tmp_path / 'data/images'
    with pytest.raises(ValueError, match=r"one of img_name, mos, .*'scene'"):
        own_data(meta, images, tmp_path, group='scene')
    with pytest.raises(FileNotFoundError, match='`--csv` must be a file'):
        own_data(tmp_path / 'none.csv', images, tmp_path)
    meta.write_text('image,score\na.png,good\n')
    with pytest.raises(ValueError, match="must be the score, but got 'score'"):
        own_data(meta, images, tmp_path)


# --- raw rows and Markdown ---------------------------------------------------------


def row(**values: str) -> Row:
    first = {
        'data': 'csiq',
        'protocol': 'by_reference',
        'student': 'resnet18',
        'variant': 'ours',
        'split': '1',
        'seed': '123',
        'plcc': '0.9',
        'srcc': '0.8',
        'config': 'c',
    }
    whole = dict.fromkeys(COLUMNS, '') | first | values
    name = [whole[key] for key in COLUMNS[:6]] + [whole['config']]
    return whole | {'name': '_'.join(name)}


def test_raw_rows_are_kept_in_an_order_of_their_own(tmp_path: Path) -> None:
    rows = [
        row(split=s, student=e) for s in ('10', '2', 'official') for e in ('b', 'a')
    ]
    raw = RawResults(tmp_path / 'new' / 'raw.csv')
    raw.write(rows)
    first = raw.path.read_bytes()
    order = [(r['student'], r['split']) for r in raw.read().values()]
    assert order == [(e, s) for e in ('a', 'b') for s in ('2', '10', 'official')]
    raw.write(reversed(rows))
    assert raw.path.read_bytes() == first
    assert [path.name for path in raw.path.parent.iterdir()] == ['raw.csv']


def test_markdown_has_medians_the_papers_figures_and_paired_differences() -> None:
    ours = {'1': '0.91', '2': '0.95', '3': '0.90'}
    regression = {'1': '0.90', '2': '0.96', '4': '0.10'}
    rows = [
        row(variant='teacher', student='clip', plcc='0.95', srcc='0.94'),
        *(row(split=s, plcc=p) for s, p in ours.items()),
        *(row(split=s, plcc=p, variant='regression') for s, p in regression.items()),
    ]
    text = markdown('Table 2', rows, read_paper(PAPER))
    assert text.splitlines()[0] == '# Table 2'
    assert '## csiq, by_reference' in text
    assert '| clip | teacher | 1 | 0.950 | 0.940 |  |  |' in text
    line = '| resnet18 | ours | 3 | 0.910 [0.900 to 0.950] | 0.800 [0.800 to 0.800] |'
    assert f'{line} 0.980 | 0.976 |' in text
    assert '| 0.900 [0.100 to 0.960] | 0.800 [0.800 to 0.800] | 0.968 |  |' in text
    # Splits 1 and 2 have both: +0.01 and -0.01.
    pairs = '| resnet18 | ours - regression | 2 | +0.000 [-0.010 to +0.010] | 1 |'
    assert f'{pairs} +0.000 [+0.000 to +0.000] | 0 |' in text
    assert '| resnet18 | ours - teacher | 1 | -0.040 | 0 | -0.140 | 0 |' in text
    order = [text.index(f'| {word} |') for word in ('teacher', 'regression', 'ours')]
    assert order == sorted(order)


def test_results_of_an_edited_recipe_do_not_mix_with_old_ones() -> None:
    rows = [row(config='old', plcc='0.1'), row(config='new', plcc='0.7')]
    rows += [row(data='spaq', config='old', plcc='0.3')]
    rows += [row(student='swin', config='old', plcc='0.4')]
    text = markdown('Table 1', rows, {}, current={'new'})
    assert '0.100' not in text
    assert '0.700' in text
    assert '0.300' in text  # of a data set that isn't planned now
    assert '0.400' in text  # of a student that isn't
    both = markdown('Table 1', rows, {})
    assert '| ours (new) | 1 | 0.700 |' in both
    assert '| ours (old) | 1 | 0.100 |' in both
    assert 'paper' not in text


def test_the_papers_figures_are_whole_and_agree_with_its_text() -> None:
    with PAPER.open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 + 64
    tables: dict[str, dict[tuple[str, ...], float]] = {'1': {}, '2': {}}
    for r in rows:
        tables[r['table']][r['data'], r['student'], r['variant']] = float(r['plcc'])
        assert bool(r['srcc']) == (r['table'] == '1')
    two = tables['2']
    assert all(two[key] == plcc for key, plcc in tables['1'].items())
    gains = [two[d, s, 'ours'] - two[d, s, 'regression'] for d, s, _ in tables['1']]
    # "(4) achieves an average improvement of 0.016 in PLCC compared to (1)"
    assert sum(gains) / len(gains) == pytest.approx(0.016, abs=0.001)


def test_a_cross_test_takes_the_images_of_one_and_the_network_of_the_other() -> None:
    trained = plan('biq2021', variants=variant_files('ours'), students=['resnet18'])[1]
    run = cross_run(trained, Recipe(CONFIGS / 'koniq10k'), None, Path('out'))
    options = run.options
    data = options['datasets']['test_1']
    assert run.is_test
    assert run.name.startswith(f'{trained.name}_on_koniq10k_')
    other = cross_run(trained, Recipe(CONFIGS / 'spaq'), None, Path('out'))
    assert run.name[-8:] != other.name[-8:]  # the hash of the test set's options
    assert options['path']['pretrain_network'] == trained.weights.as_posix()
    assert options['network']['encoder'] == 'resnet18'
    assert options['network']['encoder_weights'] is None
    assert data['mos_range'] == [1, 100]
    assert data['batch_size_per_gpu'] == 32
    assert data['split_index'] is None  # the whole set
    side = cross_run(trained, Recipe(CONFIGS / 'koniq10k'), 2, Path('out'))
    assert side.options['datasets']['test_1']['override_phase'] == 'val'
    assert side.name != run.name


def test_cross_results_are_medians_over_the_trained_networks() -> None:
    rows = [
        row(split=s, plcc=p) | {'train_data': 'biq2021', 'test_data': 'csiq'}
        for s, p in (('1', '0.5'), ('2', '0.7'))
    ]
    line = '| biq2021 | csiq | by_reference | resnet18 | ours | 2 |'
    assert f'{line} 0.600 [0.500 to 0.700] | 0.800' in cross_markdown(rows)


# --- processes ---------------------------------------------------------------------

# What a training is to `Jobs`: it leaves a record. These take no time.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
name = next(w[5:] for w in sys.argv if w.startswith('name='))
folder = Path('experiments', name)
print('training', name, 'with', os.environ['OMP_NUM_THREADS'], flush=True)
if Path('wait').exists():
    Path('pids').mkdir(exist_ok=True)
    Path('pids', str(os.getpid())).touch()
    time.sleep(60)
if Path('fail').exists() and Path('fail').read_text() in name:
    sys.exit('out of luck')
(folder / 'models').mkdir(parents=True)
(folder / 'models' / 'net_best.pth').touch()
(folder / 'models' / 'net_7.pth').touch()
value = {'val': 0.5, 'iter': 7}
record = {'results': {'tiny': {'srcc': value, 'plcc': value}}, 'seconds': 3}
(folder / 'run.json').write_text(json.dumps(record | {'commit': 'abc'}))
"""

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_reproduce import jobs_of
jobs, runs = jobs_of(Path('recipe'))
sys.exit(bool(jobs.run(runs)))
"""


def jobs_of(recipe: Path) -> tuple[Jobs, list[Run]]:
    """Two jobs at once with the stand-in; a teacher and two students."""
    scripts = Path('scripts')
    scripts.mkdir(exist_ok=True)
    (scripts / 'train.py').write_text(STAND_IN)
    raw = RawResults(Path('raw.csv'))
    jobs = Jobs(scripts, logs=Path('logs'), at_once=2, collect=raw.collect)
    runs = expand(
        Recipe(recipe),
        variants=variant_files('ours', 'regression'),
        students=STUDENTS[:1],
    )
    return jobs, runs


def driver(tmp_path: Path) -> subprocess.Popen[str]:
    code = DRIVER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it took too long'
        time.sleep(0.02)


def is_alive(pid: str) -> bool:
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except FileNotFoundError:
        return False
    return state != 'Z'


def test_runs_become_rows_and_keep_the_best_weights_alone(recipe: Path) -> None:
    jobs, runs = jobs_of(recipe)
    assert jobs.run(runs) == set()
    rows = RawResults(Path('raw.csv')).read()
    assert set(rows) == {run.name for run in runs}
    student = rows[runs[1].name]
    assert student['variant'] == 'ours'
    assert student['plcc'] == student['teacher_plcc'] == '0.5000'
    assert rows[runs[2].name]['teacher_plcc'] == ''
    assert (student['iterations'], student['seconds']) == ('7', '3')
    assert student['commit'] == 'abc'
    assert [p.name for p in (runs[1].folder / 'models').iterdir()] == ['net_best.pth']


def test_a_failed_run_is_told_with_its_log_and_the_others_go_on(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('fail').write_text('_teacher_')
    jobs, runs = jobs_of(recipe)
    teacher, student, regression = runs
    assert jobs.run(runs) == {teacher, student}
    assert list(RawResults(Path('raw.csv')).read()) == [regression.name]
    output = capsys.readouterr().out
    assert f'FAILED {teacher.name}: exit code 1' in output
    assert '    out of luck' in output
    assert f'FAILED {student.name}: its teacher failed.' in output


def test_cores_and_gpus_are_shared_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    jobs, _ = jobs_of(recipe)
    jobs.gpus = ['4', '7']
    assert [jobs._environment(i)['CUDA_VISIBLE_DEVICES'] for i in (0, 1)] == ['4', '7']
    threads = int(jobs._environment(0)['OMP_NUM_THREADS'])
    assert threads == max(1, usable_cores() // 2)
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert jobs._environment(0)['OMP_NUM_THREADS'] == '3'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='looks at /proc')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_the_trainings_end_with_the_command_however_it_ends(
    recipe: Path, how: signal.Signals
) -> None:
    Path('wait').touch()
    process = driver(recipe.parent)
    try:
        wait_until(lambda: len(list(Path().glob('pids/*'))) == 2)
    finally:
        process.send_signal(how)
        process.communicate()
    pids = [path.name for path in Path('pids').iterdir()]
    wait_until(lambda: not any(is_alive(pid) for pid in pids), seconds=10)


@pytest.mark.skipif(sys.platform == 'win32', reason='needs locks of Unix')
def test_a_run_that_another_process_has_is_waited_for(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    jobs, runs = jobs_of(recipe)
    run = runs[2]
    LOCKS.mkdir(parents=True)
    with (LOCKS / run.name).open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # It holds the lock for a second, then has a result.
        code = f'import time; time.sleep(1); exec({STAND_IN!r})'
        other = subprocess.Popen(
            [sys.executable, '-c', code, f'name={run.name}'],
            pass_fds=[lock.fileno()],
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.DEVNULL,
        )
    assert jobs.run([run]) == set()
    assert other.wait() == 0
    output = capsys.readouterr().out
    assert f'waiting for the process that has {run.name}' in output
    assert 'started' not in output
    assert list(RawResults(Path('raw.csv')).read()) == [run.name]


def test_only_a_folder_that_can_go_on_is_kept(recipe: Path) -> None:
    _, runs = jobs_of(recipe)
    for run in runs:
        for name in ('models', 'training_states'):
            (run.folder / name).mkdir(parents=True)
        (run.folder / 'training_states' / '5.state').touch()
    (runs[0].folder / 'models' / 'net_5.pth').touch()
    (runs[1].folder / 'models' / 'net_4.pth').touch()
    for run in runs:
        clear_unfinished(run)
    assert [run.folder.exists() for run in runs] == [True, False, False]


def test_a_teacher_whose_weights_are_gone_is_trained_again_for_its_students(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, runs = jobs_of(recipe)
    jobs.run(runs[:1])
    runs[0].weights.unlink()
    arguments = ['--students', STUDENTS[0], '--splits', '1', '--dry-run']
    command = ['table2', '--data', str(recipe), *arguments, '-o', '.']
    assert main(ROOT, [*command, '--variants', 'regression']) == 0
    assert '1 of them finished' in capsys.readouterr().out
    assert main(ROOT, [*command, '--variants', 'ours']) == 0
    assert '0 of them finished' in capsys.readouterr().out


# --- the real thing ----------------------------------------------------------------


def reproduce(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start(folder, str(SCRIPT), *arguments)


def raw_rows(folder: Path) -> list[Row]:
    """All but the seconds, and the commit, which may change while a test runs."""
    with (folder / 'out' / 'raw.csv').open(newline='') as file:
        return [row | {'seconds': '', 'commit': ''} for row in csv.DictReader(file)]


def logged(folder: Path) -> int:
    """Bytes in the logs: progress that no machine's load decides."""
    return sum(path.stat().st_size for path in folder.glob('out/logs/*'))


def has_logged(folder: Path, size: float) -> bool:
    return logged(folder) >= size


@pytest.mark.slow
def test_a_table_killed_five_times_has_the_rows_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    write_images(tmp_path / 'data')
    recipe = write_recipe(tmp_path / 'recipe', tmp_path / 'data', total_epoch=10)
    arguments = ['table2', '--data', str(recipe), '--splits', '1', '-o', 'out']
    arguments += ['--variants', 'regression', 'soft', 'ours']
    whole = tmp_path / 'whole'
    output = finished(reproduce(whole, *arguments), timeout=1500)
    assert output.count('finished ') == 1 + 2 * 3

    killed = tmp_path / 'killed'
    rng = random.Random(0)
    for _ in range(5):
        process = reproduce(killed, *arguments, '--jobs', '2')
        end = logged(killed) + rng.uniform(0.02, 0.2) * logged(whole)
        wait_until(functools.partial(has_logged, killed, end), seconds=300)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'it had finished already'
    finished(reproduce(killed, *arguments, '--jobs', '2'), timeout=1500)

    assert len(raw_rows(whole)) == 7
    assert raw_rows(killed) == raw_rows(whole)
    assert {row['iterations'] for row in raw_rows(whole)} == {'55'}
    tables = [(folder / 'out' / 'TABLE.md').read_text() for folder in (whole, killed)]
    assert tables[0] == tables[1]
    assert '| timm:test_efficientnet | ours - regression | 1 |' in tables[0]
    assert not list(killed.glob('experiments/*archived*'))

    again = finished(reproduce(killed, *arguments), timeout=1500)
    assert 'started' not in again


@pytest.mark.slow
def test_trained_networks_are_tested_on_another_data_set(tmp_path: Path) -> None:
    write_images(tmp_path / 'data')
    recipe = write_recipe(tmp_path / 'recipe', tmp_path / 'data')
    common = ['--splits', '1', '--students', STUDENTS[1], '--variants', 'ours']
    common += ['--recipe', str(recipe), '-o', 'out']
    meta = write_images(tmp_path / 'other', train=5, test=9)
    other = own_data(meta, tmp_path / 'other' / 'images', tmp_path)
    arguments = ['cross', '--train', str(recipe), '--test', str(other), *common]
    folder = tmp_path / 'work'

    process = reproduce(folder, *arguments)
    assert 'None of the 2 networks' in process.communicate()[0]
    assert process.returncode == 2

    finished(reproduce(folder, 'table2', '--data', str(recipe), *common), timeout=1500)
    (folder / 'out' / 'raw.csv').unlink()
    assert finished(reproduce(folder, *arguments), timeout=1500).count('finished ') == 2
    rows = raw_rows(folder)
    assert [row['variant'] for row in rows] == ['ours', 'teacher']
    assert {(row['train_data'], row['test_data']) for row in rows} == {('tiny', 'meta')}
    assert all(-1 <= float(row['srcc']) <= 1 for row in rows)
    assert 'started' not in finished(reproduce(folder, *arguments), timeout=1500)
