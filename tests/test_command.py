"""``povid COMMAND`` delegates to ``python -m MODULE``; ``conf/`` is found with and without a checkout."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from povid import machine
from povid.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


def test_every_command_has_a_module_that_python_can_run():
    for module, _ in COMMANDS.values():
        spec = find_spec(module)
        if spec.submodule_search_locations:  # a folder
            spec = find_spec(f"{module}.__main__")
        assert spec is not None, module
        assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(encoding="utf-8"), module


def test_a_command_gets_its_arguments_and_keeps_its_exit_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["povid"])
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys):
    assert main(["raport"]) == 2
    assert "raport is not a command of povid; did you mean report?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main([]) == 2
    assert "no command given" in capsys.readouterr().err
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in COMMANDS)


def test_conf_is_that_of_the_checkout_or_else_the_installed_one(tmp_path):
    assert machine.conf_folder() == ROOT / "conf"
    package = tmp_path / "site-packages" / "povid"
    package.mkdir(parents=True)
    shutil.copy(machine.__file__, package)
    spec = spec_from_file_location("installed_machine", package / "machine.py")
    installed = module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.conf_folder() == package / "conf"
