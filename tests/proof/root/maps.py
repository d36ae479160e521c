"""Maps, changes, protects and unmaps memory in several processes that share some of it; prints a sum."""

import mmap
import os

shared = mmap.mmap(-1, 1 << 20)
total = 0
for round_ in range(8):
    private = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(private), 4096):
        private[at] = (at >> 12) * (round_ + 1) & 255
    child = os.fork()
    if child == 0:
        for at in range(0, len(private), 8192):  # copies of the pages
            private[at] = 255 - private[at]
        slot = round_ % 64 * 8
        shared[slot:slot + 8] = sum(private[0::4096]).to_bytes(8, "little")
        os._exit(0)
    os.waitpid(child, 0)
    slot = round_ % 64 * 8
    total = total * 31 + int.from_bytes(shared[slot:slot + 8], "little") + sum(private[0::4096])
    private.madvise(mmap.MADV_DONTNEED)
    total += private[4096]
    private.close()
    total %= 1 << 61
print(total)
