"""Option files that build on each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyiqa_clipkd.options import load_options


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    return load_options(write(folder / 'options.yml', text), overrides)


def test_the_file_wins_over_its_bases_and_a_later_base_over_an_earlier(
    tmp_path: Path,
) -> None:
    write(tmp_path / 'one.yml', 'a: 1\nb: 1\nc: 1\n')
    write(tmp_path / 'two.yml', 'b: 2\nc: 2\n')
    options = load(tmp_path, '_base_: [one.yml, two.yml]\nname: x\nc: 3\n')
    assert options == {'a': 1, 'b': 2, 'c': 3, 'name': 'x'}


def test_mappings_are_merged_by_key_and_all_else_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / 'base.yml', 'train: {optim: {type: AdamW, lr: 1}, list: [1, 2]}\n')
    options = load(
        tmp_path,
        '_base_: [base.yml]\nname: x\ntrain: {optim: {lr: 2}, list: [3]}\n',
    )
    assert options['train'] == {'optim': {'type': 'AdamW', 'lr': 2}, 'list': [3]}


def test_null_and_a_plain_value_replace_a_mapping(tmp_path: Path) -> None:
    write(tmp_path / 'base.yml', 'a: {b: 1}\nc: {d: 1}\n')
    options = load(tmp_path, '_base_: [base.yml]\nname: x\na: ~\nc: 5\n')
    assert options['a'] is None
    assert options['c'] == 5


def test_a_base_is_relative_to_its_file_and_may_have_bases_and_be_one_string(
    tmp_path: Path,
) -> None:
    write(tmp_path / 'deep' / 'er' / 'root.yml', 'a: 1\n')
    write(tmp_path / 'deep' / 'middle.yml', '_base_: er/root.yml\nb: 2\n')
    options = load(tmp_path, '_base_: deep/middle.yml\nname: x\n')
    assert options == {'a': 1, 'b': 2, 'name': 'x'}


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path / 'root.yml', 'a: 1\n')
    write(tmp_path / 'one.yml', '_base_: [root.yml]\nb: 1\n')
    write(tmp_path / 'two.yml', '_base_: [root.yml]\nc: 1\n')
    options = load(tmp_path, '_base_: [one.yml, two.yml]\nname: x\n')
    assert options == {'a': 1, 'b': 1, 'c': 1, 'name': 'x'}


def test_a_file_that_builds_on_itself_is_named(tmp_path: Path) -> None:
    write(tmp_path / 'other.yml', '_base_: [options.yml]\n')
    with pytest.raises(ValueError, match=r'options\.yml builds on itself'):
        load(tmp_path, '_base_: [other.yml]\nname: x\n')


def test_a_missing_base_is_named_with_the_file_that_needs_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'gone\.yml \(needed by .*ions\.yml'):
        load(tmp_path, '_base_: [gone.yml]\nname: x\n')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no option file .*gone\.yml\.'):
        load_options(tmp_path / 'gone.yml')


@pytest.mark.parametrize(('text', 'kind'), [('- 1\n', 'list'), ('', 'NoneType')])
def test_a_file_without_a_mapping_is_refused(
    tmp_path: Path, text: str, kind: str
) -> None:
    with pytest.raises(ValueError, match=f'must hold a mapping, but got {kind}'):
        load(tmp_path, text)


def test_options_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='must give a `name`'):
        load(tmp_path, 'network: {encoder: swin}\n')


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('5', 5),
        ('-5', -5),
        ('0.5', 0.5),
        ('1e-4', 1e-4),
        ('.5E+3', 500.0),
        ('true', True),
        ('False', False),
        ('~', None),
        ('None', None),
        ('', None),
        ('[0, 1]', [0, 1]),
        ('{type: PLCCLoss}', {'type': 'PLCCLoss'}),
        ('timm:mobilevit_s', 'timm:mobilevit_s'),
        ('a=b', 'a=b'),
        ("'5'", '5'),
        ('1e', '1e'),
    ],
)
def test_an_override_is_yaml(tmp_path: Path, text: str, value: Any) -> None:
    options = load(tmp_path, 'name: x\na: {b: 0}\n', f'a:b={text}')
    assert options['a']['b'] == value
    assert type(options['a']['b']) is type(value)


def test_overrides_come_last_and_may_add_a_key(tmp_path: Path) -> None:
    write(tmp_path / 'base.yml', 'a: {b: 1}\n')
    text = '_base_: [base.yml]\nname: x\na: {b: 2}\n'
    options = load(tmp_path, text, 'a:b=3', 'a:c=4', 'd=5', 'd=6')
    assert options == {'a': {'b': 3, 'c': 4}, 'name': 'x', 'd': 6}


@pytest.mark.parametrize('override', ['a:b', '=1', 'a:=1', ''])
def test_an_override_of_another_form_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match='must look like key:key=value'):
        load(tmp_path, 'name: x\na: {b: 1}\n', override)


@pytest.mark.parametrize('override', ['wrong:b=1', 'a:wrong:c=1', 'a:b:wrong=1'])
def test_an_override_below_a_key_that_is_not_there_is_refused(
    tmp_path: Path, override: str
) -> None:
    with pytest.raises(ValueError, match='the options have no'):
        load(tmp_path, 'name: x\na: {b: 1}\n', override)


@pytest.mark.parametrize(
    ('encoder', 'name'),
    [
        ('swin', 'run_swin_koniq'),
        ('timm:test_resnet', 'run_test_resnet_koniq'),
        ('open_clip:ViT-B-32', 'run_ViT-B-32_koniq'),
        ('timm:hf-hub:me/my model', 'run_me-my-model_koniq'),
    ],
)
def test_the_encoder_is_in_the_name(tmp_path: Path, encoder: str, name: str) -> None:
    text = 'name: run_{encoder}_koniq\nnetwork: {encoder: resnet18}\n'
    assert load(tmp_path, text, f'network:encoder={encoder}')['name'] == name


def test_the_name_is_in_the_path_of_the_results_of_all_splits(tmp_path: Path) -> None:
    text = 'name: a_{encoder}\nnetwork: {encoder: swin}\n'
    text += 'save_final_results_path: experiments/{name}.txt\n'
    assert load(tmp_path, text)['save_final_results_path'] == 'experiments/a_swin.txt'


def test_each_data_set_gets_what_it_does_not_say_from_data(tmp_path: Path) -> None:
    text = """
name: x
data: {type: T, split_index: 1, augment: {hflip: true, size: 8}}
datasets:
  train: {}
  val: {split_index: 2, augment: {hflip: false}}
  test_1: ~
"""
    options = load(tmp_path, text)
    shared = {'type': 'T', 'split_index': 1, 'augment': {'hflip': True, 'size': 8}}
    assert 'data' not in options
    assert options['datasets'] == {
        'train': shared,
        'val': {'type': 'T', 'split_index': 2, 'augment': {'hflip': False, 'size': 8}},
        'test_1': shared,
    }


def test_data_sets_share_no_object(tmp_path: Path) -> None:
    text = 'name: x\ndata: {augment: {size: 1}}\ndatasets: {train: {}, val: {}}\n'
    sets = load(tmp_path, text)['datasets']
    sets['train']['augment']['size'] = 2
    assert sets['val']['augment']['size'] == 1


def test_an_override_changes_no_other_part_that_yaml_shares_with_it(
    tmp_path: Path,
) -> None:
    text = 'name: x\na: {b: &b {c: 1}}\nd: {b: *b}\ne: {<<: {b: *b}}\n'
    options = load(tmp_path, text, 'a:b:c=2')
    assert options['a'] == {'b': {'c': 2}}
    assert options['d'] == options['e'] == {'b': {'c': 1}}


def test_an_override_reaches_every_data_set_through_data_or_one_alone(
    tmp_path: Path,
) -> None:
    text = 'name: x\ndata: {a: 1, b: 1}\ndatasets: {train: {}, val: {}}\n'
    options = load(tmp_path, text, 'data:a=2', 'datasets:val:b=3')
    assert options['datasets'] == {'train': {'a': 2, 'b': 1}, 'val': {'a': 2, 'b': 3}}


def test_the_module_prints_the_whole_options(tmp_path: Path) -> None:
    write(tmp_path / 'base.yml', 'a: &a {b: 1}\nc: *a\n')
    path = write(tmp_path / 'options.yml', '_base_: [base.yml]\nname: x\n')
    command = [sys.executable, '-m', 'pyiqa_clipkd.options', str(path), 'c:b=1e-4']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '&' not in printed
    assert yaml.safe_load(printed) == load_options(path, ['c:b=1e-4'])


def test_several_files_are_merged_in_their_order(tmp_path: Path) -> None:
    (tmp_path / 'recipe.yml').write_text(
        'name: student_{data}\n'
        'data: {name: theirs, mos_range: [1, 100]}\n'
        'datasets: {train: {}}\n'
        "teacher: {weights: 'experiments/teacher_{data}_Split{split}/net_best.pth'}\n"
    )
    (tmp_path / 'mine.yml').write_text('data: {name: mine, dataroot_target: photos}\n')
    options = load_options([tmp_path / 'recipe.yml', tmp_path / 'mine.yml'])
    assert options['name'] == 'student_mine'
    weights = 'experiments/teacher_mine_Split{split}/net_best.pth'
    assert options['teacher']['weights'] == weights
    assert options['datasets']['train'] == {
        'name': 'mine',
        'mos_range': [1, 100],
        'dataroot_target': 'photos',
    }


@pytest.mark.parametrize(
    ('split', 'word'),
    [('1', '00'), ('10', '09'), ('without_a_split', 'without_a_split')],
)
def test_the_split_is_in_the_name_as_n_splits_count_or_as_its_column(
    tmp_path: Path, split: str, word: str
) -> None:
    text = 'name: one_{split}\ndata: {name: mine}\n'
    name = load(tmp_path, text, f'data:split_index={split}')['name']
    assert name == f'one_{word}'
