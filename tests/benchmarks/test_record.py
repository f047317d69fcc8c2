"""Records of measurements."""

import json
from pathlib import Path

import torch

from benchmarks.record import command, environment, write


def test_a_record_says_with_what_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    write(path, [{"stage": "decode", "images_a_second": 700.0}])
    found = json.loads(path.read_text())
    assert found["rows"] == [{"stage": "decode", "images_a_second": 700.0}]
    assert found["environment"].keys() == environment().keys()
    assert found["environment"]["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["environment"]["versions"]["torchvision"] and found["environment"]["cpu"]
    assert found["environment"]["command"] == command()
    assert str(tmp_path) not in json.dumps(found["environment"])
