"""The bytes of one file: whatever goes wrong, the right ones arrive or none do, and few are fetched twice."""

import errno
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hub.server import KINDS, Fault, serving
from weitiao.errors import RunError
from weitiao.weights import cache, web
from weitiao.weights.cache import Place
from weitiao.weights.partial import Partial, gaps, hasher, joined
from weitiao.weights.sources import Entry, Listing
from weitiao.weights.transfer import Download, Limits, Line, Unreachable

SIZE = 3_000_003
DATA = bytes((number * number + number // 7) % 256 for number in range(100_000)) * 31
DATA = DATA[:SIZE]
LIMITS = Limits(smallest_part_bytes=256 << 10, tries=4, wait_s=0.02, longest_wait_s=0.1)
MIB = 1 << 20


def digest_of(data):
    found = hasher("sha256", len(data))
    found.update(data)
    return f"sha256:{found.hexdigest()}"


@pytest.fixture
def hub():
    with serving({"plain": {"x": DATA}}) as server:
        yield server


def get(folder, *urls, digest=None, limits=LIMITS, timeout_s=20.0, **options):
    """One file from these places; its path."""
    partial = Partial(folder, SIZE, digest_of(DATA) if digest is None else digest)
    lines = [Line(url, f"{url}/plain/x") for url in urls]
    try:
        Download("x", partial, lines, web.Web(timeout_s=timeout_s), limits, **options).run()
        return partial.finish()
    finally:
        partial.close()


# ---- ranges and the journal ----------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(SPANS, st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_sets_of_bytes(spans, start, stop):
    held = {byte for first, last in spans for byte in range(first, last)}
    have = joined(spans)
    assert {byte for first, last in have for byte in range(first, last)} == held
    assert all(one[1] < two[0] for one, two in pairwise(have))
    assert {byte for first, last in gaps(have, start, stop) for byte in range(first, last)} == set(
        range(start, stop)
    ) - held


def test_what_a_kill_a_torn_line_and_a_bad_sector_cost(tmp_path):
    partial = Partial(tmp_path / "p", SIZE, digest_of(DATA))
    for start in (400_000, 0, 100_000, 2_900_000):
        partial.add(start, DATA[start : start + 100_000])
    partial.close()
    with (tmp_path / "p" / "journal").open("ab") as journal:
        journal.write(b"900000 100000 0000")  # the kill came here
    with (tmp_path / "p" / "data").open("r+b") as data:
        data.seek(100_005)
        data.write(bytes([DATA[100_005] ^ 1]))
    partial = Partial(tmp_path / "p", SIZE, digest_of(DATA))
    assert partial.have == [(0, 100_000), (400_000, 500_000), (2_900_000, 3_000_000)]
    for first, last in partial.missing():
        partial.add(first, DATA[first:last])
    assert partial.sound()
    assert partial.finish().read_bytes() == DATA
    assert Partial(tmp_path / "p", SIZE, digest_of(DATA)).missing() == []


def test_a_full_disk_is_said_and_what_came_is_kept(tmp_path, hub, monkeypatch):
    add = Partial.add

    def full(self, start, piece):
        if sum(last - first for first, last in self.have) > MIB:
            monkeypatch.setattr(self, "journal", _Full())
        return add(self, start, piece)

    class _Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(Partial, "add", full)
    with pytest.raises(RunError, match=f"disk is full: {SIZE} bytes needed"):
        get(tmp_path / "p", hub.url)
    monkeypatch.undo()
    hub.sent = 0
    assert get(tmp_path / "p", hub.url).read_bytes() == DATA
    assert hub.sent < SIZE - MIB / 2


# ---- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 70_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_heals(tmp_path, hub, kind, at):
    values = {"status": 503, "stall": 3, "trickle": 0.002}
    hub.faults.extend([Fault(kind, at, values.get(kind, 0))] * 2)
    limits, timeout_s = (replace(LIMITS, tries=20), 1.0) if kind == "stall" else (LIMITS, 20.0)
    assert get(tmp_path / "p", hub.url, limits=limits, timeout_s=timeout_s).read_bytes() == DATA
    again = {"flip": 1, "changed": 1, "ignore_range": 2, "gzip": 2}.get(kind, 0)  # the file may come so often more
    assert hub.sent <= (1.05 + again) * SIZE + 2 * MIB


def test_a_cut_every_64_kib_costs_nothing(tmp_path, hub):
    hub.always = Fault("every", 64 << 10)
    assert get(tmp_path / "p", hub.url).read_bytes() == DATA
    assert hub.sent == SIZE


def test_a_tag_that_looks_like_a_hash_and_is_none_costs_one_request(tmp_path, hub):
    hub.always = Fault("odd_tag")
    assert get(tmp_path / "p", hub.url).read_bytes() == DATA
    assert len(hub.ranges) <= 1 + -(-SIZE // (256 << 10))


def test_a_wrong_bit_is_found_without_fetching_what_lies_behind_it(tmp_path, hub):
    limits = replace(LIMITS, connections=1, part_bytes=256 << 10)
    hub.faults.extend([Fault(""), Fault("flip", 1000)])
    assert get(tmp_path / "p", hub.url, limits=limits).read_bytes() == DATA
    assert hub.sent == SIZE + 2 * (256 << 10)


def test_a_place_with_wrong_bytes_is_replaced_by_one_with_the_right(tmp_path, hub):
    hub.always = Fault("flip", 3)
    with serving({"plain": {"x": DATA}}) as mirror:
        assert get(tmp_path / "p", hub.url, mirror.url).read_bytes() == DATA
        assert mirror.sent <= SIZE
    with pytest.raises(RunError, match="no place gives bytes whose hash is sha256:"):
        get(tmp_path / "q", hub.url)
    assert not (tmp_path / "q").exists()


def test_a_place_that_never_serves_ranges_is_not_asked_for_ever(tmp_path, hub):
    hub.always = Fault("ignore_range")
    hub.faults.extend([Fault("cut", 100)] * 3)
    assert get(tmp_path / "p", hub.url).read_bytes() == DATA
    hub.sent, hub.always = 0, Fault("empty")
    started = time.monotonic()
    with pytest.raises(Unreachable, match=f"0 of {SIZE} bytes are kept"):
        get(tmp_path / "q", hub.url)
    assert hub.sent == 0 and time.monotonic() - started < 60


def test_a_failed_run_is_gone_on_with(tmp_path, hub):
    hub.faults.extend([Fault("cut", 100_000)] * 4)
    hub.always = Fault("status", value=500)
    with pytest.raises(Unreachable, match="HTTP 500"):
        get(tmp_path / "p", hub.url)
    kept = SIZE - sum(last - first for first, last in Partial(tmp_path / "p", SIZE, "").missing())
    assert kept == hub.sent > 0
    hub.always = None
    assert get(tmp_path / "p", hub.url).read_bytes() == DATA
    assert hub.sent == SIZE


def test_the_first_place_is_gone_back_to(tmp_path, hub):
    hub.faults.extend([Fault("status", value=503)] * 2)
    with serving({"plain": {"x": DATA}}) as mirror:
        mirror.always = Fault("status", value=404)
        assert get(tmp_path / "p", hub.url, mirror.url).read_bytes() == DATA
        assert mirror.sent == 0 and len(mirror.requests) >= 1


def test_a_file_without_a_hash_that_changes_midway_is_begun_anew(tmp_path, hub):
    hub.faults.extend([Fault("cut", 50_000)])
    partial = Partial(tmp_path / "p", SIZE, "")
    line = Line("hub", f"{hub.url}/plain/x", tags=["the one before"])
    partial.add(0, bytes(100_000))  # bytes of the file before
    Download("x", partial, [line], web.Web(), LIMITS).run()
    assert partial.finish().read_bytes() == DATA


def test_waits_that_a_server_asks_for_are_kept(tmp_path, hub):
    asked = web._asked_wait
    assert asked({"Retry-After": "7"}) == 7 and asked({"Retry-After": "soon"}) == 0 and asked({}) == 0
    assert asked({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked({"RateLimit": '"api";r=0;t=55'}) == 55
    download = Download("x", Partial(tmp_path / "p", 10, ""), [Line("hub", hub.url)], web.Web(), LIMITS)
    before = time.monotonic()
    download._note(download.lines[0], web.Fault("HTTP 429", 3.0), before)
    assert download.lines[0].ready >= before + 3
    download._note(download.lines[0], web.Fault("HTTP 429", 1e6), time.monotonic())
    assert download.lines[0].gone == "HTTP 429"


def test_stopping_leaves_a_file_that_can_be_gone_on_with(tmp_path, hub):
    stop = threading.Event()

    def tick(count):
        stop.set()

    get(tmp_path / "p", hub.url, stop=stop, tick=tick)
    kept = SIZE - sum(last - first for first, last in Partial(tmp_path / "p", SIZE, "").missing())
    assert 0 < kept < SIZE


# ---- requests ------------------------------------------------------------------------------------------------------


def test_metadata_survives_faults_and_is_not_made_up(hub):
    hub.repositories["org/x"] = {"config.json": b"{}"}
    client = web.Web(timeout_s=1, wait_s=0.01)
    url = f"{hub.url}/api/models/org/x/revision/main"
    for fault in (Fault("status", value=503), Fault("status", value=429), Fault("cut", 20), Fault("page")):
        hub.metadata.append(fault)
        assert client.json(url)[0]["id"] == "org/x"
    hub.metadata.extend([Fault("page")] * 3)
    with pytest.raises(web.Fault, match="not JSON"):
        client.json(url)


@pytest.mark.parametrize(
    ("url", "location", "leads"),
    [
        ("https://a/x/y", "/z", "https://a/z"),
        ("http://a/x", "https://b/z", "https://b/z"),
        ("https://a/x", "http://a/x", None),
        ("https://a/x", "file:///etc/passwd", None),
        ("https://a/x", "http://[bad", None),
        ("https://a/x", "https://b:port/", None),
    ],
)
def test_where_redirects_may_lead(url, location, leads):
    if leads:
        assert web._next(url, location) == leads
    else:
        with pytest.raises(web.Fault):
            web._next(url, location)


def test_addresses_are_written_down_without_secrets():
    assert web.shown("https://me:secret@a.b:8/x?sig=secret#y") == "https://a.b:8/x"
    assert web.origin("https://a.b/x") == web.origin("https://a.b:443/y") != web.origin("http://a.b/x")


# ---- two processes -------------------------------------------------------------------------------------------------


def test_one_process_takes_over_what_a_dead_one_left_and_waits_for_a_live_one(tmp_path, monkeypatch):
    place, entry = Place(tmp_path, hub=True), Entry("x", SIZE, digest_of(DATA))
    folder = place.claim(entry)
    partial = Partial(folder, SIZE, entry.digest)
    partial.add(0, DATA[:1000])
    partial.close()
    monkeypatch.setattr(cache, "_owner", lambda: "elsewhere-1")
    assert place.claim(entry) is None  # this process lives
    dead = folder.with_name(folder.name.replace(f"-{folder.name.rsplit('-', 1)[1]}", "-99999999.part"))
    folder.rename(dead)
    monkeypatch.undo()
    assert place.kept_bytes(entry) > 0
    taken = place.claim(entry)
    assert taken == folder and Partial(taken, SIZE, entry.digest).have == [(0, 1000)]
    place.tidy(Listing("x", "c", "", (entry,)))
    assert len(list(Path(tmp_path).rglob("*.part"))) == 1  # it may be wanted yet
    place.tidy(Listing("x", "c", "", ()))
    assert not list(Path(tmp_path).rglob("*.part"))


def test_without_ranges_one_connection_reads(tmp_path, hub):
    hub.always = Fault("ignore_range")
    for number in range(5):
        hub.sent = 0
        assert get(tmp_path / str(number), hub.url).read_bytes() == DATA
        assert hub.sent < 2 * SIZE  # what the other connections were sent before they were closed
