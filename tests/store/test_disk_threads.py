"""Who works for adapters that are not here yet gives way: our threads and the object stores' libraries'."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from adapters_store.disk_threads import NICENESS, submit_raw

OPEN_A_SOURCE = """
import os
import adapters_store.sources.objects
from adapters_store.sources.remote import open_source
before = os.listdir("/proc/self/task")
open_source("s3://bucket/team")
print(*(os.getpriority(os.PRIO_PROCESS, int(id)) for id in os.listdir("/proc/self/task") if id not in before))
"""


def test_raw_threads_give_way_and_their_callers_do_not():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found = submit_raw(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(10)
    assert found == max(NICENESS, before)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_threads_that_an_object_store_starts_give_way():
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_A_SOURCE], stdout=subprocess.PIPE, timeout=60, check=True, env=environment
    )
    found = [int(nice) for nice in done.stdout.split()]
    assert len(found) >= 2  # ours, and at least one of the library's
    assert set(found) == {max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))}
