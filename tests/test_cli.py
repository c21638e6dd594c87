"""The commands of ``convnext-mm``."""
import pytest

from convnext_mm import cli
from tests.helpers import ROOT, SMALL_SEGMENTATION, call_tool


def test_every_command_is_a_tool_and_has_help(capsys):
    scripts = {path.read_text(encoding='utf-8') for path in (ROOT / 'tools').glob('*.py')}
    for name, command in cli.COMMANDS.items():
        assert [text for text in scripts if f"main('{name}')" in text], name
        with pytest.raises(SystemExit) as status:
            cli.main(argv=[name, '--help'])
        assert status.value.code == 0
        assert command.description.split()[0] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(argv=['--help'])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_the_help_of_tools_names_the_script():
    done = call_tool('tools/train.py', '--help')
    assert done.returncode == 0
    assert done.stdout.startswith('usage: train.py')
    assert cli.COMMANDS['train'].description in done.stdout


def test_recipes_by_name_from_any_folder(demo_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('demo/upernet_convnext_demo', 'convnext_mm::demo/upernet_convnext_demo.py'):
        cli.main(argv=['train', name, '--dry-run', '--cfg-options', *SMALL_SEGMENTATION,
                       f'data_root={demo_data}/ADEChallengeData2016'])
        assert (tmp_path / 'work_dirs/upernet_convnext_demo/upernet_convnext_demo.py').is_file()
        assert 'no problems' in capsys.readouterr().out


def test_a_misspelled_recipe_is_an_error_with_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        cli.main(argv=['check', 'upernet_convnext_tiny_512_160k_ade'])
    assert status.value.code == 2
    assert 'upernet_convnext_tiny_512_160k_ade20k' in capsys.readouterr().err
