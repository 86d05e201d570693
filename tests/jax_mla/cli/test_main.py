"""The command line as a whole: start-up, errors and exit codes."""

import os
import resource
import subprocess
import sys

import pytest
from golden_sets import GOLDEN

import jax_mla
from jax_mla.cli import main as command_line
from jax_mla.cli import report
from jax_mla.cli.main import COMMANDS, main

RUN = [sys.executable, "-m", "jax_mla"]


def test_help_takes_less_than_300_ms():
    """Of the processor's time, which does not depend on what else the machine does."""

    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([*RUN, "--help"], check=True, capture_output=True)
    assert used() - before < 0.3


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)], ids=" ".join
)
def test_help_does_not_import_jax(argv):
    code = (
        "import sys\nfrom jax_mla.cli.main import main\n"
        f"try: main({argv!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'flax', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == jax_mla.__version__


def test_every_command_is_in_the_help():
    out = subprocess.run([*RUN, "--help"], check=True, capture_output=True, text=True).stdout
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "no/such/folder"],
        ["verify", "no/such/folder"],
        ["generate", "--model", "no/such/folder", "--prompt", "x"],
        ["generate", "--model", "x", "--prompt", "x", "--stream", "--json"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_2(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_platform_that_is_not_there_is_one_line():
    command = [*RUN, "demo"]
    environment = os.environ | {"JAX_PLATFORMS": "bogus"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unable to initialize backend 'bogus'")
    assert done.stderr.count("\n") == 1


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    module = _Interrupted()
    module.run = lambda args: (_ for _ in ()).throw(RuntimeError("a defect"))
    monkeypatch.setattr(command_line.importlib, "import_module", lambda name: module)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["demo"])


def test_a_prompt_may_be_the_name_of_a_command(monkeypatch, capsys):
    imported = []
    load = command_line.importlib.import_module
    monkeypatch.setattr(
        command_line.importlib, "import_module", lambda name: imported.append(name) or load(name)
    )
    assert main(["generate", "--model", "no/such/folder", "--prompt", "doctor"]) == 2
    assert "jax_mla.cli.generate" in imported and "jax_mla.cli.doctor" not in imported


def test_traceback_on_request():
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        main(["--traceback", "inspect", "no/such/folder"])


@pytest.mark.parametrize("count", ["0", "-3", "many", "1.5"])
def test_counts_must_be_positive(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--max-new-tokens={count}"])
    assert f"must be an integer of at least 1, got '{count}'" in capsys.readouterr().err


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["dmeo"])
    assert "dmeo" in capsys.readouterr().err


class _Interrupted:
    def add_arguments(self, parser):
        pass

    def run(self, args):
        raise KeyboardInterrupt


def test_interrupt_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(command_line.importlib, "import_module", lambda name: _Interrupted())
    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_process_skips_the_shutdown():
    code = (
        "import atexit; from jax_mla.cli import main as m; m.main = lambda: print('x') or {}; "
        "atexit.register(print, 'shutdown'); m.program()"
    )
    for status, text in ((130, "x\n"), (2, "x\nshutdown\n")):
        command = [sys.executable, "-c", code.format(status)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert (ran.returncode, ran.stdout) == (status, text)


def test_closed_pipe_is_quiet():
    command = [*RUN, "inspect", str(GOLDEN / "v3")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_table_is_plain_in_a_pipe_and_boxed_on_a_terminal(monkeypatch, capsys):
    table = ("title", ["name", "size"], [["a", 1], ["bc", 22]])
    report.print_table(*table)
    assert capsys.readouterr().out == "title\n  name  size\n  a        1\n  bc      22\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.print_table(*table)
    assert "│ bc   │   22 │" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (2_410_000, "2.41 million"),
        (671_026_404_352, "671.03 billion"),
    ],
)
def test_count(number, text):
    assert report.count(number) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (70_272, "70.3 kB"), (1.34e12, "1.34 TB"), (2e15, "2000.00 TB")],
)
def test_size(num_bytes, text):
    assert report.size(num_bytes) == text
