import warnings
from pathlib import Path

import pytest
import torch

from adaptvit import cli


def said(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "demo", "bench", "convert"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: adaptvit" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["fly"]) == 2
    assert "fly" in said(capsys)


def test_demo_takes_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = []
    monkeypatch.setattr(cli.demo, "run", folders.append)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    assert folders == [tmp_path]


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt("stopped; go on"), 130), (FloatingPointError("the loss is nan"), 2), (OSError("disk full"), 2)],
    ids=["interrupt", "nan", "disk"],
)
def test_what_stops_a_command_is_said_without_a_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(folder: Path) -> None:
        raise error

    monkeypatch.setattr(cli.demo, "run", stop)
    assert cli.main(["demo"]) == code
    assert said(capsys) == f"adaptvit: {error}\n"


def test_convert_says_which_gate_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import timm

    source, target = tmp_path / "tiny-10-30.pth", tmp_path / "avit.safetensors"
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    torch.save({"model": vit.state_dict()}, source)
    arguments = ["convert", str(source), str(target), "avit_tiny_patch16_224", "--num-classes", "10"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{target}: avit_tiny_patch16_224, gate 10 / 30\n"
    assert cli.main([*arguments[:-1], "12"]) == 2
    assert "10 classes, not 12" in said(capsys)


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(cli.demo, "run", lambda folder: warnings.warn("the gate halts everything", stacklevel=2))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["demo"]) == 0
    assert said(capsys) == "adaptvit: warning: the gate halts everything\n"
