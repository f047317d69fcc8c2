"""States in one file and in shares: from one to the other, and what neither may hold."""

import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from dinocomp.checkpoints.folder import SHARES, STATE
from dinocomp.checkpoints.plain import check_shares, only_plain_types
from dinocomp.checkpoints.shapes import check_names, read_shares, state_to_load
from dinocomp.errors import ConfigError, WeightsError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


class Touch:
    """Unpickled by somebody who trusts the file, it makes one called `ran`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def state(**more: object) -> dict:
    model = {"student_backbone.net.norm.bias": torch.randn(5), "dino_targets.center": torch.randn(1, 3)}
    optimizer = {"state": {"a": {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": ["a"]}]}
    inside = {"model": model, "optimizers": {"AdamW": optimizer}, "algorithms": [], "callbacks": {"X": {"count": 3}}}
    return {"state": inside | more, "rng": [{"python": (3, (1, 2)), "torch": torch.arange(4)}]}


def in_shares(folder: Path, content: dict) -> Path:
    dcp.save(content, checkpoint_id=str(folder), no_dist=True)
    return folder


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_from_one_file_to_shares_and_back(tmp_path: Path) -> None:
    content, file = state(), tmp_path / "iteration-00000004"
    file.mkdir()
    torch.save(content, file / STATE)
    with state_to_load(file, shares=False) as path:
        assert path == str(file / STATE), "nothing to do"
    shares = tmp_path / "iteration-00000005"
    with state_to_load(file, shares=True) as path:
        Path(path).rename(shares)
    assert read_shares(shares).keys() == content["state"]["model"].keys()
    with state_to_load(shares, shares=True) as path:
        assert path == str(shares)
    with state_to_load(shares, shares=False) as path:
        assert equal(torch.load(path, weights_only=False), content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-00000004", "iteration-00000005"]
    with state_to_load(None, shares=True) as path:
        assert path is None


@contextmanager
def full_disk() -> Iterator[None]:
    """Makes this process's files end at 1,000 bytes; pytest's report, too, so for no longer than needed."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("to_shares", [True, False])
def test_no_room_for_the_other_shape(tmp_path: Path, to_shares: bool) -> None:
    checkpoint = tmp_path / "iteration-00000004"
    content = state(model={"x": torch.randn(4096)})
    if to_shares:
        checkpoint.mkdir()
        torch.save(content, checkpoint / STATE)
    else:
        in_shares(checkpoint, content)
    refused = pytest.raises(ConfigError, match=r"Make room.*parallelism\.strategy")
    with refused, full_disk(), state_to_load(checkpoint, shares=to_shares):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-00000004"]


def test_a_tampered_list_of_shares_runs_nothing(tmp_path: Path) -> None:
    shares = in_shares(tmp_path / "shares", state())
    check_shares(shares / SHARES)
    (shares / SHARES).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for read in (lambda: check_shares(shares / SHARES), lambda: read_shares(shares)):
        with pytest.raises(WeightsError, match="is not loaded"):
            read()
    assert not (tmp_path / "ran").exists()
    with suppress(AttributeError):
        dcp.FileSystemReader(str(shares)).read_metadata()
    assert (tmp_path / "ran").exists(), "the trap works"


def test_a_dotted_name_is_no_way_out_of_the_list(tmp_path: Path) -> None:
    """Pickles may name what a module has imported, such as `filesystem` `os.mkdir`."""
    shares = in_shares(tmp_path / "shares", state())
    module, name = "torch.distributed.checkpoint.filesystem", "os.mkdir"
    path = str(tmp_path / "ran")
    text = b"\x80\x04" + b"".join(
        [pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name)]
    )
    text += pickle.STACK_GLOBAL + pickle.BINUNICODE + len(path).to_bytes(4, "little") + path.encode()
    (shares / SHARES).write_bytes(text + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP)
    with pytest.raises(WeightsError, match="is not loaded"):
        check_shares(shares / SHARES)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_share_is_not_run(tmp_path: Path) -> None:
    shares = in_shares(tmp_path / "shares", state(callbacks={"X": Touch(tmp_path / "ran")}))
    refused = pytest.raises(WeightsError, match=r"not loaded.*Weights only load failed")
    with refused, state_to_load(shares, shares=False):
        pass
    wanted = {"state.callbacks.X": None}
    with refused, only_plain_types(), state_to_load(shares, shares=True) as path:
        dcp.load(wanted, checkpoint_id=path, no_dist=True)  # as Composer does
    assert not (tmp_path / "ran").exists()
    dcp.load(wanted, checkpoint_id=str(shares), no_dist=True)
    assert (tmp_path / "ran").exists(), "the trap works"


def test_a_state_in_one_piece_hides_no_algorithms(tmp_path: Path) -> None:
    """An entry for all of the state, beside the one that is looked at."""
    shares = in_shares(tmp_path / "shares", {"state.algorithms": [], "state": "?"})
    with pytest.raises(WeightsError, match="is not loaded"):
        check_shares(shares / SHARES)


def test_what_was_rewritten_is_looked_at_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the list of shares had said."""
    shares = in_shares(tmp_path / "shares", state(algorithms=["EMA()"]))
    with pytest.raises(WeightsError, match="is not loaded"), state_to_load(shares, shares=False):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["shares"]


@pytest.mark.parametrize("algorithms", [["EMA(half_life='1ba')"], [torch.ones(2)]])
def test_algorithms_are_refused(tmp_path: Path, algorithms: list) -> None:
    """Composer evaluates their names as Python."""
    shares = in_shares(tmp_path / "shares", state(algorithms=algorithms))
    with pytest.raises(WeightsError, match="is not loaded"):
        check_shares(shares / SHARES)


def test_shares_that_were_cut(tmp_path: Path) -> None:
    shares = in_shares(tmp_path / "shares", state())
    text = (shares / SHARES).read_bytes()
    for size in (0, 10, len(text) // 2, len(text) - 1):
        (shares / SHARES).write_bytes(text[:size])
        with pytest.raises(WeightsError, match="damaged"):
            check_shares(shares / SHARES)
    (shares / SHARES).write_bytes(text)
    share = next(shares.glob("*.distcp"))
    share.write_bytes(share.read_bytes()[:300])
    with pytest.raises(WeightsError, match="damaged"):
        read_shares(shares)


def test_a_state_of_another_kind_of_run_is_not_called_damaged(tmp_path: Path) -> None:
    shares = in_shares(tmp_path / "shares", state())
    refused = pytest.raises(WeightsError, match=r"another kind of run.*Missing key")
    with refused, state_to_load(shares, shares=True) as path:
        dcp.load({"rng.0.cuda": torch.zeros(3)}, checkpoint_id=path, no_dist=True)


def test_other_networks_are_named(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / STATE)
    for saved in (tmp_path / STATE, in_shares(tmp_path / "shares", state())):
        check_names(str(saved), state()["state"]["model"])
        with pytest.raises(WeightsError, match=r"missing: x.*not in the networks: dino_targets\.center"):
            check_names(str(saved), {"student_backbone.net.norm.bias", "x"})
