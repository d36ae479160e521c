"""Tells the time ten times a second, before whatever else wants to run."""

import os
import time

os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
while True:
    now = time.time_ns()
    os.write(1, b"@clock %d.%09d\n" % divmod(now, 10**9))
    time.sleep(0.1)
