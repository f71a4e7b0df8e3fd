"""Rows that lie elsewhere: links and data sets of a little hub on the loopback, with and without a network."""

from __future__ import annotations

import io

import pytest

from tests.hub.server import serving
from weitiao.data import remote
from weitiao.data.options import DataOptions
from weitiao.data.sources import load, read_all
from weitiao.errors import InputError, RunError

ROWS = [f'{{"text": "row {number}"}}\n' for number in range(9)]


def parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    shards = [parquet([{"text": f"part {part} row {row}"} for row in range(3)]) for part in range(2)]
    repositories = {
        "datasets/org/rows": {
            **{f"data/train-0000{part}-of-00002.parquet": shard for part, shard in enumerate(shards)},
            "data/validation-00000-of-00001.parquet": shards[0], "README.md": b"#", "extra/other.csv": b"text\na\nb\n",
        },
        "datasets/org/twice": {"train.jsonl": ROWS[0].encode(), "train.csv": b"text\na\n"},
        "plain": {"rows.jsonl": "".join(ROWS).encode(), "rows.csv": b"text\nx\ny\n", "rows.parquet": shards[1]},
    }  # fmt: skip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def texts(name: object, **more: object) -> list[str]:
    options = DataOptions(train=name, validation=None, **more)  # type: ignore[arg-type]
    return [row.text for row in load(options, "pretrain").train]  # type: ignore[union-attr]


def elsewhere(hub) -> str:
    """The same server by a name that is not the hub's."""
    return hub.url.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize(("file", "first", "count"), [("rows.jsonl", "row 0", 9), ("rows.csv", "x", 2),
                                                      ("rows.parquet", "part 1 row 0", 3)])  # fmt: skip
def test_a_link_to_a_file(hub, file, first, count):
    found = texts(f"{elsewhere(hub)}/plain/{file}")
    assert found[0] == first and len(found) == count


@pytest.mark.parametrize(("rest", "count"), [("", 6), (":train", 6), (":validation", 3), ("@main:extra/other.csv", 2)])
def test_a_data_set_of_the_hub(hub, rest, count):
    assert len(texts(f"hub:org/rows{rest}")) == count
    assert hub.sent < 10_000


def test_what_is_cached_is_used_without_a_network(hub, capsys):
    names = [f"{elsewhere(hub)}/plain/rows.jsonl", "hub:org/rows"]
    before, sent = [texts(name) for name in names], hub.sent
    hub.shutdown()
    hub.server_close()
    assert [texts(name) for name in names] == before and hub.sent == sent
    assert "cannot be reached; using the cached copy" in capsys.readouterr().err
    for name in (f"{elsewhere(hub)}/plain/rows.csv", "hub:org/other"):
        with pytest.raises(RunError, match="cannot be reached"):
            texts(name)


def test_everything_wrong_is_said_at_once(hub):
    names = ["hub:org", "hub:org/nothing", "hub:org/twice", "hub:org/rows:nosuch", f"{elsewhere(hub)}/nosuch/rows.csv"]
    with pytest.raises(InputError) as caught:
        texts(names)
    said = "\n".join(caught.value.problems)
    for words in (
        "hub:OWNER/NAME",
        "org/nothing: no such",
        "train.csv, train.jsonl",
        "no file is called so",
        "RepoNotFound",
    ):
        assert words in said, said


def test_weights_are_shared_by_files_and_a_split_to_validate_on(hub):
    train = [{"path": "hub:org/rows", "weight": 1}, {"path": f"{elsewhere(hub)}/plain/rows.csv", "weight": 1}]
    options = remote.fetched(DataOptions(train=train, validation="hub:org/rows:validation"))
    assert [one.weight for one in options.sources] == [0.5, 0.5, 1]
    assert len(load(options, "pretrain").validation) == 3
    with pytest.raises(InputError, match="several files"):
        remote.fetched(DataOptions(train="hub:org/rows", validation="hub:org/rows:train"))
    assert remote.fetched(DataOptions(train="rows.jsonl")).train == "rows.jsonl"
    assert len(read_all(["hub:org/rows"], DataOptions())) == 2
