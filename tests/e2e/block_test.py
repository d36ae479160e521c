"""Disks in a running machine: jobs under a load that verifies what it wrote, errors, exports. Results are held against the
peer's tools."""

import json
import os
import subprocess

from disks import (MIB, WAIT_FOR_DISK, add_image, check, contents, contents_of_chain, create, chain, disk, disk_row, inserted,
                   job_event, load_ends, load_goes_on, make_image, run_to_ready, start, tool)
from harness import Skip, expect_equal, test


def jobs_under_load(context, *properties, more=()):
    size = 48 * MIB
    top = chain(context, size)
    command = (WAIT_FOR_DISK + "md5sum /dev/vda; read x; diskload /dev/vda; read x; "
               "blockdev --flushbufs /dev/vda; md5sum /dev/vda; blockdev --getsize64 /dev/vda")
    vm, qmp = start(context, *more, *disk(top, *properties), *context.run(command))
    before = vm.expect(r"^([0-9a-f]{32})  /dev/vda")[1]
    expect_equal(before, contents_of_chain(top), "what the guest reads of the chain")

    # A backup shows the moment when it began, whatever is written meanwhile.
    backup = create(context, "backup.qcow2", size)
    add_image(qmp, "b", backup)
    qmp.call("blockdev-backup", **{"job-id": "backup", "device": "d", "target": "b", "sync": "full", "speed": MIB})
    vm.send("go\n")
    load_goes_on(vm, 500)
    expect_equal([job["id"] for job in qmp.call("query-jobs")], ["backup"], "jobs under way")
    qmp.call("block-job-set-speed", device="backup", speed=0)
    job_event(qmp, "BLOCK_JOB_COMPLETED", "backup")
    qmp.call("blockdev-del", **{"node-name": "b"})
    check(backup)
    expect_equal(contents(backup), before, "the backup's contents")

    # The disk goes over to a mirror of itself.
    mirror = context.path("mirror.qcow2")
    make_image(qmp, "m", mirror, size)
    qmp.call("blockdev-mirror", **{"job-id": "mirror", "device": "d", "target": "m", "sync": "full"})
    run_to_ready(qmp, "mirror")
    expect_equal(inserted(qmp)["node-name"], "m", "the node after the mirror's pivot")
    load_goes_on(vm)

    # Two snapshots, of which one is committed from between and the other from the top.
    for name in "s1", "s2":
        qmp.call("blockdev-snapshot-sync", **{"node-name": inserted(qmp)["node-name"], "format": "qcow2",
                                              "snapshot-file": context.path(name + ".qcow2"),
                                              "snapshot-node-name": name})
        load_goes_on(vm)
    expect_equal(inserted(qmp)["backing_file_depth"], 2, "the chain after two snapshots")
    qmp.call("block-commit", **{"job-id": "commit", "device": "s2", "top-node": "s1", "base-node": "m"})
    job_event(qmp, "BLOCK_JOB_COMPLETED", "commit")
    expect_equal(inserted(qmp)["backing_file_depth"], 1, "the chain after a commit")
    qmp.call("block-commit", **{"job-id": "active", "device": "s2"})
    run_to_ready(qmp, "active")
    expect_equal(inserted(qmp)["node-name"], "m", "the node after the commit's pivot")

    qmp.call("block_resize", **{"node-name": "m", "size": 64 * MIB})
    load_goes_on(vm)
    vm.send("stop\n")
    load_ends(vm)
    after = vm.expect(r"^([0-9a-f]{32})  /dev/vda")[1]
    expect_equal(int(vm.expect(r"^(\d+)\n")[1]), 64 * MIB, "the size that the guest sees")
    vm.expect_exit(0)
    for path in mirror, top:
        check(path)
    expect_equal(contents(mirror), after, "the image at the end")


@test()
def disk_jobs_run_under_load(context):
    jobs_under_load(context)


@test(slow=True)
def disk_jobs_run_under_load_on_an_io_thread(context):
    jobs_under_load(context, "iothread=io", "num-queues=2", more=["-object", "iothread,id=io"])


@test()
def full_disk_pauses_the_machine(context):
    image = {"driver": "raw", "node-name": "d", "discard": "unmap", "file": {
        "driver": "blkdebug", "image": {"driver": "file", "filename": context.disk(megabytes=16)},
        "inject-error": [{"event": "none", "iotype": "write", "errno": 28, "once": True}]}}
    vm, qmp = start(context, "-blockdev", json.dumps(image), "-device", "virtio-blk-pci,drive=d,id=vd,werror=enospc",
                    *context.run(WAIT_FOR_DISK + "diskload /dev/vda 300"))
    error = qmp.event("BLOCK_IO_ERROR")
    expect_equal((error["operation"], error["action"], error["nospace"]), ("write", "stop", True), "the error")
    qmp.event("STOP")
    expect_equal(qmp.call("query-status")["status"], "io-error", "the machine's state")
    expect_equal(disk_row(qmp)["io-status"], "nospace", "the disk's state")
    qmp.call("cont")
    qmp.event("RESUME")
    load_ends(vm)
    vm.expect_exit(0)


@test(slow=True)
def full_file_system_pauses_the_machine(context):
    if os.geteuid() != 0:
        raise Skip("mounting a small file system takes root")
    small = context.path("small")
    os.mkdir(small)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "kvartz", small], capture_output=True).returncode != 0:
        raise Skip("this host doesn't let us mount a file system")
    try:
        image = create(context, "small/disk.qcow2", 32 * MIB)
        vm, qmp = start(context, *disk(image), *context.run(WAIT_FOR_DISK + "diskload /dev/vda 1000"))
        qmp.event("STOP")
        expect_equal(qmp.call("query-status")["status"], "io-error", "the machine's state")
        expect_equal(qmp.event("BLOCK_IO_ERROR")["nospace"], True, "the error's nospace")
        tool("mount", "-o", "remount,size=64m", small)
        qmp.call("cont")
        load_ends(vm)
        vm.expect_exit(0)
        check(image)
    finally:
        context.close()
        subprocess.run(["umount", "-l", small])


@test()
def temporary_snapshot_leaves_the_image_alone(context):
    image = create(context, "disk.qcow2", 16 * MIB)
    tool("qemu-io", "-c", "write -q -P 7 0 16M", image)
    before = contents(image)
    vm = context.start("-m", "256", "-nic", "none", "-drive",
                       f"file={image},format=qcow2,if=virtio,snapshot=on,cache=unsafe,discard=unmap,detect-zeroes=unmap",
                       *context.run(WAIT_FOR_DISK + "head -c 4096 /dev/vda | tr -d '\\007' | wc -c; diskload /dev/vda 200"))
    vm.expect(r"^0\n")
    load_ends(vm)
    vm.expect_exit(0)
    expect_equal(contents(image), before, "the image after the machine")


@test(seconds=120)
def disks_are_managed_by_qmp(context):
    """On a machine that stands still; an NBD client writes in the guest's place."""
    image = create(context, "disk.qcow2", 8 * MIB)
    vm, qmp = start(context, "-S", *disk(create(context, "vd.qcow2", 4 * MIB)), *context.kernel(""))
    add_image(qmp, "n", image)
    error = qmp.send_text(json.dumps({"execute": "blockdev-add", "arguments": {"driver": "nonesuch", "node-name": "x"}}))
    expect_equal(error["error"]["class"], "GenericError", "an unknown driver")
    qmp.call("block-dirty-bitmap-add", node="n", name="since", persistent=True)

    socket = context.path("nbd")
    qmp.call("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    qmp.call("block-export-add", **{"type": "nbd", "id": "e", "node-name": "n", "name": "disk", "writable": True})
    expect_equal([one["id"] for one in qmp.call("query-block-exports")], ["e"], "exports")
    uri = f"nbd+unix:///disk?socket={socket}"
    tool("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", "-c", "write -P 6 4M 128k", uri)
    bitmap = next(node for node in qmp.call("query-named-block-nodes")
                  if node["node-name"] == "n")["dirty-bitmaps"][0]
    expect_equal((bitmap["name"], bitmap["count"], bitmap["persistent"]), ("since", 196608, True), "the bitmap")

    # An incremental backup at the moment of a snapshot, or neither.
    target = create(context, "incremental.qcow2", 8 * MIB)
    add_image(qmp, "t", target)
    actions = [{"type": "blockdev-snapshot-sync", "data": {"node-name": "n", "snapshot-file": context.path("s.qcow2"),
                                                           "snapshot-node-name": "s"}},
               {"type": "abort", "data": {}}]
    error = qmp.send_text(json.dumps({"execute": "transaction", "arguments": {"actions": actions}}))
    expect_equal("error" in error, True, "a transaction that is aborted")
    expect_equal([node["node-name"] for node in qmp.call("query-named-block-nodes") if node["node-name"] == "s"], [],
                 "what an aborted transaction leaves")
    qmp.call("blockdev-backup", **{"job-id": "i", "device": "n", "target": "t", "sync": "incremental", "bitmap": "since"})
    job_event(qmp, "BLOCK_JOB_COMPLETED", "i")
    tool("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", uri)
    qmp.call("block-export-del", id="e")
    qmp.event("BLOCK_EXPORT_DELETED")
    qmp.call("nbd-server-stop")
    for node in "t", "n":
        qmp.call("blockdev-del", **{"node-name": node})
    tool("qemu-io", "-c", "read -P 5 1M 64k", "-c", "read -P 6 4M 128k", "-c", "read -P 0 0 1M", target)
    tool("qemu-io", "-c", "read -P 9 1M 64k", image)
    bitmaps = json.loads(tool("qemu-img", "info", "--output=json", image))["format-specific"]["data"]["bitmaps"]
    expect_equal([bitmap["name"] for bitmap in bitmaps], ["since"], "the bitmaps in the image")
    for path in image, target:
        check(path)

    limits = dict.fromkeys(["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"], 0)
    qmp.call("block_set_io_throttle", id=disk_row(qmp)["qdev"], **{**limits, "iops": 100, "iops_max": 200})
    node = inserted(qmp)
    expect_equal((node["iops"], node["iops_max"], node["bps"]), (100, 200, 0), "the limits")
    error = qmp.send_text(json.dumps({"execute": "block_set_io_throttle", "arguments": {"id": "no", **limits}}))
    expect_equal(error["error"]["class"], "DeviceNotFound", "limits of no device")
    error = qmp.send_text(json.dumps({"execute": "block-job-cancel", "arguments": {"device": "no"}}))
    expect_equal(error["error"]["class"], "DeviceNotActive", "cancelling no job")
    qmp.call("quit")
    vm.expect_exit(0)
