"""The command: figures from a study's folder, and what is refused."""

from __future__ import annotations

import pytest

from study.__main__ import main


def test_figures(compared, swept, tmp_path, capsys):
    main(["figures", "strips", str(swept), "--knobs", "threshold", "--output", str(tmp_path / "new" / "strips.png")])
    assert (tmp_path / "new" / "strips.png").is_file() and "strips.png" in capsys.readouterr().out
    output = ["--output", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit, match="nothing was swept"):
        main(["figures", "ablation", str(compared), *output])
    with pytest.raises(SystemExit, match="keeps no volumes of swept runs"):
        main(["figures", "strips", str(compared), *output])
    with pytest.raises(SystemExit, match="keeps no volumes of runs to compare"):
        main(["figures", "comparison", str(swept), *output])
    with pytest.raises(SystemExit):
        main(["figures", "comparison", str(compared), *output, "--ckpt_path", "x"])
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("command", [["report"], ["figures", "comparison", "--output", "x.png"]])
def test_a_folder_without_results_is_named(command, tmp_path):
    with pytest.raises(SystemExit, match="holds neither results.json"):
        main([*command, str(tmp_path)])


@pytest.mark.parametrize("command", [[], ["benchmark"], ["floor"], ["report"], ["figures"], ["figures", "denoising"]])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert not command or f"python -m study {' '.join(command)} " in capsys.readouterr().out.split("example")[1]
