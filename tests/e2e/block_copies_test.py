"""Copies of disks by drive-*, streams, limits, discards and reopened nodes, in a guest that checks what it wrote."""

import json
import os

from disks import (MIB, Shell, WAIT_FOR_DISK, allocated, chain, check, contents, contents_of_chain, create, disk, disk_row, inserted,
                   job_event, load_ends, measured_iops, start, tool)
from harness import expect_equal, Failure, test


@test()
def disk_is_copied_and_streamed_by_its_drive(context):
    top = chain(context, 32 * MIB)
    vm, qmp = start(context, "-drive", f"file={top},format=qcow2,if=none,id=d,discard=unmap", "-device",
                    "virtio-blk-pci,drive=d,id=vd", *context.run(WAIT_FOR_DISK + Shell.COMMAND))
    shell = Shell(vm)

    def write_some(seed):
        """Here and there, so that all layers still show."""
        shell.run("; ".join(f"dd if=/dev/urandom of=/dev/vda bs=4096 count=100 seek={place + 37 * seed} conv=fsync 2> /dev/null"
                            for place in range(0, 8000, 1300)))
        return shell.digest("/dev/vda")

    # Backups show the moment when they began.
    before = shell.digest("/dev/vda")
    for seed, sync in enumerate(("full", "top", "none")):
        target = context.path(f"backup-{sync}.qcow2")
        qmp.call("drive-backup", device="d", target=target, sync=sync, format="qcow2", speed=65536)
        after = write_some(seed)
        if sync == "none":
            qmp.call("block-job-cancel", device="d")
            job_event(qmp, "BLOCK_JOB_CANCELLED", "d")
        else:
            qmp.call("block-job-set-speed", device="d", speed=0)
            job_event(qmp, "BLOCK_JOB_COMPLETED", "d")
        expect_equal(contents_of_chain(target), before, f"the contents of the backup with sync={sync}")
        before = after

    # The disk goes over to a copy that stands on the same images, which then become its own.
    mirror = context.path("mirror.qcow2")
    shell.start("diskload /dev/vda 2000")
    qmp.call("drive-mirror", device="d", target=mirror, sync="top", format="qcow2")
    job_event(qmp, "BLOCK_JOB_READY", "d")
    qmp.call("block-job-complete", device="d")
    job_event(qmp, "BLOCK_JOB_COMPLETED", "d")
    expect_equal((inserted(qmp)["file"], inserted(qmp)["backing_file_depth"]), (mirror, 2), "the disk after the mirror")
    qmp.call("block-stream", device="d", base=context.path("base.qcow2"))
    job_event(qmp, "BLOCK_JOB_COMPLETED", "d")
    expect_equal((inserted(qmp)["backing_file_depth"], inserted(qmp)["backing_file"]), (1, context.path("base.qcow2")),
                 "the chain after a stream from the middle")
    qmp.call("block-stream", device="d")
    job_event(qmp, "BLOCK_JOB_COMPLETED", "d")
    expect_equal(inserted(qmp)["backing_file_depth"], 0, "the chain after a stream of all")
    load_ends(vm)
    shell.finish()
    after = shell.digest("/dev/vda")
    qmp.call("quit")
    vm.expect_exit(0)
    check(mirror)
    expect_equal(contents(mirror), after, "the image at the end")
    expect_equal("backing-filename" in json.loads(tool("qemu-img", "info", "--output=json", mirror)), False,
                 "a backing file recorded in the image at the end")


@test()
def disk_moves_to_a_copy_that_gets_its_chain_late(context):
    """The layers below are copied by others while the top one is mirrored to an image that isn't on them yet."""
    top = chain(context, 32 * MIB)
    vm, qmp = start(context, *disk(top), *context.run(WAIT_FOR_DISK + Shell.COMMAND))
    shell = Shell(vm)
    for number, mode in enumerate(("background", "write-blocking")):
        node, below = f"copy{number}", f"below{number}"
        path, lower = context.path(f"{node}.qcow2"), context.path(f"{below}.qcow2")
        tool("cp", context.path("middle.qcow2"), lower)
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", lower, "-F", "qcow2", "-o", "cluster_size=256k", path)
        qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": node, "backing": None, "discard": "unmap",
                                    "file": {"driver": "file", "filename": path}})
        shell.start("diskload /dev/vda 1500")
        qmp.call("blockdev-mirror", **{"job-id": "m", "device": inserted(qmp)["node-name"], "target": node, "sync": "top", "copy-mode": mode})
        job_event(qmp, "BLOCK_JOB_READY", "m")
        load_ends(vm)
        shell.finish()
        qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": below, "read-only": True, "file": {"driver": "file", "filename": lower}})
        qmp.call("transaction", actions=[{"type": "blockdev-snapshot", "data": {"node": below, "overlay": node}}])
        qmp.call("block-job-complete", device="m")
        job_event(qmp, "BLOCK_JOB_COMPLETED", "m")
        expect_equal((inserted(qmp)["node-name"], inserted(qmp)["backing_file_depth"]), (node, 2), "the disk after the mirror")
        expect_equal(contents_of_chain(path), shell.digest("/dev/vda"), f"the contents of the copy, {mode}")
    qmp.call("quit")
    vm.expect_exit(0)
    for number in range(2):
        check(context.path(f"copy{number}.qcow2"))


def expect_about(actual, wanted, what):
    if abs(actual - wanted) > wanted / 10:
        raise Failure(f"{what}: {actual:.1f}, not within 10 % of {wanted}")


def node(name, path, **more):
    """-blockdev's JSON for a raw image that is reopened later: its file has a name."""
    return ["-blockdev", json.dumps({"driver": "file", "node-name": name + "-file", "filename": path, "discard": "unmap"}),
            "-blockdev", json.dumps({"driver": "raw", "node-name": name, "file": name + "-file", **more})]


def device(name, drive):
    return ["-device", f"virtio-blk-pci,drive={drive},id={name}"]


@test()
def disks_keep_their_limits_and_give_space_back(context):
    # Each disk is for one thing: a, space that a file system gives back; b, zeros; c, copy-on-read; d and e, limits.
    paths = {name: context.disk(name + ".img", 32) for name in "abde"}
    tool("mke2fs", "-q", "-F", "-t", "ext4", paths["a"])
    with open(paths["b"], "wb") as file:
        file.write(b"\xff" * 16 * MIB)
    base = create(context, "base.qcow2", 16 * MIB)
    tool("qemu-io", "-c", "write -q -P 5 0 16M", base)
    overlay = create(context, "overlay.qcow2", backing=base)
    vm, qmp = start(
        context, "-object", "throttle-group,id=group,x-iops-total=150", *node("na", paths["a"]),
        "-drive", f"file={paths['b']},format=raw,if=none,id=b,discard=unmap,detect-zeroes=unmap",
        "-drive", f"file={overlay},format=qcow2,if=none,id=c,copy-on-read=on", "-blockdev",
        f"driver=throttle,node-name=nd,throttle-group=group,file.driver=raw,file.file.driver=file,file.file.filename={paths['d']}",
        "-drive", f"file={paths['e']},format=raw,if=none,id=e", *device("da", "na"), *device("db", "b"), *device("dc", "c"),
        *device("dd", "nd"), *device("de", "e"), *context.run(WAIT_FOR_DISK + Shell.COMMAND))
    shell = Shell(vm)

    # Without discard=unmap requests to give space back are taken and ignored.
    mount, umount = "mount -t ext4 /dev/vda /mnt", "umount /mnt"
    shell.run(f"mkdir -p /mnt; {mount} && yes | head -c 16777216 > /mnt/file && sync && rm /mnt/file && sync && fstrim /mnt; {umount}")
    full = allocated(paths["a"])
    if full < 16 * MIB:
        raise Failure(f"the file took {full} bytes after fstrim with discard=ignore")
    qmp.call("blockdev-reopen", options=[{"driver": "raw", "node-name": "na", "discard": "unmap", "file": "na-file"}])
    shell.run(f"{mount} && fstrim /mnt; {umount}")
    if allocated(paths["a"]) > full - 15 * MIB:
        raise Failure(f"the file takes {allocated(paths['a'])} bytes, {full} before fstrim with discard=unmap")

    shell.run("dd if=/dev/zero of=/dev/vdb bs=1048576 count=16 conv=fsync 2> /dev/null")
    if allocated(paths["b"]) > MIB:
        raise Failure(f"zeros with detect-zeroes=unmap take {allocated(paths['b'])} bytes")

    shell.run("dd if=/dev/vdc of=/dev/null bs=1048576 count=8 2> /dev/null")

    # Few enough that a machine which is busy otherwise gets so far.
    shell.start("diskload /dev/vdd")
    expect_about(measured_iops(vm, qmp, "dd"), 150, "requests a second with a throttle group")
    vm.send("stop\n")
    load_ends(vm)
    shell.start("diskload /dev/vde")
    limits = dict.fromkeys(["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"], 0)
    for limit in 100, 200:
        qmp.call("block_set_io_throttle", id="de", **{**limits, "iops": limit})
        expect_about(measured_iops(vm, qmp, "de"), limit, "requests a second with a limit set meanwhile")
    qmp.call("block_set_io_throttle", id="de", **limits)
    vm.send("stop\n")
    load_ends(vm)
    qmp.call("quit")
    vm.expect_exit(0)
    check(overlay)
    copied = sum(extent["length"] for extent in json.loads(tool("qemu-img", "map", "--output=json", overlay))
                 if extent["depth"] == 0 and extent["data"])
    if not 8 * MIB <= copied < 16 * MIB:
        raise Failure(f"copy-on-read copied {copied} bytes of 8 MiB read")
    expect_equal(contents(overlay), contents(base), "the contents after copy-on-read")
