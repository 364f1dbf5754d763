"""The choice of I/O mode, driven without a disk."""

from __future__ import annotations

import pytest

from async_ckpt.writer.io_mode import (
    BUFFERED,
    CLEARLY_BETTER,
    MAX_WRITERS,
    NUM_FIRST,
    NUM_WRITERS,
    SMALL_BYTES,
    TRIAL_BYTES,
    Arm,
    DiskTime,
    MiB,
    ModeChooser,
)

DIRECT = Arm(True, MAX_WRITERS)
SHALLOW = Arm(True, NUM_WRITERS)
GIB_PER_S = 1024.0 * MiB


class Disk:
    """A disk with fixed rates per arm, in GiB/s."""

    def __init__(self, chooser: ModeChooser, **rates: float) -> None:
        self.chooser = chooser
        self.rates = {DIRECT: rates["direct"], SHALLOW: rates.get("shallow", rates["direct"]), BUFFERED: rates["buffered"]}

    def write(self, size_bytes: int) -> Arm:
        arm = self.chooser.choose(size_bytes)
        self.chooser.observe(arm, size_bytes, size_bytes / (self.rates[arm] * GIB_PER_S))
        return arm

    def settle(self, size_bytes: int) -> Arm:
        return [self.write(size_bytes) for _ in range(NUM_FIRST + 8)][-1]


@pytest.mark.parametrize("size_mib", [1, 64, 65, 256, 1024, 4096])
@pytest.mark.parametrize(("rates", "best"), [((2.0, 0.3), DIRECT), ((1.0, 1.05), DIRECT), ((1.0, 1.3), BUFFERED)])
def test_it_ends_with_the_faster_way(size_mib, rates, best):
    disk = Disk(ModeChooser("auto", "auto"), direct=rates[0], buffered=rates[1])
    if size_mib * MiB > TRIAL_BYTES and best is BUFFERED:
        # Dear to try: only after it has won where it is cheaper.
        assert disk.settle(size_mib * MiB) is not BUFFERED
        for smaller in (256, 1024):
            assert disk.settle(smaller * MiB) == BUFFERED
    assert disk.settle(size_mib * MiB) == best


def test_a_shallow_queue_is_taken_where_it_is_clearly_better():
    assert Disk(ModeChooser("auto", "auto"), direct=1.0, shallow=1.5, buffered=0.3).settle(256 * MiB) == SHALLOW
    assert Disk(ModeChooser("auto", "auto"), direct=1.0, shallow=1.0 * CLEARLY_BETTER, buffered=0.3).settle(256 * MiB) == DIRECT


def test_small_files_go_through_the_cache_unless_told_otherwise():
    assert ModeChooser("auto", "auto").choose(SMALL_BYTES - 1) == BUFFERED
    assert ModeChooser("direct", "auto").choose(1) == DIRECT


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_a_given_mode_stays(io_mode):
    disk = Disk(ModeChooser(io_mode, 4), direct=0.1 if io_mode == "direct" else 9.0, buffered=9.0 if io_mode == "direct" else 0.1)
    assert {disk.write(256 * MiB).direct for _ in range(30)} == {io_mode == "direct"}


def test_a_given_depth_stays():
    chooser = ModeChooser("auto", 7)
    assert chooser.max_writers == 7
    disk = Disk(chooser, direct=1.0, buffered=0.3)
    disk.rates[Arm(True, 7)] = 1.0
    assert {arm.depth for arm in (disk.write(256 * MiB) for _ in range(30)) if arm.direct} == {7}


def test_losing_trials_cost_at_most_a_share():
    disk = Disk(ModeChooser("auto", "auto"), direct=2.0, buffered=0.25)
    disk.settle(256 * MiB)
    arms = [disk.write(256 * MiB) for _ in range(3000)]
    num_lost = arms.count(BUFFERED)
    assert 1 <= num_lost <= 5
    lost_s, spent_s = num_lost * (1.0 - 0.125), (len(arms) - num_lost) * 0.125
    assert lost_s <= 0.02 * spent_s


def test_it_follows_a_disk_that_changes():
    disk = Disk(ModeChooser("auto", "auto"), direct=2.0, buffered=1.6)
    assert disk.settle(256 * MiB).direct
    disk.rates.update({DIRECT: 0.5, SHALLOW: 0.5})
    assert BUFFERED in [disk.write(256 * MiB) for _ in range(200)][-3:]


def test_the_same_results_give_the_same_choices():
    def history() -> list[Arm]:
        disk = Disk(ModeChooser("auto", "auto"), direct=1.0, buffered=0.9)
        return [disk.write(size * MiB) for size in (10, 100, 1000, 5000) * 20]

    assert history() == history()


def test_the_dear_trial_waits_for_the_cheap_one():
    disk = Disk(ModeChooser("auto", "auto"), direct=2.0, buffered=0.3)
    disk.settle(256 * MiB)
    assert BUFFERED not in [disk.write(1024 * MiB) for _ in range(20)]


def test_disk_time_counts_from_first_write_to_sync():
    time = DiskTime()
    time.begin_write(10.0)
    time.begin_write(10.5)
    time.end_write(11.0)
    time.end_write(12.0)
    time.end(13.0)
    assert time.busy_s == 3.0


@pytest.mark.parametrize("why", ["starved", "company", "nothing"])
def test_disk_time_says_nothing_when_the_disk_was_not_to_blame(why):
    time = DiskTime()
    time.had_company = why == "company"
    if why != "nothing":
        time.begin_write(0.0)
        time.end_write(1.0)
        time.begin_write(5.0 if why == "starved" else 1.0)
        time.end_write(6.0)
    time.end(6.0)
    assert time.busy_s == 0.0
